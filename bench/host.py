"""Host time of one call of EFRDNFast without a CUDA graph: `python -m bench.host`.

At 3x3 pixels next to nothing is computed, so the time of a call is what Python, the dispatcher and
the ops' own overhead take; on a GPU it is what a CUDA graph saves. Both networks in turns, and the
ops of a packed call, views apart: views launch nothing.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efrdn_fast import EFRDN, accelerate, timing
from efrdn_fast.fast import EFRDNFast

__all__ = ["packed_ops", "thread_seconds"]

TURNS = 20


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen["view" if func.is_view else str(func)] += 1
        return func(*args, **(kwargs or {}))


def packed_ops(net: EFRDNFast, x: torch.Tensor) -> Counter[str]:
    """Op -> calls of it in one packed forward, all views as "view"."""
    with torch.inference_mode():
        net(x)
        packed = next(iter(net._packed[1].values()))
        with _Ops() as ops:
            packed(x)
    return ops.seen


def thread_seconds(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU time of the calling thread per call, in turns: other programs' load is not in it."""
    seconds = {name: [] for name in calls}
    for turn in range(TURNS + 2):  # the first two warm up
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if turn > 1:
                seconds[name].append(time.thread_time() - start)
    return seconds


def main() -> None:
    """Print times and counts."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = EFRDN.from_pretrained("x4").to(device)
    fast, x = accelerate(net), torch.rand(1, 3, 3, 3, device=device)
    with torch.inference_mode():
        seconds = thread_seconds({"plain": lambda: net(x), "fast": lambda: fast(x)})
    for name, samples in seconds.items():
        low, middle, high = (1e3 * timing.quantile(samples, share) for share in (0.2, 0.5, 0.8))
        print(f"{name}: {middle:.2f} ms of CPU time (20 to 80 %: {low:.2f} to {high:.2f})")
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    print(f"fast/plain: {timing.paired_ratio(seconds['plain'], seconds['fast'])}; {device}, {load}")
    ops = packed_ops(fast, x)
    print(f"{ops.total() - ops['view']} ops, {ops['view']} views in a packed call")
    for name, count in ops.most_common(12):
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    main()
