"""One run of the benches: check each variant first, measure all in turns, keep rows and runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from efrdn_fast.device import free_memory, is_out_of_memory
from efrdn_fast.timing import (
    Clock,
    first_call,
    is_noisy,
    measure,
    paired_ratio,
    peak_memory,
    quantile,
)

from . import provenance
from .ceilings import Ceilings, measure_ceilings
from .model import Point, predict
from .store import Store
from .work import Work

__all__ = ["ERRORS", "LEAST_TURNS", "Call", "NotRun", "Outcome", "Session", "Subject"]

KINDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of dtypes in the ladder -> those of the ceilings."""
LEAST_TURNS = 3
MOST_TURNS = 300
ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, ImportError, OSError, MemoryError)
"""Reasons why a variant has no figure; anything else is a bug of the bench."""

Call = Callable[[], Any]


class NotRun(RuntimeError):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """One case, with all that is compared on it."""

    op: str
    case: str
    variants: Mapping[str, Callable[[], Call]]
    """Name -> function that makes the call to be timed; may raise `NotRun`."""
    check: Callable[[str, Any], float]
    """(name, result) -> largest error; raises AssertionError where it is too large."""
    baseline: str
    dtype: Callable[[str], str] = lambda name: "float32"
    """Name -> dtype it computes in."""
    work: Callable[[str], Work | None] = lambda name: None
    """Name -> least work of one call in its dtype, where it is known."""
    at: Point | None = None
    """Place of the case among the sizes, where larger ones are modelled from smaller ones."""
    series: str = ""
    """Which sizes: the cases of one series model each other."""
    modes: tuple[str, ...] = ()
    """Modes to measure in. Default: those of the session."""
    describe: Callable[[str], str] = lambda name: ""
    """Name -> note of a variant that was measured."""
    gradients: bool = False
    """Whether the calls need autograd."""


@dataclass
class Outcome:
    """What became of one variant."""

    status: str = "measured"
    note: str = ""
    error: float | None = None
    first: float | None = None
    """Seconds until the first result: made, built, loaded, compiled, run once."""
    captured: float = 0.0
    """Seconds that the capture as a CUDA graph took on top."""
    peak: int | None = None
    """Bytes above what was held before it was made, first result included."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Mode -> seconds, one for every turn."""


