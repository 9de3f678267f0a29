"""Pieces of the GCRB kernels that compute in float32, for any channels and groups.

A row of a tile is one (pixel, group) pair: R = Q x GP rows, row = pixel x GP + group, since the
groups never mix. Of a row a thread holds CHUNKS vectors of K / lanes channels; inner values are MG
vectors `[R]`, weights tuples of tiles in the same layout, so nothing passes through shared memory.
MASKED: the channels or groups are no powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import relu

__all__ = [
    "depthwise_row",
    "depthwise_weights",
    "expand",
    "expand_weights",
    "group_tiles",
    "load_mids",
    "load_pixel",
    "load_weight",
    "project",
    "repeat",
    "spread",
    "squeeze",
    "squeeze_weights",
    "stack",
    "store_mids",
    "store_pixel",
    "sum_pixels",
]


def group_tiles(channels: int, mid: int, groups: int, dtype: torch.dtype) -> dict[str, int]:
    """How a (pixel, group) row is cut: CHUNKS vectors of K channels, so that a thread has 8."""
    width = triton.next_power_of_2(channels // groups)
    # 8 channels x 8 inner values would not fit in registers: then 4 channels.
    chunks = 2 if dtype == torch.float32 and width >= 8 and mid // groups <= 4 else 1
    return {
        "G": groups,
        "CG": channels // groups,
        "MG": mid // groups,
        "GP": triton.next_power_of_2(groups),
        "K": width // chunks,
        "CHUNKS": chunks,
    }


@triton.jit
def repeat(value, TIMES: tl.constexpr):
    """The value TIMES times, as a tuple."""
    values = ()
    for _ in tl.static_range(TIMES):
        values += (value,)
    return values


@triton.jit
def load_weight(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.load(pointers).to(tl.float32)


@triton.jit
def squeeze_weights(w1_ptr, b1_ptr, g, G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
                     K: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """W1 as MG x CHUNKS tiles `[R, K]` and b1 as MG vectors `[R]`, by row of a tile."""
    k = tl.arange(0, K)
    w1 = ()
    b1 = ()
    for m in tl.static_range(MG):
        gm = g * MG + m
        b1 += (load_weight(b1_ptr + gm, g < G, MASKED),)
        for h in tl.static_range(CHUNKS):
            c = h * K + k
            mask = (g < G)[:, None] & (c < CG)[None, :]
            w1 += (load_weight(w1_ptr + gm[:, None] * CG + c[None, :], mask, MASKED),)
    return w1, b1


@triton.jit
def depthwise_weights(w2_ptr, b2_ptr, g, G: tl.constexpr, MG: tl.constexpr,
                       MASKED: tl.constexpr):  # fmt: skip
    """W2 as MG tuples of 9 vectors `[R]`, b2 as MG."""
    w2 = ()
    b2 = ()
    for m in tl.static_range(MG):
        gm = g * MG + m
        b2 += (load_weight(b2_ptr + gm, g < G, MASKED),)
        taps = ()
        for t in tl.static_range(9):
            taps += (load_weight(w2_ptr + gm * 9 + t, g < G, MASKED),)
        w2 += (taps,)
    return w2, b2


@triton.jit
def expand_weights(w3_ptr, b3_ptr, g, G: tl.constexpr, CG: tl.constexpr, MG: tl.constexpr,
                    K: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """W3 as MG x CHUNKS tiles `[R, K]`, b3 as CHUNKS."""
    k = tl.arange(0, K)
    w3 = ()
    b3 = ()
    for h in tl.static_range(CHUNKS):
        c = h * K + k
        mask = (g < G)[:, None] & (c < CG)[None, :]
        b3 += (load_weight(b3_ptr + g[:, None] * CG + c[None, :], mask, MASKED),)
    for m in tl.static_range(MG):
        for h in tl.static_range(CHUNKS):
            c = h * K + k
            mask = (g < G)[:, None] & (c < CG)[None, :]
            pointers = w3_ptr + (g[:, None] * CG + c[None, :]) * MG + m
            w3 += (load_weight(pointers, mask, MASKED),)
    return w3, b3


@triton.jit
def load_pixel(pointers, ok, g, G: tl.constexpr, CG: tl.constexpr, K: tl.constexpr,
                CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One pixel of every row: CHUNKS tiles `[R, K]`, zero where not `ok`."""
    x = ()
    for h in tl.static_range(CHUNKS):
        mask = ok[:, None]
        if MASKED:
            mask = mask & (g < G)[:, None] & (h * K + tl.arange(0, K) < CG)[None, :]
        x += (tl.load(pointers + h * K, mask=mask, other=0.0),)
    return x


