"""Every CUDA source compiles for sm_80 and sm_90a, and no kernel spills registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90a")
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if not found and os.environ.get("CI") == "true":
        pytest.fail("nvcc is not on PATH; the CUDA sources cannot be checked")
    if not found:
        pytest.skip("nvcc is not on PATH")
    return found


def test_sources_are_found():
    assert "gcrb.cu" in {source.name for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(nvcc, source, tmp_path):
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *targets, "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    entries = list(ENTRY.finditer(done.stderr))
    assert done.stderr.count("Compiling entry function") == len(entries) > 0
    assert {entry["arch"] for entry in entries} == set(ARCHITECTURES)
    spilled = [
        f"{e['kernel']} for {e['arch']}: {e['stores']} bytes stored, {e['loads']} loaded"
        for e in entries
        if int(e["stores"]) or int(e["loads"]) or int(e["stack"])
    ]
    assert not spilled, "\n".join(spilled)
