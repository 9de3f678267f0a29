"""Builds the CUDA sources for the CPU and runs one launcher at a time (see simt.h)."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "Sparse",
    "between_nan",
    "binding",
    "executable",
    "execute",
    "require",
    "run",
]

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Values of `efrdn_fast::Dtype`."""
FLAGS = [
    *("-std=c++17", "-O1", "-fno-strict-aliasing", "-DEFRDN_FAST_SIMT"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
]
SANITIZE = [
    "-g1",
    "-fsanitize=address,bounds,alignment,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
]


@dataclass(frozen=True)
class Sparse:
    """A map inside a buffer that is larger than the memory, most of it never touched.

    `strides` are those of n, h, w in elements; `tensor` [N, C, H, W] gives the values.
    """

    tensor: Tensor
    strides: tuple[int, int, int]


def cuda_include() -> Path | None:
    """Folder of `cuda_fp16.h`: that of nvcc's toolkit, else of the wheels that torch brings."""
    candidates = [Path(torch.__file__).parent.parent / "nvidia" / "cu13" / "include"]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        if top := re.search(r"TOP=(\S+)", dry):
            candidates.insert(0, Path(top[1]) / "include")
    return next((c for c in candidates if (c / "cuda_fp16.h").exists()), None)


def require() -> None:
    """Build the programs; skip, or in CI fail, where the build lacks something."""
    needs = {
        "g++": shutil.which("g++"),
        "the CUDA headers (nvcc's toolkit or the nvidia wheels of torch)": cuda_include(),
    }
    missing = ", ".join(name for name, found in needs.items() if not found)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {missing}")
    if missing:
        pytest.skip(f"not installed: {missing}")
    for name in ("selftest", "runner"):
        executable(name)


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"efrdn_fast_simt_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _compile(command: Sequence[str], inputs: Sequence[Path], output: str) -> Path:
    """Run `command -o <file>` unless the result of the same command and inputs is there."""
    digest = hashlib.sha256(repr(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = _cache() / f"{digest.hexdigest()[:16]}_{output}"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"
        part.rename(target)
    return target


def _included(source: Path, found: dict[str, Path]) -> dict[str, Path]:
    """`found` and the project's own headers that `source` includes, directly or not."""
    for name in re.findall(r'#include "([\w.]+)"', source.read_text()):
        if name not in found:
            found[name] = next(f / name for f in (HERE, CSRC) if (f / name).exists())
            _included(found[name], found)
    return found


def _objects(sources: Sequence[Path], flags: Sequence[str]) -> list[Path]:
    out = []
    for source in sources:
        headers = _included(source, {})
        inputs = [source, *(headers[name] for name in sorted(headers))]
        command = ["g++", *flags, "-x", "c++", "-c", str(source)]
        out.append(_compile(command, inputs, f"{source.stem}.o"))
    return out


def _flags() -> list[str]:
    include = cuda_include()
    assert include, "no CUDA headers: neither nvcc nor torch's nvidia wheels are installed"
    return [*FLAGS, f"-I{HERE}", f"-I{CSRC}", f"-isystem{include}"]


@functools.cache
def executable(name: str) -> Path:
    """Build `runner` (every kernel of csrc/) or `selftest`; objects are cached by content."""
    flags = [*_flags(), *SANITIZE]
    sources = [HERE / "selftest.cu"]
    if name == "runner":
        sources = [HERE / "runner.cpp", *sorted(CSRC.glob("*.cu"))]
    objects = _objects(sources, flags)
    return _compile(["g++", *flags, *map(str, objects)], objects, name)


def binding(torch_flags: Sequence[str]) -> Path:
    """Build the library of the CUDA ops so that it takes CPU tensors and runs kernels as fibers.

    Not sanitized. Only the dispatch key in ops_cuda*.cpp differs from the real library.
    """
    flags = [*_flags(), "-fPIC"]
    key = "STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, {}, m)"
    moved = []
    for path in sorted(CSRC.glob("ops_cuda*.cpp")):
        source = path.read_text()
        assert key.format("CUDA") in source
        source = source.replace(key.format("CUDA"), key.format("CPU"))
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        moved.append(_cache() / f"{path.stem}_{digest}.cpp")
        part = moved[-1].with_suffix(f".{os.getpid()}.part")
        part.write_text(source)
        part.rename(moved[-1])
    bindings = _objects([*moved, HERE / "no_device.cpp"], [*flags, *torch_flags])
    objects = [*_objects(sorted(CSRC.glob("*.cu")), flags), *bindings]
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects)]
    root = Path(torch.__file__).parent
    return _compile([*link, f"-L{root / 'lib'}", "-ltorch_cpu"], objects, "efrdn_fast_simt.so")


def execute(program: Path, *args: str | Path, order: str = "forward"):
    """Run a built program with the threads in this order; its completed process."""
    env = {**os.environ, "SIMT_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [str(program), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def between_nan(tokens: Tensor) -> Tensor:
    """The same values `[N, T, width]`, NaN between one token and the next."""
    n, t, width = tokens.shape
    whole = torch.full((n, t, width + 6), torch.nan, dtype=tokens.dtype)
    return whole[..., 2 : 2 + width].copy_(tokens)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _number(name: str, value: int) -> bytes:
    return struct.pack("=24sqq", name.encode(), 0, value)


def _pieces(value: Tensor | Sparse) -> tuple[int, list[tuple[int, bytes]]]:
    """Bytes of the buffer; offset and content of every piece that is given."""
    if isinstance(value, Tensor):
        storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return value.untyped_storage().nbytes(), [(0, _bytes(storage))]
    size = value.tensor.element_size()
    n, c, h, w = value.tensor.shape
    step_n, step_h, step_w = (s * size for s in value.strides)
    rows = value.tensor.permute(0, 2, 3, 1)
    pieces = [
        (i * step_n + j * step_h + k * step_w, _bytes(rows[i, j, k]))
        for i in range(n)
        for j in range(h)
        for k in range(w)
    ]
    return pieces[-1][0] + c * size, pieces


def _encode(name: str, value: Tensor | Sparse) -> tuple[bytes, list[int]]:
    """Records of an array and its properties; lengths of its pieces."""
    tensor = value if isinstance(value, Tensor) else value.tensor
    total, pieces = _pieces(value)
    out = struct.pack("=24sqqq", name.encode(), 1, total, len(pieces))
    for offset, content in pieces:
        out += struct.pack("=qq", offset, len(content)) + content
    out += _number(f"{name}.dtype", DTYPES.get(tensor.dtype, -1))
    offset = tensor.storage_offset() * tensor.element_size() if tensor is value else 0
    out += _number(f"{name}.offset", offset)
    if tensor.dim() == 4:
        out += _number(f"{name}.C", tensor.shape[1])
        n, _, h, w = tensor.stride()
        strides = (n, h, w) if tensor is value else value.strides
        for axis, stride in zip("nhw", strides, strict=True):
            out += _number(f"{name}.{axis}", stride)
    return out, [len(content) for _, content in pieces]


def run(
    op: str,
    arrays: Mapping[str, Tensor | Sparse],
    numbers: Mapping[str, int],
    order: str = "forward",
) -> dict[str, Tensor]:
    """Launch `op` of runner.cpp on copies of `arrays`.

    Returns:
        The arrays as the kernels left them: shape, strides and dtype as given; of a `Sparse` the
        values, contiguous.
    """
    case, lengths = b"", {}
    for name, value in arrays.items():
        record, lengths[name] = _encode(name, value)
        case += record
    for name, value in numbers.items():
        case += _number(name, value)
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "case", Path(folder) / "result"
        given.write_bytes(case)
        done = execute(executable("runner"), op, given, result, order=order)
        assert done.returncode == 0, f"{op}: exit status {done.returncode}\n{done.stderr[:4000]}"
        content = bytearray(result.read_bytes())
    out, start = {}, 0
    for name in sorted(arrays, key=lambda n: n.encode()):  # the runner keeps them in a std::map
        value, size = arrays[name], sum(lengths[name])
        tensor = value if isinstance(value, Tensor) else value.tensor
        flat = torch.frombuffer(
            content, dtype=tensor.dtype, offset=start, count=size // tensor.element_size()
        )
        if isinstance(value, Tensor):
            out[name] = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        else:
            n, c, h, w = tensor.shape
            out[name] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        start += size
    return out
