"""Registers, shared memory, spills and matrix instructions of every Triton kernel, without a GPU.

    python -m bench.triton_resources                               compile all, print the table
    python -m bench.triton_resources --write                       ... into docs/triton_resources.md
    python -m bench.triton_resources --write --only emha --sm 90   ... these cells of it anew

The launchers run on meta tensors and their launches are recorded, so what is compiled is what they
would launch with the shipped configs. Each is compiled for six architectures and disassembled with
the tools that Triton brings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from efrdn_fast.kernels import (
    _launch,
    acrb,
    calibrate,
    conv3x3,
    emha,
    gcrb,
    gcrb_chain,
    gcrb_train,
    merge3x3,
    sigmoid_gate,
    transformer,
)
from torch import Tensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efrdn_fast import cases, cases_attention, cases_fusion

__all__ = [
    "ARCHITECTURES",
    "TABLE",
    "Kernel",
    "Resources",
    "cell",
    "kernels",
    "measure",
    "read_table",
    "render",
]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TENSOR_MEMORY = 512
"""Columns of a multiprocessor; sm_100 only."""
TABLE = Path(__file__).resolve().parent.parent / "docs" / "triton_resources.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (1, 32, 180, 320)
CONV3X3 = (
    cases.Conv3x3Case((1, 180, 320), (32,), 32),
    cases.Conv3x3Case((1, 180, 320), (9, 9, 9, 32), 32),
    cases.Conv3x3Case((1, 180, 320), (32, 32), 32, groups=8, interleaved=True, bias=False),
    cases.Conv3x3Case((1, 180, 320), (32,), 48),
    cases.Conv3x3Case((1, 180, 320), (32,), 32, groups=8, bias=False),
)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    """Of a thread."""
    shared: int
    """Bytes of a block."""
    spills: int
    """Instructions that read or write local memory."""
    mma: int
    """Matrix (tensor core) instructions."""


@dataclass(frozen=True)
class Kernel:
    """One launch to compile, and where it comes from."""

    name: str
    launch: _launch.Launch
    matrix: bool
    """Tensor cores are meant to be used."""

    @property
    def config(self) -> str:
        """Launch config as text."""
        shown = ("PX", "Q", "NB", "HEIGHT", "WIDTH", "BLOCK_M", "BLOCK_N", "P")
        shown += _COMPILED
        return " ".join(f"{k}={v}" for k, v in self.launch.options.items() if k in shown)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _recorded(
    name: str, launcher: Any, args: tuple[Any, ...], tf32: bool = False
) -> Iterator[Kernel]:
    with _launch.record() as launches, _tf32(tf32):
        launcher(*tree_map(_meta, args))
    for i, launch in enumerate(launches):
        part = f" {i + 1}/{len(launches)}" if len(launches) > 1 else ""
        matrix = re.search(r"\b(?:dot|products)\(", launch.kernel.src) is not None
        yield Kernel(name + part, launch, matrix)


def kernels() -> list[Kernel]:
    """Every kernel that the launchers use for the network's shapes, in every dtype."""
    found: list[Kernel] = []
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for groups in (1, 2, 4, 8) if dtype == torch.float32 else (2,):
            args = cases.GcrbCase(SHAPE, groups=groups).args(dtype)
            found += _recorded(f"gcrb g={groups} {short}", gcrb.gcrb, args)
        args = cases.GcrbCase(SHAPE).args(dtype)
        found += _recorded(f"gcrb_backward {short}", gcrb.gcrb_backward, (args[0], *args))
        *tensors, groups, eps = args = cases.GcrbTrainCase(SHAPE).args(dtype)
        found += _recorded(f"gcrb_train {short}", gcrb_train.gcrb_train, args)
        stats = torch.zeros(2, 2 * tensors[1].shape[0] + tensors[0].shape[1])
        args = (tensors[0], *tensors, *stats, groups, eps)
        name = f"gcrb_train_backward {short}"
        found += _recorded(name, gcrb_train.gcrb_train_backward, args)
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            label = "tf32" if tf32 else short
            x, *params, groups = cases.GcrbCase(SHAPE).args(dtype)
            args = (x, params * 3, groups)
            found += _recorded(f"gcrb_chain {label}", gcrb_chain.gcrb_chain, args, tf32)
            args = cases.AcrbCase(SHAPE, start=23).args(dtype)
            found += _recorded(f"acrb {label}", acrb.acrb, args, tf32)
            name = f"acrb_backward {label}"
            found += _recorded(name, acrb.acrb_backward, (args[0][:, :9], *args), tf32)
            for case in CONV3X3:
                name = f"conv3x3 {'+'.join(map(str, case.sources))}->{case.cout} "
                name += f"g={case.groups} {label}"
                found += _recorded(name, conv3x3.conv3x3, case.args(dtype), tf32)
            found += _attention(dtype, label, tf32)
        found += _lattice(dtype, short)
    return found


