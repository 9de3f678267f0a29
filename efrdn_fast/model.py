"""EFRDN, the reference network on one page (Eqs. 1-9)."""

from __future__ import annotations

import os

from torch import Tensor, nn

from . import checkpoint
from .blocks import ACDM, GConv, Reconstruct, conv
from .config import EFRDNConfig
from .distillation import IMDB, RFDB
from .transformer import Attention, TransformerBlock

__all__ = ["EFRDN"]

STEPS = 4  # body steps i = 1..4; ACDM (i-1) mod 2 is used for the ((i-1) // 2)-th time


class EFRDN(nn.Module):
    """Efficient feature reuse distillation network for lightweight image super-resolution.

    Plain PyTorch, in whatever dtype and on whatever device it is put; the truth for `EFRDNFast`.

    Args:
        scale: Upscaling factor 2, 3 or 4.
        channels: Feature channels C, a multiple of 16. Default: 32.
        distilled: Channels split off at every distillation step. Default: 9.
        segments: Attention segments of ceil(N / segments) tokens. Default: 4.
        segment_tokens: Fixed segment length instead of a fixed count. Default: None.
        fold: "mean" (divide overlapping patches by their count) or "sum". Default: "mean".
        module: "acdm", "imdb" or "rfdb" (Table 2: four unshared blocks). Default: "acdm".
        ablation: A row of Tables 3-5, see `efrdn_fast.config.ABLATIONS`. Default: "full".

    Raises:
        ValueError, TypeError: An argument is out of range; the message names it.

    Example:
        >>> net = EFRDN(scale=4).eval()
        >>> sr = net(torch.rand(1, 3, 48, 48))  # [1, 3, 192, 192]
    """

    def __init__(
        self,
        scale: int = 4,
        *,
        channels: int = 32,
        distilled: int = 9,
        segments: int = 4,
        segment_tokens: int | None = None,
        fold: str = "mean",
        module: str = "acdm",
        ablation: str = "full",
    ):
        super().__init__()
        self.config = EFRDNConfig(
            scale, channels, distilled, segments, segment_tokens, fold, module, ablation
        )
        self.head = conv(3, channels, 3)
        if module == "acdm":
            self.acdm = nn.ModuleList(ACDM(channels, distilled, ablation) for _ in range(2))
        else:
            block = IMDB if module == "imdb" else RFDB
            self.acdm = nn.ModuleList(block(channels) for _ in range(STEPS))
        self.gconv = nn.ModuleList(GConv(channels) for _ in range(STEPS))
        self.trans = nn.ModuleList(
            TransformerBlock(channels, segments, segment_tokens, fold) for _ in range(2)
        )
        self.tconv = nn.ModuleList(conv(channels, channels, 3) for _ in range(2))
        self.reconstruct_deep = Reconstruct(channels, scale, deep=True)
        self.reconstruct_shallow = Reconstruct(channels, scale, deep=False)
        self.cnn_dense = ablation not in ("no_cnn_dense", "no_dense")
        self.transformer_dense = ablation not in ("no_transformer_dense", "no_dense")

    @property
    def scale(self) -> int:
        """Upscaling factor."""
        return self.config.scale

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, 3, H, W], RGB in [0, 1], H, W >= 3 -> [N, 3, scale H, scale W], not clamped."""
        check_input(x)
        shallow = self.head(x)  # F_S [N, C, H, W]
        features = total = shallow  # F_A(i-1), S_(i-1)
        for i, gconv in enumerate(self.gconv):
            use, which = divmod(i, len(self.acdm))
            body = self.acdm[which](features, use)
            features = gconv(body + total if self.cnn_dense else body)
            total = total + features  # S_i = F_S + F_A1 + ... + F_Ai
        c_out = total if self.cnn_dense else features + shallow
        t_out1 = self.tconv[0](self.trans[0](c_out))
        t_add1 = t_out1 + c_out if self.transformer_dense else t_out1
        t_out2 = self.tconv[1](self.trans[1](t_add1))
        t_add2 = t_out2 + shallow
        if self.transformer_dense:
            t_add2 = t_out1 + c_out + t_add2
        return self.reconstruct_deep(t_add2) + self.reconstruct_shallow(shallow)

    def set_attention(self, attention: Attention) -> EFRDN:
        """Put another implementation of `reference.emha` into both transformer blocks."""
        for block in self.trans:
            block.emha.attention = attention
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.config.to_dict().items())

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **overrides) -> EFRDN:
        """Network with stored weights, in evaluation mode on the CPU; needs no network access.

        Args:
            name_or_path: "x2", "x3", "x4" for shipped weights, or a .safetensors or .pth file.
            **overrides: Constructor arguments that keep the weights, such as `segment_tokens=576`.

        Raises:
            FileNotFoundError: No such file, or no weights are shipped for that scale.
            ValueError: The file is no checkpoint of this network; keys or shapes that differ.
        """
        stored = checkpoint.load(name_or_path)
        net = cls(**{**stored.config, **overrides})
        checkpoint.load_into(net, stored.state_dict, str(name_or_path))
        return net.eval()


def check_input(x: Tensor) -> None:
    """Raise unless `x` is a floating [N, 3, H, W] batch of at least 3 x 3 pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"EFRDN: input must be a tensor [N, 3, H, W], got {type(x).__name__}; "
            "efrdn_fast.upscale() takes arrays and Pillow images"
        )
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"EFRDN: input must be [N, 3, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"EFRDN: input must be floating point in [0, 1], got {x.dtype}")
    if x.shape[2] < 3 or x.shape[3] < 3:
        raise ValueError(f"EFRDN: height and width must be at least 3, got {list(x.shape[2:])}")
