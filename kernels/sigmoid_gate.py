"""`x sigmoid(logits)`: one kernel forward, one backward, which computes the sigmoid again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import empty_map, launch, readable
from ._pixel_tiles import load_tile, pixel_strides, store_tile, tile_config

__all__ = ["sigmoid_gate", "sigmoid_gate_backward"]


@triton.jit(do_not_specialize=["pixels", "W", "tiles"])
def _sigmoid_gate_kernel(
    x_ptr, l_ptr, y_ptr, pixels, W, tiles, stride_xn, stride_xh, stride_ln, stride_lh,
    stride_xw: tl.constexpr, stride_lw: tl.constexpr,
    C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`tiles` of an image."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * P + tl.arange(0, P)
    ok = pixel < pixels
    x = load_tile(x_ptr + n * stride_xn, pixel, ok, W, stride_xh, stride_xw, C, CB)
    logits = load_tile(l_ptr + n * stride_ln, pixel, ok, W, stride_lh, stride_lw, C, CB)
    store_tile(y_ptr + n * pixels * C, x * tl.sigmoid(logits), pixel, ok, C, CB)


@triton.jit(do_not_specialize=["pixels", "W", "tiles"])
def _sigmoid_gate_bwd_kernel(
    grad_ptr, x_ptr, l_ptr, grad_x_ptr, grad_l_ptr, pixels, W, tiles,
    stride_gn, stride_gh, stride_xn, stride_xh, stride_ln, stride_lh,
    stride_gw: tl.constexpr, stride_xw: tl.constexpr, stride_lw: tl.constexpr,
    C: tl.constexpr, CB: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * P + tl.arange(0, P)
    ok = pixel < pixels
    grad = load_tile(grad_ptr + n * stride_gn, pixel, ok, W, stride_gh, stride_gw, C, CB)
    x = load_tile(x_ptr + n * stride_xn, pixel, ok, W, stride_xh, stride_xw, C, CB)
    logits = load_tile(l_ptr + n * stride_ln, pixel, ok, W, stride_lh, stride_lw, C, CB)
    gate = tl.sigmoid(logits)
    store_tile(grad_x_ptr + n * pixels * C, grad * gate, pixel, ok, C, CB)
    store_tile(grad_l_ptr + n * pixels * C, grad * x * gate * (1 - gate), pixel, ok, C, CB)


def _each(op: str, kernel: triton.JITFunction, maps: tuple[Tensor, ...], outs: int) -> list[Tensor]:
    """`outs` maps from `maps`, pixel by pixel."""
    maps = tuple(readable(each) for each in maps)
    n, c, h, w = maps[0].shape
    results = [empty_map(maps[0], c) for _ in range(outs)]
    config = tile_config(op, maps[0])
    config.pop("programs")
    strides = [pixel_strides(each) for each in maps]
    tiles = triton.cdiv(h * w, config["P"])
    launch(
        kernel,
        n * tiles,
        *(*maps, *results, h * w, w, tiles),
        *(stride for each in strides for stride in each[:2]),
        *(each[2] for each in strides),
        C=c,
        CB=triton.next_power_of_2(c),
        **config,
    )
    return results


def sigmoid_gate(x: Tensor, logits: Tensor) -> Tensor:
    """Launcher of `efrdn_fast::sigmoid_gate`; arguments are valid."""
    return _each("sigmoid_gate", _sigmoid_gate_kernel, (x, logits), 1)[0]


def sigmoid_gate_backward(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::sigmoid_gate_backward`: gradients of x and of the logits."""
    return tuple(_each("sigmoid_gate_backward", _sigmoid_gate_bwd_kernel, (grad, x, logits), 2))
