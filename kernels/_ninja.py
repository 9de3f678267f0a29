"""One run of ninja: its file, its end after a time-out, and what its log says of a failure."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from .. import env
from . import _toolchain
from ._plan import Plan

__all__ = ["Failure", "ninja_file", "run"]

_ERROR = re.compile(r"\berror\b|undefined reference|cannot find")
_FAILED = re.compile(r"FAILED: (?:\[code=\d+\] )?(\S+)")
_PASSING = re.compile(
    r"no space left|quota exceeded|read-only file system|input/output error|stale file handle"
    r"|cannot allocate memory|out of memory|memory exhausted|bad_alloc|resource temporarily"
    r"|too many open files|text file busy|\bkilled\b|kill signal|due to signal|signal terminated",
    re.IGNORECASE,
)
"""Words of a failure that says nothing of the compiler or the sources."""


@dataclass(frozen=True)
class Failure:
    """Why ninja built nothing."""

    reason: str
    lasting: bool
    """Whether the same tools would fail again: not where time, memory or disk ran out."""


def ninja_file(what: Plan) -> str:
    """Compile every job, then link; text of build.ninja."""

    def text(*words: object) -> str:
        return " ".join(re.sub(r"([$ :])", r"$\1", str(word)) for word in words)

    def shell(*words: object) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    lines = ["rule run", "  command = $run", "  description = $out", ""]
    for name, source, command in what.jobs:
        run = shell(*command, source, "-o", name)
        lines += [f"build {text(name)}: run {text(source)}", f"  run = {run}"]
    objects = [name for name, _, _ in what.jobs]
    at = what.link.index("@")
    link = shell(*what.link[:at], *objects, *what.link[at + 1 :], "-o", "out.so")
    lines += [f"build out.so: run {text(*objects)}", f"  run = {link}", "default out.so", ""]
    return "\n".join(lines)


def run(folder: Path, log: Path, seconds: float) -> Failure | None:
    """Run ninja in a folder and end it after so many seconds; None when all is built.

    Its output goes to the log, and to stderr when asked for.
    """
    command = [_toolchain.ninja(), "-C", str(folder), "-v"]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    verbose = env.verbose_build()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # the log is searched for English words
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        _end(process)

    watchdog = threading.Timer(seconds, give_up)
    watchdog.start()
    try:
        with log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                if verbose:
                    sys.stderr.write(line)
        status = process.wait()
    finally:
        watchdog.cancel()
        _end(process)  # of an interrupted build
    if late.is_set():
        return Failure(f"it took more than {seconds} s", lasting=False)
    return _failure(log.read_text(errors="replace").splitlines(), status) if status else None


def _end(process: subprocess.Popen) -> None:
    """End ninja where it still runs; asked politely it ends the compilers it started as well."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(lines: list[str], status: int, limit: int = 3) -> Failure:
    """What the log says of the first command that failed, on one line."""
    at = next((i for i, line in enumerate(lines) if _FAILED.match(line)), None)
    if at is None:  # no command did, but ninja itself
        said = [line for line in lines if line.startswith("ninja:")]
        return Failure(" | ".join(said[:limit]) or f"ninja ended with {status}", lasting=False)
    following = re.compile(r"\[\d+/\d+\] |FAILED: |ninja: ")
    output = list(itertools.takewhile(lambda line: not following.match(line), lines[at + 2 :]))
    errors = [line.strip() for line in output if _ERROR.search(line)]
    errors = errors or [line.strip() for line in output if line.strip()]
    said = " | ".join(errors[:limit]) or f"the compiler ended with {status} and printed nothing"
    # A shell reports the end by signal n as 128 + n.
    passing = status >= 128 or status < 0 or any(_PASSING.search(line) for line in output)
    return Failure(f"{_FAILED.match(lines[at])[1]}: {said}", lasting=not passing)
