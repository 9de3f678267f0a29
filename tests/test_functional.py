"""What the public ops refuse: the op's name, the argument, what was expected, what came."""

from __future__ import annotations

import pytest
import torch

from efrdn_fast import functional
from efrdn_fast.testing import make_input


def gcrb_arguments(**changes):
    x = make_input((2, 8, 5, 6))
    arguments = {
        "x": x,
        "w1": torch.randn(4, 4, 1, 1),
        "b1": torch.randn(4),
        "w2": torch.randn(4, 1, 3, 3),
        "b2": torch.randn(4),
        "w3": torch.randn(8, 2, 1, 1),
        "b3": torch.randn(8),
    }
    return {**arguments, **changes}


def train_arguments(**changes):
    given = gcrb_arguments()
    arguments = {"x": given["x"]}
    for i, width in ((1, 4), (2, 4), (3, 8)):
        arguments[f"w{i}"] = given[f"w{i}"]
        arguments[f"gamma{i}"] = torch.ones(width)
        arguments[f"beta{i}"] = torch.zeros(width)
    running = {
        "running_mean": [torch.zeros(4), torch.zeros(4), torch.zeros(8)],
        "running_var": [torch.ones(4), torch.ones(4), torch.ones(8)],
    }
    return {**arguments, **running, **changes}


def acrb_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "weight": torch.randn(3, 3, 3, 3),
        "bias": torch.randn(3),
        "start": 5,
    }
    return {**arguments, **changes}


def out_arguments(**changes):
    return acrb_arguments(**{"out": torch.zeros(2, 7, 5, 6), "out_start": 4, **changes})


def branch_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "w1x3": torch.randn(2, 3, 1, 3),
        "w3x3": torch.randn(2, 3, 3, 3),
        "w3x1": torch.randn(2, 3, 3, 1),
        "bias": torch.randn(2),
        "start": 5,
    }
    return {**arguments, **changes}


def acrb_train_arguments(**changes):
    arguments = {
        "x": make_input((2, 8, 5, 6)),
        "w1x3": torch.randn(3, 3, 1, 3),
        "w3x3": torch.randn(3, 3, 3, 3),
        "w3x1": torch.randn(3, 3, 3, 1),
        "gamma": torch.ones(3),
        "beta": torch.zeros(3),
        "start": 5,
    }
    return {**arguments, **changes}


def conv_arguments(**changes):
    arguments = {
        "xs": [make_input((2, 4, 5, 6)), make_input((2, 4, 5, 6))],
        "weight": torch.randn(6, 4, 3, 3),
        "bias": torch.randn(6),
        "residual": make_input((2, 6, 5, 6)),
        "groups": 2,
    }
    return {**arguments, **changes}


OPS = {
    "gcrb": gcrb_arguments,
    "gcrb_train": train_arguments,
    "acrb": acrb_arguments,
    "acrb_out": out_arguments,
    "acrb_train": acrb_train_arguments,
    "asymmetric_conv": branch_arguments,
    "conv3x3": conv_arguments,
}
META = torch.device("meta")
zeros = torch.zeros

