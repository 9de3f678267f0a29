"""Training data: HR images decoded once into a memory map, patches as a function of the sample.

A sample is drawn from `(seed, step, index)` alone, so resuming or changing the number of workers
changes nothing. LR images are whole-image bicubic reductions of the cropped HR, kept beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .resize import imresize

__all__ = [
    "VALIDATION_IMAGES",
    "ImageCache",
    "Patches",
    "build_cache",
    "find_images",
    "loader",
    "split_validation",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
DIV2K_VALIDATION = range(801, 901)
# Set aside for validation whenever they are among the images (stem with its folder).
VALIDATION_IMAGES = frozenset(
    """
    BSDS500_test/100007 BSDS500_test/107045 BSDS500_test/118031 BSDS500_test/147080
    BSDS500_test/168084 BSDS500_test/196062 BSDS500_test/2018 BSDS500_test/226043
    BSDS500_test/249021 BSDS500_test/306051 General100/im_007 General100/im_021
    General100/im_042 General100/im_064 General100/im_088 photos/005_0 photos/013_0
    photos/024_0 photos/034_0 photos/048_0
    """.split()  # noqa: SIM905 - one name per line would fill the page
)
_CACHE_VERSION = 1


def find_images(folders: Sequence[str | os.PathLike]) -> list[Path]:
    """All image files below `folders`, sorted by path.

    Raises:
        FileNotFoundError: A folder does not exist or none holds an image.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"training folder {str(folder)!r} does not exist")
        found += sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"no image ({', '.join(SUFFIXES)}) below {', '.join(map(str, folders))}"
        )
    return found


def split_validation(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Training and validation images: DIV2K 801-900, a fixed list, or else every 20th."""

    def held_out(path: Path) -> bool:
        in_div2k = "DIV2K" in str(path.parent) and path.stem.isdigit()
        return (in_div2k and int(path.stem) in DIV2K_VALIDATION) or (
            f"{path.parent.name}/{path.stem}" in VALIDATION_IMAGES
        )

    val = [p for p in images if held_out(p)]
    if not val and len(images) > 1:
        val = list(images[:: max(2, min(20, len(images) // 2))])[:20]
    taken = set(val)
    return [p for p in images if p not in taken], val


class ImageCache:
    """Decoded uint8 RGB images of one cache folder: `hr(i)`, `lr(i)` are views of memory maps."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text())
        self.scale: int = index["scale"]
        self.images: list[dict] = index["images"]
        self.skipped: list[dict] = index["skipped"]
        self._maps: dict[str, np.memmap] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}  # a worker opens its own maps

    def _view(self, kind: str, i: int) -> np.ndarray:
        if kind not in self._maps:
            self._maps[kind] = np.memmap(self.folder / f"{kind}.bin", np.uint8, mode="r")
        entry = self.images[i]
        h, w = entry["lr_size"]
        factor = self.scale if kind == "hr" else 1
        shape = (h * factor, w * factor, 3)
        start = entry[f"{kind}_offset"]
        return self._maps[kind][start : start + h * w * factor**2 * 3].reshape(shape)

    def hr(self, i: int) -> np.ndarray:
        """HR image cropped to multiples of the scale, `[scale h, scale w, 3]`."""
        return self._view("hr", i)

    def lr(self, i: int) -> np.ndarray:
        """Its bicubic reduction, `[h, w, 3]`."""
        return self._view("lr", i)


