"""JIT build of `csrc/` at first use, and what came of it in this process.

A build goes into a temporary folder under a file lock that dies with its holder, and one atomic
rename publishes it, so a killed build leaves nothing that hangs or loads.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import filelock

from ..errors import BuildError
from . import _ninja, _plan, _record

__all__ = ["build", "load", "rebuild", "why_not"]

BUILD_SECONDS = 1800
LOCK_SECONDS = BUILD_SECONDS + 60  # a build that is ended takes a while to end
"""How long to wait for another process that builds the same library."""

_log = logging.getLogger("efrdn_fast")


def build(library: str, *, force: bool = False) -> tuple[Path, float]:
    """Build a library unless it is in the cache.

    Args:
        force: Build again even so. Default: False.

    Returns:
        The file, and the seconds the compilers ran (0: from the cache).

    Raises:
        BuildError: Something is missing, a compiler failed now or, as is remembered, before, or
            another process holds the lock for longer than `LOCK_SECONDS`.
    """
    what = _plan.plan(library)
    if not force and _is_built(what):
        return what.artifact, 0.0
    lock = what.artifact.with_suffix(".lock")
    try:
        what.artifact.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=LOCK_SECONDS):
            if force:
                _record.forget(what)
            elif _is_built(what):  # while this process waited
                return what.artifact, 0.0
            return what.artifact, _build(what)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {lock} for {LOCK_SECONDS} s to build the {library} library;"
            f" end it, or set EFRDN_FAST_CACHE_DIR to another folder ({_plan.COST[library]})"
        ) from None
    except OSError as error:
        raise BuildError(
            f"the cache folder {what.artifact.parent} cannot be used: {error}; "
            f"set EFRDN_FAST_CACHE_DIR to a writable folder ({_plan.COST[library]})"
        ) from error


def _is_built(what: _plan.Plan) -> bool:
    """Whether the cache has it.

    Raises:
        BuildError: It does not, and an earlier build failed in a way that would repeat.
    """
    if what.artifact.is_file():
        return True
    _raise_remembered(what)
    return False


def _raise_remembered(what: _plan.Plan) -> None:
    if failed := _record.failure(what):
        raise BuildError(_failure(what, failed.reason, f" on {failed.when}"))


def _failure(what: _plan.Plan, reason: str, when: str = "") -> str:
    return (
        f"building the {what.library} library failed{when}: {reason} "
        f"({_plan.COST[what.library]}); `efrdn doctor --build` tries again; log: {what.log}"
    )


def _build(what: _plan.Plan) -> float:
    """Compile and link in a temporary folder, then move the result into place; seconds taken."""
    for stale in what.artifact.parent.glob(f"{what.artifact.stem}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)  # of a killed build: the lock is ours
    _log.warning("building the %s kernels, once for this machine: %s", what.library, what.log)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(
        prefix=f"{what.artifact.stem}.", suffix=".partial", dir=what.artifact.parent
    ) as name:
        folder = Path(name)
        (folder / "build.ninja").write_text(_ninja.ninja_file(what))
        if failed := _ninja.run(folder, what.log, BUILD_SECONDS):
            if failed.lasting:
                _record.note_failure(what, failed.reason)
            raise BuildError(_failure(what, failed.reason))
        os.replace(folder / "out.so", what.artifact)
    seconds = time.perf_counter() - start
    _record.note_built(what, seconds)
    return seconds


_outcomes: dict[str, str | None] = {}  # by library: None loaded, else why it failed
_guard = threading.Lock()


def why_not(library: str) -> str | None:
    """Why a library cannot be built or loaded here, in words; None when it can. Builds nothing.

    Names what is missing, what that costs and what to do; after a failed build, of this process or
    remembered of an earlier one, that failure.

    Raises:
        ValueError: EFRDN_FAST_CACHE_DIR is no folder.
    """
    if library in _outcomes:
        return _outcomes[library]
    try:
        _is_built(_plan.plan(library))
    except BuildError as error:
        return str(error)
    return None


def load(library: str) -> None:
    """Build a library where needed and register its ops, once per process.

    Raises:
        BuildError: It failed now or earlier; the message names what is missing or the first
            errors, what that costs, and the log.
    """
    with _guard:
        if library not in _outcomes:
            try:
                _load(library)
                _outcomes[library] = None
            except BuildError as error:
                _outcomes[library] = str(error)
        if outcome := _outcomes[library]:
            raise BuildError(outcome)


def rebuild(library: str) -> tuple[Path, float]:
    """Build a library afresh, whatever is built or failed before, and register its ops.

    In a process that has loaded it before, the ops of then go on.

    Returns:
        The file, and the seconds the compilers ran.

    Raises:
        BuildError: It failed; a build of before stays and serves.
    """
    what = _plan.plan(library)
    with _guard:
        if _outcomes.get(library):
            del _outcomes[library]
        try:
            built = build(library, force=True)
        except BuildError as error:
            if library not in _outcomes and not what.artifact.is_file():
                _outcomes[library] = str(error)
            raise
    load(library)
    return built


def _load(library: str) -> None:
    import torch

    path, _ = build(library)
    try:
        torch.ops.load_library(path)
    except OSError:
        # A cache folder shared between unlike machines: what was built elsewhere may not load.
        _raise_remembered(_plan.plan(library))
        path, _ = build(library, force=True)
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise BuildError(
                f"{path} does not load: {error} ({_plan.COST[library]}); delete it and try again"
            ) from error
