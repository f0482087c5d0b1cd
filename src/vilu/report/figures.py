"""Figures: histograms, curves, scatters and grids."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from vilu.metrics import aurc, auroc, fpr_at_tpr, risk_coverage_curve, roc_curve_points
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.report.style import (
    CORRECT_COLOUR,
    WRONG_COLOUR,
    LineStyle,
    house_style,
    line_styles_of,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image


def score_histograms(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Draw histograms of the uncertainty, separately for correct and wrong answers.

    Each method has a panel. The figure is like Fig. 9 and 10 in the ViLU supplement. The bars for
    correct answers add up to 100 %, and the bars for wrong answers add up to 100 %. So both kinds
    are visible, even if one kind is rare.
    """
    with house_style():
        figure, panels = _figure_with_panels(len(outcomes), columns=3, width=4.0, height=2.6)
        for axes, (title, method_outcomes) in zip(panels, outcomes.items(), strict=True):
            uncertainty, failure = evaluable_scores(method_outcomes)
            edges = np.histogram_bin_edges(uncertainty, bins=30).tolist()
            uncertainty_of_correct = uncertainty[failure == 0]
            uncertainty_of_wrong = uncertainty[failure == 1]
            _draw_share_bars(
                axes,
                uncertainty_of_correct,
                edges,
                label="answer correct",
                colour=CORRECT_COLOUR,
                hatch=None,
            )
            _draw_share_bars(
                axes,
                uncertainty_of_wrong,
                edges,
                label="answer wrong",
                colour=WRONG_COLOUR,
                hatch="///",
            )
            panel_title = f"{title}: AUROC {auroc(uncertainty, failure):.1%}"
            axes.set(title=panel_title, xlabel="uncertainty", ylabel="% of its kind")
        if panels:
            first_panel, *_ = panels
            first_panel.legend(fontsize=8)
    return figure


def _draw_share_bars(
    axes: Axes, values: Floats, edges: list[float], *, label: str, colour: str, hatch: str | None
) -> None:
    """Draw a histogram of ``values``. Each bar is a share of the values, in percent."""
    percent_per_value = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(
        values, edges, weights=percent_per_value, alpha=0.65, label=label, color=colour, hatch=hatch
    )


def roc_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Draw the ROC curves: true positive rate against false positive rate, over all thresholds.

    A correct answer is a positive, and an accepted answer is predicted to be a positive.
    """
    with house_style():
        figure, axes = _draw_line_per_method(
            outcomes, curve=roc_curve_points, note="FPR95 {:.1%}", metric=fpr_at_tpr
        )
        axes.axhline(0.95, color="#bbbbbb", linewidth=0.8)
        axes.set(
            xlabel="wrong answers accepted (false positive rate)",
            ylabel="correct answers accepted (true positive rate)",
        )
        _legend_beside(axes)
    return figure


def risk_coverage_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Draw the error rate among the accepted answers against the share of accepted answers."""
    with house_style():
        figure, axes = _draw_line_per_method(
            outcomes, curve=risk_coverage_curve, note="AURC {:.3f}", metric=aurc
        )
        axes.set(
            xlabel="coverage: share of the answers accepted",
            ylabel="selective risk: error rate among them",
        )
        axes.set_ylim(bottom=0)
        _legend_beside(axes)
    return figure


def _draw_line_per_method(
    outcomes: Sequence[Outcomes],
    curve: Callable[[Floats, Ints], tuple[Floats, Floats]],
    note: str,
    metric: Callable[[Floats, Ints], float],
) -> tuple[Figure, Axes]:
    """Draw a curve per method.

    Args:
        outcomes: The outcomes of every method.
        curve: Function from uncertainties and failures to the curve's x and y.
        note: Format string for the metric value in the legend.
        metric: Function from uncertainties and failures to this value.

    Returns:
        The figure and the axes.
    """
    line_styles = line_styles_of(method_outcomes.method or "" for method_outcomes in outcomes)
    figure = new_figure(width=6.5, height=4)
    axes = figure.add_subplot()
    for method_outcomes in outcomes:
        uncertainty, failure = evaluable_scores(method_outcomes)
        line_style = line_styles[method_outcomes.method or ""]
        value = metric(uncertainty, failure)
        label = f"{method_outcomes.method}  ({note.format(value)})"
        x, y = curve(uncertainty, failure)
        axes.plot(x, y, color=line_style.colour, linestyle=line_style.dash, label=label)
    return figure, axes


