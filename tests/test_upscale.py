"""`upscale()`: the same kind of picture comes out, alpha without fringes, errors in words."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import efrdn_fast
from efrdn_fast import EFRDN, checkpoint, upscale
from efrdn_fast.errors import BackendUnavailable
from efrdn_fast.upscaler import Upscaler, fill_clear


class Nearest(nn.Module):
    """Repeats pixels, adds `noise` to them, and records what it is given."""

    def __init__(self, scale=2, noise=0.0):
        super().__init__()
        self.scale, self.noise, self.seen = scale, noise, []

    def forward(self, x):
        self.seen.append(x.clone())
        y = x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        return y + self.noise * (2 * torch.rand_like(y) - 1)


class Bicubic(nn.Module):
    """A network that rings at edges as learned ones do."""

    scale = 4

    def forward(self, x):
        return F.interpolate(x, scale_factor=4, mode="bicubic")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints of small random networks by scale."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    return {
        scale: checkpoint.save(
            EFRDN(scale, channels=16, distilled=4), folder / f"x{scale}.safetensors"
        )
        for scale in (2, 3, 4)
    }


def noise(shape, dtype=np.uint8):
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def repeated(pixels, scale=2):
    return pixels.repeat(scale, 0).repeat(scale, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4)], ids=str)
@pytest.mark.parametrize("scale", [2, 3])
def test_arrays_come_back_as_arrays(shape, dtype, scale):
    pixels = noise(shape, dtype)
    if shape[2:] in ((2,), (4,)):
        pixels[..., -1] |= 1  # visible everywhere, else the hidden colour may change
    before = pixels.copy()
    result = upscale(pixels, scale, model=Nearest(scale))
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, repeated(pixels, scale))
    np.testing.assert_array_equal(pixels, before)


def test_arrays_in_any_memory_order():
    pixels = noise((6, 8, 3), np.uint16)
    views = [pixels[::-1, ::2], pixels.astype(">u2"), np.asfortranarray(pixels)]
    views[0].flags.writeable = False
    for view in views:
        np.testing.assert_array_equal(upscale(view, 2, model=Nearest()), repeated(view))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 5, 7), (4, 5, 7), (2, 3, 5, 7), (2, 2, 5, 7)])
def test_tensors_come_back_as_tensors(shape, dtype):
    x = torch.rand(shape).clamp_min(0.01)
    x = (x * 255).to(dtype) if dtype is torch.uint8 else x.to(dtype)
    result = upscale(x, 2, model=Nearest())
    assert result.dtype == dtype and not result.requires_grad
    expected = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(
        result, expected, atol=1e-3 if dtype is torch.float16 else 1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "mode, result",
    [
        ("L", "L"),
        ("LA", "LA"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("1", "L"),
        ("P", "RGB"),
        ("PA", "RGBA"),
        ("I;16", "I;16"),
        ("YCbCr", "RGB"),
    ],
)
def test_pillow_images_come_back_as_pillow_images(mode, result):
    image = Image.fromarray(noise((6, 9, 4)))
    image.putalpha(255)
    image = image.convert("L" if mode == "I;16" else "RGB").convert(mode)
    image.info |= {"icc_profile": b"profile", "dpi": (300, 300), "exif": b"Exif\0\0", "gamma": 2}
    out = upscale(image, 2, model=Nearest())
    assert (out.mode, out.size) == (result, (18, 12))
    assert out.info == {"icc_profile": b"profile", "dpi": (300, 300), "exif": b"Exif\0\0"}
    if mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        np.testing.assert_array_equal(np.asarray(out), repeated(np.asarray(image)))


def test_pillow_palette_with_transparency():
    image = Image.fromarray(noise((6, 6)) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.info["transparency"] = 1
    out = upscale(image, 2, model=Nearest())
    assert out.mode == "RGBA"
    alpha = np.asarray(out)[..., 3]
    np.testing.assert_array_equal(alpha == 0, repeated(np.asarray(image) == 1))
    np.testing.assert_array_equal(
        np.asarray(out)[alpha > 0], np.asarray(image.convert("RGBA").resize((12, 12), 0))[alpha > 0]
    )


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_network_does_the_work(weights, scale):
    pixels = noise((9, 8, 3))
    net = EFRDN.from_pretrained(weights[scale])
    with torch.inference_mode():
        y = net(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]
    expected = (y.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    difference = upscale(pixels, scale, model=weights[scale]).astype(int) - expected
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # other attention
    np.testing.assert_array_equal(upscale(pixels, scale, model=net), expected)


def test_gray_is_three_equal_channels_and_their_mean():
    class Tint(Nearest):
        def forward(self, x):
            return super().forward(x) + torch.tensor([0.1, 0.0, -0.04]).view(3, 1, 1)

    net = Tint()
    result = upscale(torch.full((1, 4, 4), 0.5), 2, model=net)
    assert torch.equal(net.seen[0], torch.full((1, 3, 4, 4), 0.5))
    torch.testing.assert_close(result, torch.full((1, 8, 8), 0.52))


def disc(colour, size=24, hidden=(0, 0, 0)):
    """A disc with a hard edge, clear around it."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    inside = x**2 + y**2 < (size / 3) ** 2
    pixels = np.empty((size, size, 4), np.uint8)
    pixels[..., :3] = np.where(inside[..., None], colour, hidden)
    pixels[..., 3] = 255 * inside
    return pixels


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255), (0, 255, 0)], ids=str)
def test_hard_edges_have_no_fringes(hidden):
    colour = (230, 120, 40)
    result = upscale(disc(colour, hidden=hidden), 4, model=Bicubic())
    visible = result[..., 3] > 0
    assert visible.any() and not visible.all()
    assert np.abs(result[visible][:, :3].astype(int) - colour).max() <= 1
    for ground in (0, 255):  # on black and on white every pixel lies between disc and ground
        alpha = result[..., 3:] / 255
        seen = result[..., :3] * alpha + ground * (1 - alpha)
        least, most = np.minimum(colour, ground), np.maximum(colour, ground)
        assert (seen >= least - 1.5).all() and (seen <= most + 1.5).all()


