"""Image files to arrays and back: PNG, JPEG, WebP, TIFF and BMP, 8, 16 or 32 bits, with metadata.

Pixels are `[H, W, C]`, uint8, uint16 or float32 in [0, 1]; C = 1 gray, 2 gray + alpha, 3 RGB,
4 RGB + alpha (not premultiplied).
Nothing is cut to 8 bits in silence: what cannot be kept is an error that names the way.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from .checkpoint import atomic_write
from .deep import colour16, float_colour, gray_alpha, tiff_tags, unit_range
from .encode import FORMATS, check_output, encode
from .metadata import ORIENTATION, Metadata, collect, collect_tiff

__all__ = ["MAX_PIXELS", "STREAM", "Picture", "from_pil", "read", "write"]

STREAM = Path("-")
"""Standard input or output instead of a file."""

MAX_PIXELS = 178_956_970
"""Larger inputs are refused as decompression bombs; Pillow's own limit, half a GiB of RGB."""

READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF")
TURNS = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[::-1],
}


@dataclass(frozen=True)
class Picture:
    """Upright pixels of an image file and what the file said about them."""

    pixels: np.ndarray
    """`[H, W, C]`, uint8, uint16 or float32."""
    metadata: Metadata = field(default_factory=Metadata)
    extension: str = ".png"
    """Usual extension of the file's format, or .png where that cannot be written."""


def read(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read an image file, `-` for standard input; its EXIF orientation is applied, palettes become
    RGB(A).

    Raises:
        OSError: The file is missing or cannot be opened.
        ValueError: Empty, damaged, animated, too large, or of a kind whose colours would be lost.
            Every message begins with the path and is one line.
    """
    path = Path(path)
    data = _read_bytes(path)
    if not data:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        tags = tiff_tags(data)
        orientation = tags.get(ORIENTATION, 1)
        turned = orientation != 1
        pixels = gray_alpha(data, tags, max_pixels)
        if pixels is None:
            pixels, orientation = float_colour(data, tags, max_pixels), 1  # OpenCV turns it
        if pixels is not None:
            extension, metadata = ".tiff", collect_tiff(data)
        else:
            pixels, metadata, orientation, extension = _read_pillow(data, max_pixels)
            turned = orientation != 1
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    pixels = np.ascontiguousarray(TURNS.get(orientation, lambda p: p)(pixels))
    height, width = pixels.shape[:2]
    return Picture(pixels, metadata.upright(width, height, turned), extension)


def _read_bytes(path: Path) -> bytes:
    if path == STREAM:
        return sys.stdin.buffer.read()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_pillow(data: bytes, max_pixels: int) -> tuple[np.ndarray, Metadata, int, str]:
    """Pixels, metadata, orientation still to be applied, extension."""
    with _open(data, max_pixels) as image:
        _refuse_frames(image)
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise ValueError(f"damaged or truncated {image.format} file: {error}") from error
        metadata, orientation = collect(image)
        pixels = _decode(image, data)
        if image.mode == "CMYK":
            metadata = dataclasses.replace(metadata, icc=b"")  # now sRGB
        kinds = {kind: extension for extension, kind in reversed(FORMATS.items())}
        return pixels, metadata, orientation, kinds.get(image.format, ".png")


def write(path: str | os.PathLike, picture: Picture) -> Path:
    """Write `picture` atomically in the format of the extension, with its metadata.

    `-` is standard output and the format that of `picture.extension`.

    Raises:
        ValueError: The format cannot hold the picture, see `check_output`.
        OSError: The file cannot be written; nothing is left behind.
    """
    pixels = picture.pixels
    path = Path(path)
    extension = picture.extension if path == STREAM else path.suffix.lower()
    check_output(path, *pixels.shape, bits=8 * pixels.itemsize, extension=extension)
    height, width = pixels.shape[:2]
    data = encode(pixels, picture.metadata.upright(width, height), FORMATS[extension])
    if path != STREAM:
        return atomic_write(path, data)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return path


def from_pil(image: Image.Image) -> np.ndarray:
    """Pixels `[H, W, C]` of a Pillow image of at most 8 bits a channel, or 16-bit gray.

    1-bit becomes gray, a palette RGB(A), a transparent colour alpha; CMYK goes through its ICC
    profile to sRGB.

    Raises:
        ValueError: A mode that has no such form.
    """
    mode = image.mode
    if mode in ("1", "P", "PA", "L", "RGB"):
        gray = mode in ("1", "L")
        transparent = mode == "PA" or image.has_transparency_data
        image = image.convert(
            ("LA" if gray else "RGBA") if transparent else ("L" if gray else "RGB")
        )
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode in ("RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif mode == "CMYK":
        image = _cmyk_to_srgb(image)
    elif mode == "I" or mode.startswith("I;16"):
        return _gray16(image)
    elif mode not in ("LA", "RGBA"):
        what = "floating point" if mode == "F" else f"of Pillow mode {mode}"
        raise ValueError(f"pixels are {what}; convert the image to 8 or 16 bits a channel first")
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Header of an image whose size is within `max_pixels`."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked below
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
    except UnidentifiedImageError as error:
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise ValueError(
                "TIFF of a kind that cannot be read (colour of other than 8 or 16 unsigned or 32 "
                "floating bits?); save it as 16-bit PNG first"
            ) from error
        raise ValueError(
            "not a PNG, JPEG, WebP, TIFF, BMP or GIF file, or damaged at its beginning"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"damaged header: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"{width}x{height} px is over the limit of {max_pixels} px (a decompression bomb?); "
            "raise it with --max-pixels if you trust the file"
        )
    return image


def _refuse_frames(image: Image.Image) -> None:
    if image.format == "MPO":  # a JPEG whose further pictures are other views; the first counts
        return
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"damaged {image.format} file: {error}") from error
    if frames > 1:
        what = "pages" if image.format == "TIFF" else "frames: it is animated"
        raise ValueError(f"has {frames} {what}; save them as single images first")


def _decode(image: Image.Image, data: bytes) -> np.ndarray:
    """Pixels of a loaded image, before its orientation is applied."""
    bits, photometric = 8, None
    if image.format == "PNG" and data[12:16] == b"IHDR":
        bits = data[24]
    elif image.format == "TIFF":
        tags = image.tag_v2
        stored, photometric = tags.get(258, (1,)), tags.get(262)
        bits = max(stored) if isinstance(stored, tuple) else stored
        if bits == 32 and image.mode == "F" and tags.get(339) == (3,):
            return unit_range(np.asarray(image))[..., None]
        if bits not in (1, 2, 4, 8, 16) or any(f not in (1, 4) for f in tags.get(339, (1,))):
            raise ValueError(
                f"TIFF of {bits}-bit signed, floating or odd samples; "
                "convert it to 8 or 16 unsigned or 32 floating bits first"
            )
    if bits != 16:
        return from_pil(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = _gray16(image)
        return 65535 - pixels if photometric == 0 else pixels  # 0: white is zero
    return colour16(image, data)


def _gray16(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if image.mode == "I" and pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
        raise ValueError(
            "32-bit integer pixels beyond 0..65535; convert the image to 16 bits first"
        )
    pixels = pixels.astype(np.uint16)[..., None]
    key = image.info.get("transparency")
    if isinstance(key, int):
        alpha = np.where(pixels == key, 0, 65535).astype(np.uint16)
        pixels = np.concatenate((pixels, alpha), axis=2)
    return pixels


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        raise ValueError(
            "CMYK without an ICC profile has no defined colours; convert it to RGB first"
        )
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError(f"CMYK whose ICC profile cannot be used: {error}") from error
