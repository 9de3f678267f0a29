"""What the JIT build needs of this machine: host compiler, ninja, nvcc, headers, architectures."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DEFAULT_ARCHS",
    "Cuda",
    "architectures",
    "compiler_version",
    "cuda",
    "fingerprint",
    "host_compiler",
    "is_x86",
    "ninja",
    "nvcc_host",
    "torch_root",
    "torch_standard",
]

DEFAULT_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
"""Compute capabilities built for when no device is visible and TORCH_CUDA_ARCH_LIST is unset."""

_LAUNCHERS = ("buildcache", "ccache", "distcc", "icecc", "sccache")
_STEERING = (
    *("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)
"""Variables that compilers read."""


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _output(*command: str | Path) -> str:
    """Standard output and error of a short command; empty when it cannot run."""
    try:
        done = subprocess.run(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def host_compiler() -> tuple[str, ...] | None:
    """The C++ compiler as the words of a command: CXX, else the first of g++, c++ and clang++.

    CXX may have arguments, and a launcher before it ("ccache g++ -m64").
    """
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):  # first: a path may hold spaces
            return (os.path.abspath(path),)
    try:
        words = shlex.split(asked or "")
    except ValueError:  # a quote that does not end
        return None
    programs = [shutil.which(word) for word in words[: _programs(words)]]
    if not programs or None in programs:
        return None
    return *map(os.path.abspath, programs), *words[len(programs) :]


def _programs(words: Sequence[str]) -> int:
    """How many words of a compiler's command are programs: it may stand behind a launcher."""
    return 1 + (len(words) > 1 and Path(words[0]).name in _LAUNCHERS)


def nvcc_host(cxx: Sequence[str]) -> tuple[str, ...]:
    """Options by which nvcc takes a host compiler: it knows no launcher, and arguments apart."""
    programs = _programs(cxx)
    arguments = [("-Xcompiler", word.replace(",", r"\,")) for word in cxx[programs:]]
    return "-ccbin", cxx[programs - 1], *itertools.chain.from_iterable(arguments)


@functools.cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """First line of `compiler --version`."""
    return (_output(*compiler, "--version").splitlines() or ["unknown version"])[0]


def fingerprint(tools: Iterable[str | Path]) -> str:
    """Hash that changes where a tool or what it works with is replaced, or torch, or a variable.

    Folders of headers and of the compiler's own parts count by their time, which an installation
    changes.
    """
    import torch

    gcc = Path("/usr/lib/gcc")
    paths = [*tools, shutil.which("as"), shutil.which("ld"), ninja(), "/usr/include"]
    paths += ["/usr/include/c++", *sorted(gcc.glob("*/*"))]
    facts = [torch.__version__, str(torch_root())]
    facts += [f"{name}={os.environ.get(name)}" for name in _STEERING]
    for path in paths:
        try:
            stat = os.stat(path or "")
        except OSError:  # an argument, or there is none
            facts.append(str(path))
        else:
            facts.append(f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}")
            facts[-1] += f" {stat.st_ctime_ns}"  # a package brings the time of its own making
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def ninja() -> str | None:
    """The ninja on PATH, else the one of the `ninja` package."""
    if path := shutil.which("ninja"):
        return path
    if importlib.util.find_spec("ninja") is None:
        return None
    from ninja import BIN_DIR

    return shutil.which("ninja", path=BIN_DIR)


def torch_root() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def torch_standard() -> str:
    """The C++ standard that torch itself was built with: its headers need no newer one."""
    import torch

    found = re.search(r"C\+\+ Version: (\d{4})", torch.__config__.show())
    return {"2020": "c++20", "2023": "c++23"}.get(found[1] if found else "", "c++17")


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler with the headers and the runtime library that go with it."""

    nvcc: Path
    version: str
    """Release, such as "13.0"."""
    include: Path | None
    """Folder of cuda_runtime.h, None: there is none."""
    cudart: Path | None
    """libcudart.so.N of the same major version, None: there is none."""


def _wheel_folders() -> list[Path]:
    """Folders that the nvidia-* wheels install into: nvidia/cu13 or nvidia/<part>."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return sorted(folder for root in roots for folder in root.iterdir() if folder.is_dir())


def _nvcc_candidates() -> list[Path]:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    paths = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if found := shutil.which("nvcc"):
        paths.append(Path(found))
    paths += [folder / "bin" / "nvcc" for folder in _wheel_folders()]
    return [path for path in paths if os.access(path, os.X_OK)]


def _toolkit_root(nvcc: Path) -> Path:
    """Root of nvcc's toolkit. A script on PATH may stand before it, so nvcc itself is asked."""
    found = re.search(r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-c", "-x", "cu", "x"), re.M)
    return Path(found[1]).resolve() if found else nvcc.resolve().parent.parent


def _describe(nvcc: Path) -> Cuda | None:
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if not found:
        return None
    root, wheels = _toolkit_root(nvcc), _wheel_folders()
    includes = [root / "include", *(folder / "include" for folder in wheels)]
    include = next((i for i in includes if (i / "cuda_runtime.h").is_file()), None)
    # torch's own copy first: at run time it is the one that is loaded.
    folders = [*(folder / "lib" for folder in wheels), root / "lib64", root / "lib"]
    name = f"libcudart.so.{found[1].split('.')[0]}"
    cudart = next((f / name for f in folders if (f / name).is_file()), None)
    return Cuda(nvcc, found[1], include, cudart)


@functools.cache
def cuda(major: str | None) -> Cuda | None:
    """The CUDA compiler to use: the first of torch's major version, else the first of any.

    Looked for in CUDA_HOME, CUDA_PATH, PATH and the cuda-toolkit wheels.
    """
    found = [each for nvcc in _nvcc_candidates() if (each := _describe(nvcc))]
    same = [each for each in found if each.version.split(".")[0] == major]
    return next(iter(same or found), None)


@functools.cache
def _supported(nvcc: Path) -> tuple[int, ...]:
    """Compute capabilities nvcc compiles for, as 80, 86, ..."""
    listed = _output(nvcc, "--list-gpu-code")
    return tuple(sorted({int(number) for number in re.findall(r"sm_(\d+)\b", listed)}))


def architectures(nvcc: Path, visible: list[tuple[int, int]]) -> tuple[str, ...]:
    """`-gencode` flags: visible devices with PTX, else TORCH_CUDA_ARCH_LIST, else the default list.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST names none that this nvcc supports.
    """
    supported = _supported(nvcc)
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if visible:
        wanted = [f"{major}.{minor}+PTX" for major, minor in sorted(set(visible))]
    else:
        wanted = re.split(r"[;,\s]+", given.strip()) if given.strip() else list(DEFAULT_ARCHS)
    flags = []
    for name in wanted:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {given!r} ({name!r})"
            )
        number, suffix = int(found[1] + found[2]), found[3]
        if number in supported:
            flags.append(f"-gencode=arch=compute_{number}{suffix},code=sm_{number}{suffix}")
        elif visible:  # newer than this nvcc: the newest PTX it has, compiled by the driver
            number = max((n for n in supported if n <= number), default=supported[0])
        else:
            continue
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={given!r} names no architecture that {nvcc} compiles for "
            f"({', '.join(f'{n // 10}.{n % 10}' for n in supported)})"
        )
    return tuple(dict.fromkeys(flags))
