"""ACRB forward: eager with BatchNorm, folded eager (NHWC), torch.compile, every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.work import Work, work_of
from efrdn_fast import cases, dispatch, ops, reference

__all__ = ["BASELINE", "CASES", "bench_acrb", "names", "work"]

BASELINE = "folded"
CASES = cases.ACRB_BENCH


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device."""
    usable = [
        impl.backend
        for impl in dispatch.implementations("acrb")
        if impl.backend != "reference" and impl.why_not(device) is None
    ]
    return ["eager", "folded", *(["compile"] if full else []), *usable]


def eager(x, weight, bias, start) -> Tensor:
    """Three branches and one BatchNorm in evaluation, whose folded form is `weight` and `bias`."""
    row, column = weight[:, :, 1:2] / 2, weight[:, :, :, 1:2] / 4
    square = weight - F.pad(row, (0, 0, 1, 1)) - F.pad(column, (1, 1, 0, 0))
    xs = x[:, start : start + weight.shape[0]]
    y = F.conv2d(xs, row, padding=(0, 1)) + F.conv2d(xs, square, padding=1)
    y = y + F.conv2d(xs, column, padding=(1, 0))
    zero, one = torch.zeros_like(bias), torch.ones_like(bias)
    return xs + F.relu(F.batch_norm(y, zero, one - 1e-5, one, bias, eps=1e-5))


def folded(x, weight, bias, start) -> Tensor:
    return reference.acrb(x, weight, bias, start=start)


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
    op = getattr(torch.ops, ops.NAMESPACE).acrb
    for name in names(device, full):
        if name not in ("eager", "folded", "compile"):
            calls[name] = lambda name=name: op(*args, name)
    return calls


def work(case: cases.AcrbCase, dtype: torch.dtype) -> Work:
    """Least work of a case: the slice is read in place, d channels and not all beside them."""
    n, _, height, width = case.shape
    _, weight, bias, _ = case.args(dtype, "meta")
    moved = 2 * n * case.width * height * width * dtype.itemsize + weight.nbytes + bias.nbytes
    return work_of(case, dtype, moved)


def bench_acrb(bench, harness, case, dtype, variant):
    args = case.args(dtype, harness.device)
    calls = lambda: make(args, harness.full, harness.device)  # noqa: E731
    bench("acrb", case, dtype, variant, calls, args, work(case, dtype))
