"""What tiles change: whole image against tiles, exact bands and fixed attention segments.

    python bench/tiles.py --benchmark DATA --json tiles.json --page docs/tiles.md

Per image and way: PSNR against the whole image (RGB, peak 1), the largest difference of a pixel in
grey levels of 255, and the PSNR against the original (Y, border cut) minus that of the whole image.
The JSON is written after every image; the page gets the table of what is in it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from efrdn_fast import benchmarks, metrics
from efrdn_fast.upscaler import Upscaler

__all__ = ["WAYS", "main", "table"]

WAYS = {
    "tiles of 32, overlap 8": {"tile": 32, "overlap": 8},
    "tiles of 64, overlap 16": {"tile": 64, "overlap": 16},
    "exact, bands of 32 rows": {"tile": 32, "exact": True},
    "whole, segments of 1024": {"tile": 0, "segment_tokens": 1024},
}
BEGIN, END = "<!-- begin: table of bench/tiles.py -->\n", "<!-- end -->\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", type=Path, help="folder of sets; without it only the page")
    parser.add_argument("--sets", nargs="+", default=["Set14", "BSD100"])
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--limit", type=int, help="images of each set (default: all)")
    parser.add_argument("--json", type=Path, required=True, help="kept and continued if it exists")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["images"] if args.json.exists() else []
    known = {(row["set"], row["image"]) for row in rows}
    for image_set in benchmarks.discover(args.benchmark, args.sets) if args.benchmark else ():
        for pair in benchmarks.find_pairs(image_set, args.scale)[: args.limit]:
            if (image_set.name, pair.name) in known:
                continue
            measured = _measure(*benchmarks.load_pair(pair, args.scale), args.scale)
            rows.append({"set": image_set.name, "image": pair.name, "ways": measured})
            summary = {"scale": args.scale, "torch": torch.__version__, "images": rows}
            args.json.write_text(json.dumps(summary, indent=1) + "\n")
    if args.page:
        before, _, rest = args.page.read_text().partition(BEGIN)
        args.page.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])
    print(table(rows), end="")
    return 0


def _measure(lr, hr, scale: int) -> dict[str, dict[str, float]]:
    x, y = (torch.tensor(p).permute(2, 0, 1)[None].float() / 255 for p in (lr, hr))
    whole = Upscaler(scale, tile=0).tensor(x)
    best = metrics.psnr(whole, y, scale)
    found = {}
    for name, options in WAYS.items():
        other = Upscaler(scale, **options).tensor(x)
        found[name] = {
            "psnr_to_whole": _psnr(other, whole),
            "largest": (other - whole).abs().max().item() * 255,
            "gain": metrics.psnr(other, y, scale) - best,
        }
    return found


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).double().square().mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


def table(rows: list[dict]) -> str:
    """Means over each set; of the largest differences the largest."""
    lines = [
        "| set | images | way | PSNR to the whole image | largest difference of 255 | "
        "PSNR to the original |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row["ways"] for row in rows if row["set"] == name]
        for way in WAYS:
            figures = [ways[way] for ways in of_set]
            mean = {k: sum(f[k] for f in figures) / len(figures) for k in figures[0]}
            largest = max(f["largest"] for f in figures)
            lines.append(
                f"| {name} | {len(figures)} | {way} | {mean['psnr_to_whole']:.1f} dB | "
                f"{largest:.3g} | {mean['gain']:+.4f} dB |\n"
            )
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
