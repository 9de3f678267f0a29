"""CUDA kernels on the CPU (tests/simt): sound ones run, broken ones are caught; the bindings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simt import harness as simt


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    simt.require()


@pytest.mark.parametrize("check", ["binding", "network"])
def test_bindings(check):
    """Every op of ops_cuda*.cpp, and EFRDNFast on them, from Python to the kernels and back."""
    root = Path(torch.__file__).parent / "include"
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", f"-isystem{root}"]
    library = simt.binding(flags)
    script = Path(__file__).parent / "simt" / f"check_{check}.py"
    command = [sys.executable, str(script), str(library)]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def selftest(kernel: str, order: str = "forward"):
    return simt.execute(simt.executable("selftest"), kernel, order=order)


@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
def test_harness_runs_sound_kernels(order):
    sums = selftest("block_sum", order)
    values = torch.tensor([i % 7 for i in range(192)]).view(3, 64).sum(1)
    assert sums.returncode == 0, sums.stderr
    assert [float(v) for v in sums.stdout.split()[:3]] == values.tolist()
    swapped = selftest("exchange", order)
    assert swapped.returncode == 0, swapped.stderr
    expected = torch.arange(192).view(3, 64).flip(1).flatten()
    assert [float(v) for v in swapped.stdout.split()] == expected.tolist()


@pytest.mark.parametrize(
    ("kernel", "status", "message"),
    [
        ("skipped_barrier", 3, "waits at __syncthreads"),
        ("early_exit", 3, "thread (5,0,0) has exited"),
        ("skipped_shuffle", 3, "thread (7,0,0) has exited"),
        ("foreign_lane", 3, "lane 0 shuffles from lane 9"),
        ("read_after_end", 1, "AddressSanitizer: use-after-poison"),
        ("read_before_start", 1, "AddressSanitizer: use-after-poison"),
        ("write_after_end", 1, "AddressSanitizer: use-after-poison"),
        ("write_before_start", 1, "AddressSanitizer: use-after-poison"),
        ("dynamic_overrun", 1, "AddressSanitizer: heap-buffer-overflow"),
        ("shared_overrun", 1, "index 64 out of bounds"),
        ("misaligned", 1, "requires 16 byte alignment"),
    ],
)
def test_harness_catches(kernel, status, message):
    done = selftest(kernel)
    assert done.returncode == status, done.stderr
    assert message in done.stderr


def test_harness_shows_an_absent_barrier():
    """Nobody waits, so nothing hangs: threads read poison, which others in another order."""
    first, second = (selftest("no_barrier", order).stdout.split() for order in ("forward", "3"))
    assert "nan" in first[0]
    assert first != second
