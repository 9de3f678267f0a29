"""Triton kernels on CPU tensors in Triton's interpreter, through the tests of the ops themselves.

TRITON_INTERPRET must be set before Triton is imported, so they run in a process of their own; the
largest maps are left out, for the interpreter takes many seconds for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SMALL = (
    "cpu-triton and (forward or backward) and not H63 and not N3 and not (train and "
    "(W37 or C48 or g8 or (float16 and not bfloat16)))"
)

CHOSEN = [(op, SMALL, 10) for op in ("gcrb", "acrb", "conv3x3", "fusion_backends")]
CHOSEN += [("fusion_ops", "opcheck and triton", 10)]
CHOSEN += [("nonfinite", "triton", 7)]


@pytest.mark.parametrize(("op", "chosen", "least"), CHOSEN, ids=[op for op, *_ in CHOSEN])
def test_kernels_in_the_interpreter(op, chosen, least):
    pytest.importorskip("triton", reason="Triton is for Linux; it is not installed here")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(TESTS / f"test_{op}.py"), "-k", chosen),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-1000:]
