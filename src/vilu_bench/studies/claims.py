"""Claims of a publication: its numbers, and whether finished cells agree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vilu.metrics.bootstrap import Interval, Quantity
from vilu.metrics.catalog import METRICS
from vilu_bench.studies.board import Board, Entrant, Mean
from vilu_bench.studies.views import AnyClaim, Better, Steeper, Trend

LEAST_POINTS = 3  # of a trend line whose slope is to say something

Ruling = Literal["holds", "does not hold", "open", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    claim: AnyClaim
    # "holds" where the interval of the number is above zero, "does not hold" where it is below,
    # "open" where zero is in it, "not tested" where a method has no result or the number is
    # undefined
    ruling: Ruling
    # what decides; positive in favour, as a fraction (or per unit of the axis: a doubling, an
    # accuracy of 1)
    number: float | None
    interval: Interval | None  # of the number
    what: str
    reason: str | None = None  # why it was not tested


def decide(board: Board, claim: AnyClaim) -> Verdict:
    """The verdict on a claim by the results of a board."""
    match claim:
        case Better():
            return _better(board, claim)
        case Trend():
            return _trend(board, claim)
        case Steeper():
            return _steeper(board, claim)


def _better(board: Board, claim: Better) -> Verdict:
    data = claim.data or tuple(board.config.data)
    sides = [
        (side.method, [(name, side.setting) for name in data])
        for side in (claim.better, claim.than)
    ]
    a, b = (_entrants(board, *side) for side in sides)
    title, sign = METRICS[claim.metric].title, 1 if METRICS[claim.metric].higher_is_better else -1
    what = (
        f"{title} of {_name(board, claim.better.method, claim.better.setting)} "
        f"{'less' if sign > 0 else 'below'} that of {_name(board, claim.than.method, claim.than.setting)}, {_on(data)}"
    )
    if a is None or b is None:
        return _not_tested(claim, what)
    first, second = Mean(a), Mean(b)
    difference = first.less(second, claim.metric)
    if difference is None:
        return _not_tested(claim, what, "the methods have no seed in common")
    what += _on_seeds(first, second)
    return _rule(board, claim, sign * difference, what)


def _trend(board: Board, claim: Trend) -> Verdict:
    data = claim.data or tuple(board.config.data)
    x = [board.config.settings[name].x for name in claim.settings]
    what = f"change of the {METRICS[claim.metric].title} of {claim.method} per doubling, going {claim.metric_goes}"
    slopes = []
    for name in data:
        points = _entrants(board, claim.method, [(name, setting) for setting in claim.settings])
        if points is None:
            return _not_tested(claim, what)
        logs = np.log2(np.array(x, dtype=np.float64))
        slopes.append(Quantity.slope(logs, [one.quantity(claim.metric) for one in points]))
    sign = 1 if claim.metric_goes == "up" else -1
    slope = Quantity.mean(slopes)
    return _rule(board, claim, sign * slope, f"{what}, {_on(data)}")


def _steeper(board: Board, claim: Steeper) -> Verdict:
    data = claim.data or tuple(board.config.data)
    places = [(name, setting) for name in data for setting in claim.settings]
    sign = 1 if METRICS[claim.metric].higher_is_better else -1
    what = (
        f"gain in {METRICS[claim.metric].title} per 100 points of zero-shot accuracy, {claim.steeper} less "
        f"{claim.than}, over {len(places)} places"
    )
    a, b = (_entrants(board, method, places) for method in (claim.steeper, claim.than))
    if a is None or b is None:
        return _not_tested(claim, what)
    if len(places) < LEAST_POINTS:
        return _not_tested(claim, what, f"a trend line needs {LEAST_POINTS} places")
    shared = [sorted(one.found.keys() & two.found.keys()) for one, two in zip(a, b, strict=True)]
    if not all(shared):
        return _not_tested(claim, what, "the methods have no seed in common")
    slopes = []
    for side in (a, b):
        points = [
            replace(one, found={s: one.found[s] for s in seeds})
            for one, seeds in zip(side, shared, strict=True)
        ]
        x = np.array([point.accuracy for point in points])
        slopes.append(Quantity.slope(x, [point.quantity(claim.metric) for point in points]))
    return _rule(board, claim, sign * (slopes[0] - slopes[1]), what + _on_seeds(Mean(a), Mean(b)))


def _rule(board: Board, claim: AnyClaim, number: Quantity, what: str) -> Verdict:
    ends = number.interval(board.config.confidence)
    if not (math.isfinite(ends.ci_low) and math.isfinite(ends.ci_high)):
        return _not_tested(claim, what, "the number is undefined")
    ruling: Ruling = "holds" if ends.ci_low > 0 else "does not hold" if ends.ci_high < 0 else "open"
    return Verdict(claim, ruling, number.value, ends, what)


def _not_tested(
    claim: AnyClaim, what: str, reason: str = "a method has no result there"
) -> Verdict:
    return Verdict(claim, "not tested", None, None, what, reason)


def _on_seeds(a: Mean, b: Mean) -> str:
    """Which seeds decide, where a method has others, too, that enter its mean in a table."""
    sides = [(set(one.found), set(two.found)) for one, two in zip(a.parts, b.parts, strict=True)]
    if all(one == two for one, two in sides):
        return ""
    common = sorted(set.union(*(one & two for one, two in sides)))
    return f", on the seeds that both have ({', '.join(map(str, common))})"


def _entrants(
    board: Board, method: str, places: Iterable[tuple[str, str]]
) -> tuple[Entrant, ...] | None:
    """A method's results in all of some places; None where it lacks one."""
    found = [board.find(method, *place) for place in places]
    there = tuple(one for one in found if one is not None)
    return there if len(there) == len(found) else None


def _name(board: Board, method: str, setting: str) -> str:
    """The method, and the setting where there are several."""
    return f"{method} ({setting})" if len(board.config.settings) > 1 else method


def _on(data: tuple[str, ...]) -> str:
    return data[0] if len(data) == 1 else f"mean of {', '.join(data)}"
