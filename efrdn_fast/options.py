"""Options of a training run; the defaults are the paper's recipe."""

from __future__ import annotations

import dataclasses
import math
import re
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
    """Steps; the paper gives no count. 0 with fit_tails only fits the tails."""
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
    """Type of the forward pass: fp32, bf16 or fp16 (with loss scaling, refused without CUDA)."""
    stages: str = ""
    """Progressive sizes before the last ones: "24x8@0.4,32x4@0.8" trains on 8 patches of 24 x 24
    in the first 40 % of the steps, on 4 of 32 x 32 up to 80 %, then on batch_size of patch_size."""
    last_loss: str = ""
    """Loss of the end of the run, from last_loss_from on: l1, l2 or charbonnier."""
    last_loss_from: float = 0.9
    """Share of the steps after which last_loss takes over."""
    freeze_bn_from: float = 1.0
    """Share of the steps after which BatchNorm keeps its statistics; 1 never freezes them."""
    attention: str = "sdpa"
    """explicit (score matrix) or sdpa."""
    init: str = ""
    """Checkpoint whose weights the run starts from; tails of another scale are resampled."""
    fit_tails: int = 0
    """Batches to which the upsampling tails are fitted by least squares before the first step."""
    augment: bool = True
    """Turn and mirror patches at random: each of the eight ways is equally likely."""
    manual_seed: int = 0
    """Seed of initialisation and of every sample."""

    def __post_init__(self) -> None:
        EFRDNConfig(scale=self.scale, module=self.module, ablation=self.ablation, fold=self.fold)
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"train: {name} must be a finite number, got {value}")
        for name in ("patch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.total_iter < (0 if self.fit_tails > 0 else 1):
            raise ValueError(
                f"train: total_iter must be at least 1 (0 with fit_tails), got {self.total_iter}"
            )
        if self.patch_size < 3:
            raise ValueError(f"train: patch_size must be at least 3, got {self.patch_size}")
        for name, choices in (("autocast", AUTOCAST), ("loss", LOSSES), ("attention", ATTENTION)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"train: {name} must be one of {', '.join(choices)}; "
                    f"got {getattr(self, name)!r}"
                )
        if self.last_loss and self.last_loss not in LOSSES:
            raise ValueError(
                f"train: last_loss must be one of {', '.join(LOSSES)}; got {self.last_loss!r}"
            )
        for name in ("last_loss_from", "freeze_bn_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train: {name} must be in [0, 1], got {getattr(self, name)}")
        self._parse_stages()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train: ema_decay must be in [0, 1), got {self.ema_decay}")
        if not (self.lr > 0 and 0 <= self.lr_min <= self.lr):
            raise ValueError(f"train: need 0 <= lr_min <= lr, got {self.lr_min} and {self.lr}")
        if not 0 <= self.warmup < max(1, self.total_iter):
            raise ValueError(f"train: warmup must be in [0, total_iter), got {self.warmup}")
        if self.fit_tails < 0:
            raise ValueError(f"train: fit_tails must not be negative, got {self.fit_tails}")
        if self.grad_clip < 0:
            raise ValueError(f"train: grad_clip must not be negative, got {self.grad_clip}")
        if not 0 <= self.manual_seed < 2**64:
            raise ValueError(f"train: manual_seed must be in [0, 2^64), got {self.manual_seed}")

    def _parse_stages(self) -> list[tuple[float, int, int]]:
        stages, before = [], 0.0
        for text in filter(None, self.stages.split(",")):
            match = re.fullmatch(r"\s*(\d+)x(\d+)@(\d*\.?\d+)\s*", text)
            end = float(match[3]) if match else 0.0
            if not match or int(match[1]) < 3 or int(match[2]) < 1 or not before < end < 1:
                raise ValueError(
                    "train: stages must be PATCHxBATCH@SHARE,... with shares that grow from 0 to "
                    f"1, such as 24x8@0.4,32x4@0.8; got {self.stages!r}"
                )
            stages.append((end, int(match[1]), int(match[2])))
            before = end
        return stages

    def sizes(self, step: int) -> tuple[int, int]:
        """Patch side in LR pixels and batch of `step` (0-based)."""
        for end, patch, batch in self._parse_stages():
            if step < end * self.total_iter:
                return patch, batch
        return self.patch_size, self.batch_size

    def all_sizes(self) -> list[tuple[int, int]]:
        """Every (patch, batch) of the run."""
        stages = [(patch, batch) for _, patch, batch in self._parse_stages()]
        return [*stages, (self.patch_size, self.batch_size)]

    def loss_at(self, step: int) -> str:
        """Name of the loss of `step`."""
        late = self.last_loss and step >= self.last_loss_from * self.total_iter
        return self.last_loss if late else self.loss

    def bn_frozen(self, step: int) -> bool:
        """Whether BatchNorm uses its running statistics in `step`, and keeps them."""
        return self.freeze_bn_from < 1 and step >= self.freeze_bn_from * self.total_iter

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
    fast: bool = False
    """Train and validate through the fused forward and backward of EFRDNFast."""
    compile: bool = False
    """Train through torch.compile."""
    strict: bool = False
    """An image that is unreadable or too small is an error, not left out with a warning."""
    data_note: str = ""
    """Sources and licences of the images, in words; stored in the checkpoint."""
    tensorboard: bool = True
    """Write TensorBoard events when tensorboard is installed."""

    def __post_init__(self):
        for name in ("save_freq", "val_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.val_crop < 0 or 0 < self.val_crop < 3:
            raise ValueError(f"train: val_crop must be 0 or at least 3, got {self.val_crop}")
        if self.num_workers < 0:
            raise ValueError(f"train: num_workers must not be negative, got {self.num_workers}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"train: minutes must be positive, got {self.minutes}")


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
        "attention": "explicit",  # small score matrices: faster than SDPA's backward on a CPU
    },
}
"""Named recipes: the paper's own, and one for about an hour of one CPU core."""
