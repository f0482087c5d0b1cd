"""Calibrators: functions from a score to a probability of failure, fitted on calibration rows.

There are four forms: temperature scaling, Platt scaling, beta calibration, isotonic regression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from vilu.artifacts.documents import FrozenModel
from vilu.errors import DataError
from vilu.metrics.counts import Floats

N_FOLDS = 10  # of the cross-validation
MAX_NEWTON_STEPS = 100  # Newton's method needs about eight
# with fewer failures, or with fewer successes, the smoothest form is used without cross-validation
MIN_ROWS_OF_EACH_KIND = 20
MIN_ISOTONIC_ROWS = 1000  # with fewer rows, the steps of isotonic regression would fit the noise


class LogisticForm(NamedTuple):
    """A logistic form: the log-odds of failure are linear in features of the score."""

    features: Callable[[Floats], Floats]  # from scores (N,) to features (N, F)
    has_intercept: bool  # whether the linear function has an intercept
    needs_log_odds: bool  # whether the score must be the log-odds of a probability


@np.errstate(under="ignore")  # an underflow to 0 is exact enough
def expit(log_odds: Floats) -> Floats:
    """Compute probabilities 1 / (1 + exp(-x)) from log-odds x. They are exact also near 0 and 1.

    SciPy has the same function, but importing SciPy takes half a second.
    """
    exponential = np.exp(-np.abs(log_odds))  # at most 1, so there is no overflow
    probability: Floats = np.where(log_odds < 0, exponential, 1.0) / (1 + exponential)
    return probability


@np.errstate(under="ignore", invalid="ignore")  # underflow is exact enough; NaN stays NaN
def _logarithms(score: Floats) -> Floats:
    """Compute features (N, 2) from log-odds (N,): ln p and -ln(1 - p)."""
    log_p = -np.logaddexp(0, -score)
    minus_log_complement = np.logaddexp(0, score)
    return np.stack([log_p, minus_log_complement], axis=1)


def _as_column(score: Floats) -> Floats:
    """Return the scores (N,) themselves as features (N, 1)."""
    return score[:, None]


LOGISTIC_FORMS = {
    "temperature": LogisticForm(_as_column, has_intercept=False, needs_log_odds=True),
    "platt": LogisticForm(_as_column, has_intercept=True, needs_log_odds=False),
    "beta": LogisticForm(_logarithms, has_intercept=True, needs_log_odds=True),
}
"""The logistic forms, sorted by smoothness, the smoothest form first.

Temperature scaling (Guo et al. 2017) and beta calibration (Kull et al. 2017) need a probability.
"""


class _FitFacts(FrozenModel):
    """Facts about a calibrator's fit."""

    n: int = Field(ge=1)  # number of calibration rows
    n_failures: int = Field(ge=0)
    # held-out log-loss of every tried form, by name
    log_loss: dict[str, float] = Field(default_factory=dict)


class Logistic(_FitFacts):
    """p = sigmoid(weights . features(s) + intercept) for a score s.

    If the method estimates a probability, the score is the log-odds of failure.
    """

    form: Literal["temperature", "platt", "beta"]
    weights: tuple[float, ...] = Field(min_length=1, max_length=2)
    intercept: float

    @np.errstate(under="ignore")  # an underflow to 0 is exact enough
    def __call__(self, score: Floats) -> Floats:
        """Compute probabilities (N,) from scores (N,)."""
        features = LOGISTIC_FORMS[self.form].features(score)
        weights = np.array(self.weights)
        log_odds = features @ weights + self.intercept
        return expit(log_odds)


def identity_calibrator(failure: NDArray[np.int64]) -> Logistic:
    """Make the calibrator that leaves a method's probabilities unchanged.

    ``failure`` (N,) are the failures of the calibration rows. Only the counts are stored.
    """
    n_failures = int((failure == 1).sum())
    # the score is the log-odds, so weight 1 and intercept 0 give back the same probability
    return Logistic(
        form="temperature",
        weights=(1.0,),
        intercept=0.0,
        n=len(failure),
        n_failures=n_failures,
    )


class Isotonic(_FitFacts):
    """A non-decreasing function of the score: linear between knots, constant outside the knots."""

    form: Literal["isotonic"]
    score: tuple[float, ...] = Field(min_length=1)  # of the knots, ascending
    probability: tuple[Annotated[float, Field(ge=0, le=1)], ...]  # of the knots

    def __call__(self, score: Floats) -> Floats:
        """Compute probabilities (N,) from scores (N,)."""
        return np.interp(score, self.score, self.probability)


