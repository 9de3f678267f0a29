"""The GPU run of the bench: its commands, its time, what it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import plain, run_gpu
from efrdn_fast import cli

PYTHON = sys.executable


def test_gpu_run_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    assert run_gpu.main(["--out", str(out)]) == run_gpu.NO_GPU
    said = capsys.readouterr().err
    assert "no CUDA device: torch sees none; nothing was run (not environment, verify" in said
    assert not out.exists()
    assert run_gpu.main(["--out", str(out), "--dry-run"]) == run_gpu.NO_GPU
    text = capsys.readouterr().out
    names = [step.name for step in run_gpu.steps(out)]
    assert {"environment", "tests", "sanitizer", "ladder", "kernels", "tuning"} < set(names)
    for name in names:
        assert f"\n{name} " in f"\n{text}"
    with pytest.raises(SystemExit) as wrong:
        run_gpu.main(["--out", str(out), "--only", "nonsense"])
    assert wrong.value.code == 2 and "no step nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_gpu.main(["--out", str(out), "--minutes", "0"])
    assert "--minutes must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("with_pytest", [True, False])
def test_gpu_steps_parse(monkeypatch, capsys, tmp_path, with_pytest):
    """Every command is one that its program understands, with a GPU or without."""
    have = run_gpu._have
    monkeypatch.setattr(run_gpu, "_have", lambda n: with_pytest if n == "pytest" else have(n))
    seen = set()
    for step in run_gpu.steps(tmp_path):
        words = list(step.command)
        if words[0] == "compute-sanitizer":
            words = words[words.index(PYTHON) :]
        assert words[:2] == [PYTHON, "-m"], step.name
        program, arguments = words[2], words[3:]
        seen.add(program)
        if program == "efrdn_fast":
            cli.build_parser().parse_args(arguments)
        elif program == "bench.plain":
            assert plain.main([*arguments, "--list"]) == 0
            assert "bench_" in capsys.readouterr().out, step.name
        elif program == "bench.tune":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            assert pytest.importorskip("bench.tune").main(arguments) == 1
            assert "nothing to tune" in capsys.readouterr().out
        else:
            assert (program == "pytest" and with_pytest) or "pytest" in step.needs
            files = [word for word in arguments if word.endswith(".py")]
            assert files and all((run_gpu.ROOT / file).is_file() for file in files)
    assert {"efrdn_fast", "bench.plain", "bench.tune"} <= seen


def test_gpu_steps_share_the_time(tmp_path):
    """Whatever every step takes of what it may, each gets its turn within the nine minutes."""
    todo = [replace(step, needs=()) for step in run_gpu.steps(tmp_path)]
    left = 540.0
    for at, step in enumerate(todo):
        limit = run_gpu.Runner._limit(todo[at:], left - run_gpu.GRACE)
        assert run_gpu.LEAST <= limit <= step.limit, step.name
        left -= limit
    assert left >= 0


def test_gpu_run_ended_from_outside_keeps_what_was_done(tmp_path):
    code = (
        "import signal, sys; from pathlib import Path; from bench import run_gpu as r;"
        "signal.signal(signal.SIGTERM, r._ended);"
        "step = lambda name, text: r.Step(name, (sys.executable, '-c', text), 99);"
        'slow = "import os, time; print(os.getpid(), flush=True); time.sleep(99)";'
        "r.Runner(Path(sys.argv[1]), 99).run([step('good', ''), step('slow', slow)])"
    )
    environment = {**os.environ, "PYTHONPATH": str(run_gpu.ROOT)}
    running = subprocess.Popen([PYTHON, "-c", code, str(tmp_path)], env=environment)
    log = tmp_path / "slow.log"
    while not (log.is_file() and log.read_text().endswith("\n")):
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(60) == 128 + 15
    stored = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [s["status"] for s in stored] == ["passed", "cut off"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


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
