"""Figures for papers, drawn by Matplotlib: comparison strips, features, error maps, scatter plots.

Every function returns a Matplotlib figure; `save` writes it as PNG and SVG. Pictures are shown
pixel by pixel, never smoothed.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import benchmarks, images, metrics
from .checkpoint import atomic_write
from .errors import UsageError
from .model import EFRDN
from .resize import imresize

__all__ = ["errors", "features", "pictures", "read_points", "save", "scatter", "stages", "strip"]

Box = tuple[int, int, int, int]  # left, top, width, height in HR pixels
MARK = "#e8112d"
OURS = "EFRDN (ours)"
LABELS = {
    "multi_adds_g": "Multi-Adds (G)",
    "params_k": "parameters (K)",
    "ms": "time (ms)",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
}
"""Keys of measured JSON -> words on an axis; others stand as they are."""
STAGES = ("after the CNN", "after transformer 1", "after transformer 2")


def pictures(
    hr_path: str | os.PathLike,
    upscaler,
    *,
    lr_path: str | os.PathLike | None = None,
    results: Mapping[str, str | os.PathLike] | None = None,
) -> dict[str, np.ndarray]:
    """{name: uint8 `[H, W, 3]`}: "bicubic", the given results, `OURS`, "HR", in this order.

    Args:
        upscaler: An `upscaler.Upscaler`; its scale is that of the figure.
        lr_path: Default: the HR image reduced as the benchmarks' LR files were.
        results: Name -> file of other methods, of the size of HR.

    Raises:
        ValueError: A size that does not fit.
        UsageError: A name that another picture has.
    """
    scale = upscaler.scale
    pair = benchmarks.Pair(Path(hr_path).stem, Path(hr_path), Path(lr_path) if lr_path else None)
    lr, hr = benchmarks.load_pair(pair, scale)
    planes = torch.tensor(lr).permute(2, 0, 1)
    found = {"bicubic": imresize(planes, scale).permute(1, 2, 0).numpy()}
    for name, path in (results or {}).items():
        if name in ("bicubic", OURS, "HR"):
            raise UsageError(f"{path}: the name {name!r} is taken; give it another")
        pixels = images.read(path).pixels
        if pixels.shape != hr.shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"{path}: must be 8-bit RGB of {hr.shape[1]}x{hr.shape[0]} px as HR is, "
                f"got {pixels.dtype} {pixels.shape[1]}x{pixels.shape[0]}x{pixels.shape[2]}"
            )
        found[name] = pixels
    return {**found, OURS: upscaler.array(lr), "HR": hr}


def strip(shown: Mapping[str, np.ndarray], box: Box, scale: int, title: str = ""):
    """The whole HR image with the crop marked, and the crop of every picture with PSNR/SSIM.

    Measured on Y over the whole picture, `scale` pixels cut from every side.
    """
    plt = _matplotlib()
    hr = shown["HR"]
    left, top, width, height = _checked(box, hr)
    columns = -(-len(shown) // 2)
    ratio = hr.shape[1] / hr.shape[0]
    figure = plt.figure(figsize=(4 * ratio + 1.9 * columns * width / height, 4.6), dpi=150)
    grid = figure.add_gridspec(
        2, columns + 1, width_ratios=[4 * ratio, *[1.9 * width / height] * columns]
    )
    whole = figure.add_subplot(grid[:, 0])
    _show(whole, hr, title)
    whole.add_patch(
        plt.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=MARK, linewidth=1.5)
    )
    for index, (name, pixels) in enumerate(shown.items()):
        axes = figure.add_subplot(grid[index // columns, 1 + index % columns])
        _show(
            axes, pixels[top : top + height, left : left + width], _caption(name, pixels, hr, scale)
        )
    return figure


def errors(shown: Mapping[str, np.ndarray], scale: int):
    """|picture - HR| on Y of every picture but HR, in grey levels, on one scale of colours."""
    plt = _matplotlib()
    hr = _luma(shown["HR"])
    maps = {name: (_luma(p) - hr).abs().numpy() for name, p in shown.items() if name != "HR"}
    top = max(1.0, max(float(np.percentile(m, 99.5)) for m in maps.values()))
    figure, axes = plt.subplots(
        1, len(maps), figsize=(3.2 * len(maps) * hr.shape[1] / hr.shape[0] + 1, 3.8), dpi=150,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, (name, values) in zip(axes[0], maps.items(), strict=True):
        drawn = panel.imshow(values, cmap="magma", vmin=0, vmax=top, interpolation="nearest")
        _title(panel, _caption(name, shown[name], shown["HR"], scale))
    figure.colorbar(drawn, ax=axes[0].tolist(), label="error of Y, grey levels", shrink=0.8)
    return figure


def features(net: EFRDN, x: Tensor):
    """Mean over the channels of the features after the CNN and after each transformer (Fig. 6).

    `x` is `[1, 3, H, W]` in [0, 1]; each map is spread over the colours by itself.
    """
    plt = _matplotlib()
    maps = stages(net, x)
    ratio = x.shape[3] / x.shape[2]
    figure, axes = plt.subplots(
        1, len(maps) + 1, figsize=(3.0 * ratio * (len(maps) + 1), 3.3), dpi=150,
        layout="constrained",
    )  # fmt: skip
    _show(axes[0], x[0].permute(1, 2, 0).clamp(0, 1).numpy(), "input")
    for panel, (name, values) in zip(axes[1:], maps.items(), strict=True):
        panel.imshow(values.mean(dim=(0, 1)).numpy(), cmap="viridis", interpolation="nearest")
        _title(panel, name)
    return figure


def stages(net: EFRDN, x: Tensor) -> dict[str, Tensor]:
    """{stage: features `[1, C, H, W]` on the CPU}: C_out, T_add1 and T_add2 of the paper."""
    seen: list[Tensor] = []
    # What enters the transformers and the deep tail is what left the stage before.
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().cpu()))
        for part in (net.trans[0], net.trans[1], net.reconstruct_deep)
    ]
    try:
        with torch.inference_mode():
            net(x.to(next(net.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(STAGES, seen, strict=True))


def scatter(points: Sequence[Mapping], x: str, y: str, size: str | None = None):
    """`y` against `x` of named points, one marker each, area by `size` (Fig. 7).

    Args:
        points: Rows as `read_points` gives them; "ours": true marks one.
        x: Key of the cost, drawn on a logarithmic axis where it spans more than a decade.
        y: Key of the quality.
    """
    plt = _matplotlib()
    figure, axes = plt.subplots(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    if size and min(p[size] for p in points) <= 0:
        raise ValueError(f"{size} is the area of markers and must be above 0")
    most = max(float(p[size]) for p in points) if size else 1.0
    for point in points:
        area = 60 + 500 * float(point[size]) / most if size else 90
        colour = MARK if point.get("ours") else "#3b6ea5"
        axes.scatter(point[x], point[y], s=area, color=colour, alpha=0.75, edgecolor="white")
        offset = (0, 5 + area**0.5 / 2)
        axes.annotate(
            point["name"], (point[x], point[y]), offset, textcoords="offset points", ha="center",
            fontsize=9, weight="bold" if point.get("ours") else "normal",
        )  # fmt: skip
    values = [float(p[x]) for p in points]
    if min(values) > 0 and max(values) / min(values) > 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")
    axes.margins(0.14, 0.18)
    axes.grid(True, linewidth=0.4, alpha=0.6)
    axes.set_xlabel(LABELS.get(x, x))
    axes.set_ylabel(LABELS.get(y, y))
    return figure


def read_points(paths: Iterable[str | os.PathLike], keys: Sequence[str]) -> list[dict]:
    """Rows of JSON files, each a list of objects with "name" and numbers at `keys`.

    Raises:
        ValueError: Another file; a row without a number at one of the keys, named.
    """
    rows = []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text())
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path}: expected a list of objects with name, {', '.join(keys)}")
        for row in found:
            missing = [key for key in ("name", *keys) if key not in row]
            if missing:
                raise ValueError(f"{path}: {row.get('name', row)} has no {', '.join(missing)}")
            wrong = [key for key in keys if not _is_number(row[key])]
            if wrong:
                raise ValueError(
                    f"{path}: {wrong[0]} of {row['name']} must be a finite number, "
                    f"got {row[wrong[0]]!r}"
                )
        rows += found
    if not rows:
        raise ValueError("no point to draw")
    return rows


def save(figure, paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Write the figure as .png, .svg or .pdf, and close it.

    Raises:
        UsageError: Another extension.
        OSError: A file cannot be written; no part of it is left behind.
    """
    plt = _matplotlib()
    written = [Path(path) for path in paths]
    for path in written:
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UsageError(f"{path}: figures are written as .png, .svg or .pdf")
    for path in written:
        file = io.BytesIO()
        figure.savefig(file, format=path.suffix[1:].lower(), bbox_inches="tight", pad_inches=0.05)
        atomic_write(path, file.getvalue())
    plt.close(figure)
    return written


def _is_number(value: object) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need Matplotlib: pip install efrdn_fast[figures]") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _show(axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    _title(axes, title)


def _title(axes, text: str) -> None:
    """`text` under a panel without axes."""
    axes.set_axis_off()
    axes.text(0.5, -0.02, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)


def _caption(name: str, pixels: np.ndarray, hr: np.ndarray, scale: int) -> str:
    if pixels is hr or name == "HR":
        return f"{name}\nPSNR / SSIM"
    psnr, ssim = metrics.psnr(pixels, hr, scale), metrics.ssim(pixels, hr, scale)
    return f"{name}\n{psnr:.2f} dB / {ssim:.4f}"


def _luma(pixels: np.ndarray) -> Tensor:
    return metrics.luma(torch.tensor(pixels).permute(2, 0, 1).double())[0]


def _checked(box: Box, hr: np.ndarray) -> Box:
    left, top, width, height = box
    inside = left >= 0 and top >= 0 and left + width <= hr.shape[1] and top + height <= hr.shape[0]
    if not inside or width < 3 or height < 3:
        raise ValueError(
            f"crop {left},{top},{width},{height} (left, top, width, height) is not within "
            f"{hr.shape[1]}x{hr.shape[0]} px, or is smaller than 3"
        )
    return box
