"""From a score to a probability of failure, learned on calibration rows: temperature, Platt, beta, isotonic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError

from vilu.artifacts.documents import Model
from vilu.errors import DataError
from vilu.metrics.counts import Floats

FOLDS = 10
STEPS = 100  # of Newton's method, which needs about eight
FEW_OF_A_KIND = (
    20  # with fewer failures, or fewer successes, the smoothest form is taken without a choice
)
FEW_ROWS = 1000  # with fewer rows no isotonic regression, whose steps would follow the noise


class Form(NamedTuple):
    """A logistic form: what the log-odds of failure are linear in, and whether a constant is added."""

    features: Callable[[Floats], Floats]
    intercept: bool
    of_probability: bool


@np.errstate(under="ignore")  # what is small beside the others is 0
def expit(log_odds: Floats) -> Floats:
    """1 / (1 + exp(-x)), without rounding near zero or one; SciPy's takes half a second to import."""
    small = np.exp(-np.abs(log_odds))
    found: Floats = np.where(log_odds < 0, small, 1.0) / (1 + small)
    return found


@np.errstate(under="ignore")  # what is small beside the others is 0
def _logarithms(score: Floats) -> Floats:
    """The two logarithms ln p and -ln(1 - p) of log-odds."""
    return np.stack([-np.logaddexp(0, -score), np.logaddexp(0, score)], axis=1)


FORMS = {
    "temperature": Form(lambda score: score[:, None], intercept=False, of_probability=True),
    "platt": Form(lambda score: score[:, None], intercept=True, of_probability=False),
    "beta": Form(_logarithms, intercept=True, of_probability=True),
}
"""Smoothest first.

Temperature and beta start from a probability (Guo et al. 2017; Kull et al. 2017).
"""


class _Fitted(Model):
    """What every calibrator tells of its fit: rows, failures among them, and the log-loss of every form tried."""

    n: int = Field(ge=1)
    n_failures: int = Field(ge=0)
    log_loss: dict[str, float] = Field(default_factory=dict)


class Logistic(_Fitted):
    """p = sigmoid(weights . features(s) + intercept) of a score s (of log-odds s, where the method gives them)."""

    form: Literal["temperature", "platt", "beta"]
    weights: tuple[float, ...] = Field(min_length=1, max_length=2)
    intercept: float

    @np.errstate(under="ignore")  # what is small beside the others is 0
    def __call__(self, score: Floats) -> Floats:
        """(N,) probabilities of scores (N,)."""
        return expit(FORMS[self.form].features(score) @ np.array(self.weights) + self.intercept)


class Isotonic(_Fitted):
    """p rises with the score in straight lines between knots, and is level outside them."""

    form: Literal["isotonic"]
    score: tuple[float, ...] = Field(min_length=1)
    probability: tuple[Annotated[float, Field(ge=0, le=1)], ...]

    def __call__(self, score: Floats) -> Floats:
        """(N,) probabilities of scores (N,)."""
        return np.interp(score, self.score, self.probability)


Calibrator = Logistic | Isotonic
_READER: TypeAdapter[Calibrator] = TypeAdapter(Annotated[Calibrator, Field(discriminator="form")])


def fit_calibrator(score: Floats, failure: NDArray[np.int64], *, is_log_odds: bool) -> Calibrator:
    """The form with the least log-loss in 10-fold cross-validation, or a smoother one within a standard error of it.

    Temperature and beta are tried where the scores are log-odds, isotonic regression with at least
    1,000 rows. With fewer than 20 failures or successes there is nothing to choose by: temperature,
    or Platt for other scores.

    The scores (N,) are finite, higher = more likely wrong; log-odds of failure where the method
    gives probabilities.

    Examples:
        >>> import numpy as np
        >>> from vilu.predictors.contract.probability import fit_calibrator
        >>> calibrator = fit_calibrator(
        ...     np.array([-1.0, 0.0, 1.0]), np.array([0, 0, 1]), is_log_odds=True
        ... )
        >>> calibrator.form
        'temperature'
    """
    forms = [name for name, form in FORMS.items() if is_log_odds or not form.of_probability]
    if min(failure.sum(), (1 - failure).sum()) < FEW_OF_A_KIND:
        return _fit(forms[0], score, failure)
    forms += ["isotonic"] if len(score) >= FEW_ROWS else []
    losses = {name: _held_out_losses(name, score, failure) for name in forms}
    best = min(losses.values(), key=np.mean)
    excess = ((name, losses[name] - best) for name in forms)
    near = (name for name, more in excess if more.mean() <= more.std(ddof=1) / np.sqrt(len(more)))
    chosen = _fit(next(near), score, failure)
    return chosen.model_copy(
        update={"log_loss": {name: float(loss.mean()) for name, loss in losses.items()}}
    )


