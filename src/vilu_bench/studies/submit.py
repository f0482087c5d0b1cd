"""Submitted cells: result files from other people, checked and shown beside a study."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from vilu.artifacts.disk import make_folder
from vilu.artifacts.documents import first_error
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import read_table
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import TEXT_COLUMNS, Outcomes, identity_fields
from vilu.outcomes.results import ResultRow
from vilu.predictors.persistence.description import home_of
from vilu_bench.studies.board import Board, LoadBootstrap
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.fit import collected_warnings
from vilu_bench.studies.parts import Section
from vilu_bench.studies.result import SCORES, CellResult, bootstrap_metrics, load_bootstrap

SUBMISSION_KEY = "submission"  # key for the submission in a score file's provenance
# keys in ``decided_by`` that must have the same values as in the study's cell
EQUAL_DATA_KEYS = ("test", "halves_seed", "fit_share", "division_seed", "metrics", "resamples")
# Keys in ``decided_by["train"]`` that must have the same values as in one of the study's fits. The
# budget is left out: a submitted fit may have the budget "none" in place of the study's budget.
EQUAL_FIT_KEYS = ("rows", "halves_seed", "fit_share", "division_seed", "pool_size")
# Keys in ``decided_by["train"]`` for further rows that a fit saw, with the texts in messages. A
# submitted fit may have no such rows, or the rows of one of the study's fits.
FURTHER_ROWS = {
    "validation": "it was selected on validation rows",
    "start": "its first fit was on rows",
}


class Submission(Section):
    """The metadata in a submitted file. The file's rows are scores, as from ``vilu score``."""

    schema_version: Literal[2] = 2
    # "" for our methods. For a method from outside vilu, its package and version: "my-package 1.2".
    made_by: Annotated[str, Field(pattern=r"^[\w.+ -]{0,99}$")]
    result: CellResult  # the run folder's result document
    # (setting, seed) of every cell with this result. All facts that decide the result are equal.
    stands_for: tuple[tuple[str, int], ...]


class SubmittedFile(NamedTuple):
    """A submitted file, read and checked."""

    path: Path
    submission: Submission
    outcomes: Outcomes


def export_cells(boards: Iterable[Board], run: Path, label: str, folder: Path) -> list[Path]:
    """Write a method's cells as files ``DATA/SETTING/METHOD/seed-SEED.parquet`` below ``folder``.

    Raises:
        UsageError: If no study has a result for the method, or if a study has adapted answers.
    """
    # The keys in both dicts are the method's cells that were run and have a result.
    first_board: dict[Cell, Board] = {}  # the first study with the cell
    pairs_of_cell: dict[Cell, list[tuple[str, int]]] = {}  # settings and seeds with the same result
    for board in boards:
        _refuse_adapted(board)
        for cell in board.cells:
            has_result = board.results[cell.result_cell].refused is None
            if cell.method == label and has_result:
                first_board.setdefault(cell.result_cell, board)  # an earlier study is not replaced
                pairs_of_cell.setdefault(cell.result_cell, []).append((cell.setting, cell.seed))
    if not first_board:
        raise UsageError(f"no study in {run} has a result of a method {label!r}.")
    paths = []
    for cell, board in first_board.items():
        paths.append(_write(board, run, cell, pairs_of_cell[cell], folder))
    return paths


def _refuse_adapted(board: Board) -> None:
    """Refuse a study in which methods judge different answers."""
    if board.config.judges_adapted_answers:
        raise UsageError(
            f"the study {board.config.name} has a method that judges adapted answers. Results can "
            "be submitted to studies of zero-shot answers only, where all methods judge the same."
        )


def _write(
    board: Board, run: Path, cell: Cell, settings_and_seeds: list[tuple[str, int]], folder: Path
) -> Path:
    """Write a cell's scores as a file for submission."""
    made_by = _maker(board, cell.method)
    result = board.results[cell].model_copy(update={"files": {}})
    stands_for = tuple(dict.fromkeys(settings_and_seeds))
    submission = Submission(made_by=made_by, result=result, stands_for=stands_for)
    relative_path = cell.path.relative_to("cells")
    cell_folder = make_folder((folder / relative_path).parent)
    path = cell_folder / f"seed-{cell.seed}{SCORES}"
    provenance = {SUBMISSION_KEY: submission.model_dump(mode="json")}
    scores = replace(_scores(run, cell), provenance=provenance)
    scores.save(path)
    return path


