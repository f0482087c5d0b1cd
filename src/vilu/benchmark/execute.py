"""Running cells: fit, score, evaluate, write."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

import vilu
from vilu.benchmark.cells import Cell, origin_of
from vilu.benchmark.code import code_digest
from vilu.benchmark.resampling import resampled_metrics
from vilu.benchmark.result import CellResult, Refusal, Timing
from vilu.benchmark.workbench import Truth, Workbench
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.evaluation import evaluate
from vilu.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.predictors.parameters import parameters
from vilu.progress import Silence, reporting
from vilu.space import digest
from vilu.types import SAME_TEXT

logger = logging.getLogger(__name__)

REFUSALS = (UsageError, DataError, ProvenanceError)
"""How a method says that it does not work on what it is given; anything else is a fault."""


def predictor_of(bench: Workbench, cell: Cell) -> FailurePredictor:
    """The unfitted predictor of a cell; one that does not depend on the seed has seed 0."""
    config = bench.config
    return config.predictor(cell.method, cell.seed if config.depends_on_seed(cell.method) else 0)


def decided_by(bench: Workbench, cell: Cell) -> dict[str, object]:
    """Everything that decides the result of a cell, as plain JSON."""
    config, origin, predictor = bench.config, origin_of(bench.config, cell), predictor_of(bench, cell)
    return {
        "vilu": vilu.__version__,
        "code": code_digest(type(predictor).__module__),
        "method": predictor.name,
        "parameters": {name: getattr(predictor, name) for name in parameters(predictor)},
        "steps": config.entries[cell.method].steps,
        "train": None if origin.train is None else bench.fingerprint(origin.train, "train"),
        "test": bench.fingerprint(origin.test, "test"),
        "budget": origin.budget,
        "rows_seed": origin.rows_seed,
        "halves_seed": origin.halves_seed,
        "across_preprocessing": origin.across_preprocessing,
        "metrics": list(config.metrics),
        "resamples": config.resamples,
    }


def fingerprint_of(bench: Workbench, cell: Cell) -> str:
    """Hash of ``decided_by``."""
    return digest(decided_by(bench, cell))


@dataclass(frozen=True)
class Fitted:
    """A fit, or its refusal, with what it said.

    Attributes:
        predictor: Ready to score, unless refused.
        refused: Why there was no fit.
        n_train: Rows in the training set; None where nothing is fitted.
        seconds: Of fitting.
        warnings: Of fitting.
    """

    predictor: FailurePredictor
    refused: Refusal | None = None
    n_train: int | None = None
    seconds: float | None = None
    warnings: tuple[str, ...] = ()


def run_group(bench: Workbench, cells: Sequence[Cell], root: Path) -> Iterator[Cell]:
    """Fit once, then score, evaluate and write each of the cells that share this fit; a refusal is a result, too.

    Raises:
        Exception: Whatever else goes wrong, with a note that names the cell.
    """
    fitted: Fitted | None = None
    for cell in cells:
        with Naming(cell), one_thread(), reporting(Silence()):
            refused = refuse_other_classes(bench, cell)
            if refused is not None:
                write(bench, cell, Fitted(predictor_of(bench, cell), refused), root)
            else:
                fitted = fitted or fit(bench, cell)
                write(bench, cell, fitted, root)
        yield cell


def refuse_other_classes(bench: Workbench, cell: Cell) -> Refusal | None:
    """What a closed-set method would say after its fit, before the time for that is spent."""
    if not bench.config.class_of(cell.method).closed_set:
        return None
    known, asked = bench.candidates(cell)
    others = int(((asked @ known.T).amax(dim=1) < SAME_TEXT).sum())
    reason = (
        f"it scores the {len(known)} classes that it is fitted on, and {others} of the {len(asked)} candidates here "
        "are others."
    )
    return Refusal(error=ProvenanceError.__name__, reason=reason) if others else None


def fit(bench: Workbench, cell: Cell) -> Fitted:
    """The predictor of a cell, fitted where it needs that."""
    predictor = predictor_of(bench, cell)
    train = bench.train_set(cell, (*predictor.columns, *predictor.optional_columns))
    if train is None:
        return Fitted(predictor)
    predictor = bench.config.trained_for(cell.method, predictor, len(train))
    refused, begun = None, time.perf_counter()
    with collected_warnings() as said:
        try:
            predictor.fit(train)
        except REFUSALS as error:
            refused = refusal(error)
    return Fitted(predictor, refused, len(train), time.perf_counter() - begun, tuple(said))


def write(bench: Workbench, cell: Cell, fitted: Fitted, root: Path) -> None:
    """Score, evaluate and write a cell."""
    facts, truth = decided_by(bench, cell), bench.truth(cell)
    result = CellResult(
        fingerprint=digest(facts),
        decided_by=facts,
        method=cell.method,
        data=cell.data,
        setting=cell.setting,
        seed=cell.seed,
        test_rows=truth.rows,
        n_train=fitted.n_train,
        refused=fitted.refused,
        warnings=fitted.warnings,
    )
    if result.refused is not None:
        result.save(root)
        return
    with collected_warnings() as said:
        try:
            outcomes, timing = measure(bench, cell, fitted, truth)
            rows = evaluate(outcomes, metrics=bench.config.metrics, n_resamples=0).rows
        except REFUSALS as error:
            result.model_copy(update={"refused": refusal(error)}).save(root)
            return
    scored = outcomes.evaluable
    bootstrap = resampled_metrics(
        outcomes.uncertainty[scored], outcomes.failure[scored], bench.config.resamples, truth.rows
    )
    variant = fitted.predictor.label.removeprefix(fitted.predictor.name)
    found = {"results": rows, "timing": timing, "variant": variant, "warnings": (*fitted.warnings, *said)}
    result.model_copy(update=found).save(root, outcomes, bootstrap)


def measure(bench: Workbench, cell: Cell, fitted: Fitted, truth: Truth) -> tuple[Outcomes, Timing]:
    """Scores of a cell's test rows, and how long they took.

    Raises:
        UsageError: If the method does not work on such data.
        DataError: If the data lack something that it needs.
        ProvenanceError: If it was fitted on other classes or another space.
    """
    predictor = fitted.predictor
    test = bench.test_set(cell, (*predictor.columns, *predictor.optional_columns))
    begun = time.perf_counter()
    uncertainty = predictor.predict_uncertainty(test)
    seconds = time.perf_counter() - begun
    outcomes = Outcomes(
        uncertainty=uncertainty,
        failure=truth.failure,
        method=cell.method,
        dataset=cell.data,
        split=cell.setting,
        seed=cell.seed,
        reason=truth.reason,
        is_probability=predictor.is_probability,
    )
    return outcomes, Timing(
        fit_seconds=fitted.seconds, score_seconds=seconds, rows_per_second=len(test) / max(seconds, 1e-9)
    )


def refusal(error: Exception) -> Refusal:
    """A refusal as it is kept."""
    return Refusal(error=type(error).__name__, reason=str(error))


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Distinct texts of the warnings of a block, which are not shown; complete when the block ends."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += dict.fromkeys(str(warning.message) for warning in said)


class Naming(AbstractContextManager[None]):
    """Adds the cell to whatever exception leaves the block, and to the log."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Name the cell."""
        if isinstance(error, Exception):
            error.add_note(f"in the cell: {self._cell}")
            logger.error("the benchmark stops at %s", self._cell)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch, BLAS and OpenMP, so that results do not depend on the number of cores or jobs."""
    import sklearn.linear_model  # noqa: F401 - brings the libraries that are to be limited
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
