"""How far a pixel of the output sees: the receptive field of EFRDN's local parts, its global parts.

Read from the modules of a network and the size of an image. A halo of `Reach.radius` would make
tiles exact only if there were no global parts, see `efrdn_fast.exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .blocks import ACDM, CC, EFFB, ESA, FFLB, MSCC, ChannelAttention, SelfCalibrated
from .model import EFRDN
from .transformer import EMHA, TransformerBlock

__all__ = ["Reach", "esa_radius", "radius", "reach"]


@dataclass(frozen=True)
class Reach:
    """What an output pixel depends on."""

    radius: int
    """LR pixels that the local parts see each way, at most."""
    global_parts: dict[str, int]
    """Kind of part -> how many of them a pass through the network runs over the whole image."""


def reach(net: EFRDN, height: int, width: int) -> Reach:
    """Receptive field of `net` for an image of `height` x `width`.

    Raises:
        ValueError: A network without a rule here.
    """
    if not isinstance(net, EFRDN) or net.config.module != "acdm":
        raise ValueError(f"reach: needs EFRDN with module='acdm', got {type(net).__name__}")
    size = max(height, width)
    steps = [net.acdm[i % len(net.acdm)] for i in range(len(net.gconv))]
    total = _kernel(net.head) + _kernel(net.reconstruct_deep)
    total += sum(radius(step, size) for step in steps) + sum(map(_kernel, net.gconv))
    total += sum(radius(block, size) for block in net.trans) + sum(map(_kernel, net.tconv))
    kinds = {CC: "mean and deviation (CC)", ChannelAttention: "mean (SCCA)"}
    kinds |= {EMHA: "attention segment", ESA: "grid of cells stretched over the image (ESA)"}
    parts = [m for block in (*steps, *net.trans) for m in block.modules()]
    counts = {name: sum(isinstance(m, kind) for m in parts) for kind, name in kinds.items()}
    return Reach(total, {name: count for name, count in counts.items() if count})


def radius(module: nn.Module, size: int) -> int:
    """Pixels that an output of `module` sees each way, its global parts held constant.

    `size` is the longer edge of the image, which decides the grid of ESA.
    """
    for kind, rule in RULES.items():
        if isinstance(module, kind):
            return rule(module, size)
    return _kernel(module)


def esa_radius(size: int) -> int:
    """Pixels that ESA sees each way along an edge of `size` pixels.

    A cell of its pooled map covers up to 15 pixels, every 6; three 3x3 convolutions see 3 cells
    each way; resizing spreads the cells over the edge and takes two of them for a pixel.
    """
    down = (size - 3) // 2 + 1
    kernel = min(7, down)
    cells = (down - kernel) // 3 + 1
    furthest = 0
    for y in range(size):
        source = max(0.0, (y + 0.5) * cells / size - 0.5)
        first = max(0, int(source) - 3)
        last = min(cells - 1, int(source) + 4)
        furthest = max(furthest, y - 6 * first, 6 * last + 2 * kernel - y)
    return furthest


def _kernel(module: nn.Module) -> int:
    """Sum of the half kernels of all convolutions: right for a chain, too much for branches."""
    return sum(max(m.kernel_size) // 2 for m in module.modules() if isinstance(m, nn.Conv2d))


def _calibrated(block: SelfCalibrated, size: int) -> int:
    branches = max(_kernel(block.attention), _kernel(block.context))
    return _kernel(block.split) + branches + _kernel(block.merge)


def _effb(block: EFFB, size: int) -> int:
    lattice = [_kernel(gcrb) for gcrb in (block.gcrb1, block.gcrb2, block.gcrb3)]
    fused = sum(lattice[:2]) + _kernel(block.fuse12) + _calibrated(block.scsa, size)
    return max(fused, sum(lattice)) + _kernel(block.fuse3) + _calibrated(block.scca, size)


def _fflb(block: FFLB, size: int) -> int:
    esa = esa_radius(size)
    return _kernel(block.gcrb1) + _kernel(block.gcrb2) + 2 * esa + radius(block.effb, size)


def _acdm(block: ACDM, size: int) -> int:
    trunk = kept = 0
    for refine, acrb, fflb in zip(block.refine, block.acrb, block.fflb, strict=True):
        kept = max(kept, trunk + min(1, _kernel(acrb)))  # three convolutions side by side
        trunk += _kernel(refine) + radius(fflb, size)
    trunk = max(kept, trunk + _kernel(block.conv4)) + _kernel(block.fuse)
    return trunk + radius(block.mscc, size)


RULES: dict[type[nn.Module], Callable[..., int]] = {
    ACDM: _acdm,
    FFLB: _fflb,
    EFFB: _effb,
    ESA: lambda block, size: esa_radius(size),
    MSCC: lambda block, size: _calibrated(block.scsa, size) + _calibrated(block.scca, size),
    SelfCalibrated: _calibrated,
    TransformerBlock: lambda block, size: 2,  # unfold and fold, 1 each
}
"""Blocks that are no chain of convolutions."""
