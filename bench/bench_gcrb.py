"""GCRB forward: eager with BatchNorm, folded eager (NHWC), torch.compile, every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.work import Work, work_of
from efrdn_fast import cases, dispatch, ops, reference

__all__ = ["BASELINE", "CASES", "bench_gcrb", "names", "work"]

BASELINE = "folded"
CASES = cases.GCRB_BENCH


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device."""
    usable = [
        impl.backend
        for impl in dispatch.implementations("gcrb")
        if impl.backend != "reference" and impl.why_not(device) is None
    ]
    return ["eager", "folded", *(["compile"] if full else []), *usable]


def _norm(x: Tensor, bias: Tensor) -> Tensor:
    """BatchNorm in evaluation whose folded form is `x + bias`."""
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    return F.batch_norm(x, zero, one - 1e-5, one, bias, eps=1e-5)


def eager(x, w1, b1, w2, b2, w3, b3, groups) -> Tensor:
    y = F.relu(_norm(F.conv2d(x, w1, groups=groups), b1))
    y = F.relu(_norm(F.conv2d(y, w2, padding=1, groups=w2.shape[0]), b2))
    return x + F.relu(_norm(F.conv2d(y, w3, groups=groups), b3))


def folded(x, *args) -> Tensor:
    *params, groups = args
    return reference.gcrb(x, *params, groups=groups)


def make(args: list, full: bool, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    x = args[0]
    plain = [a.to(x.dtype) if isinstance(a, Tensor) else a for a in args]
    nhwc = [
        a.to(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.ndim == 4 else a
        for a in plain
    ]
    calls = {"eager": lambda: eager(*nhwc), "folded": lambda: folded(*nhwc)}
    if full:
        mode = "max-autotune" if device.type == "cuda" else None
        compiled = torch.compile(folded, mode=mode, fullgraph=True)
        calls["compile"] = lambda: compiled(*nhwc)
    op = getattr(torch.ops, ops.NAMESPACE).gcrb
    for name in names(device, full):
        if name not in ("eager", "folded", "compile"):
            calls[name] = lambda name=name: op(*args, name)
    return calls


def work(case: cases.GcrbCase, dtype: torch.dtype) -> Work:
    """Least work of a case."""
    return work_of(case, dtype)


def bench_gcrb(bench, harness, case, dtype, variant):
    args = case.args(dtype, harness.device)
    calls = lambda: make(args, harness.full, harness.device)  # noqa: E731
    bench("gcrb", case, dtype, variant, calls, args, work(case, dtype))
