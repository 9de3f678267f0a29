"""Training that goes wrong: bad steps, divergence, what is kept then; bad devices and states."""

from __future__ import annotations

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from efrdn_fast.cli import main
from efrdn_fast.options import TrainOptions
from efrdn_fast.train import Trainer, train
from tests.training_runs import TINY, assert_same_weights, run_options, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def bad_steps(monkeypatch):
    """Call it with the steps (1-based) whose loss shall be NaN from then on."""
    loss = Trainer.loss

    def choose(*steps):
        def broken(self, sr, hr):
            return loss(self, sr, hr) * (float("nan") if self.step + 1 in steps else 1)

        monkeypatch.setattr(Trainer, "loss", broken)

    return choose


def contents(out):
    return {name: (out / name).read_bytes() for name in ("state.pt", "net.safetensors")}


def saved_step(out):
    return torch.load(out / "state.pt", weights_only=True)["step"]


def flags(**options):
    """`name=None` is a flag without a value."""
    return [
        f"--{name.replace('_', '-')}" + ("" if value is None else f"={value}")
        for name, value in {**TINY, **options}.items()
    ]


def efrdn_train(photos, out, **options):
    """Exit status of `efrdn train` in this process."""
    try:
        return main(["train", str(photos), f"--out={out}", "--no-tensorboard", *flags(**options)])
    except SystemExit as end:
        return end.code


def batch():
    return torch.zeros(2, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, 3, 24, 24, dtype=torch.uint8)


def test_non_finite_step_changes_nothing_and_a_streak_ends_the_run(
    photos, tmp_path, bad_steps, monkeypatch
):
    bad_steps(*range(1, 7))
    trainer = Trainer(TrainOptions(**TINY))
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    assert np.isnan(trainer.train_step(*batch()))
    assert trainer.skipped == 1
    assert_same_weights(trainer.net.state_dict(), before)
    monkeypatch.setattr("efrdn_fast.train.BAD_STEPS_LIMIT", 3)
    with pytest.raises(RuntimeError, match=r"not finite 3 steps in a row.*no checkpoint was"):
        train([photos], TrainOptions(**TINY), run_options(tmp_path))
    assert not (tmp_path / "state.pt").exists()


def test_streak_leaves_the_last_good_checkpoint_and_resumes_from_it(
    photos, tmp_path, bad_steps, monkeypatch
):
    options = TrainOptions(**TINY)
    monkeypatch.setattr("efrdn_fast.train.BAD_STEPS_LIMIT", 3)
    bad_steps(4, 5, 6)
    with pytest.raises(RuntimeError, match=r"3 steps in a row, up to step 6.*\(step 2\) is kept"):
        train([photos], options, run_options(tmp_path))
    kept = contents(tmp_path)
    assert saved_step(tmp_path) == 2
    with pytest.raises(RuntimeError, match=r"up to step 6.*\(step 2\) is kept"):
        train([photos], options, run_options(tmp_path, save_freq=1000))
    assert contents(tmp_path) == kept
    bad_steps()
    resumed = load_file(train([photos], options, run_options(tmp_path)))
    unbroken = train([photos], options, run_options(tmp_path / "unbroken"))
    assert_same_weights(resumed, load_file(unbroken))


