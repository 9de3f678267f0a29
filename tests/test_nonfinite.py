"""NaN and infinity in any map or weight come out where they do of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from efrdn_fast import cases, testing
from efrdn_fast.cases_fusion import CalibrateCase, Merge3x3Case, SigmoidGateCase
from tests.backends import on_cpu

CASES = {
    "gcrb": cases.GcrbCase((1, 32, 5, 6)),
    "acrb": cases.AcrbCase((1, 16, 5, 6), start=5),
    "conv3x3": cases.Conv3x3Case((1, 5, 6), (16,), 16, relu=True, residual=True),
    "merge3x3": Merge3x3Case((1, 32, 5, 6)),
    "merge3x3-channel": Merge3x3Case((1, 32, 5, 6), gate="channel"),
    "calibrate": CalibrateCase((2, 32, 5, 6)),
    "sigmoid_gate": SigmoidGateCase((1, 32, 5, 6)),
}
ON_CPU = [
    pytest.param(case, backend, id=f"{name}-cpu-{backend}", marks=marks)
    for name, case in CASES.items()
    for backend, marks in on_cpu(case.op)
]


def middle(tensor: Tensor) -> tuple[int, ...]:
    """An element away from the borders: of a weight, its middle tap."""
    if tensor.ndim < 4:
        return (0,)
    return (0, tensor.shape[1] // 2, *(size // 2 for size in tensor.shape[2:]))


def spoiled(case, values):
    """A name and the arguments of `case` with one bad value, for each value and tensor."""
    leaves, spec = tree_flatten(case.args())
    for i, leaf in enumerate(leaves):
        for bad in values if isinstance(leaf, Tensor) else ():
            changed = leaf.clone(memory_format=torch.preserve_format)
            changed[middle(leaf)] = bad
            args = [*leaves[:i], changed, *leaves[i + 1 :]]
            yield f"{bad} in tensor {i}", tree_unflatten(args, spec)


def result_and_gradients(function, args) -> list[Tensor]:
    with torch.no_grad():
        out = function(*args)
    grad = testing.make_input(out.shape, seed=7)
    return [out, *testing.gradients(function, grad)(*args)]


@pytest.mark.parametrize(("case", "backend"), ON_CPU)
def test_forward_and_backward_of_what_is_not_finite(case, backend):
    """Tensor cores multiply other groups by zero and split infinity: there more may be lost."""
    exact = backend != "triton"
    call = getattr(case, "call", None) or getattr(torch.ops.efrdn_fast, case.op)
    values = (torch.nan, torch.inf, -torch.inf) if exact else (torch.nan,)
    for what, args in spoiled(case, values):
        found = result_and_gradients(lambda *a: call(*a, backend), args)
        for i, expected in enumerate(result_and_gradients(case.reference, args)):
            name = f"{what}: gradient {i - 1}" if i else f"{what}: output"
            lost, lost_in_pytorch = ~found[i].isfinite(), ~expected.isfinite()
            assert not (lost_in_pytorch & ~lost).any(), f"{name}: hides what is not finite"
            assert not (exact and (lost & ~lost_in_pytorch).any()), f"{name}: spreads it"
            scale = expected[~lost].abs().max() if not lost.all() else 0.0
            error = (found[i] - expected)[~lost].abs().max() if not lost.all() else 0.0
            assert error <= 1e-5 * scale, f"{name}: error {error:.1e} of {scale:.1e}"
