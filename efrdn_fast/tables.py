"""The paper's tables: published figures beside obtained ones, and plain-text tables."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

from .config import EFRDNConfig
from .counts import LR_SIZES, count

__all__ = ["SizeRow", "agreement", "bicubic_rows", "paper_tables", "render", "size_rows"]

DATA = Path(__file__).parent / "data"


@functools.cache
def paper_tables() -> dict:
    """Tables 1-6 as printed; numbers are `Decimal`, so "27.0" keeps its digits."""
    text = (DATA / "paper_tables.json").read_text(encoding="utf-8")
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


@functools.cache
def bicubic_rows() -> dict:
    """Measured bicubic figures: set -> "x2" -> "rgb", "y" `[dB, SSIM]` and "images"."""
    return json.loads((DATA / "bicubic.json").read_text(encoding="utf-8"))["sets"]


@dataclass(frozen=True)
class SizeRow:
    """Parameters and Multi-Adds of one row of Tables 1-5, published and obtained."""

    table: str
    row: str
    published_k: Decimal
    """Parameters in thousands, as printed."""
    published_g: Decimal
    """Multi-Adds in units of 1e9, as printed."""
    parameters: int
    multi_adds: int

    @property
    def parameters_agree(self) -> str:
        """`agreement` of the parameters."""
        return agreement(self.published_k, Decimal(self.parameters) / 1000)

    @property
    def multi_adds_agree(self) -> str:
        """`agreement` of the Multi-Adds."""
        return agreement(self.published_g, Decimal(self.multi_adds) / 10**9)


def agreement(published: Decimal, obtained: Decimal) -> str:
    """How `obtained` meets the printed digits.

    "ok" when truncated and rounded alike, "t" when truncated, "r" when rounded, else the signed
    difference obtained - published.
    """
    digit = Decimal(1).scaleb(published.as_tuple().exponent)
    truncated = obtained.quantize(digit, ROUND_DOWN) == published
    rounded = obtained.quantize(digit, ROUND_HALF_UP) == published
    if truncated or rounded:
        return "ok" if truncated and rounded else "t" if truncated else "r"
    return f"{obtained - published:+.3f}"


@functools.cache
def size_rows() -> tuple[SizeRow, ...]:
    """Every size row of Tables 1-5, at the LR size that gives a 1280x720 result."""
    return (*_table1(), *_table2(), *_tables_3_to_5())


# A count takes about half a second, and the full network stands in every table.
_count = functools.cache(count)


def _table1() -> list[SizeRow]:
    rows = []
    full = EFRDNConfig()
    for scale in (2, 3, 4):
        width, height = LR_SIZES[scale]
        printed = paper_tables()["table1"][f"x{scale}"]["EFRDN"]
        # Table 1 prints whole thousands; the file's trailing ".0" is not printed.
        published = (printed["params_k"].quantize(Decimal(1)), printed["multi_adds_g"])
        cost = _count(full, width, height)
        title = f"x{scale}" if scale == 4 else f"x{scale}, x4 network at {width}x{height}"
        rows.append(SizeRow("1", title, *published, cost.parameters, cost.conv))
        if scale != 4:
            cost = _count(dataclasses.replace(full, scale=scale), *LR_SIZES[scale])
            rows.append(
                SizeRow("1", f"x{scale}, true tail", *published, cost.parameters, cost.conv)
            )
    return rows


def _table2() -> list[SizeRow]:
    rows = []
    for module in ("imdb", "rfdb", "acdm"):
        printed = paper_tables()["table2_x4_manga109"][f"EFRDN+{module.upper()}"]
        published = (printed["params_k"], printed["multi_adds_g"])
        cost = _count(EFRDNConfig(module=module), *LR_SIZES[4])
        if module == "acdm":
            rows.append(SizeRow("2", "ACDM", *published, cost.parameters, cost.conv))
            continue
        blocks = [part.parameters for part in cost.parts if part.name.startswith("acdm.")]
        shared = cost.parameters - sum(blocks[2:])
        title = module.upper()
        rows.append(SizeRow("2", f"{title}, 2 shared blocks", *published, shared, cost.conv))
        rows.append(SizeRow("2", f"{title}, 4 blocks", *published, cost.parameters, cost.conv))
    return rows


def _tables_3_to_5() -> list[SizeRow]:
    rows = []
    for table in ("3", "4", "5"):
        for ablation, printed in paper_tables()[f"table{table}_x4_urban100"].items():
            cost = _count(EFRDNConfig(ablation=ablation), *LR_SIZES[4])
            rows.append(SizeRow(table, ablation, *printed[:2], cost.parameters, cost.conv))
    return rows


def render(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Plain-text table: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])
