"""Fits of tables: several numbers of an answer are combined into one, by logistic regression.

All inputs are arrays of N rows; ``failure`` (N,) is 1 where an answer is wrong and 0 where it is
right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vilu.embeddings.split import part_of_rows
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.metrics.ranking import auroc
from vilu.tables.table import sign_of
from vilu.text import plural

FOLDS: Final = 5
"""Number of folds of every cross-validation."""

RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the penalty that are compared. It is ridge / 2 times the squares of the weights."""

KNOTS: Final = 64
"""Number of quantiles of a column at which ``rank_maps`` has its knots."""

STEPS: Final = 1_000
"""Maximum number of steps of an optimiser."""

Way = TypeVar("Way")  # a way to fit, which cross-validation compares with other ways


class Fold(NamedTuple):
    """One division of the rows: masks (N,) of the rows to fit on and of the rows held out."""

    fit_mask: NDArray[np.bool_]
    held_out_mask: NDArray[np.bool_]


def folds_of(cluster: Ints, failure: Ints, seed: int) -> list[Fold]:
    """Divisions for a cross-validation; rows of one cluster (N,) are in one fold.

    A fold that leaves only right or only wrong answers to fit on is left out.

    Raises:
        DataError: If all right answers, or all wrong ones, are in one fold.
    """
    fold_of_row = part_of_rows(cluster, failure, [1 / FOLDS] * FOLDS, seed)
    folds = []
    for fold_number in range(FOLDS):
        held_out_mask = fold_of_row == fold_number
        has_right_and_wrong = len(np.unique(failure[~held_out_mask])) == 2
        if has_right_and_wrong and held_out_mask.any():
            folds.append(Fold(~held_out_mask, held_out_mask))
    if not folds:
        raise DataError(_too_few_message(cluster, failure))
    is_held_out = np.any([fold.held_out_mask for fold in folds], axis=0)
    if len(np.unique(failure[is_held_out])) < 2:
        raise DataError(_too_few_message(cluster, failure))
    return folds


def _too_few_message(cluster: Ints, failure: Ints) -> str:
    """Message about answers that cannot be cross-validated."""
    n_wrong = int(failure.sum())
    n_right = len(failure) - n_wrong
    return (
        f"the fit compares by {FOLDS}-fold cross-validation, so right and wrong answers must be in "
        f"several folds each. Got {n_wrong} wrong and {n_right} right answers in "
        f"{plural(len(np.unique(cluster)), 'cluster')}, and rows of one cluster are in one fold. "
        "Label more answers, of more clusters."
    )


def log_losses(log_odds: Floats, failure: Ints) -> Floats:
    """Log-losses (N,) in nats of log-odds of failure (N,)."""
    return np.logaddexp(0, log_odds) - failure * log_odds


class Linear(NamedTuple):
    """Log-odds of failure as a linear function: weights (C,) and an intercept."""

    weights: Floats
    intercept: float

    def __call__(self, inputs: Floats) -> Floats:
        """Log-odds (N,) of inputs (N, C)."""
        return inputs @ self.weights + self.intercept

    def recalibrated(self, slope: float, shift: float) -> Linear:
        """The function slope * log-odds + shift."""
        return Linear(slope * self.weights, slope * self.intercept + shift)


def rising_logistic(inputs: Floats, failure: Ints, ridge: float) -> Linear:
    """Ridge logistic regression whose weights are at least 0, so that no input lowers the risk.

    It minimises the mean log-loss plus ridge / 2 times the squares of the weights, by L-BFGS with
    bounds.
    """
    from scipy.optimize import minimize

    n_columns = inputs.shape[1]

    def objective(point: Floats) -> tuple[float, Floats]:
        weights = point[:n_columns]
        log_odds = inputs @ weights + point[n_columns]
        loss = log_losses(log_odds, failure).mean() + ridge / 2 * (weights @ weights)
        # d/ds log(1 + exp(s)) = 1 / (1 + exp(-s)); tanh does not overflow
        error = (1 + np.tanh(log_odds / 2)) / 2 - failure
        gradient = inputs.T @ error / len(failure) + ridge * weights
        return float(loss), np.append(gradient, error.mean())

    start = np.zeros(n_columns + 1)
    bounds = [(0.0, None)] * n_columns + [(None, None)]
    optimum = minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS}
    )
    return Linear(optimum.x[:n_columns], float(optimum.x[n_columns]))


