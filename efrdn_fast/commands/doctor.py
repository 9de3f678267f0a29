"""`efrdn doctor`: what each backend can or cannot do here, and why; builds them on request."""

from __future__ import annotations

import argparse

HELP = "driver, compilers, cache, and what each backend can or cannot do here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build", action="store_true", help="build the C++ and CUDA kernels now, and time it"
    )


def run(args: argparse.Namespace) -> int:
    from .. import doctor

    failed = False
    if args.build:
        for library, finding, broken in doctor.build_all():
            print(f"{f'build {library}':<18} {finding}", flush=True)
            failed |= broken
    for what, finding in doctor.report():
        print(f"{what:<18} {finding}")
    return 1 if failed else 0
