"""Where the time of the network goes: exclusive time of every block group, plain and ours."""

from __future__ import annotations

import torch

from bench.bench_network import NetworkCase, network
from bench.groups import block_times
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.reference import emha_sdpa
from efrdn_fast.timing import quantile

__all__ = ["bench_blocks", "cases_of", "names"]

PASSES = 5


def cases_of(full: bool) -> list[NetworkCase]:
    sizes = [(96, 96), (320, 180)] if full else [(96, 96)]
    return [NetworkCase(4, width, height) for width, height in sizes]


def names(device: torch.device, full: bool) -> list[str]:
    return ["sdpa", "ours"]


def bench_blocks(harness, case, variant):
    net, x = network(case.scale, harness.device), case.input(harness.device)
    plain = type(net)(**net.config.to_dict()).to(x.device).eval().set_attention(emha_sdpa)
    plain.load_state_dict(net.state_dict())
    subject = EFRDNFast.from_reference(net) if variant == "ours" else plain
    with torch.inference_mode():
        torch.testing.assert_close(subject(x), plain(x), rtol=0, atol=1e-4)
    passes = [block_times(subject, x) for _ in range(PASSES)]
    # The pass of median length, so that its groups add up to it.
    median = quantile([sum(times.values()) for times in passes], 0.5)
    (times, *_) = (times for times in passes if sum(times.values()) == median)
    for name, seconds in times.items():
        note = f"of {median * 1e3:.1f} ms, the median of {PASSES} passes with timers"
        harness.add_mean("blocks", str(case), f"{variant}: {name}", "float32", [seconds], note)
