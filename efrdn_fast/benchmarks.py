"""Benchmark folders: which sets are there, which LR belongs to which HR, and their pixels.

Layout: `<set>/HR/<name>.png` and `<set>/LR_bicubic/X<s>/<name>x<s>.png`; sets without LR files for
a scale, and folders that hold nothing but images, get their LR computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import images
from .data import SUFFIXES
from .resize import imresize

__all__ = ["PAPER_SETS", "ImageSet", "Pair", "discover", "find_pairs", "load_pair", "read_rgb"]

# The paper's name of a set -> folder names it goes by.
PAPER_SETS = {
    "Set5": ("Set5",),
    "Set14": ("Set14",),
    "BSD100": ("B100", "BSD100", "BSDS100"),
    "Urban100": ("Urban100",),
    "Manga109": ("Manga109",),
}
LEAST_LR = 3  # pixels, as the network


@dataclass(frozen=True)
class ImageSet:
    """One folder of a benchmark."""

    name: str
    """The paper's name where it has one ("BSD100"), else the folder's."""
    folder: Path


@dataclass(frozen=True)
class Pair:
    """One image of a set at one scale."""

    name: str
    hr: Path
    lr: Path | None
    """None: to be computed from HR."""


def discover(root: str | os.PathLike, names: Sequence[str] | None = None) -> list[ImageSet]:
    """The sets below `root` (or `root` itself), the paper's first; `names` selects some.

    Args:
        root: A folder of sets, or one set.
        names: Set or folder names, in the order wanted, such as "Set5", "BSD100", "my_photos".

    Raises:
        FileNotFoundError: `root` does not exist, holds no set, or a named set is not there.
        ValueError: Two folders go by the same name.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"benchmark folder {str(root)!r} does not exist")
    folders = [] if (root / "HR").is_dir() else sorted(p for p in root.iterdir() if _is_set(p))
    if not folders and _is_set(root):
        folders = [root]
    if not folders:
        raise FileNotFoundError(
            f"no benchmark set in {str(root)!r}: expected <set>/HR/<name>.png, with "
            "<set>/LR_bicubic/X<s>/<name>x<s>.png where LR files exist"
        )
    sets: dict[str, ImageSet] = {}
    for folder in folders:
        name = _paper_name(folder.name)
        if name in sets:
            raise ValueError(f"{sets[name].folder} and {folder} are both {name}; keep one of them")
        sets[name] = ImageSet(name, folder)
    if names is None:
        first = [name for name in PAPER_SETS if name in sets]
        return [sets[name] for name in [*first, *sorted(sets.keys() - set(first))]]
    missing = [name for name in names if _paper_name(name) not in sets]
    if missing:
        raise FileNotFoundError(
            f"no set {', '.join(missing)} in {str(root)!r}; it has {', '.join(sets)}"
        )
    return [sets[name] for name in dict.fromkeys(map(_paper_name, names))]


def _paper_name(folder: str) -> str:
    for name, aliases in PAPER_SETS.items():
        if folder.lower() in (alias.lower() for alias in aliases):
            return name
    return folder


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def _is_set(folder: Path) -> bool:
    return (folder / "HR").is_dir() or bool(_images(folder))


def find_pairs(image_set: ImageSet, scale: int) -> list[Pair]:
    """The images of a set at `scale`, sorted by name.

    A set without a folder `LR_bicubic/X<scale>` has `lr=None` throughout.

    Raises:
        FileNotFoundError: The set is empty, or an HR image has no LR file while others have.
        ValueError: Two files share a name.
    """
    hr_folder = image_set.folder / "HR"
    if not hr_folder.is_dir():
        hr_folder = image_set.folder
    files = _images(hr_folder)
    if not files:
        raise FileNotFoundError(
            f"{image_set.name}: no image ({', '.join(SUFFIXES)}) in {hr_folder}"
        )
    by_name = {file.stem: file for file in files}
    if len(by_name) < len(files):
        twin = next(file for file in files if by_name[file.stem] != file)
        raise ValueError(
            f"{twin} and {by_name[twin.stem]} are both {twin.stem!r}; keep one of them"
        )
    lr_folder = image_set.folder / "LR_bicubic" / f"X{scale}"
    lr_files = {file.stem: file for file in _images(lr_folder)}
    pairs = []
    for name, hr in by_name.items():
        lr = lr_files.get(f"{name}x{scale}")
        if lr is None and lr_folder.is_dir():
            raise FileNotFoundError(
                f"{lr_folder / f'{name}x{scale}.png'} is missing: LR image of {hr} "
                f"(without the folder X{scale} all LR images are computed)"
            )
        pairs.append(Pair(name, hr, lr))
    return pairs


def load_pair(pair: Pair, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """LR `[h, w, 3]` and HR `[scale h, scale w, 3]`, uint8; HR is cropped at right and bottom.

    Raises:
        ValueError: A file is no 8-bit RGB or gray image, too small, or LR does not fit HR.
    """
    hr = read_rgb(pair.hr)
    h, w = hr.shape[0] // scale, hr.shape[1] // scale
    if min(h, w) < LEAST_LR:
        raise ValueError(
            f"{pair.hr}: {hr.shape[1]}x{hr.shape[0]} pixels are too few for x{scale}, "
            f"at least {LEAST_LR * scale} each way are needed"
        )
    hr = np.ascontiguousarray(hr[: h * scale, : w * scale])
    if pair.lr is None:
        return reduce(hr, scale), hr
    lr = read_rgb(pair.lr)
    if lr.shape[:2] != (h, w):
        raise ValueError(
            f"{pair.lr}: {lr.shape[1]}x{lr.shape[0]} pixels, but {pair.hr} at x{scale} "
            f"needs {w}x{h}"
        )
    return lr, hr


def reduce(hr: np.ndarray, scale: int) -> np.ndarray:
    """The published way from HR to LR: MATLAB bicubic by 1 / scale, `[H, W, 3]` uint8."""
    lr = imresize(torch.from_numpy(hr).permute(2, 0, 1), 1 / scale)
    return lr.permute(1, 2, 0).contiguous().numpy()


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """8-bit RGB pixels `[H, W, 3]`; gray files get three equal channels.

    Raises:
        OSError, ValueError: The file is missing, damaged, transparent or not of 8 bits.
    """
    pixels = images.read(path).pixels
    problem = None
    if pixels.dtype != np.uint8:
        problem = "16 bits for a channel"
    elif pixels.shape[2] in (2, 4) and pixels[..., -1].min() < 255:
        problem = "transparent pixels"
    if problem:
        raise ValueError(f"{path}: {problem}; 8-bit RGB or gray is needed here")
    colours = 1 if pixels.shape[2] < 3 else 3
    return np.array(np.broadcast_to(pixels[..., :colours], (*pixels.shape[:2], 3)))
