"""What the public ops refuse: the op's name, the argument, what was expected, what came."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad

from efrdn_fast import functional
from efrdn_fast.testing import make_input
from tests.op_arguments import OPS, gcrb_arguments, out_arguments

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
        ({"groups": 2.0}, TypeError, "groups must be an int, got 2.0"),
        ({"groups": True}, TypeError, "groups must be an int, got True"),
        ({"x": zeros(2, 8, 5, 6).to_sparse()}, TypeError, "x must be a dense tensor, got torch.sp"),
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
    "gcrb_chain": [
        ({"params": [zeros(4)] * 17}, ValueError, "params must be 18 tensors.*got 17"),
        ({"params": None}, TypeError, "params must be a list of tensors.*got NoneType"),
        ({"params": [None] * 18}, TypeError, r"params\[0\] \(w1\) must be a tensor, got None"),
        ({"groups": 3}, ValueError, "groups must divide C=8, got 3"),
        (
            {"x": zeros(2, 8, 5, 6, requires_grad=True)},
            ValueError,
            "x and params must not require grad.*inference only",
        ),
    ],
    "gcrb_train": [
        ({"x": zeros(1, 8, 1, 1)}, ValueError, "more than one value per channel"),
        ({"gamma2": zeros(8)}, ValueError, r"gamma2 must be \[4\], got \[8\]"),
        ({"momentum": 1.5}, ValueError, "momentum must be 0 to 1, got 1.5"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"running_var": None}, ValueError, "must be given together"),
        ({"momentum": None}, TypeError, "momentum must be a number, got None"),
        ({"eps": "1"}, TypeError, "eps must be a number, got '1'"),
        ({"running_mean": 1}, TypeError, "running_mean must be a list of tensors, got int"),
        ({"running_mean": [zeros(4)] * 2}, ValueError, "must be 3 tensors, got 2"),
        ({"running_mean": [zeros(4)] * 3}, ValueError, r"running_mean\[2\] must be \[8\]"),
    ],
    "acrb": [
        ({"x": zeros(8, 5, 6)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"weight": zeros(3, 3)}, ValueError, r"weight must be \[d, d, 3, 3\]"),
        ({"weight": zeros(3, 2, 3, 3)}, ValueError, r"weight must be \[3, 3, 3, 3\]"),
        ({"bias": zeros(4)}, ValueError, r"bias must be \[3\], got \[4\]"),
        ({"start": 6}, ValueError, "start must be 0 to 5 for 3 of 8 channels, got 6"),
        ({"start": -1}, ValueError, "start must be 0 to 5.*got -1"),
        ({"start": "5"}, TypeError, "start must be an int, got '5'"),
        ({"x": zeros(2, 2, 5, 6)}, ValueError, "start must be"),
    ],
    "acrb_out": [
        ({"out": zeros(2, 7, 5, 5)}, ValueError, r"out must be \[2, 7, 5, 6\], got"),
        ({"out": zeros(1, 7, 5, 6)}, ValueError, r"out must be \[2, 7, 5, 6\], got"),
        ({"out": zeros(2, 7, 30)}, ValueError, r"out must be \[N, C, H, W\]"),
        ({"out": zeros(2, 7, 5, 6).half()}, TypeError, "out must be torch.float32.*float16"),
        ({"out": zeros(2, 7, 5, 6, device=META)}, ValueError, "out must be on cpu.*meta"),
        ({"out": zeros(1, 1, 5, 6).expand(2, 7, 5, 6)}, ValueError, "out must not be expanded"),
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
        ({"w3x3": zeros(())}, ValueError, r"w3x3 must be \[Cout, Cin, 3, 3\], got \[\]"),
        ({"w3x3": zeros(3, 2, 3, 3)}, ValueError, r"w1x3 must be \[3, 2, 1, 3\]"),
        ({"start": 6}, ValueError, "start must be 0 to 5 for 3 of 8 channels, got 6"),
    ],
    "asymmetric_conv": [
        ({"w3x3": zeros(2, 3)}, ValueError, r"w3x3 must be \[Cout, Cin, 3, 3\]"),
        ({"w3x1": zeros(2, 2, 3, 1)}, ValueError, r"w3x1 must be \[2, 3, 3, 1\]"),
        ({"bias": zeros(3)}, ValueError, r"bias must be \[2\], got \[3\]"),
        ({"start": 6}, ValueError, "start must be 0 to 5 for 3 of 8 channels"),
    ],
    "conv3x3": [
        ({"xs": None}, TypeError, "xs must be a map or a list of maps, got NoneType"),
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
    with pytest.raises(error, match=f"^{op}: .*{words}"):
        getattr(functional, op)(**OPS[op](**changes))


FAULTS = {
    # what becomes of a tensor, error, words of the message
    "number": (lambda value: 1.0, TypeError, "must be a tensor, got float"),
    "rank": (lambda value: value[None], ValueError, r"must be \[.*got \[1, "),
    "empty": (lambda value: value[:0], ValueError, r"(must be \[.*|must not be empty, .*)\[0"),
    "int32": (torch.Tensor.int, TypeError, "must be .*float32.*got torch.int32"),
    "device": (lambda value: value.to("meta"), ValueError, "must be on .* like the input, got"),
}


def tensors_of(op: str) -> list[tuple[str, int | None]]:
    """Every tensor that the op takes: argument, index in a list."""
    return [
        (name, i)
        for name, value in OPS[op]().items()
        for i in (range(len(value)) if isinstance(value, list) else [None])
        if not isinstance(value, int)
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", OPS)
def test_functional_names_the_tensor_at_fault(op, fault):
    change, error, words = FAULTS[fault]
    for name, index in tensors_of(op):
        arguments = OPS[op]()
        if index is None:
            arguments[name] = change(arguments[name])
        else:
            arguments[name] = list(arguments[name])
            arguments[name][index] = change(arguments[name][index])
        said = re.escape(name if index is None else f"{name}[{index}]")
        if fault == "device" and said in ("x", r"xs\[0\]"):
            said = ".*"  # all others are on another device than the input
        with pytest.raises(error, match=rf"^{op}: {said}( \(\w+\))? {words}"):
            getattr(functional, op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_functional_rejects_weights_of_another_half_type(op):
    """float32 or the dtype of the map; a second map has the dtype of the first."""
    for name, index in tensors_of(op):
        if name == "x" or (name, index) == ("xs", 0):
            continue
        arguments = OPS[op]()
        if index is None:
            arguments[name] = arguments[name].half()
        else:
            arguments[name] = list(arguments[name])
            arguments[name][index] = arguments[name][index].half()
        with pytest.raises(TypeError, match=rf"^{op}: {name}.* must be .*float32.*float16"):
            getattr(functional, op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_functional_accepts_what_the_rejected_calls_change(op):
    result = getattr(functional, op)(**OPS[op](), backend="reference")
    for y in result if isinstance(result, tuple) else (result,):
        assert y.ndim == 4 and y.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_functional_rejects_two_devices(op):
    arguments = OPS[op]()
    name = "xs" if "xs" in arguments else "x"
    value = arguments[name]
    arguments[name] = [x.cuda() for x in value] if name == "xs" else value.cuda()
    with pytest.raises(ValueError, match="must be on cuda:0 like the input, got cpu"):
        getattr(functional, op)(**arguments)


def test_acrb_out_does_not_write_where_it_reads():
    whole = zeros(2, 15, 5, 6)
    x, out = whole[:, :8], whole[:, 8:]
    assert functional.acrb_out(**out_arguments(x=x.clone(), out=out), backend="reference") is out
    with pytest.raises(ValueError, match=r"^acrb_out: out must not share memory with x"):
        functional.acrb_out(**out_arguments(x=x, out=whole[:, 2:9]))


def test_functional_does_not_drop_forward_mode_derivatives():
    x, tangent = make_input((2, 8, 5, 6)), torch.ones(2, 8, 5, 6)
    with pytest.raises(
        NotImplementedError, match=r"^sigmoid_gate: x has a forward-mode derivative"
    ):
        torch.func.jvp(lambda x: functional.sigmoid_gate(x, x), (x,), (tangent,))
    with forward_ad.dual_level():
        weights = gcrb_arguments()
        weights["b2"] = forward_ad.make_dual(weights["b2"], torch.ones(4))
        with pytest.raises(NotImplementedError, match=r"^gcrb: b2 has a forward-mode derivative"):
            functional.gcrb(**weights)


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
