"""Statistics of a batch for GCRB in training, in the tiles of `_gcrb_tiles`.

Moments are kept as count, means and sums of products of deviations: Welford's update for a pixel,
Chan's for two sets of pixels, so nothing cancels. SPAN partners stand beside each inner value:
`co[m * SPAN + s]` belongs to the values m and (m + s) % MG of a group; SPAN 1 is the variance, MG
all pairs. A program leaves one row, `[1 + M + M SPAN]`, and the next kernel merges the rows in
fixed order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._gcrb_tiles import load_weight, spread, sum_pixels

__all__ = [
    "STEP",
    "add_moments",
    "inner_scales",
    "inner_values",
    "merge_moments",
    "outer_values",
    "row_size",
    "scale_of",
    "store_moments",
    "store_stats",
    "store_sums",
    "strip_rows",
    "sum_inner_rows",
    "sum_outer_rows",
    "train_config",
]

STEP = tl.constexpr(64)
"""Rows that a program reads at a time."""


def row_size(mid: int, span: int) -> int:
    """Floats of a row of moments."""
    return 1 + mid + mid * span


@triton.jit
def inner_values(pointer, g, G: tl.constexpr, MG: tl.constexpr, MASKED: tl.constexpr):
    """A vector over the inner channels as MG vectors `[R]`."""
    values = ()
    for m in tl.static_range(MG):
        values += (load_weight(pointer + g * MG + m, g < G, MASKED),)
    return values


@triton.jit
def outer_values(pointer, g, G: tl.constexpr, CG: tl.constexpr, K: tl.constexpr,
                 CHUNKS: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """A vector over the channels as CHUNKS tiles `[R, K]`."""
    values = ()
    for h in tl.static_range(CHUNKS):
        c = h * K + tl.arange(0, K)
        mask = (g < G)[:, None] & (c < CG)[None, :]
        values += (load_weight(pointer + g[:, None] * CG + c[None, :], mask, MASKED),)
    return values


@triton.jit
def scale_of(var, eps):
    """1 / standard deviation, rounded as PyTorch's."""
    return 1.0 / tl.sqrt_rn(var + eps)


@triton.jit
def add_moments(count, mean, co, values, ok, MG: tl.constexpr, SPAN: tl.constexpr):
    """Moments with one more pixel of each row of a tile, where `ok`."""
    total = count + 1.0
    share = tl.where(ok, 1.0 / total, 0.0)
    away = ()
    new_mean = ()
    for m in tl.static_range(MG):
        d = values[m] - mean[m]
        away += (d,)
        new_mean += (mean[m] + d * share,)
    new_co = ()
    for m in tl.static_range(MG):
        for s in tl.static_range(SPAN):
            product = away[m] * away[(m + s) % MG]
            new_co += (co[m * SPAN + s] + product * (count * share),)
    return tl.where(ok, total, count), new_mean, new_co


@triton.jit
def _exact_sum(values):
    """Sum over the first axis, rounded once: the statistics decide every gradient."""
    return tl.sum(values.to(tl.float64), axis=0).to(tl.float32)


@triton.jit
def _over_pixels(values, Q: tl.constexpr, GP: tl.constexpr):
    """`[R]` summed over the pixels of a tile, `[GP]`, rounded once."""
    return _exact_sum(values.reshape(Q, GP))


