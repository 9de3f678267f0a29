"""Attention forward over the number of tokens: plain scores, SDPA, SDPA padded, every backend.

Two series: four segments, as in the paper, and segments of 576 tokens. Sizes that would take longer
than `--cap` are modelled from smaller ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.model import Point
from bench.harness.session import Call, Session, Subject
from bench.harness.work import Work, largest_error
from efrdn_fast import dispatch, ops_attention, reference
from efrdn_fast.cases_attention import EmhaCase, attention_rows

__all__ = ["BASELINE", "SIZES", "bench_emha", "cases_of", "names", "work"]

BASELINE = "sdpa"
SIZES = ((64, 64), (96, 96), (160, 90), (320, 180), (480, 270), (960, 540))
"""Width, height of LR images."""
TRAINING = EmhaCase(16, 2304, 576)


def cases_of(full: bool) -> list[EmhaCase]:
    """Quick: one segment of 3,600 tokens. Full: both series and a batch of training patches."""
    if not full:
        return [EmhaCase(1, 3600, 3600)]
    tokens = [width * height for width, height in SIZES]
    fixed = [EmhaCase(1, count, (count + 3) // 4) for count in tokens]
    return [
        EmhaCase(1, 3600, 3600),
        *fixed,
        *(EmhaCase(1, count, 576) for count in tokens),
        TRAINING,
    ]


def names(device: torch.device, full: bool) -> list[str]:
    """Variants that can run on a device."""
    usable = [
        impl.backend
        for impl in dispatch.implementations("emha")
        if impl.backend != "reference" and impl.why_not(device) is None
    ]
    return ["eager", "sdpa", "padded", *(["compile"] if full else []), *usable]


def padded(qkv: Tensor, heads: int, length: int) -> Tensor:
    """SDPA of heads padded to 32 columns, as CUDA's flash kernels need it for half precision."""
    out = []
    for segment in qkv.split(length, dim=1):
        q, k, v = reference.split_heads(segment, heads)
        dim = q.shape[-1]
        wide = [F.pad(t, (0, -dim % 32)) for t in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*wide, scale=dim**-0.5)[..., :dim])
    return reference.join_heads(out)


def makers(args: tuple, device: torch.device, full: bool) -> dict[str, Callable[[], Call]]:
    qkv, heads, length, tf32 = args
    calls = {
        "eager": lambda: reference.emha(qkv, heads, length),
        "sdpa": lambda: reference.emha_sdpa(qkv, heads, length),
        "padded": lambda: padded(qkv, heads, length),
    }
    made = {name: lambda call=call: call for name, call in calls.items()}
    if full:

        def compiled() -> Call:
            function = torch.compile(reference.emha_sdpa, fullgraph=True)
            return lambda: function(qkv, heads, length)

        made["compile"] = compiled
    op = getattr(torch.ops, ops_attention.NAMESPACE).emha
    for name in names(device, full):
        if name not in made:
            made[name] = lambda name=name: lambda: op(qkv, heads, length, tf32, name)[0]
    return made


def work(case: EmhaCase, dtype: torch.dtype) -> Work:
    """Least work of a case: qkv in, result out."""
    whole, rest = divmod(case.tokens, case.length)
    exps = case.batch * case.heads * (whole * case.length**2 + rest**2)
    moved = 4 * case.batch * case.tokens * case.heads * case.dim * dtype.itemsize
    return Work(4 * case.dim * exps, exps, moved)


def subject(case: EmhaCase, dtype: torch.dtype, session: Session) -> Subject:
    args = case.args(dtype, session.device)
    qkv, heads, length, _ = args
    rows = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))[:64]

    @functools.cache
    def exact() -> tuple[Tensor, Tensor]:
        return tuple(attention_rows(qkv, heads, length, rows, d)[0] for d in (torch.float64, dtype))

    def check(name: str, out: Tensor) -> float:
        return largest_error(name, out[:, rows.to(out.device)], *exact())

    least = work(case, dtype)
    return Subject(
        "emha",
        str(case),
        makers(args, session.device, session.full),
        check,
        BASELINE,
        lambda name: str(dtype).removeprefix("torch."),
        lambda name: least,
        at=Point(case.batch * case.tokens, least.exps),
        series=f"{dtype}-{'576' if length == 576 else '4'}",
    )


def bench_emha(compare, harness, case, dtype, variant):
    compare(("emha", case, dtype), lambda: subject(case, dtype, harness), variant)
