"""Sums over the rows that programs leave behind, in fixed order: gradients repeat bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

__all__ = ["sum_rows"]

BLOCK, STEP = 16, 128
"""Columns of a program, rows it reads at a time."""


@triton.jit
def _sum_block(partial_ptr, rows, outs, col, SIZES: tl.constexpr, STARTS: tl.constexpr,
               STEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sum columns `col` of a table and store each into the output that owns it."""
    TOTAL: tl.constexpr = STARTS[-1]
    sums = tl.zeros((STEP, BLOCK), tl.float32)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        mask = (row < rows)[:, None] & (col < TOTAL)[None, :]
        pointers = partial_ptr + row[:, None].to(tl.int64) * TOTAL + col[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    for i in tl.static_range(len(SIZES)):
        index = col - STARTS[i]
        out = outs[i]
        tl.store(out + index, total.to(out.dtype.element_ty), (index >= 0) & (index < SIZES[i]))


@triton.jit(do_not_specialize=["rows_a", "rows_b"])
def _sum_rows_kernel(
    partial_a, partial_b, rows_a, rows_b, outs_a, outs_b,
    SIZES_A: tl.constexpr, SIZES_B: tl.constexpr, STARTS_A: tl.constexpr, STARTS_B: tl.constexpr,
    BLOCKS_A: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < BLOCKS_A:
        col = pid * BLOCK + tl.arange(0, BLOCK)
        _sum_block(partial_a, rows_a, outs_a, col, SIZES_A, STARTS_A, STEP, BLOCK)
    else:
        col = (pid - BLOCKS_A) * BLOCK + tl.arange(0, BLOCK)
        _sum_block(partial_b, rows_b, outs_b, col, SIZES_B, STARTS_B, STEP, BLOCK)


def sum_rows(
    a: Tensor, outs_a: Sequence[Tensor], b: Tensor | None = None, outs_b: Sequence[Tensor] = ()
) -> None:
    """Sum the rows of one or two tables, float32 `[rows, columns]`, in one launch.

    Args:
        a, b: The tables.
        outs_a, outs_b: Contiguous tensors that the columns fill one after the other.
    """
    b = a if b is None else b
    sizes = [tuple(out.numel() for out in outs) for outs in (outs_a, outs_b)]
    blocks = [triton.cdiv(sum(each), BLOCK) for each in sizes]
    launch(
        _sum_rows_kernel,
        sum(blocks),
        *(a, b, a.shape[0], b.shape[0], tuple(outs_a), tuple(outs_b), *sizes),
        *(tuple(accumulate(each, initial=0)) for each in sizes),
        *(blocks[0], BLOCK, STEP),
        num_warps=4,
    )
