"""Least time of every block group on a device, beside what was measured; the cost of large images.

    python -m bench.roofline                    this machine: floor, measured time, gap
    python -m bench.roofline --kernels          every kernel on its bench's cases
    python -m bench.roofline --device h200      a device not at hand: floors, modelled
    python -m bench.roofline --curve            from 64x64 to 8K, four ways to attend

Floors count every block as one kernel. Measured times come from `pytest bench/bench_blocks.py`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from efrdn_fast.config import EFRDNConfig
from efrdn_fast.counts import count
from efrdn_fast.tables import render

from .devices import UnknownDevice, rates
from .groups import Group, floor_of, groups
from .harness import collect
from .harness.provenance import RESULTS, device_folder
from .harness.store import load

__all__ = [
    "CURVE",
    "KERNELS",
    "WAYS",
    "CurvePoint",
    "curve",
    "floors",
    "kernel_table",
    "main",
    "measured_blocks",
]

KERNELS = ("gcrb", "gcrb_chain", "acrb", "conv3x3", "emha", "transformer")
"""Benches whose cases are single kernels or a block of few."""
OWN = ("cuda", "triton", "cpu", "packed")
"""Variants that are ours: the fastest one measured is set against the floor."""

CURVE = ((64, 64), (128, 128), (320, 180), (480, 270), (960, 540), (1920, 1080), (7680, 4320))
"""Width, height of LR images of the cost curve."""
TILE = 192
"""Side of a tile, in pixels of the LR image; 16 of them are shared with each neighbour."""
OVERLAP = 16
WAYS = {
    "4 segments": {},
    "16 segments": {"segments": 16},
    "segment_tokens=576": {"segment_tokens": 576},
    f"tiles of {TILE}": {},
}
"""Way to attend -> arguments of the network."""


@dataclass(frozen=True)
class CurvePoint:
    """Cost of one image size, attended in one way."""

    way: str
    width: int
    height: int
    floor: float
    """Seconds at least."""
    scores: int
    """Bytes of one segment's attention scores, which the plain network would store."""
    maps: int
    """Bytes of the widest tensors that are alive at once: tokens, qkv, result of attention."""


def floors(
    config: EFRDNConfig, width: int, height: int, ceilings: dict[str, float], element: int
) -> list[tuple[Group, float, str]]:
    """(group, seconds at least, binding rate) of every block group."""
    found = _groups(config, width, height)
    return [(group, *group.floor(ceilings, element)) for group in found]


@functools.cache
def _groups(config: EFRDNConfig, width: int, height: int) -> list[Group]:
    return groups(count(config, width, height))


