"""ONNX export of the reference network, with free batch, height and width.

What ONNX cannot say with free sizes is put in words that it can, exactly: patches are slices and
sums of slices (no Im2Col or Col2Im, which few runtimes know), segments are padded to one length and
masked. Height and width start at 15, where ESA's pooling window has its full size.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__
from .checkpoint import atomic_write
from .model import EFRDN
from .transformer import Attention, TransformerBlock

__all__ = ["CHECKED_SIZES", "LEAST_OPSET", "LEAST_SIZE", "exportable", "to_onnx"]

LEAST_SIZE = 15
LEAST_OPSET = 18
TRACED = (2, 24, 29)  # batch, height, width
# Smallest; tokens not divisible by the segments; the three remainders of ESA's pooling stride.
CHECKED_SIZES = ((1, 15, 15), (2, 19, 23), (1, 48, 37))
TOLERANCE = 1e-4
MASKED = -1e9  # finite: a segment of nothing but padding must not make NaN


def to_onnx(
    net: EFRDN,
    path: str | os.PathLike,
    *,
    opset: int = LEAST_OPSET,
    training: dict | None = None,
) -> list[tuple[tuple[int, int, int], float]]:
    """Write `net` as ONNX, input `lr` [N, 3, H, W] and output `sr`, both RGB in [0, 1].

    The file is written only after ONNX Runtime has agreed with PyTorch at `CHECKED_SIZES`.

    Args:
        net: The reference network, float32, on the CPU.
        path: The .onnx file; weights are inside.
        opset: ONNX operator set, at least 18.
        training: Training record of the weights, kept in the file's metadata.

    Returns:
        The sizes checked (batch, height, width), each with the largest absolute difference.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: The opset is too old, or `net` is not float32 on the CPU.
        RuntimeError: ONNX Runtime does not agree with PyTorch.
    """
    if opset < LEAST_OPSET:
        raise ValueError(f"opset must be at least {LEAST_OPSET}, got {opset}")
    weight = net.head.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"export needs a float32 network on the CPU, got {weight.dtype} on {weight.device}"
        )
    _require("onnx", "onnxscript", "onnxruntime")
    model = _translate(exportable(net), opset)
    _clean(model)
    model.metadata_props.update(
        producer=f"efrdn_fast {__version__}",
        config=json.dumps(net.config.to_dict()),
        training=json.dumps(training or {}),
        scale=str(net.scale),
        input="lr: RGB, [N, 3, H, W], float32 in [0, 1]",
        output="sr: RGB, [N, 3, scale H, scale W], not clamped",
        least_height_and_width=str(LEAST_SIZE),
    )
    import onnx_ir

    data = onnx_ir.serde.serialize_model(model).SerializeToString()
    errors = [(size, _difference(net, data, size)) for size in CHECKED_SIZES]
    size, worst = max(errors, key=lambda row: row[1])
    if not worst <= TOLERANCE:
        raise RuntimeError(f"ONNX Runtime differs from PyTorch by {worst:.2e} at {size}")
    atomic_write(Path(path), data)
    return errors


def exportable(net: EFRDN) -> EFRDN:
    """A copy of `net`, in evaluation mode, that computes the same with exportable operations."""
    net = copy.deepcopy(net).eval()
    net.set_attention(_masked_attention(None if net.config.segment_tokens else net.config.segments))
    for i, block in enumerate(net.trans):
        net.trans[i] = _SlicedTransformer(block)
    return net


class _SlicedTransformer(nn.Module):
    """`TransformerBlock` whose unfold and fold are slices."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block, (height, width) = self.block, x.shape[2:]
        t = _unfold(x).transpose(1, 2)  # [N, H W, 9 C]
        t = t + block.emha(block.norm1(t))
        t = t + block.mlp(block.norm2(t))
        y = _fold(t.transpose(1, 2), height, width)
        if block.fold == "sum":
            return y
        return y / _fold(_unfold(x.new_ones(1, 1, height, width)), height, width)


def _unfold(x: Tensor) -> Tensor:
    """`F.unfold(x, 3, padding=1)`: [N, C, H, W] -> [N, 9 C, H W]."""
    n, channels, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.stack(taps, dim=2).reshape(n, 9 * channels, height * width)


