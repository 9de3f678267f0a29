"""Backend `reference` of attention and of the parts of the transformer block.

As in `kernels.reference`: PyTorch's own kernels, any device, any float dtype, weights cast to the
dtype of the map, backward passes recompute. On a CPU attention is PyTorch's flash kernel, which
holds no scores; elsewhere blocks of scores within `reference.SCORE_BUDGET`. TF32 is PyTorch's own
setting here; the argument `tf32` is for the other backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .reference import nhwc_strides, relu_backward

__all__ = [
    "emha",
    "emha_backward",
    "token_fold",
    "token_fold_backward",
    "token_hidden",
    "token_hidden_backward",
    "token_qkv",
    "token_qkv_backward",
]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def emha(qkv, heads, length, tf32):
    if qkv.device.type == "cpu":
        segments = [reference.split_heads(s, heads) for s in qkv.split(length, dim=1)]
        parts = [_flash(q, k, v) for q, k, v in segments]
    else:
        blocks = reference.score_blocks(qkv, heads, length)
        parts = [(s.softmax(dim=-1) @ v, s.logsumexp(dim=-1)) for _, s, _, _, v in blocks]
    out, lse = zip(*parts, strict=True)
    lse = torch.cat(lse, dim=2).to(torch.promote_types(qkv.dtype, torch.float32))
    return reference.join_heads(out).contiguous(), lse.contiguous()


def emha_backward(grad_out, qkv, out, lse, heads, length, tf32):
    step = _flash_gradients if qkv.device.type == "cpu" else _plain_gradients
    return step(grad_out.to(qkv.dtype), qkv, out, lse, heads, length)


def _per_head(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)  # [N, heads, T, D]


def _flash_gradients(grad_out, qkv, out, lse, heads, length):
    grads = []
    for start in range(0, qkv.shape[1], length):
        part = slice(start, start + length)
        q, k, v = reference.split_heads(qkv[:, part], heads)
        found = _flash_backward(
            *(_per_head(grad_out[:, part], heads).contiguous(), q, k, v),
            *(_per_head(out[:, part], heads), lse[:, :, part].contiguous(), 0.0, False),
        )
        grads.append(torch.stack(found, dim=2))  # [N, heads, 3, T, D]
    return torch.cat(grads, dim=3).permute(0, 3, 2, 1, 4).flatten(2)


def _plain_gradients(grad_out, qkv, out, lse, heads, length):
    grad_qkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_q, grad_k, grad_v = reference.split_heads(grad_qkv, heads)
    grad_out, out = _per_head(grad_out, heads), _per_head(out, heads)
    delta = (grad_out * out).sum(-1, keepdim=True)
    for rows, scores, q, k, v in reference.score_blocks(qkv, heads, length):
        start = rows.start - rows.start % length
        keys = slice(start, start + k.shape[2])
        p = (scores - lse[:, :, rows, None].to(qkv.dtype)).exp()
        grad_p = grad_out[:, :, rows] @ v.transpose(-2, -1)
        grad_s = p * (grad_p - delta[:, :, rows]) * q.shape[-1] ** -0.5
        grad_q[:, :, rows] = grad_s @ k
        grad_k[:, :, keys] += grad_s.transpose(-2, -1) @ q
        grad_v[:, :, keys] += p.transpose(-2, -1) @ grad_out[:, :, rows]
    return grad_qkv


def _as(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [w.to(x.dtype) for w in weights]


def _like(grads: Sequence[Tensor], *weights: Tensor) -> list[Tensor]:
    """Gradients in the dtypes of their weights, contiguous."""
    return [g.to(w.dtype).contiguous() for g, w in zip(grads, weights, strict=True)]


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight of `F.linear`."""
    return grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)


def _norm_backward(grad, t, gamma, beta, mean, rstd):
    return torch.ops.aten.native_layer_norm_backward(
        grad, t, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
    )


def _fold(grad: Tensor, x: Tensor) -> Tensor:
    return nhwc_strides(reference.fold(grad, x.shape[2:]))


def token_qkv(x, gamma, beta, reduce, qkv, eps, tf32):
    return reference.token_qkv(x, *_as(x, gamma, beta, reduce, qkv), eps=eps)


def token_qkv_backward(grad, x, gamma, beta, reduce, qkv, eps, tf32):
    g, b, inner, outer = _as(x, gamma, beta, reduce, qkv)
    t = reference.unfold(x)
    norm, mean, rstd = torch.native_layer_norm(t, g.shape, g, b, eps)
    grad, grad_qkv = _linear_backward(grad, F.linear(norm, inner), outer)
    grad, grad_reduce = _linear_backward(grad, norm, inner)
    grad, grad_gamma, grad_beta = _norm_backward(grad, t, g, b, mean, rstd)
    grads = grad_gamma, grad_beta, grad_reduce, grad_qkv
    return _fold(grad, x), *_like(grads, gamma, beta, reduce, qkv)


def token_hidden(x, a, proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias, eps, tf32):
    weights = _as(x, proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias)
    return reference.token_hidden(x, a, *weights, eps=eps)


def token_hidden_backward(
    grad, x, a, h, proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias, eps, tf32
):
    params = proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias
    proj, offset, g, b, fc1, _ = _as(x, *params)
    t = reference.unfold(x) + F.linear(a, proj, offset)
    norm, mean, rstd = torch.native_layer_norm(t, g.shape, g, b, eps)
    grad = relu_backward(h, grad)
    grad_offset1 = grad.sum((0, 1))
    grad, grad_fc1 = _linear_backward(grad, norm, fc1)
    grad, grad_gamma, grad_beta = _norm_backward(grad, t, g, b, mean, rstd)
    grad_a, grad_proj = _linear_backward(grad, a, proj)
    grads = grad_proj, grad.sum((0, 1)), grad_gamma, grad_beta, grad_fc1, grad_offset1
    return _fold(grad, x), grad_a, *_like(grads, *params)


def token_fold(x, a, h, proj_weight, proj_bias, fc2_weight, fc2_bias, mean, tf32):
    weights = _as(x, proj_weight, proj_bias, fc2_weight, fc2_bias)
    return nhwc_strides(reference.token_fold(x, a, h, *weights, mean=mean))


def token_fold_backward(grad, a, h, proj_weight, proj_bias, fc2_weight, fc2_bias, mean, tf32):
    proj, fc2 = _as(grad, proj_weight, fc2_weight)
    count = reference.overlap_count(grad)
    tokens = reference.unfold(grad / count if mean else grad)
    grad_a, grad_proj = _linear_backward(tokens, a, proj)
    grad_h, grad_fc2 = _linear_backward(tokens, h, fc2)
    total = tokens.sum((0, 1))
    grads = _like(
        (grad_proj, total, grad_fc2, total.clone()), proj_weight, proj_bias, fc2_weight, fc2_bias
    )
    # fold(unfold(x)) = count x; a clone, for an op must not return its argument
    grad_x = nhwc_strides(grad.clone() if mean else grad * count)
    return grad_x, grad_a, grad_h, *grads
