"""Ops of one block each that have CPU kernels, differentiable once; elsewhere plain PyTorch.

Maps are `[N, C, H, W]` of one dtype, results NHWC memory. Under autocast maps go to its dtype, as
in the ops of `functional`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch

__all__ = ["calibrate", "merge3x3", "sigmoid_gate"]


def merge3x3(
    a: Tensor,
    weight: Tensor,
    b: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    relu: bool = False,
    residual: Tensor | None = None,
    groups: int = 8,
    backend: str = "auto",
) -> Tensor:
    """Grouped 3x3 convolution of `interleave(a sigmoid(gate), relu(b))`, then `+ residual`.

    Args:
        a: `[N, Ca, H, W]`.
        weight: `[C, Cin / groups, 3, 3]`; Cin is Ca, or 2 Ca with `b`.
        b: Like `a`, or None: the convolution is of `a` alone.
        gate: Logits, `[N, 1, H, W]` or `[N, Ca, 1, 1]`, or None.
        relu: ReLU on `b`. Default: False.
        residual: `[N, C, H, W]` or None.
        backend: As in `functional.gcrb`.

    Returns:
        `[N, C, H, W]`.
    """
    a, b, gate, residual = _cast(a, b, gate, residual)
    channels, inputs = weight.shape[:2]
    # What the kernel is written for: groups of four channels out, and of four in from every map.
    fits = channels == 4 * groups and channels % 32 == 0 and inputs in (4, 8)
    fits = fits and a.shape[1] * (1 if b is None else 2) == inputs * groups
    if not fits or dispatch.choose("merge3x3", backend, a) == "reference":
        plain = dispatch.implementation("merge3x3", "reference")
        return plain(a, b, gate, relu, weight, residual, groups)
    return _Merge3x3.apply(a, b, gate, relu, weight, residual)


def calibrate(
    base: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """`base + CC(x)`: `base + x (sigmoid(m(GAP x)) + sigmoid(m(STD x))) / 2`, one bottleneck m.

    Args:
        base, x: `[N, C, H, W]`.
        w1, b1, w2, b2: Of m, `[M, C, 1, 1]`, `[M]`, `[C, M, 1, 1]`, `[C]`.
        backend: As in `functional.gcrb`.
    """
    base, x = _cast(base, x)
    if x.shape[1] % 16 or dispatch.choose("calibrate", backend, x) == "reference":
        return dispatch.implementation("calibrate", "reference")(base, x, w1, b1, w2, b2)
    return _Calibrate.apply(base, x, w1, b1, w2, b2)


def sigmoid_gate(x: Tensor, logits: Tensor, *, backend: str = "auto") -> Tensor:
    """`x sigmoid(logits)`, both `[N, C, H, W]`; backend as in `functional.gcrb`."""
    x, logits = _cast(x, logits)
    if x.shape[1] % 16 or dispatch.choose("sigmoid_gate", backend, x) == "reference":
        return dispatch.implementation("sigmoid_gate", "reference")(x, logits)
    return _SigmoidGate.apply(x, logits)


def _cast(*maps: Tensor | None) -> list[Tensor | None]:
    """Maps in the dtype of autocast, else in the widest among them."""
    first = maps[0]
    if torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
        if first.dtype == torch.float64:
            dtype = first.dtype
    else:
        dtype = first.dtype
        for each in maps[1:]:
            dtype = dtype if each is None else torch.promote_types(dtype, each.dtype)
    return [each if each is None else each.to(dtype) for each in maps]


def _run(op: str, *args):
    """A launcher of the `cpu` backend, which has been chosen."""
    from .kernels import native

    return getattr(native, f"{op}_cpu")(*args)


class _Merge3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, gate, relu, weight, residual):
        ctx.save_for_backward(a, b, gate, weight)
        ctx.relu, ctx.added = relu, residual is not None
        return _run("merge3x3", a, b, gate, relu, weight, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, gate, weight = ctx.saved_tensors
        grads = _run("merge3x3_backward", grad, a, b, gate, ctx.relu, weight)
        grad_a, grad_b, grad_gate, grad_weight = grads
        grad_b = None if b is None else grad_b
        grad_gate = None if gate is None else grad_gate
        return grad_a, grad_b, grad_gate, None, grad_weight, grad if ctx.added else None


class _Calibrate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, x, *weights):
        y, statistics = _run("calibrate", base, x, *weights)
        ctx.save_for_backward(x, *weights, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, *_run("calibrate_backward", grad, *ctx.saved_tensors)


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits):
        ctx.save_for_backward(x, logits)
        return _run("sigmoid_gate", x, logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _run("sigmoid_gate_backward", grad, *ctx.saved_tensors)
