"""The ladder: the whole network in every way to run it (see `rungs`), protocol `steady`.

Warm-up, turns, medians, graph replay on CUDA. The protocol `ntire` is `bench_ntire.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.groups import groups
from bench.harness.model import Point
from bench.harness.session import ERRORS, Call, NotRun, Session, Subject
from bench.harness.work import Work
from bench.rungs import BASELINE, RUNGS
from efrdn_fast import EFRDN
from efrdn_fast.counts import Cost, count
from efrdn_fast.device import HALF
from efrdn_fast.reference import emha_sdpa

__all__ = ["BASELINE", "NetworkCase", "bench_network", "cases_of", "names", "network"]

SIZES = ((64, 64), (96, 96), (128, 128), (320, 180), (480, 270), (960, 540))
"""Width, height of LR images."""
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 5e-2, "bf16": 0.2}
"""Largest error of an image with values in [0, 1]: far above rounding, far below a wrong result.
The error found is in every row."""


@dataclass(frozen=True)
class NetworkCase:
    """Scale, LR size and batch."""

    scale: int
    width: int
    height: int
    batch: int = 1

    def __str__(self) -> str:
        return f"x{self.scale}-{self.width}x{self.height}-b{self.batch}"

    def input(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, 3, self.height, self.width
        return torch.rand(shape, generator=generator).to(device)


def cases_of(full: bool) -> list[NetworkCase]:
    """Quick: one size. Full: x2, x3 and x4, all sizes, batch 1 and 8, the small ones first."""
    if not full:
        return [NetworkCase(4, 64, 64)]
    cases = [NetworkCase(s, w, h, b) for s in (4, 2, 3) for w, h in SIZES for b in (1, 8)]
    return sorted(cases, key=lambda c: c.batch * c.width * c.height)


def names(device: torch.device, full: bool) -> list[str]:
    """All rungs; those that cannot run here say so."""
    return [name for name, rung in RUNGS.items() if full or not rung.full]


@functools.cache
def network(scale: int, device: torch.device) -> EFRDN:
    """The shipped weights, or random ones of a fixed seed, which take the same time."""
    try:
        return EFRDN.from_pretrained(f"x{scale}").to(device)
    except FileNotFoundError:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EFRDN(scale).eval().to(device)


def subject(case: NetworkCase, session: Session) -> Subject:
    """The rungs that can run, on one case."""
    device = session.device
    net, x = network(case.scale, device), case.input(device)
    cost = count(net.config, case.width, case.height)
    exact_net = EFRDN(**net.config.to_dict()).to(device).double().eval().set_attention(emha_sdpa)
    exact_net.load_state_dict(net.state_dict())

    @functools.cache
    def exact() -> Tensor:
        with torch.inference_mode():
            return torch.cat([exact_net(image[None].double()) for image in x])

    def check(name: str, out: Tensor) -> float:
        error = (out.double() - exact()).abs().max().item()
        bound = TOLERANCES[RUNGS[name].dtype]
        if not error <= bound:  # also NaN
            raise AssertionError(f"{name}: max error {error:.2e} above {bound}")
        return error

    return Subject(
        "network",
        str(case),
        {
            name: _maker(name, net, x)
            for name in names(device, session.full)
            if session.wants(name, BASELINE)
        },
        check,
        BASELINE,
        lambda name: RUNGS[name].dtype,
        lambda name: _work(cost, case.batch, RUNGS[name].dtype),
        at=Point(case.batch * case.width * case.height, case.batch * cost.exps),
        series=f"x{case.scale}",
        modes=("warm", "graph") if device.type == "cuda" else ("warm",),
    )


def _work(cost: Cost, batch: int, dtype: str) -> Work:
    """Least work when every block is one kernel, which reads its parameters for every image."""
    element = 2 if dtype in HALF else 4
    moved = batch * element * sum(group.elements for group in groups(cost))
    return Work(2 * batch * cost.total, batch * cost.exps, moved)


def _maker(name: str, net: EFRDN, x: Tensor) -> Callable[[], Call]:
    rung = RUNGS[name]
    reason = rung.why_not(x.device)
    if reason is None:
        try:
            rung.prepare(net)
        except ERRORS as error:
            reason = " ".join(str(error).split())

    def make() -> Call:
        if reason is not None:
            raise NotRun(reason)
        run = rung.make(net, x)
        return lambda: run(x)

    return make


def bench_network(compare, harness, case, variant):
    compare(("network", case), lambda: subject(case, harness), variant)
