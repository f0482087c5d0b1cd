"""Running cells: fit, score, evaluate, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from vilu.benchmark.cells import Cell, Origin, origin_of
from vilu.benchmark.facts import decided_by
from vilu.benchmark.fits import REFUSALS, Fitted, collected_warnings, fit, predictor_of, refusal
from vilu.benchmark.resampling import resampled_metrics
from vilu.benchmark.result import CellResult, Refusal, Timing
from vilu.benchmark.workbench import Truth, Workbench
from vilu.errors import ProvenanceError
from vilu.evaluation import evaluate
from vilu.outcomes import Outcomes
from vilu.progress import Silence, reporting
from vilu.space import digest
from vilu.types import SAME_TEXT

logger = logging.getLogger(__name__)


def run_group(bench: Workbench, cells: Sequence[Cell], root: Path) -> Iterator[Cell]:
    """Score, evaluate and write each of the cells that share a fit, fitting once; a refusal is a result, too.

    Raises:
        Exception: Whatever else goes wrong, with a note that names the cell.
    """
    fits: dict[Origin, Fitted] = {}
    for cell in cells:
        with Naming(cell), one_thread(), reporting(Silence()):
            refused = refuse_other_classes(bench, cell)
            if refused is not None:
                write(bench, cell, Fitted(predictor_of(bench, cell), refused), root)
            else:
                write(bench, cell, fit(bench, cell, origin_of(bench.config, cell), fits), root)
        yield cell


def refuse_other_classes(bench: Workbench, cell: Cell) -> Refusal | None:
    """What a closed-set method would say after its fit, before the time for that is spent."""
    candidates = bench.candidates(cell) if bench.config.class_of(cell.method).closed_set else None
    if candidates is None:
        return None
    known, asked = candidates
    if known.shape[1] != asked.shape[1]:
        reason = f"it is fitted on embeddings of width {known.shape[1]}, and these have {asked.shape[1]}."
        return Refusal(error=ProvenanceError.__name__, reason=reason)
    others = int(((asked @ known.T).amax(dim=1) < SAME_TEXT).sum())
    reason = (
        f"it scores the {len(known)} classes that it is fitted on, and {others} of the {len(asked)} candidates here "
        "are others."
    )
    return Refusal(error=ProvenanceError.__name__, reason=reason) if others else None


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
