"""`efrdn eval`: PSNR and SSIM on benchmark sets, beside bicubic and the paper's rows."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ._options import add_runtime, positive, tile

HELP = "measure PSNR and SSIM on benchmark sets, beside bicubic and the paper's rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import SCALES

    parser.add_argument(
        "--benchmark",
        metavar="DIR",
        help="folder of sets (<set>/HR, <set>/LR_bicubic/X<s>), or one set; without LR files they "
        "are computed. Default: $EFRDN_FAST_DATA/benchmark",
    )
    parser.add_argument(
        "-s", "--scale", type=int, nargs="+", choices=SCALES, required=True, help="2, 3, 4 or some"
    )
    parser.add_argument(
        "--model", metavar="NAME|PATH", help='"x2", "x3", "x4" or a checkpoint. Default: x<scale>'
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="SET",
        help="Set5, Set14, BSD100, Urban100, Manga109 or folder names. Default: all there are",
    )
    parser.add_argument("--bicubic", action="store_true", help="bicubic only, no network")
    parser.add_argument("--limit", type=positive, metavar="N", help="first N images of every set")
    parser.add_argument("--out", metavar="FILE.json", help="write all figures and their origin")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not refuse a set whose bicubic figures are not the known ones",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--tile", type=tile, metavar="N", help="tiles of N LR pixels; 0: never; auto: if needed"
    )
    network.add_argument(
        "--segment-tokens", type=positive, metavar="N", help="attention segments of N tokens"
    )
    network.add_argument(
        "--self-ensemble", action="store_true", help="mean over eight flips and rotations"
    )
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed import process_group

    with process_group() as here:  # under torchrun the images are shared out
        return _run(args, here)


def _run(args: argparse.Namespace, here) -> int:
    from .. import env
    from ..benchmarks import discover
    from ..checkpoint import atomic_write
    from ..evaluate import evaluate_set
    from ..report import as_json, results_table

    root = args.benchmark
    if root is None:
        if env.data_dir() is None:
            raise UsageError("give --benchmark DIR, or set EFRDN_FAST_DATA")
        root = env.data_dir() / "benchmark"
    sets = discover(root, args.sets)
    scales = list(dict.fromkeys(args.scale))
    args.device = here.device(args.device)
    networks = {scale: None if args.bicubic else _network(args, scale) for scale in scales}
    results = {scale: [] for scale in scales}
    for scale in scales:
        upscaler = networks[scale] and networks[scale].upscaler
        for image_set in sets:
            results[scale].append(
                evaluate_set(
                    image_set,
                    scale,
                    upscaler,
                    limit=args.limit,
                    check=not args.no_check,
                    progress=here.is_first,
                    here=here,
                )
            )
        if here.is_first:
            print(results_table(results[scale], networks[scale]))
            print()
    if args.out and here.is_first:
        atomic_write(args.out, as_json(vars(args), results, networks).encode())
        print(f"written: {args.out}")
    return 0


def _network(args: argparse.Namespace, scale: int):
    from ..evaluate import load_network

    return load_network(
        args.model or f"x{scale}",
        scale,
        segment_tokens=args.segment_tokens,
        self_ensemble=args.self_ensemble,
        tile=args.tile,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
    )
