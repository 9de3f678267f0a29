"""`efrdn ablate`: the variants of Tables 2-5 under one equal budget, beside the paper's."""

from __future__ import annotations

import argparse

from ._options import natural
from .train import add_fields, chosen_options

HELP = "train every variant of the paper's Tables 2-5 under one budget and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..options import PRESETS, RunOptions, TrainOptions

    parser.add_argument("data", nargs="+", help="folders of HR images (DIV2K layout or any)")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="paper", help="recipe to start from"
    )
    parser.add_argument(
        "--seeds", type=natural, nargs="+", default=[0, 1], help="runs per variant. Default: 0 1"
    )
    parser.add_argument(
        "--tables", nargs="+", choices=("2", "3", "4", "5"), default=["2", "3", "4", "5"]
    )
    parser.add_argument("--json", metavar="FILE", help="write budget and figures")
    fixed = ("module", "ablation", "manual_seed")
    add_fields(parser, TrainOptions, "budget and recipe of every variant", leave_out=fixed)
    add_fields(parser, RunOptions, "run")


def run(args: argparse.Namespace) -> int:
    import json

    from ..ablate import ablation_tables, as_json, run_ablations
    from ..checkpoint import atomic_write
    from ..distributed import process_group

    options, run_options = chosen_options(args)
    with process_group(run_options.device) as here:
        rows = run_ablations(args.data, options, run_options, seeds=args.seeds, tables=args.tables)
    if here.is_first:
        print(ablation_tables(rows))
        if args.json:
            text = json.dumps(as_json(rows, options), indent=1)
            atomic_write(args.json, (text + "\n").encode())
    return 0
