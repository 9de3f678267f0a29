"""Runs EFRDNFast on the CUDA kernels, executed as fibers, against EFRDN in float64.

Usage: python check_network.py <library built by harness.binding>. The first wrong result raises.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from efrdn_fast.kernels import _build
from PIL import Image
from torch import Tensor

from efrdn_fast import EFRDN, EFRDNFast, attention, dispatch

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "chelsea_x4.png"
OWN = ("gcrb", "acrb_out", *attention.PARTS)
"""Ops of the packed network that have CUDA kernels."""


def serve_cpu_tensors(library: str) -> None:
    """Let backend `cuda` take CPU tensors."""
    torch.ops.load_library(library)
    _build.load = lambda backend: None
    found = dispatch.implementations

    def implementations(op: str) -> tuple[dispatch.Impl, ...]:
        able = {"why_not": lambda device: None}
        return tuple(
            dataclasses.replace(i, **able) if i.backend == "cuda" else i for i in found(op)
        )

    dispatch.implementations = implementations


def photos(height: int, width: int) -> Tensor:
    """Two small parts of a photo, as a batch.

    At 4 x 5 pixels no ReLU or maximum lies so near its kink that rounding moves the gradients: with
    all weights changed at random by 3e-7 of their size, those in float64 change by less than 1e-5.
    """
    image = torch.from_numpy(np.array(Image.open(PHOTO).convert("RGB"))) / 255
    parts = [image[y : y + height, x : x + width] for y, x in ((20, 60), (45, 35))]
    return torch.stack(parts).permute(0, 3, 1, 2)


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative RMS of all together."""
    total = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return (total / sum(b.square().sum() for b in exact)).sqrt().item()


def step(net: EFRDN, x: Tensor) -> tuple[list[Tensor], ...]:
    """Output, gradients and statistics of a pass in training mode."""
    x = x.detach().to(net.head.weight.dtype).requires_grad_()
    y = net(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).mean(), [x, *net.parameters()])
    return [y.detach()], list(grads), list(net.buffers())


def check_inference(dtype: str, bound: float) -> None:
    net = EFRDN.from_pretrained("x4")
    fast = EFRDNFast.from_reference(net, backend="cuda", dtype=dtype)
    x = photos(8, 9)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        found = fast(x)
    assert {fast.plan[op] for op in OWN} == {"cuda"}, fast.plan
    assert error([found], [exact]) < bound, (dtype, error([found], [exact]))


def check_training() -> None:
    net = EFRDN.from_pretrained("x4").train()
    fast = EFRDNFast.from_reference(copy.deepcopy(net), backend="cuda")
    x = photos(4, 5)
    truth, plain, found = step(copy.deepcopy(net).double(), x), step(net, x), step(fast, x)
    names = ("output", "gradients", "statistics")
    for name, bound, t, p, f in zip(names, (1e-6, 1e-4, 1e-6), truth, plain, found, strict=True):
        allowed = 2 * error(p, t) + bound
        assert error(f, t) <= allowed, f"{name}: {error(f, t)} > {allowed}"


if __name__ == "__main__":
    serve_cpu_tensors(sys.argv[1])
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # PyTorch allows TF32 unless told otherwise
    check_inference("fp32", 1e-6)
    check_inference("fp16", 2e-3)
    check_inference("bf16", 1e-2)
    check_training()
