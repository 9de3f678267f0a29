"""The ops in plain PyTorch: the truth that every fast backend is compared with.

They compute in the dtype they are given (float64 in = float64 truth), without casts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "SCORE_BUDGET",
    "acrb",
    "acrb_out",
    "acrb_train",
    "asymmetric_conv",
    "conv3x3",
    "emha",
    "emha_sdpa",
    "gcrb",
    "gcrb_train",
    "join",
]

SCORE_BUDGET = 256 << 20
"""Bytes of attention scores that `emha` holds at a time; longer segments loop over query rows."""


def gcrb(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    groups: int = 2,
) -> Tensor:
    """GCRB, BatchNorm folded: `x + relu(conv1x1(relu(dw3x3(relu(conv1x1(x))))))`.

    The depthwise convolution pads with zeros, also where part 1 would give relu(b1).

    Args:
        x: `[N, C, H, W]`.
        w1, b1: `[M, C / groups, 1, 1]`, `[M]`.
        w2, b2: `[M, 1, 3, 3]`, `[M]`.
        w3, b3: `[C, M / groups, 1, 1]`, `[C]`.
    """
    y = F.relu(F.conv2d(x, w1, b1, groups=groups))
    y = F.relu(F.conv2d(y, w2, b2, padding=1, groups=w2.shape[0]))
    return x + F.relu(F.conv2d(y, w3, b3, groups=groups))


def gcrb_train(
    x: Tensor,
    w1: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    w2: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    w3: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    *,
    groups: int = 2,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """GCRB with BatchNorm over the statistics of the batch.

    Returns:
        y `[N, C, H, W]`; mean and biased variance `[2M + C]` of the three BatchNorms, in order.
    """
    y, mean1, var1 = _batch_norm(F.conv2d(x, w1, groups=groups), gamma1, beta1, eps)
    y = F.conv2d(F.relu(y), w2, padding=1, groups=w2.shape[0])
    y, mean2, var2 = _batch_norm(y, gamma2, beta2, eps)
    y, mean3, var3 = _batch_norm(F.conv2d(F.relu(y), w3, groups=groups), gamma3, beta3, eps)
    return x + F.relu(y), torch.cat((mean1, mean2, mean3)), torch.cat((var1, var2, var3))


def _batch_norm(
    z: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = torch.zeros_like(gamma.detach()), torch.ones_like(gamma.detach())
    y = F.batch_norm(
        z, mean, var, gamma, beta, True, 1.0, eps
    )  # momentum 1: they become the batch's
    count = z.numel() // z.shape[1]
    return y, mean, var * ((count - 1) / count)


def acrb(x: Tensor, weight: Tensor, bias: Tensor, *, start: int = 0) -> Tensor:
    """ACRB merged and folded: `s + relu(conv3x3(s))` of the channels s from `start` on.

    Args:
        x: `[N, C, H, W]`.
        weight, bias: `[d, d, 3, 3]`, `[d]`.

    Returns:
        `[N, d, H, W]`.
    """
    s = x.narrow(1, start, weight.shape[0])
    return s + F.relu(F.conv2d(s, weight, bias, padding=1))


def acrb_out(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, start: int = 0, out_start: int = 0
) -> None:
    """`acrb` written into the channels of `out` from `out_start` on."""
    out.narrow(1, out_start, weight.shape[0]).copy_(acrb(x, weight, bias, start=start))


def acrb_train(
    x: Tensor,
    w1x3: Tensor,
    w3x3: Tensor,
    w3x1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    start: int = 0,
    eps: float = 1e-5,
) -> Tensor:
    """ACRB with BatchNorm over the statistics of the batch; weights as in `asymmetric_conv`."""
    y = asymmetric_conv(x, w1x3, w3x3, w3x1, start=start)
    y = F.batch_norm(y, None, None, gamma, beta, True, 0.0, eps)
    return x.narrow(1, start, w3x3.shape[1]) + F.relu(y)


def asymmetric_conv(
    x: Tensor,
    w1x3: Tensor,
    w3x3: Tensor,
    w3x1: Tensor,
    bias: Tensor | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Sum of a 1x3, a 3x3 and a 3x1 convolution of the channels from `start` on.

    Args:
        x: `[N, C, H, W]`.
        w1x3, w3x3, w3x1: `[Cout, Cin, 1, 3]`, `[Cout, Cin, 3, 3]`, `[Cout, Cin, 3, 1]`.
        bias: `[Cout]` or None.

    Returns:
        `[N, Cout, H, W]`.
    """
    s = x.narrow(1, start, w3x3.shape[1])
    y = F.conv2d(s, w1x3, padding=(0, 1)) + F.conv2d(s, w3x3, bias, padding=1)
    return y + F.conv2d(s, w3x1, padding=(1, 0))


def join(xs: Sequence[Tensor], interleaved: bool = False) -> Tensor:
    """Concatenation of the channels of `xs`; interleaved: a0, b0, a1, b1, ... of two maps."""
    if interleaved:
        return torch.stack(tuple(xs), dim=2).flatten(1, 2)
    return xs[0] if len(xs) == 1 else torch.cat(tuple(xs), dim=1)


def conv3x3(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    groups: int = 1,
    relu: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """3x3 convolution of the concatenation of `xs`, ReLU if asked, then `+ residual`.

    Args:
        xs: One map or several `[N, Ci, H, W]`, joined along the channels.
        weight: `[Cout, Cin / groups, 3, 3]`, Cin the sum of all Ci.
        bias: `[Cout]` or None.
        residual: `[N, Cout, H, W]` or None.
        interleaved: Join two maps as a0, b0, a1, b1, ... instead.
    """
    xs = [xs] if isinstance(xs, Tensor) else list(xs)
    y = F.conv2d(join(xs, interleaved), weight, bias, padding=1, groups=groups)
    y = F.relu(y) if relu else y
    return y if residual is None else y + residual


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
