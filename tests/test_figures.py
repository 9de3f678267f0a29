"""`efrdn figure`: what is drawn, where, and that it opens."""

from __future__ import annotations

import errno
import json
import os
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from efrdn_fast import EFRDN, cli, figures, images, metrics
from efrdn_fast.images import Picture
from efrdn_fast.upscaler import Upscaler

pytest.importorskip("matplotlib", reason="the extra `figures`")


@pytest.fixture
def hr(tmp_path):
    """A picture of 60x44 px with a red square at (20, 10), 8x8."""
    pixels = np.random.default_rng(0).integers(90, 120, (44, 60, 3), np.uint8)
    pixels[10:18, 20:28] = (250, 0, 0)
    return images.write(tmp_path / "hr.png", Picture(pixels))


def run(capsys, *words):
    status = cli.main(["figure", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out.split(), err


def opens(path):
    """Size of a figure that is no blank page."""
    if path.endswith(".svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        return root.get("width"), root.get("height")
    with Image.open(path) as image:
        assert image.convert("L").getextrema()[0] < 60
        return image.size


def test_strip(tmp_path, hr, weights, capsys):
    other = images.write(tmp_path / "o.png", Picture(255 - images.read(hr).pixels))
    words = ["strip", hr, "--crop", "18,8,12,12", "-s", 2, "-n", weights]
    status, paths, _ = run(
        capsys, *words, "--result", f"inverse={other}", "-o", tmp_path / "f.png", tmp_path / "f.svg"
    )
    assert status == 0 and len(paths) == 2 and all(opens(path) for path in paths)


def test_strip_shows_the_crop_with_the_measured_figures(hr, weights):
    shown = figures.pictures(hr, Upscaler(2, weights))
    assert list(shown) == ["bicubic", "EFRDN (ours)", "HR"]
    figure = figures.strip(shown, (18, 8, 12, 12), 2, "hr")
    whole, *crops = figure.axes
    assert whole.images[0].get_array().shape == (44, 60, 3)
    (mark,) = whole.patches
    assert mark.get_xy() == (17.5, 7.5) and (mark.get_width(), mark.get_height()) == (12, 12)
    for axes, (name, pixels) in zip(crops, shown.items(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), pixels[8:20, 18:30])
        words = axes.texts[0].get_text()
        assert words.startswith(f"{name}\n")
        if name != "HR":
            psnr = metrics.psnr(pixels, shown["HR"], 2)
            assert f"{psnr:.2f} dB" in words
    figures.save(figure, [])


def test_full_disk_leaves_no_part_of_a_figure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    points = [{"name": "a", "ms": 1, "psnr": 30}]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        figures.save(figures.scatter(points, "ms", "psnr"), [tmp_path / "a.png"])
    assert list(tmp_path.iterdir()) == []


def test_error_maps_are_errors_of_luma_on_one_scale(hr, weights):
    shown = figures.pictures(hr, Upscaler(2, weights))
    figure = figures.errors(shown, 2)
    maps = [axes.images[0] for axes in figure.axes if axes.images]
    expected = metrics.luma(torch.tensor(shown["bicubic"] / 1.0).permute(2, 0, 1))
    expected = (expected - metrics.luma(torch.tensor(shown["HR"] / 1.0).permute(2, 0, 1))).abs()
    np.testing.assert_allclose(maps[0].get_array(), expected[0].numpy(), atol=1e-9)
    assert maps[0].get_clim() == maps[1].get_clim()
    figures.save(figure, [])


@pytest.mark.gpu
def test_stages_of_a_network_on_a_gpu(weights):
    found = figures.stages(EFRDN.from_pretrained(weights).cuda(), torch.rand(1, 3, 9, 8))
    assert all(features.device.type == "cpu" for features in found.values())


def test_stages_are_those_of_the_network(weights):
    net, x = EFRDN.from_pretrained(weights), torch.rand(1, 3, 9, 8)
    found = figures.stages(net, x)
    assert list(found) == list(figures.STAGES)
    with torch.inference_mode():
        tail = net.reconstruct_deep(found["after transformer 2"])
        torch.testing.assert_close(tail + net.reconstruct_shallow(net.head(x)), net(x))
        first = net.tconv[0](net.trans[0](found["after the CNN"])) + found["after the CNN"]
    torch.testing.assert_close(first, found["after transformer 1"])
    assert not net.trans[0]._forward_pre_hooks


def test_features_and_errors_by_the_command(tmp_path, hr, weights, capsys):
    for words in (["features", hr], ["errors", hr]):
        names = [tmp_path / f"{words[0]}.{ext}" for ext in ("png", "svg")]
        status, paths, _ = run(capsys, *words, "-s", 2, "-n", weights, "-o", *names)
        assert status == 0 and len(paths) == 2 and all(opens(path) for path in paths)


def test_scatter(tmp_path, capsys):
    points = [
        {"name": "a", "ms": 10, "psnr": 30.1, "params_k": 900},
        {"name": "ours", "ms": 500, "psnr": 30.6, "params_k": 768, "ours": True},
    ]
    (tmp_path / "p.json").write_text(json.dumps(points))
    words = ["scatter", tmp_path / "p.json", "-x", "ms", "--area", "params_k"]
    status, paths, _ = run(capsys, *words, "-o", tmp_path / "s.png", tmp_path / "s.svg")
    assert status == 0 and all(opens(path) for path in paths)
    figure = figures.scatter(points, "ms", "psnr")
    (axes,) = figure.axes
    assert [tuple(c.get_offsets()[0]) for c in axes.collections] == [(10, 30.1), (500, 30.6)]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "time (ms)"
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert {"10", "20", "50", "100", "200", "500"} <= set(labels)
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))
    figures.save(figure, [])


@pytest.mark.parametrize(
    "words, message",
    [
        (["strip", "hr.png", "--crop", "50,30,20,20", "-o", "f.png"], "is not within 60x44 px"),
        (["errors", "hr.png", "--result", "a=small.png", "-o", "f.png"], "of 60x44 px as HR is"),
        (["scatter", "hr.png", "-o", "f.png"], "no JSON"),
        (["scatter", "p.json", "-o", "f.png"], "a has no multi_adds_g"),
        (["scatter", "none.json", "-o", "f.png"], "none.json: No such file"),
        (["scatter", "q.json", "-o", "f.png"], "q.json: psnr of a must be a finite number"),
        (["scatter", "q.json", "-y", "n", "-o", "f.png"], "n of a must be a finite number"),
        (["scatter", "q.json", "-y", "x", "-o", "f.png"], "x of a must be a finite number"),
        (["scatter", "q.json", "-y", "z", "--area", "z", "-o", "f.png"], "must be above 0"),
    ],
)
def test_errors_are_one_line(tmp_path, hr, weights, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    images.write("small.png", Picture(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "p.json").write_text('[{"name": "a", "psnr": 1}]')
    (tmp_path / "q.json").write_text(
        '[{"name": "a", "multi_adds_g": 1, "psnr": null, "n": NaN, "x": "1", "z": 0}]'
    )
    more = [] if words[0] == "scatter" else ["-s", 2, "-n", weights]
    status, _, errors = run(capsys, *words, *more)
    assert status == 1 and message in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--result", "HR=hr.png", "-o", "f.png"], "name 'HR' is taken"),
        (["--result", "a=hr.png", "--result", "a=hr.png", "-o", "f.png"], "have the same name"),
        (["-o", "f.gif"], "figures are written as .png, .svg or .pdf"),
    ],
)
def test_wrong_usage(hr, weights, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "errors", hr, "-s", 2, "-n", weights, *words)
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.json").write_text('[{"name": "a", "psnr": 1, "ms": 2}]')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, errors = run(capsys, "scatter", tmp_path / "p.json", "-x", "ms", "-o", "f.png")
    assert status == 1 and "pip install efrdn_fast[figures]" in errors
