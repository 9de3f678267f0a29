"""Several processes equal one: gradients, statistics, training, kill and resume, shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file

from efrdn_fast.benchmarks import ImageSet
from efrdn_fast.blocks import BatchNorm
from efrdn_fast.cli import main
from efrdn_fast.distributed import GlobalBatchNorm, World, all_reduce, globalize, world
from efrdn_fast.evaluate import evaluate_set
from efrdn_fast.model import EFRDN
from efrdn_fast.options import RunOptions, TrainOptions
from efrdn_fast.train import Trainer, train
from efrdn_fast.upscaler import Upscaler

WORKERS = 2
STEPS = 3
RECIPE = {
    "ablation": "no_fflb",
    "patch_size": 6,
    "batch_size": 4,
    "total_iter": 8,
    "lr": 1e-3,
    "ema_decay": 0.9,
}


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        hr = torch.randint(0, 256, (4, 3, 24, 24), generator=generator, dtype=torch.uint8)
        yield hr[:, :, ::4, ::4].contiguous(), hr


def small_net():
    torch.manual_seed(3)
    return EFRDN(4, ablation="no_effb").double()


def frozen(net):
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return net


def gradients(net, x, weight):
    """Gradients and statistics after the loss `mean(weight * net(x))` over the whole batch."""
    (net(x) * weight).mean().backward()
    inner = getattr(net, "module", net)
    return {
        **{k: p.grad for k, p in inner.named_parameters()},
        **{k: b.clone() for k, b in inner.named_buffers()},
    }


def trained(shared):
    """Losses and weights after `STEPS` steps, the last one with frozen statistics."""
    options = TrainOptions(**{**RECIPE, "total_iter": STEPS, "freeze_bn_from": 0.6})
    trainer = Trainer(options, world=shared)
    trainer.run_through(trainer.net)
    part = slice(shared.rank, None, shared.size)
    losses = [trainer.train_step(lr[part], hr[part]) for lr, hr in batches()]
    assert not trainer.norms[0].training
    return losses, trainer.averaged().state_dict()


def evaluated(folder, here=None):
    upscaler = Upscaler(4, small_net().float().eval())
    result = evaluate_set(ImageSet("photos", Path(folder)), 4, upscaler, check=False, here=here)
    return [(image.name, image.bicubic.psnr, image.model.psnr) for image in result.images]


def _worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORKERS))
    images = evaluated(f"{folder}/photos")  # alone
    store = dist.FileStore(f"{folder}/store", WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    here = world()
    result = {"total": here.total(rank + 1.0), "merged": here.merge(here.shard(list("abcde")))}
    x = torch.full((2,), rank + 1.0, dtype=torch.float64, requires_grad=True)
    (all_reduce(x) * (rank + 1)).sum().backward()
    result["reduced"] = x.grad
    inputs = torch.load(f"{folder}/inputs.pt")
    for name, prepare in (("live", lambda n: n), ("frozen", frozen)):
        net = prepare(globalize(small_net()))
        parallel = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
        result[name] = gradients(parallel, *(t[rank::WORKERS] for t in inputs))
    result["losses"], result["weights"] = trained(here)
    result["alone"], result["shared"] = images, evaluated(f"{folder}/photos", here)
    run = RunOptions(f"{folder}/run", tensorboard=False)
    train([f"{folder}/photos"], TrainOptions(**RECIPE), run)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """Folder, inputs, and what each of two processes made of its half."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        photo = coarse.resize((64, 48), Image.Resampling.BICUBIC)
        photo.save(folder / "photos" / f"{i}.png")
    torch.manual_seed(0)
    inputs = torch.rand(4, 3, 9, 8).double(), torch.randn(4, 3, 36, 32).double()
    torch.save(inputs, folder / "inputs.pt")
    torch.multiprocessing.spawn(_worker, (str(folder),), WORKERS)
    return folder, inputs, [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


@pytest.mark.parametrize("statistics", ["live", "frozen"])
def test_gradients_and_statistics_equal_one_process(parallel, statistics):
    _, inputs, results = parallel
    net = frozen(small_net()) if statistics == "frozen" else small_net()
    expected = gradients(net, *inputs)
    for result in results:
        assert result[statistics].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                result[statistics][key], value, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: k + m
            )


