"""The paper's blocks under the paper's names, in plain PyTorch.

Comments give equation numbers of the paper and shapes `[N, C, H, W]`. A block inside ACDM takes
`use`: the two ACDMs are each used twice, and every BatchNorm keeps running statistics per use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACDM",
    "ACRB",
    "CC",
    "EFFB",
    "ESA",
    "FFLB",
    "GCRB",
    "MSCC",
    "SCCA",
    "SCSA",
    "BatchNorm",
    "GConv",
    "Reconstruct",
    "interleave",
]


def conv(cin: int, cout: int, kernel: int | tuple[int, int], *, groups: int = 1, bias: bool = True):
    """Stride-1 convolution whose zero padding keeps H x W."""
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.Conv2d(cin, cout, (kh, kw), padding=(kh // 2, kw // 2), groups=groups, bias=bias)


def interleave(a: Tensor, b: Tensor) -> Tensor:
    """Channels a0, b0, a1, b1, ...: `[N, C, H, W]` twice -> `[N, 2C, H, W]`."""
    return torch.stack((a, b), dim=2).flatten(1, 2)


class BatchNorm(nn.Module):
    """Batch normalisation with affine parameters shared by, and statistics kept per, `uses`."""

    def __init__(self, channels: int, uses: int = 2, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(uses, channels))
        self.register_buffer("running_var", torch.ones(uses, channels))

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean[use],
            self.running_var[use],
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class Identity(nn.Module):
    """A removed block (ablations)."""

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        return x


class GCRB(nn.Module):
    """Group convolution residual block: `x + P3(P2(P1(x)))`, each part conv, BN, ReLU."""

    def __init__(self, channels: int, groups: int = 2):
        super().__init__()
        mid = channels // 4
        self.squeeze = conv(channels, mid, 1, groups=groups, bias=False)
        self.bn1 = BatchNorm(mid)
        self.depthwise = conv(mid, mid, 3, groups=mid, bias=False)
        self.bn2 = BatchNorm(mid)
        self.expand = conv(mid, channels, 1, groups=groups, bias=False)
        self.bn3 = BatchNorm(channels)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        y = F.relu(self.bn1(self.squeeze(x), use))
        y = F.relu(self.bn2(self.depthwise(y), use))
        y = F.relu(self.bn3(self.expand(y), use))
        return x + y


class ACRB(nn.Module):
    """Asymmetric convolution residual block: `x + ReLU(BN(K1x3 x + K3x3 x + K3x1 x))`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1x3 = conv(channels, channels, (1, 3), bias=False)
        self.conv3x3 = conv(channels, channels, 3, bias=False)
        self.conv3x1 = conv(channels, channels, (3, 1), bias=False)
        self.bn = BatchNorm(channels)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        y = self.conv1x3(x) + self.conv3x3(x) + self.conv3x1(x)
        return x + F.relu(self.bn(y, use))


class ACRBConv3x3(nn.Conv2d):
    """ACRB replaced by one 3x3 convolution with bias (Table 3)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        return super().forward(x)


class ESA(nn.Module):
    """Enhanced spatial attention with `channels / 4` inner channels."""

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 4
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.skip = nn.Conv2d(inner, inner, 1)
        self.down = nn.Conv2d(inner, inner, 3, stride=2)
        self.deep1 = conv(inner, inner, 3)
        self.deep2 = conv(inner, inner, 3)
        self.deep3 = conv(inner, inner, 3)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.reduce(x)  # [N, C/4, H, W]
        b = self.down(a)
        b = F.max_pool2d(b, min(7, b.shape[2], b.shape[3]), stride=3)
        b = F.relu(self.deep1(b))
        b = F.relu(self.deep2(b))
        b = self.deep3(b)
        b = F.interpolate(b, size=x.shape[2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.expand(b + self.skip(a)))


class CC(nn.Module):
    """Channel calibration: `x (sigma(m(GAP x)) + sigma(m(STD x))) / 2`, one bottleneck m."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 16, 1)
        self.excite = nn.Conv2d(channels // 16, channels, 1)

    def gate(self, statistic: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(statistic))))  # [N, C, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        std = ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()
        return x * ((self.gate(mean) + self.gate(std)) / 2)


class SpatialAttention(nn.Module):
    """`l sigma(conv7x7([mean over channels; max over channels]))`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(2, 1, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class ChannelAttention(nn.Module):
    """`l sigma(W2 ReLU(W1 GAP(l)))`, no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.excite = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))


