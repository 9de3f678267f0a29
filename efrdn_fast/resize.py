"""MATLAB's bicubic `imresize` on tensors, bit for bit the rule behind the published LR images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["imresize"]

A = -0.5  # MATLAB's cubic parameter
BORDERS = ("replicate", "reflect")


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -0.5, support [-2, 2]."""
    x = x.abs()
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * x**3 - 5 * A * x**2 + 8 * A * x - 4 * A
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _taps(size: int, out: int, scale: float, border: str) -> tuple[Tensor, Tensor]:
    """Source indices and weights of every output sample, both `[out, taps]` (float64 weights)."""
    shrink = min(scale, 1.0)  # the kernel is widened by 1 / scale when the image shrinks
    width = 4 / shrink
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) / scale - 0.5
    first = (centre - width / 2).floor()
    index = first[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)
    weight = shrink * _cubic(shrink * (centre[:, None] - index))
    weight = weight / weight.sum(dim=1, keepdim=True)
    index = index.long()
    if border == "reflect":  # symmetric: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ...
        index = index.remainder(2 * size)
        index = torch.minimum(index, 2 * size - 1 - index)
    else:
        index = index.clamp(0, size - 1)
    used = (weight != 0).any(dim=0)
    return index[:, used], weight[:, used]


def _resize_dim(x: Tensor, dim: int, scale: float, border: str) -> Tensor:
    size = x.shape[dim]
    out = max(1, math.ceil(size * scale - 1e-9))
    index, weight = _taps(size, out, scale, border)
    index, weight = index.to(x.device), weight.to(x.device, x.dtype)
    shape = [1] * x.ndim
    shape[dim] = out
    y = 0
    for tap in range(index.shape[1]):
        y = y + x.index_select(dim, index[:, tap]) * weight[:, tap].view(shape)
    return y


def imresize(
    x: Tensor, scale: float, *, border: str = "replicate", round_passes: bool | None = None
) -> Tensor:
    """Bicubic resize as MATLAB's `imresize` (a = -0.5, anti-aliased when shrinking), rows first.

    Args:
        x: Image, `[..., H, W]`, uint8 (0..255) or floating point.
        scale: Output size over input size, such as 1 / 4 or 4; sizes are rounded up.
        border: "replicate" (clamped, as the published benchmark files) or "reflect" (symmetric).
        round_passes: Round to the 8-bit grid after each of the two passes. Default: as the type,
            uint8 is rounded (half away from zero) and floating point is not. Floating point with
            `round_passes=True` is rounded to multiples of 1 / 255 and clamped to [0, 1].

    Returns:
        `[..., ceil(scale H), ceil(scale W)]`, dtype of `x`; uint8 is computed in float64.

    Raises:
        TypeError: `x` is neither uint8 nor floating point.
        ValueError: `x` has no two spatial dimensions or is empty, `scale` is not positive, or
            `border` is unknown.
    """
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"imresize: x must be a non-empty [..., H, W] tensor, got {list(x.shape)}")
    if not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise TypeError(f"imresize: x must be uint8 or floating point, got {x.dtype}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"imresize: scale must be positive, got {scale}")
    if border not in BORDERS:
        raise ValueError(f"imresize: border must be one of {', '.join(BORDERS)}; got {border!r}")
    is_uint8 = x.dtype == torch.uint8
    rounded = is_uint8 if round_passes is None else round_passes
    peak = 1 if is_uint8 else 255  # factor to the 8-bit grid
    y = x.double() if is_uint8 else x
    for dim in (x.ndim - 2, x.ndim - 1):
        y = _resize_dim(y, dim, scale, border)
        if rounded:
            y = (y * peak + 0.5).floor().clamp(0, 255) / peak
    return (y + 0.5).floor().clamp(0, 255).to(torch.uint8) if is_uint8 else y
