"""`torch.ops.efrdn_fast.*`: schema, fake, autograd and autocast rule of every op.

`Library.impl` rather than `custom_op`: 10.9 against 15.7 us of host time per call. The argument
`backend` is a resolved name, so the choice stands in every trace. Outputs are NHWC memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch

__all__ = ["NAMESPACE", "SCHEMAS", "backward_backend", "nhwc_like", "plain", "register"]

NAMESPACE = "efrdn_fast"

_FOLDED = "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3"
_BATCH = (
    "Tensor w1, Tensor gamma1, Tensor beta1, Tensor w2, Tensor gamma2, Tensor beta2, "
    "Tensor w3, Tensor gamma3, Tensor beta3"
)
SCHEMAS = {
    "gcrb": f"(Tensor x, {_FOLDED}, int groups, str backend) -> Tensor",
    "gcrb_backward": f"(Tensor grad_y, Tensor x, {_FOLDED}, int groups, str backend)"
    f" -> ({', '.join(['Tensor'] * 7)})",
    "gcrb_train": f"(Tensor x, {_BATCH}, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "gcrb_train_backward": f"(Tensor grad_y, Tensor x, {_BATCH}, Tensor mean, Tensor var, "
    f"int groups, float eps, str backend) -> ({', '.join(['Tensor'] * 10)})",
    "gcrb_chain": "(Tensor x, Tensor[] params, int groups, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "acrb": "(Tensor x, Tensor weight, Tensor bias, int start, str backend) -> Tensor",
    "acrb_out": "(Tensor x, Tensor weight, Tensor bias, int start, Tensor(a!) out, int out_start, "
    "str backend) -> ()",
    "acrb_backward": "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, int start, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    # taps: what FLOP counting charges, 9, or 15 for the three merged branches of ACRB
    "conv3x3": "(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? residual, int groups, "
    "bool relu, bool interleaved, str backend, *, int taps=9) -> Tensor",
    "conv3x3_backward": "(Tensor grad, Tensor[] xs, Tensor weight, int groups, bool interleaved, "
    "str backend, *, int taps=9) -> (Tensor, Tensor)",
}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _kernel(op: str) -> Callable:
    """The op itself: look up the launcher, make the tensor's device current, launch."""

    def run(*args, taps: int = 9):
        *args, backend = args
        launch = dispatch.implementation(op, backend)
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return launch(*args)
        return launch(*args)

    return run


