"""Another process that builds the library of the fixture `tiny`, and waiting for what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def start_build(csrc: Path) -> subprocess.Popen:
    """Another process that builds the tiny library."""
    code = (
        "import pathlib\nfrom efrdn_fast.kernels import _build, _plan\n"
        f"_plan.CSRC = pathlib.Path({str(csrc)!r})\nprint(_build.build('cpu')[0])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
