"""What this machine has for the fast backends, what each can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, env
from .errors import BuildError

if TYPE_CHECKING:
    from .dispatch import BackendStatus

__all__ = ["build_all", "report"]


def report() -> list[tuple[str, str]]:
    """(what, finding) of driver, GPU, libraries, compilers, cache and backends; builds nothing."""
    import torch

    from . import dispatch

    rows = [
        ("efrdn_fast", f"{__version__}, Python {platform.python_version()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", _version("triton") or "not installed"),
        ("driver", _driver() or "no NVIDIA driver found"),
        *_gpus(),
        ("cpu", _cpu()),
        *_compilers(),
        ("cache", _cache()),
    ]
    for row in dispatch.backends():
        rows.append((f"backend {row.backend}", _backend(row)))
    return rows


def build_all() -> list[tuple[str, str, bool]]:
    """Build every library that can be built here, afresh: (library, finding, whether it failed)."""
    from .kernels import _build

    rows = []
    for library in _build.LIBRARIES:
        if reason := _build.why_not(library):
            rows.append((library, f"not built: {reason}", False))
            continue
        try:
            path, seconds = _build.build(library, force=True)
            _build.load(library)
        except BuildError as error:
            rows.append((library, f"failed: {error}", True))
        else:
            rows.append((library, f"built in {seconds:.1f} s: {path}", False))
    return rows


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.is_file() else None
    return found[0] if found else None


def _gpus() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("gpu", "torch sees no CUDA device")]
    rows = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"gpu {i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    return rows


def _cpu() -> str:
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    model = found[1] if found else platform.processor() or platform.machine()
    best = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {best}"


def _compilers() -> list[tuple[str, str]]:
    import torch

    from .kernels import _toolchain

    cxx, ninja = _toolchain.host_compiler(), _toolchain.ninja()
    cuda = _toolchain.cuda((torch.version.cuda or "").split(".")[0])
    return [
        ("c++", f"{cxx}: {_toolchain.compiler_version(cxx)}" if cxx else "not found"),
        ("ninja", ninja or "not found"),
        ("nvcc", f"{cuda.nvcc}: CUDA {cuda.version}" if cuda else "not found"),
    ]


def _cache() -> str:
    folder = env.cache_dir()
    builds = list(folder.glob("efrdn_fast_*.so")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in builds) / 2**20
    return f"{folder}: {len(builds)} builds, {size:.1f} MiB"


def _backend(row: BackendStatus) -> str:
    ops = [op for op in row.ops if not op.endswith("_backward")]
    able = "can run" if row.available else f"cannot run: {row.reason}"
    return f"{able}; ops: {', '.join(ops) or 'none'}"
