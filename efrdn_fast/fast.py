"""EFRDNFast: EFRDN with the same arguments, keys and results, sooner.

A network in evaluation mode, called without gradients, runs on weights packed for inference (see
`packing`). They are derived at the first call for a device, compute dtype and choice of backends,
and again as soon as a parameter or running statistic has changed; they are never saved, copied or
pickled. Where gradients or the statistics of a batch are asked for, forward and backward run on
fused ops (see `fast_training`), as they do where the call is recorded: by `torch.compile`,
`torch.export`, or a dispatch mode such as the FLOP counter. `torch.jit.trace`, transforms of
`torch.func`, forward-mode derivatives and other classes of tensors take the forward of EFRDN.

With EFRDN_FAST_CUDA_GRAPHS=1 a shape that comes again on a GPU is replayed as a CUDA graph (see
`graphs`), unless the call is itself being captured. Off by default: no GPU has run it yet.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import attention, dispatch, env, graphs
from .blocks import BatchNorm
from .device import HALF, PRECISIONS, caller_checks, is_out_of_memory, precision
from .fast_training import train_forward
from .model import EFRDN, check_input
from .packing import Conv, PackedGConv, Target, pack_body, pack_transformer, plan_of

__all__ = ["EFRDNFast", "accelerate"]


class EFRDNFast(EFRDN):
    """Drop-in for `EFRDN`: constructor, state dict, training and results are the same.

    A change through `parameter.data` is the one that PyTorch does not count: `train()` or `eval()`
    after it makes the packed weights anew. Hooks of sub-modules run in the plain forward only. In
    training, and where the call is recorded, `dtype` says nothing: autocast does, as for EFRDN.

    Args:
        scale, channels, distilled, segments, segment_tokens, fold, module, ablation: As `EFRDN`.
        backend: "auto", "reference", "triton", "cuda" or "cpu"; one that is named serves the ops
            that it implements, or raises, and the reference serves the others. Default: "auto".
        dtype: "auto" (that of the weights, or of autocast), "fp32", "tf32", "fp16" or "bf16".
            Half precision keeps input, tails and output in the dtype of the weights; an image whose
            output is not finite is computed again in bf16, then in fp32, except while the caller
            captures a CUDA graph. `upscale` tries again by itself. Default: "auto".

    Raises:
        ValueError, TypeError: An argument is out of range; the message names it.
        torch.OutOfMemoryError: In a call; the message names the size and what to do.

    Example:
        >>> net = EFRDNFast.from_pretrained("x4")
        >>> with torch.inference_mode():
        ...     sr = net(torch.rand(1, 3, 48, 48))  # [1, 3, 192, 192]
    """

    _packed: tuple[tuple, dict] | None = None  # fingerprint of the weights, packed by target
    _overflowed = False  # whether the warning about it has been given

    def __init__(self, scale: int = 4, *, backend: str = "auto", dtype: str = "auto", **options):
        super().__init__(scale, **options)
        _check_choices(backend, dtype)
        self.backend, self.dtype = backend, dtype

    @classmethod
    def from_reference(cls, net: EFRDN, *, backend: str = "auto", dtype: str = "auto") -> EFRDNFast:
        """The fast form of `net`, on the same parameters and buffers: training one trains both."""
        if not isinstance(net, EFRDN):
            raise TypeError(f"EFRDNFast: expected an EFRDN, got {type(net).__name__}")
        _check_choices(backend, dtype)
        fast = _sharing(cls, net)
        fast.backend, fast.dtype = backend, dtype
        return fast

    def to_reference(self) -> EFRDN:
        """The plain form, on the same parameters and buffers."""
        return _sharing(EFRDN, self)

    @property
    def plan(self) -> dict[str, str] | None:
        """Op -> backend of the last packing; None before the first call, or since a change."""
        packed = self._packed
        return None if packed is None else dict(next(reversed(packed[1].values())).plan)

    def forward(self, x: Tensor) -> Tensor:
        """As `EFRDN.forward`: `[N, 3, H, W]` in [0, 1] -> `[N, 3, scale H, scale W]`.

        A uint8 image, 0 to 255, gives a uint8 image, rounded and clamped, without gradients. NaN
        in an image is no error: NaN comes out, in evaluation mode in that image alone.
        """
        if not isinstance(x, Tensor):
            check_input(x)  # raises
        if x.dtype == torch.uint8:
            return self._bytes(x)
        recorded = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if x.device.type == "meta" or (not recorded and _needs_plain(x)):
            return super().forward(x)
        check_input(x)
        self._check_fit(x)
        if recorded:  # what is packed would be a constant in the record
            return train_forward(self, x, self.backend)
        try:
            return self._forward(x)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error).strip().partition("\n")[0]
        # Raised here, where nothing holds on to the maps of the call any more.
        raise torch.OutOfMemoryError(
            f"EFRDNFast: out of memory for an input of {list(x.shape)} ({cause}); take smaller "
            "parts with upscale(tile=...), or shorter segments of attention with "
            "EFRDN(segment_tokens=...)"
        )

    @torch.no_grad()
    def _bytes(self, x: Tensor) -> Tensor:
        y = self.forward(x.to(self.head.weight.dtype) / 255)
        return (y.clamp(0, 1) * 255).round().to(torch.uint8)

    def _forward(self, x: Tensor) -> Tensor:
        weights, differentiable = _state(self)
        if not differentiable and torch.is_grad_enabled():
            replica = getattr(self, "_is_replica", False)
            differentiable = replica or any(t.requires_grad for t in (x, *weights))
        if differentiable:
            return train_forward(self, x, self.backend)
        name = self.dtype
        if name == "auto":
            autocast = torch.is_autocast_enabled(x.device.type)
            own = self.head.weight.dtype
            compute = torch.get_autocast_dtype(x.device.type) if autocast else own
            if compute not in HALF.values():
                return self._run(x, weights, compute)
            name = next(n for n, dtype in HALF.items() if dtype == compute)
        else:
            _warn_when_slow(name, x.device)
        first, *others = PRECISIONS[name]
        y = self._in_precision(first, x, weights)
        if graphs.capturing(x) or caller_checks():  # to look at it would break the capture
            return y
        return self._rescued(y, x, weights, name, others)

    def _rescued(
        self, y: Tensor, x: Tensor, weights: list[Tensor], name: str, others: Sequence[str]
    ) -> Tensor:
        """`y` with the images that are not finite computed anew in other precisions, in turn."""
        left = _not_finite(y).nonzero().flatten() if others else ()
        for other in others:
            if not len(left):
                break
            again = self._in_precision(other, x[left], weights)
            failed = _not_finite(again)
            y[left] = again
            if not self._overflowed and not failed.all():
                self._overflowed = True
                warnings.warn(f"EFRDNFast: {name} overflowed; the result was computed in {other}")
            left = left[failed]
        return y  # what is not finite in any precision is so because input or weights are

    def _in_precision(self, name: str, x: Tensor, weights: list[Tensor]) -> Tensor:
        # On a CPU there is nothing to switch, and what is switched is of the whole process.
        switch = precision(x.device, name) if x.is_cuda and name not in HALF else None
        compute = torch.promote_types(self.head.weight.dtype, torch.float32)
        with switch or contextlib.nullcontext():
            return self._run(x, weights, HALF.get(name, compute))

    def _check_fit(self, x: Tensor) -> None:
        weight = self.head.weight
        if x.device != weight.device:
            raise ValueError(
                f"EFRDNFast: the input is on {x.device}, the weights on {weight.device}; "
                "move one of them with .to()"
            )
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not autocast:
            raise TypeError(f"EFRDNFast: the input is {x.dtype}, the weights are {weight.dtype}")

    def _run(self, x: Tensor, weights: list[Tensor], compute: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            packed = self._pack(weights, x.device, compute)
            x = x.to(self.head.weight.dtype)
            key = _graph_key(self, x) if graphs.capturable(x) else None
            return packed(x) if key is None else packed.graphs.run(packed, x, key)

    def _pack(self, weights: list[Tensor], device: torch.device, compute: torch.dtype) -> _Packed:
        """The packed network for `compute`, made anew where the weights have changed."""
        backend = dispatch.requested(self.backend)
        key = device, compute, backend
        # Replicas of DataParallel live for one call; inference tensors do not count changes.
        lasting = not (
            getattr(self, "_is_replica", False) or any(w.is_inference() for w in weights)
        )
        fingerprint = tuple((w.data_ptr(), w._version) for w in weights) if lasting else ()
        packed = self._packed
        if lasting and packed and packed[0] == fingerprint and key in packed[1]:
            return packed[1][key]
        like = torch.empty(0, dtype=compute, device=device)
        plan = plan_of(self, backend, like)
        _watch_fused_steps()
        # Aliases keep the memory, so that no new weight can come to lie at an old address.
        net = _Packed(self, Target(compute, plan), [w.detach() for w in weights])
        if lasting:
            kept = packed[1] if packed and packed[0] == fingerprint else {}
            self._packed = fingerprint, {**kept, key: net}
        return net

    def train(self, mode: bool = True) -> EFRDNFast:
        self._packed = None
        return super().train(mode)

    def extra_repr(self) -> str:
        plan = self.plan
        shown = "at the first call" if plan is None else plan
        return (
            f"{super().extra_repr()}, backend={self.backend!r}, dtype={self.dtype!r}, plan={shown}"
        )

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}


class _Packed:
    """The network for one device, compute dtype and plan of backends."""

    def __init__(self, net: EFRDN, to: Target, sources: list[Tensor]):
        self.plan, self.dtype, self.sources = to.plan, to.dtype, sources
        self.graphs = graphs.GraphCache()
        ends = Target(net.head.weight.dtype, to.plan)
        count = len(net.acdm)
        self.head = Conv(net.head, ends)
        self.body = [
            (pack_body(net.acdm[i % count], i // count, to), PackedGConv(gconv, to))
            for i, gconv in enumerate(net.gconv)
        ]
        self.trans = [
            (pack_transformer(trans, to), Conv(tconv, to))
            for trans, tconv in zip(net.trans, net.tconv, strict=True)
        ]
        deep = net.reconstruct_deep
        self.deep = Conv(deep.conv1, ends), Conv(deep.conv2, ends)
        self.shallow = Conv(net.reconstruct_shallow.conv, ends)
        self.scale = net.scale
        self.cnn_dense, self.transformer_dense = net.cnn_dense, net.transformer_dense

    def __call__(self, x: Tensor) -> Tensor:
        """Eqs. 1-9; sums over several blocks are kept in the dtype of the ends."""
        shallow = self.head(x.contiguous(memory_format=torch.channels_last))
        features = shallow.to(self.dtype)
        total = shallow
        for body, gconv in self.body:
            y = body(features)
            features = gconv((y + total).to(self.dtype) if self.cnn_dense else y)
            total = total + features
        c_out = total if self.cnn_dense else features + shallow
        t_out1 = self._transform(0, c_out)
        t_out2 = self._transform(1, t_out1 + c_out if self.transformer_dense else t_out1)
        y = t_out2 + shallow
        if self.transformer_dense:
            y = y + t_out1 + c_out
        first, second = self.deep
        y = second(first(y)).add_(self.shallow(shallow))
        return F.pixel_shuffle(y, self.scale).contiguous()

    def _transform(self, which: int, x: Tensor) -> Tensor:
        trans, tconv = self.trans[which]
        return tconv(trans(x.to(self.dtype)))


def accelerate(net: EFRDN, *, backend: str = "auto", dtype: str = "auto") -> EFRDNFast:
    """`EFRDNFast.from_reference`: the fast form of `net`, sharing its parameters.

    Raises:
        TypeError: `net` is no EFRDN.
        ValueError: No such backend or dtype.

    Example:
        >>> net = accelerate(EFRDN.from_pretrained("x4"))
    """
    return EFRDNFast.from_reference(net, backend=backend, dtype=dtype)


def _sharing(cls: type[EFRDN], net: EFRDN) -> EFRDN:
    """A `cls` that has the parameters, buffers and parts of `net`."""
    other = cls.__new__(cls)
    nn.Module.__init__(other)
    for key, value in net.__dict__.items():
        if key not in ("_packed", "_overflowed", "backend", "dtype"):
            other.__dict__[key] = value.copy() if isinstance(value, (dict, set)) else value
    return other


def _needs_plain(x: Tensor) -> bool:
    """What only the forward of EFRDN serves; an empty batch among it."""
    other = type(x) not in (Tensor, nn.Parameter) or 0 in x.shape[:1]
    forward_mode = forward_ad._current_level >= 0
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return other or forward_mode or transformed or torch.jit.is_tracing()


def _count_fused_step(optimizer: torch.optim.Optimizer, *call) -> None:
    """Fused optimizers write parameters without counting the change, by which weights are stale."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            changed = [p for p in group["params"] if p.grad is not None]
            torch.autograd.graph.increment_version(changed)


