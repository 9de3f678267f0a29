"""Pictures of the bench: what they show, and that they know when they are stale."""

from __future__ import annotations

import json

from matplotlib import pyplot

from bench import plots
from bench.harness.store import Store
from tests.test_bench_tools import row, times


def test_picture_of_the_peers(tmp_path):
    """Time and multiply-adds against printed and measured PSNR; stale when the latter changes."""
    results = tmp_path / "results"
    notes = {"EFRDNFast": "6.27 G multiply-adds", "SPAN": "1.74 G multiply-adds", "bicubic": ""}
    rows = [
        {**row(name, **times(1, 2, 3)), "case": "x4-64x64-b1", "note": note}
        for name, note in notes.items()
    ]
    Store(results / "cpu-x", "peers").add(rows, {"revision": "abc", "date": "d"})
    own = results / "cpu-x" / plots.MEASURED_PSNR
    sets = {"Set5": {"model": {"psnr": 31.0}, "bicubic": {"psnr": 28.0}}}
    own.write_text(json.dumps({"scales": {"x4": {"sets": sets}}}))
    (picture,) = plots.pictures(results, tmp_path)
    picture.draw()
    assert not picture.stale()
    own.write_text(own.read_text().replace("31.0", "31.5"))
    assert picture.stale()
    figure, axes = pyplot.subplots(2, 2)
    plots._peers(axes, rows, results / "cpu-x")
    points = [[line.get_xydata()[0].tolist() for line in panel.get_lines()] for panel in axes.flat]
    assert points[0] == [[2e-3, 32.33], [2e-3, 31.5], [2e-3, 28.42], [2e-3, 28.0]]
    assert points[1] == [[6.27, 32.33], [6.27, 31.5]]
    assert len(points[2]) == 2 and len(points[3]) == 1
    assert "no PSNR to show: SPAN" in figure.get_suptitle()
    pyplot.close(figure)


def test_picture_of_attention(tmp_path):
    """A line for each variant and series; a single size is no curve."""
    cases = {
        "N1-T4096-L1024-H8-D18": 2.0,
        "N1-T9216-L2304-H8-D18": 8.0,
        "N1-T3600-L3600-H8-D18": 3.0,
    }
    rows = [{**row("cpu", **times(m, m, m)), "case": case} for case, m in cases.items()]
    rows.append({**row("cpu", **times(1, 1, 1)), "case": "N1-T4096-L576-H8-D18"})
    large = {"case": "N1-T518400-L129600-H8-D18", "status": plots.TOO_LARGE}
    rows.append({**row("eager", **times(9, 9, 9)), **large})
    figure, axes = pyplot.subplots()
    plots._attention(axes, rows, tmp_path / "cpu-x")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    (cross,) = (line for line in axes.get_lines() if line.get_marker() == "x")
    assert cross.get_xdata().tolist() == [518400]
    assert lines["cpu, 4 segments"] == [[4096, 2e-3], [9216, 8e-3]]
    assert lines["cpu, 576 tokens"] == [[4096, 1e-3]]
    batch = {**rows[0], "case": "N16-T2304-L576-H8-D18"}
    assert not plots._over_tokens([rows[2], batch])
    pyplot.close(figure)


def test_picture_of_the_training_curve(tmp_path):
    """The steps of a run go on where those of the run before ended."""
    folder = tmp_path / "results" / "cpu-x"
    folder.mkdir(parents=True)
    for phase, steps in ((1, (100, 250)), (2, (100,))):
        lines = [{"step": step, "psnr_db": 26.0 + step / 1e3} for step in steps]
        lines.append({"step": steps[-1], "loss": 0.1})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"train_x4_phase{phase}.jsonl").write_text(text)
    (picture,) = plots.pictures(folder.parent, tmp_path)
    picture.draw()
    assert picture.path.name == "bench_curve_cpu-x.png" and not picture.stale()
    figure, axes = pyplot.subplots()
    plots._curve(axes, [r for s in picture.sources for r in plots._rows(s)], folder)
    xs = [line.get_xdata().tolist() for line in axes.get_lines()]
    assert xs == [[100, 250], [350]]
    pyplot.close(figure)


def test_pictures_know_when_they_are_stale(tmp_path):
    results = tmp_path / "results"
    run = {"revision": "abc", "date": "d"}
    rows = [
        {**row("sdpa", **times(900, 1000, 1100)), "case": "x4-2x32x32"},
        {**row("ours", **times(800, 900, 1000)), "case": "x4-2x32x32"},
    ]
    store = Store(results / "cpu-x", "train")
    store.add(rows, run)
    (picture,) = plots.pictures(results, tmp_path)
    assert picture.path.name == "bench_training_cpu-x.png"
    assert picture.stale()
    picture.draw()
    assert not picture.stale()
    store.add([{**rows[0], "p50_ms": 1001.0}], run)
    assert picture.stale()
