"""Networks that EFRDN is compared with, for timing: random weights of a fixed seed.

Own plain versions of the two relatives of Table 6 (ESRT, LBNet), the variants of Table 2, bicubic
interpolation, and those that `spandrel` brings, where it is installed, at the sizes of their
papers' light or tiny versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from efrdn_fast import EFRDN, imresize
from efrdn_fast.fast import EFRDNFast
from efrdn_fast.reference import emha_sdpa

from .esrt import ESRT
from .lbnet import LBNet

__all__ = ["PEERS", "Bicubic", "Peer"]


@dataclass(frozen=True)
class Peer:
    """One network."""

    make: Callable[[int], nn.Module]
    """Scale -> network; ImportError where its package is missing."""
    published: str | None = None
    """Its name in the paper's tables, where they have it."""

    def network(self, scale: int, device: torch.device) -> nn.Module:
        """In evaluation mode, with the same random weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make(scale).eval().to(device)


class Bicubic(nn.Module):
    """Bicubic enlargement."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return imresize(x, self.scale)


def _spandrel(module: str, name: str, **options: object) -> Callable[[int], nn.Module]:
    """A network of spandrel's; `options` may hold the name of its argument for the scale."""

    def make(scale: int) -> nn.Module:
        import_module("spandrel")
        network = getattr(import_module(f"spandrel.architectures.{module}"), name)
        chosen = {key: scale if value == "scale" else value for key, value in options.items()}
        return _merged(network(**chosen))

    return make


def _merged(net: nn.Module) -> nn.Module:
    """SPAN as it is deployed: its branches merged once, not at every call."""
    for parent in list(net.modules()):
        for key, child in list(parent.named_children()):
            if hasattr(child, "eval_conv") and hasattr(child, "update_params"):
                child.update_params()
                setattr(parent, key, child.eval_conv)
    return net


def _efrdn(**options: str) -> Callable[[int], nn.Module]:
    return lambda scale: EFRDN(scale, **options).set_attention(emha_sdpa)


PEERS = {
    "EFRDN": Peer(_efrdn(), "EFRDN"),
    "EFRDNFast": Peer(EFRDNFast, "EFRDN"),
    "EFRDN+IMDB": Peer(_efrdn(module="imdb")),
    "EFRDN+RFDB": Peer(_efrdn(module="rfdb")),
    "ESRT": Peer(ESRT, "ESRT"),
    "LBNet": Peer(LBNet, "LBNet"),
    "bicubic": Peer(Bicubic),
    "SwinIR-light": Peer(
        _spandrel(
            "SwinIR.__arch.SwinIR",
            "SwinIR",
            upscale="scale",
            window_size=8,
            depths=[6, 6, 6, 6],
            embed_dim=60,
            num_heads=[6, 6, 6, 6],
            mlp_ratio=2,
            upsampler="pixelshuffledirect",
            resi_connection="1conv",
        ),
        "SwinIR",
    ),
    "SPAN": Peer(_spandrel("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3, upscale="scale")),
    "OmniSR": Peer(
        _spandrel("OmniSR.__arch.OmniSR", "OmniSR", up_scale="scale", res_num=5, window_size=8)
    ),
    "PLKSR-tiny": Peer(
        _spandrel(
            "PLKSR.__arch.PLKSR",
            "PLKSR",
            upscaling_factor="scale",
            n_blocks=12,
            ccm_type="DCCM",
            kernel_size=13,
        )
    ),
    "SAFMN": Peer(_spandrel("SAFMN.__arch.safmn", "SAFMN", dim=36, upscaling_factor="scale")),
}
"""Name -> network; EFRDN is the baseline of their bench."""