def _legend_beside(axes: Axes) -> None:
    """Write the legend to the right of the plot, away from all lines."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def evaluable_scores(outcomes: Outcomes) -> tuple[Floats, Ints]:
    """Return the uncertainties and the failures, for the rows with both values."""
    rows = outcomes.evaluable
    return outcomes.uncertainty[rows], outcomes.failure[rows]


def failure_probability_of(outcomes: Outcomes) -> Floats | None:
    """Return the calibrated failure probabilities (N,), or else uncertainties as probabilities.

    If the outcomes are not calibrated and the uncertainties are no probabilities, return None.
    """
    if outcomes.failure_probability is not None:
        return outcomes.failure_probability
    return outcomes.uncertainty if outcomes.is_probability else None


@dataclass(frozen=True)
class Photo:
    """A picture on the contact sheet, with the model's answer."""

    image: Image.Image
    prediction: str  # the model's answer
    truth: str | None  # the right answer. None if unknown
    uncertainty: float


def contact_sheet(trusted: Sequence[Photo], doubted: Sequence[Photo]) -> Figure:
    """Draw the most trusted photos, and below them the least trusted photos.

    Under each photo are the answer and, if the right answer is known, whether the answer is wrong.
    """
    columns = max(len(trusted), len(doubted), 1)
    figure = new_figure(width=1.7 * columns, height=5.2)
    panels = figure.subfigures(nrows=2, ncols=1, squeeze=False)
    top_panel, bottom_panel = panels[:, 0]
    sections = [(top_panel, "Most trusted", trusted), (bottom_panel, "Least trusted", doubted)]
    for panel, title, photos in sections:
        panel.suptitle(title, fontsize=11, x=0.01, ha="left")
        for number, photo in enumerate(photos):
            axes = panel.add_subplot(1, columns, number + 1)
            draw_photo(axes, photo)
    return figure


def draw_photo(axes: Axes, photo: Photo) -> None:
    """Draw a picture with a caption and a frame. The frame's colour marks a wrong answer."""
    # if the right answer is not known, there is no verdict, and the frame is that of a right answer
    verdict = ""
    colour = CORRECT_COLOUR
    linewidth = 1
    if photo.truth == photo.prediction:
        verdict = "\ncorrect"
    elif photo.truth is not None:
        verdict = f"\nwrong: {photo.truth}"
        colour = WRONG_COLOUR
        linewidth = 3
    words = textwrap.shorten(photo.prediction, width=24, placeholder="…")
    axes.imshow(photo.image)
    caption = f"“{words}”{verdict}\nu = {photo.uncertainty:.3f}"
    axes.set_title(caption, fontsize=8, color=colour)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=linewidth)


@dataclass(frozen=True)
class Series:
    """Values with intervals, for a line or for one kind of point.

    All sequences but ``published`` have the same length.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]  # values as fractions, drawn in percent
    low: Sequence[float]  # lower ends of the y intervals
    high: Sequence[float]  # upper ends of the y intervals
    published: Sequence[tuple[float, float]] = ()  # points (x, y) from the literature


@dataclass(frozen=True)
class Panel:
    """One plot in a figure: title, label for the vertical axis, and series."""

    title: str
    y_label: str
    lines: Sequence[Series]


def draw_curves(
    panels: Sequence[Panel],
    x_label: str,
    *,
    title: str = "",
    log: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Figure:
    """Draw a line for every series, with a band of intervals and a label at the line's end.

    Args:
        panels: The plots.
        x_label: Label for the horizontal axes.
        title: Title for the figure.
        log: Whether the horizontal axes are logarithmic.
        names: Names to write in place of numbers at the ticks of the horizontal axes. A key is the
            number as text (``"{:g}"``).
    """

    def draw(axis: Axes, panel: Panel, line_styles: Mapping[str, LineStyle]) -> None:
        """Draw the lines in a panel, with a tick at every x of a line."""
        ticks: set[float] = set()
        for line in panel.lines:
            _draw_line_in_band(axis, line, line_styles[line.label])
            if line.published:
                _draw_published(axis, line, line_styles[line.label])
            ticks.update(line.x)
        if log:
            axis.set_xscale("log")
        numbers = [f"{tick:g}" for tick in sorted(ticks)]
        labels = [names.get(number, number) for number in numbers]
        rotation = 45 if len(ticks) > 6 else 0  # in degrees. Many level labels would overlap
        axis.set_xticks(sorted(ticks), labels, rotation=rotation)
        axis.minorticks_off()
        ends = {}
        for line in panel.lines:
            last = int(np.argmax(line.x))
            ends[line.label] = (line.x[last], 100 * line.y[last])
        _write_line_labels(axis, ends, line_styles)

    figure = _curve_panels(panels, x_label, title, draw)
    if any(line.published for panel in panels for line in panel.lines):
        figure.supxlabel("hollow markers: published", fontsize=8)
    return figure


def draw_scatter(panels: Sequence[Panel], x_label: str, *, title: str = "") -> Figure:
    """Draw every series as points with intervals, and a least-squares line per series.

    The label of a series is at the end of the line. Without a line, the label is beside the point
    with the largest x.
    """

    def draw(axis: Axes, panel: Panel, line_styles: Mapping[str, LineStyle]) -> None:
        """Draw a panel's points, and a least-squares line if the x values in a series differ."""
        ends = {}
        for line in panel.lines:
            line_style = line_styles[line.label]
            _draw_points(axis, line, line_style)
            last = int(np.argmax(line.x))
            ends[line.label] = (100 * line.x[last], 100 * line.y[last])
            if len(set(line.x)) > 1:
                x = np.array([min(line.x), max(line.x)])
                slope, offset = np.polyfit(line.x, line.y, deg=1)
                y = slope * x + offset
                axis.plot(100 * x, 100 * y, color=line_style.colour, linestyle=line_style.dash)
                ends[line.label] = (100 * float(x[-1]), 100 * float(y[-1]))
        _write_line_labels(axis, ends, line_styles)

    return _curve_panels(panels, x_label, title, draw)


