"""Backend `reference` of the ops of `fusion` and `tokens`: plain PyTorch, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["calibrate", "fold", "merge3x3", "sigmoid_gate", "unfold"]


def merge3x3(a, b, gate, relu, weight, residual, groups):
    y = a if gate is None else a * torch.sigmoid(gate)
    if b is not None:
        b = F.relu(b) if relu else b
        pair = y.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
        y = torch.stack(pair, dim=-1).flatten(3).permute(0, 3, 1, 2)
    y = F.conv2d(y, weight.to(y.dtype), padding=1, groups=groups)
    return y if residual is None else residual + y


def calibrate(base, x, w1, b1, w2, b2):
    w1, b1, w2, b2 = (w.to(x.dtype) for w in (w1, b1, w2, b2))
    mean = x.mean(dim=(2, 3), keepdim=True)
    std = ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()
    both = torch.stack((mean, std)).flatten(2)  # [2, N, C]
    gates = torch.sigmoid(F.linear(F.relu(F.linear(both, w1.flatten(1), b1)), w2.flatten(1), b2))
    return base + x * gates.mean(dim=0)[:, :, None, None]


def sigmoid_gate(x, logits):
    return x * torch.sigmoid(logits)


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
    y = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)
