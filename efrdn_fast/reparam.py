"""Weight algebra: BatchNorm into a convolution, three asymmetric branches into one 3x3.

Pure functions of tensors, differentiable; folding computes in float64 and returns the dtype of the
weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fold_acrb", "fold_bn", "fold_gcrb", "merge_asymmetric"]


def fold_bn(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals convolution, then BatchNorm.

    `w' = w gamma / sqrt(var + eps)`, `b' = beta - mean gamma / sqrt(var + eps)`.

    Args:
        weight: Of a convolution without bias, `[Cout, ...]`.
        gamma, beta, mean, var: `[Cout]` each.
    """
    factor = gamma.double() / (var.double() + eps).sqrt()
    folded = weight.double() * factor.view(-1, *[1] * (weight.ndim - 1))
    bias = beta.double() - mean.double() * factor
    return folded.to(weight.dtype), bias.to(weight.dtype)


def merge_asymmetric(w1x3: Tensor, w3x3: Tensor, w3x1: Tensor) -> Tensor:
    """3x3 weight whose convolution equals the sum of the three; `[Cout, Cin, 3, 3]`.

    A 1x3 kernel is the middle row of a 3x3, a 3x1 kernel its middle column; all pad with zeros.
    """
    return w3x3 + F.pad(w1x3, (0, 0, 1, 1)) + F.pad(w3x1, (1, 1, 0, 0))


def _fold(weight: Tensor, bn: nn.Module, use: int) -> tuple[Tensor, Tensor]:
    return fold_bn(weight, bn.weight, bn.bias, bn.running_mean[use], bn.running_var[use], bn.eps)


def fold_gcrb(block: nn.Module, use: int = 0) -> tuple[Tensor, ...]:
    """`w1, b1, w2, b2, w3, b3` of `functional.gcrb` from a `blocks.GCRB`, statistics of `use`."""
    return (
        *_fold(block.squeeze.weight, block.bn1, use),
        *_fold(block.depthwise.weight, block.bn2, use),
        *_fold(block.expand.weight, block.bn3, use),
    )


def fold_acrb(block: nn.Module, use: int = 0) -> tuple[Tensor, Tensor]:
    """`weight, bias` of `functional.acrb` from a `blocks.ACRB`, statistics of `use`."""
    branches = (block.conv1x3.weight, block.conv3x3.weight, block.conv3x1.weight)
    merged = merge_asymmetric(*(w.double() for w in branches))
    weight, bias = _fold(merged, block.bn, use)
    dtype: torch.dtype = block.conv3x3.weight.dtype
    return weight.to(dtype), bias.to(dtype)
