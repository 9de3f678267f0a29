"""`efrdn doctor`: every line that it promises, and builds on request."""

from __future__ import annotations

import shutil

import pytest
from efrdn_fast.kernels import _build, _plan, _toolchain

from efrdn_fast import cli, doctor, env

ROWS = (
    *("efrdn_fast", "torch", "triton", "driver", "cpu", "c++", "ninja", "nvcc", "cache"),
    *("library cpu", "library cuda", "EFRDN_FAST_BACKEND"),
)
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
    monkeypatch.setattr(_build, "rebuild", lambda _: pytest.fail("built without a compiler"))
    assert [row[2] for row in doctor.build_all()] == [False, False], "nothing to build: no failure"
    rows = dict(doctor.report())
    assert rows["c++"] == "not found"
    assert rows["backend cpu"].startswith("cannot run: no C++ compiler")
    assert "install" in rows["backend cpu"]
    assert rows["library cpu"].startswith("cannot be used: no C++ compiler")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `efrdn doctor` for the library "cpu" alone as a new process would."""

    def call(*args: str) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr(_build, "_outcomes", {})
        status = cli.main(["doctor", *args])
        lines = capsys.readouterr().out.splitlines()
        return status, {line[:18].strip(): line[19:] for line in lines}

    monkeypatch.setattr(_plan, "LIBRARIES", ("cpu",))
    return call


needs_compiler = pytest.mark.skipif(_toolchain.host_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_build_and_its_failure(tiny, run):
    status, rows = run()
    assert status == 0
    assert rows["library cpu"].startswith("not built yet: built at first use, some ")
    assert "minutes" in rows["library cpu"] and "`efrdn doctor --build`" in rows["library cpu"]
    status, rows = run("--build")
    assert status == 0 and rows["build cpu"].startswith("built in ")
    status, later = run()
    assert status == 0 and "build cpu" not in later
    assert later["library cpu"] == rows["library cpu"] == rows["build cpu"]
    (tiny / "ops_tiny_cpu.cpp").write_text("int tiny() { return undeclared_name; }\n")
    status, rows = run("--build")
    assert status == 1
    assert "undeclared_name" in rows["build cpu"]


@needs_compiler
def test_a_failed_build_leaves_no_backend_that_can_run(compiler, run, monkeypatch):
    false = shutil.which("false")
    monkeypatch.setenv("CXX", false)
    status, rows = run("--build")
    assert status == 1
    assert "ops_tiny_cpu.o: the compiler ended with 1 and printed nothing" in rows["build cpu"]
    for now in (rows, run()[1]):
        assert now["c++"].startswith(false)
        assert now["library cpu"].startswith("cannot be used: building the cpu library failed")
        assert now["backend cpu"].startswith("cannot run: building the cpu library failed")
        assert "`efrdn doctor --build` tries again" in now["backend cpu"]
        assert "log: " in now["backend cpu"]
    monkeypatch.setenv("CXX", str(compiler))
    assert run()[1]["backend cpu"].startswith("can run"), "another compiler may"


@needs_compiler
def test_a_failure_that_may_pass_counts_in_this_process(compiler, run, tmp_path):
    (tmp_path / "fail").write_text("echo 'error: No space left on device'; exit 1\n")
    status, rows = run("--build")
    assert status == 1 and "No space left" in rows["backend cpu"]
    assert rows["backend cpu"].startswith("cannot run")
    assert run()[1]["library cpu"].startswith("not built yet")


@needs_compiler
def test_a_build_of_before_serves_after_a_failure(compiler, run, tmp_path):
    assert run("--build")[0] == 0
    (tmp_path / "fail").write_text("exit 1\n")
    status, rows = run("--build")
    assert status == 1 and rows["build cpu"].endswith("; the build of before stays in use")
    assert rows["library cpu"].startswith("built in ")
    assert rows["backend cpu"].startswith("can run")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "auto (unset)"),
        ("auto", "auto"),
        ("cpu", "cpu"),
        (
            "opencl",
            "invalid: EFRDN_FAST_BACKEND must be auto, reference, triton, cuda, cpu or unset, "
            "got 'opencl'",
        ),
    ],
)
def test_the_backend_asked_for_is_shown(monkeypatch, value, shown):
    if value is None:
        monkeypatch.delenv("EFRDN_FAST_BACKEND", raising=False)
    else:
        monkeypatch.setenv("EFRDN_FAST_BACKEND", value)
    env.backend.cache_clear()
    try:
        assert dict(doctor.report())["EFRDN_FAST_BACKEND"] == shown
    finally:
        env.backend.cache_clear()
