"""Inputs of every op as data: the shapes that tests and benches run, with the plain reference.

`case.args(dtype, device)` are the arguments of `torch.ops.efrdn_fast.<op>` without `backend`;
`case.reference(*args)` is the same in plain PyTorch.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .testing import make_input

__all__ = [
    "ACRB",
    "ACRB_BENCH",
    "CONV3X3",
    "CONV3X3_BENCH",
    "GCRB",
    "GCRB_BENCH",
    "GCRB_CHAIN",
    "GCRB_TRAIN",
    "Weights",
    "weight_dtype",
]


class Weights:
    """Random weights in one dtype: variance 1 / fan-in, biases of standard deviation 0.5."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (mean + std * values).to(self.device, self.dtype)

    def conv(self, cout: int, cin: int, kernel: int) -> Tensor:
        return self.normal(cout, cin, kernel, kernel, std=(cin * kernel**2) ** -0.5)

    def linear(self, cout: int, cin: int) -> Tensor:
        return self.normal(cout, cin, std=cin**-0.5)

    def bias(self, size: int) -> Tensor:
        return self.normal(size, std=0.5)

    def scale(self, size: int) -> Tensor:
        return self.normal(size, std=0.2, mean=1.0)


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _ident(shape: tuple[int, ...], *rest: object) -> str:
    n, c, h, w = shape
    return "-".join([f"N{n}-C{c}-H{h}-W{w}", *(str(r) for r in rest if r != "")])


