"""`merge3x3`: grouped 3x3 convolution of interleave(a sigmoid(gate), relu(b)), plus a residual.

Without gate and ReLU the sources go to `conv3x3` as they are, one kernel. Else one kernel joins
them before, as the backward pass needs it: so a sigmoid is computed once for each pixel, not by
every program of the convolution that reads it, and `conv3x3` keeps its registers.

Backward: the same join, gradients of the convolution by the library, and one kernel that takes the
gradient of the join apart. A gate of a pixel sums over its channels in a program; one of a channel
over pixels, by a row of sums for each program, summed in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import empty_map, launch, readable, relu, relu_backward
from ._pixel_tiles import (
    chunks_of,
    load_channels,
    load_tile,
    offsets,
    pixel_strides,
    store_tile,
    tile_config,
)
from ._reduce import sum_rows
from .conv3x3 import conv3x3
from .reference import conv_backward, nhwc_strides

__all__ = ["merge3x3", "merge3x3_backward"]

PIXEL, CHANNEL = tl.constexpr(1), tl.constexpr(2)
"""Kinds of gate; 0: none."""


@triton.jit
def _open(gate_ptr, n, pixel, ok, W, stride_n, stride_h, stride_w: tl.constexpr):
    """Sigmoid of a gate of pixels, `[P, 1]`."""
    pointers = gate_ptr + n * stride_n + offsets(pixel, W, stride_h, stride_w)
    return tl.sigmoid(tl.load(pointers, mask=ok, other=0.0).to(tl.float32))[:, None]


@triton.jit
def _open_channels(gate_ptr, C: tl.constexpr, CB: tl.constexpr):
    """Sigmoid of a gate of channels, `[1, CB]`."""
    return tl.sigmoid(load_channels(gate_ptr, C, CB))[None, :]


@triton.jit(do_not_specialize=["pixels", "W", "tiles"])
def _join_kernel(
    a_ptr, b_ptr, gate_ptr, y_ptr, pixels, W, tiles,
    stride_an, stride_ah, stride_bn, stride_bh, stride_tn, stride_th,
    stride_aw: tl.constexpr, stride_bw: tl.constexpr, stride_tw: tl.constexpr,
    GATE: tl.constexpr, RELU: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`tiles` of an image; `stride_t*`: of the gate."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * P + tl.arange(0, P)
    ok = pixel < pixels
    y = load_tile(a_ptr + n * stride_an, pixel, ok, W, stride_ah, stride_aw, C, CB)
    if GATE == PIXEL:
        y *= _open(gate_ptr, n, pixel, ok, W, stride_tn, stride_th, stride_tw)
    if GATE == CHANNEL:
        y *= _open_channels(gate_ptr + n * stride_tn, C, CB)
    if b_ptr is None:
        store_tile(y_ptr + n * pixels * C, y, pixel, ok, C, CB)
    else:
        b = load_tile(b_ptr + n * stride_bn, pixel, ok, W, stride_bh, stride_bw, C, CB)
        if RELU:
            b = relu(b)
        y = tl.join(y, b).reshape(P, 2 * CB)
        store_tile(y_ptr + n * pixels * (2 * C), y, pixel, ok, 2 * C, 2 * CB)


@triton.jit(do_not_specialize=["pixels", "W", "share", "chunks"])
def _part_kernel(
    grad_ptr, a_ptr, b_ptr, gate_ptr, grad_a_ptr, grad_b_ptr, grad_gate_ptr,
    pixels, W, share, chunks, stride_gn, stride_gh,
    stride_an, stride_ah, stride_bn, stride_bh, stride_tn, stride_th, stride_gw: tl.constexpr,
    stride_aw: tl.constexpr, stride_bw: tl.constexpr, stride_tw: tl.constexpr,
    GATE: tl.constexpr, RELU: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`share`: tiles of a program, `chunks`: programs of an image.

    grad_gate: `[N, pixels]`, or sums `[chunks, N, C]` of the programs.
    """
    pid = tl.program_id(0)
    image = pid // chunks
    n = image.to(tl.int64)
    first = pid % chunks * share
    sums = tl.zeros((P, CB), tl.float32)
    if GATE == CHANNEL:
        gate = _open_channels(gate_ptr + n * stride_tn, C, CB)
    for tile in range(first, first + share):
        pixel = tile * P + tl.arange(0, P)
        ok = pixel < pixels
        grad_row = grad_ptr + n * stride_gn
        if b_ptr is None:
            grad = load_tile(grad_row, pixel, ok, W, stride_gh, stride_gw, C, CB)
        else:
            both = load_tile(grad_row, pixel, ok, W, stride_gh, stride_gw, 2 * C, 2 * CB)
            grad, grad_b = tl.split(both.reshape(P, CB, 2))
            if RELU:
                b = load_tile(b_ptr + n * stride_bn, pixel, ok, W, stride_bh, stride_bw, C, CB)
                grad_b = relu_backward(b, grad_b)
            store_tile(grad_b_ptr + n * pixels * C, grad_b, pixel, ok, C, CB)
        if GATE:
            a = load_tile(a_ptr + n * stride_an, pixel, ok, W, stride_ah, stride_aw, C, CB)
            if GATE == PIXEL:
                gate = _open(gate_ptr, n, pixel, ok, W, stride_tn, stride_th, stride_tw)
                total = tl.sum(grad * a, axis=1)[:, None] * gate * (1 - gate)
                store_tile(grad_gate_ptr + n * pixels, total, pixel, ok, 1, 1)
            else:
                sums += grad * a
            grad *= gate
        store_tile(grad_a_ptr + n * pixels * C, grad, pixel, ok, C, CB)
    if GATE == CHANNEL:
        images = tl.num_programs(0) // chunks
        row = grad_gate_ptr + ((pid % chunks) * images + image).to(tl.int64) * C
        c = tl.arange(0, CB)
        total = tl.sum(sums * gate * (1 - gate), axis=0)
        tl.store(row + c, total, mask=c < C)


