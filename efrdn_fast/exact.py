"""EFRDN over an image of any size with the numbers of the whole image, in bounded memory.

Tiles change the result of EFRDN, for CC and SCCA pool over the whole image and attention segments
run over it. Every one of these depends on those before it, so no single pass can gather them for
all: here the network runs pass by pass over bands of rows. A pass ends where a value of the whole
map is needed (mean and deviation of CC, the mean of SCCA, the pooled map of ESA); the features
between passes lie in temporary files (`rows.Rows`). Attention goes by whole segments of tokens, in
bands that hold at least one.

Costs: 101 passes for the full network, which read and write about 35 KB per LR pixel, and up to
nine maps of C channels on the disk (1.2 KB per LR pixel; C = 32, float32). The arithmetic is that
of the whole image, apart from halos of at most 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .blocks import ACDM, CC, EFFB, ESA, FFLB, SCCA, interleave
from .model import EFRDN
from .rows import Image, Moments, Rows, Stream, resized_rows
from .transformer import TransformerBlock

__all__ = ["band_rows", "bands", "check"]

BAND_BYTES = 512 << 20
"""Working memory of a band; the pass with the most needs `PASS_BYTES` per pixel and 32 channels."""
PASS_BYTES = 5_200
TOKEN_BYTES = 12_000
"""Working memory per token of the transformer blocks, per 32 channels."""
POOL_HALO = (1, 15)  # GCRB 1 each way; a cell of ESA's pooled map has 14 rows below its first


def band_rows(net: EFRDN, width: int) -> int:
    """Rows of a band by default: those that fit `BAND_BYTES`, 16 to 256."""
    pixel_bytes = PASS_BYTES * net.config.channels / 32
    return int(min(256, max(16, BAND_BYTES / (pixel_bytes * width) - sum(POOL_HALO))))


def check(net: nn.Module, x: Tensor, free: int | None) -> None:
    """Raise ValueError unless `net` can be run here, MemoryError if one segment takes over `free`.

    `free` is in bytes, or None where nobody knows.
    """
    if not isinstance(net, EFRDN) or net.config.module != "acdm":
        raise ValueError(
            "exact tiles know the passes of EFRDN with module='acdm', got "
            f"{type(net).__name__}: leave out --exact"
        )
    tokens = x.shape[2] * x.shape[3]
    length = min(tokens, net.trans[0].emha.segment_length(tokens))
    need = length * x.shape[0] * TOKEN_BYTES * net.config.channels // 32
    if free is not None and need > free:
        raise MemoryError(
            f"one attention segment of {length} tokens needs {need / 2**30:.1f} GiB; "
            "set a fixed length (--segment-tokens 4096), which changes the picture a little"
        )


def bands(
    net: EFRDN,
    x: Tensor,
    rows: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Rows of `net(x)`, as `inference.bands` gives them: (first row, `[N, 3, h, s W]` on the host).

    Args:
        net: In evaluation mode, with `module="acdm"`.
        x: `[N, 1 or 3, H, W]` on the host, H, W >= 3; floating in [0, 1], uint8 or uint16.
        rows: Rows of a band.

    Raises:
        ValueError: Another network.
        OSError: No space for the temporary files.
        FloatingPointError: The output is not finite.
    """
    check(net, x, None)
    if rows < 1:
        raise ValueError(f"exact: bands must have at least 1 row, got {rows}")
    own = next(net.parameters()).dtype
    stream = Stream(x.shape[0], *x.shape[2:], rows, torch.promote_types(own, torch.float32), device)
    if progress:
        stream.on_pass = _counter(progress, _passes(net))
    for top, bottom, low, (y,) in _network(stream, net, Image(x, own)):
        scale = net.scale
        y = y[:, :, (top - low) * scale : (bottom - low) * scale]
        if not y.isfinite().all():
            raise FloatingPointError("the network's output is not finite")
        yield top * scale, y.to("cpu", stream.dtype)


def _network(stream: Stream, net: EFRDN, image: Image) -> Iterator:
    """`EFRDN.forward` in passes; the bands of the last one."""
    channels = net.config.channels
    shallow = stream.new(channels)
    stream.run(net.head, [image], 1, [shallow])
    features = total = shallow
    for i, gconv in enumerate(net.gconv):
        use, which = divmod(i, len(net.acdm))
        body = _acdm(stream, net.acdm[which], features, use)
        features, before, total = stream.new(channels), total, stream.new(channels)
        stream.run(
            lambda b, t, g=gconv: _gconv(g, b, t, net.cnn_dense),
            [body, before],
            1,
            [features, total],
        )
    if net.cnn_dense:
        c_out = total
    else:
        c_out = stream.new(channels)
        stream.run(torch.add, [features, shallow], 0, [c_out])
    folded = _transformer(stream, net.trans[0], c_out)
    t_add1 = stream.new(channels)
    if net.transformer_dense:
        stream.run(lambda f, c: net.tconv[0](f) + c, [folded, c_out], 1, [t_add1])
    else:
        stream.run(net.tconv[0], [folded], 1, [t_add1])
    folded = _transformer(stream, net.trans[1], t_add1)

    def tail(f: Tensor, s: Tensor, t: Tensor) -> Tensor:
        t_add2 = net.tconv[1](f) + s
        t_add2 = t_add2 + t if net.transformer_dense else t_add2
        return net.reconstruct_deep(t_add2) + net.reconstruct_shallow(s)

    return stream.bands(tail, [folded, shallow, t_add1], 3)


