"""The ops of the transformer block and their chain: values, gradients, tracing, FLOPs."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import cases_attention, functional, reference
from efrdn_fast.cases_attention import TokenCase
from efrdn_fast.packing import PackedTransformer, Target
from efrdn_fast.testing import (
    assert_close_to_reference,
    case_id,
    check_backward,
    check_forward,
    gradients,
    make_input,
)
from efrdn_fast.transformer import TransformerBlock

OPS = ("token_qkv", "token_hidden", "token_fold")
CASES = {op: [c for c in cases_attention.TOKENS if c.op == op] for op in OPS}


def runs(op: str):
    half = [(CASES[op][2], dtype) for dtype in (torch.float16, torch.bfloat16)]
    half += [(case, torch.float16) for case in CASES[op] if case.offset or case.peak]
    pairs = [(case, torch.float32) for case in CASES[op]] + half
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=case_id)


@runs("token_qkv")
@pytest.mark.op("token_qkv")
@pytest.mark.usefixtures("poison_empty")
def test_token_qkv_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@runs("token_hidden")
@pytest.mark.op("token_hidden")
@pytest.mark.usefixtures("poison_empty")
def test_token_hidden_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@runs("token_fold")
@pytest.mark.op("token_fold")
@pytest.mark.usefixtures("poison_empty")
def test_token_fold_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@runs("token_qkv")
@pytest.mark.op("token_qkv_backward")
@pytest.mark.usefixtures("poison_empty")
def test_token_qkv_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@runs("token_hidden")
@pytest.mark.op("token_hidden_backward")
@pytest.mark.usefixtures("poison_empty")
def test_token_hidden_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@runs("token_fold")
@pytest.mark.op("token_fold_backward")
@pytest.mark.usefixtures("poison_empty")
def test_token_fold_backward(target, case, dtype):
    check_backward(case, dtype, *target)


def on_triton(function):
    """Run on a GPU, and on a CPU in the interpreter; without either the kernels cannot be run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    alone = pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")
    devices = [
        pytest.param("cpu", id="cpu-triton", marks=alone),
        pytest.param("cuda", id="cuda-triton", marks=pytest.mark.gpu),
    ]
    return pytest.mark.parametrize("device", devices)(function)


@on_triton
@pytest.mark.parametrize(
    ("op", "offset", "peak"),
    [
        ("token_qkv", 1e3, 0.0),
        ("token_qkv", 0.0, 1e3),
        ("token_qkv", 0.0, -3e4),
        ("token_hidden", 0.0, 1e3),  # with an offset its tokens are rounded, not their statistics
        ("token_hidden", 0.0, -3e4),
    ],
)
def test_deviation_of_tokens_cancels_nothing(op, offset, peak, device):
    """1 / deviation to some units of float32, also around pixels that stand out.

    Sums around the mean of the centre lose a digit there, and nothing is left of E[x^2] - mean^2.
    """
    from efrdn_fast.kernels import _token_stats as kernels

    x, *weights, eps, _ = TokenCase(op, (1, 32, 7, 7), offset=offset).args(device=device)
    x[:, :, ::3, ::3] += peak
    t = reference.unfold(x.double())
    if op == "token_qkv":
        gamma, beta, reduce, _ = weights
        grad = make_input((*t.shape[:2], len(reduce)), device=device)
        stats, _ = kernels.linear_stats(x, grad, reduce, gamma, beta, eps, "tf32x3")
    else:
        a, *proj, gamma, _, fc1, _ = weights
        grad = make_input((*t.shape[:2], len(fc1)), device=device)
        back = (fc1 * gamma).T.contiguous()
        stats = kernels.token_stats(x, a, grad, proj, back, eps, "tf32x3")
        t = t + F.linear(a.double(), *(p.double() for p in proj))
    exact = (t.var(dim=2, unbiased=False) + eps).rsqrt().flatten()
    torch.testing.assert_close(stats[:, kernels.RSTD.value].double(), exact, rtol=4e-7, atol=0)


