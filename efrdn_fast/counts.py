"""Parameters and multiply-adds of a network, counted by running it on the meta device.

Published convention: convolutions only, weight elements x output height x output width of every
call. True count: linear layers and attention too. Biases, norms and activations count nowhere,
but the exponentials of softmax, which bound attention, and the elements that a block must move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .blocks import BatchNorm
from .config import EFRDNConfig
from .model import EFRDN
from .transformer import EMHA, TransformerBlock

__all__ = ["LR_SIZES", "Cost", "count", "count_parameters"]

# Width x height of the LR image whose result is 1280 x 720 (x3: 1278 x 720).
LR_SIZES = {2: (640, 360), 3: (426, 240), 4: (320, 180)}


@dataclass
class Cost:
    """A part of the network: its own name, what it costs, the parts inside it."""

    name: str
    """Attribute name, with its place in a list of modules: "fflb.0"."""
    kind: str
    """Class name of the module, such as "FFLB"."""
    parameters: int = 0
    conv: int = 0
    """Multiply-adds of convolutions: the published convention."""
    linear: int = 0
    """Multiply-adds of linear layers."""
    attention: int = 0
    """Multiply-adds of q k^T and of attention x v."""
    exps: int = 0
    """Exponentials of softmax."""
    moved: int = 0
    """Elements read and written at least where the part itself is one kernel: inputs, outputs,
    parameters. Not a sum over the parts. An EMHA: its attention alone, qkv in and result out; a
    transformer block: four kernels, attention one of them (`_transformer_moves`)."""
    calls: int = 0
    parts: list[Cost] = field(default_factory=list)

    @property
    def total(self) -> int:
        """True multiply-adds: convolutions, linear layers and attention."""
        return self.conv + self.linear + self.attention


def count_parameters(net: nn.Module) -> int:
    """Number of parameters; buffers (running statistics) are not counted."""
    return sum(parameter.numel() for parameter in net.parameters())


def count(config: EFRDNConfig, width: int | None = None, height: int | None = None) -> Cost:
    """Cost of one forward pass of the reference network on one LR image, as a tree of parts.

    Args:
        config: Constructor's arguments of the network.
        width: LR width in pixels. Default: of the LR image that gives 1280x720.
        height: LR height in pixels.

    Raises:
        ValueError: The image is smaller than the network takes.
    """
    default_width, default_height = LR_SIZES[config.scale]
    width, height = width or default_width, height or default_height
    with torch.device("meta"):
        net = EFRDN(**config.to_dict()).eval()
        image = torch.empty(1, 3, height, width)
    net.set_attention(_attention_shape)
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.forward = _unchanged  # half of the time of a forward pass on the meta device
    own: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_hook(_recorder(own.setdefault(name, [0] * 6)))
        for name, module in net.named_modules()
    ]
    try:
        with torch.no_grad():
            net(image)
    finally:
        for hook in hooks:
            hook.remove()
    return _tree("", "EFRDN", net, own)


def _attention_shape(qkv: Tensor, heads: int, segment_tokens: int) -> Tensor:
    """Stands for `reference.emha`: only the shape of its result matters here."""
    return qkv.narrow(2, 0, qkv.shape[2] // 3)


def _unchanged(x: Tensor, use: int = 0) -> Tensor:
    return x


def _recorder(entry: list[int]):
    def record(module: nn.Module, args: tuple, out: Tensor) -> None:
        entry[0] += 1
        if isinstance(module, nn.Conv2d):
            entry[1] += module.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3]
        elif isinstance(module, nn.Linear):
            entry[2] += module.weight.numel() * (out.numel() // module.out_features)
        elif isinstance(module, EMHA):
            batch, tokens, _ = args[0].shape
            length = min(module.segment_length(tokens), tokens)
            whole, rest = divmod(tokens, length)
            squares = batch * (whole * length**2 + rest**2)
            entry[3] += 2 * module.proj.in_features * squares
            entry[4] += module.heads * squares
            entry[5] += 4 * module.proj.in_features * batch * tokens
            return
        if isinstance(module, TransformerBlock):
            entry[5] += _transformer_moves(module, out)
        else:
            maps = [out, *(arg for arg in args if isinstance(arg, Tensor))]
            entry[5] += sum(map(Tensor.numel, maps)) + count_parameters(module)

    return record


def _transformer_moves(block: TransformerBlock, out: Tensor) -> int:
    """Elements that four kernels move: x -> qkv -> attention a; x, a -> hidden h; x, a, h -> y."""
    n, channels, height, width = out.shape
    inner, hidden = block.emha.proj.in_features, block.mlp.fc2.in_features
    of_a_pixel = (channels + 3 * inner) + 4 * inner + (channels + inner + hidden)
    of_a_pixel += 2 * channels + inner + hidden
    return n * height * width * of_a_pixel + count_parameters(block)


def _tree(prefix: str, name: str, module: nn.Module, own: dict[str, list[int]]) -> Cost:
    calls, conv, linear, attention, exps, moved = own[prefix]
    # Parameters held by the part itself, not by a part inside it.
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    kind = type(module).__name__
    cost = Cost(name, kind, parameters, conv, linear, attention, exps, moved, calls)
    for key, child in _children(module):
        part = _tree(f"{prefix}.{key}".lstrip("."), key, child, own)
        cost.parts.append(part)
        cost.parameters += part.parameters
        cost.conv += part.conv
        cost.linear += part.linear
        cost.attention += part.attention
        cost.exps += part.exps
    return cost


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{key}.{i}", member) for i, member in enumerate(child))
        else:
            yield key, child
