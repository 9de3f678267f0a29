"""`efrdn figure`: figures for papers from pictures and measured JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from . import _options

HELP = "figures for papers: strips, error maps, features, scatter plots"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    strip = kinds.add_parser("strip", help="a crop by every method, PSNR and SSIM under each")
    strip.add_argument(
        "--crop",
        type=_box,
        required=True,
        metavar="LEFT,TOP,WIDTH,HEIGHT",
        help="part that is shown, in pixels of HR",
    )
    errors = kinds.add_parser("errors", help="maps of the error by every method")
    for kind in (strip, errors):
        kind.add_argument("hr", type=Path, metavar="HR", help="original picture")
        kind.add_argument("--lr", type=Path, help="its LR file (default: HR reduced by bicubic)")
        kind.add_argument(
            "--result",
            action="append",
            default=[],
            type=_named,
            metavar="NAME=FILE",
            help="picture of another method, of the size of HR; again for more",
        )
    features = kinds.add_parser("features", help="features after the CNN and each transformer")
    features.add_argument("image", type=Path, metavar="LR", help="input of the network")
    for kind in (strip, errors, features):
        kind.add_argument("-s", "--scale", type=int, choices=(2, 3, 4), default=4)
        kind.add_argument("-n", "--model", help="x2, x3, x4 or a checkpoint (default: x<scale>)")
        _options.add_runtime(kind)
    scatter = kinds.add_parser("scatter", help="quality against cost from JSON")
    scatter.add_argument(
        "points", nargs="+", type=Path, metavar="JSON", help="list of {name, X, Y, ...}"
    )
    scatter.add_argument(
        "-x", default="multi_adds_g", help="key of the cost (default: %(default)s)"
    )
    scatter.add_argument("-y", default="psnr", help="key of the quality (default: %(default)s)")
    scatter.add_argument("--area", metavar="KEY", help="key of the markers' area")
    for kind in (strip, errors, features, scatter):
        kind.add_argument(
            "-o", "--output", nargs="+", type=Path, required=True, help=".png, .svg or .pdf, or all"
        )


def run(args: argparse.Namespace) -> int:
    from .. import figures

    if args.kind == "scatter":
        keys = [args.x, args.y, *([args.area] if args.area else [])]
        figure = figures.scatter(figures.read_points(args.points, keys), args.x, args.y, args.area)
    else:
        from ..upscaler import Upscaler

        # Features are those of the plain network, whose stages can be listened to.
        backend = "reference" if args.kind == "features" else args.backend
        upscaler = Upscaler(
            args.scale, args.model, device=args.device, dtype=args.dtype, backend=backend
        )
        if args.kind == "features":
            figure = _features(args.image, upscaler)
        else:
            results = dict(args.result)
            if len(results) < len(args.result):
                raise UsageError("two of --result have the same name")
            shown = figures.pictures(args.hr, upscaler, lr_path=args.lr, results=results)
            if args.kind == "strip":
                figure = figures.strip(shown, args.crop, upscaler.scale, args.hr.stem)
            else:
                figure = figures.errors(shown, upscaler.scale)
    for path in figures.save(figure, args.output):
        print(path)
    return 0


def _features(path: Path, upscaler):
    import torch

    from .. import benchmarks, figures

    pixels = torch.tensor(benchmarks.read_rgb(path)).permute(2, 0, 1)[None] / 255
    return figures.features(upscaler.net, pixels)


def _box(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected LEFT,TOP,WIDTH,HEIGHT, got {text!r}")
    return tuple(int(part) for part in parts)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path)
