"""Evaluation as papers do it: uint8 RGB in and out, Y compared, and the data checked first.

Bicubic figures come before any other: a set whose bicubic row is wrong holds other images, or LR
files of another resizer, and no figure measured on it could be compared with a published one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint, metrics
from .benchmarks import ImageSet, Pair, find_pairs, load_pair, reduce
from .device import resolve_device
from .distributed import World
from .errors import UsageError
from .model import EFRDN
from .resize import imresize
from .tables import bicubic_rows, paper_tables
from .upscaler import Upscaler, fast_form, prepare

__all__ = [
    "Check",
    "ImageResult",
    "Network",
    "Score",
    "SelfEnsemble",
    "SetResult",
    "bicubic_y",
    "evaluate_set",
    "load_network",
]

# A measured row is met to its printed digits. Published rows are of the older protocol (all on Y,
# rounded once), which is then followed: that leaves their rounding and, in gray files, the range
# of Y; 0.007 dB / 0.0008 at most on Set5, Set14 and BSD100.
MEASURED_TOLERANCE = (0.005, 0.0001)
PUBLISHED_TOLERANCE = (0.02, 0.001)


@dataclass
class Score:
    """PSNR in dB and SSIM."""

    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.3f} / {self.ssim:.4f}"


@dataclass
class ImageResult:
    """What was measured on one image."""

    name: str
    lr_size: tuple[int, int]
    """Width, height."""
    lr_source: str
    """"file", or "computed" from HR."""
    lr_sha256: str
    """Of the file, or of the computed pixels (raw RGB bytes)."""
    lr_is_matlab_bicubic: bool
    """LR equals `imresize` of HR, pixel for pixel."""
    bicubic: Score
    model: Score | None = None
    seconds: float | None = None
    """Time of the network on this image, from uint8 LR to uint8 SR."""
    tile: int | None = None
    """Edge of the tiles the network really ran in, 0 for the whole image."""
    dtype: str | None = None
    """Precision it really ran in."""


@dataclass
class Check:
    """What the bicubic figures of a set were compared with."""

    against: str
    """"measured", "published" or "none"."""
    expected: Score | None = None
    obtained: Score | None = None
    note: str = ""


@dataclass
class SetResult:
    """Figures of one set at one scale."""

    name: str
    scale: int
    check: Check
    whole: bool = True
    """False when only the first images were asked for."""
    images: list[ImageResult] = field(default_factory=list)

    @property
    def bicubic(self) -> Score:
        """Mean over the images."""
        return _mean([image.bicubic for image in self.images])

    @property
    def model(self) -> Score | None:
        """Mean over the images; None when no network was run."""
        scores = [image.model for image in self.images if image.model is not None]
        return _mean(scores) if scores else None


@dataclass(frozen=True)
class Network:
    """Weights with their record, and what runs them."""

    source: str
    """As it was asked for: "x4" or a path."""
    sha256: str
    """Of the checkpoint file."""
    config: dict
    training: dict
    upscaler: Upscaler


def load_network(
    source: str | os.PathLike,
    scale: int,
    *,
    segment_tokens: int | None = None,
    self_ensemble: bool = False,
    tile: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    backend: str = "auto",
) -> Network:
    """A checkpoint made ready for evaluation; arguments as for `Upscaler` and `EFRDN`.

    Raises:
        FileNotFoundError, ValueError: No such checkpoint, or a damaged one.
        UsageError: One for another scale; no such device here.
        BackendUnavailable: `backend` cannot run here.
    """
    path = checkpoint.resolve(source)
    stored = checkpoint.load(path)
    if stored.config["scale"] != scale:
        raise UsageError(f"{source} upscales by {stored.config['scale']}, not by {scale}")
    overrides = {"segment_tokens": segment_tokens} if segment_tokens else {}
    where = resolve_device(device)
    net = fast_form(prepare(EFRDN.from_pretrained(path, **overrides), where), where, backend)
    config = net.config.to_dict()
    net = SelfEnsemble(net) if self_ensemble else net
    upscaler = Upscaler(scale, net, tile=tile, dtype=dtype, backend=backend)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Network(os.fspath(source), digest, config, stored.training, upscaler)


def evaluate_set(
    image_set: ImageSet,
    scale: int,
    upscaler: Upscaler | None = None,
    *,
    limit: int | None = None,
    check: bool = True,
    progress: bool = False,
    here: World | None = None,
) -> SetResult:
    """Bicubic figures of a set, their check, then those of a network.

    Args:
        image_set: From `benchmarks.discover`.
        scale: 2, 3 or 4.
        upscaler: Network to measure; None: bicubic only.
        limit: The first images only.
        check: Refuse data whose bicubic figures are not those of the set.
        progress: Bars on standard error.
        here: This process among those that share the images; all return the whole result.

    Raises:
        FileNotFoundError, ValueError: A file is missing, damaged or of the wrong size; or the
            set's bicubic row is not met.
    """
    every = find_pairs(image_set, scale)
    pairs = every[:limit]
    nothing = Check("none", note="not asked for")
    result = SetResult(image_set.name, scale, nothing, whole=len(pairs) == len(every))
    here = here or World()
    mine = here.shard(pairs)
    older: list[Score] | None = None
    if check and result.whole and _is_published_only(image_set.name):
        older = []
    for pair in _bar(mine, f"{image_set.name} x{scale} bicubic", progress):
        lr, hr = load_pair(pair, scale)
        result.images.append(_bicubic(pair, lr, hr, scale))
        if older is not None:
            older.append(bicubic_y(hr, scale, gray=_is_gray_file(pair)))
    result.images = here.merge(result.images)
    if check:
        result.check = _check(image_set, result, None if older is None else here.merge(older))
    if upscaler is not None:
        bar = _bar(mine, f"{image_set.name} x{scale} network", progress)
        for pair, image in zip(bar, images := here.shard(result.images), strict=True):
            lr, hr = load_pair(pair, scale)
            start = time.perf_counter()
            sr = upscaler.array(lr)
            image.seconds = time.perf_counter() - start
            image.tile, image.dtype = upscaler.outcome.tile, upscaler.outcome.dtype
            image.model = _score(sr, hr, scale, pair)
        result.images = here.merge(images)
    return result


class SelfEnsemble(nn.Module):
    """A network as the mean over the eight flips and rotations of its input."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.config, self.scale = net.config, net.scale

    def forward(self, x: Tensor) -> Tensor:
        return sum(self._turned(x, turns, mirror) for turns in range(4) for mirror in (0, 1)) / 8

    def _turned(self, x: Tensor, turns: int, mirror: int) -> Tensor:
        y = self.net(torch.rot90(x.flip(3) if mirror else x, turns, (2, 3)))
        y = torch.rot90(y, -turns, (2, 3))
        return y.flip(3) if mirror else y


