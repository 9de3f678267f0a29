"""The transformer block of the paper (Eqs. 28-30) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .reference import overlap_count

__all__ = ["EMHA", "MLP", "TransformerBlock", "overlap_count"]

Attention = Callable[[Tensor, int, int], Tensor]


class EMHA(nn.Module):
    """Efficient multi-head attention over consecutive segments of tokens (Eq. 30)."""

    def __init__(
        self, dim: int = 288, heads: int = 8, segments: int = 4, segment_tokens: int | None = None
    ):
        super().__init__()
        inner = dim // 2
        self.heads, self.segments, self.segment_tokens = heads, segments, segment_tokens
        self.attention: Attention = reference.emha
        self.reduce = nn.Linear(dim, inner, bias=False)
        self.qkv = nn.Linear(inner, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, dim)

    def segment_length(self, tokens: int) -> int:
        """Tokens of a segment: `segment_tokens`, else ceil(tokens / segments)."""
        return self.segment_tokens or (tokens + self.segments - 1) // self.segments

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.reduce(x))  # [N, T, 3 * inner]
        return self.proj(self.attention(qkv, self.heads, self.segment_length(x.shape[1])))


class MLP(nn.Module):
    """Linear, ReLU, Linear with hidden width dim / 2."""

    def __init__(self, dim: int = 288):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 2)
        self.fc2 = nn.Linear(dim // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Unfold 3x3 patches to tokens, `T + EMHA(LN T)`, `T + MLP(LN T)`, fold back."""

    def __init__(
        self,
        channels: int = 32,
        segments: int = 4,
        segment_tokens: int | None = None,
        fold: str = "mean",
    ):
        super().__init__()
        dim = 9 * channels
        self.fold = fold
        self.norm1 = nn.LayerNorm(dim)
        self.emha = EMHA(dim, segments=segments, segment_tokens=segment_tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        t = reference.unfold(x)  # [N, H W, 9 C]
        t = t + self.emha(self.norm1(t))  # (28)
        t = t + self.mlp(self.norm2(t))  # (29)
        y = reference.fold(t, x.shape[2:])
        return y / overlap_count(x) if self.fold == "mean" else y
