"""Attention inside segments of tokens (Eq. 30), straight from the qkv projection's layout.

out = softmax(q k^T / sqrt(D)) v for every segment and head; no score leaves the chip. A program
holds BLOCK_M queries of one head and streams over the keys of their segment with a running maximum
(online softmax in float32); the scale is folded into exp2. D is padded to DP, a power of two, by
masks: 18 -> 32 costs no time, since the exponentials take longer than both matrix products.

float32: products in TF32, or in three TF32 products of high and low parts, as exact as float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _emha_bwd
from ._emha_bwd import head_tile, load_heads, precision, store_heads
from ._launch import dot, launch

__all__ = ["emha", "emha_backward"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(q, k_rows, v_rows, left, top, total, acc, scale,
            D: tl.constexpr, PRECISION: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """One step of the online softmax, over the keys behind `k_rows`; TAIL: `left` of them.

    Args:
        top, total, acc: Largest score so far (times `scale`), sum of exponentials, sum of values.
        scale: log2(e) / sqrt(D).
    """
    k = load_heads(k_rows, left, D, TAIL)
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), PRECISION)
    if TAIL:
        scores = tl.where((tl.arange(0, k.shape[0]) < left)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    v = load_heads(v_rows, left, D, TAIL)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    return new_top, total, acc


@triton.jit(do_not_specialize=["T", "length"])
def _emha_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, T, length, stride_n, stride_t, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    n, head, first, begin, end = head_tile(tl.program_id(0), T, length, HEADS, BLOCK_M)
    if first < end:
        rows = qkv_ptr + n * stride_n + head * D
        column = tl.arange(0, DP)[None, :]
        m = tl.arange(0, BLOCK_M)
        q_rows = rows + (first + m)[:, None].to(tl.int64) * stride_t + column
        q = load_heads(q_rows, end - first, D, True)
        key = begin + tl.arange(0, BLOCK_N)
        k_rows = rows + WIDTH + key[:, None].to(tl.int64) * stride_t + column
        v_rows = k_rows + WIDTH
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DP), tl.float32)
        left = end - begin
        for _ in range(left // BLOCK_N):
            top, total, acc = _attend(
                q, k_rows, v_rows, left, top, total, acc, scale, D, PRECISION, False
            )
            k_rows += BLOCK_N * stride_t
            v_rows += BLOCK_N * stride_t
        left = left % BLOCK_N
        if left > 0:
            top, total, acc = _attend(
                q, k_rows, v_rows, left, top, total, acc, scale, D, PRECISION, True
            )
        out_rows = out_ptr + (n * T + first + m)[:, None] * WIDTH + head * D + column
        store_heads(out_rows, acc / total[:, None], end - first, D)
        lse = (top + tl.log2(total)) * LN2
        tl.store(lse_ptr + (n * HEADS + head) * T + first + m, lse, mask=first + m < end)


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
    wide = padded > 32 or qkv.dtype == torch.float32
    return {"BLOCK_M": 128, "BLOCK_N": 32 if wide else 64, "num_warps": 8 if wide else 4,
            "num_stages": 2 if wide else 3}  # fmt: skip


def emha(qkv: Tensor, heads: int, length: int, tf32: bool) -> tuple[Tensor, Tensor]:
    """Launcher of `efrdn_fast::emha`: out `[N, T, heads * D]`, log-sum-exp `[N, heads, T]`.

    Arguments are valid (`functional.emha` checks them).
    """
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    n, tokens, width = qkv.shape
    width //= 3
    length = min(length, tokens)
    padded = max(16, triton.next_power_of_2(width // heads))
    product = precision(qkv, tf32)
    config = _config(qkv, length, padded, product == "tf32x3")
    out = torch.empty((n, tokens, width), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((n, heads, tokens), dtype=torch.float32, device=qkv.device)
    launch(
        _emha_fwd_kernel,
        n * triton.cdiv(tokens, length) * heads * triton.cdiv(length, config["BLOCK_M"]),
        *(qkv, out, lse, tokens, length, qkv.stride(0), qkv.stride(1)),
        _emha_bwd.exp2_scale(width // heads),
        HEADS=heads,
        D=width // heads,
        DP=padded,
        PRECISION=product,
        **config,
    )
    return out, lse


def emha_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, length: int, tf32: bool
) -> Tensor:
    """Launcher of `efrdn_fast::emha_backward`: gradient of qkv."""
    return _emha_bwd.emha_backward(grad_out, qkv, out, lse, heads, length, tf32)
