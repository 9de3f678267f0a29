"""What a call must do at least: floating-point operations, exponentials, bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from efrdn_fast.testing import TOLERANCES, assert_within

__all__ = ["ExpCounter", "Work", "counted", "largest_error", "work_of"]


@dataclass(frozen=True)
class Work:
    """Least work of one call."""

    flops: int
    """Two for a multiply-add; of convolutions and matrix products."""
    exps: int
    """Of softmax."""
    bytes: int
    """Every input read once, every output written once."""


class ExpCounter(TorchDispatchMode):
    """Counts the exponentials of softmax and, apart, of sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = self.sigmoid = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_softmax":
            self.softmax += args[0].numel()
        elif name in ("sigmoid", "sigmoid_"):
            self.sigmoid += args[0].numel()
        return func(*args, **(kwargs or {}))


def counted(
    function: Callable[..., Any],
    args: Sequence[Any],
    dtype: torch.dtype,
    moved: int | None = None,
) -> tuple[Any, Work]:
    """Run a plain function once, its floating tensors cast to `dtype`; result and work.

    Args:
        moved: Bytes, where not all of every argument is needed. Default: all of them.
    """
    cast = tree_map(lambda a: a.to(dtype) if _floating(a) else a, list(args))
    with torch.no_grad(), FlopCounterMode(display=False) as flops, ExpCounter() as exps:
        out = function(*cast)
    if moved is None:
        tensors = [t for t in tree_leaves((list(args), out)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
    return out, Work(flops.get_total_flops(), exps.softmax, moved)


def work_of(case: Any, dtype: torch.dtype, moved: int | None = None) -> Work:
    """Least work of a case of `efrdn_fast.cases`, counted on the meta device: nothing is computed.

    Args:
        moved: See `counted`.
    """
    return counted(case.reference, case.args(dtype, "meta"), dtype, moved)[1]


def largest_error(name: str, out: Any, exact: Any, plain: Any) -> float:
    """Largest absolute error of one output or of several; raises beyond the kernels' bound."""
    if isinstance(out, Tensor):
        return assert_within(out, exact, plain, TOLERANCES[out.dtype], name)
    each = zip(out, exact, plain, strict=True)
    return max(largest_error(name, *triple) for triple in each)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
