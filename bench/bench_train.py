"""One training step (forward, L1, backward, Adam) of random patches; check: the head's gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_network import network
from bench.harness.session import Call, Session, Subject
from efrdn_fast import EFRDN
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.reference import emha_sdpa

__all__ = ["BASELINE", "TrainCase", "bench_train", "cases_of", "names", "subject"]

BASELINE = "sdpa"
TOLERANCES = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Largest error of the gradient, in units of its largest value."""


@dataclass(frozen=True)
class TrainCase:
    """Batch of square LR patches, x4."""

    batch: int
    patch: int

    def __str__(self) -> str:
        return f"x4-{self.batch}x{self.patch}x{self.patch}"


def cases_of(full: bool) -> list[TrainCase]:
    """A small batch; full: the paper's 16 x 48x48 too."""
    return [TrainCase(2, 32), TrainCase(16, 48)] if full else [TrainCase(2, 32)]


def names(device: torch.device, full: bool) -> list[str]:
    half = "fp16" if device.type == "cuda" else "bf16"
    more = ["compile", f"sdpa-{half}", f"compile-{half}"] if full else []
    return ["eager", "sdpa", "ours", *more]


def _dtype(name: str) -> torch.dtype:
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return kinds.get(name.partition("-")[2], torch.float32)


def _module(net: EFRDN, name: str) -> nn.Module:
    kind = name.partition("-")[0]
    if kind == "ours":
        return EFRDNFast.from_reference(net)
    if kind != "eager":
        net.set_attention(emha_sdpa)
    return torch.compile(net, dynamic=False) if kind == "compile" else net


def _step(net: EFRDN, name: str, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """The call to be timed; returns the gradient of the head's weight."""
    device, dtype = x.device, _dtype(name)
    forward = _module(net, name)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, capturable=device.type == "cuda")
    half = torch.autocast(device.type, dtype) if dtype != torch.float32 else None

    def step() -> Tensor:
        optimizer.zero_grad()
        with half or contextlib.nullcontext():
            loss = F.l1_loss(forward(x), target)
        loss.backward()
        optimizer.step()
        return net.head.weight.grad

    return step


def subject(case: TrainCase, session: Session) -> Subject:
    device = session.device
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(case.batch, 3, case.patch, case.patch, generator=generator).to(device)
    side = 4 * case.patch
    # Below every output: L1's gradient is a sum of signs, which rounding must not flip.
    target = (torch.rand(case.batch, 3, side, side, generator=generator) - 2).to(device)

    def maker(name: str) -> Callable[[], Call]:
        return lambda: _step(copy.deepcopy(network(4, device)).train(), name, x, target)

    @functools.cache
    def exact() -> Tensor:
        net = copy.deepcopy(network(4, device)).double().train()
        return _step(net, BASELINE, x.double(), target.double())().clone()

    def check(name: str, grad: Tensor) -> float:
        error = (grad.double() - exact()).abs().max().item() / exact().abs().max().item()
        bound = TOLERANCES[str(_dtype(name)).removeprefix("torch.")]
        if not error <= bound:  # also NaN
            raise AssertionError(f"{name}: gradient differs by {error:.2e}, bound {bound}")
        return error

    chosen = [n for n in names(device, session.full) if session.wants(n, BASELINE)]
    return Subject(
        "train",
        str(case),
        {name: maker(name) for name in chosen},
        check,
        BASELINE,
        lambda name: str(_dtype(name)).removeprefix("torch."),
        modes=("warm", "graph") if device.type == "cuda" else ("warm",),
        gradients=True,
    )


def bench_train(compare, harness, case, variant):
    compare(("train", case), lambda: subject(case, harness), variant)
