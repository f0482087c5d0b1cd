"""Figures: histograms, curves, scatters and grids."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from vilu.metrics import aurc, auroc, fpr_at_tpr, risk_coverage_curve, roc_curve_points
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.report.style import COLOURS, CORRECT, WRONG, house_style, looks, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image


def score_histograms(outcomes: Mapping[str, Outcomes]) -> Figure:
    """Uncertainty of correct and of wrong answers, a panel for each method.

    As Fig. 9 and 10 of the ViLU supplement. Bars are shares of the correct and of the wrong
    answers, so that the rarer kind is seen.
    """
    with house_style():
        figure, panels = _panels(len(outcomes), 3, 4.0, 2.6)
        for axes, (title, of_method) in zip(panels, outcomes.items(), strict=True):
            uncertainty, failure = known(of_method)
            edges = np.histogram_bin_edges(uncertainty, bins=30).tolist()
            _share_bars(axes, uncertainty[failure == 0], edges, "answer correct", CORRECT, None)
            _share_bars(axes, uncertainty[failure == 1], edges, "answer wrong", WRONG, "///")
            head = f"{title}: AUROC {auroc(uncertainty, failure):.1%}"
            axes.set(title=head, xlabel="uncertainty", ylabel="% of its kind")
        if panels:
            panels[0].legend(fontsize=8)
    return figure


def _share_bars(
    axes: Axes, values: Floats, edges: list[float], label: str, colour: str, hatch: str | None
) -> None:
    """A histogram in percent of the values."""
    percent = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(values, edges, weights=percent, alpha=0.65, label=label, color=colour, hatch=hatch)


def roc_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Share of correct answers accepted against share of wrong answers accepted.

    A curve has a point for every threshold; positive = correct.
    """
    figure, axes = _line_per_method(outcomes, roc_curve_points, "FPR95 {:.1%}", fpr_at_tpr)
    axes.axhline(0.95, color="#bbbbbb", linewidth=0.8)
    axes.set(
        xlabel="wrong answers accepted (false positive rate)",
        ylabel="correct answers accepted (true positive rate)",
    )
    axes.legend(fontsize=8, loc="lower right")
    return figure


