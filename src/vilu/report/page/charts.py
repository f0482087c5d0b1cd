"""Charts of the page. Templates draw the charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.metrics import risk_coverage_curve, roc_curve_points
from vilu.metrics.counts import Floats, Ints, tie_counts
from vilu.outcomes.outcomes import Outcomes
from vilu.report.figures import evaluable_scores, failure_probability_of
from vilu.report.page.choice import OperatingPoint
from vilu.report.style import line_styles_of

# edges of the plotting area between the axes, in SVG units
LEFT = 46.0
RIGHT = 388.0
TOP = 30.0
BOTTOM = 250.0


@dataclass(frozen=True)
class Axis:
    """A chart's horizontal or vertical axis."""

    label: str
    name: str  # short name, shown next to the value that the reader points at
    low: float  # value at the axis start
    high: float  # value at the axis end
    percent: bool = True  # whether values are shown in percent

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values, each with a text."""
        ticks = []
        for value in round_ticks(self.low, self.high):
            text = round_percent(value) if self.percent else f"{value:.4g}"
            ticks.append((value, text))
        return ticks


@dataclass(frozen=True, eq=False)
class Line:
    """A line through P points. Each point may have an interval."""

    label: str
    x: Floats  # (P,)
    y: Floats  # (P,)
    style_index: int  # selects colour and dashes. A method has the same number in every chart
    is_filled: bool = False  # whether the area below the line is filled
    low: Floats | None = None  # (P,) lower ends of the y intervals
    high: Floats | None = None  # (P,) upper ends of the y intervals


@dataclass(frozen=True, eq=False)
class Chart:
    """A line chart with two axes."""

    key: str  # identifier within the page
    title: str
    explanation: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]  # the last line is drawn on top
    # what marks the operating point: a point (x, y), a vertical line (x, None), or nothing (None)
    marker: tuple[float, float | None] | None = None
    # a reference line: the two ends (x0, y0, x1, y1), and the text beside the line
    guide: tuple[tuple[float, float, float, float], str] | None = None

    def px(self, value: float) -> str:
        """Convert a value to a horizontal coordinate in the SVG."""
        width = RIGHT - LEFT
        range_of_values = self.x.high - self.x.low
        return _coordinate(LEFT + width * (value - self.x.low) / range_of_values)

    def py(self, value: float) -> str:
        """Convert a value to a vertical coordinate in the SVG. The coordinate grows downwards."""
        height = BOTTOM - TOP
        range_of_values = self.y.high - self.y.low
        return _coordinate(BOTTOM - height * (value - self.y.low) / range_of_values)

    def points(self, line: Line) -> str:
        """Format a line's points, for ``<polyline points>``."""
        points = []
        for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
            points.append(f"{self.px(x)},{self.py(y)}")
        return " ".join(points)

    def area(self, line: Line) -> str:
        """Format the corners of the area below a line, down to the axis, for ``<polygon>``."""
        below_first_point = f"{self.px(line.x[0])},{_coordinate(BOTTOM)}"
        below_last_point = f"{self.px(line.x[-1])},{_coordinate(BOTTOM)}"
        return f"{below_first_point} {self.points(line)} {below_last_point}"


def round_percent(value: float) -> str:
    """Format a fraction such as 0.05 in percent, with as few digits as possible: "5"."""
    return f"{round(100 * value, 9):g}"


