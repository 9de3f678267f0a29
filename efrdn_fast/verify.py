"""The fast network against the reference in float64: single ops, whole network, PSNR on images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dispatch, metrics
from .benchmarks import ImageSet, find_pairs, load_pair
from .cases import AcrbCase, Conv3x3Case, GcrbCase, GcrbChainCase, GcrbTrainCase
from .cases_attention import EmhaCase, TokenCase
from .cases_fusion import (
    AcrbOutCase,
    CalibrateCase,
    FoldCase,
    Merge3x3Case,
    SigmoidGateCase,
    UnfoldCase,
)
from .device import HALF
from .fast import EFRDNFast
from .model import EFRDN
from .reference import emha_sdpa
from .testing import TF32_TOLERANCE, TOLERANCES, check_forward

__all__ = ["DTYPES", "SIZES", "Row", "check_images", "check_network", "check_ops"]

DTYPES = ("fp32", "tf32", "fp16", "bf16")
SIZES = ((3, 3), (3, 17), (15, 15), (33, 47), (64, 64))
"""Height, width of LR images; each at batch 1 and, up to 1,000 pixels, 3."""
PSNR_BOUND = {"fp32": 0.001, "tf32": 0.01, "fp16": 0.01, "bf16": 0.01}
"""Largest change of the PSNR of a set, in dB."""
NOISE_BOUND = {"fp16": 60.0, "bf16": 45.0}
"""Least PSNR of half precision against float64 with peak 1, in dB."""
OP_SHAPES = ((1, 32, 3, 3), (3, 32, 15, 17), (1, 32, 48, 64))


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    case: str
    dtype: str
    figure: str
    """What was measured, with its unit."""
    passed: bool
    values: Mapping[str, float] = field(default_factory=dict)
    """The same as numbers, as far as there are any."""

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.what:<12} {self.case:<22} {self.dtype:<5} {self.figure:<58} {verdict}"


def check_ops(
    device: torch.device, backend: str = "auto", dtypes: Sequence[str] | None = None
) -> Iterator[Row]:
    """Every op with kernels of its own, by the rule of `testing.assert_within`.

    Args:
        dtypes: Of `DTYPES`; the ops of tf32 are checked in fp32. Default: fp32, fp16 and bf16.
    """
    kinds = {"fp32": torch.float32, **HALF}
    wanted_kinds = kinds if dtypes is None else {"fp32" if d == "tf32" else d for d in dtypes}
    dtypes = {name: dtype for name, dtype in kinds.items() if name in wanted_kinds}
    for shape in OP_SHAPES:
        for case in _cases(shape):
            serving = {impl.backend for impl in dispatch.implementations(case.op)}
            wanted = backend if backend in {"auto", *serving} else "reference"
            for name, dtype in dtypes.items():
                like = torch.empty(0, dtype=dtype, device=device)
                taken = dispatch.choose(case.op, wanted, like)
                try:
                    error = max(check_forward(case, dtype, str(device), taken))
                    row = f"{taken}: max error {error:.2e}", True, {"max_error": error}
                except AssertionError as failure:
                    row = f"{taken}: {failure}", False
                yield Row(case.op, "x".join(map(str, shape)), name, *row)


def _cases(shape: tuple[int, int, int, int]) -> tuple[Any, ...]:
    """The forward ops on maps of `shape`, or on as many tokens as it has pixels."""
    n, channels, height, width = shape
    tokens = height * width
    return (
        GcrbCase(shape),
        GcrbChainCase(shape),
        GcrbTrainCase(shape),
        AcrbCase(shape, start=23),
        AcrbOutCase(shape, start=23),
        Conv3x3Case((n, height, width), (channels,), channels, relu=True, residual=True),
        Merge3x3Case(shape),
        CalibrateCase(shape),
        SigmoidGateCase(shape),
        UnfoldCase(shape),
        FoldCase(shape),
        EmhaCase(n, tokens, length=(tokens + 3) // 4),
        *(TokenCase(op, shape) for op in ("token_qkv", "token_hidden", "token_fold")),
    )


def check_network(
    net: EFRDN,
    dtype: str = "fp32",
    *,
    backend: str = "auto",
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Row]:
    """The whole network on random images: max and RMS error against float64.

    In fp32 and tf32 the largest error may be twice that of the plain network in fp32, plus the
    tolerance of the dtype; in half precision the noise must stay below `NOISE_BOUND`.

    Args:
        net: In evaluation mode; left as it is.
        sizes: Height, width of LR images. Default: `SIZES`.
    """
    fast = EFRDNFast.from_reference(net, backend=backend, dtype=dtype)
    plain = _plain(net)
    exact_net = _plain(net).double()
    device = net.head.weight.device
    for height, width in sizes or SIZES:
        for batch in (1, 3) if height * width <= 1000 else (1,):
            generator = torch.Generator().manual_seed(height * width + batch)
            x = torch.rand(batch, 3, height, width, generator=generator).to(device)
            with torch.inference_mode():
                exact = exact_net(x.double())
                if device.type == "cuda":
                    fast(x)  # the second call for a shape is the one that replays a graph
                error = (fast(x).double() - exact).abs()
                base = (plain(x).double() - exact).abs().max().item()
            rms = error.square().mean().sqrt().item()
            values = {"max_error": error.max().item(), "rms_error": rms}
            figure = f"max {values['max_error']:.2e}, rms {rms:.2e}"
            if dtype in HALF:
                passed = -20 * torch.tensor(rms).log10().item() >= NOISE_BOUND[dtype]
            else:
                tolerance = TF32_TOLERANCE if dtype == "tf32" else TOLERANCES[torch.float32]
                bound = 2 * base + tolerance * exact.abs().max().item()
                passed = values["max_error"] <= bound
                values["bound"] = bound
                figure += f" (bound {bound:.2e})"
            yield Row("network", f"{batch}x3x{height}x{width}", dtype, figure, passed, values)


def check_images(
    net: EFRDN,
    image_set: ImageSet,
    dtype: str = "fp32",
    *,
    backend: str = "auto",
    limit: int | None = None,
) -> Row:
    """Change of the mean PSNR (Y, shaved by the scale) of a set against the float64 network."""
    fast = EFRDNFast.from_reference(net, backend=backend, dtype=dtype)
    exact_net = _plain(net).double()
    device = net.head.weight.device
    differences = []
    for pair in find_pairs(image_set, net.scale)[:limit]:
        lr, hr = load_pair(pair, net.scale)
        x = torch.from_numpy(lr).permute(2, 0, 1)[None].to(device) / 255
        target = torch.from_numpy(hr).permute(2, 0, 1)[None].to(device).double() / 255
        with torch.inference_mode():
            before, after = (
                metrics.psnr(sr.double(), target, net.scale)
                for sr in (exact_net(x.double()), fast(x))
            )
        differences.append(after - before)
    change = sum(differences) / len(differences)
    bound = PSNR_BOUND[dtype]
    figure = f"PSNR {change:+.5f} dB over {len(differences)} images (bound {bound})"
    values = {"psnr_change": change, "images": len(differences), "bound": bound}
    return Row(image_set.name, f"x{net.scale}", dtype, figure, abs(change) <= bound, values)


def _plain(net: EFRDN) -> EFRDN:
    """A copy as a plain EFRDN, whose attention keeps no scores."""
    plain = EFRDN(**net.config.to_dict()).to(net.head.weight.device)
    plain.load_state_dict(copy.deepcopy(net.state_dict()))
    return plain.eval().set_attention(emha_sdpa)
