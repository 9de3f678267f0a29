"""The public ops: validate in words, choose a backend, call `torch.ops.efrdn_fast`.

Maps are `[N, C, H, W]` in float32, float16 or bfloat16 (float64: reference backend), in any memory
layout; NHWC memory (`channels_last`) is fastest, and every result has it. Weights are float32 or of
the dtype of the map; sums run in float32. All ops raise ValueError or TypeError that names the op,
the argument, what was expected and what came; `BackendUnavailable` when a backend that is named
cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, flops, ops, reparam
from .attention import emha, transformer_block
from .checks import (
    check_batch_norm,
    check_branches,
    check_groups,
    check_like,
    check_map,
    check_rank,
    check_running,
    check_separate,
    check_slice,
    check_squeeze,
    check_tensors,
    check_weights,
)
from .fusion import calibrate, merge3x3, sigmoid_gate

__all__ = [
    "acrb",
    "acrb_out",
    "acrb_train",
    "asymmetric_conv",
    "calibrate",
    "conv3x3",
    "emha",
    "gcrb",
    "gcrb_chain",
    "gcrb_train",
    "merge3x3",
    "sigmoid_gate",
    "transformer_block",
]

_ops = getattr(torch.ops, ops.NAMESPACE)
flops.register_when_needed()


def gcrb(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    groups: int = 2,
    backend: str = "auto",
) -> Tensor:
    """GCRB, BatchNorm folded: `x + relu(conv1x1(relu(dw3x3(relu(conv1x1(x))))))`, one kernel.

    Args:
        x: `[N, C, H, W]`.
        w1, b1: Grouped 1x1, `[M, C / groups, 1, 1]`, `[M]`.
        w2, b2: Depthwise 3x3, zero padding, `[M, 1, 3, 3]`, `[M]`.
        w3, b3: Grouped 1x1, `[C, M / groups, 1, 1]`, `[C]`.
        groups: Groups of both 1x1. Default: 2.
        backend: "auto", "reference", "triton", "cuda" or "cpu". Default: "auto".

    Returns:
        `[N, C, H, W]`, dtype of `x`. Differentiable once in every tensor.

    Example:
        >>> y = gcrb(x, *reparam.fold_gcrb(block, use=0))
    """
    channels, mid = check_squeeze("gcrb", x, w1, groups)
    weights, shapes = (w1, b1, w2, b2, w3, b3), _gcrb_shapes(channels, mid, groups)
    check_weights("gcrb", x, **{k: (w, shapes[k]) for k, w in zip(shapes, weights, strict=True)})
    return _ops.gcrb(x, w1, b1, w2, b2, w3, b3, groups, dispatch.choose("gcrb", backend, x))


def _gcrb_shapes(channels: int, mid: int, groups: int) -> dict[str, tuple[int, ...]]:
    return {
        "w1": (mid, channels // groups, 1, 1),
        "b1": (mid,),
        "w2": (mid, 1, 3, 3),
        "b2": (mid,),
        "w3": (channels, mid // groups, 1, 1),
        "b3": (channels,),
    }


def gcrb_chain(
    x: Tensor, params: Sequence[Tensor], *, groups: int = 2, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Three GCRBs one after the other, BatchNorm folded, as in EFFB; inference only.

    Args:
        x: `[N, C, H, W]`.
        params: 18 tensors, w1, b1, w2, b2, w3, b3 of each as in `gcrb`, all with the same M.
        groups: Groups of every 1x1. Default: 2.
        backend: As in `gcrb`.

    Returns:
        The results of the first, second and third, `[N, C, H, W]` each, dtype of `x`.
    """
    op = "gcrb_chain"
    check_tensors(op, "params", params, 18, "tensors, six for each GCRB")
    channels, mid = check_squeeze(op, x, params[0], groups, "params[0] (w1)")
    shapes = list(_gcrb_shapes(channels, mid, groups).items())
    for i, param in enumerate(params):
        name, shape = shapes[i % 6]
        check_weights(op, x, **{f"params[{i}] ({name})": (param, shape)})
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params)):
        raise ValueError(
            f"{op}: x and params must not require grad, the op is inference only; "
            "call gcrb three times, or gcrb_chain inside torch.no_grad()"
        )
    return _ops.gcrb_chain(x, list(params), groups, dispatch.choose(op, backend, x))


