"""Public ops of one block each, re-exported by `functional`, whose conventions they keep.

On a GPU they are Triton kernels, for any width; on a CPU C++ for some widths, and at others `auto`
takes the reference.
Without autocast maps of several dtypes go to the widest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, ops_fusion
from .checks import check_groups, check_like, check_map, check_rank, check_weights
from .tokens import width_misfit

__all__ = ["calibrate", "merge3x3", "merge_backend", "merge_misfit", "sigmoid_gate"]

_ops = getattr(torch.ops, ops_fusion.NAMESPACE)


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
        groups: Groups of the convolution. Default: 8.
        backend: As in `gcrb`.

    Returns:
        `[N, C, H, W]`. Differentiable once in every tensor.
    """
    op = "merge3x3"
    a, b, gate, residual = _widest(op, a=a, b=b, gate=gate, residual=residual)
    n, inner, height, width = a.shape
    check_rank(op, "weight", weight, "C, Cin / groups, 3, 3")
    channels, inputs = weight.shape[0], inner if b is None else 2 * inner
    check_groups(op, groups, Cin=inputs, C=channels)
    check_weights(op, a, weight=(weight, (channels, inputs // groups, 3, 3)))
    if b is not None:
        check_like(op, "b", b, a.shape, a)
    if gate is not None:
        pixel = gate.shape[1] == 1 and gate.shape[2:] == a.shape[2:]
        shape = (n, 1, height, width) if pixel else (n, inner, 1, 1)
        check_like(op, "gate", gate, shape, a)
    if residual is not None:
        check_like(op, "residual", residual, (n, channels, height, width), a)
    backend = dispatch.choose(op, backend, a, merge_misfit(weight, groups, b is not None))
    return _ops.merge3x3(a, b, gate, residual, weight, relu, groups, backend)


def merge_misfit(weight: Tensor, groups: int, joins: bool) -> str | None:
    """Why the C++ of `merge3x3` does not take a weight; None: it does. `joins`: of two maps."""
    channels, inputs = weight.shape[:2]
    if channels == 4 * groups and channels % 32 == 0 and inputs in ((4, 8) if joins else (4,)):
        return None
    return (
        f"it takes groups of 4 channels, a multiple of 32 in all, from {'4 or 8' if joins else 4}; "
        f"got {channels} in {groups} groups from {inputs}"
    )


def merge_backend(planned: str, weight: Tensor, groups: int, joins: bool) -> str:
    """The planned backend, or the reference where that is C++ which does not take the weight."""
    if planned == "cpu" and merge_misfit(weight, groups, joins) is not None:
        return "reference"
    return planned


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
        backend: As in `gcrb`.

    Returns:
        `[N, C, H, W]`. Differentiable once in every tensor.
    """
    op = "calibrate"
    base, x = _widest(op, base=base, x=x)
    check_like(op, "x", x, base.shape, base)
    check_rank(op, "w1", w1, "M, C, 1, 1")
    mid, channels = w1.shape[0], x.shape[1]
    check_weights(
        op,
        x,
        w1=(w1, (mid, channels, 1, 1)),
        b1=(b1, (mid,)),
        w2=(w2, (channels, mid, 1, 1)),
        b2=(b2, (channels,)),
    )
    return _ops.calibrate(base, x, w1, b1, w2, b2, _choose(op, backend, x))[0]


def sigmoid_gate(x: Tensor, logits: Tensor, *, backend: str = "auto") -> Tensor:
    """`x sigmoid(logits)`, both `[N, C, H, W]`; backend as in `gcrb`. Differentiable once."""
    op = "sigmoid_gate"
    x, logits = _widest(op, x=x, logits=logits)
    check_like(op, "logits", logits, x.shape, x)
    return _ops.sigmoid_gate(x, logits, _choose(op, backend, x))


def _choose(op: str, backend: str, x: Tensor) -> str:
    return dispatch.choose(op, backend, x, width_misfit(x.shape[1]))


def _widest(op: str, **maps: Tensor | None) -> list[Tensor | None]:
    """Maps in the widest dtype among them."""
    dtypes = set()
    for name, x in maps.items():
        if x is not None:
            check_map(op, name, x)
            dtypes.add(x.dtype)
    if len(dtypes) == 1:
        return list(maps.values())
    dtype = dtypes.pop()
    for each in dtypes:
        dtype = torch.promote_types(dtype, each)
    return [x if x is None else x.to(dtype) for x in maps.values()]