def curve(ceilings: dict[str, float], element: int) -> list[CurvePoint]:
    """Modelled cost of every size of `CURVE` in every way of `WAYS`; tiles one after another."""
    points = []
    for way, options in WAYS.items():
        config = EFRDNConfig(**options)
        tiled = way.startswith("tiles")
        for width, height in CURVE:
            w, h = (min(TILE, width), min(TILE, height)) if tiled else (width, height)
            tiles = _tiles(width, w) * _tiles(height, h)
            seconds = tiles * sum(f for _, f, _ in floors(config, w, h, ceilings, element))
            tokens = w * h
            length = min(config.segment_tokens or -(-tokens // config.segments), tokens)
            inner = 9 * config.channels // 2
            scores = 8 * length**2 * element
            maps = tokens * (4 * inner + 4 * config.channels) * element
            points.append(CurvePoint(way, width, height, seconds, scores, maps))
    return points


def _tiles(length: int, tile: int) -> int:
    return 1 if length <= tile else -(-(length - OVERLAP) // (tile - OVERLAP))


def measured_blocks(folder: Path, variant: str, case: str) -> dict[str, float]:
    """Group -> measured seconds, from `blocks.json` of a device; empty where there is none."""
    path = folder / "blocks.json"
    rows = load(path)["rows"] if path.is_file() else []
    prefix = f"{variant}: "
    return {
        row["variant"].removeprefix(prefix): row["p50_ms"] / 1e3
        for row in rows
        if row["variant"].startswith(prefix) and row["case"] == case
    }


def table(device: str, dtype: str, width: int, height: int, variant: str) -> str:
    """The table of one device as text."""
    ceilings, source = rates(device, dtype)
    element = 4 if dtype == "fp32" else 2
    case = f"x4-{width}x{height}-b1"
    measured = measured_blocks(RESULTS / device, variant, case)
    rows, total = [], 0.0
    for group, floor, bound in floors(EFRDNConfig(), width, height, ceilings, element):
        total += floor
        rows.append(_row(group, floor, bound, element, measured.get(group.name)))
    whole = sum(measured.values()) or None
    rows.append(("sum", "", "", "", "", _ms(total), "", _ms(whole), _gap(whole, total)))
    header = ("group", "calls", "GFLOP", "Gexp", "MB", "floor ms", "bound", "measured ms", "gap")
    about = [f"EFRDN {case}, {dtype}; {device}: {_shown(ceilings)} ({source})"]
    if measured:
        between = measured.get("between blocks", 0)
        about.append(f"measured: {variant}, {between * 1e3:.1f} ms of the sum between the blocks")
    else:
        about.append(f"not measured: no times of {case} on {device}; the floors are modelled")
    return "\n".join([*about, "", render(header, rows)])


def _row(group: Group, floor: float, bound: str, element: int, measured: float | None) -> tuple:
    return (
        group.name,
        str(group.calls),
        f"{group.flops / 1e9:.2f}",
        f"{group.exps / 1e9:.3f}" if group.exps else "",
        f"{group.elements * element / 1e6:.1f}",
        _ms(floor),
        bound,
        _ms(measured),
        _gap(measured, floor),
    )


def kernel_table(device: str, dtype: str) -> str:
    """Work, floor, best measured time and gap of every kernel on its bench's quick cases."""
    ceilings, source = rates(device, dtype)
    kind = torch.float32 if dtype == "fp32" else torch.float16
    rows = []
    for op in KERNELS:
        module = importlib.import_module(f"bench.bench_{op}")
        path = RESULTS / device / f"{op}.json"
        stored = load(path)["rows"] if path.is_file() else []
        for case in collect.cases(module, full=False):
            work = module.work(case, kind)
            floor, bound = floor_of(work.flops, work.exps, work.bytes, ceilings)
            best = _best(stored, str(case), str(kind).removeprefix("torch."))
            seconds = best and best["p50_ms"] / 1e3
            by = f"{best['variant']} {best['mode']} {best['status']}" if best else "not measured"
            rows.append(
                (
                    f"{op} {case}",
                    f"{work.flops / 1e9:.3f}",
                    f"{work.exps / 1e9:.3f}" if work.exps else "",
                    f"{work.bytes / 1e6:.1f}",
                    _ms(floor),
                    bound,
                    _ms(seconds),
                    _gap(seconds, floor),
                    by,
                )
            )
    header = ("kernel", "GFLOP", "Gexp", "MB", "floor ms", "bound", "measured ms", "gap", "by")
    about = f"kernels, {dtype}; {device}: {_shown(ceilings)} ({source}); floors are modelled"
    return f"{about}\n\n{render(header, rows)}"


def _best(rows: list[dict], case: str, dtype: str) -> dict | None:
    """The fastest measured row of an own variant."""
    own = [
        row
        for row in rows
        if (row["case"], row["dtype"]) == (case, dtype)
        and row["variant"] in OWN
        and row["status"] in ("measured", "noisy")
        and row.get("p50_ms")
    ]
    return min(own, key=lambda row: row["p50_ms"], default=None)


def _shown(ceilings: dict[str, float]) -> str:
    return ", ".join(f"{key} {value / 1e9:,.1f} G/s" for key, value in ceilings.items())


def _size(text: str) -> tuple[int, int]:
    """Argparse type of "320x180"."""
    words = text.split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected such as 320x180")
    return int(words[0]), int(words[1])


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.4g}"


def _gap(measured: float | None, floor: float) -> str:
    return "" if measured is None else f"{measured / floor:.1f}x"


def curve_table(device: str, dtype: str) -> str:
    """The cost curve of one device as text; every figure is modelled."""
    ceilings, source = rates(device, dtype)
    element = 4 if dtype == "fp32" else 2
    rows = [
        (
            point.way,
            f"{point.width}x{point.height}",
            _ms(point.floor),
            f"{point.maps / 2**20:,.0f}",
            f"{point.scores / 2**20:,.0f}",
        )
        for point in curve(ceilings, element)
    ]
    header = ("attention", "LR size", "floor ms", "maps MiB", "scores of a segment MiB")
    about = f"modelled: x4, {dtype}, {device} ({source}); scores are never stored by the ops"
    return f"{about}\n\n{render(header, rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = device_folder(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--device", default=here, help=f"default: {here}")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), help="default: fp32 on a CPU")
    size = {"type": _size, "default": (96, 96), "metavar": "WxH"}
    parser.add_argument("--size", **size, help="LR size. Default: 96x96")
    parser.add_argument(
        "--variant", choices=("sdpa", "ours"), default="ours", help="network. Default: ours"
    )
    parser.add_argument("--kernels", action="store_true", help="every kernel, by its bench's cases")
    parser.add_argument("--curve", action="store_true", help="large images, modelled")
    args = parser.parse_args(argv)
    dtype = args.dtype or ("fp32" if args.device.startswith("cpu-") else "fp16")
    try:
        if args.curve:
            print(curve_table(args.device, dtype))
        elif args.kernels:
            print(kernel_table(args.device, dtype))
        else:
            print(table(args.device, dtype, *args.size, args.variant))
    except UnknownDevice as error:
        if args.device != here:
            parser.error(str(error))
        parser.error(
            f"no results of this machine ({here}): `pytest bench/bench_blocks.py` measures it, "
            f"--device NAME takes another ({error})"
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
