"""The network in passes over bands of rows: the numbers of the whole image, in bounded memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from efrdn_fast import EFRDN, exact, images, inference
from efrdn_fast.config import ABLATIONS
from efrdn_fast.rows import Moments, Rows, Stream, resized_rows
from efrdn_fast.upscaler import Upscaler, prepare

CPU = torch.device("cpu")
FULL_DISK = Path("/dev/full")


def network(**options):
    """A small network whose batch norms have statistics of their own, in float64."""
    net = EFRDN(2, **{"channels": 16, "distilled": 5, **options})
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return net.double().eval()


def banded(net, x, rows, progress=None):
    with torch.inference_mode():
        parts = [y.clone() for _, y in exact.bands(net, x, rows, CPU, progress)]
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(
    "size, rows, options",
    [
        ((3, 3), 1, {}),
        ((5, 40), 2, {}),
        ((40, 5), 7, {}),
        ((23, 31), 5, {}),
        ((23, 31), 100, {"fold": "sum"}),
        ((40, 33), 16, {"segment_tokens": 50}),
        ((40, 33), 6, {"segment_tokens": 7}),
        ((17, 19), 4, {"segment_tokens": 10_000}),
    ],
    ids=str,
)
def test_bands_equal_the_whole_image(size, rows, options):
    net, x = network(**options), torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.inference_mode():
        whole = net(x)
    torch.testing.assert_close(banded(net, x, rows), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ablation", [name for name in ABLATIONS if name != "full"])
def test_every_ablation(ablation):
    net, x = network(ablation=ablation), torch.rand(1, 3, 20, 23, dtype=torch.float64)
    done = []
    with torch.inference_mode():
        whole = net(x)
    again = banded(net, x, 8, lambda *numbers: done.append(numbers))
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)
    assert done == [(i + 1, len(done)) for i in range(len(done))]


def test_shipped_weights_agree_to_1e_5(data_root):
    path = data_root / "benchmark" / "Set5" / "LR_bicubic" / "X4" / "headx4.png"
    x = torch.tensor(images.read(path).pixels[:40, :48]).permute(2, 0, 1)[None] / 255
    for tokens in (None, 256):
        whole = Upscaler(4, tile=0, segment_tokens=tokens).tensor(x)
        bands = Upscaler(4, tile=12, exact=True, segment_tokens=tokens)
        assert (bands.tensor(x) - whole).abs().max() < 1e-5
        assert bands.outcome == inference.Outcome(12, "fp32", exact=True)


def test_bfloat16_stays_close():
    net = prepare(network().float(), CPU)
    x = torch.rand(1, 3, 30, 24)
    parts = []
    options = {"device": CPU, "dtype": "bf16", "exact": True, "tile": 9}
    inference.run(net, x, lambda top, band: parts.append(band.clone()), **options)
    with torch.inference_mode():
        assert (torch.cat(parts, dim=2) - net(x)).abs().max() < 0.02


def test_out_of_memory_halves_the_bands(monkeypatch):
    tried = []
    real = exact.bands

    def bands(net, x, rows, *others):
        tried.append(rows)
        if rows > 20:
            raise MemoryError
        return real(net, x, rows, *others)

    monkeypatch.setattr(exact, "bands", bands)
    monkeypatch.setattr(exact, "band_rows", lambda net, width: 64)
    net, x = network().float(), torch.rand(1, 3, 24, 24)
    outcome = inference.run(net, x, lambda top, band: None, device=CPU, exact=True)
    assert tried == [64, 32, 16] and outcome.tile == 16


def test_a_segment_that_does_not_fit_names_the_way(monkeypatch):
    monkeypatch.setattr(inference, "free_memory", lambda device: 10_000_000)
    x = torch.zeros(1, 3, 100, 100)
    with pytest.raises(MemoryError, match="--segment-tokens"):
        inference.run(network(), x, lambda *_: None, device=CPU, exact=True)


def test_other_networks_and_bands_are_refused():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="module='acdm'"):
        next(exact.bands(EFRDN(2, channels=16, module="rfdb"), x, 4, CPU))
    with pytest.raises(ValueError, match="at least 1 row"):
        next(exact.bands(network(), x, 0, CPU))


def test_output_that_is_not_finite_is_noticed():
    net = network()
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError), torch.inference_mode():
        next(exact.bands(net, torch.zeros(1, 3, 8, 8), 4, CPU))


def test_rows_come_back_and_holes_are_noticed():
    rows, x = Rows((2, 3, 9, 5), torch.float32), torch.rand(2, 3, 9, 5)
    rows.write(4, x[:, :, 4:])
    with pytest.raises(OSError, match="not written"):
        rows.read(8, 11)
    rows.write(0, x[:, :, :4])
    for top, bottom in ((0, 9), (3, 6), (8, 9)):
        torch.testing.assert_close(rows.read(top, bottom), x[:, :, top:bottom], rtol=0, atol=0)


def test_temporary_files_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    banded(network(), torch.rand(1, 3, 8, 8, dtype=torch.float64), 4)
    assert list(tmp_path.iterdir()) == []


def test_moments_of_a_constant_map():
    moments = Moments()
    for _ in range(3):
        moments.add(torch.full((1, 2, 4, 5), 0.3))
    assert moments.mean(torch.float32).flatten().tolist() == pytest.approx([0.3, 0.3])
    assert moments.std(torch.float64).flatten().tolist() == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (28, 51)])
def test_resized_rows_are_those_of_interpolate(size):
    b = torch.randn(1, 4, *size)
    whole = F.interpolate(b, size=(180, 320), mode="bilinear", align_corners=False)
    for top, bottom in ((0, 180), (77, 101), (179, 180)):
        part = resized_rows(b, 180, 320, top, bottom)
        torch.testing.assert_close(part, whole[:, :, top:bottom], rtol=0, atol=1e-5)


def test_halo_is_cut_at_the_borders():
    stream = Stream(1, 10, 4, 3, torch.float32, CPU)
    source = stream.new(1)
    source.write(0, torch.arange(10.0)[None, None, :, None].expand(1, 1, 10, 4))
    seen = [
        (top, bottom, low, int(rows[0, 0, -1, 0]))
        for top, bottom, low, (rows,) in stream.bands(lambda x: x, [source], (1, 2))
    ]
    assert seen == [(0, 3, 0, 4), (3, 6, 2, 7), (6, 9, 5, 9), (9, 10, 8, 9)]


@pytest.mark.skipif(not FULL_DISK.exists(), reason="the device of Linux that is always full")
def test_full_disk_names_the_folder():
    rows = Rows((1, 2, 3, 4), torch.float32)
    rows._file = open(FULL_DISK, "wb", buffering=0)  # noqa: SIM115
    with rows._file, pytest.raises(OSError, match="set TMPDIR to a folder with more space"):
        rows.write(0, torch.ones(1, 2, 3, 4))
