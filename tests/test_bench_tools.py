"""Roofline, comparison, smoke and the GPU run of the bench."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import compare, devices, groups, plots, report, roofline, run_gpu, smoke
from bench.harness.store import Store
from bench.harness.work import ExpCounter
from efrdn_fast import EFRDN, cli
from efrdn_fast.config import EFRDNConfig
from efrdn_fast.counts import count
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.timing import Ratio

PYTHON = sys.executable


@pytest.mark.parametrize("options", [{}, {"segments": 3}, {"segment_tokens": 50}])
def test_groups_hold_what_a_forward_pass_does(options):
    """Multiply-adds against the flop counter, exponentials against those of softmax."""
    net, x = EFRDN(4, **options).eval(), torch.rand(1, 3, 15, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, ExpCounter() as exps:
        net(x)
    found = groups.groups(count(EFRDNConfig(4, **options), 16, 15))
    assert sum(group.flops for group in found) == flops.get_total_flops()
    assert sum(group.exps for group in found) == exps.softmax


def test_bytes_of_a_block_are_those_of_its_tensors():
    found = {group.name: group for group in groups.groups(count(EFRDNConfig(), 20, 10))}
    pixels, parameters = 200, 32 // 2 * 8 + 8 * 9 + 8 // 2 * 32 + 2 * (8 + 8 + 32)
    assert found["GCRB"].elements == 60 * (2 * 32 * pixels + parameters)
    assert found["attention"].elements == 2 * 4 * 144 * pixels


def test_gates_are_a_small_share_of_the_exponentials():
    """Sigmoids are not counted: at 320x180, under half a percent of the softmax's."""
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad(), ExpCounter() as exps:
        net(x)
    assert exps.sigmoid / 256 * 57600 < 0.005 * count(EFRDNConfig()).exps


def test_floor_names_what_binds():
    group = groups.Group("a", 1, flops=100, exps=10, elements=1000)
    rates = {"copy": 1e3, "matmul": 1e3, "exp": 1e3}
    assert group.floor(rates, 4) == (4.0, "copy")
    assert group.floor({**rates, "matmul": 1.0}, 4) == (100.0, "matmul")
    assert group.floor({**rates, "exp": 0.01}, 4) == (1000.0, "exp")


def test_block_times_add_up():
    net, x = EFRDN(4).eval(), torch.rand(1, 3, 16, 16)
    fast = EFRDNFast.from_reference(net, backend="reference")
    for subject in (net, fast):
        before = subject.forward
        times = groups.block_times(subject, x)
        assert {"GCRB", "ESA", "attention", "tokens", groups.REST} <= times.keys()
        assert min(times.values()) > 0
        assert subject.forward == before
        with torch.inference_mode():
            torch.testing.assert_close(subject(x), net(x), rtol=0, atol=1e-4)


def test_roofline_of_a_named_device(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["roofline", "--device", "h200", "--size", "320x180"])
    assert roofline.main() == 0
    text = capsys.readouterr().out
    assert "not measured" in text and "modelled" in text and "datasheet" in text
    (attention,) = (line for line in text.splitlines() if line.startswith("attention"))
    assert attention.split()[3] == "13.271" and "exp" in attention
    monkeypatch.setattr(sys, "argv", ["roofline", "--device", "h900"])
    assert roofline.main() == 1
    assert "no device 'h900': expected h200" in capsys.readouterr().err


def test_measured_rates_are_those_of_the_runs(tmp_path):
    run = {"revision": "r", "ceilings": {"copy": 1.0, "matmul": {"float32": 2.0}, "exp": 3.0}}
    row = {"op": "a", "case": "c", "dtype": "d", "variant": "v", "mode": "warm", "threads": 1}
    for i in (1, 2):
        best = {**run["ceilings"], "copy": float(i)}
        variant = {**row, "variant": str(i)}
        Store(tmp_path / "cpu-x", "a").add([variant], {**run, "ceilings": best, "date": str(i)})
    rates, source = devices.rates("cpu-x", results=tmp_path)
    assert rates == {"copy": 2.0, "matmul": 2.0, "exp": 3.0} and source == "measured"


def test_curve_grows_as_attention_does(monkeypatch):
    monkeypatch.setattr(roofline, "CURVE", ((480, 270), (1920, 1080)))
    points = {(p.way, p.width): p for p in roofline.curve(devices.rates("h200")[0], element=2)}
    for way in ("4 segments", "16 segments"):
        assert points[way, 1920].floor / points[way, 480].floor > 200
    fixed = "segment_tokens=576"
    assert points[fixed, 1920].floor / points[fixed, 480].floor == pytest.approx(16, rel=0.05)
    assert points[fixed, 1920].scores == points[fixed, 480].scores
    tiled = f"tiles of {roofline.TILE}"
    assert points[tiled, 1920].maps == points[tiled, 480].maps