def risk_coverage_curves(outcomes: Sequence[Outcomes]) -> Figure:
    """Error rate among the most trusted answers against the share that is trusted."""
    figure, axes = _line_per_method(outcomes, risk_coverage_curve, "AURC {:.3f}", aurc)
    axes.set(
        xlabel="coverage: share of the answers accepted",
        ylabel="selective risk: error rate among them",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper left")
    return figure


def _line_per_method(
    outcomes: Sequence[Outcomes],
    curve: Callable[[Floats, Ints], tuple[Floats, Floats]],
    note: str,
    number: Callable[[Floats, Ints], float],
) -> tuple[Figure, Axes]:
    """A curve for each method; ``note`` shows a number in the legend.

    Lines are solid for ViLU and dashed for all else, so they can be read without colour.
    """
    figure = new_figure(5.5, 5)
    axes = figure.add_subplot()
    for of_method, colour in zip(outcomes, itertools.cycle(COLOURS), strict=False):
        uncertainty, failure = known(of_method)
        name = of_method.method or ""
        style = "-" if name.startswith("vilu") else "--"
        value = number(uncertainty, failure)
        label = f"{of_method.method}  ({note.format(value)})"
        x, y = curve(uncertainty, failure)
        axes.plot(x, y, color=colour, linestyle=style, label=label)
    return figure, axes


def known(outcomes: Outcomes) -> tuple[Floats, Ints]:
    """Uncertainties and failures of the rows that have both."""
    rows = outcomes.evaluable
    return outcomes.uncertainty[rows], outcomes.failure[rows]


def probability(outcomes: Outcomes) -> Floats | None:
    """(N,) failure probabilities: the calibrated ones, or an uncertainty that is a probability.

    None where there are neither.
    """
    if outcomes.failure_probability is not None:
        return outcomes.failure_probability
    return outcomes.uncertainty if outcomes.is_probability else None


@dataclass(frozen=True)
class Photo:
    """A picture of the contact sheet with its answer."""

    image: Image.Image
    prediction: str  # the model's answer
    truth: str | None  # the right answer; None where it is not known
    uncertainty: float


def contact_sheet(trusted: Sequence[Photo], doubted: Sequence[Photo]) -> Figure:
    """The most and the least trusted photos, with the model's words and whether they are right."""
    columns = max(len(trusted), len(doubted), 1)
    figure = new_figure(1.7 * columns, 5.2)
    panels = figure.subfigures(2, 1, squeeze=False)[:, 0]
    sections = {"Most trusted": trusted, "Least trusted": doubted}
    for panel, (title, photos) in zip(panels, sections.items(), strict=True):
        panel.suptitle(title, fontsize=11, x=0.01, ha="left")
        for number, photo in enumerate(photos):
            draw_photo(panel.add_subplot(1, columns, number + 1), photo)
    return figure


def draw_photo(axes: Axes, photo: Photo) -> None:
    """One picture with its caption, framed by whether the answer is right."""
    verdict = ""
    colour = CORRECT
    linewidth = 1
    if photo.truth == photo.prediction:
        verdict = "\ncorrect"
    elif photo.truth is not None:
        verdict = f"\nwrong: {photo.truth}"
        colour = WRONG
        linewidth = 3
    words = textwrap.shorten(photo.prediction, 24, placeholder="…")
    axes.imshow(photo.image)
    caption = f"“{words}”{verdict}\nu = {photo.uncertainty:.3f}"
    axes.set_title(caption, fontsize=8, color=colour)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=linewidth)


@dataclass(frozen=True)
class Series:
    """Values along an axis as fractions, the ends of their intervals, and published (x, y)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    published: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes with a title, a label of the vertical axis, and the series in it."""

    title: str
    y_label: str
    lines: Sequence[Series]


def curves(
    panels: Sequence[Panel],
    x_label: str,
    *,
    log: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Figure:
    """A line for every series, with intervals as bars, and one legend for all panels.

    ``names`` are shown at points of the horizontal axis instead of their numbers.
    """

    def draw(axis: Axes, panel: Panel, styles: Mapping[str, dict[str, Any]]) -> None:
        ticks: set[float] = set()
        for line in panel.lines:
            _bars(axis, line, styles[line.label])
            if line.published:
                _published(axis, line, styles[line.label])
            ticks.update(line.x)
        if log:
            axis.set_xscale("log")
        numbers = [f"{tick:g}" for tick in sorted(ticks)]
        labels = [names.get(number, number) for number in numbers]
        axis.set_xticks(sorted(ticks), labels, rotation=45 if len(ticks) > 6 else 0)
        axis.minorticks_off()

    return _curve_panels(panels, x_label, draw)


def scatter(panels: Sequence[Panel], x_label: str) -> Figure:
    """Points with intervals, and the least-squares line through those of each series."""

    def draw(axis: Axes, panel: Panel, styles: Mapping[str, dict[str, Any]]) -> None:
        for line in panel.lines:
            style = styles[line.label]
            _bars(axis, line, {**style, "linestyle": "none"})
            if len(set(line.x)) > 1:
                x = np.array([min(line.x), max(line.x)])
                slope, offset = np.polyfit(line.x, line.y, 1)
                y = slope * x + offset
                axis.plot(100 * x, 100 * y, color=style["color"], ls=style["linestyle"])

    return _curve_panels(panels, x_label, draw)


def _panels(
    n: int, columns: int, width: float, height: float, below: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """So many panels of a size in inches, row by row, and room for a legend below."""
    rows = -(-n // columns)
    figure = new_figure(width * columns, height * rows + below)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(n)]


def _curve_panels(
    panels: Sequence[Panel],
    x_label: str,
    draw: Callable[[Axes, Panel, Mapping[str, dict[str, Any]]], None],
) -> Figure:
    """Panels that ``draw`` fills, with one look for a label in all of them, and one legend."""
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines)
    styles = dict(zip(labels, looks(), strict=False))
    handles: dict[str, Any] = {}
    with house_style():
        figure, axes = _panels(len(panels), min(2, len(panels)), 4.4, 3.0, below=0.5)
        for axis, panel in zip(axes, panels, strict=True):
            axis.set(title=panel.title, xlabel=x_label, ylabel=f"{panel.y_label} (%)")
            axis.grid(alpha=0.25, linewidth=0.5)
            draw(axis, panel, styles)
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        columns = min(max(len(styles), 1), 4)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
        )
    return figure