Calibrator = Logistic | Isotonic
_CALIBRATOR_READER: TypeAdapter[Calibrator] = TypeAdapter(
    Annotated[Calibrator, Field(discriminator="form")]
)


def fit_calibrator(score: Floats, failure: NDArray[np.int64], *, is_log_odds: bool) -> Calibrator:
    """Fit the calibrator form with the least log-loss in 10-fold cross-validation.

    A smoother form is preferred if its log-loss is within one standard error of the least.

    Platt scaling is always tried. Temperature scaling and beta calibration are tried if the scores
    are log-odds. Isotonic regression is tried with at least 1,000 rows. With fewer than 20 failures
    or 20 successes no forms are compared. Then temperature scaling is fitted to log-odds, and Platt
    scaling to scores that are not log-odds.

    Args:
        score: (N,) finite scores. Higher means more likely wrong.
        failure: (N,) 1 for a failure, 0 for a success.
        is_log_odds: Whether the scores are log-odds of failure.

    Examples:
        >>> import numpy as np
        >>> from vilu.predictors.contract.probability import fit_calibrator
        >>> score, failure = np.array([-1.0, 0.0, 1.0]), np.array([0, 0, 1])
        >>> fit_calibrator(score, failure, is_log_odds=True).form  # too few rows
        'temperature'
    """
    forms: list[str] = []
    for name, form in LOGISTIC_FORMS.items():
        if is_log_odds or not form.needs_log_odds:
            forms.append(name)
    n_failures = int(failure.sum())
    n_successes = len(failure) - n_failures
    if min(n_failures, n_successes) < MIN_ROWS_OF_EACH_KIND:
        smoothest_form = forms[0]
        return _fit(smoothest_form, score, failure)
    if len(score) >= MIN_ISOTONIC_ROWS:
        forms.append("isotonic")
    losses = {name: _held_out_losses(name, score, failure) for name in forms}
    calibrator = _fit(_smoothest_good_form(losses), score, failure)
    log_loss = {name: float(loss.mean()) for name, loss in losses.items()}
    return calibrator.model_copy(update={"log_loss": log_loss})


def _smoothest_good_form(losses: dict[str, Floats]) -> str:
    """Return the smoothest form with a mean log-loss within one standard error of the least.

    ``losses`` has the log-losses (N,) of all forms, the smoothest form first. The standard error
    comes from the differences, row by row, to the best form's losses. So rows that are hard for all
    forms add nothing to the error.
    """
    losses_of_best = min(losses.values(), key=np.mean)
    for name, loss in losses.items():
        excess_loss = loss - losses_of_best
        standard_error = excess_loss.std(ddof=1) / np.sqrt(len(excess_loss))
        if excess_loss.mean() <= standard_error:
            return name
    raise AssertionError("the form of the least loss has no excess")


def read_calibrator(value: object) -> Calibrator:
    """Read a calibrator from plain JSON. Raise DataError if the value describes no calibrator."""
    try:
        calibrator = _CALIBRATOR_READER.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise DataError(f"this is no calibrator of probabilities: {message}.") from error
    if isinstance(calibrator, Isotonic):
        _require_knots(calibrator)
    else:
        _require_weights(calibrator)
    return calibrator


def _require_knots(calibrator: Isotonic) -> None:
    """Refuse knots unless the scores rise, and every score has a probability."""
    has_pairs = len(calibrator.score) == len(calibrator.probability)
    steps = np.diff(calibrator.score)
    is_rising = bool((steps > 0).all())
    if not (has_pairs and is_rising):
        raise DataError("this is no calibrator of probabilities: its knots are not in order.")


def _require_weights(calibrator: Logistic) -> None:
    """Refuse the calibrator unless its form has as many features as weights."""
    zero_score = np.zeros(1)
    features = LOGISTIC_FORMS[calibrator.form].features(zero_score)
    n_weights = len(calibrator.weights)
    if n_weights != features.shape[1]:
        raise DataError(
            f"this is no calibrator of probabilities: {calibrator.form} has not {n_weights} "
            "weights."
        )


