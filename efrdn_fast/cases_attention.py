"""Inputs of attention and of the other ops of the transformer block as data; see `cases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cases import Weights, weight_dtype
from .testing import make_input

__all__ = ["EMHA", "TOKENS", "EmhaCase", "TokenCase", "attention_rows"]


@dataclass(frozen=True)
class EmhaCase:
    batch: int
    tokens: int
    length: int
    """Tokens of a segment."""
    heads: int = 8
    dim: int = 18
    """Of a head."""
    scale: float = 1.0
    """Factor of q and k: the scores grow with its square."""
    strided: bool = False
    """Whether rows of qkv are apart, as in a slice of a wider projection."""

    op = "emha"

    def __str__(self) -> str:
        extra = [f"x{self.scale:g}"] * (self.scale != 1) + ["strided"] * self.strided
        size = f"N{self.batch}-T{self.tokens}-L{self.length}-H{self.heads}-D{self.dim}"
        return "-".join([size, *extra])

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        """qkv, heads, length, tf32."""
        inner = self.heads * self.dim
        values = make_input((self.batch, self.tokens, 3 * inner), torch.float64, seed=seed)
        values[:, :, : 2 * inner] *= self.scale
        values = values.to(device, dtype)
        if self.strided:
            wide = torch.full(
                (self.batch, self.tokens + 1, 3 * inner + 5), torch.nan, dtype=dtype, device=device
            )
            values = wide[:, 1:, 2 : 2 + 3 * inner].copy_(values)
        return values, self.heads, self.length, False

    @staticmethod
    def reference(qkv: Tensor, heads: int, length: int, tf32: bool) -> tuple[Tensor, Tensor]:
        return reference.emha(qkv, heads, length), reference.emha_lse(qkv, heads, length)


def attention_rows(
    qkv: Tensor, heads: int, length: int, rows: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Output `[N, rows, heads * D]` and lse `[N, heads, rows]` of some queries, plainly."""
    parts = []
    for row in rows.tolist():
        first = row - row % length
        q, k, v = reference.split_heads(qkv[:, first : first + length].to(dtype), heads)
        at = row - first
        scores = (q[:, :, at : at + 1] @ k.mT) * q.shape[-1] ** -0.5
        parts.append((scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)))
    out, lse = zip(*parts, strict=True)
    return reference.join_heads(out), torch.cat(lse, dim=2)


@dataclass(frozen=True)
class TokenCase:
    """One of the three ops around attention; M = hidden = 9 C / 2 unless given."""

    op: str
    shape: tuple[int, int, int, int]
    layout: str = "channels_last"
    hidden: int | None = None
    mean: bool = True
    offset: float = 0.0
    """Added to the map: the mean of a token is then far above its deviation."""
    peak: float = 0.0
    """Added to one pixel: the token around it has its mean far from that of the others."""

    def __str__(self) -> str:
        n, c, h, w = self.shape
        extra = [f"L{self.hidden}"] * (self.hidden is not None) + ["sum"] * (not self.mean)
        extra += [f"offset{self.offset:g}"] * bool(self.offset)
        extra += [f"peak{self.peak:g}"] * bool(self.peak)
        return "-".join([f"N{n}-C{c}-H{h}-W{w}", self.layout, *extra])

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        """Arguments of the op without `backend`."""
        n, channels, height, width = self.shape
        dim, make = 9 * channels, Weights(weight_dtype(dtype), device, seed + 1)
        inner, hidden = dim // 2, self.hidden or dim // 2
        x = make_input(self.shape, dtype, device, self.layout, seed)
        x += self.offset
        x[:, :, height // 2, width // 2] += self.peak

        def tokens(size: int, seed: int) -> Tensor:
            return make_input((n, height * width, size), dtype, device, seed=seed)

        norm = make.scale(dim), make.bias(dim)
        if self.op == "token_qkv":
            weights = make.linear(inner, dim), make.linear(3 * inner, inner)
            return x, *norm, *weights, 1e-5, False
        a = tokens(inner, seed + 2)
        proj = make.linear(dim, inner), make.bias(dim)
        if self.op == "token_hidden":
            return x, a, *proj, *norm, make.linear(hidden, dim), make.bias(hidden), 1e-5, False
        h = tokens(hidden, seed + 3)
        return x, a, h, *proj, make.linear(dim, hidden), make.bias(dim), self.mean, False

    def reference(self, *args: Any) -> Tensor:
        *tensors, option, _ = args
        name = "mean" if self.op == "token_fold" else "eps"
        return getattr(reference, self.op)(*tensors, **{name: option})


EMHA = (
    EmhaCase(1, 1, 1),
    EmhaCase(2, 3, 1),
    EmhaCase(1, 7, 100),
    EmhaCase(2, 37, 10),
    EmhaCase(1, 61, 61, strided=True),
    EmhaCase(1, 144, 36),
    EmhaCase(1, 257, 65),
    EmhaCase(1, 70, 33, heads=2, dim=1),
    EmhaCase(2, 45, 45, heads=3, dim=7),
    EmhaCase(1, 50, 24, heads=2, dim=64, strided=True),
    EmhaCase(1, 130, 64, scale=2.0),
)
"""Small ones; the last has scores of up to some 20."""

_MAPS = (
    ((1, 32, 1, 1), "contiguous"),
    ((1, 32, 1, 13), "sliced"),
    ((2, 32, 9, 7), "channels_last"),
    ((1, 16, 11, 6), "contiguous", 24),
)
TOKENS = (
    *(TokenCase("token_qkv", *each) for each in _MAPS),
    *(TokenCase("token_hidden", *each) for each in _MAPS),
    *(TokenCase("token_fold", *each) for each in _MAPS),
    TokenCase("token_fold", (1, 32, 5, 8), mean=False),
    *(
        TokenCase(op, (1, 16, 5, 6), **far)
        for op in ("token_qkv", "token_hidden")
        for far in ({"offset": 1e3}, {"peak": 1e3})
    ),
)
