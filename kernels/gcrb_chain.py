"""EFFB's chain of three GCRBs (BatchNorm folded) in one kernel: g1, g2 and g3 from one read of x.

A program holds a tile of pixels with three more around it, of which each GCRB spoils one ring. Maps
stay in registers, both 1x1 convolutions run on tensor cores with block-diagonal weights, and only
the inner channels pass between threads: a depthwise 3x3 is a sum over columns of sums over rows,
four exchanges. float32 maps take three TF32 products for one, which is as exact as float32.

It computes (h + 6) (w + 6) / (h w) times the pixels, three launches of `gcrb` read and write more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._launch import dot, empty_map, launch, map_strides, readable, relu
from ._precision import convolution_tf32
from .gcrb import gcrb

__all__ = ["gcrb_chain"]

HALO = tl.constexpr(3)


@triton.jit
def _from(values, pixel, offset: tl.constexpr):
    """Values of the pixel `offset` further on in the tile; at the rim any."""
    at = tl.minimum(tl.maximum(pixel + offset, 0), values.shape[0] - 1)
    return tl.gather(values, tl.broadcast_to(at[:, None], values.shape), axis=0)


@triton.jit
def _depthwise(mids, w2_ptr, b2_ptr, pixel, m, M: tl.constexpr, WIDTH: tl.constexpr):
    real = m < M
    above = _from(mids, pixel, -WIDTH)
    below = _from(mids, pixel, WIDTH)
    out = tl.zeros(mids.shape, tl.float32) + tl.load(b2_ptr + m, mask=real, other=0.0)[None, :]
    for j in tl.static_range(3):
        column = above * tl.load(w2_ptr + m * 9 + j, mask=real, other=0.0)[None, :]
        column += mids * tl.load(w2_ptr + m * 9 + 3 + j, mask=real, other=0.0)[None, :]
        column += below * tl.load(w2_ptr + m * 9 + 6 + j, mask=real, other=0.0)[None, :]
        if j == 1:
            out += column
        else:
            out += _from(column, pixel, j - 1)
    return out


@triton.jit(do_not_specialize=["H", "W"])
def _gcrb_chain_kernel(
    x_ptr, params, ys, H, W, stride_xn, stride_xh, stride_yn, stride_yh,
    stride_xw: tl.constexpr, stride_yw: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, G: tl.constexpr, MP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`HEIGHT`, `WIDTH`: of a tile with its halo; `MP`: M padded for a matrix product."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    CG: tl.constexpr = C // G
    MG: tl.constexpr = M // G
    across = tl.cdiv(W, WIDTH - 2 * HALO)
    down = tl.cdiv(H, HEIGHT - 2 * HALO)
    pid = tl.program_id(0)
    n = (pid // (across * down)).to(tl.int64)
    pixel = tl.arange(0, HEIGHT * WIDTH)
    tile_y = pixel // WIDTH
    tile_x = pixel % WIDTH
    y = pid // across % down * (HEIGHT - 2 * HALO) + tile_y - HALO
    x = pid % across * (WIDTH - 2 * HALO) + tile_x - HALO
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    own = inside & (tile_y >= HALO) & (tile_y < HEIGHT - HALO)
    own = own & (tile_x >= HALO) & (tile_x < WIDTH - HALO)
    c = tl.arange(0, C)
    m = tl.arange(0, MP)
    squeezed = (c // CG)[:, None] == (m // MG)[None, :]
    squeezed = squeezed & (m < M)[None, :]
    at = y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
    source = x_ptr + n * stride_xn + at[:, None] + c[None, :]
    g = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
    at = n * stride_yn + y.to(tl.int64) * stride_yh + x.to(tl.int64) * stride_yw
    for k in tl.static_range(3):
        w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr = params[k]
        w1 = w1_ptr + m[None, :] * CG + (c % CG)[:, None]
        w1 = tl.load(w1, mask=squeezed, other=0.0).to(dtype)
        b1 = tl.load(b1_ptr + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
        mids = dot(g.to(dtype), w1, tl.zeros((HEIGHT * WIDTH, MP), tl.float32), PRECISION) + b1
        mids = tl.where(inside[:, None], relu(mids), 0.0)
        mids = relu(_depthwise(mids, w2_ptr, b2_ptr, pixel, m, M, WIDTH))
        w3 = w3_ptr + c[None, :] * MG + (m % MG)[:, None]
        w3 = tl.load(w3, mask=tl.trans(squeezed), other=0.0).to(dtype)
        b3 = tl.load(b3_ptr + c).to(tl.float32)[None, :]
        e = dot(mids.to(dtype), w3, tl.zeros((HEIGHT * WIDTH, C), tl.float32), PRECISION) + b3
        g += relu(e)
        tl.store(ys[k] + at[:, None] + c[None, :], g.to(dtype), mask=own[:, None])


def _config(x: Tensor, mid: int, groups: int) -> dict[str, Any]:
    """Launch config: HEIGHT and WIDTH of a tile with its halo (products powers of two)."""
    n, c, h, w = x.shape
    name = f"{str(x.dtype).removeprefix('torch.')}-C{c}-M{mid}-G{groups}"
    tuned = _configs.lookup("gcrb_chain", name, n * h * w, x.device)
    # A tile of 512 pixels spills, on 8 warps as on 16.
    return tuned or {"HEIGHT": 16, "WIDTH": 16, "num_warps": 8, "num_stages": 1}


def gcrb_chain(x: Tensor, params: Sequence[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of `efrdn_fast::gcrb_chain`; arguments are valid.

    Channels that make no matrix product (16, 32 or 64, and up to 16 inside) go through `gcrb`.
    """
    c, mid = x.shape[1], params[0].shape[0]
    if c not in (16, 32, 64) or mid > 16:
        g1 = gcrb(x, *params[:6], groups)
        g2 = gcrb(g1, *params[6:12], groups)
        return g1, g2, gcrb(g2, *params[12:], groups)
    x = readable(x)
    n, _, h, w = x.shape
    ys = tuple(empty_map(x, c) for _ in range(3))
    config = dict(_config(x, mid, groups))
    params = [p.contiguous() for p in params]
    down = triton.cdiv(h, config["HEIGHT"] - 6)
    across = triton.cdiv(w, config["WIDTH"] - 6)
    exact = x.dtype == torch.float32 and not convolution_tf32()
    (xn, xh, xw), (yn, yh, yw) = map_strides(x), map_strides(ys[0])
    launch(
        _gcrb_chain_kernel,
        n * down * across,
        *(x, tuple(tuple(params[i : i + 6]) for i in (0, 6, 12)), ys, h, w, xn, xh, yn, yh, xw, yw),
        C=c,
        M=mid,
        G=groups,
        MP=16,
        PRECISION="tf32x3" if exact else "tf32",
        **config,
    )
    return ys
