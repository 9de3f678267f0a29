"""The content check finds altered copies of test images, and nothing else."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from efrdn_fast.cli import main
from efrdn_fast.contamination import find_copies, fingerprint


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


def centre(image, share=0.55):
    w, h = image.size
    left, top = int(w * (1 - share) / 2), int(h * (1 - share) / 2)
    return image.crop((left, top, w - left, h - top))


ALTERED = {
    "recompressed": jpeg,
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "cropped": centre,
    "cropped-enlarged": lambda image: (c := centre(image)).resize((c.width * 3 // 2,) * 2),
    "turned-mirrored": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    "darker": lambda image: image.point(lambda v: int(0.6 * v + 40)),
}


@pytest.fixture(scope="module")
def bird(data_root):
    return Image.open(data_root / "benchmark" / "Set5" / "HR" / "bird.png").convert("RGB")


@pytest.fixture(scope="module")
def others(data_root):
    """Images that show something else: nine training images and two test images."""
    train = sorted((data_root / "train" / "T91").iterdir())[:9]
    test = [data_root / "benchmark" / "Set5" / "HR" / f"{n}.png" for n in ("baby", "butterfly")]
    return [fingerprint(path) for path in (*train, *test)]


@pytest.mark.parametrize("name", ALTERED)
def test_altered_copy_is_found_and_nothing_else(name, bird, others):
    copy = fingerprint(ALTERED[name](bird))
    (match,) = find_copies([*others, copy], [fingerprint(bird)])
    assert match.train == "" and match.correlation > 0.9


def test_scale_of_a_copy_is_told(bird):
    (match,) = find_copies([fingerprint(ALTERED["halved"](bird))], [fingerprint(bird)])
    assert match.scale == pytest.approx(0.5, rel=0.02)


def test_image_without_structure_matches_nothing(bird):
    flat = fingerprint(Image.new("RGB", (100, 80), (90, 90, 90)))
    assert len(flat.points) == 0
    assert find_copies([flat], [fingerprint(bird)]) == []
    assert find_copies([fingerprint(bird)], [flat]) == []


def test_command_names_the_copy_and_fails(bird, data_root, tmp_path, capsys):
    train, benchmark = tmp_path / "train", tmp_path / "benchmark"
    for folder in (train, benchmark / "Set1" / "HR"):
        folder.mkdir(parents=True)
    bird.save(benchmark / "Set1" / "HR" / "bird.png")
    (train / "broken.png").write_bytes(b"not a picture")
    other = sorted((data_root / "train" / "T91").iterdir())[0]
    (train / other.name).write_bytes(other.read_bytes())
    arguments = ["train", str(train), "--check-images", str(benchmark)]
    assert main(arguments) == 0
    out, errors = capsys.readouterr()
    assert "0 copies of 1 test images among 1 training images" in out
    assert "broken.png is unreadable and left out" in errors
    centre(bird).save(train / "harmless_name.png")
    assert main(arguments) == 1
    assert "harmless_name.png shows " in capsys.readouterr().out
    assert main([*arguments, "--strict"]) == 1
    assert "broken.png is unreadable" in capsys.readouterr().err
    for path in (train / "harmless_name.png", train / other.name):
        path.unlink()
    assert main(arguments) == 1
    assert "no training image below" in capsys.readouterr().err
