"""Files that are damaged or cannot be kept: named in one line, nothing left behind."""

from __future__ import annotations

import errno
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from efrdn_fast import images
from efrdn_fast.encode import check_output, to_pil
from efrdn_fast.images import Picture, read, write
from tests.image_files import minimal_png, noise, smooth


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


def test_messages_are_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "a.png")
    assert re.fullmatch(r"\S+a\.png: .+", str(caught.value))
