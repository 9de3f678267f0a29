"""Pictures of the results: latency, time per block, memory, share of the roofline, training, peers.

Each is drawn from results files alone and holds a digest of them, by which `bench.report --check`
sees that it is stale.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from efrdn_fast.config import EFRDNConfig
from efrdn_fast.tables import paper_tables

from .devices import rates
from .harness.store import load
from .roofline import floors

__all__ = ["FOLDER", "Picture", "pictures"]

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
KEY = "efrdn_fast results"  # of the digest in the PNG's text
BETWEEN = "between blocks"


@dataclass(frozen=True)
class Picture:
    """One file, and what it shows."""

    path: Path
    sources: tuple[Path, ...]
    paint: Callable[[Any, list[dict]], None]
    """(matplotlib axes, rows of the sources) draws it."""

    def digest(self) -> str:
        data = b"".join(source.read_bytes() for source in self.sources)
        return hashlib.sha256(data).hexdigest()

    def stale(self) -> bool:
        """Whether the file is missing or was drawn from other figures."""
        if not self.path.is_file():
            return True
        with Image.open(self.path) as image:
            return image.info.get(KEY) != self.digest()

    def draw(self) -> None:
        """Write the file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=100, layout="constrained")
        self.paint(axes, [row for source in self.sources for row in load(source)["rows"]])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, metadata={KEY: self.digest(), "Software": None})
        pyplot.close(figure)


def pictures(results: Path, folder: Path = FOLDER) -> list[Picture]:
    """All pictures whose figures are there: `bench_<what>_<device>.png`."""
    found = []
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        for name, (needs, paint) in _PICTURES.items():
            sources = tuple(device / f"{need}.json" for need in needs)
            if all(source.is_file() for source in sources):
                path = folder / f"bench_{name}_{device.name}.png"
                found.append(Picture(path, sources, _for_device(paint, device)))
    return found


def _for_device(paint: Callable, device: Path) -> Callable[[Any, list[dict]], None]:
    return lambda axes, rows: paint(axes, rows, device)


def _series(rows: list[dict], key: str) -> dict[str, list[tuple[int, float, str]]]:
    """Variant -> (LR pixels, value, status) of x4 at batch 1."""
    out: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        size = re.fullmatch(r"x4-(\d+)x(\d+)-b1", row["case"])
        if size and row.get(key):
            point = int(size[1]) * int(size[2]), row[key], row["status"]
            out.setdefault(row["variant"], []).append(point)
    return {name: sorted(points) for name, points in out.items()}


