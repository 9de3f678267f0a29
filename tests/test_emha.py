"""Attention on every backend that can run here: values, gradients, extremes, tracing, FLOPs."""

from __future__ import annotations

import pytest
import torch
from efrdn_fast.kernels import _build, _plan, _precision
from efrdn_fast.kernels import reference_attention as kernels
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast import functional, reference
from efrdn_fast.cases_attention import EMHA, EmhaCase, attention_rows
from efrdn_fast.testing import (
    TOLERANCES,
    assert_within,
    case_id,
    check_backward,
    check_forward,
    gradients,
    make_input,
)
from tests.backends import CPU_BACKENDS

HALF = (torch.float16, torch.bfloat16)
CASES = [(case, torch.float32) for case in EMHA]
CASES += [(case, dtype) for case in (EMHA[3], EMHA[8]) for dtype in HALF]
emha = torch.ops.efrdn_fast.emha
emha_backward = torch.ops.efrdn_fast.emha_backward


def small(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """qkv of 2 heads x 3; segments of 4 tokens."""
    return make_input((2, 11, 18), dtype)


@pytest.mark.op("emha")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_id)
def test_emha_forward(target, case, dtype):
    check_forward(case, dtype, *target)


@pytest.mark.op("emha_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=case_id)
def test_emha_backward(target, case, dtype):
    check_backward(case, dtype, *target)


@pytest.mark.op("emha_backward")
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("tokens", [1, 2, 5, 63, 64, 65, 361, 997, 2304])
def test_emha_at_many_sizes(target, tokens):
    """Four segments, also more than there are tokens; output and gradient in float32."""
    case = EmhaCase(2 if tokens < 100 else 1, tokens, (tokens + 3) // 4)
    check_forward(case, torch.float32, *target)
    check_backward(case, torch.float32, *target)


@pytest.mark.op("emha")
@pytest.mark.usefixtures("poison_empty")
def test_emha_of_a_whole_image(target):
    """57,600 tokens in four segments: 64 queries against float64, the rest finite."""
    device, backend = target
    qkv = make_input((1, 57600, 54), device=device)
    out, lse = emha(qkv, 1, 14400, False, backend)
    assert out.isfinite().all() and lse.isfinite().all()
    rows = torch.randperm(57600)[:64]
    exact = attention_rows(qkv, 1, 14400, rows)
    plain = attention_rows(qkv, 1, 14400, rows, torch.float32)
    for got, truth, near in zip((out[:, rows], lse[:, :, rows]), exact, plain, strict=True):
        assert_within(got, truth, near, TOLERANCES[torch.float32])


@pytest.mark.op("emha_backward")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=case_id)
def test_emha_of_scores_of_1e4(target, dtype):
    """Neither overflow nor NaN; output and gradient as near as the rounding of scores allows."""
    device, backend = target
    case = EmhaCase(1, 90, 45, scale=60.0 if dtype == torch.float32 else 50.0)
    qkv, *rest = case.args(dtype, device)
    q, k, _ = reference.split_heads(qkv.double(), case.heads)
    assert (q @ k.mT).abs().max() * case.dim**-0.5 > 1e4
    out, lse = emha(qkv, *rest, backend)
    exact, exact_lse = case.reference(qkv.double(), *rest)
    atol = 5e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-7, atol=1e-2)
    grads = [
        gradients(f, make_input((1, 90, 144), dtype, device, seed=3))(values)[0]
        for f, values in (
            (lambda qkv: emha(qkv, *rest, backend), qkv),
            (lambda qkv: case.reference(qkv, *rest), qkv.double()),
        )
    ]
    atol = 5e-3 if dtype == torch.float32 else 1e-1
    torch.testing.assert_close(
        grads[0].double(), grads[1], rtol=0, atol=atol * grads[1].abs().max().item()
    )


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_emha_in_every_instruction_set(isa):
    """Of this machine: blocks of one, two and all vectors, widths with a rest, half precision."""
    if reason := _plan.missing("cpu"):
        pytest.skip(f"backend cpu: {reason}")
    _build.load("cpu")
    ext = torch.ops.efrdn_fast_ext
    before = ext.cpu_isa()
    try:
        ext.use_cpu_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for tokens in (7, 16, 17, 45, 64, 131):
            case = EmhaCase(1, tokens, 100, heads=2, strided=True)
            check_forward(case, torch.float32, "cpu", "cpu")
            check_backward(case, torch.float32, "cpu", "cpu")
        for case in (EMHA[7], EMHA[8], EMHA[9]):
            for dtype in (torch.float32, *HALF):
                check_forward(case, dtype, "cpu", "cpu")
                check_backward(case, dtype, "cpu", "cpu")
    finally:
        ext.use_cpu_isa(before)


@pytest.mark.op("emha_backward")
def test_emha_backward_of_an_expanded_gradient(target):
    check_backward(EMHA[3], torch.float32, *target, expanded=True)


