"""Options that several sub-commands share; `device.resolve_device` makes a device of a name."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError

__all__ = [
    "BACKENDS",
    "DTYPES",
    "add_runtime",
    "image_size",
    "natural",
    "options_only",
    "positive",
    "seconds",
    "tile",
]

DTYPES = ("auto", "fp32", "tf32", "fp16", "bf16")
BACKENDS = ("auto", "reference", "triton", "cuda", "cpu")


@contextmanager
def options_only() -> Iterator[None]:
    """Errors of a block that handles nothing but options are those of their user."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def image_size(text: str) -> tuple[int, int]:
    """Width and height of `WIDTHxHEIGHT`, 3x3 at least."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 3:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT of at least 3x3, got {text!r}")
    return int(match[1]), int(match[2])


def natural(text: str) -> int:
    """A whole number, 0 at least."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number, 1 at least."""
    if not natural(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A finite time above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def tile(text: str) -> int | None:
    """Edge of tiles, 0 for none, None for `auto`."""
    if text == "auto":
        return None
    if 0 < natural(text) < 3:
        raise argparse.ArgumentTypeError("a tile must be at least 3 pixels; 0 for none, or auto")
    return int(text)


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
