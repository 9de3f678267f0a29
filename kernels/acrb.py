"""ACRB, branches merged and BatchNorm folded: y = s + relu(conv3x3(s, W) + b), one kernel.

s is a slice of the channels of the map, read in place; y may go into a slice of another map, so
neither the split before nor the concatenation after makes a copy. The work is that of `conv3x3`
with s as its residual; W is padded to a power of two, not the map.

Backward: the convolution again, its ReLU gating the incoming gradient; the transposed convolution
with the incoming gradient as residual; the weight gradient as products over pixels, whose partial
sums are added in fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from . import reference as _reference
from ._launch import empty_map, launch, map_strides, readable, strip
from ._precision import convolution_tf32
from ._reduce import sum_rows
from .conv3x3 import convolve, fits, load_window, parts, products, window, window_pointers

__all__ = ["acrb", "acrb_backward", "acrb_out"]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _conv3x3_weight_kernel(
    grad_ptr, x_ptr, partial_ptr, H, W, rows, stride_gn, stride_gh, stride_xn, stride_xh,
    stride_gw: tl.constexpr, SOURCES: tl.constexpr, COUT: tl.constexpr, SPLIT: tl.constexpr,
    Q: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Partial sums of one strip: a row of taps of d weight `[COUT, CIN, 3, 3]`, and d bias.

    A program holds NB output channels: nine taps at once would not fit in registers.
    """
    CIN: tl.constexpr = SOURCES[0][0]
    PADDED: tl.constexpr = SOURCES[0][1]
    LEAD: tl.constexpr = SOURCES[0][2]
    BLOCKS: tl.constexpr = (COUT + NB - 1) // NB
    pid = tl.program_id(0)
    tap_row = pid % 3
    out_channel = pid // 3 % BLOCKS * NB + tl.arange(0, NB)
    area = pid // (3 * BLOCKS)
    n, y0, x0 = strip(area, W, H, rows, Q)
    col = x0 + tl.arange(0, Q)
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + (y0 + tap_row - 1).to(tl.int64) * stride_xh
    x_row = window_pointers(x_row, column, 0, SOURCES, 0)
    grad_row = grad_ptr + n * stride_gn + y0.to(tl.int64) * stride_gh
    grad_row = grad_row + column * stride_gw + out_channel[None, :]
    wanted = (col < W)[:, None]
    if COUT % NB != 0:
        wanted = wanted & (out_channel < COUT)[None, :]
    bias = tl.zeros((Q, NB), tl.float32)
    zeros = tl.zeros((NB, PADDED), tl.float32)
    sums = (zeros, zeros, zeros)
    for r in range(y0, tl.minimum(y0 + rows, H)):
        grad = tl.load(grad_row, mask=wanted, other=0.0)
        bias += grad.to(tl.float32)
        turned = parts(tl.trans(grad), SPLIT)
        y = r + tap_row - 1
        added = ()
        for j in tl.static_range(3):
            inside = (col + (j - 1) >= 0) & (col + (j - 1) < W) & (y >= 0) & (y < H)
            x = load_window(x_row, inside, SOURCES, 0, j - 1)
            added += (products(turned, parts(x, SPLIT), sums[j], SPLIT),)
        sums = added
        x_row += stride_xh
        grad_row += stride_gh
    partial = partial_ptr + area.to(tl.int64) * (COUT * CIN * 9 + COUT)
    k = tl.arange(0, PADDED) - LEAD
    real = out_channel < COUT
    mask = real[:, None] & ((k >= 0) & (k < CIN))[None, :]
    index = (out_channel[:, None] * CIN + k[None, :]) * 9 + tap_row * 3
    for j in tl.static_range(3):
        tl.store(partial + index + j, sums[j], mask=mask)
    tl.store(partial + COUT * CIN * 9 + out_channel, tl.sum(bias, axis=0), real & (tap_row == 1))


def acrb(x: Tensor, weight: Tensor, bias: Tensor, start: int) -> Tensor:
    """Launcher of `efrdn_fast::acrb`; arguments are valid (`functional.acrb` checks them)."""
    y = empty_map(x, weight.shape[0])
    acrb_out(x, weight, bias, start, y, 0)
    return y


def acrb_out(
    x: Tensor, weight: Tensor, bias: Tensor, start: int, out: Tensor, out_start: int
) -> None:
    """Launcher of `efrdn_fast::acrb_out`: the same into `out[:, out_start : out_start + d]`."""
    d = weight.shape[0]
    s = readable(x).narrow(1, start, d)
    y = out.narrow(1, out_start, d)
    if not fits([s]):
        _reference.acrb_out(x, weight, bias, start, out, out_start)
    elif y.stride(1) == 1 or d == 1:
        convolve([s], weight, bias, s, y, relu=True)
    else:
        y.copy_(acrb(x, weight, bias, start))


def _config(out: Tensor) -> dict[str, Any]:
    """Launch config of the weight gradient: Q pixels of a row at a time, strips of `rows` rows."""
    n, d, h, w = out.shape
    name = f"{str(out.dtype).removeprefix('torch.')}-D{d}"
    tuned = _configs.lookup("acrb_backward", name, n * h * w, out.device)
    if tuned is not None:
        return tuned
    rows = n * triton.cdiv(w, 32) * 6 * h // (8 * _configs.processors(out.device))
    return {"Q": 32, "NB": 16, "rows": min(max(rows, 4), 32), "num_warps": 2, "num_stages": 1}


def acrb_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of `efrdn_fast::acrb_backward`; grad_x is zero outside the slice."""
    d = weight.shape[0]
    s, grad_y = readable(x).narrow(1, start, d), readable(grad_y)
    if not fits([s]):
        return _reference.acrb_backward(grad_y, x, weight, bias, start)
    gated = empty_map(grad_y, d)
    convolve([s], weight, bias, grad_y, gated, gate=True)
    grad_x = empty_map(x, x.shape[1]).zero_()
    convolve([gated], weight, None, grad_y, grad_x.narrow(1, start, d), transpose=True)

    n, _, h, w = gated.shape
    config = dict(_config(gated))
    rows = config.pop("rows")
    strips = n * triton.cdiv(h, rows) * triton.cdiv(w, config["Q"])
    base, source = window(s, 0, 1)
    partial = x.new_empty((strips, d * d * 9 + d), dtype=torch.float32)
    (gn, gh, gw), (xn, xh, _) = map_strides(gated), map_strides(base)
    launch(
        _conv3x3_weight_kernel,
        strips * triton.cdiv(d, config["NB"]) * 3,
        *(gated, base, partial, h, w, rows, gn, gh, xn, xh, gw),
        SOURCES=(tuple(source),),
        COUT=d,
        SPLIT=x.dtype == torch.float32 and not convolution_tf32(),
        **config,
    )
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = torch.empty_like(bias)
    sum_rows(partial, (grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias
