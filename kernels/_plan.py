"""What the JIT build of `csrc/` needs and does: library "cpu" by the C++ compiler, "cuda" by nvcc.

The file name of a build holds a hash of sources, flags, compilers and architectures. The bindings
stand on libtorch's stable ABI: one build serves every torch from 2.10 on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .. import env
from ..errors import BuildError
from . import _toolchain

__all__ = ["COST", "CSRC", "LIBRARIES", "Plan", "missing", "plan"]

LIBRARIES = ("cpu", "cuda")
CSRC = Path(__file__).resolve().parent.parent / "csrc"
COST = {
    "cpu": "backend 'cpu' is off and the plain PyTorch reference serves, several times slower",
    "cuda": "backend 'cuda' is off and Triton or the plain PyTorch reference serves",
}
"""What it costs to be without a library."""

_ABI = "0x020a000000000000"  # torch 2.10
_COMMON = ("-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_ISAS = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),  # of *_bf16_cpu.cpp, and nothing else for them
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": (),
}
Job = tuple[str, Path, tuple[str, ...]]


@dataclass(frozen=True)
class Plan:
    """One library to build: what, how, and the file it becomes."""

    library: str
    key: str
    jobs: tuple[Job, ...]
    """(object name, source, command without input and output)."""
    link: tuple[str, ...]
    """Link command up to the objects, "@" in the place of the objects."""
    artifact: Path
    tools: str
    """Fingerprint of the tools that run, see `_toolchain.fingerprint`."""

    @property
    def log(self) -> Path:
        return self.artifact.with_suffix(".log")


def missing(library: str) -> str | None:
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


def _host(cxx: tuple[str, ...]) -> tuple[str, ...]:
    return *cxx, "-c", *_COMMON


def _binding(cxx: tuple[str, ...]) -> tuple[str, ...]:
    """Compiler command for the files that see torch."""
    return (
        *_host(cxx),
        f"-std={_toolchain.torch_standard()}",
        f"-DTORCH_TARGET_VERSION={_ABI}",
        f"-isystem{_toolchain.torch_root() / 'include'}",
    )


def _cpu_jobs(cxx: tuple[str, ...]) -> list[Job]:
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


def _cuda_jobs(cxx: tuple[str, ...], cuda: _toolchain.Cuda) -> list[Job]:
    nvcc = (
        *(str(cuda.nvcc), "-c", "-O3", "-std=c++17", "-lineinfo"),
        *_toolchain.nvcc_host(cxx),
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
        ValueError: EFRDN_FAST_CACHE_DIR is no folder.
    """
    if reason := missing(library):
        raise BuildError(f"{reason} ({COST[library]})")
    import torch

    cxx = _toolchain.host_compiler()
    libraries = ["torch_cpu"]
    extra: tuple[str, ...] = ()
    versions = [_toolchain.compiler_version(cxx), platform.machine(), *platform.libc_ver()]
    versions += [word for word in cxx if word.startswith("-")]
    tools = [*cxx]
    if library == "cpu":
        jobs = _cpu_jobs(cxx)
    else:
        cuda = _toolchain.cuda(torch.version.cuda.split(".")[0])
        try:
            jobs = _cuda_jobs(cxx, cuda)
        except ValueError as error:  # TORCH_CUDA_ARCH_LIST
            raise BuildError(f"{error} ({COST[library]})") from error
        libraries.append("torch_cuda")
        extra = (str(cuda.cudart),)
        versions.append(cuda.version)
        tools += [cuda.nvcc, cuda.include]
    folder = _toolchain.torch_root() / "lib"
    link = (*cxx, "-shared", "@", f"-L{folder}", *(f"-l{name}" for name in libraries), *extra)
    key = _key(versions, jobs)
    artifact = env.cache_dir() / f"efrdn_fast_{library}_{key}.so"
    return Plan(library, key, tuple(jobs), link, artifact, _toolchain.fingerprint(tools))


def _key(versions: list[str], jobs: list[Job]) -> str:
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
