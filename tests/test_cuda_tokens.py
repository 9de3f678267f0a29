"""CUDA kernels of the transformer block, run on the CPU (tests/simt), against float64 PyTorch."""

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
    # map, width of a token beside it, dtype, layout, options
    pytest.param((1, 32, 9, 8), 144, FP16, "channels_last", "", id="9x8-C32-fp16"),
    pytest.param((1, 32, 5, 7), 144, FP32, "channels_last", "", id="5x7-C32"),
    pytest.param((2, 5, 3, 11), 20, FP32, "sliced", "tf32", id="N2-3x11-C5-tf32"),
    pytest.param((2, 5, 3, 11), 51, BF16, "sliced", "sum", id="N2-3x11-C5-bf16"),
    pytest.param((1, 3, 1, 1), 7, FP32, "channels_last", "sum", id="1x1-C3"),
    pytest.param((1, 3, 1, 5), 7, FP16, "channels_last", "half", id="1x5-C3-fp16-weights"),
]
case = pytest.mark.parametrize(("shape", "width", "dtype", "layout", "options"), CASES)


def draw(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Normal values; matrices scaled so that their products with unit inputs stay near 1."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).to(dtype)


def tokens(shape, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    n, _, h, w = shape
    return draw(n, h * w, width, seed=seed, dtype=dtype)


def run(op: str, arrays: dict, x: Tensor, out: Tensor, options: str, **numbers: int) -> Tensor:
    n, c, h, w = x.shape
    numbers |= {"N": n, "C": c, "H": h, "W": w, "tf32": "tf32" in options}
    arrays = {"x": x, "out": out, **arrays}
    first, second = (simt.run(op, arrays, numbers, order)["out"] for order in ("forward", "5"))
    assert torch.equal(first, second)
    return first


def norm_weights(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gamma = 1 + 0.2 * draw(9 * channels, seed=3)
    return gamma.to(dtype), draw(9 * channels, seed=4, dtype=dtype)


@case
def test_token_qkv(shape, width, dtype, layout, options):
    n, c, h, w = shape
    weight_dtype = FP16 if "half" in options else FP32
    x = testing.make_input(shape, dtype, layout=layout)
    x += 3  # a mean as large as the paper's images have
    gamma, beta = norm_weights(c, weight_dtype)
    reduce, qkv = (
        draw(width, 9 * c, seed=5, dtype=weight_dtype),
        draw(3 * width, width, seed=6, dtype=weight_dtype),
    )
    arrays = {"gamma": gamma, "beta": beta, "proj_weight": reduce, "qkv": qkv}
    out = torch.full((n, h * w, 3 * width), torch.nan, dtype=dtype)
    out = run("token_qkv", arrays, x, out, options, inner=width, outer=3 * width)
    args = [x, gamma, beta, reduce, qkv]
    testing.assert_close_to_reference(out, reference.token_qkv, args, tf32="tf32" in options)


@case
def test_token_hidden(shape, width, dtype, layout, options):
    n, c, h, w = shape
    weight_dtype = FP16 if "half" in options else FP32
    x = testing.make_input(shape, dtype, layout=layout)
    a = simt.between_nan(tokens(shape, width, dtype, seed=1))
    gamma, beta = norm_weights(c, weight_dtype)
    hidden = width + 3
    named = {
        "proj_weight": draw(9 * c, width, seed=5, dtype=weight_dtype),
        "proj_bias": draw(9 * c, seed=6, dtype=weight_dtype),
        "gamma": gamma,
        "beta": beta,
        "fc1_weight": draw(hidden, 9 * c, seed=7, dtype=weight_dtype),
        "fc1_bias": draw(hidden, seed=8, dtype=weight_dtype),
    }
    numbers = {"width": width, "hidden": hidden}
    numbers |= {"a_stride_n": a.stride(0), "a_stride_t": a.stride(1)}
    out = torch.full((n, h * w, hidden), torch.nan, dtype=dtype)
    out = run("token_hidden", {"a": a, **named}, x, out, options, **numbers)
    args = [x, a, *named.values()]
    testing.assert_close_to_reference(out, reference.token_hidden, args, tf32="tf32" in options)


@case
def test_token_fold(shape, width, dtype, layout, options):
    n, c, h, w = shape
    weight_dtype = FP16 if "half" in options else FP32
    x = testing.make_input(shape, dtype, layout=layout)
    hidden = width + 8
    a, hid = (tokens(shape, k, dtype, seed=s) for k, s in ((width, 1), (hidden, 2)))
    named = {
        "proj_weight": draw(9 * c, width, seed=5, dtype=weight_dtype),
        "proj_bias": draw(9 * c, seed=6, dtype=weight_dtype),
        "fc2_weight": draw(9 * c, hidden, seed=7, dtype=weight_dtype),
        "fc2_bias": draw(9 * c, seed=8, dtype=weight_dtype),
    }
    mean = "sum" not in options

    def as_map(values: Tensor) -> Tensor:
        return values.view(n, h, w, -1).permute(0, 3, 1, 2)

    out = torch.full((n, h, w, c), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    arrays = {"a": as_map(a), "h": as_map(hid), **named}
    numbers = {"width": width, "hidden": hidden, "mean": mean}
    out = run("token_fold", arrays, x, out, options, **numbers)

    def exact(*args):
        return reference.token_fold(*args, mean=mean)

    args = [x, a, hid, *named.values()]
    testing.assert_close_to_reference(out, exact, args, tf32="tf32" in options)
