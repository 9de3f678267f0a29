"""Sums of outer products over tokens that are rebuilt from the map; see `_transformer_bwd`.

A program sums a chunk of the tokens for a few rows and columns of the result, so that what it holds
stays in registers, and leaves its part of a row; the rows are added in fixed order, so the
gradients are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import dot, launch, map_strides
from ._reduce import sum_rows
from ._token_tiles import (
    channel_tiles,
    columns,
    load_blocks,
    load_pixels,
    token_tile,
    width_blocks,
    width_limit,
    zero_blocks,
)

__all__ = ["MEAN", "OFFSET", "OPTIONS", "RSTD", "SLOPE", "STATS", "TILE", "outer_sums"]

OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255}
"""Without `maxnreg` ptxas spills a few values where one more block then fits."""
TILE, CHUNKS = 32, 64
"""Tokens of a program at a time; rows of partial sums at most."""
GROUP = tl.constexpr(48)
"""Columns of a program, a third of the network's 144: it reads as much of three taps of the map."""
STATS = tl.constexpr(4)
RSTD, SLOPE, OFFSET, MEAN = (tl.constexpr(i) for i in range(4))
"""Numbers of a token: rstd, -rstd^2 (g . q) / K, -rstd (g . u) / K, mean."""


@triton.jit
def _zeros(LEFT: tl.constexpr, BLOCKS: tl.constexpr, i: tl.constexpr):
    """What the columns of left tile i are summed in: `[width]`, and a tile for each block."""
    WIDTH: tl.constexpr = LEFT[i]
    return tl.zeros((WIDTH,), tl.float32), zero_blocks(WIDTH, BLOCKS)