def bicubic_y(hr: np.ndarray, scale: int, gray: bool = False) -> Score:
    """Bicubic figures by the older protocol of the published rows, from HR alone.

    HR becomes uint8 Y (a gray file is taken as Y), is reduced and enlarged without rounding, and
    the result is rounded to uint8.
    """
    x = torch.from_numpy(hr).permute(2, 0, 1)[None].double()
    y = x[:, :1] if gray else (metrics.luma(x) + 0.5).floor()
    sr = imresize(imresize(y, 1 / scale), scale)
    sr = (sr + 0.5).floor().clamp(0, 255)
    figures = (f(sr / 255, y / 255, scale, y_channel=False) for f in (metrics.psnr, metrics.ssim))
    return Score(*figures)


def _bicubic(pair: Pair, lr: np.ndarray, hr: np.ndarray, scale: int) -> ImageResult:
    sr = imresize(torch.from_numpy(lr).permute(2, 0, 1), scale).permute(1, 2, 0).numpy()
    data = lr.tobytes() if pair.lr is None else pair.lr.read_bytes()
    return ImageResult(
        name=pair.name,
        lr_size=(lr.shape[1], lr.shape[0]),
        lr_source="computed" if pair.lr is None else "file",
        lr_sha256=hashlib.sha256(data).hexdigest(),
        lr_is_matlab_bicubic=pair.lr is None or np.array_equal(lr, reduce(hr, scale)),
        bicubic=_score(sr, hr, scale, pair),
    )


