"""Fits for tables: logistic regression combines an answer's numbers into one number.

The inputs of all functions are arrays of N rows. ``failure`` (N,) is 1 if the answer of a row is
wrong, and 0 if the answer is right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vilu.embeddings.split import part_of_each_row
from vilu.errors import DataError
from vilu.metrics.counts import Floats, Ints
from vilu.metrics.ranking import auroc
from vilu.tables.table import sign_of
from vilu.text import plural

N_FOLDS: Final = 5
"""Number of folds in every cross-validation."""

RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths ``ridge`` to compare. The penalty is ridge / 2 * (sum of squared weights)."""

N_KNOTS: Final = 64
"""Number of knots in ``rank_maps``, at quantiles of a column."""

MAX_OPTIMISER_STEPS: Final = 1_000
"""Maximum step count of each optimiser."""

FitOption = TypeVar("FitOption")  # a recipe or a ridge, to compare by cross-validation


class Fold(NamedTuple):
    """One division of the rows: a mask (N,) to fit on, and a mask (N,) to hold out."""

    fit_mask: NDArray[np.bool_]
    held_out_mask: NDArray[np.bool_]


def make_folds(cluster: Ints, failure: Ints, seed: int) -> list[Fold]:
    """Divide the rows for a cross-validation.

    ``cluster`` (N,) is the cluster of each row. All rows of a cluster are in the same fold. A fold
    is left out if the rows outside the fold are all right or all wrong, because no fit to such rows
    is possible. An empty fold is left out, too.

    Raises:
        DataError: If all right answers, or all wrong answers, are in one fold.
    """
    fold_of_row = part_of_each_row(cluster, failure, [1 / N_FOLDS] * N_FOLDS, seed)
    folds = []
    for fold_number in range(N_FOLDS):
        held_out_mask = fold_of_row == fold_number
        has_right_and_wrong = len(np.unique(failure[~held_out_mask])) == 2
        if has_right_and_wrong and held_out_mask.any():
            folds.append(Fold(fit_mask=~held_out_mask, held_out_mask=held_out_mask))
    if not folds:
        raise DataError(_too_few_message(cluster, failure))
    is_held_out = np.any([fold.held_out_mask for fold in folds], axis=0)
    has_both_held_out = len(np.unique(failure[is_held_out])) == 2
    if not has_both_held_out:
        raise DataError(_too_few_message(cluster, failure))
    return folds


def _too_few_message(cluster: Ints, failure: Ints) -> str:
    """Return the message about too few answers for a cross-validation."""
    n_wrong = int(failure.sum())
    n_right = len(failure) - n_wrong
    n_clusters = len(np.unique(cluster))
    return (
        f"the fit compares by {N_FOLDS}-fold cross-validation, so right and wrong answers must be "
        f"in several folds each. Got {n_wrong} wrong and {n_right} right answers in "
        f"{plural(n_clusters, 'cluster')}, and rows of one cluster are in one fold. "
        "Label more answers, of more clusters."
    )


def log_losses(log_odds: Floats, failure: Ints) -> Floats:
    """Compute the log-loss (N,) in nats of every row, from the failure log-odds (N,).

    For the log-odds s and the failure y, the loss is log(1 + exp(s)) - y s.
    """
    return np.logaddexp(0, log_odds) - failure * log_odds


class Linear(NamedTuple):
    """Failure log-odds as a linear function: weights (C,) and an intercept."""

    weights: Floats
    intercept: float

    def __call__(self, inputs: Floats) -> Floats:
        """Compute the log-odds (N,) of inputs (N, C)."""
        return inputs @ self.weights + self.intercept

    def recalibrated(self, slope: float, shift: float) -> Linear:
        """Return the linear function slope * (log-odds of this function) + shift."""
        return Linear(slope * self.weights, slope * self.intercept + shift)


