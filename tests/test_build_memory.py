"""Failures that a cache folder remembers: which, for how long, and what they say; their words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import filelock
import pytest
from efrdn_fast.kernels import _build, _plan, _record, _toolchain

from efrdn_fast.errors import BuildError
from tests.tiny_build import start_build

pytestmark = pytest.mark.skipif(_toolchain.host_compiler() is None, reason="no C++ compiler")


def runs(tmp_path: Path) -> int:
    """How often the compiler ran."""
    noted = tmp_path / "runs"
    return len(noted.read_text().split()) if noted.exists() else 0


@pytest.fixture
def broken(compiler, tmp_path):
    """A compiler that has failed once; the cache remembers it."""
    (tmp_path / "fail").write_text("echo 'tiny.h:1: error: no such thing' >&2; exit 1\n")
    with pytest.raises(BuildError, match="no such thing"):
        _build.build("cpu")
    assert runs(tmp_path) == 1
    return compiler


def test_another_process_does_not_compile_in_vain(broken, tiny, tmp_path):
    process = start_build(tiny)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and runs(tmp_path) == 1
    assert "building the cpu library failed on 20" in error
    assert "ops_tiny_cpu.o: tiny.h:1: error: no such thing (backend 'cpu' is off" in error
    assert "`efrdn doctor --build` tries again; log: " in error
    assert _build.why_not("cpu") in error
    with pytest.raises(BuildError, match="no such thing"):
        _build.load("cpu")
    assert runs(tmp_path) == 1


def test_who_waited_for_a_failure_does_not_repeat_it(compiler, tmp_path, monkeypatch):
    class Held(filelock.FileLock):
        """Another process held it, and its build failed."""

        def acquire(self, *args, **kwargs):
            _record.note_failure(_plan.plan("cpu"), "no such thing")
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(_build.filelock, "FileLock", Held)
    with pytest.raises(BuildError, match="no such thing"):
        _build.build("cpu")
    assert runs(tmp_path) == 0


def test_rebuild_tries_again_and_a_build_ends_the_memory(broken, tmp_path):
    (failed,) = (tmp_path / "cache").glob("*.failed")
    with pytest.raises(BuildError, match="no such thing"):
        _build.load("cpu")
    with pytest.raises(BuildError, match="no such thing"):
        _build.rebuild("cpu")
    assert runs(tmp_path) == 2 and failed.exists()
    (tmp_path / "fail").unlink()
    path, seconds = _build.rebuild("cpu")
    assert not failed.exists()
    assert _build.why_not("cpu") is None
    assert _record.built_seconds(_plan.plan("cpu")) == seconds > 0
    path.unlink()
    assert _record.built_seconds(_plan.plan("cpu")) is None


@pytest.mark.parametrize("what", ["compiler", "variable", "torch", "age", "clock", "damaged"])
def test_forgotten(broken, tmp_path, monkeypatch, what):
    import torch

    (failed,) = (tmp_path / "cache").glob("*.failed")
    record = json.loads(failed.read_text())
    assert _build.why_not("cpu") is not None
    if what == "compiler":  # installed again, with the time of its making as before
        stat, text = broken.stat(), broken.read_text()
        broken.unlink()
        broken.write_text(text)
        broken.chmod(0o755)
        os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif what == "variable":
        monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/somewhere")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "age":
        failed.write_text(json.dumps({**record, "time": record["time"] - _record.DAY}))
    elif what == "clock":  # it was ahead and is set right
        failed.write_text(json.dumps({**record, "time": record["time"] + 1000}))
    else:
        failed.write_bytes(failed.read_bytes()[:-5])
    assert _build.why_not("cpu") is None
    (tmp_path / "fail").unlink()
    assert _build.build("cpu")[1] > 0


@pytest.mark.parametrize(
    "text",
    [
        "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1",
        "echo 'Fatal error: error writing to a.s: No space left on device'; exit 1",
        "echo 'cc1plus: out of memory allocating 65536 bytes'; exit 1",
        "echo \"nvcc error   : 'cicc' died due to signal 9 (Kill signal)\"; exit 9",
        "kill -9 $$",
    ],
)
def test_what_may_pass_is_not_remembered(compiler, tmp_path, text):
    (tmp_path / "fail").write_text(f"{text}\n")
    for tries in (1, 2):
        with pytest.raises(BuildError, match=r"failed: ops_tiny_cpu\.o: "):
            _build.build("cpu")
        assert runs(tmp_path) == tries
        assert _build.why_not("cpu") is None


def test_a_time_out_is_not_remembered(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "BUILD_SECONDS", 1)
    (tmp_path / "hold").touch()
    with pytest.raises(BuildError, match="it took more than 1 s"):
        _build.build("cpu")
    assert _build.why_not("cpu") is None


def test_a_memory_that_cannot_be_written_breaks_nothing(compiler, tmp_path):
    (tmp_path / "fail").write_text("echo 'error: no such thing'; exit 1\n")
    what = _plan.plan("cpu")
    for suffix in (".failed", ".built"):  # a folder in the place of each record
        what.artifact.with_suffix(suffix).mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(BuildError, match="no such thing"):
            _build.build("cpu")
    assert runs(tmp_path) == 2
    (tmp_path / "fail").unlink()
    assert _build.build("cpu")[1] > 0
    assert _record.built_seconds(what) is None


def test_a_file_that_does_not_load_is_built_again_once(compiler, tmp_path, monkeypatch):
    artifact = _plan.plan("cpu").artifact
    artifact.parent.mkdir()
    artifact.write_bytes(b"of another machine")
    (tmp_path / "fail").write_text("echo 'error: no such thing'; exit 1\n")
    for _ in range(2):
        monkeypatch.setattr(_build, "_outcomes", {})
        with pytest.raises(BuildError, match="no such thing"):
            _build.load("cpu")
    assert runs(tmp_path) == 1
    (tmp_path / "fail").unlink()
    _build.rebuild("cpu")
    assert _build.why_not("cpu") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exit 3", "ops_tiny_cpu.o: the compiler ended with 3 and printed nothing"),
        ("echo something odd; exit 1", "ops_tiny_cpu.o: something odd"),
        (
            "echo note; echo 'a: error: one'; echo rest; echo 'b: error: two'; exit 1",
            "ops_tiny_cpu.o: a: error: one | b: error: two",
        ),
    ],
)
def test_a_failure_names_the_file_and_the_first_words(compiler, tmp_path, text, said):
    (tmp_path / "fail").write_text(f"{text}\n")
    with pytest.raises(BuildError) as failure:
        _build.build("cpu")
    assert f"building the cpu library failed: {said} (backend 'cpu' is off" in str(failure.value)


def test_messages_are_asked_for_in_english(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    (tmp_path / "fail").write_text('echo "language $LC_ALL"; exit 1\n')
    with pytest.raises(BuildError, match=r"language C "):
        _build.build("cpu")


def test_who_waits_outlasts_a_build():
    assert _build.LOCK_SECONDS >= _build.BUILD_SECONDS + 30  # ninja has 10 s to end