@triton.jit
def project(x, w, MG: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums over the channels of a row, CHUNKS tiles, times MG sets of weights: MG vectors `[R]`."""
    out = ()
    for m in tl.static_range(MG):
        products = x[0].to(tl.float32) * w[m * CHUNKS]
        for h in tl.static_range(1, CHUNKS):
            products += x[h].to(tl.float32) * w[m * CHUNKS + h]
        out += (tl.sum(products, axis=1),)
    return out


@triton.jit
def squeeze(x, w1, b1, ok, MG: tl.constexpr, CHUNKS: tl.constexpr):
    """relu(W1 x + b1) as MG vectors `[R]`, 0 where not `ok`."""
    sums = project(x, w1, MG, CHUNKS)
    mids = ()
    for m in tl.static_range(MG):
        mids += (tl.where(ok, relu(sums[m] + b1[m]), 0.0),)
    return mids


@triton.jit
def depthwise_row(top, middle, row, w2, b2, PX: tl.constexpr, MG: tl.constexpr):
    """Add one row of inner values, (PX + 2) x MG, to the partial sums of the rows around it.

    Returns:
        The finished row above, then the new `top` (taps 0 and 1 added) and `middle` (tap 0).
    """
    done = ()
    new_top = ()
    new_middle = ()
    for i in tl.static_range(PX):
        for m in tl.static_range(MG):
            a = row[i * MG + m]
            b = row[(i + 1) * MG + m]
            c = row[(i + 2) * MG + m]
            w = w2[m]
            d = top[i * MG + m] + a * w[6] + b * w[7] + c * w[8]
            t = middle[i * MG + m] + a * w[3] + b * w[4] + c * w[5]
            s = b2[m] + a * w[0] + b * w[1] + c * w[2]
            done += (d,)
            new_top += (t,)
            new_middle += (s,)
    return done, new_top, new_middle


@triton.jit
def expand(mids, w3, b3, first: tl.constexpr, MG: tl.constexpr, CHUNKS: tl.constexpr):
    """W3 relu(mids[first : first + MG]) + b3 as CHUNKS tiles `[R, K]`."""
    out = ()
    for h in tl.static_range(CHUNKS):
        e = b3[h]
        for m in tl.static_range(MG):
            e += relu(mids[first + m])[:, None] * w3[m * CHUNKS + h]
        out += (e,)
    return out


@triton.jit
def store_pixel(pointers, values, ok, g, G: tl.constexpr, CG: tl.constexpr, K: tl.constexpr,
                CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Store CHUNKS tiles `[R, K]` where `ok`, as `load_pixel` loads them."""
    for h in tl.static_range(CHUNKS):
        mask = ok[:, None]
        if MASKED:
            mask = mask & (g < G)[:, None] & (h * K + tl.arange(0, K) < CG)[None, :]
        tl.store(pointers + h * K, values[h].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_mids(pointers, ok, MG: tl.constexpr):
    """The MG inner values of each row of a tile, which lie side by side; zero where not `ok`."""
    mids = ()
    for m in tl.static_range(MG):
        mids += (tl.load(pointers + m, mask=ok, other=0.0),)
    return mids


@triton.jit
def stack(values, first: tl.constexpr, COUNT: tl.constexpr):
    """COUNT (2, 4 or 8) vectors `[R]` from `first` on as one tile: one exchange, not COUNT."""
    half = ()
    for i in tl.static_range(COUNT // 2):
        half += (tl.join(values[first + i], values[first + i + COUNT // 2]),)
    if COUNT == 8:
        half = (tl.join(half[0], half[2]), tl.join(half[1], half[3]))
    tile = half[0] if COUNT == 2 else tl.join(half[0], half[1])
    return tile.reshape(values[first].shape[0], COUNT)


@triton.jit
def store_mids(row, values, ok, MG: tl.constexpr):
    """Store the MG inner values of each row of a tile side by side."""
    if MG == 2 or MG == 4 or MG == 8:
        tl.store(row[:, None] + tl.arange(0, MG)[None, :], stack(values, 0, MG), mask=ok[:, None])
    else:
        for m in tl.static_range(MG):
            tl.store(row + m, values[m], mask=ok)


@triton.jit
def sum_pixels(values, Q: tl.constexpr, GP: tl.constexpr):
    """Sum over the pixels of a tile: `[R, K]` -> `[GP, K]`, `[R]` -> `[GP]`."""
    if len(values.shape) == 2:
        total = tl.sum(values.reshape(Q, GP, values.shape[1]), axis=0)
    else:
        total = tl.sum(values.reshape(Q, GP), axis=0)
    return total


@triton.jit
def spread(values, Q: tl.constexpr):
    """Values of the groups `[GP]` for every pixel of a tile: `[R]`."""
    GP: tl.constexpr = values.shape[0]
    return tl.broadcast_to(values[None, :], (Q, GP)).reshape(Q * GP)
