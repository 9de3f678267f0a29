"""Checkpoints: safetensors with the constructor's arguments and training record as metadata.

`.pth` files are read with `weights_only=True` only, and unwrapped (`params_ema`, `module.`, ...).
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .config import EFRDNConfig

__all__ = [
    "FORMAT_VERSION",
    "Checkpoint",
    "atomic_write",
    "load",
    "load_into",
    "resolve",
    "save",
    "unpickle",
]

FORMAT_VERSION = 1
SHIPPED = {"x2": 2, "x3": 3, "x4": 4}
# Containers that other trainers put around the weights, best first (EMA before raw).
WRAPPERS = ("params_ema", "params", "state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")
# What torch's unpickler was seen to raise on damaged files.
UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError),
    *(struct.error, AssertionError, TypeError, AttributeError),
)


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file."""

    state_dict: dict[str, Tensor]
    """Plain keys of `EFRDN.state_dict()`."""
    config: dict
    """Constructor's arguments of `EFRDN`."""
    training: dict = field(default_factory=dict)
    """How the weights were trained; empty when unknown."""


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Path of shipped weights ("x2", "x3", "x4") or of a file, which must exist."""
    name = os.fspath(name_or_path)
    if name in SHIPPED:
        path = Path(__file__).parent / "weights" / f"efrdn_{name}.safetensors"
        if not path.is_file():
            have = sorted(
                p.stem.removeprefix("efrdn_") for p in path.parent.glob("efrdn_x?.safetensors")
            )
            raise FileNotFoundError(
                f"no weights are shipped for {name} (shipped: {', '.join(have) or 'none'}); "
                "train them with `efrdn train` or give a checkpoint file"
            )
        return path
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {name!r} does not exist (names: x2, x3, x4, or a file)"
        )
    return path


def load(name_or_path: str | os.PathLike) -> Checkpoint:
    """Read a .safetensors or .pth checkpoint onto the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is unreadable, unsafe, of a newer format, or not an EFRDN.
    """
    path = resolve(name_or_path)
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state, metadata = _read_pickle(path), {}
    if metadata.get("format_version", "1") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path}: checkpoint format {metadata['format_version']}, "
            f"this version reads {FORMAT_VERSION}"
        )
    state = _plain_keys(state)
    try:
        config = json.loads(metadata.get("config") or "null") or infer_config(state, path)
        training = json.loads(metadata.get("training") or "{}")
        EFRDNConfig(**config)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: damaged metadata: {error}") from error
    return Checkpoint(state, config, training)


def save(net: nn.Module, path: str | os.PathLike, training: dict | None = None) -> Path:
    """Write `net.state_dict()` as float32 safetensors with config and record, atomically."""
    state = {
        k: v.detach().to("cpu", torch.float32).contiguous() for k, v in net.state_dict().items()
    }
    metadata = {
        "format": "efrdn_fast",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(net.config.to_dict()),
        "training": json.dumps(training or {}),
    }
    return atomic_write(path, safetensors_bytes(state, metadata))


def atomic_write(path: str | os.PathLike, data: bytes) -> Path:
    """Write `data` to `path` so that a reader or a crash sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def unpickle(path: str | os.PathLike, device: str | torch.device = "cpu") -> object:
    """Contents of a file of `torch.save`, tensors and plain values only.

    Raises:
        ValueError: Why it cannot be read; the message does not name the file.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except UNPICKLING_ERRORS as error:
        first, name = str(error).strip().partition("\n")[0], type(error).__name__
        if not first or isinstance(error, KeyError):  # whose text is the bare key
            first = f"{name} {first}".strip()
        raise ValueError(f"it holds more than tensors, or is damaged ({first})") from error


def load_into(net: nn.Module, state_dict: dict[str, Tensor], source: str = "checkpoint") -> None:
    """`load_state_dict` whose error names the keys and shapes that differ."""
    own = net.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    shapes = [
        f"{key} is {list(state_dict[key].shape)}, expected {list(own[key].shape)}"
        for key in own.keys() & state_dict.keys()
        if own[key].shape != state_dict[key].shape
    ]
    problems = []
    for title, rows in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("shapes", sorted(shapes)),
    ):
        if rows:
            more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
            problems.append(f"{title}: {', '.join(rows[:5])}{more}")
    if problems:
        raise ValueError(f"{source} does not fit {type(net).__name__}: " + "; ".join(problems))
    net.load_state_dict(state_dict)


def infer_config(state: dict[str, Tensor], source: object) -> dict:
    """Constructor's arguments from the shapes of a state dict of the full network."""
    try:
        channels = state["head.weight"].shape[0]
        tail = state["reconstruct_shallow.conv.weight"].shape[0]
        acrb = state["acdm.0.acrb.0.conv3x3.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{source}: no EFRDN checkpoint: key {error.args[0]!r} is missing "
            f"(it has {len(state)} tensors: {', '.join(list(state)[:3])}, ...)"
        ) from None
    scale = {12: 2, 27: 3, 48: 4}.get(tail)
    if scale is None:
        raise ValueError(f"{source}: tail has {tail} channels, expected 12, 27 or 48 (x2, x3, x4)")
    return {"scale": scale, "channels": channels, "distilled": acrb}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> object:
    try:
        return unpickle(path)
    except ValueError as error:
        raise ValueError(
            f"{path}: refused: {error}; only files that load with weights_only=True are read"
        ) from error


def _plain_keys(state: object) -> dict[str, Tensor]:
    """Unwrap containers and strip prefixes, in any nesting."""
    while isinstance(state, dict):
        wrapper = next((k for k in WRAPPERS if isinstance(state.get(k), dict)), None)
        if wrapper is None:
            break
        state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"no weights found: expected a dictionary of tensors, got {type(state).__name__}"
        )
    plain = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if isinstance(value, Tensor) and name != "n_averaged":
            plain[name] = value
    return plain
