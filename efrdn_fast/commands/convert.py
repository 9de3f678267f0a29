"""`efrdn convert`: a .pth or .safetensors checkpoint to a checked safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError

HELP = "turn a .pth checkpoint into safetensors with its settings inside"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        type=Path,
        help="checkpoint (.pth, .pt, .ckpt or .safetensors); pickles are refused",
    )
    parser.add_argument("output", type=Path, help="file to write, ending in .safetensors")


def run(args: argparse.Namespace) -> int:
    if args.output.suffix != ".safetensors":
        raise UsageError(f"output must end in .safetensors, got {str(args.output)!r}")
    from .. import checkpoint
    from ..model import EFRDN

    stored = checkpoint.load(args.input)
    net = EFRDN(**stored.config)
    checkpoint.load_into(net, stored.state_dict, str(args.input))
    checkpoint.save(net, args.output, stored.training)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.input} -> {args.output}: EFRDN x{net.scale}, {parameters:,} parameters")
    return 0
