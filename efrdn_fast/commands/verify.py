"""`efrdn verify`: the fast network against the float64 reference; exit status 1 beyond a bound."""

from __future__ import annotations

import argparse

from ._options import add_runtime, positive

HELP = "check the fast network against the reference in float64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import SCALES

    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        help='"x2", "x3", "x4" or a checkpoint. Default: random weights',
    )
    parser.add_argument(
        "-s", "--scale", type=int, choices=SCALES, default=4, help="of random weights. Default: 4"
    )
    parser.add_argument(
        "--benchmark",
        metavar="DIR",
        help="folder of sets; measures the change of PSNR on Set5 and Set14, needs --model",
    )
    parser.add_argument("--sets", nargs="+", metavar="SET", default=["Set5", "Set14"])
    parser.add_argument("--limit", type=positive, metavar="N", help="first N images of every set")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import verify
    from ..benchmarks import discover
    from ..device import resolve_device
    from ..model import EFRDN

    if args.benchmark and not args.model:
        raise ValueError("--benchmark measures a trained network: give --model")
    device = resolve_device(args.device)
    if args.model:
        net = EFRDN.from_pretrained(args.model)
    else:
        torch.manual_seed(0)
        net = EFRDN(args.scale).eval()
    net.to(device)
    failed = total = 0

    def show(row: verify.Row) -> None:
        nonlocal failed, total
        total += 1
        failed += not row.passed
        print(row, flush=True)

    for row in verify.check_ops(device, args.backend):
        show(row)
    # fp16 on a CPU has no fast instructions: it is verified when it is asked for
    every = ("fp32", "tf32", "fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    for dtype in every if args.dtype == "auto" else (args.dtype,):
        for row in verify.check_network(net, dtype, backend=args.backend):
            show(row)
        for image_set in discover(args.benchmark, args.sets) if args.benchmark else ():
            show(verify.check_images(net, image_set, dtype, backend=args.backend, limit=args.limit))
    print(f"{total - failed} of {total} comparisons within their bounds")
    return 1 if failed else 0