def nhwc_like(like: Tensor, channels: int) -> Tensor:
    """Output of a fake: a map of the size of `like` with `channels` channels."""
    n, _, h, w = like.shape
    return torch.empty(
        (n, channels, h, w),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def plain(like: Tensor) -> Tensor:
    """Output of a fake: contiguous, of the shape and dtype of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _fake_gcrb(x, *params_groups_backend):
    return nhwc_like(x, x.shape[1])


def _fake_gcrb_backward(grad_y, x, w1, b1, w2, b2, w3, b3, groups, backend):
    return nhwc_like(x, x.shape[1]), *map(plain, (w1, b1, w2, b2, w3, b3))


def _fake_gcrb_train(x, w1, *params_groups_eps_backend):
    size = 2 * w1.shape[0] + x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = (torch.empty(size, dtype=dtype, device=x.device) for _ in range(2))
    return nhwc_like(x, x.shape[1]), mean, var


def _fake_gcrb_train_backward(grad_y, x, *rest):
    return nhwc_like(x, x.shape[1]), *map(plain, rest[:9])


def _fake_gcrb_chain(x, params, groups, backend):
    return tuple(nhwc_like(x, x.shape[1]) for _ in range(3))


def _fake_acrb(x, weight, bias, start, backend):
    return nhwc_like(x, weight.shape[0])


def _fake_acrb_out(x, weight, bias, start, out, out_start, backend):
    return None


def _fake_acrb_backward(grad_y, x, weight, bias, start, backend):
    return nhwc_like(x, x.shape[1]), plain(weight), plain(bias)


def _fake_conv3x3(xs, weight, *rest, taps=9):
    return nhwc_like(xs[0], weight.shape[0])


def _fake_conv3x3_backward(grad, xs, weight, groups, interleaved, backend, *, taps=9):
    return nhwc_like(grad, sum(x.shape[1] for x in xs)), plain(weight)


def _autocast(op: torch._ops.OpOverload, device_type: str, maps: int) -> Callable:
    """The first `maps` arguments go to the autocast dtype; kernels read weights in float32.

    What the op itself computes, autocast leaves alone, also with none.
    """
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
    keyset = torch._C.DispatchKeySet(key[device_type])

    def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return x.to(dtype) if x is not None and x.dtype in dispatch.HALF_OR_SINGLE else x

    def run(x, *args, **kwargs):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            if isinstance(x, Tensor):
                args = (x, *args)
                cast_args = (cast(each, dtype) for each in args[:maps])
                return op(*cast_args, *args[maps:], **kwargs)
            weight, bias, residual, *rest = args
            xs = [cast(each, dtype) for each in x]
            return op(xs, weight, bias, cast(residual, dtype), *rest, **kwargs)

    return run


def backward_backend(ctx, op: str, forward: str, x: Tensor) -> None:
    """Note the backend that the backward op of a forward on backend `forward` will run on."""
    ctx.backend = dispatch.choose_backward(op, forward, x.device, x.dtype)


def _save_gcrb(ctx, inputs, output):
    *tensors, ctx.groups, backend = inputs
    ctx.save_for_backward(*tensors)
    backward_backend(ctx, "gcrb_backward", backend, tensors[0])


def _gcrb_backward(ctx, grad_y):
    grads = torch.ops.efrdn_fast.gcrb_backward(grad_y, *ctx.saved_tensors, ctx.groups, ctx.backend)
    return *grads, None, None


def _save_gcrb_train(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps, backend = inputs
    _, mean, var = output
    ctx.save_for_backward(*tensors, mean, var)
    ctx.mark_non_differentiable(mean, var)
    backward_backend(ctx, "gcrb_train_backward", backend, tensors[0])


def _gcrb_train_backward(ctx, grad_y, grad_mean, grad_var):
    grads = torch.ops.efrdn_fast.gcrb_train_backward(
        grad_y, *ctx.saved_tensors, ctx.groups, ctx.eps, ctx.backend
    )
    return *grads, None, None, None


def _save_acrb(ctx, inputs, output):
    *tensors, ctx.start, backend = inputs
    ctx.save_for_backward(*tensors)
    backward_backend(ctx, "acrb_backward", backend, tensors[0])


def _acrb_backward(ctx, grad_y):
    grads = torch.ops.efrdn_fast.acrb_backward(grad_y, *ctx.saved_tensors, ctx.start, ctx.backend)
    return *grads, None, None


def _save_conv3x3(ctx, inputs, keyword_only_inputs, output):
    xs, weight, bias, residual, ctx.groups, ctx.relu, ctx.interleaved, ctx.forward = inputs
    ctx.taps = keyword_only_inputs["taps"]
    ctx.sources, ctx.has_residual = len(xs), residual is not None
    # y > 0 tells where the ReLU was open, unless a residual hides it: then it is computed again
    ctx.save_for_backward(*xs, weight, bias, output if ctx.relu and residual is None else None)
    backward_backend(ctx, "conv3x3_backward", ctx.forward, xs[0])


def _conv3x3_backward(ctx, grad_y):
    *xs, weight, bias, y = ctx.saved_tensors
    grad = grad_y
    if ctx.relu:
        if y is None:
            y = torch.ops.efrdn_fast.conv3x3(
                xs, weight, bias, None, ctx.groups, True, ctx.interleaved, ctx.forward
            )
        grad = torch.ops.aten.threshold_backward(grad_y, y, 0)  # as ReLU's, NaN in y included
    grad_x, grad_weight = torch.ops.efrdn_fast.conv3x3_backward(
        grad, xs, weight, ctx.groups, ctx.interleaved, ctx.backend, taps=ctx.taps
    )
    if ctx.interleaved:
        grad_xs = [grad_x[:, 0::2], grad_x[:, 1::2]]
    else:
        grad_xs = list(grad_x.split([x.shape[1] for x in xs], dim=1))
    grad_bias = None if bias is None else grad.sum((0, 2, 3), dtype=bias.dtype)
    grad_residual = grad_y if ctx.has_residual else None
    return grad_xs, grad_weight, grad_bias, grad_residual, None, None, None, None


def _no_double_backward(op: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{NAMESPACE}::{op} has no derivative: second derivatives are not implemented; "
            "compute them with efrdn_fast.reference"
        )

    return backward


_FAKES = {
    "gcrb": _fake_gcrb,
    "gcrb_backward": _fake_gcrb_backward,
    "gcrb_train": _fake_gcrb_train,
    "gcrb_train_backward": _fake_gcrb_train_backward,
    "gcrb_chain": _fake_gcrb_chain,
    "acrb": _fake_acrb,
    "acrb_out": _fake_acrb_out,
    "acrb_backward": _fake_acrb_backward,
    "conv3x3": _fake_conv3x3,
    "conv3x3_backward": _fake_conv3x3_backward,
}
_AUTOGRAD = {
    "gcrb": (_gcrb_backward, _save_gcrb),
    "gcrb_train": (_gcrb_train_backward, _save_gcrb_train),
    "acrb": (_acrb_backward, _save_acrb),
    "conv3x3": (_conv3x3_backward, _save_conv3x3),
}
_MAPS = {"acrb_out": 0}  # as PyTorch's ops with `out`, which autocast leaves alone


def register(
    op: str,
    schema: str,
    fake: Callable,
    autograd: tuple[Callable, Callable] | None = None,
    maps: int = 1,
) -> None:
    """Define `op` in the namespace.

    Args:
        op: Its name, a key of `dispatch.IMPLS`.
        schema: Arguments and results.
        fake: Shapes, dtypes and strides of the results.
        autograd: Backward and setup of the context, where it is differentiable.
        maps: How many leading arguments autocast casts; 0: it leaves the op alone.
    """
    name = f"{NAMESPACE}::{op}"
    SCHEMAS.setdefault(op, schema)
    _library.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(op, _kernel(op), "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    if autograd:
        backward, setup = autograd
        torch.library.register_autograd(name, backward, setup_context=setup, lib=_library)
    elif op.endswith("_backward"):
        torch.library.register_autograd(name, _no_double_backward(op), lib=_library)
        maps = 0
    overload = getattr(torch.ops.efrdn_fast, op).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(op, _autocast(overload, device_type, maps), key)


for _op, _schema in SCHEMAS.items():
    register(_op, _schema, _FAKES[_op], _AUTOGRAD.get(_op), _MAPS.get(_op, 1))