# op: changed arguments, error, words of the message
REJECTED = {
    "gcrb": [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": zeros(8, 5, 6)}, ValueError, r"x must be \[N, C, H, W\], got \[8, 5, 6\]"),
        ({"x": zeros(0, 8, 5, 6)}, ValueError, r"x must not be empty, got zero-size \[0, 8"),
        ({"x": zeros(2, 8, 0, 6)}, ValueError, "x must not be empty"),
        ({"x": zeros(2, 8, 5, 6, dtype=torch.int32)}, TypeError, "x must be float32.*int32"),
        ({"x": zeros(2, 8, 5, 6, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"x": zeros(2, 6, 5, 6)}, ValueError, r"w1 must be \[4, 3, 1, 1\], got \[4, 4, 1, 1\]"),
        ({"groups": 3}, ValueError, "groups must divide C=8, got 3"),
        ({"groups": 0}, ValueError, "groups must divide C=8, got 0"),
        ({"groups": 8}, ValueError, "groups must divide M=4, got 8"),
        ({"w1": zeros(4, 4)}, ValueError, r"w1 must be \[M, C / groups, 1, 1\], got \[4, 4\]"),
        ({"w1": zeros(0, 4, 1, 1)}, ValueError, r"w1 must not be empty, got zero-size \[0, 4"),
        ({"b1": zeros(5)}, ValueError, r"b1 must be \[4\], got \[5\]"),
        ({"w2": zeros(4, 4, 3, 3)}, ValueError, r"w2 must be \[4, 1, 3, 3\]"),
        ({"b2": None}, TypeError, "b2 must be a tensor, got NoneType"),
        ({"w3": zeros(8, 2, 3, 3)}, ValueError, r"w3 must be \[8, 2, 1, 1\]"),
        ({"b3": zeros(8, dtype=torch.float16)}, TypeError, "b3 must be float32.*float16"),
        ({"b3": zeros(8, dtype=torch.float64)}, TypeError, "b3 must be float32.*float64"),
        ({"w2": zeros(4, 1, 3, 3, device=META)}, ValueError, "w2 must be on cpu.*meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto,.*'fast'"),
    ],
    "gcrb_train": [
        ({"x": zeros(1, 8, 1, 1)}, ValueError, "more than one value per channel"),
        ({"gamma2": zeros(8)}, ValueError, r"gamma2 must be \[4\], got \[8\]"),
        ({"momentum": 1.5}, ValueError, "momentum must be 0 to 1, got 1.5"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"running_var": None}, ValueError, "must be given together"),
        ({"running_mean": [zeros(4)] * 2}, ValueError, "must be three tensors, got 2"),
        ({"running_mean": [zeros(4)] * 3}, ValueError, r"running_mean\[2\] must be \[8\]"),
    ],
    "acrb": [
        ({"x": zeros(8, 5, 6)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"weight": zeros(3, 3)}, ValueError, r"weight must be \[d, d, 3, 3\]"),
        ({"weight": zeros(3, 2, 3, 3)}, ValueError, r"weight must be \[3, 3, 3, 3\]"),
        ({"bias": zeros(4)}, ValueError, r"bias must be \[3\], got \[4\]"),
        ({"start": 6}, ValueError, "start must be 0 to 5 for 3 of 8 channels, got 6"),
        ({"start": -1}, ValueError, "start must be 0 to 5.*got -1"),
        ({"x": zeros(2, 2, 5, 6)}, ValueError, "start must be"),
    ],
    "acrb_out": [
        ({"out": zeros(2, 7, 5, 5)}, ValueError, r"out must be \[2, 7, 5, 6\], got"),
        ({"out": zeros(1, 7, 5, 6)}, ValueError, r"out must be \[2, 7, 5, 6\], got"),
        ({"out": zeros(2, 7, 30)}, ValueError, r"out must be \[N, C, H, W\]"),
        ({"out": zeros(2, 7, 5, 6).half()}, TypeError, "out must be torch.float32.*float16"),
        ({"out": zeros(2, 7, 5, 6, device=META)}, ValueError, "out must be on cpu.*meta"),
        ({"out_start": 5}, ValueError, "out_start must be 0 to 4 for 3 of 7 channels, got 5"),
        (
            {"weight": zeros(3, 3, 3, 3, requires_grad=True)},
            ValueError,
            "weight must not require grad.*inference only",
        ),
        ({"x": zeros(2, 8, 5, 6, requires_grad=True)}, ValueError, "x must not require grad"),
    ],
    "acrb_train": [
        ({"x": zeros(1, 8, 1, 1)}, ValueError, "more than one value per channel"),
        ({"gamma": zeros(2)}, ValueError, r"gamma must be \[3\], got \[2\]"),
        ({"running_mean": zeros(3)}, ValueError, "must be given together"),
        ({"w1x3": zeros(3, 3, 3, 1)}, ValueError, r"w1x3 must be \[3, 3, 1, 3\]"),
        ({"w3x3": zeros(())}, ValueError, r"w3x3 must be \[d, d, 3, 3\], got \[\]"),
    ],
    "asymmetric_conv": [
        ({"w3x3": zeros(2, 3)}, ValueError, r"w3x3 must be \[Cout, Cin, 3, 3\]"),
        ({"w3x1": zeros(2, 2, 3, 1)}, ValueError, r"w3x1 must be \[2, 3, 3, 1\]"),
        ({"bias": zeros(3)}, ValueError, r"bias must be \[2\], got \[3\]"),
        ({"start": 6}, ValueError, "start must be 0 to 5 for 3 of 8 channels"),
    ],
    "conv3x3": [
        ({"xs": []}, ValueError, "xs must hold at least one map, got none"),
        ({"xs": [zeros(2, 8, 5, 6), 3]}, TypeError, r"xs\[1\] must be a tensor, got int"),
        (
            {"xs": [zeros(2, 4, 5, 6), zeros(2, 4, 6, 5)]},
            ValueError,
            r"xs\[1\] must be \[2, 4, 5, 6\]",
        ),
        (
            {"xs": [zeros(2, 4, 5, 6), zeros(2, 4, 5, 6).half()]},
            TypeError,
            r"xs\[1\] must be torch.float32",
        ),
        (
            {"xs": zeros(2, 8, 5, 6), "interleaved": True},
            ValueError,
            "interleaved needs two maps in xs, got 1",
        ),
        (
            {"weight": zeros(6, 8, 3, 3)},
            ValueError,
            r"weight must be \[6, 4, 3, 3\], got \[6, 8, 3, 3\]",
        ),
        ({"weight": zeros(6, 4, 5, 5)}, ValueError, r"weight must be \[6, 4, 3, 3\]"),
        ({"groups": 4}, ValueError, "groups must divide Cout=6, got 4"),
        ({"residual": zeros(2, 5, 5, 6)}, ValueError, r"residual must be \[2, 6, 5, 6\]"),
        ({"bias": zeros(6, 1)}, ValueError, r"bias must be \[6\]"),
    ],
}


