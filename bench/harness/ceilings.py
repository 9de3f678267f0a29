"""What the device reaches at best, measured in the same run: copy, matrix product, exponential.

CPU: a copy like STREAM's (bytes read plus bytes written) and a float32 GEMM, on all threads. CUDA:
the same through the framework's kernels, the product in float32, TF32, float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from efrdn_fast.device import precision
from efrdn_fast.timing import Clock, quantile

__all__ = ["Ceilings", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """Best rates of one device, per second."""

    copy: float
    """Bytes read plus bytes written."""
    matmul: dict[str, float]
    """Floating-point operations, by "float32", "tf32", "float16", "bfloat16"."""
    exp: float
    """Exponentials of float32."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure all of them, about two seconds; best of 15 samples each."""
    cuda = device.type == "cuda"
    size = 1 << (30 if cuda else 26)  # far above any cache
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _best(device, lambda: target.copy_(source))
    few = torch.rand(1 << (24 if cuda else 18), device=device)  # CPU: stays in the caches
    out = torch.empty_like(few)
    exp = few.numel() / _best(device, lambda: torch.exp(few, out=out))
    n = 8192 if cuda else 1024
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if cuda:
        kinds |= {"tf32": torch.float32, "float16": torch.float16}
    matmul = {}
    for name, dtype in kinds.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with precision(device, "tf32" if name == "tf32" else "fp32"):
            matmul[name] = 2 * n**3 / _best(device, lambda a=a, b=b: torch.mm(a, b))
    return Ceilings(copy, matmul, exp)


def _best(device: torch.device, call: Callable[[], Any]) -> float:
    clock = Clock(device)
    call()
    loops = clock.loops(call)
    return quantile([clock.sample(call, loops) for _ in range(15)], 0)