def _held_out_losses(form: str, score: Floats, failure: NDArray[np.int64]) -> Floats:
    """Compute the log-loss (N,) of every row, under a fit to the folds without this row.

    The folds are stratified by failure.
    """
    rng = np.random.default_rng(0)
    fold_of_row = np.empty(len(score), np.int64)
    for is_failure in (0, 1):
        rows = np.flatnonzero(failure == is_failure)
        # the shuffled rows are dealt out to the folds in turn
        fold_of_row[rng.permutation(rows)] = np.arange(len(rows)) % N_FOLDS
    losses = np.empty(len(score))
    for fold in range(N_FOLDS):
        is_held_out = fold_of_row == fold
        calibrator = _fit(form, score[~is_held_out], failure[~is_held_out])
        p = calibrator(score[is_held_out])
        likelihood = np.where(failure[is_held_out] == 1, p, 1 - p)
        losses[is_held_out] = -np.log(likelihood.clip(1e-12))  # finite also for a likelihood of 0
    return losses


def _fit_isotonic(score: Floats, failure: NDArray[np.int64]) -> Isotonic:
    """Fit an isotonic regression, with probabilities from 1 / (N + 2) to 1 - 1 / (N + 2).

    SciPy has such a function, but importing SciPy takes half a second.
    """
    # the different scores, and for each score the counts of rows and failures
    unique_score, index_of_row, n_rows = np.unique(score, return_inverse=True, return_counts=True)
    n_wrong = np.bincount(index_of_row, weights=failure).astype(np.int64)
    rate = _rising_rates(n_wrong, n_rows)
    min_probability = 1 / (len(score) + 2)
    probability = np.clip(rate, min_probability, 1 - min_probability)
    # Knots are the first and the last score, and the scores before and after every rise. Between
    # two rises all probabilities are equal, so no further knots are needed.
    ends = [0, len(unique_score) - 1]
    rises = np.diff(probability)
    before_rise = np.flatnonzero(rises)
    after_rise = before_rise + 1
    ends_and_rises = np.concatenate([ends, before_rise, after_rise])
    knots = np.unique(ends_and_rises)
    return Isotonic(
        form="isotonic",
        score=unique_score[knots].tolist(),
        probability=probability[knots].tolist(),
        n=len(score),
        n_failures=int(failure.sum()),
    )


def _rising_rates(n_wrong: NDArray[np.int64], n_rows: NDArray[np.int64]) -> Floats:
    """Compute rising error rates (V,) at V ascending scores, by pooling adjacent violators.

    The result is the least-squares fit among rates that never decrease. ``n_wrong`` (V,) and
    ``n_rows`` (V,) are the counts at the scores. At first every score is a pool. A pool violates
    the order if its rate is not above the preceding pool's rate. Every pass joins all violating
    pools to the preceding pools.
    """
    pool_wrong = n_wrong
    pool_rows = n_rows
    begins_pool = _begins_pool(pool_wrong, pool_rows)
    while not begins_pool.all():
        # join a pool to the preceding pool, unless the preceding pool has a lower rate
        first_index = np.flatnonzero(begins_pool)
        pool_wrong = np.add.reduceat(pool_wrong, first_index)
        pool_rows = np.add.reduceat(pool_rows, first_index)
        begins_pool = _begins_pool(pool_wrong, pool_rows)
    rate_of_row = np.repeat(pool_wrong / pool_rows, pool_rows)  # rows by ascending score
    last_row_of_score = np.cumsum(n_rows) - 1
    return rate_of_row[last_row_of_score]


