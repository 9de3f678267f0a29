"""`efrdn verify`: the fast network against the float64 reference; exit status 1 beyond a bound."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
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
        "-s", "--scale", type=int, choices=SCALES, help="default: that of the model, else 4"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--benchmark",
        metavar="DIR",
        help="folder of sets; measures the change of PSNR on Set5 and Set14, needs --model. "
        "Default with --model: $EFRDN_FAST_DATA/benchmark where it is there",
    )
    images.add_argument("--no-benchmark", action="store_true", help="do not measure PSNR")
    parser.add_argument("--sets", nargs="+", metavar="SET", default=["Set5", "Set14"])
    parser.add_argument("--limit", type=positive, metavar="N", help="first N images of every set")
    parser.add_argument("--json", metavar="FILE", help="write all figures and their origin")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import checkpoint, report, verify
    from ..benchmarks import discover, find_pairs
    from ..device import resolve_device
    from ..model import EFRDN

    device = resolve_device(args.device)
    root, why_not = _benchmark(args)
    if args.model:
        net = EFRDN.from_pretrained(args.model)
    else:
        torch.manual_seed(0)
        net = EFRDN(args.scale or 4).eval()
    if args.scale not in (None, net.scale):
        raise UsageError(f"{args.model} upscales by {net.scale}, not by {args.scale}")
    sets = discover(root, args.sets) if root else []
    for image_set in sets:
        find_pairs(image_set, net.scale)  # what is missing is said before the long checks
    net.to(device)
    rows: list[verify.Row] = []

    def show(row: verify.Row) -> None:
        rows.append(row)
        print(row, flush=True)

    # fp16 on a CPU has no fast instructions: the network is verified in it when it is asked for
    every = ("fp32", "tf32", "fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    chosen = every if args.dtype == "auto" else (args.dtype,)
    for row in verify.check_ops(device, args.backend, None if args.dtype == "auto" else chosen):
        show(row)
    for dtype in chosen:
        for row in verify.check_network(net, dtype, backend=args.backend):
            show(row)
        for image_set in sets:
            show(verify.check_images(net, image_set, dtype, backend=args.backend, limit=args.limit))
    failed = sum(not row.passed for row in rows)
    if why_not:
        print(f"PSNR not measured: {why_not}")
    print(f"{len(rows) - failed} of {len(rows)} comparisons within their bounds")
    if args.json:
        file = checkpoint.resolve(args.model) if args.model else None
        text = report.verify_json(vars(args), rows, device, file, why_not)
        checkpoint.atomic_write(args.json, text.encode())
        print(f"written: {args.json}")
    return 1 if failed else 0


def _benchmark(args: argparse.Namespace) -> tuple[str | Path | None, str]:
    """Folder of the sets, or None and why PSNR is not measured."""
    from .. import env

    if args.benchmark and not args.model:
        raise UsageError("--benchmark measures a trained network: give --model")
    if args.benchmark:
        return args.benchmark, ""
    if args.no_benchmark:
        return None, "--no-benchmark"
    if not args.model:
        return None, "the weights are random; give --model"
    data = env.data_dir()
    if data is None:
        return None, "no images; give --benchmark DIR, or set EFRDN_FAST_DATA"
    if not (data / "benchmark").is_dir():
        return None, f"no folder benchmark in {data} (EFRDN_FAST_DATA); give --benchmark DIR"
    return data / "benchmark", ""
