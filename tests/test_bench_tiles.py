"""`bench.tiles`: what it measures, goes on with, and says of the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import tiles
from efrdn_fast import EFRDN, checkpoint, images

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"


def weights(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    net = EFRDN(4, channels=16, distilled=5)
    return checkpoint.save(net, folder / f"{seed}.safetensors", {"steps": seed})


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the script on two images of 30x24 px: its exit status, with the JSON's content."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (96, 120, 3), np.uint8)
        images.write(tmp_path / "data/Set14/HR" / f"{name}.png", images.Picture(pixels))
    monkeypatch.setattr(
        tiles,
        "WAYS",
        {
            "tiles": {"tile": 12, "overlap": 2},
            "exact": {"tile": 8, "exact": True},
            "segments": {"tile": 0, "segment_tokens": 50},
        },
    )

    def run(*words) -> tuple[int, dict]:
        path = tmp_path / "tiles.json"
        fixed = ["--benchmark", tmp_path / "data", "--sets", "Set14", "--json", path]
        monkeypatch.setattr(sys, "argv", ["tiles", *map(str, (*fixed, *words))])
        return tiles.main(), json.loads(path.read_text())

    return run


def test_figures_and_weights(bench, tmp_path, capsys):
    status, found = bench("--weights", weights(tmp_path, 1))
    assert status == 0 and [row["image"] for row in found["images"]] == ["a", "b"]
    assert found["weights"]["file"] == "1.safetensors" and len(found["weights"]["sha256"]) == 64
    assert found["weights"]["training"] == {"steps": 1} and found["run"]["versions"]["torch"]
    ways = found["images"][0]["ways"]
    assert ways["exact"]["psnr_to_whole"] > 110 > 80 > ways["tiles"]["psnr_to_whole"]
    assert ways["segments"]["largest"] > 1e-3 > ways["exact"]["largest"]
    assert all(way["seconds"] > 0 for way in ways.values())
    assert f"sha256 `{found['weights']['sha256'][:16]}`" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped(bench, tmp_path, monkeypatch):
    path, measure = weights(tmp_path, 1), tiles._measure
    calls = []

    def stopping(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(*args)

    monkeypatch.setattr(tiles, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench("--weights", path)
    monkeypatch.setattr(tiles, "_measure", lambda *args: calls.append(args) or measure(*args))
    status, found = bench("--weights", path)
    assert status == 0 and len(calls) == 2
    assert [row["image"] for row in found["images"]] == ["a", "b"]


def test_figures_of_other_weights_are_not_mixed(bench, tmp_path, capsys):
    path = weights(tmp_path, 1)
    _, before = bench("--weights", path, "--limit", 1)
    with pytest.raises(SystemExit) as wrong:
        bench("--weights", weights(tmp_path, 2))
    assert wrong.value.code == 2
    assert json.loads((tmp_path / "tiles.json").read_text()) == before
    assert "tiles.json holds figures of other weights" in capsys.readouterr().err


def test_the_page_holds_the_table_of_the_results():
    (path,) = RESULTS.glob("cpu-*/tiles.json")
    page = (ROOT / "docs/tiles.md").read_text()
    shown = page.partition(tiles.BEGIN)[2].partition(tiles.END)[0]
    assert shown == tiles.table(json.loads(path.read_text()))
