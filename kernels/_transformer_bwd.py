"""Backward of the kernels around attention; tokens are rebuilt from the map again, never stored.

With g the gradient behind a Linear W after the LayerNorm of tokens t, z = (t - mean) rstd and
K = 9 C, the gradient of a token is

    dt = rstd (gamma W^T g - (g . u) / K - z (g . q) / K),    q = W gamma z,  u = W gamma 1,

so one kernel over the tokens leaves four numbers for each. The gradient of the map is then the fold
of dt, gathered by pixels; those of the weights follow from sum g z^T, summed by chunks of tokens in
fixed order. Products of whole matrices that PyTorch has as such are left to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._emha_bwd import precision
from ._launch import dot, empty_map, launch, map_strides, readable
from ._token_tiles import (
    channel_tiles,
    columns,
    fold_norm,
    fold_rows,
    inside_map,
    load_blocks,
    load_pixels,
    normed_linear,
    padded_width,
    tap_weights,
    token_tap,
    token_tile,
    width_blocks,
    width_limit,
    zero_blocks,
)
from ._token_weights import OPTIONS, STATS, TILE, weight_sums

__all__ = ["token_fold_backward", "token_hidden_backward", "token_qkv_backward"]


@triton.jit(do_not_specialize=["H", "W"])
def _token_bwd_rows_kernel(
    x_ptr, a_ptr, proj_ptr, bias_ptr, w_ptr, uv_ptr, g_ptr, back_ptr, stats_ptr, out_ptr, H, W,
    stride_n, stride_h, stride_w, eps, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
    A_BLOCKS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The numbers of every token; with `a` its gradient, else what the Linear gave."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    row = n * H * W + token
    ok = y < H
    a = load_blocks(a_ptr, row, ok, M, A_BLOCKS)
    g = load_blocks(g_ptr, row, ok, L, BLOCKS)
    normed, mean, rstd = normed_linear(x_ptr, a, proj_ptr, bias_ptr, w_ptr, uv_ptr, n, y, x, H, W,
                                       stride_n, stride_h, stride_w, eps, C, CP, M, A_BLOCKS,
                                       BLOCKS, LP, PRECISION)  # fmt: skip
    along = tl.zeros((P,), tl.float32)
    across = tl.zeros((P,), tl.float32)
    for b in tl.static_range(len(BLOCKS)):
        column = columns(BLOCKS, b)
        grad = g[b].to(tl.float32)
        along += tl.sum(grad * tl.load(uv_ptr + column)[None, :], axis=1)
        across += tl.sum(grad * normed[b], axis=1)
        if len(A_BLOCKS) == 0:
            out = normed[b] + tl.load(uv_ptr + LP + column)[None, :]
            mask = ok[:, None] & (column < L)[None, :]
            tl.store(out_ptr + row[:, None] * L + column[None, :], out.to(dtype), mask=mask)
    stats = stats_ptr + row * STATS
    slope = -rstd * rstd * across / (9 * C)
    offset = -rstd * along / (9 * C)
    tl.store(stats, rstd, mask=ok)
    tl.store(stats + 1, slope, mask=ok)
    tl.store(stats + 2, offset, mask=ok)
    tl.store(stats + 3, mean, mask=ok)
    if len(A_BLOCKS) > 0:
        acc = zero_blocks(P, A_BLOCKS)
        for tap in range(9):
            t = token_tap(x_ptr, a, proj_ptr, bias_ptr, n, y, x, tap, H, W, stride_n, stride_h,
                          stride_w, C, CP, M, A_BLOCKS, PRECISION)  # fmt: skip
            back = tl.zeros((P, CP), tl.float32)
            for b in tl.static_range(len(BLOCKS)):
                k = columns(BLOCKS, b)
                back = dot(g[b], tap_weights(back_ptr, k, tap, L, C, CP), back, PRECISION)
            dt = back * rstd[:, None] + offset[:, None] + (t - mean[:, None]) * slope[:, None]
            dt = tl.where((tl.arange(0, CP) < C)[None, :], dt, 0.0).to(dtype)
            added = ()
            for b in tl.static_range(len(A_BLOCKS)):
                k = columns(A_BLOCKS, b)
                w = tl.trans(tap_weights(proj_ptr, k, tap, M, C, CP))
                added += (dot(dt, w, acc[b], PRECISION),)
            acc = added
        for b in tl.static_range(len(A_BLOCKS)):
            k = columns(A_BLOCKS, b)
            mask = ok[:, None] & (k < M)[None, :]
            tl.store(out_ptr + row[:, None] * M + k[None, :], acc[b].to(dtype), mask=mask)


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
        slope = tl.load(stats + 1, mask=ok, other=0.0)[:, None]
        offset = tl.load(stats + 2, mask=ok, other=0.0)[:, None]
        mean = tl.load(stats + 3, mask=ok, other=0.0)[:, None]
        t = center - mean
        if len(A_BLOCKS) > 0:
            t += tl.load(bias_ptr + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)[None, :]
        acc += t * slope + offset
    acc = fold_rows(acc, g_ptr, stats_ptr, back_ptr, n, y, x, H, W, C, CP, L, BLOCKS, STATS,
                    PRECISION)  # fmt: skip
    if len(A_BLOCKS) > 0:
        acc = fold_rows(acc, a_ptr, stats_ptr + 1, proj_ptr, n, y, x, H, W, C, CP, M, A_BLOCKS,
                        STATS, PRECISION)  # fmt: skip
    out = out_ptr + n * stride_on + y.to(tl.int64)[:, None] * stride_oh
    out += x.to(tl.int64)[:, None] * stride_ow + c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(y < H)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["H", "W"])
def _unfold_linear_kernel(
    x_ptr, w_ptr, out_ptr, H, W, stride_n, stride_h, stride_w, C: tl.constexpr, CP: tl.constexpr,
    M: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """unfold(x) W `[T, M]`, weight `[9 C, M]`."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    acc = zero_blocks(P, BLOCKS)
    for tap in range(9):
        t = token_tap(x_ptr, (), None, None, n, y, x, tap, H, W, stride_n, stride_h, stride_w,
                      C, CP, 0, (), PRECISION).to(dtype)  # fmt: skip
        added = ()
        for b in tl.static_range(len(BLOCKS)):
            k = columns(BLOCKS, b)
            w = tl.trans(tap_weights(w_ptr, k, tap, M, C, CP))
            added += (dot(t, w, acc[b], PRECISION),)
        acc = added
    row = (n * H * W + token)[:, None]
    for b in tl.static_range(len(BLOCKS)):
        k = columns(BLOCKS, b)
        mask = (y < H)[:, None] & (k < M)[None, :]
        tl.store(out_ptr + row * M + k[None, :], acc[b].to(dtype), mask=mask)


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
    inner = a.shape[2] if has_a else 0
    folded, uv = fold_norm(weight, gamma, beta, None, x.dtype)
    back = (weight.float() * gamma.float()).t().to(x.dtype).contiguous()  # [9 C, L]
    stats = x.new_empty((n * h * w, STATS.value), dtype=torch.float32)
    out = x.new_empty((n, h * w, inner if has_a else width))
    limit = width_limit(product)
    sizes = channel_tiles(x) | {"M": inner, "A_BLOCKS": width_blocks(inner, limit), "L": width}
    sizes |= {"BLOCKS": width_blocks(width, limit), "PRECISION": product, "P": TILE} | OPTIONS
    a = g if a is None else a
    programs = n * triton.cdiv(h * w, TILE)
    launch(
        _token_bwd_rows_kernel,
        programs,
        *(x, a, *proj, folded, uv, g, back, stats, out, h, w, *map_strides(x), eps),
        **(sizes | {"LP": padded_width(width)}),
    )
    grad_x = empty_map(x, c)
    launch(
        _token_bwd_map_kernel,
        programs,
        *(x, a, *proj, g, back, stats, grad_x, h, w, *map_strides(x), *map_strides(grad_x)),
        **sizes,
    )
    outer, grad_proj, grad_bias = weight_sums(x, a, g, proj, back, stats, has_a, product)
    total = g.sum((0, 1), dtype=torch.float32)
    grad_weight = outer.t() * gamma + torch.outer(total, beta.float())
    grad_gamma = (weight * outer.t()).sum(0)
    grad_beta = (weight * total[:, None]).sum(0)
    grads = grad_weight.to(weight.dtype), grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype)
    return grad_x, out, *grads, grad_proj, grad_bias


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
    grad = (grad * (h > 0)).to(x.dtype).contiguous()
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
    n, c, height, width = grad.shape
    product = precision(grad, tf32)
    count = _overlaps(grad)
    grad_x = empty_map(grad, c)
    grad_x.copy_(grad if mean else grad * count)
    tokens = readable(grad / count if mean else grad).to(grad.dtype)
    outs = []
    for rows, weight in ((a, proj_weight), (h, fc2_weight)):
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        launch(
            _unfold_linear_kernel,
            n * triton.cdiv(height * width, TILE),
            *(tokens, weight.to(grad.dtype).contiguous(), out, height, width),
            *map_strides(tokens),
            **channel_tiles(grad),
            M=rows.shape[2],
            BLOCKS=width_blocks(rows.shape[2]),
            PRECISION=product,
            P=TILE,
            **OPTIONS,
        )
        outs.append(out)
    grad_fc2, grad_proj, total = weight_sums(
        tokens, a.contiguous(), h.contiguous(), (None, None), None, None, True, product
    )
    return (
        *(grad_x, *outs, grad_proj.to(proj_weight.dtype), total.to(proj_bias.dtype)),
        *(grad_fc2.to(fc2_weight.dtype), total.to(fc2_bias.dtype, copy=True)),
    )