class SelfCalibrated(nn.Module):
    """Self-calibrated convolution; the attention of its left half makes it SCSA or SCCA."""

    def __init__(self, channels: int, attention: type[nn.Module]):
        super().__init__()
        half = channels // 2
        self.split = conv(channels, channels, 1, bias=False)
        self.attention = attention(half)
        self.context = conv(half, half, 3, bias=False)
        self.merge = conv(channels, channels, 3, groups=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.split(x).chunk(2, dim=1)
        return x + self.merge(interleave(self.attention(left), F.relu(self.context(right))))


class SCSA(SelfCalibrated):
    """Self-calibrated convolution with spatial attention."""

    def __init__(self, channels: int):
        super().__init__(channels, SpatialAttention)


class SCCA(SelfCalibrated):
    """Self-calibrated convolution with channel attention."""

    def __init__(self, channels: int):
        super().__init__(channels, ChannelAttention)


class MSCC(nn.Module):
    """Multi-scale self-calibrated convolution: `SCCA(SCSA(x))`, each adding its own input."""

    def __init__(self, channels: int):
        super().__init__()
        self.scsa = SCSA(channels)
        self.scca = SCCA(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.scca(self.scsa(x))


class EFFB(nn.Module):
    """Efficient feature fusion block: three GCRBs in sequence, fused step by step."""

    def __init__(self, channels: int):
        super().__init__()
        self.gcrb1 = GCRB(channels)
        self.gcrb2 = GCRB(channels)
        self.gcrb3 = GCRB(channels)
        self.fuse12 = conv(2 * channels, channels, 3, groups=8, bias=False)
        self.scsa = SCSA(channels)
        self.fuse3 = conv(channels, channels, 3, groups=8, bias=False)
        self.scca = SCCA(channels)

    def forward(self, e: Tensor, use: int = 0) -> Tensor:
        g1 = self.gcrb1(e, use)
        g2 = self.gcrb2(g1, use)
        g3 = self.gcrb3(g2, use)
        m = self.scsa(self.fuse12(interleave(g1, g2)))
        return self.scca(self.fuse3(m + g3))


class FFLB(nn.Module):
    """Feature fusion lattice block (Eqs. 10-16)."""

    def __init__(self, channels: int, ablation: str = "full"):
        super().__init__()
        calibrate = nn.Identity if ablation == "no_cc" else CC
        self.branch_weight = nn.Parameter(torch.full((2,), 0.5))  # S_1, S_2
        self.gcrb1 = Identity() if ablation == "no_gcrb" else GCRB(channels)
        self.gcrb2 = Identity() if ablation == "no_gcrb" else GCRB(channels)
        self.esa1 = ESA(channels)
        self.esa2 = ESA(channels)
        self.cc_a1 = calibrate(channels)
        self.cc_b1 = calibrate(channels)
        self.cc_a2 = calibrate(channels)
        self.cc_b2 = calibrate(channels)
        self.effb = Identity() if ablation == "no_effb" else EFFB(channels)

    def forward(self, e: Tensor, use: int = 0) -> Tensor:
        low = self.esa1(self.gcrb1(e, use))  # (10)
        upper1 = e + self.cc_b1(low)  # (11)
        lower1 = low + self.cc_a1(e)  # (12)
        up = self.esa2(self.gcrb2(upper1, use))  # (13)
        upper2 = up + self.cc_b2(lower1)  # (14)
        lower2 = lower1 + self.cc_a2(up)  # (15)
        mixed = self.branch_weight[0] * upper2 + self.branch_weight[1] * lower2
        return e + self.effb(mixed, use)  # (16)


class ACDM(nn.Module):
    """Asymmetric convolution distillation module (Eqs. 17-27)."""

    def __init__(self, channels: int = 32, distilled: int = 9, ablation: str = "full"):
        super().__init__()
        remaining = channels - distilled
        self.widths = [remaining, distilled]
        acrb = {"no_acrb_bn": lambda _: Identity(), "acrb_to_conv3x3": ACRBConv3x3}
        make_acrb = acrb.get(ablation, ACRB)
        no_fflb = ablation == "no_fflb"
        self.refine = nn.ModuleList(conv(remaining, channels, 3) for _ in range(3))
        self.acrb = nn.ModuleList(make_acrb(distilled) for _ in range(3))
        self.fflb = nn.ModuleList(
            Identity() if no_fflb else FFLB(channels, ablation) for _ in range(3)
        )
        self.conv4 = conv(channels, channels, 3)
        self.fuse = conv(3 * distilled + channels, channels, 3)
        self.mscc = nn.Identity() if ablation == "no_mscc" else MSCC(channels)

    def forward(self, x: Tensor, use: int = 0) -> Tensor:
        t, kept = x, []
        for refine, acrb, fflb in zip(self.refine, self.acrb, self.fflb, strict=True):
            remain, distill = t.split(self.widths, dim=1)
            kept.append(acrb(distill, use))
            t = fflb(refine(remain), use)
        kept.append(self.conv4(t))
        return self.mscc(self.fuse(torch.cat(kept, dim=1))) + x


class GConv(nn.Module):
    """Depthwise separable convolution between the ACDMs: depthwise 3x3, then 1x1 with bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = conv(channels, channels, 3, groups=channels, bias=False)
        self.pointwise = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Reconstruct(nn.Module):
    """Upsampling tail: conv 3x3 to `3 scale^2` channels and pixel shuffle.

    With `deep` one more 3x3 convolution stands before it (H_r1), without any activation between.
    """

    def __init__(self, channels: int, scale: int, deep: bool):
        super().__init__()
        self.scale, self.deep = scale, deep
        if deep:
            self.conv1 = conv(channels, channels, 3)
            self.conv2 = conv(channels, 3 * scale**2, 3)
        else:
            self.conv = conv(channels, 3 * scale**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x)) if self.deep else self.conv(x)
        return F.pixel_shuffle(x, self.scale)  # [N, 3, scale H, scale W]
