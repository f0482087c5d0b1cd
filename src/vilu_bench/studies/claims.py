"""Decides whether a publication's claims hold, by the results of finished cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vilu.metrics.bootstrap import Interval, Quantity
from vilu.metrics.catalog import METRICS
from vilu_bench.studies.board import Board, Entrant, MethodMean
from vilu_bench.studies.views import (
    AnyClaim,
    BetterClaim,
    MethodInSetting,
    SteeperClaim,
    TrendClaim,
)

MIN_TREND_POINTS = 3  # a trend line with fewer points decides no claim
NO_SEED = "the methods have no seed in common"

Ruling = Literal["holds", "does not hold", "open", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """The decision on a claim."""

    claim: AnyClaim
    # "holds" if the interval of ``number`` is above zero, "does not hold" if below zero, "open" if
    # the interval contains zero. "not tested" if a method has no result or the number is
    # undefined.
    ruling: Ruling
    # The number that decides, as a fraction, not in percent. A positive number is in favour of the
    # claim. A slope is per unit of the axis: per doubling, or per accuracy of 1.
    number: float | None
    interval: Interval | None  # interval of ``number``
    number_in_words: str  # what ``number`` is
    reason: str | None = None  # why the claim was not tested


def decide(board: Board, claim: AnyClaim) -> Verdict:
    """Decide a claim by a board's results."""
    match claim:
        case BetterClaim():
            return _decide_better(board, claim)
        case TrendClaim():
            return _decide_trend(board, claim)
        case SteeperClaim():
            return _decide_steeper(board, claim)


def _decide_better(board: Board, claim: BetterClaim) -> Verdict:
    """Decide the claim that a method is better than another method."""
    data = claim.data or tuple(board.config.data)
    metric = METRICS[claim.metric]
    # The number is A - B ("A less B") if higher is better, or else B - A ("A below B").
    comparative = "less" if metric.higher_is_better else "below"
    better_name = _subject_in_words(board, claim.better)
    rival_name = _subject_in_words(board, claim.than)
    number_in_words = (
        f"{metric.title} of {better_name} {comparative} that of {rival_name}, "
        f"{_data_in_words(data)}"
    )
    better_cases = [(name, claim.better.setting) for name in data]
    rival_cases = [(name, claim.than.setting) for name in data]
    better_entrants = _entrants(board, claim.better.method, better_cases)
    rival_entrants = _entrants(board, claim.than.method, rival_cases)
    if better_entrants is None or rival_entrants is None:
        return _not_tested(claim, number_in_words)
    better_mean = MethodMean(better_entrants)
    rival_mean = MethodMean(rival_entrants)
    difference = better_mean.difference_from(rival_mean, claim.metric)
    if difference is None:
        return _not_tested(claim, number_in_words, NO_SEED)
    signed_difference = _sign(claim) * difference
    number_in_words += _common_seeds_in_words(better_entrants, rival_entrants)
    return _verdict(board, claim, signed_difference, number_in_words)


def _decide_trend(board: Board, claim: TrendClaim) -> Verdict:
    """Decide the claim that a metric rises or falls along the settings."""
    data = claim.data or tuple(board.config.data)
    number_in_words = (
        f"change of the {METRICS[claim.metric].title} of {claim.method} per doubling, "
        f"going {claim.metric_goes}"
    )
    positions = [board.config.settings[name].x for name in claim.settings]
    doublings = np.log2(np.array(positions, dtype=np.float64))
    slopes = []
    for name in data:
        cases = [(name, setting) for setting in claim.settings]
        points = _entrants(board, claim.method, cases)
        if points is None:
            return _not_tested(claim, number_in_words)
        quantities = [point.quantity(claim.metric) for point in points]
        slope_of_data = Quantity.slope(doublings, quantities)
        slopes.append(slope_of_data)
    slope = Quantity.mean(slopes)
    sign = 1 if claim.metric_goes == "up" else -1
    number_in_words += f", {_data_in_words(data)}"
    return _verdict(board, claim, sign * slope, number_in_words)


