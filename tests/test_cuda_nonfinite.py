"""NaN in maps and weights of the CUDA kernels, executed on the CPU (tests/simt)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efrdn_fast import cases, testing
from tests.simt import harness as simt
from tests.test_nonfinite import result_and_gradients, spoiled

PARAMS = {
    "gcrb": ("w1", "b1", "w2", "b2", "w3", "b3"),
    "gcrb_train": ("w1", "gamma1", "b1", "w2", "gamma2", "b2", "w3", "gamma3", "b3"),
    "acrb": ("weight", "bias"),
}


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    simt.require()


def nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan, memory_format=torch.preserve_format)


def given(case, args) -> tuple[dict, dict, Tensor]:
    """Arrays and numbers of both launchers of an op, and the incoming gradient."""
    x, *rest = args
    names = PARAMS[case.op]
    params = dict(zip(names, rest[: len(names)], strict=True))
    n, c, h, w = x.shape
    numbers = {"N": n, "H": h, "W": w}
    if case.op == "acrb":
        numbers |= {"d": c, "before": 0, "after": 0}
    else:
        numbers |= {"C": c, "M": params["w1"].shape[0], "groups": case.groups}
    grad = testing.make_input(x.shape, layout="channels_last", seed=7)
    return {"x": x, **params}, numbers, grad


def backward(op: str, arrays: dict, numbers: dict, grad: Tensor) -> list[Tensor]:
    names = ["x", *PARAMS[op]]
    made = {f"grad_{name}": nan_like(arrays[name]) for name in names}
    out = simt.run(f"{op}_bwd", arrays | made | {"grad_y": grad}, numbers)
    return [out[f"grad_{name}"] for name in names]


@pytest.mark.parametrize(
    "case", [cases.GcrbCase((1, 32, 5, 6)), cases.AcrbCase((1, 9, 5, 6))], ids=lambda c: c.op
)
def test_forward_and_backward_of_nan(case):
    for what, args in spoiled(case, (torch.nan,)):
        arrays, numbers, grad = given(case, args)
        y = simt.run(f"{case.op}_fwd", arrays | {"y": nan_like(args[0])}, numbers)["y"]
        found = [y, *backward(case.op, arrays, numbers, grad)]
        for a, b in zip(found, result_and_gradients(case.reference, args), strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), what


def test_statistics_of_nan():
    case = cases.GcrbTrainCase((2, 32, 5, 6))
    args = case.args()
    args[0][0, 5, 1, 1] = torch.nan
    arrays, numbers, grad = given(case, args)
    new = {"y": nan_like(args[0]), "mean": torch.zeros(48), "var": torch.zeros(48)}
    out = simt.run("gcrb_train", arrays | new, numbers)
    found = [out[name] for name in ("y", "mean", "var")]
    arrays |= {"mean": out["mean"], "var": out["var"]}
    found += backward(case.op, arrays, numbers, grad)
    expected = [*case.reference(*args), *testing.gradients(case.reference, grad)(*args)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
