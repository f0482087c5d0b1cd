"""Which answers of a table to label next: some to fit on, and a random sample to calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vilu.artifacts.disk import atomic_write, convert_os_errors, write_bytes
from vilu.artifacts.tables import csv_bytes
from vilu.calibration.clusters import cluster_indices
from vilu.errors import UNKNOWN
from vilu.metrics.counts import Ints
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.tables.read import FEATURES_BESIDE, open_table
from vilu.tables.table import AnswerTable, Purpose


def next_answers(
    table: AnswerTable,
    predictor: FailurePredictor,
    asked_ids: Collection[str],
    n: int,
    seed: int,
) -> tuple[Ints, list[Purpose]]:
    """Choose ``n`` answers without a label: half to fit on, half to calibrate on.

    A hash of a row's identifier decides for which of the two the row may be chosen. The rows to
    calibrate on are the next ones in the random order of their hashes. So all rows that were chosen
    so far are a random sample, at any time. The rows to fit on are spread evenly over the ascending
    uncertainties, so that right and wrong answers are among them. Rows that the predictor was
    fitted on, and copies of other rows, are not chosen.

    In a table with clusters, whole clusters are chosen in the same way, by a hash of their names
    and by their mean uncertainty. Their number is ``n`` divided by the mean size of all clusters,
    so they have about ``n`` rows. A cluster is left out if one of its rows cannot be chosen.

    Args:
        table: The answers.
        predictor: Scores the answers.
        asked_ids: Identifiers of answers that were asked for before.
        n: Number of answers.
        seed: Seed of the hash.

    Returns:
        Indices (M,) of the chosen rows, and what each is for.
    """
    # a unit is a cluster, or a row of a table without clusters
    unit_names, unit_of_row = cluster_indices(table.cluster or table.ids, len(table))
    unit_size = np.bincount(unit_of_row)
    n_units = 0  # number of units to choose
    if n:
        n_units = max(round(n * len(unit_names) / len(table)), 1)
    random_numbers = np.array([_random_number(name, seed) for name in unit_names], dtype=np.uint64)
    is_for_calibration = random_numbers % 2 == 1
    is_askable = _askable_rows(table, predictor, asked_ids)
    n_askable_rows = np.bincount(unit_of_row[is_askable], minlength=len(unit_names))
    may_be_chosen = n_askable_rows == unit_size  # only whole units are chosen

    for_calibration = np.flatnonzero(may_be_chosen & is_for_calibration)
    in_random_order = for_calibration[np.argsort(random_numbers[for_calibration])]
    units_to_calibrate = in_random_order[: n_units // 2]

    for_fit = np.flatnonzero(may_be_chosen & ~is_for_calibration)
    mean_uncertainty = np.bincount(unit_of_row, predictor.predict_uncertainty(table)) / unit_size
    ascending = for_fit[np.argsort(mean_uncertainty[for_fit], kind="stable")]
    n_to_fit = min(n_units - len(units_to_calibrate), len(ascending))
    evenly_spaced = np.linspace(0, len(ascending) - 1, n_to_fit).round().astype(np.int64)
    rows_to_fit = _rows_of_units(ascending[evenly_spaced], unit_of_row)
    rows_to_calibrate = _rows_of_units(units_to_calibrate, unit_of_row)
    purposes: list[Purpose] = ["fit"] * len(rows_to_fit)
    purposes += ["calibration"] * len(rows_to_calibrate)
    return np.concatenate([rows_to_fit, rows_to_calibrate]), purposes


def _askable_rows(
    table: AnswerTable, predictor: FailurePredictor, asked_ids: Collection[str]
) -> NDArray[np.bool_]:
    """Mask (N,) of the rows without a label that were neither asked for nor fitted on.

    Of exact copies only the first is in the mask. In a table with clusters all copies are, because
    clusters are asked for as a whole.
    """
    was_asked = np.array([key in asked_ids for key in table.ids], dtype=np.bool_)
    may_be_asked: NDArray[np.bool_] = (table.correct == UNKNOWN) & ~was_asked
    may_be_asked &= ~predictor.seen(table).shared
    if table.cluster is None:
        _, first_copies = np.unique(table.picture_identities(), return_index=True)
        is_first = np.zeros(len(table), dtype=np.bool_)
        is_first[first_copies] = True
        may_be_asked &= is_first
    return may_be_asked


def _rows_of_units(chosen: Ints, unit_of_row: Ints) -> Ints:
    """Indices of the rows of the ``chosen`` units, in the order of the units.

    ``unit_of_row`` (N,) is the unit of every row of the table.
    """
    # units that are not chosen have the rank len(chosen), which no chosen unit has
    rank_of_unit = np.full(int(unit_of_row.max()) + 1, len(chosen))
    rank_of_unit[chosen] = np.arange(len(chosen))
    rank_of_row = rank_of_unit[unit_of_row]
    rows = np.flatnonzero(rank_of_row < len(chosen))
    return rows[np.argsort(rank_of_row[rows], kind="stable")]


def _random_number(key: str, seed: int) -> int:
    """A random number from 0 to 2^64 - 1, which depends on the key and the seed only."""
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_asked_ids(files: Sequence[Path]) -> set[str]:
    """Identifiers of all rows of earlier tables of ``vilu next``."""
    asked_ids: set[str] = set()
    for file in files:
        asked_ids.update(open_table(file).ids)
    return asked_ids


def write_questions(path: Path, table: AnswerTable, purposes: Sequence[Purpose]) -> None:
    """Write a table of answers as CSV with an empty column ``correct``, to fill in.

    Features go into a file beside it, which is written first.
    """
    columns: dict[str, pa.Array] = {"id": pa.array(table.ids)}
    for name in ("answer", "truth", "group", "cluster"):
        texts = getattr(table, name)
        if texts is not None:
            columns[name] = pa.array(texts)
    for name, numbers in table.numbers.items():
        columns[name] = pa.array(numbers)
    columns["asked_for"] = pa.array(purposes, pa.string())
    columns["correct"] = pa.nulls(len(table), pa.int8())
    if table.features is not None:
        features_file = path.with_suffix(FEATURES_BESIDE)
        with (
            convert_os_errors(f"cannot write {features_file}"),
            atomic_write(features_file) as file,
        ):
            np.save(file, table.features, allow_pickle=False)
    write_bytes(path, csv_bytes(columns))
