"""CUDA kernels executed on the CPU (tests/simt), memory guarded, against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from efrdn_fast import reference, testing
from tests.simt import harness as simt


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    simt.require()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights whose products with unit inputs stay near 1."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values / max(1, values[0].numel()) ** 0.5).to(dtype)


def gcrb_params(
    channels: int, mid: int, groups: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    shapes = [
        (mid, channels // groups, 1, 1),
        (mid,),
        (mid, 1, 3, 3),
        (mid,),
        (channels, mid // groups, 1, 1),
        (channels,),
    ]
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


NAMES = ("w1", "b1", "w2", "b2", "w3", "b3")


def nhwc(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of a result: NaN."""
    return torch.full((n, h, w, c), torch.nan, dtype=dtype).permute(0, 3, 1, 2)


def nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def run_gcrb(x: Tensor, params: list[Tensor], groups: int, order: str = "forward") -> Tensor:
    n, c, h, w = x.shape
    arrays = {"x": x, "y": nhwc(n, c, h, w, x.dtype), **dict(zip(NAMES, params, strict=True))}
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": params[0].shape[0], "groups": groups}
    return simt.run("gcrb_fwd", arrays, numbers, order)["y"]


GCRB_CASES = [
    # shape, mid, groups, dtype, layout
    pytest.param((1, 32, 1, 1), 8, 2, torch.float32, "channels_last", id="1x1"),
    pytest.param((1, 32, 1, 5), 8, 2, torch.float16, "channels_last", id="1x5-fp16"),
    pytest.param((2, 32, 5, 7), 8, 2, torch.float32, "sliced", id="N2-5x7-sliced"),
    pytest.param((2, 32, 17, 19), 8, 2, torch.float16, "channels_last", id="N2-17x19-fp16"),
    pytest.param((1, 32, 17, 19), 8, 2, torch.bfloat16, "sliced", id="17x19-bf16-sliced"),
    pytest.param((1, 32, 13, 33), 8, 1, torch.float32, "channels_last", id="13x33-G1"),
    pytest.param((1, 32, 13, 17), 8, 1, torch.float16, "channels_last", id="13x17-G1-fp16"),
    pytest.param((1, 32, 13, 17), 8, 4, torch.bfloat16, "channels_last", id="13x17-G4-bf16"),
    pytest.param((1, 32, 13, 17), 8, 8, torch.float16, "channels_last", id="13x17-G8-fp16"),
    pytest.param((1, 32, 13, 17), 8, 8, torch.float32, "channels_last", id="13x17-G8"),
    pytest.param((1, 50, 5, 19), 12, 2, torch.float32, "channels_last", id="5x19-C50-M12"),
    pytest.param((1, 18, 13, 7), 6, 3, torch.float16, "sliced", id="13x7-C18-M6-G3-fp16"),
    pytest.param((1, 64, 3, 17), 16, 16, torch.bfloat16, "channels_last", id="3x17-C64-G16-bf16"),
]


@pytest.mark.parametrize(("shape", "mid", "groups", "dtype", "layout"), GCRB_CASES)
def test_gcrb_forward(shape, mid, groups, dtype, layout):
    x = testing.make_input(shape, dtype, layout=layout)
    params = gcrb_params(shape[1], mid, groups)
    y = run_gcrb(x, params, groups)

    def exact(x, *params):
        return reference.gcrb(x, *params, groups=groups)

    testing.assert_close_to_reference(y, exact, [x, *params])


@pytest.mark.parametrize(("shape", "mid", "groups", "dtype", "layout"), GCRB_CASES)
def test_gcrb_backward(shape, mid, groups, dtype, layout):
    n, c, h, w = shape
    x = testing.make_input(shape, dtype, layout=layout)
    grad_y = testing.make_input(shape, dtype, layout="channels_last", seed=1)
    params = gcrb_params(c, mid, groups)
    arrays = {"x": x, "grad_y": grad_y, **dict(zip(NAMES, params, strict=True))}
    arrays["grad_x"] = nhwc(n, c, h, w, dtype)
    arrays |= {f"grad_{name}": nan_like(p) for name, p in zip(NAMES, params, strict=True)}
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": mid, "groups": groups}
    results = [simt.run("gcrb_bwd", arrays, numbers, order) for order in ("forward", "5")]
    out, again = ([r[f"grad_{name}"] for name in ("x", *NAMES)] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))

    def forward(x, *params):
        return reference.gcrb(x, *params, groups=groups)

    exact = testing.gradients(forward, grad_y)
    testing.assert_close_to_reference(out, exact, [x, *params])


