"""3x3 patches of a map as tokens and back, in the order (tap-major) that NHWC memory gives."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, ops_fusion

__all__ = ["fold", "nhwc", "unfold", "width_misfit"]

_ops = getattr(torch.ops, ops_fusion.NAMESPACE)


def nhwc(x: Tensor) -> Tensor:
    """`[N, H, W, C]` view of a map."""
    return x.permute(0, 2, 3, 1)


def unfold(x: Tensor, backend: str = "auto") -> Tensor:
    """3x3 patches with zero padding as tokens `[N, H W, 9 C]`, tap-major."""
    return _ops.unfold(x, _choose("unfold", backend, x, x.shape[1]))


def fold(t: Tensor, shape: torch.Size, mean: bool, backend: str = "auto") -> Tensor:
    """Sum of the patches that meet at a pixel, or their mean; `[N, C, H, W]` in NHWC memory."""
    y = _ops.fold(t, shape[2], shape[3], _choose("fold", backend, t, shape[1]))
    if not mean:
        return y
    return y / (_patches(y, shape[2])[:, None] * _patches(y, shape[3]))


def _choose(op: str, backend: str, x: Tensor, channels: int) -> str:
    return dispatch.choose(op, backend, x, width_misfit(channels))


def width_misfit(channels: int) -> str | None:
    """Why the CPU kernels of tokens and gates do not take so many channels; None: they do."""
    return f"it takes channels in multiples of 16, got {channels}" if channels % 16 else None


def _patches(like: Tensor, length: int) -> Tensor:
    """How many patches cover each pixel along one axis: 3, one less at either end."""
    count = like.new_full((length,), 3.0)
    count[0] -= 1.0
    count[-1] -= 1.0
    return count
