"""A short fuzz run; the long one is `python tests/fuzz/run.py --count 5000`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efrdn_fast import cli

FUZZ = Path(__file__).parent / "fuzz"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(folder, *words):
    """(status, summary) of `tests/fuzz/run.py`."""
    log = folder / "log.json"
    done = subprocess.run(
        [sys.executable, FUZZ / "run.py", *words, "--log", log, "--keep", folder / "kept"],
        capture_output=True,
        text=True,
        cwd=Path(cli.__file__).parents[1],
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(log.read_text())


def test_damaged_images_end_in_a_result_or_in_one_line(tmp_path):
    status, summary = run(tmp_path, "--count", "60", "--seed", "7")
    assert status == 0 and summary["failures"] == [] and not (tmp_path / "kept").exists()
    assert summary["count"] == 60 and len(summary["mutations"]) == 10
    assert summary["ended"]["refused"] > 10 and summary["ended"]["upscaled"] > 5


def test_a_failure_is_reported_and_its_image_kept(tmp_path):
    status, summary = run(tmp_path, "--count", "1", "--memory", "-1")
    assert status == 1 and summary["failures"][0]["trouble"].startswith("memory grew")
    assert len(list((tmp_path / "kept").iterdir())) == 1