def _decide_steeper(board: Board, claim: SteeperClaim) -> Verdict:
    """Decide the claim that a metric rises more with accuracy for one method."""
    data = claim.data or tuple(board.config.data)
    cases = list(itertools.product(data, claim.settings))
    number_in_words = (
        f"gain in {METRICS[claim.metric].title} per 100 points of zero-shot accuracy, "
        f"{claim.steeper} less {claim.than}, over {len(cases)} cases"
    )
    steeper_entrants = _entrants(board, claim.steeper, cases)
    rival_entrants = _entrants(board, claim.than, cases)
    if steeper_entrants is None or rival_entrants is None:
        return _not_tested(claim, number_in_words)
    if len(cases) < MIN_TREND_POINTS:
        return _not_tested(claim, number_in_words, f"a trend line needs {MIN_TREND_POINTS} cases")
    seeds_of_cases = _common_seeds(steeper_entrants, rival_entrants)
    has_common_seeds = all(len(seeds) > 0 for seeds in seeds_of_cases)
    if not has_common_seeds:
        return _not_tested(claim, number_in_words, NO_SEED)
    steeper_slope = _slope_over_accuracy(steeper_entrants, seeds_of_cases, claim.metric)
    rival_slope = _slope_over_accuracy(rival_entrants, seeds_of_cases, claim.metric)
    signed_difference = _sign(claim) * (steeper_slope - rival_slope)
    number_in_words += _common_seeds_in_words(steeper_entrants, rival_entrants)
    return _verdict(board, claim, signed_difference, number_in_words)


def _sign(claim: BetterClaim | SteeperClaim) -> int:
    """Return 1 or -1. A difference in favour of the claim, times this factor, is positive."""
    return 1 if METRICS[claim.metric].higher_is_better else -1


def _common_seeds(a: Sequence[Entrant], b: Sequence[Entrant]) -> list[set[int]]:
    """Find, for each case, the seeds for which both methods have a result.

    ``a`` and ``b`` have the entrants of the two methods in the same cases.
    """
    seeds_of_cases = []
    for entrant, rival in zip(a, b, strict=True):
        seeds_of_cases.append(entrant.results.keys() & rival.results.keys())
    return seeds_of_cases


def _slope_over_accuracy(
    points: Sequence[Entrant], seeds_of_points: Sequence[set[int]], metric: str
) -> Quantity:
    """Compute the slope of a method's trend line over the zero-shot accuracy.

    Args:
        points: The method's results, one per point on the line.
        seeds_of_points: For each point, the seeds over which accuracy and metric are averaged.
        metric: Name of the metric.
    """
    accuracies = []
    quantities = []
    for point, seeds in zip(points, seeds_of_points, strict=True):
        results = {seed: point.results[seed] for seed in sorted(seeds)}
        entrant_on_seeds = replace(point, results=results)
        accuracies.append(entrant_on_seeds.accuracy)
        quantities.append(entrant_on_seeds.quantity(metric))
    return Quantity.slope(np.array(accuracies), quantities)


def _verdict(board: Board, claim: AnyClaim, number: Quantity, number_in_words: str) -> Verdict:
    """Decide a claim by the sign of ``number``."""
    interval = number.interval(board.config.confidence)
    if not np.isfinite([interval.ci_low, interval.ci_high]).all():
        return _not_tested(claim, number_in_words, "the number is undefined")
    ruling = _ruling(interval)
    return Verdict(claim, ruling, number.value, interval, number_in_words)


def _ruling(interval: Interval) -> Ruling:
    """Decide the claim that a number is above zero, from the number's interval."""
    if interval.ci_low > 0:
        return "holds"
    if interval.ci_high < 0:
        return "does not hold"
    return "open"


def _not_tested(
    claim: AnyClaim, number_in_words: str, reason: str = "a method has no result there"
) -> Verdict:
    """Return a verdict for a claim that cannot be decided."""
    return Verdict(
        claim,
        "not tested",
        number=None,
        interval=None,
        number_in_words=number_in_words,
        reason=reason,
    )


def _common_seeds_in_words(a: Sequence[Entrant], b: Sequence[Entrant]) -> str:
    """Name the common seeds of two methods, or return "" if both have the same seeds.

    The text explains why the number differs from the tables. The tables average over all seeds of
    a method, and so also over seeds for which the other method has no result.
    """
    pairs = zip(a, b, strict=True)
    have_equal_seeds = all(
        entrant.results.keys() == rival.results.keys() for entrant, rival in pairs
    )
    if have_equal_seeds:
        return ""
    common_seeds = set().union(*_common_seeds(a, b))
    seeds_in_words = ", ".join(str(seed) for seed in sorted(common_seeds))
    return f", on the seeds that both have ({seeds_in_words})"


def _entrants(
    board: Board, method: str, cases: Iterable[tuple[str, str]]
) -> tuple[Entrant, ...] | None:
    """Return a method's results in all cases (data set, setting), or None if a case has none."""
    entrants = []
    for data, setting in cases:
        entrant = board.find(method, data, setting)
        if entrant is None:
            return None
        entrants.append(entrant)
    return tuple(entrants)


def _subject_in_words(board: Board, subject: MethodInSetting) -> str:
    """Return the method's label, with the setting if the study has several."""
    if len(board.config.settings) == 1:
        return subject.method
    return f"{subject.method} ({subject.setting})"


def _data_in_words(data: tuple[str, ...]) -> str:
    """Name the data sets of a claim."""
    if len(data) == 1:
        return data[0]
    return f"mean of {', '.join(data)}"
