"""Devices: which one, how much memory it has left, and in which precision it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UsageError

__all__ = [
    "PRECISIONS",
    "caller_checks",
    "float32_ends",
    "free_memory",
    "is_out_of_memory",
    "precision",
    "resolve_device",
]

PRECISIONS = {
    "auto": ("fp32",),
    "fp32": ("fp32",),
    "tf32": ("tf32",),
    "bf16": ("bf16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
}
"""Name of a dtype -> precisions to try, the next one when the output is not finite."""
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
CGROUP = Path("/sys/fs/cgroup")
_caller_checks: ContextVar[bool] = ContextVar("efrdn_fast_caller_checks", default=False)


def caller_checks() -> bool:
    """Whether a block of `precision` in half precision surrounds the call."""
    return _caller_checks.get()


@contextmanager
def precision(device: torch.device, dtype: str) -> Iterator[None]:
    """Compute in fp32, tf32 (CUDA; fp32 elsewhere), fp16 or bf16 (autocast) inside the block.

    In fp16 and bf16 it is for the caller to look whether the result is finite.
    """
    if dtype in HALF:
        token = _caller_checks.set(True)
        try:
            with torch.autocast(device.type, HALF[dtype]):
                yield
        finally:
            _caller_checks.reset(token)
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def float32_ends(net: nn.Module) -> nn.Module:
    """Keep head and tails of an EFRDN in float32 under autocast, and return it.

    Rounding input or output to half precision would cost more than all that lies between.
    """
    for name in ("head", "reconstruct_deep", "reconstruct_shallow"):
        part = getattr(net, name)
        part.forward = _without_autocast(part.forward)
    return net


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where it does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        limit = int((CGROUP / "memory.max").read_text())  # ValueError on "max": no limit
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cache = int(stat["inactive_file"])  # counted as used, but given back when needed
        limits.append(limit - int((CGROUP / "memory.current").read_text()) + cache)
    except (OSError, ValueError, KeyError):
        pass
    return min(limits) if device.type == "cpu" and limits else None


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Device called `name`; None is cuda where there is one, else cpu.

    Raises:
        UsageError: No such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # not every backend has an is_available() of its own
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"device {str(name)!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise UsageError("device 'meta' holds no data; use cpu or cuda")
    return device


def _without_autocast(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return call


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any device means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in text for sign in ("can't allocate memory", "out of memory", "not enough memory")
    )
