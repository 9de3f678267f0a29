"""The `efrdn` program: finds the sub-commands, runs one, turns errors into one line each.

Exit status: 0 done, 1 an error or some input failed, 2 wrong usage, 130 interrupted. Wrong usage is
what the parser refuses, a `UsageError`, and a named backend that cannot run here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module

from . import __version__
from .errors import BackendUnavailable, UsageError

__all__ = ["COMMANDS", "main"]

# Modules of `efrdn_fast.commands`, in the order in which `efrdn --help` shows them.
COMMANDS = (
    "upscale",
    "compare",
    "figure",
    "eval",
    "train",
    "ablate",
    "info",
    "export",
    "convert",
    "bench",
    "verify",
    "doctor",
)

# Everything else is a bug and shows its traceback.
ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError)


def build_parser() -> argparse.ArgumentParser:
    """Parser of all sub-commands; imports their modules, which import neither torch nor NumPy."""
    parser = argparse.ArgumentParser(
        prog="efrdn", description="EFRDN: lightweight image super-resolution, x2, x3 and x4."
    )
    parser.add_argument("--version", action="version", version=f"efrdn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".commands.{name}", __package__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP.capitalize())
        module.add_arguments(command)
        command.set_defaults(run=module.run, usage_error=command.error)
    return parser


def one_line(error: BaseException) -> str:
    """Message of an error on one line; its class name when it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = f"out of memory{': ' + text if text else ''}"
    return text or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run `efrdn` with `argv` (default: the process's arguments) and return its exit status."""
    args = build_parser().parse_args(argv)
    name = f"efrdn {args.command}"
    with _sigterm_as_interrupt(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr
        )
        try:
            return args.run(args)
        except BrokenPipeError:
            # The reader (`| head`) is gone: keep the interpreter from flushing into it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (UsageError, BackendUnavailable) as error:
            args.usage_error(one_line(error))
        except ERRORS as error:
            print(f"{name}: error: {one_line(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130


@contextmanager
def _sigterm_as_interrupt():
    """Let SIGTERM unwind like Ctrl-C, so that unfinished files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
