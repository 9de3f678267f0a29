"""`base + x scale`, scale a bottleneck of the moments of x, forward and backward.

scale = (sigmoid(m(mean)) + sigmoid(m(std))) / 2 with m(s) = W2 relu(W1 s + b1) + b2 needs all of x
before the first result, so there are two passes over the map and a small kernel between them:

1. moments of x (backward: sums of grad x), a row for each program
2. the bottleneck, a program for each image, which merges the rows; backward also the gradients of
   its weights, a row for each image, which `_reduce` sums
3. the result (backward: grad scale + (x - mean) slope + offset, the last two through std and mean)

Moments are those of `_gcrb_moments`, a channel as a group of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gcrb_moments import add_moments, merge_moments, row_size, store_moments, sum_inner_rows
from ._launch import empty_map, launch, readable, relu, relu_backward
from ._pixel_tiles import (
    chunks_of,
    load_channels,
    load_tile,
    pixel_strides,
    store_tile,
    tile_config,
)
from ._reduce import sum_rows

__all__ = ["calibrate", "calibrate_backward"]

EPS = tl.constexpr(1e-6)
"""Under the root of the standard deviation."""
HIDDEN = 16
"""Hidden values of the bottleneck at a time."""


@triton.jit(do_not_specialize=["pixels", "W", "share", "chunks"])
def _calibrate_moments_kernel(
    x_ptr, partial_ptr, pixels, W, share, chunks, stride_xn, stride_xh, stride_xw: tl.constexpr,
    C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`share`: tiles of a program, `chunks`: programs of an image."""
    pid = tl.program_id(0)
    n = (pid // chunks).to(tl.int64)
    first = pid % chunks * share
    count = tl.zeros((P, CB), tl.float32)
    mean = (count,)
    co = (count,)
    for tile in range(first, first + share):
        pixel = tile * P + tl.arange(0, P)
        ok = pixel < pixels
        x = load_tile(x_ptr + n * stride_xn, pixel, ok, W, stride_xh, stride_xw, C, CB)
        count, mean, co = add_moments(count, mean, co, (x,), ok[:, None], 1, 1)
    partial = partial_ptr + pid.to(tl.int64) * (1 + 2 * C)
    flat = count.reshape(P * CB), (mean[0].reshape(P * CB),), (co[0].reshape(P * CB),)
    store_moments(partial, flat[0], flat[1], flat[2], P, C, CB, 1, 1)


@triton.jit(do_not_specialize=["pixels", "W", "share", "chunks"])
def _calibrate_sums_kernel(
    grad_ptr, x_ptr, partial_ptr, pixels, W, share, chunks,
    stride_gn, stride_gh, stride_xn, stride_xh, stride_gw: tl.constexpr, stride_xw: tl.constexpr,
    C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums of grad x over the pixels of a program."""
    pid = tl.program_id(0)
    n = (pid // chunks).to(tl.int64)
    first = pid % chunks * share
    sums = tl.zeros((P, CB), tl.float32)
    for tile in range(first, first + share):
        pixel = tile * P + tl.arange(0, P)
        ok = pixel < pixels
        grad = load_tile(grad_ptr + n * stride_gn, pixel, ok, W, stride_gh, stride_gw, C, CB)
        sums += grad * load_tile(x_ptr + n * stride_xn, pixel, ok, W, stride_xh, stride_xw, C, CB)
    c = tl.arange(0, CB)
    tl.store(partial_ptr + pid.to(tl.int64) * C + c, tl.sum(sums, axis=0), mask=c < C)


@triton.jit
def _layers(w1_ptr, b1_ptr, w2_ptr, first, C: tl.constexpr, M: tl.constexpr,
            CB: tl.constexpr, MB: tl.constexpr):  # fmt: skip
    """Hidden values from `first` on: W1 `[MB, CB]`, b1 `[MB]`, W2 turned `[MB, CB]`."""
    m = first + tl.arange(0, MB)
    c = tl.arange(0, CB)[None, :]
    mask = (m < M)[:, None] & (c < C)
    w1 = tl.load(w1_ptr + m[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
    w2 = tl.load(w2_ptr + c * M + m[:, None], mask=mask, other=0.0).to(tl.float32)
    return w1, tl.load(b1_ptr + m, mask=m < M, other=0.0).to(tl.float32), w2


@triton.jit
def _hidden(w1, b1, values):
    return relu(tl.sum(w1 * values[None, :], axis=1) + b1)


@triton.jit
def _gates(mean, std, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C: tl.constexpr, M: tl.constexpr,
           CB: tl.constexpr, MB: tl.constexpr):  # fmt: skip
    """Sigmoids of the bottleneck of both statistics, `[CB]`."""
    of_mean = load_channels(b2_ptr, C, CB)
    of_std = of_mean
    for first in range(0, M, MB):
        w1, b1, w2 = _layers(w1_ptr, b1_ptr, w2_ptr, first, C, M, CB, MB)
        of_mean += tl.sum(w2 * _hidden(w1, b1, mean)[:, None], axis=0)
        of_std += tl.sum(w2 * _hidden(w1, b1, std)[:, None], axis=0)
    return tl.sigmoid(of_mean), tl.sigmoid(of_std)


@triton.jit(do_not_specialize=["chunks"])
def _calibrate_gates_kernel(
    partial_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, statistics_ptr, factor_ptr, chunks,
    C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, MB: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    partial = partial_ptr + n.to(tl.int64) * chunks * (1 + 2 * C)
    means, variances = merge_moments(partial, chunks, C, CB, 1, 1)
    std = tl.sqrt_rn(variances[0] + EPS)
    of_mean, of_std = _gates(means[0], std, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, M, CB, MB)
    c = tl.arange(0, CB)
    tl.store(statistics_ptr + n * 2 * C + c, means[0], mask=c < C)
    tl.store(statistics_ptr + (n * 2 + 1) * C + c, std, mask=c < C)
    tl.store(factor_ptr + n * C + c, (of_mean + of_std) / 2, mask=c < C)


@triton.jit(do_not_specialize=["chunks", "pixels"])
def _calibrate_gates_bwd_kernel(
    partial_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, statistics_ptr, row_ptr, factor_ptr,
    chunks, pixels, C: tl.constexpr, M: tl.constexpr, CB: tl.constexpr, MB: tl.constexpr,
):  # fmt: skip
    """Row of an image: d W1, d b1, d W2, d b2; factors of channels: scale, slope, mean, offset."""
    n = tl.program_id(0)
    sums = sum_inner_rows(partial_ptr + n.to(tl.int64) * chunks * C, chunks, C, C, CB, 1)
    mean = load_channels(statistics_ptr + n * 2 * C, C, CB)
    std = load_channels(statistics_ptr + (n * 2 + 1) * C, C, CB)
    of_mean, of_std = _gates(mean, std, w1_ptr, b1_ptr, w2_ptr, b2_ptr, C, M, CB, MB)
    half = sums[0] / 2
    out_mean = half * of_mean * (1 - of_mean)
    out_std = half * of_std * (1 - of_std)
    row = row_ptr + n.to(tl.int64) * (2 * C * M + M + C)
    c = tl.arange(0, CB)
    tl.store(row + 2 * C * M + M + c, out_mean + out_std, mask=c < C)
    grad_mean = tl.zeros((CB,), tl.float32)
    grad_std = grad_mean
    for first in range(0, M, MB):
        w1, b1, w2 = _layers(w1_ptr, b1_ptr, w2_ptr, first, C, M, CB, MB)
        hidden_mean = _hidden(w1, b1, mean)
        hidden_std = _hidden(w1, b1, std)
        in_mean = relu_backward(hidden_mean, tl.sum(w2 * out_mean[None, :], axis=1))
        in_std = relu_backward(hidden_std, tl.sum(w2 * out_std[None, :], axis=1))
        grad_mean += tl.sum(w1 * in_mean[:, None], axis=0)
        grad_std += tl.sum(w1 * in_std[:, None], axis=0)
        grad_w1 = in_mean[:, None] * mean[None, :] + in_std[:, None] * std[None, :]
        grad_w2 = hidden_mean[:, None] * out_mean[None, :] + hidden_std[:, None] * out_std[None, :]
        m = first + tl.arange(0, MB)
        mask = (m < M)[:, None] & (c < C)[None, :]
        tl.store(row + m[:, None] * C + c[None, :], grad_w1, mask=mask)
        tl.store(row + C * M + m, in_mean + in_std, mask=m < M)
        tl.store(row + C * M + M + c[None, :] * M + m[:, None], grad_w2, mask=mask)
    share = 1.0 / pixels
    slope = grad_std / tl.where(c < C, std, 1.0) * share
    factor = factor_ptr + n * 4 * C + c
    tl.store(factor, (of_mean + of_std) / 2, mask=c < C)
    tl.store(factor + C, slope, mask=c < C)
    tl.store(factor + 2 * C, mean, mask=c < C)
    tl.store(factor + 3 * C, grad_mean * share, mask=c < C)


@triton.jit(do_not_specialize=["pixels", "W", "tiles"])
def _calibrate_map_kernel(
    a_ptr, x_ptr, y_ptr, factor_ptr, pixels, W, tiles,
    stride_an, stride_ah, stride_xn, stride_xh, stride_aw: tl.constexpr, stride_xw: tl.constexpr,
    BACKWARD: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """a + x scale, or a scale + (x - mean) slope + offset; `tiles` of an image."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * P + tl.arange(0, P)
    ok = pixel < pixels
    a = load_tile(a_ptr + n * stride_an, pixel, ok, W, stride_ah, stride_aw, C, CB)
    x = load_tile(x_ptr + n * stride_xn, pixel, ok, W, stride_xh, stride_xw, C, CB)
    if BACKWARD:
        factor = factor_ptr + n * 4 * C
        away = x - load_channels(factor + 2 * C, C, CB)[None, :]
        y = a * load_channels(factor, C, CB)[None, :]
        y += away * load_channels(factor + C, C, CB)[None, :]
        y += load_channels(factor + 3 * C, C, CB)[None, :]
    else:
        y = a + x * load_channels(factor_ptr + n * C, C, CB)[None, :]
    store_tile(y_ptr + n * pixels * C, y, pixel, ok, C, CB)


def _map(a: Tensor, x: Tensor, factors: Tensor, backward: bool, **tile: int) -> Tensor:
    n, c, h, w = x.shape
    y = empty_map(x, c)
    (an, ah, aw), (xn, xh, xw) = pixel_strides(a), pixel_strides(x)
    tiles = triton.cdiv(h * w, tile["P"])
    launch(
        _calibrate_map_kernel,
        n * tiles,
        *(a, x, y, factors, h * w, w, tiles, an, ah, xn, xh, aw, xw),
        BACKWARD=backward,
        **tile,
    )
    return y


def calibrate(
    base: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """Launcher of `efrdn_fast::calibrate`; arguments are valid (`functional` checks them)."""
    base, x = readable(base), readable(x)
    weights = [each.contiguous() for each in (w1, b1, w2, b2)]
    n, c, h, w = x.shape
    config = tile_config("calibrate", x)
    share, chunks = chunks_of(x, config)
    config.pop("programs")
    sizes = {"C": c, "CB": triton.next_power_of_2(c)}
    partial, statistics, factors = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((n * chunks, row_size(c, 1)), (n, 2, c), (n, c))
    )
    launch(
        _calibrate_moments_kernel,
        n * chunks,
        *(x, partial, h * w, w, share, chunks, *pixel_strides(x)),
        **sizes,
        **config,
    )
    launch(
        _calibrate_gates_kernel,
        n,
        *(partial, *weights, statistics, factors, chunks),
        **_bottleneck(w1),
    )
    return _map(base, x, factors, False, **sizes, **config), statistics


def calibrate_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::calibrate_backward`: gradients of x and of the four weights."""
    grad, x, statistics = readable(grad), readable(x), statistics.contiguous()
    weights = [each.contiguous() for each in (w1, b1, w2, b2)]
    n, c, h, w = x.shape
    config = tile_config("calibrate_backward", x)
    share, chunks = chunks_of(x, config)
    config.pop("programs")
    sizes = {"C": c, "CB": triton.next_power_of_2(c)}
    outs = [torch.empty_like(each) for each in weights]
    partial, rows, factors = (
        x.new_empty(shape, dtype=torch.float32)
        for shape in ((n * chunks, c), (n, sum(out.numel() for out in outs)), (n, 4, c))
    )
    (gn, gh, gw), (xn, xh, xw) = pixel_strides(grad), pixel_strides(x)
    launch(
        _calibrate_sums_kernel,
        n * chunks,
        *(grad, x, partial, h * w, w, share, chunks, gn, gh, xn, xh, gw, xw),
        **sizes,
        **config,
    )
    launch(
        _calibrate_gates_bwd_kernel,
        n,
        *(partial, *weights, statistics, rows, factors, chunks, h * w),
        **_bottleneck(w1),
    )
    sum_rows(rows, outs)
    return _map(grad, x, factors, True, **sizes, **config), *outs


def _bottleneck(w1: Tensor) -> dict[str, int]:
    mid, channels = w1.shape[:2]
    padded = triton.next_power_of_2(channels)
    block = min(HIDDEN, triton.next_power_of_2(mid))
    warps = min(max(padded // 16, 4), 16)
    return {"C": channels, "M": mid, "CB": padded, "MB": block, "num_warps": warps}
