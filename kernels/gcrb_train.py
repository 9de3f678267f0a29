"""GCRB with BatchNorm over the statistics of the batch: four kernels, forward.

Three statistics over the whole batch stand between them, so there cannot be fewer:

1. moments of W1 x
2. z2 = W2 relu(BN1(W1 x)) into memory (`[N, H, W, M]`, float32), and its moments
3. moments of q = relu(BN2(z2)), with the products inside a group: W3 q is linear in q, so its mean
   is W3 mean(q) and its variance the diagonal of W3 cov(q) W3^T
4. y = x + relu(BN3(W3 q))

Each program merges the moments that those of the kernel before left. Saved for the backward pass
are the input and the statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _gcrb_train_bwd
from . import reference as _reference
from ._gcrb_moments import (
    add_moments,
    inner_values,
    merge_moments,
    outer_values,
    row_size,
    scale_of,
    store_moments,
    store_stats,
    strip_rows,
    train_config,
)
from ._gcrb_tiles import (
    depthwise_row,
    depthwise_weights,
    expand,
    expand_weights,
    group_tiles,
    load_mids,
    load_pixel,
    project,
    repeat,
    spread,
    squeeze_weights,
    store_mids,
    store_pixel,
)
from ._launch import empty_map, launch, map_strides, readable, relu, strip

__all__ = ["gcrb_train", "gcrb_train_backward"]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_train_moments_kernel(
    x_ptr, w1_ptr, partial_ptr, H, W, rows, stride_xn, stride_xh, stride_xw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + row // GP
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + y0.to(tl.int64) * stride_xh + column * stride_xw + channel
    w1, _ = squeeze_weights(w1_ptr, w1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    count = tl.zeros((R,), tl.float32)
    mean = repeat(count, MG)
    co = mean
    ok = (col < W) & (g < G)
    for _ in range(y0, tl.minimum(y0 + rows, H)):
        x = load_pixel(x_row, ok, g, G, CG, K, CHUNKS, MASKED)
        z = project(x, w1, MG, CHUNKS)
        count, mean, co = add_moments(count, mean, co, z, ok, MG, 1)
        x_row += stride_xh
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (1 + 2 * G * MG)
    store_moments(partial, count, mean, co, Q, G, GP, MG, 1)


@triton.jit(do_not_specialize=["H", "W", "rows", "table_rows"])
def _gcrb_train_depthwise_kernel(
    x_ptr, w1_ptr, gamma_ptr, beta_ptr, w2_ptr, z2_ptr, mean_ptr, var_ptr, before_ptr, partial_ptr,
    H, W, rows, table_rows, eps, stride_xn, stride_xh, stride_xw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, PX: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    M: tl.constexpr = G * MG
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q * PX)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + (row // GP) * PX
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + (y0 - 1).to(tl.int64) * stride_xh + column * stride_xw + channel
    z2_row = z2_ptr + ((n * H + y0 - 2) * W + col) * M + g * MG

    means, variances = merge_moments(before_ptr, table_rows, G, GP, MG, 1)
    if tl.program_id(0) == 0:
        store_stats(mean_ptr, means, G, GP, MG)
        store_stats(var_ptr, variances, G, GP, MG)
    w1, beta = squeeze_weights(w1_ptr, beta_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    gamma = inner_values(gamma_ptr, g, G, MG, MASKED)
    mean1 = ()
    factor = ()
    for m in tl.static_range(MG):
        mean1 += (spread(means[m], Q),)
        factor += (gamma[m] * scale_of(spread(variances[m], Q), eps),)
    w2, _ = depthwise_weights(w2_ptr, beta_ptr, g, G, MG, MASKED)

    zero = tl.zeros((R,), tl.float32)
    nothing = repeat(zero, MG)
    top = repeat(zero, PX * MG)
    middle = top
    count = zero
    mean = nothing
    co = nothing
    for r in range(y0 - 1, tl.minimum(y0 + rows, H) + 1):
        mids = ()
        for j in tl.static_range(PX + 2):
            inside = (r >= 0) & (r < H) & (col + (j - 1) >= 0) & (col + (j - 1) < W)
            pointers = x_row + (j - 1) * stride_xw
            x = load_pixel(pointers, inside, g, G, CG, K, CHUNKS, MASKED)
            z = project(x, w1, MG, CHUNKS)
            for m in tl.static_range(MG):
                a = relu((z[m] - mean1[m]) * factor[m] + beta[m])
                mids += (tl.where(inside, a, 0.0),)
        done, top, middle = depthwise_row(top, middle, mids, w2, nothing, PX, MG)
        if r > y0:
            for i in tl.static_range(PX):
                ok = (col + i < W) & (g < G)
                z2 = done[i * MG : (i + 1) * MG]
                store_mids(z2_row + i * M, z2, ok, MG)
                count, mean, co = add_moments(count, mean, co, z2, ok, MG, 1)
        x_row += stride_xh
        z2_row += W * M
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (1 + 2 * M)
    store_moments(partial, count, mean, co, Q, G, GP, MG, 1)


@triton.jit(do_not_specialize=["pixels", "share", "table_rows"])
def _gcrb_train_inner_kernel(
    z2_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, before_ptr, partial_ptr,
    pixels, share, table_rows, eps,
    G: tl.constexpr, MG: tl.constexpr, GP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """`share`: pixels of a program."""
    MASKED: tl.constexpr = G != GP
    R: tl.constexpr = Q * GP
    M: tl.constexpr = G * MG
    row = tl.arange(0, R)
    g = row % GP
    means, variances = merge_moments(before_ptr, table_rows, G, GP, MG, 1)
    if tl.program_id(0) == 0:
        store_stats(mean_ptr + M, means, G, GP, MG)
        store_stats(var_ptr + M, variances, G, GP, MG)
    gamma = inner_values(gamma_ptr, g, G, MG, MASKED)
    beta = inner_values(beta_ptr, g, G, MG, MASKED)
    center = ()
    factor = ()
    for m in tl.static_range(MG):
        center += (spread(means[m], Q),)
        factor += (gamma[m] * scale_of(spread(variances[m], Q), eps),)
    count = tl.zeros((R,), tl.float32)
    mean = repeat(count, MG)
    co = repeat(count, MG * MG)
    first = tl.program_id(0).to(tl.int64) * share
    for start in range(0, share, Q):
        pixel = first + start + row // GP
        ok = (start + row // GP < share) & (pixel < pixels) & (g < G)
        z2 = load_mids(z2_ptr + pixel * M + g * MG, ok, MG)
        q = ()
        for m in tl.static_range(MG):
            q += (relu((z2[m] - center[m]) * factor[m] + beta[m]),)
        count, mean, co = add_moments(count, mean, co, q, ok, MG, MG)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (1 + M + M * MG)
    store_moments(partial, count, mean, co, Q, G, GP, MG, MG)


@triton.jit(do_not_specialize=["H", "W", "rows", "table_rows"])
def _gcrb_train_output_kernel(
    x_ptr, z2_ptr, y_ptr, gamma2_ptr, beta2_ptr, w3_ptr, gamma3_ptr, beta3_ptr, mean_ptr, var_ptr,
    before_ptr, H, W, rows, table_rows, eps, stride_xn, stride_xh, stride_yn, stride_yh,
    stride_xw: tl.constexpr, stride_yw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    M: tl.constexpr = G * MG
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + row // GP
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    top = y0.to(tl.int64)
    x_row = x_ptr + n * stride_xn + top * stride_xh + column * stride_xw + channel
    y_row = y_ptr + n * stride_yn + top * stride_yh + column * stride_yw + channel
    z2_row = z2_ptr + ((n * H + y0) * W + col) * M + g * MG

    mean2 = inner_values(mean_ptr + M, g, G, MG, MASKED)
    var2 = inner_values(var_ptr + M, g, G, MG, MASKED)
    gamma2 = inner_values(gamma2_ptr, g, G, MG, MASKED)
    beta2 = inner_values(beta2_ptr, g, G, MG, MASKED)
    factor2 = ()
    for m in tl.static_range(MG):
        factor2 += (gamma2[m] * scale_of(var2[m], eps),)
    means, covariances = merge_moments(before_ptr, table_rows, G, GP, MG, MG)
    w3, beta3 = expand_weights(w3_ptr, beta3_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    gamma3 = outer_values(gamma3_ptr, g, G, CG, K, CHUNKS, MASKED)
    mean3 = ()
    factor3 = ()
    for h in tl.static_range(CHUNKS):
        mean = tl.zeros((R, K), tl.float32)
        var = tl.zeros((R, K), tl.float32)
        for m in tl.static_range(MG):
            w = w3[m * CHUNKS + h]
            mean += w * spread(means[m], Q)[:, None]
            for s in tl.static_range(MG):
                cov = spread(covariances[m * MG + s], Q)[:, None]
                var += w * w3[(m + s) % MG * CHUNKS + h] * cov
        var = relu(var)  # keeps NaN
        c = h * K + tl.arange(0, K)
        real = ((row < GP) & (g < G))[:, None] & (c < CG)[None, :]
        at = 2 * M + g[:, None] * CG + c[None, :]
        tl.store(mean_ptr + at, mean, mask=real & (tl.program_id(0) == 0))
        tl.store(var_ptr + at, var, mask=real & (tl.program_id(0) == 0))
        mean3 += (mean,)
        factor3 += (gamma3[h] * scale_of(var, eps),)

    nothing = repeat(tl.zeros((R, K), tl.float32), CHUNKS)
    ok = (col < W) & (g < G)
    for _ in range(y0, tl.minimum(y0 + rows, H)):
        z2 = load_mids(z2_row, ok, MG)
        x = load_pixel(x_row, ok, g, G, CG, K, CHUNKS, MASKED)
        mids = ()
        for m in tl.static_range(MG):
            mids += ((z2[m] - mean2[m]) * factor2[m] + beta2[m],)
        z3 = expand(mids, w3, nothing, 0, MG, CHUNKS)
        out = ()
        for h in tl.static_range(CHUNKS):
            e = (z3[h] - mean3[h]) * factor3[h] + beta3[h]
            out += (x[h].to(tl.float32) + relu(e),)
        store_pixel(y_row, out, ok, g, G, CG, K, CHUNKS, MASKED)
        x_row += stride_xh
        y_row += stride_yh
        z2_row += W * M


@_reference.unless_few(_reference.gcrb_train)
def gcrb_train(
    x: Tensor,
    w1: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    w2: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    w3: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of `efrdn_fast::gcrb_train`; arguments are valid."""
    x = readable(x)
    n, c, h, w = x.shape
    mid = w1.shape[0]
    tiles = group_tiles(c, mid, groups, x.dtype)
    config = dict(train_config("gcrb_train", x, mid, groups, tiles))
    px, q, programs = (config.pop(k) for k in ("PX", "Q", "programs"))
    w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3 = (
        p.contiguous() for p in (w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3)
    )
    y = empty_map(x, c)
    (xn, xh, xw), (yn, yh, yw) = map_strides(x), map_strides(y)

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    mean, var, z2 = new(2 * mid + c), new(2 * mid + c), new(n, h, w, mid)

    rows, count1 = strip_rows(x, q, programs)
    moments1 = new(count1, row_size(mid, 1))
    launch(
        _gcrb_train_moments_kernel,
        count1,
        *(x, w1, moments1, h, w, rows, xn, xh, xw),
        **(tiles | config | {"Q": q}),
    )
    wide_rows, count2 = strip_rows(x, q * px, programs)
    moments2 = new(count2, row_size(mid, 1))
    launch(
        _gcrb_train_depthwise_kernel,
        count2,
        *(x, w1, gamma1, beta1, w2, z2, mean, var, moments1, moments2),
        *(h, w, wide_rows, count1, eps, xn, xh, xw),
        **(tiles | config | {"PX": px, "Q": q}),
    )
    inner = {key: tiles[key] for key in ("G", "MG", "GP")}
    pixels, block = n * h * w, max(1, 128 // tiles["GP"])
    share = triton.cdiv(pixels, programs * _configs.processors(x.device))
    count3 = triton.cdiv(pixels, share)
    moments3 = new(count3, row_size(mid, tiles["MG"]))
    launch(
        _gcrb_train_inner_kernel,
        count3,
        *(z2, gamma2, beta2, mean, var, moments2, moments3, pixels, share, count2, eps),
        **(inner | config | {"Q": block}),
    )
    launch(
        _gcrb_train_output_kernel,
        count1,
        *(x, z2, y, gamma2, beta2, w3, gamma3, beta3, mean, var, moments3),
        *(h, w, rows, count3, eps, xn, xh, yn, yh, xw, yw),
        **(tiles | config | {"Q": q}),
    )
    return y, mean, var


@_reference.unless_few(_reference.gcrb_train_backward)
def gcrb_train_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    w2: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    w3: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    mean: Tensor,
    var: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::gcrb_train_backward`: gradients of x and of the nine parameters."""
    params = (w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3)
    return _gcrb_train_bwd.gcrb_train_backward(grad_y, x, params, mean, var, groups, eps)
