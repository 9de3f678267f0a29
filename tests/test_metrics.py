"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from efrdn_fast import metrics

SKIMAGE = {
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
    "data_range": 255,
}
CASES = [(64, 48, 4), (37, 61, 3), (19, 19, 4), (11, 40, 0), (80, 23, 2)]


def images(height: int, width: int, noise: float = 12) -> tuple[np.ndarray, np.ndarray]:
    """A smooth uint8 image with edges and its noisy copy."""
    rng = np.random.default_rng([height, width])
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (5 + c)) + np.cos(columns / (7 - c)) for c in range(3)], -1)
    hr = 127 + 50 * waves + 30 * ((rows // 8 + columns // 8) % 2)[..., None]
    sr = hr + rng.normal(0, noise, hr.shape)
    return tuple(np.clip(x, 0, 255).round().astype(np.uint8) for x in (sr, hr))


def luma(image: np.ndarray, crop: int) -> np.ndarray:
    y = 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255
    return y[crop : y.shape[0] - crop, crop : y.shape[1] - crop]


def nchw(*arrays: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).double() / 255


@pytest.mark.parametrize(("height", "width", "crop"), CASES)
def test_uint8_equals_skimage(height, width, crop):
    sr, hr = images(height, width)
    a, b = luma(sr, crop), luma(hr, crop)
    expected = peak_signal_noise_ratio(b, a, data_range=255)
    assert metrics.psnr(sr, hr, crop) == pytest.approx(expected, abs=1e-9)
    assert metrics.ssim(sr, hr, crop) == pytest.approx(
        structural_similarity(a, b, **SKIMAGE), abs=1e-9
    )


@pytest.mark.parametrize(("height", "width", "crop"), CASES)
def test_rgb_equals_skimage(height, width, crop):
    sr, hr = images(height, width)
    cut = (slice(crop, height - crop), slice(crop, width - crop))
    a, b = sr[cut].astype(np.float64), hr[cut].astype(np.float64)
    assert metrics.psnr(sr, hr, crop, y_channel=False) == pytest.approx(
        peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9
    )
    expected = structural_similarity(a, b, channel_axis=2, **SKIMAGE)
    assert metrics.ssim(sr, hr, crop, y_channel=False) == pytest.approx(expected, abs=1e-9)


def test_float_batch_is_the_mean_over_images():
    pairs = [images(40, 40, noise) for noise in (3, 20)]
    srs, hrs = nchw(*(sr for sr, _ in pairs)), nchw(*(hr for _, hr in pairs))
    for figure in (metrics.psnr, metrics.ssim):
        single = [figure(sr, hr, 4) for sr, hr in pairs]
        assert figure(srs, hrs, 4) == pytest.approx(sum(single) / 2, abs=1e-9)
        assert single[0] > single[1]
        assert figure(srs.float(), hrs.float(), 4) == pytest.approx(sum(single) / 2, abs=1e-5)


def test_uint8_tensors_equal_arrays():
    sr, hr = images(32, 30)
    for figure in (metrics.psnr, metrics.ssim):
        assert figure(torch.from_numpy(sr), torch.from_numpy(hr), 2) == figure(sr, hr, 2)


def test_read_only_and_flipped_arrays():
    sr, hr = images(32, 30)
    expected = metrics.psnr(sr, hr, 2)
    sr.flags.writeable = hr.flags.writeable = False
    assert metrics.psnr(sr, hr, 2) == expected
    assert metrics.psnr(sr[::-1], hr[::-1], 2) == pytest.approx(expected, abs=1e-9)


def test_identical_images():
    _, hr = images(30, 30)
    assert metrics.psnr(hr, hr, 4) == math.inf
    assert metrics.ssim(hr, hr, 4) == pytest.approx(1, abs=1e-12)


def test_known_luma():
    white, black = torch.full((3, 1, 1), 255.0), torch.zeros(3, 1, 1)
    assert metrics.luma(white).item() == pytest.approx(235)
    assert metrics.luma(black).item() == 16
    assert metrics.luma(torch.rand(2, 3, 4, 5)).shape == (2, 1, 4, 5)


def test_one_channel_is_taken_as_it_is():
    sr, hr = images(40, 32)
    a, b = (torch.from_numpy(luma(x, 0))[None, None] / 255 for x in (sr, hr))
    for figure in (metrics.psnr, metrics.ssim):
        assert figure(a, b, 3, y_channel=False) == pytest.approx(figure(sr, hr, 3), abs=1e-9)


@pytest.mark.gpu
def test_on_gpu():
    sr, hr = images(64, 48)
    a, b = nchw(sr), nchw(hr)
    for figure in (metrics.psnr, metrics.ssim):
        assert figure(a.cuda(), b.cuda(), 4) == pytest.approx(figure(a, b, 4), abs=1e-9)


FLOAT, UINT8 = torch.rand(1, 3, 20, 20), np.zeros((20, 20, 3), np.uint8)


@pytest.mark.parametrize(
    ("sr", "hr", "crop", "error", "message"),
    [
        (FLOAT, torch.rand(1, 3, 20, 21), 0, ValueError, r"\[1, 3, 20, 20\].*\[1, 3, 20, 21\]"),
        (FLOAT, FLOAT.double(), 0, TypeError, "float32.*float64"),
        (FLOAT, UINT8, 0, TypeError, "float32.*uint8"),
        (FLOAT, "image.png", 0, TypeError, "str"),
        (FLOAT.long(), FLOAT.long(), 0, TypeError, "int64"),
        (FLOAT[0], FLOAT[0], 0, ValueError, r"\[N, 3, H, W\].*\[3, 20, 20\]"),
        (FLOAT[:, :1], FLOAT[:, :1], 0, ValueError, "y_channel=False"),
        (UINT8[..., 0], UINT8[..., 0], 0, ValueError, r"\[H, W, 3\].*\[20, 20\]"),
        (FLOAT, FLOAT, -1, ValueError, "crop_border.*-1"),
        (FLOAT, FLOAT, 2.0, ValueError, "crop_border.*2.0"),
        (FLOAT, FLOAT, 10, ValueError, "leave 0 x 0"),
    ],
)
@pytest.mark.parametrize("figure", [metrics.psnr, metrics.ssim])
def test_rejects(figure, sr, hr, crop, error, message):
    with pytest.raises(error, match=message):
        figure(sr, hr, crop)


def test_ssim_rejects_less_than_a_window():
    assert metrics.psnr(FLOAT, FLOAT, 5) == math.inf
    with pytest.raises(ValueError, match="leave 10 x 10, at least 11 x 11"):
        metrics.ssim(FLOAT, FLOAT, 5)
