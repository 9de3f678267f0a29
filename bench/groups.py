"""The network as groups of blocks: the least work of each and, measured, its time.

Least work: floating-point operations, exponentials, and the bytes that the blocks move when each of
them is one kernel (`efrdn_fast.counts`). Times are exclusive: they add up to that of the network.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efrdn_fast import functional, packing
from efrdn_fast.counts import Cost
from efrdn_fast.fast import EFRDNFast

__all__ = ["GROUPS", "REST", "Group", "block_times", "floor_of", "groups"]

REST = "other convolutions"
GROUPS = {
    "GCRB": ("GCRB", "PackedGCRB"),
    "ACRB": ("ACRB",),
    "ESA": ("ESA", "PackedESA"),
    "CC": ("CC", "PackedCC"),
    "self-calibrated": ("SCSA", "SCCA", "PackedSC"),
    "GConv": ("GConv", "PackedGConv"),
    "attention": ("EMHA",),
    "tokens": ("TransformerBlock", "PackedTransformer"),
    REST: ("Conv2d", "Conv", "Merge"),
}
"""Group -> classes of its blocks, plain and packed. "tokens": a transformer block but attention."""
BETWEEN = "between blocks"  # sums, concatenations, what no block claims
OPS = {"acrb_out": "ACRB", "acrb": "ACRB", "emha": "attention"}
"""Ops of `functional` that the packed network calls outside of a block of their own."""


def floor_of(flops: int, exps: int, moved: int, ceilings: Mapping[str, float]) -> tuple[float, str]:
    """Seconds that work takes at least, `moved` in bytes, and which rate binds."""
    terms = {
        "copy": moved / ceilings["copy"],
        "matmul": flops / ceilings["matmul"],
        "exp": exps / ceilings["exp"],
    }
    bound = max(terms, key=lambda key: terms[key])
    return terms[bound], bound


@dataclass
class Group:
    """Least work of the blocks of one group."""

    name: str
    calls: int = 0
    flops: int = 0
    exps: int = 0
    elements: int = 0
    """Read and written."""

    def floor(self, ceilings: Mapping[str, float], element: int = 4) -> tuple[float, str]:
        """Seconds that a device needs at least, and which of its rates binds.

        Args:
            ceilings: Per second: "copy" (bytes), "matmul" (operations), "exp".
            element: Bytes of an element.
        """
        return floor_of(self.flops, self.exps, self.elements * element, ceilings)


def groups(cost: Cost) -> list[Group]:
    """The groups of a network; together they hold all its multiply-adds and exponentials."""
    found = {name: Group(name) for name in GROUPS}

    def add(name: str, calls: int, macs: int, exps: int, elements: int) -> None:
        group = found[name]
        group.calls += calls
        group.flops += 2 * macs
        group.exps += exps
        group.elements += elements

    def walk(part: Cost) -> None:
        name = _NAMES.get(part.kind)
        if name == "tokens":
            (attention,) = (inner for inner in part.parts if inner.kind == "EMHA")
            macs, moved = part.conv + part.linear, part.moved - attention.moved
            add("tokens", part.calls, macs, 0, moved)
            add("attention", part.calls, part.attention, part.exps, attention.moved)
        elif name:
            add(name, part.calls, part.total, part.exps, part.moved)
        for inner in () if name else part.parts:
            walk(inner)

    walk(cost)
    return [group for group in found.values() if group.calls]


_NAMES = {kind: name for name, kinds in GROUPS.items() for kind in kinds}


class _Stopwatch:
    """Exclusive seconds of nested sections."""

    def __init__(self, device: torch.device):
        self.device, self.stack = device, [BETWEEN]
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _switch(self) -> None:
        now = self._now()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, name: str) -> None:
        self._switch()
        # A convolution inside of a block is the block's.
        inside = name == REST and self.stack[-1] != BETWEEN
        self.stack.append(self.stack[-1] if inside else name)

    def leave(self) -> None:
        self._switch()
        self.stack.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed


def block_times(net: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of each group in one forward pass of an `EFRDN` or `EFRDNFast`; they add up to it.

    On CUDA the device is synchronized around every block, which shows launches as time.
    """
    watch = _Stopwatch(x.device)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for target, attribute, name in _sections(net):
            stack.enter_context(_patched(target, attribute, name, watch))
        watch.last = watch._now()
        net(x)
        watch._switch()
    return dict(watch.seconds)


def _sections(net: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """(object, attribute, group) of all that is timed: modules, packed classes, ops."""
    # A fast network runs packed classes and ops; another attention in a module would change it.
    for module in () if isinstance(net, EFRDNFast) else net.modules():
        name = _NAMES.get(type(module).__name__)
        if name == "attention":
            yield module, "attention", name
        elif name:
            yield module, "forward", name
    for kind, name in _NAMES.items():
        if hasattr(packing, kind) and "__call__" in vars(getattr(packing, kind)):
            yield getattr(packing, kind), "__call__", name
    for op, name in OPS.items():
        if hasattr(functional, op):
            yield functional, op, name


@contextlib.contextmanager
def _patched(target: Any, attribute: str, name: str, watch: _Stopwatch) -> Iterator[None]:
    before = vars(target).get(attribute)
    setattr(target, attribute, watch.around(name, getattr(target, attribute)))
    try:
        yield
    finally:
        if before is None:
            delattr(target, attribute)
        else:
            setattr(target, attribute, before)
