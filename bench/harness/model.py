"""Figures of sizes that were not run, from smaller ones that were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Point", "predict"]


@dataclass(frozen=True)
class Point:
    """One size of a network, and what was measured there."""

    pixels: int
    """Of all LR images of the batch."""
    exps: int
    """Exponentials of attention: what grows faster than the pixels."""
    seconds: float = 0.0
    peak: int = 0
    """Bytes."""

    def measured(self, seconds: float, peak: int | None) -> Point:
        return replace(self, seconds=seconds, peak=peak or 0)


def predict(points: Sequence[Point], pixels: int, exps: int) -> Point | None:
    """Time and memory at another size; None without a measured point.

    Time is a pixels + b exps through the two largest points where both are positive, else in
    proportion to whichever of the two makes it longer from the largest point. Memory grows with the
    pixels.
    """
    if not points:
        return None
    *_, last = ordered = sorted(points, key=lambda p: p.pixels)
    ratio = max(pixels / last.pixels, exps / last.exps if last.exps else 0.0)
    seconds = last.seconds * ratio
    if len(ordered) > 1:
        first = ordered[-2]
        determinant = first.pixels * last.exps - last.pixels * first.exps
        if determinant:
            a = (first.seconds * last.exps - last.seconds * first.exps) / determinant
            b = (first.pixels * last.seconds - last.pixels * first.seconds) / determinant
            if a > 0 and b > 0:
                seconds = a * pixels + b * exps
    return Point(pixels, exps, seconds, round(last.peak * pixels / last.pixels))
