"""Files in, files out: depth, channels and colour kept."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from PIL import Image

from efrdn_fast.images import Picture, from_pil, read, write
from efrdn_fast.metadata import Metadata
from tests.fuzz import seeds
from tests.image_files import (
    MAKE,
    MODEL,
    ORIENTATION,
    SRGB,
    XMP,
    exif_block,
    minimal_png,
    noise,
    parse_exif,
    png_chunk,
    smooth,
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