@pytest.mark.parametrize(
    ("op", "changes", "error", "words"),
    [(op, *row) for op, rows in REJECTED.items() for row in rows],
)
def test_functional_rejects(op, changes, error, words):
    speaks = "asymmetric_conv" if "w1x3" in changes else op  # acrb_train calls it
    with pytest.raises(error, match=f"^{speaks}: .*{words}"):
        getattr(functional, op)(**OPS[op](**changes))


@pytest.mark.parametrize("op", OPS)
def test_functional_accepts_what_the_rejected_calls_change(op):
    result = getattr(functional, op)(**OPS[op](), backend="reference")
    assert result.ndim == 4 and result.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_functional_rejects_two_devices(op):
    arguments = OPS[op]()
    name = "xs" if "xs" in arguments else "x"
    value = arguments[name]
    arguments[name] = [x.cuda() for x in value] if name == "xs" else value.cuda()
    with pytest.raises(ValueError, match="must be on cuda:0 like the input, got cpu"):
        getattr(functional, op)(**arguments)


def test_acrb_out_takes_tensors_that_require_grad_without_grad_mode():
    x = make_input((2, 8, 5, 6)).requires_grad_()
    with torch.no_grad():
        out = functional.acrb_out(**out_arguments(x=x), backend="reference")
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_functional_weights_may_be_of_the_dtype_of_the_map(dtype):
    given = {name: value.to(dtype) for name, value in gcrb_arguments().items()}
    assert functional.gcrb(**given, backend="reference").dtype == dtype


def test_functional_float64_runs_on_the_reference():
    given = {name: value.double() for name, value in gcrb_arguments().items()}
    assert functional.gcrb(**given).dtype == torch.float64
