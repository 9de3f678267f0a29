"""The `efrdn` program in a process of its own, and files for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from efrdn_fast import cli

__all__ = ["efrdn", "picture", "tree"]


def efrdn(*args, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        **options,
    )


def picture(path, size=(7, 5), mode="RGB", **options):
    """An image file of `size` (width, height)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)
    image.save(path, **options)
    return path


def tree(folder):
    """All files below `folder`, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
