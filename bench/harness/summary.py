"""The table that ends a run: times, paired ratios, rates, first calls, and what was not run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from efrdn_fast.tables import render

if TYPE_CHECKING:
    from .session import Session

__all__ = ["lines"]

HEADER = (
    *("variant", "p50 ms", "p20", "p80", "paired ratio", "GB/s", "GFLOP/s", "Gexp/s", "peak MiB"),
    "",
)


def lines(session: Session) -> Iterator[str]:
    """Header with device, versions and ceilings, then a block for every case."""
    run = session.run
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield ""
    yield f"{run['device']}, {run['isa']}; {versions}; revision {run['revision']}"
    yield f"clocks {run['clocks']}; load {run['load']}; {run['command']}"
    c = session.ceilings
    matmul = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in c.matmul.items())
    yield (
        f"ceilings of this run: copy {c.copy / 1e9:,.1f} GB/s; matrix product {matmul} GFLOP/s; "
        f"exp {c.exp / 1e9:,.2f} G/s"
    )
    by_case = sorted(session.rows, key=_case)
    for (op, case, dtype, mode), group in groupby(by_case, key=_case):
        rows = list(group)
        yield ""
        yield " ".join(filter(None, (f"{op} {case}", dtype, mode and f"({mode})")))
        yield render(HEADER, [_cells(row) for row in rows])
        first = [f"{r['variant']} {_number(r['first_ms'] / 1e3)}" for r in rows if r["first_ms"]]
        if first:
            yield f"first call (made, built, loaded, captured), s: {', '.join(first)}"


def _case(row: dict[str, Any]) -> tuple[str, str, str, str]:
    mode = "" if row["mode"] == "modelled" else row["mode"]
    return row["op"], row["case"], row["dtype"] if row["op"] != "network" else "", mode


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = ""
    if row.get("ratio"):
        ratio = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        ratio = f"{ratio} to {row['baseline']}"
    status = "" if row["status"] == "measured" else row["status"]
    return (
        row["variant"],
        *(_number(row.get(f"{key}_ms")) for key in ("p50", "p20", "p80")),
        ratio,
        *(
            _share(row.get(key), row.get(share))
            for key, share in (
                ("gbps", "copy_share"),
                ("gflops", "matmul_share"),
                ("gexps", "exp_share"),
            )
        ),
        _number(row["peak_mib"]),
        ": ".join(filter(None, (status, row["note"]))),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _share(value: float | None, share: float | None) -> str:
    return "" if value is None else f"{_number(value)} ({share:.0%})"