@triton.jit
def store_moments(partial, count, mean, co, Q: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                  MG: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """Merge the rows of a tile and store them as one row of the table."""
    M: tl.constexpr = G * MG
    group = tl.arange(0, GP)
    total = _over_pixels(count, Q, GP)
    share = 1.0 / tl.maximum(total, 1.0)
    tl.store(partial + group, total, mask=group < 1)
    away = ()
    for m in tl.static_range(MG):
        center = _over_pixels(mean[m] * count, Q, GP) * share
        # Once more from there: what the first sum rounded away.
        center += _over_pixels((mean[m] - spread(center, Q)) * count, Q, GP) * share
        tl.store(partial + 1 + group * MG + m, center, mask=group < G)
        away += (mean[m] - spread(center, Q),)
    for m in tl.static_range(MG):
        for s in tl.static_range(SPAN):
            product = away[m] * away[(m + s) % MG]
            merged = _over_pixels(co[m * SPAN + s] + count * product, Q, GP)
            tl.store(partial + 1 + M + (group * MG + m) * SPAN + s, merged, mask=group < G)


@triton.jit
def merge_moments(partial, rows, G: tl.constexpr, GP: tl.constexpr, MG: tl.constexpr,
                  SPAN: tl.constexpr):  # fmt: skip
    """Means and covariances of all rows of a table, MG and MG SPAN vectors `[GP]`."""
    M: tl.constexpr = G * MG
    SIZE: tl.constexpr = 1 + M + M * SPAN
    group = tl.arange(0, GP)[None, :]
    count = tl.zeros((STEP, 1), tl.float32)
    sums = ()
    for _ in tl.static_range(MG):
        sums += (tl.zeros((STEP, GP), tl.float32),)
    for start in range(0, rows, STEP):
        row = (start + tl.arange(0, STEP))[:, None]
        table = partial + row.to(tl.int64) * SIZE
        n = tl.load(table, mask=row < rows, other=0.0)
        count += n
        added = ()
        for m in tl.static_range(MG):
            mask = (row < rows) & (group < G)
            added += (sums[m] + n * tl.load(table + 1 + group * MG + m, mask=mask, other=0.0),)
        sums = added
    share = 1.0 / tl.sum(count)
    mean = ()
    for m in tl.static_range(MG):
        mean += (_exact_sum(sums[m]) * share,)
    products = ()
    for _ in tl.static_range(MG * SPAN):
        products += (tl.zeros((STEP, GP), tl.float32),)
    rest = ()
    for _ in tl.static_range(MG):
        rest += (tl.zeros((STEP, GP), tl.float32),)
    for start in range(0, rows, STEP):
        row = (start + tl.arange(0, STEP))[:, None]
        table = partial + row.to(tl.int64) * SIZE + 1
        mask = (row < rows) & (group < G)
        n = tl.load(table - 1, mask=row < rows, other=0.0)
        away = ()
        left = ()
        for m in tl.static_range(MG):
            d = tl.load(table + group * MG + m, mask=mask, other=0.0) - mean[m][None, :]
            away += (d,)
            left += (rest[m] + n * d,)
        rest = left
        added = ()
        for m in tl.static_range(MG):
            for s in tl.static_range(SPAN):
                index = M + (group * MG + m) * SPAN + s
                co = tl.load(table + index, mask=mask, other=0.0)
                added += (products[m * SPAN + s] + co + n * (away[m] * away[(m + s) % MG]),)
        products = added
    cov = ()
    for i in tl.static_range(MG * SPAN):
        cov += (_exact_sum(products[i]) * share,)
    exact = ()
    for m in tl.static_range(MG):
        exact += (mean[m] + _exact_sum(rest[m]) * share,)
    return exact, cov


@triton.jit
def store_stats(pointer, values, G: tl.constexpr, GP: tl.constexpr, MG: tl.constexpr):
    """Store MG vectors `[GP]` as a vector over the inner channels."""
    group = tl.arange(0, GP)
    for m in tl.static_range(MG):
        tl.store(pointer + group * MG + m, values[m], mask=group < G)


@triton.jit
def sum_inner_rows(partial, rows, SIZE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                   MG: tl.constexpr):  # fmt: skip
    """Sums over the rows of a table, `SIZE` columns, of its first M: MG vectors `[GP]`."""
    group = tl.arange(0, GP)[None, :]
    sums = ()
    for _ in tl.static_range(MG):
        sums += (tl.zeros((STEP, GP), tl.float32),)
    for start in range(0, rows, STEP):
        row = (start + tl.arange(0, STEP))[:, None]
        table = partial + row.to(tl.int64) * SIZE + group * MG
        added = ()
        for m in tl.static_range(MG):
            mask = (row < rows) & (group < G)
            added += (sums[m] + tl.load(table + m, mask=mask, other=0.0),)
        sums = added
    out = ()
    for m in tl.static_range(MG):
        out += (tl.sum(sums[m], axis=0),)
    return out


@triton.jit
def sum_outer_rows(partial, rows, first: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr,
                   G: tl.constexpr, GP: tl.constexpr, CG: tl.constexpr, K: tl.constexpr,
                   CHUNKS: tl.constexpr):  # fmt: skip
    """Sums over the rows of a table of C of its columns, from `first` on: CHUNKS tiles `[R, K]`."""
    at = tl.arange(0, GP * K)[None, :]
    out = ()
    for h in tl.static_range(CHUNKS):
        c = at % K + h * K
        real = (at // K < G) & (c < CG)
        sums = tl.zeros((STEP, GP * K), tl.float32)
        for start in range(0, rows, STEP):
            row = (start + tl.arange(0, STEP))[:, None]
            table = partial + row.to(tl.int64) * SIZE + (first + at // K * CG + c)
            sums += tl.load(table, mask=(row < rows) & real, other=0.0)
        total = tl.sum(sums, axis=0).reshape(1, GP, K)
        out += (tl.broadcast_to(total, (Q, GP, K)).reshape(Q * GP, K),)
    return out


@triton.jit
def inner_scales(var_ptr, g, eps, G: tl.constexpr, MG: tl.constexpr, MASKED: tl.constexpr):
    """1 / standard deviation of the inner channels as MG vectors `[R]`."""
    var = inner_values(var_ptr, g, G, MG, MASKED)
    scales = ()
    for m in tl.static_range(MG):
        scales += (scale_of(var[m], eps),)
    return scales


@triton.jit
def store_sums(partial, sums, Q: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                MG: tl.constexpr):  # fmt: skip
    """Sum MG vectors `[R]` over the pixels of a tile and store them side by side, by group."""
    group = tl.arange(0, GP)
    for m in tl.static_range(MG):
        tl.store(partial + group * MG + m, sum_pixels(sums[m], Q, GP), mask=group < G)


def train_config(
    op: str, x: Tensor, mid: int, groups: int, tiles: dict[str, int]
) -> dict[str, Any]:
    """Launch config of all kernels of an op: PX (where pixels overlap), Q, programs, num_warps.

    programs: of each multiprocessor; every one reads what all those of the kernel before left, so
    there are no more than run at a time.
    """
    n, c, h, w = x.shape
    name = f"{str(x.dtype).removeprefix('torch.')}-C{c}-M{mid}-G{groups}"
    tuned = _configs.lookup(op, name, n * h * w, x.device)
    if tuned is not None:
        return tuned
    lanes = max(1, tiles["K"] // (16 // x.element_size()))
    threads = 128 if tiles["MG"] <= 4 else 32
    q = max(1, threads // (tiles["GP"] * lanes))
    return {"PX": 1 if tiles["MG"] > 2 else 2, "Q": q, "programs": 3, "num_warps": 4}


def strip_rows(x: Tensor, columns: int, programs: int) -> tuple[int, int]:
    """Height of a strip of `columns` pixels, and number of strips, about `programs` for each SM."""
    n, _, h, w = x.shape
    across = n * triton.cdiv(w, columns)
    rows = min(h, max(4, triton.cdiv(across * h, programs * _configs.processors(x.device))))
    return rows, across * triton.cdiv(h, rows)
