"""Triton kernels compiled ahead of time for GPUs that are not there, against the committed table.

`python -m bench.triton_resources` compiles all; here are a few, on an architecture each.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux; it is not installed here")
REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE = (
    ("gcrb g=2 float32", 90),
    ("gcrb g=8 float32", 80),
    ("gcrb_backward float32 2/3", 90),
    ("gcrb_chain float16", 90),
    ("gcrb_train float32 3/4", 80),
    ("emha float16 2/2", 90),
    ("emha_backward float16 2/2", 120),
    ("acrb float32", 120),
    ("acrb_backward float32 3/4", 100),
    ("conv3x3 32->32 g=1 bfloat16", 90),
    ("conv3x3 32->32 g=1 float32", 86),
    ("sigmoid_gate_backward bfloat16", 89),
    ("calibrate float16 1/3", 80),
    ("calibrate_backward float32 2/4", 120),
    ("merge3x3 pixel float16 1/2", 90),
    ("merge3x3_backward channel float32 2/3", 100),
    ("token_qkv float16 2/2", 90),
    ("token_hidden float32 2/2", 90),
    ("token_fold float32", 89),
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
def table(resources) -> dict[tuple[str, str], dict[int, str]]:
    return resources.read_table(resources.TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def kernels(resources):
    return {kernel.name: kernel for kernel in resources.kernels()}


def test_every_kernel_is_compiled(kernels):
    from triton.runtime.jit import JITFunction

    from efrdn_fast import kernels as package

    written = set()
    for module in pkgutil.iter_modules(package.__path__):
        values = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        found = (value.fn.__name__ for value in values.values() if isinstance(value, JITFunction))
        written |= {name for name in found if name.endswith("_kernel")}
    assert len(written) > 20
    assert written == {kernel.launch.kernel.fn.__name__ for kernel in kernels.values()}


def test_table_has_every_kernel_with_its_config(table, kernels):
    assert set(table) == {(kernel.name, kernel.config) for kernel in kernels.values()}


def test_table_is_complete(table):
    missing = [(row, a) for row, cells in table.items() for a in cells if cells[a] == "-"]
    assert missing == []


def test_no_kernel_spills(table):
    assert [(row, a) for row, cells in table.items() for a in cells if "spill" in cells[a]] == []


@pytest.mark.parametrize(("name", "architecture"), SAMPLE)
def test_compiled_kernel(resources, table, kernels, name, architecture):
    import triton

    kernel = kernels[name]
    found = resources.measure(kernel.launch, architecture)
    assert found.spills == 0
    assert found.mma > 0 or not kernel.matrix
    version = resources.TABLE.read_text(encoding="utf-8").split("Triton ")[2].split(",")[0]
    if version == triton.__version__:
        assert resources.cell(found) == table[name, kernel.config][architecture]
