"""Gradients of weights behind tokens that are rebuilt from the map; see `_transformer_bwd`.

A program sums one tap of the tokens over a chunk of them and leaves its part of a row; the rows are
added in fixed order, so the gradients are the same in every run.
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
    tap_weights,
    token_tap,
    token_tile,
    width_blocks,
    width_limit,
    zero_blocks,
)

__all__ = ["OPTIONS", "STATS", "TILE", "weight_sums"]

OPTIONS = {"num_warps": 4, "num_stages": 1}
TILE, CHUNKS = 32, 32
"""Tokens of a program; rows of partial sums at most."""
STATS = tl.constexpr(4)
"""Numbers of a token: rstd, -rstd^2 (g . q) / K, -rstd (g . u) / K, mean."""


@triton.jit
def _token_gradient(t, g, stats_ptr, row, ok, w_ptr, tap, C: tl.constexpr, CP: tl.constexpr,
                    L: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """z and dt of one tap, `[P, CP]`, zero in rows that are not `ok` and from channel C on."""
    stats = stats_ptr + row * STATS
    rstd = tl.load(stats, mask=ok, other=0.0)[:, None]
    slope = tl.load(stats + 1, mask=ok, other=0.0)[:, None]
    offset = tl.load(stats + 2, mask=ok, other=0.0)[:, None]
    mean = tl.load(stats + 3, mask=ok, other=0.0)[:, None]
    back = tl.zeros(t.shape, tl.float32)
    for b in tl.static_range(len(BLOCKS)):
        k = columns(BLOCKS, b)
        back = dot(g[b], tap_weights(w_ptr, k, tap, L, C, CP), back, PRECISION)
    real = (tl.arange(0, CP) < C)[None, :]
    return (
        tl.where(real, (t - mean) * rstd, 0.0),
        tl.where(real, back * rstd + offset + (t - mean) * slope, 0.0),
    )


@triton.jit
def _outer(t, rows, acc, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + t^T rows, a tile `[CP, width]` for each block."""
    added = ()
    for b in tl.static_range(len(BLOCKS)):
        added += (dot(tl.trans(t.to(rows[b].dtype)), rows[b], acc[b], PRECISION),)
    return added


@triton.jit
def _store_outer(ptr, acc, tap, C: tl.constexpr, CP: tl.constexpr, SIZE: tl.constexpr,
                 BLOCKS: tl.constexpr):  # fmt: skip
    """Rows `c * 9 + tap` of a gradient `[9 C, SIZE]`."""
    c = tl.arange(0, CP)
    for b in tl.static_range(len(BLOCKS)):
        k = columns(BLOCKS, b)
        mask = (c < C)[:, None] & (k < SIZE)[None, :]
        tl.store(ptr + (c * 9 + tap)[:, None] * SIZE + k[None, :], acc[b], mask=mask)


@triton.jit(do_not_specialize=["N", "H", "W", "tiles"])
def _token_bwd_weights_kernel(
    x_ptr, a_ptr, proj_ptr, bias_ptr, g_ptr, back_ptr, stats_ptr, partial_ptr, N, H, W, tiles,
    stride_n, stride_h, stride_w, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
    A_BLOCKS: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """sum z g^T `[9 C, L]`, sum dt a^T `[9 C, M]` and sum dt `[9 C]` of `tiles` tiles of tokens.

    Without NORM z and dt are both unfold(x).
    """
    tap = tl.program_id(0) % 9
    chunk = tl.program_id(0) // 9
    last = tl.minimum((chunk + 1) * tiles, N * tl.cdiv(H * W, P))
    sums = tl.zeros((CP,), tl.float32)
    outer_g = zero_blocks(CP, BLOCKS)
    outer_a = zero_blocks(CP, A_BLOCKS)
    for tile in range(chunk * tiles, last):
        n, token, y, x = token_tile(tile, H, W, P)
        row = n * H * W + token
        ok = y < H
        a = load_blocks(a_ptr, row, ok, M, A_BLOCKS)
        g = load_blocks(g_ptr, row, ok, L, BLOCKS)
        if NORM:
            t = token_tap(x_ptr, a, proj_ptr, bias_ptr, n, y, x, tap, H, W, stride_n, stride_h,
                          stride_w, C, CP, M, A_BLOCKS, PRECISION)  # fmt: skip
            z, t = _token_gradient(t, g, stats_ptr, row, ok, back_ptr, tap, C, CP, L, BLOCKS,
                                   PRECISION)  # fmt: skip
        else:
            t = token_tap(x_ptr, (), None, None, n, y, x, tap, H, W, stride_n, stride_h, stride_w,
                          C, CP, 0, (), PRECISION)  # fmt: skip
            t = tl.where(ok[:, None], t, 0.0)
            z = t
        outer_g = _outer(z, g, outer_g, BLOCKS, PRECISION)
        outer_a = _outer(t, a, outer_a, A_BLOCKS, PRECISION)
        sums += tl.sum(t, axis=0)
    partial = partial_ptr + chunk.to(tl.int64) * (9 * C * (L + M + 1))
    _store_outer(partial, outer_g, tap, C, CP, L, BLOCKS)
    _store_outer(partial + 9 * C * L, outer_a, tap, C, CP, M, A_BLOCKS)
    c = tl.arange(0, CP)
    tl.store(partial + 9 * C * (L + M) + c * 9 + tap, sums, mask=c < C)


def weight_sums(
    x: Tensor, a: Tensor, g: Tensor, proj: tuple, back: Tensor | None, stats: Tensor | None,
    has_a: bool, product: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the weights kernel and sum its rows: `[9 C, L]`, `[9 C, M]`, `[9 C]`, float32."""
    n, c, h, w = x.shape
    inner, width = a.shape[2] if has_a else 0, g.shape[2]
    tiles, limit = n * triton.cdiv(h * w, TILE), width_limit(product)
    each = triton.cdiv(tiles, CHUNKS)
    rows = triton.cdiv(tiles, each)
    partial = x.new_empty((rows, 9 * c * (width + inner + 1)), dtype=torch.float32)
    launch(
        _token_bwd_weights_kernel,
        9 * rows,
        *(x, a, *proj, g, back, stats, partial, n, h, w, each, *map_strides(x)),
        **channel_tiles(x),
        M=inner,
        A_BLOCKS=width_blocks(inner, limit),
        L=width,
        BLOCKS=width_blocks(width, limit),
        NORM=stats is not None,
        PRECISION=product,
        P=TILE,
        **OPTIONS,
    )
    sums = [partial.new_empty(shape) for shape in ((9 * c, width), (9 * c, inner), (9 * c,))]
    sum_rows(partial, sums)
    return tuple(sums)
