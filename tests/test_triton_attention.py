"""Triton kernels of attention and of the block around it in Triton's interpreter.

The tests of the ops themselves run in a process of their own, as in `test_triton_interpret`; what
is selected covers every kernel, float32 and float16, in segments that do not divide the tokens,
heads of 1, 7, 18 and 64, values that are not finite, scores of 1e4 and maps far from zero.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEADS = "(float32 and (T7- or D7 or D1- or D64)) or (float16 and (D7 or 1e4)) or finite"
SELECTED = {
    "emha": f"cpu-triton and not bfloat16 and ({HEADS})",
    "transformer": "cpu-triton and token and not bfloat16 and not W1-contiguous "
    "and not (H9 and float32) and not (backward and 1000 and float16)",
}


@pytest.mark.parametrize("module", SELECTED)
def test_attention_in_the_interpreter(module):
    pytest.importorskip("triton", reason="Triton is for Linux; it is not installed here")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(TESTS / f"test_{module}.py"), "-k", SELECTED[module]),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 10, done.stdout[-1000:]