def test_run_whose_last_steps_are_bad_fails_and_keeps_the_checkpoint(
    photos, tmp_path, bad_steps, capsys
):
    bad_steps(5, 6)
    assert efrdn_train(photos, tmp_path, save_freq=4) == 1
    kept = contents(tmp_path)
    assert saved_step(tmp_path) == 4
    capsys.readouterr()
    assert efrdn_train(photos, tmp_path, save_freq=1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "last finite at step 4 of 6" in error
    assert error.endswith("the last good checkpoint (step 4) is kept")
    assert contents(tmp_path) == kept


def test_run_that_time_ends_at_a_bad_step_fails_and_keeps_the_checkpoint(
    photos, tmp_path, bad_steps
):
    bad_steps(2)
    train([photos], TrainOptions(**TINY), run_options(tmp_path, minutes=1e-9))
    kept = contents(tmp_path)
    with pytest.raises(RuntimeError, match=r"last finite at step 1 of 2.*\(step 1\) is kept"):
        train([photos], TrainOptions(**TINY), run_options(tmp_path, minutes=1e-9, save_freq=1))
    assert contents(tmp_path) == kept


def test_stop_at_a_bad_step_says_that_it_is_not_saved(photos, tmp_path, bad_steps, monkeypatch):
    step = Trainer.train_step

    def stopping(self, lr, hr):
        value = step(self, lr, hr)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return value

    monkeypatch.setattr(Trainer, "train_step", stopping)
    bad_steps(3)
    with (
        pytest.warns(UserWarning, match=r"not saved; the last good checkpoint \(step 2\) is kept"),
        pytest.raises(KeyboardInterrupt),
    ):
        train([photos], TrainOptions(**TINY), run_options(tmp_path))
    assert saved_step(tmp_path) == 2


def test_checkpoint_due_at_a_bad_step_is_written_after_the_next_good_one(
    photos, tmp_path, bad_steps, monkeypatch
):
    bad_steps(2)
    unbroken = load_file(train([photos], TrainOptions(**TINY), run_options(tmp_path / "a")))
    step = Trainer.train_step

    def killed(self, lr, hr):
        if self.step == 3:
            raise MemoryError
        return step(self, lr, hr)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(MemoryError):
        train([photos], TrainOptions(**TINY), run_options(tmp_path / "b"))
    assert saved_step(tmp_path / "b") == 3
    monkeypatch.setattr(Trainer, "train_step", step)
    resumed = load_file(train([photos], TrainOptions(**TINY), run_options(tmp_path / "b")))
    assert_same_weights(resumed, unbroken)
    assert torch.load(tmp_path / "b" / "state.pt", weights_only=True)["skipped"] == 1


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, "not finite 20 steps in a row"),
        (1e38, "weights are not finite after step 1"),
    ],
)
def test_diverged_weights_are_never_saved(photos, tmp_path, capsys, lr, message):
    changes = {"lr": lr, "total_iter": 30, "save_freq": 1 if lr > 1e37 else 2}
    assert efrdn_train(photos, tmp_path, **changes) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and "no checkpoint was written" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_loss_of_a_window_without_a_good_step_is_null(photos, tmp_path, bad_steps):
    bad_steps(1, 2)
    options = TrainOptions(**{**TINY, "total_iter": 2})
    with pytest.raises(RuntimeError, match="last finite at step 0 of 2"):
        train([photos], options, run_options(tmp_path, tensorboard=True))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "loss" in row]
    assert row["loss"] is None and row["skipped"] == 2


def test_overflow_of_the_loss_scale_is_no_streak_until_the_scale_is_used_up(monkeypatch):
    trainer = Trainer(TrainOptions(**TINY))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    # A finite loss whose gradient is not.
    monkeypatch.setattr(Trainer, "loss", lambda self, sr, hr: (sr - sr.detach()).sum().sqrt())
    assert np.isnan(trainer.train_step(*batch()))
    assert (trainer.skipped, trainer.bad_streak, trainer.scaler.get_scale()) == (1, 0, 1.0)
    assert np.isnan(trainer.train_step(*batch()))
    assert (trainer.skipped, trainer.bad_streak) == (2, 1)


def test_resume_from_another_folder_leaves_a_checkpoint_in_its_own(photos, tmp_path):
    options = TrainOptions(**{**TINY, "total_iter": 1, "warmup": 0})
    first = train([photos], options, run_options(tmp_path / "a"))
    state = str(tmp_path / "a" / "state.pt")
    second = train([photos], options, run_options(tmp_path / "b"), resume=state)
    assert_same_weights(load_file(second), load_file(first))


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"device": "meta"}, 2, "device 'meta' holds no data; use cpu or cuda"),
        ({"device": "nope"}, 2, "device 'nope' cannot be used here: "),
        ({"autocast": "fp16"}, 2, "fp16 needs CUDA for its loss scaling; use bf16 or fp32"),
        ({"init": "nope"}, 1, "checkpoint 'nope' does not exist"),
    ],
)
def test_what_cannot_be_used_here_is_refused_before_anything_is_made(
    photos, tmp_path, capsys, changes, status, message
):
    assert efrdn_train(photos, tmp_path / "out", **changes) == status
    captured = capsys.readouterr().err
    assert message in captured and "Traceback" not in captured
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def state(photos, tmp_path_factory):
    """Entries of the state of a run of one step."""
    out = tmp_path_factory.mktemp("state")
    train([photos], TrainOptions(**TINY), run_options(out, minutes=1e-9))
    return torch.load(out / "state.pt", weights_only=True)


