"""Ablations: the rows of the paper's tables, equal budgets, what is repeated and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from efrdn_fast import ablate
from efrdn_fast.cli import main
from efrdn_fast.config import ABLATIONS
from efrdn_fast.options import RunOptions, TrainOptions


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_rows_are_those_of_the_papers_tables():
    rows = ablate.variants()
    assert {row.ablation for row in rows} == set(ABLATIONS)
    assert {row.module for row in rows} == {"acdm", "imdb", "rfdb"}
    assert len({row.key for row in rows}) == 13
    assert [row.name for row in ablate.variants(["4"])] == ["no_gcrb", "no_effb", "no_cc", "full"]


def test_command_trains_each_network_once_and_shows_both_tables(photos, tmp_path, capsys):
    out, figures = tmp_path / "runs", tmp_path / "figures.json"
    arguments = ["ablate", str(photos), "--tables", "2", "--out", str(out), "--json", str(figures)]
    arguments += ["--total-iter", "1", "--batch-size", "1", "--patch-size", "6", "--no-tensorboard"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "30.76" in text and "637K" in text and "paper: acdm > rfdb > imdb" in text
    assert sorted(p.name for p in out.iterdir() if p.name != "cache") == sorted(
        f"{name}-{seed}" for name in ("imdb", "rfdb", "full") for seed in (0, 1)
    )
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/net.safetensors")}
    assert main(arguments) == 0
    assert capsys.readouterr().out == text
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("*/net.safetensors")}
    stored = json.loads(figures.read_text())
    assert stored["budget"]["total_iter"] == 1
    assert all(len(row["psnr"]) == 2 and min(row["psnr"].values()) > 0 for row in stored["rows"])


def test_table_gives_paired_differences_with_their_spread():
    rows = ablate.variants(["5"])
    for row, figures in zip(
        rows, [(20.0, 21.0), (20.5, 22.0), (19.0, 19.5), (20.4, 21.6)], strict=True
    ):
        row.psnr = dict(enumerate(figures))
    text = ablate.ablation_tables(rows)
    assert "-0.500 ± 0.100" in text  # 20.0 - 20.4 and 21.0 - 21.6
    assert "+0.250 ± 0.150" in text
    assert "ours:  no_transformer_dense > full > no_cnn_dense > no_dense" in text
    assert "paper: full > no_dense > no_transformer_dense > no_cnn_dense" in text


def test_a_seed_is_needed(photos):
    with pytest.raises(ValueError, match="at least one seed"):
        ablate.run_ablations([photos], TrainOptions(), RunOptions(), seeds=())