class Session:
    """Checks and measures subjects on one device, and writes what it found.

    Args:
        seconds: Time of the turns of one case; at least `LEAST_TURNS` turns are taken.
        cap: Seconds that the turns of one variant may take; one that would need more is modelled
            from smaller sizes or, where there are none, run once.
        results: Folder of the devices' folders; None keeps nothing.
        only: Names of variants; the baseline of a case is always measured. Default: all.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        full: bool = False,
        seconds: float = 4.0,
        cap: float = 60.0,
        results: Path | None = provenance.RESULTS,
        only: Iterable[str] = (),
    ):
        self.device, self.full, self.seconds, self.cap = device, full, seconds, cap
        self.only = frozenset(only)
        self.folder = results / provenance.device_folder(device) if results else None
        self.modes = ("cold", "graph") if device.type == "cuda" else ("warm",)
        self.rows: list[dict[str, Any]] = []
        self._points: dict[tuple[str, str], list[Point]] = defaultdict(list)
        self._done: dict[Any, dict[str, Outcome]] = {}

    @cached_property
    def ceilings(self) -> Ceilings:
        """Best rates of the device, measured at first use."""
        return measure_ceilings(self.device)

    @cached_property
    def run(self) -> dict[str, Any]:
        """Provenance of this run."""
        return {**provenance.record(self.device), "ceilings": self.ceilings.to_dict()}

    def wants(self, variant: str, baseline: str) -> bool:
        """Whether a variant was asked for."""
        return not self.only or variant in self.only or variant == baseline

    def outcome(self, key: Any, subject: Callable[[], Subject], variant: str) -> Outcome:
        """What became of one variant of a case; the first call measures the whole case."""
        if key not in self._done:
            made = subject()
            outcomes = self._done[key] = self._measure(made)
            base = outcomes[made.baseline].samples if made.baseline in outcomes else {}
            rows = [r for name in outcomes for r in self._rows(made, name, outcomes[name], base)]
            self._keep(made.op, rows)
        return self._done[key][variant]

    def add_mean(
        self,
        op: str,
        case: str,
        variant: str,
        dtype: str,
        seconds: list[float],
        note: str,
        peak: int | None = None,
    ) -> None:
        """A row of calls that differ, such as pictures of a set: p50 is their mean."""
        mean = sum(seconds) / len(seconds)
        row = {
            **{"op": op, "case": case, "dtype": dtype, "variant": variant, "mode": "once"},
            **{"threads": torch.get_num_threads(), "status": "measured", "note": note},
            **{"samples": len(seconds), "p50_ms": _round(mean, 1e3), "baseline": ""},
            **{"min_ms": _round(min(seconds), 1e3), "first_ms": _round(seconds[0], 1e3)},
            "peak_mib": _round(peak, 2**-20),
        }
        self._keep(op, [row])

    def add_missing(
        self, op: str, case: str, variant: str, dtype: str, status: str, note: str
    ) -> None:
        """A row that says why there is no figure."""
        row = {"op": op, "case": case, "dtype": dtype, "variant": variant, "mode": ""}
        row |= {"threads": torch.get_num_threads(), "status": status, "note": note, "samples": 0}
        self._keep(op, [{**row, "baseline": "", "first_ms": None, "peak_mib": None}])

    def _keep(self, op: str, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.folder:
            Store(self.folder, op).add(rows, self.run)

    def _measure(self, subject: Subject) -> dict[str, Outcome]:
        outcomes, calls = {}, {}
        with torch.inference_mode(not subject.gradients):
            for name, make in subject.variants.items():
                if not self.wants(name, subject.baseline):
                    continue
                outcomes[name] = self._modelled(subject, name) or Outcome()
                if outcomes[name].status == "measured":
                    try:
                        calls[name] = self._first(subject, name, make, outcomes[name])
                    except ERRORS as error:
                        outcomes[name].status, outcomes[name].note = _reason(error)
                        if outcomes[name].status == "does not fit":
                            outcomes[name].samples = self._guess(subject, name)
            for mode in subject.modes or self.modes:
                self._turns(calls, mode, outcomes)
        for name, outcome in outcomes.items():
            if subject.at and outcome.samples and "modelled" not in outcome.samples:
                samples = next(iter(outcome.samples.values()))
                point = subject.at.measured(quantile(samples, 0.5), outcome.peak)
                self._points[subject.op + subject.series, name].append(point)
        return outcomes

    def _modelled(self, subject: Subject, name: str) -> Outcome | None:
        """The outcome of a variant that would take too long or too much memory here."""
        points = self._points[subject.op + subject.series, name]
        at = subject.at and predict(points, subject.at.pixels, subject.at.exps)
        if not at:
            return None
        origin = f"from {', '.join(str(p.pixels) for p in points)} pixels"
        free = free_memory(self.device)
        if free is not None and at.peak > free:
            note = f"needs {at.peak / 2**30:.1f} GiB, {free / 2**30:.1f} are free; {origin}"
            return Outcome("does not fit", note, peak=at.peak, samples={"modelled": [at.seconds]})
        if at.seconds * LEAST_TURNS > self.cap:
            return Outcome("modelled", origin, peak=at.peak, samples={"modelled": [at.seconds]})
        return None

    def _guess(self, subject: Subject, name: str) -> dict[str, list[float]]:
        """Modelled seconds of a variant whose memory ran out; nothing without smaller sizes."""
        points = self._points[subject.op + subject.series, name]
        at = subject.at and predict(points, subject.at.pixels, subject.at.exps)
        return {"modelled": [at.seconds]} if at else {}

    def _first(self, subject: Subject, name: str, make: Callable[[], Call], to: Outcome) -> Call:
        made: list[Call] = []
        got: list[tuple[Any, float]] = []

        def whole() -> Any:
            made.append(make())
            return made[0]()

        to.peak = peak_memory(lambda: got.append(first_call(whole, self.device)), self.device)
        result, to.first = got.pop()
        to.error = subject.check(name, result)
        to.note = subject.describe(name)
        return made[0]

    def _turns(self, calls: Mapping[str, Call], mode: str, outcomes: Mapping[str, Outcome]) -> None:
        clock, prepared, once = Clock(self.device, mode), {}, {}
        for name, call in calls.items():
            try:
                prepared[name], seconds = first_call(partial(clock.prepare, call), self.device)
            except RuntimeError as error:
                outcomes[name].note = f"no {mode} figure: {_line(error)}"
                continue
            outcomes[name].captured = seconds if mode == "graph" else 0.0
            once[name] = clock.sample(prepared[name])
            if once[name] * LEAST_TURNS > self.cap:
                outcomes[name].samples[mode] = [once[name]]
                outcomes[name].note = f"one call only: {LEAST_TURNS} need more than {self.cap:g} s"
                del prepared[name]
        samples = measure(prepared, clock, seconds=self.seconds, least=LEAST_TURNS, most=MOST_TURNS)
        for name, seconds in samples.items():
            outcomes[name].samples[mode] = seconds

    def _rows(
        self, subject: Subject, name: str, outcome: Outcome, base: Mapping[str, list[float]]
    ) -> Iterator[dict[str, Any]]:
        """One row for every mode, or one that says why there is none."""
        common = {
            **{"op": subject.op, "case": subject.case, "dtype": subject.dtype(name)},
            **{"variant": name, "threads": torch.get_num_threads(), "note": outcome.note},
            **{"status": outcome.status, "baseline": subject.baseline},
            "first_ms": _round(outcome.first, 1e3),
            "peak_mib": _round(outcome.peak, 2**-20),
            "error": outcome.error and float(f"{outcome.error:.2e}"),
        }
        for mode, seconds in outcome.samples.items() or [("", [])]:
            row = {**common, "mode": mode, "samples": len(seconds)}
            if mode == "graph" and outcome.first is not None:
                row["first_ms"] = _round(outcome.first + outcome.captured, 1e3)
            if seconds:
                row |= {
                    f"{key}_ms": _round(quantile(seconds, q), 1e3)
                    for key, q in {"min": 0, "p20": 0.2, "p50": 0.5, "p80": 0.8}.items()
                }
                row |= self._rates(subject, name, quantile(seconds, 0.5))
                if mode != "modelled":
                    paired = base.get(mode, []) if name != subject.baseline else []
                    row |= _judged(row["status"], seconds, paired)
            yield row

    def _rates(self, subject: Subject, name: str, seconds: float) -> dict[str, Any]:
        work = subject.work(name)
        if work is None:
            return {}
        ceilings, out, dtype = self.ceilings, {}, subject.dtype(name)
        kind = KINDS.get(dtype, dtype)
        matmul = ceilings.matmul.get(kind, ceilings.matmul["float32"])
        for key, share, amount, best in (
            ("gbps", "copy_share", work.bytes, ceilings.copy),
            ("gflops", "matmul_share", work.flops, matmul),
            ("gexps", "exp_share", work.exps, ceilings.exp),
        ):
            if amount:
                out[key] = _round(amount / seconds, 1e-9)
                out[share] = _round(amount / seconds / best)
        return out


def _judged(status: str, seconds: list[float], base: list[float]) -> dict[str, Any]:
    """Paired ratio to the baseline; "noisy" where samples or ratio spread too far."""
    noisy = len(seconds) < LEAST_TURNS or is_noisy(seconds)
    if len(base) != len(seconds):  # the baseline has no figure, or one of them a single call
        return {"status": "noisy" if noisy else status}
    ratio = paired_ratio(base, seconds)
    return {
        "status": "noisy" if noisy or ratio.noisy else status,
        "ratio": _round(ratio.value),
        "ratio_low": _round(ratio.low),
        "ratio_high": _round(ratio.high),
    }


def _reason(error: BaseException) -> tuple[str, str]:
    """Status and note of a variant that failed."""
    if is_out_of_memory(error):
        return "does not fit", _line(error)
    if isinstance(error, (NotRun, ImportError)):
        return "not run", _line(error)
    return "wrong" if isinstance(error, AssertionError) else "failed", _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}" or type(error).__name__


def _round(value: float | None, factor: float = 1.0) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value * factor:.4g}")
