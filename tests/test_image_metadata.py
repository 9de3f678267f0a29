"""EXIF, XMP, ICC, resolution and orientation, from one file to another."""

from __future__ import annotations

import math
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps, IptcImagePlugin, PngImagePlugin

from efrdn_fast.images import Picture, read, write
from efrdn_fast.metadata import Metadata, collect
from tests.image_files import (
    EXIF_IFD,
    EXPOSURE,
    GPS_IFD,
    MAKE,
    MAKER_NOTE,
    MODEL,
    ORIENTATION,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    SRGB,
    XMP,
    XRES,
    exif_block,
    minimal_png,
    noise,
    parse_exif,
    png_chunk,
    smooth,
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ext", [".png", ".jpg", ".webp", ".tiff", ".png16", ".tiff16", ".bmp"])
def test_metadata_survives(tmp_path, ext, channels):
    dtype = np.uint16 if ext.endswith("16") else np.uint8
    ext = ext.removesuffix("16")
    before = Metadata(exif_block(), SRGB, XMP.replace(b'"6"', b'"1"'), (300.0, 240.0))
    pixels = noise(14, 18, channels, dtype)
    after = read(write(tmp_path / f"a{ext}", Picture(pixels, before))).metadata
    if ext != ".webp":  # it has no resolution of its own
        assert after.dpi == pytest.approx((300, 240), abs=0.02)
    if ext == ".bmp":
        return
    assert after.icc == SRGB
    assert after.xmp == before.xmp
    exif = parse_exif(after.exif)
    assert exif[MAKE] == "Maker" and exif[MODEL] == "Model 7"
    inner = exif.get_ifd(EXIF_IFD)
    assert inner[MAKER_NOTE] == b"\x01secret\xff" * 5
    assert float(inner[EXPOSURE]) == pytest.approx(0.008)
    assert (inner[PIXEL_WIDTH], inner[PIXEL_HEIGHT]) == (18, 14)  # of the pixels, not of the source
    assert exif.get_ifd(GPS_IFD)[2] == (47.0, 30.0, 15.5)


def test_metadata_crosses_formats(tmp_path):
    """PNG -> TIFF -> JPEG -> WebP -> PNG: nothing is lost on the way."""
    picture = Picture(smooth(14, 18, 3), Metadata(exif_block(), SRGB, XMP, (72.0, 72.0)))
    for name in ("a.png", "b.tiff", "c.jpg", "d.webp", "e.png"):
        picture = read(write(tmp_path / name, picture))
    exif = parse_exif(picture.metadata.exif)
    assert exif[MAKE] == "Maker" and 256 not in exif and 273 not in exif  # no tags of TIFF pixels
    assert exif.get_ifd(GPS_IFD)[1] == "N"
    assert exif.get_ifd(EXIF_IFD)[MAKER_NOTE] == b"\x01secret\xff" * 5
    assert picture.metadata.icc == SRGB
    assert b"xmpmeta" in picture.metadata.xmp


@pytest.mark.parametrize("name", ["a.tiff", "b.png", "c.jpg"])
def test_bigtiff_gives_its_metadata_to_all(tmp_path, name, recwarn):
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    noise_image = Image.fromarray(noise(14, 18, 3, np.uint8))
    noise_image.save(tmp_path / "big.tiff", big_tiff=True, exif=exif, dpi=(300, 300))
    assert (tmp_path / "big.tiff").read_bytes()[2] == 43
    after = read(write(tmp_path / name, read(tmp_path / "big.tiff"))).metadata
    assert parse_exif(after.exif)[MAKE] == "Maker" and not recwarn.list
    assert after.dpi == pytest.approx((300, 300), abs=0.02)


IPTC = b"\x1c\x02\x78\x00\x09A caption\x1c\x02\x50\x00\x02me"  # 21 bytes, odd on purpose


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_iptc_goes_between_jpeg_and_tiff(tmp_path, dtype):
    pixels = noise(14, 18, 3, np.uint8).astype(dtype) / (255 if dtype is np.float32 else 1)
    picture = Picture(pixels.astype(dtype), Metadata(exif_block(), SRGB, XMP, iptc=IPTC))
    after = read(write(tmp_path / "a.tiff", picture)).metadata
    assert after.iptc == IPTC and after.icc == SRGB and parse_exif(after.exif)[MAKE] == "Maker"
    after = read(write(tmp_path / "b.jpg", Picture(noise(14, 18, 3, np.uint8), after))).metadata
    assert after.iptc == IPTC and after.icc == SRGB and b"xmpmeta" in after.xmp
    with Image.open(tmp_path / "b.jpg") as image:
        assert IptcImagePlugin.getiptcinfo(image)[2, 120] == b"A caption"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_iptc_stored_as_numbers(tmp_path, order, bits, recwarn):
    """As Photoshop does; 8 bits of gray, or 16 bits of gray + alpha."""
    text, count, wide = IPTC + bytes(3), (1 if bits == 8 else 2), bits // 8
    tags = {256: 1, 257: 1, 259: 1, 262: 1, 273: 8, 277: count, 278: 1, 279: count * wide}
    end = 12 + 2 + 12 * (len(tags) + 2) + 4
    rows = {tag: (4, 1, struct.pack(f"{order}I", value)) for tag, value in tags.items()}
    rows[258] = (3, count, struct.pack(f"{order}{count}H", *[bits] * count).ljust(4, b"\0"))
    rows[33723] = (4, len(text) // 4, struct.pack(f"{order}I", end))
    data = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 12)
    data += b"\x55\x55\xff\xff" + struct.pack(f"{order}H", len(rows))
    for tag in sorted(rows):
        kind, number, value = rows[tag]
        data += struct.pack(f"{order}HHI", tag, kind, number) + value
    (tmp_path / "a.tif").write_bytes(data + bytes(4) + text)
    picture = read(tmp_path / "a.tif")
    assert picture.pixels.shape == (1, 1, count) and int(picture.pixels.flat[0]) & 255 == 0x55
    assert picture.metadata.iptc == text and not recwarn.list


@pytest.mark.parametrize("source", ["a.tiff", "a.jpg", "a.png", "b.jpg"])
def test_no_resolution_is_made_up(tmp_path, source):
    """Pillow tells of 1 dpi for a TIFF without resolution, of 72 for a JPEG with EXIF."""
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    more = {"exif": exif} if source != "b.jpg" else {}
    Image.fromarray(noise(14, 18, 3, np.uint8)).save(tmp_path / source, **more)
    picture = read(tmp_path / source)
    assert picture.metadata.dpi is None and picture.metadata.denser(4).dpi is None
    for name in ("c.tiff", "c.png", "c.jpg"):
        assert read(write(tmp_path / name, picture)).metadata.dpi is None


def test_resolution_in_exif_alone_counts(tmp_path):
    exif = Image.Exif()
    exif[XRES], exif[XRES + 1], exif[0x0128] = 240.0, 240.0, 2
    Image.fromarray(noise(14, 18, 3, np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg").metadata.dpi == (240, 240)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "png16", "tiff16"])
def test_orientation_is_applied_once(tmp_path, kind, orientation):
    pixels = smooth(24, 40, 3)
    source, target = tmp_path / f"a.{kind.removesuffix('16')}", tmp_path / "out.png"
    tag = Image.Exif()
    tag[ORIENTATION] = orientation
    if kind == "tiff16":
        import tifffile

        pixels = pixels.astype(np.uint16) * 257
        tags = [(ORIENTATION, 3, 1, orientation, True)]
        tifffile.imwrite(source, pixels, photometric="rgb", extratags=tags)
    elif kind == "png16":
        pixels = pixels.astype(np.uint16) * 257
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        block = tag.tobytes().removeprefix(b"Exif\0\0")
        source.write_bytes(minimal_png(40, 24, 16, 2, rows, png_chunk(b"eXIf", block)))
    else:
        options = {"lossless": True} if kind == "webp" else {}
        Image.fromarray(pixels).save(source, exif=tag, quality=95, **options)
    with Image.open(source) as image:
        image.load()  # a TIFF is turned by Pillow itself
        expected = np.asarray(ImageOps.exif_transpose(image))
    if kind.endswith("16"):
        expected = expected.astype(np.uint16) * 257
    picture = read(source)
    np.testing.assert_array_equal(picture.pixels, expected)
    write(target, picture)
    with Image.open(target) as image:
        assert image.getexif().get(ORIENTATION, 1) == 1
    np.testing.assert_array_equal(read(target).pixels, expected)


def test_orientation_in_xmp_is_reset_too(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    Image.fromarray(smooth(8, 12, 3)).save(tmp_path / "a.png", pnginfo=info)
    picture = read(tmp_path / "a.png")
    assert picture.pixels.shape == (12, 8, 3)  # 6: turned by a quarter
    assert b'tiff:Orientation="1"' in picture.metadata.xmp


def test_turned_pixels_drop_the_thumbnail_but_keep_maker_note_offsets():
    block = bytearray(exif_block(orientation=6))
    end = 8 + 2 + 12 * struct.unpack_from(">H", block, 8)[0]
    struct.pack_into(">I", block, end, 8)  # a "thumbnail" directory: the first one again
    before = Metadata(exif=bytes(block))
    assert struct.unpack_from(">I", before.upright(5, 5).exif, end)[0] == 8
    turned = before.upright(5, 6, turned=True).exif
    assert struct.unpack_from(">I", turned, end)[0] == 0
    assert turned.index(b"secret") == bytes(block).index(b"secret")
    assert parse_exif(turned)[ORIENTATION] == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated File|EXIF that TIFF:UserWarning")
@pytest.mark.parametrize("cut", [0, 3, 8, 9, 20, 40, 90])
def test_damaged_exif_never_stops_a_picture(tmp_path, cut):
    block = exif_block(orientation=1)[:cut] or b"rubbish"
    Image.fromarray(smooth(8, 9, 3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block, quality=95)
    picture = read(tmp_path / "a.jpg")
    assert picture.pixels.shape == (8, 9, 3)
    for name in ("b.jpg", "b.png", "b.webp", "b.tiff"):
        assert read(write(tmp_path / name, picture)).pixels.shape == (8, 9, 3)


@pytest.mark.parametrize("ext", [".png", ".jpg", ".tiff"])
def test_resolution_grows_with_the_picture_where_asked(tmp_path, ext):
    xmp = XMP.replace(b"tiff:Orientation", b'tiff:XResolution="300/1" tiff:Orientation')
    exif = parse_exif(exif_block())
    exif[XRES] = 300.0
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    about = Metadata(block, SRGB, xmp, (300.0, 150.0)).denser(4)
    assert about.dpi == (1200, 600)
    again = read(write(tmp_path / f"a{ext}", Picture(smooth(9, 7, 3), about))).metadata
    assert again.dpi == pytest.approx((1200, 600), abs=0.5)
    assert b'tiff:XResolution="1200/1"' in again.xmp
    if ext != ".tiff":  # whose EXIF leaves resolution to the file's own tags
        assert parse_exif(again.exif)[XRES] == 1200


def test_large_exif_is_left_out_of_jpeg_with_a_warning(tmp_path):
    big = Image.Exif()
    big[EXIF_IFD] = {MAKER_NOTE: bytes(70_000)}
    block = big.tobytes().removeprefix(b"Exif\0\0")
    with pytest.warns(UserWarning, match="does not fit JPEG"):
        write(tmp_path / "a.jpg", Picture(smooth(8, 8, 3), Metadata(exif=block, icc=SRGB)))
    after = read(tmp_path / "a.jpg").metadata
    assert after.exif == b"" and after.icc == SRGB


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((f"a.{ext}", np.uint8) for ext in ("png", "jpg", "webp", "bmp", "tiff")),
        *((f"a.{ext}", np.uint16) for ext in ("png", "tiff")),
    ],
)
def test_large_iptc_and_resolution_never_stop_a_picture(tmp_path, name, dtype):
    """TIFF holds any; JPEG has 64 KiB and 16 bits for them."""
    about = Metadata(icc=SRGB, iptc=b"i" * 70_000, dpi=(4e9, 4e9))
    picture = read(write(tmp_path / "in.tiff", Picture(smooth(8, 8, 3).astype(dtype), about)))
    assert picture.metadata == about
    path = tmp_path / name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(path, picture)
    texts = [str(warning.message) for warning in caught]
    dropped = [text for text in texts if "resolution of 4e+09 x 4e+09 dpi does not fit" in text]
    assert len(dropped) == (path.suffix in (".png", ".jpg", ".bmp"))  # WebP never has one
    cut = [text for text in texts if "IPTC of more than 64 KiB does not fit JPEG" in text]
    assert len(cut) == (path.suffix == ".jpg")
    after = read(path)
    assert after.pixels.dtype == dtype
    if name != "a.bmp":  # it holds pixels and a resolution only
        assert after.metadata.icc == SRGB
        assert after.metadata.dpi == (about.dpi if name == "a.tiff" else None)


@pytest.mark.parametrize(
    "dots", [(math.nan, 72.0), (math.inf, 72.0), (72.0, 0.0), (72.0,), 72, "x"]
)
def test_resolution_that_is_none(tmp_path, dots):
    image = Image.new("RGB", (4, 4))
    image.info["dpi"] = dots
    assert collect(image)[0].dpi is None
