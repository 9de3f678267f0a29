"""GCRB with folded BatchNorm in one kernel: one read and one write of the map.

y = x + relu(W3 relu(dw(relu(W1 x + b1)) + b2) + b3), W1 and W3 grouped 1x1 convolutions, dw a
depthwise 3x3 whose input is 0 outside the image.

A program streams down a strip of columns. A thread holds PX neighbouring pixels, so the 3x3 window
costs (PX + 2) / PX squeezes for each pixel and no exchange between threads; of the rows it carries
only two partial sums of the depthwise convolution. Two kernels:

- any shape, all arithmetic in float32: a row of a tile is (pixels, group), since groups never mix;
- 16-bit maps of at least 16 channels, M = 8 or 16: both 1x1 convolutions on tensor cores, with
  block-diagonal weights. Weights and inner values go in as high + low halves, so what is rounded
  is (nearly) only the output; 500 instead of 1,000 thread instructions for each pixel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _gcrb_bwd
from ._gcrb_tiles import (
    depthwise_row,
    depthwise_weights,
    expand,
    expand_weights,
    group_tiles,
    load_pixel,
    repeat,
    squeeze,
    squeeze_weights,
    store_pixel,
)
from ._launch import dot, empty_map, launch, map_strides, readable, relu, strip

__all__ = ["forward_config", "gcrb", "gcrb_backward"]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_fwd_kernel(
    x_ptr, y_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    H, W, rows, stride_xn, stride_xh, stride_yn, stride_yh,
    stride_xw: tl.constexpr, stride_yw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr,
    PX: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q * PX)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + (row // GP) * PX  # first of the PX columns
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + (y0 - 1).to(tl.int64) * stride_xh + column * stride_xw + channel
    y_row = y_ptr + n * stride_yn + (y0 - 2).to(tl.int64) * stride_yh + column * stride_yw + channel
    w1, b1 = squeeze_weights(w1_ptr, b1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    w2, b2 = depthwise_weights(w2_ptr, b2_ptr, g, G, MG, MASKED)
    w3, b3 = expand_weights(w3_ptr, b3_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    top = repeat(tl.zeros((R,), tl.float32), PX * MG)
    middle = top
    for r in range(y0 - 1, tl.minimum(y0 + rows, H) + 1):
        mids = ()
        for j in tl.static_range(PX + 2):
            inside = (r >= 0) & (r < H) & (col + (j - 1) >= 0) & (col + (j - 1) < W)
            pointers = x_row + (j - 1) * stride_xw
            x = load_pixel(pointers, inside, g, G, CG, K, CHUNKS, MASKED)
            mids = mids + squeeze(x, w1, b1, inside, MG, CHUNKS)
        done, top, middle = depthwise_row(top, middle, mids, w2, b2, PX, MG)
        if r > y0:
            for i in tl.static_range(PX):
                ok = col + i < W
                above = x_row - stride_xh + i * stride_xw
                residual = load_pixel(above, ok, g, G, CG, K, CHUNKS, MASKED)
                e = expand(done, w3, b3, i * MG, MG, CHUNKS)
                out = ()
                for h in tl.static_range(CHUNKS):
                    out += (residual[h].to(tl.float32) + relu(e[h]),)
                store_pixel(y_row + i * stride_yw, out, ok, g, G, CG, K, CHUNKS, MASKED)
        x_row += stride_xh
        y_row += stride_yh


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """x as high + low part, both in a 16-bit dtype."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_fwd_mma_kernel(
    x_ptr, y_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr,
    H, W, rows, stride_xn, stride_xh, stride_yn, stride_yh,
    stride_xw: tl.constexpr, stride_yw: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, G: tl.constexpr, PX: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CG: tl.constexpr = C // G
    MG: tl.constexpr = M // G
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q * PX)
    col = x0 + tl.arange(0, Q) * PX
    column = col[:, None].to(tl.int64)
    channel = tl.arange(0, C)
    m = tl.arange(0, M)
    x_row = x_ptr + n * stride_xn + (y0 - 1).to(tl.int64) * stride_xh
    x_row = x_row + column * stride_xw + channel[None, :]
    y_row = y_ptr + n * stride_yn + (y0 - 2).to(tl.int64) * stride_yh
    y_row = y_row + column * stride_yw + channel[None, :]

    # Of every 8 values along K (or N) a matrix instruction hands thread t of 4 values 2t and
    # 2t + 1. Numbering the channels so that a thread owns C / 4 adjacent ones makes the fragments
    # equal to a vector load from memory: nothing passes through shared memory.
    order = (channel // 2) % 4 * (C // 4) + channel // 8 * 2 + channel % 2
    in_group = (order // CG)[:, None] == (m // MG)[None, :]
    w1 = tl.load(w1_ptr + m[None, :] * CG + (order % CG)[:, None], mask=in_group, other=0.0)
    w1_high, w1_low = _halves(w1.to(tl.float32), dtype)
    # K of the second product: high and low half of each inner value, pairs of channels by thread.
    k = tl.arange(0, 2 * M)
    mid = k // 4 * 2 + k % 2
    in_group = (mid // MG)[:, None] == (order // CG)[None, :]
    w3 = tl.load(w3_ptr + order[None, :] * MG + (mid % MG)[:, None], mask=in_group, other=0.0)
    w3_high, w3_low = _halves(w3.to(tl.float32), dtype)
    b1 = tl.load(b1_ptr + m).to(tl.float32)[None, :]
    b2 = tl.load(b2_ptr + m).to(tl.float32)[None, :]
    b3 = tl.load(b3_ptr + order).to(tl.float32)[None, :]
    taps = ()
    for t in tl.static_range(9):
        taps += (tl.load(w2_ptr + m * 9 + t).to(tl.float32)[None, :],)

    top = repeat(tl.zeros((Q, M), tl.float32), PX)
    middle = top
    for r in range(y0 - 1, tl.minimum(y0 + rows, H) + 1):
        mids = ()
        for j in tl.static_range(PX + 2):
            inside = (r >= 0) & (r < H) & (col + (j - 1) >= 0) & (col + (j - 1) < W)
            x = tl.load(x_row + (j - 1) * stride_xw, mask=inside[:, None], other=0.0)
            x = x.reshape(Q, 4, C // 8, 2).permute(0, 2, 1, 3).reshape(Q, C)
            s = dot(x, w1_high, tl.broadcast_to(b1, (Q, M)))
            s = dot(x, w1_low, s)
            mids += (tl.where(inside[:, None], relu(s), 0.0),)
        done, top, middle = depthwise_row(top, middle, mids, (taps,), (b2,), PX, 1)
        if r > y0:
            for i in tl.static_range(PX):
                high, low = _halves(relu(done[i]), dtype)
                both = tl.join(high, low).reshape(Q, M // 2, 2, 2).permute(0, 1, 3, 2)
                both = both.reshape(Q, 2 * M)
                e = dot(both, w3_high, tl.broadcast_to(b3, (Q, C)))
                e = dot(both, w3_low, e)
                e = relu(e).reshape(Q, C // 8, 4, 2).permute(0, 2, 1, 3).reshape(Q, C)
                ok = (col + i < W)[:, None]
                residual = tl.load(x_row - stride_xh + i * stride_xw, mask=ok, other=0.0)
                tl.store(y_row + i * stride_yw, (residual.to(tl.float32) + e).to(dtype), mask=ok)
        x_row += stride_xh
        y_row += stride_yh


def forward_config(x: Tensor, mid: int, groups: int) -> dict[str, Any]:
    """Launch config of the forward kernel: MMA, PX, Q, rows, num_warps, num_stages.

    PX: pixels of a thread; Q: threads (or rows of a matrix tile) along W; rows: height of a strip.
    """
    n, c, h, w = x.shape
    name = str(x.dtype).removeprefix("torch.")
    tuned = _configs.lookup("gcrb", f"{name}-C{c}-M{mid}-G{groups}", n * h * w, x.device)
    if tuned is not None:
        return tuned
    mma = x.dtype != torch.float32 and c in (16, 32, 64) and mid in (8, 16)
    if mma:
        config = {"MMA": 1, "PX": 2, "Q": 16, "num_warps": 1, "num_stages": 1}
    else:
        tiles = group_tiles(c, mid, groups, x.dtype)
        lanes = max(1, tiles["K"] // (16 // x.element_size()))  # threads that share a pixel
        config = {"MMA": 0, "PX": {1: 4, 2: 2, 3: 2, 4: 2}.get(tiles["MG"], 1)}
        config |= {"Q": max(1, 128 // (tiles["GP"] * lanes)), "num_warps": 4, "num_stages": 1}
    # Short strips where the image is small: eight warps for each processor come first.
    strips = n * triton.cdiv(w, config["Q"] * config["PX"]) * config["num_warps"]
    rows = strips * h // (8 * _configs.processors(x.device))
    return config | {"rows": min(max(rows, 2), 32)}


def gcrb(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    groups: int,
) -> Tensor:
    """Launcher of `efrdn_fast::gcrb`; arguments are valid (`functional.gcrb` checks them)."""
    x = readable(x)
    y = empty_map(x, x.shape[1])
    n, c, h, w = x.shape
    mid = w1.shape[0]
    config = dict(forward_config(x, mid, groups))
    mma, rows = config.pop("MMA"), config.pop("rows")
    programs = n * triton.cdiv(h, rows) * triton.cdiv(w, config["Q"] * config["PX"])
    (xn, xh, xw), (yn, yh, yw) = map_strides(x), map_strides(y)
    weights = (each.contiguous() for each in (w1, b1, w2, b2, w3, b3))
    args = (x, y, *weights, h, w, rows, xn, xh, yn, yh, xw, yw)
    if mma:
        launch(_gcrb_fwd_mma_kernel, programs, *args, C=c, M=mid, G=groups, **config)
    else:
        launch(_gcrb_fwd_kernel, programs, *args, **group_tiles(c, mid, groups, x.dtype), **config)
    return y


def gcrb_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    groups: int,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::gcrb_backward`: gradients of x and of the six parameters."""
    return _gcrb_bwd.gcrb_backward(grad_y, x, w1, b1, w2, b2, w3, b3, groups)
