"""Options that several sub-commands share; `device.resolve_device` makes a device of a name."""

from __future__ import annotations

import argparse

__all__ = ["BACKENDS", "DTYPES", "add_runtime"]

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
        help="precision; auto is fp32, and tf32 differs from it on CUDA only (default: auto)",
    )
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="implementation (default: auto)"
    )
