"""Tables and pictures of README and docs, generated from the results files, never typed.

    python -m bench.report            write them
    python -m bench.report --check    exit status 1 where one differs from the results (CI)

A table stands between `<!-- bench: TABLE DEVICE OP CASE -->` and `<!-- /bench -->`; TABLE is
a key of `COLUMNS` or of `training_tables` or `user_tables`, DEVICE a folder of `bench/results`. A
device without results says "not measured", a figure that spreads too far "noisy". Rows stand in a
fixed order, whichever run was the last. Pictures: see `plots`; each holds a digest of the files it
shows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import training_tables, user_tables
from .harness.provenance import RESULTS
from .harness.store import load
from .peers import PEERS
from .rungs import RUNGS

__all__ = ["PAGES", "main", "render_page"]

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/attention.md", "docs/benchmarks.md", "docs/training.md")
BLOCK = re.compile(r"(<!-- bench: (.+?) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def _time(row: Mapping[str, Any]) -> str:
    if not row.get("p50_ms") or row["status"] == "noisy":
        return row["status"]
    unit = f"{row['p50_ms'] / 1e3:.2f} s" if row["p50_ms"] >= 1e3 else f"{row['p50_ms']:.3g} ms"
    return unit if row["status"] == "measured" else f"{unit} ({row['status']})"


def _ratio(row: Mapping[str, Any]) -> str:
    if row["variant"] == row["baseline"]:
        return "1"
    if not row.get("ratio") or row["status"] == "noisy":
        return ""
    return f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _share(row: Mapping[str, Any]) -> str:
    if row["status"] == "noisy":
        return ""
    shares = {"copy": "copy_share", "matrix product": "matmul_share", "exp": "exp_share"}
    found = {name: row.get(key) or 0 for name, key in shares.items()}
    best = max(found, key=lambda name: found[name])
    return f"{found[best]:.0%} of {best}" if found[best] else ""


def _error(row: Mapping[str, Any]) -> str:
    return "" if row.get("error") is None else f"{row['error']:.1e}"


def _memory(row: Mapping[str, Any]) -> str:
    return "" if row["status"] == "noisy" else user_tables.memory(row.get("peak_mib"))


COLUMNS: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "network": {
        "": lambda row: f"`{row['variant']}`",
        "time": _time,
        "speed": _ratio,
        "max error": _error,
    },
    "kernels": {
        "case": lambda row: f"{row['case']} {row['dtype']}",
        "": lambda row: f"`{row['variant']}`",
        "time": _time,
        "speed": _ratio,
        "share of the ceiling": _share,
    },
    "attention": {
        "case": lambda row: row["case"],
        "": lambda row: f"`{row['variant']}`",
        "time": _time,
        "speed": _ratio,
        "memory": _memory,
    },
    "peers": {
        "": lambda row: row["variant"],
        "time": _time,
        "speed": _ratio,
        "size": lambda row: row["note"],
    },
    "ntire": {
        "": lambda row: f"`{row['variant']}`",
        "mean time": _time,
        "pictures": lambda row: row["note"],
    },
    "blocks": {
        "": lambda row: row["variant"],
        "time": _time,
    },
}
"""Table -> title of a column -> its cell."""


def table(kind: str, device: str, op: str, case: str) -> str:
    """One table as Markdown, with the source of its figures.

    Args:
        kind: A key of `COLUMNS`, of `training_tables.TABLES` or of `user_tables.TABLES`.
        case: Of the rows; "*" takes all.

    Raises:
        ValueError: No such table.
    """
    others = training_tables.TABLES | user_tables.TABLES
    if kind in others:
        return others[kind](device, case)
    if kind not in COLUMNS:
        known = [*COLUMNS, *others]
        raise ValueError(f"no table {kind!r}; expected {', '.join(known)}")
    path = RESULTS / device / f"{op}.json"
    stored = load(path) if path.is_file() else {"rows": [], "runs": {}}
    rows = [
        row
        for row in stored["rows"]
        if case in ("*", row["case"]) and row["status"] not in ("not run", "wrong", "failed")
    ]
    if not rows:
        return f"Not measured: no results of `{op}` on {device}.\n"
    if kind != "blocks":  # those are in the order of the network
        rows.sort(key=_place)
    columns = COLUMNS[kind]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    about = _about([stored["runs"][name] for name in dict.fromkeys(row["run"] for row in rows)])
    if any(row["variant"] == row["baseline"] for row in rows):
        about += f". Speed: paired ratio to `{rows[0]['baseline']}` with its interval"
    return "\n".join([*lines, "", f"{about} ([figures]({{up}}{_relative(path)}))."]) + "\n"


ORDER = (*RUNGS, *PEERS, "eager", "folded", "sdpa", "padded", "compile", "packed", "ours")
"""Variants in the order of tables; the others, backends, come after them by name."""


def _place(row: Mapping[str, Any]) -> tuple:
    name, words = row["variant"], re.split(r"(\d+)", row["case"])
    natural = [(int(word), "") if word.isdecimal() else (0, word) for word in words]
    rank = ORDER.index(name) if name in ORDER else len(ORDER)
    return natural, row["dtype"] if name not in RUNGS else "", rank, name, row.get("mode") or ""


def _about(runs: Sequence[Mapping[str, Any]]) -> str:
    """Devices and versions, each with its revisions, nothing twice."""
    found: dict[str, dict[str, set[bool]]] = {}
    for run in runs:
        machine = f"{run['device']}, {run['isa']}, torch {run['versions']['torch']}"
        commit = run["revision"] or "unknown"
        changed = found.setdefault(machine, {}).setdefault(commit.removesuffix("+"), set())
        changed.add(commit.endswith("+"))
    return "; ".join(
        f"{machine}, revision{'s' * (len(commits) > 1)} "
        + ", ".join(commit + _CHANGED[frozenset(changed)] for commit, changed in commits.items())
        for machine, commits in found.items()
    )


_CHANGED = {
    frozenset({False}): "",
    frozenset({True}): "+",
    frozenset({False, True}): " (partly +)",
}
"""Whether the rows of a commit are of code with changes to it -> what stands behind its name."""


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def render_page(text: str, up: str) -> str:
    """A page with its tables made anew; `up` leads from it to the repository's root.

    Raises:
        ValueError: A marker that names no table.
    """

    def block(found: re.Match[str]) -> str:
        words = found[2].split()
        if len(words) != 4:
            raise ValueError(f"marker {found[2]!r}: expected TABLE DEVICE OP CASE")
        return found[1] + "\n" + table(*words).replace("{up}", up) + "\n" + found[3]

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    args = parser.parse_args()
    from . import plots  # needs matplotlib to draw, not to check

    stale = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        made = render_page(text, "../" * name.count("/"))
        if made != text:
            stale.append(name)
            if not args.check:
                page.write_text(made, encoding="utf-8")
    for picture in plots.pictures(RESULTS):
        if picture.stale():
            stale.append(_relative(picture.path))
            if not args.check:
                picture.draw()
    verb = "differ from the results; run `python -m bench.report`" if args.check else "written"
    print(f"{', '.join(stale)} {verb}" if stale else "all tables and pictures are up to date")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
