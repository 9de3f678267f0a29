"""`efrdn eval`: benchmark folders, the bicubic check, figures, table, JSON, bad data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efrdn_fast import (
    EFRDN,
    EFRDNFast,
    __version__,
    benchmarks,
    checkpoint,
    cli,
    evaluate,
    metrics,
)
from efrdn_fast.benchmarks import ImageSet, discover, find_pairs, load_pair, read_rgb
from efrdn_fast.evaluate import SelfEnsemble, bicubic_y, evaluate_set
from efrdn_fast.tables import bicubic_rows, paper_tables

ROWS = [(name, scale) for name in ("Set5", "Set14", "BSD100") for scale in (2, 3, 4)]


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(image: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with one set of two images, with LR files for x2 only."""
    for i, (height, width) in enumerate([(45, 52), (40, 61)]):
        hr = pixels(height, width, i)
        save(hr, tmp_path / "photos" / "HR" / f"p{i}.png")
        lr = benchmarks.reduce(hr[: height // 2 * 2, : width // 2 * 2].copy(), 2)
        save(lr, tmp_path / "photos" / "LR_bicubic" / "X2" / f"p{i}x2.png")
    return tmp_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = EFRDN(2, channels=16, distilled=4).eval()
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    return checkpoint.save(net, path, {"steps": 7})


@pytest.fixture
def run(capsys):
    """Runs `efrdn eval`; returns (status, output, errors)."""

    def call(*arguments):
        status = cli.main(["eval", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


@pytest.mark.parametrize(("name", "scale"), ROWS)
def test_bicubic_columns(data_root, name, scale):
    """The column of a network's protocol, and that every LR file is MATLAB bicubic."""
    (image_set,) = discover(data_root / "benchmark", [name])
    result = evaluate_set(image_set, scale)
    assert len(result.images) == {"Set5": 5, "Set14": 14, "BSD100": 100}[name]
    psnr, ssim = bicubic_rows()[name][f"x{scale}"]["rgb"]
    assert result.bicubic.psnr == pytest.approx(psnr, abs=0.0006)
    assert result.bicubic.ssim == pytest.approx(ssim, abs=0.00006)
    assert result.check.against == "measured"
    assert all(image.lr_is_matlab_bicubic and image.lr_source == "file" for image in result.images)
    for image in result.images:
        stored = bicubic_rows()[name][f"x{scale}"]["images"][image.name]
        assert (image.bicubic.psnr, image.bicubic.ssim) == pytest.approx(stored, abs=1e-4)


# BSD100 at one scale only: the protocol is the same, and it holds 100 images.
@pytest.mark.parametrize(("name", "scale"), [*ROWS[:6], ("BSD100", 4)])
def test_older_protocol(data_root, name, scale):
    """The measured Y column, and the published row within the tolerance used for it."""
    (image_set,) = discover(data_root / "benchmark", [name])
    scores = [
        bicubic_y(load_pair(pair, scale)[1], scale, gray=Image.open(pair.hr).mode == "L")
        for pair in find_pairs(image_set, scale)
    ]
    psnr, ssim = np.mean([(score.psnr, score.ssim) for score in scores], axis=0)
    assert (psnr, ssim) == pytest.approx(bicubic_rows()[name][f"x{scale}"]["y"], abs=0.0006)
    published = [float(x) for x in paper_tables()["bicubic_published"][name][f"x{scale}"]]
    assert abs(psnr - published[0]) <= evaluate.PUBLISHED_TOLERANCE[0]
    assert abs(ssim - published[1]) <= evaluate.PUBLISHED_TOLERANCE[1]


def copy_set5(data_root: Path, to: Path, scale: int = 4) -> Path:
    source = data_root / "benchmark" / "Set5"
    shutil.copytree(source / "HR", to / "HR", copy_function=shutil.copyfile)
    lr = Path("LR_bicubic") / f"X{scale}"
    shutil.copytree(source / lr, to / lr, copy_function=shutil.copyfile)
    return to


def test_refuses_lr_of_another_resizer(data_root, tmp_path, run):
    folder = copy_set5(data_root, tmp_path / "Set5")
    for file in (folder / "HR").iterdir():
        hr = Image.open(file)
        small = hr.resize((hr.width // 4, hr.height // 4), Image.Resampling.NEAREST)
        small.save(folder / "LR_bicubic" / "X4" / f"{file.stem}x4.png")
    status, out, err = run("--benchmark", tmp_path, "-s", 4, "--bicubic")
    assert status == 1
    assert not out
    assert "Set5 x4 in" in err
    assert "measured 28.430 / 0.8111" in err
    assert "5 of 5 LR files (baby, bird, butterfly, ...) are not MATLAB's bicubic" in err
    assert len(err.splitlines()) == 1
    status, out, _ = run("--benchmark", tmp_path, "-s", 4, "--bicubic", "--no-check")
    assert status == 0
    assert "only 0 of 5 LR files are MATLAB bicubic of HR; bicubic row not checked" in out


def test_refuses_other_images_and_names_the_first(data_root, tmp_path):
    folder = copy_set5(data_root, tmp_path / "Set5")
    hr = np.array(Image.open(folder / "HR" / "bird.png"))[:, ::-1, ::-1]  # colours swapped
    save(np.ascontiguousarray(hr), folder / "HR" / "bird.png")
    save(benchmarks.reduce(hr.copy(), 4), folder / "LR_bicubic" / "X4" / "birdx4.png")
    with pytest.raises(ValueError, match=r"HR images are not those .*first that differs: bird"):
        evaluate_set(ImageSet("Set5", folder), 4)


def test_refuses_a_set_with_an_image_missing(data_root, tmp_path):
    folder = copy_set5(data_root, tmp_path / "Set5")
    (folder / "HR" / "woman.png").unlink()
    with pytest.raises(ValueError, match=r"\(4 images here, 5 expected\)"):
        evaluate_set(ImageSet("Set5", folder), 4)


def test_part_of_a_set_is_checked_by_its_images(data_root, run):
    (image_set,) = discover(data_root / "benchmark", ["Set5"])
    result = evaluate_set(image_set, 4, limit=2)
    assert [image.name for image in result.images] == ["baby", "bird"]
    assert (result.check.against, result.check.note) == ("measured", "first 2 images")
    asked = ("--benchmark", data_root / "benchmark", "-s", 4, "--sets", "Set5", "--bicubic")
    assert "of the whole set" in run(*asked, "--limit", 2)[1]
    assert "of the whole set" not in run(*asked)[1]


def test_sets_with_a_published_row_only(data_root, tmp_path, monkeypatch):
    """As Urban100 and Manga109: the older protocol is followed and compared."""
    monkeypatch.setattr(evaluate, "bicubic_rows", dict)
    (image_set,) = discover(data_root / "benchmark", ["Set5"])
    result = evaluate_set(image_set, 3)
    assert (result.check.against, result.check.note) == ("published", "older protocol")
    assert result.check.expected.psnr == 30.39
    assert evaluate_set(image_set, 3, limit=1).check.note == "only part of the set"
    with pytest.raises(ValueError, match=r"Urban100 x3 .* published 24.460 / 0.7349"):
        evaluate_set(ImageSet("Urban100", image_set.folder), 3)


def test_custom_set_is_reported(photos, run):
    status, out, _ = run("--benchmark", photos, "-s", 2, "--bicubic")
    assert status == 0
    assert "photos (2)" in out
    assert "photos x2: LR files are MATLAB bicubic of HR, bit for bit" in out
    assert "bicubic row not checked (no known row)" in out


def test_lr_is_computed_where_there_is_none(photos, run):
    status, out, _ = run("--benchmark", photos, "-s", 3, "--bicubic")
    assert status == 0
    assert "photos x3: LR computed (MATLAB bicubic)" in out
    (pair, _) = find_pairs(ImageSet("photos", photos / "photos"), 3)
    lr, hr = load_pair(pair, 3)
    assert pair.lr is None
    assert (lr.shape, hr.shape) == ((15, 17, 3), (45, 51, 3))


def test_a_folder_of_nothing_but_images(photos, run):
    status, out, _ = run("--benchmark", photos / "photos" / "HR", "-s", 4, "--bicubic")
    assert status == 0
    assert "HR (2)" in out


def test_computed_lr_gives_the_same_figures(photos):
    with_files = evaluate_set(ImageSet("photos", photos / "photos"), 2)
    shutil.rmtree(photos / "photos" / "LR_bicubic")
    computed = evaluate_set(ImageSet("photos", photos / "photos"), 2)
    assert computed.bicubic == with_files.bicubic
    assert {image.lr_source for image in computed.images} == {"computed"}


def test_network_and_json(photos, weights, run, tmp_path):
    out_file = tmp_path / "out" / "figures.json"
    status, out, _ = run(
        *("--benchmark", photos, "-s", 2, "--model", weights, "--out", out_file, "--device", "cpu")
    )
    assert status == 0
    assert f"this network: {weights}" in out
    assert "EFRDN, published" in out
    record = json.loads(out_file.read_text())
    assert record["efrdn_fast"] == __version__
    assert record["versions"]["torch"] == torch.__version__
    network = record["scales"]["x2"]["network"]
    assert network["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network["training"] == {"steps": 7}
    assert (network["device"], network["dtype"], network["backend"]) == ("cpu", "auto", "auto")
    fast = EFRDNFast.from_pretrained(weights)
    with torch.inference_mode():
        fast(torch.rand(1, 3, 9, 9))
    assert network["plan"] == fast.plan
    figures = record["scales"]["x2"]["sets"]["photos"]
    assert [image["name"] for image in figures["images"]] == ["p0", "p1"]
    lr = photos / "photos" / "LR_bicubic" / "X2" / "p0x2.png"
    image = figures["images"][0]
    assert image["lr_sha256"] == hashlib.sha256(lr.read_bytes()).hexdigest()
    assert (image["tile"], image["dtype"]) == (0, "fp32")

    # The same by hand.
    net = EFRDN.from_pretrained(weights)
    scores = []
    for pair in find_pairs(ImageSet("photos", photos / "photos"), 2):
        lr, hr = load_pair(pair, 2)
        with torch.no_grad():
            sr = net(torch.from_numpy(lr).permute(2, 0, 1)[None] / 255)
        sr = (sr[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        scores.append((metrics.psnr(sr, hr, 2), metrics.ssim(sr, hr, 2)))
    psnr, ssim = np.mean(scores, axis=0)
    assert figures["model"]["psnr"] == pytest.approx(psnr, abs=0.01)
    assert figures["model"]["ssim"] == pytest.approx(ssim, abs=1e-4)


def test_options_change_the_network(photos, weights):
    (pair, _) = find_pairs(ImageSet("photos", photos / "photos"), 2)
    lr, _ = load_pair(pair, 2)
    variants = [{}, {"segment_tokens": 32}, {"self_ensemble": True}, {"tile": 16}]
    outs = [evaluate.load_network(weights, 2, **v).upscaler.array(lr) for v in variants]
    for out, variant in zip(outs[1:], variants[1:], strict=True):
        assert out.shape == outs[0].shape
        assert not np.array_equal(out, outs[0]), variant


def test_self_ensemble_turns_back():
    """A network that is the same for all eight turns is its own mean."""

    class Nearest(torch.nn.Module):
        config, scale = None, 2

        def forward(self, x):
            return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    x = torch.rand(1, 3, 4, 7)
    torch.testing.assert_close(SelfEnsemble(Nearest())(x), Nearest()(x))
    ensemble = SelfEnsemble(EFRDN(2, channels=16).eval())
    with torch.no_grad():
        torch.testing.assert_close(ensemble(x.flip(3)), ensemble(x).flip(3))
        torch.testing.assert_close(ensemble(x.mT), ensemble(x).mT)


@pytest.mark.parametrize("folder", ["B100", "BSD100", "BSDS100", "bsd100"])
def test_names_of_bsd100(tmp_path, folder):
    save(pixels(20, 20), tmp_path / folder / "HR" / "a.png")
    assert [(s.name, s.folder.name) for s in discover(tmp_path)] == [("BSD100", folder)]
    assert discover(tmp_path, ["B100"]) == discover(tmp_path, ["BSD100"])
    assert discover(tmp_path / folder)[0].name == "BSD100"


def test_sets_in_the_papers_order(tmp_path):
    for name in ("mine", "Manga109", "Urban100", "B100", "Set14", "Set5", "art"):
        save(pixels(20, 20), tmp_path / name / "HR" / "a.png")
    (tmp_path / "empty").mkdir()
    names = [image_set.name for image_set in discover(tmp_path)]
    assert names == ["Set5", "Set14", "BSD100", "Urban100", "Manga109", "art", "mine"]
    assert [s.name for s in discover(tmp_path, ["mine", "Set5"])] == ["mine", "Set5"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def widen(path: Path) -> None:
    save(pixels(22, 27), path)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((45, 52), 900, np.uint16)).save(path)


def transparent(path: Path) -> None:
    save(np.dstack([pixels(45, 52), np.full((45, 52), 90, np.uint8)]), path)


HR, LR = "photos/HR/p0.png", "photos/LR_bicubic/X2/p0x2.png"


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        (HR, truncate, ["p0.png", "damaged"]),
        (HR, lambda path: path.write_bytes(b""), ["p0.png", "empty"]),
        (HR, lambda path: path.write_text("no image"), ["p0.png"]),
        (HR, sixteen_bits, ["p0.png", "16 bits", "8-bit RGB or gray"]),
        (HR, transparent, ["p0.png", "transparent", "8-bit RGB or gray"]),
        (HR, lambda path: save(pixels(5, 40), path), ["p0.png", "40x5", "at least 6"]),
        (LR, truncate, ["p0x2.png", "damaged"]),
        (LR, widen, ["p0x2.png", "27x22", "p0.png", "26x22"]),
        (LR, Path.unlink, ["p0x2.png", "missing"]),
    ],
)
def test_bad_files_are_named(photos, run, file, spoil, words):
    spoil(photos / file)
    status, out, err = run("--benchmark", photos, "-s", 2, "--bicubic")
    assert status == 1
    assert not out
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err


def test_image_smaller_than_the_ssim_window(photos, run):
    save(pixels(15, 40), photos / "photos" / "HR" / "p0.png")
    status, _, err = run("--benchmark", photos, "-s", 3, "--bicubic")
    assert status == 1
    assert "p0.png: ssim: [15, 39] pixels without a border of 3 leave 9 x 33" in err


def test_files_of_one_name(photos):
    save(pixels(45, 52), photos / "photos" / "HR" / "p0.bmp")
    with pytest.raises(ValueError, match=r"p0\.bmp and .*p0\.png are both 'p0'"):
        find_pairs(ImageSet("photos", photos / "photos"), 2)


def test_two_folders_of_one_set(tmp_path):
    for name in ("B100", "BSDS100"):
        save(pixels(20, 20), tmp_path / name / "HR" / "a.png")
    with pytest.raises(ValueError, match=r"B100 and .*BSDS100 are both BSD100"):
        discover(tmp_path)


def test_folders_without_images(tmp_path, run):
    status, _, err = run("--benchmark", tmp_path / "nothing", "-s", 2, "--bicubic")
    assert status == 1
    assert "nothing' does not exist" in err
    status, _, err = run("--benchmark", tmp_path, "-s", 2, "--bicubic")
    assert status == 1
    assert "no benchmark set in" in err
    (tmp_path / "Set5" / "HR").mkdir(parents=True)
    status, _, err = run("--benchmark", tmp_path, "-s", 2, "--bicubic")
    assert status == 1
    assert "Set5: no image" in err


def test_bad_arguments(photos, weights, run, monkeypatch, capsys):
    monkeypatch.delenv("EFRDN_FAST_DATA", raising=False)
    status, _, err = run("--benchmark", photos, "-s", 2, "--sets", "Set5", "--bicubic")
    assert status == 1
    assert "no set Set5 in" in err
    assert "it has photos" in err
    here = ("--benchmark", photos)
    for arguments, message in (
        (["-s", 2, "--bicubic"], "give --benchmark DIR"),
        ([*here, "-s", 4, "--model", weights], "upscales by 2, not by 4"),
        ([*here, "-s", 5], "invalid choice"),
        ([*here, "-s", 2, "--limit", 0], "at least 1"),
        ([*here], "required: -s"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_default_folder(photos, run, monkeypatch):
    (photos / "benchmark").mkdir()
    (photos / "photos").rename(photos / "benchmark" / "photos")
    monkeypatch.setenv("EFRDN_FAST_DATA", str(photos))
    assert run("-s", 2, "--bicubic")[0] == 0


def test_gray_and_opaque_files_are_rgb(tmp_path):
    gray = pixels(20, 24)[..., 0]
    assert np.array_equal(read_rgb(save(gray, tmp_path / "g.png")), np.dstack([gray] * 3))
    opaque = np.dstack([pixels(20, 24), np.full((20, 24), 255, np.uint8)])
    assert np.array_equal(read_rgb(save(opaque, tmp_path / "o.png")), opaque[..., :3])
