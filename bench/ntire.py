"""Protocol `ntire`: whole pictures one by one, batch 1, no warm-up, fp32 unless the rung says else.

    python -m bench.ntire RUNG [--device cpu|cuda] [--set FOLDER]

As the efficient super-resolution challenge measures (events around one forward pass of each
picture, the mean of all): the first call's build and every new shape are inside. A process of its
own for each rung; prints one JSON line. Pictures: the LR files of a set at scale 4, else noise of
the sizes of Set5.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from efrdn_fast import env
from efrdn_fast.device import resolve_device
from efrdn_fast.timing import Clock, peak_memory

from .bench_network import network
from .rungs import RUNGS

__all__ = ["SET5", "main", "pictures", "run"]

SET5 = ((128, 128), (72, 72), (64, 64), (70, 70), (57, 86))
"""Width, height of the LR images of Set5 at scale 4."""


def pictures(folder: Path | None) -> tuple[str, list[Tensor]]:
    """Where the pictures are from, and they themselves, `[1, 3, H, W]` in [0, 1]."""
    data = env.data_dir()
    if folder is None and data is not None and (data / "benchmark" / "Set5").is_dir():
        folder = data / "benchmark" / "Set5"
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        sizes = [(1, 3, height, width) for width, height in SET5]
        return "noise of the sizes of Set5", [torch.rand(s, generator=generator) for s in sizes]
    from efrdn_fast.benchmarks import ImageSet, find_pairs, load_pair

    pairs = find_pairs(ImageSet(folder.name, folder), 4)
    images = [np.ascontiguousarray(load_pair(pair, 4)[0]) for pair in pairs]
    return folder.name, [torch.from_numpy(i).permute(2, 0, 1)[None].float() / 255 for i in images]


def run(name: str, device: torch.device, images: list[Tensor]) -> tuple[list[float], int | None]:
    """Seconds of each picture in order, and peak memory; nothing is called before the first."""
    rung, net, clock = RUNGS[name], network(4, device), Clock(device)
    seconds = []

    def all_of_them() -> None:
        made = None if rung.fixed else rung.make(net, images[0])
        for image in images:
            x = image.to(device)
            seconds.append(clock.sample(lambda x=x: (made or rung.make(net, x))(x)))

    with torch.inference_mode():
        peak = peak_memory(all_of_them, device)
    return seconds, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rung", choices=RUNGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", type=Path, help="folder of one benchmark set")
    args = parser.parse_args()
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    reason = RUNGS[args.rung].why_not(device)
    if reason:
        print(f"{args.rung}: not run: {reason}", file=sys.stderr)
        return 1
    origin, images = pictures(args.set)
    seconds, peak = run(args.rung, device, images)
    print(json.dumps({"pictures": origin, "seconds": seconds, "peak": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
