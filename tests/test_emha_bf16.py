"""Attention of bfloat16 in dot products of pairs, on CPUs that have them."""

from __future__ import annotations

import pytest
import torch
from efrdn_fast.kernels import _build, _plan, native

from efrdn_fast import functional, reference
from efrdn_fast.cases_attention import EmhaCase
from efrdn_fast.testing import check_backward, check_forward, make_input

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def isa():
    """The kernels with dot products serve."""
    if reason := _plan.missing("cpu"):
        pytest.skip(f"backend cpu: {reason}")
    _build.load("cpu")
    ext = torch.ops.efrdn_fast_ext
    before = ext.cpu_isa()
    if before != "avx512bf16":
        pytest.skip(f"this CPU has no AVX512_BF16 but {before}")
    yield ext.use_cpu_isa
    ext.use_cpu_isa(before)


CASES = [EmhaCase(1, tokens, tokens) for tokens in (1, 2, 3, 5, 31, 40, 41, 79, 80, 81, 163, 577)]
CASES += [EmhaCase(1, 83, 83, heads=2, dim=dim) for dim in (1, 2, 3, 7, 17, 33, 63, 64)]
CASES += [EmhaCase(2, 97, 40, strided=True), EmhaCase(1, 61, 20, heads=3, dim=11, strided=True)]
CASES += [EmhaCase(1, 97, 97, heads=2, dim=dim, scale=5.0) for dim in (1, 7, 18, 64)]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case):
    """Nearer than the tolerance for bfloat16: only weights and output are rounded."""
    check_forward(case, BF16, "cpu", "cpu")
    qkv, *rest = case.args(BF16)
    out, lse = native.emha_cpu(qkv, *rest)
    exact, exact_lse = case.reference(qkv.double(), *rest)
    error = (out.double() - exact).abs().max().item()
    assert error <= 2**-8 * qkv.double().abs().max().item()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-4)


def test_one_token_gets_its_value():
    """Up to the rounding of its weight and of the output."""
    qkv = make_input((2, 9, 42), BF16)
    out = functional.emha(qkv, 2, 1, backend="cpu")
    torch.testing.assert_close(out, qkv[:, :, 28:], rtol=2**-7, atol=0)


@pytest.mark.parametrize("case", [CASES[8], CASES[15], CASES[-2]], ids=str)
def test_backward(case):
    """It computes the weights again from the log-sum-exp of this forward."""
    check_backward(case, BF16, "cpu", "cpu")


def test_scores_of_1e4():
    """Scores are sums of exact products: what is chosen is right, without overflow."""
    case = EmhaCase(1, 91, 91, scale=50.0)
    qkv, *rest = case.args(BF16)
    q, k, _ = reference.split_heads(qkv.double(), case.heads)
    assert (q @ k.mT).abs().max() * case.dim**-0.5 > 1e4
    out, lse = native.emha_cpu(qkv, *rest)
    exact, exact_lse = case.reference(qkv.double(), *rest)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-7, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [11, 90])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_finite(value, tokens, part):
    """The same outputs are NaN as in plain PyTorch."""
    qkv = make_input((2, tokens, 42), BF16)
    qkv[0, 2, {"query": 0, "key": 14, "value": 28}[part]] = value
    out, _ = native.emha_cpu(qkv, 2, tokens, False)
    expected = reference.emha(qkv.double(), 2, tokens)
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-2, equal_nan=True)


def test_values_far_from_one():
    """Values near the ends of what is bounded take the shifted sums."""
    for factor in (1e-30, 1e30):
        qkv, *rest = EmhaCase(1, 85, 85).args(BF16)
        qkv[:, :, 288:] *= factor
        out, _ = native.emha_cpu(qkv, *rest)
        exact = reference.emha(qkv.double(), 8, 85)
        torch.testing.assert_close(out.double() / factor, exact / factor, rtol=0, atol=1e-2)


def test_only_bfloat16_takes_it(isa):
    for dtype, same in ((torch.float32, True), (torch.float16, True), (BF16, False)):
        args = EmhaCase(1, 83, 83).args(dtype)
        outs = []
        for name in ("avx512", "avx512bf16"):
            isa(name)
            outs.append(native.emha_cpu(*args)[1])
        assert torch.equal(*outs) is same
