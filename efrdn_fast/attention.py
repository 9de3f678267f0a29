"""Public ops of the transformer block, re-exported by `functional`, whose conventions they keep.

`emha` takes the arguments of `reference.emha`: `net.set_attention(functional.emha)` puts it into a
plain network, also for training, where only its input, its output and one number per query and
head are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import dispatch, ops_attention, reference
from .checks import check_int, check_map, check_rank, check_weights
from .kernels._precision import matmul_tf32

__all__ = [
    "MAX_HEAD_DIM",
    "PARTS",
    "emha",
    "is_fused",
    "is_plain",
    "planned_block",
    "transformer_block",
    "weights_of",
]

MAX_HEAD_DIM = 64
PARTS = ("token_qkv", "emha", "token_hidden", "token_fold")
"""Ops of a transformer block, in order."""

FUSED_WIDTH = 288
"""Widest token (9 C) that networks run through these ops; wider ones may not fit on the chip."""

_ops = getattr(torch.ops, ops_attention.NAMESPACE)


def emha(
    qkv: Tensor,
    heads: int,
    segment_tokens: int | None = None,
    *,
    segments: int = 4,
    tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside segments of consecutive tokens (Eq. 30), without a matrix of scores.

    Args:
        qkv: Output of the qkv projection, `[N, T, 3 * heads * D]`, laid out (q, k, v) x heads x D,
            D <= 64.
        heads: Number of heads.
        segment_tokens: Length of a segment; the last one may be shorter. Default: None, then
            ceil(T / segments).
        segments: Number of segments where no length is given. Default: 4.
        tf32: Products in TF32, for float32 on a GPU. Default: None, as PyTorch is set for matrix
            products.
        backend: As in `gcrb`.

    Returns:
        `[N, T, heads * D]`, heads joined, dtype of `qkv`. Differentiable once.

    Example:
        >>> net.set_attention(functional.emha)
    """
    check_map("emha", "qkv", qkv, "N, T, 3 * heads * D")
    check_int("emha", "heads", heads)
    tokens, width = qkv.shape[1:]
    if heads < 1 or width % (3 * heads):
        raise ValueError(
            f"emha: qkv must be [N, T, 3 * heads * D], got {list(qkv.shape)} for heads={heads}"
        )
    _check_head_dim("emha", width // (3 * heads), heads)
    length = _segment_length("emha", tokens, segment_tokens, segments)
    backend = dispatch.choose("emha", backend, qkv)
    return _ops.emha(qkv, heads, length, _tf32(qkv, tf32), backend)[0]


def _check_head_dim(op: str, dim: int, heads: int) -> None:
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head_dim must be at most {MAX_HEAD_DIM}, got {dim} ({heads} heads)"
        )


def _segment_length(op: str, tokens: int, segment_tokens: int | None, segments: int) -> int:
    given = segment_tokens is not None
    name, count = ("segment_tokens", segment_tokens) if given else ("segments", segments)
    check_int(op, name, count)
    if count < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {count}")
    return count if given else (tokens + count - 1) // count