def _maker(board: Board, method: str) -> str:
    """Return package and version for a method from outside vilu, or "" for our methods."""
    cls = board.config.class_of(method)
    entries = home_of(cls)  # empty for our methods
    distribution = entries.get("home", {}).get("distribution")
    if distribution in {None, "vilu", "vilu-bench"}:
        return ""
    return f"{distribution} {importlib.metadata.version(distribution)}"


def _scores(run: Path, cell: Cell) -> Outcomes:
    return Outcomes.load((run / cell.path).with_suffix(SCORES))


def add_submissions(boards: Sequence[Board], run: Path, files: Iterable[Path]) -> list[Board]:
    """Check submitted files, and add each file to every matching study in a run folder.

    Raises:
        DataError: If there is no file, or if a file differs from the result that the study would
            compute from the file's rows.
    """
    submitted_files = [_read(path) for path in files]
    if not submitted_files:
        raise DataError(
            f"there is no cell to show beside those of {run}: the folder has no {SCORES} file."
        )
    pairs_by_board = []
    placed_files: set[Path] = set()
    for board in boards:
        _refuse_adapted(board)
        pairs = _files_and_cells(board, submitted_files)
        pairs_by_board.append(pairs)
        placed_files.update(submitted_file.path for submitted_file, _ in pairs)
    for submitted_file in submitted_files:
        if submitted_file.path not in placed_files:
            raise DataError(
                f"{submitted_file.path}: no study in {run} has a result with its data set, "
                "setting and seed, to compare it with."
            )
    boards_with_submissions = []
    for board, pairs in zip(boards, pairs_by_board, strict=True):
        boards_with_submissions.append(_with_submitted_files(board, run, pairs))
    return boards_with_submissions


def _read(path: Path) -> SubmittedFile:
    """Read a submitted file, and check that the file is undamaged and has every row once."""
    try:
        outcomes = Outcomes.load(path)
        table, _ = read_table(path, TEXT_COLUMNS)
        document = outcomes.provenance.get(SUBMISSION_KEY)
        submission = Submission.model_validate(document)
    except ValidationError as error:
        fault = first_error(error)
        raise DataError(f"{path} is no cell as `vilu submit` writes it: {fault}") from error
    except DataError as error:
        raise DataError(f"{path} is no cell as `vilu submit` writes it: {error}") from error
    has_all_rows = False
    if "row_id" in table.column_names:
        has_all_rows = table["row_id"].to_pylist() == list(range(len(table)))
    if not has_all_rows:
        raise DataError(
            f"{path} must have every row once, in order: row_id must be 0 to {len(table) - 1}."
        )
    cell = submission.result.cell
    # a cell has no ``answer``, so the scores' own answer is expected
    expected = (cell.method, cell.data, cell.setting, cell.seed, outcomes.answer)
    if tuple(identity_fields(outcomes).values()) != expected:
        raise DataError(f"{path} says that it is {cell}, and its scores are of another cell.")
    return SubmittedFile(path, submission, outcomes)


def _files_and_cells(
    board: Board, submitted_files: Iterable[SubmittedFile]
) -> list[tuple[SubmittedFile, Cell]]:
    """Pair each submitted file with every cell of the study to compare the file with."""
    pairs = []
    for submitted_file in submitted_files:
        for cell in _matching_cells(board, submitted_file):
            pairs.append((submitted_file, cell))
    return pairs


def _matching_cells(board: Board, submitted_file: SubmittedFile) -> list[Cell]:
    """Find the study's cells to compare a submitted file with: a cell for each setting and seed.

    If the study has no result with a setting and seed, no cell is returned for this pair. If
    several methods have a result there, the last method is taken: all these methods have the same
    test rows.
    """
    data = submitted_file.submission.result.data
    wanted_pairs = set(submitted_file.submission.stands_for)
    matching: dict[tuple[str, int], Cell] = {}
    for cell in board.cells:
        if cell.data != data:
            continue
        setting_and_seed = (cell.setting, cell.seed)
        has_result = board.results[cell.result_cell].refused is None
        if has_result and setting_and_seed in wanted_pairs:
            matching[setting_and_seed] = cell
    return list(matching.values())