@functools.cache
def _watch_fused_steps() -> None:
    register_optimizer_step_post_hook(_count_fused_step)


def _not_finite(y: Tensor) -> Tensor:
    """Per image, by one reduction: a sum is finite only where all its terms are."""
    return ~y.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()


def _check_choices(backend: str, dtype: str) -> None:
    if dtype not in PRECISIONS:
        raise ValueError(f"EFRDNFast: dtype must be one of {', '.join(PRECISIONS)}; got {dtype!r}")
    if backend != "auto" and backend not in env.BACKENDS:
        table = {row.backend: row.reason for row in dispatch.backends()}
        names = ", ".join(f"{n} (not here: {why})" if why else n for n, why in table.items())
        raise ValueError(f"EFRDNFast: backend must be one of auto, {names}; got {backend!r}")


def _graph_key(net: EFRDN, x: Tensor) -> tuple | None:
    """What a graph of the packed forward freezes besides the weights; None: run without one.

    Parts that run as modules and an attention set by the user may do what a replay would not.
    """
    blocks, config = [trans.emha for trans in net.trans], net.config
    plain = all(attention.is_plain(b.attention) for b in blocks)
    if not plain or (config.module, config.ablation) != ("acdm", "full"):
        return None
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    return (
        *(b.segment_length(x.shape[2] * x.shape[3]) for b in blocks),
        *(matmul.fp32_precision, conv.fp32_precision),
        torch.are_deterministic_algorithms_enabled(),
    )


def _state(net: nn.Module) -> tuple[list[Tensor], bool]:
    """All parameters and buffers, and whether a BatchNorm is in training mode."""
    weights, left, training = [], [net], False
    while left:
        module = left.pop()
        training |= module.training and isinstance(module, BatchNorm)
        for tensors in (module._parameters, module._buffers):
            weights += [t for t in tensors.values() if t is not None]
        left += [m for m in module._modules.values() if m is not None]
    return weights, training


_slow: set[str] = set()


def _warn_when_slow(dtype: str, device: torch.device) -> None:
    """Once per dtype: half precision on a CPU that has no instructions for it."""
    if device.type != "cpu" or dtype not in HALF or dtype in _slow:
        return
    able = torch.cpu.get_capabilities()
    needs = {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
    if not any(able.get(name) for name in needs[dtype]):
        _slow.add(dtype)
        warnings.warn(f"EFRDNFast: this CPU computes {dtype} slower than fp32; use dtype='fp32'")
