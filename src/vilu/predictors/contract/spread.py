"""The spread of a score among the photos of a fit, for predictors fitted without labels.

Such a score ranks answers. As a probability of failure the score can be far off, since the score
was never compared with labels. So a score is shown as a quantile: the share of the photos of the
fit with at most this score.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor

SPREAD: Final = "spread"
"""Key of the quantiles in the notes of a predictor."""

N_QUANTILE_STEPS: Final = 200
"""Number of steps between the quantiles, from the smallest score to the largest."""


def note_spread(predictor: FailurePredictor, uncertainty: Floats) -> None:
    """Note the quantiles of the scores (N,) of the fit rows. NaN scores are left out."""
    scores = uncertainty[np.isfinite(uncertainty)]
    if len(scores):
        steps = np.linspace(0, 1, N_QUANTILE_STEPS + 1)
        quantiles = np.quantile(scores, steps)
        predictor.notes_[SPREAD] = quantiles.tolist()


def is_shown_as_probability(predictor: FailurePredictor) -> bool:
    """Whether the score of a predictor is shown as a probability of failure."""
    return predictor.is_probability and SPREAD not in predictor.notes_


def quantiles_in_spread(predictor: FailurePredictor, uncertainty: Floats) -> Floats | None:
    """(N,) share of the fit rows with at most this score; None without a noted spread.

    NaN scores have NaN quantiles.

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
    # Equal quantiles mean that many photos have the same score. All of these photos have at most
    # this score. So the last of equal quantiles is used, with the largest share.
    is_below_next = np.diff(quantiles) > 0
    is_last_of_equals = np.append(is_below_next, True)
    shares = np.linspace(0, 1, len(quantiles))[is_last_of_equals]
    share_of_row: Floats = np.interp(uncertainty, quantiles[is_last_of_equals], shares, left=0.0)
    return share_of_row