def build_cache(
    images: Sequence[Path],
    scale: int,
    cache_dir: str | os.PathLike,
    *,
    strict: bool = False,
    quiet: bool = False,
) -> ImageCache:
    """Decode `images` once (later calls reuse the result) and reduce them by `scale`.

    An image that is unreadable or smaller than three LR pixels is left out, with a warning in
    every call.

    Args:
        images: HR image files.
        scale: 2, 3 or 4.
        cache_dir: Folder that holds all caches; one sub-folder for every set of files and scale.
        strict: Raise on such an image instead.
        quiet: Do not warn, as another process does.

    Raises:
        ValueError: `strict` and an image cannot be used, or none can.
        OSError: The cache cannot be written (no half-written cache stays).
    """
    stamps = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in images]
    key = hashlib.sha256(json.dumps([_CACHE_VERSION, scale, stamps]).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"x{scale}-{key}"
    if not (folder / "index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            _decode_all(images, scale, part, strict)
            if folder.exists():  # another process was faster
                shutil.rmtree(part)
            else:
                part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    cache = ImageCache(folder)
    for entry in cache.skipped:
        if strict:
            raise ValueError(
                f"image {entry['path']} cannot be used: {entry['reason']} (so says {folder}; "
                "remove it to look again)"
            )
        if not quiet:
            warnings.warn(f"image {entry['path']} is left out: {entry['reason']}")
    return cache


def _decode(path: Path, scale: int) -> np.ndarray:
    """RGB pixels of an image, cropped to multiples of `scale`; or ValueError says why not."""
    try:
        with Image.open(path) as image:
            hr = np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"unreadable: {error}") from error
    h, w = hr.shape[0] // scale, hr.shape[1] // scale
    if min(h, w) < 3:
        raise ValueError(f"smaller than {3 * scale} pixels")
    return np.ascontiguousarray(hr[: h * scale, : w * scale])


def _decode_all(images: Sequence[Path], scale: int, folder: Path, strict: bool) -> None:
    entries, skipped, offsets = [], [], {"hr": 0, "lr": 0}
    with open(folder / "hr.bin", "wb") as hr_file, open(folder / "lr.bin", "wb") as lr_file:
        for path in tqdm(images, desc="decoding", unit="image", disable=None):
            try:
                hr = _decode(path, scale)
            except ValueError as error:
                if strict:
                    raise ValueError(f"image {path} cannot be used: {error}") from error
                skipped.append({"path": str(path), "reason": str(error)})
                continue
            lr = imresize(torch.from_numpy(hr).permute(2, 0, 1), 1 / scale).permute(1, 2, 0).numpy()
            entries.append(
                {
                    "path": str(path),
                    "lr_size": list(lr.shape[:2]),
                    "hr_offset": offsets["hr"],
                    "lr_offset": offsets["lr"],
                    "sha256": hashlib.sha256(hr.tobytes()).hexdigest(),
                }
            )
            hr_file.write(hr.tobytes())
            lr_file.write(lr.tobytes())
            offsets["hr"] += hr.size
            offsets["lr"] += lr.size
    if not images:
        raise ValueError("no images to decode")
    if not entries:
        first = "{path}: {reason}".format(**skipped[0])
        raise ValueError(f"none of {len(images)} images can be used; the first one, {first}")
    index = {"scale": scale, "images": entries, "skipped": skipped}
    (folder / "index.json").write_text(json.dumps(index))


class Patches(Dataset):
    """LR/HR patch pairs, uint8 `[3, p, p]` and `[3, scale p, scale p]`, flipped and rotated.

    Item (step, index, p) depends on these and on the seed alone. All patch positions of all images
    are equally likely; one of the eight flips and rotations is applied unless `augment` is off.
    """

    def __init__(self, cache: ImageCache, seed: int, augment: bool = True):
        self.cache, self.seed, self.augment = cache, seed, augment
        self._sizes = np.array([entry["lr_size"] for entry in cache.images])
        self._ends: dict[int, np.ndarray] = {}

    def ends(self, patch: int) -> np.ndarray:
        """Number of patch positions up to and including every image.

        Raises:
            ValueError: No image is as large as a patch.
        """
        if patch not in self._ends:
            positions = np.clip(self._sizes - patch + 1, 0, None).prod(axis=1)
            if not positions.any():
                raise ValueError(
                    f"no training image is as large as a patch of {patch} LR pixels "
                    f"({patch * self.cache.scale} HR pixels)"
                )
            self._ends[patch] = positions.cumsum()
        return self._ends[patch]

    def too_small(self, patch: int) -> list[str]:
        """Images from which no patch of that side is drawn."""
        small = (self._sizes < patch).any(axis=1)
        return [self.cache.images[i]["path"] for i in np.flatnonzero(small)]

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        step, index, p = key
        ends, s = self.ends(p), self.cache.scale
        rng = np.random.default_rng([self.seed, step, index])
        position = int(rng.integers(ends[-1]))
        image = int(np.searchsorted(ends, position, side="right"))
        position -= int(ends[image - 1]) if image else 0
        top, left = divmod(position, self.cache.images[image]["lr_size"][1] - p + 1)
        lr = self.cache.lr(image)[top : top + p, left : left + p]
        hr = self.cache.hr(image)[s * top : s * (top + p), s * left : s * (left + p)]
        turns, mirror = divmod(int(rng.integers(8)) if self.augment else 0, 2)
        return _augment(lr, turns, mirror), _augment(hr, turns, mirror)


def _augment(image: np.ndarray, turns: int, mirror: int) -> Tensor:
    image = np.rot90(image[:, ::-1] if mirror else image, turns)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def loader(
    patches: Patches,
    sizes: Callable[[int], tuple[int, int]],
    first_step: int,
    last_step: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Batches of the steps `first_step .. last_step - 1`, the same for any number of `workers`.

    Args:
        patches: Source of the samples.
        sizes: Patch side and (global) batch of a step.
        first_step, last_step: Range of steps.
        workers: Processes that prepare batches.
        rank, world_size: This process's share of every batch, samples rank, rank + world_size, ...
    """

    class Batches:
        def __iter__(self):
            for step in range(first_step, last_step):
                patch, batch = sizes(step)
                yield [(step, i, patch) for i in range(rank, batch, world_size)]

        def __len__(self) -> int:
            return last_step - first_step

    return DataLoader(
        patches,
        batch_sampler=Batches(),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
