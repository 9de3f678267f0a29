"""Backward of the kernels around attention; tokens are rebuilt from the map again, never stored.

With g the gradient behind a Linear W after the LayerNorm of tokens t, z = (t - mean) rstd and
K = 9 C, the gradient of a token is

    dt = rstd (gamma W^T g - (g . u) / K - z (g . q) / K),    q = W gamma z,  u = W gamma 1,

so one kernel over the tokens leaves four numbers for each. The gradient of the map is then the fold
of dt, gathered by pixels; those of the weights follow from sum g z^T, summed by chunks of tokens in
fixed order. With the numbers known all of it is linear in t = unfold(x) + W a + b: the terms of x,
a and b are summed apart, and no tap needs the projection again. Products of whole matrices that
PyTorch has as such are left to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._emha_bwd import precision
from ._launch import dot, empty_map, launch, map_strides, readable
from ._token_stats import linear_stats, token_stats
from ._token_tiles import (
    channel_tiles,
    columns,
    fold_rows,
    inside_map,
    load_pixels,
    tap_weights,
    token_tile,
    width_blocks,
    width_limit,
    zero_blocks,
)
from ._token_weights import MEAN, OFFSET, OPTIONS, RSTD, SLOPE, STATS, TILE, outer_sums
from .reference import relu_backward

__all__ = ["token_fold_backward", "token_hidden_backward", "token_qkv_backward"]


@triton.jit(do_not_specialize=["H", "W"])
def _token_bwd_map_kernel(
    x_ptr, a_ptr, proj_ptr, bias_ptr, g_ptr, back_ptr, stats_ptr, out_ptr, H, W,
    stride_n, stride_h, stride_w, stride_on, stride_oh, stride_ow,
    C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, A_BLOCKS: tl.constexpr,
    L: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Fold of the gradients of the tokens."""
    n, _, y, x = token_tile(tl.program_id(0), H, W, P)
    c = tl.arange(0, CP)
    center = load_pixels(x_ptr, n, y, x, H, W, stride_n, stride_h, stride_w, C, CP)
    acc = tl.zeros((P, CP), tl.float32)
    for tap in range(9):
        row = y + (1 - tap // 3)
        column = x + (1 - tap % 3)
        ok = inside_map(row, column, H, W)
        stats = stats_ptr + ((n * H + row) * W + column) * STATS
        slope = tl.load(stats + SLOPE, mask=ok, other=0.0)[:, None]
        offset = tl.load(stats + OFFSET, mask=ok, other=0.0)[:, None]
        mean = tl.load(stats + MEAN, mask=ok, other=0.0)[:, None]
        t = center - mean
        if len(A_BLOCKS) > 0:
            t += tl.load(bias_ptr + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)[None, :]
        acc += t * slope + offset
    acc = fold_rows(acc, g_ptr, stats_ptr + RSTD, back_ptr, n, y, x, H, W, C, CP, L, BLOCKS, STATS,
                    PRECISION)  # fmt: skip
    if len(A_BLOCKS) > 0:
        acc = fold_rows(acc, a_ptr, stats_ptr + SLOPE, proj_ptr, n, y, x, H, W, C, CP, M, A_BLOCKS,
                        STATS, PRECISION)  # fmt: skip
    out = out_ptr + n * stride_on + y.to(tl.int64)[:, None] * stride_oh
    out += x.to(tl.int64)[:, None] * stride_ow + c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(y < H)[:, None] & (c < C)[None, :])