def read_calibrator(value: object) -> Calibrator:
    """A calibrator from plain JSON."""
    try:
        found = _READER.validate_python(value)
    except ValidationError as error:
        raise DataError(
            f"this is no calibrator of probabilities: {error.errors()[0]['msg']}."
        ) from error
    if isinstance(found, Isotonic) and (
        len(found.score) != len(found.probability) or bool((np.diff(found.score) <= 0).any())
    ):
        raise DataError("this is no calibrator of probabilities: its knots are not in order.")
    if (
        isinstance(found, Logistic)
        and len(found.weights) != FORMS[found.form].features(np.zeros(1)).shape[1]
    ):
        raise DataError(
            f"this is no calibrator of probabilities: {found.form} has not {len(found.weights)} weights."
        )
    return found


def _held_out_losses(form: str, score: Floats, failure: NDArray[np.int64]) -> Floats:
    """(N,) log-loss of every row under a fit without its fold; failures are dealt out evenly."""
    losses, fold, rng = (
        np.empty(len(score)),
        np.empty(len(score), np.int64),
        np.random.default_rng(0),
    )
    for kind in (0, 1):
        rows = np.flatnonzero(failure == kind)
        fold[rng.permutation(rows)] = np.arange(len(rows)) % FOLDS
    for held_out in (fold == number for number in range(FOLDS)):
        p = _fit(form, score[~held_out], failure[~held_out])(score[held_out])
        losses[held_out] = -np.log(np.where(failure[held_out] == 1, p, 1 - p).clip(1e-12))
    return losses


def _fit_isotonic(score: Floats, failure: NDArray[np.int64], counts: dict[str, Any]) -> Isotonic:
    """Isotonic regression, its ends kept 1 / (N + 2) away from certainty; SciPy's takes half a second to import."""
    value, place, rows = np.unique(score, return_inverse=True, return_counts=True)
    wrong, pooled = np.bincount(place, failure).astype(np.int64), rows
    while not (begins := np.append(True, wrong[1:] * pooled[:-1] > wrong[:-1] * pooled[1:])).all():
        wrong, pooled = (np.add.reduceat(part, np.flatnonzero(begins)) for part in (wrong, pooled))
    end = 1 / (len(score) + 2)
    level = np.clip(np.repeat(wrong / pooled, pooled)[np.cumsum(rows) - 1], end, 1 - end)
    rises = np.flatnonzero(np.diff(level))  # of a level stretch its two ends are enough
    knots = np.unique(np.concatenate([[0, len(value) - 1], rises, rises + 1]))
    return Isotonic(
        form="isotonic", score=value[knots].tolist(), probability=level[knots].tolist(), **counts
    )


def _fit(form: Any, score: Floats, failure: NDArray[np.int64]) -> Calibrator:  # noqa: ANN401 - a key of FORMS
    """Isotonic regression, or logistic regression without a penalty.

    Targets are (N_f + 1) / (N_f + 2) for failures and 1 / (N_s + 2) for successes, which keeps the
    weights finite where the scores separate them (Platt 1999, Sec. 2.2).
    """
    counts: dict[str, Any] = {"n": len(score), "n_failures": int(failure.sum())}
    if form == "isotonic":
        return _fit_isotonic(score, failure, counts)
    features = FORMS[form].features(score)
    weights, intercept = _least_log_loss(features, failure, intercept=FORMS[form].intercept)
    falling = np.flatnonzero(np.array(weights) < 0)
    if form == "beta" and len(
        falling
    ):  # the form has no falling parts: without the first one, once more (Kull et al.)
        kept = [part for part in range(features.shape[1]) if part != falling[0]]
        left, intercept = _least_log_loss(features[:, kept], failure, intercept=True)
        weights = [0.0] * features.shape[1]
        weights[kept[0]] = max(left[0], 0.0)
    return Logistic(form=form, weights=tuple(weights), intercept=intercept, **counts)


@np.errstate(under="ignore")  # what is small beside the others is 0
def _least_log_loss(
    features: Floats, failure: NDArray[np.int64], *, intercept: bool
) -> tuple[list[float], float]:
    """Weights and constant of a logistic regression without a penalty, on smoothed targets, by Newton's method."""
    scale = np.maximum(np.abs(features).max(axis=0), 1e-12)
    n_failures = int(failure.sum())
    target = np.where(
        failure == 1, (n_failures + 1) / (n_failures + 2), 1 / (len(failure) - n_failures + 2)
    )
    x = np.column_stack([features / scale, np.ones((len(features), int(intercept)))])

    def log_loss(weights: Floats) -> float:
        return float((np.logaddexp(0, x @ weights) - target * (x @ weights)).sum())

    weights = np.zeros(x.shape[1])
    least = log_loss(weights)
    for _ in range(STEPS):
        p = expit(x @ weights)
        # without a least loss of its own (equal scores) a direction gets no weight
        step = np.linalg.lstsq(x.T @ (x * (p * (1 - p))[:, None]), x.T @ (p - target), rcond=None)[
            0
        ]
        tried = (
            (log_loss(weights - step / 2**halvings), weights - step / 2**halvings)
            for halvings in range(12)
        )
        lowest, better = next((one for one in tried if one[0] < least), (least, None))
        if better is None:
            break
        weights, least = better, lowest
    return (weights[: features.shape[1]] / scale).tolist(), float(weights[-1]) if intercept else 0.0