def _begins_pool(n_wrong: NDArray[np.int64], n_rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask (V,): true if the rate begins a new pool.

    The rates are ``n_wrong`` (V,) / ``n_rows`` (V,). The first rate begins a pool, and so does
    every rate above the preceding rate.
    """
    # The rate w1 / n1 is above the preceding rate w0 / n0 if w1 * n0 > w0 * n1. These products are
    # whole numbers, so the comparison is exact.
    products = n_wrong[1:] * n_rows[:-1]
    preceding_products = n_wrong[:-1] * n_rows[1:]
    is_above = products > preceding_products
    return np.append(True, is_above)


def _fit(form: Any, score: Floats, failure: NDArray[np.int64]) -> Calibrator:  # noqa: ANN401
    """Fit a calibrator: isotonic regression, or logistic regression without a penalty.

    ``form`` is a key of ``LOGISTIC_FORMS``, or "isotonic". A logistic regression has smoothed
    targets (``_smoothed_targets``).
    """
    if form == "isotonic":
        return _fit_isotonic(score, failure)
    features = LOGISTIC_FORMS[form].features(score)
    weights, intercept = _least_log_loss(
        features, failure, with_intercept=LOGISTIC_FORMS[form].has_intercept
    )
    negative_indices = np.flatnonzero(np.array(weights) < 0)
    # Beta calibration has no negative weights. The feature with the first negative weight is
    # dropped, and the remaining feature is fitted again (Kull et al.).
    if form == "beta" and len(negative_indices):
        dropped_index = int(negative_indices[0])
        remaining_index = 1 - dropped_index  # the two features have the indices 0 and 1
        refitted_weights, intercept = _least_log_loss(
            features[:, [remaining_index]], failure, with_intercept=True
        )
        weights = [0.0, 0.0]
        weights[remaining_index] = max(refitted_weights[0], 0.0)
    return Logistic(
        form=form,
        weights=tuple(weights),
        intercept=intercept,
        n=len(score),
        n_failures=int(failure.sum()),
    )


@np.errstate(under="ignore")  # an underflow to 0 is exact enough
def _least_log_loss(
    features: Floats, failure: NDArray[np.int64], *, with_intercept: bool
) -> tuple[list[float], float]:
    """Fit a logistic regression without a penalty to smoothed targets. Return weights, intercept.

    If ``with_intercept`` is false, the intercept is 0.
    """
    n_features = features.shape[1]
    largest_features = np.abs(features).max(axis=0)
    scale = np.maximum(largest_features, 1e-12)  # not 0 if a feature is 0 everywhere
    x = features / scale  # |x| is at most 1
    if with_intercept:
        constant_feature = np.ones(len(x))
        x = np.column_stack([x, constant_feature])
    targets = _smoothed_targets(failure)
    weights = _newton_weights(x, targets)
    intercept = 0.0
    if with_intercept:
        intercept = float(weights[-1])
    feature_weights = weights[:n_features] / scale  # for the features before scaling
    return feature_weights.tolist(), intercept


def _smoothed_targets(failure: NDArray[np.int64]) -> Floats:
    """Compute smoothed targets (N,) for a logistic regression (Platt 1999, Sec. 2.2).

    The targets are (N_f + 1) / (N_f + 2) for the N_f failures and 1 / (N_s + 2) for the N_s
    successes. With these targets the weights stay finite even if the scores separate failures from
    successes.
    """
    n_failures = int(failure.sum())
    n_successes = len(failure) - n_failures
    failure_target = (n_failures + 1) / (n_failures + 2)
    success_target = 1 / (n_successes + 2)
    return np.where(failure == 1, failure_target, success_target)


def _newton_weights(x: Floats, target: Floats) -> Floats:
    """Find the weights (F,) of the features x (N, F) with the least log-loss, by Newton's method.

    ``target`` (N,) are the smoothed targets.
    """
    weights = np.zeros(x.shape[1])
    loss = _log_loss(weights, x, target)
    for _ in range(MAX_NEWTON_STEPS):
        p = expit(x @ weights)
        gradient = x.T @ (p - target)
        variance = p * (1 - p)
        curvature = x.T @ (x * variance[:, None])
        # Equal scores give a direction without curvature. ``solve`` would fail there. Least squares
        # make no step in this direction.
        step, *_ = np.linalg.lstsq(curvature, gradient, rcond=None)
        result = _newton_step(weights, step, loss, x, target)
        if result is None:
            break
        weights, loss = result
    return weights


def _newton_step(
    weights: Floats, step: NDArray[np.floating], last_loss: float, x: Floats, target: Floats
) -> tuple[Floats, float] | None:
    """Return weights and log-loss after a Newton step, or None if the loss decreases no further.

    A full step may be too long. The step is halved until the loss is below ``last_loss``, at most
    11 times.
    """
    for n_halvings in range(12):
        candidate = weights - step / 2**n_halvings
        loss = _log_loss(candidate, x, target)
        if loss < last_loss:
            return candidate, loss
    return None


def _log_loss(weights: Floats, x: Floats, target: Floats) -> float:
    """Sum the log-loss over all rows: ln(1 + exp(s)) - t s for log-odds s and targets t."""
    log_odds = x @ weights
    losses = np.logaddexp(0, log_odds) - target * log_odds
    return float(losses.sum())
