"""3x3 convolution of several sources, forward: concatenation and eager, torch.compile, backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bench.harness.work import Work, work_of
from efrdn_fast import cases, dispatch, ops, reference

__all__ = ["BASELINE", "CASES", "bench_conv3x3", "names", "work"]

BASELINE = "folded"
CASES = cases.CONV3X3_BENCH


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device."""
    usable = [
        impl.backend
        for impl in dispatch.implementations("conv3x3")
        if impl.backend != "reference" and impl.why_not(device) is None
    ]
    return ["eager", "folded", *(["compile"] if full else []), *usable]


def plain(xs, weight, bias, residual, groups, relu, interleaved) -> Tensor:
    return reference.conv3x3(
        xs,
        weight,
        bias,
        residual=residual,
        groups=groups,
        relu=relu,
        interleaved=interleaved,
    )


def make(args: list, full: bool, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    dtype = args[0][0].dtype

    def layout(memory_format: torch.memory_format) -> list:
        def convert(value):
            if not isinstance(value, Tensor):
                return value
            value = value.to(dtype)
            return value.contiguous(memory_format=memory_format) if value.ndim == 4 else value

        return tree_map(convert, list(args))

    nchw, nhwc = layout(torch.contiguous_format), layout(torch.channels_last)
    calls = {"eager": lambda: plain(*nchw), "folded": lambda: plain(*nhwc)}
    if full:
        mode = "max-autotune" if device.type == "cuda" else None
        compiled = torch.compile(plain, mode=mode, fullgraph=True)
        calls["compile"] = lambda: compiled(*nhwc)
    op = getattr(torch.ops, ops.NAMESPACE).conv3x3
    for name in names(device, full):
        if name not in ("eager", "folded", "compile"):
            calls[name] = lambda name=name: op(*args, name)
    return calls


def work(case: cases.Conv3x3Case, dtype: torch.dtype) -> Work:
    """Least work of a case."""
    return work_of(case, dtype)


def bench_conv3x3(bench, harness, case, dtype, variant):
    args = case.args(dtype, harness.device)
    calls = lambda: make(args, harness.full, harness.device)  # noqa: E731
    bench("conv3x3", case, dtype, variant, calls, args, work(case, dtype))
