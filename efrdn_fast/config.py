"""Constructor arguments of the network as one frozen, self-checking record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["ABLATIONS", "FOLDS", "MODULES", "SCALES", "EFRDNConfig"]

SCALES = (2, 3, 4)
FOLDS = ("mean", "sum")
MODULES = ("acdm", "imdb", "rfdb")
ABLATIONS = (
    "full",
    "no_acrb_bn",
    "acrb_to_conv3x3",
    "no_fflb",
    "no_mscc",
    "no_gcrb",
    "no_effb",
    "no_cc",
    "no_cnn_dense",
    "no_transformer_dense",
    "no_dense",
)


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"EFRDN: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"EFRDN: {name} must be at least {least}, got {value}")


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"EFRDN: {name} must be one of {', '.join(map(str, choices))}; got {value!r}"
        )


@dataclass(frozen=True)
class EFRDNConfig:
    """Arguments of `EFRDN` and `EFRDNFast`; stored as JSON in every checkpoint."""

    scale: int = 4
    """Upscaling factor: 2, 3 or 4."""
    channels: int = 32
    """Feature channels C, a multiple of 16 (groups of 8, bottleneck C / 16, 8 attention heads)."""
    distilled: int = 9
    """Channels split off for ACRB in every step of ACDM, int(0.3 C) in the paper."""
    segments: int = 4
    """Attention segments of ceil(N / segments) tokens; ignored with `segment_tokens`."""
    segment_tokens: int | None = None
    """Fixed length of a segment in tokens; cost then grows linearly with the image."""
    fold: str = "mean"
    """How overlapping patches meet at a pixel: "mean" or "sum"."""
    module: str = "acdm"
    """Body of the network: "acdm", or the blocks of Table 2: "imdb", "rfdb"."""
    ablation: str = "full"
    """A row of Tables 3-5: the part removed or replaced."""

    def __post_init__(self) -> None:
        _check_choice("scale", self.scale, SCALES)
        _check_count("channels", self.channels, 16)
        if self.channels % 16:
            raise ValueError(f"EFRDN: channels must be a multiple of 16, got {self.channels}")
        _check_count("distilled", self.distilled, 1)
        if self.distilled >= self.channels:
            raise ValueError(
                f"EFRDN: distilled must be less than channels={self.channels}, got {self.distilled}"
            )
        _check_count("segments", self.segments, 1)
        if self.segment_tokens is not None:
            _check_count("segment_tokens", self.segment_tokens, 1)
        _check_choice("fold", self.fold, FOLDS)
        _check_choice("module", self.module, MODULES)
        _check_choice("ablation", self.ablation, ABLATIONS)
        inside_acdm = self.ablation not in (
            "full",
            "no_cnn_dense",
            "no_transformer_dense",
            "no_dense",
        )
        if self.module != "acdm" and inside_acdm:
            raise ValueError(
                f"EFRDN: ablation {self.ablation!r} changes ACDM, but module is {self.module!r}"
            )

    def to_dict(self) -> dict:
        """Plain dictionary of all arguments, JSON-ready."""
        return dataclasses.asdict(self)
