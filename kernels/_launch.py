"""What the Triton launchers share: maps they can read in place, fresh outputs, the launch itself.

`record()` collects launches instead of running them: the ahead-of-time check calls the launchers on
meta tensors with it and compiles exactly what they would launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Launch",
    "dot",
    "empty_map",
    "launch",
    "map_strides",
    "readable",
    "record",
    "relu",
    "relu_backward",
    "strip",
]


class Launch(NamedTuple):
    """One kernel launch: `kernel[(programs,)](*args, **options)`."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    # Triton 3.6 reads loop bounds with int(array of one element), which NumPy 2.4 refuses.
    def _patch_tensor(tensor: Any, scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor

    # It patches triton.language again for every call of a helper, 2 ms each: once in a kernel does.
    _patched: set[int] = set()

    def _patch_once(function: Any, patch: Any = interpreter._patch_lang) -> Any:
        first, names = not _patched, id(function.__globals__)
        if names in _patched:
            return None
        _patched.add(names)
        scope = patch(function)
        if first:  # the kernel itself
            restore = scope.restore
            scope.restore = lambda: (restore(), _patched.clear())
        return scope

    interpreter._patch_lang = _patch_once

_recorder: ContextVar[list[Launch] | None] = ContextVar("efrdn_fast_launches", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside, launches are appended to the list that this yields, and nothing runs."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launch a kernel with a grid of one dimension.

    Args:
        options: Constexpr arguments, `num_warps`, `num_stages`.
    """
    recorder = _recorder.get()
    if recorder is None:
        kernel[(programs,)](*args, **options)
    else:
        recorder.append(Launch(kernel, programs, args, options))


def readable(x: Tensor) -> Tensor:
    """`x` itself when the channels of a pixel are adjacent in memory, else an NHWC copy."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def map_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of N, H and W; that of W decides the code of a kernel, so it is C where W is 1."""
    return x.stride(0), x.stride(2), x.stride(3) if x.shape[3] > 1 else x.shape[1]


def empty_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised `[N, channels, H, W]` in NHWC memory, by default in the dtype of `like`."""
    n, _, h, w = like.shape
    return torch.empty(
        (n, channels, h, w),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN, as PyTorch's does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_backward(gate, grad):
    """The gradient behind a ReLU in front of it: a NaN in `gate` passes it, as in PyTorch."""
    return tl.where(gate <= 0, 0.0, grad)


# The interpreter keeps bfloat16 as raw bits and would multiply those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TF32 = tl.constexpr("tf32")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = _TF32):
    """acc + a b on tensor cores, sums in float32.

    float32 operands are rounded to TF32, or with "tf32x3" split into two TF32 parts, which is as
    exact as float32.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def strip(pid, W, H, rows, COLUMNS: tl.constexpr):
    """Image, first row and first column of program `pid` of a grid over strips."""
    strips = tl.cdiv(W, COLUMNS)
    heights = tl.cdiv(H, rows)
    n = pid // (strips * heights)
    return n.to(tl.int64), (pid // strips % heights) * rows, (pid % strips) * COLUMNS
