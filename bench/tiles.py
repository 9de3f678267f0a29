"""What tiles change: whole image against tiles, exact bands and fixed attention segments.

    python -m bench.tiles --benchmark DATA --json tiles.json --page docs/tiles.md

Per image and way: PSNR against the whole image (RGB, peak 1), the largest difference of a pixel in
grey levels of 255, the PSNR against the original (Y, border cut) minus that of the whole image, and
seconds. All ways but the exact one run `EFRDNFast`, as `efrdn upscale` does. The JSON is written
after every image and names the weights; the same command goes on from there. The page gets the
table of what is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import provenance
from efrdn_fast import benchmarks, checkpoint, metrics
from efrdn_fast.commands._options import positive
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
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--weights", help="x2, x3, x4 or a checkpoint (default: x<scale>)")
    parser.add_argument("--limit", type=positive, help="images of each set (default: all)")
    parser.add_argument("--json", type=Path, required=True, help="kept and continued if it exists")
    parser.add_argument("--page", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    found = json.loads(args.json.read_text()) if args.json.exists() else {"images": []}
    if args.benchmark:
        weights = _weights(args.weights or f"x{args.scale}")
        if found["images"] and not _continues(found, weights, args.scale):
            parser.error(
                f"{args.json} holds figures of other weights or another scale; "
                "name another file or delete it"
            )
        found |= {"run": provenance.record(torch.device("cpu"))}
        found |= {"scale": args.scale, "weights": weights}
        _fill(found, args)
    if args.page:
        before, _, rest = args.page.read_text().partition(BEGIN)
        args.page.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])
    print(table(found), end="")
    return 0


def _weights(source: str) -> dict:
    """What tells these weights from others."""
    path = checkpoint.resolve(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "sha256": digest, "training": checkpoint.load(path).training}


def _continues(found: dict, weights: dict, scale: int) -> bool:
    same = found.get("weights", {}).get("sha256") == weights["sha256"]
    return same and found.get("scale") == scale


def _fill(found: dict, args: argparse.Namespace) -> None:
    """Measure the images that `found` lacks; it is stored after each."""
    rows = found["images"]
    known = {(row["set"], row["image"]) for row in rows}
    for image_set in benchmarks.discover(args.benchmark, args.sets):
        for pair in benchmarks.find_pairs(image_set, args.scale)[: args.limit]:
            if (image_set.name, pair.name) in known:
                continue
            lr, hr = benchmarks.load_pair(pair, args.scale)
            measured = _measure(lr, hr, args.scale, args.weights)
            rows.append({"set": image_set.name, "image": pair.name, "ways": measured})
            checkpoint.atomic_write(args.json, (json.dumps(found, indent=1) + "\n").encode())
            seconds = ", ".join(f"{way} {m['seconds']:.2f} s" for way, m in measured.items())
            print(f"{image_set.name} {pair.name}: {seconds}", file=sys.stderr)


def _measure(lr, hr, scale: int, weights: str | None) -> dict[str, dict[str, float]]:
    x, y = (torch.tensor(p).permute(2, 0, 1)[None].float() / 255 for p in (lr, hr))
    whole = Upscaler(scale, weights, tile=0).tensor(x)
    best = metrics.psnr(whole, y, scale)
    found = {}
    for name, options in WAYS.items():
        upscaler = Upscaler(scale, weights, **options)
        start = time.perf_counter()
        other = upscaler.tensor(x)
        found[name] = {
            "psnr_to_whole": _psnr(other, whole),
            "largest": (other - whole).abs().max().item() * 255,
            "gain": metrics.psnr(other, y, scale) - best,
            "seconds": round(time.perf_counter() - start, 3),
        }
    return found


def _psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).double().square().mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


def table(found: dict) -> str:
    """Means over each set; of the largest differences the largest. Which weights, below."""
    rows = found["images"]
    lines = [
        "| set | images | way | PSNR to the whole image | largest difference of 255 | "
        "PSNR to the original |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row["ways"] for row in rows if row["set"] == name]
        for way in WAYS:
            figures = [ways[way] for ways in of_set]
            keys = "psnr_to_whole", "gain"
            mean = {key: sum(f[key] for f in figures) / len(figures) for key in keys}
            largest = max(f["largest"] for f in figures)
            lines.append(
                f"| {name} | {len(figures)} | {way} | {mean['psnr_to_whole']:.1f} dB | "
                f"{largest:.3g} | {mean['gain']:+.4f} dB |\n"
            )
    weights = found["weights"]
    lines.append(f"\nWeights: `{weights['file']}`, sha256 `{weights['sha256'][:16]}`.\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