def _score(sr: np.ndarray, hr: np.ndarray, scale: int, pair: Pair) -> Score:
    try:
        return Score(metrics.psnr(sr, hr, scale), metrics.ssim(sr, hr, scale))
    except ValueError as error:
        raise ValueError(f"{pair.hr}: {error}") from error


def _is_gray_file(pair: Pair) -> bool:
    with Image.open(pair.hr) as image:
        return image.mode in ("1", "L", "LA")


def _is_published_only(name: str) -> bool:
    return name not in bicubic_rows() and name in paper_tables()["bicubic_published"]


def _check(image_set: ImageSet, result: SetResult, older: list[Score] | None) -> Check:
    """Compare with the measured row, else the published one.

    Raises:
        ValueError: They differ; the message names the row, both figures and a probable cause.
    """
    name, key = result.name, f"x{result.scale}"
    if name in bicubic_rows():
        row = bicubic_rows()[name][key]
        expected, note = Score(*row["rgb"]), ""
        if not result.whole:
            known = [row["images"].get(image.name) for image in result.images]
            if None in known:
                return Check("none", note="unknown image names in a part of the set")
            expected = _mean([Score(*figures) for figures in known])
            note = f"first {len(known)} images"
        found = Check("measured", expected, result.bicubic, note)
        tolerance = MEASURED_TOLERANCE
    elif older is None:
        known = _is_published_only(name)
        return Check("none", note="only part of the set" if known else "no known row")
    else:
        published = paper_tables()["bicubic_published"][name][key]
        found = Check("published", Score(*map(float, published)), _mean(older), "older protocol")
        tolerance = PUBLISHED_TOLERANCE
    if not _within(found, tolerance):
        raise ValueError(_refusal(image_set, result, found, tolerance))
    return found


def _within(check: Check, tolerance: tuple[float, float]) -> bool:
    # A figure of NaN must not pass.
    return (
        abs(check.obtained.psnr - check.expected.psnr) <= tolerance[0]
        and abs(check.obtained.ssim - check.expected.ssim) <= tolerance[1]
    )


def _refusal(
    image_set: ImageSet, result: SetResult, check: Check, tolerance: tuple[float, float]
) -> str:
    images = result.images
    foreign = [image.name for image in images if not image.lr_is_matlab_bicubic]
    if foreign:
        cause = (
            f"{len(foreign)} of {len(images)} LR files ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}) are not MATLAB's bicubic of their HR: "
            "made by another resizer, or of other images"
        )
    else:
        cause = "LR fits HR, so the HR images are not those of the set, or not all of them"
        rows = bicubic_rows().get(result.name, {}).get(f"x{result.scale}", {}).get("images", {})
        if rows and rows.keys() != {image.name for image in images} and not check.note:
            cause += f" ({len(images)} images here, {len(rows)} expected)"
        off = [i.name for i in images if abs(i.bicubic.psnr - rows.get(i.name, [0])[0]) > 0.005]
        if rows and off:
            cause += f"; first that differs: {off[0]}"
    return (
        f"{result.name} x{result.scale} in {image_set.folder}: bicubic gives {check.obtained}, "
        f"{check.against} {check.expected} (tolerance {tolerance[0]} dB / {tolerance[1]}). "
        f"Probable cause: {cause}. --no-check goes on without comparing"
    )


def _mean(scores: Sequence[Score]) -> Score:
    return Score(
        float(np.mean([score.psnr for score in scores])),
        float(np.mean([score.ssim for score in scores])),
    )


def _bar(pairs: Sequence[Pair], title: str, progress: bool):
    return tqdm(pairs, desc=title, unit="image", leave=False, disable=None if progress else True)
