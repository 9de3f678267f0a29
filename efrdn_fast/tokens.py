"""3x3 patches of a map as tokens and back, in the order (tap-major) that NHWC memory gives.

The two sums over patches are each other's transpose, which is what their gradients are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fold", "nhwc", "unfold"]


def nhwc(x: Tensor) -> Tensor:
    """`[N, H, W, C]` view of a map."""
    return x.permute(0, 2, 3, 1)


def unfold(x: Tensor) -> Tensor:
    """3x3 patches with zero padding as tokens `[N, H W, 9 C]`, tap-major."""
    return _Unfold.apply(x)


def fold(t: Tensor, shape: torch.Size, mean: bool) -> Tensor:
    """Sum of the patches that meet at a pixel, or their mean; `[N, C, H, W]` in NHWC memory."""
    y = _Fold.apply(t, shape)
    if not mean:
        return y
    rows, columns = _patches(y, shape[2]), _patches(y, shape[3])
    return y / (rows[:, None] * columns)


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _unfold(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _fold(grad, ctx.shape)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor, shape: torch.Size) -> Tensor:
        return _fold(t, shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _unfold(grad), None


def _unfold(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    padded = F.pad(nhwc(x), (0, 0, 1, 1, 1, 1))
    taps = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [N, H, W, C, 3, 3]
    return taps.permute(0, 1, 2, 4, 5, 3).reshape(n, height * width, 9 * channels)


def _fold(t: Tensor, shape: torch.Size) -> Tensor:
    n, channels, height, width = shape
    t = t.reshape(n, height, width, 9, channels)
    padded = t.new_zeros(n, height + 2, width + 2, channels)
    for tap in range(9):
        i, j = divmod(tap, 3)
        padded[:, i : i + height, j : j + width] += t[:, :, :, tap]
    y = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)


def _patches(like: Tensor, length: int) -> Tensor:
    """How many patches cover each pixel along one axis: 3 inside, 2 at both ends."""
    count = like.new_full((length,), 3.0)
    count[0] = count[-1] = 2.0
    return count
