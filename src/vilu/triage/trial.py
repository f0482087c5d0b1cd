"""The plan for a predictor's test, fixed before any look at the test's labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.anytime import (
    SEQUENCE_STARTS,
    n_labels_needed,
    n_right_labels_needed,
    threshold_grid,
)
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.text import plural
from vilu.triage.choose import choose_limit

N_WRONG_PLANNED_FOR: Final = 2
"""The planned label count certifies the limit even with this many wrong answers.

At 5 % risk the planned count is about 200. So about 1 % of the answers up to the limit may be
wrong.
"""

NAMES_SHOWN: Final = 5
"""An error names at most this many photos without a score."""


class Trial(FrozenModel):
    """The plan for a predictor's test: the thresholds, and which labels count.

    Attributes:
        n_fit: How many labels the predictor was fitted on.
        grid: The thresholds, ascending.
        limit: Only labels of photos with an uncertainty up to this limit count.
        likely: Whether a guarantee up to the limit is expected, from the predictor's probabilities.
        share: Share of the calibration photos with an uncertainty up to the limit.
        level: Level of the test, or 0 until the predictor has enough labels to be certified.
    """

    n_fit: int = Field(ge=0)
    grid: tuple[float, ...]
    limit: float
    likely: bool
    share: float = Field(ge=0, le=1)
    level: float = Field(default=0, ge=0, lt=1)

    @classmethod
    def plan(
        cls,
        n_fit: int,
        scores: Floats,
        n_answered: int,
        max_risk: float,
        delta: float,
        *,
        least_share: float = 0.0,
    ) -> Self:
        """Plan a trial from scores alone.

        Args:
            n_fit: How many labels the predictor was fitted on.
            scores: (M,) uncertainties of the calibration photos, all finite (``require_scores``).
            n_answered: How many calibration photos have a label. The limit is chosen for a larger
                number, because more labels will come.
            max_risk: Largest allowed error rate.
            delta: Level for the test.
            least_share: At least this share of the photos has an uncertainty up to the limit.
        """
        level = level_of_limit(delta)
        # enough labels for ``N_WRONG_PLANNED_FOR`` wrong answers, and more labels than now
        n_planned = max(
            n_labels_needed(N_WRONG_PLANNED_FOR, max_risk, level),
            n_answered + n_right_labels_needed(max_risk, level),
        )
        n_labels = min(n_planned, len(scores))  # there cannot be more labels than photos
        limit, is_expected = choose_limit(scores, n_labels, max_risk, level)
        # the smallest limit with at least ``least_share`` of the photos
        least_limit = float(np.quantile(scores, least_share, method="higher"))
        if limit < least_limit:
            limit = least_limit
            is_expected = False
        grid = tuple(threshold_grid(scores, limit).tolist())
        share = share_up_to(limit, scores)
        return cls(n_fit=n_fit, grid=grid, limit=limit, likely=is_expected, share=share)

    def with_raised_limit(self, n_thresholds: int, scores: Floats) -> Self:
        """Raise the limit by ``n_thresholds`` thresholds, but not beyond the grid.

        ``scores`` (M,) are the calibration photos' uncertainties.
        """
        # index of the last threshold up to the limit
        index_of_limit = int(np.searchsorted(self.grid, self.limit, side="right")) - 1
        last_index = len(self.grid) - 1
        limit = self.grid[min(index_of_limit + n_thresholds, last_index)]
        share = share_up_to(limit, scores)
        return self.model_copy(update={"limit": limit, "share": share})


def share_up_to(limit: float, scores: Floats) -> float:
    """Compute the share of scores (M,) up to a limit."""
    return float((scores <= limit).mean())


def require_scores(scores: Floats, rows: Ints, names: Sequence[str]) -> None:
    """Raise DataError if a test could draw a photo without a score.

    Args:
        scores: (N,) uncertainties of all photos. NaN for a photo without a score.
        rows: (M,) rows that the test may draw.
        names: N paths or identifiers, for the error.
    """
    rows_without_score = rows[np.isnan(scores[rows])]
    if not len(rows_without_score):
        return
    first_rows = rows_without_score[:NAMES_SHOWN].tolist()
    first_names = ", ".join(repr(names[row]) for row in first_rows)
    raise DataError(
        f"the predictor has no score (NaN) for {plural(len(rows_without_score), 'photo')} of "
        f"{len(rows):,} that labels could be drawn from: {first_names}. Leave them out, or fit "
        "anew."
    )


def level_of_limit(delta: float) -> float:
    """Return the part of the level ``delta`` for the planned limit alone."""
    _, share = SEQUENCE_STARTS[-1]
    return share * delta
