"""Fits the predictor of a cell."""

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
from vilu.predictors.nn.train import default_batch
from vilu.predictors.vilu.fine_tuning import initialise
from vilu_bench.studies.cells import Cell, Origin
from vilu_bench.studies.config import Config
from vilu_bench.studies.data import Workbench, differs_in_preprocessing
from vilu_bench.studies.result import Refusal

REFUSALS = (UsageError, DataError, ProvenanceError)
"""Exceptions by which a method refuses data or settings; any other exception is a bug."""


@dataclass(frozen=True)
class Fitted:
    """The result of a fit: a predictor or a refusal, with the warnings."""

    predictor: FailurePredictor  # fitted, unless ``refused`` is set
    refused: Refusal | None = None  # why the fit was refused; None if the fit was not refused
    n_train: int | None = None  # number of training rows; None if nothing was fitted
    seconds: float | None = None  # time of this fit, without the time of the earlier fit
    warnings: tuple[str, ...] = ()  # warnings of the fit


def predictor_of(config: Config, cell: Cell) -> FailurePredictor:
    """The unfitted predictor of a cell. If the predictor ignores the seed, the seed is 0."""
    seed = 0
    if config.depends_on_seed(cell.method):
        seed = cell.seed
    return config.predictor(cell.method, seed)


def fit(bench: Workbench, cell: Cell, origin: Origin, fits: dict[Origin, Fitted]) -> Fitted:
    """The predictor of a cell, fitted if it needs a fit.

    ``fits`` maps origins to the fits of earlier cells. New fits are added to ``fits``.
    """
    if not origin.train:
        return Fitted(predictor_of(bench.config, cell))
    if origin not in fits:
        earlier_fit = None
        if origin.start is not None:
            earlier_fit = fit(bench, cell, origin.start, fits)
        if earlier_fit is not None and earlier_fit.refused is not None:
            fits[origin] = earlier_fit  # this fit is refused for the same reason
        else:
            fits[origin] = _fit(bench, cell, origin, earlier_fit)
    return fits[origin]


def _fit(bench: Workbench, cell: Cell, origin: Origin, earlier_fit: Fitted | None) -> Fitted:
    """Fit a predictor on the rows of ``origin``.

    The fit starts from the weights of ``earlier_fit``, or from scratch if ``earlier_fit`` is None.
    """
    predictor = predictor_of(bench.config, cell)
    columns = (*predictor.columns, *predictor.optional_columns)
    refused = None
    n_train = None
    start_time = time.perf_counter()
    with collected_warnings() as fit_warnings:
        try:
            train = bench.train_set(origin, columns)
            validation = bench.validation_set(origin)
            n_train = len(train)
            start_time = time.perf_counter()  # the time to read the rows does not count
            if earlier_fit is None:
                predictor = _with_epochs_for_steps(bench.config, cell.method, predictor, train)
            else:
                predictor = _initialised_from(earlier_fit.predictor, origin, train)
            predictor.fit(train, validation, unlabelled=bench.unlabelled_set(origin))
        except REFUSALS as error:
            refused = refusal_from(error)
    return Fitted(
        predictor,
        refused=refused,
        n_train=n_train,
        seconds=time.perf_counter() - start_time,
        warnings=tuple(fit_warnings),
    )


def _initialised_from(
    fitted_predictor: FailurePredictor, origin: Origin, train: EmbeddingSource
) -> FailurePredictor:
    """An unfitted predictor whose training starts from the weights of a fitted predictor."""
    may_differ = origin.across_preprocessing
    if may_differ and differs_in_preprocessing(fitted_predictor.space_, train.space):
        # The earlier fit used, for example, a different picture size. A copy of the fitted
        # predictor gets the space of the new training rows, because a predictor refuses rows of
        # another space.
        fitted_predictor = copy.copy(fitted_predictor)
        fitted_predictor.space_ = train.space
    return initialise(type(fitted_predictor), fitted_predictor)


def _with_epochs_for_steps(
    config: Config, label: str, predictor: FailurePredictor, train: EmbeddingSource
) -> FailurePredictor:
    """A copy of the predictor with as many epochs as the method's ``steps`` need.

    If the method has no ``steps``, ``predictor`` is returned unchanged.
    """
    if config.entries[label].steps is None:
        return predictor
    values: dict[str, Any] = {name: getattr(predictor, name) for name in parameters(predictor)}
    # a training step takes a pool of captions, else the given batch size, else the default
    step_rows = train.pool_size or values["batch_size"] or default_batch(len(train))
    values["epochs"] = config.epochs_for(label, step_rows, len(train))
    return type(predictor)(**values)


def refusal_from(error: Exception) -> Refusal:
    """The refusal with the name and the message of an exception."""
    return Refusal(error=type(error).__name__, reason=str(error))


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings of a block in a list instead of showing them, each text once.

    The list is filled when the block ends.
    """
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += dict.fromkeys(str(warning.message) for warning in caught)