def _with_submitted_files(
    board: Board, run: Path, pairs: Sequence[tuple[SubmittedFile, Cell]]
) -> Board:
    """Add files to a study. A pair is a file and the cell with equal data, setting and seed."""
    submitted_files: dict[Cell, SubmittedFile] = {}
    result_cells = {cell: cell.result_cell for cell in board.cells}
    results = dict(board.results)
    for submitted_file, study_cell in pairs:
        result = _check_submitted_file(board, run, submitted_file, study_cell)
        cell = replace(study_cell, method=result.method, same_as=None)
        present_scores = _present_scores(run, result_cells, submitted_files, cell)
        if present_scores is not None:
            _require_same_scores(submitted_file, present_scores)
        elif result.method in board.config.method_entries:
            raise _conflict_error(submitted_file)
        else:
            if cell != result.cell:  # the cell has another setting or seed, and shares the result
                cell = replace(cell, same_as=result.cell)
            submitted_files[cell] = submitted_file
            results[result.cell] = result
    makers = {}
    for submitted_file in submitted_files.values():
        makers[submitted_file.submission.result.method] = submitted_file.submission.made_by
    config = board.config.with_submitted_methods(makers)
    load_bootstrap_of_any = _bootstrap_with_submissions(board, run, submitted_files, results)
    return Board(config, (*board.cells, *submitted_files), results, load_bootstrap_of_any)


def _present_scores(
    run: Path,
    result_cells: Mapping[Cell, Cell],
    submitted_files: Mapping[Cell, SubmittedFile],
    cell: Cell,
) -> Outcomes | None:
    """Return a cell's present scores, from an earlier submitted file or the study, else None."""
    if cell in submitted_files:
        return submitted_files[cell].outcomes
    if cell in result_cells:
        return _scores(run, result_cells[cell])
    return None


def _require_same_scores(submitted_file: SubmittedFile, present_scores: Outcomes) -> None:
    submitted_scores = submitted_file.outcomes.uncertainty
    if not np.array_equal(present_scores.uncertainty, submitted_scores, equal_nan=True):
        raise _conflict_error(submitted_file)


def _conflict_error(submitted_file: SubmittedFile) -> DataError:
    method = submitted_file.submission.result.method
    return DataError(
        f"{submitted_file.path}: there is a {method!r} with other scores. "
        "Hand in yours under a label of its own."
    )


def _bootstrap_with_submissions(
    board: Board,
    run: Path,
    submitted_files: Mapping[Cell, SubmittedFile],
    results: Mapping[Cell, CellResult],
) -> LoadBootstrap:
    """Return a function that returns bootstrap values for a cell in the study or in a file.

    For a cell in the study the values are read. For a submitted file the values are computed from
    the scores.
    """
    outcomes = {
        cell.result_cell: submitted_file.outcomes
        for cell, submitted_file in submitted_files.items()
    }

    def bootstrap(cell: Cell) -> Floats:
        if cell not in outcomes:
            return load_bootstrap(run, cell)
        scores = outcomes[cell].take(outcomes[cell].evaluable)
        return bootstrap_metrics(
            scores.uncertainty, scores.failure, board.config.resamples, results[cell].test_rows
        )

    return cache(bootstrap)


def _check_submitted_file(
    board: Board, run: Path, submitted_file: SubmittedFile, study_cell: Cell
) -> CellResult:
    """Return a submitted file's result, with metrics computed from the file's scores.

    Args:
        board: The study.
        run: The study's run folder.
        submitted_file: The submitted file.
        study_cell: The study's cell with the same data set, setting and seed.

    Raises:
        DataError: If the file's facts, rows or metrics are not the expected values.
    """
    result = submitted_file.submission.result
    outcomes = submitted_file.outcomes
    fault = _fault_of_facts(board, result, study_cell)
    if fault is None:
        fault = _fault_of_rows(_scores(run, study_cell.result_cell), outcomes)
    rows: tuple[ResultRow, ...] = ()
    if fault is None:
        with collected_warnings():  # not shown again, because the submitted result has the warnings
            rows = evaluate(outcomes, metrics=board.config.metrics, n_resamples=0).rows
        fault = _fault_of_metrics(result, rows)
    if fault is not None:
        raise DataError(
            f"{submitted_file.path} is no result of {board.config.name} on {study_cell.data}: "
            f"{fault}."
        )
    return result.model_copy(update={"results": rows})


