"""EFRDNFast inside DataParallel, DDP, `.half()`, `torch.func`; bytes; overflow of one image."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.autograd import forward_ad
from torch.nn.parallel import DataParallel, DistributedDataParallel, replicate

from efrdn_fast import EFRDN, EFRDNFast, graphs, upscale
from tests.fast_networks import as_reference, trained


def small(**options) -> EFRDNFast:
    net = EFRDNFast(2, channels=16, distilled=5, ablation="no_effb", **options)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    return net.eval()


def step(net: torch.nn.Module, x: torch.Tensor) -> None:
    net(x).square().mean().backward()


def assert_same_state(net: EFRDN, other: EFRDN) -> None:
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)
    for (name, a), b in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def test_data_parallel_without_a_gpu_is_the_network():
    net, x = small(), torch.rand(2, 3, 6, 7)
    with torch.no_grad():
        assert torch.equal(DataParallel(net)(x), net(x))


def test_replicas_of_data_parallel(monkeypatch):
    """`replicate` as on two GPUs, with copies of the weights in the place of broadcasts."""

    def broadcast(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", broadcast)
    net = small(dtype="fp32")
    plain = copy.deepcopy(net).to_reference()
    x = torch.rand(2, 3, 6, 7)
    with torch.no_grad():
        expected = net(x)
        for factor in (1, 2):  # what was packed for earlier replicas does not outlive them
            net.head.weight.mul_(factor)
            for each in replicate(net, [0, 1], detach=True):
                torch.testing.assert_close(each(x), expected if factor == 1 else net(x))
    net.head.weight.data.div_(2)
    for each in (net.train(), plain.train()):
        replicas = replicate(each, [0, 1])
        torch.cat(
            [r(part) for r, part in zip(replicas, x.split(1), strict=True)]
        ).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_distributed_data_parallel(tmp_path):
    """One process; `test_distributed` has two. After a step the packed weights are the new ones."""
    net, x = small().train(), torch.rand(2, 3, 6, 7)
    plain = copy.deepcopy(net).to_reference()
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.eval()
        with torch.no_grad():
            before = wrapped(x)
        net.train()
        step(wrapped, x)
        step(plain, x)
        assert_same_state(plain, net)
        optimizer.step()
        net.eval()
        with torch.no_grad():
            after = wrapped(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, net.to_reference()(x), rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    net, x = small(), torch.rand(1, 3, 9, 10)
    with torch.no_grad():
        exact = copy.deepcopy(net).to_reference().double()(x.double())
        net = net.to(dtype)
        y, plain = net(x.to(dtype)), net.to_reference()(x.to(dtype))
        assert y.dtype == dtype
        error, base = ((each.double() - exact).square().mean().sqrt() for each in (y, plain))
        assert error <= 2 * base
        back = net.float()(x)
    assert back.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_bytes_in_and_out(dtype):
    net = small(dtype=dtype)
    x = torch.randint(0, 256, (2, 3, 9, 10), dtype=torch.uint8)
    y = net(x)
    with torch.no_grad():
        exact = (net(x / 255) * 255).clamp(0, 255)
    assert y.dtype == torch.uint8 and not y.requires_grad
    assert y.shape == (2, 3, 18, 20)
    assert torch.equal(y, exact.round().byte())
    assert y.min() == 0 or y.max() == 255  # the clamp had something to do
    if dtype == "auto":
        picture = upscale(Image.fromarray(x[0].permute(1, 2, 0).numpy()), 2, model=net)
        assert np.array_equal(np.asarray(picture), y[0].permute(1, 2, 0).numpy())


def overflowing() -> tuple[EFRDNFast, torch.Tensor]:
    """A network that overflows float16 for the second of three images; the third holds NaN."""
    net, x = small(dtype="fp16"), torch.rand(3, 3, 8, 9)
    x[1] *= 1e6
    x[2, 0, 0, 0] = torch.nan
    return net, x


@pytest.mark.filterwarnings("ignore:.*slower than fp32")
def test_only_images_that_overflow_are_computed_again():
    net, x = overflowing()
    with torch.no_grad():
        kept = net(x[:1])
        message = "fp16 overflowed; the result was computed in bf16"
        with pytest.warns(UserWarning, match=message) as caught:
            y = net(x)
        assert len([w for w in caught if "overflowed" in str(w.message)]) == 1
        assert torch.equal(y[:1], kept)
        net.dtype = "bf16"
        assert torch.equal(y[1:2], net(x[1:2])) and y[1].isfinite().all()
    assert y[2].isnan().any() and y[:2].isfinite().all()


def test_half_weights_and_autocast_are_checked_too():
    net, x = overflowing()
    net.dtype = "auto"
    warned = pytest.warns(UserWarning, match="fp16 overflowed")
    with torch.no_grad(), torch.autocast("cpu", torch.float16), warned:
        assert net(x[:2]).isfinite().all()


def test_the_result_is_not_looked_at_inside_the_caller_s_capture(monkeypatch):
    net, x = overflowing()
    monkeypatch.setattr(graphs, "capturing", lambda x: True)
    monkeypatch.setattr(EFRDNFast, "_rescued", None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*overflowed")
        assert not net(x)[1].isfinite().all()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_empty_batch_is_that_of_the_plain_network(mode):
    net = trained(EFRDNFast).train(mode == "train")
    plain = net.to_reference()
    for x in (torch.rand(0, 3, 6, 7), torch.rand(0, 3, 6, 7).requires_grad_()):
        assert net(x).shape == plain(x).shape == (0, 3, 12, 14)
    assert net(torch.zeros(0, 3, 6, 7, dtype=torch.uint8)).dtype == torch.uint8


def test_transforms_of_functions():
    """vmap, jvp, grad and Hessian products of `torch.func`, in which the plain forward runs."""
    net, x = trained(EFRDNFast).requires_grad_(False), torch.rand(2, 1, 3, 6, 7)
    plain = as_reference(net).requires_grad_(False)
    tangent = torch.rand_like(x[0])

    def along(net):
        return torch.func.jvp(net, (x[0],), (tangent,))[1]

    def gradient(net):
        return torch.func.grad(lambda x: net(x).square().sum())(x[0])

    def product(net):
        return torch.func.jvp(lambda x: gradient_at(net, x), (x[0],), (tangent,))[1]

    def gradient_at(net, x):
        return torch.func.grad(lambda x: net(x).square().sum())(x)

    def mapped(net):
        return torch.func.vmap(net)(x)

    for transform in (along, gradient, product, mapped):
        torch.testing.assert_close(transform(net), transform(plain))
    expected = along(plain)
    with forward_ad.dual_level():
        y = net(forward_ad.make_dual(x[0], tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)
