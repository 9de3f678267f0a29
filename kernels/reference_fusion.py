"""Backend `reference` of the ops of `fusion` and `tokens`: plain PyTorch, NHWC memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reference import conv_backward, nhwc_strides, relu_backward

__all__ = [
    "calibrate",
    "calibrate_backward",
    "fold",
    "merge3x3",
    "merge3x3_backward",
    "sigmoid_gate",
    "sigmoid_gate_backward",
    "unfold",
]


def _joined(a, b, gate, relu):
    """`interleave(a sigmoid(gate), relu(b))`."""
    y = a if gate is None else a * torch.sigmoid(gate)
    if b is None:
        return y
    b = F.relu(b) if relu else b
    pair = y.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.stack(pair, dim=-1).flatten(3).permute(0, 3, 1, 2)


def merge3x3(a, b, gate, residual, weight, relu, groups):
    y = _joined(a, b, gate, relu)
    y = F.conv2d(y, weight.to(y.dtype), padding=1, groups=groups)
    return nhwc_strides(y if residual is None else residual + y)


def merge3x3_backward(grad, a, b, gate, weight, relu, groups):
    y = _joined(a, b, gate, relu)
    grad_y, grad_weight = conv_backward(grad, y, weight.to(y.dtype), groups, padding=1)
    grad_b, grad_gate = (a.new_empty(0, dtype=torch.float32) for _ in range(2))
    if b is not None:
        grad_y, grad_b = grad_y[:, 0::2], grad_y[:, 1::2]
        grad_b = relu_backward(b, grad_b) if relu else grad_b
        grad_b = nhwc_strides(grad_b)
    if gate is not None:
        open_ = torch.sigmoid(gate)
        grad_gate = (grad_y * a).sum_to_size(gate.shape) * open_ * (1 - open_)
        grad_gate, grad_y = grad_gate.to(gate.dtype).contiguous(), grad_y * open_
    return nhwc_strides(grad_y), grad_b, grad_gate, grad_weight.to(weight.dtype)


def _gates(statistics, w1, b1, w2, b2):
    """Hidden values `[N, 2, M]` and gates `[N, 2, C]` of the bottleneck for both statistics."""
    hidden = F.relu(F.linear(statistics, w1.flatten(1), b1))
    return hidden, torch.sigmoid(F.linear(hidden, w2.flatten(1), b2))


def calibrate(base, x, w1, b1, w2, b2):
    mean = x.mean(dim=(2, 3))
    std = ((x - mean[:, :, None, None]).square().mean(dim=(2, 3)) + 1e-6).sqrt()
    statistics = torch.stack((mean, std), dim=1)
    _, gates = _gates(statistics, *(w.to(x.dtype) for w in (w1, b1, w2, b2)))
    y = base + x * gates.mean(dim=1)[:, :, None, None]
    return nhwc_strides(y), statistics.to(torch.promote_types(x.dtype, torch.float32))


def calibrate_backward(grad, x, w1, b1, w2, b2, statistics):
    weights = [w.to(statistics.dtype) for w in (w1, b1, w2, b2)]
    hidden, gates = _gates(statistics, *weights)
    inner = (grad * x).sum(dim=(2, 3), dtype=statistics.dtype)[:, None] / 2
    grad_out = inner * gates * (1 - gates)  # [N, 2, C]
    grad_hidden = relu_backward(hidden, grad_out @ weights[2].flatten(1))
    grad_mean, grad_std = (grad_hidden @ weights[0].flatten(1)).unbind(1)
    mean, std = statistics.unbind(1)
    slope = grad_std / (std * x.shape[2] * x.shape[3])
    offset = grad_mean / (x.shape[2] * x.shape[3])
    factors = (gates.mean(dim=1), slope, mean, offset)
    scale, slope, mean, offset = (f.to(x.dtype)[:, :, None, None] for f in factors)
    grads = (
        grad_hidden.flatten(0, 1).T @ statistics.flatten(0, 1),
        grad_hidden.sum(dim=(0, 1)),
        grad_out.flatten(0, 1).T @ hidden.flatten(0, 1),
        grad_out.sum(dim=(0, 1)),
    )
    grads = (g.view_as(w).to(w.dtype) for g, w in zip(grads, (w1, b1, w2, b2), strict=True))
    return nhwc_strides(grad * scale + (x - mean) * slope + offset), *grads


def sigmoid_gate(x, logits):
    return nhwc_strides(x * torch.sigmoid(logits))


def sigmoid_gate_backward(grad, x, logits):
    open_ = torch.sigmoid(logits)
    return nhwc_strides(grad * open_), nhwc_strides(grad * x * open_ * (1 - open_))


def unfold(x):
    n, channels, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    taps = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # [N, H, W, C, 3, 3]
    return taps.permute(0, 1, 2, 4, 5, 3).reshape(n, height * width, 9 * channels)


def fold(t, height, width):
    n, channels = t.shape[0], t.shape[2] // 9
    t = t.reshape(n, height, width, 9, channels)
    padded = t.new_zeros(n, height + 2, width + 2, channels)
    for tap in range(9):
        i, j = divmod(tap, 3)
        padded[:, i : i + height, j : j + width] += t[:, :, :, tap]
    return nhwc_strides(padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2))
