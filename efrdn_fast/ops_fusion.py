"""`torch.ops.efrdn_fast`: merges, gates and tokens of `fusion` and `tokens`, as `ops` has the rest.

Autocast leaves `unfold` and `fold` alone, as it does PyTorch's: they compute nothing.
"""

from __future__ import annotations

import torch

from .ops import NAMESPACE, backward_backend, nhwc_like, plain, register

__all__ = ["FUSION_SCHEMAS", "NAMESPACE"]

_BOTTLENECK = "Tensor w1, Tensor b1, Tensor w2, Tensor b2"
FUSION_SCHEMAS = {
    "merge3x3": "(Tensor a, Tensor? b, Tensor? gate, Tensor? residual, Tensor weight, bool relu, "
    "int groups, str backend) -> Tensor",
    # gradients of a, b, gate and weight; of what is not there, an empty tensor
    "merge3x3_backward": "(Tensor grad, Tensor a, Tensor? b, Tensor? gate, Tensor weight, "
    "bool relu, int groups, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    # statistics: mean and deviation of x, [N, 2, C]
    "calibrate": f"(Tensor base, Tensor x, {_BOTTLENECK}, str backend) -> (Tensor, Tensor)",
    "calibrate_backward": f"(Tensor grad, Tensor x, {_BOTTLENECK}, Tensor statistics, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sigmoid_gate": "(Tensor x, Tensor logits, str backend) -> Tensor",
    "sigmoid_gate_backward": "(Tensor grad, Tensor x, Tensor logits, str backend)"
    " -> (Tensor, Tensor)",
    "unfold": "(Tensor x, str backend) -> Tensor",
    "fold": "(Tensor t, SymInt height, SymInt width, str backend) -> Tensor",
}


def _fake_merge3x3(a, b, gate, residual, weight, *rest):
    return nhwc_like(a, weight.shape[0])


def _fake_merge3x3_backward(grad, a, b, gate, weight, *rest):
    grad_a = nhwc_like(a, a.shape[1])
    none = (a.new_empty(0, dtype=torch.float32) for _ in range(2))
    grad_b = next(none) if b is None else nhwc_like(b, b.shape[1])
    grad_gate = next(none) if gate is None else plain(gate)
    return grad_a, grad_b, grad_gate, plain(weight)


def _fake_calibrate(base, x, *rest):
    wide = torch.promote_types(x.dtype, torch.float32)
    return nhwc_like(x, x.shape[1]), x.new_empty(x.shape[0], 2, x.shape[1], dtype=wide)


def _fake_calibrate_backward(grad, x, *rest):
    return nhwc_like(x, x.shape[1]), *map(plain, rest[:4])


def _fake_sigmoid_gate(x, *rest):
    return nhwc_like(x, x.shape[1])


def _fake_sigmoid_gate_backward(grad, x, *rest):
    return nhwc_like(x, x.shape[1]), nhwc_like(x, x.shape[1])


def _fake_unfold(x, backend):
    n, channels, height, width = x.shape
    return x.new_empty(n, height * width, 9 * channels)


def _fake_fold(t, height, width, backend):
    return nhwc_like(t.new_empty(t.shape[0], 1, height, width), t.shape[2] // 9)


def _save_merge3x3(ctx, inputs, output):
    a, b, gate, residual, weight, ctx.relu, ctx.groups, backend = inputs
    ctx.save_for_backward(a, b, gate, weight)
    ctx.added = residual is not None
    backward_backend(ctx, "merge3x3_backward", backend, a)


def _merge3x3_backward(ctx, grad):
    a, b, gate, weight = ctx.saved_tensors
    grad_a, grad_b, grad_gate, grad_weight = torch.ops.efrdn_fast.merge3x3_backward(
        grad, a, b, gate, weight, ctx.relu, ctx.groups, ctx.backend
    )
    return (
        grad_a,
        None if b is None else grad_b,
        None if gate is None else grad_gate,
        grad if ctx.added else None,
        grad_weight,
        *(None, None, None),
    )


def _save_calibrate(ctx, inputs, output):
    _, x, *weights, backend = inputs
    _, statistics = output
    ctx.save_for_backward(x, *weights, statistics)
    ctx.mark_non_differentiable(statistics)
    backward_backend(ctx, "calibrate_backward", backend, x)


def _calibrate_backward(ctx, grad, grad_statistics):
    grads = torch.ops.efrdn_fast.calibrate_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad, *grads, None


def _save_sigmoid_gate(ctx, inputs, output):
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    backward_backend(ctx, "sigmoid_gate_backward", backend, tensors[0])


def _sigmoid_gate_backward(ctx, grad):
    grads = torch.ops.efrdn_fast.sigmoid_gate_backward(grad, *ctx.saved_tensors, ctx.backend)
    return *grads, None


# The two sums over patches are each other's transpose, which is what their gradients are.
def _save_unfold(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.height, ctx.width = x.shape[2:]


def _unfold_backward(ctx, grad):
    return torch.ops.efrdn_fast.fold(grad, ctx.height, ctx.width, ctx.backend), None


def _save_fold(ctx, inputs, output):
    *_, ctx.backend = inputs


def _fold_backward(ctx, grad):
    return torch.ops.efrdn_fast.unfold(grad, ctx.backend), None, None, None


_FAKES = {
    "merge3x3": _fake_merge3x3,
    "merge3x3_backward": _fake_merge3x3_backward,
    "calibrate": _fake_calibrate,
    "calibrate_backward": _fake_calibrate_backward,
    "sigmoid_gate": _fake_sigmoid_gate,
    "sigmoid_gate_backward": _fake_sigmoid_gate_backward,
    "unfold": _fake_unfold,
    "fold": _fake_fold,
}
_AUTOGRAD = {
    "merge3x3": (_merge3x3_backward, _save_merge3x3),
    "calibrate": (_calibrate_backward, _save_calibrate),
    "sigmoid_gate": (_sigmoid_gate_backward, _save_sigmoid_gate),
    "unfold": (_unfold_backward, _save_unfold),
    "fold": (_fold_backward, _save_fold),
}
_MAPS = {"merge3x3": 4, "calibrate": 2, "sigmoid_gate": 2, "unfold": 0, "fold": 0}

for _op, _schema in FUSION_SCHEMAS.items():
    register(_op, _schema, _FAKES[_op], _AUTOGRAD.get(_op), _MAPS.get(_op, 1))
