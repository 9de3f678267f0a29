"""Protocol `ntire` (see `ntire`) of the main rungs, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.rungs import RUNGS

__all__ = ["CASES", "bench_ntire", "names"]

CASES = ["x4"]
QUICK = ("sdpa-fp32", "ours-cpu-fp32", "ours-cuda-fp32", "ours-triton-fp32")


def names(device: torch.device, full: bool) -> list[str]:
    """Rungs that can run on the device."""
    wanted = RUNGS if full else QUICK
    return [name for name in wanted if RUNGS[name].why_not(device) is None]


def bench_ntire(harness, show, case, variant):
    if harness.only and variant not in harness.only:
        pytest.skip("another variant was asked for")
    command = [sys.executable, "-m", "bench.ntire", variant, "--device", harness.device.type]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    seconds = got["seconds"]
    note = f"{got['pictures']}: mean of {len(seconds)}, no warm-up"
    dtype = RUNGS[variant].dtype
    harness.add_mean("ntire", case, variant, dtype, seconds, note)
    show(seconds)
