"""Every environment variable of the package, parsed with an error that names it.

| variable | values | default |
|---|---|---|
| `EFRDN_FAST_BACKEND` | `auto`, `reference`, `triton`, `cuda`, `cpu` | `auto` |
| `EFRDN_FAST_CACHE_DIR` | folder for builds | `efrdn_fast` in TORCH_EXTENSIONS_DIR or `~/.cache` |
| `EFRDN_FAST_VERBOSE_BUILD` | `0`, `1` | `0` |
| `EFRDN_FAST_CUDA_GRAPHS` | `0`, `1`: inference of `EFRDNFast` on a GPU as CUDA graphs | `0` |
| `EFRDN_FAST_DATA` | folder with benchmark and training images | unset |
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

__all__ = ["BACKENDS", "backend", "cache_dir", "cuda_graphs", "data_dir", "verbose_build"]

BACKENDS = ("reference", "triton", "cuda", "cpu")


@functools.cache
def backend() -> str:
    """EFRDN_FAST_BACKEND, read once per process.

    Raises:
        ValueError: It names no backend.
    """
    value = os.environ.get("EFRDN_FAST_BACKEND") or "auto"
    if value != "auto" and value not in BACKENDS:
        raise ValueError(
            f"EFRDN_FAST_BACKEND must be auto, {', '.join(BACKENDS)} or unset, got {value!r}"
        )
    return value


def cache_dir() -> Path:
    """Folder that holds what the JIT build makes; need not exist yet.

    EFRDN_FAST_CACHE_DIR, else `efrdn_fast` in TORCH_EXTENSIONS_DIR, XDG_CACHE_HOME or `~/.cache`.

    Raises:
        ValueError: EFRDN_FAST_CACHE_DIR exists and is no folder.
    """
    value = os.environ.get("EFRDN_FAST_CACHE_DIR")
    if value:
        folder = Path(value).expanduser()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"EFRDN_FAST_CACHE_DIR must be a folder, got the file {value!r}")
        return folder
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "efrdn_fast"


def verbose_build() -> bool:
    """EFRDN_FAST_VERBOSE_BUILD: show the compiler's commands and output.

    Raises:
        ValueError: Neither 0 nor 1.
    """
    return _switch("EFRDN_FAST_VERBOSE_BUILD", "0")


def cuda_graphs() -> bool:
    """EFRDN_FAST_CUDA_GRAPHS: capture inference on a GPU, see `graphs`; off until a GPU has run it.

    Raises:
        ValueError: Neither 0 nor 1.
    """
    return _switch("EFRDN_FAST_CUDA_GRAPHS", "0")


def _switch(name: str, default: str) -> bool:
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def data_dir() -> Path | None:
    """EFRDN_FAST_DATA, or None when it is unset.

    Raises:
        ValueError: It is set and is no folder.
    """
    value = os.environ.get("EFRDN_FAST_DATA")
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ValueError(f"EFRDN_FAST_DATA must be an existing folder, got {value!r}")
    return folder
