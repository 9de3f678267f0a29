"""FLOP formulas of the ops for `torch.utils.flop_counter`: those of the layers they replace.

Recomputation in a backward op is not counted, so totals equal those of the reference network.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder

import torch

__all__ = ["register_when_needed"]

COUNTER = "torch.utils.flop_counter"


def _conv(x: list[int], channels: int, inner: int, taps: int) -> int:
    """Convolution [N, .., H, W] -> [N, channels, H, W], `inner` input channels per group."""
    n, _, h, w = x
    return 2 * n * h * w * channels * inner * taps


def _conv_backward(x: list[int], cin: int, cout: int, groups: int, taps: int) -> int:
    # PyTorch's formula for the weight gradient charges every pair of channels, also across groups.
    return _conv(x, cout, cin // groups, taps) + _conv(x, cout, cin, taps)


def gcrb(x, w1, *args, out_shape=None, **kwargs) -> int:
    """1x1 C -> M, depthwise 3x3, 1x1 M -> C."""
    mid, inner = w1[0], w1[1]
    groups = x[1] // inner
    return _conv(x, mid, inner, 1) + _conv(x, mid, 1, 9) + _conv(x, x[1], mid // groups, 1)


def gcrb_backward(grad_y, x, w1, *args, out_shape=None, **kwargs) -> int:
    """Input and weight gradients of the three convolutions."""
    mid, inner = w1[0], w1[1]
    groups = x[1] // inner
    return (
        _conv_backward(x, x[1], mid, groups, 1)
        + _conv_backward(x, mid, mid, mid, 9)
        + _conv_backward(x, mid, x[1], groups, 1)
    )


def gcrb_chain(x, params, *args, out_shape=None, **kwargs) -> int:
    return sum(gcrb(x, params[i]) for i in (0, 6, 12))


def acrb(x, weight, *args, out_shape=None, **kwargs) -> int:
    """Charged as the three branches that `weight` merges: 3 + 9 + 3 taps."""
    return _conv(x, weight[0], weight[1], 15)


def acrb_backward(grad_y, x, weight, *args, out_shape=None, **kwargs) -> int:
    return _conv_backward(x, weight[1], weight[0], 1, 15)


def conv3x3(xs, weight, *args, taps=9, out_shape=None, **kwargs) -> int:
    return _conv(xs[0], weight[0], weight[1], taps)


def conv3x3_backward(grad, xs, weight, groups, *args, taps=9, out_shape=None, **kwargs) -> int:
    return _conv_backward(grad, weight[1] * groups, weight[0], groups, taps)


def merge3x3(a, b, gate, residual, weight, *args, out_shape=None, **kwargs) -> int:
    return _conv(a, weight[0], weight[1], 9)


def merge3x3_backward(grad, a, b, gate, weight, relu, groups, *args, **kwargs) -> int:
    return _conv_backward(a, weight[1] * groups, weight[0], groups, 9)


def calibrate(base, x, w1, *args, out_shape=None, **kwargs) -> int:
    """Two 1x1 convolutions of one pixel, for the mean and for the deviation."""
    return 2 * 2 * _conv([x[0], 0, 1, 1], w1[0], w1[1], 1)


def calibrate_backward(grad, *args, **kwargs) -> int:
    return 2 * calibrate(grad, *args)


def no_products(*args, **kwargs) -> int:
    """Of ops that multiply no matrices: PyTorch charges nothing for those either."""
    return 0


def emha(qkv, heads, length, *args, out_shape=None, **kwargs) -> int:
    """q k^T and the product with v, for the segments as they are."""
    n, tokens, width = qkv
    whole, rest = divmod(tokens, length)
    return 4 * n * (width // 3) * (whole * length**2 + rest**2)


def emha_backward(grad_out, qkv, out, lse, heads, length, *args, out_shape=None, **kwargs) -> int:
    return 2 * emha(qkv, heads, length)


def _linear(x: list[int], *weights: list[int]) -> int:
    """Linear layers over all tokens of a map."""
    n, _, h, w = x
    return 2 * n * h * w * sum(rows * columns for rows, columns in weights)


def token_qkv(x, gamma, beta, reduce, qkv, *args, out_shape=None, **kwargs) -> int:
    return _linear(x, reduce, qkv)


def token_qkv_backward(grad, *args, out_shape=None, **kwargs) -> int:
    return 2 * token_qkv(*args)


def token_hidden(x, a, proj, proj_bias, gamma, beta, fc1, *args, out_shape=None, **kwargs) -> int:
    return _linear(x, proj, fc1)


def token_hidden_backward(grad, x, a, h, *args, out_shape=None, **kwargs) -> int:
    return 2 * token_hidden(x, a, *args)


def token_fold(x, a, h, proj, proj_bias, fc2, *args, out_shape=None, **kwargs) -> int:
    """The projection is charged to `token_hidden`; here it is computed again."""
    return _linear(x, fc2)


def token_fold_backward(grad, a, h, *args, out_shape=None, **kwargs) -> int:
    return 2 * token_fold(grad, a, h, *args)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.efrdn_fast
    for packets, formula in (
        ([ops.gcrb, ops.gcrb_train], gcrb),
        ([ops.gcrb_backward, ops.gcrb_train_backward], gcrb_backward),
        (ops.gcrb_chain, gcrb_chain),
        ([ops.acrb, ops.acrb_out], acrb),
        (ops.acrb_backward, acrb_backward),
        (ops.conv3x3, conv3x3),
        (ops.conv3x3_backward, conv3x3_backward),
        (ops.merge3x3, merge3x3),
        (ops.merge3x3_backward, merge3x3_backward),
        (ops.calibrate, calibrate),
        (ops.calibrate_backward, calibrate_backward),
        ([ops.sigmoid_gate, ops.sigmoid_gate_backward, ops.unfold, ops.fold], no_products),
        (ops.emha, emha),
        (ops.emha_backward, emha_backward),
        (ops.token_qkv, token_qkv),
        (ops.token_qkv_backward, token_qkv_backward),
        (ops.token_hidden, token_hidden),
        (ops.token_hidden_backward, token_hidden_backward),
        (ops.token_fold, token_fold),
        (ops.token_fold_backward, token_fold_backward),
    ):
        register_flop_formula(packets)(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when somebody imports the flop counter.

    Importing it here would import Triton, which `import efrdn_fast.functional` must not.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def register_when_needed() -> None:
    """Register with the flop counter now if it is loaded, else as soon as it is."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
