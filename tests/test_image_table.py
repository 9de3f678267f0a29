"""Every format, mode, depth and piece of metadata through the upscaler; writes docs/images.md.

`EFRDN_FAST_WRITE_DOCS=1 pytest tests/test_image_table.py` puts the table into the page; without it
a page that says anything else is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

from efrdn_fast import batch, images
from efrdn_fast.batch import Job
from efrdn_fast.upscaler import Upscaler
from tests.fuzz import seeds

PAGE = Path(__file__).parents[1] / "docs" / "images.md"
BEGIN, END = "<!-- begin: table of tests/test_image_table.py -->\n", "<!-- end -->\n"
HEAD = "| file | holds | bits | result | bits | pixels | EXIF | ICC | XMP | dpi |\n"
CHANNELS = {1: "gray", 2: "gray + alpha", 3: "RGB", 4: "RGB + alpha"}


class Twice(nn.Module):
    """Every pixel as 2x2 equal ones, so that what comes out is known."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest")


def state(kind: str, before: images.Metadata, after: images.Metadata) -> str:
    """ "kept", "lost" or "-": what became of one piece of metadata."""
    old, new = getattr(before, kind), getattr(after, kind)
    if not old:
        return "-"
    if kind == "exif":  # rewritten by some formats: camera and maker note are what counts
        return "kept" if b"Maker" in new and b"\x01secret\xff" * 5 in new else "lost"
    if kind == "dpi":
        return "kept" if new and np.allclose(old, new, atol=0.5) else "lost"
    return "kept" if old == new else "lost"


def row(seed, folder: Path) -> str:
    """A line of the table, from what really happened."""
    source = folder / f"in{seed.extension}"
    target = folder / f"out{seed.extension if seed.extension != '.gif' else '.png'}"
    source.write_bytes(seed.data)
    upscaler = Upscaler(2, Twice())
    (result,) = batch.process([Job(source, target)], upscaler, overwrite=True)
    cells = [seed.extension[1:], seed.mode, str(seed.bits)]
    if result.status == "failed":
        message = result.message.removeprefix(f"{source}: ").removeprefix(f"{target}: ")
        return "| " + " | ".join([*cells, f"error: {message}", *[""] * 6]) + " |\n"
    before, after = images.read(source), images.read(target)
    assert after.pixels.dtype == before.pixels.dtype
    assert after.pixels.shape[2] == before.pixels.shape[2]
    expected = before.pixels.repeat(2, axis=0).repeat(2, axis=1)
    visible = expected[..., -1:] > 0 if expected.shape[2] in (2, 4) else np.True_
    error = np.abs(after.pixels.astype(float) - expected) * visible
    exact = error.max() <= (1e-6 if after.pixels.dtype == np.float32 else 0)
    assert exact or (seed.extension in (".jpg", ".webp") and error.mean() < 4)
    kept = [state(kind, before.metadata, after.metadata) for kind in ("exif", "icc", "xmp", "dpi")]
    if "CMYK" in seed.mode:
        kept[1] = "used"  # the result is sRGB
    bits = 8 * after.pixels.itemsize
    result = [CHANNELS[after.pixels.shape[2]], str(bits) if bits < 32 else "32 float"]
    result.append("exact" if exact else "lossy codec")
    return "| " + " | ".join([*cells, *result, *kept]) + " |\n"


def test_the_page_tells_what_happens(tmp_path):
    table = HEAD + "|---" * 10 + "|\n" + "".join(row(seed, tmp_path) for seed in seeds.seeds())
    assert "lost" not in table and table.count("exact") > 20
    before, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    if os.environ.get("EFRDN_FAST_WRITE_DOCS") == "1":
        PAGE.write_text(before + BEGIN + table + END + after)
        return
    if old != table:
        pytest.fail(
            "docs/images.md is stale: EFRDN_FAST_WRITE_DOCS=1 pytest tests/test_image_table.py\n"
            + "\n".join(sorted(set(table.splitlines()) ^ set(old.splitlines())))
        )