def run_gcrb_chain(x, params, groups: int, order: str = "forward", given=None) -> list[Tensor]:
    """`given`: the same `x` laid out otherwise."""
    n, c, h, w = x.shape
    arrays = {f"y{k}": nhwc(n, c, h, w, x.dtype) for k in range(3)}
    arrays["x"] = x if given is None else given
    names = [f"{name}_{k}" for k in range(3) for name in NAMES]
    arrays |= dict(zip(names, params, strict=True))
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": params[0].shape[0], "groups": groups}
    out = simt.run("gcrb_chain_fwd", arrays, numbers, order)
    return [out[f"y{k}"] for k in range(3)]


CHAIN_CASES = [
    *GCRB_CASES,
    pytest.param((1, 32, 1, 53), 8, 2, torch.float16, "channels_last", id="1x53-fp16"),
    pytest.param((2, 32, 21, 27), 8, 2, torch.float32, "channels_last", id="N2-21x27"),
    pytest.param((1, 32, 11, 29), 8, 1, torch.bfloat16, "channels_last", id="11x29-G1-bf16"),
]


@pytest.mark.parametrize(("shape", "mid", "groups", "dtype", "layout"), CHAIN_CASES)
def test_gcrb_chain_forward(shape, mid, groups, dtype, layout):
    x = testing.make_input(shape, dtype, layout=layout)
    params = [p * (1 + 0.1 * k) for k in range(3) for p in gcrb_params(shape[1], mid, groups)]
    ys = run_gcrb_chain(x, params, groups)

    def exact(x, *params):
        return reference.gcrb_chain(x, params, groups=groups)

    testing.assert_close_to_reference(ys, exact, [x, *params])
    again = run_gcrb_chain(x, params, groups, "5")
    g = x
    for k, y in enumerate(ys):
        g = run_gcrb(g, params[6 * k : 6 * k + 6], groups)
        assert torch.equal(y, g), f"result {k} is not that of one launch after the other"
        assert torch.equal(y, again[k])


BATCH_NAMES = ("w1", "gamma1", "b1", "w2", "gamma2", "b2", "w3", "gamma3", "b3")


def gcrb_batch_params(channels: int, mid: int, groups: int) -> list[Tensor]:
    """w1, gamma1, beta1, w2, .. of GCRB in training."""
    w1, b1, w2, b2, w3, b3 = gcrb_params(channels, mid, groups)
    gammas = [1 + 0.2 * draw(size, seed=7) for size in (mid, mid, channels)]
    return [w1, gammas[0], b1, w2, gammas[1], b2, w3, gammas[2], b3]


def shifted_input(shape, dtype: torch.dtype, layout: str) -> Tensor:
    """Channels with a mean of their own, as large as 20 standard deviations."""
    x = testing.make_input(shape, dtype, layout=layout)
    return x.add_(torch.linspace(-2, 20, shape[1]).to(dtype).view(1, -1, 1, 1))


GCRB_TRAIN_CASES = [
    pytest.param((1, 32, 1, 37), 8, 2, torch.float32, "channels_last", id="1x37"),
    pytest.param((2, 32, 17, 19), 8, 2, torch.float32, "sliced", id="N2-17x19-sliced"),
    pytest.param((2, 32, 13, 17), 8, 2, torch.float16, "channels_last", id="N2-13x17-fp16"),
    pytest.param((2, 32, 5, 33), 8, 1, torch.float32, "channels_last", id="N2-5x33-G1"),
    pytest.param((1, 32, 13, 17), 8, 4, torch.bfloat16, "channels_last", id="13x17-G4-bf16"),
    pytest.param((1, 32, 13, 17), 8, 8, torch.float32, "channels_last", id="13x17-G8"),
    pytest.param((2, 18, 13, 7), 6, 3, torch.float32, "sliced", id="N2-13x7-C18-M6-G3"),
    pytest.param((6, 32, 94, 97), 8, 8, torch.float32, "channels_last", id="N6-94x97-G8"),
]


