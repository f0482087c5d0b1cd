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
    asked: Collection[str],
    n: int,
    seed: int,
) -> tuple[Ints, list[Purpose]]:
    """Choose ``n`` answers without a label: half to fit on, half to calibrate on.

    A hash of the identifier says for each row which of the two it may be for. The rows to calibrate
    on are the next ones in the random order of their hashes, so all of them together are a random
    sample, whenever one stops. The rows to fit on are spread over the order of the uncertainties,
    so that right and wrong answers are among them. Rows that the predictor was fitted on, and
    copies of other rows, are not chosen.

    In a table with clusters, whole clusters are chosen in the same way, by a hash of their names
    and by their mean uncertainty. Their number is ``n`` divided by the mean size of all clusters,
    so they have about ``n`` rows. Clusters of which a row cannot be chosen are left out.

    Args:
        table: The answers.
        predictor: Scores the answers.
        asked: Identifiers of answers that were asked for before.
        n: Number of answers.
        seed: Seed of the hash.

    Returns:
        Indices (M,) of the chosen rows, and what each is for.
    """
    names, unit = cluster_indices(table.cluster or table.ids, len(table))
    size = np.bincount(unit)
    n_units = 0
    if n:
        n_units = max(round(n * len(names) / len(table)), 1)
    position = np.array([_position(name, seed) for name in names], dtype=np.uint64)
    is_for_calibration = position % 2 == 1
    is_free = (
        np.bincount(unit[_may_be_asked(table, predictor, asked)], minlength=len(names)) == size
    )
    free = np.flatnonzero(is_free & is_for_calibration)
    to_calibrate = free[np.argsort(position[free])][: n_units // 2]
    free = np.flatnonzero(is_free & ~is_for_calibration)
    uncertainty = np.bincount(unit, predictor.predict_uncertainty(table)) / size
    in_order = free[np.argsort(uncertainty[free], kind="stable")]
    n_to_fit = min(n_units - len(to_calibrate), len(in_order))
    steps = np.linspace(0, len(in_order) - 1, n_to_fit).round().astype(np.int64)
    rows_to_fit = _rows_of_units(in_order[steps], unit)
    rows_to_calibrate = _rows_of_units(to_calibrate, unit)
    purposes: list[Purpose] = ["fit"] * len(rows_to_fit)
    purposes += ["calibration"] * len(rows_to_calibrate)
    return np.concatenate([rows_to_fit, rows_to_calibrate]), purposes


def _may_be_asked(
    table: AnswerTable, predictor: FailurePredictor, asked: Collection[str]
) -> NDArray[np.bool_]:
    """Mask (N,) of the rows without a label that were neither asked for nor fitted on.

    Of exact copies only the first may be asked, unless the table has clusters, which stay whole.
    """
    was_asked = np.array([key in asked for key in table.ids], dtype=np.bool_)
    may_be_asked: NDArray[np.bool_] = (table.correct == UNKNOWN) & ~was_asked
    may_be_asked &= ~predictor.seen(table).shared
    if table.cluster is None:
        _, first_copies = np.unique(table.picture_identities(), return_index=True)
        is_first = np.zeros(len(table), dtype=np.bool_)
        is_first[first_copies] = True
        may_be_asked &= is_first
    return may_be_asked


def _rows_of_units(chosen: Ints, unit: Ints) -> Ints:
    """Indices of the rows of the ``chosen`` units, in the order of the units.

    A unit is a cluster, or a row of a table without clusters. ``unit`` (N,) is that of every row.
    """
    place = np.full(int(unit.max()) + 1, len(chosen))
    place[chosen] = np.arange(len(chosen))
    place_of_row = place[unit]
    rows = np.flatnonzero(place_of_row < len(chosen))
    return rows[np.argsort(place_of_row[rows], kind="stable")]


def _position(key: str, seed: int) -> int:
    """A random number from 0 to 2^64 - 1, which depends on the key and the seed only."""
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def asked_in(files: Sequence[Path]) -> set[str]:
    """Identifiers of all rows of earlier tables of ``vilu next``."""
    asked: set[str] = set()
    for file in files:
        asked.update(open_table(file).ids)
    return asked


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
