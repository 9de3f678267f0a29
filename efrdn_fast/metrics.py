"""PSNR and SSIM as super-resolution papers compute them: on Y, border cut, MATLAB's SSIM window."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["luma", "psnr", "ssim"]

LUMA = (65.481, 128.553, 24.966)  # BT.601 studio range, per 255, plus 16
PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03

Image = Tensor | np.ndarray


def luma(x_255: Tensor) -> Tensor:
    """Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, unrounded; `x_255` is [..., 3, H, W]."""
    r, g, b = x_255.unbind(dim=-3)
    return (16 + (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b) / 255).unsqueeze(-3)


def psnr(sr: Image, hr: Image, crop_border: int, y_channel: bool = True) -> float:
    """Peak signal-to-noise ratio in dB with peak 255, mean over the batch.

    Args:
        sr: Result: float tensor `[N, 3, H, W]` in [0, 1], or uint8 `[H, W, 3]` (array or tensor).
        hr: Truth, same shape and type as `sr`.
        crop_border: Pixels cut from every side first; the scale factor by convention.
        y_channel: Compare Y of BT.601 (unrounded), else the channels as they are; a float image
            may then have one channel, `[N, 1, H, W]`. Default: True.

    Returns:
        dB; `inf` when the images are equal.

    Raises:
        TypeError: The types differ, or are neither float nor uint8.
        ValueError: The shapes differ or are not as above, or nothing is left after the crop.
    """
    a, b = _prepare("psnr", sr, hr, crop_border, y_channel, least=1)
    error = (a - b).square().mean(dim=(1, 2, 3)).cpu()
    return (10 * torch.log10(PEAK**2 / error)).mean().item()


def ssim(sr: Image, hr: Image, crop_border: int, y_channel: bool = True) -> float:
    """Structural similarity: Gaussian window 11x11, sigma 1.5, valid area, K = (0.01, 0.03).

    Arguments, types and errors as `psnr`; what is left after the crop must be at least 11 x 11.
    Without `y_channel` the mean over the channels.
    """
    a, b = _prepare("ssim", sr, hr, crop_border, y_channel, least=WINDOW)
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    index = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return index.mean().item()


def _blur(x: Tensor) -> Tensor:
    """Separable Gaussian over the valid area: `[N, C, H, W]` -> `[N, C, H - 10, W - 10]`."""
    offsets = range(-(WINDOW // 2), WINDOW // 2 + 1)
    taps = [math.exp(-(i**2) / (2 * SIGMA**2)) for i in offsets]
    taps = [tap / sum(taps) for tap in taps]
    for dim in (2, 3):
        size = x.shape[dim] - WINDOW + 1
        y = taps[0] * x.narrow(dim, 0, size)
        for i in range(1, WINDOW):
            y.add_(x.narrow(dim, i, size), alpha=taps[i])
        x = y
    return x


def _prepare(
    name: str, sr: Image, hr: Image, crop_border: int, y_channel: bool, least: int
) -> tuple[Tensor, Tensor]:
    """Both images as float64 `[N, C, H, W]` in 0..255, cropped."""
    if not all(isinstance(image, Tensor | np.ndarray) for image in (sr, hr)):
        raise TypeError(
            f"{name}: expected tensors or arrays, got {type(sr).__name__} and {type(hr).__name__}"
        )
    sr, hr = _as_tensor(sr), _as_tensor(hr)
    if sr.dtype != hr.dtype:
        raise TypeError(f"{name}: sr is {sr.dtype} and hr is {hr.dtype}; give both in one type")
    if sr.shape != hr.shape:
        raise ValueError(f"{name}: sr is {list(sr.shape)} and hr is {list(hr.shape)}")
    if sr.device != hr.device:
        raise ValueError(f"{name}: sr is on {sr.device} and hr on {hr.device}")
    if isinstance(crop_border, bool) or not isinstance(crop_border, int) or crop_border < 0:
        raise ValueError(f"{name}: crop_border must be an int of at least 0, got {crop_border!r}")
    a, b = _to_255(name, sr, y_channel), _to_255(name, hr, y_channel)
    height, width = (size - 2 * crop_border for size in a.shape[2:])
    if height < least or width < least:
        raise ValueError(
            f"{name}: {list(a.shape[2:])} pixels without a border of {crop_border} leave "
            f"{max(0, height)} x {max(0, width)}, at least {least} x {least} are needed"
        )
    rows, columns = (
        slice(crop_border, crop_border + height),
        slice(crop_border, crop_border + width),
    )
    a, b = a[:, :, rows, columns], b[:, :, rows, columns]
    return (luma(a), luma(b)) if y_channel else (a, b)


def _as_tensor(image: Image) -> Tensor:
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.require(image, requirements=("C", "W")))  # copied where it must be


def _to_255(name: str, x: Tensor, y_channel: bool) -> Tensor:
    if x.dtype == torch.uint8:
        if x.ndim != 3 or x.shape[2] != 3:
            raise ValueError(f"{name}: uint8 images must be [H, W, 3], got {list(x.shape)}")
        x, factor = x.permute(2, 0, 1)[None], 1
    elif x.is_floating_point():
        channels = (3,) if y_channel else (1, 3)
        if x.ndim != 4 or x.shape[1] not in channels or x.shape[0] == 0:
            raise ValueError(
                f"{name}: float images must be [N, 3, H, W] (or [N, 1, H, W] with "
                f"y_channel=False), got {list(x.shape)}"
            )
        factor = 255
    else:
        raise TypeError(f"{name}: images must be uint8 or floating point, got {x.dtype}")
    # Metal has no float64: the figures are then computed on the CPU.
    return (x.cpu() if x.device.type == "mps" else x).detach().double() * factor
