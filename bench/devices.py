"""Rates of devices for the roofline: datasheet figures, and those measured by a run of the bench.

Exponentials per second are derived: 16 per clock and multiprocessor, at the boost clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .harness.provenance import RESULTS
from .harness.store import OtherResults, load

__all__ = ["DATASHEET", "UnknownDevice", "rates"]


class UnknownDevice(ValueError):
    """Neither datasheet figures nor measured ceilings are at hand."""


def _nvidia(copy_tbps: float, half: float, single: float, processors: int, ghz: float):
    return {
        "copy": copy_tbps * 1e12,
        "fp16": half * 1e12,
        "fp32": single * 1e12,
        "exp": 16 * processors * ghz * 1e9,
    }


DATASHEET = {
    "h200": _nvidia(4.8, 989, 67, 132, 1.98),
    "h100": _nvidia(3.35, 989, 67, 132, 1.98),
    "a100": _nvidia(2.039, 312, 19.5, 108, 1.41),
    "rtx4090": _nvidia(1.008, 165, 82.6, 128, 2.52),
}
"""Device -> memory (bytes), dense matrix product in half precision and in float32, exponentials,
each per second. Vendor's figures (H200 SXM, H100 SXM, A100 SXM 80 GB, GeForce RTX 4090)."""


def rates(device: str, dtype: str = "fp16", results: Path = RESULTS) -> tuple[dict, str]:
    """Rates of a device, {"copy", "matmul", "exp"}, and where they are from.

    Args:
        device: A key of `DATASHEET`, or a folder of the results: the best that its runs measured.
        dtype: fp32 or fp16; what a CPU computes is fp32.

    Raises:
        UnknownDevice: No such device, or no run of it measured ceilings.
        ValueError: A file of its results is no JSON.
    """
    if device in DATASHEET:
        row = DATASHEET[device]
        found = {"copy": row["copy"], "matmul": row[dtype], "exp": row["exp"]}
        return found, "datasheet"
    files = sorted((results / device).glob("*.json")) if device else []
    runs = [run for path in files for run in _ceilings(path)]
    if not runs:
        measured = sorted(path.parent.name for path in results.glob("*/*.json") if _ceilings(path))
        raise UnknownDevice(
            f"no device {device!r}: expected {', '.join(DATASHEET)} (datasheet) or a folder of "
            f"results with ceilings ({', '.join(dict.fromkeys(measured)) or 'none'})"
        )
    kind = "float32" if dtype == "fp32" or device.startswith("cpu-") else "float16"
    return {
        "copy": max(run["copy"] for run in runs),
        "matmul": max(run["matmul"][kind] for run in runs),
        "exp": max(run["exp"] for run in runs),
    }, "measured"


def _ceilings(path: Path) -> list[Mapping]:
    try:
        return [run["ceilings"] for run in load(path)["runs"].values() if "ceilings" in run]
    except OtherResults:
        return []
