"""What this machine has for the fast backends, what each can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, env
from .errors import BuildError

if TYPE_CHECKING:
    from .dispatch import BackendStatus

__all__ = ["build_all", "report"]

_MINUTES = {"cpu": 2, "cuda": 4}
"""Minutes of a build on two idle cores, rounded up (73 and 229 s on an AMD EPYC)."""


def report() -> list[tuple[str, str]]:
    """(what, finding) of driver, GPU, compilers, cache, builds and backends; builds nothing."""
    import torch

    from . import dispatch
    from .kernels import _plan

    rows = [
        ("efrdn_fast", f"{__version__}, Python {platform.python_version()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", _version("triton") or "not installed"),
        ("driver", _driver() or "no NVIDIA driver found"),
        *_gpus(),
        ("cpu", _cpu()),
        *_compilers(),
        ("cache", _cache()),
        *((f"library {name}", _library(name)) for name in _plan.LIBRARIES),
        ("EFRDN_FAST_BACKEND", _asked()),
    ]
    for row in dispatch.backends():
        rows.append((f"backend {row.backend}", _backend(row)))
    return rows


def build_all() -> Iterator[tuple[str, str, bool]]:
    """Build every library that can be built here, afresh: (library, finding, whether it failed)."""
    from .kernels import _build, _plan

    for library in _plan.LIBRARIES:
        if reason := _plan.missing(library):
            yield library, f"not built: {reason} ({_plan.COST[library]})", False
            continue
        try:
            path, seconds = _build.rebuild(library)
        except BuildError as error:
            serves = "" if _build.why_not(library) else "; the build of before stays in use"
            yield library, f"failed: {error}{serves}", True
        else:
            yield library, f"built in {seconds:.1f} s: {path}", False


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
        ("c++", f"{shlex.join(cxx)}: {_toolchain.compiler_version(cxx)}" if cxx else "not found"),
        ("ninja", ninja or "not found"),
        ("nvcc", f"{cuda.nvcc}: CUDA {cuda.version}" if cuda else "not found"),
    ]


def _cache() -> str:
    folder = env.cache_dir()
    builds = list(folder.glob("efrdn_fast_*.so")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in builds) / 2**20
    return f"{folder}: {len(builds)} builds, {size:.1f} MiB"


def _library(library: str) -> str:
    from .kernels import _build, _plan, _record

    if reason := _build.why_not(library):
        return f"cannot be used: {reason}"
    what = _plan.plan(library)
    if what.artifact.is_file():
        seconds = _record.built_seconds(what)
        took = f" in {seconds:.1f} s" if seconds is not None else ""
        return f"built{took}: {what.artifact}"
    return (
        f"not built yet: built at first use, some {_MINUTES[library]} minutes on two cores; "
        "`efrdn doctor --build` builds now"
    )


def _asked() -> str:
    try:
        return env.backend() + ("" if os.environ.get("EFRDN_FAST_BACKEND") else " (unset)")
    except ValueError as error:
        return f"invalid: {error}"


def _backend(row: BackendStatus) -> str:
    ops = [op for op in row.ops if not op.endswith("_backward")]
    able = "can run" if row.available else f"cannot run: {row.reason}"
    return f"{able}; ops: {', '.join(ops) or 'none'}"
