"""Training data: cache, validation split, and samples as a function of (seed, step, index)."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from efrdn_fast.data import (
    VALIDATION_IMAGES,
    Patches,
    build_cache,
    find_images,
    loader,
    split_validation,
)
from efrdn_fast.resize import imresize


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (h, w) in enumerate([(40, 61), (33, 50), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_cache_holds_cropped_hr_and_its_bicubic_lr(photos, tmp_path):
    cache = build_cache(find_images([photos]), 4, tmp_path / "cache")
    hr = cache.hr(0)
    assert hr.shape == (40, 60, 3)
    np.testing.assert_array_equal(hr, np.asarray(Image.open(photos / "0.png"))[:40, :60])
    expected = imresize(torch.tensor(hr).permute(2, 0, 1), 1 / 4).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(cache.lr(0), expected)


def test_cache_is_built_once_and_again_when_an_image_changes(photos, tmp_path):
    first = build_cache(find_images([photos]), 2, tmp_path / "cache")
    stamp = (first.folder / "hr.bin").stat().st_mtime_ns
    again = build_cache(find_images([photos]), 2, tmp_path / "cache")
    assert again.folder == first.folder
    assert (again.folder / "hr.bin").stat().st_mtime_ns == stamp
    Image.new("RGB", (30, 30)).save(photos / "0.png")
    assert build_cache(find_images([photos]), 2, tmp_path / "cache").folder != first.folder


def test_unreadable_image_is_named_and_left_out_or_an_error(photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    images = find_images([photos])
    with pytest.raises(ValueError, match=r"broken\.png cannot be used: unreadable"):
        build_cache(images, 4, tmp_path / "cache", strict=True)
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):  # decoded, then found
        with pytest.warns(UserWarning, match=r"broken\.png is left out: unreadable"):
            cache = build_cache(images, 4, tmp_path / "cache")
        assert len(cache) == 3
        assert [entry["path"] for entry in cache.skipped] == [str(photos / "broken.png")]
    with pytest.raises(ValueError, match=r"broken\.png cannot be used: unreadable.*remove it"):
        build_cache(images, 4, tmp_path / "cache", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_cache(images, 4, tmp_path / "cache", quiet=True)


def test_image_below_three_lr_pixels_is_named_and_left_out_or_an_error(photos, tmp_path):
    Image.new("RGB", (11, 40)).save(photos / "narrow.png")
    images = find_images([photos])
    with pytest.raises(ValueError, match=r"narrow\.png cannot be used: smaller than 12 pixels"):
        build_cache(images, 4, tmp_path / "cache", strict=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"narrow\.png is left out: smaller than 12 pixels"):
            assert len(build_cache(images, 4, tmp_path / "cache")) == 3


def test_whatever_a_decoder_raises_leaves_the_image_out(photos, tmp_path, monkeypatch):
    def damaged(image, mode):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "convert", damaged)
    with pytest.raises(ValueError, match=r"none of 3 images.*0\.png: unreadable: unpack requires"):
        build_cache(find_images([photos]), 4, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_images_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image"):
        find_images([tmp_path])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images([tmp_path / "missing"])


def test_images_smaller_than_a_patch_are_never_drawn(photos, tmp_path):
    cache = build_cache(find_images([photos]), 4, tmp_path / "cache")
    patches = Patches(cache, seed=0)
    for step in range(8):
        lr, hr = patches[step, 0, 16]  # only 2.png is 16 LR pixels wide and high
        assert (lr.shape, hr.shape) == ((3, 16, 16), (3, 64, 64))
    with pytest.raises(ValueError, match="as large as a patch of 17"):
        patches.ends(17)
    assert patches.too_small(16) == [str(photos / name) for name in ("0.png", "1.png")]


def test_patch_pair_is_aligned(photos, tmp_path):
    cache = build_cache(find_images([photos]), 2, tmp_path / "cache")
    patches = Patches(cache, seed=3)
    for step, index in np.ndindex(6, 4):
        lr, hr = patches[step, index, 12]
        # Inside, away from the patch border, the LR of the HR patch is the LR patch, but for the
        # rounding between passes, whose order a rotation swaps; one pixel off would differ by 20.
        inner = imresize(hr, 1 / 2)[:, 3:-3, 3:-3]
        assert (inner.int() - lr[:, 3:-3, 3:-3].int()).abs().max() <= 2


def test_all_flips_and_rotations_occur(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(folder / "a.png")
    patches = Patches(build_cache(find_images([folder]), 2, tmp_path / "c"), seed=1)
    assert len({patches[n, 0, 4][1].numpy().tobytes() for n in range(100)}) == 8
    plain = Patches(patches.cache, seed=1, augment=False)
    assert len({plain[n, 0, 4][1].numpy().tobytes() for n in range(20)}) == 1


def test_samples_do_not_depend_on_workers_processes_or_the_first_step(photos, tmp_path):
    def sizes(step):
        return (8, 4) if step < 2 else (10, 2)

    patches = Patches(build_cache(find_images([photos]), 4, tmp_path / "cache"), seed=7)
    plain = list(loader(patches, sizes, 0, 4))
    assert [tuple(lr.shape) for lr, _ in plain] == [(4, 3, 8, 8)] * 2 + [(2, 3, 10, 10)] * 2
    for workers in (1, 2):
        for (a, b), (c, d) in zip(plain, loader(patches, sizes, 0, 4, workers), strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
    for (a, _), (b, _) in zip(plain[2:], loader(patches, sizes, 2, 4), strict=True):
        assert torch.equal(a, b)
    for rank in (0, 1):
        share = loader(patches, sizes, 0, 4, 0, rank, 2)
        for (a, _), (b, _) in zip(plain, share, strict=True):
            assert torch.equal(a[rank::2], b)
    other = next(iter(loader(Patches(patches.cache, seed=8), sizes, 0, 1)))[0]
    assert not torch.equal(plain[0][0], other)


def test_validation_split(tmp_path):
    div2k = [tmp_path / "DIV2K_train_HR" / f"{i:04d}.png" for i in (1, 2, 800, 801, 900)]
    train, val = split_validation(div2k)
    assert [p.stem for p in train] == ["0001", "0002", "0800"]
    assert [p.stem for p in val] == ["0801", "0900"]
    plain = [tmp_path / f"{i}.png" for i in range(100)]
    train, val = split_validation(plain)
    assert len(val) == 5 and not set(train) & set(val) and len(train) == 95


def test_fixed_validation_list_is_in_the_training_images(data_root):
    stems = {f"{p.parent.name}/{p.stem}" for p in find_images([data_root / "train"])}
    assert len(VALIDATION_IMAGES) == 20
    assert stems >= VALIDATION_IMAGES
