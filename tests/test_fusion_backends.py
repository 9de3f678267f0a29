"""Gates and joins of the lattice on every backend that can run here, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from efrdn_fast.kernels import _configs

from efrdn_fast import fusion
from efrdn_fast.cases_fusion import CalibrateCase, FusionCase, Merge3x3Case, SigmoidGateCase
from efrdn_fast.errors import BackendUnavailable
from efrdn_fast.testing import case_id, check_backward, check_forward, make_input

HALF = (torch.float16, torch.bfloat16)
SHAPES = (
    ((2, 32, 5, 7), "channels_last"),
    ((1, 32, 33, 17), "sliced"),
    ((3, 16, 1, 1), "contiguous"),
    ((2, 20, 1, 13), "sliced"),
    ((2, 12, 11, 1), "contiguous"),
)
CASES = [
    (cls(*shape), torch.float32) for cls in (SigmoidGateCase, CalibrateCase) for shape in SHAPES
]
CASES += [(cls(*SHAPES[1]), dtype) for cls in (SigmoidGateCase, CalibrateCase) for dtype in HALF]
MERGES = (
    Merge3x3Case((2, 32, 5, 7)),
    Merge3x3Case((1, 16, 11, 1), "sliced", gate="channel"),
    Merge3x3Case((2, 16, 1, 1), "contiguous", gate="channel", relu=False, added=False),
    Merge3x3Case((2, 20, 1, 13), "sliced", relu=False),
    Merge3x3Case((1, 32, 3, 5), "contiguous", gate=None),
    Merge3x3Case((1, 32, 7, 2), "sliced", gate=None, relu=False, added=False),
    Merge3x3Case((2, 32, 2, 3), gate="channel", second=False, relu=False),
    Merge3x3Case((1, 32, 3, 2), "sliced", gate=None, second=False),
)
CASES += [(case, torch.float32) for case in MERGES]
CASES += [(case, dtype) for case in MERGES[:2] for dtype in HALF]


def served(case: FusionCase, backend: str) -> bool:
    """Whether a backend takes the widths of a case; C++ does not take all, and says so."""
    if backend != "cpu" or case.shape[1] % (32 if case.op == "merge3x3" else 16) == 0:
        return True
    with pytest.raises(BackendUnavailable, match="'cpu' cannot run: it takes"):
        case.call(*case.args(), backend)
    return False


@pytest.mark.op("merge3x3")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_id)
def test_fusion_forward(target, case, dtype):
    if served(case, target[1]):
        check_forward(case, dtype, *target)


@pytest.mark.op("merge3x3_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_id)
def test_fusion_backward(target, case, dtype):
    if served(case, target[1]):
        check_backward(case, dtype, *target)


class Cropped:
    """A case whose maps are windows of larger ones: their rows do not follow each other."""

    def __init__(self, case):
        self.op, self.call, self.reference = case.op, case.call, case.reference
        self.case = case

    def args(self, dtype=torch.float32, device="cpu"):
        size = self.case.shape[2:]
        return tuple(
            _around(value) if isinstance(value, torch.Tensor) and value.shape[2:] == size else value
            for value in self.case.args(dtype, device)
        )


def _around(x):
    """`x` as a window of a map of NaN."""
    whole = F.pad(x, (1, 2, 1, 1), value=torch.nan).contiguous(memory_format=torch.channels_last)
    return whole[:, :, 1:-1, 1:-2]


@pytest.mark.op("merge3x3_backward")
@pytest.mark.parametrize("cls", [SigmoidGateCase, CalibrateCase, Merge3x3Case])
def test_fusion_forward_and_backward_of_windows(target, cls):
    case = Cropped(cls((2, 32, 5, 6)))
    check_forward(case, torch.float32, *target)
    check_backward(case, torch.float32, *target)


@pytest.mark.op("merge3x3_backward")
@pytest.mark.parametrize("cls", [SigmoidGateCase, CalibrateCase, Merge3x3Case])
def test_fusion_backward_of_an_expanded_gradient(target, cls):
    check_backward(cls((2, 32, 3, 4)), torch.float32, *target, expanded=True)


@pytest.mark.op("calibrate")
def test_calibrate_forward_keeps_small_deviations_of_large_values(target):
    """As a difference of squares they would be lost."""
    device, backend = target
    case = CalibrateCase((2, 32, 9, 16))
    base, x, *weights = case.args(device=device)
    x = (x + 1000).contiguous(memory_format=torch.channels_last)
    ops = torch.ops.efrdn_fast
    with _configs.trial("calibrate", {"P": 16, "programs": 6, "num_warps": 4}):
        _, statistics = ops.calibrate(base, x, *weights, backend)
    exact = x.double().flatten(2)
    std = (exact.var(dim=2, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(statistics[:, 0].double(), exact.mean(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(statistics[:, 1].double(), std, rtol=5e-5, atol=0)


@pytest.mark.op("merge3x3_backward")
@pytest.mark.parametrize(
    "case", [CalibrateCase((3, 32, 9, 7)), MERGES[6]], ids=lambda case: case.op
)
def test_fusion_backward_by_many_programs(target, case):
    """What several programs leave of an image is summed, and repeats bit by bit."""
    config = {"P": 8, "programs": 12, "num_warps": 4}
    with _configs.trial(f"{case.op}_backward", config):
        check_backward(case, torch.float32, *target)
        grads = []
        for _ in range(2):
            args = case.args(device=target[0])
            leaves = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor)]
            grads.append(torch.autograd.grad(case.call(*args, target[1]).sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.op("sigmoid_gate")
def test_sigmoid_gate_forward_of_extreme_logits(target):
    device, backend = target
    logits = torch.tensor([0.0, 30, -30, 200, -200, torch.inf, -torch.inf, torch.nan])
    logits = logits.repeat(4).view(1, 32, 1, 1).to(device)
    found = fusion.sigmoid_gate(torch.ones_like(logits), logits, backend=backend)
    torch.testing.assert_close(found, torch.sigmoid(logits), equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.op("merge3x3")
def test_merge3x3_backward_through_relu_at_zero_and_nan(target):
    """ReLU passes the gradient of a NaN and stops that of zero, as PyTorch's does."""
    device, backend = target
    b = make_input((1, 16, 2, 2), device=device, layout="channels_last")
    b[0, 1, 0, 0] = 0
    b[0, 0, 0, 0] = torch.nan
    weight = torch.ones(32, 4, 3, 3, device=device)
    grads = []
    for name in (backend, "reference"):
        leaf = b.clone().requires_grad_()
        y = fusion.merge3x3(torch.ones_like(b), weight, leaf, relu=True, backend=name)
        grads.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
    torch.testing.assert_close(*grads)
    assert grads[0][0, 1, 0, 0] == 0
