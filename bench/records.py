"""Results files that are no `store.Store`, for the pages: read, named, or said to be missing."""

from __future__ import annotations

import json
from typing import Any

from .harness.provenance import RESULTS

__all__ = ["RESULTS", "missing", "read", "source"]


def read(device: str, name: str) -> dict[str, Any] | None:
    """What `bench/results/<device>/<name>.json` holds; None where there is none."""
    path = RESULTS / device / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def missing(device: str, name: str) -> str:
    """What a page says where there is none."""
    return f"Not measured: no results of `{name}` on {device}.\n"


def source(run: dict[str, Any], device: str, name: str) -> str:
    """Device, version and revision of a run, and its file; `{up}` leads from a page to the root."""
    return (
        f"{run['device']}, torch {run['versions']['torch']}, revision {run['revision']} "
        f"([figures]({{up}}bench/results/{device}/{name}.json))."
    )
