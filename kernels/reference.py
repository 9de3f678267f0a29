"""Backend `reference`: the ops through PyTorch's own kernels, on any device, in any float dtype.

Forward ops call `efrdn_fast.reference`; backward ops recompute what they need from the input.
Weights are cast to the dtype of the map; results are NHWC memory like those of every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference

__all__ = [
    "acrb",
    "acrb_backward",
    "acrb_out",
    "conv3x3",
    "conv3x3_backward",
    "conv_backward",
    "gcrb",
    "gcrb_backward",
    "gcrb_chain",
    "gcrb_train",
    "gcrb_train_backward",
    "nhwc_strides",
    "relu_backward",
    "unless_few",
]


FEW_VALUES = 32


def unless_few(plain: Callable) -> Callable[[Callable], Callable]:
    """Of a kernel of `gcrb_train` or its backward: batches of few values go to `plain`, of here.

    Of two values BatchNorm makes -1 and 1 whatever they are, if mean and variance are those of the
    very values that it normalises, and its gradient cancels. The fused kernels know the statistics
    more exactly and the values by another route; the difference, of rounding, is divided by the
    deviation: of two values by up to 23 times the tolerance, in gradients by 300 times. In 40 draws
    the result was within it from 24 values on.
    """

    def wrap(kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def serve(first: Tensor, *args):  # x, or the gradient of y, which is of its size
            few = first.shape[0] * first.shape[2] * first.shape[3] < FEW_VALUES
            return (plain if few else kernel)(first, *args)

        return serve

    return wrap


def nhwc_strides(y: Tensor) -> Tensor:
    """`y` in NHWC memory, with the strides of `memory_format=channels_last` at any size."""
    _, c, h, w = y.shape
    if y.stride() == (c * h * w, 1, w * c, c):
        return y
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int = 1, padding: int = 0
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [1, 1],
        [padding] * 2,
        [1, 1],
        False,
        [0, 0],
        groups,
        [True, True, False],
    )
    return grad_x, grad_weight.contiguous()  # oneDNN gives NHWC memory where the maps have it


def relu_backward(gate: Tensor, grad: Tensor) -> Tensor:
    """`grad` in front of a ReLU; `gate`: its argument or its result. A NaN there passes it."""
    return torch.ops.aten.threshold_backward(grad, gate, 0)


def _channel_sum(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum((0, 2, 3), dtype=like.dtype)


def gcrb(x, w1, b1, w2, b2, w3, b3, groups):
    params = [p.to(x.dtype) for p in (w1, b1, w2, b2, w3, b3)]
    return nhwc_strides(reference.gcrb(x, *params, groups=groups))


def gcrb_backward(grad_y, x, w1, b1, w2, b2, w3, b3, groups):
    v1, c1, v2, c2, v3, c3 = (p.to(x.dtype) for p in (w1, b1, w2, b2, w3, b3))
    mid = v2.shape[0]
    a1 = F.relu(F.conv2d(x, v1, c1, groups=groups))
    a2 = F.relu(F.conv2d(a1, v2, c2, padding=1, groups=mid))
    g3 = relu_backward(F.conv2d(a2, v3, c3, groups=groups), grad_y)
    g2, grad_w3 = conv_backward(g3, a2, v3, groups)
    g2 = relu_backward(a2, g2)
    g1, grad_w2 = conv_backward(g2, a1, v2, mid, padding=1)
    g1 = relu_backward(a1, g1)
    g0, grad_w1 = conv_backward(g1, x, v1, groups)
    return (
        nhwc_strides(grad_y + g0),
        grad_w1.to(w1.dtype),
        _channel_sum(g1, b1),
        grad_w2.to(w2.dtype),
        _channel_sum(g2, b2),
        grad_w3.to(w3.dtype),
        _channel_sum(g3, b3),
    )


def gcrb_chain(x, params, groups):
    params = [p.to(x.dtype) for p in params]
    return tuple(map(nhwc_strides, reference.gcrb_chain(x, params, groups=groups)))


def gcrb_train(x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3, groups, eps):
    params = _batch_params(x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3)
    y, mean, var = reference.gcrb_train(x, *params, groups=groups, eps=eps)
    return nhwc_strides(y), mean, var


def _batch_params(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Weights in the dtype of `x`, gammas and betas in that of the statistics: float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(p.to(wide if i % 3 else x.dtype) for i, p in enumerate(params))


def gcrb_train_backward(
    grad_y, x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3, mean, var, groups, eps
):
    params = w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3
    v1, gamma1, beta1, v2, gamma2, beta2, v3, gamma3, beta3 = _batch_params(x, *params)
    mid = v2.shape[0]

    # Statistics anew, not those saved: of few values the gradient cancels but for the rounding of
    # mean and deviation, so they must be those of the very values here.
    def norm(z, gamma, beta):
        return torch.native_batch_norm(z, gamma, beta, None, None, True, 0.0, eps)

    def norm_backward(grad, z, gamma, stats):
        return torch.ops.aten.native_batch_norm_backward(
            grad, z, gamma, None, None, *stats, True, eps, [True, True, True]
        )

    z1 = F.conv2d(x, v1, groups=groups)
    y1, *stats1 = norm(z1, gamma1, beta1)
    a1 = F.relu(y1)
    z2 = F.conv2d(a1, v2, padding=1, groups=mid)
    y2, *stats2 = norm(z2, gamma2, beta2)
    a2 = F.relu(y2)
    z3 = F.conv2d(a2, v3, groups=groups)
    y3, *stats3 = norm(z3, gamma3, beta3)
    g3, grad_gamma3, grad_beta3 = norm_backward(relu_backward(y3, grad_y), z3, gamma3, stats3)
    g2, grad_w3 = conv_backward(g3, a2, v3, groups)
    g2, grad_gamma2, grad_beta2 = norm_backward(relu_backward(a2, g2), z2, gamma2, stats2)
    g1, grad_w2 = conv_backward(g2, a1, v2, mid, padding=1)
    g1, grad_gamma1, grad_beta1 = norm_backward(relu_backward(a1, g1), z1, gamma1, stats1)
    g0, grad_w1 = conv_backward(g1, x, v1, groups)
    grads = (
        *(grad_w1, grad_gamma1, grad_beta1),
        *(grad_w2, grad_gamma2, grad_beta2),
        *(grad_w3, grad_gamma3, grad_beta3),
    )
    return nhwc_strides(grad_y + g0), *(g.to(p.dtype) for g, p in zip(grads, params, strict=True))


def acrb(x, weight, bias, start):
    return nhwc_strides(reference.acrb(x, weight.to(x.dtype), bias.to(x.dtype), start=start))


def acrb_out(x, weight, bias, start, out, out_start):
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    reference.acrb_out(x, weight, bias, out, start=start, out_start=out_start)


def acrb_backward(grad_y, x, weight, bias, start):
    v, c = weight.to(x.dtype), bias.to(x.dtype)
    s = x.narrow(1, start, v.shape[0])
    g = relu_backward(F.conv2d(s, v, c, padding=1), grad_y)
    grad_s, grad_weight = conv_backward(g, s, v, padding=1)
    grad_x = torch.zeros_like(x, memory_format=torch.channels_last)
    grad_x.narrow(1, start, v.shape[0]).copy_(grad_s).add_(grad_y)
    return grad_x, grad_weight.to(weight.dtype), _channel_sum(g, bias)


def conv3x3(xs, weight, bias, residual, groups, relu, interleaved):
    dtype = xs[0].dtype
    y = reference.conv3x3(
        xs,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        residual=residual,
        groups=groups,
        relu=relu,
        interleaved=interleaved,
    )
    return nhwc_strides(y)


def conv3x3_backward(grad, xs, weight, groups, interleaved):
    x, v = reference.join(xs, interleaved), weight.to(grad.dtype)
    grad_x, grad_weight = conv_backward(grad, x, v, groups, padding=1)
    return nhwc_strides(grad_x), grad_weight.to(weight.dtype)
