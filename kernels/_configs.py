"""Launch configs as data: `configs/<device>.json` where the device was tuned, else a heuristic.

A file maps op -> variant (dtype and channels) -> pixels N H W -> config, and is written only by
`python -m bench.tune` on the device itself. The entry with the nearest pixel count serves.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

__all__ = ["FOLDER", "file_name", "lookup", "processors", "trial"]

FOLDER = Path(__file__).parent / "configs"
_log = logging.getLogger(__name__)


def file_name(device_name: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200.json`."""
    return "-".join(device_name.lower().split()) + ".json"


_trial: ContextVar[tuple[str, dict[str, Any] | None, list[tuple[str, int]]] | None] = ContextVar(
    "efrdn_fast_trial_config", default=None
)


@contextlib.contextmanager
def trial(op: str, config: dict[str, Any] | None) -> Iterator[list[tuple[str, int]]]:
    """Inside, `op` is launched with `config`, or with the heuristic one for None.

    Yields the list of (variant, pixels) for which a config was looked up.
    """
    asked: list[tuple[str, int]] = []
    token = _trial.set((op, config, asked))
    try:
        yield asked
    finally:
        _trial.reset(token)


def lookup(op: str, variant: str, pixels: int, device: torch.device) -> dict[str, Any] | None:
    """The tuned config of the nearest size, or None where the device has none for it."""
    tried = _trial.get()
    if tried is not None and tried[0] == op:
        tried[2].append((variant, pixels))
        return tried[1]
    if device.type != "cuda":
        return None
    return _nearest(torch.cuda.get_device_name(device), op, variant, pixels)


@functools.lru_cache(maxsize=4096)
def _nearest(device_name: str, op: str, variant: str, pixels: int) -> dict[str, Any] | None:
    sizes = _table(device_name).get(op, {}).get(variant, {})
    if not sizes:
        return None
    return sizes[min(sizes, key=lambda size: abs(math.log(int(size) / pixels)))]


@functools.cache
def _table(device_name: str) -> dict[str, Any]:
    path = FOLDER / file_name(device_name)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    _log.info(
        "no launch configs for %s, heuristic ones serve; `python -m bench.tune` writes %s",
        device_name,
        path.name,
    )
    return {}


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for any other (interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
