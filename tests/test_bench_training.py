"""Choices of the recipe and the tables of weights, recipe and ablations."""

from __future__ import annotations

import json

import pytest

from bench import recipe, records, report, training_tables, user_tables
from efrdn_fast.ablate import variants


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / "cpu-x").mkdir()

    def write(name, content):
        (tmp_path / "cpu-x" / f"{name}.json").write_text(json.dumps(content))

    return write


def test_every_change_of_the_recipe_is_valid_and_keeps_the_number_of_pixels():
    def pixels(options):
        sizes = (options.sizes(step) for step in range(options.total_iter))
        return sum(batch * patch * patch for patch, batch in sizes)

    base = recipe.options_of("base", 0, 80)
    assert base.total_iter == 80 and base.warmup == 10
    for name, change in recipe.CHANGES.items():
        options = recipe.options_of(name, 0, 80)
        assert pixels(options) == pixels(base), name
        assert (options != base) == bool(change), name


def test_table_of_weights(results):
    figures = {"psnr": 31.2346, "ssim": 0.87654}
    sets = {"Set5": {"whole": True, "bicubic": figures, "model": figures}}
    sets["Set14"] = {"whole": False, "bicubic": figures, "model": figures}
    results("eval_x4", {"scales": {"x4": {"sets": sets}}})
    text = training_tables.weights("cpu-x", "short")
    assert "| x4 **these weights** | 31.235 / 0.8765 | not measured | not measured |" in text
    assert "| x4 EFRDN, published (DIV2K) | 32.33 / 0.8964 |" in text
    assert "x3" not in text and "ensemble" not in text and "LBNet" not in text
    results("eval_x4_ensemble", {"scales": {"x4": {"sets": sets}}})
    text = training_tables.weights("cpu-x", "*")
    assert "self-ensemble" in text and "LBNet, published" in text


def test_psnr_with_other_segments(results):
    """Change on the whole sets, as a table and as a sentence; of the same weights only."""

    def evaluation(psnr, weights):
        sets = {name: {"whole": True, "model": {"psnr": psnr}} for name in ("Set5", "Set14")}
        sets["BSD100"] = {"whole": False, "model": {"psnr": psnr}}
        return {"scales": {"x4": {"network": {"sha256": weights}, "sets": sets}}}

    results("eval_x4", evaluation(31.0, "a"))
    missing = "no results of `eval_x4_segments` on cpu-x"
    assert missing in training_tables.segment_psnr("cpu-x", "short")
    results("eval_x4_segments", evaluation(30.9876, "a"))
    text = report.table("segment_psnr", "cpu-x", "eval", "*")
    assert "| Set14 | 31.000 dB | 30.988 dB | -0.012 dB |" in text and "BSD100" not in text
    text = training_tables.segment_psnr("cpu-x", "short")
    assert "changes by -0.012 / -0.012 dB on Set5 / Set14 " in text
    results("eval_x4_segments", evaluation(30.9876, "b"))
    assert "are of different weights" in training_tables.segment_psnr("cpu-x", "*")


def test_tables_of_recipe_and_ablations(results):
    run = {"device": "X", "versions": {"torch": "2"}, "revision": "abc"}
    rows = [("base", 25.0), ("peak rate 4e-4", 24.5)]
    rows = [{"change": c, "seed": 0, "psnr_db": p, "cpu_seconds": 9.6} for c, p in rows]
    results("recipe", {"run": run, "rows": rows})
    text = report.table("recipe", "cpu-x", "recipe", "*")
    assert "| base, seed 0 | 25.000 | +0.000 | 10 |" in text
    assert "| peak rate 4e-4 | 24.500 | -0.500 | 10 |" in text
    rows = [
        {"table": v.table, "name": v.name, "psnr": {"0": 25.0 + i, "1": 26.0 + i}}
        for i, v in enumerate(variants())
    ]
    results("ablation", {"rows": rows})
    text = training_tables.ablation("cpu-x", "*")
    assert "Table 2" in text and "±" in text and text.count("ours:") == 4
    results("ablation", {"rows": [row for row in rows if row["table"] == "3"]})
    text = training_tables.ablation("cpu-x", "*")
    assert "Table 3" in text and text.count("ours:") == 1


@pytest.mark.parametrize("name", [*training_tables.TABLES, *user_tables.TABLES])
def test_what_was_not_measured_is_said_so(results, name):
    text = report.table(name, "cpu-x", name, "*")
    assert text.startswith("Not measured: no results of `") and text.endswith(" on cpu-x.\n")
