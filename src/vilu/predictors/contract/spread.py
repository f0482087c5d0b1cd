"""The spread of a score among the fitted photos, for predictors fitted without labels.

Such a score ranks answers. As a probability of failure the score can be far off, since the score
was never compared with labels. So a score is shown as a quantile: the share of fitted photos with
at most this score.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor

SPREAD: Final = "spread"
"""Key of the quantiles in a predictor's notes."""

N_QUANTILE_STEPS: Final = 200
"""Number of steps between the quantiles, from the smallest score to the largest."""


def note_spread(predictor: FailurePredictor, uncertainty: Floats) -> None:
    """Note the quantiles of the fit rows' scores (N,). NaN scores are left out."""
    scores = uncertainty[np.isfinite(uncertainty)]
    if len(scores):
        steps = np.linspace(0, 1, N_QUANTILE_STEPS + 1)
        quantiles = np.quantile(scores, steps)
        predictor.notes_[SPREAD] = quantiles.tolist()


def is_shown_as_probability(predictor: FailurePredictor) -> bool:
    """Return whether a predictor's score is shown as a probability of failure."""
    return predictor.is_probability and SPREAD not in predictor.notes_


def quantiles_in_spread(predictor: FailurePredictor, uncertainty: Floats) -> Floats | None:
    """Return the quantiles (N,) of scores: the share of fit rows with the same score or less.

    NaN scores have NaN quantiles. If no spread is noted, the result is None.

    Examples:
        >>> import numpy as np, vilu
        >>> from vilu.predictors.contract.spread import note_spread, quantiles_in_spread
        >>> predictor = vilu.MCM()
        >>> note_spread(predictor, np.array([0.1, 0.2, 0.3]))
        >>> quantiles_in_spread(predictor, np.array([0.05, 0.2, 0.9])).tolist()
        [0.0, 0.5, 1.0]
    """
    if SPREAD not in predictor.notes_:
        return None
    quantiles = np.array(predictor.notes_[SPREAD])
    # If quantiles are equal, many photos have the same score. The last of the equal quantiles gives
    # the share of photos with at most this score, so only the last one is kept.
    is_below_next = np.diff(quantiles) > 0
    is_last_of_equals = np.append(is_below_next, True)
    shares = np.linspace(0, 1, len(quantiles))[is_last_of_equals]
    share_of_row: Floats = np.interp(uncertainty, quantiles[is_last_of_equals], shares, left=0.0)
    return share_of_row
