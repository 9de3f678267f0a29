"""The guard against slow-downs: paired ratios that must stay above a floor, in about a minute.

    python -m bench.smoke [--seconds 20]

The floors stand well under the measured ratios, so that a busy machine passes and a lost fast path
does not. Exit status 1 below a floor; a noisy ratio below its floor is measured once more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from efrdn_fast.kernels import _plan

from efrdn_fast import EFRDN, cases
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.timing import Clock, Ratio, measure, paired_ratio

__all__ = ["FLOORS", "check", "main"]

FLOORS = {"network": 1.8, "gcrb": 1.5}
"""Bench -> least ratio to plain PyTorch: the network to eager with explicit scores, GCRB to folded
convolutions. A test holds them well under the committed ratios: of x4-64x64-b1 in network.json
(`eager-fp32` to `ours-cpu-fp32`) and of H180-W320 in gcrb.json."""

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def network() -> Pair:
    """x4, 64x64: eager with explicit scores, EFRDNFast on what `auto` takes."""
    torch.manual_seed(0)
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 64, 64)
    fast = EFRDNFast.from_reference(net)
    return lambda: net(x), lambda: fast(x)


def gcrb() -> Pair | None:
    """180x320: folded PyTorch, the C++ kernel; None where it cannot be built."""
    if _plan.missing("cpu"):
        return None
    case = cases.GCRB_BENCH[0]
    args = case.args()
    op = torch.ops.efrdn_fast.gcrb
    return lambda: case.reference(*args), lambda: op(*args, "cpu")


PAIRS = {"network": network, "gcrb": gcrb}


def check(name: str, seconds: float, floor: float) -> tuple[Ratio | None, bool]:
    """Ratio of a pair, None where it cannot run, and whether it stands above its floor."""
    with torch.inference_mode():
        pair = PAIRS[name]()
        if pair is None:
            return None, True
        baseline, fast = pair
        torch.testing.assert_close(fast(), baseline(), rtol=0, atol=1e-4)
        for _ in range(2):
            clock = Clock(torch.device("cpu"))
            calls = {"baseline": baseline, "fast": fast}
            samples = measure(calls, clock, seconds=seconds, least=5)
            ratio = paired_ratio(samples["baseline"], samples["fast"])
            if ratio.value >= floor or not ratio.noisy:
                break
    return ratio, ratio.value >= floor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each pair. Default: 20")
    args = parser.parse_args(argv)
    if not args.seconds > 0:
        parser.error(f"--seconds must be positive, got {args.seconds}")
    failed = False
    for name, floor in FLOORS.items():
        ratio, passed = check(name, args.seconds, floor)
        failed |= not passed
        shown = "not run: the C++ kernels cannot be built here" if ratio is None else str(ratio)
        print(f"{name}: {shown} (floor {floor}x): {'ok' if passed else 'SLOWER'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
