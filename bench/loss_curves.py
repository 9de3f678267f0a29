"""Loss curves of plain and fused training over the same short run.

    python -m bench.loss_curves FOLDER --seeds 0 1 --json curves.json

200 steps of 2 patches of 16x16 LR pixels (x4, fp32, Adam, peak 5e-4, warm-up 20), the same batches
in the same order whatever the seed, which draws the weights; L1 loss of every step. One thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.harness import provenance
from efrdn_fast import accelerate
from efrdn_fast.commands._options import natural, positive
from efrdn_fast.data import find_images
from efrdn_fast.options import TrainOptions
from efrdn_fast.resize import imresize
from efrdn_fast.trainer import Trainer

__all__ = ["batches", "curve", "main"]

IMAGES, PATCHES, EDGE = 20, 2, 64  # first images of the folder; HR patches of a step; their edge


def batches(folder: Path, steps: int) -> list[tuple[Tensor, Tensor]]:
    """LR and HR patches of every step, uint8 `[2, 3, 16, 16]` and `[2, 3, 64, 64]`."""
    paths = find_images([folder])[:IMAGES]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    draw, found = np.random.default_rng(0), []
    for _ in range(steps):
        patches = []
        for _ in range(PATCHES):
            image = images[draw.integers(len(images))]
            top, left = (draw.integers(side - EDGE + 1) for side in image.shape[:2])
            patches.append(image[top : top + EDGE, left : left + EDGE])
        hr = torch.tensor(np.stack(patches)).permute(0, 3, 1, 2)
        found.append((imresize(hr, 0.25), hr))
    return found


def curve(data: list[tuple[Tensor, Tensor]], seed: int, fast: bool) -> list[float]:
    """Loss of every step."""
    options = TrainOptions(
        patch_size=EDGE // 4, batch_size=PATCHES, total_iter=len(data), lr=5e-4, warmup=20,
        ema_decay=0.99, grad_clip=1.0, cc_bias_init=0.1, manual_seed=seed,
    )  # fmt: skip
    trainer = Trainer(options)
    if fast:
        trainer.run_through(accelerate(trainer.net))
    return [trainer.train_step(*batch) for batch in data]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="training images")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = batches(args.data, args.steps), []
    for seed in args.seeds:
        for fast in (False, True):
            losses = curve(data, seed, fast)
            rows.append({"seed": seed, "fast": fast, "loss": [round(x, 6) for x in losses]})
            print(
                f"seed {seed}, {'fused' if fast else 'plain'}: {np.mean(losses[-20:]):.4f}",
                flush=True,
            )
            if args.json:
                record = {"run": provenance.record(torch.device("cpu")), "rows": rows}
                args.json.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
