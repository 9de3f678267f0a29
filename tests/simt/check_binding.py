"""Calls every op of ops_cuda*.cpp with CPU tensors, the kernels run as fibers.

Usage: python check_binding.py <library built by harness.binding>. The first wrong result raises.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from efrdn_fast import reference, testing

ext = torch.ops.efrdn_fast_ext
LAYOUTS = ("contiguous", "channels_last", "sliced")


def draw(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / max(1, values[0].numel()) ** 0.5


def is_nhwc(y: Tensor) -> bool:
    return y.is_contiguous(memory_format=torch.channels_last)


def gcrb_weights() -> list[Tensor]:
    shapes = [(8, 16, 1, 1), (8,), (8, 1, 3, 3), (8,), (32, 4, 1, 1), (32,)]
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


def expect_error(part: str, function: Callable, *args) -> None:
    try:
        function(*args)
    except RuntimeError as error:
        assert part in str(error), f"{part!r} not in {error}"
    else:
        raise AssertionError(f"no error that names {part!r}")


def check_gcrb() -> None:
    weights = gcrb_weights()

    def exact(x, *weights):
        return reference.gcrb(x, *weights, groups=2)

    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            x = testing.make_input((2, 32, 5, 6), dtype, layout=layout)
            grad = testing.make_input((2, 32, 5, 6), dtype, layout=layout, seed=1)
            y = ext.gcrb_cuda(x, *weights, 2)
            assert is_nhwc(y)
            testing.assert_close_to_reference(y, exact, [x, *weights])
            grads = ext.gcrb_backward_cuda(grad, x, *weights, 2)
            assert is_nhwc(grads[0])
            args = [x, *weights]
            testing.assert_close_to_reference(grads, testing.gradients(exact, grad), args)
    # weights that are not contiguous and of two dtypes; their gradients keep their own
    x = testing.make_input((1, 32, 3, 4), torch.float16)
    odd = [w.half() if i % 2 else w.flip(0).flip(0) for i, w in enumerate(weights)]
    odd[0] = odd[0].transpose(0, 1).contiguous().transpose(0, 1)
    testing.assert_close_to_reference(ext.gcrb_cuda(x, *odd, 2), exact, [x, *odd])
    grads = ext.gcrb_backward_cuda(x, x, *odd, 2)
    assert [g.dtype for g in grads[1:]] == [w.dtype for w in odd]
    assert [g.shape for g in grads[1:]] == [w.shape for w in odd]
    expect_error(
        "w2 must have 72 values, got 63", ext.gcrb_cuda, x, *odd[:2], odd[2][:7], *odd[3:], 2
    )
    expect_error("groups=3 must divide", ext.gcrb_cuda, x, *odd, 3)
    expect_error("must have the dtype", ext.gcrb_backward_cuda, x.float(), x, *odd, 2)
    expect_error("got 3 dimensions", ext.gcrb_cuda, x[0], *odd, 2)
    expect_error("float32, bfloat16 or float16", ext.gcrb_cuda, x.double(), *odd, 2)


def check_gcrb_chain() -> None:
    params = [w * (1 + 0.1 * k) for k in range(3) for w in gcrb_weights()]

    def exact(x, *params):
        return reference.gcrb_chain(x, params, groups=2)

    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            x = testing.make_input((2, 32, 5, 6), dtype, layout=layout)
            ys = ext.gcrb_chain_cuda(x, params, 2)
            assert all(is_nhwc(y) for y in ys)
            testing.assert_close_to_reference(ys, exact, [x, *params])
    odd = [p.bfloat16() if i < 6 else p for i, p in enumerate(params)]  # dtypes of their own
    testing.assert_close_to_reference(ext.gcrb_chain_cuda(x, odd, 2), exact, [x, *odd])
    expect_error("18 tensors, got 17", ext.gcrb_chain_cuda, x, params[:17], 2)
    narrow = [draw(4, 16, 1, 1), draw(4), draw(4, 1, 3, 3), draw(4), draw(32, 2, 1, 1), draw(32)]
    expect_error("M=8, got 4", ext.gcrb_chain_cuda, x, [*params[:12], *narrow], 2)
    expect_error("b3 must have 32", ext.gcrb_chain_cuda, x, [*params[:17], params[1]], 2)
    expect_error("groups=3 must divide", ext.gcrb_chain_cuda, x, params, 3)


def check_gcrb_train() -> None:
    w1, b1, w2, b2, w3, b3 = gcrb_weights()
    gammas = [1 + 0.2 * draw(size, seed=9) for size in (8, 8, 32)]
    params = [w1, gammas[0], b1, w2, gammas[1], b2, w3, gammas[2], b3]

    def exact(x, *params):
        return reference.gcrb_train(x, *params, groups=2)

    for layout in LAYOUTS:
        x = testing.make_input((2, 32, 7, 6), layout=layout)
        grad = testing.make_input((2, 32, 7, 6), layout=layout, seed=1)
        y, mean, var = ext.gcrb_train_cuda(x, *params, 2, 1e-5)
        testing.assert_close_to_reference((y, mean, var), exact, [x, *params])
        grads = ext.gcrb_train_backward_cuda(grad, x, *params, mean, var, 2, 1e-5)
        testing.assert_close_to_reference(grads, testing.gradients(exact, grad), [x, *params])
    half = [p.half() for p in params]
    y, mean, var = ext.gcrb_train_cuda(x.half(), *half, 2, 1e-5)
    grads = ext.gcrb_train_backward_cuda(x.half(), x.half(), *half, mean, var, 2, 1e-5)
    assert [(g.shape, g.dtype) for g in grads[1:]] == [(p.shape, p.dtype) for p in half]
    bad = [*params[:4], gammas[1][:7], *params[5:]]
    expect_error("gamma1, gamma2 and gamma3", ext.gcrb_train_cuda, x, *bad, 2, 1e-5)


def check_acrb() -> None:
    weight, bias = draw(9, 9, 3, 3), draw(9, seed=1)

    def exact(x, weight, bias):
        return reference.acrb(x, weight, bias, start=23)

    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.float16):
            x = testing.make_input((2, 32, 5, 6), dtype, layout=layout)
            y = ext.acrb_cuda(x, weight, bias, 23)
            testing.assert_close_to_reference(y, exact, [x, weight, bias])
            for memory in (torch.channels_last, torch.contiguous_format):
                out = torch.zeros(2, 59, 5, 6, dtype=dtype).contiguous(memory_format=memory)
                ext.acrb_out_cuda(x, weight, bias, 23, out, 18)
                assert torch.equal(out[:, 18:27], y)
                assert (out[:, :18] == 0).all()
                assert (out[:, 27:] == 0).all()
            grad = testing.make_input((2, 9, 5, 6), dtype, layout=layout, seed=1)
            grads = ext.acrb_backward_cuda(grad, x, weight, bias, 23)
            args = [x, weight, bias]
            testing.assert_close_to_reference(grads, testing.gradients(exact, grad), args)
    expect_error("start=24 and 9", ext.acrb_cuda, x, weight, bias, 24)
    expect_error("out_start=51 and 9", ext.acrb_out_cuda, x, weight, bias, 23, out, 51)


def check_conv3x3() -> None:
    weight, bias = draw(32, 59, 3, 3), draw(32, seed=1)
    residual = testing.make_input((2, 32, 5, 6), seed=8)

    def exact(xs, weight, bias, residual, groups=1, relu=True, interleaved=False):
        options = {"groups": groups, "relu": relu, "interleaved": interleaved}
        return reference.conv3x3(xs, weight, bias, residual=residual, **options)

    for widths in ([9, 9, 9, 32], [59], [10, 10, 10, 10, 10, 9]):
        for layout in LAYOUTS:
            xs = [
                testing.make_input((2, c, 5, 6), layout=layout, seed=i)
                for i, c in enumerate(widths)
            ]
            y = ext.conv3x3_cuda(xs, weight, bias, residual, 1, True, False, False)
            assert is_nhwc(y)
            testing.assert_close_to_reference(y, exact, [xs, weight, bias, residual])
    pair = [testing.make_input((2, 32, 5, 6), seed=i) for i in range(2)]
    grouped = draw(32, 8, 3, 3)
    y = ext.conv3x3_cuda(pair, grouped, None, None, 8, False, True, False)
    testing.assert_close_to_reference(y, exact, [pair, grouped, None, None, 8, False, True])
    expect_error(
        "two maps of as many channels",
        ext.conv3x3_cuda,
        pair[:1],
        grouped,
        None,
        None,
        4,
        False,
        True,
        False,
    )
    expect_error(
        "weight must be [32, 64, 3, 3]",
        ext.conv3x3_cuda,
        pair,
        grouped,
        None,
        None,
        1,
        False,
        False,
        False,
    )


def check_emha() -> None:
    heads, d, length = 2, 18, 17

    def exact(qkv):
        return reference.emha(qkv, heads, length)

    whole = draw(2, 40, 3 * heads * d + 7).mul_(20)
    views = {
        "contiguous": whole[..., : 3 * heads * d].contiguous(),
        "rows apart": whole[..., 3 : 3 + 3 * heads * d],
        "every other value": whole.repeat_interleave(2, dim=2)[..., : 6 * heads * d : 2],
        "tokens turned": whole[..., : 3 * heads * d].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for qkv in views.values():
        for dtype in (torch.float32, torch.float16):
            given = qkv.to(dtype)
            out, lse = ext.emha_cuda(given, heads, length, False)
            assert out.is_contiguous()
            testing.assert_close_to_reference(out, exact, [given])
            grad = draw(40, 2, heads * d, seed=1).to(dtype).transpose(0, 1)
            back = ext.emha_backward_cuda(grad, given, out, lse, heads, length, False)
            assert back.is_contiguous()
            expected = testing.gradients(exact, grad)
            testing.assert_close_to_reference((back,), expected, [given])
    expect_error("3 * heads * D", ext.emha_cuda, given, 5, length, False)
    expect_error("at most 64 values a head", ext.emha_cuda, given.repeat(1, 1, 8), 2, 4, False)
    expect_error("length=0 and the 40 tokens", ext.emha_cuda, given, heads, 0, False)
    expect_error(
        "grad_out must have the dtype",
        ext.emha_backward_cuda,
        grad.float(),
        given,
        out,
        lse,
        heads,
        length,
        False,
    )


def check_gradients(grads: tuple, exact: Callable, grad: Tensor, args: list[Tensor]) -> None:
    """Also that they have the dtypes of their arguments and NHWC memory or none between values."""
    assert is_nhwc(grads[0])
    assert all(g.is_contiguous() for g in grads[1:])
    assert [g.dtype for g in grads] == [a.dtype for a in args]
    args = [args[0], *(a.contiguous() for a in args[1:])]
    testing.assert_close_to_reference(grads, testing.gradients(exact, grad), args)


def check_tokens() -> None:
    c, width, hidden = 5, 10, 7
    gamma, beta = 1 + draw(9 * c).mul_(0.2), draw(9 * c, seed=1)
    reduce, qkv = draw(width, 9 * c, seed=2), draw(3 * width, width, seed=3)
    proj, offset = draw(9 * c, width, seed=4), draw(9 * c, seed=5)
    fc1, offset1 = draw(hidden, 9 * c, seed=6), draw(hidden, seed=7)
    fc2 = draw(9 * c, hidden, seed=8)
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.float16):
            x = testing.make_input((2, c, 3, 4), dtype, layout=layout)
            out = ext.token_qkv_cuda(x, gamma, beta, reduce, qkv, 1e-5, False)
            args = [x, gamma, beta, reduce, qkv]
            testing.assert_close_to_reference(out, reference.token_qkv, args)
            grad = draw(12, 2, 3 * width, seed=10).to(dtype).transpose(0, 1)
            grads = ext.token_qkv_backward_cuda(grad, *args, 1e-5, False)
            check_gradients(grads, reference.token_qkv, grad, args)
            a = draw(12, 2, 2 * width, seed=9).to(dtype).transpose(0, 1)[..., ::2]
            args = [x, a, proj, offset, gamma, beta, fc1, offset1]
            h = ext.token_hidden_cuda(*args, 1e-5, False)
            testing.assert_close_to_reference(h, reference.token_hidden, args)
            grad = draw(2, 12, hidden, seed=11).to(dtype)
            grads = ext.token_hidden_backward_cuda(grad, x, a, h, *args[2:], 1e-5, False)
            check_gradients(grads, reference.token_hidden, grad, args)
            args = [x, a, h, proj, offset, fc2, offset]
            for mean in (False, True):
                y = ext.token_fold_cuda(*args, mean, False)
                assert is_nhwc(y)
                exact = functools.partial(reference.token_fold, mean=mean)
                testing.assert_close_to_reference(y, exact, args)
                grad = testing.make_input(x.shape, dtype, layout=layout, seed=12)
                grads = ext.token_fold_backward_cuda(grad, *args[1:], mean, False)
                check_gradients(grads, exact, grad, args)
    # weights that are not contiguous and of two dtypes
    odd = [gamma.half(), beta, reduce.T.contiguous().T, qkv.half()]
    grad = draw(2, 12, 3 * width).to(dtype)
    grads = ext.token_qkv_backward_cuda(grad, x, *odd, 1e-5, False)
    check_gradients(grads, reference.token_qkv, grad, [x, *odd])
    wrong = grad[..., 1:]
    expect_error("grad must have 30", ext.token_qkv_backward_cuda, wrong, x, *odd, 1e-5, False)
    expect_error("gamma must have 45", ext.token_qkv_cuda, x, fc1, *args[1:4], 1e-5, False)
    wide = x.repeat(1, 20, 1, 1)
    norm = torch.ones(900, dtype=dtype)
    matrices = torch.ones(9, 900, dtype=dtype), torch.ones(9, 9, dtype=dtype)
    for op, given in ((ext.token_qkv_cuda, ()), (ext.token_qkv_backward_cuda, (grad[..., :9],))):
        expect_error(
            "do not fit into shared memory",
            op,
            *given,
            wide,
            norm,
            norm,
            *matrices,
            1e-5,
            False,
        )
    expect_error(
        "a must be [N, H W, width]",
        ext.token_fold_cuda,
        x,
        a[:1],
        h,
        proj,
        offset,
        fc2,
        offset,
        True,
        False,
    )


CHECKS = (
    check_gcrb,
    check_gcrb_chain,
    check_gcrb_train,
    check_acrb,
    check_conv3x3,
    check_emha,
    check_tokens,
)

if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    with testing.poison_empty():
        for check in CHECKS:
            check()
