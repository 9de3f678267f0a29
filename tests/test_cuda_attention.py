"""CUDA attention executed on the CPU (tests/simt), memory guarded, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efrdn_fast import reference, testing
from tests.simt import harness as simt


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    simt.require()


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    # N, tokens, heads, head_dim, length of a segment, dtype, tf32
    pytest.param(1, 1, 2, 18, 4, FP32, False, id="T1"),
    pytest.param(1, 256, 1, 18, 256, FP16, False, id="T256-fp16"),
    pytest.param(1, 131, 2, 18, 131, FP32, False, id="T131"),
    pytest.param(1, 131, 1, 18, 131, FP32, True, id="T131-tf32"),
    pytest.param(2, 50, 2, 18, 17, BF16, False, id="N2-T50-segments-of-17-bf16"),
    pytest.param(2, 50, 2, 18, 17, FP32, False, id="N2-T50-segments-of-17"),
    pytest.param(1, 70, 1, 23, 66, FP16, False, id="T70-D23-fp16"),
    pytest.param(1, 40, 1, 64, 40, FP16, False, id="T40-D64-fp16"),
    pytest.param(1, 40, 1, 33, 40, BF16, False, id="T40-D33-bf16"),
    pytest.param(1, 21, 2, 64, 21, FP32, False, id="T21-D64"),
    pytest.param(1, 21, 1, 24, 21, FP32, True, id="T21-D24-tf32"),
    pytest.param(1, 9, 3, 1, 5, FP16, False, id="T9-D1-fp16"),
]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(qkv: Tensor, heads: int, length: int, tf32: bool) -> tuple[dict, dict]:
    n, tokens, width = qkv.shape
    out = torch.full((n, tokens, width // 3), torch.nan, dtype=qkv.dtype)
    lse = torch.full((n, heads, tokens), torch.nan)
    numbers = {"N": n, "T": tokens, "length": length, "heads": heads, "tf32": tf32}
    numbers |= {"d": width // (3 * heads), "stride_n": qkv.stride(0), "stride_t": qkv.stride(1)}
    return {"qkv": qkv, "out": out, "lse": lse}, numbers


def log_sum_exp(qkv: Tensor, heads: int, length: int) -> Tensor:
    """Of the scaled scores of every query, `[N, heads, T]`."""
    n, tokens, width = qkv.shape
    q, k, _ = qkv.view(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scale = (width // (3 * heads)) ** -0.5
    parts = zip(q.split(length, dim=2), k.split(length, dim=2), strict=True)
    return torch.cat([(a @ b.mT * scale).logsumexp(-1) for a, b in parts], dim=2)


@pytest.mark.parametrize(("n", "tokens", "heads", "d", "length", "dtype", "tf32"), CASES)
def test_emha_forward(n, tokens, heads, d, length, dtype, tf32):
    qkv = simt.between_nan(draw(n, tokens, 3 * heads * d, dtype=dtype))
    arrays, numbers = arguments(qkv, heads, length, tf32)
    first, second = (simt.run("emha_fwd", arrays, numbers, order) for order in ("forward", "5"))
    assert torch.equal(first["out"], second["out"])

    def exact(qkv):
        return reference.emha(qkv, heads, length), log_sum_exp(qkv, heads, length)

    out = first["out"], first["lse"]
    testing.assert_close_to_reference(out, exact, [qkv.contiguous()], dtype=dtype, tf32=tf32)


@pytest.mark.parametrize(("n", "tokens", "heads", "d", "length", "dtype", "tf32"), CASES)
def test_emha_backward(n, tokens, heads, d, length, dtype, tf32):
    qkv = simt.between_nan(draw(n, tokens, 3 * heads * d, dtype=dtype))
    grad = simt.between_nan(draw(n, tokens, heads * d, dtype=dtype, seed=1))
    arrays, numbers = arguments(qkv, heads, length, tf32)
    double = qkv.double().contiguous()
    arrays["out"] = reference.emha(double, heads, length).to(dtype).contiguous()
    arrays["lse"] = log_sum_exp(double, heads, length).float()
    arrays |= {"grad_out": grad, "grad_qkv": torch.full(qkv.shape, torch.nan, dtype=dtype)}
    numbers |= {"grad_stride_n": grad.stride(0), "grad_stride_t": grad.stride(1)}
    runs = [simt.run("emha_bwd", arrays, numbers, order)["grad_qkv"] for order in ("forward", "5")]
    assert torch.equal(*runs)

    def exact(qkv):
        return testing.gradients(lambda x: reference.emha(x, heads, length), grad)(qkv)

    args = [qkv.contiguous()]
    testing.assert_close_to_reference((runs[0],), exact, args, dtype=dtype, tf32=tf32)


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_emha_of_large_scores(dtype):
    """|score| up to 1e4: softmax picks one key, and nothing overflows."""
    tokens, d = 70, 18
    qkv = draw(1, tokens, 3 * d, dtype=FP32)
    scores = qkv[0, :, :d] @ qkv[0, :, d : 2 * d].T * d**-0.5
    qkv[..., : 2 * d] *= (1e4 / scores.abs().max()) ** 0.5
    qkv = qkv.to(dtype)
    arrays, numbers = arguments(qkv, 1, tokens, False)
    forward = simt.run("emha_fwd", arrays, numbers)
    exact = reference.emha(qkv.double(), 1, tokens)
    # float scores of 1e4 are good to 5e-4
    testing.assert_within(forward["out"], exact, exact, 4e-3, "out")
    lse = log_sum_exp(qkv.double(), 1, tokens)
    testing.assert_within(forward["lse"], lse, lse, 1e-6, "lse")
    grad = draw(1, tokens, d, dtype=dtype, seed=1)
    arrays |= {name: forward[name] for name in ("out", "lse")}
    arrays |= {"grad_out": grad, "grad_qkv": torch.full_like(qkv, torch.nan)}
    numbers |= {"grad_stride_n": 0, "grad_stride_t": d}
    assert simt.run("emha_bwd", arrays, numbers)["grad_qkv"].isfinite().all()


@pytest.mark.parametrize("tf32", [False, True])
def test_emha_passes_infinite_values_on(tf32):
    """As in PyTorch: a score of -inf has no weight, one of +inf makes its row NaN."""
    tokens, d = 40, 18
    qkv = draw(1, tokens, 3 * d, dtype=FP16)
    qkv[0, 7, d] = torch.inf  # a key
    qkv[0, 9, 2 * d + 3] = torch.inf  # a value
    qkv = qkv.float() if tf32 else qkv
    out = simt.run("emha_fwd", *arguments(qkv, 1, tokens, tf32))["out"]
    expected = reference.emha(qkv.float(), 1, tokens)
    assert expected.isinf().any()
    assert expected.isnan().any()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=4e-3, equal_nan=True)