def row(variant: str, **more) -> dict:
    key = {"op": "a", "case": "c", "dtype": "float32", "mode": "warm", "threads": 2}
    return {**key, "variant": variant, "status": "measured", **more}


def times(low: float, median: float, high: float) -> dict:
    return {"p20_ms": low, "p50_ms": median, "p80_ms": high}


def ratio(low: float, value: float, high: float) -> dict:
    return {"ratio_low": low, "ratio": value, "ratio_high": high, **times(1, 1, 1)}


def test_compare(tmp_path, capsys, monkeypatch):
    old = [
        row("alone", **times(9, 10, 11)),
        row("same", **times(9, 10, 11)),
        row("load", **{**ratio(1.9, 2.0, 2.1), **times(1, 1, 1)}),
        row("lost", **ratio(1.9, 2.0, 2.1)),
        row("loud", **times(9, 10, 11)),
        row("gone", **times(9, 10, 11)),
        row("guess", **times(9, 10, 11)),
    ]
    new = [
        row("alone", **times(4, 5, 6)),
        row("same", **times(10, 11, 12)),
        row("load", **{**ratio(1.95, 2.05, 2.2), **times(3, 3, 3)}),
        row("lost", **ratio(0.9, 1.0, 1.1)),
        {**row("loud", **times(90, 100, 110)), "status": "noisy"},
        {**row("guess", **times(9, 10, 11)), "status": "modelled"},
    ]
    for folder, rows, torch_version in (("old", old, "2.10"), ("new", new, "2.11")):
        run = {"revision": "r", "date": folder, "versions": {"torch": torch_version}}
        Store(tmp_path / folder, "a").add(rows, run)
    found = {c.key[3]: c for c in compare.changes(tmp_path / "old", tmp_path / "new" / "a.json")}
    assert {name: change.verdict for name, change in found.items()} == {
        "alone": "faster",
        "same": "within the noise",
        "load": "within the noise",
        "lost": "slower",
        "loud": "noisy",
        "guess": "no figure: measured, then modelled",
    }
    assert found["alone"].factor == 2 and found["lost"].factor == 0.5
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert compare.main() == 1
    text = capsys.readouterr().out
    assert "not the same: torch: 2.10, then 2.11" in text
    assert "1 faster, 1 slower, 1 noisy" in text
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "old")])
    assert compare.main() == 0
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), str(tmp_path / "old")])
    assert compare.main() == 2
    assert "holds no results" in capsys.readouterr().err


def test_smoke_fails_below_its_floor(monkeypatch, capsys):
    x = torch.rand(64)

    def pair():
        return (lambda: [x.exp() for _ in range(400)] and x.exp()), lambda: x.exp()

    monkeypatch.setattr(smoke, "PAIRS", {"network": pair})
    got, passed = smoke.check("network", 0.05, 2.0)
    assert isinstance(got, Ratio) and passed
    assert not smoke.check("network", 0.05, 1e6)[1]
    monkeypatch.setattr(smoke, "FLOORS", {"network": 1e6})
    monkeypatch.setattr(sys, "argv", ["smoke", "--seconds", "0.05"])
    assert smoke.main() == 1
    assert "SLOWER" in capsys.readouterr().out


def test_gpu_run_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert run_gpu.main(["--out", str(out)]) == run_gpu.NO_GPU
    assert "no CUDA device: torch sees none; nothing was run" in capsys.readouterr().err
    assert not out.exists()
    assert run_gpu.main(["--out", str(out), "--dry-run"]) == run_gpu.NO_GPU
    text = capsys.readouterr().out
    for name in ("environment", "tests", "sanitizer", "ladder", "kernels", "tuning", "training"):
        assert f"\n{name} " in f"\n{text}"
    with pytest.raises(SystemExit) as wrong:
        run_gpu.main(["--out", str(out), "--only", "nonsense"])
    assert wrong.value.code == 2 and "no step nonsense" in capsys.readouterr().err


def test_gpu_steps_fit_the_time_and_name_real_files():
    todo = run_gpu.steps(run_gpu.ROOT / "out")
    assert [step.name for step in todo[:3]] == ["environment", "tests", "ladder"]
    for step in todo:
        for word in step.command:
            if word.endswith(".py") and not word.startswith("/"):
                assert (run_gpu.ROOT / word).is_file(), word


