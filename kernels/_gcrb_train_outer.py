"""Backward of GCRB in training, the half of BN3: its two sums, then the gradient behind BN2."""

from __future__ import annotations

import triton
import triton.language as tl

from ._gcrb_moments import (
    inner_scales,
    inner_values,
    outer_values,
    scale_of,
    store_sums,
    sum_outer_rows,
)
from ._gcrb_tiles import (
    depthwise_row,
    depthwise_weights,
    expand,
    expand_weights,
    load_mids,
    load_pixel,
    project,
    repeat,
    squeeze_weights,
    store_mids,
    sum_pixels,
)
from ._launch import relu, relu_backward, strip

__all__ = ["gcrb_train_bwd_expand_kernel", "gcrb_train_bwd_sums_kernel"]


@triton.jit
def _outer_scales(var_ptr, g, eps, G: tl.constexpr, CG: tl.constexpr, K: tl.constexpr,
                  CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """1 / standard deviation of the channels as CHUNKS tiles `[R, K]`."""
    var = outer_values(var_ptr, g, G, CG, K, CHUNKS, MASKED)
    scales = ()
    for h in tl.static_range(CHUNKS):
        scales += (scale_of(var[h], eps),)
    return scales


@triton.jit(do_not_specialize=["H", "W", "rows"])
def gcrb_train_bwd_sums_kernel(
    grad_ptr, x_ptr, w1_ptr, gamma1_ptr, beta1_ptr, w2_ptr, gamma2_ptr, beta2_ptr,
    w3_ptr, gamma3_ptr, beta3_ptr, mean_ptr, var_ptr, zhat2_ptr, partial_ptr,
    H, W, rows, eps, stride_gn, stride_gh, stride_xn, stride_xh,
    stride_gw: tl.constexpr, stride_xw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, PX: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    C: tl.constexpr = G * CG
    M: tl.constexpr = G * MG
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q * PX)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + (row // GP) * PX
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + (y0 - 1).to(tl.int64) * stride_xh + column * stride_xw + channel
    grad_row = grad_ptr + n * stride_gn + (y0 - 2).to(tl.int64) * stride_gh
    grad_row = grad_row + column * stride_gw + channel
    zhat2_row = zhat2_ptr + ((n * H + y0 - 2) * W + col) * M + g * MG

    w1, beta1 = squeeze_weights(w1_ptr, beta1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    gamma1 = inner_values(gamma1_ptr, g, G, MG, MASKED)
    mean1 = inner_values(mean_ptr, g, G, MG, MASKED)
    scale1 = inner_scales(var_ptr, g, eps, G, MG, MASKED)
    w2, mean2 = depthwise_weights(w2_ptr, mean_ptr + M, g, G, MG, MASKED)
    scale2 = inner_scales(var_ptr + M, g, eps, G, MG, MASKED)
    factor1 = ()
    for m in tl.static_range(MG):
        factor1 += (gamma1[m] * scale1[m],)
    gamma2 = inner_values(gamma2_ptr, g, G, MG, MASKED)
    beta2 = inner_values(beta2_ptr, g, G, MG, MASKED)
    w3, mean3 = expand_weights(w3_ptr, mean_ptr + 2 * M, g, G, CG, MG, K, CHUNKS, MASKED)
    scale3 = _outer_scales(var_ptr + 2 * M, g, eps, G, CG, K, CHUNKS, MASKED)
    gamma3 = outer_values(gamma3_ptr, g, G, CG, K, CHUNKS, MASKED)
    beta3 = outer_values(beta3_ptr, g, G, CG, K, CHUNKS, MASKED)

    zero = tl.zeros((R,), tl.float32)
    nothing = repeat(zero, MG)
    no_channels = repeat(tl.zeros((R, K), tl.float32), CHUNKS)
    top = repeat(zero, PX * MG)
    middle = top
    grad_beta = no_channels
    grad_gamma = no_channels
    for r in range(y0 - 1, tl.minimum(y0 + rows, H) + 1):
        mids = ()
        for j in tl.static_range(PX + 2):
            inside = (r >= 0) & (r < H) & (col + (j - 1) >= 0) & (col + (j - 1) < W)
            pointers = x_row + (j - 1) * stride_xw
            x = load_pixel(pointers, inside, g, G, CG, K, CHUNKS, MASKED)
            z = project(x, w1, MG, CHUNKS)
            for m in tl.static_range(MG):
                a = relu((z[m] - mean1[m]) * factor1[m] + beta1[m])
                mids += (tl.where(inside, a, 0.0),)
        done, top, middle = depthwise_row(top, middle, mids, w2, nothing, PX, MG)
        if r > y0:
            for i in tl.static_range(PX):
                ok = (col + i < W) & (g < G)
                zhat2 = ()
                q = ()
                for m in tl.static_range(MG):
                    hat = (done[i * MG + m] - mean2[m]) * scale2[m]
                    zhat2 += (hat,)
                    q += (gamma2[m] * hat + beta2[m],)
                store_mids(zhat2_row + i * M, zhat2, ok, MG)
                grad = load_pixel(grad_row + i * stride_gw, ok, g, G, CG, K, CHUNKS, MASKED)
                z3 = expand(q, w3, no_channels, 0, MG, CHUNKS)
                new_beta = ()
                new_gamma = ()
                for h in tl.static_range(CHUNKS):
                    zhat3 = (z3[h] - mean3[h]) * scale3[h]
                    e = gamma3[h] * zhat3 + beta3[h]
                    g3 = relu_backward(e, grad[h].to(tl.float32))
                    new_beta += (grad_beta[h] + g3,)
                    new_gamma += (grad_gamma[h] + g3 * zhat3,)
                grad_beta = new_beta
                grad_gamma = new_gamma
        x_row += stride_xh
        grad_row += stride_gh
        zhat2_row += W * M
    # One row of sums: grad_beta3 [C], grad_gamma3 [C].
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * C)
    group = tl.arange(0, GP)
    for h in tl.static_range(CHUNKS):
        c = h * K + tl.arange(0, K)
        mask = (group < G)[:, None] & (c < CG)[None, :]
        at = group[:, None] * CG + c[None, :]
        tl.store(partial + at, sum_pixels(grad_beta[h], Q, GP), mask=mask)
        tl.store(partial + C + at, sum_pixels(grad_gamma[h], Q, GP), mask=mask)


@triton.jit(do_not_specialize=["H", "W", "rows", "table_rows"])
def gcrb_train_bwd_expand_kernel(
    grad_ptr, zhat2_ptr, gamma2_ptr, beta2_ptr, w3_ptr, gamma3_ptr, beta3_ptr, mean_ptr, var_ptr,
    g2_ptr, grad_gamma3_ptr, grad_beta3_ptr, before_ptr, partial_ptr, weights_ptr,
    H, W, rows, table_rows, eps, share, stride_gn, stride_gh, stride_gw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`share`: 1 / pixels."""
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
    grad_row = grad_ptr + n * stride_gn + y0.to(tl.int64) * stride_gh
    grad_row = grad_row + column * stride_gw + channel
    inner_row = ((n * H + y0) * W + col) * M + g * MG
    zhat2_row = zhat2_ptr + inner_row
    g2_row = g2_ptr + inner_row

    betas = sum_outer_rows(before_ptr, table_rows, 0, 2 * C, Q, G, GP, CG, K, CHUNKS)
    gammas = sum_outer_rows(before_ptr, table_rows, C, 2 * C, Q, G, GP, CG, K, CHUNKS)
    first = (tl.program_id(0) == 0) & (row < GP) & (g < G)
    for h in tl.static_range(CHUNKS):
        c = h * K + tl.arange(0, K)
        mask = first[:, None] & (c < CG)[None, :]
        at = g[:, None] * CG + c[None, :]
        tl.store(grad_beta3_ptr + at, betas[h].to(grad_beta3_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_gamma3_ptr + at, gammas[h].to(grad_gamma3_ptr.dtype.element_ty), mask=mask)
    gamma2 = inner_values(gamma2_ptr, g, G, MG, MASKED)
    beta2 = inner_values(beta2_ptr, g, G, MG, MASKED)
    w3, mean3 = expand_weights(w3_ptr, mean_ptr + 2 * M, g, G, CG, MG, K, CHUNKS, MASKED)
    scale3 = _outer_scales(var_ptr + 2 * M, g, eps, G, CG, K, CHUNKS, MASKED)
    gamma3 = outer_values(gamma3_ptr, g, G, CG, K, CHUNKS, MASKED)
    beta3 = outer_values(beta3_ptr, g, G, CG, K, CHUNKS, MASKED)

    factor3 = ()
    for h in tl.static_range(CHUNKS):
        factor3 += (gamma3[h] * scale3[h],)
    no_channels = repeat(tl.zeros((R, K), tl.float32), CHUNKS)
    grad_beta = repeat(tl.zeros((R,), tl.float32), MG)
    grad_gamma = grad_beta
    grad_w3 = repeat(tl.zeros((R, K), tl.float32), MG * CHUNKS)
    ok = (col < W) & (g < G)
    for _ in range(y0, tl.minimum(y0 + rows, H)):
        zhat2 = load_mids(zhat2_row, ok, MG)
        grad = load_pixel(grad_row, ok, g, G, CG, K, CHUNKS, MASKED)
        q = ()
        for m in tl.static_range(MG):
            q += (gamma2[m] * zhat2[m] + beta2[m],)
        z3 = expand(q, w3, no_channels, 0, MG, CHUNKS)
        g3 = ()
        for h in tl.static_range(CHUNKS):
            zhat3 = (z3[h] - mean3[h]) * scale3[h]
            e = gamma3[h] * zhat3 + beta3[h]
            each = relu_backward(e, grad[h].to(tl.float32))
            each = factor3[h] * (each - share * (betas[h] + zhat3 * gammas[h]))
            g3 += (tl.where(ok[:, None], each, 0.0),)
        back = project(g3, w3, MG, CHUNKS)
        g2s = ()
        new_beta = ()
        new_gamma = ()
        new_w3 = ()
        for m in tl.static_range(MG):
            g2 = relu_backward(q[m], back[m])
            g2s += (g2,)
            new_beta += (grad_beta[m] + g2,)
            new_gamma += (grad_gamma[m] + g2 * zhat2[m],)
            inner = relu(q[m])[:, None]
            for h in tl.static_range(CHUNKS):
                new_w3 += (grad_w3[m * CHUNKS + h] + g3[h] * inner,)
        store_mids(g2_row, g2s, ok, MG)
        grad_beta = new_beta
        grad_gamma = new_gamma
        grad_w3 = new_w3
        grad_row += stride_gh
        zhat2_row += W * M
        g2_row += W * M
    # One row of sums: grad_beta2 [M], grad_gamma2 [M]; of weight gradients: grad_w3 [C, MG].
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * M)
    store_sums(partial, grad_beta, Q, G, GP, MG)
    store_sums(partial + M, grad_gamma, Q, G, GP, MG)
    weights = weights_ptr + tl.program_id(0).to(tl.int64) * (C * MG + M * 9 + M * CG)
    group = tl.arange(0, GP)
    for h in tl.static_range(CHUNKS):
        c = h * K + tl.arange(0, K)
        mask = (group < G)[:, None] & (c < CG)[None, :]
        at = (group[:, None] * CG + c[None, :]) * MG
        for m in tl.static_range(MG):
            total = sum_pixels(grad_w3[m * CHUNKS + h], Q, GP)
            tl.store(weights + at + m, total, mask=mask)
