"""Results as CSV (one row for a figure) and JSON (the same rows with what they depend on)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "KEY", "OtherResults", "Store", "load"]

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


class OtherResults(ValueError):
    """A JSON file that another program than the harness wrote."""


class Store:
    """The results of one op on one device: `<folder>/<op>.csv` and `<op>.json`."""

    def __init__(self, folder: Path, op: str):
        self.csv, self.json = folder / f"{op}.csv", folder / f"{op}.json"

    def add(self, rows: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> None:
        """Add rows of one run; they replace those of the same case, variant, mode and threads.

        A row without a mode, which says that there is no figure, replaces and is replaced by all.
        But what was measured stays where the new run only models it or could not run it here. The
        files change at once or not at all.
        """
        old = load(self.json) if self.json.is_file() else {"runs": {}, "rows": []}
        name = _run_name(run)
        new = [{**row, "run": name} for row in rows]
        new = [n for n in new if not any(_stays(row, n) for row in old["rows"])]
        kept = [row for row in old["rows"] if not any(_replaces(n, row) for n in new)] + new
        used = {row["run"] for row in kept}
        runs = {k: v for k, v in {**old["runs"], name: dict(run)}.items() if k in used}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.DictWriter(table, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        _write(self.json, json.dumps({"runs": runs, "rows": kept}, indent=1) + "\n")
        _write(self.csv, table.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Runs and rows of a results file.

    Raises:
        FileNotFoundError: No such file.
        OtherResults: JSON, but no results file of the bench.
        ValueError: No JSON, or a row that names no case.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(record, dict) or not {"runs", "rows"} <= record.keys():
        raise OtherResults(f"{path} holds no runs and rows; expected a results file of bench/")
    for row in record["rows"]:
        absent = {"op", "case", "dtype", "variant", "status"} - row.keys()
        if absent:
            raise ValueError(f"{path} holds a row without {', '.join(sorted(absent))}: {row}")
    return record


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both are of one variant on one case, whatever the mode."""
    return _key({**a, "mode": ""}) == _key({**b, "mode": ""})


def _mode(row: Mapping[str, Any]) -> str:
    """Mode of a row with a measured figure, "" of any other."""
    mode = str(row.get("mode") or "")
    return "" if mode == "modelled" else mode


def _stays(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an old row has a measured figure, and the new one only less to say."""
    less = new.get("mode") == "modelled" or new.get("status") == "not run"
    return less and bool(_mode(old)) and _same(old, new)


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether both are of one case and mode, or one of them says that there is no figure."""
    modes = {_mode(row) for row in (new, old)}
    return _same(new, old) and (len(modes) == 1 or "" in modes)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in KEY)


def _run_name(run: Mapping[str, Any]) -> str:
    return f"{run['revision'] or 'unknown'} {run['date']}"
