"""What each choice of the training recipe is worth: short runs, one change each, same samples.

    python -m bench.recipe FOLDER... --out runs/recipe --cache-dir cache

Every run starts from the same random weights and sees the same number of LR pixels; PSNR is that
of the averaged weights on the centre 48x48 LR pixels of the validation images. The spread of the
base over the seeds says what a difference means. Finished runs are not repeated. Writes
`bench/results/<device>/recipe.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from efrdn_fast import checkpoint
from efrdn_fast.commands._options import natural, positive
from efrdn_fast.options import RunOptions, TrainOptions
from efrdn_fast.train import train

from .harness import provenance

__all__ = ["BASE", "CHANGES", "main", "options_of"]

STEPS = 400
BASE = TrainOptions(
    patch_size=24, batch_size=4, total_iter=STEPS, lr=8e-4, warmup=STEPS // 8, ema_decay=0.98,
    grad_clip=1.0, cc_bias_init=0.1, autocast="bf16", attention="explicit",
)  # fmt: skip
CHANGES: dict[str, dict] = {
    "base": {},
    "peak rate 4e-4": {"lr": 4e-4},
    "peak rate 1.6e-3": {"lr": 1.6e-3},
    "batch 2, twice the steps": {"batch_size": 2, "total_iter": 2 * STEPS, "warmup": STEPS // 4},
    "batch 8, half the steps": {"batch_size": 8, "total_iter": STEPS // 2, "warmup": STEPS // 16},
    "9 of 16x16, at half time 24x24": {"stages": "16x9@0.5"},
    "fp32": {"autocast": "fp32"},
    "CC bias starts at 0": {"cc_bias_init": 0.0},
    "L2 in the last tenth": {"last_loss": "l2"},
    "BatchNorm frozen in the last tenth": {"freeze_bn_from": 0.9},
    "no flips and rotations": {"augment": False},
    "average slower (0.995)": {"ema_decay": 0.995},
    "no average": {"ema_decay": 0.0},
    "fold by sum": {"fold": "sum"},
    "Charbonnier": {"loss": "charbonnier"},
    "no warm-up": {"warmup": 0},
    "no gradient clipping": {"grad_clip": 0.0},
    "one patch of 48x48": {"patch_size": 48, "batch_size": 1},
    "9 patches of 16x16": {"patch_size": 16, "batch_size": 9},
}


def options_of(name: str, seed: int, steps: int = STEPS) -> TrainOptions:
    """Options of a run; counts of steps are scaled from 400 to `steps`."""
    options = dataclasses.replace(BASE, **CHANGES[name], manual_seed=seed)
    counts = {k: getattr(options, k) * steps // STEPS for k in ("total_iter", "warmup")}
    return dataclasses.replace(options, **counts)


def _measure(data: list[str], options: TrainOptions, run: RunOptions) -> dict:
    """PSNR and seconds of a run; those of an earlier, finished one are read from its folder."""
    done = Path(run.out) / "done.json"
    if done.is_file():
        row = json.loads(done.read_text())
        if row["options"] == options.to_dict():
            return row
    start = time.process_time()
    record = checkpoint.load(train(data, options, run, resume=None)).training
    row = {
        "options": options.to_dict(),
        "psnr_db": record["validation_psnr_db"],
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    done.write_text(json.dumps(row))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="training folders")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache-dir", help="folder of decoded images. Default: below --out")
    parser.add_argument("--steps", type=positive, default=STEPS, help="steps of the base")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0, 1], help="of the base")
    args = parser.parse_args()
    device, rows = torch.device("cpu"), []
    folder = provenance.RESULTS / provenance.device_folder(device)
    torch.set_num_threads(1)
    jobs = [("base", seed) for seed in args.seeds]
    jobs += [(name, args.seeds[0]) for name in CHANGES if name != "base"]
    for name, seed in jobs:
        run = RunOptions(
            out=str(args.out / f"{list(CHANGES).index(name):02d}-{seed}"),
            cache_dir=args.cache_dir or str(args.out / "cache"),
            **{"val_freq": 10 * args.steps, "save_freq": 10 * args.steps, "val_crop": 48},
            **{"fast": True, "tensorboard": False},
        )
        row = _measure(args.data, options_of(name, seed, args.steps), run)
        rows.append({"change": name, "seed": seed, **row})
        less = row["psnr_db"] - rows[0]["psnr_db"]
        print(f"{name} (seed {seed}): {row['psnr_db']:.3f} dB, {less:+.3f}", flush=True)
        result = {"run": provenance.record(device), "rows": rows}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
