"""Pieces of the kernels around attention: tokens are rebuilt from the map, never stored.

A tile is P consecutive tokens of one image, which are also P pixels. Of the 9 C values of a token
one tap, C values, is on chip at a time. Widths that are no power of two (144) are cut into blocks
of powers of two (4 x 32 + 16): BLOCKS holds (start, width) of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import dot, launch

__all__ = [
    "channel_tiles",
    "columns",
    "first_row",
    "fold_norm",
    "fold_rows",
    "inside_map",
    "load_blocks",
    "load_pixels",
    "merge_tap",
    "normed_linear",
    "overlaps",
    "padded_width",
    "tap_weights",
    "token_tap",
    "token_tile",
    "width_blocks",
    "width_limit",
    "zero_blocks",
]


def width_blocks(size: int, limit: int = 32) -> tuple[tuple[int, int], ...]:
    """`size` as (start, width) of powers of two from 16 to `limit`; the last may reach beyond."""
    blocks, start = [], 0
    while start < size:
        width = min(limit, max(16, 1 << (size - start).bit_length() - 1))
        blocks.append((start, width))
        start += width
    return tuple(blocks)


def width_limit(product: str) -> int:
    """Of blocks where two widths are on chip: three TF32 products take operands apart there."""
    return 16 if product == "tf32x3" else 32


def channel_tiles(x: Tensor) -> dict[str, int]:
    """C of a map `[N, C, H, W]` and CP, what its pixels are padded to on chip."""
    return {"C": x.shape[1], "CP": max(16, triton.next_power_of_2(x.shape[1]))}


def padded_width(size: int) -> int:
    """Where the last of `width_blocks` ends."""
    return -(-size // 16) * 16


@triton.jit
def columns(BLOCKS: tl.constexpr, b: tl.constexpr):
    """Columns of block b."""
    START: tl.constexpr = BLOCKS[b][0]
    WIDTH: tl.constexpr = BLOCKS[b][1]
    return START + tl.arange(0, WIDTH)


@triton.jit
def _zeros(ROWS: tl.constexpr, BLOCKS: tl.constexpr, b: tl.constexpr):
    WIDTH: tl.constexpr = BLOCKS[b][1]
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def zero_blocks(ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """A tile of zeros `[ROWS, width]` for each block."""
    tiles = ()
    for b in tl.static_range(len(BLOCKS)):
        tiles += (_zeros(ROWS, BLOCKS, b),)
    return tiles


@triton.jit
def token_tile(pid, H, W, P: tl.constexpr):
    """Image, tokens, rows and columns of program `pid`; rows from H on are none."""
    tiles = tl.cdiv(H * W, P)
    token = pid % tiles * P + tl.arange(0, P)
    return (pid // tiles).to(tl.int64), token, token // W, token % W


@triton.jit
def first_row(pid, H, W, P: tl.constexpr):
    """Row of the first token of program `pid` in a matrix of the tokens of all images."""
    tiles = tl.cdiv(H * W, P)
    return (pid // tiles).to(tl.int64) * H * W + pid % tiles * P


@triton.jit
def inside_map(y, x, H, W):
    return (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def overlaps(y, x, H, W):
    """How many 3x3 patches cover a pixel: 9 inside, 6 at edges, 4 in corners."""
    rows = 1 + (y > 0).to(tl.float32) + (y < H - 1).to(tl.float32)
    return rows * (1 + (x > 0).to(tl.float32) + (x < W - 1).to(tl.float32))


@triton.jit
def load_pixels(x_ptr, n, y, x, H, W, stride_n, stride_h, stride_w,
                C: tl.constexpr, CP: tl.constexpr):  # fmt: skip
    """Channels of pixels, `[P, CP]` float32; zero outside the map and from channel C on."""
    c = tl.arange(0, CP)
    offset = n * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    mask = inside_map(y, x, H, W)[:, None] & (c < C)[None, :]
    return tl.load(x_ptr + offset[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_blocks(ptr, row, ok, SIZE: tl.constexpr, BLOCKS: tl.constexpr, first=0):
    """Columns from `first` on of rows of SIZE values, a tile for each block.

    Zero where not `ok` and behind SIZE.
    """
    tiles = ()
    for b in tl.static_range(len(BLOCKS)):
        k = first + columns(BLOCKS, b)
        pointers = ptr + row[:, None] * SIZE + k[None, :]
        tiles += (tl.load(pointers, mask=ok[:, None] & (k < SIZE)[None, :], other=0.0),)
    return tiles


@triton.jit
def tap_weights(w_ptr, k, tap, SIZE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """Rows of one tap of a weight `[9 C, SIZE]`, channel-major: `[len(k), CP]`."""
    c = tl.arange(0, CP)
    pointers = w_ptr + (c * 9 + tap)[None, :] * SIZE + k[:, None]
    return tl.load(pointers, mask=(k < SIZE)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def token_tap(x_ptr, a, proj_ptr, bias_ptr, n, y, x, tap, H, W, stride_n, stride_h, stride_w,
              C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, A_BLOCKS: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One tap of the tokens, `[P, CP]` float32: of unfold(x), with A_BLOCKS + proj(a)."""
    t = load_pixels(
        x_ptr, n, y + (tap // 3 - 1), x + (tap % 3 - 1), H, W, stride_n, stride_h, stride_w, C, CP
    )
    if len(A_BLOCKS) > 0:
        c = tl.arange(0, CP)
        t += tl.load(bias_ptr + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)[None, :]
        for b in tl.static_range(len(A_BLOCKS)):
            k = columns(A_BLOCKS, b)
            t = dot(a[b], tap_weights(proj_ptr, k, tap, M, C, CP), t, PRECISION)
    return t


@triton.jit
def merge_tap(mean, m2, t, i, C: tl.constexpr, CP: tl.constexpr):
    """Mean and sum of squared differences from it of i taps, merged with those of the tap t (Chan).

    A tap outside the map counts as any other, with C values.
    """
    tap_mean = tl.sum(t, axis=1) / C
    apart = tl.where((tl.arange(0, CP) < C)[None, :], t - tap_mean[:, None], 0.0)
    step = tap_mean - mean
    part = 1.0 / (i + 1)
    m2 += tl.sum(apart * apart, axis=1) + step * step * (C * i * part)
    return mean + step * part, m2


@triton.jit
def normed_linear(x_ptr, a, proj_ptr, bias_ptr, w_ptr, uv_ptr, n, y, x, H, W,
                  stride_n, stride_h, stride_w, eps, C: tl.constexpr, CP: tl.constexpr,
                  M: tl.constexpr, A_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
                  LP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Linear of the normalised tokens without what is constant: W gamma (t - mean) rstd.

    One pass: t is shifted by the channel mean of one tap, which is at most 3 standard deviations
    from the mean of the token, so the product cancels no more than a digit however large the mean
    is. The statistics are merged from those of the taps and cancel nothing.

    Returns:
        A tile for each of BLOCKS; mean and 1 / deviation of every token.
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    P: tl.constexpr = y.shape[0]
    c = tl.arange(0, CP)
    shift = tl.zeros((P,), tl.float32)
    mean = tl.zeros((P,), tl.float32)
    m2 = tl.zeros((P,), tl.float32)
    acc = zero_blocks(P, BLOCKS)
    # Not hoisted: `a` in two TF32 parts, kept in registers over all taps, spills.
    for i in tl.range(9, disable_licm=True):
        tap = (i + 4) % 9  # from the centre, which is never padding
        t = token_tap(x_ptr, a, proj_ptr, bias_ptr, n, y, x, tap, H, W, stride_n, stride_h,
                      stride_w, C, CP, M, A_BLOCKS, PRECISION)  # fmt: skip
        shift = tl.where(i == 0, tl.sum(t, axis=1) / C, shift)
        t = tl.where((c < C)[None, :], t - shift[:, None], 0.0)
        mean, m2 = merge_tap(mean, m2, t, i, C, CP)
        added = ()
        for b in tl.static_range(len(BLOCKS)):
            column = columns(BLOCKS, b)
            w = tl.load(w_ptr + (tap * CP + c)[:, None] * LP + column[None, :])
            added += (dot(t.to(dtype), w, acc[b], PRECISION),)
        acc = added
    rstd = 1.0 / tl.sqrt(m2 / (9 * C) + eps)
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        u = tl.load(uv_ptr + columns(BLOCKS, b))
        out += ((acc[b] - mean[:, None] * u[None, :]) * rstd[:, None],)
    return out, shift + mean, rstd


@triton.jit
def fold_rows(acc, rows_ptr, scale_ptr, w_ptr, n, y, x, H, W, C: tl.constexpr, CP: tl.constexpr,
              SIZE: tl.constexpr, BLOCKS: tl.constexpr, SCALES: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """acc + fold of a Linear without bias of rows `[T, SIZE]`; weight `[9 C, SIZE]`.

    Args:
        scale_ptr: Factor of every row, SCALES values apart, or None.
    """
    for tap in range(9):
        row = y + (1 - tap // 3)
        column = x + (1 - tap % 3)
        ok = inside_map(row, column, H, W)
        token = (n * H + row) * W + column
        tiles = load_blocks(rows_ptr, token, ok, SIZE, BLOCKS)
        for b in tl.static_range(len(BLOCKS)):
            tile = tiles[b]
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + token * SCALES, mask=ok, other=0.0)
                tile = (tile.to(tl.float32) * scale[:, None]).to(tile.dtype)
            k = columns(BLOCKS, b)
            acc = dot(tile, tap_weights(w_ptr, k, tap, SIZE, C, CP), acc, PRECISION)
    return acc


@triton.jit
def _fold_norm_kernel(
    w_ptr, gamma_ptr, beta_ptr, bias_ptr, out_ptr, uv_ptr,
    C: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    c = tl.arange(0, CP)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    mask = (c < C)[:, None] & (column < L)[None, :]
    for tap in range(9):
        k = c * 9 + tap
        w = tl.load(w_ptr + column[None, :] * (9 * C) + k[:, None], mask=mask, other=0.0)
        w = w.to(tl.float32)
        gamma = tl.load(gamma_ptr + k, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + k, mask=c < C, other=0.0).to(tl.float32)
        folded = (w * gamma[:, None]).to(dtype)
        tl.store(out_ptr + (tap * CP + c)[:, None] * LP + column[None, :], folded)
        u += tl.sum(folded.to(tl.float32), axis=0)
        v += tl.sum(w * beta[:, None], axis=0)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + column, mask=column < L, other=0.0).to(tl.float32)
    tl.store(uv_ptr + column, u)
    tl.store(uv_ptr + LP + column, v)


def fold_norm(
    weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A Linear behind a LayerNorm as the kernels read it.

    Args:
        weight: `[L, 9 C]`, channel-major.

    Returns:
        W gamma, `[9, CP, LP]`, zero in the padding; its row sums and W beta + bias, `[2, LP]`.
    """
    size, channels = weight.shape[0], weight.shape[1] // 9
    padded, wide = max(16, triton.next_power_of_2(channels)), padded_width(size)
    out = weight.new_empty((9, padded, wide), dtype=dtype)
    uv = weight.new_empty((2, wide), dtype=torch.float32)
    launch(
        _fold_norm_kernel,
        wide // 16,
        *(weight.contiguous(), gamma.contiguous(), beta.contiguous()),
        *(None if bias is None else bias.contiguous(), out, uv),
        *(channels, padded, size, wide, 16),
        num_warps=4,
    )
    return out, uv
