"""What the public ops refuse, in words: the op, the argument, what came, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch

__all__ = [
    "check_batch_norm",
    "check_branches",
    "check_groups",
    "check_int",
    "check_like",
    "check_map",
    "check_rank",
    "check_running",
    "check_separate",
    "check_slice",
    "check_squeeze",
    "check_tensor",
    "check_tensors",
    "check_weights",
]

DTYPES = (*dispatch.HALF_OR_SINGLE, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    # What has no rule for it, PyTorch would drop without a word.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} has a forward-mode derivative, which the fused ops do not carry; "
            "compute it with efrdn_fast.reference, or take gradients backwards"
        )


def check_rank(op: str, name: str, weight: Tensor, dims: str) -> None:
    """A tensor with as many dimensions as `dims` names, whose sizes can then be read."""
    check_tensor(op, name, weight)
    if weight.ndim != len(dims.split(", ")):
        raise ValueError(f"{op}: {name} must be [{dims}], got {list(weight.shape)}")


def check_map(op: str, name: str, x: Tensor, dims: str = "N, C, H, W") -> None:
    check_tensor(op, name, x)
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}"
        )
    if x.ndim != len(dims.split(", ")):
        raise ValueError(f"{op}: {name} must be [{dims}], got {list(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{op}: {name} must not be empty, got zero-size {list(x.shape)}")


def check_like(op: str, name: str, other: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A second map: the given shape, dtype and device of `x`."""
    check_map(op, name, other)
    if other.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(other.shape)}")
    if other.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must be {x.dtype} like the input, got {other.dtype}")
    if other.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like the input, got {other.device}")


def check_weights(op: str, x: Tensor, **weights: tuple[Tensor, tuple[int, ...]]) -> None:
    """Each weight is not empty, has its shape and device, and is float32 or of the dtype of `x`."""
    for name, (weight, shape) in weights.items():
        check_tensor(op, name, weight)
        if weight.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(weight.shape)}")
        if 0 in shape:
            raise ValueError(f"{op}: {name} must not be empty, got zero-size {list(shape)}")
        if weight.dtype != x.dtype and weight.dtype != torch.float32:
            raise TypeError(
                f"{op}: {name} must be float32 or {x.dtype} like the input, got {weight.dtype}"
            )
        if weight.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on {x.device} like the input, got {weight.device}"
            )


def check_separate(op: str, name: str, out: Tensor, x: Tensor) -> None:
    """`out` can be written while `x` is read; a trace, which has no memory, is not looked at."""
    if torch.compiler.is_compiling():
        return
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f"{op}: {name} must not be expanded, several of its values are one")
    if torch._C._overlaps(x, out):
        raise ValueError(f"{op}: {name} must not share memory with x, which is read meanwhile")


def check_tensors(op: str, name: str, values: object, count: int, what: str = "tensors") -> None:
    """A list or tuple of `count` tensors."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of {what}, got {type(values).__name__}")
    if len(values) != count:
        raise ValueError(f"{op}: {name} must be {count} {what}, got {len(values)}")


def check_int(op: str, name: str, value: object) -> None:
    """A whole number, also one that a trace keeps open."""
    whole = isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")
    if not whole or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}")


def check_slice(op: str, name: str, start: int, width: int, channels: int) -> None:
    check_int(op, name, start)
    if not 0 <= start <= channels - width:
        raise ValueError(
            f"{op}: {name} must be 0 to {channels - width} for {width} of {channels} channels, "
            f"got {start}"
        )


def check_groups(op: str, groups: int, **channels: int) -> None:
    check_int(op, "groups", groups)
    for name, count in channels.items():
        if groups < 1 or count % groups:
            raise ValueError(f"{op}: groups must divide {name}={count}, got {groups}")


def check_batch_norm(op: str, x: Tensor, momentum: float, eps: float) -> None:
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{op}: x must hold more than one value per channel for batch statistics, "
            f"got {list(x.shape)}"
        )
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be 0 to 1, got {momentum}")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")


def check_running(op: str, mean: object, var: object) -> None:
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: running_mean and running_var must be given together")


def check_squeeze(op: str, x: Tensor, w1: Tensor, groups: int, name: str = "w1") -> tuple[int, int]:
    """C and M of a GCRB."""
    check_map(op, "x", x)
    check_rank(op, name, w1, "M, C / groups, 1, 1")
    channels, mid = x.shape[1], w1.shape[0]
    check_groups(op, groups, C=channels, M=mid)
    return channels, mid


def check_branches(
    op: str, x: Tensor, w1x3: Tensor, w3x3: Tensor, w3x1: Tensor, start: int
) -> tuple[int, int]:
    """Cout and Cin of an asymmetric convolution of channels `start` on of `x`."""
    check_map(op, "x", x)
    check_rank(op, "w3x3", w3x3, "Cout, Cin, 3, 3")
    cout, cin = w3x3.shape[:2]
    check_weights(
        op,
        x,
        w3x3=(w3x3, (cout, cin, 3, 3)),
        w1x3=(w1x3, (cout, cin, 1, 3)),
        w3x1=(w3x1, (cout, cin, 3, 1)),
    )
    check_slice(op, "start", start, cin, x.shape[1])
    return cout, cin
