"""`efrdn export`: ONNX with free batch, height and width, checked in ONNX Runtime."""

from __future__ import annotations

import argparse

from ._options import positive

HELP = "write the network as ONNX with free height and width, checked in ONNX Runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="x4", metavar="NAME|PATH", help='"x2", "x3", "x4" or a checkpoint'
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE.onnx")
    parser.add_argument("--opset", type=int, default=18, help="at least 18. Default: 18")
    parser.add_argument(
        "--segment-tokens",
        type=positive,
        metavar="N",
        help="attention segments of N tokens instead of the checkpoint's: cost and memory then "
        "grow linearly with the image, and the result changes a little",
    )


def run(args: argparse.Namespace) -> int:
    from .. import checkpoint
    from ..export import least_size, to_onnx
    from ..model import EFRDN

    path = checkpoint.resolve(args.model)
    overrides = {} if args.segment_tokens is None else {"segment_tokens": args.segment_tokens}
    net = EFRDN.from_pretrained(path, **overrides)
    errors = to_onnx(net, args.output, opset=args.opset, training=checkpoint.load(path).training)
    least = least_size(net)
    print(f"{args.output}: EFRDN x{net.scale}, opset {args.opset}, height and width >= {least}")
    for (batch, height, width), error in errors:
        print(
            f"{batch}x3x{height}x{width}: ONNX Runtime differs from PyTorch by {error:.1e} at most"
        )
    return 0
