"""Patches per second of the training loader: `python -m bench.train_loader FOLDER --cache-dir DIR`.

Batches of 16 pairs (48x48 LR, 192x192 HR at x4, the paper's), flipped and rotated, from the memory
map, by so many loader processes; nothing trains meanwhile. Writes
`bench/results/<device>/train_loader.json`.
"""

from __future__ import annotations

import argparse
import json
import time

from .harness.provenance import RESULTS, device_folder

WARM_UP, STEPS = 10, 150
SIZES = (48, 16)  # LR pixels a side, patches in a batch


def measure(patches, workers: int) -> float:
    """Patches per second after the warm-up."""
    from efrdn_fast.data import loader

    batches = iter(loader(patches, lambda step: SIZES, 0, WARM_UP + STEPS, workers))
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in range(STEPS):
        next(batches)
    return STEPS * SIZES[1] / (time.perf_counter() - start)


def main() -> None:
    import torch

    from efrdn_fast.data import Patches, build_cache, find_images, split_validation

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", help="training folders")
    parser.add_argument("--cache-dir", required=True, help="folder of decoded images")
    args = parser.parse_args()
    name = device_folder(torch.device("cpu"))
    torch.set_num_threads(1)
    images, _ = split_validation(find_images(args.data))
    patches = Patches(build_cache(images, 4, args.cache_dir), seed=0)
    rows = [
        {"workers": workers, "patches_per_s": round(measure(patches, workers))}
        for workers in (0, 1, 2)
    ]
    result = {
        "command": "python -m bench.train_loader ../shared/data/train --cache-dir cache",
        "device": name,
        "images": len(images),
        "patch": SIZES[0],
        "batch": SIZES[1],
        "torch": torch.__version__,
        "rows": rows,
    }
    path = RESULTS / name / "train_loader.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
