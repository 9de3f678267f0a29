"""Tiles `[P, CB]` of maps, P pixels of an image by all channels, for kernels of one pass.

Pixels are counted through the rows of an image. Where the rows of a map follow each other in memory
its stride of H is None, and a pixel's place needs no division. CB is C padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._launch import map_strides

__all__ = [
    "chunks_of",
    "load_channels",
    "load_tile",
    "offsets",
    "pixel_strides",
    "store_tile",
    "tile_config",
    "wanted",
]

ELEMENTS = 2048
"""Values of a tile: 16 for each of 128 threads."""


def pixel_strides(x: Tensor) -> tuple[int, int | None, int]:
    """Strides of N, of H (None: rows follow each other) and of W."""
    n, h, w = map_strides(x)
    return n, None if x.shape[2] == 1 or h == x.shape[3] * w else h, w


def tile_config(op: str, x: Tensor) -> dict[str, Any]:
    """Launch config: P pixels of a tile, `programs` of each multiprocessor where they sum."""
    n, c, h, w = x.shape
    name = f"{str(x.dtype).removeprefix('torch.')}-C{c}"
    tuned = _configs.lookup(op, name, n * h * w, x.device)
    if tuned is not None:
        return dict(tuned)
    pixels = max(1, ELEMENTS // triton.next_power_of_2(c))
    return {"P": pixels, "programs": 2, "num_warps": 4}


def chunks_of(x: Tensor, config: dict[str, Any]) -> tuple[int, int]:
    """Tiles of a program, and programs of an image, for about `programs` on each multiprocessor.

    All that an image's programs leave is read by one, so there are no more than run at a time.
    """
    n, _, h, w = x.shape
    tiles = triton.cdiv(h * w, config["P"])
    share = triton.cdiv(n * tiles, config["programs"] * _configs.processors(x.device))
    share = min(share, tiles)
    return share, triton.cdiv(tiles, share)


@triton.jit
def offsets(pixel, W, stride_h, stride_w: tl.constexpr):
    """Offsets of pixels in an image."""
    if stride_h is None:
        at = pixel.to(tl.int64) * stride_w
    else:
        at = (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w
    return at


@triton.jit
def wanted(ok, C: tl.constexpr, CB: tl.constexpr):
    """Mask of a tile whose pixels are `ok`."""
    mask = ok[:, None]
    if C != CB:
        mask = mask & (tl.arange(0, CB) < C)[None, :]
    return mask


@triton.jit
def load_tile(x_ptr, pixel, ok, W, stride_h, stride_w: tl.constexpr,
              C: tl.constexpr, CB: tl.constexpr):  # fmt: skip
    """Pixels of the image at `x_ptr` in float32, `[P, CB]`; zero where not `ok`."""
    pointers = x_ptr + offsets(pixel, W, stride_h, stride_w)[:, None] + tl.arange(0, CB)[None, :]
    return tl.load(pointers, mask=wanted(ok, C, CB), other=0.0).to(tl.float32)


@triton.jit
def store_tile(y_ptr, value, pixel, ok, C: tl.constexpr, CB: tl.constexpr):
    """Store into a dense NHWC image."""
    pointers = y_ptr + pixel.to(tl.int64)[:, None] * C + tl.arange(0, CB)[None, :]
    tl.store(pointers, value.to(y_ptr.dtype.element_ty), mask=wanted(ok, C, CB))


@triton.jit
def load_channels(pointer, C: tl.constexpr, CB: tl.constexpr):
    """A contiguous vector over the channels in float32, `[CB]`; zero beyond C."""
    c = tl.arange(0, CB)
    return tl.load(pointer + c, mask=c < C, other=0.0).to(tl.float32)
