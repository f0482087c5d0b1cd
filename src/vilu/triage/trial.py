"""What is fixed of a predictor before its labels are looked at."""

from __future__ import annotations

from typing import Final

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.anytime import grid_of
from vilu.metrics.counts import Floats
from vilu.triage.choose import choose_limit

PLANNED: Final = 200
"""Calibration labels for which the limit is chosen: so many show a risk of 1 % to be below 5 %."""


class Trial(Model):
    """A predictor that is tested: the thresholds that it may get, and how far its labels reach.

    Attributes:
        n_fit: Labels that it was fitted on.
        grid: Thresholds, ascending.
        limit: Only labels of photos up to this uncertainty count for it.
        likely: Whether its own probabilities let one hope for a guarantee there.
        attempt: Its number among those of which labels could certify something; 0: not yet.
    """

    n_fit: int = Field(ge=0)
    grid: tuple[float, ...]
    limit: float
    likely: bool
    attempt: int = Field(default=0, ge=0)

    @classmethod
    def plan(
        cls,
        n_fit: int,
        scores: Floats,
        n_labels: int,
        max_risk: float,
        delta: float,
        *,
        least_share: float = 0.0,
    ) -> Trial:
        """A new one, from the scores (M,) of calibration photos and how many labels they may get.

        At least the share ``least_share`` of the photos lies below the limit.
        """
        limit, likely = choose_limit(scores, min(n_labels, len(scores)), max_risk, delta)
        lowest = float(np.quantile(scores, least_share, method="higher"))
        if limit < lowest:
            limit = lowest
            likely = False
        grid = tuple(grid_of(scores, limit).tolist())
        return cls(n_fit=n_fit, grid=grid, limit=limit, likely=likely)
