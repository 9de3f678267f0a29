"""The backends that tests run on a CPU, and why one is skipped."""

from __future__ import annotations

import os

import pytest
import torch
from efrdn_fast.kernels import _plan

from efrdn_fast import dispatch

__all__ = ["CPU_BACKENDS", "INTERPRETED", "marks", "on_cpu"]

INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def marks(device: str, impl: dispatch.Impl) -> list[pytest.MarkDecorator]:
    """Skips an implementation that cannot run; a build that failed before is no reason to."""
    if device == "cuda" and not torch.cuda.is_available():
        return [pytest.mark.gpu]
    cpp = impl.backend == "cpu"
    reason = _plan.missing("cpu") if cpp else impl.why_not(torch.device(device))
    return [pytest.mark.skip(reason=f"backend {impl.backend}: {reason}")] if reason else []


def on_cpu(op: str) -> list[tuple[str, list[pytest.MarkDecorator]]]:
    """Backends of an op that take CPU tensors, with their marks."""
    names = ("reference", "cpu", *INTERPRETED)
    impls = [impl for impl in dispatch.implementations(op) if impl.backend in names]
    return [(impl.backend, marks("cpu", impl)) for impl in impls]


CPU_BACKENDS = [pytest.param(name, marks=why) for name, why in on_cpu("acrb") if name != "triton"]
"""`reference` and `cpu`, for the parameter `backend`."""
