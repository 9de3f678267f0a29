"""Where a figure comes from: device, clocks, driver, versions, revision, command, load."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["PACKAGES", "RESULTS", "device_folder", "device_name", "record", "revision"]

RESULTS = Path(__file__).resolve().parent.parent / "results"
PACKAGES = ("numpy", "triton", "onnxruntime", "openvino", "tensorrt", "spandrel")


def device_name(device: torch.device) -> str:
    """Model of the device; of a CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model} {torch.get_num_threads()} threads"


def device_folder(device: torch.device) -> str:
    """Name of the folder of a device's results: "cpu-amd-epyc-2-threads", "cuda-nvidia-h200"."""
    name = f"{device.type} {device_name(device)}".lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@functools.cache
def revision() -> str:
    """Commit of the checkout, with "+" when the code differs from it; "" outside of one.

    Results and the pages made of them are no code: a run that writes them leaves no mark on the
    next one.
    """
    commit = _git("rev-parse", "--short=12", "HEAD")
    made = (":/", ":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)README.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *made)
    return commit + "+" if commit and changed else commit


def _git(*words: str) -> str:
    command = ["git", *words]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def record(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """Everything a figure depends on besides the code, ready for JSON.

    Args:
        command: The command line to repeat it. Default: that of this process.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda if device.type == "cuda" else None
    versions |= {package: _version(package) for package in PACKAGES}
    return {
        "command": command or _command(),
        "revision": revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "clocks": _clocks(device),
        "driver": _smi("driver_version") if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: version for name, version in versions.items() if version},
        "platform": platform.system() + " " + platform.machine(),
    }


def _command() -> str:
    program = Path(sys.argv[0])
    if program.name == "__main__.py" and program.parent.name == "pytest":
        return " ".join(["python -m pytest", *sys.argv[1:]])
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name.startswith("bench."):
        return " ".join(["python -m", main.name, *sys.argv[1:]])
    return " ".join([program.name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _clocks(device: torch.device) -> str:
    """Policy of the clocks as found; benches never change it."""
    if device.type == "cuda":
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"
        found = _smi(fields)
        return f"as found ({fields}: {found})" if found else "as found, nvidia-smi says nothing"
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return f"governor {governor.read_text().strip()}" if governor.is_file() else "not readable"


def _smi(fields: str) -> str | None:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None
