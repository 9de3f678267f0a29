"""Training: exact resume after any end, atomic checkpoints, bad options."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from efrdn_fast import checkpoint
from efrdn_fast.model import EFRDN
from efrdn_fast.options import PRESETS, RunOptions, TrainOptions
from efrdn_fast.train import Trainer, _gpu_use, train
from efrdn_fast.warmstart import fit_tails
from tests.training_runs import TINY, assert_same_weights, run_options, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return load_file(train([photos], TrainOptions(**TINY), run_options(out)))


def command(photos, out, *extra):
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    code = "import sys; from efrdn_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    return [
        *(sys.executable, "-c", code, "train", str(photos), "--out", str(out), *arguments),
        *("--save-freq", "2", "--val-freq", "3", "--no-tensorboard", *extra),
    ]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.01)


def test_stopped_by_time_and_resumed_equals_unbroken(photos, unbroken, tmp_path):
    options = TrainOptions(**TINY)
    for _ in range(TINY["total_iter"] + 1):
        path = train([photos], options, run_options(tmp_path, minutes=1e-9, num_workers=1))
        step = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
        if step == TINY["total_iter"]:
            break
    assert_same_weights(load_file(path), unbroken)


def test_killed_and_resumed_equals_unbroken(photos, unbroken, tmp_path):
    process = subprocess.Popen(command(photos, tmp_path), cwd=tmp_path, env=_environment())
    wait_for(tmp_path / "state.pt", process)
    process.kill()
    process.wait()
    path = train([photos], TrainOptions(**TINY), run_options(tmp_path))
    assert_same_weights(load_file(path), unbroken)
    assert not list(tmp_path.glob("*.part"))


def test_terminated_saves_the_finished_step_and_says_so(photos, unbroken, tmp_path):
    process = subprocess.Popen(
        command(photos, tmp_path, "--save-freq", "1000", "--val-freq", "1"),
        cwd=tmp_path,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "state.pt").is_file()
    path = train([photos], TrainOptions(**TINY), run_options(tmp_path))
    assert_same_weights(load_file(path), unbroken)


def _environment():
    # The thread count must equal this process's, since it decides the order of sums.
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_result_is_a_checkpoint_with_its_record(photos, tmp_path):
    path = train(
        [photos], TrainOptions(**{**TINY, "total_iter": 3, "scale": 2}), run_options(tmp_path)
    )
    net = EFRDN.from_pretrained(path)
    assert net.scale == 2 and not net.training
    record = checkpoint.load(path).training
    assert record["steps"] == 3 and record["options"]["patch_size"] == 6
    assert np.isfinite(record["validation_psnr_db"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "psnr_db" in r] == [3]
    (row,) = [r for r in rows if "steps_per_s" in r]
    assert 0 < row["data_s"] < 3 / row["steps_per_s"]


def test_gpu_use_is_left_out_where_it_cannot_be_asked(monkeypatch):
    def missing(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert _gpu_use(torch.device("cuda")) == {} == _gpu_use(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    assert _gpu_use(torch.device("cuda")) == {"gpu_percent": 93}


def test_warm_start_takes_all_weights_and_resamples_the_tails_of_another_scale(tmp_path):
    net = EFRDN(4, ablation="no_fflb").eval()
    source = checkpoint.save(net, tmp_path / "x4.safetensors")
    stored = checkpoint.load(source).state_dict
    same = Trainer(TrainOptions(**{**TINY, "init": str(source)})).net.state_dict()
    assert_same_weights(same, stored)
    x = torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        enlarged = net(x)
        for scale in (2, 3):
            options = TrainOptions(**{**TINY, "init": str(source), "scale": scale})
            other = Trainer(options).net.eval()
            blocks = enlarged.unfold(2, 4, 4).unfold(3, 4, 4).flatten(0, 3)  # [N, 4, 4]
            blocks = torch.nn.functional.adaptive_avg_pool2d(blocks, scale)
            expected = (
                blocks.view(3, 8, 8, scale, scale).transpose(2, 3).reshape(1, 3, 8 * scale, -1)
            )
            torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="does not fit EFRDN"):
        Trainer(TrainOptions(init=str(source)))  # the full network has more keys


def test_fitted_tails_are_the_least_squares_solution(photos, tmp_path):
    torch.manual_seed(0)
    net = EFRDN(2, ablation="no_fflb")
    lr = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    hr = lr.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def gradients():
        tails = (net.reconstruct_deep.conv2.weight, net.reconstruct_shallow.conv.weight)
        loss = (net.eval()(lr.float() / 255) - hr.float() / 255).square().mean()
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, tails)])

    before, slope = gradients()
    fit_tails(net, [(lr, hr)])
    after, flat = gradients()
    assert after < 0.1 * before
    assert flat.abs().max() < 1e-3 * slope.abs().max()


def test_run_without_steps_saves_the_fitted_tails_and_resumes_as_it_is(photos, tmp_path):
    before = {"steps": 9}
    source = checkpoint.save(EFRDN(4, ablation="no_fflb"), tmp_path / "x4.safetensors", before)
    options = TrainOptions(
        **{**TINY, "total_iter": 0, "warmup": 0, "scale": 2, "init": str(source), "fit_tails": 1}
    )
    path = train([photos], options, run_options(tmp_path, data_note="own photos, CC0"))
    fitted = load_file(path)
    start = Trainer(options).net.state_dict()
    different = {k for k in start if not torch.equal(start[k], fitted[k])}
    assert {k.rsplit(".", 1)[0] for k in different} == {
        "reconstruct_deep.conv2",
        "reconstruct_shallow.conv",
    }
    record = checkpoint.load(path).training
    assert (record["steps"], record["started_from"]) == (0, before)
    assert record["data_note"] == "own photos, CC0"
    assert_same_weights(load_file(train([photos], options, run_options(tmp_path))), fitted)


def test_stages_late_loss_and_frozen_statistics(photos, tmp_path, monkeypatch):
    seen = []
    step = Trainer.train_step

    def spy(self, lr, hr):
        before = self.norms[0].running_mean.clone()
        value = step(self, lr, hr)
        moved = not torch.equal(before, self.norms[0].running_mean)
        seen.append((tuple(lr.shape), self.options.loss_at(self.step - 1), moved))
        return value

    monkeypatch.setattr(Trainer, "train_step", spy)
    options = TrainOptions(
        **{**TINY, "total_iter": 4, "stages": "5x3@0.25", "last_loss": "l2"},
        last_loss_from=0.5,
        freeze_bn_from=0.75,
    )
    train([photos], options, run_options(tmp_path))
    assert seen == [
        ((3, 3, 5, 5), "l1", True),
        ((2, 3, 6, 6), "l1", True),
        ((2, 3, 6, 6), "l2", True),
        ((2, 3, 6, 6), "l2", False),
    ]


def test_checkpoint_files_of_the_full_network_are_small(tmp_path):
    trainer = Trainer(TrainOptions(patch_size=6, batch_size=1))
    trainer.train_step(
        torch.zeros(1, 3, 6, 6, dtype=torch.uint8), torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    )
    trainer.save(tmp_path, {})
    sizes = {path.name: path.stat().st_size / 2**20 for path in tmp_path.iterdir()}
    assert sizes.keys() == {"state.pt", "net.safetensors"}
    assert 12 < sizes["state.pt"] < 16 and sizes["net.safetensors"] < 3.3


def test_state_without_the_youngest_options_is_still_read(photos, tmp_path):
    train([photos], TrainOptions(**{**TINY, "total_iter": 2}), run_options(tmp_path))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["options"]["stages"], state["options"]["freeze_bn_from"]
    torch.save(state, tmp_path / "state.pt")
    train([photos], TrainOptions(**{**TINY, "total_iter": 2}), run_options(tmp_path))


def test_loss_falls_and_average_follows(photos):
    trainer = Trainer(TrainOptions(**{**TINY, "total_iter": 40, "ema_decay": 0.5}))
    generator = torch.Generator().manual_seed(0)
    hr = torch.randint(0, 256, (2, 3, 24, 24), generator=generator, dtype=torch.uint8)
    lr = hr[:, :, ::4, ::4]
    losses = [trainer.train_step(lr, hr) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    own, mean = trainer.net.state_dict(), trainer.averaged().state_dict()
    assert any(not torch.equal(own[k], mean[k]) for k in own)


def test_full_disk_keeps_the_previous_checkpoint(photos, tmp_path, monkeypatch):
    train([photos], TrainOptions(**{**TINY, "total_iter": 2}), run_options(tmp_path))
    kept = (tmp_path / "state.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(
            [photos], TrainOptions(**{**TINY, "total_iter": 2}), run_options(tmp_path), resume=None
        )
    assert (tmp_path / "state.pt").read_bytes() == kept
    assert not list(tmp_path.glob(".*.part"))


def test_resume_refuses_other_options_and_damaged_states(photos, tmp_path):
    train([photos], TrainOptions(**{**TINY, "total_iter": 2}), run_options(tmp_path))
    with pytest.raises(ValueError, match=r"lr: 0\.001 then, 0\.0005 now"):
        changed = TrainOptions(**{**TINY, "total_iter": 2, "lr": 5e-4})
        train([photos], changed, run_options(tmp_path))
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a training state to resume from"):
        train([photos], TrainOptions(**TINY), run_options(tmp_path))
    with pytest.raises(FileNotFoundError, match="no training state"):
        train([photos], TrainOptions(**TINY), run_options(tmp_path), resume=str(tmp_path / "no.pt"))


@pytest.mark.parametrize("autocast", ["bf16", "fp32"])
@pytest.mark.parametrize("loss", ["l1", "l2", "charbonnier"])
def test_every_loss_and_cpu_type_trains(autocast, loss):
    trainer = Trainer(TrainOptions(**{**TINY, "loss": loss, "autocast": autocast}))
    lr = torch.full((2, 3, 6, 6), 128, dtype=torch.uint8)
    hr = torch.full((2, 3, 24, 24), 128, dtype=torch.uint8)
    assert np.isfinite(trainer.train_step(lr, hr))
    assert trainer.step == 1 and trainer.skipped == 0


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    options = TrainOptions(total_iter=1000, lr=2e-4, lr_min=6.25e-6, warmup=100)
    assert options.learning_rate(0) == pytest.approx(2e-6)
    assert options.learning_rate(99) == pytest.approx(2e-4)
    assert options.learning_rate(550) == pytest.approx((2e-4 + 6.25e-6) / 2)
    assert options.learning_rate(1000) == pytest.approx(6.25e-6)


def test_defaults_are_the_papers_recipe():
    assert PRESETS["paper"] == {}
    options = TrainOptions()
    assert (options.patch_size, options.batch_size, options.loss) == (48, 16, "l1")
    assert (options.lr, options.lr_min, options.warmup) == (2e-4, 6.25e-6, 0)
    for preset in PRESETS.values():
        TrainOptions(**preset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 5}, "scale must be one of 2, 3, 4"),
        ({"patch_size": 2}, "patch_size must be at least 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"loss": "l3"}, "loss must be one of"),
        ({"autocast": "fp8"}, "autocast must be one of"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"lr": 0.0}, "lr_min <= lr"),
        ({"warmup": 2_000_000}, "warmup must be in"),
        ({"grad_clip": -1}, "grad_clip must not be negative"),
        ({"lr": math.inf}, "lr must be a finite number, got inf"),
        ({"lr_min": math.nan}, "lr_min must be a finite number, got nan"),
        ({"grad_clip": math.nan}, "grad_clip must be a finite number, got nan"),
        ({"cc_bias_init": math.nan}, "cc_bias_init must be a finite number, got nan"),
        ({"cc_bias_init": -math.inf}, "cc_bias_init must be a finite number, got -inf"),
        ({"ema_decay": math.nan}, "ema_decay must be a finite number"),
        ({"manual_seed": -1}, r"manual_seed must be in \[0, 2\^64\), got -1"),
        ({"manual_seed": 2**64}, r"manual_seed must be in \[0, 2\^64\)"),
        ({"total_iter": 0}, "total_iter must be at least 1"),
        ({"fit_tails": -1}, "fit_tails must not be negative"),
        ({"stages": "24x8"}, "stages must be PATCHxBATCH@SHARE"),
        ({"stages": "24x8@0.5,32x4@0.4"}, "with shares that grow"),
        ({"last_loss": "l3"}, "last_loss must be one of"),
        ({"freeze_bn_from": 1.5}, r"freeze_bn_from must be in \[0, 1\]"),
    ],
)
def test_options_reject(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_freq": 0}, "save_freq must be at least 1, got 0"),
        ({"val_freq": -1}, "val_freq must be at least 1, got -1"),
        ({"val_crop": 2}, "val_crop must be 0 or at least 3, got 2"),
        ({"num_workers": -1}, "num_workers must not be negative, got -1"),
        ({"minutes": 0.0}, "minutes must be positive, got 0.0"),
    ],
)
def test_run_options_reject(change, message):
    with pytest.raises(ValueError, match=message):
        RunOptions(**change)


def test_fast_training_learns_the_same(photos, unbroken, tmp_path):
    """The same samples and steps through the fused ops; Adam magnifies the rounding."""
    out = tmp_path / "out"
    found = load_file(train([photos], TrainOptions(**TINY), run_options(out, fast=True)))
    for key, expected in unbroken.items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-3, msg=key)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("psnr_db" in row for row in rows)
