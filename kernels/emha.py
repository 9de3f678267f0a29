"""Attention inside segments of tokens (Eq. 30): softmax(q k^T / sqrt(D)) v by segment and head.

A first kernel copies keys and values from the qkv projection's layout to padded rows `[tokens, DP]`
of each segment and head, DP a power of two above D. In the second a program holds BLOCK_M queries
and streams over the keys with a running maximum (online softmax in float32, the scale folded into
exp2); no score leaves the chip, and 18 -> 32 costs no time, since the exponentials take longer than
both matrix products. The copy is 1 % of the work at 14,400 tokens and takes out of the inner loop:

- masks and 4-byte loads: rows of 18 values are not aligned to more;
- sums of exponentials: column D of V is 1, so the product with V yields them;
- the shorter last block: column D of q is 1, that of K 0, or -inf behind the end of a segment.

Together 516 -> 370 machine instructions for 64 scores of a thread (sm_90, 4 warps), whose 64
exponentials take the time of 512.

float32: products in TF32, or in three TF32 products of high and low parts, as exact as float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _emha_bwd
from ._emha_bwd import exp2_scale, head_tile, load_heads, store_heads
from ._launch import launch
from .conv3x3 import parts, products

__all__ = ["emha", "emha_backward"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _finite_parts(x, SPLIT: tl.constexpr):
    """`parts` whose low part of an infinite value is 0, not NaN."""
    out = parts(x, SPLIT)
    if SPLIT:
        out = (out[0], tl.where(x == out[0], 0.0, out[1]))
    return out


@triton.jit(do_not_specialize=["T", "length"])
def _emha_pack_kernel(
    qkv_ptr, packed_ptr, T, length, stride_n, stride_t,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    WIDTH: tl.constexpr = HEADS * D
    # Of a float32 query the low part, 0 in column D, would make NaN of -inf.
    LAST: tl.constexpr = -1e30 if dtype == tl.float32 else float("-inf")
    pid = tl.program_id(0)
    n, head, first, begin, end = head_tile(pid, T, length, HEADS, BLOCK_N)
    column = tl.arange(0, DP)[None, :]
    row = tl.arange(0, BLOCK_N)
    rows = qkv_ptr + n * stride_n + (first + row)[:, None].to(tl.int64) * stride_t
    rows += WIDTH + head * D + column
    k = load_heads(rows, end - first, D, True).to(tl.float32)
    k = tl.where((column == D) & (first + row >= end)[:, None], LAST, k)
    v = load_heads(rows + WIDTH, end - first, D, True).to(tl.float32)
    v = tl.where((column == D) & (first + row < end)[:, None], 1.0, v)
    blocks = tl.cdiv(length, BLOCK_N)
    size = blocks * (BLOCK_N * DP)
    ks = _finite_parts(k, SPLIT)
    vs = _finite_parts(v, SPLIT)
    COUNT: tl.constexpr = len(ks)
    out = packed_ptr + (pid // blocks * 2 * COUNT).to(tl.int64) * size + column
    k_rows = out + (first - begin + row)[:, None] * DP
    if dtype == tl.float32:
        # Of 8 keys a thread holds the probabilities of 2t and 2t + 1, and multiplies t and t + 4.
        row = row // 8 * 8 + row % 2 * 4 + row // 2 % 4
    v_rows = out + (first - begin + row)[:, None] * DP + COUNT * size
    for i in tl.static_range(COUNT):
        tl.store(k_rows + i * size, ks[i].to(dtype))
        tl.store(v_rows + i * size, vs[i].to(dtype))


@triton.jit(do_not_specialize=["T", "length"])
def _emha_fwd_kernel(
    qkv_ptr, packed_ptr, out_ptr, lse_ptr, T, length, stride_n, stride_t, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    pid = tl.program_id(0)
    n, head, first, begin, end = head_tile(pid, T, length, HEADS, BLOCK_M)
    if first < end:
        column = tl.arange(0, DP)[None, :]
        token = first + tl.arange(0, BLOCK_M)
        q_rows = qkv_ptr + n * stride_n + token[:, None].to(tl.int64) * stride_t
        q = load_heads(q_rows + head * D + column, end - first, D, True).to(tl.float32)
        q = _finite_parts(tl.where(column == D, 1.0, q).to(dtype), SPLIT)
        size = tl.cdiv(length, BLOCK_N) * (BLOCK_N * DP)
        COUNT: tl.constexpr = len(q)
        k_rows = packed_ptr + (pid // tl.cdiv(length, BLOCK_M) * 2 * COUNT).to(tl.int64) * size
        k_rows += tl.arange(0, BLOCK_N)[:, None] * DP + column
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        acc = tl.zeros((BLOCK_M, DP), tl.float32)
        for _ in range(begin, end, BLOCK_N):
            ks = ()
            vs = ()
            for i in tl.static_range(COUNT):
                ks += (tl.trans(tl.load(k_rows + i * size)),)
                vs += (tl.load(k_rows + (COUNT + i) * size),)
            scores = products(q, ks, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), SPLIT)
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            p = tl.exp2(scores * scale - new_top[:, None])
            acc *= tl.exp2(top - new_top)[:, None]
            if dtype == tl.float32:
                # The order of V: what a thread holds is what it multiplies, nothing is exchanged.
                p = p.reshape(BLOCK_M, BLOCK_N // 8, 4, 2).permute(0, 1, 3, 2)
                p = p.reshape(BLOCK_M, BLOCK_N)
            acc = products(parts(p.to(dtype), SPLIT), vs, acc, SPLIT)
            top = new_top
            k_rows += BLOCK_N * DP
        total = tl.sum(tl.where(column == D, acc, 0.0), axis=1)
        out_rows = out_ptr + (n * T + token)[:, None] * WIDTH + head * D + column
        store_heads(out_rows, acc / total[:, None], end - first, D)
        lse = (top + tl.log2(total)) * LN2
        tl.store(lse_ptr + (n * HEADS + head) * T + token, lse, mask=token < end)


def _config(qkv: Tensor, length: int, padded: int, split: bool) -> dict[str, Any]:
    """Launch config: BLOCK_M queries of a program, BLOCK_N keys at a time, warps, stages.

    Args:
        padded: Head width on chip.
        split: float32 in three TF32 products.
    """
    name = str(qkv.dtype).removeprefix("torch.") + ("x3" if split else "")
    tuned = _configs.lookup("emha", f"{name}-D{padded}", length, qkv.device)
    if tuned is not None:
        return tuned
    single = qkv.dtype == torch.float32
    if single and padded > 64:
        # Heads of 64 in float32: no larger tiles fit on chip, and three products spill.
        return {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    # 128 queries share what a program reads of the L2 cache; with 64 that would be the limit.
    keys = 64 if padded <= 32 and not split else 32
    stages = 3 if padded <= 32 and not single else 2
    return {"BLOCK_M": 128, "BLOCK_N": keys, "num_warps": 8, "num_stages": stages}


def emha(qkv: Tensor, heads: int, length: int, tf32: bool) -> tuple[Tensor, Tensor]:
    """Launcher of `efrdn_fast::emha`: out `[N, T, heads * D]`, log-sum-exp `[N, heads, T]`.

    Arguments are valid (`functional.emha` checks them).
    """
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    n, tokens, width = qkv.shape
    width //= 3
    length = min(length, tokens)
    split = qkv.dtype == torch.float32 and not tf32
    sizes = {"HEADS": heads, "D": width // heads, "DP": max(16, _above(width // heads))}
    sizes["SPLIT"] = split
    config = _config(qkv, length, sizes["DP"], split)
    segments = n * triton.cdiv(tokens, length) * heads
    blocks = triton.cdiv(length, config["BLOCK_N"])
    shape = (tokens, length, qkv.stride(0), qkv.stride(1))
    packed = qkv.new_empty((segments, 4 if split else 2, blocks * config["BLOCK_N"], sizes["DP"]))
    launch(
        _emha_pack_kernel,
        segments * blocks,
        *(qkv, packed, *shape),
        **(sizes | {"BLOCK_N": config["BLOCK_N"], "num_warps": 4}),
    )
    out = qkv.new_empty((n, tokens, width))
    lse = qkv.new_empty((n, heads, tokens), dtype=torch.float32)
    launch(
        _emha_fwd_kernel,
        segments * triton.cdiv(length, config["BLOCK_M"]),
        *(qkv, packed, out, lse, *shape, exp2_scale(width // heads)),
        **(sizes | config),
    )
    return out, lse


def _above(width: int) -> int:
    """The smallest power of two above `width`."""
    return triton.next_power_of_2(width + 1)


def emha_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, length: int, tf32: bool
) -> Tensor:
    """Launcher of `efrdn_fast::emha_backward`: gradient of qkv."""
    return _emha_bwd.emha_backward(grad_out, qkv, out, lse, heads, length, tf32)