def _lattice(dtype: torch.dtype, label: str) -> Iterator[Kernel]:
    """Gates and joins, forward and backward, without the convolution that follows a join."""
    x, logits = cases_fusion.SigmoidGateCase(SHAPE).args(dtype)
    yield from _recorded(f"sigmoid_gate {label}", sigmoid_gate.sigmoid_gate, (x, logits))
    args = (x, x, logits)
    yield from _recorded(f"sigmoid_gate_backward {label}", sigmoid_gate.sigmoid_gate_backward, args)
    args = cases_fusion.CalibrateCase(SHAPE).args(dtype)
    yield from _recorded(f"calibrate {label}", calibrate.calibrate, args)
    args = (*args, torch.zeros(SHAPE[0], 2, SHAPE[1]))
    yield from _recorded(f"calibrate_backward {label}", calibrate.calibrate_backward, args)
    n, c, *size = SHAPE
    for gate in ("pixel", "channel"):
        case = cases_fusion.Merge3x3Case((n, c // 2, *size), gate=gate)
        a, b, logits, _, _, relu, _ = case.args(dtype)
        args, rest = (a, b, logits), (torch.zeros(c, c // 8, 3, 3), relu, 8)
        for name, launcher, given in (
            ("merge3x3", merge3x3.merge3x3, (*args, x, *rest)),
            ("merge3x3_backward", merge3x3.merge3x3_backward, (x, *args, *rest)),
        ):
            for kernel in _recorded(f"{name} {gate} {label}", launcher, given):
                if not kernel.matrix:
                    yield kernel


def _attention(dtype: torch.dtype, label: str, tf32: bool) -> Iterator[Kernel]:
    """Attention in four segments and the kernels around it, forward and backward."""
    tokens = SHAPE[2] * SHAPE[3]
    qkv, out = (torch.empty(1, tokens, width, dtype=dtype, device="meta") for width in (432, 144))
    args = (8, tokens // 4, tf32)
    yield from _recorded(f"emha {label}", emha.emha, (qkv, *args))
    lse = torch.empty(1, 8, tokens, device="meta")
    yield from _recorded(f"emha_backward {label}", emha.emha_backward, (out, qkv, out, lse, *args))
    for op in ("token_qkv", "token_hidden", "token_fold"):
        args = (*cases_attention.TokenCase(op, SHAPE).args(dtype)[:-1], tf32)
        yield from _recorded(f"{op} {label}", getattr(transformer, op), args)
        if op != "token_fold":  # its gradient takes the place of x
            args = (qkv if op == "token_qkv" else out), *args
        if op == "token_hidden":
            args = (*args[:3], out, *args[3:])
        backward = getattr(transformer, f"{op}_backward")
        yield from _recorded(f"{op}_backward {label}", backward, args)


def _signature(kernel: _launch.Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and divisibility as Triton's runtime derives them from the arguments.

    Pointers count as aligned to 16 bytes, as PyTorch allocates them.
    """
    values = dict(zip(kernel.kernel.arg_names, kernel.args, strict=False)) | kernel.options
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def describe(value: Any, path: tuple[int, ...], constant: bool, specialize: bool) -> Any:
        if isinstance(value, tuple) and not constant:
            return tuple(describe(v, (*path, i), constant, specialize) for i, v in enumerate(value))
        if constant or value is None or (isinstance(value, int) and value == 1 and specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        tensor = isinstance(value, Tensor)
        if tensor or (specialize and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if tensor:
            return "*" + _TYPES[value.dtype]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(kernel.kernel.params):
        value, specialize = values[parameter.name], not parameter.do_not_specialize
        types[parameter.name] = describe(value, (i,), parameter.is_constexpr, specialize)
    return types, constants, attributes


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


_COMPILED = ("num_warps", "num_stages", "maxnreg")
"""Options of the compiler; the others are arguments of the kernel."""


def compile_for(kernel: _launch.Launch, architecture: int) -> Any:
    """The compiled kernel; Triton keeps it in its cache."""
    types, constants, attributes = _signature(kernel)
    source = ASTSource(kernel.kernel, types, constants, attributes)
    options = {k: v for k, v in kernel.options.items() if k in _COMPILED}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@functools.cache
def _disassembler() -> str:
    return str(next(Path(triton.__file__).parent.rglob("cuobjdump")))


def measure(kernel: _launch.Launch, architecture: int) -> Resources:
    """Compile for one architecture (80 for sm_80) and read the machine code."""
    compiled = compile_for(kernel, architecture)
    columns = compiled.metadata.tmem_size
    if columns > TENSOR_MEMORY:  # Triton gives a kernel that only traps
        name = kernel.kernel.fn.__name__
        raise ValueError(
            f"{name} for sm_{architecture} takes {columns} columns of tensor memory; there are "
            f"{TENSOR_MEMORY}"
        )
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


@functools.cache
def _read(cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [_disassembler(), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        mma=len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", code)),
    )


def cell(used: Resources) -> str:
    """Registers / KiB of shared memory (matrix instructions), and spills if there are any."""
    text = f"{used.registers} / {used.shared / 1024:.1f}"
    text += f" ({used.mma})" if used.mma else ""
    return f"{text} {used.spills} spills" if used.spills else text


def read_table(text: str) -> dict[tuple[str, str], dict[int, str]]:
    """(kernel, config) -> architecture -> cell of a table as `render` writes it."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {
        (name.strip(), config.strip()): {
            a: each.strip() for a, each in zip(ARCHITECTURES, cells, strict=True)
        }
        for name, config, *cells in lines[2:]
    }


def render(rows: list[Kernel], cells: dict[tuple[str, str], dict[int, str]]) -> str:
    """The table as Markdown; a dash where `cells` has none."""
    titles = ["kernel", "config", *(f"sm_{a}" for a in ARCHITECTURES)]
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Triton {triton.__version__}, compiled ahead of time and disassembled, no GPU needed: "
        "`python -m bench.triton_resources --write`.",
        "Each cell: registers of a thread / KiB of shared memory of a block (matrix instructions), "
        "and the number of instructions",
        "that spill where there are any. A dash is a pair that has not been compiled.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
    ]
    for kernel in rows:
        known = cells.get((kernel.name, kernel.config), {})
        shown = [known.get(a, "-") for a in ARCHITECTURES]
        lines.append(f"| {' | '.join([kernel.name, kernel.config, *shown])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/triton_resources.md")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--sm", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="N"
    )
    args = parser.parse_args()
    found = kernels()
    chosen = [kernel for kernel in found if args.only in kernel.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(kernel.name.split()[0] for kernel in found))
        parser.error(f"--only: no kernel has {args.only!r} in its name; there are {names}")
    cells = read_table(TABLE.read_text(encoding="utf-8")) if args.write else {}
    for kernel in chosen:
        known = cells.setdefault((kernel.name, kernel.config), {})
        known.update({a: cell(measure(kernel.launch, a)) for a in args.sm})
        if args.write:  # what is compiled stays, should this be stopped
            TABLE.write_text(render(found, cells), encoding="utf-8")
    print(render(found if args.write else chosen, cells), end="")


if __name__ == "__main__":
    main()
