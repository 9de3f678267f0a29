"""Pixels to the bytes of PNG, JPEG, WebP, TIFF and BMP files, with metadata."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .metadata import EXIF_PREFIX, Metadata, jpeg_iptc, png_chunks, png_info, tiff_directory

__all__ = ["FORMATS", "check_output", "encode", "to_pil"]

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Extension -> format that can be written. GIF is read besides."""

LONGEST_EDGE = {"JPEG": 65_535, "WEBP": 16_383}
CLASSIC_4_GIB = ("TIFF", "BMP")
MARKER_BYTES = 65_500  # EXIF, XMP and IPTC go into one JPEG segment each
MOST_DPI = {"JPEG": 65_535, "PNG": 50_000_000, "BMP": 50_000_000}  # PNG, BMP: 31 bits per metre
STRIP_ROWS = 256
EIGHT_BIT = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def encode(pixels: np.ndarray, metadata: Metadata, kind: str, quality: int = 95) -> bytes:
    """A whole file of format `kind` (a value of `FORMATS`) with pixels `[H, W, C]`.

    `quality` is for JPEG, written without chroma subsampling, and WebP; the others are lossless.
    """
    if metadata.dpi and max(metadata.dpi) > MOST_DPI.get(kind, math.inf):
        dots = " x ".join(f"{each:.6g}" for each in metadata.dpi)
        warnings.warn(f"a resolution of {dots} dpi does not fit {kind} and was left out")
        metadata = dataclasses.replace(metadata, dpi=None)
    if kind == "TIFF":
        return _encode_tiff(pixels, metadata)
    if kind == "PNG" and pixels.dtype == np.uint16:
        return _encode_png16(pixels, metadata)
    return _encode_pillow(pixels, metadata, kind, quality)


