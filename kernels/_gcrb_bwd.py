"""Backward of the folded GCRB: two kernels over the map and one that sums the weight gradients.

Everything is recomputed from x. The first kernel streams like the forward one, masks the incoming
gradient by the last ReLU and leaves g2, the gradient at the depthwise output (`[N, H, W, M]`,
float32); the second takes it through the depthwise convolution and the squeeze.
Each program leaves one row of partial sums; the third kernel adds the rows in fixed order, so the
gradients are the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
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
    stack,
    store_mids,
    store_pixel,
    sum_pixels,
)
from ._launch import empty_map, launch, map_strides, readable, relu, relu_backward, strip
from ._reduce import sum_rows

__all__ = ["gcrb_backward"]


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_bwd_expand_kernel(
    grad_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, g2_ptr, partial_ptr,
    H, W, rows, stride_gn, stride_gh, stride_xn, stride_xh,
    stride_gw: tl.constexpr, stride_xw: tl.constexpr,
    G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
    GP: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr,
    PX: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    MASKED: tl.constexpr = (G != GP) or (CG != K * CHUNKS)
    R: tl.constexpr = Q * GP
    n, y0, x0 = strip(tl.program_id(0), W, H, rows, Q * PX)
    row = tl.arange(0, R)
    g = row % GP
    col = x0 + (row // GP) * PX
    channel = g[:, None] * CG + tl.arange(0, K)[None, :]
    column = col[:, None].to(tl.int64)
    x_row = x_ptr + n * stride_xn + (y0 - 1).to(tl.int64) * stride_xh + column * stride_xw + channel
    grad_row = grad_ptr + n * stride_gn + (y0 - 2).to(tl.int64) * stride_gh
    grad_row = grad_row + column * stride_gw + channel
    g2_row = g2_ptr + ((n * H + y0 - 2) * W + col) * (G * MG) + g * MG
    w1, b1 = squeeze_weights(w1_ptr, b1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    w2, b2 = depthwise_weights(w2_ptr, b2_ptr, g, G, MG, MASKED)
    w3, b3 = expand_weights(w3_ptr, b3_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    zero = tl.zeros((R,), tl.float32)
    zeros = tl.zeros((R, K), tl.float32)
    top = repeat(zero, PX * MG)
    middle = top
    grad_w3 = repeat(zeros, MG * CHUNKS)
    grad_b3 = repeat(zeros, CHUNKS)
    grad_b2 = repeat(zero, MG)
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
                grad = load_pixel(grad_row + i * stride_gw, ok, g, G, CG, K, CHUNKS, MASKED)
                e = expand(done, w3, b3, i * MG, MG, CHUNKS)
                g3 = ()
                for h in tl.static_range(CHUNKS):
                    g3 += (relu_backward(e[h], grad[h].to(tl.float32)),)
                new_w3 = ()
                new_b3 = ()
                for h in tl.static_range(CHUNKS):
                    new_b3 += (grad_b3[h] + g3[h],)
                new_b2 = ()
                g2s = ()
                for m in tl.static_range(MG):
                    a = done[i * MG + m]
                    products = g3[0] * w3[m * CHUNKS]
                    for h in tl.static_range(1, CHUNKS):
                        products += g3[h] * w3[m * CHUNKS + h]
                    g2 = relu_backward(a, tl.sum(products, axis=1))
                    new_b2 += (grad_b2[m] + g2,)
                    g2s += (g2,)
                    inner = relu(a)[:, None]
                    for h in tl.static_range(CHUNKS):
                        new_w3 += (grad_w3[m * CHUNKS + h] + g3[h] * inner,)
                store_mids(g2_row + i * G * MG, g2s, ok & (g < G), MG)
                grad_w3 = new_w3
                grad_b3 = new_b3
                grad_b2 = new_b2
        x_row += stride_xh
        grad_row += stride_gh
        g2_row += W * (G * MG)
    # One row of partial sums: grad_w3 [C, MG], grad_b3 [C], grad_b2 [M].
    C: tl.constexpr = G * CG
    M: tl.constexpr = G * MG
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (C * MG + C + M)
    group = tl.arange(0, GP)
    for h in tl.static_range(CHUNKS):
        c = h * K + tl.arange(0, K)
        mask = (group < G)[:, None] & (c < CG)[None, :]
        channel = group[:, None] * CG + c[None, :]
        tl.store(partial + C * MG + channel, sum_pixels(grad_b3[h], Q, GP), mask=mask)
        for m in tl.static_range(MG):
            total = sum_pixels(grad_w3[m * CHUNKS + h], Q, GP)
            tl.store(partial + channel * MG + m, total, mask=mask)
    for m in tl.static_range(MG):
        total = sum_pixels(grad_b2[m], Q, GP)
        tl.store(partial + C * MG + C + group * MG + m, total, mask=group < G)


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _gcrb_bwd_squeeze_kernel(
    grad_ptr, x_ptr, g2_ptr, w1_ptr, b1_ptr, w2_ptr, out_ptr, partial_ptr,
    H, W, rows, stride_gn, stride_gh, stride_xn, stride_xh, stride_on, stride_oh,
    stride_gw: tl.constexpr, stride_xw: tl.constexpr, stride_ow: tl.constexpr,
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
    top = y0.to(tl.int64)
    x_row = x_ptr + n * stride_xn + top * stride_xh + column * stride_xw + channel
    grad_row = grad_ptr + n * stride_gn + top * stride_gh + column * stride_gw + channel
    out_row = out_ptr + n * stride_on + top * stride_oh + column * stride_ow + channel
    g2_row = g2_ptr + ((n * H + y0) * W + col) * (G * MG) + g * MG
    w1, b1 = squeeze_weights(w1_ptr, b1_ptr, g, G, CG, MG, K, CHUNKS, MASKED)
    w2, _ = depthwise_weights(w2_ptr, b1_ptr, g, G, MG, MASKED)
    zero = tl.zeros((R,), tl.float32)
    zeros = tl.zeros((R, K), tl.float32)
    grad_w1 = repeat(zeros, MG * CHUNKS)
    grad_b1 = repeat(zero, MG)
    grad_w2 = repeat(zero, MG * 9)
    ok = (col < W) & (g < G)
    for r in range(y0, tl.minimum(y0 + rows, H)):
        x = load_pixel(x_row, ok, g, G, CG, K, CHUNKS, MASKED)
        mids = squeeze(x, w1, b1, ok, MG, CHUNKS)
        back = repeat(zero, MG)
        new_w2 = ()
        for t in tl.static_range(9):
            # Output pixel (r - dy, col - dx) saw this one through tap (dy, dx).
            near = col - (t % 3 - 1)
            inside = ok & (near >= 0) & (near < W) & (r >= t // 3 - 1) & (r - (t // 3 - 1) < H)
            pointers = g2_row - ((t // 3 - 1) * W + (t % 3 - 1)) * (G * MG)
            sums = ()
            for m in tl.static_range(MG):
                g2 = tl.load(pointers + m, mask=inside, other=0.0)
                sums += (back[m] + g2 * w2[m][t],)
                new_w2 += (grad_w2[t * MG + m] + g2 * mids[m],)
            back = sums
        grad_w2 = new_w2
        g1 = ()
        new_w1 = ()
        new_b1 = ()
        for m in tl.static_range(MG):
            each = relu_backward(mids[m], back[m])
            g1 += (each,)
            new_b1 += (grad_b1[m] + each,)
            for h in tl.static_range(CHUNKS):
                new_w1 += (grad_w1[m * CHUNKS + h] + each[:, None] * x[h].to(tl.float32),)
        grad_w1 = new_w1
        grad_b1 = new_b1
        grad = load_pixel(grad_row, ok, g, G, CG, K, CHUNKS, MASKED)
        out = ()
        for h in tl.static_range(CHUNKS):
            total = grad[h].to(tl.float32)
            for m in tl.static_range(MG):
                total += g1[m][:, None] * w1[m * CHUNKS + h]
            out += (total,)
        store_pixel(out_row, out, ok, g, G, CG, K, CHUNKS, MASKED)
        x_row += stride_xh
        grad_row += stride_gh
        out_row += stride_oh
        g2_row += W * (G * MG)
    # One row of partial sums: grad_w1 [M, CG], grad_b1 [M], grad_w2 [M, 9].
    M: tl.constexpr = G * MG
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (M * CG + M + M * 9)
    group = tl.arange(0, GP)
    for m in tl.static_range(MG):
        mid = group * MG + m
        for h in tl.static_range(CHUNKS):
            c = h * K + tl.arange(0, K)
            mask = (group < G)[:, None] & (c < CG)[None, :]
            total = sum_pixels(grad_w1[m * CHUNKS + h], Q, GP)
            tl.store(partial + mid[:, None] * CG + c[None, :], total, mask=mask)
        taps = ()
        for t in tl.static_range(8):
            taps += (grad_w2[t * MG + m],)
        pointers = partial + M * CG + M + mid[:, None] * 9 + tl.arange(0, 8)[None, :]
        tl.store(pointers, sum_pixels(stack(taps, 0, 8), Q, GP), mask=(group < G)[:, None])
    last = grad_w2[8 * MG : 9 * MG] + grad_b1
    for i in tl.static_range(2 * MG // 8):
        k = i * 8 + tl.arange(0, 8)
        mid = group[:, None] * MG + (k % MG)[None, :]
        column = tl.where((k < MG)[None, :], M + mid * 9 + 8, mid)
        total = sum_pixels(stack(last, i * 8, 8), Q, GP)
        tl.store(partial + M * CG + column, total, mask=(group < G)[:, None])
    for i in tl.static_range(2 * MG // 8 * 8, 2 * MG):
        mid = group * MG + i % MG
        column = mid if i >= MG else M + mid * 9 + 8
        tl.store(partial + M * CG + column, sum_pixels(last[i], Q, GP), mask=group < G)


def _config(x: Tensor, mid: int, groups: int, tiles: dict[str, int]) -> dict[str, Any]:
    """Launch config of both kernels: PX (of the first), Q, rows, num_warps; see `gcrb`."""
    n, c, h, w = x.shape
    name = str(x.dtype).removeprefix("torch.")
    tuned = _configs.lookup("gcrb_backward", f"{name}-C{c}-M{mid}-G{groups}", n * h * w, x.device)
    if tuned is not None:
        return tuned
    lanes = max(1, tiles["K"] // (16 // x.element_size()))
    # With 8 inner channels in a group, only a quarter of the channels of a pixel fit in a thread.
    threads = 128 if tiles["MG"] <= 4 else 32
    config = {"PX": 1 if tiles["MG"] > 2 else 2, "Q": max(1, threads // (tiles["GP"] * lanes))}
    strips = n * triton.cdiv(w, config["Q"]) * 4
    rows = strips * h // (8 * _configs.processors(x.device))
    return config | {"rows": min(max(rows, 2), 32), "num_warps": 4}


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
    """Launcher of `efrdn_fast::gcrb_backward`; arguments are valid."""
    x, grad_y = readable(x), readable(grad_y)
    n, c, h, w = x.shape
    mid = w1.shape[0]
    tiles = group_tiles(c, mid, groups, x.dtype)
    config = dict(_config(x, mid, groups, tiles))
    rows, px, q = (config.pop(k) for k in ("rows", "PX", "Q"))
    params = [each.contiguous() for each in (w1, b1, w2, b2, w3, b3)]
    (gn, gh, gw), (xn, xh, xw) = map_strides(grad_y), map_strides(x)
    new = x.new_empty
    g2 = new((n, h, w, mid), dtype=torch.float32)
    programs = n * triton.cdiv(h, rows) * triton.cdiv(w, q * px)
    expanded = new((programs, c * tiles["MG"] + c + mid), dtype=torch.float32)
    launch(
        _gcrb_bwd_expand_kernel,
        programs,
        *(grad_y, x, *params, g2, expanded, h, w, rows, gn, gh, xn, xh, gw, xw),
        **(tiles | config | {"PX": px, "Q": q}),
    )
    grad_x = empty_map(x, c)
    on, oh, ow = map_strides(grad_x)
    programs = n * triton.cdiv(h, rows) * triton.cdiv(w, q)
    squeezed = new((programs, mid * tiles["CG"] + mid * 10), dtype=torch.float32)
    launch(
        _gcrb_bwd_squeeze_kernel,
        programs,
        *(grad_y, x, g2, params[0], params[1], params[2], grad_x, squeezed, h, w, rows),
        *(gn, gh, xn, xh, on, oh, gw, xw, ow),
        **(tiles | config | {"Q": q}),
    )
    grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3 = (
        torch.empty_like(each, memory_format=torch.contiguous_format) for each in params
    )
    sum_rows(expanded, (grad_w3, grad_b3, grad_b2), squeezed, (grad_w1, grad_b1, grad_w2))
    return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3
