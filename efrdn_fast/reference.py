"""The ops in plain PyTorch: the truth that every fast backend is compared with.

They compute in the dtype they are given (float64 in = float64 truth), without casts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    "emha_lse",
    "emha_sdpa",
    "fold",
    "gcrb",
    "gcrb_chain",
    "gcrb_train",
    "join",
    "join_heads",
    "overlap_count",
    "score_blocks",
    "split_heads",
    "token_fold",
    "token_hidden",
    "token_qkv",
    "transformer_block",
    "unfold",
]

SCORE_BUDGET = 256 << 20
"""Bytes of scores that `emha` computes at a time; longer segments loop over query rows."""


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


def gcrb_chain(
    x: Tensor, params: Sequence[Tensor], *, groups: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Three GCRBs one after the other: all three results.

    Args:
        params: w1, b1, w2, b2, w3, b3 of each, as in `gcrb`.
    """
    g1 = gcrb(x, *params[:6], groups=groups)
    g2 = gcrb(g1, *params[6:12], groups=groups)
    return g1, g2, gcrb(g2, *params[12:], groups=groups)


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


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `[N, T, 3 * heads * D]`, views `[N, heads, T, D]`."""
    n, tokens, width = qkv.shape
    q, k, v = qkv.view(n, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def score_blocks(
    qkv: Tensor, heads: int, segment_tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Scaled scores of attention in blocks of query rows, each within `SCORE_BUDGET`.

    Yields:
        The tokens of the rows, their scores `[N, heads, rows, segment]`, their queries, and keys
        and values of their segment; each of the three `[N, heads, tokens, D]`.
    """
    n, tokens, _ = qkv.shape
    row_bytes = n * heads * min(segment_tokens, tokens) * qkv.element_size()
    rows = max(1, SCORE_BUDGET // max(1, row_bytes))
    scale = split_heads(qkv, heads)[0].shape[-1] ** -0.5
    first = 0
    for segment in qkv.split(segment_tokens, dim=1):
        q, k, v = split_heads(segment, heads)
        for part in q.split(rows, dim=2):
            last = first + part.shape[2]
            yield slice(first, last), (part @ k.transpose(-2, -1)) * scale, part, k, v
            first = last


def emha(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """Efficient multi-head attention (Eq. 30): softmax(q k^T / sqrt(d)) v inside every segment.

    Args:
        qkv: Output of the qkv projection, `[N, T, 3 * heads * D]`, laid out (q, k, v) x heads x D.
        heads: Number of heads.
        segment_tokens: Length of a segment; the last one may be shorter.

    Returns:
        `[N, T, heads * D]`, heads joined. Without gradients at most `SCORE_BUDGET` bytes of scores
        at a time, and as much of their softmax.
    """
    blocks = score_blocks(qkv, heads, segment_tokens)
    return join_heads([scores.softmax(dim=-1) @ v for _, scores, _, _, v in blocks])


def emha_lse(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """Log of the sum of exp of the scaled scores of every query, `[N, heads, T]`."""
    blocks = score_blocks(qkv, heads, segment_tokens)
    return torch.cat([scores.logsumexp(dim=-1) for _, scores, *_ in blocks], dim=2)


def join_heads(parts: Sequence[Tensor]) -> Tensor:
    """Consecutive tokens of several `[N, heads, tokens, D]` as one `[N, T, heads * D]`."""
    return torch.cat(tuple(parts), dim=2).transpose(1, 2).flatten(2)


def emha_sdpa(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """`emha` through `scaled_dot_product_attention`: same result, no score matrix on CPU."""
    segments = qkv.split(segment_tokens, dim=1)
    return join_heads([F.scaled_dot_product_attention(*split_heads(s, heads)) for s in segments])


def overlap_count(x: Tensor) -> Tensor:
    """How many 3x3 patches cover each pixel of `x`: 9 inside, 6 at edges, 4 in corners."""
    ones = x.new_ones(1, 1, *x.shape[2:])
    return F.fold(F.unfold(ones, 3, padding=1), x.shape[2:], 3, padding=1)  # [1, 1, H, W]


def unfold(x: Tensor) -> Tensor:
    """3x3 patches of `x` `[N, C, H, W]`, zero padding, as tokens `[N, H W, 9 C]`."""
    return F.unfold(x, 3, padding=1).transpose(1, 2)


def fold(t: Tensor, size: Sequence[int]) -> Tensor:
    """Sum of the patches `[N, H W, 9 C]` that meet at each pixel; `[N, C, H, W]`, `size` H, W."""
    return F.fold(t.transpose(1, 2), tuple(size), 3, padding=1)


def token_qkv(
    x: Tensor, gamma: Tensor, beta: Tensor, reduce: Tensor, qkv: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """q k v of the tokens of a map: `LN(unfold3x3(x))` through two Linear without bias.

    Args:
        x: `[N, C, H, W]`.
        gamma, beta: Of the LayerNorm, `[9 C]`, channel-major.
        reduce, qkv: `[M, 9 C]`, `[3 M, M]`.

    Returns:
        `[N, H W, 3 M]`.
    """
    t = F.layer_norm(unfold(x), gamma.shape, gamma, beta, eps)
    return F.linear(F.linear(t, reduce), qkv)


def token_hidden(
    x: Tensor,
    a: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Hidden layer of the MLP: `relu(fc1(LN(unfold3x3(x) + proj(a))))` (Eqs. 28, 29).

    Args:
        x: `[N, C, H, W]`.
        a: Output of the attention, `[N, H W, M]`.
        proj_weight, proj_bias: `[9 C, M]`, `[9 C]`.
        gamma, beta: Of the LayerNorm, `[9 C]`, channel-major.
        fc1_weight, fc1_bias: `[hidden, 9 C]`, `[hidden]`.

    Returns:
        `[N, H W, hidden]`.
    """
    t = unfold(x) + F.linear(a, proj_weight, proj_bias)
    return F.relu(F.linear(F.layer_norm(t, gamma.shape, gamma, beta, eps), fc1_weight, fc1_bias))


def token_fold(
    x: Tensor,
    a: Tensor,
    h: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    mean: bool = True,
) -> Tensor:
    """Tokens after both residuals, folded: `fold(unfold3x3(x) + proj(a) + fc2(h))`.

    Args:
        x, a, proj_weight, proj_bias: As in `token_hidden`.
        h: Its result, `[N, H W, hidden]`.
        fc2_weight, fc2_bias: `[9 C, hidden]`, `[9 C]`.
        mean: Divide by the number of patches that cover a pixel.

    Returns:
        `[N, C, H, W]`.
    """
    t = unfold(x) + F.linear(a, proj_weight, proj_bias) + F.linear(h, fc2_weight, fc2_bias)
    y = fold(t, x.shape[2:])
    return y / overlap_count(x) if mean else y


def transformer_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    reduce: Tensor,
    qkv: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    heads: int = 8,
    segment_tokens: int,
    eps: float = 1e-5,
    mean: bool = True,
) -> Tensor:
    """The transformer block (Eqs. 28-30) from the four parts above."""
    a = emha(token_qkv(x, norm1_weight, norm1_bias, reduce, qkv, eps=eps), heads, segment_tokens)
    proj = proj_weight, proj_bias
    h = token_hidden(x, a, *proj, norm2_weight, norm2_bias, fc1_weight, fc1_bias, eps=eps)
    return token_fold(x, a, h, *proj, fc2_weight, fc2_bias, mean=mean)
