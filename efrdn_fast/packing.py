"""Blocks of EFRDN packed for inference: BatchNorm folded per use, branches merged, NHWC memory.

Every class is built from a module of `blocks` (or `transformer`) and holds plain tensors derived
from its parameters. Maps are `[N, C, H, W]` in NHWC memory and of the compute dtype. A part that
has no packed form runs as the module it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import attention, blocks, dispatch, functional, fusion, reparam, tokens
from .transformer import TransformerBlock

__all__ = [
    "OPS",
    "Conv",
    "PackedACDM",
    "PackedGConv",
    "PackedTransformer",
    "Target",
    "pack_body",
    "pack_transformer",
    "plan_of",
]

OPS = ("gcrb", "acrb_out", "merge3x3", "calibrate", "sigmoid_gate", "unfold", *attention.PARTS)
"""Ops that the packed network calls; each has a backend of its own, `fold` that of `unfold`."""

CPU_TOKENS = 2048
"""Tokens that the transformer block takes through its Linear layers at a time on a CPU."""

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """What the packed weights are made for."""

    dtype: torch.dtype
    """Of the maps between head and tails."""
    plan: Mapping[str, str]
    """Op -> backend."""

    def weight(self, value: Tensor) -> Tensor:
        """Compute dtype; NHWC memory where it has four dimensions."""
        value = value.detach().to(self.dtype)
        return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

    def folded(self, value: Tensor) -> Tensor:
        """Float32 at least, which the ops of `functional` take with maps of any dtype."""
        return value.detach().to(torch.promote_types(self.dtype, torch.float32))


def plan_of(net: nn.Module, backend: str, like: Tensor) -> dict[str, str]:
    """Op -> backend for a network; merges that the C++ does not take go to the reference."""
    plan, merges = dispatch.plan(OPS, backend, like), []
    for module in net.modules():
        if isinstance(module, blocks.EFFB):
            merges += [(module.fuse12, True), (module.fuse3, False)]
        elif isinstance(module, blocks.SelfCalibrated):
            merges.append((module.merge, True))
    for conv, joins in merges:
        plan["merge3x3"] = fusion.merge_backend(plan["merge3x3"], conv.weight, conv.groups, joins)
    return plan


class Conv:
    """Convolution of an `nn.Conv2d` with other weights, in place of the module."""

    def __init__(
        self,
        conv: nn.Conv2d,
        to: Target,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        bias = conv.bias if bias is None else bias
        self.weight = to.weight(conv.weight if weight is None else weight)
        self.bias = None if bias is None else to.weight(bias)
        self.options = {
            "stride": conv.stride,
            "padding": conv.padding,
            "groups": conv.groups,
        }

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.options)


class PackedModule:
    """A part without a packed form: the module itself, under autocast where dtypes differ."""

    def __init__(self, module: nn.Module, use: int, to: Target):
        own = next((p.dtype for p in module.parameters()), to.dtype)
        self.module, self.use = module, use
        self.autocast = to.dtype if own != to.dtype else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.autocast is None:
            return self.module(x, self.use)
        with torch.autocast(x.device.type, self.autocast):
            return self.module(x, self.use)


class PackedGCRB:
    """One op, backend as planned."""

    def __init__(self, block: nn.Module, use: int, to: Target):
        self.weights = [to.folded(w) for w in reparam.fold_gcrb(block, use)]
        self.groups, self.backend = block.squeeze.groups, to.plan["gcrb"]

    def __call__(self, x: Tensor) -> Tensor:
        return functional.gcrb(x, *self.weights, groups=self.groups, backend=self.backend)


def pack_gcrb(block: nn.Module, use: int, to: Target) -> Map:
    if isinstance(block, blocks.GCRB):
        return PackedGCRB(block, use, to)
    return PackedModule(block, use, to)


class PackedESA:
    """ESA whose two 1x1 convolutions of the input are one: `a` and `skip(a)` side by side."""

    def __init__(self, block: blocks.ESA, to: Target):
        reduce, skip = block.reduce, block.skip
        weight, inner = reduce.weight.double(), reduce.out_channels
        through = skip.weight.double().flatten(1)
        shortcut = (through @ weight.flatten(1)).view_as(weight)
        offset = through @ reduce.bias.double() + skip.bias.double()
        self.inner = inner
        self.enter = Conv(
            reduce, to, torch.cat((weight, shortcut)), torch.cat((reduce.bias.double(), offset))
        )
        down = block.down.weight  # reads `a` in the first half of the channels, nothing in the rest
        self.down = Conv(block.down, to, torch.cat((down, torch.zeros_like(down)), dim=1))
        self.deep = [Conv(c, to) for c in (block.deep1, block.deep2, block.deep3)]
        self.expand = Conv(block.expand, to)
        self.backend = to.plan["sigmoid_gate"]

    def __call__(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down(a)
        b = F.max_pool2d(b, min(7, b.shape[2], b.shape[3]), stride=3)
        b = self.deep[0](b).relu_()
        b = self.deep[2](self.deep[1](b).relu_())
        b = F.interpolate(b, size=x.shape[2:], mode="bilinear", align_corners=False)
        logits = self.expand(b.add_(a[:, self.inner :]))
        return fusion.sigmoid_gate(x, logits, backend=self.backend)


class PackedCC:
    """`base + CC(x)`; `base + x` where the CC is removed."""

    def __init__(self, block: nn.Module, to: Target):
        self.weights, self.backend = None, to.plan["calibrate"]
        if isinstance(block, blocks.CC):
            squeeze, excite = block.squeeze, block.excite
            weights = squeeze.weight, squeeze.bias, excite.weight, excite.bias
            self.weights = [to.folded(w) for w in weights]

    def __call__(self, base: Tensor, x: Tensor) -> Tensor:
        if self.weights is None:
            return base + x
        return fusion.calibrate(base, x, *self.weights, backend=self.backend)


class Merge:
    """A grouped 3x3 convolution that joins two maps, or reads one."""

    def __init__(self, conv: nn.Conv2d, to: Target):
        self.weight, self.groups = to.folded(conv.weight), conv.groups
        self.backend = to.plan["merge3x3"]

    def __call__(self, a: Tensor, b: Tensor | None = None, **options) -> Tensor:
        options = {"groups": self.groups, "backend": self.backend, **options}
        return fusion.merge3x3(a, self.weight, b, **options)


class PackedSC:
    """SCSA or SCCA."""

    def __init__(self, block: blocks.SelfCalibrated, to: Target):
        attention = block.attention
        self.half = block.split.out_channels // 2
        self.split, self.context = Conv(block.split, to), Conv(block.context, to)
        self.merge = Merge(block.merge, to)
        self.spatial = None
        if isinstance(attention, blocks.SpatialAttention):
            self.spatial = Conv(attention.conv, to)
        else:
            self.squeeze = to.weight(attention.squeeze.weight.flatten(1))
            self.excite = to.weight(attention.excite.weight.flatten(1))

    def logits(self, left: Tensor) -> Tensor:
        """Of the gate, `[N, 1, H, W]` or `[N, C / 2, 1, 1]`."""
        if self.spatial is not None:
            pooled = (left.mean(dim=1, keepdim=True), left.amax(dim=1, keepdim=True))
            return self.spatial(torch.cat(pooled, dim=1))
        pooled = F.linear(left.mean(dim=(2, 3)), self.squeeze).relu_()
        return F.linear(pooled, self.excite)[:, :, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        left, right = self.split(x).split(self.half, dim=1)
        right = self.context(right)
        return self.merge(left, right, gate=self.logits(left), relu=True, residual=x)


class PackedEFFB:
    """EFFB."""

    def __init__(self, block: blocks.EFFB, use: int, to: Target):
        self.gcrb = [PackedGCRB(b, use, to) for b in (block.gcrb1, block.gcrb2, block.gcrb3)]
        self.fuse12 = Merge(block.fuse12, to)
        self.fuse3 = Merge(block.fuse3, to)
        self.scsa, self.scca = PackedSC(block.scsa, to), PackedSC(block.scca, to)

    def __call__(self, e: Tensor) -> Tensor:
        g1 = self.gcrb[0](e)
        g2 = self.gcrb[1](g1)
        g3 = self.gcrb[2](g2)
        m = self.scsa(self.fuse12(g1, g2))
        return self.scca(self.fuse3(m.add_(g3)))


class PackedFFLB:
    """FFLB (Eqs. 10-16)."""

    def __init__(self, block: blocks.FFLB, use: int, to: Target):
        self.gcrb1, self.gcrb2 = (pack_gcrb(b, use, to) for b in (block.gcrb1, block.gcrb2))
        self.esa1, self.esa2 = PackedESA(block.esa1, to), PackedESA(block.esa2, to)
        self.a1, self.a2 = PackedCC(block.cc_a1, to), PackedCC(block.cc_a2, to)
        self.b1, self.b2 = PackedCC(block.cc_b1, to), PackedCC(block.cc_b2, to)
        self.s1, self.s2 = to.weight(block.branch_weight)
        full = isinstance(block.effb, blocks.EFFB)
        self.effb = PackedEFFB(block.effb, use, to) if full else PackedModule(block.effb, use, to)

    def __call__(self, e: Tensor) -> Tensor:
        low = self.esa1(self.gcrb1(e))  # (10)
        upper = self.b1(e, low)  # (11)
        lower = self.a1(low, e)  # (12)
        up = self.esa2(self.gcrb2(upper))  # (13)
        mixed = self.b2(up, lower).mul_(self.s1)  # (14)
        mixed.addcmul_(self.a2(lower, up), self.s2)  # (15)
        return self.effb(mixed).add_(e)  # (16)


class PackedACDM:
    """ACDM (Eqs. 17-27); ACRB reads its slice in place and writes where it is fused."""

    def __init__(self, block: blocks.ACDM, use: int, to: Target):
        self.widths, self.backend = block.widths, to.plan["acrb_out"]
        self.refine = [Conv(c, to) for c in block.refine]
        self.acrb = [
            [to.folded(w) for w in reparam.fold_acrb(b, use)]
            if isinstance(b, blocks.ACRB)
            else PackedModule(b, use, to)
            for b in block.acrb
        ]
        self.fflb = [
            PackedFFLB(b, use, to) if isinstance(b, blocks.FFLB) else PackedModule(b, use, to)
            for b in block.fflb
        ]
        self.conv4, self.fuse = Conv(block.conv4, to), Conv(block.fuse, to)
        self.mscc = []
        if isinstance(block.mscc, blocks.MSCC):
            self.mscc = [PackedSC(block.mscc.scsa, to), PackedSC(block.mscc.scca, to)]
        self.joined = block.fuse.in_channels

    def __call__(self, x: Tensor) -> Tensor:
        remaining, distilled = self.widths
        n, _, height, width = x.shape
        kept = x.new_empty(n, height, width, self.joined).permute(0, 3, 1, 2)
        t = x
        for j, (refine, acrb, fflb) in enumerate(
            zip(self.refine, self.acrb, self.fflb, strict=True)
        ):
            at = j * distilled
            if isinstance(acrb, list):
                functional.acrb_out(
                    t, *acrb, kept, start=remaining, out_start=at, backend=self.backend
                )
            else:
                kept[:, at : at + distilled] = acrb(t[:, remaining:])
            t = fflb(refine(t[:, :remaining]))
        kept[:, 3 * distilled :] = self.conv4(t)
        y = self.fuse(kept)
        for unit in self.mscc:
            y = unit(y)
        return y + x


class PackedGConv:
    """GConv."""

    def __init__(self, block: blocks.GConv, to: Target):
        self.depthwise, self.pointwise = Conv(block.depthwise, to), Conv(block.pointwise, to)

    def __call__(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class PackedTransformer:
    """Transformer block whose tokens are tap-major, as NHWC memory gives them.

    The order inside a token is free: the weights that read or write tokens are permuted alike.
    """

    def __init__(self, block: TransformerBlock, to: Target):
        channels = block.norm1.normalized_shape[0] // 9
        device = block.norm1.weight.device
        order = torch.arange(9 * channels, device=device).view(channels, 9).T.flatten()
        emha, mlp = block.emha, block.mlp

        def take(value: Tensor, dim: int = 0) -> Tensor:
            return to.weight(value.index_select(dim, order))

        self.norms = [(take(n.weight), take(n.bias), n.eps) for n in (block.norm1, block.norm2)]
        self.reduce, self.qkv = take(emha.reduce.weight, 1), to.weight(emha.qkv.weight)
        self.proj = take(emha.proj.weight), take(emha.proj.bias)
        self.fc1 = take(mlp.fc1.weight, 1), to.weight(mlp.fc1.bias)
        self.fc2 = take(mlp.fc2.weight), take(mlp.fc2.bias)
        self.emha, self.mean, self.plan = emha, block.fold == "mean", to.plan

    def norm(self, t: Tensor, which: int) -> Tensor:
        weight, bias, eps = self.norms[which]
        return F.layer_norm(t, weight.shape, weight, bias, eps)

    def __call__(self, x: Tensor) -> Tensor:
        t = tokens.unfold(x, self.plan["unfold"])  # [N, H W, 9 C]
        n, count, _ = t.shape
        # What is 9 C wide stays in the caches of a CPU; a GPU is better filled by one call.
        parts = t.flatten(0, 1).split(CPU_TOKENS if x.device.type == "cpu" else n * count)
        qkv = t.new_empty(n * count, len(self.qkv))
        for part, out in zip(parts, qkv.split(len(parts[0])), strict=True):
            torch.mm(F.linear(self.norm(part, 0), self.reduce), self.qkv.T, out=out)
        heads, length = self.emha.heads, self.emha.segment_length(count)
        attend = self.emha.attention
        if attention.is_plain(attend):
            attend = functools.partial(functional.emha, backend=self.plan["emha"])
        a = attend(qkv.view(n, count, -1), heads, length).flatten(0, 1)
        del qkv
        for part, y in zip(parts, a.split(len(parts[0])), strict=True):
            _add_linear(part, y, *self.proj)  # (28)
            h = F.linear(self.norm(part, 1), *self.fc1).relu_()
            _add_linear(part, h, *self.fc2)  # (29)
        return tokens.fold(t, x.shape, self.mean, self.plan["unfold"])


class FusedTransformer(PackedTransformer):
    """Transformer block as four ops on a GPU, between which no token of 9 C values is stored."""

    def __init__(self, block: TransformerBlock, to: Target):
        super().__init__(block, to)
        self.weights = [to.weight(w) for w in attention.weights_of(block)]
        self.eps = block.norm1.eps

    def __call__(self, x: Tensor) -> Tensor:
        if not attention.is_plain(self.emha.attention):
            return super().__call__(x)
        length = self.emha.segment_length(x.shape[2] * x.shape[3])
        return attention.planned_block(
            *(x, self.weights, self.emha.heads, length),
            **{"eps": self.eps, "mean": self.mean, "plan": self.plan},
        )


def pack_transformer(block: TransformerBlock, to: Target) -> Map:
    fused = attention.is_fused(block, to.plan)
    return FusedTransformer(block, to) if fused else PackedTransformer(block, to)


def _add_linear(t: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """`t += F.linear(x, weight, bias)`, in place by the matrix product itself."""
    t.add_(bias).addmm_(x, weight.T)


def pack_body(module: nn.Module, use: int, to: Target) -> Map:
    """Packed ACDM; IMDB and RFDB run as they are."""
    if isinstance(module, blocks.ACDM):
        return PackedACDM(module, use, to)
    return PackedModule(module, use, to)