def test_runner_keeps_what_was_done(tmp_path):
    step = run_gpu.Step
    sleep = "import subprocess, sys; print('begun', flush=True); "
    sleep += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    todo = [
        step("good", (PYTHON, "-c", "print('fine')"), 30),
        step("bad", (PYTHON, "-c", "raise SystemExit(7)"), 30),
        step("slow", (PYTHON, "-c", sleep), 2),
        step("absent", (PYTHON, "-c", ""), 30, ("no_such_package", "bin:no-such-program")),
        step("nothing", ("no-such-program",), 30),
    ]
    runner = run_gpu.Runner(tmp_path, 60)
    runner.run(todo)
    stored = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert {s["name"]: s["status"] for s in stored} == {
        "good": "passed",
        "bad": "failed",
        "slow": "cut off",
        "absent": "not run",
        "nothing": "failed",
    }
    notes = {s["name"]: s["note"] for s in stored}
    assert notes["bad"] == "exit status 7, see bad.log"
    assert notes["absent"] == "missing: no_such_package, bin:no-such-program"
    assert (tmp_path / "good.log").read_text() == "fine\n"
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    assert next(s["seconds"] for s in stored if s["name"] == "slow") < 30


def test_runner_stops_when_the_time_is_up(tmp_path):
    now = iter(range(0, 1000, 20))
    runner = run_gpu.Runner(tmp_path, 30, clock=lambda: next(now))
    outcomes = runner.run([run_gpu.Step(str(i), (PYTHON, "-c", ""), 30) for i in range(3)])
    assert [o.status for o in outcomes] == ["passed", "not run", "not run"]
    assert outcomes[1].note == "no time left"


def test_bench_command(capsys):
    sized = ["bench", "--device", "cpu", "--backend", "reference", "--size", "20x16"]
    assert cli.main([*sized, "--seconds", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "20x16 plain, SDPA" in text and "20x16 EFRDNFast" in text
    assert "torch" in text.splitlines()[0] and "x [" in text
    assert cli.main([*sized, "--seconds", "0"]) == 1
    assert "--seconds must be positive, got 0" in capsys.readouterr().err


def test_report_makes_tables_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    run = {"revision": "abc", "date": "d", "device": "Some CPU", "isa": "AVX2"}
    run["versions"] = {"torch": "2.11"}
    rows = [
        {**row("sdpa", **times(9, 10, 11)), "baseline": "sdpa", "error": 1.5e-6},
        {**row("ours", **ratio(1.9, 2.0, 2.1)), "baseline": "sdpa", "error": None},
        {**row("late", p50_ms=2500.0), "status": "modelled", "baseline": "sdpa"},
        {**row("gone"), "status": "not run", "baseline": "sdpa"},
    ]
    Store(tmp_path / "cpu-x", "a").add(rows, run)
    page = "before\n<!-- bench: network cpu-x a c -->\nold\n<!-- /bench -->\nafter\n"
    made = report.render_page(page, "../")
    assert "old" not in made and made.startswith("before\n") and made.endswith("after\n")
    assert "| `sdpa` | 10 ms | 1 | 1.5e-06 |" in made
    assert "| `ours` | 1 ms | 2.00x [1.90, 2.10] |  |" in made
    assert "| `late` | 2.50 s (modelled) |  |  |" in made
    assert "gone" not in made and "Some CPU, AVX2, torch 2.11, revision abc" in made
    assert report.render_page(made, "../") == made
    absent = report.render_page(page.replace("cpu-x", "cuda-nvidia-h200"), "")
    assert "Not measured: no results of `a` on cuda-nvidia-h200." in absent
    with pytest.raises(ValueError, match="expected TABLE DEVICE OP CASE"):
        report.render_page(page.replace(" a c", ""), "")
    with pytest.raises(ValueError, match="no table 'networks'"):
        report.render_page(page.replace("network", "networks"), "")


def test_pictures_know_when_they_are_stale(tmp_path):
    results = tmp_path / "results"
    run = {"revision": "abc", "date": "d"}
    rows = [
        {**row("sdpa", **times(900, 1000, 1100)), "case": "x4-2x32x32"},
        {**row("ours", **times(800, 900, 1000)), "case": "x4-2x32x32"},
    ]
    store = Store(results / "cpu-x", "train")
    store.add(rows, run)
    (picture,) = plots.pictures(results, tmp_path)
    assert picture.path.name == "bench_training_cpu-x.png"
    assert picture.stale()
    picture.draw()
    assert not picture.stale()
    store.add([{**rows[0], "p50_ms": 1001.0}], run)
    assert picture.stale()