def _kind(a: Tensor, gate: Tensor | None) -> int:
    if gate is None:
        return 0
    pixel = gate.shape[1] == 1 and gate.shape[2:] == a.shape[2:]
    return (PIXEL if pixel else CHANNEL).value


def _strides(x: Tensor | None) -> tuple[int, int | None, int]:
    return (0, None, 0) if x is None else pixel_strides(x)


def _join(a: Tensor, b: Tensor | None, gate: Tensor | None, relu: bool) -> Tensor:
    """`interleave(a sigmoid(gate), relu(b))`."""
    n, c, h, w = a.shape
    y = empty_map(a, c if b is None else 2 * c)
    config = tile_config("merge3x3", y)
    config.pop("programs")
    tiles = triton.cdiv(h * w, config["P"])
    (an, ah, aw), (bn, bh, bw), (tn, th, tw) = _strides(a), _strides(b), _strides(gate)
    launch(
        _join_kernel,
        n * tiles,
        *(a, b, gate, y, h * w, w, tiles, an, ah, bn, bh, tn, th, aw, bw, tw),
        GATE=_kind(a, gate),
        RELU=relu,
        C=c,
        CB=triton.next_power_of_2(c),
        **config,
    )
    return y


def _readable(*maps: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else readable(each) for each in maps)


def merge3x3(
    a: Tensor,
    b: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    relu: bool,
    groups: int,
) -> Tensor:
    """Launcher of `efrdn_fast::merge3x3`; arguments are valid (`functional` checks them)."""
    a, b, gate = _readable(a, b, gate)
    if gate is None and not (relu and b is not None):
        sources = [a] if b is None else [a, b]
        return conv3x3(sources, weight, None, residual, groups, False, b is not None)
    return conv3x3([_join(a, b, gate, relu)], weight, None, residual, groups, False, False)


def merge3x3_backward(
    grad: Tensor,
    a: Tensor,
    b: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    relu: bool,
    groups: int,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::merge3x3_backward`: gradients of a, b, gate and weight."""
    a, b, gate = _readable(a, b, gate)
    plain = b is None and gate is None
    y = a if plain else _join(a, b, gate, relu)
    grad_y, grad_weight = conv_backward(grad, y, weight.to(y.dtype), groups, padding=1)
    grad_y = readable(grad_y)
    grad_weight = grad_weight.to(weight.dtype, memory_format=torch.contiguous_format)
    grad_b, grad_gate = (a.new_empty(0, dtype=torch.float32) for _ in range(2))
    if plain:
        return nhwc_strides(grad_y), grad_b, grad_gate, grad_weight

    n, c, h, w = a.shape
    kind = _kind(a, gate)
    config = tile_config("merge3x3_backward", grad_y)
    share, chunks = (
        chunks_of(a, config) if kind == CHANNEL else (1, triton.cdiv(h * w, config["P"]))
    )
    config.pop("programs")
    grad_a = empty_map(a, c)
    if b is not None:
        grad_b = empty_map(a, c)
    if gate is not None:
        grad_gate = gate.new_empty(gate.shape)
    sums = grad_gate
    if kind == CHANNEL:
        sums = a.new_empty((chunks, n * c), dtype=torch.float32)
    (gn, gh, gw), (an, ah, aw) = pixel_strides(grad_y), pixel_strides(a)
    (bn, bh, bw), (tn, th, tw) = _strides(b), _strides(gate)
    launch(
        _part_kernel,
        n * chunks,
        *(grad_y, a, b, gate, grad_a, grad_b, sums, h * w, w, share, chunks),
        *(gn, gh, an, ah, bn, bh, tn, th, gw, aw, bw, tw),
        GATE=kind,
        RELU=relu,
        C=c,
        CB=triton.next_power_of_2(c),
        **config,
    )
    if kind == CHANNEL:
        sum_rows(sums, (grad_gate,))
    return grad_a, grad_b, grad_gate, grad_weight