@pytest.mark.op("emha_backward")
def test_emha_backward_is_deterministic(target):
    device, backend = target
    args = EmhaCase(2, 97, 40).args(torch.float32, device)
    out, lse = emha(*args, backend)
    first, second = (emha_backward(out, args[0], out, lse, *args[1:], backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [5, 14])
def test_emha_by_blocks_of_scores_equals_the_flash_kernel(monkeypatch, tokens):
    """What the reference backend does on other devices, here in float64 on the CPU."""
    qkv = make_input((2, tokens, 18), torch.float64)
    grad = make_input((2, tokens, 6), torch.float64, seed=1)
    out, lse = kernels.emha(qkv, 2, 6, False)
    torch.testing.assert_close(lse, reference.emha_lse(qkv, 2, 6))
    monkeypatch.setattr(reference, "SCORE_BUDGET", 4 * 2 * 2 * 6 * 8)  # 4 rows at a time
    args = grad, qkv, out, lse, 2, 6
    torch.testing.assert_close(kernels._plain_gradients(*args), kernels._flash_gradients(*args))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_emha_opcheck(backend):
    torch.library.opcheck(emha.default, (small().requires_grad_(), 2, 4, False, backend))
    qkv = small()
    out, lse = emha(qkv, 2, 4, False, backend)
    args = (out.clone(), qkv, out, lse, 2, 4, False, backend)
    torch.library.opcheck(emha_backward.default, args)


def test_emha_gradcheck():
    qkv = make_input((1, 5, 12), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: functional.emha(qkv, 2, 3), qkv)


def test_emha_double_backward_says_what_to_do():
    qkv = small().requires_grad_()
    (grad,) = torch.autograd.grad(functional.emha(qkv, 2, 4).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"emha_backward has no derivative.*reference"):
        grad.sum().backward()


def test_emha_compile():
    qkv = small().requires_grad_()

    def step(qkv):
        return functional.emha(qkv, 2, segments=3, backend="reference")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), step(qkv))
    (grad,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
    (expected,) = torch.autograd.grad(step(qkv).sum(), qkv)
    torch.testing.assert_close(grad, expected)


def test_emha_takes_a_count_or_a_length():
    qkv = small(torch.float64)
    torch.testing.assert_close(
        functional.emha(qkv, 2, segments=3), reference.emha(qkv, 2, 4), rtol=0, atol=1e-12
    )


def test_emha_flops_equal_those_of_the_reference():
    qkv = small().requires_grad_()
    counts = []
    for attention in (reference.emha, functional.emha):
        with FlopCounterMode(display=False) as forward:
            out = attention(qkv, 2, 4)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_emha_autocast():
    qkv = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.emha(qkv, 2, 4)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, functional.emha(qkv.bfloat16(), 2, 4))


@pytest.mark.op("emha")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_emha_keeps_what_is_not_finite(target, value):
    """In query, key or value of one token: the same outputs are NaN as in plain PyTorch.

    PyTorch's own kernel on a CPU, which is the reference backend there, gives 0 for a NaN query.
    """
    device, backend = target
    plain = reference.emha_sdpa if target == ("cpu", "reference") else reference.emha
    for column in (0, 6, 12):
        qkv = small().to(device)
        qkv[0, 2, column] = value
        out, _ = emha(qkv, 2, 4, False, backend)
        expected = plain(qkv, 2, 4)
        torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": [1.0]}, TypeError, "qkv must be a tensor, got list"),
        ({"qkv": torch.zeros(11, 18)}, ValueError, r"\[N, T, 3 \* heads \* D\], got \[11, 18\]"),
        ({"qkv": torch.zeros(2, 0, 18)}, ValueError, "must not be empty, got zero-size"),
        ({"qkv": torch.zeros(1, 4, 18, dtype=torch.int32)}, TypeError, "float32.*int32"),
        ({"heads": 4}, ValueError, r"got \[2, 11, 18\] for heads=4"),
        ({"heads": 0}, ValueError, "heads=0"),
        ({"heads": 2.0}, TypeError, "heads must be an int, got 2.0"),
        ({"segment_tokens": 2.5}, TypeError, "segment_tokens must be an int, got 2.5"),
        ({"segments": "4"}, TypeError, "segments must be an int, got '4'"),
        ({"qkv": torch.zeros(1, 4, 390)}, ValueError, "head_dim must be at most 64, got 65"),
        ({"segment_tokens": 0}, ValueError, "segment_tokens must be at least 1, got 0"),
        ({"segments": 0}, ValueError, "segments must be at least 1, got 0"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto,.*'fast'"),
    ],
)
def test_emha_rejects(changes, error, message):
    arguments = {"qkv": small(), "heads": 2, **changes}
    with pytest.raises(error, match=message):
        functional.emha(**arguments)


def test_tf32_follows_both_interfaces_of_pytorch():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        for setting, expected in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = conv.fp32_precision = setting
            assert _precision.matmul_tf32() is expected
            assert _precision.convolution_tf32() is expected
        for expected in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = expected
            assert _precision.matmul_tf32() is expected
            assert _precision.convolution_tf32() is expected
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
