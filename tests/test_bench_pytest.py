"""`pytest bench/` and `python -m bench.plain`, run as users run them on one small case."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench import plain, run_gpu
from bench.harness.store import load

SMALL = ["--seconds", "0.05", "--device", "cpu"]


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    # pytest-benchmark turns itself off in a process that descends from a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
    environment["PYTHONPATH"] = str(run_gpu.ROOT)
    return subprocess.run(
        command, cwd=run_gpu.ROOT, env=environment, capture_output=True, text=True
    )


def test_pytest_bench_writes_results_and_the_form_of_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    kept, shown = tmp_path / "results", tmp_path / "shown.json"
    done = bench(
        *("bench/bench_gcrb.py", "-k", "N16", "--variants", "eager", *SMALL),
        *("--results", str(kept), "--benchmark-json", str(shown)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first call (made, built, loaded, captured), s: eager" in done.stdout
    (path,) = kept.glob("*/gcrb.json")
    rows = {row["variant"]: row for row in load(path)["rows"]}
    assert rows.keys() == {"eager", "folded"}  # the baseline comes with what was asked for
    assert rows["eager"]["ratio"] > 0 and rows["eager"]["copy_share"] > 0
    assert path.with_suffix(".csv").is_file()
    stored = json.loads(shown.read_text())["benchmarks"]
    found = {each["params"]["variant"]: each for each in stored}
    assert found.keys() == rows.keys()
    for name, each in found.items():
        assert each["group"].startswith("bench_gcrb N16") and each["extra_info"]["mode"] == "warm"
        assert each["stats"]["rounds"] == rows[name]["samples"]
        assert each["stats"]["min"] * 1e3 == pytest.approx(rows[name]["min_ms"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "eager,nonsense"], "--variants: no bench here has nonsense; there are"),
        (["--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["--device", "abacus"], "--device: device 'abacus' cannot be used here"),
    ],
)
def test_wrong_options_are_said_plainly(words, message, tmp_path):
    done = bench("bench/bench_acrb.py", "--results", str(tmp_path), *words)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_benches_run_without_pytest(tmp_path, capsys):
    words = ["gcrb", "--match", "N16", "--variants", "eager", *SMALL, "--results", str(tmp_path)]
    assert plain.main(words) == 0
    text = capsys.readouterr().out
    assert "gcrb N16-C32-H48-W48-g2-channels_last float32 eager warm" in text
    (path,) = tmp_path.glob("*/gcrb.json")
    assert {row["variant"] for row in load(path)["rows"]} == {"eager", "folded"}


def test_plain_bench_says_what_it_cannot_do(capsys):
    assert (
        plain.main(["gcrb", "--match", "N16", "--variants", "cuda", "--device", "cpu", "--list"])
        == 0
    )
    assert "cuda it needs a CUDA tensor" in capsys.readouterr().out
    for words, message in (
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["gcrb", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["gcrb", "--variants", "nonsense", "--device", "cpu"], "no bench here has nonsense"),
        (["gcrb", "--match", "N16", "zzz", "--device", "cpu"], "has zzz; there are N1"),
        (["gcrb", "--cap", "-1"], "--cap must be positive, got -1.0"),
    ):
        with pytest.raises(SystemExit) as wrong:
            plain.main(words)
        assert wrong.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_result_fails_the_run_without_pytest(monkeypatch, tmp_path, capsys):
    from bench import bench_gcrb

    real = bench_gcrb.folded
    monkeypatch.setattr(bench_gcrb, "eager", lambda *args: real(*args) + 0.1)
    words = ["gcrb", "--match", "N16", "--variants", "eager", *SMALL, "--results", str(tmp_path)]
    assert plain.main(words) == 1
    assert "eager wrong" in capsys.readouterr().out
