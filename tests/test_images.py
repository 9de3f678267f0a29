"""Files in, files out: depth, channels, colour and metadata kept; damage named in one line."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from efrdn_fast import images
from efrdn_fast.encode import check_output, to_pil
from efrdn_fast.images import Picture, from_pil, read, write
from efrdn_fast.metadata import Metadata

_spec = importlib.util.spec_from_file_location(
    "image_seeds", Path(__file__).parent / "fuzz" / "seeds.py"
)
seeds = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(seeds)

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


LOSSLESS = [
    (ext, channels, dtype)
    for ext in (".png", ".tiff", ".tif", ".bmp")
    for channels in (1, 2, 3, 4)
    for dtype in (np.uint8, np.uint16)
    if ext != ".bmp" or (channels in (1, 3) and dtype is np.uint8)
]


@pytest.mark.parametrize("ext, channels, dtype", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (300, 5)], ids=str)
def test_lossless_formats_keep_pixels(tmp_path, ext, channels, dtype, size):
    pixels = noise(*size, channels, dtype)
    again = read(write(tmp_path / f"a{ext}", Picture(pixels))).pixels
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_written_files_mean_the_same_to_other_readers(tmp_path, channels, dtype):
    import cv2
    import tifffile

    pixels = noise(301, 17, channels, dtype)
    write(tmp_path / "a.tiff", Picture(pixels))
    np.testing.assert_array_equal(np.squeeze(pixels), tifffile.imread(tmp_path / "a.tiff"))
    write(tmp_path / "a.png", Picture(pixels))
    seen = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)
    order = {1: [0], 2: [0, 3], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    np.testing.assert_array_equal(pixels, seen.reshape(301, 17, -1)[..., order])


def test_png16_compresses_smooth_images(tmp_path):
    y, x = np.mgrid[:200, :200].astype(np.uint16)
    pixels = np.stack((x * 200, y * 150, x * 64 + y * 64), axis=2)
    assert write(tmp_path / "a.png", Picture(pixels)).stat().st_size < pixels.nbytes / 4


@pytest.mark.parametrize("ext, channels", [(".jpg", 1), (".jpeg", 3), (".webp", 3), (".webp", 4)])
def test_lossy_formats_stay_close(tmp_path, ext, channels):
    pixels = smooth(40, 52, channels)
    again = read(write(tmp_path / f"a{ext}", Picture(pixels))).pixels
    assert again.shape == pixels.shape
    error = again.astype(float) - pixels
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 38


def test_jpeg_keeps_full_chroma(tmp_path):
    write(tmp_path / "a.jpg", Picture(smooth(16, 16, 3)))
    with Image.open(tmp_path / "a.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4


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


def test_palette_and_transparency(tmp_path):
    colours = [255, 0, 0, 0, 255, 0, 0, 0, 255]
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0], [0, 0, 1]], np.uint8), "P")
    image.putpalette(colours)
    image.save(tmp_path / "opaque.png")
    pixels = read(tmp_path / "opaque.png").pixels
    assert pixels.shape == (3, 3, 3)
    assert pixels[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    image.save(tmp_path / "clear.png", transparency=bytes([255, 128, 0]))
    pixels = read(tmp_path / "clear.png").pixels
    assert pixels.shape == (3, 3, 4)
    assert pixels[0, :, 3].tolist() == [255, 128, 0]
    image.save(tmp_path / "a.gif", transparency=2)
    assert read(tmp_path / "a.gif").pixels[0, :, 3].tolist() == [255, 255, 0]


def test_transparent_colour_becomes_alpha(tmp_path):
    rgb = smooth(5, 6, 3)
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=tuple(int(v) for v in rgb[2, 3]))
    pixels = read(tmp_path / "rgb.png").pixels
    assert pixels.shape == (5, 6, 4) and pixels[2, 3, 3] == 0 and pixels[0, 0, 3] == 255
    gray = noise(4, 4, 1, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in gray)
    key = png_chunk(b"tRNS", gray[1, 2].astype(">u2").tobytes())
    (tmp_path / "gray.png").write_bytes(minimal_png(4, 4, 16, 0, rows, key))
    pixels = read(tmp_path / "gray.png").pixels
    np.testing.assert_array_equal(pixels[..., :1], gray)
    assert pixels[1, 2, 1] == 0 and pixels[0, 0, 1] == 65535


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 2), ("La", 2), ("P", 3)])
@pytest.mark.parametrize("transparent", [False, True])
def test_pillow_modes(mode, channels, transparent):
    image = Image.fromarray(smooth(6, 5, 1)[..., 0])
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    if transparent and mode in ("L", "P"):
        image.info["transparency"], channels = 0, channels + 1
    assert from_pil(image).shape == (6, 5, channels)


@pytest.mark.parametrize("mode", ["RGBX", "YCbCr", "HSV", "RGBa", "I;16", "I;16B", "I"])
def test_rare_pillow_modes(mode):
    if mode.startswith("I"):
        image = Image.new(mode, (4, 3), 40_000)
        assert (from_pil(image) == np.full((3, 4, 1), 40_000, np.uint16)).all()
        return
    image = Image.new("RGBA", (4, 3), (200, 100, 50, 255))
    image = (image if mode == "RGBa" else image.convert("RGB")).convert(mode)
    pixels = from_pil(image)
    assert pixels.shape[2] == (4 if mode == "RGBa" else 3)
    assert np.abs(pixels[0, 0, :3].astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_refused_pillow_modes(mode):
    with pytest.raises(ValueError, match="floating point" if mode == "F" else "LAB"):
        from_pil(Image.new(mode, (4, 4)))
    with pytest.raises(ValueError, match=r"beyond 0\.\.65535"):
        from_pil(Image.new("I", (4, 4), 70_000))


def test_sixteen_bit_gray_needs_no_opencv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    gray = noise(9, 7, 1, np.uint16)
    for name in ("a.png", "a.tiff"):
        np.testing.assert_array_equal(read(write(tmp_path / name, Picture(gray))).pixels, gray)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bit_colour_names_the_extra_without_opencv(tmp_path, monkeypatch, name):
    write(tmp_path / name, Picture(noise(9, 7, 3, np.uint16)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install efrdn_fast\[images\]"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"planarconfig": "separate"}, "layout that OpenCV misreads"),
        ({"extrasamples": ["assocalpha"]}, "premultiplied"),
        ({"dtype": np.float32}, "floating pixels run from"),
        ({"dtype": np.float64}, "floating TIFF of 64 bits"),
        ({"dtype": np.float32, "extrasamples": ["assocalpha"]}, "premultiplied alpha"),
        ({"dtype": np.int16}, "TIFF of a kind that cannot be read"),
        ({"dtype": np.uint32}, "TIFF of a kind that cannot be read"),
        ({"dtype": np.float32, "photometric": "minisblack"}, "floating pixels run from"),
        ({"dtype": np.float64, "photometric": "minisblack"}, "TIFF of a kind that cannot be read"),
        ({"dtype": np.int16, "photometric": "minisblack"}, "signed, floating"),
    ],
    ids=str,
)
def test_unreadable_tiff_is_named_never_cut(tmp_path, options, message):
    import tifffile

    dtype = options.get("dtype", np.uint16)
    options = {key: value for key, value in options.items() if key != "dtype"}
    channels = 4 if "extrasamples" in options else 3
    options = {"photometric": "rgb", **options}
    pixels = (noise(40, 37, channels, np.uint16) // 2).astype(dtype)
    if options["photometric"] != "rgb":
        pixels = pixels[..., 0]
    if "planarconfig" in options:
        pixels = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_float_tiff_of_another_writer(tmp_path, channels, orientation, byteorder):
    import tifffile

    pixels = np.random.default_rng(channels).random((9, 7, channels), np.float32)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels[..., 0] if channels == 1 else pixels,
        photometric="minisblack" if channels == 1 else "rgb",
        extrasamples=["unassalpha"] if channels == 4 else None,
        byteorder=byteorder,
        resolution=(300, 150),
        resolutionunit="INCH",
        metadata=None,
        extratags=[(ORIENTATION, 3, 1, orientation, True), (MAKE, 2, 6, "Maker", True)],
    )
    picture = read(tmp_path / "a.tif")
    upright = pixels if orientation == 1 else pixels.swapaxes(0, 1)[:, ::-1]
    np.testing.assert_array_equal(picture.pixels, upright)
    assert picture.metadata.dpi == (300, 150)
    assert parse_exif(picture.metadata.exif)[MAKE] == "Maker"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_float_tiff_means_the_same_to_other_readers(tmp_path, channels):
    import tifffile

    pixels = np.random.default_rng(0).random((300, 7, channels), np.float32)
    path = write(
        tmp_path / "a.tiff", Picture(pixels, Metadata(exif_block(), SRGB, XMP, (300, 300)))
    )
    assert tifffile.imread(path).shape == (300, 7, channels)[: 2 if channels == 1 else 3]
    np.testing.assert_array_equal(tifffile.imread(path).reshape(pixels.shape), pixels)
    again = read(path)
    np.testing.assert_array_equal(again.pixels, pixels)
    assert again.metadata.icc == SRGB and again.metadata.dpi == (300, 300)
    assert again.metadata.xmp == XMP.replace(b'"6"', b'"1"')
    assert parse_exif(again.metadata.exif)[MODEL] == "Model 7"


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}], ids=str)
def test_gray_and_alpha_of_another_tiff_writer(tmp_path, dtype, options):
    import tifffile

    pixels = np.random.default_rng(0).random((40, 7, 2), np.float32)
    pixels = pixels if dtype is np.float32 else (pixels * 65535).astype(np.uint16)
    about = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "metadata": None}
    orientation = {"extratags": [(ORIENTATION, 3, 1, 6, True)], "rowsperstrip": 16}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **about, **orientation, **options)
    upright = pixels.swapaxes(0, 1)[:, ::-1]
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, upright)


@pytest.mark.parametrize("change", ["lzw", "short", "garbage", "premultiplied"])
def test_gray_and_alpha_that_cannot_be_read(tmp_path, change):
    import tifffile

    path, pixels = tmp_path / "a.tif", noise(40, 7, 2, np.uint16)
    alpha = "assocalpha" if change == "premultiplied" else "unassalpha"
    options = {"photometric": "minisblack", "extrasamples": [alpha], "compression": "zlib"}
    tifffile.imwrite(path, pixels, metadata=None, **options)
    data = bytearray(path.read_bytes())
    if change == "lzw":
        at = data.index(struct.pack("<HHI", 259, 3, 1))
        data[at + 8] = 5
    elif change == "short":
        del data[-40:]
    elif change == "garbage":
        data[-200:-100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"layout that cannot be read|damaged or truncated"):
        read(path)


def test_floating_pixels_that_are_not_finite_are_refused(tmp_path):
    pixels = np.full((5, 5, 3), 0.5, np.float32)
    pixels[2, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        read(write(tmp_path / "a.tiff", Picture(pixels)))
    with pytest.raises(ValueError, match="PNG cannot hold floating pixels; write tiff"):
        write(tmp_path / "a.png", Picture(pixels))


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_where_white_is_zero(tmp_path, dtype):
    import tifffile

    gray = noise(8, 9, 1, dtype)
    tifffile.imwrite(
        tmp_path / "a.tif", np.iinfo(dtype).max - gray[..., 0], photometric="miniswhite"
    )
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, gray)


def test_cmyk_goes_through_its_profile(tmp_path):
    image = Image.new("CMYK", (8, 6), (0, 255, 255, 0))
    image.save(tmp_path / "plain.jpg")
    with pytest.raises(ValueError, match="CMYK without an ICC profile"):
        read(tmp_path / "plain.jpg")
    image.save(tmp_path / "wrong.jpg", icc_profile=SRGB)  # a profile of another colour space
    with pytest.raises(ValueError, match="CMYK whose ICC profile cannot be used"):
        read(tmp_path / "wrong.jpg")
    image.save(tmp_path / "cmyk.tif", icc_profile=seeds.cmyk_profile())
    picture = read(tmp_path / "cmyk.tif")
    assert picture.metadata.icc == b""  # pixels are sRGB now
    assert picture.pixels.shape == (6, 8, 3)
    red, green, blue = picture.pixels[0, 0].astype(int)
    assert red > 200 and green < 80 and blue < 80


@pytest.mark.parametrize("ext", ["gif", "webp", "png", "tiff"])
def test_animated_and_paged_files_are_refused(tmp_path, ext):
    frames = [Image.fromarray(noise(8, 8, 3) // (i + 1)) for i in range(3)]
    frames[0].save(tmp_path / f"a.{ext}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 pages" if ext == "tiff" else "has 3 frames"):
        read(tmp_path / f"a.{ext}")


def test_first_picture_of_mpo_is_read(tmp_path):
    frames = [Image.fromarray(smooth(8, 12, 3)), Image.fromarray(smooth(8, 12, 3))]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "a.jpg").pixels.shape == (8, 12, 3)


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    bomb = minimal_png(60_000, 60_000, 8, 2, b"\0" * 100)
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"60000x60000 px is over the limit.*--max-pixels"):
        read(tmp_path / "bomb.png")
    write(tmp_path / "a.png", Picture(smooth(10, 10, 3)))
    with pytest.raises(ValueError, match="over the limit of 99 px"):
        read(tmp_path / "a.png", max_pixels=99)
    assert read(tmp_path / "a.png", max_pixels=100).pixels.shape == (10, 10, 3)
    assert Image.MAX_IMAGE_PIXELS  # the caller's own limit is as it was


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated File:UserWarning")
@pytest.mark.parametrize("ext", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_truncated_files_are_refused(tmp_path, ext):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / f"a.{ext}")
    data = (tmp_path / f"a.{ext}").read_bytes()
    for part in (4, 30, len(data) // 2, len(data) - len(data) // 8):
        (tmp_path / f"a.{ext}").write_bytes(data[:part])
        with pytest.raises(ValueError) as caught:
            read(tmp_path / f"a.{ext}")
        assert str(caught.value).startswith(f"{tmp_path}") and "\n" not in str(caught.value)


def test_truncated_sixteen_bit_colour_is_refused(tmp_path):
    data = write(tmp_path / "a.png", Picture(noise(64, 64, 3, np.uint16))).read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match="damaged or truncated PNG"):
        read(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ext", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_flipped_bytes_give_a_picture_or_one_line(tmp_path, ext):
    options = {"compression": "tiff_lzw"} if ext == "tiff" else {}
    file = io.BytesIO()
    Image.fromarray(smooth(24, 24, 3)).save(file, {"jpg": "JPEG"}.get(ext, ext.upper()), **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(file.getvalue())
        for place in rng.integers(0, min(len(data), 400), 4):
            data[place] = rng.integers(256)
        (tmp_path / f"a.{ext}").write_bytes(data)
        try:
            picture = read(tmp_path / f"a.{ext}", max_pixels=1 << 20)
            write(tmp_path / "b.png", picture)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        read(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="empty"):
        read(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="not a PNG, JPEG"):
        read(tmp_path / "text.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(images.Path, "read_bytes", refuse)
    with pytest.raises(OSError, match=r"a\.png: cannot be read: Permission denied"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "name, shape, bits, message",
    [
        ("a.jpg", (9, 9, 3), 16, "16-bit pixels to 8.*--ext png"),
        ("a.webp", (9, 9, 1), 16, "16-bit"),
        ("a.jpg", (9, 9, 4), 8, "transparency"),
        ("a.bmp", (9, 9, 2), 8, "transparency"),
        ("a.webp", (10, 16_384, 3), 8, "16383 px edge of WEBP"),
        ("a.jpg", (70_000, 10, 3), 8, "65535 px edge of JPEG"),
        ("a.tiff", (40_000, 40_000, 3), 8, "4 GiB of TIFF"),
        ("a.gif", (9, 9, 3), 8, r"cannot write '?\.gif"),
        ("a", (9, 9, 3), 8, "without an extension"),
    ],
)
def test_outputs_that_cannot_hold_a_picture(name, shape, bits, message):
    with pytest.raises(ValueError, match=message):
        check_output(name, *shape, bits=bits)


def test_pillow_has_no_sixteen_bit_colour():
    assert to_pil(noise(4, 4, 1, np.uint16)).mode == "I;16"
    with pytest.raises(ValueError, match="16-bit colour"):
        to_pil(noise(4, 4, 3, np.uint16))


@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, where):
    (tmp_path / "a.png").write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.png", Picture(smooth(8, 8, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_large_exif_is_left_out_of_jpeg_with_a_warning(tmp_path):
    big = Image.Exif()
    big[EXIF_IFD] = {MAKER_NOTE: bytes(70_000)}
    block = big.tobytes().removeprefix(b"Exif\0\0")
    with pytest.warns(UserWarning, match="does not fit JPEG"):
        write(tmp_path / "a.jpg", Picture(smooth(8, 8, 3), Metadata(exif=block, icc=SRGB)))
    after = read(tmp_path / "a.jpg").metadata
    assert after.exif == b"" and after.icc == SRGB


def test_messages_are_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "a.png")
    assert re.fullmatch(r"\S+a\.png: .+", str(caught.value))
