"""Training runs of EFRDN: data, resume, log, validation, atomic checkpoints.

Under torchrun every process runs the same code on its share of each batch; the first one writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .data import ImageCache, Patches, build_cache, find_images, loader, split_validation
from .device import resolve_device
from .distributed import World, process_group
from .distributed import world as find_world
from .fast import accelerate
from .model import EFRDN
from .options import RunOptions, TrainOptions
from .trainer import Trainer, validate
from .warmstart import fit_tails

__all__ = ["Trainer", "train", "validate"]

BAD_STEPS_LIMIT = 20  # non-finite losses or gradients in a row that end a run


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
        ValueError: Options differ from those of the state, which may be damaged; no image is
            large enough; or the device is not there.
        RuntimeError: The run diverged or ended in steps that were not finite; the last good
            checkpoint is kept.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and, when finite, saved.
    """
    device = resolve_device(find_world().device(run.device))
    with process_group(device) as here:
        return _train(data, options, dataclasses.replace(run, device=str(device)), resume, here)


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
    train_images, val_images = split_validation(find_images(data))
    if not train_images:
        raise ValueError(
            f"train: all {len(val_images)} images are kept for validation, none is left"
        )
    trainer = Trainer(options, run.device, world)
    out = Path(run.out)
    state = out / "state.pt" if resume == "auto" else Path(resume) if resume else None
    resumed = state is not None and (state.is_file() or resume != "auto")
    if resumed:
        if not state.is_file():
            raise FileNotFoundError(f"no training state at {str(state)!r} to resume from")
        trainer.restore(state)
    out.mkdir(parents=True, exist_ok=True)
    if world.is_first:
        for part in out.glob(".*.part"):  # of a run that was killed while it saved
            part.unlink()
    patches, val_cache = _open_data(train_images, val_images, options, run, world)
    trainer.run_through(accelerate(trainer.net) if run.fast else trainer.net)
    if run.compile:
        trainer.forward = torch.compile(trainer.forward)
    session = _Session(trainer, run, patches.cache, val_cache, data)
    if resumed and (out / "state.pt").exists() and state.samefile(out / "state.pt"):
        session.saved = trainer.step
    try:
        if options.fit_tails and not resumed:
            # From samples that no step of the run draws.
            first = options.total_iter
            fit_tails(trainer.net, loader(patches, options.sizes, first, first + options.fit_tails))
            trainer.averaged().load_state_dict(trainer.net.state_dict())
            session.save()
        batches = loader(
            *(patches, options.sizes, trainer.step, options.total_iter, run.num_workers),
            *(world.rank, world.size),
        )
        with _stop_signals() as stop:
            session.loop(batches, stop)
    finally:
        session.close()
    return out / "net.safetensors"


def _open_data(
    train_images: Sequence[Path],
    val_images: Sequence[Path],
    options: TrainOptions,
    run: RunOptions,
    world: World,
) -> tuple[Patches, ImageCache | None]:
    """Decoded training and validation images; what is left out of them is said in every run."""
    decode = functools.partial(
        build_cache,
        **{"scale": options.scale, "cache_dir": run.cache_dir or Path(run.out) / "cache"},
        **{"strict": run.strict, "quiet": world.local_rank > 0},
    )
    if world.local_rank:  # one process of a machine decodes
        world.wait()
    patches = Patches(decode(train_images), options.manual_seed, options.augment)
    val_cache = decode(val_images) if val_images else None
    if not world.local_rank:
        world.wait()
    for patch, _ in options.all_sizes():
        patches.ends(patch)  # raises when no image is large enough
    smallest = min(patch for patch, _ in options.all_sizes())
    small = patches.too_small(smallest)
    if small and not world.local_rank:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        warnings.warn(
            f"{len(small)} of {len(patches.cache)} training images are smaller than a patch of "
            f"{smallest} LR pixels and never drawn: {', '.join(small[:5])}{more}"
        )
    return patches, val_cache


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


class _Timed:
    """Batches of a loader; `waited` adds up the seconds that training stood still for them."""

    def __init__(self, batches: Iterable):
        self.batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator:
        batches = iter(self.batches)
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.monotonic() - start
            yield batch


def _gpu_use(device: torch.device) -> dict[str, int]:
    """Per cent of the last sample period in which a kernel ran, where NVML can be asked."""
    if device.type != "cuda":
        return {}
    try:
        return {"gpu_percent": torch.cuda.utilization(device)}
    except (ImportError, RuntimeError):  # no nvidia-ml-py, or no rights to ask
        return {}


