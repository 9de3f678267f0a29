"""Which backend serves an op: one visible table, and for every entry a reason why it cannot run.

`auto` takes the committed measured winner of the device where there is one, else the first of
cuda > triton > reference on a GPU and of cpu > reference on a CPU that can run. A backend that is
named runs or raises `BackendUnavailable` with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.resources
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import env
from .errors import BackendUnavailable, BuildError

__all__ = [
    "AUTO_ORDER",
    "IMPLS",
    "BackendStatus",
    "BackendTable",
    "Impl",
    "backends",
    "choose",
    "choose_backward",
    "implementation",
    "implementations",
    "plan",
    "requested",
    "use_backend",
]

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
"""Tiers by device type, best first; any other device has the reference only."""

WhyNot = Callable[[torch.device], "str | None"]


def _why_not_native(backend: str, device: torch.device) -> str | None:
    if device.type != backend:
        kind = "CUDA" if backend == "cuda" else "CPU"
        return f"it needs a {kind} tensor, got one on {device}"
    from .kernels import _build

    return _build.why_not(backend)


def _why_not_triton(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return (
            f"it needs a CUDA tensor, got one on {device} "
            "(CPU tensors run only in the interpreter, TRITON_INTERPRET=1)"
        )
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _never(device: torch.device) -> str | None:
    return None


WHY_NOT: dict[str, WhyNot] = {
    "cuda": functools.partial(_why_not_native, "cuda"),
    "triton": _why_not_triton,
    "cpu": functools.partial(_why_not_native, "cpu"),
    "reference": _never,
}


@dataclass(frozen=True)
class Impl:
    """One implementation of one op."""

    backend: str
    target: str
    """`module:function` below the package, imported at the first call."""
    why_not: WhyNot
    """Device -> reason why the backend cannot run on it, None when it can; builds nothing."""
    dtypes: tuple[torch.dtype, ...] | None = HALF_OR_SINGLE
    """Dtypes of the map it takes; None: every floating dtype."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Reason why it cannot take a map of `dtype` on `device`, or None."""
        if self.dtypes is not None and dtype not in self.dtypes:
            names = ", ".join(_name(d) for d in self.dtypes)
            return f"it computes in {names}, got {_name(dtype)}"
        return self.why_not(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(
    op: str,
    triton: str | None = None,
    native: tuple[str, ...] = (),
    reference: str = "reference",
) -> tuple[Impl, ...]:
    targets = {name: f"kernels.native:{op}_{name}" for name in native}
    if triton:
        targets["triton"] = f"kernels.{triton}:{op}"
    impls = [Impl(b, targets[b], WHY_NOT[b]) for b in ("cuda", "triton", "cpu") if b in targets]
    return *impls, Impl("reference", f"kernels.{reference}:{op}", _never, dtypes=None)


BOTH = ("cuda", "cpu")
ATTENTION = "reference_attention"
IMPLS: dict[str, tuple[Impl, ...]] = {
    "gcrb": _row("gcrb", "gcrb", BOTH),
    "gcrb_backward": _row("gcrb_backward", "gcrb", BOTH),
    "gcrb_train": _row("gcrb_train", "gcrb_train", BOTH),
    "gcrb_train_backward": _row("gcrb_train_backward", "gcrb_train", BOTH),
    "acrb": _row("acrb", "acrb", BOTH),
    "acrb_out": _row("acrb_out", "acrb", BOTH),
    "acrb_backward": _row("acrb_backward", "acrb", BOTH),
    "gcrb_chain": _row("gcrb_chain", "gcrb_chain", BOTH),
    "conv3x3": _row("conv3x3", "conv3x3", ("cuda",)),
    "conv3x3_backward": _row("conv3x3_backward"),
    **{
        op + suffix: _row(op + suffix, op, ("cpu",), "reference_fusion")
        for op in ("merge3x3", "calibrate", "sigmoid_gate")
        for suffix in ("", "_backward")
    },
    **{op: _row(op, None, ("cpu",), "reference_fusion") for op in ("unfold", "fold")},
    **{op: _row(op, "emha", BOTH, ATTENTION) for op in ("emha", "emha_backward")},
    **{
        op + suffix: _row(op + suffix, "transformer", ("cuda",), ATTENTION)
        for op in ("token_qkv", "token_hidden", "token_fold")
        for suffix in ("", "_backward")
    },
}

_override: ContextVar[str | None] = ContextVar("efrdn_fast_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op called with backend "auto" inside this context runs on the named backend.

    A function compiled or exported inside keeps that choice.

    Args:
        name: "auto", "reference", "triton", "cuda" or "cpu".

    Raises:
        ValueError: No backend has this name.
    """
    token = _override.set(_check_name("use_backend", name))
    try:
        yield
    finally:
        _override.reset(token)


def choose(op: str, backend: str, x: torch.Tensor, misfit: str | None = None) -> str:
    """Name of the backend that serves `op` on `x`.

    Args:
        op: A key of `IMPLS`.
        backend: "auto" (then `use_backend`, then EFRDN_FAST_BACKEND decide), or a backend's name.
        misfit: Why the C++ for CPUs does not take these sizes; None: it does.

    Raises:
        ValueError: No backend has this name.
        BackendUnavailable: The named backend cannot run here; the message says why.
    """
    return _choose(op, backend, x.device, x.dtype, misfit)


def requested(backend: str) -> str:
    """`backend`, or what `use_backend` or EFRDN_FAST_BACKEND put in the place of "auto"."""
    return (_override.get() or env.backend()) if backend == "auto" else backend


def _choose(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, misfit: str | None = None
) -> str:
    backend = requested(backend)
    if misfit is not None and backend == "auto" and device.type == "cpu":
        backend = "reference"  # and nothing is built
    chosen = _resolve(op, backend, device, dtype)
    if misfit is not None and chosen == "cpu":
        raise BackendUnavailable(f"{op}: backend 'cpu' cannot run: {misfit} (reference: can run)")
    return chosen


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo (2 s): a
# trace records the chosen backend as a constant.
_choose._dynamo_marked_constant = True


def choose_backward(op: str, forward: str, device: torch.device, dtype: torch.dtype) -> str:
    """Backend of a backward op: that of its forward where it has one, else what auto takes."""
    named = forward in {impl.backend for impl in implementations(op)}
    return _resolve(op, forward if named else "auto", device, dtype)


def plan(ops: Sequence[str], backend: str, x: torch.Tensor) -> dict[str, str]:
    """Op -> backend for ops that work together on `x`.

    A backend that is named serves the ops that it implements, and the reference the others.

    Raises:
        ValueError: No backend has this name.
        BackendUnavailable: The named backend implements none of them or cannot run here.
    """
    return dict(zip(ops, _plan(tuple(ops), backend, x.device, x.dtype), strict=True))


def _plan(
    ops: tuple[str, ...], backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, ...]:
    backend = requested(backend)
    serving = {op: {impl.backend for impl in implementations(op)} for op in ops}
    if backend != "auto" and not any(backend in names for names in serving.values()):
        _resolve(ops[0], backend, device, dtype)  # raises: it would serve nothing
    return tuple(
        _resolve(op, backend if backend in {"auto", *names} else "reference", device, dtype)
        for op, names in serving.items()
    )


_plan._dynamo_marked_constant = True


def _check_name(where: str, backend: str) -> str:
    if backend != "auto" and backend not in env.BACKENDS:
        names = ", ".join(("auto", *env.BACKENDS))
        raise ValueError(f"{where}: backend must be one of {names}; got {backend!r}")
    return backend


def implementations(op: str) -> tuple[Impl, ...]:
    """The implementations of `op`, fastest first."""
    return IMPLS[op]


@functools.cache
def _resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    impls = {impl.backend: impl for impl in implementations(op)}
    if _check_name(op, backend) != "auto":
        if backend not in impls:
            raise BackendUnavailable(
                f"{op}: backend {backend!r} has no implementation of it; {', '.join(impls)} have"
            )
        reason = _unready(op, impls[backend], device, dtype)
        if reason is None:
            return backend
        others = "; ".join(
            f"{name}: {why or 'can run'}"
            for name, impl in impls.items()
            if name != backend
            for why in [impl.refuses(device, dtype)]
        )
        raise BackendUnavailable(f"{op}: backend {backend!r} cannot run: {reason} ({others})")
    order = [name for name in AUTO_ORDER.get(device.type, ("reference",)) if name in impls]
    winner = _winner(op, device)
    if winner in order:
        order = [winner, *(name for name in order if name != winner)]
    skipped = []
    for name in order:
        if impls[name].dtypes is not None and dtype not in impls[name].dtypes:
            continue  # by design, nothing to mend
        reason = _unready(op, impls[name], device, dtype)
        if reason is None:
            if skipped:
                _warn_once(op, name, skipped)
            return name
        skipped.append(f"{name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend can run on {device}; {'; '.join(skipped)}")


def _unready(op: str, impl: Impl, device: torch.device, dtype: torch.dtype) -> str | None:
    """Reason why `impl` cannot run now, after building or importing what it needs."""
    reason = impl.refuses(device, dtype)
    if reason is None:
        try:
            implementation(op, impl.backend)
        except BuildError as error:
            reason = str(error)
    return reason


_warned = False


def _warn_once(op: str, taken: str, skipped: list[str]) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"efrdn_fast: {op} runs on backend {taken!r}, not on the fastest, because "
            f"{'; '.join(skipped)}. `efrdn doctor` shows what is missing.",
            RuntimeWarning,
        )


@functools.cache
def _winners() -> dict[str, dict[str, str]]:
    path = importlib.resources.files(f"{__package__}.kernels") / "configs" / "backends.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _winner(op: str, device: torch.device) -> str | None:
    """Measured best backend, `{device name: {op: backend}}` in `kernels/configs/backends.json`."""
    if device.type != "cuda" or not _winners():
        return None
    return _winners().get(torch.cuda.get_device_name(device), {}).get(op)


@functools.cache
def implementation(op: str, backend: str) -> Callable:
    """The launcher behind `op`, imported, and built where it is C++.

    Raises:
        BuildError: Its build failed.
    """
    impl = next(i for i in IMPLS[op] if i.backend == backend)
    if backend in BOTH:
        from .kernels import _build

        _build.load(backend)
    module, function = impl.target.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


@dataclass(frozen=True)
class BackendStatus:
    """What one backend can do in this process."""

    backend: str
    reason: str | None
    """Why it cannot run here; None: it can."""
    ops: tuple[str, ...]
    """Ops it implements."""

    @property
    def available(self) -> bool:
        return self.reason is None


class BackendTable(tuple[BackendStatus, ...]):
    """All backends; prints as a table."""

    def __repr__(self) -> str:
        return "\n".join(
            f"{row.backend:<10} {'yes' if row.available else f'no: {row.reason}'}" for row in self
        )


def backends() -> BackendTable:
    """What can run here, and why the rest cannot; builds nothing."""
    gpu = torch.cuda.is_available()
    rows = []
    for name in ("cuda", "triton", "cpu", "reference"):
        if name == "cuda" and not gpu:
            reason = "torch sees no CUDA device"
        else:
            device = torch.device("cuda" if gpu and name != "cpu" else "cpu")
            reason = WHY_NOT[name](device)
        ops = tuple(op for op in IMPLS if any(i.backend == name for i in implementations(op)))
        rows.append(BackendStatus(name, reason, ops))
    return BackendTable(rows)