def run_gcrb_train(x, params, groups: int, order: str = "forward") -> list[Tensor]:
    n, c, h, w = x.shape
    m = params[0].shape[0]
    arrays = {"x": x, "y": nhwc(n, c, h, w, x.dtype), **dict(zip(BATCH_NAMES, params, strict=True))}
    arrays |= {"mean": torch.full((2 * m + c,), torch.nan)}
    arrays |= {"var": torch.full((2 * m + c,), torch.nan)}
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": m, "groups": groups}
    out = simt.run("gcrb_train", arrays, numbers, order)
    return [out[name] for name in ("y", "mean", "var")]


FIVE_PIXELS = pytest.param((1, 32, 1, 5), 8, 2, torch.float32, "channels_last", id="1x5")


@pytest.mark.parametrize(
    ("shape", "mid", "groups", "dtype", "layout"), [FIVE_PIXELS, *GCRB_TRAIN_CASES]
)
def test_gcrb_train_forward(shape, mid, groups, dtype, layout):
    x = shifted_input(shape, dtype, layout)
    params = gcrb_batch_params(shape[1], mid, groups)
    out = run_gcrb_train(x, params, groups)

    def exact(x, *params):
        return reference.gcrb_train(x, *params, groups=groups)

    testing.assert_close_to_reference(out, exact, [x, *params])


def test_gcrb_train_forward_is_the_same_in_every_order():
    x = shifted_input((2, 32, 13, 17), torch.float32, "channels_last")
    params = gcrb_batch_params(32, 8, 2)
    first, second = (run_gcrb_train(x, params, 2, order) for order in ("forward", "5"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("shape", "mid", "groups", "dtype", "layout"), GCRB_TRAIN_CASES)
def test_gcrb_train_backward(shape, mid, groups, dtype, layout):
    n, c, h, w = shape
    x = testing.make_input(shape, dtype, layout=layout)
    grad_y = testing.make_input(shape, dtype, layout="channels_last", seed=1)
    params = gcrb_batch_params(c, mid, groups)

    def forward(x, *params):
        return reference.gcrb_train(x, *params, groups=groups)

    _, mean, var = forward(x.double(), *(p.double() for p in params))
    arrays = {"x": x, "grad_y": grad_y, **dict(zip(BATCH_NAMES, params, strict=True))}
    arrays |= {"mean": mean.float(), "var": var.float(), "grad_x": nhwc(n, c, h, w, dtype)}
    arrays |= {f"grad_{name}": nan_like(p) for name, p in zip(BATCH_NAMES, params, strict=True)}
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": mid, "groups": groups}
    out = simt.run("gcrb_train_bwd", arrays, numbers)
    grads = [out[f"grad_{name}"] for name in ("x", *BATCH_NAMES)]
    if n * h * w < 1000:
        again = simt.run("gcrb_train_bwd", arrays, numbers, "5")
        names = [f"grad_{name}" for name in ("x", *BATCH_NAMES)]
        assert all(torch.equal(out[name], again[name]) for name in names)
    testing.assert_close_to_reference(grads, testing.gradients(forward, grad_y), [x, *params])


def test_gcrb_forward_half_weights():
    x = testing.make_input((1, 32, 5, 7), torch.float16, layout="channels_last")
    params = gcrb_params(32, 8, 2, torch.float16)
    y = run_gcrb(x, params, 2)
    testing.assert_close_to_reference(y, lambda *a: reference.gcrb(*a, groups=2), [x, *params])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gcrb_forward_is_the_same_in_every_order(dtype):
    x = testing.make_input((1, 32, 13, 17), dtype, layout="channels_last")
    results = [
        run_gcrb(x, gcrb_params(32, 8, 2), 2, order) for order in ("forward", "reverse", "3")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gcrb_forward_beyond_32_bits(dtype):
    """Images, rows and pixels that lie more than 2^31 elements apart."""
    x = testing.make_input((2, 32, 2, 3), dtype)
    params = gcrb_params(32, 8, 2)
    near = run_gcrb(x.contiguous(memory_format=torch.channels_last), params, 2)
    n, c, h, w = x.shape
    step = (1 << 31) + 16
    arrays = {
        "x": simt.Sparse(x, (h * step, step, 32)),
        "y": simt.Sparse(torch.full_like(x, torch.nan), (step, 3 * 32, 32)),
    }
    numbers = {"N": n, "C": c, "H": h, "W": w, "M": 8, "groups": 2}
    arrays |= dict(zip(NAMES, params, strict=True))
    assert torch.equal(simt.run("gcrb_fwd", arrays, numbers)["y"], near)


def test_gcrb_chain_beyond_32_bits():
    x = testing.make_input((2, 32, 2, 3), layout="channels_last")
    params = [p for _ in range(3) for p in gcrb_params(32, 8, 2)]
    near = run_gcrb_chain(x, params, 2)
    far = simt.Sparse(x, (((1 << 31) + 16) * 2, (1 << 31) + 16, 32))
    assert all(map(torch.equal, run_gcrb_chain(x, params, 2, given=far), near))


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(1, 6, torch.float32), (256, 40, torch.float16), (300, 33, torch.float32)],
)
def test_reduce_rows(rows, columns, dtype):
    """Column sums into two targets; more than 256 rows take two launches."""
    values = torch.randn(rows, columns)
    arrays = {
        "rows": values,
        "first": torch.full((columns - 5,), torch.nan, dtype=dtype),
        "second": torch.full((5,), torch.nan, dtype=dtype),
    }
    out = simt.run("reduce_rows", arrays, {"rows": rows, "columns": columns})
    got = torch.cat((out["first"], out["second"]))
    testing.assert_close_to_reference(got, lambda v: v.sum(0), [values], dtype=dtype)


