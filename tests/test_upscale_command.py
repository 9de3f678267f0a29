"""`efrdn upscale`: which file becomes which, and what a result keeps."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efrdn_fast import __version__, batch, checkpoint, cli, images
from efrdn_fast.batch import plan
from efrdn_fast.images import Picture
from efrdn_fast.metadata import Metadata
from tests.image_files import SRGB
from tests.program import picture, tree


def test_one_file_gets_a_neighbour(here, upscale):
    picture("photo.PNG")
    status, out, err = upscale("photo.PNG")
    assert (status, err) == (0, [])  # and no progress bar, for stderr is no terminal
    assert out[0] == "photo.PNG -> photo_x2.PNG (14x10)"
    assert out[1].startswith("1 upscaled, 0 skipped, 0 failed")
    with Image.open("photo_x2.PNG") as image:
        assert image.size == (14, 10)


@pytest.mark.parametrize(
    "words, result",
    [
        (["a.jpg", "-o", "big.png"], "big.png"),
        (["-i", "a.jpg", "-o", "deep/er/big.webp"], "deep/er/big.webp"),
        (["-i", "a.jpg", "-o", "out"], "out/a.jpg"),
        (["a.jpg", "-o", "out", "--ext", "tiff"], "out/a.tiff"),
        (["a.jpg", "--suffix=-large"], "a-large.jpg"),
        (["a.jpg", "--ext", "bmp", "-s", "2"], "a_x2.bmp"),
        (["a.jpg", "--ext", "png", "--suffix", ""], "a.png"),
        (["b.gif"], "b_x2.png"),
    ],
)
def test_names_of_results(here, upscale, words, result):
    picture("a.jpg")
    picture("b.gif")
    assert upscale(*words)[0] == 0
    assert tree(here) == sorted(["a.jpg", "b.gif", result])
    assert images.read(result).pixels.shape == (10, 14, 3)


def test_folder_keeps_its_tree_and_is_done_once(here, upscale):
    for name in ("a.png", "sub/b.jpg", "sub/deep/c.webp", ".hidden/d.png", "sub/.e.png"):
        picture(f"in/{name}")
    Path("in/notes.txt").write_text("no image")
    status, out, err = upscale("-i", "in", "-o", "out")
    assert (status, err) == (0, [])
    assert tree("out") == ["a.png", "sub/b.jpg", "sub/deep/c.webp"]
    before = {name: (here / "out" / name).stat().st_mtime_ns for name in tree("out")}
    picture("in/sub/new.png")
    status, out, err = upscale("-i", "in", "-o", "out", "--json-summary", "log/summary.json")
    assert (status, err) == (0, [])
    assert out[0].startswith("in/sub/new.png -> out/sub/new.png")
    assert out[-1].startswith("1 upscaled, 3 skipped (results exist; --overwrite replaces them)")
    assert {name: (here / "out" / name).stat().st_mtime_ns for name in before} == before
    summary = json.loads(Path("log/summary.json").read_text())
    assert (summary["done"], summary["skipped"], summary["failed"]) == (1, 3, 0)
    assert summary["scale"] == 2 and summary["efrdn_fast"] == __version__
    done = next(row for row in summary["images"] if row["status"] == "done")
    assert done["size"] == [14, 10] and done["dtype"] == "fp32" and done["tile"] == 0
    assert done["input"] == "in/sub/new.png" and done["seconds"] >= 0
    assert upscale("in", "-o", "out", "--overwrite")[1][-1].startswith("4 upscaled, 0 skipped, 0")
    assert (here / "out/a.png").stat().st_mtime_ns > before["a.png"]


def test_folder_without_its_subfolders(here, upscale):
    picture("in/a.png")
    picture("in/sub/b.png")
    assert upscale("in", "--no-recursive")[0] == 0
    assert tree("in_x2") == ["a.png"]  # beside the folder


def test_output_inside_the_input_is_not_read(here, upscale):
    picture("a.png")
    for _ in range(2):
        assert upscale(".", "-o", "big", "--overwrite")[0] == 0
        assert tree(here) == ["a.png", "big/a.png"]


def test_results_beside_their_sources_are_not_read(here, upscale):
    picture("in/a.png")
    picture("in/b.jpg")
    assert upscale("in", "-o", "in")[0] == 0
    names = ["a.png", "a_x2.png", "b.jpg", "b_x2.jpg"]
    assert tree("in") == names
    status, out, err = upscale("in", "-o", "in")
    assert (status, err, tree("in")) == (0, [], names)
    assert out[-1].startswith("0 upscaled, 4 skipped")
    assert upscale(*sorted(Path("in").iterdir()), "--overwrite")[0] == 0  # a shell's in/*
    assert tree("in") == names


def test_two_inputs_for_one_result(here, upscale):
    picture("in/a.png", size=(6, 6))
    picture("in/a.jpg")
    status, _, err = upscale("in", "-o", "out", "--ext", "png")
    assert status == 1 and tree("out") == ["a.png"]
    assert len(err) == 1 and "already the result of in/a.png" in err[0] and "in/a.jpg" in err[0]
    assert images.read("out/a.png").pixels.shape == (12, 12, 3)  # of what keeps its format
    picture("out2/b.gif")
    picture("out2/b.jpg")
    status, _, err = upscale("out2", "-o", "out2", "--ext", "png")
    assert status == 1 and "already the result of out2/b.gif" in err[0]  # else the first
    status, _, err = upscale("in/a.png", "in/a.png", "-o", "twice")
    assert status == 1 and "already the result" in err[0]


def test_inputs_are_never_replaced(here, upscale):
    for name in ("a.png", "a.jpg"):
        picture(name)
    before = {name: Path(name).read_bytes() for name in ("a.png", "a.jpg")}
    for words in (
        ["a.png", "--suffix", ""],
        ["a.png", "-o", "a.png"],
        ["a.jpg", "a.png", "--suffix", "", "--ext", "png"],
        [".", "-o", ".", "--suffix", ""],
    ):
        status, _, err = upscale(*words, "--overwrite")
        assert status == 1 and "error: " in err[0]
        assert {name: Path(name).read_bytes() for name in before} == before


def test_one_output_file_for_many_inputs_is_wrong_usage(here, upscale, capsys):
    for words in (["a.png", "b.png", "-o", "c.png"], [".", "-o", "c.png"]):
        with pytest.raises(SystemExit) as end:
            upscale(*words)
        assert end.value.code == 2 and "is one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, output, can", [("a.png", "out.gif", ".png"), ("a.mp4", "out.avi", ".mp4")]
)
def test_a_format_that_cannot_be_written_is_no_folder(here, upscale, capsys, source, output, can):
    picture("a.png")
    with pytest.raises(SystemExit) as end:
        upscale(source, "-o", output)
    assert end.value.code == 2 and tree(here) == ["a.png"]
    assert f"cannot write {Path(output).suffix}; use one of {can}" in capsys.readouterr().err
    Path(output).mkdir()
    assert upscale("a.png", "-o", output)[0] == 0 and tree(here) == ["a.png", f"{output}/a.png"]


def test_dry_run_misses_files(here, upscale):
    picture("a.png")
    status, out, err = upscale("a.png", "b.png", "--dry-run")
    assert status == 1 and out == ["a.png -> a_x2.png"] and "b.png: no such file" in err[0]


def test_bad_files_are_named_and_the_others_done(here, upscale):
    picture("in/good.png")
    picture("in/zzz.jpg", size=(9, 4))
    picture("in/small.png", size=(9, 2))
    picture("in/cmyk.jpg", mode="CMYK")
    Path("in/empty.png").touch()
    Path("in/text.png").write_text("no image")
    data = picture("in/cut.png", size=(40, 40)).read_bytes()
    Path("in/cut.png").write_bytes(data[: len(data) // 2])
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save("in/moving.gif", save_all=True, append_images=frames[1:])
    picture("in/large.png", size=(60, 60))
    status, out, err = upscale("in", "gone.png", "-o", "out", "--max-pixels", 2000)
    assert status == 1
    assert tree("out") == ["good.png", "zzz.jpg"]
    expected = {
        "small.png": "at least 3x3 px, got 9x2",
        "cmyk.jpg": "CMYK without an ICC profile",
        "empty.png": "the file is empty",
        "text.png": "not a PNG, JPEG",
        "cut.png": "damaged or truncated PNG",
        "moving.gif": "has 2 frames",
        "large.png": "60x60 px is over the limit of 2000 px",
        "gone.png": "no such file",
    }
    assert len(err) == len(expected)
    for name, message in expected.items():
        line = next(line for line in err if name in line)
        assert line.startswith("efrdn upscale: error: ") and message in line
        assert line.count(name) == 1
    assert out[-1].startswith("2 upscaled, 0 skipped, 8 failed")


@pytest.mark.parametrize(
    "words, message",
    [
        (["none"], "none: no such file"),
        (["empty"], "videos are named one by one"),
        (["a.png", "-n", "other.safetensors"], "checkpoint 'other.safetensors' does not exist"),
        (["a.png", "-n", "text.safetensors"], "not a readable safetensors file"),
        (["a.png", "-o", "text.safetensors/out"], "text.safetensors"),
        (["clear.png", "--ext", "jpg"], "cannot hold transparency"),
    ],
)
def test_errors_before_any_result(here, upscale, words, message):
    picture("a.png", size=(12, 12))
    Image.new("RGBA", (5, 5), (9, 9, 9, 100)).save("clear.png")
    Path("empty").mkdir()
    Path("text.safetensors").write_text("text")
    names = tree(here)
    status, _, err = upscale(*words)
    assert status == 1 and len(err) == 1 and message in err[0]
    assert tree(here) == names


@pytest.mark.parametrize(
    "words, message",
    [
        (["-s", "3"], "upscales by 2, not by 3"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--backend", "triton"], "backend 'triton'"),
        (["-t", "8", "--tile-pad", "7"], "overlap must be within 0..4"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(here, upscale, capsys, words, message):
    picture("a.png", size=(12, 12))
    with pytest.raises(SystemExit) as end:
        upscale("a.png", *words)
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert tree(here) == ["a.png"]


def test_missing_weights_are_one_line(here, capsys, monkeypatch):
    picture("a.png")
    monkeypatch.setattr(checkpoint, "SHIPPED", {"x2": 2, "x3": 3, "x4": 4, "x7": 7})
    assert cli.main(["upscale", "a.png", "-n", "x7"]) == 1
    assert "no weights are shipped for x7" in capsys.readouterr().err


def test_opaque_alpha_may_become_jpeg(here, upscale):
    image = Image.open(picture("a.png"))
    image.putalpha(255)
    image.save("a.png")
    assert upscale("a.png", "--ext", "jpg")[0] == 0
    assert images.read("a_x2.jpg").pixels.shape == (10, 14, 3)


def test_metadata_and_orientation_go_along(here, upscale):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    picture("a.jpg", exif=exif, icc_profile=SRGB, dpi=(300, 300))
    assert upscale("a.jpg")[0] == 0
    assert upscale("a.jpg", "-o", "bare.jpg", "--strip-metadata")[0] == 0
    with Image.open("a_x2.jpg") as image:
        assert image.size == (10, 14)
        assert image.getexif()[0x010F] == "Maker" and image.getexif()[0x0112] == 1
        assert image.info["icc_profile"] == SRGB and image.info["dpi"] == (300, 300)
    with Image.open("bare.jpg") as image:
        assert image.size == (10, 14) and not image.getexif() and "dpi" not in image.info
        assert image.info["icc_profile"] == SRGB  # else the colours would change


def test_float_tiff_stays_floating(here, upscale):
    pixels = np.random.default_rng(0).random((5, 7, 3), np.float32)
    images.write("a.tiff", Picture(pixels))
    assert upscale("a.tiff", "-o", "b.tiff")[0] == 0
    assert images.read("b.tiff").pixels.dtype == np.float32
    status, _, errors = upscale("a.tiff", "-o", "b.png")
    assert status == 1 and "PNG cannot hold floating pixels" in errors[0]


def test_resolution_as_asked(here, upscale):
    picture("a.png", dpi=(300, 300))
    for how, dots in (("keep", 300), ("scale", 600)):
        assert upscale("a.png", "-o", "b.png", "--overwrite", "--dpi", how)[0] == 0
        assert images.read("b.png").metadata.dpi == pytest.approx((dots, dots), abs=0.1)


def test_sixteen_bits_stay_sixteen(here, upscale, monkeypatch):
    y, x = np.mgrid[:9, :8]
    pixels = np.stack((x * 8000 + 13, y * 7000 + 7, 60000 - x * y), 2).astype(np.uint16)
    images.write("a.png", Picture(pixels))
    images.write("b.tiff", Picture(pixels[..., :1]))
    assert upscale("a.png", "b.tiff")[0] == 0
    result = images.read("a_x2.png").pixels
    assert result.dtype == np.uint16 and result.shape == (18, 16, 3)
    assert len(np.unique(result & 0xFF)) > 100  # the low bytes are no copies
    assert images.read("b_x2.tiff").pixels.dtype == np.uint16
    status, _, err = upscale("a.png", "--ext", "webp")
    assert status == 1 and "would cut 16-bit pixels to 8" in err[0]
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, err = upscale("a.png", "--overwrite")
    assert status == 1 and "pip install efrdn_fast[images]" in err[0]


def test_tiles_and_half_precision_are_reported(here, upscale):
    picture("a.png", size=(20, 12))
    words = ("-t", "10", "--tile-pad", "4", "--dtype", "bf16", "--json-summary", "s.json")
    assert upscale("a.png", *words)[0] == 0
    row = json.loads(Path("s.json").read_text())["images"][0]
    assert (row["tile"], row["dtype"]) == (10, "bf16")
    assert upscale("a.png", "-t", "auto", "--overwrite")[0] == 0


def test_exact_bands(here, upscale):
    picture("a.png", (24, 20))
    assert upscale("a.png", "-o", "whole.png", "--tile", "0", "--segment-tokens", "50")[0] == 0
    words = ["--exact", "--tile", "7", "--segment-tokens", "50", "--json-summary", "s.json"]
    assert upscale("a.png", "-o", "bands.png", *words)[0] == 0
    np.testing.assert_array_equal(images.read("bands.png").pixels, images.read("whole.png").pixels)
    (image,) = json.loads(Path("s.json").read_text())["images"]
    assert image["exact"] is True and image["tile"] == 7


def test_warnings_are_one_line(here, upscale, monkeypatch):
    picture("a.png", size=(80, 64))
    monkeypatch.setattr("efrdn_fast.inference.free_memory", lambda _: 41 * 41 * 5000)
    status, _, err = upscale("a.png")
    assert status == 0
    assert len(err) == 1
    start = "efrdn upscale: warning: a.png: 80x64 px do not fit on cpu in one piece"
    assert err[0].startswith(start)


def test_a_warning_is_told_of_every_file(here, upscale):
    pixels = np.zeros((4, 4, 3), np.uint8)
    for name in ("a.tiff", "b.tiff"):
        images.write(name, Picture(pixels, Metadata(iptc=b"i" * 70_000)))
    status, _, err = upscale("a.tiff", "b.tiff", "--ext", "jpg")
    assert status == 0
    assert [line.split(": ")[2] for line in err] == ["a.tiff", "b.tiff"]
    assert all("IPTC of more than 64 KiB" in line for line in err)


def test_full_disk_is_one_line_and_leaves_nothing(here, upscale, monkeypatch):
    picture("in/a.png")
    picture("in/b.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = upscale("in", "-o", "out")
    assert status == 1 and len(err) == 2 and "No space left on device" in err[1]
    assert tree(here) == ["in/a.png", "in/b.png"]


def test_plan_reports_folders_that_cannot_be_read(here, monkeypatch):
    Path("in").mkdir()

    def walk(root, onerror):
        onerror(PermissionError(errno.EACCES, "Permission denied", "in/secret"))
        return []

    monkeypatch.setattr(batch.os, "walk", walk)
    jobs = plan([Path("in")], None, scale=2)
    assert [job.error for job in jobs] == ["in/secret: Permission denied"]
