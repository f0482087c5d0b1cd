"""From uncertainty to a probability of failure: what every predictor shares."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from vilu.errors import DataError, UsageError
from vilu.metrics.counts import real_vector
from vilu.predictors.probability import Calibrator, fit_calibrator
from vilu.types import UNKNOWN

CERTAIN = 1e-15
"""Probabilities nearer to 0 or 1 than this count as this far away, so that their log-odds are finite."""


@dataclasses.dataclass
class Calibrated:
    """A score that can be brought to a probability.

    Attributes:
        name: Of the method.
        is_probability: Whether the uncertainty estimates P(failure).
        calibrator_: From uncertainty to P(failure), learned on calibration rows; None without.
    """

    name: ClassVar[str]
    is_probability: ClassVar[bool] = False

    calibrator_: Calibrator | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """P(failure) (N,) float64 of uncertainties (N,) of this predictor; NaN stays NaN.

        Calibrated, where ``calibrate`` was called; else of methods whose uncertainty is a probability, without the bias
        of a weighted loss (``_log_weight``).

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale, and it has not been calibrated.
        """
        if self.calibrator_ is None:
            return self.raw_failure_probability(uncertainty)
        return self.calibrator_(self._calibration_score(real_vector(uncertainty, "uncertainty")))

    def raw_failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """As ``failure_probability`` before ``calibrate``.

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale.
        """
        if not self.is_probability:
            raise UsageError(
                f"{self.name} gives a score, not a probability of failure. Calibrate it (`vilu calibrate`), or take "
                "vilu_plus."
            )
        score = self._calibration_score(real_vector(uncertainty, "uncertainty"))
        probability: NDArray[np.float64] = special.expit(score)
        return probability

    def calibrate_scores(self, uncertainty: ArrayLike, failure: ArrayLike) -> Self:
        """As ``calibrate``, from uncertainties (N,) of this predictor and failures (N,); unknown ones are left out.

        Raises:
            DataError: If no row has both.
        """
        scores, failures = real_vector(uncertainty, "uncertainty"), real_vector(failure, "failure")
        known = np.isfinite(scores) & (failures != UNKNOWN)
        if not known.any():
            raise DataError(f"none of the {len(scores)} calibration rows has an uncertainty and a known failure.")
        score = self._calibration_score(scores[known])
        self.calibrator_ = fit_calibrator(score, failures[known].astype(np.int64), is_log_odds=self.is_probability)
        return self

    def _calibration_score(self, uncertainty: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds without the bias of the loss where the uncertainty is a probability, else the uncertainty itself."""
        if not self.is_probability:
            return uncertainty
        log_odds: NDArray[np.float64] = special.logit(np.clip(uncertainty, CERTAIN, 1 - CERTAIN)) - self._log_weight()
        return log_odds

    def _log_weight(self) -> float:
        """What a weighted loss adds to the log-odds of failure."""
        return 0.0
