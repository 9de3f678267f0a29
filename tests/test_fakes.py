"""What `torch.compile` trusts: shapes, dtypes and strides of every fake, against real results."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from efrdn_fast import functional
from tests.op_arguments import OPS
from tests.test_fast_traced import one_step
from tests.test_traced_ops import INFERENCE_ONLY, leaves


def layout(y: torch.Tensor | None) -> tuple | None:
    """What a graph compiled for `y` relies on; the stride of a dimension of 1 says nothing."""
    if y is None:
        return None
    strides = [s for s, size in zip(y.stride(), y.shape, strict=True) if size > 1]
    return tuple(y.shape), y.dtype, strides if y.numel() else None


class FakesCompared(TorchDispatchMode):
    """Runs every op of the library on fake tensors too and compares what comes out."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.namespace == "efrdn_fast":
            self.seen.add(op._opname)
            with FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs or {}))
                expected = op(*fakes[0], **fakes[1])
            pairs = zip(tree_leaves(result), tree_leaves(expected), strict=True)
            for i, (real, fake) in enumerate(pairs):
                assert layout(real) == layout(fake), f"{op}, result {i}"
        return result


def in_nhwc(value):
    """Maps and weights of four dimensions in NHWC memory, as a network under `channels_last`."""
    if isinstance(value, list):
        return [in_nhwc(v) for v in value]
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_fakes_of_ops(op, backend, nhwc):
    arguments = OPS[op]()
    if nhwc:
        arguments = {name: in_nhwc(value) for name, value in arguments.items()}
    with FakesCompared() as compared:
        if op in INFERENCE_ONLY:
            getattr(functional, op)(**arguments, backend=backend)
        else:
            leaves(arguments)  # which then require gradients
            y = getattr(functional, op)(**arguments, backend=backend)
            y.square().sum().backward()
    forward = {name for name in compared.seen if not name.endswith("_backward")}
    assert forward and (op in INFERENCE_ONLY or len(compared.seen) > len(forward))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fakes_of_ops_in_the_network(backend, mode, autocast):
    net = one_step(mode, backend=backend).to(memory_format=torch.channels_last)
    with FakesCompared() as compared, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net(torch.rand(2, 3, 9, 10)).float().square().mean().backward()
    assert {"merge3x3_backward", "calibrate_backward", "sigmoid_gate_backward"} <= compared.seen
    assert ("conv3x3_backward" if mode == "train" else "acrb_backward") in compared.seen


def test_inductor_compiles_forward_and_backward():
    """Unlike the other backends of `torch.compile` it asserts the strides of every fake."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((8, 4, 3, 3), (8, 1, 3, 3))]

    def step(x, weight, merge):  # nothing but ops, so that Inductor has no C++ to compile
        y = functional.conv3x3(x, weight, backend="reference")
        return functional.merge3x3(y, merge, groups=8, backend="reference")

    torch._dynamo.reset()
    inputs = (x, *weights)
    compiled = torch.compile(step, fullgraph=True)
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(step(*inputs).sum(), inputs))
