"""Timing, ratios, models, results files and comparisons of the bench."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from bench.harness.model import Point, predict
from bench.harness.session import NotRun, Session, Subject
from bench.harness.store import Store, load
from bench.harness.summary import lines
from bench.harness.work import Work, counted, largest_error
from efrdn_fast import cases, reference, timing

CPU = torch.device("cpu")


def samples(ratio: float, spread: float, count: int = 60, seed: int = 0) -> tuple[list, list]:
    """Times of a baseline that takes `ratio` times as long, under a drifting load that both see."""
    rng = np.random.default_rng(seed)
    load = 1 + 0.5 * np.sin(np.linspace(0, 3, count))
    base = 1e-3 * ratio * load * (1 + spread * rng.random(count))
    return list(base), list(1e-3 * load * (1 + spread * rng.random(count)))


def test_quantile():
    assert timing.quantile([3, 1, 2], 0) == 1
    assert timing.quantile([3, 1, 2], 0.5) == 2
    assert timing.quantile([3, 1, 2], 1) == 3


@pytest.mark.parametrize("seed", range(5))
def test_second_run_falls_into_first_interval(seed):
    first = timing.paired_ratio(*samples(2.0, 0.1, seed=seed))
    second = timing.paired_ratio(*samples(2.0, 0.1, seed=seed + 100))
    assert first.low <= second.value <= first.high
    assert not first.noisy
    assert first.high - first.low < 0.3


def test_interval_covers_drift_of_the_ratio():
    base, other = samples(2.0, 0.02)
    base[40:] = [1.2 * s for s in base[40:]]
    ratio = timing.paired_ratio(base, other)
    assert ratio.low < 2.0 and ratio.high > 2.3


def test_wide_samples_are_noisy():
    assert timing.paired_ratio(*samples(2.0, 2.0, count=6)).noisy
    assert "noisy" in str(timing.paired_ratio(*samples(2.0, 2.0, count=6)))
    assert timing.is_noisy([1.0, 1.0, 2.0, 2.0, 2.0])
    assert not timing.is_noisy([1.0, 1.01, 1.02, 1.03, 1.04])


def test_paired_ratio_rejects_what_is_not_paired():
    with pytest.raises(ValueError, match="2 and 1 samples"):
        timing.paired_ratio([1, 2], [1])
    with pytest.raises(ValueError, match="0 and 0 samples"):
        timing.paired_ratio([], [])


def test_clock_modes():
    with pytest.raises(ValueError, match="'cold' cannot be timed on cpu"):
        timing.Clock(CPU, "cold")
    with pytest.raises(ValueError, match="'lukewarm'"):
        timing.Clock(CPU, "lukewarm")


def test_measure_takes_turns():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(1e-3)) for name in "ab"}
    got = timing.measure(calls, timing.Clock(CPU), seconds=0, least=4)
    assert [len(s) for s in got.values()] == [4, 4]
    assert min(got["a"] + got["b"]) >= 1e-3
    assert "".join(order[-8:]) == "abababab"


def test_peak_memory_sees_a_large_tensor():
    peak = timing.peak_memory(lambda: torch.ones(64 << 20, dtype=torch.uint8), CPU)
    if peak is None:
        pytest.skip("this kernel does not reset the high-water mark of resident memory")
    assert 60 << 20 < peak < 80 << 20


def test_model_splits_pixels_and_exponentials():
    def at(pixels: int) -> Point:
        return Point(pixels, pixels**2).measured(1e-6 * pixels + 1e-9 * pixels**2, 100 * pixels)

    got = predict([at(4096), at(1024)], 65536, 65536**2)
    assert got.seconds == pytest.approx(1e-6 * 65536 + 1e-9 * 65536**2)
    assert got.peak == 6553600
    alone = predict([at(1024)], 2048, 2048**2)
    assert alone.seconds == pytest.approx(4 * at(1024).seconds)
    assert predict([], 1, 1) is None


def test_work_of_the_ops():
    case = cases.GcrbCase((2, 32, 6, 5))
    _, work = counted(case.reference, case.args(), torch.float32)
    assert work.flops == 2 * 328 * 60
    assert work.exps == 0
    qkv = torch.randn(1, 10, 3 * 8 * 18)
    _, work = counted(reference.emha, (qkv, 8, 4), torch.float32)
    squares = 4 * 4 + 4 * 4 + 2 * 2
    assert work.exps == 8 * squares
    assert work.flops == 2 * 2 * 8 * 18 * squares
    assert work.bytes == 4 * (qkv.numel() + 10 * 8 * 18)


def subject(variants: dict, **more) -> Subject:
    exact = torch.arange(4.0, dtype=torch.float64)
    check = lambda name, out: largest_error(name, out, exact, exact.float())  # noqa: E731
    return Subject("op", "case", variants, check, "plain", **more)


def taking(seconds: float):
    """Makes a call that `stopwatch` says takes so long."""

    def call() -> torch.Tensor:
        return torch.arange(4.0)

    call.seconds = seconds
    return lambda: call


@pytest.fixture
def stopwatch(monkeypatch):
    """Calls of `taking` last what they say, however busy the machine is."""
    real = timing.Clock.sample

    def sample(self, call, loops=1):
        return getattr(call, "seconds", None) or real(self, call, loops)

    monkeypatch.setattr(timing.Clock, "sample", sample)


def broken():
    raise NotRun("no such device")


def test_session_checks_measures_and_stores(tmp_path, stopwatch):
    session = Session(CPU, seconds=0.3, results=tmp_path)
    work = Work(2_000_000, 0, 8_000_000)
    variants = {
        "plain": taking(4e-3),
        "fast": taking(1e-3),
        "wrong": lambda: lambda: torch.zeros(4),
        "absent": broken,
    }
    made = lambda: subject(variants, work=lambda name: work)  # noqa: E731
    got = {name: session.outcome(1, made, name) for name in variants}
    assert {name: each.status for name, each in got.items()} == {
        "plain": "measured",
        "fast": "measured",
        "wrong": "wrong",
        "absent": "not run",
    }
    assert "max error" in got["wrong"].note and not got["wrong"].samples
    (path,) = tmp_path.rglob("op.json")
    stored = load(path)
    rows = {row["variant"]: row for row in stored["rows"]}
    fast = rows["fast"]
    assert (fast["ratio_low"], fast["ratio"], fast["ratio_high"]) == (3.92, 4.0, 4.08)
    assert (fast["gbps"], fast["gflops"]) == (8.0, 2.0) and "gexps" not in fast
    ceilings = session.ceilings
    assert fast["copy_share"] == pytest.approx(8e9 / ceilings.copy, rel=1e-3)
    assert fast["matmul_share"] == pytest.approx(2e9 / ceilings.matmul["float32"], rel=1e-3)
    assert "ratio" not in rows["plain"] and "p50_ms" not in rows["wrong"]
    assert rows["absent"]["note"] == "no such device"
    (run,) = stored["runs"].values()
    assert run["versions"]["torch"] == torch.__version__
    assert run["ceilings"]["copy"] > 0 and run["command"]
    text = "\n".join(lines(session))
    assert "not run: no such device" in text and "ceilings of this run" in text
    first = next(
        line for line in text.splitlines() if line.startswith("first call") and "fast" in line
    )
    assert ": plain " in first and ", fast " in first and "absent" not in first
    assert path.with_suffix(".csv").read_text().count("\n") == 5


def test_session_models_what_does_not_fit_the_cap(stopwatch):
    session = Session(CPU, seconds=0.05, cap=0.1, results=None)
    small = lambda: subject({"plain": taking(2e-3)}, at=Point(100, 0))  # noqa: E731
    large = lambda: subject({"plain": taking(99)}, at=Point(100_000, 0))  # noqa: E731
    assert session.outcome(1, small, "plain").status == "measured"
    got = session.outcome(2, large, "plain")
    assert got.status == "modelled" and "100 pixels" in got.note
    assert got.samples["modelled"] == [pytest.approx(2.0)]
    assert session.rows[-1]["mode"] == "modelled"


def test_session_models_what_ran_out_of_memory(stopwatch):
    def too_large():
        raise torch.OutOfMemoryError("out of memory: tried to allocate 99 GiB")

    session = Session(CPU, seconds=0.05, results=None)
    small = lambda: subject({"plain": taking(2e-3)}, at=Point(100, 0))  # noqa: E731
    large = lambda: subject({"plain": too_large}, at=Point(200, 0))  # noqa: E731
    session.outcome(1, small, "plain")
    assert session.outcome(2, large, "plain").status == "does not fit"
    row = session.rows[-1]
    assert row["mode"] == "modelled" and row["p50_ms"] == 4.0 and "99 GiB" in row["note"]


def test_shares_of_the_ladder_are_those_of_its_dtypes(stopwatch):
    session = Session(CPU, seconds=0.05, results=None)
    work = {"plain": Work(8, 0, 8), "half": Work(8, 0, 4)}
    variants = {"plain": taking(1e-3), "half": taking(1e-3)}
    dtypes = {"plain": "fp32", "half": "bf16"}
    made = lambda: subject(variants, dtype=dtypes.get, work=work.get)  # noqa: E731
    session.outcome(1, made, "plain")
    rows = {row["variant"]: row for row in session.rows}
    best = session.ceilings.matmul
    for name, kind in (("plain", "float32"), ("half", "bfloat16")):
        assert rows[name]["matmul_share"] == pytest.approx(8e3 / best[kind], rel=1e-3)
    assert rows["half"]["gbps"] == rows["plain"]["gbps"] / 2


def test_graph_rows_count_the_capture(monkeypatch):
    """On a stand-in for a CUDA clock: capture is a part of the first call of graph mode only."""

    class Stand(timing.Clock):
        def __init__(self, device, mode):
            super().__init__(device)
            self.kind = mode

        def prepare(self, call):
            time.sleep(0.05 if self.kind == "graph" else 0)
            return call

        def sample(self, call, loops=1):
            return call.seconds

    monkeypatch.setattr("bench.harness.session.Clock", Stand)
    session = Session(CPU, seconds=0.05, results=None)
    made = lambda: subject({"plain": taking(1e-3)}, modes=("cold", "graph"))  # noqa: E731
    session.outcome(1, made, "plain")
    cold, graph = session.rows
    assert (cold["mode"], graph["mode"]) == ("cold", "graph")
    assert graph["first_ms"] >= cold["first_ms"] + 45


def test_session_says_what_memory_a_size_needs(monkeypatch):
    monkeypatch.setattr("bench.harness.session.free_memory", lambda device: 1 << 30)
    session = Session(CPU, seconds=0.05, results=None)
    session._points["op", "plain"].append(Point(100, 0, 1e-6, 1 << 28))
    got = session.outcome(1, lambda: subject({"plain": taking(99)}, at=Point(800, 0)), "plain")
    assert got.status == "does not fit" and "needs 2.0 GiB, 1.0 are free" in got.note


def test_slow_call_without_a_model_runs_once(stopwatch):
    session = Session(CPU, seconds=0.05, cap=0.03, results=None)
    got = session.outcome(1, lambda: subject({"plain": taking(0.02)}), "plain")
    assert "one call only" in got.note
    assert session.rows[0]["status"] == "noisy" and session.rows[0]["samples"] == 1


def test_store_replaces_rows_and_drops_unused_runs(tmp_path):
    row = {"op": "a", "case": "c", "dtype": "float32", "variant": "v", "mode": "warm", "threads": 2}
    row["status"] = "measured"
    store = Store(tmp_path, "a")
    for date, p50 in (("1", 1.0), ("2", 2.0)):
        store.add([{**row, "p50_ms": p50}], {"revision": "r", "date": date})
    store.add([{**row, "variant": "w", "p50_ms": math.pi}], {"revision": "r", "date": "2"})
    stored = load(tmp_path / "a.json")
    assert [r["p50_ms"] for r in stored["rows"]] == [2.0, math.pi]
    assert list(stored["runs"]) == ["r 2"]
    for mode, left in (("", 1), ("warm", 1), ("cold", 2)):
        store.add([{**row, "mode": mode}], {"revision": "r", "date": "3"})
        assert sum(r["variant"] == "v" for r in load(tmp_path / "a.json")["rows"]) == left


def test_store_keeps_what_was_measured(tmp_path):
    """A partial run, another machine's lack of a package or a guess takes no figure away."""
    row = {"op": "a", "case": "c", "dtype": "float32", "variant": "v", "threads": 2}
    store, date = Store(tmp_path, "a"), iter("123456")

    def after(**new) -> list[tuple]:
        store.add([{**row, **new}], {"revision": "r", "date": next(date)})
        stored = load(tmp_path / "a.json")["rows"]
        return [(r["variant"], r["mode"], r["status"]) for r in stored]

    guess, warm = ("v", "modelled", "modelled"), ("v", "warm", "measured")
    assert after(mode="modelled", status="modelled") == [guess]
    assert after(mode="warm", status="measured") == [warm]
    assert after(mode="modelled", status="modelled") == [warm]
    assert after(mode="", status="not run") == [warm]
    assert after(mode="warm", status="measured", variant="w") == [warm, ("w", "warm", "measured")]
    assert after(mode="", status="wrong") == [("w", "warm", "measured"), ("v", "", "wrong")]
    assert not list(tmp_path.glob("*.part"))


def test_load_names_what_is_no_results_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="holds no runs and rows"):
        load(tmp_path / "other.json")