def _coordinate(value: float) -> str:
    """Format a coordinate with at most two decimals: 46.0 as "46", and 46.5 as "46.5"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def round_ticks(low: float, high: float, n_wanted: int = 5) -> list[float]:
    """Return about ``n_wanted`` multiples of a round step in [low, high].

    A round step is 1, 2 or 5 times a power of ten.
    """
    exact_step = (high - low) / n_wanted
    power = 10.0 ** math.floor(math.log10(exact_step))
    round_steps = [factor * power for factor in (1, 2, 5, 10)]
    # A step may be smaller than the exact step by a quarter. This gives only a few more ticks.
    step = next(step for step in round_steps if step >= 0.75 * exact_step)
    # the tolerance keeps ticks at both range ends in spite of rounding
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thin_points(x: ArrayLike, y: ArrayLike, max_points: int) -> tuple[Floats, Floats]:
    """Keep at most ``max_points`` points: both ends, and points evenly along the line."""
    xs = np.asarray(x, dtype=np.float64)
    ys = np.asarray(y, dtype=np.float64)
    if len(xs) <= max_points:
        return xs, ys
    x_steps = np.diff(xs)
    y_steps = np.diff(ys)
    segment_lengths = np.hypot(x_steps, y_steps)
    # the line's length up to the second point, the third point, and so on
    length_up_to_later = np.cumsum(segment_lengths)
    length_up_to_point = np.concatenate([[0.0], length_up_to_later])
    even_lengths = np.linspace(0, length_up_to_point[-1], max_points)
    indices_at_lengths = np.searchsorted(length_up_to_point, even_lengths)
    indices = np.unique(indices_at_lengths)
    # if several points at the end are equal, the search does not reach the last point
    inner_indices = indices[1:-1]
    with_ends = np.union1d(inner_indices, [0, len(xs) - 1])
    return xs[with_ends], ys[with_ends]


MAX_CLASSES = 100  # maximum number of rows in the class table
ERROR_PER_SIDE = 0.025  # error probability on each side of a 95 % interval


@dataclass(frozen=True)
class Rate:
    """The share k / n of some rows, with a 95 % Clopper-Pearson interval."""

    k: int
    n: int
    # how many rows count as one independent row. 1 if all rows are independent.
    design_effect: float = 1.0

    @property
    def value(self) -> float | None:
        """The share k / n. None if n is 0."""
        return self.k / self.n if self.n else None

    @property
    def low(self) -> float:
        """Lower end of the interval: P[Bin(n, low) >= k] = 0.025."""
        counts = self._independent_counts()
        return lower_bound(*counts, ERROR_PER_SIDE)

    @property
    def high(self) -> float:
        """Upper end of the interval: P[Bin(n, high) <= k] = 0.025."""
        counts = self._independent_counts()
        return upper_bound(*counts, ERROR_PER_SIDE)

    def _independent_counts(self) -> tuple[float, float]:
        """Convert k and n to effective numbers of independent rows."""
        return self.k / self.design_effect, self.n / self.design_effect


@dataclass(frozen=True)
class ClassRow:
    """A row in the class table: the images that the model answered with one class."""

    name: str  # name of the answered class
    failures: Rate  # wrong answers among all answers with this class
    accepted: Rate  # accepted answers among all answers with this class
    accepted_failures: Rate  # wrong answers among the accepted answers with this class


def class_rows(outcomes: Outcomes, operating_point: OperatingPoint) -> tuple[list[ClassRow], int]:
    """Make the table of answered classes. Also return how many classes the table leaves out.

    The class with most wrong answers comes first. As in every metric, rows without a known failure
    or without an uncertainty are not counted. The table is empty if there are no class names.
    """
    names = outcomes.class_names
    answer = outcomes.prediction
    if names is None or answer is None:
        return [], 0
    is_counted = outcomes.evaluable & (answer >= 0)
    is_wrong = outcomes.failure == 1

    def count_per_class(mask: NDArray[np.bool_]) -> list[int]:
        """Count, for each class, the counted rows in the mask whose answer is this class."""
        counts: list[int] = np.bincount(answer[is_counted & mask], minlength=len(names)).tolist()
        return counts

    n = count_per_class(is_counted)
    n_wrong = count_per_class(is_wrong)
    n_accepted = count_per_class(operating_point.accepted)
    n_accepted_wrong = count_per_class(operating_point.accepted & is_wrong)
    design_effect = outcomes.tally().scores.design_effect

    def wrong_then_all(c: int) -> tuple[int, int]:
        """Return how many answers with this class are wrong, then how many there are."""
        return n_wrong[c], n[c]

    answered_classes = sorted(np.flatnonzero(n).tolist(), key=wrong_then_all, reverse=True)
    listed_classes = answered_classes[:MAX_CLASSES]
    table = []
    for c in listed_classes:
        failures = Rate(n_wrong[c], n[c], design_effect)
        accepted = Rate(n_accepted[c], n[c], design_effect)
        accepted_failures = Rate(n_accepted_wrong[c], n_accepted[c], design_effect)
        row = ClassRow(names[c], failures, accepted, accepted_failures)
        table.append(row)
    return table, len(answered_classes) - len(listed_classes)


HISTOGRAM_BINS = 30
RELIABILITY_BINS = 15
MAX_POINTS_PER_CHART = 2000  # maximum number of points of all lines in a chart
# ``Line.style_index`` values for kinds of answers. Methods have the values 0, 1, 2, ...
RIGHT_STYLE = -1
WRONG_STYLE = -2
OUTSIDE_STYLE = -3
DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}


def svg_line_styles(methods: Sequence[str]) -> list[dict[str, str]]:
    """Return each method's colour and SVG dash pattern, in the given order."""
    styles = line_styles_of(methods)
    return [
        {"colour": styles[method].colour, "dash": _svg_dash(styles[method].dash)}
        for method in methods
    ]


def _svg_dash(style: Any) -> str:  # noqa: ANN401 - a name, or matplotlib's (offset, lengths)
    """Convert a matplotlib line style to an SVG dash pattern."""
    if isinstance(style, str):
        return DASHES[style]
    _, lengths = style  # in multiples of the line width, which is about 2 on the page
    return " ".join(str(2 * length) for length in lengths)


