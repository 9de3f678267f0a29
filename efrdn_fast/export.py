"""ONNX export of the reference network, with free batch, height and width.

What ONNX cannot say with free sizes is put in words that it can: patches are cut and put together
by grouped convolutions (few runtimes know Col2Im), attention is written in ONNX operators. Height
and width start at 15, where ESA's pooling window has its full size.
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

from . import __version__, reference
from .checkpoint import atomic_write
from .errors import UsageError
from .fast import EFRDNFast
from .model import EFRDN
from .transformer import TransformerBlock

__all__ = ["CHECKED_SIZES", "LEAST_OPSET", "LEAST_SIZE", "exportable", "least_size", "to_onnx"]

LEAST_SIZE = 15
LEAST_OPSET = 18
TRACED = (2, 9, 14)  # batch, and what height and width have more than the least
# Added to the smallest height and width. Tokens do not divide by four segments, and with ESA's
# pooling stride all remainders occur.
CHECKED_SIZES = ((1, 0, 0), (2, 4, 8), (1, 33, 22))
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
        UsageError: The opset is too old.
        ValueError: `net` is not float32 on the CPU.
        RuntimeError: ONNX Runtime does not agree with PyTorch.
    """
    if opset < LEAST_OPSET:
        raise UsageError(f"opset must be at least {LEAST_OPSET}, got {opset}")
    weight = net.head.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"export needs a float32 network on the CPU, got {weight.dtype} on {weight.device}"
        )
    _require("onnx", "onnxscript", "onnxruntime")
    net = copy.deepcopy(net).eval()
    least = least_size(net)
    model = _translate(exportable(net), opset, least)
    _clean(model)
    model.metadata_props.update(
        producer=f"efrdn_fast {__version__}",
        config=json.dumps(net.config.to_dict()),
        training=json.dumps(training or {}),
        scale=str(net.scale),
        input="lr: RGB, [N, 3, H, W], float32 in [0, 1]",
        output="sr: RGB, [N, 3, scale H, scale W], not clamped",
        least_height_and_width=str(least),
    )
    import onnx_ir

    data = onnx_ir.serde.serialize_model(model).SerializeToString()
    sizes = [(batch, least + height, least + width) for batch, height, width in CHECKED_SIZES]
    errors = [(size, _difference(net, data, size)) for size in sizes]
    size, worst = max(errors, key=lambda row: row[1])
    if not worst <= TOLERANCE:
        raise RuntimeError(f"ONNX Runtime differs from PyTorch by {worst:.2e} at {size}")
    atomic_write(Path(path), data)
    return errors


def exportable(net: EFRDN) -> EFRDN:
    """A copy of `net` that computes the same with exportable operations."""
    net = copy.deepcopy(net.to_reference() if isinstance(net, EFRDNFast) else net)
    segments, segment_tokens = net.config.segments, net.config.segment_tokens or 0
    net.set_attention(lambda qkv, heads, _: _attention(qkv, heads, segments, segment_tokens))
    for i, block in enumerate(net.trans):
        net.trans[i] = _ConvTransformer(block, net.config.channels)
    return net


def least_size(net: EFRDN) -> int:
    """Smallest height and width of the exported network: no segment may be empty."""
    return LEAST_SIZE if net.config.segment_tokens else max(LEAST_SIZE, net.config.segments)


class _ConvTransformer(nn.Module):
    """`TransformerBlock` whose unfold and fold are grouped convolutions with kernels of 0 and 1."""

    def __init__(self, block: TransformerBlock, channels: int):
        super().__init__()
        self.block, self.channels = block, channels
        taps = torch.eye(9).to(block.norm1.weight).view(9, 3, 3)
        self.register_buffer("unfold", taps[:, None].repeat(channels, 1, 1, 1))  # [9 C, 1, 3, 3]
        self.register_buffer("fold", taps.flip(1, 2)[None].repeat(channels, 1, 1, 1))  # [C, 9, ...]
        self.register_buffer("ones", torch.ones_like(taps[:1, None]))

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        t = F.conv2d(x, self.unfold, padding=1, groups=self.channels)  # [N, 9 C, H, W]
        t = t.flatten(2).transpose(1, 2)  # [N, H W, 9 C]
        t = t + block.emha(block.norm1(t))
        t = t + block.mlp(block.norm2(t))
        t = t.transpose(1, 2).unflatten(2, x.shape[2:])
        y = F.conv2d(t, self.fold, padding=1, groups=self.channels)
        if block.fold == "sum":
            return y
        return y / F.conv2d(torch.ones_like(x[:1, :1]), self.ones, padding=1)


