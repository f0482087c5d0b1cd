"""Geometry of a small chart: values to places in an SVG of 400 x 300, round ticks, lines of few points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vilu.metrics.counts import Floats

LEFT, RIGHT, TOP, BOTTOM = 46.0, 388.0, 30.0, 250.0


@dataclass(frozen=True)
class Axis:
    """One direction of a chart.

    Attributes:
        label: What is written along it.
        name: Shorter, for a value that is read from it.
        low: Value at its beginning.
        high: Value at its end.
        percent: Whether values are fractions that are shown in per cent.
    """

    label: str
    name: str
    low: float
    high: float
    percent: bool = True

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values and their texts."""
        values = round_ticks(self.low, self.high)
        if self.percent:
            return [(value, f"{round(100 * value, 9):g}") for value in values]
        return [(value, f"{value:.4g}") for value in values]


@dataclass(frozen=True, eq=False)
class Line:
    """Points that are joined.

    Attributes:
        label: Whose they are.
        x: (P,) values.
        y: (P,) values.
        look: Number of its look; lines of one method have the same in every chart.
        filled: Whether the area below is tinted.
        low: (P,) lower ends of intervals; none where there are no intervals.
        high: (P,) upper ends.
    """

    label: str
    x: Floats
    y: Floats
    look: int
    filled: bool = False
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, eq=False)
class Chart:
    """Lines between two axes.

    Attributes:
        key: Identifier in the page.
        title: Above it.
        says: What it shows, in a sentence.
        x: Horizontal axis.
        y: Vertical axis.
        lines: What is drawn, the last on top.
        marker: (x, y) of the operating point, (x, None) for a vertical line; None where it cannot be shown.
        guide: (x0, y0, x1, y1) and the text of a line to compare with.
    """

    key: str
    title: str
    says: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marker: tuple[float, float | None] | None = None
    guide: tuple[tuple[float, float, float, float], str] | None = None

    def px(self, value: float) -> str:
        """Horizontal place of a value."""
        return _place(LEFT + (RIGHT - LEFT) * (value - self.x.low) / (self.x.high - self.x.low))

    def py(self, value: float) -> str:
        """Vertical place of a value."""
        return _place(BOTTOM - (BOTTOM - TOP) * (value - self.y.low) / (self.y.high - self.y.low))

    def points(self, line: Line) -> str:
        """The places of a line, for ``<polyline points>``."""
        return " ".join(f"{self.px(x)},{self.py(y)}" for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True))

    def area(self, line: Line) -> str:
        """The same, closed along the horizontal axis."""
        return f"{self.px(line.x[0])},{_place(BOTTOM)} {self.points(line)} {self.px(line.x[-1])},{_place(BOTTOM)}"


def _place(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about ``wanted`` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thin(x: ArrayLike, y: ArrayLike, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` of the points of a line, both ends among them, evenly along its length."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(xs) <= limit:
        return xs, ys
    length = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], limit)))
    kept = np.union1d(kept[1:-1], [0, len(xs) - 1])
    return xs[kept], ys[kept]
