"""ACRB and the asymmetric convolution on every backend that can run here."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import blocks, cases, functional, reference, reparam
from efrdn_fast.testing import (
    assert_close_to_reference,
    case_id,
    check_backward,
    check_forward,
    gradients,
    make_input,
)
from tests.backends import CPU_BACKENDS

HALF = (torch.float16, torch.bfloat16)
FORWARD = [(case, torch.float32) for case in cases.ACRB]
FORWARD += [(case, dtype) for case in cases.ACRB[4:7] for dtype in HALF]


def small(dtype: torch.dtype = torch.float32):
    return cases.AcrbCase((2, 7, 5, 4), "sliced", width=3, start=2).args(dtype)


def branches(cout: int, cin: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    kernels = ((1, 3), (3, 3), (3, 1))
    return [0.3 * torch.randn(cout, cin, *kernel, dtype=dtype) for kernel in kernels]


@pytest.mark.op("acrb")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_acrb_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@pytest.mark.op("acrb_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_acrb_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@pytest.mark.op("acrb_backward")
def test_acrb_backward_of_an_expanded_gradient(target):
    check_backward(cases.ACRB[4], torch.float32, *target, expanded=True)


@pytest.mark.op("acrb_out")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
@pytest.mark.parametrize("memory", ["channels_last", "contiguous"])
def test_acrb_out_writes_its_channels_and_no_others(target, case, dtype, memory):
    device, backend = target
    x, weight, bias, start = args = case.args(dtype, device)
    n, _, h, w = x.shape
    out = make_input((n, case.width + 8, h, w), dtype, device, memory, seed=3)
    before = out.clone()
    returned = functional.acrb_out(x, weight, bias, out, start=start, out_start=5, backend=backend)
    assert returned is out
    written = slice(5, 5 + case.width)
    assert_close_to_reference(out[:, written], case.reference, args)
    assert torch.equal(out[:, :5], before[:, :5])
    assert torch.equal(out[:, 5 + case.width :], before[:, 5 + case.width :])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_acrb_opcheck(backend):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in small()]
    torch.library.opcheck(torch.ops.efrdn_fast.acrb.default, (*args, backend))
    x, weight, bias, start = small()
    grad = torch.randn(2, 3, 5, 4)
    torch.library.opcheck(
        torch.ops.efrdn_fast.acrb_backward.default, (grad, x, weight, bias, start, backend)
    )
    torch.library.opcheck(
        torch.ops.efrdn_fast.acrb_out.default,
        (x, weight, bias, start, torch.zeros(2, 6, 5, 4), 1, backend),
    )


def test_acrb_gradcheck():
    *tensors, start = small(torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: functional.acrb(*t, start=start), tensors)


def test_acrb_compile():
    x, weight, bias, start = small()
    tensors = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def step(x, weight, bias):
        return functional.acrb(torch.sin(x), weight, bias, start=start)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(step(*tensors).square().sum(), tensors)
    torch.testing.assert_close(grads, expected)


def test_acrb_out_compile_and_export():
    x, weight, bias, start = small()

    class Write(torch.nn.Module):
        def forward(self, x):
            out = torch.zeros(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
            functional.acrb_out(x, weight, bias, out, start=start, out_start=2)
            return out + 1

    with torch.no_grad():
        expected = Write()(x)
        compiled = torch.compile(Write(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(Write(), (x,))
        torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_acrb_flops_equal_those_of_the_block(training):
    block = blocks.ACRB(9).train(training)
    x = make_input((2, 9, 7, 5)).requires_grad_()

    def fast(x):
        if not training:
            return functional.acrb(x, *reparam.fold_acrb(block))
        weights = (c.weight for c in (block.conv1x3, block.conv3x3, block.conv3x1))
        return functional.acrb_train(x, *weights, block.bn.weight, block.bn.bias)

    counts = []
    for step in (block, fast):
        with FlopCounterMode(display=False) as forward:
            y = step(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


@pytest.mark.op("conv3x3")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "cout", "start", "cin"),
    [((1, 32, 1, 1), 9, 23, 9), ((2, 11, 13, 7), 4, 3, 5), ((1, 5, 17, 19), 5, 0, 5)],
)
def test_asymmetric_conv_and_the_gradient_of_every_branch(target, layout, shape, cout, start, cin):
    device, backend = target
    x = make_input(shape, device=device, layout=layout)
    args = [x, *(w.to(device) for w in branches(cout, cin)), torch.randn(cout, device=device)]

    def plain(*args):
        return reference.asymmetric_conv(*args, start=start)

    for value in args:
        value.requires_grad_()
    y = functional.asymmetric_conv(*args, start=start, backend=backend)
    assert_close_to_reference(y, plain, args)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, grad)
    assert_close_to_reference(grads, gradients(plain, grad), args)


def test_asymmetric_conv_gradcheck():
    args = [make_input((1, 5, 4, 3), torch.float64), *branches(2, 3, torch.float64)]
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: functional.asymmetric_conv(*a, start=1), args)


@pytest.mark.op("conv3x3")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(
    ("shape", "d", "start", "layout"),
    [((2, 32, 13, 7), 9, 23, "sliced"), ((1, 5, 1, 37), 5, 0, "channels_last")],
)
def test_acrb_train_gradients_and_statistics(target, shape, d, start, layout):
    device, backend = target
    args = [make_input(shape, device=device, layout=layout)]
    args += [w.to(device) for w in branches(d, d)]
    args += [torch.rand(d, device=device) + 0.5, torch.randn(d, device=device)]
    norm = torch.nn.BatchNorm2d(d).double().to(device)

    def plain(x, w1x3, w3x3, w3x1, gamma, beta):
        y = reference.asymmetric_conv(x, w1x3, w3x3, w3x1, start=start)
        y = torch.nn.functional.batch_norm(y, None, None, gamma, beta, training=True)
        return x[:, start : start + d] + y.relu()

    mean, var = torch.zeros(d, device=device), torch.ones(d, device=device)
    for value in args:
        value.requires_grad_()
    y = functional.acrb_train(*args, mean, var, start=start, backend=backend)
    assert_close_to_reference(y, plain, args)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, grad)
    assert_close_to_reference(grads, gradients(plain, grad), args)
    norm(reference.asymmetric_conv(*(a.detach().double() for a in args[:4]), start=start))
    torch.testing.assert_close(mean.double(), norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), norm.running_var, rtol=1e-5, atol=1e-6)


def test_acrb_train_gradcheck():
    args = [make_input((2, 5, 4, 3), torch.float64), *branches(3, 3, torch.float64)]
    args += [torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(3, dtype=torch.float64)]
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: functional.acrb_train(*a, start=1), args)


@pytest.mark.op("acrb")
@pytest.mark.parametrize("use", [0, 1])
def test_acrb_block_vectors(vectors_root, target, use):
    device, backend = target
    block, stored = vector_block(vectors_root)
    dtype = torch.float64 if backend == "reference" else torch.float32
    block = block.to(device, dtype)
    x = stored["input"].to(device, dtype)
    y = functional.acrb(x, *reparam.fold_acrb(block, use), backend=backend)
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    expected = stored[f"output.eval.use{use}"]
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=atol)


def test_acrb_train_block_vectors(vectors_root):
    block, stored = vector_block(vectors_root)
    weights = [c.weight for c in (block.conv1x3, block.conv3x3, block.conv3x1)]
    for use in range(2):
        y = functional.acrb_train(
            *(stored["input"], *weights, block.bn.weight, block.bn.bias),
            *(block.bn.running_mean[use], block.bn.running_var[use]),
        )
        torch.testing.assert_close(y, stored[f"output.train.use{use}"], rtol=0, atol=1e-10)
        for name, value in block.named_buffers():
            expected = stored[f"after_train.use{use}.{name}"][use]
            torch.testing.assert_close(value[use], expected, rtol=0, atol=1e-10)


def vector_block(root) -> tuple[blocks.ACRB, dict[str, torch.Tensor]]:
    stored = load_file(root / "acrb.safetensors")
    weights = {k.removeprefix("weight."): v for k, v in stored.items() if k.startswith("weight.")}
    block = blocks.ACRB(stored["input"].shape[1]).double().eval().requires_grad_(False)
    block.load_state_dict(weights)
    return block, stored


@pytest.mark.gpu
def test_acrb_in_a_cuda_graph():
    case = cases.ACRB[5]
    x, weight, bias, start = case.args(torch.float32, "cuda")
    functional.acrb(x, weight, bias, start=start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.acrb(x, weight, bias, start=start)
    x.copy_(make_input(case.shape, device="cuda", seed=5))
    graph.replay()
    assert torch.equal(y, functional.acrb(x, weight, bias, start=start))
