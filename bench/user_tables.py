"""Tables of what users call and of the length of segments, from the results files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import records

__all__ = ["TABLES", "foundation", "memory", "segments"]


def _seconds(value: float) -> str:
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.3g} s"


def memory(mib: float | None) -> str:
    """MiB, from 1,024 on in GiB; empty where there is no figure."""
    if mib is None:
        return ""
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def segments(device: str, _: str) -> str:
    """Time and memory of the network over the size of the image, one pair of columns a setting."""
    stored = records.read(device, "segments")
    if stored is None:
        return records.missing(device, "segments")
    rows = {(row["setting"], row["size"]): row for row in stored["rows"]}
    settings = list(dict.fromkeys(setting for setting, _ in rows))
    titles = [f"{name}: time | memory" for name in settings]
    lines = [f"| LR size | {' | '.join(titles)} |", "|" + "---|" * (1 + 2 * len(settings))]
    for size in dict.fromkeys(size for _, size in rows):
        cells = [_cells(rows.get((setting, size))) for setting in settings]
        lines.append(f"| {size.replace('x', ' x ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", records.source(stored["run"], device, "segments")]) + "\n"


def _cells(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured | "
    time, held = _seconds(row["seconds"]), memory(row["peak_mib"])
    if row["source"] == "modelled":
        return f"*{time}, modelled* | *{held}*"
    return f"{time} | {held}"


def foundation(device: str, _: str) -> str:
    """What users call, plain and fast: time and peak memory of the process."""
    stored = records.read(device, "foundation")
    if stored is None:
        return records.missing(device, "foundation")
    found: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in stored["rows"]:
        found.setdefault(_called(row), {})[row["fast"]] = row
    lines = ["| | plain: time | peak memory | fast: time | peak memory |", "|" + "---|" * 5]
    for name, pair in found.items():
        cells = [
            f"{_seconds(pair[fast]['median_s'])} | {pair[fast]['peak_mib']:,} MiB"
            for fast in (False, True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = f"{stored['network']}; {stored['dtype']}, {stored['threads']} threads, torch "
    link = f"[figures]({{up}}bench/results/{device}/foundation.json)"
    text = f"{about}{stored['torch']}, `{stored['command']}` ({link})."
    return "\n".join([*lines, "", text]) + "\n"


def _called(row: dict[str, Any]) -> str:
    if row["what"] == "train":
        return f"training step, {row['batch']} patches of {row['patch']} x {row['patch']}"
    width, height = row["size"]
    return f"`upscale()` of {width} x {height} to {4 * width} x {4 * height}"


TABLES: dict[str, Callable[[str, str], str]] = {"segments": segments, "foundation": foundation}
"""Name in a page's marker -> its table, of a device and the marker's last word."""