def _lines(axes: Any, series: dict[str, list[tuple[int, float, str]]], factor: float) -> None:
    for name, points in series.items():
        xs, ys = [p[0] for p in points], [p[1] * factor for p in points]
        (line,) = axes.plot(xs, ys, label=name, linewidth=1)
        for x, y, (_, _, status) in zip(xs, ys, points, strict=True):
            solid = status in ("measured", "noisy")
            face = line.get_color() if solid else "none"
            axes.plot([x], [y], "o", color=line.get_color(), markerfacecolor=face, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="LR pixels (hollow: modelled)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7)


def _latency(axes: Any, rows: list[dict], device: Path) -> None:
    series = _series(rows, "p50_ms")
    _lines(axes, series, 1e-3)
    ceilings, _ = rates(device.name, "fp32", device.parent)
    sizes = [(64, 64), (128, 128), (320, 180), (480, 270), (960, 540)]
    least = [sum(f for _, f, _ in floors(EFRDNConfig(), w, h, ceilings, 4)) for w, h in sizes]
    axes.plot([w * h for w, h in sizes], least, "k--", label="floor fp32 (modelled)", linewidth=1)
    axes.set(title=f"EFRDN x4, batch 1, {device.name}", ylabel="seconds")
    axes.legend(fontsize=7)


def _memory(axes: Any, rows: list[dict], device: Path) -> None:
    _lines(axes, _series(rows, "peak_mib"), 1.0)
    axes.set(title=f"peak memory above what was held, x4, {device.name}", ylabel="MiB")


def _blocks(axes: Any, rows: list[dict], device: Path) -> None:
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        variant, _, name = row["variant"].partition(": ")
        size = row["case"].removeprefix("x4-").removesuffix("-b1")
        bars.setdefault(f"{variant}\n{size}", {})[name] = row["p50_ms"]
    left = dict.fromkeys(bars, 0.0)
    for name in dict.fromkeys(name for bar in bars.values() for name in bar):
        widths = [bar.get(name, 0.0) for bar in bars.values()]
        colour = "0.8" if name == BETWEEN else None
        axes.barh(list(bars), widths, left=list(left.values()), label=name, color=colour)
        left = {key: left[key] + width for key, width in zip(left, widths, strict=True)}
    axes.set(title=f"time per block, x4, {device.name}", xlabel="ms")
    axes.legend(fontsize=7, ncols=2)


def _shares(axes: Any, rows: list[dict], device: Path) -> None:
    bars = {
        f"{row['op']} {row['variant']} {row['case'][:22]}": max(
            row.get(key) or 0 for key in ("copy_share", "matmul_share", "exp_share")
        )
        for row in rows
        if row.get("copy_share") and row["dtype"] == "float32"
    }
    axes.barh(list(bars), [100 * value for value in bars.values()])
    axes.tick_params(axis="y", labelsize=6)
    axes.set(title=f"kernels: share of the ceiling that binds, {device.name}", xlabel="%")


def _training(axes: Any, rows: list[dict], device: Path) -> None:
    found = {f"{row['case']}\n{row['variant']}": row for row in rows if row.get("p50_ms")}
    middle = [row["p50_ms"] / 1e3 for row in found.values()]
    errors = [
        [(row["p50_ms"] - row["p20_ms"]) / 1e3 for row in found.values()],
        [(row["p80_ms"] - row["p50_ms"]) / 1e3 for row in found.values()],
    ]
    axes.bar(list(found), middle, yerr=errors, capsize=4)
    axes.tick_params(axis="x", labelsize=7)
    axes.set(title=f"one training step, {device.name}", ylabel="seconds")


def _peers(axes: Any, rows: list[dict], device: Path) -> None:
    """Fig. 7: time against PSNR on Set5 x4; squares are measured here, circles printed.

    The legend holds the multiply-adds of one call.
    """
    published = {**paper_tables()["table1"]["x4"], **paper_tables()["table6_x4"]}
    names = {"EFRDN": "EFRDN", "EFRDNFast": "EFRDN", "SwinIR-light": "SwinIR"}
    size = max((row["case"] for row in rows if row.get("p50_ms")), key=_pixels)
    left_out = []
    for row in (r for r in rows if r["case"] == size and r.get("p50_ms")):
        name = row["variant"]
        printed = published.get(names.get(name, name), {}).get("Set5")
        if printed is None:
            left_out.append(name)
            continue
        macs = re.search(r"([\d.]+) G multiply-adds", row["note"])
        x, y = row["p50_ms"] / 1e3, float(printed[0])
        label = f"{name}, printed" + (f", {macs[1]} G" if macs else "")
        axes.plot([x], [y], "o", markerfacecolor="none", markersize=9, label=label)
    own = device / "eval_x4.json"
    if own.is_file():
        sets = json.loads(own.read_text())["scales"]["x4"]["sets"]
        for name, key in (("EFRDNFast", "model"), ("bicubic", "bicubic")):
            row = next((r for r in rows if r["variant"] == name and r["case"] == size), None)
            if row and row.get("p50_ms"):
                y = sets["Set5"][key]["psnr"]
                label = f"{name}, measured" + (", shipped weights" if key == "model" else "")
                axes.plot([row["p50_ms"] / 1e3], [y], "s", markersize=7, label=label)
    axes.set(
        xscale="log",
        xlabel=f"seconds for {size.removeprefix('x4-').removesuffix('-b1')}, measured here",
        ylabel="PSNR on Set5 x4 (dB)",
        title=f"circle: PSNR printed in the EFRDN paper; square: measured here; {device.name}",
    )
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7, loc="center left")
    unknown = ", ".join(name for name in left_out if name != "bicubic")
    axes.text(0.01, 0.02, f"no PSNR to show: {unknown}", transform=axes.transAxes, fontsize=7)
    axes.grid(True, alpha=0.3)


def _pixels(case: str) -> int:
    size = re.fullmatch(r"x4-(\d+)x(\d+)-b1", case)
    return int(size[1]) * int(size[2]) if size else 0


_PICTURES: dict[str, tuple[tuple[str, ...], Callable]] = {
    "latency": (("network",), _latency),
    "memory": (("network",), _memory),
    "blocks": (("blocks",), _blocks),
    "kernels": (("gcrb", "acrb"), _shares),
    "training": (("train",), _training),
    "peers": (("peers",), _peers),
}
"""Name -> results files it needs, function that draws it."""
