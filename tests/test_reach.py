"""Receptive field as computed against what a changed pixel really changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efrdn_fast import EFRDN
from efrdn_fast.blocks import ACRB, CC, EFFB, ESA, GCRB, SCSA, ChannelAttention, GConv, Reconstruct
from efrdn_fast.reach import esa_radius, radius, reach

C = 16


class Constant(nn.Module):
    """A global part held constant."""

    def forward(self, x):
        return 0.5 * x


def local(module):
    """`module` in float64 with its global parts held constant."""
    for name, child in list(module.named_modules()):
        if isinstance(child, (CC, ChannelAttention)):
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Constant())
    return module.double().eval()


def furthest(module, size, positions):
    """How far a change at any of `positions` along the height reaches, in output rows."""
    x = torch.rand(1, C, size, 17, dtype=torch.float64)
    with torch.inference_mode():
        base, far = module(x), 0
        scale = base.shape[2] // size
        for y in positions:
            changed = x.clone()
            changed[:, :, y] += 10
            rows = (module(changed) - base).abs().amax(dim=(0, 1, 3)).nonzero().flatten() // scale
            far = max(far, int((rows - y).abs().max()))
    return far


@pytest.mark.parametrize(
    "make",
    [GCRB, ACRB, GConv, SCSA, EFFB, lambda c: Reconstruct(c, 2, deep=True), nn.Identity],
    ids=["GCRB", "ACRB", "GConv", "SCSA", "EFFB", "tail", "identity"],
)
def test_local_blocks(make):
    block = local(make(C))
    expected = 1 if isinstance(block, ACRB) else radius(block, 40)  # ACRB: side by side
    assert furthest(block, 40, [20]) == expected


@pytest.mark.parametrize("size", [17, 18, 30, 61, 100])
def test_esa(size):
    """Max pooling may hide a change, so all parameters are positive and all rows are tried."""
    block = local(ESA(C))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.abs_()
    seen = furthest(block, size, range(size))
    assert esa_radius(size) - 2 <= seen <= esa_radius(size)


def test_the_whole_network():
    net = EFRDN(4)
    found = reach(net, 180, 320)
    assert found.radius > 320  # more than the image: no halo helps
    assert found.global_parts == {
        "mean and deviation (CC)": 48,
        "mean (SCCA)": 16,
        "attention segment": 2,
        "grid of cells stretched over the image (ESA)": 24,
    }
    bare = reach(EFRDN(4, ablation="no_fflb"), 180, 320)
    # head 1, tail 2; a step: three 3x3, conv4, fuse, MSCC 4 + 2, G_conv 1; transformers 2 + 1 each
    assert bare.radius == 3 + 4 * (3 + 2 + 6 + 1) + 2 * 3
    assert bare.global_parts == {"mean (SCCA)": 4, "attention segment": 2}


def test_other_networks_have_no_rule():
    with pytest.raises(ValueError, match="module='acdm'"):
        reach(EFRDN(2, module="imdb"), 9, 9)