def risk_coverage(methods: Sequence[Outcomes], operating_point: OperatingPoint) -> Chart:
    """Chart the selective risk against the coverage. The first method is the main method."""
    main, *_ = methods
    curves = [
        risk_coverage_curve(*evaluable_scores(method_outcomes)) for method_outcomes in methods
    ]
    largest_risk = max(_largest_risk(coverage, risk) for coverage, risk in curves)
    y_end = _round_axis_end(largest_risk)
    _, failure = evaluable_scores(main)
    accepted = operating_point.accepted[main.evaluable]
    n_accepted = int(accepted.sum())
    risk_of_accepted = float(failure[accepted].mean()) if n_accepted else 0.0
    error_rate = float(failure.mean())
    guide = None
    if error_rate > 0:
        ends = (0.0, error_rate, 1.0, error_rate)
        guide = (ends, f"all answers: {100 * error_rate:.1f} %")
    return Chart(
        key="risk",
        title="Errors among the accepted",
        explanation=(
            "Error rate among the answers that are accepted, against the share that is accepted; "
            "lower is better."
        ),
        x=Axis("accepted, % of all answers", name="coverage", low=0.0, high=1.0),
        y=Axis("wrong, % of the accepted", name="errors", low=0.0, high=y_end),
        lines=_thin_lines(methods, curves),
        marker=(n_accepted / len(failure), risk_of_accepted),
        guide=guide,
    )


def _largest_risk(coverage: Floats, risk: Floats) -> float:
    """Return a curve's largest risk, except for the noisy part at coverages below 5 %."""
    is_steady = coverage >= 0.05
    return float(risk[is_steady].max())


def roc(methods: Sequence[Outcomes], operating_point: OperatingPoint) -> Chart | None:
    """Chart two shares: how many of the right answers, and of the wrong answers, are accepted.

    If all answers are right, or all are wrong, return None.
    """
    main, *_ = methods
    _, failure = evaluable_scores(main)
    n_wrong = failure.sum()
    if n_wrong in {0, len(failure)}:
        return None
    curves = [roc_curve_points(*evaluable_scores(method_outcomes)) for method_outcomes in methods]
    accepted = operating_point.accepted[main.evaluable]
    wrong_accepted = float(accepted[failure == 1].mean())
    right_accepted = float(accepted[failure == 0].mean())
    x_axis = Axis("wrong answers accepted, %", name="wrong accepted", low=0.0, high=1.0)
    y_axis = Axis("right answers accepted, %", name="right accepted", low=0.0, high=1.0)
    lines = _thin_lines(methods, curves)
    return Chart(
        key="roc",
        title="Right and wrong answers told apart (ROC)",
        explanation=(
            "Share of the right answers that is accepted, against the share of the wrong ones; "
            "higher is better."
        ),
        x=x_axis,
        y=y_axis,
        lines=lines,
        marker=(wrong_accepted, right_accepted),
        guide=((0.0, 0.0, 1.0, 1.0), "by chance"),
    )


def histogram(outcomes: Outcomes, threshold: float | None, number: int) -> Chart:
    """Chart the uncertainty, with separate histograms for right and for wrong answers.

    Answers to pictures of none of the classes have a third histogram. The bars in each histogram
    add up to 100 %.

    Args:
        outcomes: The outcomes of a method.
        threshold: Where to draw a vertical line. None for no line.
        number: The method's number. 0 is the main method.
    """
    uncertainty, _ = evaluable_scores(outcomes)
    low, high = _uncertainty_range(outcomes)
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    style_of_row = _styles_of_answers(outcomes)
    labels = {RIGHT_STYLE: "right answers", WRONG_STYLE: "wrong answers"}
    if OUTSIDE_STYLE in style_of_row:
        labels[WRONG_STYLE] = "wrong within the classes"
        labels[OUTSIDE_STYLE] = "of none of the classes"
    # two points per bin, at the left and the right edge, draw the bins as steps
    x = np.repeat(edges, 2)[1:-1]
    lines = []
    for style_index, label in labels.items():
        counts, _ = np.histogram(uncertainty[style_of_row == style_index], edges)
        share = counts / max(counts.sum(), 1)
        is_filled = style_index != OUTSIDE_STYLE
        y = np.repeat(share, 2)
        line = Line(label, x=x, y=y, style_index=style_index, is_filled=is_filled)
        lines.append(line)
    largest_share = max(float(line.y.max()) for line in lines)
    title = "Uncertainty of right and wrong answers"
    if number > 0:
        title = outcomes.method or ""
    marker = None
    if threshold is not None:
        marker = (float(np.clip(threshold, low, high)), None)
    return Chart(
        key=f"histogram-{number}",
        title=title,
        explanation=(
            "Right and wrong answers by their uncertainty; the bars of each kind add up to 100 %."
        ),
        x=Axis("uncertainty", name="uncertainty", low=low, high=high, percent=False),
        y=Axis("% of its kind", name="share", low=0.0, high=_round_axis_end(largest_share)),
        lines=tuple(lines),
        marker=marker,
    )