def acrb_slice(shape, width: int, start: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels `start` .. of an NHWC map of `width` channels that is NaN elsewhere."""
    n, d, h, w = shape
    whole = nhwc(n, width, h, w, dtype)
    return whole.narrow(1, start, d).copy_(testing.make_input(shape, dtype, seed=seed))


ACRB_CASES = [
    # shape of the slice, channels of x, start, channels of the result, its start, dtype
    pytest.param((1, 9, 1, 1), 32, 23, 59, 0, torch.float32, id="1x1"),
    pytest.param((1, 9, 1, 5), 32, 23, 59, 9, torch.float16, id="1x5-fp16"),
    pytest.param((2, 9, 5, 7), 32, 0, 9, 0, torch.bfloat16, id="N2-5x7-bf16"),
    pytest.param((2, 9, 9, 37), 32, 23, 59, 18, torch.float32, id="N2-9x37"),
    pytest.param((1, 1, 3, 3), 4, 2, 2, 1, torch.float32, id="3x3-d1"),
    pytest.param((1, 20, 9, 7), 20, 0, 23, 3, torch.float16, id="9x7-d20-fp16"),
]


def run_acrb(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, order: str = "forward") -> Tensor:
    n, d, h, w = x.shape
    arrays = {"x": x, "y": y, "weight": weight, "bias": bias}
    return simt.run("acrb_fwd", arrays, {"N": n, "H": h, "W": w, "d": d}, order)["y"]


@pytest.mark.parametrize(("shape", "width", "start", "out_width", "out_start", "dtype"), ACRB_CASES)
def test_acrb_forward(shape, width, start, out_width, out_start, dtype):
    n, d, h, w = shape
    x = acrb_slice(shape, width, start, dtype)
    weight, bias = draw(d, d, 3, 3), draw(d, seed=1)
    out = torch.full((n, h, w, out_width), 7.0, dtype=dtype).permute(0, 3, 1, 2)
    out.narrow(1, out_start, d).fill_(torch.nan)
    y = run_acrb(x, weight, bias, out.narrow(1, out_start, d))
    testing.assert_close_to_reference(y, reference.acrb, [x, weight, bias])
    whole = torch.empty(0, dtype=dtype).set_(y.untyped_storage()).view(n, h, w, out_width)
    others = [c for c in range(out_width) if not out_start <= c < out_start + d]
    assert (whole[..., others] == 7).all()


@pytest.mark.parametrize(("shape", "width", "start", "out_width", "out_start", "dtype"), ACRB_CASES)
def test_acrb_backward(shape, width, start, out_width, out_start, dtype):
    n, d, h, w = shape
    x = acrb_slice(shape, width, start, dtype)
    grad_y = acrb_slice(shape, out_width, out_start, dtype, seed=1)
    weight, bias = draw(d, d, 3, 3), draw(d, seed=1)
    grad_x = nhwc(n, width, h, w, dtype)
    arrays = {"x": x, "grad_y": grad_y, "weight": weight, "bias": bias}
    arrays["grad_x"] = grad_x.narrow(1, start, d)
    arrays |= {"grad_weight": nan_like(weight), "grad_bias": nan_like(bias)}
    numbers = {"N": n, "H": h, "W": w, "d": d, "before": start, "after": width - start - d}
    results = [simt.run("acrb_bwd", arrays, numbers, order) for order in ("forward", "5")]
    names = ("grad_x", "grad_weight", "grad_bias")
    assert all(torch.equal(results[0][name], results[1][name]) for name in names)
    out = [results[0][name] for name in names]
    storage = torch.empty(0, dtype=dtype).set_(out[0].untyped_storage())
    whole = storage.view(n, h, w, width).permute(0, 3, 1, 2)
    assert (whole[:, :start] == 0).all()
    assert (whole[:, start + d :] == 0).all()
    exact = testing.gradients(reference.acrb, grad_y)
    testing.assert_close_to_reference(out, exact, [x, weight, bias])


def conv_source(channels: int, size: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """NHWC; odd channel counts are slices of a wider map that is NaN elsewhere."""
    n, h, w = size
    layout = "sliced" if channels % 8 else "channels_last"
    return testing.make_input((n, channels, h, w), dtype, layout=layout, seed=seed)


CONV_CASES = [
    # N H W, channels of the sources, Cout, groups, dtype, options
    pytest.param((1, 1, 1), [32], 32, 1, torch.float32, "", id="1x1"),
    pytest.param((1, 1, 5), [32], 32, 1, torch.float16, "bias relu", id="1x5-fp16"),
    pytest.param((2, 17, 19), [32], 32, 1, torch.bfloat16, "bias residual", id="N2-17x19-bf16"),
    pytest.param((1, 17, 5), [23], 32, 1, torch.float32, "bias", id="17x5-C23"),
    pytest.param((1, 5, 18), [9, 9, 9, 32], 32, 1, torch.float16, "bias", id="5x18-C59-fp16"),
    pytest.param((1, 5, 18), [9, 9, 9, 32], 32, 1, torch.float32, "residual", id="5x18-C59"),
    pytest.param((1, 5, 7), [32, 32], 32, 8, torch.float16, "interleaved", id="5x7-G8-C64-fp16"),
    pytest.param((1, 5, 7), [16, 16], 32, 8, torch.float32, "interleaved residual", id="5x7-G8"),
    pytest.param((1, 9, 7), [16], 16, 1, torch.bfloat16, "relu", id="9x7-C16-bf16"),
    pytest.param((1, 5, 7), [32], 48, 1, torch.float16, "bias", id="5x7-Cout48-fp16"),
    pytest.param((1, 5, 7), [3], 32, 1, torch.float32, "bias tf32", id="5x7-C3-tf32"),
    pytest.param((1, 5, 7), [30], 27, 3, torch.float32, "bias tf32", id="5x7-G3-Cout27-tf32"),
]


@pytest.mark.parametrize(("size", "channels", "cout", "groups", "dtype", "options"), CONV_CASES)
def test_conv3x3_forward(size, channels, cout, groups, dtype, options):
    xs = [conv_source(c, size, dtype, seed=i) for i, c in enumerate(channels)]
    weight = draw(cout, sum(channels) // groups, 3, 3)
    bias = draw(cout, seed=1) if "bias" in options else None
    residual = conv_source(cout, size, dtype, seed=9) if "residual" in options else None
    flags = {name: name in options for name in ("relu", "interleaved")}
    n, h, w = size
    arrays = {f"x{i}": x for i, x in enumerate(xs)}
    arrays |= {"weight": weight, "y": nhwc(n, cout, h, w, dtype)}
    arrays |= {k: v for k, v in (("bias", bias), ("residual", residual)) if v is not None}
    numbers = {"N": n, "H": h, "W": w, "Cout": cout, "groups": groups, **flags}
    numbers["tf32"] = "tf32" in options
    y = simt.run("conv3x3_fwd", arrays, numbers)["y"]
    again = simt.run("conv3x3_fwd", arrays, numbers, "5")["y"]
    assert torch.equal(y, again)

    def exact(xs, weight, bias, residual):
        return reference.conv3x3(xs, weight, bias, residual=residual, groups=groups, **flags)

    args = [xs, weight, bias, residual]
    testing.assert_close_to_reference(y, exact, args, dtype=dtype, tf32="tf32" in options)
