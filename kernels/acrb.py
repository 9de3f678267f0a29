"""ACRB, branches merged and BatchNorm folded: y = s + relu(conv3x3(s, W) + b), one kernel.

s is a slice of the channels of the map, read in place; y may go into a slice of another map, so
neither the split before nor the concatenation after makes a copy. The work is that of `conv3x3`
with s as its residual; W is padded to a power of two, not the map.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import empty_map, readable
from .conv3x3 import convolve

__all__ = ["acrb", "acrb_out"]


def acrb(x: Tensor, weight: Tensor, bias: Tensor, start: int) -> Tensor:
    """Launcher of `efrdn_fast::acrb`; arguments are valid (`functional.acrb` checks them)."""
    y = empty_map(x, weight.shape[0])
    acrb_out(x, weight, bias, start, y, 0)
    return y


def acrb_out(
    x: Tensor, weight: Tensor, bias: Tensor, start: int, out: Tensor, out_start: int
) -> None:
    """Launcher of `efrdn_fast::acrb_out`: the same into `out[:, out_start : out_start + d]`."""
    d = weight.shape[0]
    s = readable(x).narrow(1, start, d)
    y = out.narrow(1, out_start, d)
    if y.stride(1) == 1 or d == 1:
        convolve([s], weight, bias, s, y, relu=True)
    else:
        y.copy_(acrb(x, weight, bias, start))