def _tf32(x: Tensor, asked: bool | None) -> bool:
    if asked is not None and not isinstance(asked, bool):
        raise TypeError(f"emha: tf32 must be True, False or None, got {asked!r}")
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return False
    return matmul_tf32() if asked is None else asked


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
    segment_tokens: int | None = None,
    segments: int = 4,
    eps: float = 1e-5,
    mean: bool = True,
    tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Transformer block (Eqs. 28-30) in four ops, between which no 9 C wide token is stored.

    Args:
        x: `[N, C, H, W]`.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: Of the LayerNorms, `[9 C]`,
            channel-major.
        reduce, qkv: `[M, 9 C]`, `[3 M, M]`.
        proj_weight, proj_bias: `[9 C, M]`, `[9 C]`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: `[L, 9 C]`, `[L]`, `[9 C, L]`, `[9 C]`.
        heads, segment_tokens, segments, tf32: As in `emha`; heads must divide M.
        eps: Of the LayerNorms. Default: 1e-5.
        mean: Divide the fold by the number of patches that cover a pixel. Default: True.
        backend: As in `gcrb`; a backend that is named serves the ops of the four that it has.

    Returns:
        `[N, C, H, W]`, dtype of `x`. Differentiable once in every tensor.

    Example:
        >>> y = functional.transformer_block(x, *block.parameters())
    """
    op = "transformer_block"
    check_map(op, "x", x)
    for name, weight, rows in (("reduce", reduce, "M"), ("fc1_weight", fc1_weight, "L")):
        check_rank(op, name, weight, f"{rows}, 9 * C")
    dim, inner, hidden = 9 * x.shape[1], reduce.shape[0], fc1_weight.shape[0]
    check_weights(
        op,
        x,
        norm1_weight=(norm1_weight, (dim,)),
        norm1_bias=(norm1_bias, (dim,)),
        reduce=(reduce, (inner, dim)),
        qkv=(qkv, (3 * inner, inner)),
        proj_weight=(proj_weight, (dim, inner)),
        proj_bias=(proj_bias, (dim,)),
        norm2_weight=(norm2_weight, (dim,)),
        norm2_bias=(norm2_bias, (dim,)),
        fc1_weight=(fc1_weight, (hidden, dim)),
        fc1_bias=(fc1_bias, (hidden,)),
        fc2_weight=(fc2_weight, (dim, hidden)),
        fc2_bias=(fc2_bias, (dim,)),
    )
    check_int(op, "heads", heads)
    if heads < 1 or inner % heads:
        raise ValueError(f"{op}: heads must divide the width {inner} of q, got {heads}")
    _check_head_dim(op, inner // heads, heads)
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")
    length = _segment_length(op, x.shape[2] * x.shape[3], segment_tokens, segments)
    weights = (
        *(norm1_weight, norm1_bias, reduce, qkv, proj_weight, proj_bias),
        *(norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
    )
    plan = dispatch.plan(PARTS, backend, x)
    return planned_block(x, weights, heads, length, eps=eps, mean=mean, tf32=tf32, plan=plan)


def is_plain(attention: Callable) -> bool:
    """Whether `attention` is one of the plain ones, which `emha` may stand in for."""
    return attention in (reference.emha, reference.emha_sdpa)


def is_fused(block: nn.Module, plan: Mapping[str, str]) -> bool:
    """Whether `planned_block` serves a transformer block: it has kernels for all ops, on a GPU."""
    kernels = all(plan[op] in ("triton", "cuda") for op in PARTS)
    narrow = block.norm1.normalized_shape[0] <= FUSED_WIDTH
    return kernels and narrow and block.norm1.eps == block.norm2.eps


def weights_of(block: nn.Module) -> tuple[Tensor, ...]:
    """Those of a transformer block in the order of `transformer_block`."""
    emha, mlp = block.emha, block.mlp
    return (
        *(block.norm1.weight, block.norm1.bias, emha.reduce.weight, emha.qkv.weight),
        *(emha.proj.weight, emha.proj.bias, block.norm2.weight, block.norm2.bias),
        *(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
    )


def planned_block(
    x: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    length: int,
    *,
    eps: float,
    mean: bool,
    plan: Mapping[str, str],
    tf32: bool | None = None,
) -> Tensor:
    """`transformer_block` of arguments that need no check; `plan` gives the backend of each op."""
    gamma1, beta1, reduce, qkv, proj, offset, gamma2, beta2, fc1, offset1, fc2, offset2 = weights
    tf32 = _tf32(x, tf32)
    first, second, third, fourth = (plan[op] for op in PARTS)
    tokens = _ops.token_qkv(x, gamma1, beta1, reduce, qkv, eps, tf32, first)
    a, _ = _ops.emha(tokens, heads, length, tf32, second)
    h = _ops.token_hidden(x, a, proj, offset, gamma2, beta2, fc1, offset1, eps, tf32, third)
    return _ops.token_fold(x, a, h, proj, offset, fc2, offset2, mean, tf32, fourth)
