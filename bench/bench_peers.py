"""EFRDN beside its peers in the same run, float32: time, memory, parameters, multiply-adds.

Times do not depend on the weights, which are random. A result is checked against the same network
in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.bench_network import NetworkCase
from bench.harness.model import Point
from bench.harness.session import Call, Session, Subject
from bench.harness.work import counted
from bench.peers import PEERS
from efrdn_fast.counts import count_parameters

__all__ = ["bench_peers", "cases_of", "names"]

BASELINE = "EFRDN"
TOLERANCE = 1e-4
"""Largest error, in units of the largest value of the result."""


def cases_of(full: bool) -> list[NetworkCase]:
    """x4 at one size; full: more sizes, and the other scales."""
    sizes = [(4, 64, 64)] if not full else [(2, 64, 64), (3, 64, 64), (4, 64, 64), (4, 128, 128)]
    sizes += [(4, 320, 180)] if full else []
    return [NetworkCase(*size) for size in sizes]


def names(device: torch.device, full: bool) -> list[str]:
    return list(PEERS)


def subject(case: NetworkCase, session: Session) -> Subject:
    x = case.input(session.device)
    networks: dict[str, nn.Module] = {}

    def maker(name: str) -> Callable[[], Call]:
        def make() -> Call:
            networks[name] = net = PEERS[name].network(case.scale, session.device)
            return lambda: net(x)

        return make

    def check(name: str, out: Tensor) -> float:
        net = networks[name].double()
        exact = net(x.double())
        net.float()
        error = (out.double() - exact).abs().max().item()
        bound = TOLERANCE * exact.abs().max().item()
        assert error <= bound, f"{name}: max error {error:.2e} above {bound:.2e}"  # also NaN
        return error

    def describe(name: str) -> str:
        net = networks[name]
        work = counted(net, (x,), torch.float32)[1]
        size = f"{count_parameters(net):,} parameters"
        return f"{size}, {work.flops / 2e9:.2f} G multiply-adds"

    return Subject(
        "peers",
        str(case),
        {name: maker(name) for name in PEERS if session.wants(name, BASELINE)},
        check,
        BASELINE,
        at=Point(case.width * case.height, 0),
        series=f"x{case.scale}",
        modes=("warm", "graph") if session.device.type == "cuda" else ("warm",),
        describe=describe,
    )


def bench_peers(compare, harness, case, variant):
    if harness.wants(variant, BASELINE):
        compare(("peers", case), lambda: subject(case, harness), variant)
