"""Forward of a network on fused, differentiable ops; gradients and statistics are EFRDN's.

Every BatchNorm is as its mode says: GCRB runs as one op over batch statistics, or as one op with
the running ones folded in. The three branches of an ACRB are the one convolution that they equal,
1x1 convolutions matrix products on NHWC memory, and the tokens of the transformer in the order
(tap-major) of NHWC memory. Blocks that an ablation or a subclass replaced run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import attention, blocks, dispatch, functional, fusion, reparam, tokens
from .model import EFRDN
from .tokens import nhwc
from .transformer import TransformerBlock

__all__ = ["train_forward"]

OPS = (
    *("gcrb_train", "gcrb", "acrb", "conv3x3"),
    *("merge3x3", "calibrate", "sigmoid_gate", "unfold", *attention.PARTS),
)


def train_forward(net: EFRDN, x: Tensor, backend: str = "auto") -> Tensor:
    """`EFRDN.forward`, differentiable.

    Args:
        x: `[N, 3, H, W]`, checked.
        backend: The one that is named serves the ops that it has, the reference the others.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    plan = dispatch.plan(OPS, backend, torch.empty(0, dtype=dtype, device=x.device))
    return _Walk(plan).network(net, x.contiguous(memory_format=torch.channels_last))


def _conv1x1(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.linear(nhwc(x), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def _uniform(norms: list[blocks.BatchNorm]) -> bool:
    """Whether the norms are plain ones, of one mode."""
    return all(type(n) is blocks.BatchNorm and n.training == norms[0].training for n in norms)


def _tap_major(weight: Tensor, dim: int = 0) -> Tensor:
    """Reorder 9 C values of a token along `dim` from channel-major to tap-major."""
    channels = weight.shape[dim] // 9
    return weight.unflatten(dim, (channels, 9)).transpose(dim, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class _Walk:
    """The modules in the order of the paper, each through its op."""

    plan: Mapping[str, str]
    """Op -> backend."""

    def network(self, net: EFRDN, x: Tensor) -> Tensor:
        """Eqs. 1-9."""
        shallow = net.head(x)
        features = total = shallow
        for i, gconv in enumerate(net.gconv):
            use, which = divmod(i, len(net.acdm))
            body = self.acdm(net.acdm[which], features, use)
            depthwise = gconv.depthwise(body + total if net.cnn_dense else body)
            features = _conv1x1(gconv.pointwise, depthwise)
            total = total + features
        c_out = total if net.cnn_dense else features + shallow
        t_out1 = net.tconv[0](self.transformer(net.trans[0], c_out))
        t_add1 = t_out1 + c_out if net.transformer_dense else t_out1
        t_out2 = net.tconv[1](self.transformer(net.trans[1], t_add1))
        t_add2 = t_out2 + shallow
        if net.transformer_dense:
            t_add2 = t_out1 + c_out + t_add2
        return net.reconstruct_deep(t_add2) + net.reconstruct_shallow(shallow)

    def acdm(self, block: nn.Module, x: Tensor, use: int) -> Tensor:
        """Eqs. 17-27."""
        if not isinstance(block, blocks.ACDM):
            return block(x, use)
        remaining = block.widths[0]
        t, kept = x, []
        for refine, acrb, fflb in zip(block.refine, block.acrb, block.fflb, strict=True):
            kept.append(self.acrb(acrb, t, remaining, use))
            t = self.fflb(fflb, refine(t[:, :remaining]), use)
        kept.append(block.conv4(t))
        y = block.fuse(torch.cat(kept, dim=1))
        if isinstance(block.mscc, blocks.MSCC):
            y = self.self_calibrated(block.mscc.scca, self.self_calibrated(block.mscc.scsa, y))
        return y + x

    def gcrb(self, block: nn.Module, x: Tensor, use: int) -> Tensor:
        if not isinstance(block, blocks.GCRB):
            return block(x, use)
        norms = [block.bn1, block.bn2, block.bn3]
        groups = block.squeeze.groups
        if not _uniform(norms):
            return block(x, use)
        if not norms[0].training:
            folded = reparam.fold_gcrb(block, use)
            return functional.gcrb(x, *folded, groups=groups, backend=self.plan["gcrb"])
        convs = block.squeeze, block.depthwise, block.expand
        pairs = zip(convs, norms, strict=True)
        return functional.gcrb_train(
            x,
            *(w for conv, norm in pairs for w in (conv.weight, norm.weight, norm.bias)),
            [n.running_mean[use] for n in norms],
            [n.running_var[use] for n in norms],
            groups=groups,
            momentum=norms[0].momentum,
            eps=norms[0].eps,
            backend=self.plan["gcrb_train"],
        )

    def acrb(self, block: nn.Module, x: Tensor, start: int, use: int) -> Tensor:
        """ACRB of the channels from `start` on."""
        if not isinstance(block, blocks.ACRB) or not _uniform([block.bn]):
            return block(x[:, start:], use)
        norm = block.bn
        if not norm.training:
            folded = reparam.fold_acrb(block, use)
            return functional.acrb(x, *folded, start=start, backend=self.plan["acrb"])
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
            backend=self.plan["conv3x3"],
        )

    def fflb(self, block: nn.Module, e: Tensor, use: int) -> Tensor:
        """Eqs. 10-16."""
        if not isinstance(block, blocks.FFLB):
            return block(e, use)
        low = self.esa(block.esa1, self.gcrb(block.gcrb1, e, use))
        upper1 = self.calibrate(block.cc_b1, e, low)
        lower1 = self.calibrate(block.cc_a1, low, e)
        up = self.esa(block.esa2, self.gcrb(block.gcrb2, upper1, use))
        upper2 = self.calibrate(block.cc_b2, up, lower1)
        lower2 = self.calibrate(block.cc_a2, lower1, up)
        mixed = block.branch_weight[0] * upper2 + block.branch_weight[1] * lower2
        return e + self.effb(block.effb, mixed, use)

    def effb(self, block: nn.Module, e: Tensor, use: int) -> Tensor:
        if not isinstance(block, blocks.EFFB):
            return block(e, use)
        g1 = self.gcrb(block.gcrb1, e, use)
        g2 = self.gcrb(block.gcrb2, g1, use)
        g3 = self.gcrb(block.gcrb3, g2, use)
        m = self.self_calibrated(block.scsa, self.merge(block.fuse12, g1, g2))
        return self.self_calibrated(block.scca, self.merge(block.fuse3, m + g3))

    def merge(self, conv: nn.Conv2d, a: Tensor, b: Tensor | None = None, **options) -> Tensor:
        plan = self.plan["merge3x3"]
        backend = fusion.merge_backend(plan, conv.weight, conv.groups, b is not None)
        return fusion.merge3x3(a, conv.weight, b, groups=conv.groups, backend=backend, **options)

    def self_calibrated(self, block: blocks.SelfCalibrated, x: Tensor) -> Tensor:
        left, right = _conv1x1(block.split, x).chunk(2, dim=1)
        right = block.context(right)
        attention = block.attention
        if isinstance(attention, blocks.SpatialAttention):
            pooled = left.mean(dim=1, keepdim=True), left.amax(dim=1, keepdim=True)
            gate = attention.conv(torch.cat(pooled, dim=1))
        else:
            pooled = left.mean(dim=(2, 3))
            gate = F.relu(F.linear(pooled, attention.squeeze.weight.flatten(1)))
            gate = F.linear(gate, attention.excite.weight.flatten(1))[:, :, None, None]
        return self.merge(block.merge, left, right, gate=gate, relu=True, residual=x)

    def esa(self, block: blocks.ESA, x: Tensor) -> Tensor:
        a = _conv1x1(block.reduce, x)
        b = block.down(a)
        b = F.max_pool2d(b, min(7, b.shape[2], b.shape[3]), stride=3)
        b = block.deep3(F.relu(block.deep2(F.relu(block.deep1(b)))))
        b = F.interpolate(b, size=x.shape[2:], mode="bilinear", align_corners=False)
        logits = _conv1x1(block.expand, b + _conv1x1(block.skip, a))
        return fusion.sigmoid_gate(x, logits, backend=self.plan["sigmoid_gate"])

    def calibrate(self, block: nn.Module, base: Tensor, x: Tensor) -> Tensor:
        """`base + CC(x)`."""
        if not isinstance(block, blocks.CC):
            return base + block(x)
        convs = block.squeeze, block.excite
        weights = (w for conv in convs for w in (conv.weight, conv.bias))
        return fusion.calibrate(base, x, *weights, backend=self.plan["calibrate"])

    def transformer(self, block: nn.Module, x: Tensor) -> Tensor:
        """Eqs. 28-30."""
        if not isinstance(block, TransformerBlock):
            return block(x)
        emha, mlp, backend = block.emha, block.mlp, self.plan["unfold"]
        length = emha.segment_length(x.shape[2] * x.shape[3])
        plain = attention.is_plain(emha.attention)
        if plain and attention.is_fused(block, self.plan):
            return attention.planned_block(
                *(x, attention.weights_of(block), emha.heads, length),
                **{"eps": block.norm1.eps, "mean": block.fold == "mean", "plan": self.plan},
            )
        t = tokens.unfold(x, backend)

        def normalise(norm: nn.LayerNorm, t: Tensor) -> Tensor:
            weight, bias = _tap_major(norm.weight), _tap_major(norm.bias)
            return F.layer_norm(t, weight.shape, weight, bias, norm.eps)

        qkv = F.linear(normalise(block.norm1, t), _tap_major(emha.reduce.weight, 1))
        qkv = F.linear(qkv, emha.qkv.weight)
        attend = emha.attention
        if plain:
            attend = functools.partial(functional.emha, backend=self.plan["emha"])
        y = attend(qkv, emha.heads, length)
        t = t + F.linear(y, _tap_major(emha.proj.weight), _tap_major(emha.proj.bias))  # (28)
        y = F.linear(normalise(block.norm2, t), _tap_major(mlp.fc1.weight, 1), mlp.fc1.bias)
        y = F.linear(F.relu(y), _tap_major(mlp.fc2.weight), _tap_major(mlp.fc2.bias))
        return tokens.fold(t + y, x.shape, block.fold == "mean", backend)  # (29)
