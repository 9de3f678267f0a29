"""The ops in plain PyTorch: the truth that every fast backend is compared with.

They compute in the dtype they are given (float64 in = float64 truth), without casts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SCORE_BUDGET", "emha", "emha_sdpa"]

SCORE_BUDGET = 256 << 20
"""Bytes of attention scores that `emha` holds at a time; longer segments loop over query rows."""


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    n, tokens, width = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v  # each [N, heads, T, D]


def emha(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """Efficient multi-head attention (Eq. 30): softmax(q k^T / sqrt(d)) v inside every segment.

    Args:
        qkv: Output of the qkv projection, `[N, T, 3 * heads * D]`, laid out (q, k, v) x heads x D.
        heads: Number of heads.
        segment_tokens: Length of a segment; the last one may be shorter.

    Returns:
        `[N, T, heads * D]`, heads joined. At most `SCORE_BUDGET` bytes of scores at a time.
    """
    n, tokens, _ = qkv.shape
    row_bytes = n * heads * min(segment_tokens, tokens) * qkv.element_size()
    rows = max(1, SCORE_BUDGET // max(1, row_bytes))  # query rows whose scores fit the budget
    scale = _split_heads(qkv, heads)[0].shape[-1] ** -0.5
    out = []
    for segment in qkv.split(segment_tokens, dim=1):
        q, k, v = _split_heads(segment, heads)
        for q_rows in q.split(rows, dim=2):
            scores = (q_rows @ k.transpose(-2, -1)) * scale  # [N, heads, rows, segment]
            out.append(scores.softmax(dim=-1) @ v)
    return torch.cat(out, dim=2).transpose(1, 2).reshape(n, tokens, -1)


def emha_sdpa(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """`emha` through `scaled_dot_product_attention`: same result, no score matrix on CPU."""
    n, tokens, _ = qkv.shape
    out = [
        F.scaled_dot_product_attention(*_split_heads(segment, heads))
        for segment in qkv.split(segment_tokens, dim=1)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).reshape(n, tokens, -1)
