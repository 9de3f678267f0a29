"""efrdn_fast: EFRDN, a lightweight image super-resolution network, made fast on GPUs and CPUs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# Public name -> module that holds it. Loaded at first use, so `import efrdn_fast` costs nothing.
_NAMES = {
    "EFRDN": "model",
    "EFRDNConfig": "config",
    "EFRDNFast": "fast",
    "accelerate": "fast",
    "backends": "dispatch",
    "imresize": "resize",
    "upscale": "upscaler",
    "use_backend": "dispatch",
}
_MODULES = ("functional", "metrics", "reference")

__all__ = ["__version__", *_NAMES, *_MODULES]

# `kernels/` and `csrc/` install inside this package; in a checkout they stand beside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(import_module(f".{_NAMES[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
