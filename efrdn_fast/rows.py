"""Feature maps too large for memory: kept in a temporary file, computed band by band of rows.

A pass reads bands of its inputs with a halo of rows around them, so that what it computes inside
the band is what the whole map would give; sums over the whole map are gathered on the way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Image", "Moments", "Rows", "Stream", "resized_rows"]


class Rows:
    """Map `[N, C, H, W]` in an unnamed temporary file, which goes with it.

    The file lies where `tempfile` puts it (TMPDIR); it is read and written, not mapped, so that its
    pages do not count as memory of the process.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype):
        self.count, self.channels, self.height, self.width = shape
        self.dtype = dtype
        self.row_bytes = self.count * self.channels * self.width * dtype.itemsize
        self._file = tempfile.TemporaryFile(prefix="efrdn_", buffering=0)  # noqa: SIM115

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows `top` to `bottom`, `[N, C, bottom - top, W]`."""
        rows = torch.empty(bottom - top, self.count, self.channels, self.width, dtype=self.dtype)
        view = memoryview(rows.numpy()).cast("B")
        self._file.seek(top * self.row_bytes)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise OSError(f"rows {top} to {bottom} were not written before they are read")
            done += got
        return rows.permute(1, 2, 0, 3)

    def write(self, top: int, x: Tensor) -> None:
        """Store `x` `[N, C, h, W]` from row `top` on.

        Raises:
            OSError: The disk is full; the message names the folder.
        """
        rows = x.permute(2, 0, 1, 3).to("cpu", self.dtype).contiguous()
        view = memoryview(rows.numpy()).cast("B")
        self._file.seek(top * self.row_bytes)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            raise OSError(
                error.errno,
                f"features between passes cannot be kept in {tempfile.gettempdir()}: "
                f"{error.strerror}; set TMPDIR to a folder with more space",
            ) from error


class Image:
    """The network's input on the host, `[N, 1 or 3, H, W]`, in bands like `Rows`."""

    def __init__(self, x: Tensor, dtype: torch.dtype):
        self.x, self.dtype = x, dtype
        self.peak = {torch.uint8: 255, torch.uint16: 65535}.get(x.dtype, 1)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows in [0, 1], `[N, 3, bottom - top, W]`."""
        rows = self.x[:, :, top:bottom].to(self.dtype)
        return (rows / self.peak if self.peak > 1 else rows).expand(-1, 3, -1, -1)


class Moments:
    """Mean and deviation of every channel over a whole map, from sums in float64."""

    def __init__(self) -> None:
        self.pixels = 0
        self.sums: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add the rows `x` `[N, C, h, W]`."""
        wide = x.double()
        sums = torch.stack((wide.sum(dim=(2, 3)), wide.square().sum(dim=(2, 3))))
        self.sums = sums if self.sums is None else self.sums + sums
        self.pixels += x.shape[2] * x.shape[3]

    def mean(self, dtype: torch.dtype) -> Tensor:
        """`[N, C, 1, 1]`."""
        return (self.sums[0] / self.pixels)[..., None, None].to(dtype)

    def std(self, dtype: torch.dtype) -> Tensor:
        """`sqrt(variance + 1e-6)` as in CC, `[N, C, 1, 1]`."""
        mean, square = self.sums / self.pixels
        variance = (square - mean.square()).clamp_min(0)
        return (variance + 1e-6).sqrt()[..., None, None].to(dtype)


class Stream:
    """Passes over maps of one size, in bands of `rows` rows, computed on `device`."""

    def __init__(self, count: int, height: int, width: int, rows: int, dtype, device):
        self.count, self.height, self.width, self.rows = count, height, width, rows
        self.dtype, self.device = dtype, device
        self.on_pass: Callable[[], None] = lambda: None

    def new(self, channels: int) -> Rows:
        """A map that is still to be written."""
        return Rows((self.count, channels, self.height, self.width), self.dtype)

    def bands(
        self, function: Callable, sources: Sequence[Rows | Image], halo: int | tuple[int, int]
    ) -> Iterator[tuple[int, int, int, tuple[Tensor, ...]]]:
        """(top, bottom, first row of the results, results), results with their halo.

        `function` gets the rows of all `sources` with up to `halo` more above and below (or as many
        as its two numbers say), fewer at the borders of the map, where zero padding is right.
        """
        above, below = halo if isinstance(halo, tuple) else (halo, halo)
        for top in range(0, self.height, self.rows):
            bottom = min(top + self.rows, self.height)
            low, high = max(0, top - above), min(self.height, bottom + below)
            results = function(*(s.read(low, high).to(self.device) for s in sources))
            yield top, bottom, low, results if isinstance(results, tuple) else (results,)
        self.on_pass()

    def run(
        self,
        function: Callable,
        sources: Sequence[Rows | Image],
        halo: int | tuple[int, int],
        targets: Sequence[Rows | Moments | None],
        also: Callable[[int, int, int, Tensor], None] | None = None,
    ) -> None:
        """One pass: each result of `function` goes into its target, to be stored or summed up.

        A source may be a target where the halo is 0. `also` gets (top, bottom, first row, first
        result with its halo).
        """
        for top, bottom, low, results in self.bands(function, sources, halo):
            for target, result in zip(targets, results, strict=True):
                inner = result[:, :, top - low : bottom - low]
                if isinstance(target, Rows):
                    target.write(top, inner)
                elif target is not None:
                    target.add(inner)
            if also:
                also(top, bottom, low, results[0])


def resized_rows(b: Tensor, height: int, width: int, top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of `b` `[N, C, h, w]` resized bilinearly to `height` x `width`.

    The arithmetic of `F.interpolate(align_corners=False)`, in its precision.
    """
    real = torch.float64 if b.dtype == torch.float64 else torch.float32
    scale = torch.tensor(b.shape[2], dtype=real) / height
    position = (torch.arange(top, bottom, dtype=real) + 0.5) * scale - 0.5
    position = position.clamp_min(0)
    first = position.long()
    share = (position - first).to(b)[:, None]
    last = (first + 1).clamp_max(b.shape[2] - 1)
    rows = b[:, :, first.to(b.device)] * (1 - share) + b[:, :, last.to(b.device)] * share
    size = (bottom - top, width)
    return F.interpolate(rows, size=size, mode="bilinear", align_corners=False)
