"""Launch configs of the Triton kernels, and the fastest backend of every op, on this GPU.

    python -m bench.tune                    all ops; at most 20 minutes
    python -m bench.tune --ops gcrb conv3x3 --minutes 5
    python -m bench.tune --backends         only which backend wins

Writes `<device>.json` and the device's entry of `backends.json` in `kernels/configs` (`--folder`:
elsewhere).
One value of a config is changed at a time and kept where it gains 2 % in turn-by-turn timing; what
is found is written where it beats the heuristic config by as much. A config counts only if its
result agrees with the heuristic one's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from efrdn_fast.kernels import _configs
from torch.utils._pytree import tree_leaves
from triton.errors import TritonError

from efrdn_fast import cases, cases_fusion, dispatch, ops
from efrdn_fast.timing import Clock, measure, paired_ratio

__all__ = ["SPACE", "changes", "descend", "main"]

GAIN = 1.02
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "gcrb": {"PX": (2, 1, 4), "Q": (16, 8, 32, 64), "rows": (16, 4, 8, 32), "num_warps": (4, 1, 2)},
    "conv3x3": {
        "PX": (1, 2, 4),
        "Q": (32, 16, 64),
        "NB": (16, 32),
        "rows": (16, 4, 8, 32),
        "num_warps": (4, 2, 8),
        "num_stages": (1, 2),
    },
    "gcrb_chain": {"HEIGHT": (16, 8, 32), "WIDTH": (16, 32, 64), "num_warps": (8, 4, 16)},
    "gcrb_train": {"PX": (1, 2), "Q": (32, 16, 64), "programs": (3, 2, 4, 6), "num_warps": (4, 2)},
    "sigmoid_gate": {"P": (64, 32, 128), "programs": (2,), "num_warps": (4, 2, 8)},
    "calibrate": {"P": (64, 32, 128), "programs": (2, 1, 4), "num_warps": (4, 2, 8)},
    "merge3x3": {"P": (64, 32, 128), "programs": (2,), "num_warps": (4, 2, 8)},
}
"""Op -> the values that each key of its config may take; the search starts at the first ones."""
CASES = {
    "gcrb": cases.GCRB_BENCH,
    "conv3x3": cases.CONV3X3_BENCH + cases.ACRB_BENCH,
    "gcrb_chain": tuple(cases.GcrbChainCase(case.shape) for case in cases.GCRB_BENCH),
    "gcrb_train": tuple(cases.GcrbTrainCase(case.shape) for case in cases.GCRB_BENCH),
    "sigmoid_gate": tuple(cases_fusion.SigmoidGateCase(case.shape) for case in cases.GCRB_BENCH),
    "calibrate": tuple(cases_fusion.CalibrateCase(case.shape) for case in cases.GCRB_BENCH),
    "merge3x3": tuple(cases_fusion.Merge3x3Case(case.shape) for case in cases.GCRB_BENCH),
}


def changes(config: dict[str, int], space: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """The configs that differ from `config` in one value."""
    for key, values in space.items():
        for value in values:
            if key in config and config[key] != value:
                yield {**config, key: value}


def descend(
    start: dict[str, int],
    space: dict[str, tuple[int, ...]],
    gain: Callable[[dict[str, int], dict[str, int]], float],
    out_of_time: Callable[[], bool],
) -> dict[str, int]:
    """Coordinate descent; `gain(best, other)`: how many times faster `other` is, 0 if unusable."""
    best, seen = start, [start]
    improved = True
    while improved:
        improved = False
        for config in list(changes(best, space)):
            if out_of_time():
                return best
            if config in seen:
                continue
            seen.append(config)
            if gain(best, config) >= GAIN:
                best, improved = config, True
                break
    return best


def _tune(
    op: str, case: Any, dtype: torch.dtype, clock: Clock, deadline: float, folder: Path
) -> None:
    launch = getattr(getattr(torch.ops, ops.NAMESPACE), case.op)
    args = case.args(dtype, clock.device)
    expected = launch(*args, "triton")

    def call(config: dict[str, int] | None) -> Any:
        with _configs.trial(op, config):
            return launch(*args, "triton")

    with _configs.trial(op, None) as asked:
        launch(*args, "triton")

    def gain(best: dict[str, int] | None, other: dict[str, int]) -> float:
        try:
            out = call(other)
        except TritonError as error:
            print(f"  {other}: {str(error).splitlines()[0]}")
            return 0.0
        for a, b in zip(tree_leaves(out), tree_leaves(expected), strict=True):
            if not torch.allclose(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item()):
                print(f"  {other}: another result")
                return 0.0
        samples = measure(
            {"best": lambda: call(best), "other": lambda: call(other)}, clock, seconds=0.5
        )
        return paired_ratio(samples["best"], samples["other"]).median

    start = {key: values[0] for key, values in SPACE[op].items()}
    if op == "gcrb":
        start |= {"MMA": int(dtype != torch.float32), "num_stages": 1}
    best = descend(start, SPACE[op], gain, lambda: time.monotonic() > deadline)
    (variant, pixels), *_ = asked
    times = gain(None, best)
    print(f"{op} {case} {variant}: {best}, {times:.2f} times the speed of the heuristic config")
    if times >= GAIN:
        path = folder / _configs.file_name(torch.cuda.get_device_name(clock.device))
        _merge(path, {op: {variant: {str(pixels): best}}})


def _merge(path: Path, entries: dict[str, Any]) -> None:
    """Write a JSON file with the entries added to what it holds."""

    def join(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return old | {key: join(old.get(key), value) for key, value in new.items()}

    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(join(old, entries), indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _winner(op: str, clock: Clock) -> str | None:
    """Backend with the least geometric mean of times over the cases, in float32."""
    backends = [
        impl.backend for impl in dispatch.implementations(op) if impl.why_not(clock.device) is None
    ]
    logs = dict.fromkeys(backends, 0.0)
    for case in CASES[op]:
        launch = getattr(getattr(torch.ops, ops.NAMESPACE), case.op)
        args = case.args(torch.float32, clock.device)
        calls = {name: functools.partial(launch, *args, name) for name in backends}
        for name, samples in measure(calls, clock, seconds=1.0).items():
            logs[name] += math.log(sorted(samples)[len(samples) // 2])
    return min(logs, key=logs.__getitem__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=sorted(SPACE), default=list(SPACE))
    parser.add_argument("--minutes", type=float, default=20.0, help="time in all (default: 20)")
    parser.add_argument("--backends", action="store_true", help="only which backend wins")
    parser.add_argument("--folder", type=Path, default=_configs.FOLDER, help="where to write")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if not torch.cuda.is_available():
        print("bench.tune: torch sees no CUDA device, there is nothing to tune; configs stay as is")
        return 1
    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    clock = Clock(device, "warm")
    if not args.backends:
        for op in args.ops:
            for dtype in DTYPES:
                for case in CASES[op]:
                    if time.monotonic() < deadline:
                        _tune(op, case, dtype, clock, deadline, args.folder)
    winners = {op: _winner(op, clock) for op in args.ops}
    _merge(args.folder / "backends.json", {torch.cuda.get_device_name(device): winners})
    print(f"fastest backends: {winners}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