class _Session:
    """One invocation of `train`: log, validation, checkpoints, progress."""

    def __init__(
        self,
        trainer: Trainer,
        run: RunOptions,
        cache: ImageCache,
        val_cache: ImageCache | None,
        data: Sequence[str | os.PathLike],
    ):
        self.trainer, self.run, self.cache, self.val_cache = trainer, run, cache, val_cache
        self.out, self.started = Path(run.out), time.monotonic()
        self.writer = _writer(run) if trainer.world.is_first else None
        self.data = [Path(d).name for d in data]
        self.psnr: float | None = None
        self.saved: int | None = None  # step of the checkpoint in `out`, when it is of this run

    @property
    def judged(self) -> EFRDN:
        """The network to validate."""
        averaged = self.trainer.averaged()
        return accelerate(averaged) if self.run.fast else averaged

    def record(self) -> dict:
        """Training record for the checkpoint's metadata, with that of the weights it began with."""
        extra = {"started_from": self.trainer.started_from, "data_note": self.run.data_note}
        return {
            **{name: value for name, value in extra.items() if value},
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
        """Replace the checkpoint, unless the weights are not finite, which is an error."""
        trainer = self.trainer
        if not trainer.is_finite():
            raise RuntimeError(f"weights are not finite after step {trainer.step}; {self.kept()}")
        if trainer.world.is_first:
            trainer.save(self.out, self.record())
        self.saved = trainer.step

    def kept(self) -> str:
        """What is left of a run that goes wrong, in words."""
        if self.saved is None:
            return "no checkpoint was written; try a lower lr or grad_clip"
        return f"the last good checkpoint (step {self.saved}) is kept"

    def log(self, **row: float | None) -> None:
        if not self.trainer.world.is_first:
            return
        row = {"step": self.trainer.step, **row}
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(name, value, self.trainer.step)

    def loop(self, batches: Iterable, stop: Sequence[int] = ()) -> None:
        """Train on `batches` until they end, time is up or `stop` is not empty; then save.

        Nothing is saved inside a streak of bad steps, for the weights may be what made them bad;
        a checkpoint that falls due there is written after the first good step.
        """
        trainer, run, total = self.trainer, self.run, self.trainer.options.total_iter
        losses, tick, stopped, due = [], time.monotonic(), 0.0, False
        timed = _Timed(batches)
        off = None if trainer.world.is_first else True
        bar = tqdm(total=total, initial=trainer.step, unit="step", smoothing=0.05, disable=off)
        try:
            for lr, hr in timed:
                losses.append(trainer.train_step(lr, hr))
                bar.update()
                if trainer.bad_streak >= BAD_STEPS_LIMIT:
                    raise RuntimeError(
                        f"loss or gradient not finite {BAD_STEPS_LIMIT} steps in a row, up to step "
                        f"{trainer.step}; {self.kept()}"
                    )
                if trainer.step % 100 == 0 or trainer.step == total:
                    seconds, tick = time.monotonic() - tick, time.monotonic()
                    good = [x for x in losses if math.isfinite(x)]
                    loss = sum(good) / len(good) if good else None
                    self.log(
                        **{"loss": loss, "skipped": trainer.skipped},
                        **{"steps_per_s": len(losses) / seconds, "data_s": timed.waited},
                        **_gpu_use(trainer.device),
                    )
                    shown = "none" if loss is None else f"{loss:.4f}"
                    bar.set_postfix(loss=shown, psnr=self.psnr and f"{self.psnr:.2f}")
                    losses, timed.waited = [], 0.0
                if self.val_cache and (trainer.step % run.val_freq == 0 or trainer.step == total):
                    self.psnr = validate(
                        *(self.judged, self.val_cache, trainer.device, run.val_crop),
                        trainer.world,
                    )
                    self.log(psnr_db=self.psnr)
                    tick = time.monotonic()
                due = due or trainer.step % run.save_freq == 0
                if due and not trainer.bad_streak:
                    self.save()
                    due = False
                late = run.minutes and time.monotonic() - self.started > 60 * run.minutes
                stopped, ended = trainer.world.total(bool(stop), bool(late))
                if stopped or ended:
                    break
        finally:
            bar.close()
        if trainer.bad_streak:
            message = (
                f"loss and gradient were last finite at step {trainer.step - trainer.bad_streak} "
                f"of {trainer.step}, so the end is not saved; {self.kept()}"
            )
            if not stopped:
                raise RuntimeError(message)
            warnings.warn(message)
        elif self.saved != trainer.step:
            self.save()
        if stopped:
            raise KeyboardInterrupt

    def close(self) -> None:
        if self.writer:
            self.writer.close()
