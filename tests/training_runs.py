"""Photos and options of the tiny runs in the tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from efrdn_fast.options import RunOptions

__all__ = ["TINY", "assert_same_weights", "run_options", "write_photos"]

# Without FFLB a step takes a quarter of the time; the trainer does not see the difference.
TINY = {
    "ablation": "no_fflb",
    "patch_size": 6,
    "batch_size": 2,
    "total_iter": 6,
    "lr": 1e-3,
    "warmup": 1,
    "grad_clip": 1,
}


def write_photos(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def run_options(out: Path, **changes) -> RunOptions:
    return RunOptions(
        **{"out": str(out), "tensorboard": False, "save_freq": 2, "val_freq": 3, **changes}
    )


def assert_same_weights(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    different = [k for k in state if not torch.equal(state[k], expected[k])]
    assert not different
