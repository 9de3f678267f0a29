"""EXIF, ICC, XMP and resolution of a picture: taken from a file, mended, written to another."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import zlib
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

__all__ = [
    "Metadata",
    "collect",
    "collect_tiff",
    "jpeg_iptc",
    "png_chunks",
    "png_info",
    "tiff_directory",
]

EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION, EXIF_IFD, WIDTH, HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003
RESOLUTION, UNIT = (0x011A, 0x011B), 0x0128
GROUPS = (EXIF_IFD, 0x8825)  # sub-directories: Exif, GPS
SHORT, LONG, RATIONAL = 3, 4, 5
IPTC_TAG, IPTC_RESOURCE = 33723, 0x0404
XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)[2-8]")
XMP_RESOLUTION = re.compile(rb"(tiff:[XY]Resolution(?:=[\"']|>)\s*)(\d+)")
# TIFF tags that never belong to another file, for they say how pixels are stored: subfile type,
# size, bits, compression, photometric, fill order, strips, orientation, samples, planes, predictor,
# colour map, tiles, sub-directories, sample format, JPEG tables, YCbCr; those that are kept apart:
# resolution, XMP, ICC, IPTC; and Photoshop's, which tell of the old pixels.
NOT_EXIF = {
    *range(254, 267), 273, 274, 277, 278, 279, 280, 281, 282, 283, 284, 290, 291, 292, 293, 296,
    301, *range(317, 326), 330, *range(332, 343), 347, *range(512, 533), 700, 33723, 34377, 34675,
}  # fmt: skip


@dataclass(frozen=True)
class Metadata:
    """What a picture says beside its pixels; empty where the file held nothing."""

    exif: bytes = b""
    """TIFF block, without the prefix that JPEG puts before it."""
    icc: bytes = b""
    """ICC profile of the pixels."""
    xmp: bytes = b""
    """XMP packet."""
    dpi: tuple[float, float] | None = None
    """Dots per inch, horizontal and vertical."""
    iptc: bytes = b""
    """IPTC records (caption, author, rights), which JPEG and TIFF hold."""

    def upright(self, width: int, height: int, turned: bool = False) -> Metadata:
        """The same for pixels that stand upright and measure `width` x `height`.

        The orientation becomes 1, the sizes in EXIF become the new ones; `turned` pixels drop the
        embedded thumbnail, which was not turned. All else, maker notes too, stays where it was.
        """
        return dataclasses.replace(
            self,
            exif=_patch_exif(self.exif, width, height, turned),
            xmp=XMP_ORIENTATION.sub(rb"\g<1>1", self.xmp),
        )

    def denser(self, factor: int) -> Metadata:
        """The same with `factor` times the resolution, so that a print keeps its size."""
        return dataclasses.replace(
            self,
            exif=_scale_resolution(self.exif, factor),
            xmp=XMP_RESOLUTION.sub(lambda m: m[1] + b"%d" % (int(m[2]) * factor), self.xmp),
            dpi=self.dpi and (self.dpi[0] * factor, self.dpi[1] * factor),
        )


def collect(image: Image.Image) -> tuple[Metadata, int]:
    """Metadata of a loaded Pillow image, and its orientation 1-8 (1 where pixels are upright)."""
    info = image.info
    exif = _raw_exif(image)
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's EXIF parser raises nearly anything on damaged blocks
        exif, orientation = b"", 1
    xmp = info.get("xmp") or b""
    metadata = Metadata(
        exif=exif,
        icc=info.get("icc_profile") or b"",
        xmp=xmp.encode() if isinstance(xmp, str) else bytes(xmp),
        dpi=_dots(info.get("dpi")) if _tells_resolution(image, exif) else None,
        iptc=_iptc(image),
    )
    return metadata, orientation if orientation in range(1, 9) else 1


def collect_tiff(data: bytes) -> Metadata:
    """Metadata of a TIFF file that Pillow has no mode for."""
    exif = Image.Exif()
    try:
        exif.load(EXIF_PREFIX + data)
        own = {tag: exif.get(tag) for tag in (*RESOLUTION, UNIT, 700, 34675)}
        iptc = _tiff_iptc(exif._info)
        raw = _own_exif(exif)
    except Exception:  # Pillow's EXIF parser raises nearly anything on damaged blocks
        return Metadata()
    dots, factor = _dots([own[tag] for tag in RESOLUTION]), {3: 2.54}.get(own[UNIT], 1)
    return Metadata(
        exif=raw.removeprefix(EXIF_PREFIX),
        icc=own[34675] or b"",
        xmp=own[700] or b"",
        dpi=(dots[0] * factor, dots[1] * factor) if dots and own[UNIT] in (2, 3, None) else None,
        iptc=iptc,
    )


def png_info(metadata: Metadata) -> PngInfo:
    """XMP as the chunk that Pillow's PNG writer takes; it has options of its own for the rest."""
    info = PngInfo()
    if metadata.xmp:
        info.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    return info


