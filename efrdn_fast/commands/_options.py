"""Options that several sub-commands share, and what their values mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "DTYPES", "add_runtime", "resolve_device"]

DTYPES = ("auto", "fp32", "tf32", "fp16", "bf16")
BACKENDS = ("auto", "reference", "triton", "cuda", "cpu")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, `--dtype` and `--backend`."""
    group = parser.add_argument_group("where and how to compute")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the network; auto is fp32, tf32 differs from it on CUDA only (default: auto)",
    )
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="implementation (default: auto)"
    )


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Device called `name`; None is cuda where there is one, else cpu.

    Raises:
        ValueError: No such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # not every backend has an is_available() of its own
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no data; use cpu or cuda")
    return device
