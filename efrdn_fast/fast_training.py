"""Forward of a network in training mode on fused ops; gradients and statistics are EFRDN's.

GCRB runs as one op over batch statistics, the three branches of an ACRB as the one convolution
that they equal, 1x1 convolutions as matrix products on NHWC memory, and the transformer on tokens
whose order (tap-major) is that of NHWC memory. Blocks that an ablation replaced run as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks, functional, reference
from .model import EFRDN
from .tokens import fold, nhwc, unfold
from .transformer import TransformerBlock

__all__ = ["train_forward"]


def train_forward(net: EFRDN, x: Tensor, backend: str = "auto") -> Tensor:
    """`EFRDN.forward` of a network all of whose modules are in training mode.

    Args:
        x: `[N, 3, H, W]`, checked.
        backend: Of the ops of `functional`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    shallow = net.head(x)
    features = total = shallow
    for i, gconv in enumerate(net.gconv):
        use, which = divmod(i, len(net.acdm))
        body = _acdm(net.acdm[which], features, use, backend)
        features = _gconv(gconv, body + total if net.cnn_dense else body)
        total = total + features
    c_out = total if net.cnn_dense else features + shallow
    t_out1 = net.tconv[0](_transformer(net.trans[0], c_out))
    t_add1 = t_out1 + c_out if net.transformer_dense else t_out1
    t_out2 = net.tconv[1](_transformer(net.trans[1], t_add1))
    t_add2 = t_out2 + shallow
    if net.transformer_dense:
        t_add2 = t_out1 + c_out + t_add2
    return net.reconstruct_deep(t_add2) + net.reconstruct_shallow(shallow)


