"""The public ops of convolutions in torch.compile, torch.export, autocast and FLOP counting."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import functional, ops
from efrdn_fast.testing import make_input
from tests.op_arguments import OPS

INFERENCE_ONLY = ("gcrb_chain", "acrb_out")
LIBRARY_OPS = {"acrb_train": "conv3x3", "asymmetric_conv": "conv3x3"}
"""The op behind the public ones that have none of their own name."""


def call(op: str, arguments: dict):
    """The results of `op` in a tuple."""
    result = getattr(functional, op)(**arguments, backend="reference")
    return result if isinstance(result, tuple) else (result,)


def leaves(arguments: dict) -> list[torch.Tensor]:
    """What the gradients of an op go to."""
    out = []
    for name, value in arguments.items():
        if not name.startswith("running"):
            out += value if isinstance(value, list) else [value]
    return [t.requires_grad_() for t in out if isinstance(t, torch.Tensor)]


def test_the_table_has_every_op_of_convolutions():
    forward = {name for name in ops.SCHEMAS if not name.endswith("_backward")}
    known = {LIBRARY_OPS.get(op, op) for op in OPS}
    other = {"emha", "token_qkv", "token_hidden", "token_fold"}
    other |= {"merge3x3", "calibrate", "sigmoid_gate", "unfold", "fold"}
    assert known == forward - other


@pytest.mark.parametrize("op", OPS)
def test_op_compiles_in_one_graph(op):
    def step(arguments):
        return call(op, arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for function in (step, compiled):
        torch.manual_seed(0)
        arguments = OPS[op]()
        if op in INFERENCE_ONLY:
            with torch.no_grad():
                results = function(arguments)
            grads = ()
        else:
            tensors = leaves(arguments)
            results = function(arguments)
            grads = torch.autograd.grad(results[0].square().sum(), tensors)
        found.append((*results, *grads, *arguments.get("running_mean", ())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("op", OPS)
def test_op_exports_with_dynamic_sizes(op):
    arguments = OPS[op]()
    for name in ("residual", "running_mean", "running_var", "out"):
        arguments.pop(name, None)
    maps = arguments.pop("xs", None) or [arguments.pop("x")]

    class Module(torch.nn.Module):
        def forward(self, maps):
            given = {"xs": maps} if op == "conv3x3" else {"x": maps[0]}
            if op == "acrb_out":
                given["out"] = maps[0].new_zeros(2, 7, *maps[0].shape[2:])
            return call(op, {**arguments, **given})

    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    with torch.no_grad():
        program = torch.export.export(
            Module(), (maps,), dynamic_shapes={"maps": [sizes] * len(maps)}
        )
        targets = [node.target for node in program.graph.nodes]
        assert getattr(torch.ops.efrdn_fast, LIBRARY_OPS.get(op, op)).default in targets
        others = [make_input((2, x.shape[1], 9, 4), seed=i) for i, x in enumerate(maps)]
        torch.testing.assert_close(program.module()(others), Module()(others))


@pytest.mark.parametrize("op", OPS)
def test_op_autocast(op):
    """Maps go to the autocast dtype, weights stay; a result that is given keeps its own."""
    torch.manual_seed(0)
    plain = OPS[op]()
    torch.manual_seed(0)
    cast = OPS[op]()
    if op in ("acrb_out", "acrb_train"):  # acrb_train adds the map as it came
        expected_dtype = torch.float32
    else:
        expected_dtype = torch.bfloat16
        for name in ("x", "xs", "residual"):
            if isinstance(cast.get(name), list):
                cast[name] = [x.bfloat16() for x in cast[name]]
            elif name in cast:
                cast[name] = cast[name].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = call(op, plain)
    assert all(y.dtype == expected_dtype for y in results)
    if op == "acrb_train":
        torch.testing.assert_close(results, call(op, cast), rtol=0.05, atol=0.05)
    else:
        assert all(torch.equal(a, b) for a, b in zip(results, call(op, cast), strict=True))


@pytest.mark.parametrize("op", [op for op in OPS if op not in (*INFERENCE_ONLY, "acrb_train")])
def test_op_backward_inside_autocast_is_that_outside(op):
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        arguments = OPS[op]()
        tensors = leaves(arguments)
        (y,) = call(op, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(y, tensors, torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("op", "as_many_as", "times"), [("gcrb_chain", "gcrb", 3), ("acrb_out", "acrb", 1)]
)
def test_op_flops_of_the_ops_that_only_infer(op, as_many_as, times):
    """The others are compared with the modules that they replace."""
    counts = []
    for name in (op, as_many_as):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(name, OPS[name]())
        counts.append(counter.get_total_flops())
    assert counts[0] == times * counts[1] > 0
