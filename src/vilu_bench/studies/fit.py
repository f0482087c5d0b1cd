"""Fits the predictor for a cell."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.nn.train import default_batch_size
from vilu.predictors.vilu.fine_tuning import start_from_fitted
from vilu_bench.studies.cells import Cell, FitInputs
from vilu_bench.studies.config import Config
from vilu_bench.studies.data import StudyData, differs_in_preprocessing
from vilu_bench.studies.result import Refusal

REFUSALS = (UsageError, DataError, ProvenanceError)
"""Exceptions by which a method refuses data or settings. Any other exception is a bug."""


@dataclass(frozen=True)
class FitResult:
    """The result of a fit: a predictor or a refusal, with the warnings."""

    predictor: FailurePredictor  # fitted, unless ``refusal`` is set
    refusal: Refusal | None = None  # why the fit was refused, or None if the fit was not refused
    n_train: int | None = None  # number of training rows, or None if nothing was fitted
    seconds: float | None = None  # time for this fit, without the time for the earlier fit
    warnings: tuple[str, ...] = ()  # warnings from the fit


def predictor_of(config: Config, cell: Cell) -> FailurePredictor:
    """Make a cell's unfitted predictor. If the predictor ignores the seed, the seed is 0."""
    seed = 0
    if config.depends_on_seed(cell.method):
        seed = cell.seed
    return config.predictor(cell.method, seed)


def fit_cell(
    study_data: StudyData,
    cell: Cell,
    fit_inputs: FitInputs,
    fit_results: dict[FitInputs, FitResult],
) -> FitResult:
    """Fit a cell's predictor, unless ``fit_results`` already has the result, and return the result.

    A method that needs no fit gets a new predictor. ``fit_results`` maps the inputs of all fits so
    far to the results, and new results are added.
    """
    if not fit_inputs.train:
        predictor = predictor_of(study_data.config, cell)
        return FitResult(predictor)
    if fit_inputs not in fit_results:
        earlier_fit = None
        if fit_inputs.start is not None:
            earlier_fit = fit_cell(study_data, cell, fit_inputs.start, fit_results)
        if earlier_fit is not None and earlier_fit.refusal is not None:
            fit_results[fit_inputs] = earlier_fit  # this fit is refused for the same reason
        else:
            fit_results[fit_inputs] = _fit_predictor(study_data, cell, fit_inputs, earlier_fit)
    return fit_results[fit_inputs]


def _fit_predictor(
    study_data: StudyData, cell: Cell, fit_inputs: FitInputs, earlier_fit: FitResult | None
) -> FitResult:
    """Fit a cell's predictor, from the weights of ``earlier_fit`` or else from scratch."""
    predictor = predictor_of(study_data.config, cell)
    columns = (*predictor.columns, *predictor.optional_columns)
    refusal = None
    n_train = None
    start_time = time.perf_counter()
    with collected_warnings() as fit_warnings:
        try:
            train = study_data.train_set(fit_inputs, columns)
            validation = study_data.validation_set(fit_inputs)
            n_train = len(train)
            start_time = time.perf_counter()  # the time to read the rows does not count
            if earlier_fit is None:
                predictor = _with_epochs_for_steps(study_data.config, cell.method, predictor, train)
            else:
                predictor = _initialised_from(earlier_fit.predictor, fit_inputs, train)
            predictor.fit(train, validation, unlabelled=study_data.unlabelled_set(fit_inputs))
        except REFUSALS as error:
            refusal = refusal_from(error)
    seconds = time.perf_counter() - start_time
    return FitResult(
        predictor,
        refusal=refusal,
        n_train=n_train,
        seconds=seconds,
        warnings=tuple(fit_warnings),
    )


def _initialised_from(
    fitted_predictor: FailurePredictor, fit_inputs: FitInputs, train: EmbeddingSource
) -> FailurePredictor:
    """Make an unfitted predictor whose training starts from a fitted predictor's weights."""
    may_differ = fit_inputs.across_preprocessing
    if may_differ and differs_in_preprocessing(fitted_predictor.space_, train.space):
        # The earlier fit used, for example, a different picture size. A predictor refuses rows from
        # another space, so a copy of the fitted predictor gets the new training rows' space.
        fitted_predictor = copy.copy(fitted_predictor)
        fitted_predictor.space_ = train.space
    return start_from_fitted(type(fitted_predictor), fitted_predictor)


def _with_epochs_for_steps(
    config: Config, label: str, predictor: FailurePredictor, train: EmbeddingSource
) -> FailurePredictor:
    """Return a copy of the predictor with as many epochs as the method's ``steps`` need.

    If the method has no ``steps``, ``predictor`` is returned unchanged.
    """
    if config.method_entries[label].steps is None:
        return predictor
    values: dict[str, Any] = {name: getattr(predictor, name) for name in parameters(predictor)}
    # a training step takes a pool of captions, or else the given or the default batch size
    step_rows = train.pool_size or values["batch_size"] or default_batch_size(len(train))
    values["epochs"] = config.epochs_for(label, step_rows, len(train))
    return type(predictor)(**values)


def refusal_from(error: Exception) -> Refusal:
    """Make a refusal with an exception's name and message."""
    return Refusal(error=type(error).__name__, reason=str(error))


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings from a block in a list instead of showing them, each text once.

    The list is filled when the block ends.
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += dict.fromkeys(str(warning.message) for warning in caught)
