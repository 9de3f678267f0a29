"""Does a test image, or a part of one, stand among the training images? Compared by content.

Local patches at the extrema of a difference-of-Gaussians scale space (Lowe, IJCV 2004) are compared
by correlation, in all eight flips and rotations; pairs of images in which several matches agree on
one scale and position are then laid over each other and correlated pixel by pixel. That finds
copies after cropping, resizing, JPEG compression, flips, quarter turns and changes of brightness
and contrast, whatever the files are called.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .benchmarks import discover, find_pairs
from .data import find_images

__all__ = ["Fingerprint", "Match", "check_images", "find_copies", "fingerprint"]

LONGEST_SIDE = 512  # larger images are reduced first
POINTS_PER_OCTAVE = 40
SIGMAS = [1.6 * 2 ** (i / 3) for i in range(6)]  # of the levels of an octave, in its pixels
PATCH = 8  # samples on a side of a descriptor, 1.5 sigma apart
SIMILAR = 0.9  # correlation of two descriptors that makes a match
CANDIDATES = 4  # best matches of a patch that are looked at
AGREEING = 3  # matches with the same scale and shift that make a pair worth a comparison
HYPOTHESES = 500  # pairs of matches that are tried as an alignment
SAME = 0.85  # correlation of the overlapping pixels, local mean removed, that makes a copy
LEAST_OVERLAP = 24  # pixels a side that are compared, at the coarser of the two resolutions


@dataclass(frozen=True)
class Fingerprint:
    """Descriptors of an image and where they lie."""

    path: str
    descriptors: Tensor
    """`[P, 64]`, mean 0, norm 1, rows of the patch first."""
    points: Tensor
    """`[P, 3]`: y, x and sigma in pixels of `gray`."""
    gray: Tensor
    """`[H, W]` in [0, 1], at most 512 pixels a side."""


@dataclass(frozen=True)
class Match:
    """A training image that shows what a test image shows."""

    train: str
    test: str
    correlation: float
    """Of the overlapping pixels after removing the local mean."""
    scale: float
    """Pixels of the training image per pixel of the test image."""


def fingerprint(source: str | os.PathLike | Image.Image) -> Fingerprint:
    """Descriptors of an image file or PIL image.

    Raises:
        OSError: The file is not a readable image.
    """
    if not isinstance(source, Image.Image):
        with Image.open(source) as image:
            return dataclasses.replace(fingerprint(image), path=os.fspath(source))
    image = source.convert("L")
    ratio = max(1.0, max(image.size) / LONGEST_SIDE)
    if ratio > 1:
        size = [max(1, round(side / ratio)) for side in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS)
    gray = torch.from_numpy(np.asarray(image, np.float32) / 255)
    descriptors, points = _describe(gray)
    return Fingerprint("", descriptors, points, gray)


def check_images(
    data: Sequence[str | os.PathLike],
    benchmark: str | os.PathLike,
    *,
    strict: bool = False,
    progress: Callable[[Sequence], Sequence] = lambda x: x,
) -> tuple[list[Match], int, int]:
    """Copies of benchmark images among training images, and how many of both were compared.

    Args:
        data: Training folders, as for `train`.
        benchmark: Folder of sets, or one set, as for `efrdn eval`.
        strict: Raise on an unreadable training image instead of leaving it out with a warning.
        progress: Wraps the loops, such as `tqdm`.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: No training image is readable, or `strict` and one is not.
        OSError: A benchmark image is unreadable.
    """
    tests = [pair.hr for image_set in discover(benchmark) for pair in find_pairs(image_set, 4)]
    train = []
    for path in progress(find_images(data)):
        try:
            train.append(fingerprint(path))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if strict:
                raise ValueError(f"training image {path} is unreadable: {error}") from error
            warnings.warn(f"training image {path} is unreadable and left out: {error}")
    if not train:
        raise ValueError(f"no training image below {', '.join(map(str, data))} can be read")
    matches = find_copies(train, [fingerprint(path) for path in tests], progress)
    return matches, len(train), len(tests)


def _blur(x: Tensor, sigma: float) -> Tensor:
    radius = min(int(3 * sigma + 1), min(x.shape[-2:]) - 1)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), "reflect"), taps[None, None, None])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), "reflect"), taps[None, None, :, None])


def _describe(gray: Tensor) -> tuple[Tensor, Tensor]:
    base, zoom = gray[None, None], 1.0
    descriptors, points = [torch.zeros(0, PATCH * PATCH)], [torch.zeros(0, 3)]
    while min(base.shape[-2:]) >= 20:
        levels = torch.cat(
            [_blur(base, (sigma**2 - 0.5**2) ** 0.5) for sigma in SIGMAS], dim=1
        )  # [1, 6, H, W]; the base is taken to be blurred by 0.5 already
        found = _extrema(levels[0])
        if len(found):
            sigma = torch.tensor(SIGMAS)[found[:, 0]]
            patches = _sample(levels[0], found, sigma)
            points.append(torch.stack((found[:, 1], found[:, 2], sigma), dim=1) * zoom)
            descriptors.append(patches)
        base, zoom = levels[:, 3:4, ::2, ::2], zoom * 2
    return torch.cat(descriptors), torch.cat(points)


def _extrema(levels: Tensor) -> Tensor:
    """Strongest extrema `[P, 3]` (level, y, x) of the differences of neighbouring `levels`."""
    dog = (levels[1:] - levels[:-1])[None, None]  # [1, 1, 5, H, W]
    strength = dog.abs()
    peak = (strength == F.max_pool3d(strength, 3, 1, 1)) & (strength > 0.005)
    peak[:, :, [0, -1]] = False
    level, y, x = peak[0, 0].nonzero(as_tuple=True)
    # A descriptor reaches 5.25 sigma from its middle.
    margin = 5.25 * torch.tensor(SIGMAS)[level]
    height, width = levels.shape[-2:]
    inside = (torch.minimum(y, height - 1 - y) >= margin) & (
        torch.minimum(x, width - 1 - x) >= margin
    )
    order = strength[0, 0, level, y, x].where(inside, -1).argsort(descending=True, stable=True)
    order = order[: min(POINTS_PER_OCTAVE, int(inside.sum()))]
    return torch.stack((level[order], y[order], x[order]), dim=1)


def _sample(levels: Tensor, points: Tensor, sigma: Tensor) -> Tensor:
    height, width = levels.shape[-2:]
    steps = (torch.arange(PATCH) - (PATCH - 1) / 2) * 1.5
    y = points[:, 1, None, None] + steps[:, None] * sigma[:, None, None]
    x = points[:, 2, None, None] + steps * sigma[:, None, None]
    shape = (len(points), PATCH, PATCH)
    # [1, P * 8, 8, 2] in [-1, 1]; all levels are sampled and each point keeps its own.
    y, x = y.expand(shape) * 2 / (height - 1) - 1, x.expand(shape) * 2 / (width - 1) - 1
    grid = torch.stack((x, y), dim=-1).reshape(1, -1, PATCH, 2)
    values = F.grid_sample(levels[None], grid, align_corners=True)[0].view(len(levels), *shape)
    patches = values[points[:, 0], torch.arange(len(points))].flatten(1)
    patches = patches - patches.mean(dim=1, keepdim=True)
    return F.normalize(patches, dim=1)


def find_copies(
    train: Sequence[Fingerprint],
    test: Sequence[Fingerprint],
    progress: Callable[[Sequence[Fingerprint]], Sequence[Fingerprint]] = lambda x: x,
) -> list[Match]:
    """Pairs of a training and a test image that share content, best first.

    Args:
        train, test: From `fingerprint`.
        progress: Wraps the loop over `test`, such as `tqdm`.
    """
    owner = torch.cat([torch.full((len(f.points),), i) for i, f in enumerate(train)])
    descriptors = torch.cat([f.descriptors for f in train])
    points = torch.cat([f.points for f in train])
    found = []
    for image in progress(test):
        best: dict[int, Match] = {}
        for turns, mirror in ((t, m) for t in range(4) for m in (False, True)):
            view = _turned(image, turns, mirror)
            for i, scale, shift in _aligned(view, owner, descriptors, points):
                correlation = _overlap(train[i].gray, view.gray, scale, shift)
                if correlation > max(SAME, best[i].correlation if i in best else 0):
                    best[i] = Match(train[i].path, image.path, correlation, scale)
        found += best.values()
    return sorted(found, key=lambda match: -match.correlation)


def _turned(image: Fingerprint, turns: int, mirror: bool) -> Fingerprint:
    """The fingerprint of the image mirrored left to right, then turned `turns` quarters."""

    def turn(x: Tensor) -> Tensor:
        return torch.rot90(x.flip(-1) if mirror else x, turns, (-2, -1))

    y, x, sigma = image.points.unbind(1)
    height, width = image.gray.shape
    x = width - 1 - x if mirror else x
    for _ in range(turns):
        y, x, height, width = width - 1 - x, y, width, height
    patches = turn(image.descriptors.view(-1, PATCH, PATCH)).flatten(1)
    return Fingerprint(image.path, patches, torch.stack((y, x, sigma), dim=1), turn(image.gray))


def _aligned(
    view: Fingerprint, owner: Tensor, descriptors: Tensor, points: Tensor
) -> list[tuple[int, float, Tensor]]:
    """(training image, scale, shift `[2]`) wherever several matches agree."""
    if not len(view.points) or not len(points):
        return []
    values, index = (view.descriptors @ descriptors.T).topk(min(CANDIDATES, len(points)), dim=1)
    row, column = (values > SIMILAR).nonzero(as_tuple=True)
    mine, theirs = view.points[row], points[index[row, column]]
    owners = owner[index[row, column]]
    result = []
    for i in owners.unique().tolist():
        a, b = mine[owners == i], theirs[owners == i]
        if len(a) < AGREEING:
            continue
        agree = _consensus(a, b)
        if agree is not None:
            result.append((i, *_fit(a[agree, :2], b[agree, :2])))
    return result


def _consensus(a: Tensor, b: Tensor) -> Tensor | None:
    """Mask of the largest set of matches `[M, 3]` that one scale and shift explain, or None."""
    distance = torch.cdist(a[:, :2], a[:, :2])
    scales = torch.cdist(b[:, :2], b[:, :2]) / distance.clamp(min=1e-6)
    # Any two matches give a scale and a shift; it must fit the sizes of the first one's patches.
    expected = (b[:, 2] / a[:, 2])[:, None]
    first, second = (
        ((distance > 8) & ((scales / expected).log2().abs() < 0.5)).nonzero()[:HYPOTHESES].unbind(1)
    )
    if not len(first):
        return None
    scale = scales[first, second][:, None]  # [K, 1]
    shift = b[first, :2] - scale * a[first, :2]  # [K, 2]
    error = (b[:, :2] - scale[..., None] * a[:, :2] - shift[:, None]).norm(dim=2)  # [K, M]
    agree = error < 1.5 * torch.maximum(b[:, 2], scale * a[:, 2])
    agree = agree[agree.sum(dim=1).argmax()]
    # Repeated detections of one spot count once.
    spots = (a[agree, :2] / 4).round().unique(dim=0)
    return agree if len(spots) >= AGREEING else None


def _fit(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
    """Least-squares scale and shift with `b = scale a + shift`."""
    middle_a, middle_b = a.mean(dim=0), b.mean(dim=0)
    spread = (a - middle_a).square().sum().clamp(min=1e-6)
    scale = ((a - middle_a) * (b - middle_b)).sum() / spread
    return float(scale), middle_b - scale * middle_a


def _overlap(train: Tensor, test: Tensor, scale: float, shift: Tensor) -> float:
    """Correlation of both images where they overlap; -1 where that is too little to tell."""
    if not 1 / 16 < scale < 16:
        return -1.0
    # Samples one pixel of the coarser image apart, in coordinates of the test image.
    step = max(1.0, 1 / scale)
    low = ((-shift) / scale).clamp(min=0)
    high = torch.minimum(
        (torch.tensor(train.shape) - 1 - shift) / scale, torch.tensor(test.shape) - 1.0
    )
    count = ((high - low) / step).floor().long() + 1
    if int(count.min()) < LEAST_OVERLAP:
        return -1.0
    y, x = (low[d] + torch.arange(int(count[d])) * step for d in (0, 1))
    a = _at(_blur(test[None, None], 0.6 * step), y, x)
    y, x = y * scale + shift[0], x * scale + shift[1]
    b = _at(_blur(train[None, None], 0.6 * step * scale), y, x)
    a, b = (m - _blur(m, 4) for m in (a, b))
    # The fitted position may be off by a pixel or two: the best of all such moves counts.
    inner, best = a[..., 2:-2, 2:-2], -1.0
    for dy in range(5):
        for dx in range(5):
            moved = b[..., dy : dy + inner.shape[-2], dx : dx + inner.shape[-1]]
            best = max(best, float(F.cosine_similarity(inner.flatten(), moved.flatten(), dim=0)))
    return best


def _at(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    y, x = y * 2 / (height - 1) - 1, x * 2 / (width - 1) - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    return F.grid_sample(image, grid, align_corners=True, padding_mode="border")
