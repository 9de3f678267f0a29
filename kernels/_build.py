"""JIT build of `csrc/` at first use: library "cpu" by the C++ compiler alone, "cuda" by nvcc.

A build goes into a temporary folder under a file lock that dies with its holder, and one atomic
rename publishes it, so a killed build leaves nothing that hangs or loads. The file name holds a
hash of sources, flags, compilers and architectures. The bindings stand on libtorch's stable ABI:
one build serves every torch from 2.10 on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import filelock

from .. import env
from ..errors import BuildError
from . import _toolchain

__all__ = ["LIBRARIES", "Plan", "build", "load", "plan", "why_not"]

LIBRARIES = ("cpu", "cuda")
CSRC = Path(__file__).resolve().parent.parent / "csrc"
LOCK_SECONDS = 1200
"""How long to wait for another process that builds the same library."""
BUILD_SECONDS = 1800

_ABI = "0x020a000000000000"  # torch 2.10
_COMMON = ("-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_ISAS = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),  # of *_bf16_cpu.cpp, and nothing else for them
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": (),
}
_COST = {
    "cpu": "backend 'cpu' is off and the plain PyTorch reference serves, several times slower",
    "cuda": "backend 'cuda' is off and Triton or the plain PyTorch reference serves",
}
_log = logging.getLogger("efrdn_fast")


@dataclass(frozen=True)
class Plan:
    """One library to build: what, how, and the file it becomes."""

    library: str
    key: str
    jobs: tuple[tuple[str, Path, tuple[str, ...]], ...]
    """(object name, source, command without input and output)."""
    link: tuple[str, ...]
    """Link command up to the objects, "@" in the place of the objects."""

    @property
    def artifact(self) -> Path:
        return env.cache_dir() / f"efrdn_fast_{self.library}_{self.key}.so"

    @property
    def log(self) -> Path:
        return self.artifact.with_suffix(".log")


def _missing(library: str) -> str | None:
    """What the build lacks, and what to do; None when nothing."""
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}; got {library!r}")
    if sys.platform == "win32":
        return "the build of the C++ kernels knows g++ and clang++ only; use WSL"
    if _toolchain.host_compiler() is None:
        asked = os.environ.get("CXX")
        what = f"CXX={asked} was not found" if asked else "no C++ compiler (g++, clang++) on PATH"
        return f"{what}; install one (apt-get install g++) or set CXX"
    if _toolchain.ninja() is None:
        return "ninja was not found; pip install ninja"
    if not (_toolchain.torch_root() / "include/torch/csrc/stable/library.h").is_file():
        return "this torch has no headers of the stable ABI; install torch 2.10 or newer"
    return _missing_cuda() if library == "cuda" else None


def _missing_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    major = torch.version.cuda.split(".")[0]
    found = _toolchain.cuda(major)
    mend = (
        f"install the CUDA toolkit {torch.version.cuda} or "
        f"pip install 'cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]=={torch.version.cuda}.*'"
    )
    if found is None:
        return f"nvcc was not found (CUDA_HOME, PATH, the cuda-toolkit wheels); {mend}"
    if found.version.split(".")[0] != major:
        return f"{found.nvcc} is CUDA {found.version}, torch is for {torch.version.cuda}; {mend}"
    if found.include is None:
        return f"cuda_runtime.h of {found.nvcc} was not found; {mend}"
    if not any((found.include / name).is_file() for name in ("nv/target", "cccl/nv/target")):
        return f"nv/target of {found.nvcc} was not found, part of cccl; {mend}"
    if found.cudart is None:
        return f"libcudart.so.{major} was not found; {mend}"
    return None


def _host(cxx: str) -> tuple[str, ...]:
    return cxx, "-c", *_COMMON


def _binding(cxx: str) -> tuple[str, ...]:
    """Compiler command for the files that see torch."""
    return (
        *_host(cxx),
        f"-std={_toolchain.torch_standard()}",
        f"-DTORCH_TARGET_VERSION={_ABI}",
        f"-isystem{_toolchain.torch_root() / 'include'}",
    )


def _cpu_jobs(cxx: str) -> list[tuple[str, Path, tuple[str, ...]]]:
    jobs = []
    isas = _ISAS if _toolchain.is_x86() else {"generic": ()}
    for source in sorted(CSRC.glob("*_cpu.cpp")):
        if source.name.startswith("ops_"):
            jobs.append((f"{source.stem}.o", source, _binding(cxx)))
            continue
        for isa, flags in isas.items():
            if ("bf16" in isa) == ("_bf16_" in source.name):
                command = (*_host(cxx), "-std=c++17", f"-DEFRDN_FAST_ISA={isa}", *flags)
                jobs.append((f"{source.stem}.{isa}.o", source, command))
    return jobs


def _cuda_jobs(cxx: str, cuda: _toolchain.Cuda) -> list[tuple[str, Path, tuple[str, ...]]]:
    nvcc = (
        *(str(cuda.nvcc), "-c", "-O3", "-std=c++17", "-lineinfo", "-ccbin", cxx),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", f"-isystem={cuda.include}"),
        *_toolchain.architectures(cuda.nvcc, _visible_devices()),
    )
    jobs = [(f"{source.stem}.o", source, nvcc) for source in sorted(CSRC.glob("*.cu"))]
    binding = (*_binding(cxx), "-DUSE_CUDA", f"-isystem{cuda.include}")
    jobs += [(f"{source.stem}.o", source, binding) for source in sorted(CSRC.glob("ops_cuda*.cpp"))]
    return jobs


def _visible_devices() -> list[tuple[int, int]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def plan(library: str) -> Plan:
    """Commands and hash of a library.

    Raises:
        BuildError: Something that the build needs is missing.
    """
    if reason := _missing(library):
        raise BuildError(f"{reason} ({_COST[library]})")
    import torch

    cxx = _toolchain.host_compiler()
    libraries = ["torch_cpu"]
    extra: tuple[str, ...] = ()
    versions = [_toolchain.compiler_version(cxx), platform.machine(), *platform.libc_ver()]
    if library == "cpu":
        jobs = _cpu_jobs(cxx)
    else:
        cuda = _toolchain.cuda(torch.version.cuda.split(".")[0])
        try:
            jobs = _cuda_jobs(cxx, cuda)
        except ValueError as error:  # TORCH_CUDA_ARCH_LIST
            raise BuildError(f"{error} ({_COST[library]})") from error
        libraries.append("torch_cuda")
        extra = (str(cuda.cudart),)
        versions.append(cuda.version)
    folder = _toolchain.torch_root() / "lib"
    link = (cxx, "-shared", "@", f"-L{folder}", *(f"-l{name}" for name in libraries), *extra)
    key = _key(versions, jobs)
    return Plan(library, key, tuple(jobs), link)


def _key(versions: list[str], jobs: list[tuple[str, Path, tuple[str, ...]]]) -> str:
    """Hash of everything that decides the result; folders of this machine do not."""
    digest = hashlib.sha256("\0".join(versions).encode())
    for name, source, command in jobs:
        flags = [Path(f).name for f in command if not f.startswith("-isystem")]
        digest.update("\0".join((name, *flags)).encode())
        for path in _with_includes(source):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _with_includes(source: Path) -> list[Path]:
    """A source and the files of its own folder that it includes, also through each other."""
    found = [source]
    for path in found:
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M):
            included = source.parent / name
            if included.is_file() and included not in found:
                found.append(included)
    return found


def build(library: str, *, force: bool = False) -> tuple[Path, float]:
    """Build a library unless it is in the cache.

    Args:
        force: Build again even so. Default: False.

    Returns:
        The file, and the seconds the compilers ran (0: from the cache).

    Raises:
        BuildError: Something is missing, a compiler failed, or another process holds the lock for
            longer than `LOCK_SECONDS`.
    """
    what = plan(library)
    if what.artifact.is_file() and not force:
        return what.artifact, 0.0
    lock = what.artifact.with_suffix(".lock")
    try:
        what.artifact.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=LOCK_SECONDS):
            if what.artifact.is_file() and not force:  # built while this process waited
                return what.artifact, 0.0
            return what.artifact, _build(what)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {lock} for {LOCK_SECONDS} s to build the {library} library;"
            f" end it, or set EFRDN_FAST_CACHE_DIR to another folder ({_COST[library]})"
        ) from None
    except OSError as error:
        raise BuildError(
            f"the cache folder {what.artifact.parent} cannot be used: {error}; "
            f"set EFRDN_FAST_CACHE_DIR to a writable folder ({_COST[library]})"
        ) from error


def _build(what: Plan) -> float:
    """Compile and link in a temporary folder, then move the result into place; seconds taken."""
    for stale in what.artifact.parent.glob(f"{what.artifact.stem}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)  # of a killed build: the lock is ours
    _log.warning("building the %s kernels, once for this machine: %s", what.library, what.log)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(
        prefix=f"{what.artifact.stem}.", suffix=".partial", dir=what.artifact.parent
    ) as name:
        folder = Path(name)
        (folder / "build.ninja").write_text(_ninja_file(what))
        status = _run_ninja(folder, what.log)
        if status != 0:
            raise BuildError(
                f"building the {what.library} library failed: {_first_errors(what.log, status)} "
                f"({_COST[what.library]}); log: {what.log}"
            )
        os.replace(folder / "out.so", what.artifact)
    return time.perf_counter() - start


def _ninja_file(what: Plan) -> str:
    def text(*words: object) -> str:
        return " ".join(re.sub(r"([$ :])", r"$\1", str(word)) for word in words)

    def shell(*words: object) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    lines = ["rule run", "  command = $run", "  description = $out", ""]
    for name, source, command in what.jobs:
        run = shell(*command, source, "-o", name)
        lines += [f"build {text(name)}: run {text(source)}", f"  run = {run}"]
    objects = [name for name, _, _ in what.jobs]
    at = what.link.index("@")
    link = shell(*what.link[:at], *objects, *what.link[at + 1 :], "-o", "out.so")
    lines += [f"build out.so: run {text(*objects)}", f"  run = {link}", "default out.so", ""]
    return "\n".join(lines)


def _run_ninja(folder: Path, log: Path) -> int | None:
    """Exit status of ninja, None after `BUILD_SECONDS`.

    Its output goes to the log, and to stderr when asked for.
    """
    command = [_toolchain.ninja(), "-C", str(folder), "-v"]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    verbose = env.verbose_build()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        _end(process)

    watchdog = threading.Timer(BUILD_SECONDS, give_up)
    watchdog.start()
    try:
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                if verbose:
                    sys.stderr.write(line)
        status = process.wait()
    finally:
        watchdog.cancel()
        _end(process)  # of an interrupted build
    return None if late.is_set() else status


def _end(process: subprocess.Popen) -> None:
    """End ninja where it still runs; asked politely it ends the compilers it started as well."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_errors(log: Path, status: int | None, limit: int = 3) -> str:
    """The first lines of a log that name an error, on one line."""
    if status is None:
        return f"it took more than {BUILD_SECONDS} s"
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if re.search(r"\berror\b|undefined reference", line)]
    found = [line for line in found if not line.startswith("ninja:")] or found
    return " | ".join(line.strip() for line in found[:limit]) or f"ninja exited with {status}"


