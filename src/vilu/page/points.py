"""The operating points that a reader can choose from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vilu.metrics.counts import Floats, Ints, check_pair

MAX_POINTS = 500
"""Operating points in a page at most, however many rows there are."""


@dataclass(frozen=True, eq=False)
class Points:
    """Some thresholds with what they accept, from nothing to everything.

    Attributes:
        threshold: (P,) ascending; the first is -inf: accept nothing.
        accepted: (P,) rows with uncertainty <= threshold.
        wrong: (P,) how many of those are wrong.
        start: Position of the chosen threshold, or of the point nearest to what was chosen.
    """

    threshold: Floats
    accepted: Ints
    wrong: Ints
    start: int


def operating_points(
    uncertainty: ArrayLike, failure: ArrayLike, chosen: float | None, n_accepted: int, limit: int = MAX_POINTS
) -> Points:
    """Thresholds that accept about evenly growing numbers of rows, the chosen one exactly among them.

    Args:
        uncertainty: (N,) scores.
        failure: (N,) 1 where the answer is wrong, else 0.
        chosen: The chosen threshold; None where what is accepted is not said by one.
        n_accepted: How many rows the choice accepts: where the slider stands if there is no chosen threshold.
        limit: Number of points at most, at least 4.

    Raises:
        DataError: As for every metric.
    """
    scores, wrong = check_pair(uncertainty, failure)
    order = np.argsort(scores, kind="stable")
    scores, wrong_below = scores[order], np.concatenate([[0], np.cumsum(wrong[order])])
    distinct = np.unique(scores)
    if len(distinct) > limit - 2:
        rows = np.round(np.linspace(0, len(scores) - 1, limit - 2)).astype(np.int64)
        distinct = np.unique(scores[rows])
    threshold = np.concatenate([[-np.inf], distinct if chosen is None else np.union1d(distinct, [chosen])])
    accepted = np.searchsorted(scores, threshold, side="right")
    nearest = np.argmin(np.abs(accepted - n_accepted)) if chosen is None else np.searchsorted(threshold, chosen)
    return Points(threshold, accepted, wrong_below[accepted], int(nearest))
