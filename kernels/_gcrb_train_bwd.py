"""Backward of GCRB in training: four kernels, and one that sums the weight gradients.

With n pixels, the gradient g behind a BatchNorm becomes gamma / std (g - sum g / n - zhat sum(g
zhat) / n) before it; the two sums are the gradients of beta and gamma. They are what a kernel needs
of the whole one before it, and each program adds the rows that its programs left, in fixed order:

1. zhat2 (BN2's normalised input) again into memory; sums for BN3
2. gradient behind BN2 into memory; sums for BN2, gradient of W3
3. gradient behind BN1 into memory; sums for BN1, gradient of W2
4. gradient of x, gradient of W1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gcrb_moments import (
    inner_scales,
    inner_values,
    store_stats,
    store_sums,
    strip_rows,
    sum_inner_rows,
    train_config,
)
from ._gcrb_tiles import (
    depthwise_weights,
    group_tiles,
    load_mids,
    load_pixel,
    project,
    repeat,
    spread,
    squeeze_weights,
    stack,
    store_mids,
    store_pixel,
    sum_pixels,
)
from ._gcrb_train_outer import gcrb_train_bwd_expand_kernel, gcrb_train_bwd_sums_kernel
from ._launch import empty_map, launch, map_strides, readable, relu, relu_backward, strip
from ._reduce import sum_rows

__all__ = ["gcrb_train_backward"]


@triton.jit
def _normalised(x, w1, mean, scale, MG: tl.constexpr, CHUNKS: tl.constexpr):
    """zhat1 = (W1 x - mean) / std as MG vectors `[R]`."""
    sums = project(x, w1, MG, CHUNKS)
    hats = ()
    for m in tl.static_range(MG):
        hats += ((sums[m] - mean[m]) * scale[m],)
    return hats


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_train_bwd_depthwise_kernel(
    x_ptr, zhat2_ptr, g2_ptr, w1_ptr, gamma1_ptr, beta1_ptr, w2_ptr, gamma2_ptr, mean_ptr, var_ptr,
    g1_ptr, grad_gamma2_ptr, grad_beta2_ptr, before_ptr, partial_ptr, weights_ptr,
    H, W, rows, programs, eps, share, stride_xn, stride_xh, stride_xw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`programs`: of this kernel and of the one before."""
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    C: tl.constexpr = G * CG
    M: tl.constexpr = G * MG
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + row // GP
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + y0.to(tl.int64) * stride_xh + column * stride_xw + channel
    inner_row = ((n * H + y0) * W + col) * M + g * MG
    zhat2_row = zhat2_ptr + inner_row
    g2_row = g2_ptr + inner_row
    g1_row = g1_ptr + inner_row

    betas = sum_inner_rows(before_ptr, programs, 2 * M, G, GP, MG)
    gammas = sum_inner_rows(before_ptr + M, programs, 2 * M, G, GP, MG)
    if tl.program_id(0) == 0:
        store_stats(grad_beta2_ptr, betas, G, GP, MG)
        store_stats(grad_gamma2_ptr, gammas, G, GP, MG)
    w1, beta1 = squeeze_weights(w1_ptr, beta1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    mean1 = inner_values(mean_ptr, g, G, MG, MASKED)
    scale1 = inner_scales(var_ptr, g, eps, G, MG, MASKED)
    gamma1 = inner_values(gamma1_ptr, g, G, MG, MASKED)
    w2, gamma2 = depthwise_weights(w2_ptr, gamma2_ptr, g, G, MG, MASKED)
    scale2 = inner_scales(var_ptr + M, g, eps, G, MG, MASKED)
    factor = ()  # gradient before BN2 = factor g2 - shift - slope zhat2
    shift = ()
    slope = ()
    for m in tl.static_range(MG):
        each = gamma2[m] * scale2[m]
        factor += (each,)
        shift += (each * share * spread(betas[m], Q),)
        slope += (each * share * spread(gammas[m], Q),)

    zero = tl.zeros((R,), tl.float32)
    grad_beta = repeat(zero, MG)
    grad_gamma = grad_beta
    grad_w2 = repeat(zero, MG * 9)
    ok = (col < W) & (g < G)
    for r in range(y0, tl.minimum(y0 + rows, H)):
        x = load_pixel(x_row, ok, g, G, CG, K, CHUNKS, MASKED)
        zhat1 = _normalised(x, w1, mean1, scale1, MG, CHUNKS)
        mids = ()
        for m in tl.static_range(MG):
            mids += (tl.where(ok, relu(gamma1[m] * zhat1[m] + beta1[m]), 0.0),)
        back = repeat(zero, MG)
        new_w2 = ()
        for t in tl.static_range(9):
            # Output pixel (r - dy, col - dx) saw this one through tap (dy, dx).
            near = col - (t % 3 - 1)
            inside = ok & (near >= 0) & (near < W) & (r >= t // 3 - 1) & (r - (t // 3 - 1) < H)
            offset = ((t // 3 - 1) * W + (t % 3 - 1)) * M
            g2 = load_mids(g2_row - offset, inside, MG)
            zhat2 = load_mids(zhat2_row - offset, inside, MG)
            sums = ()
            for m in tl.static_range(MG):
                each = factor[m] * g2[m] - shift[m] - slope[m] * zhat2[m]
                each = tl.where(inside, each, 0.0)
                sums += (back[m] + each * w2[m][t],)
                new_w2 += (grad_w2[t * MG + m] + each * mids[m],)
            back = sums
        grad_w2 = new_w2
        g1 = ()
        new_beta = ()
        new_gamma = ()
        for m in tl.static_range(MG):
            each = relu_backward(mids[m], back[m])
            g1 += (each,)
            new_beta += (grad_beta[m] + each,)
            new_gamma += (grad_gamma[m] + each * zhat1[m],)
        store_mids(g1_row, g1, ok, MG)
        grad_beta = new_beta
        grad_gamma = new_gamma
        x_row += stride_xh
        zhat2_row += W * M
        g2_row += W * M
        g1_row += W * M
    # One row of sums: grad_beta1 [M], grad_gamma1 [M]; of weight gradients: grad_w2 [M, 9].
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * M)
    store_sums(partial, grad_beta, Q, G, GP, MG)
    store_sums(partial + M, grad_gamma, Q, G, GP, MG)
    weights = weights_ptr + tl.program_id(0).to(tl.int64) * (C * MG + M * 9 + M * CG) + C * MG
    group = tl.arange(0, GP)
    for m in tl.static_range(MG):
        taps = ()
        for t in tl.static_range(8):
            taps += (grad_w2[t * MG + m],)
        mid = group * MG + m
        at = mid[:, None] * 9 + tl.arange(0, 8)[None, :]
        total = sum_pixels(stack(taps, 0, 8), Q, GP)
        tl.store(weights + at, total, mask=(group < G)[:, None])
        total = sum_pixels(grad_w2[8 * MG + m], Q, GP)
        tl.store(weights + mid * 9 + 8, total, mask=group < G)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_train_bwd_squeeze_kernel(
    grad_ptr, x_ptr, g1_ptr, w1_ptr, gamma1_ptr, mean_ptr, var_ptr, out_ptr,
    grad_gamma1_ptr, grad_beta1_ptr, before_ptr, weights_ptr,
    H, W, rows, programs, eps, share, stride_gn, stride_gh, stride_xn, stride_xh,
    stride_on, stride_oh, stride_gw: tl.constexpr, stride_xw: tl.constexpr, stride_ow: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    C: tl.constexpr = G * CG
    M: tl.constexpr = G * MG
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + row // GP
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    top = y0.to(tl.int64)
    x_row = x_ptr + n * stride_xn + top * stride_xh + column * stride_xw + channel
    grad_row = grad_ptr + n * stride_gn + top * stride_gh + column * stride_gw + channel
    out_row = out_ptr + n * stride_on + top * stride_oh + column * stride_ow + channel
    g1_row = g1_ptr + ((n * H + y0) * W + col) * M + g * MG

    betas = sum_inner_rows(before_ptr, programs, 2 * M, G, GP, MG)
    gammas = sum_inner_rows(before_ptr + M, programs, 2 * M, G, GP, MG)
    if tl.program_id(0) == 0:
        store_stats(grad_beta1_ptr, betas, G, GP, MG)
        store_stats(grad_gamma1_ptr, gammas, G, GP, MG)
    w1, gamma1 = squeeze_weights(w1_ptr, gamma1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    mean1 = inner_values(mean_ptr, g, G, MG, MASKED)
    scale1 = inner_scales(var_ptr, g, eps, G, MG, MASKED)
    factor = ()
    shift = ()
    slope = ()
    for m in tl.static_range(MG):
        factor += (gamma1[m] * scale1[m],)
        shift += (share * spread(betas[m], Q),)
        slope += (share * spread(gammas[m], Q),)
    grad_w1 = repeat(tl.zeros((R, K), tl.float32), MG * CHUNKS)
    ok = (col < W) & (g < G)
    for _ in range(y0, tl.minimum(y0 + rows, H)):
        x = load_pixel(x_row, ok, g, G, CG, K, CHUNKS, MASKED)
        grad = load_pixel(grad_row, ok, g, G, CG, K, CHUNKS, MASKED)
        g1 = load_mids(g1_row, ok, MG)
        zhat1 = _normalised(x, w1, mean1, scale1, MG, CHUNKS)
        g0 = ()
        new_w1 = ()
        for m in tl.static_range(MG):
            each = factor[m] * (g1[m] - shift[m] - slope[m] * zhat1[m])
            each = tl.where(ok, each, 0.0)
            g0 += (each,)
            for h in tl.static_range(CHUNKS):
                new_w1 += (grad_w1[m * CHUNKS + h] + each[:, None] * x[h].to(tl.float32),)
        grad_w1 = new_w1
        out = ()
        for h in tl.static_range(CHUNKS):
            total = grad[h].to(tl.float32)
            for m in tl.static_range(MG):
                total += g0[m][:, None] * w1[m * CHUNKS + h]
            out += (total,)
        store_pixel(out_row, out, ok, g, G, CG, K, CHUNKS, MASKED)
        x_row += stride_xh
        grad_row += stride_gh
        out_row += stride_oh
        g1_row += W * M
    # The last columns of the row of weight gradients: grad_w1 [M, CG].
    weights = weights_ptr + tl.program_id(0).to(tl.int64) * (C * MG + M * 9 + M * CG)
    group = tl.arange(0, GP)
    for m in tl.static_range(MG):
        for h in tl.static_range(CHUNKS):
            c = h * K + tl.arange(0, K)
            mask = (group < G)[:, None] & (c < CG)[None, :]
            at = C * MG + M * 9 + (group * MG + m)[:, None] * CG + c[None, :]
            total = sum_pixels(grad_w1[m * CHUNKS + h], Q, GP)
            tl.store(weights + at, total, mask=mask)


def gcrb_train_backward(
    grad_y: Tensor,
    x: Tensor,
    params: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of x and of the nine parameters, in the order of `gcrb_train`."""
    x, grad_y = readable(x), readable(grad_y)
    n, c, h, w = x.shape
    w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3 = params = [
        p.contiguous() for p in params
    ]
    mid = w1.shape[0]
    tiles = group_tiles(c, mid, groups, x.dtype)
    config = dict(train_config("gcrb_train_backward", x, mid, groups, tiles))
    px, q, programs = (config.pop(k) for k in ("PX", "Q", "programs"))
    grad_x = empty_map(x, c)
    grads = [torch.empty_like(p) for p in params]
    (gn, gh, gw), (xn, xh, xw), (on, oh, ow) = map(map_strides, (grad_y, x, grad_x))

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    share = 1 / (n * h * w)
    zhat2, g2, g1 = (new(n, h, w, mid) for _ in range(3))
    rows, count1 = strip_rows(x, q * px, programs)
    sums3 = new(count1, 2 * c)
    launch(
        gcrb_train_bwd_sums_kernel,
        count1,
        *(grad_y, x, *params, mean, var, zhat2, sums3, h, w, rows, eps, gn, gh, xn, xh, gw, xw),
        **(tiles | config | {"PX": px, "Q": q}),
    )
    rows, count = strip_rows(x, q, programs)
    options = tiles | config | {"Q": q}
    weights = new(count, c * tiles["MG"] + mid * 9 + mid * tiles["CG"])
    sums2, sums1 = new(count, 2 * mid), new(count, 2 * mid)
    launch(
        gcrb_train_bwd_expand_kernel,
        count,
        *(grad_y, zhat2, gamma2, beta2, w3, gamma3, beta3, mean, var, g2, grads[7], grads[8]),
        *(sums3, sums2, weights, h, w, rows, count1, eps, share, gn, gh, gw),
        **options,
    )
    launch(
        _gcrb_train_bwd_depthwise_kernel,
        count,
        *(x, zhat2, g2, w1, gamma1, beta1, w2, gamma2, mean, var, g1, grads[4], grads[5]),
        *(sums2, sums1, weights, h, w, rows, count, eps, share, xn, xh, xw),
        **options,
    )
    launch(
        _gcrb_train_bwd_squeeze_kernel,
        count,
        *(grad_y, x, g1, w1, gamma1, mean, var, grad_x, grads[1], grads[2], sums1, weights),
        *(h, w, rows, count, eps, share, gn, gh, xn, xh, on, oh, gw, xw, ow),
        **options,
    )
    sum_rows(weights, (grads[6], grads[3], grads[0]))
    return grad_x, *grads
