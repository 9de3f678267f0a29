"""Backends `cpu` and `cuda`: the ops in C++, each built and loaded at its first call."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _build

__all__ = ["acrb_backward_cpu", "acrb_cpu", "acrb_out_cpu", "gcrb_backward_cpu", "gcrb_cpu"]


@functools.cache
def _op(name: str):
    _build.load(name.rsplit("_", 1)[1])
    return getattr(torch.ops.efrdn_fast_ext, name).default


def gcrb_cpu(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, groups: int
) -> Tensor:
    return _op("gcrb_cpu")(x, w1, b1, w2, b2, w3, b3, groups)


def gcrb_backward_cpu(
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
    return _op("gcrb_backward_cpu")(grad_y, x, w1, b1, w2, b2, w3, b3, groups)


def acrb_cpu(x: Tensor, weight: Tensor, bias: Tensor, start: int) -> Tensor:
    return _op("acrb_cpu")(x, weight, bias, start)


def acrb_out_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, start: int, out: Tensor, out_start: int
) -> None:
    _op("acrb_out_cpu")(x, weight, bias, start, out, out_start)


def acrb_backward_cpu(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _op("acrb_backward_cpu")(grad_y, x, weight, bias, start)
