"""Tables of weights, segments, recipe and ablations for README and docs, from the results files."""

from __future__ import annotations

from typing import Any

from efrdn_fast.ablate import ablation_tables, variants
from efrdn_fast.tables import paper_tables

from . import records

__all__ = ["TABLES", "ablation", "recipe", "segment_psnr", "weights"]

SETS = ("Set5", "Set14", "BSD100")
SCALES = (4, 3, 2)
SHORT = ("IMDN", "EFRDN")  # the peers that README shows


def _sets(device: str, name: str, scale: int) -> dict[str, Any] | None:
    """Sets of an evaluation; None where it has not been made."""
    found = (records.read(device, name) or {}).get("scales", {}).get(f"x{scale}")
    return found and found["sets"]


def _figures(sets: dict[str, Any], which: str) -> list[str]:
    """PSNR and SSIM on whole sets; "not measured" for the others."""
    whole = {name: found for name, found in sets.items() if found["whole"]}
    shown = {name: f"{v[which]['psnr']:.3f} / {v[which]['ssim']:.4f}" for name, v in whole.items()}
    return [shown.get(name, "not measured") for name in SETS]


def weights(device: str, peers: str) -> str:
    """PSNR and SSIM of the shipped weights beside bicubic and published networks.

    Args:
        peers: "short" (two of Table 1) or "*" (all of Table 1, and Table 6 at x4).
    """
    lines = ["| PSNR (dB) / SSIM on Y | " + " | ".join(SETS) + " |", "|" + "---|" * 4]
    for scale in SCALES:
        plain = _sets(device, f"eval_x{scale}", scale)
        if plain is None:
            continue
        ensemble = _sets(device, f"eval_x{scale}_ensemble", scale)
        rows = [
            ("bicubic", _figures(plain, "bicubic")),
            ("**these weights**", _figures(plain, "model")),
        ]
        if ensemble:
            rows.append(("these weights, self-ensemble of 8", _figures(ensemble, "model")))
        published = dict(paper_tables()["table1"][f"x{scale}"])
        if scale == 4 and peers == "*":
            published |= paper_tables()["table6_x4"]
        published["EFRDN"] = published.pop("EFRDN")  # last
        for name, row in published.items():
            if peers == "*" or name in SHORT:
                cells = [f"{row[s][0]:.2f} / {row[s][1]:.4f}" if row[s] else "" for s in SETS]
                rows.append((f"{name}, published (DIV2K)", cells))
        lines += [f"| x{scale} {name} | {' | '.join(cells)} |" for name, cells in rows]
    if len(lines) == 2:
        return records.missing(device, "eval_x4")
    links = ", ".join(
        f"[{path.stem}]({{up}}bench/results/{device}/{path.name})"
        for path in sorted((records.RESULTS / device).glob("eval_x*.json"))
    )
    return "\n".join([*lines, "", f"By `efrdn eval`: {links}."]) + "\n"


def segment_psnr(device: str, form: str) -> str:
    """PSNR at x4 with four segments and with segments of 576 tokens, of the same weights.

    Args:
        form: "short" (one sentence) or "*" (a table).
    """
    names = "eval_x4", "eval_x4_segments"
    networks = [(records.read(device, name) or {}).get("scales", {}).get("x4") for name in names]
    for name, network in zip(names, networks, strict=True):
        if network is None:
            return records.missing(device, name)
    if len({network["network"]["sha256"] for network in networks}) > 1:
        return f"Not measured: {' and '.join(names)} on {device} are of different weights.\n"
    rows = []
    for name in SETS:
        pair = [network["sets"].get(name) for network in networks]
        if all(found and found["whole"] for found in pair):
            rows.append((name, *(found["model"]["psnr"] for found in pair)))
    links = ", ".join(f"[{name}]({{up}}bench/results/{device}/{name}.json)" for name in names)
    if form == "short":
        changes = " / ".join(f"{after - before:+.3f}" for _, before, after in rows)
        sets = " / ".join(name for name, *_ in rows)
        return f"With segments of 576 tokens PSNR changes by {changes} dB on {sets} ({links}).\n"
    lines = ["| PSNR, x4 | four segments | 576 tokens | change |", "|" + "---|" * 4]
    lines += [f"| {n} | {a:.3f} dB | {b:.3f} dB | {b - a:+.3f} dB |" for n, a, b in rows]
    return "\n".join([*lines, "", f"By `efrdn eval`: {links}."]) + "\n"


def recipe(device: str, _: str) -> str:
    """PSNR of every choice of the recipe, and its difference to the first base."""
    stored = records.read(device, "recipe")
    if stored is None:
        return records.missing(device, "recipe")
    rows = stored["rows"]
    base = rows[0]["psnr_db"]
    lines = ["| change | PSNR, dB | to the base | CPU seconds |", "|" + "---|" * 4]
    for row in rows:
        name = f"base, seed {row['seed']}" if row["change"] == "base" else row["change"]
        psnr, seconds = row["psnr_db"], row["cpu_seconds"]
        lines.append(f"| {name} | {psnr:.3f} | {psnr - base:+.3f} | {seconds:.0f} |")
    return "\n".join([*lines, "", records.source(stored["run"], device, "recipe")]) + "\n"


def ablation(device: str, _: str) -> str:
    """The paper's Tables 2-5, or those that were made, beside the trained variants."""
    stored = records.read(device, "ablation")
    if stored is None:
        return records.missing(device, "ablation")
    psnr = {(row["table"], row["name"]): row["psnr"] for row in stored["rows"]}
    rows = variants(list(dict.fromkeys(table for table, _ in psnr)))
    for row in rows:
        row.psnr = psnr[row.table, row.name]
    return f"```text\n{ablation_tables(rows)}\n```\n"


TABLES = {
    "weights": weights,
    "segment_psnr": segment_psnr,
    "recipe": recipe,
    "ablation": ablation,
}
"""Name in a page's marker -> its table, of a device and the marker's last word."""
