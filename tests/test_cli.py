"""The `efrdn` program: start-up, one line per error, files and folders, clean ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from efrdn_fast import EFRDN, __version__, batch, checkpoint, cli, images
from efrdn_fast.batch import plan
from efrdn_fast.images import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoint of a small random x2 network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    return checkpoint.save(EFRDN(2, channels=16, distilled=4), folder / "net.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def upscale(weights, capsys):
    """Runs `efrdn upscale` with the small network; returns (status, lines out, lines of errors)."""

    def call(*args):
        status = cli.main(["upscale", "-n", str(weights), *map(str, args)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out.splitlines(), err.splitlines()

    return call


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


def test_help_and_version_import_neither_torch_nor_numpy():
    code = (
        "import sys; from efrdn_fast.cli import main\n"
        "for word in (['--help'], ['upscale', '--help'], ['--version']):\n"
        "    try: main(word)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = efrdn("-c", code)
    assert result.returncode == 0, result.stderr
    assert f"efrdn {__version__}" in result.stdout
    for name in cli.COMMANDS:
        assert f"\n    {name} " in result.stdout


def test_module_runs_as_a_program():
    result = efrdn("-m", "efrdn_fast", "upscale")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("efrdn upscale: error: no input")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    module = import_module(f"efrdn_fast.commands.{name}")
    assert module.HELP and "\n" not in module.HELP
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and "usage: efrdn " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "required: COMMAND"),
        (["draw"], "invalid choice: 'draw'"),
        (["upscale"], "no input"),
        (["upscale", "a.png", "-s", "5"], "invalid choice: 5"),
        (["upscale", "a.png", "-t", "2"], "at least 3 pixels"),
        (["upscale", "a.png", "-t", "big"], "whole number"),
        (["upscale", "a.png", "--tile-pad", "-1"], "whole number|expected one argument"),
        (["upscale", "a.png", "--max-pixels", "0"], "at least 1"),
        (["upscale", "a.png", "--ext", "gif"], "invalid choice: 'gif'"),
        (["upscale", "a.png", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["upscale", "a.png", "--overwrite", "--skip-existing"], "not allowed with"),
        (["convert", "a.pth", "b.pth"], "must end in .safetensors"),
    ],
)
def test_wrong_usage_is_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("two\n  lines"), 1, "efrdn convert: error: two lines"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "efrdn convert: error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "CUDA out of memory."),
        (ImportError("No module named 'onnx'"), 1, "No module named 'onnx'"),
        (RuntimeError(), 1, "efrdn convert: error: RuntimeError"),
        (KeyboardInterrupt(), 130, "efrdn convert: interrupted"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, status, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("efrdn_fast.commands.convert.run", fail)
    assert cli.main(["convert", "a.pth", "b.safetensors"]) == status
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(_):
        raise AssertionError("a bug")

    monkeypatch.setattr("efrdn_fast.commands.convert.run", fail)
    with pytest.raises(AssertionError):
        cli.main(["convert", "a.pth", "b.safetensors"])


@pytest.mark.parametrize("wrap", ["plain", "params_ema", "nested", "compiled"])
def test_convert(tmp_path, weights, capsys, wrap):
    stored = checkpoint.load(weights)
    net = EFRDN(3)
    state = net.state_dict()
    content = {
        "plain": state,
        "params_ema": {"params": {}, "params_ema": state},
        "nested": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
    }[wrap]
    torch.save(content, tmp_path / "a.pth")
    out = tmp_path / "new" / "a.safetensors"
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(out)]) == 0
    assert "EFRDN x3, 755,800 parameters" in capsys.readouterr().out
    again = EFRDN.from_pretrained(out)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    # A safetensors file keeps its settings.
    assert cli.main(["convert", str(weights), str(out)]) == 0
    assert checkpoint.load(out).config == stored.config


def test_convert_names_what_differs(tmp_path, capsys):
    state = EFRDN(2).state_dict()
    del state["tconv.0.bias"]
    state["extra"], state["tconv.1.bias"] = torch.zeros(1), torch.zeros(7)
    torch.save(state, tmp_path / "a.pth")
    assert cli.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]) == 1
    err = capsys.readouterr().err
    assert "missing: tconv.0.bias" in err and "unexpected: extra" in err
    assert "tconv.1.bias is [7], expected [32]" in err
    assert err.count("\n") == 1 and not (tmp_path / "b.safetensors").exists()
    (tmp_path / "c.pth").write_bytes(b"rubbish")
    assert cli.main(["convert", str(tmp_path / "c.pth"), str(tmp_path / "b.safetensors")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


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
    assert len(err) == 1 and "already the result of in/a.jpg" in err[0] and "in/a.png" in err[0]
    assert images.read("out/a.png").pixels.shape == (10, 14, 3)  # of the first, a.jpg
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
        (["empty"], "no images in this folder (.png"),
        (["a.png", "-s", "3"], "upscales by 2, not by 3"),
        (["a.png", "-n", "other.safetensors"], "checkpoint 'other.safetensors' does not exist"),
        (["a.png", "-n", "text.safetensors"], "not a readable safetensors file"),
        (["a.png", "--device", "cuda:99"], "cuda:99"),
        (["a.png", "--backend", "triton"], "backend 'triton'"),
        (["a.png", "-o", "text.safetensors/out"], "text.safetensors"),
        (["a.png", "-t", "8", "--tile-pad", "7"], "overlap must be within 0..4"),
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


@pytest.mark.parametrize("ext, kind", [((), "PNG"), (("--ext", "tiff"), "TIFF")])
def test_standard_input_and_output(here, weights, ext, kind):
    picture("a.png", mode="RGBA")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "efrdn_fast", "upscale", "-n", str(weights)]
    done = subprocess.run(
        [*command, "-i", "-", "-o", "-", *ext],
        input=Path("a.png").read_bytes(),
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0 and b"1 upscaled" in done.stderr
    result = Image.open(io.BytesIO(done.stdout))
    assert (result.format, result.size, result.mode) == (kind, (14, 10), "RGBA")
    assert tree(here) == ["a.png"]


def test_standard_input_that_is_no_image(here, upscale, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    status, _, errors = upscale("-i", "-", "-o", "b.png")
    assert status == 1 and errors[0].startswith("efrdn upscale: error: -: not a PNG")
    assert tree(here) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["-i", "-"], "standard input needs an output"),
        (["-i", "-", "-o", "folder"], "standard input needs an output"),
        (["-i", "-", "a.png", "-o", "-"], "'-' is one image"),
        (["-i", ".", "-o", "-"], "'-' is one image"),
    ],
)
def test_pipes_are_for_one_image(here, upscale, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        upscale(*words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


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
    assert err[0].startswith("efrdn upscale: warning: 80x64 px do not fit on cpu in one piece")


def test_full_disk_is_one_line_and_leaves_nothing(here, upscale, monkeypatch):
    picture("in/a.png")
    picture("in/b.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, _, err = upscale("in", "-o", "out")
    assert status == 1 and len(err) == 2 and "No space left on device" in err[1]
    assert tree(here) == ["in/a.png", "in/b.png"]


def test_interrupt_keeps_what_is_done(here, upscale, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        picture(f"in/{name}")
    replace, written = os.replace, []

    def stop(part, target):
        written.append(str(target))
        if str(target).endswith("b.png"):
            raise KeyboardInterrupt
        replace(part, target)

    monkeypatch.setattr(os, "replace", stop)
    status, _, err = upscale("in", "-o", "out", "--json-summary", "s.json")
    assert status == 130 and err == ["efrdn upscale: interrupted"]
    assert tree("out") == ["a.png"]
    assert json.loads(Path("s.json").read_text())["done"] == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_termination_ends_a_run_cleanly(here, weights):
    picture("in/a.png")
    picture("in/b.png", size=(300, 300))  # takes far longer than the test waits
    command = [sys.executable, "-m", "efrdn_fast", "upscale", "in", "-o", "out", "-n", str(weights)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout.readline().startswith("in/a.png -> out/a.png")
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "efrdn upscale: interrupted\n"
    assert tree("out") == ["a.png"]


def test_plan_reports_folders_that_cannot_be_read(here, monkeypatch):
    Path("in").mkdir()

    def walk(root, onerror):
        onerror(PermissionError(errno.EACCES, "Permission denied", "in/secret"))
        return []

    monkeypatch.setattr(batch.os, "walk", walk)
    jobs = plan([Path("in")], None, scale=2)
    assert [job.error for job in jobs] == ["in/secret: Permission denied"]