def gcrb_train(
    x: Tensor,
    w1: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    w2: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    w3: Tensor,
    gamma3: Tensor,
    beta3: Tensor,
    running_mean: Sequence[Tensor] | None = None,
    running_var: Sequence[Tensor] | None = None,
    *,
    groups: int = 2,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """GCRB with BatchNorm over the statistics of the batch, as in training.

    Args:
        x: `[N, C, H, W]`, N H W > 1; below 32, the kernels of every backend are PyTorch's.
        w1, w2, w3: As in `gcrb`.
        gamma1, beta1, ...: Weight and bias of the three BatchNorms, `[M]`, `[M]`, `[C]`.
        running_mean, running_var: Three tensors `[M]`, `[M]`, `[C]`, updated in place (unbiased
            variance) as `(1 - momentum) old + momentum new`. Default: None, no update.
        groups: Groups of both 1x1. Default: 2.
        backend: As in `gcrb`.

    Returns:
        `[N, C, H, W]`, dtype of `x`. Differentiable once in every tensor but the running ones.
    """
    channels, mid = check_squeeze("gcrb_train", x, w1, groups)
    check_batch_norm("gcrb_train", x, momentum, eps)
    check_weights(
        "gcrb_train",
        x,
        w1=(w1, (mid, channels // groups, 1, 1)),
        gamma1=(gamma1, (mid,)),
        beta1=(beta1, (mid,)),
        w2=(w2, (mid, 1, 3, 3)),
        gamma2=(gamma2, (mid,)),
        beta2=(beta2, (mid,)),
        w3=(w3, (channels, mid // groups, 1, 1)),
        gamma3=(gamma3, (channels,)),
        beta3=(beta3, (channels,)),
    )
    check_running("gcrb_train", running_mean, running_var)
    if running_mean is not None:
        widths = (mid, mid, channels)
        for name, running in (("running_mean", running_mean), ("running_var", running_var)):
            check_tensors("gcrb_train", name, running, 3)
            for i, (each, width) in enumerate(zip(running, widths, strict=True)):
                check_weights("gcrb_train", x, **{f"{name}[{i}]": (each, (width,))})
    backend = dispatch.choose("gcrb_train", backend, x)
    y, mean, var = _ops.gcrb_train(
        x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3, groups, eps, backend
    )
    if running_mean is not None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        with torch.no_grad():
            _update(running_mean, mean, momentum)
            _update(running_var, var * (count / (count - 1)), momentum)
    return y


def _update(running: Sequence[Tensor], batch: Tensor, momentum: float) -> None:
    parts = batch.split([each.shape[0] for each in running])
    parts = [new.to(old.dtype) for old, new in zip(running, parts, strict=True)]
    torch._foreach_lerp_(list(running), parts, momentum)  # one launch for the three


def acrb(
    x: Tensor, weight: Tensor, bias: Tensor, *, start: int = 0, backend: str = "auto"
) -> Tensor:
    """ACRB, branches merged and BatchNorm folded: `s + relu(conv3x3(s) + bias)`, one kernel.

    Args:
        x: `[N, C, H, W]`; s is its channels `start` to `start + d - 1`, read in place.
        weight, bias: `[d, d, 3, 3]`, `[d]`.
        start: First channel. Default: 0.
        backend: As in `gcrb`.

    Returns:
        `[N, d, H, W]`, dtype of `x`. Differentiable once in every tensor.

    Example:
        >>> y = acrb(x, *reparam.fold_acrb(block, use=0), start=23)
    """
    _check_acrb("acrb", x, weight, bias, start)
    return _ops.acrb(x, weight, bias, start, dispatch.choose("acrb", backend, x))


def _check_acrb(op: str, x: Tensor, weight: Tensor, bias: Tensor, start: int) -> None:
    check_map(op, "x", x)
    check_rank(op, "weight", weight, "d, d, 3, 3")
    d = weight.shape[0]
    check_weights(op, x, weight=(weight, (d, d, 3, 3)), bias=(bias, (d,)))
    check_slice(op, "start", start, d, x.shape[1])


def acrb_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    start: int = 0,
    out_start: int = 0,
    backend: str = "auto",
) -> Tensor:
    """`acrb` written into the channels of `out` from `out_start` on; inference only.

    Args:
        out: `[N, Cout, H, W]`, dtype and device of `x`; must not share memory with `x`.

    Returns:
        `out`.
    """
    _check_acrb("acrb_out", x, weight, bias, start)
    check_map("acrb_out", "out", out)
    if torch.is_grad_enabled():
        for name, value in (("x", x), ("weight", weight), ("bias", bias), ("out", out)):
            if value.requires_grad:
                raise ValueError(
                    f"acrb_out: {name} must not require grad, the op is inference only; "
                    "call acrb, or acrb_out inside torch.no_grad()"
                )
    n, _, h, w = x.shape
    check_like("acrb_out", "out", out, (n, out.shape[1], h, w), x)
    check_separate("acrb_out", "out", out, x)
    check_slice("acrb_out", "out_start", out_start, weight.shape[0], out.shape[1])
    _ops.acrb_out(x, weight, bias, start, out, out_start, dispatch.choose("acrb_out", backend, x))
    return out


def acrb_train(
    x: Tensor,
    w1x3: Tensor,
    w3x3: Tensor,
    w3x1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    start: int = 0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """ACRB with BatchNorm over the statistics of the batch, as in training.

    Args:
        x: `[N, C, H, W]`, N H W > 1; channels `start` to `start + d - 1` are read.
        w1x3, w3x3, w3x1: `[d, d, 1, 3]`, `[d, d, 3, 3]`, `[d, d, 3, 1]`.
        gamma, beta: `[d]` each.
        running_mean, running_var: `[d]` each, updated in place as `gcrb_train` does, or None.

    Returns:
        `[N, d, H, W]`, dtype of `x`.
    """
    d, _ = check_branches("acrb_train", x, w1x3, w3x3, w3x1, start)
    check_batch_norm("acrb_train", x, momentum, eps)
    check_weights(
        "acrb_train", x, w3x3=(w3x3, (d, d, 3, 3)), gamma=(gamma, (d,)), beta=(beta, (d,))
    )
    check_running("acrb_train", running_mean, running_var)
    if running_mean is not None:
        check_weights(
            "acrb_train", x, running_mean=(running_mean, (d,)), running_var=(running_var, (d,))
        )
    y = _merged_conv(x, reparam.merge_asymmetric(w1x3, w3x3, w3x1), None, start, backend)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, True, momentum, eps)
    return x.narrow(1, start, d) + F.relu(y)


def asymmetric_conv(
    x: Tensor,
    w1x3: Tensor,
    w3x3: Tensor,
    w3x1: Tensor,
    bias: Tensor | None = None,
    *,
    start: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum of a 1x3, a 3x3 and a 3x1 convolution, computed as the one 3x3 that it equals.

    Args:
        x: `[N, C, H, W]`; channels `start` to `start + Cin - 1` are read in place.
        w1x3, w3x3, w3x1: `[Cout, Cin, 1, 3]`, `[Cout, Cin, 3, 3]`, `[Cout, Cin, 3, 1]`; each
            gets its part of the gradient.
        bias: `[Cout]` or None.
        start: First channel. Default: 0.
        backend: As in `gcrb`.

    Returns:
        `[N, Cout, H, W]`, dtype of `x`.
    """
    cout, _ = check_branches("asymmetric_conv", x, w1x3, w3x3, w3x1, start)
    if bias is not None:
        check_weights("asymmetric_conv", x, bias=(bias, (cout,)))
    weight = reparam.merge_asymmetric(w1x3, w3x3, w3x1)
    return _merged_conv(x, weight, bias, start, backend)


def _merged_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: int, backend: str
) -> Tensor:
    """`weight`: that of the three branches, merged."""
    cin = weight.shape[1]
    backend = dispatch.choose("conv3x3", backend, x)
    sources = [x if cin == x.shape[1] else x.narrow(1, start, cin)]
    return _ops.conv3x3(list(sources), weight, bias, None, 1, False, False, backend, taps=15)


def conv3x3(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    groups: int = 1,
    relu: bool = False,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """3x3 convolution of several maps as if concatenated, ReLU if asked, then `+ residual`.

    Args:
        xs: One map or several `[N, Ci, H, W]`; their concatenation is never made.
        weight: `[Cout, Cin / groups, 3, 3]`, Cin the sum of all Ci.
        bias: `[Cout]` or None.
        residual: `[N, Cout, H, W]` or None.
        groups: Groups of the convolution. Default: 1.
        relu: ReLU after the bias. Default: False.
        interleaved: Join two maps as a0, b0, a1, b1, ... instead. Default: False.
        backend: As in `gcrb`.

    Returns:
        `[N, Cout, H, W]`, dtype of the maps. Differentiable once in every tensor.
    """
    op = "conv3x3"
    sources = [xs] if isinstance(xs, Tensor) else xs
    if not isinstance(sources, (list, tuple)):
        raise TypeError(f"{op}: xs must be a map or a list of maps, got {type(xs).__name__}")
    if not sources:
        raise ValueError(f"{op}: xs must hold at least one map, got none")
    first = sources[0]
    check_map(op, "xs[0]", first)
    n, c, h, w = first.shape
    for i, x in enumerate(sources[1:], 1):
        check_map(op, f"xs[{i}]", x)
        check_like(op, f"xs[{i}]", x, (n, c if interleaved else x.shape[1], h, w), first)
    if interleaved and len(sources) != 2:
        raise ValueError(f"{op}: interleaved needs two maps in xs, got {len(sources)}")
    check_rank(op, "weight", weight, "Cout, Cin / groups, 3, 3")
    cin, cout = sum(x.shape[1] for x in sources), weight.shape[0]
    check_groups(op, groups, Cin=cin, Cout=cout)
    check_weights(
        op,
        first,
        weight=(weight, (cout, cin // groups, 3, 3)),
        **({} if bias is None else {"bias": (bias, (cout,))}),
    )
    if residual is not None:
        check_like(op, "residual", residual, (n, cout, h, w), first)
    backend = dispatch.choose(op, backend, first)
    return _ops.conv3x3(list(sources), weight, bias, residual, groups, relu, interleaved, backend)
