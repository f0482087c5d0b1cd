"""The charts of a page, as lines of numbers; the template draws them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vilu.metrics import risk_coverage_curve, roc_curve_points
from vilu.metrics.counts import Floats, tie_counts
from vilu.outcomes import Outcomes
from vilu.page.axes import Axis, Chart, Line, thin
from vilu.page.choice import Choice
from vilu.page.classes import Rate
from vilu.report.style import looks

BINS = 30
RELIABILITY_BINS = 15
TOTAL_POINTS = 2000
"""Of all lines of a chart; with many methods each has fewer."""

RIGHT_LOOK, WRONG_LOOK = -1, -2
"""Looks of answers; methods count from 0."""

DASHES = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}


def line_looks(n: int) -> list[dict[str, str]]:
    """Colour and SVG dash pattern of so many methods, the main one first."""
    found: list[dict[str, Any]] = list(itertools.islice(looks(), n))
    return [{"colour": one["color"], "dash": _dash(one["linestyle"])} for one in found]


def _dash(style: Any) -> str:  # noqa: ANN401 - a name, or matplotlib's (offset, lengths)
    return DASHES[style] if isinstance(style, str) else " ".join(str(2 * length) for length in style[1])


def risk_coverage(methods: Sequence[Outcomes], choice: Choice) -> Chart:
    """Selective risk over coverage, the main method (the first) on top."""
    limit = _points_each(methods)
    lines, top = [], 0.0
    for look, one in enumerate(methods):
        coverage, risk = risk_coverage_curve(*_known(one))
        top = max(top, float(risk[(coverage >= 0.05) | (coverage == 1)].max()))
        lines.append(Line(one.method or "", *thin(coverage, risk, limit), look))
    _, failure = _known(methods[0])
    accepted = choice.accepted[methods[0].evaluable]
    m = int(accepted.sum())
    rate = float(failure.mean())
    return Chart(
        key="risk",
        title="Errors among the accepted",
        says="Error rate among the answers that are accepted, against the share that is accepted; lower is better.",
        x=Axis("accepted, % of all answers", "coverage", 0.0, 1.0),
        y=Axis("wrong, % of the accepted", "errors", 0.0, _ceiling(top)),
        lines=tuple(reversed(lines)),
        marker=(m / len(failure), float(failure[accepted].mean()) if m else 0.0),
        guide=((0.0, rate, 1.0, rate), f"all answers: {100 * rate:.1f} %") if rate else None,
    )


def roc(methods: Sequence[Outcomes], choice: Choice) -> Chart | None:
    """Right answers accepted over wrong ones accepted; None where all answers are right, or all wrong."""
    _, failure = _known(methods[0])
    if not 0 < failure.sum() < len(failure):
        return None
    limit = _points_each(methods)
    lines = [
        Line(one.method or "", *thin(*roc_curve_points(*_known(one)), limit), look) for look, one in enumerate(methods)
    ]
    accepted = choice.accepted[methods[0].evaluable]
    return Chart(
        key="roc",
        title="Right and wrong answers told apart (ROC)",
        says="Share of the right answers that is accepted, against the share of the wrong ones; higher is better.",
        x=Axis("wrong answers accepted, %", "wrong accepted", 0.0, 1.0),
        y=Axis("right answers accepted, %", "right accepted", 0.0, 1.0),
        lines=tuple(reversed(lines)),
        marker=(float(accepted[failure == 1].mean()), float(accepted[failure == 0].mean())),
        guide=((0.0, 0.0, 1.0, 1.0), "by chance"),
    )


def histogram(outcomes: Outcomes, threshold: float | None, number: int) -> Chart:
    """Uncertainty of the right and of the wrong answers, in shares of their kind."""
    uncertainty, failure = _known(outcomes)
    low, high = (0.0, 1.0) if outcomes.is_probability else (float(uncertainty.min()), float(uncertainty.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    shares = []
    for kind in (0, 1):
        counts, _ = np.histogram(uncertainty[failure == kind], edges)
        shares.append(counts / max(counts.sum(), 1))
    x = np.repeat(edges, 2)[1:-1]
    return Chart(
        key=f"histogram-{number}",
        title="Uncertainty of right and wrong answers" if number == 0 else outcomes.method or "",
        says="Right answers and wrong ones by their uncertainty, each in shares of their kind.",
        x=Axis("uncertainty", "uncertainty", low, high, percent=False),
        y=Axis("% of its kind", "share", 0.0, _ceiling(max(float(share.max()) for share in shares))),
        lines=(
            Line("right answers", x, np.repeat(shares[0], 2), RIGHT_LOOK, filled=True),
            Line("wrong answers", x, np.repeat(shares[1], 2), WRONG_LOOK, filled=True),
        ),
        marker=None if threshold is None else (float(np.clip(threshold, low, high)), None),
    )


def reliability(methods: Sequence[Outcomes]) -> Chart | None:
    """Failure rate over the mean failure probability, in bins of equal width; only methods that give probabilities.

    None where the main method does not.
    """
    stated = [probability(one) for one in methods]
    if stated[0] is None:
        return None
    lines = [
        _reliability_line(one, p, look)
        for look, (one, p) in enumerate(zip(methods, stated, strict=True))
        if p is not None
    ]
    return Chart(
        key="reliability",
        title="Stated and found failure rates",
        says="Share of wrong answers against the failure probability that was stated, in bins; bars: 95 % intervals.",
        x=Axis("failure probability stated, %", "stated", 0.0, 1.0),
        y=Axis("answers that are wrong, %", "found", 0.0, 1.0),
        lines=tuple(reversed(lines)),
        guide=((0.0, 0.0, 1.0, 1.0), "as stated"),
    )


def probability(outcomes: Outcomes) -> Floats | None:
    """(N,) failure probabilities: the calibrated ones, or else an uncertainty that is one; None without."""
    if outcomes.failure_probability is not None:
        return outcomes.failure_probability
    return outcomes.uncertainty if outcomes.is_probability else None


def _reliability_line(outcomes: Outcomes, stated: Floats, look: int) -> Line:
    """The bins of the ECE, right-closed; empty ones have no point."""
    rows = outcomes.evaluable
    counts = tie_counts(stated[rows], outcomes.failure[rows])
    of_score = np.searchsorted(np.arange(1, RELIABILITY_BINS) / RELIABILITY_BINS, counts.value, side="left")
    n, wrong, total = (
        np.bincount(of_score, weights, RELIABILITY_BINS)
        for weights in (counts.size, counts.wrong, counts.value * counts.size)
    )
    there = n > 0
    rates = [Rate(int(k), int(m)) for k, m in zip(wrong[there], n[there], strict=True)]
    low, high = (np.array([getattr(rate, end) for rate in rates]) for end in ("low", "high"))
    ends = (low, high) if look == 0 else (None, None)
    return Line(outcomes.method or "", total[there] / n[there], wrong[there] / n[there], look, False, *ends)


def _known(outcomes: Outcomes) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    rows = outcomes.evaluable
    return outcomes.uncertainty[rows], outcomes.failure[rows]


def _points_each(methods: Sequence[Outcomes]) -> int:
    return int(np.clip(TOTAL_POINTS // len(methods), 40, 250))


def _ceiling(value: float) -> float:
    """A round end of an axis, at least as large and at most 1."""
    return next((top for top in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if value <= top), 1.0)
