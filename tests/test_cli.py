"""The `efrdn` program: start-up, one line per error, pipes, clean ends."""

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

import pytest
import torch
from PIL import Image

from efrdn_fast import EFRDN, __version__, checkpoint, cli
from tests.program import efrdn, picture, tree


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
        (["eval", "-s", "4", "--tile", "2"], "at least 3 pixels"),
        (["export", "-o", "a.onnx", "--segment-tokens", "0"], "at least 1"),
        (["verify", "--limit", "0"], "at least 1"),
        (["upscale", "a.png", "--ext", "gif"], "invalid choice: 'gif'"),
        (["upscale", "a.png", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["upscale", "a.png", "--overwrite", "--skip-existing"], "not allowed with"),
        (["convert", "a.pth", "b.pth"], "must end in .safetensors"),
        (["compare", "a.png", "b.png", "-o", "c.png"], "written as .html"),
        (["bench", "--seconds", "0"], "must be positive and finite, got 0"),
        (["bench", "--seconds", "inf"], "must be positive and finite, got inf"),
        (["info", "--channels", "40"], "multiple of 16, got 40"),
        (["export", "-o", "a.onnx", "--opset", "3"], "opset must be at least 18"),
        (["train", "photos", "--lr", "0"], "need 0 <= lr_min <= lr"),
        (["train", "photos", "--save-freq", "0"], "save_freq must be at least 1"),
        (["train", "photos", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["ablate", "photos", "--patch-size", "0"], "patch_size"),
        (["bench", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["upscale", "a.png", "--device", "meta"], "'meta' holds no data"),
        (["upscale", "a.png", "-s", "2", "-n", "x4"], "upscales by 4, not by 2"),
        (["upscale", "a.png", "--backend", "cuda", "--exact"], "not backend 'cuda'"),
        (["bench", "--backend", "triton", "--device", "cpu"], "backend 'triton' cannot run"),
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


def test_every_option_of_training_names_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Default: ." not in text and "Default: None" not in text
    assert "Default: `<out>/cache`. --device" in text
