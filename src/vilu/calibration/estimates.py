"""Error rates and class shares, from a few labels and predictions for all rows.

A random sample of n among N rows is labelled. Let y be 1 where a row has a property (a wrong
answer, or the class k), and 0 elsewhere. Every row has a prediction f for y. The share of all N
rows with the property is, for any weight w in [0, 1],

    mean of w f over all N rows + mean of y - w f over all N rows.

The first mean is known. The second mean is estimated from the n labelled rows. If w f predicts y
well, the estimate has a small variance. If predictions are wrong, the estimate has no bias. The
weight is the slope of y on f among the labelled rows (power tuning). With w = 0 the predictions
have no effect.

**Interval for the second mean.** With few labels a normal interval is too short, because rare
values are often missing in the sample. So the n residuals y - w f get random weights, drawn from a
Dirichlet distribution with n + 1 parameters of 1. The last weight belongs to an unseen row. This
row's residual is the largest or the smallest possible residual, each with probability 1/2. The
limits are quantiles of the weighted mean.

With w = 0 and k rows with the property, the weighted mean is a mixture of Beta(k + 1, n - k) and
Beta(k, n - k + 1). The limits are then the Clopper-Pearson limits with the mid-p value
(Lancaster 1961). For w > 0 there is no proof. ``benchmarks/estimate.py`` simulates how often the
interval contains the true share.

Sources: Angelopoulos et al., Prediction-powered inference (2023), and PPI++ (2023) for the weight.
Gaffke, Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
variable (2005), for the unseen row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.rules import refuse_fit_rows
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.probability import fit_calibrator
from vilu.validation import checked, require_between

MIN_LABELS: Final = 30
"""Smallest number of labels for using predictions."""

MIN_EXPECTED_OF_CLASS: Final = 15
"""Smallest expected number of labelled rows in a class for using predictions."""

N_DRAWS: Final = 10_000
"""Number of random weight draws. The limits then vary by about 1 % of the width."""

MAX_WEIGHTS_IN_MEMORY: Final = 2**21
"""Largest number of random weights in memory at once."""

N_FOLDS: Final = 10
"""Number of folds for labelled rows.

A labelled row gets a probability from a calibrator that is fitted without the row's fold.
"""

MIN_P_VALUE: Final = 1e-4
"""Labels are refused if "the labelled rows are a random sample" has a smaller p-value.

