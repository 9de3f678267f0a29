"""The transformer block around attention without its 288-wide tokens in memory: three kernels.

- token_qkv: W_qkv W_reduce LN(unfold3x3(x)), the tokens rebuilt tap by tap;
- token_hidden: h = relu(W1 LN(unfold3x3(x) + W_p a + b_p) + b1), the same with the projection;
- token_fold: fold(unfold3x3(x) + W_p a + b_p + W_2 h + b_2) as a transposed convolution over
  [a; h]: each pixel gathers what the up to 9 tokens around it hold for it.

LayerNorm becomes W LN(t) = rstd (W gamma t - mean u) + v, u the row sums of W gamma, v = W beta; a
small kernel folds gamma into the weight beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _configs, _transformer_bwd
from ._emha_bwd import precision
from ._launch import dot, empty_map, launch, map_strides, readable, relu
from ._token_tiles import (
    channel_tiles,
    columns,
    first_row,
    fold_norm,
    fold_rows,
    inside_map,
    load_blocks,
    load_pixels,
    normed_linear,
    overlaps,
    padded_width,
    token_tile,
    width_blocks,
    width_limit,
)

__all__ = ["token_fold", "token_hidden", "token_qkv"]


@triton.jit(do_not_specialize=["H", "W"])
def _token_qkv_kernel(
    x_ptr, w_ptr, uv_ptr, qkv_ptr, out_ptr, H, W, stride_n, stride_h, stride_w, eps,
    C: tl.constexpr, CP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr, P: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n, token, y, x = token_tile(tl.program_id(0), H, W, P)
    normed, _, _ = normed_linear(x_ptr, (), None, None, w_ptr, uv_ptr, n, y, x, H, W, stride_n,
                                 stride_h, stride_w, eps, C, CP, 0, (), BLOCKS, LP,
                                 PRECISION)  # fmt: skip
    reduced = ()
    for b in tl.static_range(len(BLOCKS)):
        v = tl.load(uv_ptr + LP + columns(BLOCKS, b))
        reduced += ((normed[b] + v[None, :]).to(dtype),)
    out_rows = out_ptr + (n * H * W + token)[:, None] * (3 * L)
    for start in range(0, 3 * L, NB):
        column = start + tl.arange(0, NB)
        out = tl.zeros((P, NB), tl.float32)
        for b in tl.static_range(len(BLOCKS)):
            k = columns(BLOCKS, b)
            mask = (k < L)[:, None] & (column < 3 * L)[None, :]
            w = tl.load(qkv_ptr + column[None, :] * L + k[:, None], mask=mask, other=0.0)
            out = dot(reduced[b], w, out, PRECISION)
        mask = (y < H)[:, None] & (column < 3 * L)[None, :]
        tl.store(out_rows + column[None, :], out.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def _token_hidden_kernel(
    x_ptr, a_ptr, proj_ptr, bias_ptr, w_ptr, uv_ptr, out_ptr, H, W, stride_n, stride_h, stride_w,
    eps, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, A_BLOCKS: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    n, _, y, x = token_tile(tl.program_id(0), H, W, P)
    # A scalar and offsets from it: 64-bit offsets of all rows, kept over the taps, spill.
    first = first_row(tl.program_id(0), H, W, P)
    row = tl.arange(0, P)
    a = load_blocks(a_ptr + first * M, row, y < H, M, A_BLOCKS)
    normed, _, _ = normed_linear(x_ptr, a, proj_ptr, bias_ptr, w_ptr, uv_ptr, n, y, x, H, W,
                                 stride_n, stride_h, stride_w, eps, C, CP, M, A_BLOCKS, BLOCKS,
                                 LP, PRECISION)  # fmt: skip
    for b in tl.static_range(len(BLOCKS)):
        column = columns(BLOCKS, b)
        h = relu(normed[b] + tl.load(uv_ptr + LP + column)[None, :])
        mask = (y < H)[:, None] & (column < L)[None, :]
        out = out_ptr + first * L + (row[:, None] * L + column[None, :])
        tl.store(out, h.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def _token_fold_kernel(
    x_ptr, a_ptr, h_ptr, proj_ptr, proj_bias_ptr, fc2_ptr, fc2_bias_ptr, out_ptr, H, W,
    stride_n, stride_h, stride_w, stride_on, stride_oh, stride_ow,
    C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, A_BLOCKS: tl.constexpr,
    L: tl.constexpr, BLOCKS: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    n, _, y, x = token_tile(tl.program_id(0), H, W, P)
    c = tl.arange(0, CP)
    acc = tl.zeros((P, CP), tl.float32)
    for tap in tl.static_range(9):
        k = c * 9 + tap
        bias = tl.load(proj_bias_ptr + k, mask=c < C, other=0.0).to(tl.float32)
        bias += tl.load(fc2_bias_ptr + k, mask=c < C, other=0.0).to(tl.float32)
        ok = inside_map(y + (1 - tap // 3), x + (1 - tap % 3), H, W)
        acc += tl.where(ok[:, None], bias[None, :], 0.0)
    acc = fold_rows(acc, a_ptr, None, proj_ptr, n, y, x, H, W, C, CP, M, A_BLOCKS, 1, PRECISION)
    acc = fold_rows(acc, h_ptr, None, fc2_ptr, n, y, x, H, W, C, CP, L, BLOCKS, 1, PRECISION)
    center = load_pixels(x_ptr, n, y, x, H, W, stride_n, stride_h, stride_w, C, CP)
    count = overlaps(y, x, H, W)[:, None]
    out = center + acc / count if MEAN else center * count + acc
    offset = n * stride_on + y.to(tl.int64) * stride_oh + x.to(tl.int64) * stride_ow
    mask = (y < H)[:, None] & (c < C)[None, :]
    tl.store(out_ptr + offset[:, None] + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def _config(op: str, x: Tensor, product: str) -> dict[str, Any]:
    """Launch config: P tokens of a program, NB columns of qkv at a time, warps, stages."""
    n, c, h, w = x.shape
    name = str(x.dtype).removeprefix("torch.") + product.removeprefix("tf32")
    tuned = _configs.lookup(op, f"{name}-C{c}", n * h * w, x.device)
    if tuned is not None:
        return tuned
    single = x.dtype == torch.float32
    # Each of these spills otherwise: token_fold with two stages on sm_80; token_hidden in three
    # products with 64 tokens, which take more tensor memory than sm_100 has besides. Without
    # `maxnreg` ptxas spills a few values so that one more block fits; with it, in the two cases
    # that have none, it takes on more than fits.
    stages = 1 if single or op == "token_fold" else 2
    three = op == "token_hidden" and product == "tf32x3"
    config = {"P": 32 if three else 64, "num_warps": 4, "num_stages": stages}
    free = three or (op == "token_fold" and not single)
    config |= {} if free else {"maxnreg": 255}
    return config | ({"NB": width_limit(product)} if op == "token_qkv" else {})


def token_qkv(
    x: Tensor, gamma: Tensor, beta: Tensor, reduce: Tensor, qkv: Tensor, eps: float, tf32: bool
) -> Tensor:
    """Launcher of `efrdn_fast::token_qkv`; arguments are valid (`functional` checks them)."""
    x = readable(x)
    n, _, h, w = x.shape
    inner, product = reduce.shape[0], precision(x, tf32)
    config = _config("token_qkv", x, product)
    weight, uv = fold_norm(reduce, gamma, beta, None, x.dtype)
    out = x.new_empty((n, h * w, 3 * inner))
    launch(
        _token_qkv_kernel,
        n * triton.cdiv(h * w, config["P"]),
        *(x, weight, uv, qkv.to(x.dtype).contiguous(), out, h, w, *map_strides(x), eps),
        **channel_tiles(x),
        L=inner,
        LP=padded_width(inner),
        BLOCKS=width_blocks(inner),
        PRECISION=product,
        **config,
    )
    return out


def token_hidden(
    x: Tensor,
    a: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    eps: float,
    tf32: bool,
) -> Tensor:
    """Launcher of `efrdn_fast::token_hidden`."""
    x, a = readable(x), a.contiguous()
    n, _, h, w = x.shape
    inner, hidden, product = a.shape[2], fc1_weight.shape[0], precision(x, tf32)
    config = _config("token_hidden", x, product)
    limit = width_limit(product)
    weight, uv = fold_norm(fc1_weight, gamma, beta, fc1_bias, x.dtype)
    out = x.new_empty((n, h * w, hidden))
    launch(
        _token_hidden_kernel,
        n * triton.cdiv(h * w, config["P"]),
        *(x, a, proj_weight.to(x.dtype).contiguous(), proj_bias.contiguous(), weight, uv, out),
        *(h, w, *map_strides(x), eps),
        **channel_tiles(x),
        M=inner,
        A_BLOCKS=width_blocks(inner, limit),
        L=hidden,
        LP=padded_width(hidden),
        BLOCKS=width_blocks(hidden, limit),
        PRECISION=product,
        **config,
    )
    return out


def token_fold(
    x: Tensor,
    a: Tensor,
    h: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    mean: bool,
    tf32: bool,
) -> Tensor:
    """Launcher of `efrdn_fast::token_fold`."""
    x = readable(x)
    n, channels, height, width = x.shape
    product = precision(x, tf32)
    limit = width_limit(product)
    config = _config("token_fold", x, product)
    out = empty_map(x, channels)
    launch(
        _token_fold_kernel,
        n * triton.cdiv(height * width, config["P"]),
        *(x, a.contiguous(), h.contiguous()),
        *(proj_weight.to(x.dtype).contiguous(), proj_bias.contiguous()),
        *(fc2_weight.to(x.dtype).contiguous(), fc2_bias.contiguous(), out),
        *(height, width, *map_strides(x), *map_strides(out)),
        **channel_tiles(x),
        M=a.shape[2],
        A_BLOCKS=width_blocks(a.shape[2], limit),
        L=h.shape[2],
        BLOCKS=width_blocks(h.shape[2], limit),
        MEAN=mean,
        PRECISION=product,
        **config,
    )
    return out


def token_qkv_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    reduce: Tensor,
    qkv: Tensor,
    eps: float,
    tf32: bool,
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_qkv_backward`: gradients of x and of the four parameters."""
    return _transformer_bwd.token_qkv_backward(grad, x, gamma, beta, reduce, qkv, eps, tf32)


def token_hidden_backward(
    grad: Tensor, x: Tensor, a: Tensor, h: Tensor, *params_eps_tf32: Any
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_hidden_backward`: gradients of x, a and six parameters."""
    return _transformer_bwd.token_hidden_backward(grad, x, a, h, *params_eps_tf32)


def token_fold_backward(
    grad: Tensor, a: Tensor, h: Tensor, *params_mean_tf32: Any
) -> tuple[Tensor, ...]:
    """Launcher of `efrdn_fast::token_fold_backward`: gradients of x, a, h and four parameters."""
    return _transformer_bwd.token_fold_backward(grad, a, h, *params_mean_tf32)
