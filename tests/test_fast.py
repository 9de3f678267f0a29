"""EFRDNFast in evaluation mode against EFRDN: results, gradients, the plan of backends."""

from __future__ import annotations

import copy

import pytest
import torch

from efrdn_fast import EFRDN, EFRDNFast, accelerate, dispatch, packing, reference
from efrdn_fast.config import ABLATIONS
from tests.fast_networks import as_reference, check, disturb, trained

SIZES = [(1, 3, 3), (3, 3, 17), (1, 15, 15), (1, 33, 47)]


@pytest.fixture(params=["auto", "reference"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_reference(size, backend):
    batch, height, width = size
    net = trained(EFRDNFast, backend=backend)
    check(net, torch.rand(batch, 3, height, width))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_reference_at_full_width(scale):
    net = disturb(EFRDN(scale=scale)).eval()
    for shape in ((1, 3, 16, 15), (3, 3, 5, 4)):
        check(accelerate(net), torch.rand(shape), net)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations(ablation):
    check(trained(EFRDNFast, ablation=ablation), torch.rand(2, 3, 7, 9))


@pytest.mark.parametrize("module", ["imdb", "rfdb"])
def test_modules_of_table_2(module):
    check(trained(EFRDNFast, module=module), torch.rand(2, 3, 7, 9))


@pytest.mark.parametrize(
    "options", [{"fold": "sum"}, {"segments": 7}, {"segment_tokens": 12}, {"channels": 48}], ids=str
)
def test_options(options):
    check(trained(EFRDNFast, **options), torch.rand(1, 3, 6, 9))


@pytest.mark.parametrize("layout", ["nhwc", "cropped"])
def test_layouts_of_the_input(layout):
    x = torch.rand(2, 3, 9, 12)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    x = nhwc if layout == "nhwc" else x[:, :, 1:8, 2:11]
    net = trained(EFRDNFast)
    before = x.clone()
    check(net, x)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert net(x).is_contiguous()


def test_float64_is_exact():
    net = trained(EFRDNFast).double()
    x = torch.rand(1, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), as_reference(net)(x), rtol=0, atol=1e-12)
    assert set(net.plan.values()) == {"reference"}


def test_gradients_in_evaluation():
    plain = trained().double()
    net = accelerate(copy.deepcopy(plain))
    x = torch.rand(1, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(plain(x).sum(), [x, *plain.parameters()])
    found = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    net.requires_grad_(False)
    assert net(x).requires_grad
    assert not net(x.detach()).requires_grad
    assert net.plan is not None  # nothing asks for a gradient: packed


def test_a_part_in_training_mode_stays_so():
    net, x = trained(EFRDNFast), torch.rand(1, 3, 8, 9)
    net.acdm[0].train()
    plain = as_reference(net)
    plain.acdm[0].train()
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-4)
    assert net.plan is None
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_set_by_the_user():
    net, x, calls = trained(EFRDNFast), torch.rand(1, 3, 6, 7), []

    def counted(*args):
        calls.append(args[1:])
        return reference.emha(*args)

    with torch.no_grad():
        before = net(x)
        torch.testing.assert_close(net.set_attention(counted)(x), before, rtol=1e-4, atol=1e-5)
    assert calls == [(8, 11), (8, 11)]


def test_without_data():
    """Meta tensors give the shape, as EFRDN does."""
    net = trained(EFRDNFast).to("meta")
    with torch.no_grad():
        assert net(torch.rand(1, 3, 6, 7, device="meta")).shape == (1, 3, 12, 14)


def test_shows_its_plan():
    net = trained(EFRDNFast, backend="reference", dtype="fp32")
    line = repr(net).splitlines()[1]
    assert "scale=2, channels=16" in line
    assert "backend='reference', dtype='fp32', plan=at the first call" in line
    with torch.no_grad():
        net(torch.rand(1, 3, 4, 4))
    assert f"plan={dict.fromkeys(packing.OPS, 'reference')}" in repr(net)


@pytest.mark.parametrize("training", [False, True])
def test_a_named_backend_serves_every_op(training, monkeypatch):
    """And the reference those that it does not have: nothing else is built or run."""
    used, find = set(), dispatch.implementation
    monkeypatch.setattr(
        dispatch, "implementation", lambda op, backend: used.add(backend) or find(op, backend)
    )
    net = trained(EFRDNFast, backend="reference").train(training)
    with torch.no_grad():
        net(torch.rand(2, 3, 6, 7))
    assert used == {"reference"}


def test_changed_input_shape():
    net = trained(EFRDNFast)
    for shape in ((1, 3, 6, 7), (2, 3, 9, 5), (1, 3, 3, 3), (1, 3, 6, 7)):
        check(net, torch.rand(shape))
