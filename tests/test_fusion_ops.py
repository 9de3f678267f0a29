"""Merges, gates and sums over patches as `torch.library` ops, and what they refuse."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import cases_fusion, functional, fusion, tokens
from efrdn_fast.blocks import CC
from efrdn_fast.testing import case_id, check_backward, check_forward, make_input
from tests.backends import INTERPRETED, on_cpu

SHAPE = (2, 32, 5, 6)
CASES = [
    cls(SHAPE)
    for cls in (
        cases_fusion.Merge3x3Case,
        cases_fusion.CalibrateCase,
        cases_fusion.SigmoidGateCase,
        cases_fusion.UnfoldCase,
        cases_fusion.FoldCase,
    )
]
BACKENDS = ("reference", "cpu")
ops = torch.ops.efrdn_fast


def samples(op: str, dtype: torch.dtype, *, channel_gate: bool = False) -> tuple:
    """Arguments of the op without `backend`."""
    x, y, residual = (make_input(SHAPE, dtype, "cpu", "channels_last", i) for i in range(3))
    n, c, h, w = SHAPE
    weight = torch.randn(c, 8, 3, 3) / 8
    gate = torch.randn((n, c, 1, 1) if channel_gate else (n, 1, h, w)).to(dtype)
    bottleneck = torch.randn(8, c, 1, 1), torch.randn(8), torch.randn(c, 8, 1, 1), torch.randn(c)
    statistics = torch.rand(n, 2, c)
    made = {
        "merge3x3": (x, y, gate, residual, weight, True, c // 4),
        "merge3x3_backward": (residual, x, y, gate, weight, True, c // 4),
        "calibrate": (x, y, *bottleneck),
        "calibrate_backward": (residual, x, *bottleneck, statistics),
        "sigmoid_gate": (x, y),
        "sigmoid_gate_backward": (residual, x, y),
        "unfold": (x,),
        "fold": (make_input((n, h * w, 9 * c), dtype), h, w),
    }
    return made[op]


OPS = (
    *("merge3x3", "merge3x3_backward", "calibrate", "calibrate_backward"),
    *("sigmoid_gate", "sigmoid_gate_backward", "unfold", "fold"),
)


SERVED = [
    pytest.param(op, backend, marks=marks, id=f"{op}-{backend}")
    for op in OPS
    for backend, marks in on_cpu(op)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize(("op", "backend"), SERVED)
def test_opcheck(op, backend, dtype):
    args = samples(op, dtype)
    if not op.endswith("_backward"):
        args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(getattr(ops, op).default, (*args, backend))


@pytest.mark.parametrize("backend", BACKENDS + INTERPRETED)
@pytest.mark.parametrize("gate", ["none", "channel"])
def test_opcheck_of_merge3x3_without_its_options(gate, backend):
    x, y, logits, _, weight, relu, groups = samples("merge3x3", torch.float32, channel_gate=True)
    if gate == "none":
        y, logits, weight = None, None, weight[:, :4]
    tensors = [t if t is None else t.requires_grad_() for t in (x, y, logits, None, weight)]
    torch.library.opcheck(ops.merge3x3.default, (*tensors, relu, groups, backend))
    grad, (x, y, logits, _, weight) = torch.randn(SHAPE), tensors
    args = [None if t is None else t.detach() for t in (grad, x, y, logits, weight)]
    torch.library.opcheck(ops.merge3x3_backward.default, (*args, relu, groups, backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_reference_backend(case, dtype):
    """Its formulas of the gradients are those of autograd."""
    check_forward(case, dtype, "cpu", "reference")
    check_backward(case, dtype, "cpu", "reference")


@pytest.mark.parametrize(
    ("gate", "second", "relu"),
    [("channel", True, False), ("pixel", False, True), (None, True, True)],
)
def test_gradients_of_merge3x3_on_the_reference(gate, second, relu):
    n, c, h, w = SHAPE
    shapes = {"channel": (n, c, 1, 1), "pixel": (n, 1, h, w)}
    a, b, residual = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(c, 8 if second else 4, 3, 3, dtype=torch.float64)
    logits = None if gate is None else torch.randn(shapes[gate], dtype=torch.float64)
    present = [t.requires_grad_() for t in (a, b, logits, residual, weight) if t is not None]
    present = [t for t in present if second or t is not b]

    def plain():
        left = a if logits is None else a * torch.sigmoid(logits)
        right = b.relu() if relu else b
        joined = torch.stack((left, right), dim=2).flatten(1, 2) if second else left
        y = torch.nn.functional.conv2d(joined, weight, padding=1, groups=c // 4)
        return y + residual

    y = fusion.merge3x3(a, weight, b if second else None, gate=logits, relu=relu, residual=residual)
    torch.testing.assert_close(y, plain())
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(each, present, grad) for each in (y, plain()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_flops_equal_those_of_the_block():
    block, (base, x) = CC(32), (make_input(SHAPE).requires_grad_() for _ in range(2))
    convs = block.squeeze, block.excite
    weights = [w for conv in convs for w in (conv.weight, conv.bias)]
    merge = torch.nn.Conv2d(64, 32, 3, padding=1, groups=8, bias=False)
    pairs = [
        (lambda: base + block(x), lambda: functional.calibrate(base, x, *weights)),
        (
            lambda: merge(torch.cat((base, x), dim=1)),
            lambda: functional.merge3x3(base, merge.weight, x),
        ),
        (lambda: x * torch.sigmoid(base), lambda: functional.sigmoid_gate(x, base)),
    ]
    for pair in pairs:
        counts = []
        for step in pair:
            with FlopCounterMode(display=False) as forward:
                y = step()
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1]
    with FlopCounterMode(display=False) as counter:
        tokens.fold(tokens.unfold(x), x.shape, True).sum().backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend):
    x, logits, _, residual, weight, *_ = (
        t.detach().requires_grad_() for t in samples("merge3x3", torch.float32)[:5]
    )
    bottleneck = [t.requires_grad_() for t in samples("calibrate", torch.float32)[2:]]
    leaves = [x, logits, residual, weight, *bottleneck]

    def step():
        y = functional.merge3x3(x, weight, logits, relu=True, residual=residual, backend=backend)
        y = functional.calibrate(y, functional.sigmoid_gate(y, x, backend=backend), *bottleneck)
        y = tokens.fold(tokens.unfold(y, backend).square(), y.shape, True, backend)
        return y.square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = (torch.autograd.grad(call(), leaves) for call in (compiled, step))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_maps(backend):
    x, y, gate, residual, weight, *_ = samples("merge3x3", torch.float32)
    bottleneck = samples("calibrate", torch.float32)[2:]
    with torch.autocast("cpu", torch.bfloat16):
        for result in (
            fusion.merge3x3(x, weight, y, gate=gate, residual=residual, backend=backend),
            fusion.calibrate(x, y, *bottleneck, backend=backend),
            fusion.sigmoid_gate(x, y.bfloat16(), backend=backend),
        ):
            assert result.dtype == torch.bfloat16
        assert tokens.unfold(x, backend).dtype == torch.float32
        assert fusion.sigmoid_gate(x.double(), y.double()).dtype == torch.float64


def test_second_derivatives_say_so():
    x = make_input(SHAPE).requires_grad_()
    y = functional.sigmoid_gate(x, x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sigmoid_gate_backward has no derivative"):
        grad.sum().backward()


def merge_arguments(**changes):
    x, y, gate, residual, weight, relu, groups = samples("merge3x3", torch.float32)
    given = {"a": x, "b": y, "gate": gate, "residual": residual, "weight": weight}
    return {**given, "relu": relu, "groups": groups, **changes}


def calibrate_arguments(**changes):
    names = ("base", "x", "w1", "b1", "w2", "b2")
    return {**dict(zip(names, samples("calibrate", torch.float32), strict=True)), **changes}


def gate_arguments(**changes):
    return {
        **dict(zip(("x", "logits"), samples("sigmoid_gate", torch.float32), strict=True)),
        **changes,
    }


META = torch.device("meta")
zeros = torch.zeros


@pytest.mark.parametrize(
    ("op", "arguments", "error", "words"),
    [
        ("merge3x3", merge_arguments(a=[1.0]), TypeError, "a must be a tensor, got list"),
        ("merge3x3", merge_arguments(a=zeros(2, 32, 30)), ValueError, r"a must be \[N, C, H, W\]"),
        (
            "merge3x3",
            merge_arguments(b=zeros(2, 16, 5, 6)),
            ValueError,
            r"b must be \[2, 32, 5, 6\]",
        ),
        ("merge3x3", merge_arguments(b=None), ValueError, r"weight must be \[32, 4, 3, 3\], got"),
        (
            "merge3x3",
            merge_arguments(gate=zeros(2, 1, 5, 5)),
            ValueError,
            r"gate must be \[2, 32, 1",
        ),
        (
            "merge3x3",
            merge_arguments(gate=zeros(1, 1, 5, 6)),
            ValueError,
            r"gate must be \[2, 1, 5",
        ),
        ("merge3x3", merge_arguments(groups=3), ValueError, "groups must divide Cin=64, got 3"),
        ("merge3x3", merge_arguments(weight=zeros(32, 8)), ValueError, r"weight must be \[C, Cin"),
        (
            "merge3x3",
            merge_arguments(weight=zeros(32, 8, 3, 3, device=META)),
            ValueError,
            "weight.*meta",
        ),
        ("merge3x3", merge_arguments(residual=zeros(2, 31, 5, 6)), ValueError, "residual must be"),
        (
            "merge3x3",
            merge_arguments(residual=zeros(SHAPE, device=META)),
            ValueError,
            "residual.*meta",
        ),
        ("merge3x3", merge_arguments(backend="fast"), ValueError, "backend must be one of"),
        ("calibrate", calibrate_arguments(base=zeros(2, 32, 5, 5)), ValueError, "x must be"),
        (
            "calibrate",
            calibrate_arguments(w1=zeros(8, 32)),
            ValueError,
            r"w1 must be \[M, C, 1, 1\]",
        ),
        ("calibrate", calibrate_arguments(b1=zeros(7)), ValueError, r"b1 must be \[8\], got \[7\]"),
        ("calibrate", calibrate_arguments(w2=zeros(8, 32, 1, 1)), ValueError, "w2 must be"),
        ("calibrate", calibrate_arguments(b2=zeros(32).half()), TypeError, "b2 must be float32"),
        ("sigmoid_gate", gate_arguments(logits=zeros(2, 1, 5, 6)), ValueError, "logits must be"),
        ("sigmoid_gate", gate_arguments(x=zeros(SHAPE, dtype=torch.int32)), TypeError, "int32"),
        ("sigmoid_gate", gate_arguments(x=zeros(0, 32, 5, 6)), ValueError, "x must not be empty"),
    ],
)
def test_rejects(op, arguments, error, words):
    with pytest.raises(error, match=f"^{op}: .*{words}"):
        getattr(functional, op)(**arguments)


def test_accepts_what_the_rejected_calls_change():
    given = (merge_arguments(), calibrate_arguments(), gate_arguments())
    for op, arguments in zip(("merge3x3", "calibrate", "sigmoid_gate"), given, strict=True):
        assert getattr(functional, op)(**arguments).shape == SHAPE