@pytest.mark.parametrize("dtype, peak", [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_hard_edges_of_gray_have_no_fringes_at_any_depth(dtype, peak):
    pixels = disc((200, 200, 200))[..., [0, 3]].astype(np.float64) / 255
    result = upscale((pixels * peak).astype(dtype), 4, model=Bicubic()).astype(np.float64) / peak
    visible = result[..., 1] > 0
    assert visible.any() and not visible.all()
    assert np.abs(result[visible][:, 0] - 200 / 255).max() < 1 / 200


def test_clear_and_opaque_stay_so_whatever_the_network_does():
    pixels = disc((200, 100, 50))
    result = upscale(pixels, 2, model=Nearest(noise=0.2))
    padded = np.pad(pixels[..., 3], 1, mode="edge")
    near = np.stack([padded[i : i + 24, j : j + 24] for i in range(3) for j in range(3)])
    opaque, clear = repeated(near.min(0) == 255), repeated(near.max(0) == 0)
    assert (result[opaque][:, 3] == 255).all() and (result[clear][:, 3] == 0).all()
    edge = result[~opaque & ~clear][:, 3]
    assert ((edge > 0) & (edge < 255)).mean() > 0  # there the network decides


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("channels", [2, 4])
def test_constant_alpha_is_kept_without_a_pass(value, channels):
    pixels = noise((5, 6, channels))
    pixels[..., -1] = value
    net = Nearest()
    result = upscale(pixels, 2, model=net)
    assert len(net.seen) == 1
    np.testing.assert_array_equal(result, repeated(pixels))


def test_alpha_takes_a_second_pass():
    calls = []
    net = Nearest()
    upscale(disc((9, 9, 9)), 2, model=net, tile=16, progress=lambda *call: calls.append(call))
    assert calls == [(i + 1, 8) for i in range(8)]
    assert len(net.seen) == 8


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (16, 16), (13, 27)])
def test_clear_pixels_take_the_colour_of_their_neighbours(height, width):
    colour, alpha = torch.rand(2, 3, height, width), torch.rand(2, 1, height, width)
    alpha[alpha < 0.6] = 0
    alpha[:, :, 0, 0] = 1
    filled = fill_clear(colour, alpha)
    visible = (alpha > 0).expand_as(colour)
    assert torch.equal(filled[visible], colour[visible])
    for n, c in ((0, 0), (1, 2)):
        shown = colour[n, c][alpha[n, 0] > 0]
        assert filled[n, c].min() >= shown.min() - 1e-5 and filled[n, c].max() <= shown.max() + 1e-5


def test_an_invisible_picture_is_no_trouble():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[4, 4, 3] = 1  # all but
    assert upscale(pixels, 2, model=Nearest()).shape == (16, 16, 4)
    assert torch.isfinite(fill_clear(torch.rand(1, 3, 5, 5), torch.zeros(1, 1, 5, 5))).all()


def test_network_keeps_its_mode_and_is_loaded_once(weights):
    net = EFRDN(2, channels=16, distilled=4)
    net.acdm[0].eval()
    modes = [module.training for module in net.modules()]
    assert True in modes and False in modes
    first = upscale(noise((6, 6, 3)), 2, model=net)
    assert [module.training for module in net.modules()] == modes
    np.testing.assert_array_equal(first, upscale(noise((6, 6, 3)), 2, model=net.eval()))
    assert Upscaler(2, weights[2]).net is Upscaler(None, str(weights[2])).net