def check_output(
    path: str | os.PathLike,
    height: int,
    width: int,
    channels: int,
    *,
    bits: int,
    extension: str | None = None,
) -> None:
    """Raise ValueError unless a format can hold such an image without loss of kind.

    The format is that of `extension`, by default the path's. 32 bits are floating.
    """
    path = Path(path)
    extension = path.suffix if extension is None else extension
    kind = FORMATS.get(extension.lower())
    if kind is None:
        raise ValueError(
            f"{path}: cannot write {extension or 'a file without an extension'!r}; "
            f"use one of {', '.join(FORMATS)}"
        )
    if bits == 32 and kind != "TIFF":
        raise ValueError(f"{path}: {kind} cannot hold floating pixels; write tiff (--ext tiff)")
    if bits == 16 and kind not in ("PNG", "TIFF"):
        raise ValueError(
            f"{path}: {kind} would cut 16-bit pixels to 8; write png or tiff (--ext png)"
        )
    if channels in (2, 4) and kind in ("JPEG", "BMP"):
        raise ValueError(
            f"{path}: {kind} cannot hold transparency; write png, webp or tiff (--ext png)"
        )
    edge = LONGEST_EDGE.get(kind)
    if edge and max(height, width) > edge:
        raise ValueError(
            f"{path}: {width}x{height} is beyond the {edge} px edge of {kind} (--ext png)"
        )
    if kind in CLASSIC_4_GIB and height * width * channels * bits // 8 >= 0xFFFF0000:
        raise ValueError(f"{path}: {width}x{height} is beyond the 4 GiB of {kind} (--ext png)")


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Pillow image of `[H, W, C]`: uint8 as L, LA, RGB or RGBA; uint16 gray as I;16.

    Raises:
        ValueError: 16-bit colour, which Pillow has no mode for.
    """
    if pixels.dtype == np.uint16 and pixels.shape[2] != 1:
        raise ValueError("Pillow has no mode for 16-bit colour; use an array, or `images.write`")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _encode_pillow(pixels: np.ndarray, metadata: Metadata, kind: str, quality: int) -> bytes:
    exif, xmp, iptc = metadata.exif, metadata.xmp, metadata.iptc
    if kind == "JPEG" and max(map(len, (exif, xmp, iptc))) > MARKER_BYTES:
        warnings.warn("EXIF, XMP or IPTC of more than 64 KiB does not fit JPEG and was left out")
        blocks = (exif, xmp, iptc)
        exif, xmp, iptc = (block if len(block) <= MARKER_BYTES else b"" for block in blocks)
    options: dict = {}
    if metadata.dpi and kind != "WEBP":
        options["dpi"] = metadata.dpi
    if kind != "BMP":
        options["icc_profile"] = metadata.icc or None
        if exif:
            options["exif"] = EXIF_PREFIX + exif
    if kind == "PNG":
        options["pnginfo"] = png_info(metadata)
    elif kind in ("JPEG", "WEBP"):
        options |= {"quality": quality, "xmp": xmp}
    if kind == "JPEG":
        options |= {"subsampling": "4:4:4", "extra": jpeg_iptc(iptc)}
    file = io.BytesIO()
    to_pil(pixels).save(file, kind, **options)
    return file.getvalue()


def _encode_png16(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """16-bit PNG; every row takes the filter (none, left, up) with the least sum of differences."""
    height, width, channels = pixels.shape
    pixel_bytes = 2 * channels
    packer = zlib.compressobj(6)
    packed = []
    above = np.zeros((1, width * pixel_bytes), np.uint8)
    for top in range(0, height, STRIP_ROWS):
        block = pixels[top : top + STRIP_ROWS].astype(">u2")
        rows = block.view(np.uint8).reshape(len(block), -1)
        left = rows.copy()
        left[:, pixel_bytes:] -= rows[:, :-pixel_bytes]
        up = rows - np.concatenate((above, rows[:-1]))
        filtered = np.stack((rows, left, up))
        cost = np.abs(filtered.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
        best = cost.argmin(axis=0)  # [rows]
        lines = np.concatenate(
            (best[:, None].astype(np.uint8), filtered[best, np.arange(len(rows))]), axis=1
        )
        packed.append(packer.compress(lines.tobytes()))
        above = rows[-1:]
    packed.append(packer.flush())  # a chunk for each: one is 2 GiB at most
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    data = [(b"IDAT", part) for part in packed if part]
    chunks = [(b"IHDR", header), *png_chunks(metadata), *data, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _encode_tiff(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """Deflate in strips, integers with horizontal differences; 8, 16 or 32 bits, 1-4 channels."""
    height, width, channels = pixels.shape
    try:
        directory = tiff_directory(metadata)
        _tiff_file(directory, [b""])
    except Exception as error:  # Pillow's TIFF writer raises nearly anything on odd EXIF values
        warnings.warn(f"EXIF that TIFF cannot hold was left out ({error})")
        directory = tiff_directory(dataclasses.replace(metadata, exif=b""))
    strips = []
    floating = pixels.dtype == np.float32
    for top in range(0, height, STRIP_ROWS):
        rows = pixels[top : top + STRIP_ROWS].copy()
        if not floating:
            rows[:, 1:] -= pixels[top : top + STRIP_ROWS, :-1]
        strips.append(zlib.compress(rows.astype(rows.dtype.newbyteorder("<")).tobytes(), 6))
    directory[256], directory[257] = width, height
    directory[258] = (8 * pixels.itemsize,) * channels
    directory[259] = 8  # deflate
    directory[262] = 1 if channels < 3 else 2  # black is zero; RGB
    directory[277] = channels
    directory[278] = STRIP_ROWS
    directory[284] = 1  # interleaved
    directory[317] = 1 if floating else 2  # horizontal differences
    if channels in (2, 4):
        directory[338] = 2  # alpha is not premultiplied
    if floating:
        directory[339] = (3,) * channels
    return _tiff_file(directory, strips)


def _tiff_file(directory: ImageFileDirectory_v2, strips: list[bytes]) -> bytes:
    """A TIFF file: header, directory (its strip offsets are set here), pixel data."""
    offsets, position = [], 0
    for strip in strips:
        offsets.append(position)
        position += len(strip)
    for tag, values in ((273, offsets), (279, [len(strip) for strip in strips])):
        directory.tagtype[tag] = 4  # 32 bits
        directory[tag] = tuple(values)
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + b"".join(strips)