def _bars(axis: Axes, line: Series, style: dict[str, Any]) -> None:
    """A series with its intervals, from left to right; points without a line have x in percent."""
    order = np.argsort(line.x, kind="stable")
    x = _ordered(line.x, order)
    y = _ordered(line.y, order)
    below = np.maximum(y - _ordered(line.low, order), 0)
    above = np.maximum(_ordered(line.high, order) - y, 0)
    if style["linestyle"] == "none":
        x = 100 * x
    axis.errorbar(
        x,
        100 * y,
        100 * np.stack([below, above]),
        label=line.label,
        linewidth=1.3,
        markersize=4.5,
        elinewidth=0.8,
        capsize=2,
        **style,
    )


def _ordered(values: Sequence[float], order: Ints) -> Floats:
    return np.asarray(values, dtype=np.float64)[order]


def _published(axis: Axes, line: Series, style: dict[str, Any]) -> None:
    """The published points of a series, hollow."""
    x, y = zip(*sorted(line.published), strict=True)
    look = {"color": style["color"], "marker": style["marker"], "linestyle": ":", "linewidth": 0.7}
    axis.plot(
        x,
        100 * np.asarray(y),
        markerfacecolor="white",
        markersize=5,
        label=f"{line.label}, published",
        **look,
    )


@dataclass(frozen=True)
class Grid:
    """Fractions by number of row (from the top) and column.

    A missing fraction is left white, the chosen pair is framed.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[int, int], float]
    chosen: tuple[int, int] | None


def grids(panels: Sequence[Grid], row_label: str, column_label: str) -> Figure:
    """Darker is higher; the number stands in every field, the chosen one is framed."""
    with house_style():
        figure, axes = _panels(len(panels), min(2, len(panels)), 4.2, 2.6)
        for axis, panel in zip(axes, panels, strict=True):
            _draw_grid(axis, panel)
            axis.set(title=panel.title, xlabel=column_label, ylabel=row_label)
    return figure


def _draw_grid(axis: Axes, panel: Grid) -> None:
    """The fields of a grid with their numbers, and the frame around the chosen field."""
    field = np.full((len(panel.rows), len(panel.columns)), np.nan)
    for place, value in panel.values.items():
        field[place] = value
    low = float(np.nanmin(field))
    high = float(np.nanmax(field))
    spread = high - low
    # wider than the values, so that no field is white or too dark for its number
    axis.imshow(field, cmap="Greys", vmin=low - spread / 4, vmax=high + spread, aspect="auto")
    for (row, column), value in panel.values.items():
        axis.text(column, row, f"{100 * value:.1f}", ha="center", va="center", fontsize=8)
    if panel.chosen is not None:
        y, x = panel.chosen
        across = [x - 0.48, x + 0.48, x + 0.48, x - 0.48, x - 0.48]
        down = [y - 0.48, y - 0.48, y + 0.48, y + 0.48, y - 0.48]
        axis.plot(across, down, color=WRONG, linewidth=2)
    axis.set_xticks(range(len(panel.columns)), panel.columns)
    axis.set_yticks(range(len(panel.rows)), panel.rows)
