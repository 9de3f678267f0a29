"""The benches without pytest: same cases, checks, timing and results.

    python -m bench.plain gcrb network --device cuda [--full] [--match x4-64x64-b1 ...] [--list]

A line for each variant as soon as its case is done, the tables at the end. Exit status: 0, or 1
where a result was wrong or a variant failed, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from efrdn_fast.device import resolve_device

from .harness import collect, provenance, summary
from .harness.session import ERRORS, Session, Subject

__all__ = ["main", "names"]

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Benches there are: "gcrb" for `bench/bench_gcrb.py`."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def _todo(
    module: ModuleType, session: Session, match: Sequence[str]
) -> Iterator[tuple[Any, Any, str, str | None]]:
    """Case, dtype, variant, and the reason why it does not run."""
    has_dtype = "dtype" in inspect.signature(collect.function(module)).parameters
    for case in collect.cases(module, session.full):
        if match and not any(word in str(case) for word in match):
            continue
        for dtype in collect.dtypes(session.full) if has_dtype else [None]:
            for name, reason in collect.variants(module, session.device, session.full).items():
                if session.wants(name, collect.baseline(module)):
                    yield case, dtype, name, reason


def _run(module: ModuleType, session: Session, match: Sequence[str]) -> bool:
    """Whether no variant was wrong or failed."""
    good, function = True, collect.function(module)
    parameters = inspect.signature(function).parameters

    def compare(key: Any, subject: Callable[[], Subject], variant: str) -> None:
        session.outcome(key, subject, variant)

    def bench(op, case, dtype, variant, calls, args, work) -> None:
        base = collect.baseline(module)
        made = lambda: collect.kernel_subject(op, case, dtype, calls(), args, work, base)  # noqa: E731
        compare((op, case, dtype), made, variant)

    for case, dtype, variant, reason in _todo(module, session, match):
        label = " ".join(filter(None, (module.__name__, str(case), str(dtype or ""), variant)))
        if reason:
            print(f"{label}: not run: {reason}", flush=True)
            continue
        given = {
            **{"harness": session, "compare": compare, "bench": bench, "show": _show},
            **{"case": case, "dtype": dtype, "variant": variant},
        }
        before = len(session.rows)
        try:
            function(**{name: given[name] for name in parameters})
        except ERRORS as error:
            good = False
            print(f"{label}: failed: {error}", flush=True)
        for row in session.rows[before:]:
            good &= row["status"] not in ("wrong", "failed")
            print(_line(row), flush=True)
    return good


def _show(seconds: list[float], **extra: Any) -> None:
    """Here nobody draws pytest-benchmark's table."""


def _line(row: dict[str, Any]) -> str:
    ms = f"{row['p50_ms']:.4g} ms" if row.get("p50_ms") else ""
    ratio = f"{row['ratio']:.2f}x to {row['baseline']}" if row.get("ratio") else ""
    said = (row["case"], row["dtype"], row["variant"], row["mode"], row["status"], ms, ratio)
    return " ".join(filter(None, (row["op"], *said, row["note"])))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benches", nargs="+", choices=names(), metavar="BENCH")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--full", action="store_true", help="all sizes and dtypes, torch.compile")
    parser.add_argument("--match", nargs="+", default=[], help="only cases with one of these words")
    parser.add_argument("--variants", default="", help="comma-separated; the baseline always runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case (default: 4)")
    parser.add_argument("--cap", type=float, default=20.0, help="seconds per variant (default: 20)")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS)
    parser.add_argument("--list", action="store_true", help="say what would run, measure nothing")
    args = parser.parse_args(argv)
    device = torch.device("cuda") if args.list and args.device == "cuda" else None
    for name in ("seconds", "cap"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    try:
        device = device or resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    session = Session(
        device,
        full=args.full,
        seconds=args.seconds,
        cap=args.cap,
        results=None if args.list else args.results,
        only=filter(None, args.variants.split(",")),
    )
    modules = [importlib.import_module(f"bench.bench_{name}") for name in args.benches]
    known = {name for m in modules for name in collect.variants(m, device, True)}
    if session.only - known:
        parser.error(
            f"--variants: no bench here has {', '.join(sorted(session.only - known))}; "
            f"there are {', '.join(sorted(known))}"
        )
    cases = [str(case) for module in modules for case in collect.cases(module, args.full)]
    unknown = [word for word in args.match if not any(word in case for case in cases)]
    if unknown:
        parser.error(
            f"--match: no case {'' if args.full else 'without --full '}has {', '.join(unknown)}; "
            f"there are {', '.join(dict.fromkeys(cases))}"
        )
    if args.list:
        for module in modules:
            for case, dtype, variant, reason in _todo(module, session, args.match):
                print(module.__name__, case, dtype or "", variant, reason or "")
        return 0
    good = True
    for module in modules:
        good &= _run(module, session, args.match)
    if session.rows:
        print(*summary.lines(session), sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
