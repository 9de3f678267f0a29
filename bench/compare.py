"""What moved beyond the noise between two runs of the bench.

    python bench/compare.py OLD NEW     results files (.json), or folders of them

Where both runs hold a paired ratio of a variant to its baseline, their intervals are compared: they
stand above the load of the machine. Else the times are: p20 to p80 of the one against the other.
Exit status: 0, 1 where anything became slower, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: of the checkout only this folder is on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.harness.store import KEY, OtherResults, load
from efrdn_fast.tables import render

__all__ = ["Change", "changes", "differences", "main"]

SETTINGS = ("device", "threads", "isa", "driver", "platform")


@dataclass(frozen=True)
class Change:
    """One row that both runs hold."""

    key: tuple[str, ...]
    factor: float | None
    """How many times faster NEW is; None where one of them has no figure."""
    verdict: str
    """"faster", "slower", "within the noise", "noisy" or why there is no figure."""
    by: str
    """"ratio" or "time"."""


def _rows(path: Path) -> tuple[dict[tuple[str, ...], Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Key -> row of a file or of all files of a folder, and the runs."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows, runs = {}, []
    for file in files:
        try:
            stored = load(file)
        except OtherResults:
            if not path.is_dir():
                raise
            continue
        rows |= {tuple(str(row.get(k)) for k in KEY): row for row in stored["rows"]}
        runs += stored["runs"].values()
    if not rows:
        raise ValueError(f"{path} holds no results of the bench")
    return rows, runs


def changes(old: Path, new: Path) -> Iterator[Change]:
    """Every row that both hold, in the order of the old one.

    Raises:
        ValueError: There is none.
    """
    before, after = _rows(old)[0], _rows(new)[0]
    if before.keys().isdisjoint(after):
        raise ValueError(
            f"no row is in both, by {', '.join(KEY)}: {old} begins with "
            f"{' '.join(next(iter(before)))}, {new} with {' '.join(next(iter(after)))}"
        )
    for key, row in before.items():
        if key in after:
            yield _change(key, row, after[key])


def _change(key: tuple[str, ...], old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    states = [row["status"] for row in (old, new)]
    if not all(row.get("p50_ms") for row in (old, new)) or "modelled" in states:
        return Change(key, None, f"no figure: {states[0]}, then {states[1]}", "time")
    by = "ratio" if old.get("ratio") and new.get("ratio") else "time"
    if by == "ratio":
        factor = new["ratio"] / old["ratio"]
        better, worse = new["ratio_low"] > old["ratio_high"], new["ratio_high"] < old["ratio_low"]
    else:
        factor = old["p50_ms"] / new["p50_ms"]
        (old_low, old_high), (new_low, new_high) = _span(old), _span(new)
        better, worse = new_high < old_low, new_low > old_high
    if "noisy" in states:
        return Change(key, factor, "noisy", by)
    return Change(key, factor, _verdict(better, worse), by)


def _span(row: Mapping[str, Any]) -> tuple[float, float]:
    """p20 and p80 in ms; the median where there are none."""
    return row.get("p20_ms") or row["p50_ms"], row.get("p80_ms") or row["p50_ms"]


def _verdict(better: bool, worse: bool) -> str:
    return "faster" if better else "slower" if worse else "within the noise"


def differences(old: Path, new: Path) -> list[str]:
    """What differs between the runs besides the code: "torch: 2.10.0, then 2.11.0"."""
    found = [_context(_rows(path)[1]) for path in (old, new)]
    names = sorted(found[0].keys() | found[1].keys())
    shown = [[" and ".join(sorted(each.get(n, {"nothing"}))) for each in found] for n in names]
    return [f"{n}: {a}, then {b}" for n, (a, b) in zip(names, shown, strict=True) if a != b]


def _context(runs: list[Mapping[str, Any]]) -> dict[str, set[str]]:
    context: dict[str, set[str]] = {}
    for run in runs:
        values = {name: run.get(name) for name in SETTINGS} | run.get("versions", {})
        for name, value in values.items():
            context.setdefault(name, set()).add(str(value))
    return context


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="show what did not move too")
    args = parser.parse_args()
    try:
        found = list(changes(args.old, args.new))
        differing = differences(args.old, args.new)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for line in differing:
        print(f"not the same: {line}")
    moved = [c for c in found if c.verdict in ("faster", "slower")]
    rows = [
        (
            " ".join(c.key[:-1]),
            f"{c.factor:.2f}x" if c.factor else "",
            f"{c.verdict} ({c.by})" if c.factor else c.verdict,
        )
        for c in (found if args.all else moved)
    ]
    if rows:
        print(render(("case", "new / old speed", "verdict"), rows))
    noisy = sum(c.verdict == "noisy" for c in found)
    slower = sum(c.verdict == "slower" for c in moved)
    print(
        f"{len(found)} rows in both: {len(moved) - slower} faster, {slower} slower, {noisy} noisy"
    )
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