So the labels in a random sample are refused with this probability.
"""

EstimationMethod = Literal["prediction-powered", "exact"]


@dataclass(frozen=True)
class Estimate:
    """Estimated share of N rows with a property, with an interval.

    Attributes:
        name: "error rate", or a class name.
        share: The estimate.
        low: Lower limit of the interval.
        high: Upper limit of the interval.
        method: "prediction-powered", or "exact" (Clopper-Pearson) if there are too few labels or
            too few rows with the property.
        weight: Weight for the predictions, from 0 to 1.
        plain: Exact interval from the labels alone.
        n_labelled: Number of labelled rows.
        n: Number N of all rows.
    """

    name: str
    share: float
    low: float
    high: float
    method: EstimationMethod
    weight: float
    plain: tuple[float, float]
    n_labelled: int
    n: int

    @property
    def relative_width(self) -> float:
        """Interval width, divided by the width of ``plain``."""
        low, high = self.plain
        return (self.high - self.low) / (high - low)

    def __str__(self) -> str:
        text = f"{self.name}: {self.share:.1%} [{self.low:.1%}, {self.high:.1%}]"
        if self.method == "exact":
            return text
        return f"{text}, {self.relative_width:.2f} times as wide as by the labels alone"


@dataclass(frozen=True)
class Predictions:
    """Predictions for a property.

    Attributes:
        of_labelled: (n,) predictions for the labelled rows. The prediction for a row does not
            depend on the row's own label.
        of_all_rows: (N,) predictions for all rows.
    """

    of_labelled: Floats
    of_all_rows: Floats

    @property
    def smallest(self) -> float:
        """Smallest prediction."""
        return float(min(self.of_labelled.min(), self.of_all_rows.min()))

    @property
    def largest(self) -> float:
        """Largest prediction."""
        return float(max(self.of_labelled.max(), self.of_all_rows.max()))


@checked
def estimate(
    outcomes: Outcomes, *, confidence: float = 0.95, of_classes: bool = False
) -> tuple[Estimate, ...]:
    """Estimate the error rate, and the share of each class, from a few labels.

    The shares are shares of the N rows. The rows with a known failure must be a random sample of
    the N rows. Every single interval contains the true share with about the probability
    ``confidence``. This was found by simulation and is not guaranteed
    (``vilu.calibration.estimates``).

    Args:
        outcomes: N rows with an uncertainty, some with a known failure. The failure probabilities
            are ``failure_probability``, or else the uncertainty if the uncertainty is a
            probability. Otherwise a calibrator is fitted to the labels in folds.
        confidence: Confidence of the intervals, in (0, 1).
        of_classes: Whether to estimate the class shares, too. Class shares need ``prediction``,
            ``target`` in the labelled rows, and ``class_names``.

    Returns:
        The estimate for the error rate, and then the estimates for the classes in order.

    Raises:
        DataError: If there are fewer than two labels, if the labelled rows are clearly no random
            sample, if rows were used in the fit, or if classes are not known.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> probability = rng.random(3000) ** 3
        >>> failure = (rng.random(3000) < probability).astype(int)
        >>> true_rate = failure.mean()
        >>> failure[rng.permutation(3000)[100:]] = -1  # 100 labels are left
        >>> outcomes = vilu.Outcomes(probability, failure, is_probability=True)
        >>> (error_rate,) = vilu.estimate(outcomes)
        >>> print(error_rate)
        error rate: 26.4% [19.7%, 33.2%], 0.71 times as wide as by the labels alone
        >>> float(round(true_rate, 3))
        0.246
    """
    require_between("confidence", confidence)
    refuse_fit_rows(outcomes)
    usable_outcomes = outcomes.take(np.flatnonzero(np.isfinite(outcomes.uncertainty)))
    is_labelled = usable_outcomes.failure != UNKNOWN
    _require_random_labels(usable_outcomes, is_labelled)
    failure = (usable_outcomes.failure[is_labelled] == 1).astype(np.float64)
    failure_predictions = _failure_predictions(usable_outcomes, is_labelled)
    error_rate = _estimate_share(
        "error rate", failure, failure_predictions, confidence, min_expected=0
    )
    estimates = [error_rate]
    if of_classes:
        estimates += _estimate_class_shares(
            usable_outcomes, is_labelled, failure_predictions, confidence
        )
    return tuple(estimates)


def _require_random_labels(outcomes: Outcomes, is_labelled: NDArray[np.bool_]) -> None:
    """Refuse labels if labelled and unlabelled rows clearly differ in uncertainty."""
    from scipy import stats

    n_labelled = int(is_labelled.sum())
    if n_labelled < 2:
        raise DataError(
            f"{n_labelled} of the {len(outcomes):,} rows has both a score and a label. Label rows "
            "that are drawn at random, at least 100."
        )
    if n_labelled == len(outcomes):
        return
    ks_test = stats.ks_2samp(outcomes.uncertainty[is_labelled], outcomes.uncertainty[~is_labelled])
    if ks_test.pvalue < MIN_P_VALUE:
        raise DataError(
            f"the {n_labelled:,} labelled rows are no random sample of the {len(outcomes):,} rows: "
            f"their scores differ from those of the other rows (Kolmogorov-Smirnov, p = "
            f"{ks_test.pvalue:.1g}). Labels that `vilu next` or a person has chosen say nothing "
            "about all rows. Draw rows at random, label them, and give no other labels."
        )


def _failure_predictions(outcomes: Outcomes, is_labelled: NDArray[np.bool_]) -> Predictions:
    """Return failure probabilities from the outcomes, or else from calibrated uncertainties."""
    failure_probability = outcomes.failure_probability
    if failure_probability is None and outcomes.is_probability:
        failure_probability = outcomes.uncertainty
    if failure_probability is not None:
        return Predictions(
            of_labelled=failure_probability[is_labelled], of_all_rows=failure_probability
        )
    return _calibrate_in_folds(outcomes.uncertainty, outcomes.failure, is_labelled)


def _calibrate_in_folds(
    uncertainty: Floats, failure: Ints, is_labelled: NDArray[np.bool_]
) -> Predictions:
    """Return failure probabilities. A fold's calibrator is fitted to all other folds.

    ``of_labelled`` has, for each row, the probability from the calibrator without the row's fold.
    ``of_all_rows`` has the mean probability from all calibrators (Zrnic and Candes,
    Cross-prediction-powered inference).
    """
    labelled_uncertainty = uncertainty[is_labelled]
    labelled_failure = failure[is_labelled]
    rng = np.random.default_rng(0)
    # random folds, with sizes that differ by at most one row
    fold_of_label = rng.permutation(len(labelled_uncertainty)) % N_FOLDS
    of_labelled = np.empty(len(labelled_uncertainty))
    of_all_rows = np.zeros(len(uncertainty))
    for fold in np.unique(fold_of_label):
        is_in_fold = fold_of_label == fold
        calibrator = fit_calibrator(
            labelled_uncertainty[~is_in_fold], labelled_failure[~is_in_fold], is_log_odds=False
        )
        of_labelled[is_in_fold] = calibrator(labelled_uncertainty[is_in_fold])
        # In the mean of ``of_labelled``, a calibrator's weight is the share of the labels that are
        # in the fold. The calibrator has the same weight here. So the mean residual has no bias.
        of_all_rows += calibrator(uncertainty) * is_in_fold.mean()
    return Predictions(of_labelled=of_labelled, of_all_rows=of_all_rows)


def _estimate_class_shares(
    outcomes: Outcomes,
    is_labelled: NDArray[np.bool_],
    failure_predictions: Predictions,
    confidence: float,
) -> list[Estimate]:
    """Estimate the shares of all classes, in class order."""
    names = outcomes.class_names
    if names is None or outcomes.prediction is None or outcomes.target is None:
        raise DataError(
            "shares of classes need answers, names of classes, and the right class of every "
            "labelled row. These rows lack some of them."
        )
    right_class = outcomes.target[is_labelled]
    is_unknown = (right_class < 0) & ~outcomes.outside[is_labelled]
    if is_unknown.any():
        raise DataError(
            f"the right class of {int(is_unknown.sum()):,} labelled rows is not known. Shares of "
            "classes need it: where an answer is wrong, another class is right."
        )
    estimates = []
    for index, name in enumerate(names):
        # An answer predicts its class with the probability that the answer is right.
        predicts_class = outcomes.prediction == index
        class_probability = Predictions(
            of_labelled=predicts_class[is_labelled] * (1 - failure_predictions.of_labelled),
            of_all_rows=predicts_class * (1 - failure_predictions.of_all_rows),
        )
        is_of_class = (right_class == index).astype(np.float64)
        class_estimate = _estimate_share(
            name, is_of_class, class_probability, confidence, min_expected=MIN_EXPECTED_OF_CLASS
        )
        estimates.append(class_estimate)
    return estimates


def _estimate_share(
    name: str,
    has_property: Floats,
    predictions: Predictions,
    confidence: float,
    *,
    min_expected: int,
) -> Estimate:
    """Estimate the share of rows with a property.

    Args:
        name: Name of the share.
        has_property: (n,) 1 for a labelled row with the property, 0 for a labelled row without.
        predictions: Predictions for the property.
        confidence: Confidence of the interval, in (0, 1).
        min_expected: Predictions are not used if fewer labelled rows than this number are
            expected with the property, or without the property.
    """
    exact_estimate = _exact_estimate(name, has_property, len(predictions.of_all_rows), confidence)
    # The predictions and not the labels decide which interval is taken. If the labels decided, the
    # interval would be too short.
    n = len(has_property)
    n_expected = n * float(predictions.of_all_rows.mean())
    is_too_rare = min(n_expected, n - n_expected) < min_expected
    if n < MIN_LABELS or is_too_rare:
        return exact_estimate
    return _estimate_with_predictions(exact_estimate, has_property, predictions, confidence)


def _exact_estimate(name: str, has_property: Floats, n_rows: int, confidence: float) -> Estimate:
    """Estimate a share of ``n_rows`` rows from the labels alone (``has_property``, (n,))."""
    n = len(has_property)
    n_true = int(has_property.sum())
    delta = 1 - confidence
    low = lower_bound(n_true, n, delta / 2)
    high = upper_bound(n_true, n, delta / 2)
    return Estimate(
        name=name,
        share=n_true / n,
        low=low,
        high=high,
        method="exact",
        weight=0.0,
        plain=(low, high),
        n_labelled=n,
        n=n_rows,
    )


def _estimate_with_predictions(
    exact_estimate: Estimate, has_property: Floats, predictions: Predictions, confidence: float
) -> Estimate:
    """Estimate the share in ``exact_estimate`` again, from labels and predictions."""
    weight = tuned_weight(has_property, predictions.of_labelled)
    weighted_mean = weight * float(predictions.of_all_rows.mean())  # the known mean of w f
    residual = has_property - weight * predictions.of_labelled
    # A residual y - w f is largest with y = 1 and the smallest f, and smallest with y = 0 and the
    # largest f.
    largest_residual = 1 - weight * predictions.smallest
    smallest_residual = -weight * predictions.largest
    low, high = mean_interval(residual, smallest_residual, largest_residual, confidence)
    unbounded_share = weighted_mean + residual.mean()
    share = float(np.clip(unbounded_share, 0, 1))
    return replace(
        exact_estimate,
        share=share,
        low=max(weighted_mean + low, 0.0),
        high=min(weighted_mean + high, 1.0),
        method="prediction-powered",
        weight=weight,
    )


def tuned_weight(has_property: Floats, prediction: Floats) -> float:
    """Return the weight w in [0, 1] that gives the residuals y - w f the smallest variance.

    y is ``has_property`` (n,), and f is ``prediction`` (n,). The weight is the slope in a
    regression of y on f, limited to [0, 1]. If all predictions are equal, the weight is 0.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.estimates import tuned_weight
        >>> round(tuned_weight(np.array([0.0, 0, 1, 1]), np.array([0.0, 1, 1, 2])), 6)
        0.5
    """
    centred_prediction = prediction - prediction.mean()
    sum_of_squares = float(centred_prediction @ centred_prediction)
    if sum_of_squares == 0:
        return 0.0
    slope = float(centred_prediction @ has_property) / sum_of_squares
    return min(max(slope, 0.0), 1.0)


def mean_interval(
    values: Floats, smallest: float, largest: float, confidence: float
) -> tuple[float, float]:
    """Return the lower and upper limit for a population mean, from a random sample of values.

    Args:
        values: The sample's values (n,).
        smallest: Smallest possible value in the population.
        largest: Largest possible value in the population.
        confidence: Confidence of the interval, in (0, 1).

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.estimates import mean_interval
        >>> low, high = mean_interval(np.zeros(100), 0, 1, 0.95)  # all 100 values are 0
        >>> low, abs(high - (1 - 0.05**0.01)) < 0.001  # mid-p: (1 - high)^100 / 2 = 0.025
        (0.0, True)
    """
    n = len(values)
    draws_in_memory = max(MAX_WEIGHTS_IN_MEMORY // (n + 1), 1)
    draws_per_block = min(draws_in_memory, N_DRAWS)
    means = []
    for first_draw in range(0, N_DRAWS, draws_per_block):
        n_draws = min(draws_per_block, N_DRAWS - first_draw)
        weights = _random_weights(n + 1, n_draws, seed=first_draw)  # every block has another seed
        mean_of_seen = weights[:, :n] @ values
        weight_of_unseen = weights[:, n]
        means.append(mean_of_seen + weight_of_unseen * smallest)
        means.append(mean_of_seen + weight_of_unseen * largest)
    delta = 1 - confidence
    low, high = np.quantile(np.concatenate(means), [delta / 2, 1 - delta / 2])
    return float(low), float(high)


# All classes have the same labelled rows, and so the same weights. With few labels, all draws are
# one block, and the weights are drawn only once.
@lru_cache(maxsize=1)
def _random_weights(n: int, n_draws: int, seed: int) -> Floats:
    """Draw (n_draws, n) weights from the Dirichlet distribution with n parameters of 1."""
    rng = np.random.default_rng(seed)
    exponential = rng.standard_exponential((n_draws, n))
    weights: Floats = exponential / exponential.sum(axis=1, keepdims=True)
    return weights
