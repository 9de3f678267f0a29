"""EFFB's three GCRBs: the chain as one op, three calls of `gcrb`, and folded eager (NHWC)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import bench_gcrb as single
from bench.harness.work import Work, work_of
from efrdn_fast import cases, ops

__all__ = ["BASELINE", "CASES", "bench_gcrb_chain", "names", "work"]

BASELINE = "folded"
CASES = tuple(cases.GcrbChainCase(case.shape) for case in cases.GCRB_BENCH)
THREE = "three-"
"""Three calls of `gcrb` on the backend that follows."""


def _backends(device: torch.device) -> list[str]:
    return [name for name in single.names(device, full=False) if name not in ("eager", "folded")]


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device."""
    return ["folded", *(name for b in _backends(device) for name in (b, THREE + b))]


def three(step: Callable[..., Tensor], x: Tensor, params: list[Tensor], *rest):
    """`step` on x, on its result and on the result of that."""
    out = []
    for i in (0, 6, 12):
        x = step(x, *params[i : i + 6], *rest)
        out.append(x)
    return tuple(out)


def make(args: tuple, device: torch.device) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    x, params, groups = args
    plain = [p.to(x.dtype) for p in params]
    calls = {"folded": lambda: three(single.folded, x, plain, groups)}
    library = getattr(torch.ops, ops.NAMESPACE)
    for name in _backends(device):
        calls[name] = lambda name=name: library.gcrb_chain(x, params, groups, name)
        calls[THREE + name] = lambda name=name: three(library.gcrb, x, params, groups, name)
    return calls


def work(case: cases.GcrbChainCase, dtype: torch.dtype) -> Work:
    """Least work of a case."""
    return work_of(case, dtype)


def bench_gcrb_chain(bench, harness, case, dtype, variant):
    args = case.args(dtype, harness.device)
    calls = lambda: make(args, harness.device)  # noqa: E731
    bench("gcrb_chain", case, dtype, variant, calls, args, work(case, dtype))
