"""Weights in half precision like the map, as `net.to(torch.bfloat16)` leaves them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from efrdn_fast import EFRDNFast, cases, functional, reference
from efrdn_fast.cases_attention import TokenCase
from efrdn_fast.cases_fusion import CalibrateCase, Merge3x3Case
from efrdn_fast.testing import case_id, check_backward, check_forward
from tests.backends import on_cpu

HALF = (torch.float16, torch.bfloat16)


class HalfWeights:
    """A case whose weights are in the dtype of its map."""

    def __init__(self, case):
        self.case, self.op, self.reference = case, case.op, case.reference
        if hasattr(case, "call"):
            self.call = case.call

    def args(self, dtype, device="cpu"):
        def cast(value):
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        return tuple(tree_map(cast, self.case.args(dtype, device)))


class AcrbTrainCase(cases.AcrbCase):
    """x, the three branches, gamma, beta; it runs where `conv3x3` does."""

    op = "conv3x3"

    def args(self, dtype=torch.float32, device="cpu"):
        d, make = self.width, cases.Weights(torch.float32, device, 3)
        branches = [make.normal(d, d, *size, std=0.2) for size in ((1, 3), (3, 3), (3, 1))]
        return super().args(dtype, device)[0], *branches, make.scale(d), make.bias(d)

    def call(self, *args):
        *tensors, backend = args
        return functional.acrb_train(*tensors, start=self.start, backend=backend).contiguous(
            memory_format=torch.channels_last
        )

    def reference(self, *tensors):
        return reference.acrb_train(*tensors, start=self.start)


CASES = {
    "gcrb": cases.GcrbCase((2, 32, 5, 6)),
    # small: on larger maps plain PyTorch in half precision opens other ReLUs than float64
    "gcrb_train": cases.GcrbTrainCase((1, 32, 1, 37)),
    "acrb": cases.AcrbCase((2, 16, 5, 6), start=5),
    "acrb_train": AcrbTrainCase((2, 16, 5, 6), start=5),
    "conv3x3": cases.Conv3x3Case((1, 5, 6), (16,), 16, relu=True),
    "merge3x3": Merge3x3Case((1, 32, 5, 6)),
    "calibrate": CalibrateCase((2, 32, 5, 6)),
    **{op: TokenCase(op, (1, 16, 4, 5)) for op in ("token_qkv", "token_hidden", "token_fold")},
}
ON_CPU = [
    pytest.param(HalfWeights(case), backend, id=f"{name}-cpu-{backend}", marks=marks)
    for name, case in CASES.items()
    for backend, marks in on_cpu(case.op)
]


@pytest.mark.parametrize("dtype", HALF, ids=case_id)
@pytest.mark.parametrize(("case", "backend"), ON_CPU)
def test_forward_and_backward(case, backend, dtype):
    check_forward(case, dtype, "cpu", backend)
    check_backward(case, dtype, "cpu", backend)


@pytest.mark.parametrize("dtype", HALF, ids=case_id)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_training_step_of_the_network(backend, dtype):
    net = EFRDNFast(2, channels=16, distilled=4, backend=backend).to(dtype).train()
    y = net(torch.rand(2, 3, 6, 7, dtype=dtype))
    y.float().square().mean().backward()
    assert y.dtype == dtype
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
