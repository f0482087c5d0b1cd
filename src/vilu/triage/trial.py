"""The plan of a predictor's test, fixed before the labels of the test are looked at."""

from __future__ import annotations

from typing import Final

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.anytime import STARTS, flawless_labels, grid_of, labels_needed
from vilu.metrics.counts import Floats
from vilu.triage.choose import choose_limit

ALLOWED_WRONG: Final = 2
"""The limit is chosen for the number of labels that certify it if so many answers are wrong.

At 5 % risk these are about 200 labels, so that about 1 % of the answers up to the limit are wrong.
"""


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
    ) -> Trial:
        """Plan a trial from scores alone.

        Args:
            n_fit: Number of labels that the predictor was fitted on.
            scores: (M,) uncertainties of the calibration photos.
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
        share = float((scores <= limit).mean())
        return cls(n_fit=n_fit, grid=grid, limit=limit, likely=likely, share=share)


def level_of_limit(delta: float) -> float:
    """Level of the test of the planned limit alone."""
    _, share = STARTS[-1]
    return share * delta