def damaged(state, damage):
    state = {**state, "net": dict(state["net"])}
    damage(state)
    return state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("step"), "it has no step"),
        (lambda s: [s.pop(k) for k in ("ema", "scaler")], "it has no ema, scaler"),
        (lambda s: s.update(version=2), "it is of version 2, expected 1"),
        (
            lambda s: s.update(step="3"),
            "TypeError: 'str' object cannot be interpreted as an integer",
        ),
        (lambda s: s.update(step=7), "it is at step 7 of 6, 0 of them skipped"),
        (lambda s: s.update(options=None), "'NoneType' object is not a mapping"),
        (lambda s: s["net"].pop("head.weight"), "its net does not fit EFRDN: missing: head.weight"),
        (lambda s: s.update(ema=[]), "'list' object has no attribute 'keys'"),
        (lambda s: s.update(optimizer={}), "KeyError: 'param_groups'"),
        (lambda s: s["net"].update({"head.bias": torch.full((32,), math.nan)}), "not finite"),
    ],
)
def test_state_that_is_not_whole_is_refused_in_words(
    photos, tmp_path, capsys, state, damage, message
):
    torch.save(damaged(state, damage), tmp_path / "state.pt")
    assert efrdn_train(photos, tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "state.pt: not a training state to resume from: " in line and message in line
    assert line.endswith("give a state.pt that `efrdn train` wrote, or start anew (--resume never)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk\n", "it holds more than tensors, or is damaged (KeyError 174812789)"),
        (b"", "it holds more than tensors, or is damaged (EOFError)"),
        (b"M", "it holds more than tensors, or is damaged (unpack requires"),
    ],
)
def test_file_that_is_no_state_is_refused_in_words(photos, tmp_path, capsys, content, message):
    (tmp_path / "state.pt").write_bytes(content)
    assert efrdn_train(photos, tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"not a training state to resume from: {message}" in line
    assert "start anew (--resume never)" in line
    torch.save([1, 2], tmp_path / "state.pt")
    assert efrdn_train(photos, tmp_path) == 1
    assert "it holds a list, expected a dictionary" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["3.png", "1b.png"], ids=["training", "validation"])
def test_image_that_cannot_be_used_is_named_in_every_run_or_an_error(tmp_path, capsys, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_photos(folder)
    (folder / name).write_bytes(b"not a picture")
    rest = {"total_iter": 1, "warmup": 0}
    assert efrdn_train(folder, tmp_path / "a", **rest, strict=None) == 1
    assert f"{name} cannot be used: unreadable" in capsys.readouterr().err
    for _ in range(2):
        assert efrdn_train(folder, tmp_path / "b", **rest) == 0
        warning = f"warning: image {folder / name} is left out: unreadable"
        assert capsys.readouterr().err.count(warning) == 1
    assert efrdn_train(folder, tmp_path / "b", **rest, strict=None) == 1
    assert f"{name} cannot be used: unreadable" in capsys.readouterr().err


def test_images_that_no_patch_fits_in_are_named(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 23)).save(tmp_path / "photos" / "flat.png")
    options = TrainOptions(**{**TINY, "total_iter": 1, "warmup": 0, "stages": "7x2@0.5"})
    message = r"1 of 2 training images are smaller than a patch of 6 LR pixels.*flat\.png"
    for _ in range(2):
        with pytest.warns(UserWarning, match=message):
            train([tmp_path / "photos"], options, run_options(tmp_path / "out"))


def test_images_that_are_all_for_validation_are_an_error(photos, tmp_path):
    folder = tmp_path / "DIV2K_valid_HR"
    folder.mkdir()
    shutil.copy(photos / "0.png", folder / "0801.png")
    with pytest.raises(ValueError, match="all 1 images are kept for validation"):
        train([folder], TrainOptions(**TINY), run_options(tmp_path))
