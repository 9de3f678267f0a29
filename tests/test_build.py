"""The JIT build: cache key, failures and their words, lock, killed and parallel builds, nvcc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from efrdn_fast.kernels import _build, _plan, _toolchain

from efrdn_fast.errors import BuildError
from tests.tiny_build import REPOSITORY, start_build, wait_for

pytestmark = pytest.mark.skipif(_toolchain.host_compiler() is None, reason="no C++ compiler")


def test_build_once_then_from_the_cache(tiny):
    path, seconds = _build.build("cpu")
    assert path.is_file() and seconds > 0
    assert _build.build("cpu") == (path, 0.0)
    _build.load("cpu")
    assert _build.why_not("cpu") is None
    left = {p.suffix for p in path.parent.iterdir()}
    assert left <= {".so", ".log", ".lock", ".built"}, "temporary folders are removed"


def test_key_follows_sources_flags_and_compiler(tiny, monkeypatch, tmp_path):
    key = _plan.plan("cpu").key
    assert _plan.plan("cpu").key == key
    (tiny / "tiny.h").write_text("#define TINY 2\n")
    changed = _plan.plan("cpu").key
    (tiny / "unrelated.h").write_text("")
    assert _plan.plan("cpu").key == changed != key
    monkeypatch.setattr(_plan, "_COMMON", (*_plan._COMMON, "-g"))
    flags = _plan.plan("cpu").key
    monkeypatch.setattr(_toolchain, "compiler_version", lambda _: "g++ 99")
    assert len({key, changed, flags, _plan.plan("cpu").key}) == 4


def test_key_does_not_depend_on_where_the_package_is(tiny, monkeypatch, tmp_path):
    key = _plan.plan("cpu").key
    monkeypatch.setattr(_plan, "CSRC", tiny.rename(tmp_path / "elsewhere"))
    assert _plan.plan("cpu").key == key


def test_failure_names_the_error_and_is_remembered(tiny, monkeypatch):
    (tiny / "ops_tiny_cpu.cpp").write_text("int tiny() { return undeclared_name; }\n")
    with pytest.raises(BuildError, match="undeclared_name") as failure:
        _build.load("cpu")
    message = str(failure.value)
    log = Path(message.rsplit("log: ", 1)[1])
    assert "undeclared_name" in log.read_text()
    assert "backend 'cpu' is off" in message and "\n" not in message
    monkeypatch.setattr(_build, "build", lambda *_, **__: pytest.fail("built again"))
    with pytest.raises(BuildError, match="undeclared_name"):
        _build.load("cpu")
    assert _build.why_not("cpu") == message


def test_why_not_without_compiler_or_ninja(tiny, monkeypatch):
    monkeypatch.setattr(_toolchain, "ninja", lambda: None)
    reason = _build.why_not("cpu")
    assert "pip install ninja" in reason and "backend 'cpu' is off" in reason
    monkeypatch.setenv("PATH", "")
    reason = _build.why_not("cpu")
    assert "no C++ compiler" in reason and "install" in reason and "backend 'cpu' is off" in reason
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        _build.load("cpu")
    monkeypatch.setattr(_build, "_outcomes", {})
    monkeypatch.setenv("CXX", "g++-that-is-not-here")
    assert "CXX=g++-that-is-not-here was not found" in _build.why_not("cpu")


def test_compiler_with_launcher_and_arguments(compiler, tmp_path, monkeypatch):
    ccache = tmp_path / "bin" / "ccache"
    ccache.parent.mkdir()
    ccache.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/launched\nexec "$@"\n')
    ccache.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ccache.parent}:{tmp_path}:{os.environ['PATH']}")
    keys = set()
    for given in ("cxx", "ccache cxx", "cxx -DOTHER=1", "ccache cxx '-DOTHER=two words' -DMORE"):
        monkeypatch.setenv("CXX", given)
        path, seconds = _build.build("cpu")
        assert path.is_file() and seconds > 0
        keys.add(path)
    assert len(keys) == 4, "arguments decide the result"
    launched = (tmp_path / "launched").read_text()
    assert f"{compiler} -DOTHER=two words -DMORE -c -O3" in launched
    assert f"{compiler} -DOTHER=two words -DMORE -shared" in launched


@pytest.mark.parametrize(
    "given", ["ccache g++-that-is-not-here", "no-such-cxx -m64", "g++ 'open", " "]
)
def test_compiler_command_that_is_not_there(tiny, monkeypatch, given):
    monkeypatch.setenv("CXX", given)
    assert f"CXX={given} was not found" in _build.why_not("cpu")


def test_compiler_in_a_folder_with_a_space(compiler, tmp_path, monkeypatch):
    folder = tmp_path / "my tools"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./my tools/cxx")
    assert "was not found" in _build.why_not("cpu")
    compiler.rename(folder / "cxx")
    assert _toolchain.host_compiler() == (str(folder / "cxx"),)
    assert _build.build("cpu")[1] > 0


def test_host_compiler_of_nvcc():
    """nvcc takes a compiler alone; its arguments go by -Xcompiler, where a comma parts them."""
    assert _toolchain.nvcc_host(("/bin/g++",)) == ("-ccbin", "/bin/g++")
    assert _toolchain.nvcc_host(("/bin/ccache", "/bin/g++", "-Wl,-x", "-m64")) == (
        *("-ccbin", "/bin/g++", "-Xcompiler", r"-Wl\,-x", "-Xcompiler", "-m64"),
    )


def test_unknown_library():
    with pytest.raises(ValueError, match="cpu, cuda; got 'gpu'"):
        _build.why_not("gpu")


def test_cache_folder_that_cannot_be_made(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFRDN_FAST_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="set EFRDN_FAST_CACHE_DIR to a writable folder"):
        _build.build("cpu")


def test_lock_held_by_another(tiny, monkeypatch):
    monkeypatch.setattr(_build, "LOCK_SECONDS", 0.1)
    lock = _plan.plan("cpu").artifact.with_suffix(".lock")
    lock.parent.mkdir()
    with filelock.FileLock(lock), pytest.raises(BuildError, match="another process has held"):
        _build.build("cpu")
    assert _build.build("cpu")[1] > 0


def test_killed_build_leaves_nothing_that_hangs(compiler, tiny, tmp_path):
    (tmp_path / "hold").touch()
    process = start_build(tiny)
    try:
        runs = wait_for(lambda: (tmp_path / "runs").exists() and (tmp_path / "runs").read_text())
        process.kill()
        process.wait()
        artifact = _plan.plan("cpu").artifact
        assert list(artifact.parent.glob("*.partial")) and not artifact.exists()
    finally:
        process.kill()
        (tmp_path / "hold").unlink()
    os.kill(int(runs.split()[0]), signal.SIGKILL)
    start = time.monotonic()
    path, seconds = _build.build("cpu")
    assert path.is_file() and seconds > 0
    assert time.monotonic() - start < 60
    assert not list(path.parent.glob("*.partial"))


def test_two_processes_build_once(compiler, tiny, tmp_path):
    (tmp_path / "hold").touch()
    processes = [start_build(tiny) for _ in range(2)]
    wait_for(lambda: (tmp_path / "runs").exists())
    (tmp_path / "hold").unlink()
    outputs = [p.communicate(timeout=240) for p in processes]
    assert all(p.returncode == 0 for p in processes), outputs
    assert outputs[0][0] == outputs[1][0]
    assert len((tmp_path / "runs").read_text().split()) == 2  # one compile, one link


def test_a_build_that_takes_too_long_is_ended(compiler, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "BUILD_SECONDS", 1)
    (tmp_path / "hold").touch()
    with pytest.raises(BuildError, match="it took more than 1 s"):
        _build.build("cpu")
    if (tmp_path / "runs").exists():
        (pid,) = (tmp_path / "runs").read_text().split()
        wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_verbose_build_shows_commands(tiny, monkeypatch, capfd):
    monkeypatch.setenv("EFRDN_FAST_VERBOSE_BUILD", "1")
    _build.build("cpu")
    assert "ops_tiny_cpu.cpp" in capfd.readouterr().err


def test_importing_the_package_builds_nothing(tmp_path):
    code = (
        "import efrdn_fast, efrdn_fast.functional, efrdn_fast.kernels._build as b; b.why_not('cpu')"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "EFRDN_FAST_CACHE_DIR": str(tmp_path / "cache")},
        check=True,
    )
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def nvcc(monkeypatch, tmp_path):
    """A stand-in for nvcc 13.0 in the folder of a wheel, the only one to be found."""
    folder = tmp_path / "nvidia" / "cu13"
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "nvcc"
    script.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
  --list-gpu-code) printf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_100\\nsm_120\\n';;
  --dryrun) echo '#$ TOP={folder}/bin/..' >&2;;
esac
"""
    )
    script.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_toolchain.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(_toolchain, "_wheel_folders", lambda: [folder])
    _toolchain.cuda.cache_clear()
    yield script
    _toolchain.cuda.cache_clear()


