"""`efrdn compare`: a page to look at two or three pictures, in one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError

HELP = "write one HTML page that compares LR, SR and HR with a slider"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lr", type=Path, metavar="LR", help="the small picture")
    parser.add_argument("sr", type=Path, metavar="SR", help="the upscaled picture")
    parser.add_argument("hr", type=Path, nargs="?", metavar="HR", help="the original, if there is")
    parser.add_argument(
        "-o", "--output", type=Path, help="page to write (default: SR with .html behind its name)"
    )
    parser.add_argument("--title", help="of the page (default: the name of SR)")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint import atomic_write
    from ..compare_page import page

    path = args.output or args.sr.with_suffix(".html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: the page is written as .html")
    atomic_write(path, page(args.lr, args.sr, args.hr, args.title).encode())
    print(path)
    return 0
