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
from efrdn_fast import EFRDN
from efrdn_fast.counts import count, count_parameters
from efrdn_fast.reference import emha, emha_sdpa
from efrdn_fast.transformer import EMHA

__all__ = ["BASELINE", "bench_peers", "cases_of", "names"]

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


def multiply_adds(net: nn.Module, x: Tensor) -> int:
    """True ones: convolutions, linear layers and attention, of which SDPA on a CPU shows none."""
    if isinstance(net, EFRDN):
        return count(net.config, x.shape[3], x.shape[2]).total
    attentions = [module for module in net.modules() if isinstance(module, EMHA)]
    for module in attentions:
        module.attention = emha
    flops = counted(net, (x,), x.dtype)[1].flops
    for module in attentions:
        module.attention = emha_sdpa
    return flops // 2


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
        if not error <= bound:  # also NaN
            raise AssertionError(f"{name}: max error {error:.2e} above {bound:.2e}")
        return error

    def describe(name: str) -> str:
        net = networks[name]
        macs = multiply_adds(net, x) / 1e9
        return f"{count_parameters(net):,} parameters, {macs:.2f} G multiply-adds"

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
    compare(("peers", case), lambda: subject(case, harness), variant)