def _fault_of_facts(board: Board, result: CellResult, cell: Cell) -> str | None:
    """Say how a submitted result's facts differ from the facts of our cell. None if equal."""
    our_result = board.results[cell.result_cell]
    facts = result.decided_by
    if result.fingerprint != digest(facts):
        return "its fingerprint does not match its own facts (decided_by)"
    if result.test_rows != our_result.test_rows:
        return "it was tested on other rows. Embed or import the same data"
    our_facts = our_result.decided_by
    differing = [key for key in EQUAL_DATA_KEYS if facts.get(key) != our_facts.get(key)]
    if differing:
        return f"it differs in {', '.join(differing)}"
    submitted_fit = facts.get("train")
    if not submitted_fit:  # the method is not fitted, so there is nothing more to compare
        return None
    our_fits = list(_fits_of_study(board, cell))
    if not any(_is_same_fit(submitted_fit, our_fit) for our_fit in our_fits):
        return "it was fitted on rows that no method of the study was fitted on"
    for key, use in FURTHER_ROWS.items():
        our_rows = [our_fit.get(key) for our_fit in our_fits]
        if submitted_fit.get(key) not in [None, *our_rows]:
            return (
                f"{use} that no method of the study saw. Run the study again if it is of an older "
                "version, or submit without these rows"
            )
    budget = board.config.settings[cell.setting].budget
    submitted_budget = submitted_fit.get("budget")
    if submitted_budget not in {budget, "none"}:
        return f"it was fitted with the budget {submitted_budget}, here the budget is {budget}"
    return None


def _is_same_fit(submitted_fit: Mapping[str, object], our_fit: Mapping[str, object]) -> bool:
    return all(submitted_fit.get(key) == our_fit.get(key) for key in EQUAL_FIT_KEYS)


def _fits_of_study(board: Board, cell: Cell) -> Iterator[Mapping[str, object]]:
    """Yield the training facts for every fit with the cell's data set, setting and seed."""
    wanted_case = (cell.data, cell.setting, cell.seed)
    for our_cell in board.cells:
        if (our_cell.data, our_cell.setting, our_cell.seed) == wanted_case:
            our_fit = board.results[our_cell.result_cell].decided_by.get("train")
            if our_fit:
                yield our_fit


def _fault_of_rows(our_outcomes: Outcomes, submitted_outcomes: Outcomes) -> str | None:
    """Say how a submitted file's rows differ from the study's rows. None if equal."""
    if len(submitted_outcomes) != len(our_outcomes):
        return f"it has {len(submitted_outcomes)} rows, and there are {len(our_outcomes)}"
    differs = (submitted_outcomes.failure != our_outcomes.failure) | (
        submitted_outcomes.outside != our_outcomes.outside
    )
    if differs.any():
        return (
            f"row {np.flatnonzero(differs)[0]} has another truth than here "
            "(right, wrong, or of none of the classes)"
        )
    lacks_score = np.isnan(submitted_outcomes.uncertainty) & ~np.isnan(our_outcomes.uncertainty)
    if lacks_score.any():
        return f"row {np.flatnonzero(lacks_score)[0]} has no uncertainty, but has one here"
    return None


def _fault_of_metrics(result: CellResult, rows: Iterable[ResultRow]) -> str | None:
    """Say how a submitted result's metrics differ from the metrics in ``rows``. None if equal.

    ``rows`` are computed from the submitted scores.
    """
    stated_values = {row.metric: row.value for row in result.results}
    differing = []
    for row in rows:
        value = stated_values.get(row.metric)
        if not _is_same_number(value, row.value):
            differing.append(f"{row.metric} = {row.value}, and it says {value}")
    if not differing:
        return None
    return f"its rows give {'; '.join(differing)}"


def _is_same_number(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b  # true if both are None
    return math.isclose(a, b, abs_tol=1e-9)