def ridge_logistic(inputs: Floats, failure: Ints, ridge: float) -> Linear:
    """Ridge logistic regression by scikit-learn, with the objective of ``rising_logistic``."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's C multiplies the sum of the log-losses, but ``ridge`` is for their mean.
    model = LogisticRegression(C=1 / (ridge * len(failure)), max_iter=STEPS)
    with warnings.catch_warnings():
        # With a weak penalty, and more columns than rows, it may not converge. The warning is not
        # needed, because cross-validation judges every fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, failure)
    return Linear(model.coef_[0].astype(np.float64), float(model.intercept_[0]))


def platt_scaling(log_odds: Floats, failure: Ints) -> tuple[float, float]:
    """Slope and shift that calibrate held-out log-odds (N,) by logistic regression.

    If failures become rarer as the log-odds rise, the log-odds are of no use. Then the slope is 1
    and the shift 0.
    """
    column = log_odds[:, None]
    scale = max(float(np.abs(column).max()), 1e-12)
    fitted = ridge_logistic(column / scale, failure, ridge=1e-9)
    slope = float(fitted.weights[0]) / scale
    if slope <= 0:
        return 1.0, 0.0
    return slope, fitted.intercept


@dataclass(frozen=True)
class RisingMaps:
    """A rising function for every column. It is a sum of S pieces, each linear between two numbers.

    The function of column c is sum_s rise[c, s] * clip((x - lower[c, s]) / width[c, s], 0, 1). A
    number outside the range of the fit counts as the nearest number in this range.
    """

    lower: Floats  # (C, S)
    width: Floats  # (C, S), positive
    rise: Floats  # (C, S), at least 0

    def __call__(self, numbers: Floats) -> Floats:
        """The mapped numbers (N, C)."""
        mapped = np.zeros_like(numbers)
        for piece in range(self.lower.shape[1]):
            share = (numbers - self.lower[:, piece]) / self.width[:, piece]
            mapped += self.rise[:, piece] * np.clip(share, 0, 1)
        return mapped

    def take(self, columns: Sequence[int]) -> RisingMaps:
        """The functions of these columns."""
        chosen_columns = list(columns)
        return RisingMaps(
            self.lower[chosen_columns], self.width[chosen_columns], self.rise[chosen_columns]
        )


def straight_maps(numbers: Floats) -> RisingMaps:
    """Straight lines: a column divided by its standard deviation, within the range of the fit."""
    lowest = numbers.min(axis=0)
    span = numbers.max(axis=0) - lowest
    deviation = numbers.std(axis=0)
    is_constant = span == 0
    width = np.where(is_constant, 1.0, span)
    rise = np.where(is_constant, 0.0, span / np.where(is_constant, 1.0, deviation))
    return RisingMaps(lowest[:, None], width[:, None], rise[:, None])


def rank_maps(numbers: Floats) -> RisingMaps:
    """Ranks: the log-odds of the share of rows with smaller numbers in the column.

    Between ``KNOTS`` quantiles the function is linear, so different numbers stay different.
    """
    n_columns = numbers.shape[1]
    share = (np.arange(KNOTS) + 0.5) / KNOTS
    height = np.log(share) - np.log1p(-share)
    lower = np.zeros((n_columns, KNOTS - 1))
    width = np.ones((n_columns, KNOTS - 1))
    rise = np.zeros((n_columns, KNOTS - 1))
    for column in range(n_columns):
        knots, group = np.unique(np.quantile(numbers[:, column], share), return_inverse=True)
        # several quantiles may be the same number, which then has the mean of their heights
        mean_height = np.bincount(group, height) / np.bincount(group)
        n_pieces = len(knots) - 1
        lower[column, :n_pieces] = knots[:-1]
        width[column, :n_pieces] = np.diff(knots)
        rise[column, :n_pieces] = np.diff(mean_height)
    return RisingMaps(lower, width, rise)


MAPS: Final[dict[str, Callable[[Floats], RisingMaps]]] = {
    "straight": straight_maps,
    "ranked": rank_maps,
}
"""Functions that fit the maps of the columns, by name. Columns are mapped, then combined."""


def risk_directions(names: Sequence[str], numbers: Floats, failure: Ints) -> Floats:
    """For every column (C,): 1 if a higher number means more likely wrong, else -1.

    The name of a column decides. If the name does not say it, the failures of the rows decide.
    """
    signs_of_risk = []
    for column, name in enumerate(names):
        sign = sign_of(name)
        if sign == 0:
            means_wrong = auroc(numbers[:, column], failure) >= 0.5
            sign = -1 if means_wrong else 1
        signs_of_risk.append(-sign)
    return np.array(signs_of_risk, dtype=np.float64)


class Recipe(NamedTuple):
    """A way to combine columns, which cross-validation compares with others."""

    maps: str  # key of ``MAPS``
    columns: tuple[int, ...]
    ridge: float


def recipes_to_compare(n_columns: int) -> list[Recipe]:
    """Each column alone, and all together with every strength of the penalty."""
    weakest_ridge = min(RIDGES)  # a penalty on one column only shrinks its weight
    all_recipes = []
    for map_name in MAPS:
        for column in range(n_columns):
            all_recipes.append(Recipe(map_name, (column,), weakest_ridge))
        if n_columns > 1:
            every_column = tuple(range(n_columns))
            all_recipes += [Recipe(map_name, every_column, ridge) for ridge in RIDGES]
    return all_recipes


@dataclass(frozen=True)
class Combination:
    """A rising combination of columns; it gives log-odds of failure for numbers (N, C)."""

    direction: Floats  # (C,)
    maps: RisingMaps
    linear: Linear

    def __call__(self, numbers: Floats) -> Floats:
        """Log-odds (N,)."""
        return self.linear(self.maps(numbers * self.direction))


def fit_combination(
    names: Sequence[str], numbers: Floats, failure: Ints, recipe: Recipe
) -> Combination:
    """The combination of a recipe, fitted to all these rows."""
    direction = risk_directions(names, numbers, failure)
    maps = MAPS[recipe.maps](numbers * direction)
    return _fit_mapped(direction, maps, maps(numbers * direction), failure, recipe)


def _fit_mapped(
    direction: Floats, maps: RisingMaps, mapped: Floats, failure: Ints, recipe: Recipe
) -> Combination:
    """The combination of a recipe, where the numbers (N, C) are mapped already."""
    chosen_columns = list(recipe.columns)
    fit_of_chosen = rising_logistic(mapped[:, chosen_columns], failure, recipe.ridge)
    weights = np.zeros(len(direction))
    weights[chosen_columns] = fit_of_chosen.weights
    return Combination(direction, maps, Linear(weights, fit_of_chosen.intercept))


def held_out_log_odds(
    names: Sequence[str], numbers: Floats, failure: Ints, folds: Sequence[Fold]
) -> dict[Recipe, Floats]:
    """Log-odds (N,) of every recipe. Those of a row are by a fit without the fold of the row.

    A row that is in no fold has NaN.
    """
    log_odds = {recipe: np.full(len(failure), np.nan) for recipe in recipes_to_compare(len(names))}
    for fit_mask, held_out_mask in folds:
        direction = risk_directions(names, numbers[fit_mask], failure[fit_mask])
        for map_name, make_maps in MAPS.items():
            maps = make_maps(numbers[fit_mask] * direction)
            mapped = maps(numbers[fit_mask] * direction)
            for recipe, log_odds_of_recipe in log_odds.items():
                if recipe.maps == map_name:
                    fit = _fit_mapped(direction, maps, mapped, failure[fit_mask], recipe)
                    log_odds_of_recipe[held_out_mask] = fit(numbers[held_out_mask])
    return log_odds


class CrossValidated(NamedTuple, Generic[Way]):
    """Which of several ways to fit is best on held-out rows, and how to calibrate its log-odds."""

    best: Way  # the way with the least mean held-out log-loss
    losses: dict[Way, float]  # mean held-out log-loss of every way
    slope: float  # calibrated log-odds are slope * log-odds + shift
    shift: float

    @classmethod
    def of(cls, held_out: Mapping[Way, Floats], failure: Ints) -> CrossValidated[Way]:
        """Compare ways by their held-out log-odds (N,), which are NaN for rows in no fold."""
        losses = {}
        for way, log_odds in held_out.items():
            is_known = np.isfinite(log_odds)
            losses[way] = float(log_losses(log_odds[is_known], failure[is_known]).mean())
        best = min(losses, key=losses.__getitem__)
        is_known = np.isfinite(held_out[best])
        slope, shift = platt_scaling(held_out[best][is_known], failure[is_known])
        return cls(best, losses, slope, shift)


def best_combination(
    names: Sequence[str], numbers: Floats, failure: Ints, folds: Sequence[Fold]
) -> tuple[Combination, CrossValidated[Recipe]]:
    """The combination with the least held-out log-loss, calibrated by its held-out log-odds."""
    comparison = CrossValidated.of(held_out_log_odds(names, numbers, failure, folds), failure)
    fit = fit_combination(names, numbers, failure, comparison.best)
    linear = fit.linear.recalibrated(comparison.slope, comparison.shift)
    return Combination(fit.direction, fit.maps, linear), comparison


class Probe(NamedTuple):
    """A ridge logistic regression on standardised inputs."""

    mean: Floats  # (I,)
    scale: Floats  # (I,)
    linear: Linear


def best_probe(
    inputs: Floats, failure: Ints, folds: Sequence[Fold]
) -> tuple[Probe, CrossValidated[float]]:
    """The probe with the least held-out log-loss, calibrated by its held-out log-odds."""
    held_out_odds = {ridge: np.full(len(failure), np.nan) for ridge in RIDGES}
    for fit_mask, held_out_mask in folds:
        mean, scale = _mean_and_scale(inputs[fit_mask])
        standardised = (inputs - mean) / scale
        for ridge, log_odds in held_out_odds.items():
            fit = ridge_logistic(standardised[fit_mask], failure[fit_mask], ridge)
            log_odds[held_out_mask] = fit(standardised[held_out_mask])
    comparison = CrossValidated.of(held_out_odds, failure)
    mean, scale = _mean_and_scale(inputs)
    fit = ridge_logistic((inputs - mean) / scale, failure, comparison.best)
    linear = fit.recalibrated(comparison.slope, comparison.shift)
    return Probe(mean, scale, linear), comparison


def _mean_and_scale(inputs: Floats) -> tuple[Floats, Floats]:
    """Mean (I,) and scale (I,) of inputs: their standard deviation, or 1 if it is 0."""
    deviation = inputs.std(axis=0)
    deviation[deviation == 0] = 1.0
    return inputs.mean(axis=0), deviation
