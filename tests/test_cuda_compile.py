"""The CUDA library builds for sm_80 and sm_90a; no kernel spills registers; its ops load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from efrdn_fast.kernels import _plan

from efrdn_fast.errors import BuildError

ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted(path.name for path in _plan.CSRC.glob("*.cu"))
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def build() -> _plan.Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
        try:
            return _plan.plan("cuda")
        except BuildError as error:
            if os.environ.get("CI") == "true":
                pytest.fail(str(error))
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def compile_object(build: _plan.Plan, source: str, folder: Path, *flags: str) -> str:
    """Compile one source as the JIT build does; what the compiler printed."""
    name, path, command = next(job for job in build.jobs if job[1].name == source)
    done = subprocess.run(
        [*command, *flags, str(path), "-o", str(folder / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    return done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(build, folder, source):
    report = compile_object(build, source, folder, "-Xptxas", "-v")
    entries = list(ENTRY.finditer(report))
    assert report.count("Compiling entry function") == len(entries) > 0
    assert {entry["arch"] for entry in entries} == set(ARCHITECTURES)
    spilled = [
        f"{e['kernel']} for {e['arch']}: {e['stores']} bytes stored, {e['loads']} loaded"
        for e in entries
        if int(e["stores"]) or int(e["loads"]) or int(e["stack"])
    ]
    assert not spilled, "\n".join(spilled)


def test_library_links_and_registers_its_ops(build, folder):
    for name, path, _ in build.jobs:
        if not (folder / name).exists():
            compile_object(build, path.name, folder)
    objects = [str(folder / name) for name, _, _ in build.jobs]
    at = build.link.index("@")
    library = folder / "efrdn_fast_cuda.so"
    link = [*build.link[:at], *objects, *build.link[at + 1 :], "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    bindings = "".join(path.read_text() for path in _plan.CSRC.glob("ops_cuda*.cpp"))
    names = re.findall(r'm\.impl\("(\w+)"', bindings)
    program = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    print(getattr(torch.ops.efrdn_fast_ext, name).default._schema)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), *names], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    assert len(done.stdout.splitlines()) == len(names) > 0