def _fold(t: Tensor, height: int, width: int) -> Tensor:
    """`F.fold(t, (height, width), 3, padding=1)`: [N, 9 C, H W] -> [N, C, H, W]."""
    padded = F.pad(t.reshape(t.shape[0], -1, 9, height, width), (1, 1, 1, 1))
    return sum(
        padded[:, :, 3 * i + j, 2 - i : 2 - i + height, 2 - j : 2 - j + width]
        for i in range(3)
        for j in range(3)
    )


def _masked_attention(segments: int | None) -> Attention:
    """`reference.emha` over `segments` segments (None: as many as their length asks for).

    The runtime holds the scores of one head at a time, and, when their count is fixed, of one
    segment: 0.8 GiB at 320x180 and four segments instead of 6.
    """

    def attention(qkv: Tensor, heads: int, length: int) -> Tensor:
        n, tokens, width = qkv.shape
        if segments is None:
            length = torch.sym_min(length, tokens)
        count = segments or (tokens + length - 1) // length
        beyond = torch.arange(count * length, device=qkv.device) >= tokens
        mask = beyond.to(qkv.dtype).reshape(count, 1, length) * MASKED
        padded = F.pad(qkv, (0, 0, 0, count * length - tokens))
        padded = padded.reshape(n, count, length, 3, heads, width // (3 * heads))
        if segments:
            # Pieces [N, length, D], one for each head of each segment.
            q, k, v = padded.permute(3, 1, 4, 0, 2, 5).flatten(1, 2)
            masks = [row for row in mask.unbind(0) for _ in range(heads)]
        else:
            q, k, v = padded.permute(3, 4, 0, 1, 2, 5)  # pieces [N, count, length, D]
            masks = [mask] * heads
        q, k = q * q.shape[-1] ** -0.5, k.transpose(-2, -1)
        pieces = zip(q.unbind(0), k.unbind(0), v.unbind(0), masks, strict=True)
        out = torch.stack([(a @ b + m).softmax(dim=-1) @ c for a, b, c, m in pieces])
        if segments:
            out = out.unflatten(0, (segments, heads)).permute(2, 0, 3, 1, 4)
        else:
            out = out.permute(1, 2, 3, 0, 4)
        return out.reshape(n, count * length, width // 3)[:, :tokens]

    return attention


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'efrdn_fast[export]'"
        )


def _translate(net: nn.Module, opset: int):
    """The dynamo exporter's model (onnx_ir), not optimised."""
    batch, height, width = TRACED
    axes = {0: torch.export.Dim("batch", min=1)}
    axes |= {i: torch.export.Dim(name, min=LEAST_SIZE) for i, name in ((2, "height"), (3, "width"))}
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that torchvision, which is not needed, is missing
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)
            # Whether a pooled size divides by the stride, or is 1, changes nothing in the graph:
            # without this the exporter would make both a condition on height and width.
            program = torch.export.export(
                net,
                (torch.rand(batch, 3, height, width),),
                dynamic_shapes=(axes,),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            return torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["lr"],
                output_names=["sr"],
                optimize=False,
                verbose=False,
            ).model
    finally:
        log.setLevel(level)


def _clean(model) -> None:
    """Constants folded, equal nodes merged, traces of the exporting machine removed.

    The exporter's own optimiser gives the same node count to within 1 %, in five times the time.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model, onnx_shape_inference=False)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        clean(model)


def _difference(net: EFRDN, data: bytes, size: Sequence[int]) -> float:
    """Largest absolute difference of ONNX Runtime from PyTorch on random pixels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, height, width, generator=generator)
    with torch.no_grad():
        expected = net.eval()(x)
    got = torch.from_numpy(session.run(["sr"], {"lr": x.numpy()})[0])
    if got.shape != expected.shape:
        raise RuntimeError(
            f"ONNX Runtime gives {list(got.shape)} for {list(x.shape)}, expected "
            f"{list(expected.shape)}"
        )
    return (got - expected).abs().max().item()
