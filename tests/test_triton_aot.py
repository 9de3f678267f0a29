"""Triton kernels compiled ahead of time for GPUs that are not there, against the committed table.

`python -m bench.triton_resources` compiles all; here are a few, on an architecture each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux; it is not installed here")
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = (
    ("gcrb g=2 float32", 90),
    ("gcrb g=8 float32", 80),
    ("gcrb_backward float32 2/3", 90),
    ("acrb float32", 120),
    ("acrb_backward float32 3/4", 100),
    ("conv3x3 32->32 g=1 bfloat16", 90),
    ("conv3x3 32->32 g=1 float32", 86),
)


@pytest.fixture(scope="module")
def resources():
    sys.path.insert(0, str(REPOSITORY))
    try:
        from bench import triton_resources
    finally:
        sys.path.remove(str(REPOSITORY))
    return triton_resources


@pytest.fixture(scope="module")
def table(resources) -> dict[str, dict[int, str]]:
    """Kernel -> architecture -> cell of the committed table."""
    text = resources.TABLE.read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {
        name.strip(): {
            architecture: cell.strip()
            for architecture, cell in zip(resources.ARCHITECTURES, cells, strict=False)
        }
        for name, _, *cells in rows[2:]
    }


@pytest.fixture(scope="module")
def kernels(resources):
    return {kernel.name: kernel for kernel in resources.kernels()}


def test_rows_of_the_table_are_kernels_that_exist(table, kernels):
    assert len(table) > 40
    assert set(table) <= set(kernels)


@pytest.mark.parametrize(("name", "architecture"), SAMPLE)
def test_compiled_kernel(resources, table, kernels, name, architecture):
    import triton

    kernel = kernels[name]
    found = resources.measure(kernel.launch, architecture)
    assert found.spills == 0
    assert found.mma > 0 or not kernel.matrix
    version = resources.TABLE.read_text(encoding="utf-8").split("Triton ")[2].split(",")[0]
    if version == triton.__version__:
        assert resources.cell(found) == table[name][architecture]
