"""Transformer block over the size of the image: eager, SDPA, SDPA padded, packed, every backend.

`packed` is what `EFRDNFast` runs; a backend's name means all four ops of the block on it. Series
and modelled sizes as in `bench_emha`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.bench_emha import BASELINE, SIZES, padded
from bench.harness.model import Point
from bench.harness.session import Call, Session, Subject
from bench.harness.work import Work
from efrdn_fast import dispatch, functional, packing, reference
from efrdn_fast.attention import PARTS
from efrdn_fast.testing import make_input
from efrdn_fast.transformer import TransformerBlock

__all__ = ["BASELINE", "BlockCase", "bench_transformer", "cases_of", "names", "work"]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from the baseline over its largest value; the tests hold tighter bounds."""


@dataclass(frozen=True)
class BlockCase:
    """LR size, length of segments (None: four of them), batch."""

    width: int
    height: int
    segment_tokens: int | None = None
    batch: int = 1

    op = "token_qkv"

    def __str__(self) -> str:
        segments = f"L{self.segment_tokens}" if self.segment_tokens else "4seg"
        return f"N{self.batch}-{self.width}x{self.height}-{segments}"


def cases_of(full: bool) -> list[BlockCase]:
    if not full:
        return [BlockCase(160, 90)]
    return [BlockCase(*size, length) for length in (None, 576) for size in SIZES]


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device; backends that have all ops of the block."""
    rows = [dispatch.implementations(op) for op in PARTS]
    usable = [
        impl.backend
        for impl in rows[0]
        if impl.backend != "reference"
        and impl.why_not(device) is None
        and all(impl.backend in {each.backend for each in row} for row in rows)
    ]
    return ["eager", "sdpa", "padded", *(["compile"] if full else []), "packed", *usable]


def work(case: BlockCase, dtype: torch.dtype) -> Work:
    """Least work of a case when the block is one kernel: features in and out, parameters."""
    with torch.device("meta"):
        block = TransformerBlock(segment_tokens=case.segment_tokens)
    tokens = case.width * case.height
    length = block.emha.segment_length(tokens)
    whole, rest = divmod(tokens, length)
    exps = case.batch * 8 * (whole * length**2 + rest**2)
    linear = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    elements = 2 * case.batch * 32 * tokens + sum(p.numel() for p in block.parameters())
    flops = 72 * exps + 2 * case.batch * tokens * linear
    return Work(flops, exps, elements * dtype.itemsize)


def subject(case: BlockCase, dtype: torch.dtype, session: Session) -> Subject:
    shape = case.batch, 32, case.height, case.width
    x = make_input(shape, dtype, session.device, "channels_last")

    def block(attention: Callable) -> TransformerBlock:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = TransformerBlock(segment_tokens=case.segment_tokens).eval()
        made.emha.attention = attention
        return made.to(session.device, dtype)

    plain = block(reference.emha_sdpa)

    def packed() -> Call:
        plan = dispatch.plan(packing.OPS, "auto", x)
        made = packing.PackedTransformer(block(reference.emha), packing.Target(dtype, plan))
        return lambda: made(x)

    def compiled() -> Call:
        made = torch.compile(plain, fullgraph=True)
        return lambda: made(x)

    def on(backend: str) -> Call:
        weights, length = list(plain.parameters()), case.segment_tokens
        return lambda: functional.transformer_block(
            x, *weights, segment_tokens=length, backend=backend
        )

    modules = {"eager": reference.emha, "sdpa": reference.emha_sdpa, "padded": padded}
    made = {
        name: lambda attention=attention: functools.partial(block(attention), x)
        for name, attention in modules.items()
    }
    made |= {"packed": packed} | ({"compile": compiled} if session.full else {})
    made |= {
        name: lambda name=name: on(name)
        for name in names(session.device, session.full)
        if name not in made
    }

    @functools.cache
    def expected() -> Tensor:
        with torch.inference_mode():
            return plain(x).double()

    def check(name: str, out: Tensor) -> float:
        error = (out.double() - expected()).abs().max().item()
        bound = TOLERANCES[dtype] * expected().abs().max().item()
        assert error <= bound, f"{name}: differs by {error:.2e}, allowed {bound:.2e}"
        return error

    least = work(case, dtype)
    return Subject(
        "transformer",
        str(case),
        made,
        check,
        BASELINE,
        lambda name: str(dtype).removeprefix("torch."),
        lambda name: least,
        at=Point(case.batch * case.width * case.height, least.exps),
        series=f"{dtype}-{case.segment_tokens or 4}",
    )


def bench_transformer(compare, harness, case, dtype, variant):
    compare(("transformer", case, dtype), lambda: subject(case, dtype, harness), variant)
