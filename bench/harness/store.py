"""Results as CSV (one row for a figure) and JSON (the same rows with what they depend on)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "KEY", "Store", "load"]

KEY = ("op", "case", "dtype", "variant", "mode", "threads")
FIELDS = (
    *KEY,
    "status",
    *("min_ms", "p20_ms", "p50_ms", "p80_ms", "samples", "first_ms", "peak_mib"),
    *("baseline", "ratio", "ratio_low", "ratio_high"),
    *("gbps", "copy_share", "gflops", "matmul_share", "gexps", "exp_share"),
    *("error", "note", "run"),
)
"""Columns. status: measured, noisy, modelled, does not fit, not run, wrong. Shares are of the
ceilings of the same run; error is the largest absolute one against float64."""


class Store:
    """The results of one op on one device: `<folder>/<op>.csv` and `<op>.json`."""

    def __init__(self, folder: Path, op: str):
        self.csv, self.json = folder / f"{op}.csv", folder / f"{op}.json"

    def add(self, rows: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> None:
        """Add rows of one run; they replace those of the same case, variant, mode and threads.

        A row without a mode, which says that there is no figure, replaces and is replaced by all.
        """
        old = load(self.json) if self.json.is_file() else {"runs": {}, "rows": []}
        name = _run_name(run)
        new = [{**row, "run": name} for row in rows]
        kept = [row for row in old["rows"] if not any(_replaces(n, row) for n in new)] + new
        used = {row["run"] for row in kept}
        runs = {k: v for k, v in {**old["runs"], name: dict(run)}.items() if k in used}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps({"runs": runs, "rows": kept}, indent=1) + "\n")
        with self.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)


def load(path: Path) -> dict[str, Any]:
    """Runs and rows of a results file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no results file of the bench.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(record, dict) or not {"runs", "rows"} <= record.keys():
        raise ValueError(f"{path} holds no runs and rows; expected a results file of bench/")
    return record


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether both are of one case and mode, or one of them says that there is no figure."""
    modes = {str(row.get("mode") or "") for row in (new, old)}
    same = _key({**new, "mode": ""}) == _key({**old, "mode": ""})
    return same and (len(modes) == 1 or "" in modes)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in KEY)


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['revision'] or 'unknown'} {run['date']}"