def _gconv(gconv: nn.Module, body: Tensor, total: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    features = gconv(body + total if dense else body)
    return features, total + features


def _acdm(stream: Stream, block: ACDM, x: Rows, use: int) -> Rows:
    t, kept = x, []
    for refine, acrb, fflb in zip(block.refine, block.acrb, block.fflb, strict=True):
        kept.append(stream.new(block.widths[1]))
        e = stream.new(x.channels)

        def cut(t: Tensor, refine=refine, acrb=acrb) -> tuple[Tensor, Tensor]:
            remain, distill = t.split(block.widths, dim=1)
            return acrb(distill, use), refine(remain)

        stream.run(cut, [t], 1, [kept[-1], e])
        t = _fflb(stream, fflb, e, use) if isinstance(fflb, FFLB) else e

    def fuse(t: Tensor, *parts: Tensor) -> Tensor:
        return block.fuse(torch.cat((*parts, block.conv4(t)), dim=1))

    y = stream.new(x.channels)
    if isinstance(block.mscc, nn.Identity):
        stream.run(lambda x, *parts: fuse(*parts) + x, [x, t, *kept], 2, [y])
        return y
    scsa, scca = block.mscc.scsa, block.mscc.scca
    return _scca(stream, scca, lambda *parts: scsa(fuse(*parts)), [t, *kept], 6, x)


def _fflb(stream: Stream, block: FFLB, e: Rows, use: int) -> Rows:
    """Eqs. 10-16; a pass ends at each pooled map and at each CC."""
    low, of_e, of_low = stream.new(e.channels), Moments(), Moments()
    pooled = _Pooled(stream, block.esa1)
    stream.run(lambda e: (block.gcrb1(e, use), e), [e], POOL_HALO, [low, of_e], pooled.gather)
    _esa(stream, pooled, low, of_low)
    gate_a1, gate_b1 = _gate(block.cc_a1, of_e, stream), _gate(block.cc_b1, of_low, stream)
    up, of_lower, of_up = stream.new(e.channels), Moments(), Moments()
    pooled = _Pooled(stream, block.esa2)

    def second(e: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        return block.gcrb2(e + low * gate_b1, use), low + e * gate_a1  # (11), (12)

    stream.run(second, [e, low], POOL_HALO, [up, of_lower], pooled.gather)
    _esa(stream, pooled, up, of_up)
    gate_a2, gate_b2 = _gate(block.cc_a2, of_up, stream), _gate(block.cc_b2, of_lower, stream)

    def mixed(e: Tensor, low: Tensor, up: Tensor) -> Tensor:
        lower1 = low + e * gate_a1
        upper2, lower2 = up + lower1 * gate_b2, lower1 + up * gate_a2  # (14), (15)
        return block.branch_weight[0] * upper2 + block.branch_weight[1] * lower2

    if not isinstance(block.effb, EFFB):
        out = stream.new(e.channels)
        stream.run(lambda e, low, up: e + mixed(e, low, up), [e, low, up], 0, [out])
        return out
    effb = block.effb

    def fused(*parts: Tensor) -> Tensor:
        g1 = effb.gcrb1(mixed(*parts), use)
        g2 = effb.gcrb2(g1, use)
        m = effb.scsa(effb.fuse12(interleave(g1, g2)))
        return effb.fuse3(m + effb.gcrb3(g2, use))

    return _scca(stream, effb.scca, fused, [e, low, up], 8, e)


class _Pooled:
    """The pooled map of an ESA, gathered row by row of cells; a cell covers up to 15 rows."""

    def __init__(self, stream: Stream, esa: ESA):
        self.esa, self.stream, self.cells = esa, stream, []
        down = [(edge - 3) // 2 + 1 for edge in (stream.height, stream.width)]
        self.kernel = min(7, *down)
        self.count = (down[0] - self.kernel) // 3 + 1

    def gather(self, top: int, bottom: int, low: int, x: Tensor) -> None:
        """Cells that begin in the rows `top` to `bottom`; `x` begins at row `low`."""
        first, end = -(-top // 6), min(-(-bottom // 6), self.count)
        if first < end:
            rows = x[:, :, 6 * first - low : 6 * (end - 1) + 2 * self.kernel + 1 - low]
            down = self.esa.down(self.esa.reduce(rows))
            self.cells.append(F.max_pool2d(down, self.kernel, stride=3))

    def apply(self, top: int, x: Tensor, deep: Tensor) -> Tensor:
        """ESA of the rows `x` that begin at `top`, given its map after the deep convolutions."""
        esa, stream = self.esa, self.stream
        b = resized_rows(deep, stream.height, stream.width, top, top + x.shape[2])
        return x * torch.sigmoid(esa.expand(b + esa.skip(esa.reduce(x))))

    def deep(self) -> Tensor:
        """The whole map after the three convolutions, `[N, C/4, h, w]`."""
        esa = self.esa
        b = F.relu(esa.deep1(torch.cat(self.cells, dim=2)))
        return esa.deep3(F.relu(esa.deep2(b)))


def _esa(stream: Stream, pooled: _Pooled, x: Rows, moments: Moments) -> None:
    """`x` becomes the output of ESA, of which `moments` are taken."""
    deep = pooled.deep()
    for top, _, _, (rows,) in stream.bands(lambda rows: rows, [x], 0):
        y = pooled.apply(top, rows, deep)
        x.write(top, y)
        moments.add(y)


def _gate(calibration: nn.Module, moments: Moments, stream: Stream) -> Tensor | float:
    """What CC multiplies its input by, `[N, C, 1, 1]`; 1 where CC is removed."""
    if not isinstance(calibration, CC):
        return 1.0
    mean, std = moments.mean(stream.dtype), moments.std(stream.dtype)
    return (calibration.gate(mean) + calibration.gate(std)) / 2


def _scca(
    stream: Stream, block: SCCA, function: Callable, sources: list[Rows], halo: int, skip: Rows
) -> Rows:
    """`SCCA(function(sources)) + skip`, `function` being local with the given halo."""
    z, pooled = stream.new(skip.channels), Moments()

    def first(*parts: Tensor) -> tuple[Tensor, Tensor]:
        z = function(*parts)
        return z, block.split(z).chunk(2, dim=1)[0]

    stream.run(first, sources, halo, [z, pooled])
    attention = block.attention
    gate = attention.excite(F.relu(attention.squeeze(pooled.mean(stream.dtype)))).sigmoid()

    def second(z: Tensor, skip: Tensor) -> Tensor:
        left, right = block.split(z).chunk(2, dim=1)
        mixed = interleave(left * gate, F.relu(block.context(right)))
        return z + block.merge(mixed) + skip

    out = stream.new(skip.channels)
    stream.run(second, [z, skip], 2, [out])
    return out


def _transformer(stream: Stream, block: TransformerBlock, x: Rows) -> Rows:
    """The block over runs of whole segments; their patches are folded where they meet."""
    height, width = stream.height, stream.width
    tokens, emha = height * width, block.emha
    length = emha.segment_length(tokens)
    wanted = stream.rows * width * PASS_BYTES // TOKEN_BYTES
    step = length * max(1, wanted // length)
    out = stream.new(x.channels)
    carry = None  # sums of rows that later tokens still add to, from row `done` on
    done = 0
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        low, high = max(0, begin // width - 1), min(height, (end - 1) // width + 2)
        t = reference.unfold(x.read(low, high).to(stream.device))
        t = t[:, begin - low * width : end - low * width]
        qkv = emha.qkv(emha.reduce(block.norm1(t)))
        t = t + emha.proj(emha.attention(qkv, emha.heads, length))
        t = t + block.mlp(block.norm2(t))
        pads = (0, 0, begin - low * width, high * width - end)
        sums = reference.fold(F.pad(t, pads), (high - low, width))
        if carry is not None:
            sums[:, :, done - low : done - low + carry.shape[2]] += carry
        final = height if end == tokens else max(done, end // width - 1)
        if final > done:
            y = sums[:, :, done - low : final - low]
            out.write(done, y / _cover(done, final, stream) if block.fold == "mean" else y)
        carry, done = sums[:, :, final - low :], final
    stream.on_pass()
    return out


def _cover(top: int, bottom: int, stream: Stream) -> Tensor:
    """How many patches cover each pixel of the rows, `[1, 1, bottom - top, W]`."""
    sides = []
    for first, last, length in ((top, bottom, stream.height), (0, stream.width, stream.width)):
        position = torch.arange(first, last, device=stream.device)
        sides.append(
            3 - (position == 0).to(stream.dtype) - (position == length - 1).to(stream.dtype)
        )
    return (sides[0][:, None] * sides[1])[None, None]


def _passes(net: EFRDN) -> int:
    """Passes over the image, for progress."""
    block = net.acdm[0]
    lattice = [f for f in block.fflb if isinstance(f, FFLB)]
    inside = sum(6 if isinstance(f.effb, EFFB) else 5 for f in lattice)
    mixing = 1 if isinstance(block.mscc, nn.Identity) else 2
    steps = len(net.gconv) * (len(block.fflb) + inside + mixing + 1)
    return 1 + steps + (not net.cnn_dense) + 2 + 1 + 1


def _counter(progress: Callable[[int, int], None], total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return count
