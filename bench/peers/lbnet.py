"""LBNet in plain PyTorch (Gao et al., "Lightweight Bimodal Network", IJCAI 2022).

For timing, with random weights. 32 channels; a symmetric CNN that runs three fusion modules twice,
then two transformers that are applied three times each, in sixteen segments. The paper's 742 K
parameters at x4 are the check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrdn_fast.blocks import conv

from .parts import ChannelAttention, EfficientTransformer, fold, unfold

__all__ = ["LBNet"]

RECURSIONS = 3  # of each transformer


class SpatialGate(nn.Module):
    """Gate of every pixel from the mean and the largest of its channels."""

    def __init__(self):
        super().__init__()
        self.conv = conv(2, 1, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        return x * self.conv(both).sigmoid()


class DualAttentionBlock(nn.Module):
    """Features of three depths, refined by channel and by spatial attention (FRDAB)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.enter = conv(channels, channels, 1)
        self.left, self.right = conv(channels, half, 3), conv(channels, half, 3)
        self.deep = conv(2 * channels, channels, 3)
        self.beside = conv(half, half, 3)
        self.channel, self.spatial = ChannelAttention(2 * channels), SpatialGate()
        self.leave = conv(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        entered = F.relu(self.enter(x))
        left, right = F.relu(self.left(entered)), F.relu(self.right(entered))
        deep = F.relu(self.deep(torch.cat((entered, left, right), dim=1)))
        y = torch.cat((left, self.beside(right), deep), dim=1)
        return x + self.leave(self.channel(y) + self.spatial(y))


class FusionModule(nn.Module):
    """Three dual attention blocks, densely connected by 1x1 convolutions (LFFM)."""

    def __init__(self, channels: int):
        super().__init__()
        self.blocks = nn.ModuleList(DualAttentionBlock(channels) for _ in range(3))
        self.fuse = nn.ModuleList(
            conv(count * channels, channels, 1, groups=groups)
            for count, groups in ((2, 2), (3, 2), (4, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        seen, y = [x], x
        for block, fuse in zip(self.blocks, self.fuse, strict=True):
            seen.append(block(y))
            y = fuse(torch.cat(seen, dim=1))
        return x + y


class LBNet(nn.Module):
    """`[N, 3, H, W]` -> `[N, 3, scale H, scale W]`."""

    def __init__(self, scale: int = 4, channels: int = 32):
        super().__init__()
        self.head = conv(3, channels, 3)
        self.fusions = nn.ModuleList(FusionModule(channels) for _ in range(3))
        self.gates = nn.ModuleList(ChannelAttention(channels) for _ in range(3))
        self.gather = conv(6 * channels, channels, 1)
        self.transformers = nn.ModuleList(
            EfficientTransformer(9 * channels, segments=16) for _ in range(2)
        )
        self.after = nn.ModuleList(conv(channels, channels, 3) for _ in range(2))
        self.tail = conv(channels, 3 * scale**2, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        shallow = y = self.head(x)
        outputs = []
        for module in self.fusions:
            y = module(y)
            outputs.append(y)
        for module, gate, first in zip(self.fusions, self.gates, tuple(outputs), strict=True):
            y = module(y + gate(first))
            outputs.append(y)
        y = self.gather(torch.cat(outputs, dim=1))
        for transformer, after in zip(self.transformers, self.after, strict=True):
            tokens = unfold(y)
            for _ in range(RECURSIONS):
                tokens = transformer(tokens)
            y = after(fold(tokens, *x.shape[2:]))
        return F.pixel_shuffle(self.tail(y + shallow), self.scale)
