"""Backward of the segment attention, and the pieces that both directions share.

Probabilities are recomputed from the log-sum-exp. One kernel streams over the keys for dQ and
leaves two numbers for every query: norm, which makes the recomputed probabilities add up to 1 (a
log-sum-exp of 1e4 in float32 is off by 1e-3), and delta, the sum over channels of dO x O. One
streams over the queries for dK and dV. No atomics: the gradients are the same in every run.

delta from the stored O is off by the rounding of O, which large keys multiply; the rows of the
gradient of the scores add up to 0, and what they miss corrects it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs
from ._launch import dot, launch

__all__ = ["emha_backward", "exp2_scale", "head_tile", "load_heads", "precision", "store_heads"]

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def head_tile(pid, T, length, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Image, head, first token of program `pid`, first token and end of its segment.

    Programs of one head follow each other, so that its keys and values stay in the L2 cache. The
    first token lies behind the end where the last segment is too short for the program.
    """
    blocks = tl.cdiv(length, BLOCK)
    segments = tl.cdiv(T, length)
    head = pid // blocks % HEADS
    segment = pid // (blocks * HEADS)
    begin = segment % segments * length
    first = begin + pid % blocks * BLOCK
    return (segment // segments).to(tl.int64), head, first, begin, tl.minimum(begin + length, T)


@triton.jit
def load_heads(rows, left, D: tl.constexpr, TAIL: tl.constexpr):
    """Rows of D values, zero in the columns from D on and, with TAIL, in rows from `left` on."""
    ok = (tl.arange(0, rows.shape[1]) < D)[None, :]
    if TAIL:
        ok = ok & (tl.arange(0, rows.shape[0]) < left)[:, None]
    return tl.load(rows, mask=ok, other=0.0)


@triton.jit
def store_heads(rows, values, left, D: tl.constexpr):
    """Store the D real columns of the first `left` rows."""
    ok = (tl.arange(0, rows.shape[1]) < D)[None, :] & (tl.arange(0, rows.shape[0]) < left)[:, None]
    tl.store(rows, values.to(rows.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["T", "length"])
def _emha_bwd_query_kernel(
    qkv_ptr, grad_out_ptr, out_ptr, lse_ptr, norm_ptr, grad_ptr, T, length,
    stride_n, stride_t, stride_gn, stride_gt, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    n, head, first, begin, end = head_tile(tl.program_id(0), T, length, HEADS, BLOCK_M)
    if first < end:
        column = tl.arange(0, DP)[None, :]
        token = first + tl.arange(0, BLOCK_M)
        row = (n * T + token)[:, None]
        rows = qkv_ptr + n * stride_n + head * D + column
        q = load_heads(rows + token[:, None].to(tl.int64) * stride_t, end - first, D, True)
        grad_rows = grad_out_ptr + n * stride_gn + token[:, None].to(tl.int64) * stride_gt
        grad = load_heads(grad_rows + head * D + column, end - first, D, True)
        out = load_heads(out_ptr + row * WIDTH + head * D + column, end - first, D, True)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
        lane = (n * HEADS + head) * T + token
        lse = tl.load(lse_ptr + lane, mask=token < end, other=0.0) * LOG2E
        key = begin + tl.arange(0, BLOCK_N)
        k_rows = rows + WIDTH + key[:, None].to(tl.int64) * stride_t
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = tl.zeros((BLOCK_M, DP), tl.float32)
        keys = tl.zeros((BLOCK_M, DP), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        rest = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(begin, end, BLOCK_N):
            k = load_heads(k_rows, end - start, D, True)
            v = load_heads(k_rows + WIDTH, end - start, D, True)
            scores = dot(q, tl.trans(k), zeros, PRECISION)
            p = tl.exp2(scores * scale - lse[:, None])
            p = tl.where((start + tl.arange(0, BLOCK_N) < end)[None, :], p, 0.0)
            total += tl.sum(p, axis=1)
            keys = dot(p.to(k.dtype), k, keys, PRECISION)
            grad_p = dot(grad, tl.trans(v), zeros, PRECISION)
            grad_scores = p * (grad_p - delta[:, None])
            rest += tl.sum(grad_scores, axis=1)
            acc = dot(grad_scores.to(k.dtype), k, acc, PRECISION)
            k_rows += BLOCK_N * stride_t
        norm = 1.0 / total
        delta += rest * norm
        acc -= (rest * norm)[:, None] * keys
        tl.store(norm_ptr + lane * 2, norm, mask=token < end)
        tl.store(norm_ptr + lane * 2 + 1, delta, mask=token < end)
        grad_rows = grad_ptr + row * (3 * WIDTH) + head * D + column
        store_heads(grad_rows, acc * (norm * (scale / LOG2E))[:, None], end - first, D)


@triton.jit(do_not_specialize=["T", "length"])
def _emha_bwd_key_kernel(
    qkv_ptr, grad_out_ptr, lse_ptr, norm_ptr, grad_ptr, T, length,
    stride_n, stride_t, stride_gn, stride_gt, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * D
    n, head, first, begin, end = head_tile(tl.program_id(0), T, length, HEADS, BLOCK_N)
    if first < end:
        column = tl.arange(0, DP)[None, :]
        token = first + tl.arange(0, BLOCK_N)
        rows = qkv_ptr + n * stride_n + head * D + column
        k_rows = rows + WIDTH + token[:, None].to(tl.int64) * stride_t
        k = load_heads(k_rows, end - first, D, True)
        v = load_heads(k_rows + WIDTH, end - first, D, True)
        query = begin + tl.arange(0, BLOCK_M)
        q_rows = rows + query[:, None].to(tl.int64) * stride_t
        grad_rows = grad_out_ptr + n * stride_gn + head * D + column
        grad_rows += query[:, None].to(tl.int64) * stride_gt
        lane = (n * HEADS + head) * T + query
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        grad_k = tl.zeros((BLOCK_N, DP), tl.float32)
        grad_v = tl.zeros((BLOCK_N, DP), tl.float32)
        for start in range(begin, end, BLOCK_M):
            # Queries behind the end: q, dO, lse, norm and delta are 0, so they add 0.
            ok = query < end - (start - begin)
            q = load_heads(q_rows, end - start, D, True)
            grad = load_heads(grad_rows, end - start, D, True)
            lse = tl.load(lse_ptr + lane, mask=ok, other=0.0) * LOG2E
            norm = tl.load(norm_ptr + lane * 2, mask=ok, other=0.0)
            delta = tl.load(norm_ptr + lane * 2 + 1, mask=ok, other=0.0)
            scores = dot(k, tl.trans(q), zeros, PRECISION)
            p = tl.exp2(scores * scale - lse[None, :]) * norm[None, :]
            grad_v = dot(p.to(grad.dtype), grad, grad_v, PRECISION)
            grad_p = dot(v, tl.trans(grad), zeros, PRECISION)
            grad_scores = p * (grad_p - delta[None, :])
            grad_k = dot(grad_scores.to(q.dtype), q, grad_k, PRECISION)
            q_rows += BLOCK_M * stride_t
            grad_rows += BLOCK_M * stride_gt
            lane += BLOCK_M
        out = grad_ptr + (n * T + token)[:, None] * (3 * WIDTH) + WIDTH + head * D + column
        store_heads(out, grad_k * (scale / LOG2E), end - first, D)
        store_heads(out + WIDTH, grad_v, end - first, D)


def precision(x: Tensor, tf32: bool) -> str:
    """Precision of the products: 16-bit maps take "tf32", which says nothing to them."""
    return "tf32x3" if x.dtype == torch.float32 and not tf32 else "tf32"


def exp2_scale(width: int) -> float:
    """log2(e) / sqrt(width): exp2 of the scaled scores is the exponential that softmax wants."""
    return math.log2(math.e) * width**-0.5


def _config(qkv: Tensor, length: int, padded: int, split: bool) -> dict[str, Any]:
    """Launch config of both kernels: ROWS of a program and COLUMNS at a time, warps, stages.

    Rows are queries, columns keys, in the second kernel the other way round.
    """
    name = str(qkv.dtype).removeprefix("torch.") + ("x3" if split else "")
    tuned = _configs.lookup("emha_backward", f"{name}-D{padded}", length, qkv.device)
    if tuned is not None:
        return tuned
    single = qkv.dtype == torch.float32
    return {"ROWS": 64, "COLUMNS": 16 if single else 32, "num_warps": 4, "num_stages": 1}


def emha_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, length: int, tf32: bool
) -> Tensor:
    """Launcher of `efrdn_fast::emha_backward`; arguments are valid."""
    qkv, grad_out = (x if x.stride(2) == 1 else x.contiguous() for x in (qkv, grad_out))
    n, tokens, width = qkv.shape
    width //= 3
    length = min(length, tokens)
    padded = max(16, triton.next_power_of_2(width // heads))
    product = precision(qkv, tf32)
    options = dict(_config(qkv, length, padded, product == "tf32x3"))
    rows, columns = options.pop("ROWS"), options.pop("COLUMNS")
    options |= {"HEADS": heads, "D": width // heads, "DP": padded, "PRECISION": product}
    grad_qkv = torch.empty((n, tokens, 3 * width), dtype=qkv.dtype, device=qkv.device)
    norm = lse.new_empty((*lse.shape, 2))  # norm, delta
    shape = (tokens, length, *qkv.stride()[:2], *grad_out.stride()[:2], exp2_scale(width // heads))
    segments = n * triton.cdiv(tokens, length) * heads
    launch(
        _emha_bwd_query_kernel,
        segments * triton.cdiv(length, rows),
        *(qkv, grad_out, out.contiguous(), lse.contiguous(), norm, grad_qkv, *shape),
        **(options | {"BLOCK_M": rows, "BLOCK_N": columns}),
    )
    if qkv.dtype != torch.float32:  # else ptxas spills four values for a third block on sm_120
        options["maxnreg"] = 255
    launch(
        _emha_bwd_key_kernel,
        segments * triton.cdiv(length, rows),
        *(qkv, grad_out, lse.contiguous(), norm, grad_qkv, *shape),
        **(options | {"BLOCK_M": columns, "BLOCK_N": rows}),
    )
    return grad_qkv
