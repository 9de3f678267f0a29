"""`efrdn bench`: how fast the network is on this machine, plain and ours, in turns."""

from __future__ import annotations

import argparse

from . import _options

HELP = "time EFRDNFast against plain PyTorch on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import SCALES

    parser.add_argument("-s", "--scale", type=int, choices=SCALES, default=4, help="default: 4")
    parser.add_argument(
        "--size",
        type=_options.image_size,
        nargs="+",
        metavar="WxH",
        default=[(64, 64), (128, 128)],
        help="sizes of LR images. Default: 64x64 128x128",
    )
    parser.add_argument(
        "--seconds", type=_options.seconds, default=10.0, help="of turns for each size. Default: 10"
    )
    _options.add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..device import resolve_device
    from ..doctor import report
    from ..fast import EFRDNFast
    from ..model import EFRDN
    from ..reference import emha_sdpa
    from ..tables import render
    from ..timing import Clock, first_call, is_noisy, measure, paired_ratio, quantile

    device = resolve_device(args.device)
    facts = dict(report())
    shown = "gpu 0" if device.type == "cuda" else "cpu"
    print(f"{facts[shown]}; torch {facts['torch']}; efrdn_fast {facts['efrdn_fast']}", flush=True)
    torch.manual_seed(0)
    plain = EFRDN(args.scale).eval().to(device)
    fast = EFRDNFast.from_reference(plain, backend=args.backend, dtype=args.dtype)
    plain.set_attention(emha_sdpa)
    clock, rows = Clock(device), []
    for width, height in args.size:
        x = torch.rand(1, 3, height, width, device=device)
        calls = {"plain, SDPA": lambda x=x: plain(x), "EFRDNFast": lambda x=x: fast(x)}
        with torch.inference_mode():
            first = {name: first_call(call, device)[1] for name, call in calls.items()}
            samples = measure(calls, clock, seconds=args.seconds, least=3)
        base = samples["plain, SDPA"]
        for name, seconds in samples.items():
            ratio = "" if seconds is base else str(paired_ratio(base, seconds))
            p20, p50, p80 = (f"{1e3 * quantile(seconds, q):.4g}" for q in (0.2, 0.5, 0.8))
            noise = "noisy" if is_noisy(seconds) else ""
            label = f"{width}x{height} {name}"
            rows.append((label, p50, p20, p80, ratio, f"{first[name]:.2f}", noise))
    header = ("random weights, batch 1", "p50 ms", "p20", "p80", "speed", "first s", "")
    print(render(header, rows))
    print(f"EFRDNFast: backend {args.backend}, dtype {args.dtype}, plan {fast.plan}")
    return 0
