"""Pictures in one HTML page with a slider between them; the page needs nothing else."""

from __future__ import annotations

import base64
import html
import json
import os
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
import torch

from . import images, metrics
from .encode import encode
from .metadata import Metadata
from .resize import imresize

__all__ = ["page"]


def page(
    lr_path: str | os.PathLike,
    sr_path: str | os.PathLike,
    hr_path: str | os.PathLike | None = None,
    title: str | None = None,
) -> str:
    """The page's text: LR enlarged bicubically to the size of SR, SR, and HR where it is given.

    Pictures of more than 8 bits are shown with 8; clear pixels show the page behind them. With an
    8-bit HR of the same size the notes are PSNR and SSIM on Y, the border of a scale cut.

    Raises:
        ValueError, OSError: A picture cannot be read, or the sizes do not belong together.
    """
    (lr, lr_icc), (sr, sr_icc) = (_read(path) for path in (lr_path, sr_path))
    scale = sr.shape[0] // lr.shape[0]
    if scale < 1 or sr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
        raise ValueError(
            f"{sr_path} ({_size(sr)} px) is no whole multiple of {lr_path} ({_size(lr)} px)"
        )
    planes = torch.tensor(lr).permute(2, 0, 1)
    large = imresize(planes, scale).permute(1, 2, 0).numpy() if scale > 1 else lr
    shown = {"LR, bicubic": large, "SR": sr}
    notes, profiles = dict.fromkeys(shown, ""), dict(zip(shown, (lr_icc, sr_icc), strict=True))
    if hr_path is not None:
        hr, profiles["HR"] = _read(hr_path)
        hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]  # as LR was made
        if hr.shape[:2] != sr.shape[:2]:
            raise ValueError(f"{hr_path} ({_size(hr)} px) is not of the size of {sr_path}")
        notes = {name: _note(pixels, hr, scale) for name, pixels in shown.items()}
        shown["HR"], notes["HR"] = hr, ""
    pictures = [
        {
            "name": name,
            "note": notes[name],
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "data": f"data:image/png;base64,{_png(pixels, profiles[name])}",
        }
        for name, pixels in shown.items()
    ]
    template = resources.files(__package__).joinpath("data/compare.html").read_text("utf-8")
    return Template(template).substitute(
        title=html.escape(title or Path(sr_path).name),
        pictures=json.dumps(pictures).replace("<", "\\u003c"),
    )


def _note(pixels: np.ndarray, hr: np.ndarray, scale: int) -> str:
    """PSNR and SSIM in words; empty where they are not defined."""
    colours = [p[..., :1].repeat(3, axis=2) if p.shape[2] < 3 else p[..., :3] for p in (pixels, hr)]
    if min(hr.shape[:2]) < 2 * scale + 11:
        return ""
    psnr, ssim = (measure(*colours, scale) for measure in (metrics.psnr, metrics.ssim))
    return f"{psnr:.2f} dB / {ssim:.4f}"


def _read(path: str | os.PathLike) -> tuple[np.ndarray, bytes]:
    """Pixels of 8 bits, and the profile without which their colours would be others."""
    picture = images.read(path)
    return _eight_bits(picture.pixels), picture.metadata.icc


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    most = 65535 if pixels.dtype == np.uint16 else 1
    return (pixels.astype(np.float32) * (255 / most)).round().astype(np.uint8)


def _png(pixels: np.ndarray, icc: bytes) -> str:
    return base64.b64encode(encode(pixels, Metadata(icc=icc), "PNG")).decode()


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
