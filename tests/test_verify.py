"""efrdn verify: right networks pass, wrong ones are found, exit status."""

from __future__ import annotations

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


def test_command(net, image_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "SIZES", ((5, 6),))
    path = str(checkpoint.save(net, tmp_path / "net.safetensors"))
    words = ["verify", "--model", path, "--backend", "reference", "--device", "cpu"]
    assert cli.main([*words, "--benchmark", str(image_set.folder.parent), "--sets", "mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "96 of 96 comparisons within their bounds"
    assert any(line.startswith("mine") and "bf16" in line for line in out)


def test_command_fails_beyond_a_bound(net, broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "SIZES", ((5, 6),))
    path = str(checkpoint.save(net, tmp_path / "net.safetensors"))
    words = ["verify", "--model", path, "--backend", "reference", "--device", "cpu"]
    assert cli.main([*words, "--dtype", "fp32"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_images_need_trained_weights(image_set, capsys):
    assert cli.main(["verify", "--benchmark", str(image_set.folder)]) == 1
    assert "give --model" in capsys.readouterr().err
