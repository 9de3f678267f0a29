"""Inputs of the merges, gates and sums over patches, as data; see `cases`.

`case.call(*args, backend)` runs the op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional, fusion, reference, tokens
from .cases import AcrbCase, Weights, weight_dtype
from .testing import make_input

__all__ = [
    "AcrbOutCase",
    "CalibrateCase",
    "FoldCase",
    "FusionCase",
    "Merge3x3Case",
    "SigmoidGateCase",
    "UnfoldCase",
]


class AcrbOutCase(AcrbCase):
    """`acrb` into the middle of a wider map."""

    op = "acrb_out"

    @staticmethod
    def call(x: Tensor, weight: Tensor, bias: Tensor, start: int, backend: str) -> Tensor:
        d = weight.shape[0]
        n, _, h, w = x.shape
        wide = x.new_full((n, h, w, d + 7), torch.nan).permute(0, 3, 1, 2)
        functional.acrb_out(x, weight, bias, wide, start=start, out_start=3, backend=backend)
        around = torch.cat((wide[:, :3], wide[:, 3 + d :]), dim=1)
        assert around.isnan().all(), "channels outside the slice were written"
        return wide[:, 3 : 3 + d].contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class FusionCase:
    """An op of `fusion` or `tokens` on maps of `shape`."""

    shape: tuple[int, int, int, int]
    layout: str = "channels_last"

    def maps(
        self, count: int, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> list[Tensor]:
        """Maps of `shape`."""
        return [make_input(self.shape, dtype, device, self.layout, seed + i) for i in range(count)]


class SigmoidGateCase(FusionCase):
    """x, logits."""

    op = "sigmoid_gate"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        return tuple(self.maps(2, dtype, device, seed))

    @staticmethod
    def call(x: Tensor, logits: Tensor, backend: str) -> Tensor:
        return fusion.sigmoid_gate(x, logits, backend=backend)

    @staticmethod
    def reference(x: Tensor, logits: Tensor) -> Tensor:
        return x * torch.sigmoid(logits)


class CalibrateCase(FusionCase):
    """base, x, and the bottleneck of width C / 4."""

    op = "calibrate"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        channels = self.shape[1]
        mid, make = max(1, channels // 4), Weights(weight_dtype(dtype), device, seed + 5)
        squeeze = make.conv(mid, channels, 1), make.bias(mid)
        excite = make.conv(channels, mid, 1), make.bias(channels)
        return *self.maps(2, dtype, device, seed), *squeeze, *excite

    @staticmethod
    def call(*args: Any) -> Tensor:
        *tensors, backend = args
        return fusion.calibrate(*tensors, backend=backend)

    @staticmethod
    def reference(
        base: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        std = ((x - mean).square().mean(dim=(2, 3), keepdim=True) + 1e-6).sqrt()
        gates = [torch.sigmoid(F.conv2d(F.conv2d(s, w1, b1).relu(), w2, b2)) for s in (mean, std)]
        return base + x * (gates[0] + gates[1]) / 2


@dataclass(frozen=True)
class Merge3x3Case(FusionCase):
    """a, b, gate, residual, weight, relu, groups."""

    gate: str | None = "pixel"
    """One value per "pixel" or "channel", or None."""
    second: bool = True
    """With b."""
    relu: bool = True
    added: bool = True
    """With a residual."""

    op = "merge3x3"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        n, channels, height, width = self.shape
        a, b, residual = self.maps(3, dtype, device, seed)
        inputs = 2 * channels if self.second else channels
        groups, make = channels // 4, Weights(weight_dtype(dtype), device, seed + 5)
        shape = (n, 1, height, width) if self.gate == "pixel" else (n, channels, 1, 1)
        return (
            a,
            b if self.second else None,
            make_input(shape, dtype, device, seed=seed + 4) if self.gate else None,
            residual if self.added else None,
            make.conv(channels, inputs // groups, 3),
            self.relu,
            groups,
        )

    @staticmethod
    def call(
        a: Tensor,
        b: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        relu: bool,
        groups: int,
        backend: str,
    ) -> Tensor:
        options = {"gate": gate, "relu": relu, "residual": residual}
        return fusion.merge3x3(a, weight, b, **options, groups=groups, backend=backend)

    @staticmethod
    def reference(
        a: Tensor,
        b: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        relu: bool,
        groups: int,
    ) -> Tensor:
        sources = [a if gate is None else a * torch.sigmoid(gate)]
        if b is not None:
            sources.append(b.relu() if relu else b)
        interleaved = b is not None
        return reference.conv3x3(
            sources, weight, residual=residual, groups=groups, interleaved=interleaved
        )


class UnfoldCase(FusionCase):
    """x."""

    op = "unfold"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        return tuple(self.maps(1, dtype, device, seed))

    @staticmethod
    def call(x: Tensor, backend: str) -> Tensor:
        return tokens.unfold(x, backend)

    @staticmethod
    def reference(x: Tensor) -> Tensor:
        return _tap_major(reference.unfold(x))


class FoldCase(FusionCase):
    """Tokens, shape of the map; the mean of the patches that meet."""

    op = "fold"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        n, channels, height, width = self.shape
        return make_input((n, height * width, 9 * channels), dtype, device, seed=seed), self.shape

    @staticmethod
    def call(t: Tensor, shape: tuple[int, int, int, int], backend: str) -> Tensor:
        return tokens.fold(t, shape, True, backend)

    @staticmethod
    def reference(t: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        y = reference.fold(t.unflatten(2, (9, -1)).transpose(2, 3).flatten(2), shape[2:])
        return y / reference.overlap_count(y)


def _tap_major(t: Tensor) -> Tensor:
    """Tokens `[N, H W, C * 9]` in the order (tap, channel)."""
    return t.unflatten(2, (-1, 9)).transpose(2, 3).flatten(2)
