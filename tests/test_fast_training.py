"""EFRDNFast in training mode: results, gradients and running statistics of EFRDN."""

import copy

import pytest
import torch

from efrdn_fast import EFRDN, EFRDNFast, reference
from efrdn_fast.config import ABLATIONS


def pair(dtype=torch.float64, *, backend="auto", **options) -> tuple[EFRDN, EFRDNFast]:
    """A network and its fast form, on weights of their own, whose BatchNorms are not neutral."""
    net = EFRDN(**{"scale": 2, "channels": 16, "distilled": 5, **options})
    with torch.no_grad():
        for buffer in net.buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
        for name, parameter in net.named_parameters():
            if ".bn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    net = net.to(dtype).train()
    return net, EFRDNFast.from_reference(copy.deepcopy(net), backend=backend)


def step(net: EFRDN, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of input and parameters, and buffers after one pass."""
    x = x.detach().to(net.head.weight.dtype).requires_grad_()
    y = net(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).mean(), [x, *net.parameters()])
    return [t.detach().double() for t in (y, *grads, *net.buffers())]


def assert_equal(net: EFRDN, fast: EFRDNFast, x: torch.Tensor) -> None:
    """In float64, where both are the same function to rounding."""
    names = ["output", "input", *(n for n, _ in net.named_parameters())]
    names += [n for n, _ in net.named_buffers()]
    for name, a, b in zip(names, step(net, x), step(fast, x), strict=True):
        scale = a.abs().max().item()
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9 * scale + 1e-15, msg=name)


@pytest.mark.parametrize("size", [(2, 3, 16, 19), (1, 3, 3, 3), (3, 3, 5, 4)], ids=str)
def test_equals_reference(size):
    assert_equal(*pair(), torch.rand(size))


def test_equals_reference_at_full_width():
    assert_equal(*pair(channels=32, distilled=9), torch.rand(2, 3, 12, 9))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations(ablation):
    assert_equal(*pair(ablation=ablation), torch.rand(2, 3, 7, 9))


@pytest.mark.parametrize(
    "options", [{"module": "imdb"}, {"fold": "sum"}, {"segment_tokens": 12}], ids=str
)
def test_options(options):
    assert_equal(*pair(**options), torch.rand(2, 3, 6, 9))


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Relative RMS of all together."""
    total = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (total / sum(b.square().sum() for b in exact)).sqrt().item()


@pytest.mark.parametrize("size", [(2, 3, 24, 20), (1, 3, 33, 31)], ids=str)
def test_float32_is_as_near_to_float64_as_the_reference(size):
    """Single gradients differ where a ReLU or a maximum flips, as they do in the reference."""
    net, fast = pair(torch.float32, channels=32, distilled=9)
    exact = copy.deepcopy(net).double()
    x = torch.rand(size)
    truth, plain, found = step(exact, x), step(net, x), step(fast, x)
    count = len(list(net.buffers()))
    parts = [slice(0, 1), slice(1, -count), slice(-count, None)]
    for part, tolerance in zip(parts, (1e-6, 2e-3, 1e-6), strict=True):
        allowed = 2 * error(plain[part], truth[part]) + tolerance
        assert error(found[part], truth[part]) <= allowed, part


def test_autocast_trains():
    net, fast = pair(torch.float32, channels=32, distilled=9)
    x = torch.rand(2, 3, 12, 16)
    exact = step(copy.deepcopy(net).double(), x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = step(net, x), step(fast, x)
    assert error(found[:1], exact[:1]) <= 2 * error(plain[:1], exact[:1]) + 1e-2
    assert error(found[1:], exact[1:]) <= 2 * error(plain[1:], exact[1:]) + 1e-2


def test_learns_as_the_reference_does():
    """Loss over steps; a wrong gradient or statistic would set the curves apart."""
    lr = torch.rand(2, 3, 10, 10, dtype=torch.float64)
    hr = torch.nn.functional.interpolate(lr, scale_factor=2, mode="bicubic")
    curves = []
    for net in pair():
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            loss = (net(lr) - hr).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_without_gradients_it_updates_statistics():
    net, fast = pair()
    x = torch.rand(1, 3, 8, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    for a, b in zip(net.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_set_by_the_user():
    _, fast = pair()
    calls = []

    def counted(*args):
        calls.append(args[1:])
        return reference.emha(*args)

    fast.set_attention(counted)(torch.rand(1, 3, 6, 7, dtype=torch.float64))
    assert calls == [(8, 11), (8, 11)]
