"""Fair timing: calls measured in turns (A B A B ...), medians, and paired ratios with an interval.

What is compared is timed alternately, so that drift and load hit all alike; a ratio is taken turn
by turn. A measurement that is too wide to be quoted is marked noisy.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    "MODES",
    "Clock",
    "Ratio",
    "first_call",
    "is_noisy",
    "measure",
    "paired_ratio",
    "peak_memory",
    "quantile",
]

MODES = ("warm", "cold", "graph")
"""warm: calls in a row. cold (CUDA): L2 emptied before each. graph (CUDA): replayed in a row."""

NOISY_SPREAD = 0.3
"""(p80 - p20) / p50 above which samples are not quoted."""
NOISY_INTERVAL = 0.25
"""(high - low) / median above which a paired ratio is not quoted."""
DRIFT = 0.02
"""Share by which the interval is widened: what the same code differs by in another process."""
SETTLE_SECONDS = 0.02  # worker threads of one library spin on after a call; the next one's wait
SAMPLE_SECONDS = 5e-4  # least time of a sample of many calls, far above the clock's resolution

Call = Callable[[], Any]


def quantile(values: Sequence[float], fraction: float) -> float:
    """Value below which `fraction` of `values` lies (the sample itself, not interpolated)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def is_noisy(seconds: Sequence[float]) -> bool:
    """Whether samples spread too far for their median to be quoted."""
    spread = quantile(seconds, 0.8) - quantile(seconds, 0.2)
    return spread > NOISY_SPREAD * quantile(seconds, 0.5)


@dataclass(frozen=True)
class Ratio:
    """How many times sooner one call is done than another."""

    value: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is too wide for the ratio to be quoted."""
        return not (self.high - self.low <= NOISY_INTERVAL * self.value)

    def __str__(self) -> str:
        shown = f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"
        return f"{shown} noisy" if self.noisy else shown


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> Ratio:
    """Median over the turns of baseline / other, with the interval a second run should hit.

    The interval is the 95 % one of a bootstrap over blocks of neighbouring turns, stretched to the
    medians of the run's three thirds (drift) and by `DRIFT` on both sides.

    Args:
        baseline, other: Seconds, of the same turns.

    Raises:
        ValueError: No samples, or not as many of the one as of the other.
    """
    if not baseline or len(baseline) != len(other):
        raise ValueError(f"paired_ratio: {len(baseline)} and {len(other)} samples, expected pairs")
    ratios = np.asarray(baseline) / np.asarray(other)
    count = len(ratios)
    block = max(1, count // 10)
    starts = np.random.default_rng(0).integers(0, count, size=(1000, -(-count // block)))
    picked = (starts[:, :, None] + np.arange(block)).reshape(1000, -1)[:, :count] % count
    medians = np.median(ratios[picked], axis=1)
    ends = [*np.quantile(medians, (0.025, 0.975))]
    if count >= 6:
        ends += [np.median(third) for third in np.array_split(ratios, 3)]
    low, high = min(ends) * (1 - DRIFT), max(ends) * (1 + DRIFT)
    return Ratio(float(np.median(ratios)), float(low), float(high))


class Clock:
    """Times calls on one device, in one of `MODES`.

    Raises:
        ValueError: The device cannot be timed in this mode.
    """

    def __init__(self, device: torch.device, mode: str = "warm"):
        if mode not in MODES or (mode != "warm" and device.type != "cuda"):
            raise ValueError(f"Clock: mode {mode!r} cannot be timed on {device}")
        self.device, self.mode = device, mode
        if mode == "cold":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def prepare(self, call: Call) -> Call:
        """What is to be timed in place of `call`: its CUDA graph, or the call itself."""
        if self.mode != "graph":
            return call
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # warm-up on a side stream, as capture demands
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def loops(self, call: Call) -> int:
        """Calls per sample, such that a sample is long enough for the clock."""
        if self.mode == "cold":
            return 1
        return max(1, math.ceil(SAMPLE_SECONDS / self.sample(call, 1)))

    def sample(self, call: Call, loops: int = 1) -> float:
        """Seconds of one call, mean over `loops` calls in a row."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.mode == "cold":
                self._flush.zero_()
            start.record()
            for _ in range(loops):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / loops
        start = time.perf_counter()
        for _ in range(loops):
            call()
        return (time.perf_counter() - start) / loops


def first_call(call: Call, device: torch.device) -> tuple[Any, float]:
    """Result and seconds (wall clock, device finished) of the first call."""
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def measure(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    seconds: float = 4.0,
    least: int = 20,
    most: int = 300,
) -> dict[str, list[float]]:
    """Samples of all calls, taken in turns after a warm-up.

    Args:
        calls: Name -> call without arguments, made by `Clock.prepare`.
        seconds: Time after which no further turn begins, once there are `least`.
        least, most: Number of turns.

    Returns:
        Name -> seconds of one call, one sample for every turn.
    """
    loops = {}
    for name, call in calls.items():
        call()
        loops[name] = clock.loops(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            if loops[name] == 1 and clock.device.type == "cpu":
                time.sleep(SETTLE_SECONDS)
            samples[name].append(clock.sample(call, loops[name]))
    return samples


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Most bytes that a call holds above what is held before it; None where nobody can tell.

    CUDA: the allocator's count. CPU: resident memory, whose high-water mark Linux resets.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    try:
        _trim()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: else its reuse shows not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
