"""What the cache folder remembers of builds: the seconds of a good one, why another failed.

A failure counts for the same tools and for a day, so that nobody compiles in vain at every start,
and nobody who mends a compiler waits. A record that cannot be written or read is no record.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from ._plan import Plan

__all__ = ["DAY", "Remembered", "built_seconds", "failure", "forget", "note_built", "note_failure"]

DAY = 24 * 3600


@dataclass(frozen=True)
class Remembered:
    """A failure of an earlier process."""

    reason: str
    when: str


def _built(what: Plan) -> Path:
    return what.artifact.with_suffix(".built")


def _failed(what: Plan) -> Path:
    return what.artifact.with_suffix(".failed")


def note_built(what: Plan, seconds: float) -> None:
    forget(what)
    _write(_built(what), {"seconds": seconds})


def note_failure(what: Plan, reason: str) -> None:
    _write(_failed(what), {"reason": reason, "tools": what.tools, "time": time.time()})


def forget(what: Plan) -> None:
    """No failure of this build is remembered any more."""
    with contextlib.suppress(OSError):
        _failed(what).unlink()


def built_seconds(what: Plan) -> float | None:
    """Seconds that the build took; None: not built, or by a version that took no note."""
    seconds = _read(_built(what)).get("seconds")
    return seconds if isinstance(seconds, float) and what.artifact.is_file() else None


def failure(what: Plan) -> Remembered | None:
    """The failure that still counts, None: there is none."""
    record = _read(_failed(what))
    reason, tools, noted = (record.get(name) for name in ("reason", "tools", "time"))
    if not isinstance(reason, str) or not isinstance(noted, float) or tools != what.tools:
        return None
    if not 0 <= time.time() - noted < DAY:
        return None
    return Remembered(reason, time.strftime("%Y-%m-%d %H:%M", time.localtime(noted)))


def _write(path: Path, record: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(record))


def _read(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or of a process that was killed while it wrote
        return {}
    return record if isinstance(record, dict) else {}
