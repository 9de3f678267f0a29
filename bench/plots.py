"""Pictures of the results: latency, memory, blocks, attention, share of the roofline, training.

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
TOO_LARGE = "does not fit"
FIXED = "576 tokens"
CURVE_DB = 1.2  # of the training curve that is shown


@dataclass(frozen=True)
class Picture:
    """One file, and what it shows."""

    path: Path
    sources: tuple[Path, ...]
    paint: Callable[[Any, list[dict]], None]
    """(matplotlib axes, rows of the sources) draws it."""
    also: tuple[Path, ...] = ()
    """Other files that it reads."""
    panels: int = 1
    """Panels a side."""

    def digest(self) -> str:
        data = b"".join(source.read_bytes() for source in (*self.sources, *self.also))
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

        size = (8, 4.5) if self.panels == 1 else (10, 7.5)
        figure, axes = pyplot.subplots(
            self.panels, self.panels, figsize=size, dpi=100, layout="constrained"
        )
        self.paint(axes, [row for source in self.sources for row in _rows(source)])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, metadata={KEY: self.digest(), "Software": None})
        pyplot.close(figure)


def pictures(results: Path, folder: Path = FOLDER) -> list[Picture]:
    """All pictures whose figures are there: `bench_<what>_<device>.png`."""
    found = []
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        for name, (needs, paint) in _PICTURES.items():
            groups = [sorted(device.glob(need), key=_numbered) for need in needs]
            sources = tuple(source for group in groups for source in group)
            if all(groups) and (name != "attention" or _over_tokens(_rows(sources[0]))):
                path = folder / f"bench_{name}_{device.name}.png"
                more = (device / MEASURED_PSNR,) if name == "peers" else ()
                also = tuple(each for each in more if each.is_file())
                panels = 2 if name == "peers" else 1
                found.append(Picture(path, sources, _for_device(paint, device), also, panels))
    return found


def _numbered(path: Path) -> tuple[int, str]:
    """Order of files whose names end in a number."""
    return len(path.name), path.name


def _rows(source: Path) -> list[dict]:
    """Rows of a results file, or of a training log, which say which log they are of."""
    if source.suffix == ".json":
        return load(source)["rows"]
    lines = source.read_text(encoding="utf-8").splitlines()
    return [{"log": source.stem, **json.loads(line)} for line in lines]


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


def _over_tokens(rows: list[dict]) -> dict[str, list[tuple[int, float, str]]]:
    """Variant and segments -> (tokens, ms, status), at batch 1."""
    series: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        case = re.match(r"N1-T(\d+)-L(\d+)-", row["case"])
        if not case or row["status"] not in ("measured", "modelled", TOO_LARGE):
            continue
        tokens, length = int(case[1]), int(case[2])
        segments = {(tokens + 3) // 4: "4 segments", 576: FIXED}.get(length)
        if segments:
            point = tokens, row["p50_ms"], row["status"]
            series.setdefault(f"{row['variant']}, {segments}", []).append(point)
    return {name: sorted(points) for name, points in series.items()}


def _attention(axes: Any, rows: list[dict], device: Path) -> None:
    """Time over tokens: solid four segments, dashed segments of 576."""
    series = _over_tokens(rows)
    _lines(axes, series, 1e-3)
    for line in axes.get_lines():
        if str(line.get_label()).endswith(FIXED):
            line.set_linestyle("--")
    large = [point for points in series.values() for point in points if point[2] == TOO_LARGE]
    axes.plot([p[0] for p in large], [p[1] * 1e-3 for p in large], "kx", markersize=10)
    axes.set(title=f"attention, 8 heads of 18, fp32, {device.name}", ylabel="seconds")
    axes.set_xlabel("tokens (hollow: modelled, cross: does not fit in memory)")
    axes.legend(fontsize=7)


def _curve(axes: Any, rows: list[dict], device: Path) -> None:
    """Validation PSNR over the steps of all runs, one after the other."""
    start, best = 0, 0.0
    for at, name in enumerate(dict.fromkeys(row["log"] for row in rows), 1):
        run = [row for row in rows if row["log"] == name]
        judged = [(start + row["step"], row["psnr_db"]) for row in run if "psnr_db" in row]
        xs, ys = [x for x, _ in judged], [y for _, y in judged]
        axes.plot(xs, ys, "o-", markersize=4, label=f"run {at}")
        best = max([best, *ys])
        start += max(row["step"] for row in run)
    axes.set(title=f"x4, averaged weights, {device.name}", xlabel="steps", ylabel="PSNR (dB)")
    if best:  # an average starts far below, where nothing can be told apart
        axes.set_ylim(best - CURVE_DB, best + CURVE_DB / 10)
        axes.set_xlabel(f"steps (the last {CURVE_DB} dB)")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")


def _shares(axes: Any, rows: list[dict], device: Path) -> None:
    bars = {
        f"{row['op']} {row['variant']} {row['case'][:22]}": max(
            row.get(key) or 0 for key in ("copy_share", "matmul_share", "exp_share")
        )
        for row in rows
        if row.get("copy_share")
        and row["dtype"] == "float32"
        and row["status"] == "measured"  # noisy ones are not quoted
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
    """Fig. 7: time and true multiply-adds against PSNR at x4, on the sets that hold most networks.

    A hollow circle is a PSNR printed in the paper, a square one measured here with the shipped
    weights; times and multiply-adds are measured and counted here.
    """
    size = max((row["case"] for row in rows if row.get("p50_ms")), key=_pixels)
    found = {row["variant"]: row for row in rows if row["case"] == size and row.get("p50_ms")}
    path = device / MEASURED_PSNR
    own = json.loads(path.read_text())["scales"]["x4"]["sets"] if path.is_file() else {}
    shown = set()
    for line, name_of_set in zip(axes, ("Set5", "Manga109"), strict=True):
        for at, (name, row) in enumerate(found.items()):
            macs = re.search(r"([\d.]+) G multiply-adds", row["note"])
            xs = row["p50_ms"] / 1e3, float(macs[1]) if macs else 0.0
            for marker, psnr in (
                ("o", _printed(name, name_of_set)),
                ("s", own.get(name_of_set, {}).get(_KEYS.get(name, ""), {}).get("psnr")),
            ):
                for panel, x in zip(line, xs, strict=True):
                    if psnr is not None and x:  # bicubic has no multiply-adds of this kind
                        style = {"color": f"C{at % 10}", "markersize": 8, "label": name}
                        face = "none" if marker == "o" else f"C{at % 10}"
                        panel.plot([x], [float(psnr)], marker, markerfacecolor=face, **style)
                        shown.add(name)
        for panel in line:
            panel.set(ylabel=f"PSNR on {name_of_set} x4 (dB)")
            panel.grid(True, which="both", alpha=0.3)
        line[0].set_xscale("log")
    shape = size.removeprefix("x4-").removesuffix("-b1")
    axes[1][0].set_xlabel(f"seconds for {shape}, measured here")
    axes[1][1].set_xlabel(f"true multiply-adds for {shape}, G")
    handles = {h.get_label(): h for panel in axes.flat for h in panel.get_lines()}
    axes[0][0].legend(handles.values(), handles, fontsize=7, loc="center left")
    missing = ", ".join(name for name in found if name not in shown)
    axes[0][0].figure.suptitle(
        f"circle: PSNR printed in the EFRDN paper; square: measured here, shipped weights; "
        f"{device.name}\nno PSNR to show: {missing or 'none'}",
        fontsize=9,
    )


MEASURED_PSNR = "eval_x4.json"
_KEYS = {"EFRDNFast": "model", "bicubic": "bicubic"}  # networks with a measured PSNR


def _printed(name: str, name_of_set: str) -> Any:
    """PSNR that the paper prints for a network at x4 on a set, None where it prints none."""
    paper = paper_tables()
    if name == "bicubic":
        return paper["bicubic_published"][name_of_set]["x4"][0]
    if name in paper["table2_x4_manga109"]:
        row = paper["table2_x4_manga109"][name]["psnr_ssim"]
        return row[0] if name_of_set == "Manga109" else None
    row = {**paper["table1"]["x4"], **paper["table6_x4"]}.get(PRINTED_AS.get(name, name), {})
    return row[name_of_set][0] if row.get(name_of_set) else None


PRINTED_AS = {"EFRDNFast": "EFRDN", "SwinIR-light": "SwinIR"}
"""Name here -> name in the paper's tables."""


def _pixels(case: str) -> int:
    size = re.fullmatch(r"x4-(\d+)x(\d+)-b1", case)
    return int(size[1]) * int(size[2]) if size else 0


_PICTURES: dict[str, tuple[tuple[str, ...], Callable]] = {
    "latency": (("network.json",), _latency),
    "memory": (("network.json",), _memory),
    "blocks": (("blocks.json",), _blocks),
    "attention": (("emha.json",), _attention),
    "kernels": (("gcrb.json", "acrb.json", "emha.json"), _shares),
    "training": (("train.json",), _training),
    "curve": (("train_x4_phase*.jsonl",), _curve),
    "peers": (("peers.json",), _peers),
}
"""Name -> results files it needs (patterns), function that draws it."""
