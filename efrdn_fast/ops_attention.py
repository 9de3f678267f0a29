"""`torch.ops.efrdn_fast`: attention and the parts of the transformer block, as `ops` has the rest.

Tokens are `[N, T, width]`, contiguous where an op returns them; maps are NHWC memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import NAMESPACE, backward_backend, nhwc_like, plain, register

__all__ = ["ATTENTION_SCHEMAS", "NAMESPACE"]

_HIDDEN = (
    "Tensor proj_weight, Tensor proj_bias, Tensor gamma, Tensor beta, Tensor fc1_weight, "
    "Tensor fc1_bias, float eps, bool tf32, str backend"
)
_FOLD = (
    "Tensor proj_weight, Tensor proj_bias, Tensor fc2_weight, Tensor fc2_bias, bool mean, "
    "bool tf32, str backend"
)
_QKV = "Tensor gamma, Tensor beta, Tensor reduce, Tensor qkv, float eps, bool tf32, str backend"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


ATTENTION_SCHEMAS = {
    "emha": "(Tensor qkv, int heads, SymInt length, bool tf32, str backend) -> (Tensor, Tensor)",
    "emha_backward": "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int heads, "
    "SymInt length, bool tf32, str backend) -> Tensor",
    "token_qkv": f"(Tensor x, {_QKV}) -> Tensor",
    "token_qkv_backward": f"(Tensor grad, Tensor x, {_QKV}) -> {_tensors(5)}",
    "token_hidden": f"(Tensor x, Tensor a, {_HIDDEN}) -> Tensor",
    # h: the result of the forward op, whose sign is that of the ReLU
    "token_hidden_backward": f"(Tensor grad, Tensor x, Tensor a, Tensor h, {_HIDDEN})"
    f" -> {_tensors(8)}",
    "token_fold": f"(Tensor x, Tensor a, Tensor h, {_FOLD}) -> Tensor",
    "token_fold_backward": f"(Tensor grad, Tensor a, Tensor h, {_FOLD}) -> {_tensors(7)}",
}


def _fake_emha(qkv, heads, length, tf32, backend):
    n, tokens, width = qkv.shape
    lse = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(n, tokens, width // 3), qkv.new_empty(n, heads, tokens, dtype=lse)


def _fake_emha_backward(grad_out, qkv, *rest):
    return plain(qkv)


def _tokens(x: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2] * x.shape[3], width)


def _fake_token_qkv(x, gamma, beta, reduce, qkv, *rest):
    return _tokens(x, qkv.shape[0])


def _fake_token_qkv_backward(grad, x, gamma, beta, reduce, qkv, *rest):
    return nhwc_like(x, x.shape[1]), *map(plain, (gamma, beta, reduce, qkv))


def _fake_token_hidden(x, a, proj_weight, proj_bias, gamma, beta, fc1_weight, *rest):
    return _tokens(x, fc1_weight.shape[0])


def _fake_token_hidden_backward(grad, x, a, h, *rest):
    return nhwc_like(x, x.shape[1]), plain(a), *map(plain, rest[:6])


def _fake_token_fold(x, *rest):
    return nhwc_like(x, x.shape[1])


def _fake_token_fold_backward(grad, a, h, *rest):
    return nhwc_like(grad, grad.shape[1]), plain(a), plain(h), *map(plain, rest[:4])


def _save_emha(ctx, inputs, output):
    qkv, ctx.heads, ctx.length, ctx.tf32, backend = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)
    backward_backend(ctx, "emha_backward", backend, qkv)


def _emha_backward(ctx, grad_out, grad_lse):
    grad = torch.ops.efrdn_fast.emha_backward(
        grad_out, *ctx.saved_tensors, ctx.heads, ctx.length, ctx.tf32, ctx.backend
    )
    return grad, None, None, None, None


def _save_token_qkv(ctx, inputs, output):
    *tensors, ctx.eps, ctx.tf32, backend = inputs
    ctx.save_for_backward(*tensors)
    backward_backend(ctx, "token_qkv_backward", backend, tensors[0])


def _token_qkv_backward(ctx, grad):
    grads = torch.ops.efrdn_fast.token_qkv_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.tf32, ctx.backend
    )
    return *grads, None, None, None


def _save_token_hidden(ctx, inputs, output):
    x, a, *weights, ctx.eps, ctx.tf32, backend = inputs
    ctx.save_for_backward(x, a, output, *weights)
    backward_backend(ctx, "token_hidden_backward", backend, x)


def _token_hidden_backward(ctx, grad):
    grads = torch.ops.efrdn_fast.token_hidden_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.tf32, ctx.backend
    )
    return *grads, None, None, None


def _save_token_fold(ctx, inputs, output):
    x, *tensors, ctx.mean, ctx.tf32, backend = inputs
    ctx.save_for_backward(*tensors)
    backward_backend(ctx, "token_fold_backward", backend, x)


def _token_fold_backward(ctx, grad):
    grads = torch.ops.efrdn_fast.token_fold_backward(
        grad, *ctx.saved_tensors, ctx.mean, ctx.tf32, ctx.backend
    )
    return *grads, None, None, None


_FAKES = {
    "emha": _fake_emha,
    "emha_backward": _fake_emha_backward,
    "token_qkv": _fake_token_qkv,
    "token_qkv_backward": _fake_token_qkv_backward,
    "token_hidden": _fake_token_hidden,
    "token_hidden_backward": _fake_token_hidden_backward,
    "token_fold": _fake_token_fold,
    "token_fold_backward": _fake_token_fold_backward,
}
_AUTOGRAD = {
    "emha": (_emha_backward, _save_emha),
    "token_qkv": (_token_qkv_backward, _save_token_qkv),
    "token_hidden": (_token_hidden_backward, _save_token_hidden),
    "token_fold": (_token_fold_backward, _save_token_fold),
}
_MAPS = {"token_hidden": 2, "token_fold": 3}

for _op, _schema in ATTENTION_SCHEMAS.items():
    register(_op, _schema, _FAKES[_op], _AUTOGRAD.get(_op), _MAPS.get(_op, 1))