def png_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Everything as PNG chunks (name, data), in an order that may stand before IDAT."""
    chunks = []
    if metadata.icc:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata.icc)))
    if metadata.dpi:
        per_metre = [round(dots / 0.0254) for dots in metadata.dpi]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if metadata.exif:
        chunks.append((b"eXIf", metadata.exif))
    if metadata.xmp:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    return chunks


def jpeg_iptc(data: bytes) -> bytes:
    """IPTC as a JPEG segment: the one resource of Photoshop that tells nothing of the pixels."""
    if not data:
        return b""
    resource = b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(data)) + data
    block = b"Photoshop 3.0\0" + resource + b"\0" * (len(data) % 2)
    return b"\xff\xed" + struct.pack(">H", len(block) + 2) + block


def tiff_directory(metadata: Metadata) -> ImageFileDirectory_v2:
    """Everything as a TIFF directory, to which the writer adds the tags of the pixels."""
    directory = ImageFileDirectory_v2()
    if metadata.exif:
        exif = Image.Exif()
        exif.load(EXIF_PREFIX + metadata.exif)
        for tag in list(exif):
            if tag in GROUPS:
                directory[tag] = dict(exif.get_ifd(tag))
            elif tag not in NOT_EXIF:
                directory[tag] = exif[tag]
    if metadata.dpi:
        directory[282], directory[283], directory[296] = *metadata.dpi, 2  # dots per inch
    if metadata.xmp:
        directory.tagtype[700] = 1  # bytes
        directory[700] = metadata.xmp
    if metadata.iptc:
        directory.tagtype[IPTC_TAG] = 7
        directory[IPTC_TAG] = metadata.iptc
    if metadata.icc:
        directory.tagtype[34675] = 7
        directory[34675] = metadata.icc
    return directory


def _raw_exif(image: Image.Image) -> bytes:
    """EXIF block as stored; of a TIFF, whose directory is the EXIF, as a block of its own."""
    try:
        if image.format == "TIFF":
            raw = _own_exif(image.getexif())
        elif "exif" in image.info:
            raw = image.info["exif"]
        elif "Raw profile type exif" in image.info:
            raw = image.getexif().tobytes()
        else:
            raw = b""
    except Exception:  # as above: a damaged block is as good as none
        return b""
    while raw.startswith(EXIF_PREFIX):
        raw = raw[len(EXIF_PREFIX) :]
    return raw


def _iptc(image: Image.Image) -> bytes:
    """IPTC records as stored; empty where there are none or they are damaged."""
    if image.format == "TIFF":
        return _tiff_iptc(image.tag_v2)
    resources = image.info.get("photoshop")
    data = resources.get(IPTC_RESOURCE) if isinstance(resources, dict) else None
    return data if isinstance(data, bytes) else b""


def _tiff_iptc(directory: ImageFileDirectory_v2) -> bytes:
    """As stored: where a writer calls them numbers of 32 bits, Pillow's value is but the first."""
    return getattr(directory, "_tagdata", {}).get(IPTC_TAG, b"")


def _dots(pair: object) -> tuple[float, float] | None:
    """Horizontal and vertical resolution; None unless both are positive numbers."""
    try:
        dots = float(pair[0]), float(pair[1])
    except (TypeError, ValueError, IndexError, ArithmeticError):
        return None
    return dots if all(0 < each < math.inf for each in dots) else None


def _tells_resolution(image: Image.Image, exif: bytes) -> bool:
    """Whether the resolution stands in the file; Pillow makes one up for a TIFF or JPEG without."""
    if image.format == "TIFF":
        return RESOLUTION[0] in image.tag_v2
    if image.format in ("JPEG", "MPO") and not image.info.get("jfif_unit"):
        return bool(exif) and RESOLUTION[0] in image.getexif()
    return True


def _own_exif(exif: Image.Exif) -> bytes:
    """The block without the tags that belong to a TIFF file's pixels; never of the BigTIFF kind."""
    exif.bigtiff = False
    for tag in NOT_EXIF & set(exif):
        del exif[tag]
    return exif.tobytes() if len(exif) else b""


def _scale_resolution(raw: bytes, factor: int) -> bytes:
    """Multiply the numerators of both resolutions in place."""
    order = {b"II": "<", b"MM": ">"}.get(raw[:2])
    if order is None:
        return raw
    data = bytearray(raw)
    try:
        entries, _ = _entries(data, struct.unpack_from(f"{order}I", data, 4)[0], order)
        for tag in RESOLUTION:
            kind, position = entries.get(tag, (0, 0))
            if kind == RATIONAL:
                (offset,) = struct.unpack_from(f"{order}I", data, position)
                (dots,) = struct.unpack_from(f"{order}I", data, offset)
                struct.pack_into(f"{order}I", data, offset, dots * factor)
    except struct.error:  # an offset beyond the block
        pass
    return bytes(data)


def _patch_exif(raw: bytes, width: int, height: int, drop_thumbnail: bool) -> bytes:
    """Set orientation and sizes in place, so that offsets inside maker notes stay right."""
    order = {b"II": "<", b"MM": ">"}.get(raw[:2])
    if order is None:
        return raw
    data = bytearray(raw)
    try:
        (first,) = struct.unpack_from(f"{order}I", data, 4)
        entries, end = _entries(data, first, order)
        if drop_thumbnail:
            struct.pack_into(f"{order}I", data, end, 0)
        _set_entry(data, entries, ORIENTATION, 1, order)
        if EXIF_IFD in entries:
            (offset,) = struct.unpack_from(f"{order}I", data, entries[EXIF_IFD][1])
            inner, _ = _entries(data, offset, order)
            _set_entry(data, inner, WIDTH, width, order)
            _set_entry(data, inner, HEIGHT, height, order)
    except struct.error:  # an offset beyond the block: what could be mended is mended
        pass
    return bytes(data)


def _entries(data: bytearray, offset: int, order: str) -> tuple[dict[int, tuple[int, int]], int]:
    """{tag: (type, position of its value)} of the directory at `offset`, and where it ends."""
    (count,) = struct.unpack_from(f"{order}H", data, offset)
    rows = {}
    for position in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, position)
        rows[tag] = (kind, position + 8)
    return rows, offset + 2 + 12 * count


def _set_entry(data: bytearray, entries: dict, tag: int, value: int, order: str) -> None:
    kind, position = entries.get(tag, (0, 0))
    if kind == SHORT and value < 1 << 16:
        struct.pack_into(f"{order}H", data, position, value)
    elif kind == LONG:
        struct.pack_into(f"{order}I", data, position, value)
