"""Fixtures of all tests: data folders, a fixed seed, the GPU marker, poisoned memory."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from efrdn_fast.kernels import _build, _plan, _toolchain

from efrdn_fast import EFRDN, checkpoint, cli, dispatch, env, testing
from tests import backends

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # for `bench`; an installed efrdn_fast still comes first


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    if hasattr(config, "workerinput"):  # pytest -n: one thread each, so that workers share cores
        torch.set_num_threads(1)
    config.addinivalue_line("markers", "op(name): the op whose backends `target` runs through")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def _folder(candidates: list[Path], what: str, mend: str) -> Path:
    for folder in candidates:
        if folder.is_dir():
            return folder
    reason = f"no {what} found at {', '.join(map(str, candidates))}; {mend}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with `benchmark/` and `train/`: EFRDN_FAST_DATA, else `../shared/data`."""
    given = env.data_dir()
    candidates = [given] if given else [REPOSITORY.parent / "shared" / "data"]
    return _folder(candidates, "images", "set EFRDN_FAST_DATA to the folder that holds them")


@pytest.fixture(scope="session")
def vectors_root() -> Path:
    """Folder of block-by-block test vectors: beside the data folder, else `../shared/vectors`."""
    given = env.data_dir()
    candidates = [given.parent / "vectors"] if given else []
    candidates.append(REPOSITORY.parent / "shared" / "vectors")
    return _folder(candidates, "test vectors", "put them in `vectors` beside EFRDN_FAST_DATA")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Same seed for every test; TF32 off, so that float32 means float32."""
    torch.manual_seed(42)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def poison_empty():
    """New uninitialised tensors hold NaN: an element that a kernel does not write shows."""
    with testing.poison_empty():
        yield


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoint of a small random x2 network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    return checkpoint.save(EFRDN(2, channels=16, distilled=4), folder / "net.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A library "cpu" of one small source, with a cache of its own; returns its csrc folder."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "ops_tiny_cpu.cpp").write_text('#include "tiny.h"\nint tiny() { return TINY; }\n')
    (csrc / "tiny.h").write_text("#define TINY 1\n")
    monkeypatch.setattr(_plan, "CSRC", csrc)
    monkeypatch.setattr(_build, "_outcomes", {})
    monkeypatch.setenv("EFRDN_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return csrc


@pytest.fixture
def compiler(tmp_path, monkeypatch, tiny):
    """The host compiler behind a script in the folder of the test.

    It notes each run in `runs`, waits while `hold` exists, and runs `fail` in its place where that
    exists.
    """
    host = shlex.join(_toolchain.host_compiler())
    script = tmp_path / "cxx"
    script.write_text(
        f"""#!/bin/sh
case "$*" in *--version*) exec {host} --version;; esac
echo $$ >> {tmp_path}/runs
while [ -e {tmp_path}/hold ]; do sleep 0.05; done
[ -e {tmp_path}/fail ] && exec sh {tmp_path}/fail
exec {host} "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


@pytest.fixture
def upscale(weights, capsys):
    """Runs `efrdn upscale` with the small network; returns (status, lines out, lines of errors)."""

    def call(*args):
        status = cli.main(["upscale", "-n", str(weights), *map(str, args)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err.splitlines()

    return call


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target` of a test marked `op(name)`: each (device, backend) that implements the op."""
    if "target" not in metafunc.fixturenames:
        return
    op = metafunc.definition.get_closest_marker("op").args[0]
    serving = {
        "cpu": ("reference", "cpu", *backends.INTERPRETED),
        "cuda": ("reference", "triton", "cuda"),
    }
    targets = [
        pytest.param(
            (device, impl.backend),
            id=f"{device}-{impl.backend}",
            marks=backends.marks(device, impl),
        )
        for device, names in serving.items()
        for impl in dispatch.implementations(op)
        if impl.backend in names
    ]
    metafunc.parametrize("target", targets)