def rising_logistic(inputs: Floats, failure: Ints, ridge: float) -> Linear:
    """Fit a ridge logistic regression with weights >= 0, so no input lowers the risk.

    L-BFGS with bounds minimises (mean log-loss) + ridge / 2 * (sum of squared weights).
    """
    from scipy.optimize import minimize

    n_columns = inputs.shape[1]

    def objective(parameters: Floats) -> tuple[float, Floats]:
        """Return the value to minimise, and the gradient."""
        weights = parameters[:n_columns]
        intercept = parameters[n_columns]
        log_odds = inputs @ weights + intercept
        losses = log_losses(log_odds, failure)
        loss = losses.mean() + ridge / 2 * (weights @ weights)
        # 1 / (1 + exp(-s)), written with tanh to avoid an overflow
        probability = (1 + np.tanh(log_odds / 2)) / 2
        error = probability - failure
        gradient_of_weights = inputs.T @ error / len(failure) + ridge * weights
        gradient_of_intercept = error.mean()
        return float(loss), np.append(gradient_of_weights, gradient_of_intercept)

    initial_parameters = np.zeros(n_columns + 1)
    bounds = [(0.0, None)] * n_columns + [(None, None)]  # weights >= 0, and any intercept
    options = {"maxiter": MAX_OPTIMISER_STEPS}
    optimum = minimize(
        objective, initial_parameters, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return Linear(optimum.x[:n_columns], float(optimum.x[n_columns]))


def ridge_logistic(inputs: Floats, failure: Ints, ridge: float) -> Linear:
    """Fit a ridge logistic regression by scikit-learn, with the objective of ``rising_logistic``.

    The weights may have any sign.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's C multiplies the sum of the log-losses, but ``ridge`` is for the mean.
    model = LogisticRegression(C=1 / (ridge * len(failure)), max_iter=MAX_OPTIMISER_STEPS)
    with warnings.catch_warnings():
        # With a weak penalty, and more columns than rows, the fit may not converge. The warning is
        # not needed, because cross-validation judges every fit.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, failure)
    weights = model.coef_[0].astype(np.float64)
    return Linear(weights, float(model.intercept_[0]))


def platt_scaling(log_odds: Floats, failure: Ints) -> tuple[float, float]:
    """Return slope and shift to calibrate held-out log-odds (N,) by logistic regression.

    If failures become rarer as the log-odds rise, the log-odds are useless. Then the slope is 1
    and the shift 0.
    """
    column = log_odds[:, None]
    # the optimiser gets numbers from -1 to 1, whatever range the log-odds have
    magnitude = np.abs(column)
    scale = max(float(magnitude.max()), 1e-12)  # never 0
    linear = ridge_logistic(column / scale, failure, ridge=1e-9)  # nearly without a penalty
    slope = float(linear.weights[0]) / scale
    if slope <= 0:
        return 1.0, 0.0
    return slope, linear.intercept


@dataclass(frozen=True)
class RisingMaps:
    """A rising function for every column: a sum of S pieces, each linear between two numbers.

    A number x in column c is mapped to

        sum_s rise[c, s] * clip((x - lower[c, s]) / width[c, s], 0, 1)

    A number outside the range of the fit is mapped like the nearest number in this range.
    """

    lower: Floats  # (C, S) start of a piece
    width: Floats  # (C, S) length of a piece, positive
    rise: Floats  # (C, S) rise of the function over a piece, at least 0

    def __call__(self, numbers: Floats) -> Floats:
        """Return the mapped numbers (N, C)."""
        mapped_numbers = np.zeros_like(numbers)
        for piece in range(self.lower.shape[1]):
            share_of_piece = (numbers - self.lower[:, piece]) / self.width[:, piece]
            mapped_numbers += self.rise[:, piece] * np.clip(share_of_piece, 0, 1)
        return mapped_numbers


def straight_maps(numbers: Floats) -> RisingMaps:
    """Fit straight lines: a column divided by its standard deviation, within the fitted range.

    A constant column is mapped to 0.
    """
    lowest = numbers.min(axis=0)
    span = numbers.max(axis=0) - lowest
    is_constant = span == 0
    standard_deviation = numbers.std(axis=0)
    deviation = np.where(is_constant, 1.0, standard_deviation)  # never 0
    width = np.where(is_constant, 1.0, span)
    rise = np.where(is_constant, 0.0, span / deviation)
    return RisingMaps(lowest[:, None], width[:, None], rise[:, None])


def rank_maps(numbers: Floats) -> RisingMaps:
    """Fit ranks: the log-odds of the share of rows with smaller numbers in the column.

    Between ``N_KNOTS`` quantiles the function is linear, so different numbers stay different if
    they are between the lowest and the highest quantile.
    """
    n_columns = numbers.shape[1]
    share = (np.arange(N_KNOTS) + 0.5) / N_KNOTS  # never 0 or 1, so the log-odds are finite
    height = np.log(share) - np.log1p(-share)  # log-odds of the shares
    # A column with fewer knots has unused pieces: their rise is 0, and their width is not 0.
    lower = np.zeros((n_columns, N_KNOTS - 1))
    width = np.ones((n_columns, N_KNOTS - 1))
    rise = np.zeros((n_columns, N_KNOTS - 1))
    for column in range(n_columns):
        quantiles = np.quantile(numbers[:, column], share)
        # Several quantiles may be the same number. They become a single knot, at their mean height.
        knots, knot_of_quantile = np.unique(quantiles, return_inverse=True)
        mean_height = np.bincount(knot_of_quantile, height) / np.bincount(knot_of_quantile)
        n_pieces = len(knots) - 1
        lower[column, :n_pieces] = knots[:-1]
        width[column, :n_pieces] = np.diff(knots)
        rise[column, :n_pieces] = np.diff(mean_height)
    return RisingMaps(lower, width, rise)


MAP_MAKERS: Final[dict[str, Callable[[Floats], RisingMaps]]] = {
    "straight": straight_maps,
    "ranked": rank_maps,
}
"""Name -> function that fits the column maps. Columns are mapped first, then combined."""


def risk_directions(names: Sequence[str], numbers: Floats, failure: Ints) -> Floats:
    """Return every column's direction (C,): 1 if a higher number means more likely wrong, else -1.

    The column's name decides. If the name has no sign, the failures in the rows decide.
    """
    directions = []
    for column, name in enumerate(names):
        direction = -sign_of(name)
        if direction == 0:
            is_higher_if_wrong = auroc(numbers[:, column], failure) >= 0.5
            direction = 1 if is_higher_if_wrong else -1
        directions.append(direction)
    return np.array(directions, dtype=np.float64)


class Recipe(NamedTuple):
    """A way to combine columns. Cross-validation compares several recipes."""

    map_name: str  # key of ``MAP_MAKERS``
    columns: tuple[int, ...]  # column indices
    ridge: float  # penalty strength


def recipes_to_compare(n_columns: int) -> list[Recipe]:
    """List the recipes: each column alone, and all columns together with every penalty strength."""
    # a single strength is enough for a single column, because the penalty only shrinks the weight
    weakest_ridge = min(RIDGES)
    all_recipes = []
    for map_name in MAP_MAKERS:
        for column in range(n_columns):
            recipe = Recipe(map_name, (column,), weakest_ridge)
            all_recipes.append(recipe)
        if n_columns > 1:
            every_column = tuple(range(n_columns))
            all_recipes += [Recipe(map_name, every_column, ridge) for ridge in RIDGES]
    return all_recipes


@dataclass(frozen=True)
class Combination:
    """A rising function from the table's columns to the failure log-odds."""

    direction: Floats  # (C,) 1 if a higher number means more likely wrong, else -1
    maps: RisingMaps  # maps of the columns after multiplication by ``direction``
    linear: Linear  # log-odds from the mapped columns

    def __call__(self, numbers: Floats) -> Floats:
        """Compute the log-odds (N,) of numbers (N, C). The numbers are not mapped yet."""
        mapped_numbers = self.maps(numbers * self.direction)
        return self.linear(mapped_numbers)


def fit_combination(
    names: Sequence[str], numbers: Floats, failure: Ints, recipe: Recipe
) -> Combination:
    """Fit the combination of a recipe to the rows of ``numbers`` (N, C)."""
    direction = risk_directions(names, numbers, failure)
    make_maps = MAP_MAKERS[recipe.map_name]
    maps = make_maps(numbers * direction)
    mapped_numbers = maps(numbers * direction)
    return _fit_mapped(direction, maps, mapped_numbers, failure, recipe)


def _fit_mapped(
    direction: Floats, maps: RisingMaps, mapped_numbers: Floats, failure: Ints, recipe: Recipe
) -> Combination:
    """Fit the combination of a recipe to ``mapped_numbers`` (N, C).

    These are the results of ``maps`` for the numbers times ``direction``. Columns outside the
    recipe get the weight 0.
    """
    chosen_columns = list(recipe.columns)
    linear = rising_logistic(mapped_numbers[:, chosen_columns], failure, recipe.ridge)
    weights = np.zeros(len(direction))
    weights[chosen_columns] = linear.weights
    linear_in_all_columns = Linear(weights, linear.intercept)
    return Combination(direction, maps, linear_in_all_columns)


def held_out_log_odds(
    names: Sequence[str], numbers: Floats, failure: Ints, folds: Sequence[Fold]
) -> dict[Recipe, Floats]:
    """Return recipe -> log-odds (N,). Each row is scored by a fit without the row's fold.

    A row outside all folds has NaN.
    """
    log_odds = {recipe: np.full(len(failure), np.nan) for recipe in recipes_to_compare(len(names))}
    for fit_mask, held_out_mask in folds:
        fit_failure = failure[fit_mask]
        direction = risk_directions(names, numbers[fit_mask], fit_failure)
        directed_numbers = numbers[fit_mask] * direction
        for map_name, make_maps in MAP_MAKERS.items():
            maps = make_maps(directed_numbers)
            mapped_numbers = maps(directed_numbers)
            for recipe, log_odds_of_recipe in log_odds.items():
                if recipe.map_name == map_name:
                    combination = _fit_mapped(direction, maps, mapped_numbers, fit_failure, recipe)
                    # these numbers are not mapped, because ``combination`` applies the maps itself
                    log_odds_of_recipe[held_out_mask] = combination(numbers[held_out_mask])
    return log_odds


class CrossValidation(NamedTuple, Generic[FitOption]):
    """The option with the best result on held-out rows, and its calibration."""

    best_option: FitOption  # the one with the least mean held-out log-loss
    loss_of_option: dict[FitOption, float]  # option -> mean held-out log-loss
    slope: float  # calibrated log-odds are slope * log-odds + shift
    shift: float

    @classmethod
    def of(cls, held_out: Mapping[FitOption, Floats], failure: Ints) -> CrossValidation[FitOption]:
        """Compare options.

        ``held_out`` maps each option to held-out log-odds (N,), NaN for rows outside all folds.
        """
        loss_of_option = {}
        for option, log_odds in held_out.items():
            is_known = np.isfinite(log_odds)
            losses = log_losses(log_odds[is_known], failure[is_known])
            loss_of_option[option] = float(losses.mean())
        best_option = min(loss_of_option, key=loss_of_option.__getitem__)
        best_log_odds = held_out[best_option]
        is_known = np.isfinite(best_log_odds)
        slope, shift = platt_scaling(best_log_odds[is_known], failure[is_known])
        return cls(best_option, loss_of_option, slope, shift)


def best_combination(
    names: Sequence[str], numbers: Floats, failure: Ints, folds: Sequence[Fold]
) -> tuple[Combination, CrossValidation[Recipe]]:
    """Return the combination with the least log-loss on held-out rows, calibrated on these rows."""
    log_odds_of_recipe = held_out_log_odds(names, numbers, failure, folds)
    comparison = CrossValidation.of(log_odds_of_recipe, failure)
    combination = fit_combination(names, numbers, failure, comparison.best_option)
    linear = combination.linear.recalibrated(comparison.slope, comparison.shift)
    return replace(combination, linear=linear), comparison


class Probe(NamedTuple):
    """A ridge logistic regression on standardised inputs (N, I): (inputs - mean) / scale."""

    mean: Floats  # (I,)
    scale: Floats  # (I,)
    linear: Linear  # log-odds from the standardised inputs


def best_probe(
    inputs: Floats, failure: Ints, folds: Sequence[Fold]
) -> tuple[Probe, CrossValidation[float]]:
    """Return the probe with the least log-loss on held-out rows, calibrated on these rows."""
    held_out_log_odds_of_ridge = {ridge: np.full(len(failure), np.nan) for ridge in RIDGES}
    for fit_mask, held_out_mask in folds:
        mean, scale = _mean_and_scale(inputs[fit_mask])
        standardised_inputs = (inputs - mean) / scale
        for ridge, log_odds in held_out_log_odds_of_ridge.items():
            linear = ridge_logistic(standardised_inputs[fit_mask], failure[fit_mask], ridge)
            log_odds[held_out_mask] = linear(standardised_inputs[held_out_mask])
    comparison = CrossValidation.of(held_out_log_odds_of_ridge, failure)
    mean, scale = _mean_and_scale(inputs)
    linear = ridge_logistic((inputs - mean) / scale, failure, comparison.best_option)
    calibrated_linear = linear.recalibrated(comparison.slope, comparison.shift)
    return Probe(mean, scale, calibrated_linear), comparison


def _mean_and_scale(inputs: Floats) -> tuple[Floats, Floats]:
    """Return mean (I,) and scale (I,) of inputs. The scale is the standard deviation, never 0."""
    deviation = inputs.std(axis=0)
    deviation[deviation == 0] = 1.0
    return inputs.mean(axis=0), deviation
