"""The blocks that Table 2 puts in the place of ACDM: textbook IMDB and RFDB.

IMDB: Hui et al., "Lightweight Image Super-Resolution with Information Multi-Distillation Network",
ACM MM 2019. RFDB: Liu et al., "Residual Feature Distillation Network for Lightweight Image
Super-Resolution", ECCV Workshops 2020. Both with LeakyReLU(0.05), as published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ESA, conv

__all__ = ["IMDB", "RFDB"]

NEGATIVE_SLOPE = 0.05


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, NEGATIVE_SLOPE)


class ContrastAttention(nn.Module):
    """Contrast-aware channel attention: gate from mean plus standard deviation, reduction 16."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 16, 1)
        self.excite = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        # The small constant keeps the root differentiable on a constant map.
        std = ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean + std))))


class IMDB(nn.Module):
    """Information multi-distillation block: a quarter of the channels is kept at every step."""

    def __init__(self, channels: int):
        super().__init__()
        kept = channels // 4
        self.widths = [kept, channels - kept]
        self.conv1 = conv(channels, channels, 3)
        self.conv2 = conv(channels - kept, channels, 3)
        self.conv3 = conv(channels - kept, channels, 3)
        self.conv4 = conv(channels - kept, kept, 3)
        self.attention = ContrastAttention(4 * kept)
        self.fuse = conv(4 * kept, channels, 1)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        kept, t = [], x
        for step in (self.conv1, self.conv2, self.conv3):
            distilled, t = _act(step(t)).split(self.widths, dim=1)
            kept.append(distilled)
        kept.append(self.conv4(t))
        return self.fuse(self.attention(torch.cat(kept, dim=1))) + x


class RFDB(nn.Module):
    """Residual feature distillation block: 1x1 distillation beside residual convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.distill = nn.ModuleList(conv(channels, half, 1) for _ in range(3))
        self.refine = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.conv4 = conv(channels, half, 3)
        self.fuse = conv(4 * half, channels, 1)
        self.esa = ESA(channels)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        kept, t = [], x
        for distill, refine in zip(self.distill, self.refine, strict=True):
            kept.append(_act(distill(t)))
            t = _act(refine(t) + t)
        kept.append(_act(self.conv4(t)))
        return self.esa(self.fuse(torch.cat(kept, dim=1)))
