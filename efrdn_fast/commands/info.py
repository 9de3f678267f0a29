"""`efrdn info`: parameters and multiply-adds of a network or checkpoint; the paper's size rows."""

from __future__ import annotations

import argparse
import re

from ..errors import UsageError
from ._options import image_size, options_only

HELP = "size and cost of the network, published and true; what a checkpoint holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..config import ABLATIONS, MODULES, SCALES

    parser.add_argument(
        "checkpoint", nargs="?", help='"x2", "x3", "x4" or a file: prints its record too'
    )
    parser.add_argument("-s", "--scale", type=int, choices=SCALES, help="default: 4")
    parser.add_argument("--module", choices=MODULES, help="body of the network (Table 2)")
    parser.add_argument("--ablation", choices=ABLATIONS, help="a row of Tables 3-5")
    parser.add_argument("--channels", type=int, help="feature channels, a multiple of 16")
    parser.add_argument("--segments", type=int, help="attention segments")
    parser.add_argument("--segment-tokens", type=int, help="fixed length of a segment instead")
    parser.add_argument(
        "--size",
        type=image_size,
        metavar="WxH",
        help="LR size. Default: 640x360, 426x240, 320x180 for x2, x3, x4 (1280x720 results)",
    )
    parser.add_argument("--depth", type=int, default=3, help="levels of parts. Default: 3")
    parser.add_argument(
        "--tables", action="store_true", help="size rows of Tables 1-5, published and obtained"
    )


def run(args: argparse.Namespace) -> int:
    if args.tables:
        print(_tables())
        return 0
    from ..config import EFRDNConfig

    names = ("scale", "module", "ablation", "channels", "segments", "segment_tokens")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.checkpoint is None:
        with options_only():
            config = EFRDNConfig(**chosen)
        print(_cost(config, args.size, args.depth))
        return 0
    from .. import checkpoint

    stored = checkpoint.load(args.checkpoint)
    changed = chosen.keys() - {"segments", "segment_tokens"}
    if changed:
        raise UsageError(f"a checkpoint fixes {', '.join(sorted(changed))}; leave the option out")
    print(_record(checkpoint.resolve(args.checkpoint), stored))
    with options_only():
        config = EFRDNConfig(**{**stored.config, **chosen})
    print(_cost(config, args.size, args.depth))
    return 0


def _tables() -> str:
    from ..tables import render, size_rows

    header = ("table", "row", "published", "obtained", "", "published", "obtained", "")
    rows = [
        (
            row.table,
            row.row,
            f"{row.published_k}K",
            f"{row.parameters / 1e3:.3f}K",
            row.parameters_agree,
            f"{row.published_g}G",
            f"{row.multi_adds / 1e9:.3f}G",
            row.multi_adds_agree,
        )
        for row in size_rows()
    ]
    legend = (
        "ok: agrees to the printed digits; t: after truncation; r: after rounding; "
        "else obtained - published.\n"
        "Multi-Adds count convolutions only, for a 1280x720 result, as published."
    )
    return f"{render(header, rows, left=2)}\n\n{legend}"


def _record(path: object, stored) -> str:
    from ..config import EFRDNConfig

    lines = [f"checkpoint {path}", f"tensors: {len(stored.state_dict)}", "config:"]
    config = EFRDNConfig(**stored.config).to_dict()
    lines += [f"  {key}: {value}" for key, value in config.items()]
    lines.append("training:" if stored.training else "training: no record")
    lines += _indented(stored.training)
    return "\n".join([*lines, ""])


def _indented(record: dict, indent: str = "  ") -> list[str]:
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_indented(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines


def _cost(config, size: tuple[int, int] | None, depth: int) -> str:
    from ..counts import LR_SIZES, count
    from ..tables import render

    width, height = size or LR_SIZES[config.scale]
    cost = count(config, width, height)
    pixels = width * height
    tokens = config.segment_tokens or -(-pixels // config.segments)
    rows = [
        (
            label,
            f"{parts[0].parameters * len(parts):,}",
            f"{sum(p.conv for p in parts) / pixels:,.2f}",
            *(
                f"{sum(getattr(p, kind) for p in parts) / 1e9:.3f}"
                for kind in ("conv", "linear", "attention", "total")
            ),
        )
        for label, parts in _grouped([cost], 0, depth)
    ]
    header = ("part", "parameters", "conv MACs/px", "conv G", "linear G", "attention G", "all G")
    scale = config.scale
    return "\n".join(
        [
            f"EFRDN x{scale}, LR {width}x{height} -> {scale * width}x{scale * height}",
            f"parameters                               {cost.parameters:>15,}",
            f"Multi-Adds, published (convolutions)     {cost.conv / 1e9:>13.3f} G",
            f"Multi-Adds, true (with linear, attention){cost.total / 1e9:>13.3f} G",
            f"attention in segments of {min(tokens, pixels):,} of {pixels:,} tokens",
            "",
            render(header, rows),
        ]
    )


def _grouped(parts: list, level: int, depth: int) -> list[tuple[str, list]]:
    """Rows of like parts: what is inside several parts of one kind is put together."""
    kind, calls = parts[0].kind, parts[0].calls
    names = " ".join(dict.fromkeys(part.name.split(".")[0] for part in parts))
    label = kind if kind.lower() == names.lower() else f"{names} ({kind})" if names else kind
    label += f" x {len(parts)}" if len(parts) > 1 else ""
    label += f", used {calls} times each" if level == 1 and calls > 1 else ""
    rows = [("  " * level + label, parts)]
    if level == depth:
        return rows
    groups: dict[tuple, list] = {}
    for inner in (part for parent in parts for part in parent.parts):
        # esa1, esa2 and cc_a1, cc_b2 are alike; conv1x3 and conv3x1 are not.
        base = re.sub(r"(\.|_[ab])?\d$", "", inner.name)
        groups.setdefault((base, inner.kind, inner.parameters), []).append(inner)
    for members in groups.values():
        rows += _grouped(members, level + 1, depth)
    return rows
