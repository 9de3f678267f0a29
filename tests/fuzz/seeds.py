"""Small image files of every format, mode and depth: the seeds of the fuzz run and of the table.

Made here, so the repository holds no image of unknown origin.
"""

from __future__ import annotations

import io
import itertools
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from skimage.color import rgb2lab

from efrdn_fast.encode import encode
from efrdn_fast.metadata import Metadata

__all__ = ["Seed", "cmyk_profile", "metadata", "seeds"]

SIZE = (12, 10)  # width, height
MAKE, EXIF_IFD, MAKER_NOTE = 271, 0x8769, 0x927C
XMP = (
    b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" dc:source="seed"/></rdf:RDF></x:xmpmeta>'
    b'<?xpacket end="w"?>'
)


@dataclass(frozen=True)
class Seed:
    """One file."""

    extension: str
    mode: str
    """What the file holds, in words."""
    bits: int
    """Per channel."""
    data: bytes


def seeds() -> list[Seed]:
    """All of them; the same bytes on every call."""
    found = [
        Seed(extension, mode, bits, encode(_pixels(channels, bits), metadata(), kind))
        for extension, kind in ((".png", "PNG"), (".tiff", "TIFF"))
        for bits in ((16,) if kind == "PNG" else (16, 32))
        for channels, mode in ((1, "gray"), (2, "gray + alpha"), (3, "RGB"), (4, "RGB + alpha"))
    ]
    for extension, modes in PILLOW.items():
        found += [Seed(extension, mode, *_pillow(extension, mode)) for mode in modes]
    found += [Seed(extension, "animated or paged", 8, _frames(extension)) for extension in FRAMED]
    order = list(PILLOW)
    return sorted(found, key=lambda seed: (order.index(seed.extension), seed.bits))


PILLOW = {
    ".png": (
        "1-bit", "gray", "gray + alpha", "palette", "palette + alpha", "RGB", "RGB + clear colour",
        "RGB + alpha",
    ),
    ".jpg": ("gray", "RGB", "CMYK with profile", "CMYK without profile"),
    ".webp": ("RGB", "RGB + alpha"),
    ".tiff": (
        "1-bit", "gray", "gray + alpha", "palette", "RGB", "RGB + alpha", "CMYK with profile",
        "Lab",
    ),
    ".bmp": ("1-bit", "gray", "palette", "RGB"),
    ".gif": ("palette", "palette + alpha"),
}  # fmt: skip
FRAMED = (".png", ".webp", ".tiff", ".gif")
MODES = {
    "1-bit": "1", "gray": "L", "gray + alpha": "LA", "palette": "P", "palette + alpha": "P",
    "RGB": "RGB", "RGB + clear colour": "RGB", "RGB + alpha": "RGBA", "Lab": "LAB",
    "CMYK with profile": "CMYK", "CMYK without profile": "CMYK",
}  # fmt: skip


def metadata() -> Metadata:
    """Camera, maker note, sRGB profile, XMP and 300 dpi."""
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    exif[EXIF_IFD] = {MAKER_NOTE: b"\x01secret\xff" * 5}
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return Metadata(block, srgb, XMP, (300.0, 300.0))


def _pixels(channels: int, bits: int) -> np.ndarray:
    """Smooth colours; alpha with a hard edge."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    planes = [0.5 + 0.3 * np.sin(x / 3 + c) + 0.2 * np.cos(y / 2 - c) for c in range(channels)]
    unit = np.stack(planes, axis=2)
    if channels in (2, 4):
        unit[..., -1] = x + y > 8
    if bits == 32:
        return unit.astype(np.float32)
    most = (1 << bits) - 1
    return (unit * most).round().astype(np.uint8 if bits == 8 else np.uint16)


def _pillow(extension: str, mode: str) -> tuple[int, bytes]:
    """Bits per channel and a file written by Pillow."""
    image = Image.fromarray(_pixels({"LA": 2, "RGBA": 4}.get(MODES[mode], 3), 8))
    if mode == "Lab":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(MODES[mode])
    about = metadata()
    options: dict = {"exif": b"Exif\0\0" + about.exif, "icc_profile": about.icc, "dpi": about.dpi}
    if "CMYK" in mode or mode == "Lab":
        options["icc_profile"] = cmyk_profile() if mode == "CMYK with profile" else None
    if mode in ("palette + alpha", "RGB + clear colour"):
        options["transparency"] = image.getpixel((0, 0))
    if extension == ".png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", about.xmp.decode())
    elif extension == ".tiff":
        directory = Image.Exif()
        directory.load(options["exif"])
        directory[700] = about.xmp
        options["exif"] = directory
    elif extension in (".jpg", ".webp"):
        options["xmp"] = about.xmp
    elif extension == ".gif":
        options = {key: options[key] for key in ("transparency",) if key in options}
    if extension == ".webp":
        del options["dpi"]
    file = io.BytesIO()
    image.save(file, "JPEG" if extension == ".jpg" else extension[1:].upper(), **options)
    return (1 if mode == "1-bit" else 8), file.getvalue()


def _frames(extension: str) -> bytes:
    frames = [Image.fromarray(_pixels(3, 8)), Image.fromarray(255 - _pixels(3, 8))]
    file = io.BytesIO()
    frames[0].save(file, extension[1:].upper(), save_all=True, append_images=frames[1:])
    return file.getvalue()


def cmyk_profile() -> bytes:
    """A small CMYK profile: a 2^4 lookup table from ink to Lab, each ink taking its colour away."""

    def lab(c, m, y, k):
        rgb = np.array([(1.0 - ink) * (1 - k) for ink in (c, m, y)])
        level, a, b = rgb2lab(rgb)
        return bytes(np.clip((level * 2.55, a + 128, b + 128), 0, 255).round().astype(np.uint8))

    grid = b"".join(lab(*ink) for ink in itertools.product((0, 1), repeat=4))
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + grid + ramp * 3
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"cmyk\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags, body, offset = b"", b"", 128 + 4 + 3 * 12
    for name, data in ((b"A2B0", lut), (b"desc", text), (b"wtpt", white)):
        data += bytes(-len(data) % 4)
        tags += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 3) + tags + body
