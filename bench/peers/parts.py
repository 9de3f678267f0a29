"""What ESRT and LBNet share: channel attention, the efficient transformer, patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from efrdn_fast.reference import emha_sdpa
from efrdn_fast.transformer import EMHA

__all__ = ["ChannelAttention", "EfficientTransformer", "fold", "unfold"]


class ChannelAttention(nn.Module):
    """Gate from the mean of each channel through a bottleneck of 1/16."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 16, 1)
        self.excite = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * self.excite(self.squeeze(mean).relu()).sigmoid()


class EfficientTransformer(nn.Module):
    """Pre-norm attention in `segments` segments and an MLP of a quarter of the width.

    Tokens `[N, T, dim]`. Attention is EFRDN's, which took it from these networks, through SDPA.
    """

    def __init__(self, dim: int, segments: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = EMHA(dim, segments=segments)
        self.attention.attention = emha_sdpa
        self.mlp = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, dim))

    def forward(self, t: Tensor) -> Tensor:
        t = t + self.attention(self.norm1(t))
        return t + self.mlp(self.norm2(t))


def unfold(x: Tensor) -> Tensor:
    """3x3 patches of every pixel as tokens: `[N, C, H, W]` -> `[N, H W, 9 C]`."""
    return F.unfold(x, 3, padding=1).transpose(1, 2)


def fold(t: Tensor, height: int, width: int) -> Tensor:
    """Sum of the patches where they overlap: `[N, H W, 9 C]` -> `[N, C, H, W]`."""
    return F.fold(t.transpose(1, 2), (height, width), 3, padding=1)
