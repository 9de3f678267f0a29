"""What tests and benches share: inputs in every layout, the tolerance rule, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "LAYOUTS",
    "TOLERANCES",
    "assert_close_to_reference",
    "assert_within",
    "case_id",
    "check_backward",
    "check_forward",
    "gradients",
    "make_input",
    "poison_empty",
]

LAYOUTS = ("contiguous", "channels_last", "sliced")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Absolute part of the tolerance by dtype, in units of max |reference|."""
TF32_TOLERANCE = 2e-3


def make_input(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> Tensor:
    """Standard normal values; the same values in every layout and on every device.

    Args:
        shape: `[N, C, H, W]`, or any shape where the layout is "contiguous".
        layout: "contiguous" (NCHW memory), "channels_last" (NHWC memory) or "sliced" (channels
            3 to C + 2 of an NHWC map of C + 5, whose other channels are NaN).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"make_input: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    if layout == "contiguous":
        return values
    n, channels, height, width = shape
    before, after = (3, 2) if layout == "sliced" else (0, 0)
    whole = torch.full(
        (n, height, width, before + channels + after), torch.nan, dtype=dtype, device=device
    ).permute(0, 3, 1, 2)
    return whole[:, before : before + channels].copy_(values)


def gradients(function: Callable[..., Tensor | tuple], grad: Tensor) -> Callable[..., tuple]:
    """Function of the same arguments that returns d<function, grad> / d argument.

    One gradient for each floating tensor argument, in order, also inside lists; of several outputs
    the first counts.
    """

    def backward(*args: Any) -> tuple:
        args = tree_map(lambda a: a.detach().requires_grad_() if _floating(a) else a, args)
        with torch.enable_grad():
            out = function(*args)
        out = out if isinstance(out, Tensor) else out[0]
        leaves = [a for a in tree_leaves(args) if _floating(a)]
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    return backward


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return tree_map(lambda a: a.detach().to(dtype) if _floating(a) else a, list(args))


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def assert_within(
    out: Tensor, exact: Tensor, plain: Tensor, tolerance: float, name: str = "output"
) -> float:
    """Assert `max |out - exact| <= 2 max |plain - exact| + tolerance max |exact|`.

    Args:
        out: Result to judge.
        exact: Float64 truth.
        plain: What plain PyTorch gives in the dtype of `out`.

    Returns:
        The largest absolute error.

    Raises:
        AssertionError: Wrong shape, a value that is not finite, or the bound is exceeded.
    """
    if out.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(out.shape)}, expected {list(exact.shape)}")
    if not out.isfinite().all():
        bad = int((~out.isfinite()).sum())
        raise AssertionError(f"{name}: {bad} of {out.numel()} values are NaN or infinite")
    error = (out.double() - exact).abs().max().item()
    base = (plain.double() - exact).abs().max().item()
    bound = 2 * base + tolerance * exact.abs().max().item()
    if error > bound:
        raise AssertionError(
            f"{name}: max error {error:.3e} above {bound:.3e} "
            f"(plain PyTorch {base:.3e}, max |reference| {exact.abs().max().item():.3e})"
        )
    return error


def assert_close_to_reference(
    out: Tensor | Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    args: Sequence[Any],
    *,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> list[float]:
    """Assert that `out` is as near to `reference(*args)` in float64 as plain PyTorch, within 2x.

    Args:
        out: One tensor, or one for each output of `reference`.
        reference: Plain PyTorch function; it is run in float64 and in `dtype`.
        args: Its arguments; floating tensors (also inside lists) are cast.
        dtype: Compute dtype to compare with. Default: that of the first tensor of `args`.
        tf32: Allow what TF32 costs; the baseline then runs with TF32 on. Default: False.

    Returns:
        The largest absolute error of each output.
    """
    if dtype is None:
        dtype = next(a.dtype for a in tree_leaves(args) if _floating(a))
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCES[dtype]
    with torch.no_grad(), _tf32(False):
        exact = reference(*_cast(args, torch.float64))
    with torch.no_grad(), _tf32(tf32):
        plain = reference(*_cast(args, dtype))
    if isinstance(out, Tensor):
        return [assert_within(out.detach(), exact, plain, tolerance)]
    assert len(out) == len(exact), f"{len(out)} outputs, expected {len(exact)}"
    return [
        assert_within(o.detach(), e, p, tolerance, f"output {i}")
        for i, (o, e, p) in enumerate(zip(out, exact, plain, strict=True))
    ]


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Inside, memory from `torch.empty*` and from `at::empty` in C++ is filled with NaN.

    PyTorch fills it itself in deterministic mode, so that kernels in C++ are covered too.
    """
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def case_id(value: Any) -> str:
    """Readable pytest id of a case, a dtype or a string."""
    return str(value).removeprefix("torch.")


def check_forward(case: Any, dtype: torch.dtype, device: str, backend: str) -> list[float]:
    """Run `case` (see `efrdn_fast.cases`) on a backend, compare with the reference; the errors."""
    args = case.args(dtype, device)
    out = _op(case)(*args, backend)
    first = out if isinstance(out, Tensor) else out[0]
    assert first.dtype == dtype, f"dtype {first.dtype}, expected {dtype}"
    if first.ndim == 4:
        _, c, h, w = first.shape
        assert first.stride() == (c * h * w, 1, w * c, c), f"strides {first.stride()} are not NHWC"
    else:
        assert first.is_contiguous(), f"strides {first.stride()} are not contiguous"
    return assert_close_to_reference(out, case.reference, args)


def check_backward(
    case: Any, dtype: torch.dtype, device: str, backend: str, *, expanded: bool = False
) -> list[float]:
    """Every gradient of `case` on a backend against autograd through the reference.

    Args:
        expanded: The incoming gradient is one value with strides 0, as `y.sum()` hands it back.
    """
    args = tree_map(lambda a: a.requires_grad_() if _floating(a) else a, case.args(dtype, device))
    out = _op(case)(*args, backend)
    out = out if isinstance(out, Tensor) else out[0]
    if expanded:
        grad = torch.ones((), dtype=dtype, device=device).expand(out.shape)
    else:
        grad = make_input(out.shape, dtype, device, "contiguous", seed=7)
    leaves = [a for a in tree_leaves(args) if _floating(a)]
    grads = torch.autograd.grad(out, leaves, grad)
    for leaf, each in zip(leaves, grads, strict=True):
        assert each.dtype == leaf.dtype, f"gradient is {each.dtype}, its tensor {leaf.dtype}"
    return assert_close_to_reference(grads, gradients(case.reference, grad), args)


def _op(case: Any) -> Any:
    from . import ops

    if hasattr(case, "call"):
        return case.call
    return getattr(getattr(torch.ops, ops.NAMESPACE), case.op)