def test_nvcc_of_the_wheel_is_found(nvcc):
    found = _toolchain.cuda("13")
    assert (found.nvcc, found.version, found.include, found.cudart) == (nvcc, "13.0", None, None)
    folder = nvcc.parent.parent
    for path in (folder / "include" / "cuda_runtime.h", folder / "lib" / "libcudart.so.13"):
        path.parent.mkdir()
        path.touch()
    _toolchain.cuda.cache_clear()
    found = _toolchain.cuda("13")
    assert found.include == folder / "include"
    assert found.cudart == folder / "lib" / "libcudart.so.13"


def test_architectures(nvcc, monkeypatch):
    def names(visible=()):
        flags = _toolchain.architectures(nvcc, list(visible))
        return [flag.split(",code=")[1] for flag in flags]

    assert names([(9, 0), (9, 0), (8, 0)]) == ["sm_80", "compute_80", "sm_90", "compute_90"]
    assert names([(10, 3)]) == ["compute_100"], "newer than nvcc: its newest PTX"
    everything = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert names() == everything
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert names() == ["sm_86", "sm_90", "compute_90"]
    assert names([(8, 0)]) == ["sm_80", "compute_80"], "a visible device comes first"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"like '8\.0;9\.0"):
        names()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0")
    with pytest.raises(ValueError, match="names no architecture"):
        names()


def test_why_not_cuda_names_what_is_missing(nvcc, monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cuda_runtime.h" in _plan._missing_cuda()
    include = nvcc.parent.parent / "include"
    include.mkdir()
    (include / "cuda_runtime.h").touch()
    _toolchain.cuda.cache_clear()
    assert "nv/target" in _plan._missing_cuda()
    (include / "nv").mkdir()
    (include / "nv" / "target").touch()
    reason = _plan._missing_cuda()
    assert "libcudart.so.13" in reason and "cuda-toolkit[" in reason and "==13.0.*" in reason
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _toolchain.cuda.cache_clear()
    assert "is CUDA 13.0, torch is for 12.8" in _plan._missing_cuda()
    nvcc.unlink()
    _toolchain.cuda.cache_clear()
    assert "nvcc was not found" in _plan._missing_cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in _plan._missing_cuda()