@dataclass(frozen=True)
class GcrbCase:
    shape: tuple[int, int, int, int]
    layout: str = "channels_last"
    groups: int = 2
    mid: int | None = None
    """Channels M inside; default C / 4."""

    op = "gcrb"

    def __str__(self) -> str:
        return _ident(self.shape, f"g{self.groups}", self.layout)

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        channels = self.shape[1]
        mid, groups = self.mid or channels // 4, self.groups
        make = Weights(weight_dtype(dtype), device, seed + 1)
        return (
            make_input(self.shape, dtype, device, self.layout, seed),
            *(make.conv(mid, channels // groups, 1), make.bias(mid)),
            *(make.conv(mid, 1, 3), make.bias(mid)),
            *(make.conv(channels, mid // groups, 1), make.bias(channels)),
            groups,
        )

    @staticmethod
    def reference(x: Tensor, *args: Any) -> Tensor:
        *params, groups = args
        return reference.gcrb(x, *params, groups=groups)


@dataclass(frozen=True)
class GcrbChainCase(GcrbCase):
    op = "gcrb_chain"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        x, *first, groups = super().args(dtype, device, seed)
        rest = (super(GcrbChainCase, self).args(dtype, device, seed + i)[1:7] for i in (10, 20))
        return x, [*first, *(p for params in rest for p in params)], groups

    @staticmethod
    def reference(x: Tensor, params: list[Tensor], groups: int) -> tuple[Tensor, Tensor, Tensor]:
        return reference.gcrb_chain(x, params, groups=groups)


@dataclass(frozen=True)
class GcrbTrainCase(GcrbCase):
    op = "gcrb_train"

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        x, w1, _, w2, _, w3, _, groups = super().args(dtype, device, seed)
        make = Weights(weight_dtype(dtype), device, seed + 2)
        norms = [(make.scale(w.shape[0]), make.bias(w.shape[0])) for w in (w1, w2, w3)]
        return x, w1, *norms[0], w2, *norms[1], w3, *norms[2], groups, 1e-5

    @staticmethod
    def reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *params, groups, eps = args
        return reference.gcrb_train(x, *params, groups=groups, eps=eps)


@dataclass(frozen=True)
class AcrbCase:
    shape: tuple[int, int, int, int]
    layout: str = "channels_last"
    width: int = 9
    """Channels d that are read."""
    start: int = 0

    op = "acrb"

    def __str__(self) -> str:
        return _ident(self.shape, f"d{self.width}at{self.start}", self.layout)

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        make = Weights(weight_dtype(dtype), device, seed + 1)
        return (
            make_input(self.shape, dtype, device, self.layout, seed),
            make.conv(self.width, self.width, 3),
            make.bias(self.width),
            self.start,
        )

    @staticmethod
    def reference(x: Tensor, weight: Tensor, bias: Tensor, start: int) -> Tensor:
        return reference.acrb(x, weight, bias, start=start)


@dataclass(frozen=True)
class Conv3x3Case:
    size: tuple[int, int, int]
    """N, H, W."""
    sources: tuple[int, ...]
    """Channels of each source."""
    cout: int
    layout: str = "channels_last"
    groups: int = 1
    relu: bool = False
    bias: bool = True
    residual: bool = False
    interleaved: bool = False

    op = "conv3x3"

    def __str__(self) -> str:
        n, h, w = self.size
        sources = "+".join(map(str, self.sources))
        flags = [name for name in ("relu", "residual", "interleaved") if getattr(self, name)]
        rest = [f"g{self.groups}", *flags, "" if self.bias else "nobias", self.layout]
        return f"N{n}-C{sources}to{self.cout}-H{h}-W{w}-" + "-".join(r for r in rest if r)

    def args(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Any, ...]:
        n, h, w = self.size
        make = Weights(weight_dtype(dtype), device, seed + 1)
        return (
            [
                make_input((n, c, h, w), dtype, device, self.layout, seed + 2 + i)
                for i, c in enumerate(self.sources)
            ],
            make.conv(self.cout, sum(self.sources) // self.groups, 3),
            make.bias(self.cout) if self.bias else None,
            make_input((n, self.cout, h, w), dtype, device, "channels_last", seed)
            if self.residual
            else None,
            *(self.groups, self.relu, self.interleaved),
        )

    @staticmethod
    def reference(
        xs: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        groups: int,
        relu: bool,
        interleaved: bool,
    ) -> Tensor:
        return reference.conv3x3(
            xs,
            weight,
            bias,
            residual=residual,
            groups=groups,
            relu=relu,
            interleaved=interleaved,
        )


GCRB = (
    GcrbCase((1, 32, 1, 1)),
    GcrbCase((1, 32, 1, 1), layout="contiguous"),
    GcrbCase((1, 32, 1, 37), layout="sliced"),
    GcrbCase((2, 32, 23, 1)),
    GcrbCase((2, 32, 13, 11), layout="contiguous"),
    GcrbCase((1, 32, 63, 65)),
    GcrbCase((1, 32, 63, 65), layout="sliced"),
    GcrbCase((3, 32, 17, 19), layout="sliced"),
    GcrbCase((1, 12, 7, 5), groups=1, mid=3),
    GcrbCase((2, 48, 11, 13), groups=4),
    GcrbCase((1, 32, 9, 31), groups=8, layout="contiguous"),
)
GCRB_TRAIN = (
    *(GcrbTrainCase(*astuple(case)) for case in GCRB if case.shape[2:] != (1, 1)),
    # few values of a channel
    GcrbTrainCase((2, 32, 1, 1)),
    GcrbTrainCase((1, 32, 1, 2), layout="sliced"),
    GcrbTrainCase((2, 12, 2, 2), layout="contiguous", groups=1, mid=3),
    GcrbTrainCase((1, 32, 4, 4)),
)

GCRB_CHAIN = (
    GcrbChainCase((1, 32, 1, 1)),
    GcrbChainCase((2, 32, 13, 29), layout="sliced"),
    GcrbChainCase((1, 12, 7, 5), groups=1, mid=3),
    GcrbChainCase((1, 32, 63, 65), layout="contiguous"),
)

ACRB = (
    AcrbCase((1, 9, 1, 1)),
    AcrbCase((1, 32, 1, 1), "contiguous", start=23),
    AcrbCase((1, 32, 1, 37), start=23),
    AcrbCase((2, 32, 23, 1), "sliced", start=23),
    AcrbCase((2, 32, 13, 11), "contiguous", start=23),
    AcrbCase((1, 32, 63, 65), start=23),
    AcrbCase((3, 32, 17, 19), "sliced", start=0),
    AcrbCase((1, 11, 7, 5), width=5, start=3),
    AcrbCase((1, 32, 19, 29), width=16, start=16),
    AcrbCase((1, 23, 9, 10), "contiguous", width=23),
)

CONV3X3 = (
    Conv3x3Case((1, 1, 1), (32,), 32),
    Conv3x3Case((1, 1, 37), (32,), 32, relu=True),
    Conv3x3Case((2, 13, 11), (23,), 32, "sliced"),
    Conv3x3Case((1, 63, 65), (32,), 32, residual=True, relu=True),
    Conv3x3Case((2, 17, 19), (9, 9, 9, 32), 32, bias=False),
    Conv3x3Case((1, 13, 11), (16, 16), 32, groups=8, interleaved=True, bias=False, residual=True),
    Conv3x3Case((1, 17, 19), (32, 32), 32, "sliced", groups=8, interleaved=True, relu=True),
    Conv3x3Case((1, 9, 31), (32,), 32, "contiguous", groups=8, bias=False),
    Conv3x3Case((1, 11, 13), (5, 7), 3, "contiguous"),
    Conv3x3Case((1, 12, 7), (32,), 48),
)

GCRB_BENCH = (GcrbCase((1, 32, 180, 320)), GcrbCase((1, 32, 720, 1280)), GcrbCase((16, 32, 48, 48)))
ACRB_BENCH = (
    AcrbCase((1, 32, 180, 320), start=23),
    AcrbCase((1, 32, 720, 1280), start=23),
    AcrbCase((16, 32, 48, 48), start=23),
)
CONV3X3_BENCH = (
    Conv3x3Case((1, 180, 320), (32,), 32),
    Conv3x3Case((1, 180, 320), (23,), 32, "sliced"),
    Conv3x3Case((1, 180, 320), (9, 9, 9, 32), 32),
    Conv3x3Case((1, 180, 320), (16, 16), 32, groups=8, interleaved=True, bias=False),
    Conv3x3Case((1, 180, 320), (32,), 48),
)
