"""Cells that others ran: one file each to hand in, checked row by row against a study, and shown beside its own."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from vilu.artifacts.disk import make_folder
from vilu.artifacts.documents import explain
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import read_table
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.outcomes import TEXT_COLUMNS, Outcomes, facts_of
from vilu.predictors.persistence.record import home_of
from vilu_bench.studies.board import Board
from vilu_bench.studies.cells import Cell
from vilu_bench.studies.fit import collected_warnings
from vilu_bench.studies.parts import Section
from vilu_bench.studies.result import SCORES, CellResult, load_bootstrap, resampled_metrics

KEY = "submission"  # of the provenance of the scores
SAME_DATA = (
    "test",
    "halves_seed",
    "fit_share",
    "division_seed",
    "metrics",
    "resamples",
)  # whatever the method is
SAME_FIT = (
    "rows",
    "halves_seed",
    "fit_share",
    "division_seed",
    "pool_size",
)  # but for the budget, which may be none


class Submission(Section):
    """What a file says beside its rows, which are scores as ``vilu score`` writes them."""

    schema_version: Literal[2] = 2
    made_by: Annotated[
        str, Field(pattern=r"^[\w.+ -]{0,99}$")
    ]  # distribution and version of a method from outside
    result: CellResult  # as the run folder has it
    stands_for: tuple[
        tuple[str, int], ...
    ]  # settings and seeds whose result it is, since nothing in them differs


class Guest(NamedTuple):
    """A file that was handed in."""

    path: Path
    said: Submission
    outcomes: Outcomes


def export(boards: Iterable[Board], run: Path, label: str, folder: Path) -> list[Path]:
    """Write every cell of a method as a file of its own, below ``folder`` by data set, setting and seed.

    Raises:
        UsageError: If no study has a result of it.
    """
    found: dict[Cell, tuple[Board, list[tuple[str, int]]]] = {}
    for board in boards:
        for cell in board.cells:
            if cell.method == label and board.results[cell.run].refused is None:
                found.setdefault(cell.run, (board, []))[1].append((cell.setting, cell.seed))
    if not found:
        raise UsageError(f"no study in {run} has a result of a method {label!r}.")
    return [_write(board, run, cell, places, folder) for cell, (board, places) in found.items()]


def _write(
    board: Board, run: Path, cell: Cell, places: list[tuple[str, int]], folder: Path
) -> Path:
    name = home_of(board.config.class_of(cell.method)).get("home", {}).get("distribution")
    said = Submission(
        made_by=f"{name} {importlib.metadata.version(name)}" if name else "",
        result=board.results[cell].model_copy(update={"files": {}}),
        stands_for=tuple(dict.fromkeys(places)),
    )
    path = (
        make_folder((folder / cell.path.relative_to("cells")).parent) / f"seed-{cell.seed}{SCORES}"
    )
    replace(_scores(run, cell), provenance={KEY: said.model_dump(mode="json")}).save(path)
    return path


def _scores(run: Path, cell: Cell) -> Outcomes:
    return Outcomes.load((run / cell.path).with_suffix(SCORES))


def take_in(boards: Sequence[Board], run: Path, files: Iterable[Path]) -> list[Board]:
    """The studies of a run folder with cells that were handed in as further columns, each checked first.

    Raises:
        DataError: If there is none, or one is not what a study would have found on its rows.
    """
    guests = [_read(path) for path in files]
    if not guests:
        raise DataError(
            f"there is no cell to show beside those of {run}: the folder has no {SCORES} file."
        )
    placed = [
        [(guest, cell) for guest in guests for cell in _places(board, guest)] for board in boards
    ]
    for guest in guests:
        if not any(guest is one for found in placed for one, _ in found):
            raise DataError(
                f"{guest.path}: no study in {run} has a result in its place, to compare it with."
            )
    return [_with(board, run, found) for board, found in zip(boards, placed, strict=True)]


def _read(path: Path) -> Guest:
    """A file that was handed in: its digest is right, and every row is there once."""
    try:
        outcomes, table = Outcomes.load(path), read_table(path, TEXT_COLUMNS)[0]
        said = Submission.model_validate(outcomes.provenance.get(KEY))
    except (DataError, ValidationError) as error:
        what = explain(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{path} is no cell as `vilu submit` writes it: {what}") from error
    if "row_id" not in table.column_names or table["row_id"].to_pylist() != list(range(len(table))):
        raise DataError(
            f"{path} must have every row once, in order: row_id must be 0 to {len(table) - 1}."
        )
    cell = said.result.cell
    if tuple(facts_of(outcomes).values()) != (cell.method, cell.data, cell.setting, cell.seed):
        raise DataError(f"{path} says that it is {cell}, and its scores are of another cell.")
    return Guest(path, said, outcomes)


def _places(board: Board, guest: Guest) -> list[Cell]:
    """The cells of a study beside which a guest stands: one for each of its places, with a result."""
    wanted = {(guest.said.result.data, setting, seed) for setting, seed in guest.said.stands_for}
    able = [cell for cell in board.cells if board.results[cell.run].refused is None]
    return list(
        {
            place: cell
            for cell in able
            if (place := (cell.data, cell.setting, cell.seed)) in wanted
        }.values()
    )


def _with(board: Board, run: Path, found: Sequence[tuple[Guest, Cell]]) -> Board:
    """A study with the guests beside some of its cells."""
    guests: dict[Cell, Guest] = {}
    own, results = {cell: cell.run for cell in board.cells}, dict(board.results)
    for guest, beside in found:
        result = _checked(board, run, guest, beside)
        cell = replace(beside, method=result.method, same_as=None)
        there = (
            guests[cell].outcomes
            if cell in guests
            else _scores(run, own[cell])
            if cell in own
            else None
        )
        if there is None and result.method not in board.config.entries:
            guests[cell if cell == result.cell else replace(cell, same_as=result.cell)] = guest
            results[result.cell] = result
        elif there is None or not np.array_equal(
            there.uncertainty, guest.outcomes.uncertainty, equal_nan=True
        ):
            what = f"there is a {result.method!r} with other scores. Hand in yours under a label of its own"
            raise DataError(f"{guest.path}: {what}.")
    rows = {cell.run: guest.outcomes for cell, guest in guests.items()}

    def bootstrap(cell: Cell) -> Floats:
        if cell not in rows:
            return load_bootstrap(run, cell)
        scores = rows[cell].take(rows[cell].evaluable)
        return resampled_metrics(
            scores.uncertainty, scores.failure, board.config.resamples, results[cell].test_rows
        )

    made_by = {guest.said.result.method: guest.said.made_by for guest in guests.values()}
    return Board(
        board.config.with_guests(made_by), (*board.cells, *guests), results, cache(bootstrap)
    )


def _checked(board: Board, run: Path, guest: Guest, beside: Cell) -> CellResult:
    """The result of a guest, its metrics computed here; refused where anything is not as beside it."""
    theirs = guest.said.result
    wrong = _wrong_facts(board, theirs, beside) or _wrong_rows(
        _scores(run, beside.run), guest.outcomes
    )
    with collected_warnings():  # they are in the result
        rows = (
            ()
            if wrong
            else evaluate(guest.outcomes, metrics=board.config.metrics, n_resamples=0).rows
        )
    said = {row.metric: row.value for row in theirs.results}
    for row in rows:
        value = said.get(row.metric)
        if (value is None) != (row.value is None) or not math.isclose(
            value or 0, row.value or 0, abs_tol=1e-9
        ):
            wrong = f"its rows give {row.metric} = {row.value}, and it says {value}"
    if wrong:
        raise DataError(
            f"{guest.path} is no result of {board.config.name} on {beside.data}: {wrong}."
        )
    return theirs.model_copy(update={"results": rows})


def _wrong_facts(board: Board, theirs: CellResult, beside: Cell) -> str | None:
    """What of the description of a cell cannot be, or is of something else than the study's."""
    ours, facts, place = (
        board.results[beside.run],
        theirs.decided_by,
        (beside.data, beside.setting, beside.seed),
    )
    if theirs.fingerprint != digest(facts):
        return "its fingerprint is not that of what it says decided it"
    if theirs.test_rows != ours.test_rows:
        return "it was tested on other rows. Embed or import the same data"
    if differing := [key for key in SAME_DATA if facts.get(key) != ours.decided_by.get(key)]:
        return f"it differs in {', '.join(differing)}"
    there = (
        board.results[cell.run]
        for cell in board.cells
        if (cell.data, cell.setting, cell.seed) == place
    )
    fits, train = (
        [one.decided_by["train"] for one in there if one.decided_by.get("train")],
        facts.get("train"),
    )
    if train and not any(all(train.get(key) == fit.get(key) for key in SAME_FIT) for fit in fits):
        return "it was fitted on rows that no method of the study was fitted on"
    budget = board.config.settings[beside.setting].budget
    if train and train.get("budget") not in {budget, "none"}:
        return f"it was fitted on {train.get('budget')} labels a class, here {budget}"
    return None


def _wrong_rows(ours: Outcomes, theirs: Outcomes) -> str | None:
    """How the rows of a guest are not those of the study, one by one."""
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} rows, and there are {len(ours)}"
    wrong = np.flatnonzero((theirs.failure != ours.failure) | (theirs.outside != ours.outside))
    if len(wrong):
        return f"row {wrong[0]} is not as right or wrong as here"
    without = np.flatnonzero(np.isnan(theirs.uncertainty) & ~np.isnan(ours.uncertainty))
    return f"row {without[0]} has no uncertainty, and could have one" if len(without) else None