def _conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(nhwc(x), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def _gcrb(block: nn.Module, x: Tensor, use: int, backend: str) -> Tensor:
    if not isinstance(block, blocks.GCRB):
        return block(x, use)
    norms = block.bn1, block.bn2, block.bn3
    convs = block.squeeze, block.depthwise, block.expand
    weights = [w for c, n in zip(convs, norms, strict=True) for w in (c.weight, n.weight, n.bias)]
    return functional.gcrb_train(
        x,
        *weights,
        [n.running_mean[use] for n in norms],
        [n.running_var[use] for n in norms],
        groups=block.squeeze.groups,
        momentum=block.bn1.momentum,
        eps=block.bn1.eps,
        backend=backend,
    )


def _acrb(block: nn.Module, x: Tensor, start: int, use: int, backend: str) -> Tensor:
    """ACRB of the channels from `start` on."""
    if not isinstance(block, blocks.ACRB):
        return block(x[:, start:], use)
    norm = block.bn
    return functional.acrb_train(
        x,
        block.conv1x3.weight,
        block.conv3x3.weight,
        block.conv3x1.weight,
        norm.weight,
        norm.bias,
        norm.running_mean[use],
        norm.running_var[use],
        start=start,
        momentum=norm.momentum,
        eps=norm.eps,
        backend=backend,
    )


def _acdm(block: nn.Module, x: Tensor, use: int, backend: str) -> Tensor:
    """Eqs. 17-27."""
    if not isinstance(block, blocks.ACDM):
        return block(x, use)
    remaining = block.widths[0]
    t, kept = x, []
    for refine, acrb, fflb in zip(block.refine, block.acrb, block.fflb, strict=True):
        kept.append(_acrb(acrb, t, remaining, use, backend))
        t = _fflb(fflb, refine(t[:, :remaining]), use, backend)
    kept.append(block.conv4(t))
    y = block.fuse(torch.cat(kept, dim=1))
    if isinstance(block.mscc, blocks.MSCC):
        y = _self_calibrated(block.mscc.scca, _self_calibrated(block.mscc.scsa, y))
    return y + x


def _fflb(block: nn.Module, e: Tensor, use: int, backend: str) -> Tensor:
    """Eqs. 10-16."""
    if not isinstance(block, blocks.FFLB):
        return block(e, use)
    low = _esa(block.esa1, _gcrb(block.gcrb1, e, use, backend))
    upper1 = _calibrate(block.cc_b1, e, low)
    lower1 = _calibrate(block.cc_a1, low, e)
    up = _esa(block.esa2, _gcrb(block.gcrb2, upper1, use, backend))
    upper2 = _calibrate(block.cc_b2, up, lower1)
    lower2 = _calibrate(block.cc_a2, lower1, up)
    mixed = block.branch_weight[0] * upper2 + block.branch_weight[1] * lower2
    return e + _effb(block.effb, mixed, use, backend)


def _effb(block: nn.Module, e: Tensor, use: int, backend: str) -> Tensor:
    if not isinstance(block, blocks.EFFB):
        return block(e, use)
    g1 = _gcrb(block.gcrb1, e, use, backend)
    g2 = _gcrb(block.gcrb2, g1, use, backend)
    g3 = _gcrb(block.gcrb3, g2, use, backend)
    m = _self_calibrated(block.scsa, block.fuse12(_interleave(g1, g2)))
    return _self_calibrated(block.scca, block.fuse3(m + g3))


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack((nhwc(a), nhwc(b)), dim=-1).flatten(3).permute(0, 3, 1, 2)


def _self_calibrated(block: blocks.SelfCalibrated, x: Tensor) -> Tensor:
    left, right = _conv1x1(block.split, x).chunk(2, dim=1)
    right = F.relu(block.context(right))
    return x + block.merge(_interleave(block.attention(left), right))


def _esa(block: blocks.ESA, x: Tensor) -> Tensor:
    a = _conv1x1(block.reduce, x)
    b = block.down(a)
    b = F.max_pool2d(b, min(7, b.shape[2], b.shape[3]), stride=3)
    b = block.deep3(F.relu(block.deep2(F.relu(block.deep1(b)))))
    b = F.interpolate(b, size=x.shape[2:], mode="bilinear", align_corners=False)
    return x * torch.sigmoid(_conv1x1(block.expand, b + _conv1x1(block.skip, a)))


def _calibrate(block: nn.Module, base: Tensor, x: Tensor) -> Tensor:
    """`base + CC(x)`."""
    return base + block(x)


def _gconv(block: blocks.GConv, x: Tensor) -> Tensor:
    return _conv1x1(block.pointwise, block.depthwise(x))


def _tap_major(weight: Tensor, dim: int = 0) -> Tensor:
    """Reorder 9 C values of a token along `dim` from channel-major to tap-major."""
    channels = weight.shape[dim] // 9
    return weight.unflatten(dim, (channels, 9)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _transformer(block: TransformerBlock, x: Tensor) -> Tensor:
    """Eqs. 28-30."""
    emha, mlp = block.emha, block.mlp
    t = unfold(x)

    def normalise(norm: nn.LayerNorm, t: Tensor) -> Tensor:
        weight, bias = _tap_major(norm.weight), _tap_major(norm.bias)
        return F.layer_norm(t, weight.shape, weight, bias, norm.eps)

    qkv = F.linear(normalise(block.norm1, t), _tap_major(emha.reduce.weight, 1))
    qkv = F.linear(qkv, emha.qkv.weight)
    attention = emha.attention
    if attention is reference.emha:  # nothing else was asked for by `set_attention`
        attention = reference.emha_sdpa
    y = attention(qkv, emha.heads, emha.segment_length(t.shape[1]))
    t = t + F.linear(y, _tap_major(emha.proj.weight), _tap_major(emha.proj.bias))  # (28)
    y = F.linear(normalise(block.norm2, t), _tap_major(mlp.fc1.weight, 1), mlp.fc1.bias)
    y = F.linear(F.relu(y), _tap_major(mlp.fc2.weight), _tap_major(mlp.fc2.bias))
    return fold(t + y, x.shape, block.fold == "mean")  # (29)
