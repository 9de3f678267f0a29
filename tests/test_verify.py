"""efrdn verify: right networks pass, wrong ones are found, exit status."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from efrdn_fast import EFRDN, checkpoint, cli, dispatch, fast, fusion, verify
from efrdn_fast.benchmarks import ImageSet

CPU = torch.device("cpu")


@pytest.fixture
def net() -> EFRDN:
    return EFRDN(scale=2, channels=16, distilled=5).eval()


@pytest.fixture
def image_set(tmp_path) -> ImageSet:
    folder = tmp_path / "sets" / "mine"
    (folder / "HR").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "HR" / "noise.png")
    return ImageSet("mine", folder)


@pytest.fixture
def broken(monkeypatch):
    """Packed weights that are wrong by a thousandth."""
    forward = fast._Packed.__call__
    monkeypatch.setattr(fast._Packed, "__call__", lambda self, x: forward(self, x) * 1.001)


@pytest.fixture(autouse=True)
def small_ops(monkeypatch):
    monkeypatch.setattr(verify, "OP_SHAPES", ((1, 32, 3, 3), (2, 32, 5, 7)))


def test_ops():
    rows = list(verify.check_ops(CPU))
    # every forward op of the table of backends, each at two shapes and in three dtypes
    forward = {op for op in dispatch.IMPLS if "backward" not in op}
    assert {(row.what, row.dtype) for row in rows} == {
        (op, dtype) for op in forward for dtype in ("fp32", "fp16", "bf16")
    }
    assert len(rows) == 6 * len(forward)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_finds_a_wrong_op(monkeypatch):
    gate = fusion.sigmoid_gate
    monkeypatch.setattr(fusion, "sigmoid_gate", lambda *args, **kw: gate(*args, **kw) * 1.1)
    rows = [row for row in verify.check_ops(CPU, "reference") if not row.passed]
    assert {row.what for row in rows} == {"sigmoid_gate"} and len(rows) == 6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_network(net, dtype):
    rows = list(verify.check_network(net, dtype, sizes=[(3, 3), (7, 9)]))
    assert [row.case for row in rows] == ["1x3x3x3", "3x3x3x3", "1x3x7x9", "3x3x7x9"]
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


def test_finds_a_wrong_network(net, broken):
    assert not any(row.passed for row in verify.check_network(net, sizes=[(7, 9)]))


def test_images(net, image_set):
    row = verify.check_images(net, image_set)
    assert row.passed and "over 1 images" in row.figure


def test_finds_a_change_of_psnr(net, image_set, monkeypatch):
    forward = fast._Packed.__call__
    monkeypatch.setattr(fast._Packed, "__call__", lambda self, x: forward(self, x) + 0.1)
    assert not verify.check_images(net, image_set).passed


@pytest.fixture
def command(net, tmp_path, monkeypatch):
    """Runs `efrdn verify` of a small x2 network on one size: its status."""
    monkeypatch.setattr(verify, "SIZES", ((5, 6),))
    monkeypatch.delenv("EFRDN_FAST_DATA", raising=False)
    path = str(checkpoint.save(net, tmp_path / "net.safetensors"))

    def run(*words) -> int:
        fixed = ["verify", "--model", path, "--backend", "reference", "--device", "cpu"]
        return cli.main([*fixed, *map(str, words)])

    return run


def test_command(command, image_set, capsys):
    assert command("--benchmark", image_set.folder.parent, "--sets", "mine") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "96 of 96 comparisons within their bounds"
    assert any(line.startswith("mine") and "bf16" in line for line in out)
    assert "PSNR not measured" not in "".join(out)


def test_command_fails_beyond_a_bound(command, broken, capsys):
    assert command("--dtype", "fp32") == 1
    assert "FAILED" in capsys.readouterr().out


def test_one_dtype_is_that_of_the_ops_too(command, tmp_path):
    for dtype, of_ops in (("bf16", "bf16"), ("tf32", "fp32")):
        command("--dtype", dtype, "--json", tmp_path / "rows.json")
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        found = {row["dtype"] for row in rows if row["what"] != "network"}
        assert found == {of_ops}
        assert {row["dtype"] for row in rows if row["what"] == "network"} == {dtype}


def test_benchmark_of_the_data_folder(command, image_set, monkeypatch, capsys):
    """Taken by itself; what is not measured is said."""
    words = ("--dtype", "fp32", "--sets", "mine")
    assert command(*words) == 0
    assert "PSNR not measured: no images; give --benchmark DIR, or" in capsys.readouterr().out
    data = image_set.folder.parents[1]
    monkeypatch.setenv("EFRDN_FAST_DATA", str(data))
    assert command(*words) == 0
    assert f"PSNR not measured: no folder benchmark in {data}" in capsys.readouterr().out
    image_set.folder.parent.rename(data / "benchmark")
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "\nmine " in out and "PSNR not measured" not in out
    assert command(*words, "--no-benchmark") == 0
    out = capsys.readouterr().out
    assert "\nmine " not in out and "PSNR not measured: --no-benchmark" in out


def test_json(command, image_set, broken, tmp_path):
    words = ("--dtype", "fp32", "--benchmark", image_set.folder.parent, "--sets", "mine")
    assert command(*words, "--json", tmp_path / "new" / "verify.json") == 1
    record = json.loads((tmp_path / "new" / "verify.json").read_text())
    weights = (tmp_path / "net.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["versions"]["torch"] == torch.__version__ and record["device"] == "cpu"
    assert record["failed"] == sum(not row["passed"] for row in record["rows"]) > 0
    assert record["psnr_not_measured"] is None
    network, images = record["rows"][-2:]
    assert network["values"]["max_error"] > network["values"]["bound"] > 0
    assert images["what"] == "mine" and images["values"]["images"] == 1


@pytest.mark.parametrize("words", [["--benchmark", "none"], ["--benchmark", ".", "--sets", "b"]])
def test_a_missing_benchmark_ends_the_run_at_once(command, image_set, monkeypatch, capsys, words):
    monkeypatch.chdir(image_set.folder.parent)
    monkeypatch.setattr(verify, "check_ops", lambda *_: pytest.fail("too late"))
    assert command(*words) == 1
    out, err = capsys.readouterr()
    assert not out and ("'none' does not exist" in err or "no set b in '.'" in err)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--benchmark", "d"], "give --model"),
        (["--benchmark", "d", "--no-benchmark"], "not allowed with"),
        (["--model", "x4", "-s", "2"], "x4 upscales by 4, not by 2"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