@triton.jit
def _add_linear(acc, rows_ptr, row, ok, w_ptr, SIZE: tl.constexpr, M: tl.constexpr,
                BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + rows W, a tile for each of BLOCKS; weight `[SIZE, M]`."""
    for start in range(0, SIZE, BLOCK):
        k = start + tl.arange(0, BLOCK)
        real = (k < SIZE)[None, :]
        rows = tl.load(rows_ptr + row[:, None] * SIZE + k[None, :], ok[:, None] & real, 0.0)
        added = ()
        for b in tl.static_range(len(BLOCKS)):
            column = columns(BLOCKS, b)
            mask = (k < SIZE)[:, None] & (column < M)[None, :]
            w = tl.load(w_ptr + k[:, None] * M + column[None, :], mask, 0.0)
            added += (dot(rows, w, acc[b], PRECISION),)
        acc = added
    return acc


@triton.jit(do_not_specialize=["H", "W"])
def _unfold_linear_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, squares_ptr, g_ptr, mixed_ptr, total_ptr, stats_ptr, out_ptr,
    H, W, stride_n, stride_h, stride_w, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
    BLOCKS: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """unfold(x) W `[T, M]`, weight `[9 C, M]`; with `stats_ptr` dt W.

    Then t = unfold(x) + bias + W a, so dt W follows from products with W^T W (`squares_ptr`), with
    the weight behind the norm times W (`mixed_ptr`) and with 1 W (`total_ptr`).
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    ok = y < H
    row = n * H * W + token
    stats = stats_ptr
    if stats_ptr is not None:
        stats = stats_ptr + row * STATS
        mean = tl.load(stats + MEAN, mask=ok, other=0.0)[:, None]
    acc = zero_blocks(P, BLOCKS)
    for tap in range(9):
        t = load_pixels(x_ptr, n, y + (tap // 3 - 1), x + (tap % 3 - 1), H, W, stride_n, stride_h,
                        stride_w, C, CP)  # fmt: skip
        if stats_ptr is not None:
            c = tl.arange(0, CP)
            bias = tl.load(bias_ptr + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)
            t += bias[None, :] - mean
        added = ()
        for b in tl.static_range(len(BLOCKS)):
            k = columns(BLOCKS, b)
            w = tl.trans(tap_weights(w_ptr, k, tap, M, C, CP))
            added += (dot(t.to(dtype), w, acc[b], PRECISION),)
        acc = added
    if stats_ptr is not None:
        acc = _add_linear(acc, a_ptr, row, ok, squares_ptr, M, M, BLOCKS, BLOCK, PRECISION)
        rstd = tl.load(stats + RSTD, mask=ok, other=1.0)[:, None]
        slope = tl.load(stats + SLOPE, mask=ok, other=0.0)[:, None] / rstd
        scaled = ()
        for b in tl.static_range(len(BLOCKS)):
            scaled += (acc[b] * slope,)
        acc = _add_linear(scaled, g_ptr, row, ok, mixed_ptr, L, M, BLOCKS, BLOCK, PRECISION)
        offset = tl.load(stats + OFFSET, mask=ok, other=0.0)[:, None]
    for b in tl.static_range(len(BLOCKS)):
        k = columns(BLOCKS, b)
        out = acc[b]
        if stats_ptr is not None:
            total = tl.load(total_ptr + k, mask=k < M, other=0.0)
            out = out * rstd + offset * total[None, :]
        mask = ok[:, None] & (k < M)[None, :]
        tl.store(out_ptr + row[:, None] * M + k[None, :], out.to(dtype), mask=mask)


def _normed_backward(
    x: Tensor, a: Tensor | None, g: Tensor, proj: tuple, weight: Tensor, gamma: Tensor,
    beta: Tensor, eps: float, product: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Through Linear and LayerNorm of the tokens of x, with `a` of unfold(x) + proj(a).

    Args:
        g: Gradient behind the Linear, `[N, T, L]` in the dtype of x.
        proj: Weight and bias of the projection, or two None.

    Returns:
        Gradient of x; of `a`, or without it W LN(t) `[N, T, L]`; of the weight, gamma and beta;
        of the projection's weight and bias (empty without `a`).
    """
    n, c, h, w = x.shape
    width, has_a = weight.shape[0], a is not None
    inner, limit = a.shape[2] if has_a else 0, width_limit(product)
    back = (weight.float() * gamma.float()).t().to(x.dtype).contiguous()  # [9 C, L]
    if has_a:
        stats = token_stats(x, a, g, proj, back, eps, product)
    else:
        stats, out = linear_stats(x, g, weight, gamma, beta, eps, product)
    grad_x = empty_map(x, c)
    launch(
        _token_bwd_map_kernel,
        n * triton.cdiv(h * w, TILE),
        *(x, a if has_a else g, *proj, g, back, stats, grad_x),
        *(h, w, *map_strides(x), *map_strides(grad_x)),
        **channel_tiles(x),
        M=inner,
        A_BLOCKS=width_blocks(inner, limit),
        L=width,
        BLOCKS=width_blocks(width, limit),
        PRECISION=product,
        P=TILE,
        **OPTIONS,
    )
    grad_proj, grad_bias = (), ()
    if has_a:
        out = _unfold_linear(x, proj[0], proj[1], a, g, back, stats, product)
        outer, grad_proj, grad_bias = _weight_gradients(x, a, g, proj, back, stats, product)
    else:
        outer, _ = outer_sums(x, stats, product, (None, g, RSTD.value))
    total = g.sum((0, 1), dtype=torch.float32)
    grad_weight = outer.t() * gamma + torch.outer(total, beta.float())
    grad_gamma = (weight * outer.t()).sum(0)
    grad_beta = (weight * total[:, None]).sum(0)
    grads = grad_weight.to(weight.dtype), grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)
    return grad_x, out, *grads, grad_proj, grad_bias


def _weight_gradients(
    x: Tensor, a: Tensor, g: Tensor, proj: tuple[Tensor, Tensor], back: Tensor, stats: Tensor,
    product: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """sum z g^T, sum dt a^T and sum dt where t - mean = (unfold(x) - mean) + bias + W a.

    Sums over the tokens of each term, so that no tap of a token needs the projection again.
    """
    weight, bias, back = proj[0].float(), proj[1].float(), back.float()
    outer, _, sloped, sloped_x = outer_sums(
        x, stats, product, (None, g, RSTD.value), (None, a, SLOPE.value)
    )
    scaled, scaled_g, squares, sloped_a = outer_sums(
        x, stats, product, (g, a, RSTD.value), (a, a, SLOPE.value)
    )
    _, slope, offset, _ = stats.sum(0)
    outer += torch.outer(bias, scaled_g) + weight @ scaled.t()
    # sum offset a, with offset = -rstd (g . u) / K, u = W gamma 1
    constant = back.sum(0) @ scaled / -len(weight)
    grad_proj = sloped + torch.outer(bias, sloped_a) + weight @ squares + back @ scaled + constant
    grad_bias = sloped_x + bias * slope + weight @ sloped_a + back @ scaled_g + offset
    return outer, grad_proj, grad_bias


def _unfold_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, g: Tensor | None,
    back: Tensor | None, stats: Tensor | None, product: str,
) -> Tensor:  # fmt: skip
    """unfold(x) W `[N, T, M]`; with `stats` dt W, the gradient of `a`."""
    n, _, h, w = x.shape
    inner, limit = weight.shape[1], width_limit(product)
    out = x.new_empty((n, h * w, inner))
    matrices: tuple[Tensor | None, ...] = (None, None, None)
    if stats is not None:
        wide = weight.float()
        squares, mixed = (m.float().t() @ wide for m in (weight, back))
        matrices = squares.to(x.dtype), mixed.to(x.dtype), wide.sum(0)
    options = dict(OPTIONS)
    if stats is None and x.dtype != torch.float32:
        del options["maxnreg"]  # with it ptxas takes on more than fits
    launch(
        _unfold_linear_kernel,
        n * triton.cdiv(h * w, TILE),
        *(x, weight, bias, a, matrices[0], g, *matrices[1:], stats, out, h, w, *map_strides(x)),
        **channel_tiles(x),
        M=inner,
        BLOCKS=width_blocks(inner, limit),
        L=0 if g is None else g.shape[2],
        BLOCK=limit,
        PRECISION=product,
        P=TILE,
        **options,
    )
    return out


def _overlaps(x: Tensor) -> Tensor:
    """How many 3x3 patches cover each pixel, `[H, W]`."""
    places = (torch.arange(size, device=x.device) for size in x.shape[2:])
    rows, columns = (3 - (i == 0).float() - (i == i[-1]).float() for i in places)
    return rows[:, None] * columns


def token_qkv_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    reduce: Tensor,
    qkv: Tensor,
    eps: float,
    tf32: bool,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_qkv_backward`; arguments are valid."""
    x = readable(x)
    grad = grad.to(x.dtype)
    inner = (grad @ qkv.to(x.dtype)).contiguous()
    grad_x, reduced, *grads, _, _ = _normed_backward(
        x, None, inner, (None, None), reduce, gamma, beta, eps, precision(x, tf32)
    )
    grad_reduce, grad_gamma, grad_beta = grads
    grad_qkv = (grad.flatten(0, 1).t() @ reduced.flatten(0, 1)).to(qkv.dtype)
    return grad_x, grad_gamma, grad_beta, grad_reduce, grad_qkv


def token_hidden_backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    h: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    eps: float,
    tf32: bool,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_hidden_backward`; `h` is what the forward gave."""
    x, a = readable(x), a.contiguous()
    grad = relu_backward(h, grad).to(x.dtype).contiguous()
    proj = proj_weight.to(x.dtype).contiguous(), proj_bias.contiguous()
    grad_x, grad_a, *grads, grad_proj, grad_bias = _normed_backward(
        x, a, grad, proj, fc1_weight, gamma, beta, eps, precision(x, tf32)
    )
    grad_fc1, grad_gamma, grad_beta = grads
    return (
        *(grad_x, grad_a, grad_proj.to(proj_weight.dtype), grad_bias.to(proj_bias.dtype)),
        *(grad_gamma, grad_beta, grad_fc1),
        grad.sum((0, 1), dtype=torch.float32).to(fc1_bias.dtype),
    )


def token_fold_backward(
    grad: Tensor,
    a: Tensor,
    h: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    mean: bool,
    tf32: bool,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_fold_backward`."""
    product = precision(grad, tf32)
    count = _overlaps(grad)
    grad_x = empty_map(grad, grad.shape[1])
    grad_x.copy_(grad if mean else grad * count)
    tokens = readable(grad / count if mean else grad).to(grad.dtype)
    outs = [
        _unfold_linear(tokens, m.to(grad.dtype).contiguous(), *[None] * 5, product)
        for m in (proj_weight, fc2_weight)
    ]
    grad_proj, total, grad_fc2, _ = outer_sums(
        tokens, None, product, (None, a.contiguous(), 0), (None, h.contiguous(), 0)
    )
    return (
        *(grad_x, *outs, grad_proj.to(proj_weight.dtype), total.to(proj_bias.dtype)),
        *(grad_fc2.to(fc2_weight.dtype), total.to(fc2_bias.dtype, copy=True)),
    )
