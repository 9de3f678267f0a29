"""ESRT in plain PyTorch (Lu et al., "Transformer for Single Image Super-Resolution", CVPRW 2022).

For timing, with random weights. 32 channels; three high preserving blocks whose low-frequency path
runs five times at half resolution; one efficient transformer in four segments. The paper's 751 K
parameters at x4 are the check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrdn_fast.blocks import conv

from .parts import ChannelAttention, EfficientTransformer, fold, unfold

__all__ = ["ESRT"]

REPEATS = 5  # of the shared low-frequency block


def _weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


class ResidualUnit(nn.Module):
    """Squeeze to half the channels and back, both weighted by a learned scalar."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = conv(channels, channels // 2, 3)
        self.act = nn.PReLU(channels // 2)
        self.expand = conv(channels // 2, channels, 3)
        self.of_input, self.of_update = _weight(), _weight()

    def forward(self, x: Tensor) -> Tensor:
        return self.of_input * x + self.of_update * self.expand(self.act(self.reduce(x)))


class AdaptiveResidualFeatureBlock(nn.Module):
    """Two residual units, their outputs fused, gated and convolved (ARFB)."""

    def __init__(self, channels: int):
        super().__init__()
        self.unit1, self.unit2 = ResidualUnit(channels), ResidualUnit(channels)
        self.fuse = conv(2 * channels, channels, 1, bias=False)
        self.gate = ChannelAttention(channels)
        self.refine = conv(channels, channels, 3, bias=False)
        self.of_first, self.of_second = _weight(), _weight()
        self.of_input, self.of_update = _weight(), _weight()

    def forward(self, x: Tensor) -> Tensor:
        first = self.unit1(x)
        second = self.unit2(first)
        both = torch.cat((self.of_second * second, self.of_first * first), dim=1)
        update = self.refine(self.gate(self.fuse(both).relu())).relu()
        return self.of_input * x + self.of_update * update


class HighPreservingBlock(nn.Module):
    """High and low frequencies apart, the low ones at half resolution (HPB)."""

    def __init__(self, channels: int):
        super().__init__()
        self.enter = AdaptiveResidualFeatureBlock(channels)
        self.low = AdaptiveResidualFeatureBlock(channels)
        self.high = AdaptiveResidualFeatureBlock(channels)
        self.fuse = conv(2 * channels, channels, 1, bias=False)
        self.gate = ChannelAttention(channels)
        self.leave = AdaptiveResidualFeatureBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        low = F.avg_pool2d(entered, 2)
        high = self.high(entered - self._enlarged(low, x))
        for _ in range(REPEATS):
            low = self.low(low)
        fused = self.fuse(torch.cat((self._enlarged(low, x), high), dim=1)).relu()
        return self.leave(self.gate(fused)) + x

    @staticmethod
    def _enlarged(low: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(low, size=like.shape[2:], mode="bilinear", align_corners=True)


class Upsampler(nn.Sequential):
    """Steps of x2 (or one of x3), each a convolution and a pixel shuffle, then 3 channels."""

    def __init__(self, channels: int, scale: int, bias: bool):
        steps: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            steps += [conv(channels, factor**2 * channels, 3), nn.PixelShuffle(factor)]
        super().__init__(*steps, conv(channels, 3, 3, bias=bias))


class ESRT(nn.Module):
    """`[N, 3, H, W]` -> `[N, 3, scale H, scale W]`, H, W even."""

    def __init__(self, scale: int = 4, channels: int = 32):
        super().__init__()
        self.head = conv(3, channels, 3)
        self.blocks = nn.ModuleList(HighPreservingBlock(channels) for _ in range(3))
        self.gather = conv(3 * channels, channels, 3)
        self.transformer = EfficientTransformer(9 * channels, segments=4)
        self.after = conv(channels, channels, 3)
        self.of_input, self.of_update = _weight(), _weight()
        self.last = conv(channels, channels, 3)
        self.tail = Upsampler(channels, scale, bias=True)
        self.shortcut = Upsampler(channels, scale, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shallow = features = self.head(x)
        outputs = []
        for block in self.blocks:
            features = block(features)
            outputs.append(features)
        tokens = self.transformer(unfold(self.gather(torch.cat(outputs, dim=1))))
        deep = self.after(fold(tokens, *x.shape[2:]))
        y = self.last(self.of_input * shallow + self.of_update * deep)
        return self.tail(y) + self.shortcut(shallow).relu()
