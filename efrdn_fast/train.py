"""Training of EFRDN: resumable to the bit, atomic checkpoints, averaged weights.

Under torchrun every process runs the same code on its share of each batch; the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from . import checkpoint, metrics, reference
from .blocks import CC, BatchNorm
from .data import ImageCache, Patches, build_cache, find_images, loader, split_validation
from .distributed import World, globalize, process_group
from .fast import accelerate
from .model import EFRDN
from .options import RunOptions, TrainOptions
from .warmstart import fit_tails, warm_start

__all__ = ["Trainer", "train", "validate"]

BAD_STEPS_LIMIT = 20  # non-finite losses or gradients in a row that end a run
STATE_VERSION = 1


class Trainer:
    """Network, averaged weights, optimizer and loss scaler of a run, with an exact state.

    Args:
        options: What decides the weights.
        device: Device to train on.
        world: This process among those that share every batch.
    """

    def __init__(
        self,
        options: TrainOptions,
        device: str | torch.device = "cpu",
        world: World | None = None,
    ):
        self.options, self.device, self.world = options, torch.device(device), world or World()
        self.step, self.skipped, self.bad_streak = 0, 0, 0
        torch.manual_seed(options.manual_seed)
        net = EFRDN(
            options.scale, module=options.module, ablation=options.ablation, fold=options.fold
        )
        for module in net.modules():
            if isinstance(module, CC) and options.cc_bias_init:
                nn.init.constant_(module.squeeze.bias, options.cc_bias_init)
        if options.init:
            warm_start(net, options.init)
        if options.attention == "sdpa":
            net.set_attention(reference.emha_sdpa)
        if self.world.size > 1:
            globalize(net)
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.norms = [m for m in self.net.modules() if isinstance(m, BatchNorm)]
        self.ema = AveragedModel(
            self.net, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True
        )
        # One fused kernel: 9 % of a step of 4 patches of 32x32 on a CPU core.
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.lr, fused=fused)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=options.autocast == "fp16" and self.device.type == "cuda"
        )
        self.run_through(self.net)

    def run_through(self, net: EFRDN) -> None:
        """Train through the forward of `net`, a form of the network on the same parameters."""
        self.forward: nn.Module = net
        if self.world.size > 1:  # every process computes the same statistics, so none is sent
            self.forward = DistributedDataParallel(net, broadcast_buffers=False)

    def loss(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Loss of the present step, mean over the pixels."""
        name = self.options.loss_at(self.step)
        if name == "l1":
            return F.l1_loss(sr, hr)
        if name == "l2":
            return F.mse_loss(sr, hr)
        return ((sr - hr).square() + 1e-6).sqrt().mean()  # Charbonnier, eps 1e-3

    def train_step(self, lr_uint8: Tensor, hr_uint8: Tensor) -> float:
        """One optimizer step on (this process's share of) a uint8 batch; returns the loss.

        A step whose loss or gradient is not finite changes nothing but the step counter.
        """
        options = self.options
        x = lr_uint8.to(self.device, non_blocking=True).float().div_(255)
        hr = hr_uint8.to(self.device, non_blocking=True).float().div_(255)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.step)
        for norm in self.norms:
            norm.train(not options.bn_frozen(self.step))
        before = [b.clone() for b in self.net.buffers()]  # to undo a bad step
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.autocast)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            sr = self.forward(x.contiguous(memory_format=torch.channels_last))
        loss = self.loss(sr.float(), hr)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        limit = options.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        self.step += 1
        # Summed over the processes, so that all of them decide alike.
        value, length = (x / self.world.size for x in self.world.total(loss.item(), norm.item()))
        if not math.isfinite(value) or not math.isfinite(length):
            with torch.no_grad():
                for buffer, value in zip(self.net.buffers(), before, strict=True):
                    buffer.copy_(value)
            if self.scaler.is_enabled():
                self.scaler.update()
            self.skipped += 1
            self.bad_streak += 1
            return math.nan
        self.bad_streak = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.net)
        return value

    def averaged(self) -> EFRDN:
        """The averaged network (not a copy)."""
        return self.ema.module

    def save(self, folder: Path, record: dict) -> None:
        """Write `state.pt` (to resume) and `net.safetensors` (averaged weights), atomically."""
        state = {
            "version": STATE_VERSION,
            "options": self.options.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        checkpoint.atomic_write(folder / "state.pt", buffer.getvalue())
        checkpoint.save(self.averaged(), folder / "net.safetensors", record)

    def restore(self, path: Path) -> None:
        """Continue exactly where `path` (a `state.pt`) was saved.

        Raises:
            ValueError: The file is damaged or was written with other options (named).
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            was = state["options"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable training state: {error}") from error
        defaults = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
        was, now = {**defaults, **was}, self.options.to_dict()  # options younger than the state
        differ = [f"{k}: {was[k]!r} then, {now.get(k)!r} now" for k in now if was[k] != now[k]]
        if differ:
            raise ValueError(f"{path}: cannot resume with other options ({'; '.join(differ)})")
        self.step, self.skipped = state["step"], state["skipped"]
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@torch.inference_mode()
def validate(
    net: nn.Module,
    images: ImageCache,
    device: torch.device,
    crop: int = 0,
    world: World | None = None,
) -> float:
    """Mean PSNR on Y in dB, border of `scale` pixels cut, over whole images or their centres.

    Every process of `world` does its share of the images; all return the mean over all.
    """
    world = world or World()
    scale, was_training, total = images.scale, net.training, 0.0
    net.eval()
    for i in world.shard(list(range(len(images)))):
        lr, hr = images.lr(i), images.hr(i)
        if crop:
            h, w = min(crop, lr.shape[0]), min(crop, lr.shape[1])
            top, left = (lr.shape[0] - h) // 2, (lr.shape[1] - w) // 2
            lr = lr[top : top + h, left : left + w]
            hr = hr[scale * top : scale * (top + h), scale * left : scale * (left + w)]
        x = torch.tensor(lr).permute(2, 0, 1)[None].to(device).float() / 255
        sr = (net(x)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        total += metrics.psnr(sr.permute(1, 2, 0).cpu().numpy(), hr, crop_border=scale)
    net.train(was_training)
    return world.total(total)[0] / len(images)


def _writer(run: RunOptions):
    if not run.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboard is not installed, so no events are written: pip install tensorboard"
        )
        return None
    return SummaryWriter(Path(run.out) / "tensorboard")


def train(
    data: Sequence[str | os.PathLike],
    options: TrainOptions,
    run: RunOptions,
    *,
    resume: str | None = "auto",
) -> Path:
    """Train and return the path of the averaged weights, `<out>/net.safetensors`.

    Args:
        data: HR image folders (DIV2K layout or any).
        options: What decides the weights.
        run: Where, how long, how often.
        resume: "auto" (continue `<out>/state.pt` if there is one), a path, or None (start anew).

    Raises:
        FileNotFoundError: No images, or no state at `resume`.
        ValueError: Options differ from those of the state, or no image is large enough.
        RuntimeError: The loss stayed non-finite; the last good checkpoint is kept.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and saved first.
    """
    with process_group(run.device) as world:
        return _train(data, options, run, resume, world)


def _train(
    data: Sequence[str | os.PathLike],
    options: TrainOptions,
    run: RunOptions,
    resume: str | None,
    world: World,
) -> Path:
    for _, batch in options.all_sizes():
        if batch % world.size:
            raise ValueError(
                f"train: a batch of {batch} cannot be shared equally by {world.size} processes"
            )
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    if world.is_first:
        for part in out.glob(".*.part"):  # of a run that was killed while it saved
            part.unlink()
    train_images, val_images = split_validation(find_images(data))
    cache_dir = run.cache_dir or out / "cache"
    if world.local_rank:  # one process of a machine decodes
        world.wait()
    cache = build_cache(train_images, options.scale, cache_dir, strict=run.strict)
    val_cache = build_cache(val_images, options.scale, cache_dir) if val_images else None
    if not world.local_rank:
        world.wait()
    patches = Patches(cache, options.manual_seed)
    for patch, _ in options.all_sizes():
        patches.ends(patch)  # raises when no image is large enough
    trainer = Trainer(options, world.device(run.device), world)
    state = out / "state.pt" if resume == "auto" else Path(resume) if resume else None
    resumed = state is not None and (state.is_file() or resume != "auto")
    if resumed:
        if not state.is_file():
            raise FileNotFoundError(f"no training state at {str(state)!r} to resume from")
        trainer.restore(state)
    if run.fast:
        trainer.run_through(accelerate(trainer.net))
    if run.compile:
        trainer.forward = torch.compile(trainer.forward)
    session = _Session(trainer, run, cache, val_cache, data)
    if options.fit_tails and not resumed:
        # From samples that no step of the run draws.
        first = options.total_iter
        fit_tails(trainer.net, loader(patches, options.sizes, first, first + options.fit_tails))
        trainer.averaged().load_state_dict(trainer.net.state_dict())
        session.save()
    try:
        batches = loader(
            *(patches, options.sizes, trainer.step, options.total_iter, run.num_workers),
            *(world.rank, world.size),
        )
        with _stop_signals() as stop:
            session.loop(batches, stop)
    finally:
        session.close()
    return out / "net.safetensors"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is finished and saved; a second one interrupts."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Session:
    """One invocation of `train`: log, validation, checkpoints, progress."""

    def __init__(self, trainer, run, cache, val_cache, data):
        self.trainer, self.run, self.cache, self.val_cache = trainer, run, cache, val_cache
        self.out, self.started = Path(run.out), time.monotonic()
        self.writer = _writer(run) if trainer.world.is_first else None
        self.data = [Path(d).name for d in data]
        self.psnr: float | None = None

    @property
    def judged(self) -> EFRDN:
        """The network to validate."""
        averaged = self.trainer.averaged()
        return accelerate(averaged) if self.run.fast else averaged

    def record(self) -> dict:
        """Training record for the checkpoint's metadata."""
        return {
            "options": self.trainer.options.to_dict(),
            "steps": self.trainer.step,
            "images": len(self.cache),
            "data": self.data,
            "device": str(self.trainer.device),
            "processes": self.trainer.world.size,
            "torch": torch.__version__,
            "validation_psnr_db": self.psnr,
        }

    def save(self) -> None:
        if self.trainer.world.is_first:
            self.trainer.save(self.out, self.record())

    def log(self, **row) -> None:
        if not self.trainer.world.is_first:
            return
        row = {"step": self.trainer.step, **row}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.trainer.step)

    def loop(self, batches, stop: Sequence[int] = ()) -> None:
        """Train on `batches` until they end, time is up or `stop` is not empty; then save."""
        trainer, run, total = self.trainer, self.run, self.trainer.options.total_iter
        saved, losses, tick, stopped = trainer.step, [], time.monotonic(), 0.0
        off = None if trainer.world.is_first else True
        bar = tqdm(total=total, initial=trainer.step, unit="step", smoothing=0.05, disable=off)
        try:
            for lr, hr in batches:
                losses.append(trainer.train_step(lr, hr))
                bar.update()
                if trainer.bad_streak >= BAD_STEPS_LIMIT:
                    raise RuntimeError(
                        f"loss or gradient not finite {BAD_STEPS_LIMIT} steps in a row, up to step "
                        f"{trainer.step}; {self.out} keeps the last good checkpoint (step {saved})"
                    )
                if trainer.step % 100 == 0 or trainer.step == total:
                    seconds, tick = time.monotonic() - tick, time.monotonic()
                    good = [x for x in losses if math.isfinite(x)]
                    loss = sum(good) / max(1, len(good))
                    self.log(loss=loss, skipped=trainer.skipped, steps_per_s=len(losses) / seconds)
                    bar.set_postfix(loss=f"{loss:.4f}", psnr=self.psnr and f"{self.psnr:.2f}")
                    losses = []
                if self.val_cache and (trainer.step % run.val_freq == 0 or trainer.step == total):
                    self.psnr = validate(
                        *(self.judged, self.val_cache, trainer.device, run.val_crop),
                        trainer.world,
                    )
                    self.log(psnr_db=self.psnr)
                    tick = time.monotonic()
                if trainer.step % run.save_freq == 0 or trainer.step == total:
                    self.save()
                    saved = trainer.step
                late = run.minutes and time.monotonic() - self.started > 60 * run.minutes
                stopped, ended = trainer.world.total(bool(stop), bool(late))
                if stopped or ended:
                    break
        finally:
            bar.close()
        if saved != trainer.step and not trainer.bad_streak:
            self.save()
        if stopped:
            raise KeyboardInterrupt

    def close(self) -> None:
        if self.writer:
            self.writer.close()