@triton.jit
def _left_tiles(
    x_ptr, left_ptr, stats_ptr, part, n, row, y, x, H, W, stride_n, stride_h, stride_w,
    SCALE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Three taps of unfold(x) - mean, or a group of columns of `left`, times number SCALE."""
    ok = y < H
    scale = ok.to(tl.float32)[:, None]
    tiles = ()
    if left_ptr is None:
        mean = 0.0
        if stats_ptr is not None:
            scale = tl.load(stats_ptr + row * STATS + SCALE, mask=ok, other=0.0)[:, None]
            mean = tl.load(stats_ptr + row * STATS + MEAN, mask=ok, other=0.0)[:, None]
        for i in tl.static_range(3):
            t = load_pixels(x_ptr, n, y + (part - 1), x + (i - 1), H, W, stride_n, stride_h,
                            stride_w, C, CP)  # fmt: skip
            tiles += ((t - mean) * scale,)
    else:
        scale = tl.load(stats_ptr + row * STATS + SCALE, mask=ok, other=0.0)[:, None]
        loaded = load_blocks(left_ptr, row, ok, K, BLOCKS, part * GROUP)
        for i in tl.static_range(len(BLOCKS)):
            tiles += (loaded[i].to(tl.float32) * scale,)
    return tiles


@triton.jit
def _left_index(left_ptr, part, i: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                BLOCKS: tl.constexpr):  # fmt: skip
    """Rows of the result that columns of tile i of `_left_tiles` belong to; from 9 C on none."""
    if left_ptr is None:
        c = tl.arange(0, CP)
        index = tl.where(c < C, c, CP) * 9 + part * 3 + i
    else:
        index = part * GROUP + columns(BLOCKS, i)
    return index


@triton.jit(do_not_specialize=["N", "H", "W", "tiles"])
def _token_bwd_outer_kernel(
    x_ptr, left_ptr, right_ptr, stats_ptr, partial_ptr, N, H, W, tiles,
    stride_n, stride_h, stride_w, SCALE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    K: tl.constexpr, L: tl.constexpr, PARTS: tl.constexpr, GROUPS: tl.constexpr,
    LEFT: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """sum s l r^T `[K, L]` and sum s l `[K]` of `tiles` tiles of tokens.

    s is number SCALE of a token, 1 without `stats_ptr`; l its row of `left_ptr`, without that of
    unfold(x) - mean; r its row of `right_ptr`.
    """
    part = tl.program_id(0) % PARTS
    group = tl.program_id(0) // PARTS % GROUPS
    chunk = tl.program_id(0) // (PARTS * GROUPS)
    last = tl.minimum((chunk + 1) * tiles, N * tl.cdiv(H * W, P))
    sums, acc = (), ()
    for i in tl.static_range(len(LEFT)):
        total, products = _zeros(LEFT, BLOCKS, i)
        sums += (total,)
        acc += products
    for tile in range(chunk * tiles, last):
        n, token, y, x = token_tile(tile, H, W, P)
        row = n * H * W + token
        right = load_blocks(right_ptr, row, y < H, L, BLOCKS, group * GROUP)
        left = _left_tiles(x_ptr, left_ptr, stats_ptr, part, n, row, y, x, H, W, stride_n,
                           stride_h, stride_w, SCALE, C, CP, K, BLOCKS)  # fmt: skip
        summed, added = (), ()
        for i in tl.static_range(len(LEFT)):
            summed += (sums[i] + tl.sum(left[i], axis=0),)
            turned = tl.trans(left[i].to(right_ptr.dtype.element_ty))
            for b in tl.static_range(len(BLOCKS)):
                added += (dot(turned, right[b], acc[i * len(BLOCKS) + b], PRECISION),)
        sums = summed
        acc = added
    partial = partial_ptr + chunk.to(tl.int64) * (K * (L + 1))
    for i in tl.static_range(len(LEFT)):
        index = _left_index(left_ptr, part, i, C, CP, BLOCKS)
        tl.store(partial + K * L + index, sums[i], mask=(index < K) & (group == 0))
        for b in tl.static_range(len(BLOCKS)):
            column = group * GROUP + columns(BLOCKS, b)
            mask = (index < K)[:, None] & (column < L)[None, :]
            pointers = partial + index[:, None] * L + column[None, :]
            tl.store(pointers, acc[i * len(BLOCKS) + b], mask=mask)


def _partial(
    x: Tensor, left: Tensor | None, right: Tensor, stats: Tensor | None, scale: int, product: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Launch the kernel; its table, and empty tensors for the sums of the table's columns."""
    n, c, h, w = x.shape
    size, width = 9 * c if left is None else left.shape[2], right.shape[2]
    # Operands of float32 take twice the registers: 32 tokens of them spill.
    tile = TILE // 2 if x.dtype == torch.float32 else TILE
    tiles = n * triton.cdiv(h * w, tile)
    each = triton.cdiv(tiles, CHUNKS)
    chunks = triton.cdiv(tiles, each)
    partial = x.new_empty((chunks, size * (width + 1)), dtype=torch.float32)
    shape = channel_tiles(x)
    blocks = width_blocks(GROUP.value, width_limit(product))
    parts = 3 if left is None else triton.cdiv(size, GROUP.value)
    groups = triton.cdiv(width, GROUP.value)
    launch(
        _token_bwd_outer_kernel,
        chunks * groups * parts,
        *(x, left, right, stats, partial, n, h, w, each, *map_strides(x)),
        **shape,
        SCALE=scale,
        K=size,
        L=width,
        PARTS=parts,
        GROUPS=groups,
        LEFT=(shape["CP"],) * 3 if left is None else tuple(width for _, width in blocks),
        BLOCKS=blocks,
        PRECISION=product,
        P=tile,
        **OPTIONS,
    )
    return partial, (partial.new_empty((size, width)), partial.new_empty((size,)))


def outer_sums(
    x: Tensor, stats: Tensor | None, product: str, *wanted: tuple[Tensor | None, Tensor, int]
) -> list[Tensor]:
    """One or two sums of outer products and what is left of them without the right factor.

    Args:
        stats: Numbers of the tokens; without them s = 1 and mean = 0.
        wanted: (left, right, number) for each: sum s l r^T `[K, L]` and sum s l `[K]`, float32,
            with rows l of `left`, for None those of unfold(x) - mean, and s that number of a token.
    """
    tables = [_partial(x, left, right, stats, scale, product) for left, right, scale in wanted]
    sum_rows(*(each for table in tables for each in table))
    return [out for _, outs in tables for out in outs]
