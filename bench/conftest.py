"""Harness of the benches: check first, then paired measurement, then a CSV row and a table line.

`pytest bench/` measures; a variant that differs from the float64 reference gets no number. All
variants of a case are timed in turns (A B C A B C ...), so drift and load hit them alike; ratios
are medians over the turns. CPU: wall clock; CUDA: events on the current stream, caches warm.
Rows go to `bench/results/<device>/<op>.csv`.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from efrdn_fast import testing

BASELINE = "folded"
FIELDS = (
    *(
        "op",
        "case",
        "dtype",
        "variant",
        "min_ms",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "speedup",
        "samples",
    ),
    *("device", "threads", "python", "torch", "triton", "cuda", "revision", "command"),
)
KEY = ("op", "case", "dtype", "variant", "threads")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("efrdn_fast benches")
    group.addoption("--full", action="store_true", help="torch.compile and half precision as well")
    group.addoption("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--seconds", type=float, default=4.0, help="time per case (default: 4)")
    group.addoption(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the CSV files (default: bench/results)",
    )


@dataclass
class Measured:
    """Outcome of one variant of one case."""

    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Time of the baseline over this one, turn by turn."""


def _quantile(values: list[float], fraction: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(fraction * len(values)))]


class Harness:
    """Measures each case once for all its variants, keeps the numbers, writes the CSV files."""

    def __init__(self, config: pytest.Config):
        self.full = config.getoption("full")
        name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.budget = config.getoption("seconds")
        self.results = config.getoption("results")
        self._done: dict[Any, dict[str, Measured]] = {}
        self._context = {
            "device": self.device_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda or "",
            "revision": _revision(),
            "command": " ".join(["pytest", *sys.argv[1:]]),
        }

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
        model = found[1].strip() if found else platform.processor() or platform.machine()
        return f"{model} {torch.backends.cpu.get_cpu_capability()}"

    def measure(
        self, key: Any, variants: Callable[[], dict[str, Callable[[], Any]]], exact: Callable, plain
    ) -> dict[str, Measured]:
        """Numbers of all variants of a case; the first call checks and measures them.

        Args:
            key: Identifies the case.
            variants: Makes {name: call without arguments that returns the output}.
            exact: Output in float64.
            plain: Output of plain PyTorch in the dtype of the case.
        """
        if key not in self._done:
            self._done[key] = self._measure(variants(), exact(), plain())
        return self._done[key]

    def _measure(self, calls: dict, exact: torch.Tensor, plain: torch.Tensor) -> dict:
        out = {}
        with torch.inference_mode():
            for name, call in calls.items():
                try:
                    result = call()
                    tolerance = testing.TOLERANCES[result.dtype]
                    testing.assert_within(result, exact, plain, tolerance, name)
                    out[name] = Measured()
                except Exception as error:  # every reason is shown at the variant's own test
                    out[name] = Measured(error=f"{type(error).__name__}: {error}")
            good = {name: call for name, call in calls.items() if out[name].error is None}
            loops = {name: self._loops(call) for name, call in good.items()}
            for _ in self._turns():
                turn = {name: self._time(call, loops[name]) for name, call in good.items()}
                for name, seconds in turn.items():
                    out[name].seconds.append(seconds)
                    out[name].ratios.append(turn.get(BASELINE, math.nan) / seconds)
        return out

    def _turns(self):
        """At least 20 and at most 300 turns, as many as the time allows."""
        start = time.perf_counter()
        for turn in range(300):
            if turn >= 20 and time.perf_counter() - start > self.budget:
                return
            yield turn

    def _loops(self, call: Callable) -> int:
        """Warm up; calls per sample so that one takes half a millisecond at least."""
        for _ in range(3):
            call()
        return max(1, math.ceil(5e-4 / self._time(call, 3)))

    def _time(self, call: Callable, loops: int) -> float:
        """Seconds of one call, mean over `loops` calls in a row."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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

    def record(self, op: str, case: object, dtype: torch.dtype, variant: str, got: Measured):
        """One CSV row; a row of the same case, variant and thread count is replaced."""
        low, p20, p50, p80 = (f"{1e3 * _quantile(got.seconds, q):.4f}" for q in (0, 0.2, 0.5, 0.8))
        row = {
            **self._context,
            **{"op": op, "case": str(case), "dtype": str(dtype).removeprefix("torch.")},
            **{"variant": variant, "min_ms": low, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80},
            **{"speedup": f"{statistics.median(got.ratios):.3f}", "samples": len(got.seconds)},
        }
        folder = re.sub(r"[^a-z0-9]+", "-", self._context["device"].lower()).strip("-")
        path = self.results / folder / f"{op}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = list(csv.DictReader(path.open())) if path.is_file() else []
        rows = [r for r in rows if any(r[k] != str(row[k]) for k in KEY)] + [row]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package) if importlib.util.find_spec(package) else ""


def _revision() -> str:
    """Commit, with "+" when tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def harness(request: pytest.FixtureRequest) -> Harness:
    return Harness(request.config)


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[list[float]], None]:
    """Hands samples (seconds) to pytest-benchmark, for its table; nothing where it is missing."""
    if not request.config.pluginmanager.has_plugin("benchmark"):
        return lambda seconds: None
    benchmark = request.getfixturevalue("benchmark")

    def replay(seconds: list[float]) -> None:
        clock = iter([0.0, *(t for s in seconds for t in (s, 0.0))])
        benchmark._timer = lambda: next(clock)
        benchmark.pedantic(lambda: None, rounds=len(seconds))

    return replay


@pytest.fixture
def bench(harness: Harness, show: Callable, request: pytest.FixtureRequest) -> Callable:
    """bench(op, case, dtype, variant, variants, args): check, measure, record one variant."""

    def run(op, case, dtype, variant, variants, args):
        def reference(kind: torch.dtype) -> torch.Tensor:
            cast = [a.to(kind) if isinstance(a, torch.Tensor) else a for a in args]
            with torch.no_grad():
                return case.reference(*cast)

        got = harness.measure(
            (op, case, dtype), variants, lambda: reference(torch.float64), lambda: reference(dtype)
        )[variant]
        if got.error:
            pytest.fail(f"no number: {got.error}")
        show(got.seconds)
        harness.record(op, case, dtype, variant, got)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case`, `dtype` and `variant` of a bench from CASES and `variants_of` of its module."""
    if "variant" not in metafunc.fixturenames:
        return
    module, config = metafunc.module, metafunc.config
    name = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    full = config.getoption("full")
    dtypes = [torch.float32, torch.bfloat16] if full else [torch.float32]
    names = module.names(torch.device(name), full)
    cases = [
        pytest.param(case, dtype, name, id=f"{case}-{str(dtype).removeprefix('torch.')}-{name}")
        for case in module.CASES
        for dtype in dtypes
        for name in names
    ]
    metafunc.parametrize(("case", "dtype", "variant"), cases)
