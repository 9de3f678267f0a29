"""Ablations: every variant of the paper's Tables 2-5 trained under one equal budget.

All variants of a seed see the same samples in the same order, so their differences to the full
network are paired; the spread of these differences over the seeds is the uncertainty.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from . import checkpoint
from .config import EFRDNConfig
from .counts import count
from .options import RunOptions, TrainOptions
from .tables import paper_tables, render
from .train import train

__all__ = ["TABLES", "Variant", "ablation_tables", "as_json", "run_ablations", "variants"]

TABLES = ("2", "3", "4", "5")
_count = functools.cache(count)  # about half a second each
BENCHMARKS = {"2": "Manga109", "3": "Urban100", "4": "Urban100", "5": "Urban100"}


@dataclass
class Variant:
    """One row of Tables 2-5; rows of several tables that are the same network are trained once."""

    table: str
    name: str
    module: str
    ablation: str
    published: tuple[Decimal, Decimal, Decimal, Decimal]
    """Parameters in thousands, Multi-Adds in 1e9, PSNR in dB and SSIM, as printed."""
    psnr: dict[int, float] = field(default_factory=dict)
    """Seed -> PSNR in dB on the validation images."""

    @property
    def key(self) -> str:
        """Name of the network, the same in every table."""
        return self.ablation if self.module == "acdm" else self.module


def variants(tables: Sequence[str] = TABLES) -> list[Variant]:
    """The rows of `tables` in the paper's order; every table has the full network once."""
    rows, printed = [], paper_tables()
    for table in tables:
        if table == "2":
            for title, row in printed["table2_x4_manga109"].items():
                module = title.rsplit("+", 1)[1].lower()
                figures = (row["params_k"], row["multi_adds_g"], *row["psnr_ssim"])
                rows.append(Variant(table, module, module, "full", figures))
        else:
            for ablation, figures in printed[f"table{table}_x4_urban100"].items():
                rows.append(Variant(table, ablation, "acdm", ablation, tuple(figures)))
    return rows


def run_ablations(
    data: Sequence[str | os.PathLike],
    options: TrainOptions,
    run: RunOptions,
    *,
    seeds: Sequence[int] = (0, 1),
    tables: Sequence[str] = TABLES,
) -> list[Variant]:
    """Train every variant with every seed and return the rows with their validation PSNR.

    Args:
        data: Training folders, as for `train`.
        options: The budget and recipe of all; module, ablation and manual_seed are set here.
        run: `<out>/<variant>-<seed>` holds each run; finished ones are not repeated, and a
            stopped one is resumed.
        seeds: At least one.
        tables: Any of "2", "3", "4", "5".

    Raises:
        ValueError: No seed, or no images to validate on.
    """
    if not seeds:
        raise ValueError("ablate: at least one seed is needed")
    for seed in seeds:  # a bad one is refused before hours of the others
        dataclasses.replace(options, manual_seed=seed)
    rows = variants(tables)
    cache_dir = run.cache_dir or str(Path(run.out) / "cache")
    done: dict[tuple[str, int], float] = {}
    for seed in seeds:
        for row in rows:
            if (row.key, seed) not in done:
                done[row.key, seed] = _psnr(data, options, run, row, seed, cache_dir)
            row.psnr[seed] = done[row.key, seed]
    return rows


def _psnr(
    data: Sequence[str | os.PathLike],
    options: TrainOptions,
    run: RunOptions,
    row: Variant,
    seed: int,
    cache_dir: str,
) -> float:
    out = Path(run.out) / f"{row.key}-{seed}"
    options = dataclasses.replace(
        options, module=row.module, ablation=row.ablation, manual_seed=seed
    )
    path = out / "net.safetensors"
    record = checkpoint.load(path).training if path.is_file() else {}
    if (record.get("options"), record.get("steps")) != (options.to_dict(), options.total_iter):
        last = dataclasses.replace(
            run, out=str(out), cache_dir=cache_dir, val_freq=max(1, options.total_iter)
        )
        record = checkpoint.load(train(data, options, last)).training
    if record.get("validation_psnr_db") is None:
        raise ValueError(
            f"ablate: {out} ended at step {record['steps']} of {options.total_iter} without "
            "validation: give it more time, and images to validate on"
        )
    return record["validation_psnr_db"]


def ablation_tables(rows: Sequence[Variant]) -> str:
    """The paper's tables beside the obtained rows, as text.

    "to full" is PSNR less that of the full network; for ours the mean over the seeds with half
    the range of the differences. The order of the variants, best first, stands under each table.
    """
    parts = []
    for table in dict.fromkeys(row.table for row in rows):
        own = [row for row in rows if row.table == table]
        full = next(row for row in own if row.key == "full")
        header = (
            *(f"Table {table}", "params", "here", "M-Adds", "here"),
            *(f"paper ({BENCHMARKS[table]})", "to full", "ours (validation)", "to full"),
        )
        lines = [_line(row, full) for row in own]
        orders = (
            sorted(own, key=lambda row: -row.published[2]),
            sorted(own, key=lambda row: -statistics.mean(row.psnr.values())),
        )
        paper, ours = (" > ".join(row.name for row in order) for order in orders)
        parts.append(f"{render(header, lines)}\n\npaper: {paper}\nours:  {ours}")
    return "\n\n".join(parts)


def _line(row: Variant, full: Variant) -> tuple[str, ...]:
    cost = _count(EFRDNConfig(module=row.module, ablation=row.ablation))
    params, multi_adds, psnr, _ = row.published
    differences = _differences(row, full)
    spread = (max(differences) - min(differences)) / 2
    return (
        *(row.name, f"{params}K", f"{cost.parameters / 1e3:.1f}K"),
        *(f"{multi_adds}G", f"{cost.conv / 1e9:.2f}G"),
        *(f"{psnr:.2f}", f"{psnr - full.published[2]:+.2f}"),
        f"{statistics.mean(row.psnr.values()):.3f}",
        f"{statistics.mean(differences):+.3f} ± {spread:.3f}",
    )


def _differences(row: Variant, full: Variant) -> list[float]:
    return [row.psnr[seed] - full.psnr[seed] for seed in row.psnr]


def as_json(rows: Sequence[Variant], options: TrainOptions) -> dict:
    """The rows and the budget, JSON-ready."""
    return {
        "budget": options.to_dict(),
        "rows": [
            {**dataclasses.asdict(row), "published": [float(x) for x in row.published]}
            for row in rows
        ],
    }