def test_training_equals_one_process_and_all_processes_agree(parallel):
    _, _, (first, second) = parallel
    losses, weights = trained(World())
    np.testing.assert_allclose(first["losses"], losses, rtol=1e-4)
    for key in weights:
        assert torch.equal(first["weights"][key], second["weights"][key]), key
    # Adam's first steps are of the size of the learning rate whatever the gradient's size, so
    # rounding shows in single weights; of all of them almost none may be off by a tenth of a step.
    off = torch.cat([(first["weights"][k] - v).abs().flatten() for k, v in weights.items()])
    assert (off > 0.1 * RECIPE["lr"]).float().mean() < 1e-3


def test_collectives(parallel):
    _, _, results = parallel
    for result in results:
        assert result["total"] == [3.0]
        assert result["merged"] == list("abcde")
        torch.testing.assert_close(result["reduced"], torch.full((2,), 3.0).double())


def test_evaluation_by_shares_equals_that_of_one_process(parallel):
    for result in parallel[2]:
        assert [name for name, *_ in result["alone"]] == ["0", "1", "2"]
        assert result["shared"] == result["alone"]


def test_folder_is_upscaled_by_shares(parallel, tmp_path, monkeypatch, capsys):
    done = []
    for rank in range(3):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        arguments = ["upscale", str(parallel[0] / "photos"), "-o", str(tmp_path / "out")]
        assert main([*arguments, "-s", "4", "--json-summary", str(tmp_path / "s.json")]) == 0
        summary = tmp_path / ("s.json" if rank == 0 else f"s.{rank}.json")
        rows = json.loads(summary.read_text())["images"]
        done += [Path(row["input"]).name for row in rows if row["status"] == "done"]
    assert sorted(done) == ["0.png", "1.png", "2.png"]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_globalize_keeps_keys_and_tensors():
    net = small_net()
    before = net.state_dict()
    after = globalize(net).state_dict()
    assert list(before) == list(after)
    assert all(before[k].data_ptr() == after[k].data_ptr() for k in before)
    assert not any(type(m) is BatchNorm for m in net.modules())
    assert any(isinstance(m, GlobalBatchNorm) for m in net.modules())


def test_world_reads_torchruns_variables(monkeypatch):
    assert world() == World()
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world() == World(2, 3, 1)
    assert world().shard(list(range(8))) == [2, 5]
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK is 3, but WORLD_SIZE 3"):
        world()


def test_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    from efrdn_fast import train as module

    with pytest.raises(ValueError, match="a batch of 4 cannot be shared equally by 3 processes"):
        module._train([tmp_path], TrainOptions(**RECIPE), RunOptions(), None, World(0, 3))


def torchrun(*arguments, **options):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORKERS)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"),
        *("--max-restarts", "2", "--monitor-interval", "0.2", "-m", "efrdn_fast", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def children(pid):
    """Processes that `pid` started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_killed_worker_is_restarted_and_ends_with_the_same_weights(parallel, tmp_path):
    folder, pieces = parallel[0], []
    for key, value in RECIPE.items():
        pieces += [f"--{key.replace('_', '-')}", str(value)]
    process = torchrun(
        *("train", str(folder / "photos"), "--out", str(tmp_path), *pieces, "--save-freq", "1"),
        *("--val-freq", "100", "--no-tensorboard"),
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 180
    while not (tmp_path / "state.pt").exists():
        assert process.poll() is None and time.monotonic() < end, "no state was saved"
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "SIGKILL" in errors or "-9" in errors  # it was killed before the run was over
    found = load_file(tmp_path / "net.safetensors")
    unbroken = load_file(folder / "run" / "net.safetensors")
    assert found.keys() == unbroken.keys()
    assert [k for k in found if not torch.equal(found[k], unbroken[k])] == []
