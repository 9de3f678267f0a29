"""The 3x3 convolution of several sources on every backend that can run here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import blocks, cases, functional
from efrdn_fast.testing import case_id, check_backward, check_forward, make_input

HALF = (torch.float16, torch.bfloat16)
FORWARD = [(case, torch.float32) for case in cases.CONV3X3]
FORWARD += [(case, dtype) for case in cases.CONV3X3[3:7] for dtype in HALF]


def flat(case: cases.Conv3x3Case, dtype: torch.dtype):
    """Tensors of a case in one list, and a function of that list."""
    xs, weight, bias, residual, groups, relu, interleaved = case.args(dtype)
    tensors = [*xs, weight, bias, residual]
    present = [t.requires_grad_() for t in tensors if t is not None]

    def call(*values):
        rest = iter(values)
        *xs, weight, bias, residual = [None if t is None else next(rest) for t in tensors]
        return functional.conv3x3(
            xs,
            weight,
            bias,
            residual=residual,
            groups=groups,
            relu=relu,
            interleaved=interleaved,
        )

    return present, call


SMALL = (
    cases.Conv3x3Case((2, 3, 4), (2, 1), 2, "sliced", relu=True, residual=True),
    cases.Conv3x3Case((1, 3, 4), (4, 4), 4, groups=2, interleaved=True, relu=True),
)


@pytest.mark.op("conv3x3")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_conv3x3_forward(target, case, dtype):
    check_forward(case, dtype, *target)


def test_conv3x3_relu_passes_gradients_as_pytorch_does():
    """Where the result is NaN the gradient passes, and a closed ReLU stops an infinite one."""
    x = make_input((1, 1, 1, 3))
    x[0, 0, 0, 2] = torch.nan
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    grad = torch.tensor([[[[torch.inf, 2.0, 3.0]]]])
    found = []
    for call in (
        lambda bias: functional.conv3x3(x, weight, bias, relu=True, backend="reference"),
        lambda bias: F.relu(F.conv2d(x, weight, bias, padding=1)),
    ):
        bias = torch.full((1,), -1e6, requires_grad=True)
        found.append(torch.autograd.grad(call(bias), bias, grad)[0])
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found)


@pytest.mark.op("conv3x3")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_conv3x3_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@pytest.mark.op("conv3x3")
def test_conv3x3_backward_of_an_expanded_gradient(target):
    check_backward(cases.CONV3X3[5], torch.float32, *target, expanded=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_conv3x3_opcheck(case):
    *args, relu, interleaved = case.args()
    for value in (*args[0], *args[1:4]):
        if value is not None:
            value.requires_grad_()
    args = (*args, relu, interleaved, "reference")
    torch.library.opcheck(torch.ops.efrdn_fast.conv3x3.default, args, {"taps": 15})


def test_conv3x3_backward_opcheck():
    xs, weight, _, _, groups, _, interleaved = SMALL[1].args()
    grad = torch.randn(1, 4, 3, 4)
    torch.library.opcheck(
        torch.ops.efrdn_fast.conv3x3_backward.default,
        (grad, xs, weight, groups, interleaved, "reference"),
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_conv3x3_gradcheck(case):
    tensors, call = flat(case, torch.float64)
    assert torch.autograd.gradcheck(call, tensors)


def test_conv3x3_compile_and_export():
    tensors, call = flat(SMALL[0], torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(call(*tensors).square().sum(), tensors))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    with torch.no_grad():
        program = torch.export.export(Module(), tuple(t.detach() for t in tensors))
        torch.testing.assert_close(program.module()(*tensors), call(*tensors))


def test_conv3x3_equals_a_convolution_of_the_interleaved_map():
    a, b = make_input((1, 16, 5, 6)), make_input((1, 16, 5, 6), seed=1)
    weight = torch.randn(32, 4, 3, 3)
    expected = F.conv2d(blocks.interleave(a, b), weight, padding=1, groups=8)
    y = functional.conv3x3([a, b], weight, groups=8, interleaved=True)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("groups", [1, 8])
def test_conv3x3_flops_equal_those_of_the_convolution(groups):
    conv = torch.nn.Conv2d(32, 16, 3, padding=1, groups=groups)
    x = make_input((2, 32, 7, 5)).requires_grad_()
    counts = []
    for step in (
        conv,
        lambda x: functional.conv3x3(x.split(8, 1), conv.weight, conv.bias, groups=groups),
    ):
        with FlopCounterMode(display=False) as forward:
            y = step(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_conv3x3_autocast_casts_maps_and_residual():
    xs, weight, bias, residual, *_ = SMALL[0].args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.conv3x3(xs, weight, bias, residual=residual)
    assert y.dtype == torch.bfloat16
