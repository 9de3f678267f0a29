"""One training step and its exact state; validation.

A step is a function of the state, the options and the batch alone; several processes that each get
their share of the batch make the same step as one.
"""

from __future__ import annotations

import dataclasses
import io
import math
import operator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoint, metrics, reference
from .blocks import CC, BatchNorm
from .data import ImageCache
from .distributed import World, globalize
from .errors import UsageError
from .model import EFRDN
from .options import TrainOptions
from .warmstart import warm_start

__all__ = ["Trainer", "validate"]

STATE_VERSION = 1
STATE_KEYS = ("version", "options", "step", "skipped", "net", "ema", "optimizer", "scaler")


class Trainer:
    """Network, averaged weights, optimizer and loss scaler of a run, with an exact state.

    Args:
        options: What decides the weights.
        device: Device to train on.
        world: This process among those that share every batch.

    Raises:
        UsageError: fp16 without CUDA.
    """

    def __init__(
        self,
        options: TrainOptions,
        device: str | torch.device = "cpu",
        world: World | None = None,
    ):
        self.options, self.device, self.world = options, torch.device(device), world or World()
        if options.autocast == "fp16" and self.device.type != "cuda":
            raise UsageError(
                "train: autocast fp16 needs CUDA for its loss scaling; "
                f"use bf16 or fp32 on {self.device}"
            )
        self.step, self.skipped, self.bad_streak = 0, 0, 0
        torch.manual_seed(options.manual_seed)
        net = EFRDN(
            options.scale, module=options.module, ablation=options.ablation, fold=options.fold
        )
        for module in net.modules():
            if isinstance(module, CC) and options.cc_bias_init:
                nn.init.constant_(module.squeeze.bias, options.cc_bias_init)
        self.started_from = warm_start(net, options.init) if options.init else {}
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
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.autocast == "fp16")
        self.forward: nn.Module = self.net

    def run_through(self, net: nn.Module) -> None:
        """Train through the forward of `net`, a form of the network on the same parameters.

        To be called once, and before the first step, by a process among several.
        """
        self.forward = net
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

        A step whose loss or gradient is not finite changes nothing but the step counter, and
        `bad_streak` counts such steps in a row.
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
                for buffer, kept in zip(self.net.buffers(), before, strict=True):
                    buffer.copy_(kept)
            self.skipped += 1
            # Loss scaling overflows now and then by design, and halves its scale; that is no sign
            # against the weights as long as there is a scale to halve.
            scaled = self.scaler.is_enabled() and self.scaler.get_scale() > 1
            if not (scaled and math.isfinite(value)):
                self.bad_streak += 1
            if self.scaler.is_enabled():
                self.scaler.update()
            return math.nan
        self.bad_streak = 0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update_parameters(self.net)
        return value

    def averaged(self) -> EFRDN:
        """The averaged network (not a copy)."""
        return self.ema.module

    def is_finite(self) -> bool:
        """Whether all weights and statistics, averaged or not, are finite."""
        tensors = [*self.net.state_dict().values(), *self.averaged().state_dict().values()]
        return bool(torch.stack([t.isfinite().all() for t in tensors]).all())

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
            ValueError: The file is no whole and finite state, or was written with other options
                (named).
        """
        defaults = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
        try:
            state = _read_state(path, self.device)
            # Options may be younger than the state.
            was, now = {**defaults, **state["options"]}, self.options.to_dict()
            differ = [f"{k}: {was[k]!r} then, {now[k]!r} now" for k in now if was[k] != now[k]]
            if not differ:
                self._load(state)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: not a training state to resume from: {why}; give a state.pt that "
                "`efrdn train` wrote, or start anew (--resume never)"
            ) from error
        if differ:
            raise ValueError(f"{path}: cannot resume with other options ({'; '.join(differ)})")

    def _load(self, state: dict) -> None:
        step, skipped = operator.index(state["step"]), operator.index(state["skipped"])
        if not 0 <= skipped <= step <= self.options.total_iter:
            raise ValueError(
                f"it is at step {step} of {self.options.total_iter}, {skipped} of them skipped"
            )
        checkpoint.load_into(self.net, state["net"], "its net")
        checkpoint.load_into(self.ema, state["ema"], "its ema")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if not self.is_finite():
            raise ValueError("its weights are not finite")
        self.step, self.skipped = step, skipped


def _read_state(path: Path, device: torch.device) -> dict:
    """A state file's entries, complete but not looked into."""
    state = checkpoint.unpickle(path, device)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dictionary")
    missing = [key for key in STATE_KEYS if key not in state]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    if state["version"] != STATE_VERSION:
        raise ValueError(f"it is of version {state['version']!r}, expected {STATE_VERSION}")
    return state


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
