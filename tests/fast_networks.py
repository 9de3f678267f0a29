"""Small networks for the tests of EFRDNFast, and what its results are held to."""

from __future__ import annotations

import copy

import torch

from efrdn_fast import EFRDN, EFRDNFast
from efrdn_fast.testing import TOLERANCES, assert_within


def trained(cls: type[EFRDN] = EFRDN, **options) -> EFRDN:
    """A small network in evaluation mode whose running statistics differ between the uses."""
    net = cls(**{"scale": 2, "channels": 16, "distilled": 5, **options})
    return disturb(net).eval()


def disturb(net: EFRDN) -> EFRDN:
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(torch.rand_like(buffer) * 0.8 + (0.4 if "var" in name else -0.4))
        for name, parameter in net.named_parameters():
            if ".bn" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def check(net: EFRDNFast, x: torch.Tensor, source: EFRDN | None = None) -> None:
    """The packed forward of `net` is as near to float64 as the plain one, within twice."""
    plain = as_reference(source or net)
    with torch.no_grad():
        out = net(x)
        exact = copy.deepcopy(plain).double()(x.double())
        assert out.dtype == x.dtype
        assert_within(out, exact, plain(x), TOLERANCES[x.dtype])
    assert net.plan is not None, "the packed forward did not run"


def as_reference(net: EFRDN) -> EFRDN:
    plain = EFRDN(**net.config.to_dict()).to(net.head.weight)
    plain.load_state_dict(net.state_dict())
    return plain.eval()
