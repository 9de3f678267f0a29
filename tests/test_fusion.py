"""Ops of one block each: CPU kernels against the reference in float64, gradients included."""

import functools

import pytest
import torch

from efrdn_fast import dispatch, fusion, tokens
from efrdn_fast.blocks import CC
from efrdn_fast.errors import BackendUnavailable
from efrdn_fast.transformer import overlap_count

SIZES = ((2, 5, 7), (1, 33, 17), (3, 16, 16), (1, 1, 1))


@pytest.fixture(autouse=True, params=["generic", "avx2", "avx512"])
def isa(request):
    """Every instruction set that this CPU has."""
    dispatch.implementation("merge3x3", "cpu")
    ops = torch.ops.efrdn_fast_ext
    best = ops.cpu_isa()
    try:
        ops.use_cpu_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    yield
    ops.use_cpu_isa(best)


def maps(count, size, channels, dtype=torch.float32):
    n, h, w = size
    made = torch.randn(count, n, h, w, channels).to(dtype).permute(0, 1, 4, 2, 3)
    return [m.requires_grad_() for m in made]


def check(op, tensors, tolerance=3e-6):
    """`op` on the CPU kernel against itself in float64 on the reference, and its gradients."""
    tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
    present = [t for t in tensors if t is not None]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y, truth = op(*tensors, backend="cpu"), op(*exact, backend="reference")
    assert y.dtype == present[0].dtype
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    grads = torch.autograd.grad(y, present, weights.to(y.dtype))
    expected = torch.autograd.grad(truth, [t for t in exact if t is not None], weights)
    for found, wanted in zip((y, *grads), (truth, *expected), strict=True):
        assert found.shape == wanted.shape
        scale = wanted.abs().max().item() + 1e-3
        assert (found.double() - wanted).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("channels", "second", "gate"),
    [(32, False, None), (16, True, "pixel"), (16, True, "channel"), (32, True, None)],
)
def test_merge3x3(size, channels, second, gate):
    a, b, residual = maps(3, size, 32)
    a, b = a[:, :channels], b[:, 32 - channels :] if second else None
    logits = None
    if gate is not None:
        n, h, w = size
        logits = torch.randn((n, 1, h, w) if gate == "pixel" else (n, channels, 1, 1))
    weight = torch.randn(32, 8 if second and channels == 32 else 4, 3, 3) / 6

    def op(a, b, logits, weight, residual, backend):
        return fusion.merge3x3(
            a, weight, b, gate=logits, relu=second, residual=residual, backend=backend
        )

    check(op, [a, b, logits, weight, residual])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_calibrate(size):
    block = CC(32)
    convs = block.squeeze, block.excite
    weights = [w.detach() for conv in convs for w in (conv.weight, conv.bias)]
    check(fusion.calibrate, [*maps(2, size, 32), *weights], tolerance=2e-5)


def test_calibrate_is_the_block():
    block = CC(32).double()
    base, x = (m.double() for m in maps(2, (2, 5, 6), 32))
    convs = block.squeeze, block.excite
    weights = [w for conv in convs for w in (conv.weight, conv.bias)]
    torch.testing.assert_close(fusion.calibrate(base, x, *weights), base + block(x))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sigmoid_gate(size):
    x, logits = maps(2, size, 32)
    check(fusion.sigmoid_gate, [x, logits])


def test_sigmoid_gate_of_extreme_logits():
    logits = torch.tensor([0.0, 30, -30, 200, -200, torch.inf, -torch.inf, torch.nan])
    logits = logits.repeat(4).view(1, 1, 1, 32).permute(0, 3, 1, 2)
    x = torch.ones(1, 32, 1, 1)
    found = fusion.sigmoid_gate(x, logits, backend="cpu")
    torch.testing.assert_close(found, torch.sigmoid(logits), equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Sums run in float32: what is left is the rounding of input and output."""
    a, b = (m.detach() for m in maps(2, (2, 9, 11), 32, dtype))
    weight = torch.randn(32, 8, 3, 3) / 8
    epsilon = torch.finfo(dtype).eps
    for op in (
        lambda a, b, backend: fusion.merge3x3(a, weight, b, backend=backend),
        fusion.sigmoid_gate,
        lambda a, b, backend: fusion.calibrate(
            a,
            b,
            *(w.detach() for c in (CC(32).squeeze, CC(32).excite) for w in (c.weight, c.bias)),
            backend=backend,
        ),
    ):
        torch.manual_seed(0)
        found = op(a, b, backend="cpu")
        torch.manual_seed(0)
        wanted = op(a.double(), b.double(), backend="reference")
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [16, 32])
def test_tokens(size, channels):
    (x,) = maps(1, size, channels)
    with torch.no_grad():
        t = tokens.unfold(x, "cpu")
        assert torch.equal(t, tokens.unfold(x, "reference"))
        y = tokens.fold(t, x.shape, False, "cpu")
        torch.testing.assert_close(y, tokens.fold(t, x.shape, False, "reference"))
        torch.testing.assert_close(y, x * overlap_count(x))
        torch.testing.assert_close(tokens.fold(t, x.shape, True, "cpu"), x)
    check(lambda x, backend: tokens.unfold(x, backend).square(), [x])


def test_tokens_differentiate_twice():
    (x,) = maps(1, (1, 3, 4), 16)
    second = {}
    for backend in ("cpu", "reference"):
        t = tokens.unfold(x, backend)
        weights = torch.linspace(-1, 1, t.numel()).view(t.shape).requires_grad_()
        y = tokens.fold(t * weights, x.shape, False, backend)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second[backend] = torch.autograd.grad(grad.square().sum(), [x, weights])
    for found, wanted in zip(second["cpu"], second["reference"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_other_widths_take_the_reference():
    """By `auto`; a backend that is named runs or says why not."""
    a, b = maps(2, (1, 4, 5), 24)
    bottleneck = torch.randn(2, 24, 1, 1), torch.randn(2), torch.randn(24, 2, 1, 1), torch.randn(24)
    calls = [
        (functools.partial(fusion.merge3x3, a, torch.randn(48, 6, 3, 3), b), (1, 48, 4, 5)),
        (functools.partial(fusion.sigmoid_gate, a, b), a.shape),
        (functools.partial(fusion.calibrate, a, b, *bottleneck), a.shape),
        (functools.partial(tokens.unfold, a), (1, 20, 216)),
        (functools.partial(tokens.fold, torch.randn(1, 20, 216), a.shape, True), a.shape),
    ]
    for call, shape in calls:
        for backend in ("auto", "reference"):
            assert call(backend=backend).shape == shape
        with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run: it takes .*got (24|48)"):
            call(backend="cpu")
        with pytest.raises(ValueError, match="backend must be one of"):
            call(backend="fast")


def test_autocast_casts_maps():
    a, b = (m.detach() for m in maps(2, (1, 4, 5), 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert fusion.sigmoid_gate(a, b).dtype == torch.bfloat16
