"""imresize against the published LR files, and against PyTorch's antialiased bicubic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efrdn_fast import imresize

SETS = {"Set5": 5, "Set14": 14, "B100": 100}
MODES = {"replicate": "edge", "reflect": "symmetric"}


def read(path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", SETS)
def test_published_files_bit_for_bit(data_root, name, scale):
    files = sorted((data_root / "benchmark" / name / "HR").glob("*.png"))
    assert len(files) == SETS[name]
    for file in files:
        hr = read(file)
        height, width = (size // scale * scale for size in hr.shape[1:])
        lr = read(file.parent.parent / "LR_bicubic" / f"X{scale}" / f"{file.stem}x{scale}.png")
        ours = imresize(hr[:, :height, :width], 1 / scale)
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, lr), f"{file.name} x{scale}"


@pytest.mark.parametrize("border", MODES)
@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(24, 36), (12, 48)])
def test_float_equals_padded_interpolate(height, width, scale, border):
    """The same kernel by another implementation, its border made by padding."""
    x = torch.rand(2, 3, height, width, dtype=torch.float64)
    pad = 12  # a multiple of 2, 3 and 4, no less than half a widened kernel
    padded = torch.from_numpy(np.pad(x.numpy(), [(0, 0)] * 2 + [(pad, pad)] * 2, MODES[border]))
    size = [round(n * scale) for n in padded.shape[2:]]
    # PyTorch takes a = -0.5 only with antialias, and -0.75 without.
    expected = F.interpolate(padded, size=size, mode="bicubic", antialias=True, align_corners=False)
    cut = round(pad * scale)
    expected = expected[:, :, cut : size[0] - cut, cut : size[1] - cut]
    out = imresize(x, scale, border=border)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_borders_differ_at_the_border_only():
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    a, b = imresize(x, 1 / 4), imresize(x, 1 / 4, border="reflect")
    assert not torch.equal(a, b)
    torch.testing.assert_close(a[..., 2:-2, 2:-2], b[..., 2:-2, 2:-2])


def test_rounding_of_passes():
    x = (torch.rand(3, 20, 28) * 255).round().to(torch.uint8)
    rounded = imresize(x, 1 / 2)
    unrounded = imresize(x, 1 / 2, round_passes=False)
    assert unrounded.dtype == torch.uint8
    assert not torch.equal(rounded, unrounded)
    assert (rounded.int() - unrounded.int()).abs().max() == 1
    grid = imresize(x.double() / 255, 1 / 2, round_passes=True)
    torch.testing.assert_close(grid * 255, rounded.double(), rtol=0, atol=1e-9)
    plain = (imresize(x.double(), 1 / 2) + 0.5).floor().clamp(0, 255)
    assert torch.equal(plain.to(torch.uint8), unrounded)


def test_constant_stays_constant():
    for scale in (1 / 3, 1.7, 4):
        out = imresize(torch.full((9, 11), 0.3, dtype=torch.float64), scale)
        torch.testing.assert_close(out, torch.full_like(out, 0.3))


def test_shapes_and_dtypes():
    assert imresize(torch.rand(7, 10), 1 / 4).shape == (2, 3)  # rounded up
    assert imresize(torch.rand(2, 3, 7, 10), 3).shape == (2, 3, 21, 30)
    assert imresize(torch.rand(1, 1), 4).shape == (4, 4)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
        assert imresize(torch.ones(3, 8, 8, dtype=dtype), 1 / 2).dtype == dtype


def test_gradient_flows():
    x = torch.rand(1, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: imresize(x, 1 / 2), x)


@pytest.mark.gpu
def test_on_gpu():
    x = (torch.rand(3, 40, 60) * 255).to(torch.uint8)
    assert torch.equal(imresize(x.cuda(), 1 / 4).cpu(), imresize(x, 1 / 4))


@pytest.mark.parametrize(
    ("x", "scale", "options", "error", "message"),
    [
        (torch.rand(8), 2, {}, ValueError, r"\[8\]"),
        (torch.rand(3, 0, 8), 2, {}, ValueError, r"\[3, 0, 8\]"),
        (torch.ones(8, 8, dtype=torch.int32), 2, {}, TypeError, "int32"),
        (torch.rand(8, 8), 0, {}, ValueError, "scale.*0"),
        (torch.rand(8, 8), float("nan"), {}, ValueError, "scale.*nan"),
        (torch.rand(8, 8), 2, {"border": "wrap"}, ValueError, "replicate, reflect.*'wrap'"),
    ],
)
def test_rejects(x, scale, options, error, message):
    with pytest.raises(error, match=message):
        imresize(x, scale, **options)