def _figure_with_panels(
    n: int, columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``n`` panels in rows. A panel is ``width`` by ``height`` inches."""
    rows = math.ceil(n / columns)
    figure = new_figure(width=width * columns, height=height * rows)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(n)]


def _curve_panels(
    panels: Sequence[Panel],
    x_label: str,
    title: str,
    draw: Callable[[Axes, Panel, Mapping[str, LineStyle]], None],
) -> Figure:
    """Make one plot per panel with ``draw``. Lines with the same label look the same."""
    line_styles = line_styles_of({line.label for panel in panels for line in panel.lines})
    with house_style():
        columns = min(2, len(panels))
        figure, axes = _figure_with_panels(len(panels), columns, width=4.8, height=3.0)
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(title=panel.title, xlabel=x_label, ylabel=panel.y_label)
            axis.grid(alpha=0.25, linewidth=0.5)
            draw(axis, panel, line_styles)
        if title:
            figure.suptitle(title, fontsize=10)
    return figure


def _draw_line_in_band(axis: Axes, line: Series, line_style: LineStyle) -> None:
    """Draw a series in percent, in ascending order of x, with the intervals as a band."""
    order = np.argsort(line.x, kind="stable")
    x = _in_order(line.x, order)
    low = 100 * _in_order(line.low, order)
    high = 100 * _in_order(line.high, order)
    axis.fill_between(x, low, high, color=line_style.colour, alpha=0.12, linewidth=0)
    y = 100 * _in_order(line.y, order)
    axis.plot(x, y, label=line.label, linewidth=1.3, markersize=4.5, **line_style.plot_arguments)


def _write_line_labels(
    axis: Axes, ends: Mapping[str, tuple[float, float]], line_styles: Mapping[str, LineStyle]
) -> None:
    """Write every line's label to the right of the plot, at the height where the line ends.

    ``ends`` maps a label to the line's last point (x and y in the units of ``axis``). Overlapping
    labels are moved apart. A dotted line leads from the last point to the label: a line may end
    early, and must not seem to go on.
    """
    bottom, top = axis.get_ylim()
    heights = {label: (y - bottom) / (top - bottom) for label, (_, y) in ends.items()}
    spaced_heights = _spaced_heights(heights, LABEL_HEIGHT)
    for label, height in spaced_heights.items():
        colour = line_styles[label].colour
        leader = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.7,
            "linestyle": (0, (1, 1.5)),  # a dot, then a gap of 1.5 line widths
            "relpos": (0, 0.5),  # it ends at the middle of the label's left edge
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axis.annotate(
            label,
            ends[label],
            xytext=(1.06, height),
            textcoords="axes fraction",
            arrowprops=leader,
            color=colour,
            fontsize=8,
            verticalalignment="center",
            annotation_clip=False,
        )


LABEL_HEIGHT = 0.065
"""Height of a label as a share of the plot height."""


def _spaced_heights(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move the label heights apart, to distances of at least ``gap``.

    Heights and gap are shares of the plot height. Labels that are too close form a group, with the
    distance ``gap`` between labels. A group is centred on the mean height of the labels. If two
    groups are then too close, both are joined. The result has the lowest label first.
    """
    groups: list[list[str]] = []  # labels in each group. Groups and labels go from low to high
    for label in sorted(heights, key=lambda label: heights[label]):
        groups.append([label])
        while len(groups) > 1 and _are_too_close(groups[-2], groups[-1], heights, gap):
            upper_group = groups.pop()
            groups[-1] += upper_group
    spaced_heights = {}
    for group in groups:
        lowest_height = _lowest_height(group, heights, gap)
        for number, label in enumerate(group):
            spaced_heights[label] = lowest_height + number * gap
    return spaced_heights


def _lowest_height(group: Sequence[str], heights: Mapping[str, float], gap: float) -> float:
    """Return the height of a group's lowest label. The group is centred on the mean height.

    A group is moved into the plot if a label would be above the plot (1.0) or below the plot (0.0).
    If the group is higher than the plot, the highest label is at the top of the plot.
    """
    centre = sum(heights[label] for label in group) / len(group)
    extent = gap * (len(group) - 1)
    lowest = max(centre - extent / 2, 0.0)
    return min(lowest, 1.0 - extent)


def _are_too_close(
    lower: Sequence[str], upper: Sequence[str], heights: Mapping[str, float], gap: float
) -> bool:
    """Return whether the groups ``lower`` and ``upper`` are less than ``gap`` apart."""
    top_of_lower = _lowest_height(lower, heights, gap) + gap * (len(lower) - 1)
    bottom_of_upper = _lowest_height(upper, heights, gap)
    return bottom_of_upper - top_of_lower < gap


def _draw_points(axis: Axes, line: Series, line_style: LineStyle) -> None:
    """Draw a series as points, with the intervals as bars. x and y are in percent."""
    y = np.asarray(line.y)
    low = np.asarray(line.low)
    high = np.asarray(line.high)
    below = np.maximum(y - low, 0)
    above = np.maximum(high - y, 0)
    x = np.asarray(line.x)
    lengths_of_bars = np.stack([below, above])
    axis.errorbar(
        100 * x,
        100 * y,
        100 * lengths_of_bars,
        label=line.label,
        color=line_style.colour,
        marker=line_style.marker,
        linestyle="none",
        markersize=4.5,
        elinewidth=0.8,
        capsize=2,
    )


def _in_order(values: Sequence[float], order: Ints) -> Floats:
    """Return the values (N,) in the order of the indices ``order`` (N,)."""
    return np.asarray(values, dtype=np.float64)[order]


def _draw_published(axis: Axes, line: Series, line_style: LineStyle) -> None:
    """Draw the published points of a series, with hollow markers."""
    points = sorted(line.published)  # in ascending order of x
    x = [point_x for point_x, _ in points]
    y = [point_y for _, point_y in points]
    y_in_percent = 100 * np.asarray(y)
    axis.plot(
        x,
        y_in_percent,
        color=line_style.colour,
        marker=line_style.marker,
        linestyle=":",
        linewidth=0.7,
        markerfacecolor="white",
        markersize=5,
        label=f"{line.label}, published",
    )


@dataclass(frozen=True)
class Grid:
    """A table of fractions, drawn as a heat map."""

    title: str
    rows: Sequence[str]  # row labels, from the top
    columns: Sequence[str]  # column labels, from the left
    # The fraction in each cell (row, column). Rows and columns are counted from 0. Cells without a
    # fraction stay white.
    values: Mapping[tuple[int, int], float]
    chosen: tuple[int, int] | None  # (row, column) of a cell with a frame


def draw_grids(panels: Sequence[Grid], row_label: str, column_label: str) -> Figure:
    """Draw heat maps. A darker cell has a higher fraction, printed in the cell in percent."""
    with house_style():
        n_columns = min(2, len(panels))
        figure, axes = _figure_with_panels(len(panels), n_columns, width=4.2, height=2.6)
        for axis, panel in zip(axes, panels, strict=True):
            _draw_grid(axis, panel)
            axis.set(title=panel.title, xlabel=column_label, ylabel=row_label)
    return figure


def _draw_grid(axis: Axes, panel: Grid) -> None:
    """Draw a grid's cells with the numbers, and the frame around the chosen cell."""
    fractions = np.full((len(panel.rows), len(panel.columns)), np.nan)
    for cell, value in panel.values.items():
        fractions[cell] = value
    low = float(np.nanmin(fractions))
    high = float(np.nanmax(fractions))
    spread = high - low
    # The range of greys is wider than the range of values. So no cell is white, and no cell is so
    # dark that the number cannot be read.
    axis.imshow(fractions, cmap="Greys", vmin=low - spread / 4, vmax=high + spread, aspect="auto")
    for (row, column), value in panel.values.items():
        axis.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8)
    if panel.chosen is not None:
        y, x = panel.chosen
        # The frame goes through four corners and back to the first corner. A cell has the side 1,
        # so the frame is just inside the cell.
        across = [x - 0.48, x + 0.48, x + 0.48, x - 0.48, x - 0.48]
        down = [y - 0.48, y - 0.48, y + 0.48, y + 0.48, y - 0.48]
        axis.plot(across, down, color=WRONG_COLOUR, linewidth=2)
    axis.set_xticks(range(len(panel.columns)), panel.columns)
    axis.set_yticks(range(len(panel.rows)), panel.rows)
