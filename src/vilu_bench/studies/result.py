"""A cell's result as files: a JSON document, scores, and bootstrap values."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_serializer

from vilu.artifacts.disk import atomic_write, convert_os_errors, file_hash, make_folder
from vilu.artifacts.documents import SCHEMA_VERSION, first_error, read_json, read_log, write_json
from vilu.artifacts.tables import write_table
from vilu.errors import DataError
from vilu.metrics.bootstrap import SortedScores, values_on_resamples, values_without_strata
from vilu.metrics.catalog import METRICS
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.outcomes.results import ResultRow, ResultTable
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.parts import RANKING_METRICS, Name, Names, Section

logger = logging.getLogger("vilu.bench")

RUN_AGAIN = "Run its `vilu benchmark` again"  # advice in error messages
# suffixes for the two files beside a cell's document: the scores, and the bootstrap values
Suffix = Literal[".parquet", ".npy"]
SCORES: Suffix = ".parquet"
BOOTSTRAP: Suffix = ".npy"


class Refusal(Section):
    """Why a method gives no result in a cell."""

    error: str  # name of the exception
    reason: str


class Timing(Section):
    """Wall times for a cell with a single thread, from a line in the run folder's ``log.jsonl``."""

    fit_seconds: float | None  # time for the fit, or None if nothing was fitted
    score_seconds: float  # time to score the test set
    rows_per_second: float  # number of rows scored per second


class CellResult(Section):
    """A cell's result document."""

    schema_version: Literal[2] = SCHEMA_VERSION
    kind: Literal["benchmark cell"] = "benchmark cell"
    fingerprint: str  # hash of ``decided_by``
    decided_by: dict[str, Any]  # all facts that decide the result
    method: Name
    data: Name
    setting: Name
    seed: int
    variant: str = ""  # suffix on the method's label, such as " (model)", empty for most methods
    test_rows: str  # hash of the rows tested on
    n_train: int | None = None  # number of training rows, or None if nothing was fitted
    results: tuple[ResultRow, ...] = ()  # a row per metric, with the setting as ``split``
    refused: Refusal | None = None  # why there are no results
    warnings: tuple[str, ...] = ()  # warnings from the fit and from scoring
    # SHA-256, by suffix, for the two files beside this document, empty for a refused cell
    files: dict[Suffix, str] = Field(default_factory=dict)

    @field_serializer("results")
    def _results_to_dicts(self, results: tuple[ResultRow, ...]) -> list[dict[str, Any]]:
        return ResultTable(results).to_dicts()

    def value(self, metric: str) -> float | None:
        """Return a metric's value, or None if the metric is undefined or the cell was refused."""
        for row in self.results:
            if row.metric == metric:
                return row.value
        return None

    def save(
        self, root: Path, outcomes: Outcomes | None = None, bootstrap: Floats | None = None
    ) -> None:
        """Write the cell's files.

        The document is written last, so a cell with a document is finished.
        """
        path = root / self.cell.path
        make_folder(path.parent)
        files: dict[Suffix, str] = {}
        if outcomes is not None and bootstrap is not None:  # a refused cell has neither
            write_table(path.with_suffix(SCORES), *outcomes.table())
            with atomic_write(path.with_suffix(BOOTSTRAP)) as handle:
                np.save(handle, bootstrap, allow_pickle=False)
            files = {suffix: file_hash(path.with_suffix(suffix)) for suffix in (SCORES, BOOTSTRAP)}
        complete_result = self.model_copy(update={"files": files})
        write_json(path, complete_result.model_dump(mode="json"))

    @property
    def cell(self) -> Cell:
        """The cell that has this result."""
        return Cell(self.method, self.data, self.setting, self.seed)


def load_result(root: Path, cell: Cell, fingerprint: str) -> CellResult | None:
    """Load a cell's result. Return None if missing, damaged, or with another fingerprint.

    Raises:
        ProvenanceError: If the document has the schema of another vilu version.
    """
    path = root / cell.path
    if not path.is_file():
        return None
    try:
        document = read_json(path, RUN_AGAIN)
        result = CellResult.model_validate(document)
    except ValidationError as error:
        damage = first_error(error)
        logger.warning("%s is damaged: %s", path, damage)
        return None
    except DataError as error:
        logger.warning("%s", error)
        return None
    if result.fingerprint != fingerprint:
        return None
    for suffix, sha256 in result.files.items():
        file_beside = path.with_suffix(suffix)
        if not file_beside.exists():
            logger.warning("%s is gone", file_beside)
            return None
        if file_hash(file_beside) != sha256:
            logger.warning("%s is not the file of its cell", file_beside)
            return None
    return result


def load_times(root: Path, cells: Iterable[Cell]) -> dict[Cell, Timing]:
    """Read wall times of cells, from each cell's last line in the run folder's log."""
    times: dict[Cell, Timing] = {}
    cell_of_path = {cell.path.as_posix(): cell for cell in cells}
    for facts in read_log(root):
        cell_path = facts.pop("cell", None)
        cell = cell_of_path.get(str(cell_path))
        if cell is not None:
            # a line with different content is skipped: a log does not follow a fixed schema
            with suppress(ValidationError):
                times[cell] = Timing.model_validate(facts)
    return times


def load_bootstrap(root: Path, cell: Cell) -> Floats:
    """Load a finished cell's bootstrap values (M ranking metrics, B resamples)."""
    path = (root / cell.path).with_suffix(BOOTSTRAP)
    with convert_os_errors(f"cannot read {path}"):
        values: Floats = np.load(path, allow_pickle=False)
    return values


def bootstrap_metrics(
    uncertainty: Floats, failure: Ints, n_resamples: int, rows_hash: str
) -> Floats:
    """Compute the M ``RANKING_METRICS`` on B resamples of the test rows, as an array (M, B).

    ``rows_hash`` is the hexadecimal hash of the test rows. This hash seeds the resampling. So all
    cells with the same test rows have the same resamples, for any method and training seed,
    and differences between methods are paired. The choice of test rows gives the values a variance,
    and an average over training seeds does not reduce this variance.
    """
    scores = SortedScores(uncertainty, failure == 1)
    kernels = {name: METRICS[name].kernel for name in RANKING_METRICS}
    seed = int(rows_hash, 16)
    values = values_on_resamples(kernels, scores, n_resamples, seed)
    return np.stack([values[name] for name in RANKING_METRICS])


def bootstrap_across_answers(
    uncertainty: Floats, failure: Ints, n_resamples: int, rows_hash: str, metrics: Names
) -> Floats:
    """Compute M metrics on B resamples, as an array (M, B), for methods with different answers.

    The resamples are as in ``bootstrap_metrics``, but without strata for right and wrong rows. Such
    strata do not fit all methods: each method judges different answers, and different rows are
    wrong for each method.
    """
    kernels = {name: METRICS[name].kernel for name in metrics}
    seed = int(rows_hash, 16)
    values = values_without_strata(kernels, uncertainty, failure, n_resamples, seed)
    return np.stack([values[name] for name in metrics])
