"""Half precision of EFRDNFast: noise, overflow, NaN, and the warning where it is slow."""

from __future__ import annotations

import warnings

import pytest
import torch

from efrdn_fast import EFRDNFast, accelerate, fast
from efrdn_fast.upscaler import Upscaler
from tests.fast_networks import as_reference, trained


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a.double() - b.double()).square().mean().log10()).item()


@pytest.mark.parametrize(("dtype", "least_db"), [("bf16", 45), ("fp16", 60)])
def test_half_precision(dtype, least_db):
    """Noise relative to a peak of 1; input, tails and output stay float32."""
    net, x = trained(EFRDNFast, dtype=dtype), torch.rand(1, 3, 15, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*slower than fp32")
        y = net(x)
        exact = as_reference(net).double()(x.double())
    assert y.dtype == torch.float32
    assert len(y.unique()) > y.numel() // 2  # not rounded to half precision
    assert decibels(y, exact) > least_db


def test_autocast_is_half_precision():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        named = accelerate(net, dtype="bf16")(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, named)


def test_half_precision_of_unpacked_parts():
    net, x = trained(EFRDNFast, module="imdb", dtype="bf16"), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        assert decibels(net(x), as_reference(net)(x)) > 45


def test_overflow_falls_back_and_warns_once():
    net, x = trained(EFRDNFast, dtype="fp16"), torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        net.head.weight.mul_(1e6)  # beyond float16
    message = "fp16 overflowed; the result was computed in bf16"
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        y = net(x)
    assert y.isfinite().all()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(net(x), y)


@pytest.mark.filterwarnings("ignore:.*slower than fp32")
def test_upscale_tells_of_every_image_that_overflows():
    net = trained(EFRDNFast)
    with torch.no_grad():
        net.head.weight.mul_(1e6)
    upscaler = Upscaler(2, net, dtype="fp16")
    for _ in range(2):
        with pytest.warns(UserWarning, match="fp16 overflowed on this image; .* in bf16"):
            upscaler.tensor(torch.rand(3, 8, 9))
        assert upscaler.outcome.dtype == "bf16"


def test_nan_in_gives_nan_out_without_a_warning():
    x = torch.rand(1, 3, 8, 9)
    x[0, 1, 2, 3] = torch.nan
    for dtype in ("auto", "bf16"):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            assert trained(EFRDNFast, dtype=dtype)(x).isnan().any()


def test_warns_of_slow_half_precision_once(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(fast, "_slow", set())
    net, x = trained(EFRDNFast, dtype="bf16"), torch.rand(1, 3, 4, 4)
    with torch.no_grad(), pytest.warns(UserWarning, match="bf16 slower than fp32") as caught:
        net(x)
        net(x)
    assert len(caught) == 1
