"""Numbers that the backward keeps of every token; see `_transformer_bwd`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import dot, launch, map_strides
from ._token_tiles import (
    channel_tiles,
    columns,
    fold_norm,
    load_blocks,
    merge_tap,
    normed_linear,
    padded_width,
    tap_weights,
    token_tap,
    token_tile,
    width_blocks,
    width_limit,
)
from ._token_weights import MEAN, OFFSET, OPTIONS, RSTD, SLOPE, STATS, TILE

__all__ = ["linear_stats", "token_stats"]


@triton.jit
def _store_stats(stats_ptr, row, ok, mean, rstd, along, across, K: tl.constexpr):
    """The numbers of tokens from g . u (`along`) and g . q (`across`)."""
    stats = stats_ptr + row * STATS
    tl.store(stats + RSTD, rstd, mask=ok)
    tl.store(stats + SLOPE, -rstd * rstd * across / K, mask=ok)
    tl.store(stats + OFFSET, -rstd * along / K, mask=ok)
    tl.store(stats + MEAN, mean, mask=ok)


@triton.jit(do_not_specialize=["H", "W"])
def _token_bwd_rows_kernel(
    x_ptr, w_ptr, uv_ptr, g_ptr, stats_ptr, out_ptr, H, W, stride_n, stride_h, stride_w, eps,
    C: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The numbers of every token of unfold(x), and what the Linear gave."""
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    row = n * H * W + token
    ok = y < H
    normed, mean, rstd = normed_linear(x_ptr, (), None, None, w_ptr, uv_ptr, n, y, x, H, W,
                                       stride_n, stride_h, stride_w, eps, C, CP, 0, (), BLOCKS,
                                       LP, PRECISION)  # fmt: skip
    along = tl.zeros((P,), tl.float32)
    across = tl.zeros((P,), tl.float32)
    for b in tl.static_range(len(BLOCKS)):
        column = columns(BLOCKS, b)
        mask = ok[:, None] & (column < L)[None, :]
        # One block at a time, behind the taps: all of g at once spills.
        grad = tl.load(g_ptr + row[:, None] * L + column[None, :], mask, 0.0).to(tl.float32)
        along += tl.sum(grad * tl.load(uv_ptr + column)[None, :], axis=1)
        across += tl.sum(grad * normed[b], axis=1)
        out = normed[b] + tl.load(uv_ptr + LP + column)[None, :]
        pointers = out_ptr + row[:, None] * L + column[None, :]
        tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=mask)
    _store_stats(stats_ptr, row, ok, mean, rstd, along, across, 9 * C)


@triton.jit(do_not_specialize=["H", "W"])
def _token_bwd_stats_kernel(
    x_ptr, a_ptr, proj_ptr, bias_ptr, g_ptr, back_ptr, stats_ptr, H, W,
    stride_n, stride_h, stride_w, eps, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
    A_BLOCKS: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The numbers of every token of unfold(x) + W a + b.

    g . u and g . q are sums over gamma W^T g, so nothing is kept that is as wide as g.
    """
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    row = n * H * W + token
    ok = y < H
    a = load_blocks(a_ptr, row, ok, M, A_BLOCKS)
    g = load_blocks(g_ptr, row, ok, L, BLOCKS)
    shift = tl.zeros((P,), tl.float32)
    mean = tl.zeros((P,), tl.float32)
    m2 = tl.zeros((P,), tl.float32)
    along = tl.zeros((P,), tl.float32)
    across = tl.zeros((P,), tl.float32)
    for i in tl.range(9, disable_licm=True):  # as in normed_linear
        tap = (i + 4) % 9
        t = token_tap(x_ptr, a, proj_ptr, bias_ptr, n, y, x, tap, H, W, stride_n, stride_h,
                      stride_w, C, CP, M, A_BLOCKS, PRECISION)  # fmt: skip
        shift = tl.where(i == 0, tl.sum(t, axis=1) / C, shift)
        t = tl.where((tl.arange(0, CP) < C)[None, :], t - shift[:, None], 0.0)
        back = tl.zeros((P, CP), tl.float32)
        for b in tl.static_range(len(BLOCKS)):
            k = columns(BLOCKS, b)
            back = dot(g[b], tap_weights(back_ptr, k, tap, L, C, CP), back, PRECISION)
        mean, m2 = merge_tap(mean, m2, t, i, C, CP)
        along += tl.sum(back, axis=1)
        across += tl.sum(back * t, axis=1)
    rstd = 1.0 / tl.sqrt(m2 / (9 * C) + eps)
    across = (across - mean * along) * rstd
    _store_stats(stats_ptr, row, ok, shift + mean, rstd, along, across, 9 * C)


def _empty(x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.new_empty((n * h * w, STATS.value), dtype=torch.float32)


def _sizes(x: Tensor, g: Tensor, tile: int, product: str) -> dict[str, object]:
    width = g.shape[2]
    sizes = channel_tiles(x) | {"L": width, "BLOCKS": width_blocks(width, width_limit(product))}
    return sizes | {"PRECISION": product, "P": tile} | OPTIONS


def linear_stats(
    x: Tensor, g: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float, product: str
) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens unfold(x), and their W LN(t) `[N, T, L]`."""
    n, _, h, w = x.shape
    stats, out = _empty(x), torch.empty_like(g)
    launch(
        _token_bwd_rows_kernel,
        n * triton.cdiv(h * w, TILE),
        *(x, *fold_norm(weight, gamma, beta, None, x.dtype), g, stats, out),
        *(h, w, *map_strides(x), eps),
        **_sizes(x, g, TILE, product),
        LP=padded_width(g.shape[2]),
    )
    return stats, out


def token_stats(
    x: Tensor, a: Tensor, g: Tensor, proj: tuple[Tensor, Tensor], back: Tensor, eps: float,
    product: str,
) -> Tensor:  # fmt: skip
    """Numbers of the tokens unfold(x) + W a + b.

    Args:
        proj: W and b.
        back: gamma W^T of the Linear behind the norm, `[9 C, L]`.
    """
    n, _, h, w = x.shape
    stats, tile = _empty(x), TILE // 2  # 32 tokens spill in float32
    launch(
        _token_bwd_stats_kernel,
        n * triton.cdiv(h * w, tile),
        *(x, a, *proj, g, back, stats, h, w, *map_strides(x), eps),
        **_sizes(x, g, tile, product),
        M=a.shape[2],
        A_BLOCKS=width_blocks(a.shape[2], width_limit(product)),
    )
    return stats