def test_changed_checkpoint_is_loaded_again(tmp_path):
    path = checkpoint.save(EFRDN(2, channels=16, distilled=4), tmp_path / "a.safetensors")
    first = Upscaler(2, path).net
    checkpoint.save(EFRDN(3, channels=16, distilled=4), path)
    os.utime(path, ns=(1, 1))
    assert Upscaler(model=path).scale == 3 and first.scale == 2


def test_scale_must_be_that_of_the_model(weights):
    assert Upscaler(model=weights[3]).scale == 3
    with pytest.raises(ValueError, match=r"x2\.safetensors upscales by 2, not by 4"):
        upscale(noise((6, 6, 3)), model=weights[2])
    with pytest.raises(ValueError, match="Nearest upscales by 3, not by 2"):
        upscale(noise((6, 6, 3)), 2, model=Nearest(3))
    with pytest.raises(ValueError, match="the network upscales by 2, not by 3"):
        upscale(noise((6, 6, 3)), 3, model=nn.Upsample(scale_factor=2))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        upscale(noise((6, 6, 3)), model=tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="x5"):
        upscale(noise((6, 6, 3)), scale=5)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((5, 5, 3)), TypeError, "uint8, uint16 or float32, got float64"),
        (np.zeros((5, 5, 3), np.int64), TypeError, "got int64"),
        (np.zeros((5,), np.uint8), ValueError, r"\[H, W\]"),
        (np.zeros((1, 5, 5, 3), np.uint8), ValueError, r"\[H, W\]"),
        (np.zeros((5, 5, 5), np.uint8), ValueError, "1 to 4 channels"),
        (np.zeros((2, 5, 3), np.uint8), ValueError, r"at least 3x3 px, got 5x2 \(W x H\)"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, "got 5x0"),
        (torch.zeros(5, 5), ValueError, r"\[C, H, W\]"),
        (torch.zeros(7, 5, 5), ValueError, r"got \[7, 5, 5\]"),
        (torch.zeros(1, 1, 3, 5, 5), ValueError, "1 to 4 channels"),
        (torch.zeros(0, 3, 5, 5), ValueError, "empty batch"),
        (torch.zeros(3, 5, 5, dtype=torch.int32), TypeError, "int32"),
        (torch.full((3, 5, 5), float("nan")), ValueError, "NaN"),
        (torch.full((3, 5, 5), float("inf")), ValueError, "NaN or infinite"),
        (torch.full((3, 5, 5), 255.0), ValueError, r"in \[0, 1\], got 255 to 255"),
        (Image.new("RGB", (2, 8)), ValueError, "got 2x8"),
        (Image.new("F", (8, 8)), ValueError, "floating point"),
        (Image.new("CMYK", (8, 8)), ValueError, "CMYK without an ICC profile"),
        ([[0, 1], [2, 3]], TypeError, "got list"),
        ("photo.jpg", TypeError, "Pillow image, array or tensor, got str"),
    ],
    ids=lambda value: "" if isinstance(value, (np.ndarray, torch.Tensor)) else None,
)
def test_bad_images_are_named(image, error, message):
    with pytest.raises(error, match=message):
        upscale(image, 2, model=Nearest())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": "fp8"}, ValueError, "dtype must be one of"),
        ({"tile": 2}, ValueError, "tile must be at least 3"),
        ({"device": "cuda:77"}, ValueError, "cuda:77|move it"),
        ({"backend": "triton"}, BackendUnavailable, "backend 'triton' cannot run"),
        ({"backend": "fpga"}, ValueError, "backend must be one of auto.*got 'fpga'"),
        ({"overlap": 99, "tile": 8}, ValueError, r"overlap must be within 0\.\.4"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, message, weights):
    with pytest.raises(error, match=message):
        Upscaler(2, weights[2], **options).array(noise((20, 20, 3)))
    with pytest.raises(error, match=message):
        Upscaler(2, Nearest(), **options).array(noise((20, 20, 3)))


def test_half_precision_stays_close(weights):
    pixels = noise((12, 12, 3))
    exact = upscale(pixels, 2, model=weights[2]).astype(int)
    for dtype in ("fp16", "bf16"):
        worker = Upscaler(2, weights[2], dtype=dtype)
        assert np.abs(worker.array(pixels) - exact).max() <= 3
        assert worker.outcome.dtype == dtype


def test_tiles_hardly_change_the_picture(weights):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8))
    pixels = np.asarray(small.resize((60, 48), Image.Resampling.BICUBIC))
    whole = upscale(pixels, 2, model=weights[2]).astype(float)
    cut = upscale(pixels, 2, model=weights[2], tile=32).astype(float)
    assert np.abs(whole - cut).max() > 0
    assert 10 * np.log10(255**2 / np.square(whole - cut).mean()) > 35


def test_the_name_is_the_function():
    assert efrdn_fast.upscale is efrdn_fast.upscaler.upscale
    assert "upscale" in efrdn_fast.__all__
