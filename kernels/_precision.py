"""Whether PyTorch is set to compute float32 products in TF32, by either of its two interfaces.

Reading `allow_tf32` raises RuntimeError once `fp32_precision` has been set differently; reading
`fp32_precision` follows both.
"""

from __future__ import annotations

import torch

__all__ = ["convolution_tf32", "matmul_tf32"]


def matmul_tf32() -> bool:
    """Setting for matrix products on a GPU."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# A trace takes the setting as a constant: Dynamo cannot follow its getter, and guards the setting.
matmul_tf32._dynamo_marked_constant = True


def convolution_tf32() -> bool:
    """Setting for convolutions on a GPU."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
