"""`efrdn doctor`: every line that it promises, and builds on request."""

from __future__ import annotations

import pytest
from efrdn_fast.kernels import _build, _toolchain

from efrdn_fast import cli, doctor

ROWS = ("efrdn_fast", "torch", "triton", "driver", "cpu", "c++", "ninja", "nvcc", "cache")
BACKENDS = ("reference", "triton", "cuda", "cpu")


def test_report_names_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("EFRDN_FAST_CACHE_DIR", str(tmp_path / "cache"))
    rows = dict(doctor.report())
    assert set(ROWS) | {f"backend {name}" for name in BACKENDS} <= set(rows)
    assert any(name.startswith("gpu") for name in rows)
    assert rows["cache"] == f"{tmp_path / 'cache'}: 0 builds, 0.0 MiB"
    assert rows["backend reference"].startswith("can run; ops: gcrb")
    assert not (tmp_path / "cache").exists(), "a report builds nothing"


def test_report_says_why_a_backend_cannot_run(monkeypatch):
    monkeypatch.setattr(_build, "_outcomes", {})
    monkeypatch.setattr(_toolchain, "host_compiler", lambda: None)
    rows = dict(doctor.report())
    assert rows["c++"] == "not found"
    assert rows["backend cpu"].startswith("cannot run: no C++ compiler")
    assert "install" in rows["backend cpu"]


@pytest.mark.skipif(_toolchain.host_compiler() is None, reason="no C++ compiler")
def test_build_and_its_failure(monkeypatch, tmp_path, capsys):
    (tmp_path / "ops_tiny_cpu.cpp").write_text("int tiny() { return 1; }\n")
    monkeypatch.setattr(_build, "CSRC", tmp_path)
    monkeypatch.setattr(_build, "LIBRARIES", ("cpu",))
    monkeypatch.setattr(_build, "_outcomes", {})
    monkeypatch.setenv("EFRDN_FAST_CACHE_DIR", str(tmp_path / "cache"))
    assert cli.main(["doctor", "--build"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("build cpu") and "built in" in first
    (tmp_path / "ops_tiny_cpu.cpp").write_text("int tiny() { return undeclared_name; }\n")
    monkeypatch.setattr(_build, "_outcomes", {})
    assert cli.main(["doctor", "--build"]) == 1
    assert "undeclared_name" in capsys.readouterr().out