def _uncertainty_range(outcomes: Outcomes) -> tuple[float, float]:
    """Return the two ends of the uncertainty axis. The ends always differ."""
    if outcomes.is_probability:
        return 0.0, 1.0
    uncertainty, _ = evaluable_scores(outcomes)
    low = float(uncertainty.min())
    high = float(uncertainty.max())
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def _styles_of_answers(outcomes: Outcomes) -> Ints:
    """Return the ``style_index`` (M,) of each row with an uncertainty and a known failure."""
    _, failure = evaluable_scores(outcomes)
    is_outside = outcomes.outside[outcomes.evaluable]
    style_within_classes = np.where(failure, WRONG_STYLE, RIGHT_STYLE)
    return np.where(is_outside, OUTSIDE_STYLE, style_within_classes)


def reliability(methods: Sequence[Outcomes]) -> Chart | None:
    """Chart the failure rate against the mean failure probability, in bins of equal width.

    Only methods with probabilities have a line. The result is None if the main method (the first
    method) has no probabilities.
    """
    main, *_ = methods
    if failure_probability_of(main) is None:
        return None
    lines = []
    for style_index, method_outcomes in enumerate(methods):
        stated_probability = failure_probability_of(method_outcomes)
        if stated_probability is not None:
            line = _reliability_line(method_outcomes, stated_probability, style_index)
            lines.append(line)
    x_axis = Axis("failure probability stated, %", name="stated", low=0.0, high=1.0)
    y_axis = Axis("answers that are wrong, %", name="found", low=0.0, high=1.0)
    return Chart(
        key="reliability",
        title="Stated and found failure rates",
        explanation=(
            "Share of wrong answers against the failure probability that was stated, in bins; "
            "bars: 95 % intervals."
        ),
        x=x_axis,
        y=y_axis,
        lines=tuple(reversed(lines)),
        guide=((0.0, 0.0, 1.0, 1.0), "as stated"),
    )


def _reliability_line(outcomes: Outcomes, stated_probability: Floats, style_index: int) -> Line:
    """Make a line through the bins of the ECE with at least one row.

    The main method's line (``style_index`` 0) has an interval at each bin.
    """
    rows = outcomes.evaluable
    counts = tie_counts(stated_probability[rows], outcomes.failure[rows])
    inner_edges = np.arange(1, RELIABILITY_BINS) / RELIABILITY_BINS
    # "left": a value on an edge belongs to the bin below the edge
    bin_of_value = np.searchsorted(inner_edges, counts.value, side="left")
    n_rows = np.bincount(bin_of_value, counts.size, RELIABILITY_BINS)
    n_wrong = np.bincount(bin_of_value, counts.wrong, RELIABILITY_BINS)
    sum_of_values = np.bincount(bin_of_value, counts.value * counts.size, RELIABILITY_BINS)
    has_rows = n_rows > 0
    n_rows = n_rows[has_rows]
    n_wrong = n_wrong[has_rows]
    mean_value = sum_of_values[has_rows] / n_rows
    line = Line(outcomes.method or "", x=mean_value, y=n_wrong / n_rows, style_index=style_index)
    is_main = style_index == 0
    if not is_main:
        return line
    design_effect = outcomes.tally().scores.design_effect
    rates = []
    for wrong_in_bin, rows_in_bin in zip(n_wrong, n_rows, strict=True):
        rate_of_bin = Rate(int(wrong_in_bin), int(rows_in_bin), design_effect)
        rates.append(rate_of_bin)
    low = np.array([rate.low for rate in rates])
    high = np.array([rate.high for rate in rates])
    return replace(line, low=low, high=high)


def _thin_lines(
    methods: Sequence[Outcomes], curves: Sequence[tuple[Floats, Floats]]
) -> tuple[Line, ...]:
    """Make one line per method, with few points. The main method's line is last, and so on top."""
    max_points = int(np.clip(MAX_POINTS_PER_CHART // len(methods), 40, 250))  # points per line
    lines = []
    for style_index, (method_outcomes, curve) in enumerate(zip(methods, curves, strict=True)):
        x, y = thin_points(*curve, max_points)
        line = Line(method_outcomes.method or "", x, y, style_index)
        lines.append(line)
    return tuple(reversed(lines))


ROUND_AXIS_ENDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def _round_axis_end(value: float) -> float:
    """Return the smallest of ``ROUND_AXIS_ENDS`` that is at least ``value``, or else 1."""
    for end in ROUND_AXIS_ENDS:
        if value <= end:
            return end
    return 1.0