def small(op: str, dtype: torch.dtype = torch.float32, **options) -> tuple:
    return TokenCase(op, (2, 2, 3, 4), "sliced", hidden=5, **options).args(dtype)


@pytest.mark.parametrize("op", OPS)
def test_token_opcheck(op):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in small(op)]
    packet = getattr(torch.ops.efrdn_fast, op)
    torch.library.opcheck(packet.default, (*args, "reference"))
    args = small(op)
    y = packet(*args, "reference")
    args = (y, *args[1:]) if op == "token_fold" else (y, *args)
    if op == "token_hidden":
        args = (*args[:3], y, *args[3:])
    backward = getattr(torch.ops.efrdn_fast, f"{op}_backward")
    torch.library.opcheck(backward.default, (*args, "reference"))


@pytest.mark.parametrize("op", OPS)
def test_token_gradcheck(op):
    args = small(op, torch.float64, **({"mean": False} if op == "token_fold" else {}))
    tensors = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor)]
    packet = getattr(torch.ops.efrdn_fast, op)
    options = args[len(tensors) :]
    # fast_mode: along one random direction, a minute less
    assert torch.autograd.gradcheck(
        lambda *t: packet(*t, *options, "reference"), tensors, fast_mode=True
    )


def block(channels: int = 16, **options) -> TransformerBlock:
    """A block whose norms and biases are not those of a fresh one."""
    made = TransformerBlock(channels, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def plain(segment_tokens: int, mean: bool = True):
    def run(x, *weights):
        return reference.transformer_block(x, *weights, segment_tokens=segment_tokens, mean=mean)

    return run


@pytest.mark.parametrize("fold", ["mean", "sum"])
def test_reference_of_the_parts_equals_the_block(fold):
    module = block(fold=fold).double()
    x = make_input((2, 16, 5, 7), torch.float64)
    y = plain(9, fold == "mean")(x, *module.parameters())
    torch.testing.assert_close(y, module(x), rtol=0, atol=1e-12)


@pytest.mark.op("emha_backward")
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 5), (9, 13), (48, 48)], ids=str)
def test_block_forward_and_every_gradient(target, size):
    """Also with fewer tokens than segments, and where the last one is shorter."""
    device, backend = target
    weights = [p.detach().to(device) for p in block().parameters()]
    x = make_input((2 if size < (48, 48) else 1, 16, *size), device=device)
    tokens = size[0] * size[1]
    args, length = (x, *weights), (tokens + 3) // 4

    def fast(*args):
        return functional.transformer_block(*args, backend=backend)

    grad = make_input(x.shape, device=device, seed=9)
    assert_close_to_reference(fast(*args), plain(length), args)
    assert_close_to_reference(gradients(fast, grad)(*args), gradients(plain(length), grad), args)


def test_packed_block_takes_more_tokens_than_a_part():
    """On a CPU its Linear layers run over 2,048 tokens at a time, also across images."""
    module = block(32).eval()
    x = make_input((2, 32, 33, 35), layout="channels_last")
    packed = PackedTransformer(
        module, Target(torch.float32, {"emha": "reference", "unfold": "auto"})
    )
    with torch.inference_mode():
        y = packed(x)
        assert_close_to_reference(y, plain(289), (x, *module.parameters()))


@pytest.mark.op("unfold")
@pytest.mark.parametrize("far", [{"offset": 1e3}, {"peak": 1e3}], ids=str)
def test_packed_block_far_from_zero(target, far):
    """What it adds to its input, not the input, gives the bound."""
    device, backend = target
    module = block(32).eval().to(device)
    x, *_ = TokenCase("token_qkv", (1, 32, 9, 8), **far).args(device=device)
    plan = {"emha": backend, "unfold": backend}
    packed = PackedTransformer(module, Target(torch.float32, plan))

    def added(x, *weights):
        return plain(18)(x, *weights) - x

    with torch.inference_mode():
        assert_close_to_reference(packed(x) - x, added, (x, *module.parameters()))