# One node for the exporter; its symbolic shapes would else take most of the time of an export.
@torch.library.custom_op("efrdn_fast_export::emha", mutates_args=())
def _attention(qkv: Tensor, heads: int, segments: int, segment_tokens: int) -> Tensor:
    tokens = qkv.shape[1]
    return reference.emha(qkv, heads, segment_tokens or -(-tokens // segments))


@_attention.register_fake
def _(qkv: Tensor, heads: int, segments: int, segment_tokens: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def _onnx_attention(qkv, heads: int, segments: int, segment_tokens: int):
    """`_attention` in ONNX operators, one head (of one segment, when their count is fixed) a time.

    The runtime then holds the scores of that head: 0.8 GiB at 320x180 and four segments, not 6.
    """
    from onnxscript import opset18 as op

    def ints(*values: int):
        return op.Constant(value_ints=values)

    dim = qkv.shape[2] // (3 * heads)
    tokens = op.Shape(qkv, start=1, end=2)
    parts = op.Reshape(qkv, ints(0, 0, 3 * heads, dim))
    parts = op.Transpose(parts, perm=[2, 0, 1, 3])  # [3 heads, N, T, D]

    def attend(parts, rank: int, mask=None):
        """All heads of `parts` [3 heads, N, ..., L, D], one after the other."""
        swap = [*range(rank - 2), rank - 1, rank - 2]
        rows = []
        for head in range(heads):
            q, k, v = (op.Gather(parts, ints(head + i * heads), axis=0) for i in range(3))
            q = op.Mul(q, op.Constant(value_float=dim**-0.5))
            scores = op.MatMul(q, op.Transpose(k, perm=swap))
            scores = scores if mask is None else op.Add(scores, mask)
            rows.append(op.MatMul(op.Softmax(scores, axis=-1), v))
        return op.Concat(*rows, axis=0)

    if segment_tokens:  # as many segments as the image asks for, padded to one length and masked
        length = op.Min(ints(segment_tokens), tokens)
        count = op.Div(op.Sub(op.Add(tokens, length), ints(1)), length)
        total = op.Mul(count, length)
        beyond = op.Concat(ints(0), op.Sub(total, tokens), axis=0)
        parts = op.Pad(parts, beyond, None, ints(2), mode="constant")
        parts = op.Reshape(parts, op.Concat(ints(0, 0), count, length, ints(dim), axis=0))
        place = op.Range(op.Constant(value_int=0), op.Squeeze(total), op.Constant(value_int=1))
        hidden = op.Cast(op.GreaterOrEqual(place, tokens), to=1)  # 1: float32
        mask = op.Mul(hidden, op.Constant(value_float=MASKED))
        mask = op.Reshape(mask, op.Concat(count, ints(1), length, axis=0))
        out = op.Reshape(attend(parts, 5, mask), ints(0, 0, -1, dim))
        out = op.Slice(out, ints(0), tokens, ints(2))
    else:
        length = op.Div(op.Add(tokens, ints(segments - 1)), ints(segments))
        rows = []
        for i in range(segments):
            start, end = (op.Mul(length, ints(i + j)) for j in (0, 1))
            rows.append(attend(op.Slice(parts, start, end, ints(2)), 4))
        out = op.Concat(*rows, axis=2)
    out = op.Transpose(out, perm=[1, 2, 0, 3])  # [N, T, heads, D]
    return op.Reshape(out, ints(0, 0, heads * dim))


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"ONNX export needs {', '.join(missing)}: pip install 'efrdn_fast[export]'"
        )


def _translate(net: nn.Module, opset: int, least: int):
    """The dynamo exporter's model (onnx_ir), not optimised."""
    batch, height, width = TRACED
    axes = {0: torch.export.Dim("batch", min=1)}
    axes |= {i: torch.export.Dim(name, min=least) for i, name in ((2, "height"), (3, "width"))}
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
                (torch.rand(batch, 3, least + height, least + width),),
                dynamic_shapes=(axes,),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            return torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["lr"],
                output_names=["sr"],
                custom_translation_table={
                    torch.ops.efrdn_fast_export.emha.default: _onnx_attention
                },
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
        expected = net(x)
    got = torch.from_numpy(session.run(["sr"], {"lr": x.numpy()})[0])
    if got.shape != expected.shape:
        raise RuntimeError(
            f"ONNX Runtime gives {list(got.shape)} for {list(x.shape)}, expected "
            f"{list(expected.shape)}"
        )
    return (got - expected).abs().max().item()
