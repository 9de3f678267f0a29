"""3x3 convolution of up to four maps at once, never concatenated: bias, ReLU, residual.

y = relu(sum over sources conv3x3(x_s, W_s) + b) + r on tensor cores. A program streams down a strip
of columns: each source pixel is loaded once per row and enters up to nine products, of the three
output rows and columns that it reaches; three rows of sums are carried. All warps of a program
share the pixels and split the output channels, so their weights stay on chip.

Groups become block-diagonal weights: for the 4 to 8 channels of a group the zeros cost less than
another data layout. Interleaved sources (a0, b0, a1, b1, ...) are a numbering of the weight's
channels. float32 maps use TF32 where PyTorch's own convolutions may, else three TF32 products of
high and low parts, which is as exact as float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from . import reference as _reference
from ._launch import dot, empty_map, launch, map_strides, readable, relu, relu_backward, strip
from ._precision import convolution_tf32

__all__ = [
    "Source",
    "conv3x3",
    "convolve",
    "fits",
    "load_window",
    "parts",
    "products",
    "window",
    "window_pointers",
]

MAX_SOURCES = 4
MAX_CHANNELS = {2: 128, 4: 80}
"""Padded input channels whose weights fit on chip, by bytes of an element."""
WEIGHT_BYTES = 80 << 10
"""Shared memory that weights may take; the smallest of the supported GPUs have 99 KiB a block."""


class Source(NamedTuple):
    """Constants of one source: a window of `padded` channels around the `channels` wanted."""

    channels: int
    padded: int
    """Channels read, a power of two."""
    lead: int
    """Channels of the window before the first one wanted."""
    whole: int
    """1: all of the window may be read; 0: only the channels wanted."""
    first: int
    """Input channel of the convolution that the first one is; channel c is `first + step c`."""
    step: int
    stride_w: int
    shift: int
    """Channels by which the next block of output channels reads further on (groups)."""


@triton.jit
def parts(x, SPLIT: tl.constexpr):
    """(x,), or with SPLIT its leading bits that TF32 keeps and the rest."""
    if SPLIT:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        out = (high, x - high)
    else:
        out = (x,)
    return out


@triton.jit
def products(x, w, acc, SPLIT: tl.constexpr):
    if SPLIT:
        acc = dot(x[1], w[0], acc)
        acc = dot(x[0], w[1], acc)
    return dot(x[0], w[0], acc)


@triton.jit
def window_pointers(x_row, column, block, SOURCES: tl.constexpr, s: tl.constexpr):
    """Pointers `[Q, PADDED]` of the pixels in `column` (`[Q, 1]`) of a row."""
    PADDED: tl.constexpr = SOURCES[s][1]
    STRIDE: tl.constexpr = SOURCES[s][6]
    SHIFT: tl.constexpr = SOURCES[s][7]
    return x_row + column * STRIDE + (block * SHIFT + tl.arange(0, PADDED))[None, :]


@triton.jit
def _taps(w_ptr, out_channel, block, stride_wo, stride_wi, stride_wy, stride_wx,
          SOURCES: tl.constexpr, s: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr,
          GROUPS: tl.constexpr, dtype: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Weights of one source: 9 times the parts of a tile `[PADDED, NB]`, zero across groups."""
    CHANNELS: tl.constexpr = SOURCES[s][0]
    PADDED: tl.constexpr = SOURCES[s][1]
    LEAD: tl.constexpr = SOURCES[s][2]
    FIRST: tl.constexpr = SOURCES[s][4]
    STEP: tl.constexpr = SOURCES[s][5]
    SHIFT: tl.constexpr = SOURCES[s][7]
    k = tl.arange(0, PADDED) - LEAD
    group = out_channel // (COUT // GROUPS)
    inner = (FIRST + (block * SHIFT + k) * STEP)[:, None] - group[None, :] * (CIN // GROUPS)
    real = (out_channel >= 0) & (out_channel < COUT)
    mask = ((k >= 0) & (k < CHANNELS))[:, None] & real[None, :]
    mask = mask & (inner >= 0) & (inner < CIN // GROUPS)
    pointers = w_ptr + inner * stride_wi + out_channel[None, :] * stride_wo
    taps = ()
    for t in tl.static_range(9):
        tap = pointers + ((t // 3) * stride_wy + (t % 3) * stride_wx)
        taps += (parts(tl.load(tap, mask=mask, other=0.0).to(dtype), SPLIT),)
    return taps


@triton.jit
def load_window(pointers, inside, SOURCES: tl.constexpr, s: tl.constexpr, offset: tl.constexpr):
    """Channels of one pixel, `[Q, PADDED]`; zero: those not wanted and pixels not `inside`."""
    CHANNELS: tl.constexpr = SOURCES[s][0]
    PADDED: tl.constexpr = SOURCES[s][1]
    LEAD: tl.constexpr = SOURCES[s][2]
    WHOLE: tl.constexpr = SOURCES[s][3]
    STRIDE: tl.constexpr = SOURCES[s][6]
    k = tl.arange(0, PADDED) - LEAD
    wanted = ((k >= 0) & (k < CHANNELS))[None, :]
    mask = inside[:, None]
    if not WHOLE:
        mask = mask & wanted
    x = tl.load(pointers + offset * STRIDE, mask=mask, other=0.0)
    if WHOLE and CHANNELS != PADDED:
        x = tl.where(wanted, x, 0.0)
    return x


@triton.jit(do_not_specialize=["H", "W", "rows"])
def _conv3x3_kernel(
    xs, strides_x, w_ptr, b_ptr, r_ptr, y_ptr, H, W, rows,
    stride_wo, stride_wi, stride_wy, stride_wx, stride_rn, stride_rh, stride_yn, stride_yh,
    stride_rw: tl.constexpr, stride_yw: tl.constexpr, SOURCES: tl.constexpr,
    COUNT: tl.constexpr, CIN: tl.constexpr, COUT: tl.constexpr, GROUPS: tl.constexpr,
    RELU: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, LEAD: tl.constexpr,
    PX: tl.constexpr, Q: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    BLOCKS: tl.constexpr = (COUT + NB - 1) // NB
    pid = tl.program_id(0)
    n, y0, x0 = strip(pid // BLOCKS, W, H, rows, Q * PX)
    block = pid % BLOCKS
    out_channel = block * NB + tl.arange(0, NB) - LEAD
    col = x0 + tl.arange(0, Q) * PX
    column = col[:, None].to(tl.int64)
    x_rows = ()
    taps = ()
    for s in tl.static_range(COUNT):
        x_row = xs[s] + n * strides_x[s][0] + (y0 - 1).to(tl.int64) * strides_x[s][1]
        x_rows += (window_pointers(x_row, column, block, SOURCES, s),)
        taps += (_taps(w_ptr, out_channel, block, stride_wo, stride_wi, stride_wy, stride_wx,
                       SOURCES, s, CIN, COUT, GROUPS, dtype, SPLIT),)  # fmt: skip
    y_row = y_ptr + n * stride_yn + (y0 - 2).to(tl.int64) * stride_yh
    y_row = y_row + column * stride_yw + out_channel[None, :]
    real = (out_channel >= 0) & (out_channel < COUT)
    bias = tl.zeros((Q, NB), tl.float32)
    if b_ptr is not None:
        bias += tl.load(b_ptr + out_channel, mask=real, other=0.0).to(tl.float32)
    if r_ptr is not None:
        r_row = r_ptr + n * stride_rn + (y0 - 2).to(tl.int64) * stride_rh
        r_row = r_row + column * stride_rw + (out_channel + LEAD)[None, :]

    # sums[3 x PX]: the row above the loaded one, which it completes, the same row, the row below
    carried = ()
    for _ in tl.static_range(2 * PX):
        carried += (bias,)
    for r in range(y0 - 1, tl.minimum(y0 + rows, H) + 1):
        sums = carried
        for _ in tl.static_range(PX):
            sums += (bias,)
        for j in tl.static_range(PX + 2):
            inside = (r >= 0) & (r < H) & (col + (j - 1) >= 0) & (col + (j - 1) < W)
            for s in tl.static_range(COUNT):
                x = load_window(x_rows[s], inside, SOURCES, s, j - 1)
                x = parts(x, SPLIT)
                added = ()
                for a in tl.static_range(3 * PX):
                    if (j - a % PX >= 0) and (j - a % PX <= 2):
                        tap = taps[s][(2 - a // PX) * 3 + (j - a % PX)]
                        added += (products(x, tap, sums[a], SPLIT),)
                    else:
                        added += (sums[a],)
                sums = added
        if r > y0:
            for i in tl.static_range(PX):
                ok = (col + i < W)[:, None]
                wanted = ok
                if LEAD > 0 or COUT % NB != 0:
                    wanted = ok & real[None, :]
                out = sums[i]
                if RELU:
                    out = relu(out)
                if r_ptr is not None:
                    mask = ok if LEAD > 0 else wanted
                    residual = tl.load(r_row + i * stride_rw, mask=mask, other=0.0)
                    if GATE:
                        out = relu_backward(out, residual.to(tl.float32))
                    else:
                        out += residual.to(tl.float32)
                tl.store(y_row + i * stride_yw, out.to(dtype), mask=wanted)
        carried = sums[PX : 3 * PX]
        moved = ()
        for s in tl.static_range(COUNT):
            moved += (x_rows[s] + strides_x[s][1],)
        x_rows = moved
        y_row += stride_yh
        if r_ptr is not None:
            r_row += stride_rh


def window(x: Tensor, first: int, step: int) -> tuple[Tensor, Source]:
    """How to read the channels of `x`: from an aligned window where memory around them allows.

    A masked load of 9 channels at an odd offset moves single elements; a window of 16 channels
    that contains them moves 16-byte vectors, and the others are zeroed in registers.
    """
    c, stride_w = x.shape[1], map_strides(x)[2]
    padded = max(16, triton.next_power_of_2(c))
    offset, lanes = x.storage_offset(), 16 // x.element_size()
    start = offset % stride_w  # channel of the whole map
    begin = min(start, stride_w - padded) // lanes * lanes
    if begin >= 0 and start + c <= begin + padded:
        base = offset - start + begin
        extents = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        last = base + sum(extents) - (c - 1) * x.stride(1) + padded
        if last <= x.untyped_storage().nbytes() // x.element_size():
            around = x.as_strided(x.shape, x.stride(), base)
            return around, Source(c, padded, start - begin, 1, first, step, stride_w, 0)
    return x, Source(c, padded, 0, int(c == padded), first, step, stride_w, 0)


def _config(out: Tensor, name: str, width: int, groups: int, split: bool) -> dict[str, Any]:
    """Launch config: PX, Q, NB, rows, num_warps, num_stages.

    PX: pixels of a matrix row; Q: matrix rows along W; NB: output channels of a program.

    Args:
        width: Padded channels of all sources.
    """
    n, cout, h, w = out.shape
    tuned = _configs.lookup("conv3x3", name, n * h * w, out.device)
    if tuned is not None:
        return tuned
    pixel = width * out.element_size() * (2 if split else 1)
    if 9 * 32 * pixel > WEIGHT_BYTES:
        # Four warps repeat two tiles, but share the loads, which else spill.
        config = {"PX": 1, "Q": 32, "NB": 16, "num_warps": 4}
    elif cout <= 16 or groups > 1:
        # Where the groups of a block are 16 channels, one pixel is given few registers and spills.
        narrow = groups > 1 and width <= 16
        config = {"PX": 1 if split and not narrow else 2, "Q": 32, "NB": 16, "num_warps": 2}
    else:
        config = {"PX": 4 if pixel <= 128 else 2, "Q": 16, "NB": 32, "num_warps": 4}
    config["num_stages"] = 1 if split else 2
    programs = n * triton.cdiv(w, config["Q"] * config["PX"]) * triton.cdiv(cout, config["NB"])
    # At least eight warps for each processor, then strips as high as possible.
    rows = programs * config["num_warps"] * h // (8 * _configs.processors(out.device))
    return config | {"rows": min(max(rows, 4), 32)}


def _by_groups(sources: list[Source], cin: int, cout: int, groups: int, block: int) -> list[Source]:
    """Sources narrowed to the groups of one block of output channels, where those are adjacent."""
    read = block * cin // (cout * len(sources))  # channels of each source
    adjacent = len(sources) == 1 or sources[0].step == 2
    whole = all(s.whole and s.lead == 0 for s in sources) and cout % block == 0
    if groups == 1 or not adjacent or not whole or block % (cout // groups):
        return sources
    if read < 16 or read & (read - 1):
        return sources
    return [s._replace(channels=read, padded=read, shift=read) for s in sources]


def convolve(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    groups: int = 1,
    relu: bool = False,
    interleaved: bool = False,
    gate: bool = False,
    transpose: bool = False,
) -> None:
    """`conv3x3` written into `out`, any map whose channels are adjacent in memory.

    Args:
        gate: Write the residual where the convolution is positive, zero elsewhere.
        transpose: Correlate with the weight turned round, input and output channels exchanged:
            the gradient of the input.
    """
    bases, sources, cin = [], [], 0
    for s, x in enumerate(xs):
        base, source = window(readable(x), *((s, 2) if interleaved else (cin, 1)))
        bases.append(base)
        sources.append(source)
        cin += x.shape[1]
    x, (n, cout, h, w) = bases[0], out.shape
    split = x.dtype == torch.float32 and not convolution_tf32()
    name = f"{str(x.dtype).removeprefix('torch.')}{'x3' if split else ''}"
    name += f"-C{'+'.join(str(each.shape[1]) for each in xs)}to{cout}"
    if groups > 1:
        name += f"-G{groups}"
    width = sum(s.padded for s in _by_groups(sources, cin, cout, groups, 16))
    config = dict(_config(out, name, width, groups, split))
    rows = config.pop("rows")
    sources = _by_groups(sources, cin, cout, groups, config["NB"])
    lead, rn, rh, rw = 0, 0, 0, 0
    if residual is not None:
        # An aligned window again, where it holds all channels: then sums are numbered like it.
        residual = readable(residual)
        base, source = window(residual, 0, 1)
        if source.whole and source.padded == config["NB"]:
            residual, lead = base, source.lead
        rn, rh, rw = map_strides(residual)
    yn, yh, yw = map_strides(out)
    strides = weight.stride()
    if transpose:
        weight = weight[:, :, 2:, 2:]
        strides = (strides[1], strides[0], -strides[2], -strides[3])
    launch(
        _conv3x3_kernel,
        n
        * triton.cdiv(h, rows)
        * triton.cdiv(w, config["Q"] * config["PX"])
        * triton.cdiv(cout, config["NB"]),
        tuple(bases),
        tuple(map_strides(base)[:2] for base in bases),
        *(weight, bias, residual, out, h, w, rows, *strides),
        *(rn, rh, yn, yh, rw, yw),
        SOURCES=tuple(map(tuple, sources)),
        COUNT=len(sources),
        CIN=cin,
        COUT=cout,
        GROUPS=groups,
        RELU=relu,
        GATE=gate,
        SPLIT=split,
        LEAD=lead,
        **config,
    )


def fits(xs: Sequence[Tensor]) -> bool:
    """Whether the kernels take these sources; a warning says it once where they do not."""
    limit = MAX_CHANNELS[xs[0].element_size()]
    width = sum(max(16, triton.next_power_of_2(x.shape[1])) for x in xs)
    if len(xs) <= MAX_SOURCES and width <= limit:
        return True
    warnings.warn(
        f"the triton 3x3 convolution takes up to {MAX_SOURCES} maps of together {limit} channels, "
        f"got {[x.shape[1] for x in xs]}; PyTorch's convolution serves"
    )
    return False


def conv3x3(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    relu: bool,
    interleaved: bool,
) -> Tensor:
    """Launcher of `efrdn_fast::conv3x3`; arguments are valid (`functional.conv3x3` checks them).

    Wider inputs than the network's, whose weights do not fit on chip, go to PyTorch's convolution.
    """
    if not fits(xs):
        return _reference.conv3x3(xs, weight, bias, residual, groups, relu, interleaved)
    out = empty_map(xs[0], weight.shape[0])
    convolve(xs, weight, bias, residual, out, groups=groups, relu=relu, interleaved=interleaved)
    return out
