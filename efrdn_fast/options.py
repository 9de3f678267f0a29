"""Options of a training run; the defaults are the paper's recipe."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .config import EFRDNConfig

__all__ = ["PRESETS", "RunOptions", "TrainOptions"]

AUTOCAST = ("fp32", "bf16", "fp16")
LOSSES = ("l1", "l2", "charbonnier")
ATTENTION = ("explicit", "sdpa")


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the weights; stored in every checkpoint."""

    scale: int = 4
    """Upscaling factor."""
    module: str = "acdm"
    """Body of the network: acdm, imdb or rfdb."""
    ablation: str = "full"
    """Row of Tables 3-5 to train."""
    fold: str = "mean"
    """How overlapping patches meet in the transformer: mean or sum."""
    patch_size: int = 48
    """Side of a training patch in LR pixels."""
    batch_size: int = 16
    """Patches in a step."""
    total_iter: int = 1_000_000
    """Steps; the paper gives no count."""
    lr: float = 2e-4
    """Peak learning rate of Adam."""
    lr_min: float = 6.25e-6
    """Learning rate at the end of the cosine."""
    warmup: int = 0
    """Steps of linear warm-up before the cosine."""
    loss: str = "l1"
    """l1, l2 or charbonnier."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones validated and saved."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 leaves gradients alone."""
    cc_bias_init: float = 0.0
    """Initial bias of the CC bottlenecks; a positive value avoids units that start dead."""
    autocast: str = "fp32"
    """Type of the forward pass: fp32, bf16 or fp16 (with loss scaling, CUDA only)."""
    attention: str = "sdpa"
    """explicit (score matrix) or sdpa."""
    init: str = ""
    """Checkpoint whose weights the run starts from; tails of another scale are resampled."""
    manual_seed: int = 0
    """Seed of initialisation and of every sample."""

    def __post_init__(self) -> None:
        EFRDNConfig(scale=self.scale, module=self.module, ablation=self.ablation, fold=self.fold)
        for name in ("patch_size", "batch_size", "total_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.patch_size < 3:
            raise ValueError(f"train: patch_size must be at least 3, got {self.patch_size}")
        for name, choices in (("autocast", AUTOCAST), ("loss", LOSSES), ("attention", ATTENTION)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"train: {name} must be one of {', '.join(choices)}; "
                    f"got {getattr(self, name)!r}"
                )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train: ema_decay must be in [0, 1), got {self.ema_decay}")
        if not (self.lr > 0 and 0 <= self.lr_min <= self.lr):
            raise ValueError(f"train: need 0 <= lr_min <= lr, got {self.lr_min} and {self.lr}")
        if not 0 <= self.warmup < self.total_iter:
            raise ValueError(f"train: warmup must be in [0, total_iter), got {self.warmup}")
        if self.grad_clip < 0:
            raise ValueError(f"train: grad_clip must not be negative, got {self.grad_clip}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step` (0-based): linear warm-up, then cosine from `lr` to `lr_min`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total_iter - self.warmup)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * min(1, done))) / 2

    def to_dict(self) -> dict:
        """Plain dictionary, JSON-ready."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunOptions:
    """What does not change the weights: where, how long, how often."""

    out: str = "runs/efrdn"
    """Folder of checkpoints and logs."""
    cache_dir: str | None = None
    """Folder of decoded images. Default: `<out>/cache`."""
    device: str = "cpu"
    """Device to train on."""
    minutes: float | None = None
    """Stop after so long, with a checkpoint from which `resume` goes on exactly."""
    save_freq: int = 500
    """Steps between checkpoints."""
    val_freq: int = 1000
    """Steps between validations."""
    val_crop: int = 0
    """Validate on the centre of so many LR pixels a side; 0 is the whole image."""
    num_workers: int = 0
    """Processes that prepare patches."""
    compile: bool = False
    """Train through torch.compile."""
    strict: bool = False
    """An unreadable training image is an error, not skipped."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""


PRESETS: dict[str, dict] = {
    "paper": {},
    "small": {
        "patch_size": 32,
        "batch_size": 4,
        "total_iter": 4000,
        "lr": 8e-4,
        "warmup": 100,
        "ema_decay": 0.995,
        "grad_clip": 1.0,
        "cc_bias_init": 0.1,
    },
}
"""Named recipes: the paper's own, and one for an hour on two CPU cores."""
