"""CUDA kernels of the transformer block, run on the CPU (tests/simt), against float64 PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
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
FAR_FROM_ZERO = [
    pytest.param((1, 16, 4, 5), 20, FP32, "channels_last", "offset", id="4x5-C16-offset"),
    pytest.param((1, 16, 4, 5), 20, FP32, "channels_last", "peak", id="4x5-C16-peak"),
    pytest.param((1, 16, 4, 5), 20, FP16, "channels_last", "offset", id="4x5-C16-fp16-offset"),
    pytest.param((1, 16, 4, 5), 20, FP16, "channels_last", "peak", id="4x5-C16-fp16-peak"),
]
NAMES = ("shape", "width", "dtype", "layout", "options")
case = pytest.mark.parametrize(NAMES, CASES)
norm_case = pytest.mark.parametrize(NAMES, [*CASES, *FAR_FROM_ZERO])


def draw(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    """Normal values; matrices scaled so that their products with unit inputs stay near 1."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).to(dtype)


def tokens(shape, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    n, _, h, w = shape
    return draw(n, h * w, width, seed=seed, dtype=dtype)


def image(shape, dtype: torch.dtype, layout: str, options: str, mean: float = 3) -> Tensor:
    """A map with a mean as large as the paper's images have, or far from zero in all or a pixel."""
    x = testing.make_input(shape, dtype, layout=layout)
    x += 1e3 if "offset" in options else mean
    if "peak" in options:
        x[:, :, shape[2] // 2, shape[3] // 2] += 1e3
    return x


def launch(
    op: str, arrays: dict, x: Tensor, outs: dict[str, Tensor], options: str, **numbers: int
) -> dict[str, Tensor]:
    """`outs` as the kernels left them, the same in two orders of the threads."""
    n, c, h, w = x.shape
    numbers |= {"N": n, "C": c, "H": h, "W": w, "tf32": "tf32" in options}
    arrays = {"x": x, **arrays, **outs}
    first, second = (simt.run(op, arrays, numbers, order) for order in ("forward", "5"))
    for name in outs:
        assert torch.equal(first[name], second[name]), name
    return {name: first[name] for name in outs}


def run(op: str, arrays: dict, x: Tensor, out: Tensor, options: str, **numbers: int) -> Tensor:
    return launch(op, arrays, x, {"out": out}, options, **numbers)["out"]


def assert_gradients(
    op: str,
    arrays: dict,
    args: dict[str, Tensor],
    options: str,
    exact: Callable,
    grad: Tensor,
    **numbers: int,
) -> None:
    """Launch a backward op; compare the gradients of all `args`, the first being the map x."""
    outs = {f"grad_{name}": poison(value) for name, value in args.items()}
    x = args["x"]
    grads = launch(op, arrays, x if grad.dim() == 3 else grad, outs, options, **numbers)
    expected = testing.gradients(exact, grad)
    values = [value.contiguous() for value in args.values()]
    testing.assert_close_to_reference(
        tuple(grads.values()), expected, values, dtype=x.dtype, tf32="tf32" in options
    )


def poison(value: Tensor) -> Tensor:
    """NaN of the shape of a weight, of contiguous tokens or of a map in NHWC memory."""
    out = torch.full(value.shape, torch.nan, dtype=value.dtype)
    return out.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else out


def norm_weights(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gamma = 1 + 0.2 * draw(9 * channels, seed=3)
    return gamma.to(dtype), draw(9 * channels, seed=4, dtype=dtype)


def qkv_weights(c: int, inner: int, outer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gamma, beta = norm_weights(c, dtype)
    reduce = draw(inner, 9 * c, seed=5, dtype=dtype)
    return {
        "gamma": gamma,
        "beta": beta,
        "reduce": reduce,
        "qkv": draw(outer, inner, seed=6, dtype=dtype),
    }


def as_arrays(qkv: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the runner: the matrix on tokens is `proj_weight` in all ops."""
    return {"proj_weight" if name == "reduce" else name: value for name, value in qkv.items()}


def hidden_weights(c: int, width: int, hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gamma, beta = norm_weights(c, dtype)
    return {
        "proj_weight": draw(9 * c, width, seed=5, dtype=dtype),
        "proj_bias": draw(9 * c, seed=6, dtype=dtype),
        "gamma": gamma,
        "beta": beta,
        "fc1_weight": draw(hidden, 9 * c, seed=7, dtype=dtype),
        "fc1_bias": draw(hidden, seed=8, dtype=dtype),
    }


def fold_weights(c: int, width: int, hidden: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "proj_weight": draw(9 * c, width, seed=5, dtype=dtype),
        "proj_bias": draw(9 * c, seed=6, dtype=dtype),
        "fc2_weight": draw(9 * c, hidden, seed=7, dtype=dtype),
        "fc2_bias": draw(9 * c, seed=8, dtype=dtype),
    }


@norm_case
def test_token_qkv(shape, width, dtype, layout, options):
    n, c, h, w = shape
    weight_dtype = FP16 if "half" in options else FP32
    x = image(shape, dtype, layout, options)
    weights = qkv_weights(c, width, 3 * width, weight_dtype)
    out = torch.full((n, h * w, 3 * width), torch.nan, dtype=dtype)
    numbers = {"inner": width, "outer": 3 * width}
    out = run("token_qkv", as_arrays(weights), x, out, options, **numbers)
    args = [x, *weights.values()]
    testing.assert_close_to_reference(out, reference.token_qkv, args, tf32="tf32" in options)


@norm_case
def test_token_hidden(shape, width, dtype, layout, options):
    n, c, h, w = shape
    weight_dtype = FP16 if "half" in options else FP32
    x = image(shape, dtype, layout, options, mean=0)
    a = simt.between_nan(tokens(shape, width, dtype, seed=1))
    hidden = width + 3
    named = hidden_weights(c, width, hidden, weight_dtype)
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
    named = fold_weights(c, width, hidden, weight_dtype)
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


BACKWARD_CASES = [
    *CASES,
    pytest.param((1, 3, 2, 3), 170, FP16, "channels_last", "", id="2x3-C3-wide-fp16"),
    pytest.param((1, 33, 2, 17), 5, FP32, "channels_last", "", id="2x17-C33"),
    pytest.param((1, 1, 43, 49), 3, FP32, "channels_last", "", id="43x49-C1-chunks"),
]
backward_case = pytest.mark.parametrize(NAMES, BACKWARD_CASES)
norm_backward_case = pytest.mark.parametrize(NAMES, [*BACKWARD_CASES, *FAR_FROM_ZERO])


@norm_backward_case
def test_token_qkv_backward(shape, width, dtype, layout, options):
    c = shape[1]
    weight_dtype = FP16 if "half" in options else FP32
    x = image(shape, dtype, layout, options)
    outer = 2 * width + 1
    weights = qkv_weights(c, width, outer, weight_dtype)
    grad = tokens(shape, outer, dtype, seed=7)
    args, arrays = {"x": x, **weights}, {"grad": grad, **as_arrays(weights)}
    numbers = {"inner": width, "outer": outer}
    assert_gradients("token_qkv_bwd", arrays, args, options, reference.token_qkv, grad, **numbers)


@norm_backward_case
def test_token_hidden_backward(shape, width, dtype, layout, options):
    c = shape[1]
    weight_dtype = FP16 if "half" in options else FP32
    x = image(shape, dtype, layout, options)
    hidden = width + 3
    weights = hidden_weights(c, width, hidden, weight_dtype)
    args = {"x": x, "a": tokens(shape, width, dtype, seed=1), **weights}
    grad, out = (tokens(shape, hidden, dtype, seed=s) for s in (2, 9))
    out = out.relu()  # whose sign decides, whatever the forward would give

    def exact(x, a, proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias):
        t = reference.unfold(x) + F.linear(a, proj_weight, proj_bias)
        t = F.layer_norm(t, gamma.shape, gamma, beta, 1e-5)
        return F.linear(t, fc1_weight, fc1_bias) * (out > 0)

    arrays = {"a": args["a"], **weights, "grad": grad, "out": out}
    numbers = {"width": width, "hidden": hidden, "a_stride_n": 0, "a_stride_t": 0}
    assert_gradients("token_hidden_bwd", arrays, args, options, exact, grad, **numbers)


@backward_case
def test_token_fold_backward(shape, width, dtype, layout, options):
    c = shape[1]
    weight_dtype = FP16 if "half" in options else FP32
    hidden, mean = width + 8, "sum" not in options
    weights = fold_weights(c, width, hidden, weight_dtype)
    rows = {"a": tokens(shape, width, dtype, seed=1), "h": tokens(shape, hidden, dtype, seed=2)}
    grad = testing.make_input(shape, dtype, layout=layout)
    args = {"x": testing.make_input(shape, dtype, seed=1), **rows, **weights}

    def exact(*args):
        return reference.token_fold(*args, mean=mean)

    arrays = {**rows, **weights}  # the map is the gradient: the op does not need x
    numbers = {"width": width, "hidden": hidden, "mean": mean}
    assert_gradients("token_fold_bwd", arrays, args, options, exact, grad, **numbers)


@pytest.mark.parametrize("op", ["token_qkv", "token_fold"])
def test_token_backward_of_maps_with_64_bit_offsets(op):
    shape, width = (2, 3, 2, 3), 7
    x = testing.make_input(shape, layout="channels_last")
    if op == "token_qkv":
        weights = qkv_weights(3, width, width, FP32)
        arrays = {"grad": tokens(shape, width, FP32, seed=7), **as_arrays(weights)}
        args, numbers = weights, {"inner": width, "outer": width}
    else:
        rows = {name: tokens(shape, width, FP32, seed=1) for name in "ah"}
        args = arrays = {**rows, **fold_weights(3, width, width, FP32)}
        numbers = {"width": width, "hidden": width, "mean": 1}
    outs = {f"grad_{name}": poison(value) for name, value in {"x": x, **args}.items()}
    near = launch(f"{op}_bwd", arrays, x, outs, "", **numbers)
    step = (1 << 31) + 16
    outs["grad_x"] = simt.Sparse(torch.full_like(x, torch.nan), (step, 3 * 3, 3))
    arrays = {**arrays, "x": simt.Sparse(x, (2 * step, step, 3))}
    far = launch(f"{op}_bwd", arrays, x, outs, "", **numbers)
    for name, value in near.items():
        assert torch.equal(far[name], value), name
