"""Protocol `ntire` (see `ntire`) of the main rungs, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.rungs import RUNGS

__all__ = ["CASES", "bench_ntire", "names", "why_not"]

CASES = ["x4"]
QUICK = ("sdpa-fp32", "ours-cpu-fp32", "ours-cuda-fp32", "ours-triton-fp32")
START_SECONDS = 60  # of a process, its imports and the ONNX export


def names(device: torch.device, full: bool) -> list[str]:
    return list(RUNGS if full else QUICK)


def why_not(name: str, device: torch.device) -> str | None:
    return RUNGS[name].why_not(device)


def bench_ntire(harness, show, case, variant):
    command = [sys.executable, "-m", "bench.ntire", variant, "--device", harness.device.type]
    dtype, limit = RUNGS[variant].dtype, START_SECONDS + 5 * harness.cap
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        note = f"not done in {limit:g} s; --cap raises the limit"
        harness.add_missing("ntire", case, variant, dtype, "does not fit", note)
        return
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    seconds = got["seconds"]
    note = f"{got['pictures']}: mean of {len(seconds)}, no warm-up"
    harness.add_mean("ntire", case, variant, dtype, seconds, note, got["peak"])
    show(seconds)
