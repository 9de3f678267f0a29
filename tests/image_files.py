"""Pictures, EXIF blocks and PNG files made for the tests of image files."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

__all__ = [
    "EXIF_IFD",
    "EXPOSURE",
    "GPS_IFD",
    "MAKE",
    "MAKER_NOTE",
    "MODEL",
    "ORIENTATION",
    "PIXEL_HEIGHT",
    "PIXEL_WIDTH",
    "SRGB",
    "XMP",
    "XRES",
    "exif_block",
    "minimal_png",
    "noise",
    "parse_exif",
    "png_chunk",
    "smooth",
]

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    b'<?xpacket end="w"?>'
)
MAKE, MODEL, XRES, ORIENTATION, EXIF_IFD, GPS_IFD = 271, 272, 282, 274, 0x8769, 0x8825
EXPOSURE, MAKER_NOTE, PIXEL_WIDTH, PIXEL_HEIGHT = 0x829A, 0x927C, 0xA002, 0xA003


def exif_block(orientation: int = 1, width: int = 9, height: int = 7) -> bytes:
    """EXIF with camera, exposure, maker note, sizes and GPS, without the JPEG prefix."""
    exif = Image.Exif()
    exif[MAKE], exif[MODEL], exif[ORIENTATION] = "Maker", "Model 7", orientation
    exif[EXIF_IFD] = {
        EXPOSURE: 0.008,
        MAKER_NOTE: b"\x01secret\xff" * 5,
        PIXEL_WIDTH: width,
        PIXEL_HEIGHT: height,
    }
    exif[GPS_IFD] = {1: "N", 2: (47.0, 30.0, 15.5)}
    return exif.tobytes().removeprefix(b"Exif\0\0")


def parse_exif(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + block)
    return exif


def noise(height: int, width: int, channels: int, dtype=np.uint8) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width * 10 + channels)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """What lossy formats keep well."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 60 * np.sin(x / 9 + c) + 50 * np.cos(y / 7 - c) for c in range(channels)]
    return np.stack(planes, axis=2).round().astype(np.uint8)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def minimal_png(
    width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG written by hand; `rows` carry their filter bytes."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )
