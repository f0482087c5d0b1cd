"""Lines and points with intervals, in panels; published values as hollow markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vilu.report.style import house_style, looks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
WIDTH, HEIGHT = 4.4, 3.0


@dataclass(frozen=True)
class Line:
    """Values along an axis, as fractions.

    Attributes:
        label: For the legend.
        x: Where.
        y: Values.
        low: Lower ends of their intervals.
        high: Upper ends.
        published: (x, y) of a publication.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    published: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above it.
        y_label: Of the vertical axis.
        lines: What is in it.
    """

    title: str
    y_label: str
    lines: Sequence[Line]


def curves(panels: Sequence[Panel], x_label: str, *, log: bool) -> Figure:
    """A line for every series, intervals as bars; one legend for all panels."""
    with house_style():
        figure, axes = _panels(panels)
        styles = _styles(panels)
        for axis, panel in zip(axes, panels, strict=True):
            for line in panel.lines:
                _bars(axis, line, styles[line.label])
                if line.published:
                    _published(axis, line, styles[line.label])
            ticks = sorted({x for line in panel.lines for x in line.x})
            if log:
                axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
            axis.minorticks_off()
            axis.set_xlabel(x_label)
        _legend(figure, axes, len(styles))
    return figure


def scatter(panels: Sequence[Panel], x_label: str) -> Figure:
    """Points with intervals, and the least-squares line through those of each series."""
    with house_style():
        figure, axes = _panels(panels)
        styles = _styles(panels)
        for axis, panel in zip(axes, panels, strict=True):
            for line in panel.lines:
                style = styles[line.label]
                _bars(axis, line, {**style, "linestyle": "none"})
                if len(set(line.x)) > 1:
                    ends = np.array([min(line.x), max(line.x)])
                    slope, offset = np.polyfit(line.x, line.y, 1)
                    axis.plot(100 * ends, 100 * (slope * ends + offset), color=style["color"], ls=style["linestyle"])
            axis.set_xlabel(x_label)
        _legend(figure, axes, len(styles))
    return figure


def _panels(panels: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(WIDTH * columns, HEIGHT * rows + 0.5)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(panels))]
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(panel.title)
        axis.set_ylabel(f"{panel.y_label} (%)")
        axis.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """One look for a label in all panels."""
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines)
    return dict(zip(labels, looks(), strict=False))


def _bars(axis: Axes, line: Line, style: dict[str, Any]) -> None:
    order = np.argsort(line.x, kind="stable")
    x, y, low, high = (np.asarray(values, dtype=np.float64)[order] for values in (line.x, line.y, line.low, line.high))
    scaled = x if style["linestyle"] != "none" else 100 * x
    around = 100 * np.stack([np.maximum(y - low, 0), np.maximum(high - y, 0)])
    axis.errorbar(
        scaled, 100 * y, around, label=line.label, linewidth=1.3, markersize=4.5, elinewidth=0.8, capsize=2, **style
    )


def _published(axis: Axes, line: Line, style: dict[str, Any]) -> None:
    x, y = zip(*sorted(line.published), strict=True)
    look = {"color": style["color"], "marker": style["marker"], "linestyle": ":", "linewidth": 0.7}
    axis.plot(x, 100 * np.asarray(y), markerfacecolor="white", markersize=5, label=f"{line.label}, published", **look)


def _legend(figure: Figure, axes: Sequence[Axes], n_labels: int) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=min(max(n_labels, 1), 4), fontsize=8
    )
