"""Backends `cpu` and `cuda`: the ops in C++, each library built and loaded at its first call.

Every launcher takes the arguments of its op in `efrdn_fast.ops` without `backend`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _build, reference
from ._precision import convolution_tf32

__all__ = [
    "acrb_backward_cpu",
    "acrb_backward_cuda",
    "acrb_cpu",
    "acrb_cuda",
    "acrb_out_cpu",
    "acrb_out_cuda",
    "calibrate_backward_cpu",
    "calibrate_cpu",
    "conv3x3_cuda",
    "emha_backward_cpu",
    "emha_backward_cuda",
    "emha_cpu",
    "emha_cuda",
    "fold_cpu",
    "gcrb_backward_cpu",
    "gcrb_backward_cuda",
    "gcrb_chain_cpu",
    "gcrb_chain_cuda",
    "gcrb_cpu",
    "gcrb_cuda",
    "gcrb_train_backward_cpu",
    "gcrb_train_backward_cuda",
    "gcrb_train_cpu",
    "gcrb_train_cuda",
    "merge3x3_backward_cpu",
    "merge3x3_cpu",
    "sigmoid_gate_backward_cpu",
    "sigmoid_gate_cpu",
    "token_fold_backward_cuda",
    "token_fold_cuda",
    "token_hidden_backward_cuda",
    "token_hidden_cuda",
    "token_qkv_backward_cuda",
    "token_qkv_cuda",
    "unfold_cpu",
]


@functools.cache
def _op(name: str) -> torch._ops.OpOverload:
    _build.load(name.rsplit("_", 1)[1])
    return getattr(torch.ops.efrdn_fast_ext, name).default


def gcrb_cpu(*args: Any) -> Tensor:
    return _op("gcrb_cpu")(*args)


def gcrb_cuda(*args: Any) -> Tensor:
    return _op("gcrb_cuda")(*args)


def gcrb_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    return _op("gcrb_backward_cpu")(*args)


def gcrb_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("gcrb_backward_cuda")(*args)


def gcrb_chain_cpu(x: Tensor, params: list[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    g1 = gcrb_cpu(x, *params[:6], groups)
    g2 = gcrb_cpu(g1, *params[6:12], groups)
    return g1, g2, gcrb_cpu(g2, *params[12:], groups)


def gcrb_chain_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _op("gcrb_chain_cuda")(*args)


@reference.unless_few(reference.gcrb_train)
def gcrb_train_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _op("gcrb_train_cpu")(*args)


@reference.unless_few(reference.gcrb_train)
def gcrb_train_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _op("gcrb_train_cuda")(*args)


@reference.unless_few(reference.gcrb_train_backward)
def gcrb_train_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    return _op("gcrb_train_backward_cpu")(*args)


@reference.unless_few(reference.gcrb_train_backward)
def gcrb_train_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("gcrb_train_backward_cuda")(*args)


def acrb_cpu(*args: Any) -> Tensor:
    return _op("acrb_cpu")(*args)


def acrb_cuda(*args: Any) -> Tensor:
    return _op("acrb_cuda")(*args)


def acrb_out_cpu(*args: Any) -> None:
    _op("acrb_out_cpu")(*args)


def acrb_out_cuda(*args: Any) -> None:
    _op("acrb_out_cuda")(*args)


def acrb_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    return _op("acrb_backward_cpu")(*args)


def acrb_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("acrb_backward_cuda")(*args)


def conv3x3_cuda(*args: Any) -> Tensor:
    return _op("conv3x3_cuda")(*args, convolution_tf32())


def emha_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _op("emha_cpu")(*args)


def emha_backward_cpu(*args: Any) -> Tensor:
    return _op("emha_backward_cpu")(*args)


def merge3x3_cpu(a, b, gate, residual, weight, relu, groups) -> Tensor:
    return _op("merge3x3_cpu")(a, b, gate, relu, weight, residual)


def merge3x3_backward_cpu(grad, a, b, gate, weight, relu, groups) -> tuple[Tensor, ...]:
    return _op("merge3x3_backward_cpu")(grad, a, b, gate, relu, weight)


def calibrate_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return _op("calibrate_cpu")(*args)


def calibrate_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    return _op("calibrate_backward_cpu")(*args)


def sigmoid_gate_cpu(*args: Any) -> Tensor:
    return _op("sigmoid_gate_cpu")(*args)


def sigmoid_gate_backward_cpu(*args: Any) -> tuple[Tensor, ...]:
    return _op("sigmoid_gate_backward_cpu")(*args)


def unfold_cpu(*args: Any) -> Tensor:
    return _op("unfold_cpu")(*args)


def fold_cpu(*args: Any) -> Tensor:
    return _op("fold_cpu")(*args)


def emha_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return _op("emha_cuda")(*args)


def emha_backward_cuda(*args: Any) -> Tensor:
    return _op("emha_backward_cuda")(*args)


def token_qkv_cuda(*args: Any) -> Tensor:
    return _op("token_qkv_cuda")(*args)


def token_hidden_cuda(*args: Any) -> Tensor:
    return _op("token_hidden_cuda")(*args)


def token_fold_cuda(*args: Any) -> Tensor:
    return _op("token_fold_cuda")(*args)


def token_qkv_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("token_qkv_backward_cuda")(*args)


def token_hidden_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("token_hidden_backward_cuda")(*args)


def token_fold_backward_cuda(*args: Any) -> tuple[Tensor, ...]:
    return _op("token_fold_backward_cuda")(*args)
