"""GCRB on every backend that can run here: values, gradients, tracing, FLOPs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import blocks, cases, functional, reference, reparam
from efrdn_fast.testing import case_id, check_backward, check_forward, gradients, make_input
from tests.backends import CPU_BACKENDS

HALF = (torch.float16, torch.bfloat16)
FORWARD = [(case, torch.float32) for case in cases.GCRB]
FORWARD += [(case, dtype) for case in cases.GCRB[4:7] for dtype in HALF]
CHAIN = [(case, torch.float32) for case in cases.GCRB_CHAIN]
CHAIN += [(cases.GCRB_CHAIN[1], dtype) for dtype in HALF]
TRAIN = [(case, torch.float32) for case in cases.GCRB_TRAIN]
# Larger maps only measure luck: plain PyTorch in half precision opens other ReLUs than float64.
TRAIN += [(cases.GCRB_TRAIN[2], dtype) for dtype in HALF]


def small(op: str = "gcrb", dtype: torch.dtype = torch.float32):
    kind = cases.GcrbCase if op == "gcrb" else cases.GcrbTrainCase
    return kind((2, 8, 5, 4), layout="sliced").args(dtype)


@pytest.mark.op("gcrb")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_gcrb_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@pytest.mark.op("gcrb_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), FORWARD, ids=case_id)
def test_gcrb_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@pytest.mark.op("gcrb_chain")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), CHAIN, ids=case_id)
def test_gcrb_chain_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gcrb_chain_opcheck(backend):
    args = cases.GcrbChainCase((2, 8, 5, 4), layout="sliced").args()
    torch.library.opcheck(torch.ops.efrdn_fast.gcrb_chain.default, (*args, backend))


def test_gcrb_chain_is_inference_only():
    x, params, groups = cases.GcrbChainCase((1, 8, 5, 4)).args()
    params[7].requires_grad_()
    with pytest.raises(ValueError, match=r"params must not require grad.*inference only"):
        functional.gcrb_chain(x, params, groups=groups)
    with torch.no_grad():
        results = functional.gcrb_chain(x, params, groups=groups, backend="reference")
    assert not any(y.requires_grad for y in results)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda params: params[:17], "18 tensors, six for each GCRB, got 17"),
        (lambda params: [*params[:13], params[0], *params[14:]], r"params\[13\] \(b1\) must be"),
    ],
)
def test_gcrb_chain_rejects(change, words):
    x, params, groups = cases.GcrbChainCase((1, 8, 5, 4)).args()
    with pytest.raises(ValueError, match=f"^gcrb_chain: .*{words}"):
        functional.gcrb_chain(x, change(params), groups=groups)


@pytest.mark.op("gcrb_train")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), TRAIN, ids=case_id)
def test_gcrb_train_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@pytest.mark.op("gcrb_train_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), TRAIN, ids=case_id)
def test_gcrb_train_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@pytest.mark.op("gcrb_train_backward")
def test_gcrb_train_forward_and_backward_of_nan(target):
    """A NaN shows in every statistic behind it, and in the gradients as on plain PyTorch."""
    device, backend = target
    case = cases.GcrbTrainCase((2, 12, 5, 4), groups=1, mid=3)
    x, *params, groups, eps = case.args(torch.float32, device)
    x[0, 5, 2, 2] = torch.nan
    found = torch.ops.efrdn_fast.gcrb_train(x, *params, groups, eps, backend)
    expected = case.reference(x, *params, groups, eps)
    grad = make_input(x.shape, device=device, seed=7)
    grads = torch.ops.efrdn_fast.gcrb_train_backward(
        grad, x, *params, *found[1:], groups, eps, backend
    )
    plain = gradients(case.reference, grad)(x, *params, groups, eps)
    for a, b in zip((*found, *grads), (*expected, *plain), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert found[2].isnan().all()


@pytest.mark.op("gcrb_backward")
def test_gcrb_backward_of_an_expanded_gradient(target):
    check_backward(cases.GCRB[4], torch.float32, *target, expanded=True)


@pytest.mark.op("gcrb_train_backward")
def test_gcrb_train_backward_of_an_expanded_gradient(target):
    check_backward(cases.GCRB_TRAIN[2], torch.float32, *target, expanded=True)


@pytest.mark.op("gcrb_train_backward")
def test_gcrb_training_is_deterministic(target):
    device, backend = target
    *tensors, groups, eps = cases.GCRB_TRAIN[3].args(torch.float32, device)
    runs = []
    for _ in range(2):
        y, mean, var = torch.ops.efrdn_fast.gcrb_train(*tensors, groups, eps, backend)
        grads = torch.ops.efrdn_fast.gcrb_train_backward(
            y, *tensors, mean, var, groups, eps, backend
        )
        runs.append((y, mean, var, *grads))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gcrb_opcheck(backend):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in small()]
    torch.library.opcheck(torch.ops.efrdn_fast.gcrb.default, (*args, backend))
    args = small()
    torch.library.opcheck(
        torch.ops.efrdn_fast.gcrb_backward.default, (args[0].clone(), *args, backend)
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gcrb_train_opcheck(backend):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in small("gcrb_train")]
    torch.library.opcheck(torch.ops.efrdn_fast.gcrb_train.default, (*args, backend))
    *tensors, groups, eps = small("gcrb_train")
    y, mean, var = torch.ops.efrdn_fast.gcrb_train(*tensors, groups, eps, backend)
    torch.library.opcheck(
        torch.ops.efrdn_fast.gcrb_train_backward.default,
        (y, *tensors, mean, var, groups, eps, backend),
    )


def test_gcrb_gradcheck():
    *tensors, groups = small(dtype=torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: functional.gcrb(*t, groups=groups), tensors)


def test_gcrb_train_gradcheck():
    *tensors, groups, eps = small("gcrb_train", torch.float64)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: functional.gcrb_train(*t, groups=groups, eps=eps), tensors
    )


def test_gcrb_double_backward_says_what_to_do():
    *tensors, groups = small()
    x = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(
        functional.gcrb(*tensors, groups=groups).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"gcrb_backward has no derivative.*reference"):
        grad.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_gcrb_compile(compiler):
    *tensors, groups = small()
    tensors = [t.requires_grad_() for t in tensors]

    def step(*tensors):
        return functional.gcrb(*tensors, groups=groups, backend="reference")

    # Nothing but the op: Inductor then has no C++ of its own to compile (half a minute).
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*tensors), step(*tensors))
    grads = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    for grad, expected in zip(
        grads, torch.autograd.grad(step(*tensors).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(grad, expected)


def test_gcrb_train_compile_updates_running_statistics():
    *tensors, groups, eps = small("gcrb_train")
    norms = (tensors[2], tensors[5], tensors[8])

    def step(tensors, mean, var):
        return functional.gcrb_train(*tensors, mean, var, groups=groups, eps=eps)

    buffers = [[torch.zeros_like(g) for g in norms] for _ in range(4)]
    expected = step(tensors, *buffers[:2])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors, *buffers[2:]), expected)
    for eager, traced in zip(buffers[:2], buffers[2:], strict=True):
        torch.testing.assert_close(traced, eager)
        assert all(t.abs().max() > 0 for t in traced)


def test_gcrb_export_keeps_the_op_and_dynamic_sizes():
    block = blocks.GCRB(8).eval().requires_grad_(False)

    class Folded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, value in enumerate(reparam.fold_gcrb(block)):
                self.register_buffer(f"p{i}", value)

        def forward(self, x):
            return functional.gcrb(x, *self.buffers(), backend="reference")

    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(
        Folded(), (make_input((1, 8, 6, 7)),), dynamic_shapes=({2: height, 3: width},)
    )
    ops = [node.target for node in program.graph.nodes]
    assert torch.ops.efrdn_fast.gcrb.default in ops
    x = make_input((1, 8, 9, 4))
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gcrb_flops_equal_those_of_the_block(training):
    block = blocks.GCRB(32, groups=2).train(training)
    x = make_input((2, 32, 7, 5)).requires_grad_()

    def fast(x):
        if not training:
            return functional.gcrb(x, *reparam.fold_gcrb(block))
        norms = [(bn.weight, bn.bias) for bn in (block.bn1, block.bn2, block.bn3)]
        w1, w2, w3 = (c.weight for c in (block.squeeze, block.depthwise, block.expand))
        return functional.gcrb_train(x, w1, *norms[0], w2, *norms[1], w3, *norms[2])

    counts = []
    for step in (block, fast):
        with FlopCounterMode(display=False) as forward:
            y = step(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_gcrb_autocast_casts_the_map_and_keeps_the_weights():
    x, *params, groups = small()
    w1 = params[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.gcrb(x, *params, groups=groups)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert w1.grad.dtype == torch.float32
    assert torch.equal(y, functional.gcrb(x.bfloat16(), *params, groups=groups))


@pytest.mark.op("gcrb")
@pytest.mark.parametrize("use", [0, 1])
def test_gcrb_block_vectors(vectors_root, target, use):
    """Folded block against stored float64 values, in float64 where the backend takes it."""
    device, backend = target
    block, stored = vector_block(vectors_root)
    dtype = torch.float64 if backend == "reference" else torch.float32
    block = block.to(device, dtype)
    y = functional.gcrb(
        stored["input"].to(device, dtype), *reparam.fold_gcrb(block, use), backend=backend
    )
    torch.testing.assert_close(
        y.cpu().double(),
        stored[f"output.eval.use{use}"],
        rtol=0,
        atol=1e-10 if dtype == torch.float64 else 1e-5,
    )


def test_gcrb_train_block_vectors(vectors_root):
    """Output, and running statistics after the update, against stored float64 values."""
    block, stored = vector_block(vectors_root)
    norms = (block.bn1, block.bn2, block.bn3)
    w1, w2, w3 = (c.weight for c in (block.squeeze, block.depthwise, block.expand))
    for use in range(2):
        y = functional.gcrb_train(
            stored["input"],
            *(w1, norms[0].weight, norms[0].bias),
            *(w2, norms[1].weight, norms[1].bias),
            *(w3, norms[2].weight, norms[2].bias),
            [bn.running_mean[use] for bn in norms],
            [bn.running_var[use] for bn in norms],
        )
        torch.testing.assert_close(y, stored[f"output.train.use{use}"], rtol=0, atol=1e-10)
    for name, value in block.named_buffers():
        for use in range(2):
            expected = stored[f"after_train.use{use}.{name}"][use]
            torch.testing.assert_close(value[use], expected, rtol=0, atol=1e-10)


def vector_block(root) -> tuple[blocks.GCRB, dict[str, torch.Tensor]]:
    stored = load_file(root / "gcrb.safetensors")
    weights = {k.removeprefix("weight."): v for k, v in stored.items() if k.startswith("weight.")}
    block = blocks.GCRB(stored["input"].shape[1]).double().eval().requires_grad_(False)
    block.load_state_dict(weights)
    return block, stored


@pytest.mark.gpu
def test_gcrb_in_a_cuda_graph():
    case = cases.GCRB[5]
    x, *params, groups = case.args(torch.float32, "cuda")
    functional.gcrb(x, *params, groups=groups)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.gcrb(x, *params, groups=groups)
    x.copy_(make_input(case.shape, device="cuda", seed=5))
    graph.replay()
    torch.testing.assert_close(y, functional.gcrb(x, *params, groups=groups), rtol=0, atol=0)


def test_reference_gcrb_pads_with_zeros_not_with_the_bias():
    """Outside the image the inner map is 0: a border pixel differs from an inner one."""
    x, *params, groups = cases.GcrbCase((1, 8, 5, 5)).args(torch.float64)
    params[1].fill_(1.0)
    y = reference.gcrb(torch.zeros_like(x), *params, groups=groups)
    assert (y[..., 0, 0] - y[..., 2, 2]).abs().max() > 0.01