def test_block_options_reach_the_ops():
    module = block(segment_tokens=6, fold="sum").double()
    x = make_input((1, 16, 4, 5), torch.float64)
    y = functional.transformer_block(x, *module.parameters(), segment_tokens=6, mean=False)
    torch.testing.assert_close(y, module(x), rtol=0, atol=1e-12)


def test_block_compiles_in_one_graph():
    module = block(channels=2, segments=2)
    module.emha.heads = 3
    weights = list(module.parameters())

    def step(x):
        return functional.transformer_block(x, *weights, heads=3, segments=2, backend="reference")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = make_input((1, 2, 4, 5)).requires_grad_()
    torch.testing.assert_close(compiled(x), step(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), (x, *weights)),
        torch.autograd.grad(step(x).sum(), (x, *weights)),
    )


def test_block_flops_equal_those_of_the_module():
    module = block()
    x = make_input((2, 16, 5, 7)).requires_grad_()
    counts = []
    for step in (module, lambda x: functional.transformer_block(x, *module.parameters())):
        with FlopCounterMode(display=False) as forward:
            y = step(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_block_autocast_keeps_the_weights():
    module = block()
    x = make_input((1, 16, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.transformer_block(x, *module.parameters())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.op("emha_backward")
@pytest.mark.parametrize(
    ("file", "options"),
    [("trans_segments4_mean", {}), ("trans_segments3_sum", {"segments": 3, "mean": False})],
)
def test_block_vectors(vectors_root, target, file, options):
    """Output and all gradients against stored float64 values."""
    device, backend = target
    stored = load_file(vectors_root / f"{file}.safetensors")
    exact = backend == "reference"
    dtype = torch.float64 if exact else torch.float32
    names = [name for name, _ in TransformerBlock().named_parameters()]
    args = [stored[key] for key in ("input", *(f"weight.{name}" for name in names))]
    args = [a.to(device, dtype).requires_grad_() for a in args]
    y = functional.transformer_block(*args, backend=backend, **options)
    grads = torch.autograd.grad(y, args, stored["cotangent"].to(device, dtype))
    expected = [stored[key] for key in ("grad.input", *(f"grad.weight.{name}" for name in names))]
    for got, wanted in zip((y, *grads), (stored["output.eval.use0"], *expected), strict=True):
        bound = 1e-10 if exact else 2e-5 * wanted.abs().max().item()
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.zeros(2, 16, 5)}, ValueError, r"x must be \[N, C, H, W\], got \[2, 16, 5\]"),
        ({0: torch.zeros(2, 16, 0, 7)}, ValueError, "x must not be empty"),
        ({0: torch.zeros(2, 8, 5, 7)}, ValueError, r"norm1_weight must be \[72\], got \[144\]"),
        ({1: torch.zeros(144, device="meta")}, ValueError, "norm1_weight must be on cpu.*meta"),
        ({2: torch.zeros(144).double()}, TypeError, "norm1_bias must be float32.*float64"),
        ({3: torch.zeros(72)}, ValueError, r"reduce must be \[M, 9 \* C\], got \[72\]"),
        ({4: torch.zeros(144, 72)}, ValueError, r"qkv must be \[216, 72\], got \[144, 72\]"),
        ({9: None}, TypeError, "fc1_weight must be a tensor, got NoneType"),
        ({"heads": 5}, ValueError, "heads must divide the width 72 of q, got 5"),
        ({"heads": 1}, ValueError, "head_dim must be at most 64, got 72"),
        ({"segments": 0}, ValueError, "segments must be at least 1, got 0"),
        ({"segment_tokens": 0}, ValueError, "segment_tokens must be at least 1, got 0"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto,.*'fast'"),
    ],
)
def test_block_rejects(changes, error, message):
    args = [make_input((2, 16, 5, 7)), *block().parameters()]
    options = {key: value for key, value in changes.items() if isinstance(key, str)}
    for key, value in changes.items():
        if isinstance(key, int):
            args[key] = value
    with pytest.raises(error, match=message):
        functional.transformer_block(*args, **options)
