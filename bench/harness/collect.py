"""What a bench module offers: its function, cases, dtypes, and variants that run here or do not."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from efrdn_fast import dispatch

from .session import Subject
from .work import Work, counted, largest_error

__all__ = ["baseline", "cases", "dtypes", "function", "kernel_subject", "variants"]


def function(module: ModuleType) -> Callable[..., None]:
    """`bench_gcrb` of `bench/bench_gcrb.py`."""
    return getattr(module, module.__name__.rpartition(".")[2])


def cases(module: ModuleType, full: bool) -> list[Any]:
    """The module's `cases_of(full)`, or its CASES."""
    return list(module.cases_of(full) if hasattr(module, "cases_of") else module.CASES)


def dtypes(full: bool) -> list[torch.dtype]:
    """Of benches that have a parameter `dtype`."""
    return [torch.float32, torch.bfloat16] if full else [torch.float32]


def baseline(module: ModuleType) -> str | None:
    """The variant that is measured whatever was asked for."""
    return getattr(module, "BASELINE", None)


def variants(module: ModuleType, device: torch.device, full: bool) -> dict[str, str | None]:
    """Variant -> None, or the reason why it cannot run on the device."""
    why_not = getattr(module, "why_not", lambda name, device: None)
    found = {name: why_not(name, device) for name in module.names(device, full)}
    op = getattr(cases(module, full)[0], "op", None)
    for impl in dispatch.implementations(op) if op in dispatch.IMPLS else ():
        if impl.backend != "reference":
            found.setdefault(impl.backend, impl.why_not(device))
    return found


def kernel_subject(
    op: str,
    case: Any,
    dtype: torch.dtype,
    calls: dict[str, Callable[[], Any]],
    args: Any,
    work: Work,
    compared_with: str,
) -> Subject:
    """One op on one case; its results are held to the bound of the kernels' own tests."""
    plain, _ = counted(case.reference, args, dtype)
    exact, _ = counted(case.reference, args, torch.float64)
    return Subject(
        op,
        str(case),
        {name: lambda call=call: call for name, call in calls.items()},
        lambda name, out: largest_error(name, out, exact, plain),
        compared_with,
        lambda name: str(dtype).removeprefix("torch."),
        lambda name: work,
    )
