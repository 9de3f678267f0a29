"""A network over an image of any size: tiles, precision, and what to do when memory runs out.

Input and output stay on the host, only tiles travel to the device. EFRDN has global parts (pooled
channel statistics, attention over the whole image), so tiles change its result a little.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import exact as whole_image
from .device import PRECISIONS, free_memory, is_out_of_memory, precision
from .errors import UsageError

__all__ = ["OVERLAP", "Outcome", "bands", "check_tiles", "run", "tiled"]

OVERLAP = 16
"""LR pixels that neighbouring tiles share by default; no more than a quarter of a tile.

With 0, 8, 16 and 24 of them tiles of 64 agree with the whole image to 50.6, 53.4, 54.2 and 54.2 dB
(x4, three images of BSD100); with 16 the PSNR against the original is the same within 0.02 dB.
"""
AUTO_TILE = 256
"""Largest tile that is chosen without being asked for: the attention is quadratic in its area."""
LEAST_AUTO_TILE = 32
BYTES_PER_PIXEL = 10_000
"""Working memory per LR pixel of EFRDN with 32 channels; measured 8,300 to 9,200 (x2, x4, CPU)."""
SLOW_PIXELS = {"cpu": 512 * 512, "cuda": 2048 * 2048}

Progress = Callable[[int, int], None]  # tiles done, tiles in all
Emit = Callable[[int, Tensor], None]  # first row of the output, rows [N, 3, h, W]


@dataclass(frozen=True)
class Outcome:
    """How an image was computed in the end."""

    tile: int
    """Edge of the tiles in LR pixels, 0 for the whole image at once; rows of a band if exact."""
    dtype: str
    """Precision that gave finite numbers: fp32, tf32, fp16 or bf16."""
    exact: bool = False
    """Whether the parts agree with the whole image, see `exact.bands`."""


def tiled(
    net: nn.Module,
    x: Tensor,
    tile: int,
    overlap: int | None = None,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """`net(x)` tile by tile, neighbours blended linearly over their overlap.

    Args:
        net: Maps [N, 3, h, w] in [0, 1] to [N, 3, s h, s w] for an integer s.
        x: `[N, C, H, W]` on the host, C = 1 or 3; floating in [0, 1], uint8 or uint16.
        tile: Edge of a tile in LR pixels, overlap included, at least 3; 0 for no tiles.
        overlap: LR pixels that neighbours share at least, at most tile / 2. Default: `OVERLAP`.
        device: Where `net` is and computes. Default: the CPU.
        progress: Called with (tiles done, tiles in all).

    Returns:
        `[N, 3, s H, s W]`, floating, on the host, not clamped.

    Raises:
        ValueError: A tile or overlap out of range.
        FloatingPointError: The network's output is not finite.
    """
    device = device or torch.device("cpu")
    with torch.inference_mode():
        return torch.cat(
            [band.clone() for _, band in bands(net, x, tile, overlap, device, progress)], dim=2
        )


def run(
    net: nn.Module,
    x: Tensor,
    emit: Emit,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    device: torch.device,
    dtype: str = "auto",
    exact: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """`tiled`, handing finished rows to `emit` in order, with a second try where one can help.

    With `tile=None` the whole image is computed at once if memory allows, else in tiles, halved
    until they fit. Half precision whose output is not finite is repeated in bf16, then fp32. Every
    such change is one warning; a new try emits from row 0 again. With `exact` the image is computed
    in bands of `tile` rows whose numbers are those of the whole image.

    Raises:
        MemoryError: Even the smallest tile, or the one asked for, does not fit.
        ValueError: The output is not finite in fp32 or tf32; a tile, overlap or dtype out of range.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}; got {dtype!r}")
    height, width = x.shape[2:]
    sizes = (_exact_rows if exact else _tile_sizes)(net, x, tile, device)
    precisions = list(PRECISIONS[dtype])
    if sizes[0] == 0 or exact:
        _warn_when_slow(net, height, width, device)
    while True:
        shared = overlap
        if tile is None and overlap is not None:
            shared = min(overlap, (sizes[0] or max(height, width)) // 2)
        try:
            with torch.inference_mode(), precision(device, precisions[0]):
                parts = (
                    whole_image.bands(net, x, sizes[0], device, progress)
                    if exact
                    else bands(net, x, sizes[0], shared, device, progress)
                )
                for top, band in parts:
                    emit(top, band)
            break
        except FloatingPointError as error:
            if len(precisions) == 1:
                raise ValueError(f"{error} in {precisions[0]}: are the weights damaged?") from None
            del precisions[0]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(sizes) == 1:
                what = (
                    f"tiles of {sizes[0]} px" if sizes[0] else f"{width}x{height} px in one piece"
                )
                raise MemoryError(
                    f"{what} do not fit on {device}; use smaller tiles (--tile) or --device cpu"
                ) from error
            del sizes[0]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if precisions[0] != PRECISIONS[dtype][0]:
        warnings.warn(f"{dtype} overflowed on this image; it was computed in {precisions[0]}")
    if tile is None and sizes[0] and not exact:
        warnings.warn(
            f"{width}x{height} px do not fit on {device} in one piece: upscaled in tiles of "
            f"{sizes[0]} px, which differ a little; --tile chooses their size"
        )
    return Outcome(sizes[0], precisions[0], exact)


def check_tiles(tile: int, overlap: int) -> None:
    """Refuse tiles that are too small, or whose neighbours share too much.

    Raises:
        UsageError: They are.
    """
    if tile < 3:
        raise UsageError(f"tile must be at least 3 px (or 0 for none), got {tile}")
    if not 0 <= overlap <= tile // 2:
        raise UsageError(
            f"overlap must be within 0..{tile // 2} for tiles of {tile}, got {overlap}"
        )


def bands(
    net: nn.Module,
    x: Tensor,
    tile: int,
    overlap: int | None,
    device: torch.device,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Rows of `tiled` as soon as they are final: (first row, `[N, 3, h, s W]` on the host).

    A band is overwritten when the next one is asked for. Only one row of tiles is held at a time.
    """
    height, width = x.shape[2:]
    tile = tile or max(height, width)
    overlap = min(OVERLAP, tile // 4) if overlap is None else overlap
    check_tiles(tile, overlap)
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    tile_height, tile_width = min(tile, height), min(tile, width)
    count = len(tops) * len(lefts)
    rows = None  # rows of the output that are not final yet
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            y = _forward(net, x[:, :, top : top + tile_height, left : left + tile_width], device)
            if count == 1:
                yield 0, y
            elif rows is None:
                scale = y.shape[3] // tile_width
                down = _weights(tops, tile_height, height, overlap, scale)
                across = _weights(lefts, tile_width, width, overlap, scale)
                rows = y.new_zeros(*y.shape[:3], width * scale)
            if count > 1:
                span = slice(left * scale, (left + tile_width) * scale)
                rows[..., span] += y * (down[i][:, None] * across[j])
            if progress:
                progress(i * len(lefts) + j + 1, count)
        if count > 1:
            final = (tops[i + 1] - top if i + 1 < len(tops) else tile_height) * scale
            yield top * scale, rows[:, :, :final]
            rows = torch.cat((rows[:, :, final:], torch.zeros_like(rows[:, :, :final])), dim=2)


def _forward(net: nn.Module, x: Tensor, device: torch.device) -> Tensor:
    """`net` on one tile: host to device, scaled to [0, 1], three channels, and back to the host."""
    own = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    peak = {torch.uint8: 255, torch.uint16: 65535}.get(x.dtype, 1)
    y = x.to(device).to(own)
    y = net((y / peak if peak > 1 else y).expand(-1, 3, -1, -1))
    if (
        y.dim() != 4
        or y.shape[3] % x.shape[3]
        or y.shape[3] * x.shape[2] != y.shape[2] * x.shape[3]
    ):
        raise ValueError(f"the network made {list(y.shape)} of {list(x.shape)}, no integer scale")
    if not y.isfinite().all():
        raise FloatingPointError("the network's output is not finite")
    return y.to("cpu", torch.promote_types(own, torch.float32))


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of equal tiles, spread evenly, that share at least `overlap`."""
    if tile >= length:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _weights(starts: list[int], tile: int, length: int, overlap: int, scale: int) -> list[Tensor]:
    """Share of every tile in the output along one axis, `[tile * scale]`; they add up to 1."""
    ramp = max(1, overlap * scale)
    position = torch.arange(tile * scale) + 0.5
    total = torch.zeros(length * scale)
    shares = []
    for start in starts:
        share = torch.ones(tile * scale)
        if start > 0:
            share = torch.minimum(share, position / ramp)
        if start + tile < length:
            share = torch.minimum(share, (tile * scale - position) / ramp)
        total[start * scale : (start + tile) * scale] += share
        shares.append(share)
    return [
        share / total[start * scale : (start + tile) * scale]
        for start, share in zip(starts, shares, strict=True)
    ]


def _tile_sizes(net: nn.Module, x: Tensor, tile: int | None, device: torch.device) -> list[int]:
    """Tile edges to try, best first; 0 is the whole image."""
    if tile is not None:
        return [tile]
    height, width = x.shape[2:]
    channels = getattr(getattr(net, "config", None), "channels", 32)
    pixel_bytes = BYTES_PER_PIXEL * x.shape[0] * channels / 32
    free = free_memory(device)
    edges = [max(height, width)]
    edge = min(AUTO_TILE, (edges[0] + 1) // 2)
    while edge >= LEAST_AUTO_TILE:
        edges.append(edge)
        edge //= 2
    fitting = [
        edge
        for edge in edges
        if free is None or min(edge, height) * min(edge, width) * pixel_bytes < free
    ]
    return [0 if edge == edges[0] else edge for edge in fitting or edges[-1:]]


def _exact_rows(net: nn.Module, x: Tensor, tile: int | None, device: torch.device) -> list[int]:
    """Rows of the bands of the exact mode to try, best first."""
    whole_image.check(net, x, free_memory(device))
    if tile:
        return [tile]
    rows = whole_image.band_rows(net, x.shape[3])
    return [rows >> i for i in range(rows.bit_length()) if rows >> i >= 8]


def _warn_when_slow(net: nn.Module, height: int, width: int, device: torch.device) -> None:
    quadratic = getattr(getattr(net, "config", None), "segment_tokens", 0) is None
    if quadratic and height * width > SLOW_PIXELS.get(device.type, SLOW_PIXELS["cuda"]):
        warnings.warn(
            f"{width}x{height} px in one piece take long on {device.type}: the time of the "
            f"attention grows with the square of the area (tiles are faster: --tile {AUTO_TILE})"
        )