_outcomes: dict[str, str | None] = {}  # by library: None loaded, else why it failed
_guard = threading.Lock()


def why_not(library: str) -> str | None:
    """Why a library cannot be built or loaded here, in words; None when it can. Builds nothing.

    Names what is missing, what that costs and what to do; after a failed build, that failure.
    """
    if outcome := _outcomes.get(library):
        return outcome
    if library in _outcomes:
        return None
    reason = _missing(library)
    return f"{reason} ({_COST[library]})" if reason else None


def load(library: str) -> None:
    """Build a library where needed and register its ops, once per process.

    Raises:
        BuildError: It failed now or earlier in this process; the message names what is missing or
            the first errors, what that costs, and the log.
    """
    with _guard:
        if library not in _outcomes:
            try:
                _load(library)
                _outcomes[library] = None
            except BuildError as error:
                _outcomes[library] = str(error)
        if outcome := _outcomes[library]:
            raise BuildError(outcome)


def _load(library: str) -> None:
    import torch

    path, _ = build(library)
    try:
        torch.ops.load_library(path)
    except OSError:
        # A cache folder shared between unlike machines: what was built elsewhere may not load.
        path, _ = build(library, force=True)
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise BuildError(
                f"{path} does not load: {error} ({_COST[library]}); delete it and try again"
            ) from error
