"""Pixels that Pillow cannot hold: 16-bit colour and floating TIFF by OpenCV, gray + alpha here.

What OpenCV makes of 16-bit colour is compared with what Pillow says of the file, so a layout that
it misreads is an error and never a wrong picture.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .metadata import ORIENTATION

__all__ = ["colour16", "float_colour", "gray_alpha", "tiff_tags", "unit_range"]

WIDTH, HEIGHT, BITS, EXTRA, FORMAT = 256, 257, 258, 338, 339
COMPRESSION, OFFSETS, STRIP_ROWS, SIZES, PLANES, PREDICTOR = 259, 273, 278, 279, 284, 317
READ = (
    WIDTH, HEIGHT, BITS, COMPRESSION, OFFSETS, ORIENTATION, STRIP_ROWS, SIZES, PLANES, PREDICTOR,
    EXTRA, FORMAT,
)  # fmt: skip
FLOATING, PREMULTIPLIED = 3, 1
DEFLATE = (8, 32946)


def colour16(image: Image.Image, data: bytes) -> np.ndarray:
    """16-bit colour `[H, W, C]`; `image` is what Pillow made of it, cut to 8 bits.

    Raises:
        ValueError: OpenCV is not installed, or it cannot decode the file or misreads it.
    """
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"16-bit {image.mode} pixels; convert the image to 16-bit RGB first")
    decoded = _opencv(data, "16-bit colour")
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3:
        raise ValueError("16-bit colour that OpenCV cannot decode; save it as 16-bit PNG first")
    pixels = _rgb(decoded)
    seen = np.asarray(image)
    if pixels.shape[:2] != seen.shape[:2] or ((pixels[..., :3] >> 8) != seen[..., :3]).any():
        raise ValueError(
            "16-bit colour in a layout that OpenCV misreads (separate planes or premultiplied "
            "alpha); save it as 16-bit PNG first"
        )
    if data[25] == 4 and image.format == "PNG":  # colour type 4: gray + alpha
        return pixels[..., [0, 3]]
    return pixels


def tiff_tags(data: bytes) -> dict:
    """{tag: value or values} of a TIFF file's first page, 0 -> where the next one begins.

    Empty for other files and for a damaged directory.
    """
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return {}
    try:
        directory = ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        return {**{tag: directory[tag] for tag in READ if tag in directory}, 0: directory.next}
    except Exception:  # Pillow's parser raises nearly anything on damaged data
        return {}


def float_colour(data: bytes, tags: dict, max_pixels: int) -> np.ndarray | None:
    """float32 `[H, W, 3 or 4]` of a floating colour TIFF; None where `tags` tell of another file.

    Raises:
        ValueError: Too large, several pages, not 32 bits, premultiplied, or not in [0, 1].
    """
    bits, formats = (_tuple(tags.get(tag, ())) for tag in (BITS, FORMAT))
    if len(bits) < 3 or FLOATING not in formats:
        return None
    width, height = _size(tags, max_pixels)
    if (
        set(bits) != {32}
        or set(formats) != {FLOATING}
        or PREMULTIPLIED in _tuple(tags.get(EXTRA, ()))
    ):
        what = "with premultiplied alpha" if set(bits) == {32} else f"of {bits[0]} bits"
        raise ValueError(f"floating TIFF {what}; save it with 32 bits and plain alpha first")
    decoded = _opencv(data, "floating colour")
    if decoded is None or decoded.dtype != np.float32 or decoded.ndim != 3:
        raise ValueError("floating colour that OpenCV cannot decode; save it uncompressed first")
    if sorted(decoded.shape[:2]) != sorted((width, height)) or decoded.shape[2] != len(bits):
        raise ValueError("floating colour in a layout that OpenCV misreads; save it uncompressed")
    return unit_range(_rgb(decoded))


def gray_alpha(data: bytes, tags: dict, max_pixels: int) -> np.ndarray | None:
    """`[H, W, 2]` of a TIFF of 16-bit or floating gray + alpha; None where `tags` tell of another.

    Raises:
        ValueError: Too large, several pages, damaged, or stored otherwise than as strips that are
            plain or deflated.
    """
    bits, formats = (_tuple(tags.get(tag, ())) for tag in (BITS, FORMAT))
    dtype = {((16, 16), ()): np.uint16, ((16, 16), (1, 1)): np.uint16}.get((bits, formats))
    dtype = np.float32 if (bits, formats) == ((32, 32), (FLOATING, FLOATING)) else dtype
    if dtype is None:
        return None
    width, height = _size(tags, max_pixels)
    compression, predictor = tags.get(COMPRESSION, 1), tags.get(PREDICTOR, 1)
    plain = tags.get(PLANES, 1) == 1 and PREMULTIPLIED not in _tuple(tags.get(EXTRA, ()))
    if not plain or compression not in (1, *DEFLATE) or predictor not in (1, 2):
        raise ValueError(
            "gray + alpha in a layout that cannot be read; save it as 16-bit PNG first"
        )
    order = "<" if data[:2] == b"II" else ">"
    wanted = width * height * 2 * np.dtype(dtype).itemsize
    rows = bytearray()
    try:
        for offset, size in zip(_tuple(tags[OFFSETS]), _tuple(tags[SIZES]), strict=True):
            strip = data[offset : offset + size]
            unpacker = zlib.decompressobj()
            rows += (
                strip if compression == 1 else unpacker.decompress(strip, wanted - len(rows) + 1)
            )
        pixels = np.frombuffer(rows, np.dtype(dtype).newbyteorder(order))
        pixels = pixels.astype(dtype).reshape(height, width, 2)
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"damaged or truncated TIFF file: {error}") from error
    if predictor == 2 and dtype is np.uint16:
        pixels = pixels.cumsum(axis=1, dtype=np.uint16)
    return pixels if dtype is np.uint16 else unit_range(pixels)


def _size(tags: dict, max_pixels: int) -> tuple[int, int]:
    """Width and height of a TIFF of one page, within the limit."""
    width, height = (tags.get(tag, 0) for tag in (WIDTH, HEIGHT))
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 < height):
        raise ValueError(f"damaged TIFF file: {width}x{height} px")
    if width * height > max_pixels:
        raise ValueError(
            f"{width}x{height} px is over the limit of {max_pixels} px (a decompression bomb?); "
            "raise it with --max-pixels if you trust the file"
        )
    if tags[0]:
        raise ValueError("has several pages; save them as single images first")
    return width, height


def unit_range(pixels: np.ndarray) -> np.ndarray:
    """`pixels`, floating; raises ValueError unless they lie within [0, 1]."""
    if not np.isfinite(pixels).all():
        raise ValueError("floating pixels hold NaN or infinite values")
    least, most = float(pixels.min()), float(pixels.max())
    if least < 0 or most > 1:
        raise ValueError(
            f"floating pixels run from {least:.4g} to {most:.4g}; scale them to 0..1 first"
        )
    return pixels


def _opencv(data: bytes, what: str) -> np.ndarray | None:
    try:
        import cv2
        from cv2 import IMREAD_UNCHANGED, imdecodeWithMetadata
    except ImportError as error:
        raise ValueError(
            f"{what} needs OpenCV 4.12 or newer, for Pillow would cut it to 8 bits: "
            "pip install efrdn_fast[images]"
        ) from error
    levels = cv2.utils.logging
    level = levels.setLogLevel(levels.LOG_LEVEL_SILENT)  # the error below says it once
    try:
        # Unlike imdecode it leaves a PNG's orientation to us. A TIFF's is applied by both.
        return imdecodeWithMetadata(np.frombuffer(data, np.uint8), flags=IMREAD_UNCHANGED)[0]
    except cv2.error as error:
        raise ValueError(f"{what} that OpenCV cannot decode: {error.err}") from error
    finally:
        levels.setLogLevel(level)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """OpenCV's order is BGR."""
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def _tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
