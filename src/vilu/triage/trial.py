"""The plan of a predictor's test, fixed before the labels of the test are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.anytime import STARTS, flawless_labels, grid_of, labels_needed
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.text import plural
from vilu.triage.choose import choose_limit

ALLOWED_WRONG: Final = 2
"""The limit is chosen for the number of labels that certify it if so many answers are wrong.

At 5 % risk these are about 200 labels, so that about 1 % of the answers up to the limit are wrong.
"""

NAMES_SHOWN: Final = 5
"""Maximum number of photos without a score that an error names."""


class Trial(Model):
    """The test of a predictor: the thresholds that it may get, and how far labels count.

    Attributes:
        n_fit: Number of labels that the predictor was fitted on.
        grid: Thresholds, ascending.
        limit: Only labels of photos up to this uncertainty count.
        likely: Whether a guarantee up to the limit is expected, by the predictor's probabilities.
        share: Share of the calibration photos that the limit includes.
        level: Level of the test; 0 until the predictor has enough labels to be certified.
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
            n_fit: Number of labels that the predictor was fitted on.
            scores: (M,) uncertainties of the calibration photos, all finite (``require_scores``).
            n_answered: Number of calibration photos that have a label. More labels will come, so
                the limit is chosen for more.
            max_risk: Largest error rate that is allowed.
            delta: Level of the test.
            least_share: The limit includes at least this share of the photos.
        """
        level = level_of_limit(delta)
        n_planned = max(
            labels_needed(ALLOWED_WRONG, max_risk, level),
            n_answered + flawless_labels(max_risk, level),
        )
        limit, likely = choose_limit(scores, min(n_planned, len(scores)), max_risk, level)
        # The smallest limit that includes this share of the photos.
        least_limit = float(np.quantile(scores, least_share, method="higher"))
        if limit < least_limit:
            limit = least_limit
            likely = False
        grid = tuple(grid_of(scores, limit).tolist())
        share = share_up_to(limit, scores)
        return cls(n_fit=n_fit, grid=grid, limit=limit, likely=likely, share=share)

    def further(self, n_thresholds: int, scores: Floats) -> Self:
        """The trial with its limit ``n_thresholds`` further up the grid, at most at its end.

        ``scores`` (M,) are the uncertainties of the calibration photos.
        """
        last = int(np.searchsorted(self.grid, self.limit, side="right")) - 1
        limit = self.grid[min(last + n_thresholds, len(self.grid) - 1)]
        return self.model_copy(update={"limit": limit, "share": share_up_to(limit, scores)})


def share_up_to(limit: float, scores: Floats) -> float:
    """Share of the scores (M,) up to a limit."""
    return float((scores <= limit).mean())


def require_scores(scores: Floats, rows: Ints, names: Sequence[str]) -> None:
    """Raise DataError if a photo that a test may draw has no score.

    Args:
        scores: (N,) uncertainties of all photos; NaN for a photo without a score.
        rows: (M,) rows of the photos that the test may draw.
        names: N paths or identifiers, for the error.
    """
    unscored = rows[np.isnan(scores[rows])]
    if not len(unscored):
        return
    shown = ", ".join(repr(names[row]) for row in unscored[:NAMES_SHOWN].tolist())
    raise DataError(
        f"the predictor has no score (NaN) for {plural(len(unscored), 'photo')} of "
        f"{len(rows):,} that labels could be drawn from: {shown}. Leave them out, or fit anew."
    )


def level_of_limit(delta: float) -> float:
    """Level of the test of the planned limit alone."""
    _, share = STARTS[-1]
    return share * delta
