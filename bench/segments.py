"""Cost of the whole network over the size of the image: four segments, or segments of 576 tokens.

    python -m bench.segments --json segments.json

Each size and setting runs in a process of its own, so that its peak memory is its own: the network
x4 of `EFRDNFast`, batch 1, float32, the better of two calls. Sizes above `--most` exponentials are
modelled from smaller ones as `bench.harness.model` says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.bench_emha import SIZES
from bench.harness import provenance
from bench.harness.model import Point, predict
from efrdn_fast import EFRDNFast
from efrdn_fast.config import EFRDNConfig
from efrdn_fast.counts import count
from efrdn_fast.timing import peak_memory

__all__ = ["main"]

SETTINGS = {"4 segments": None, "576 tokens": 576}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="rows of earlier runs in it are kept")
    sizes = [f"{width}x{height}" for width, height in SIZES]
    parser.add_argument("--sizes", nargs="+", choices=sizes, metavar="WxH", help="default: all")
    parser.add_argument("--most", type=float, default=3e10, help="exponentials (default: 3e10)")
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(*args.one)))
        return 0
    rows = _load(args.json)
    for setting, length in SETTINGS.items():
        for width, height in SIZES:
            name = f"{width}x{height}"
            if args.sizes and name not in args.sizes:
                continue
            exps = count(EFRDNConfig(segment_tokens=length), width, height).exps
            row = {"setting": setting, "size": name, "pixels": width * height, "exps": exps}
            if exps <= args.most:
                row |= {"source": "measured", **_child(width, height, length or 0)}
            else:
                row |= {"source": "modelled", **_model(rows, row)}
            rows = [r for r in rows if (r["setting"], r["size"]) != (setting, name)] + [row]
            print(json.dumps(row), flush=True)
    if args.json:
        record = {"run": provenance.record(torch.device("cpu")), "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _load(path: Path | None) -> list[dict]:
    return json.loads(path.read_text())["rows"] if path and path.is_file() else []


def _child(width: int, height: int, length: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.segments", "--one", *map(str, (width, height, length))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(width: int, height: int, length: int) -> dict[str, float]:
    net = EFRDNFast(4, segment_tokens=length or None).eval()
    x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    seconds = []

    def call() -> None:
        start = time.perf_counter()
        net(x)
        seconds.append(time.perf_counter() - start)

    with torch.inference_mode():
        net(x[:, :, :16, :16])  # packs the weights and loads the kernels
        peak = peak_memory(call, x.device)
        call()
    return {"seconds": round(min(seconds), 4), "peak_mib": peak and round(peak / 2**20, 1)}


def _model(rows: list[dict], row: dict) -> dict[str, float]:
    points = [
        Point(r["pixels"], r["exps"], r["seconds"], int((r["peak_mib"] or 0) * 2**20))
        for r in rows
        if r["setting"] == row["setting"] and r["source"] == "measured"
    ]
    found = predict(points, row["pixels"], row["exps"])
    if found is None:
        raise SystemExit(f"nothing was measured to model {row['setting']}, {row['size']} from")
    return {"seconds": round(found.seconds, 1), "peak_mib": round(found.peak / 2**20)}


if __name__ == "__main__":
    sys.exit(main())
