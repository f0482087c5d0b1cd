"""Chooses table answers to label next: some to fit on, and a random sample to calibrate on."""

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
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.tables.files import FEATURES_SUFFIX
from vilu.tables.read import open_table
from vilu.tables.table import AnswerTable, LabelPurpose


def choose_next_answers(
    table: AnswerTable,
    predictor: FailurePredictor,
    asked_ids: Collection[str],
    n: int,
    seed: int,
) -> tuple[Ints, list[LabelPurpose]]:
    """Choose ``n`` answers without a label: half to fit on, half to calibrate on.

    A hash of the row's identifier decides between the two purposes. The rows to calibrate on are
    the next rows in the random order of the hashes. So at any time, all rows chosen for calibration
    are a random sample. The rows to fit on are spread evenly over the ascending uncertainties, to
    include right and wrong answers. Rows that the predictor was fitted on are not chosen. Without
    clusters, copies of earlier rows are not chosen either.

    If the table has clusters, whole clusters are chosen in the same way. The cluster's name is
    hashed, and the uncertainty is the mean over the cluster's rows. The number of clusters is ``n``
    divided by the mean cluster size, so the chosen clusters have about ``n`` rows. A cluster is
    left out if any row in the cluster cannot be chosen.

    Args:
        table: The answers.
        predictor: The predictor that scores the answers.
        asked_ids: Answer identifiers from earlier requests.
        n: Number of answers.
        seed: Seed for the hash.

    Returns:
        Row indices (M,) of the chosen answers, and each row's purpose.
    """
    # a unit is a cluster, or a single row if the table has no clusters
    unit_names, unit_of_row = cluster_indices(table.cluster or table.ids, len(table))
    unit_size = np.bincount(unit_of_row)
    n_units = 0  # number of units to choose
    if n:
        units_in_n_rows = n * len(unit_names) / len(table)  # on average
        n_units = max(round(units_in_n_rows), 1)
    random_numbers = np.array([_random_number(name, seed) for name in unit_names], dtype=np.uint64)
    is_for_calibration = random_numbers % 2 == 1
    is_askable = _askable_mask(table, predictor, asked_ids)
    n_askable_rows = np.bincount(unit_of_row[is_askable], minlength=len(unit_names))
    may_be_chosen = n_askable_rows == unit_size  # only whole units are chosen
    calibration_candidates = np.flatnonzero(may_be_chosen & is_for_calibration)
    units_to_calibrate = _first_units(calibration_candidates, random_numbers, n_units // 2)
    fit_candidates = np.flatnonzero(may_be_chosen & ~is_for_calibration)
    uncertainty = predictor.predict_uncertainty(table)
    mean_uncertainty = np.bincount(unit_of_row, weights=uncertainty) / unit_size
    n_to_fit = n_units - len(units_to_calibrate)
    units_to_fit = _evenly_spaced_units(fit_candidates, mean_uncertainty, n_to_fit)
    rows_to_fit = _rows_of_units(units_to_fit, unit_of_row)
    rows_to_calibrate = _rows_of_units(units_to_calibrate, unit_of_row)
    purposes: list[LabelPurpose] = ["fit"] * len(rows_to_fit)
    purposes += ["calibration"] * len(rows_to_calibrate)
    return np.concatenate([rows_to_fit, rows_to_calibrate]), purposes


def _first_units(candidates: Ints, random_numbers: NDArray[np.uint64], n_units: int) -> Ints:
    """Return the first ``n_units`` candidates in the ascending order of the random numbers.

    ``random_numbers`` has a number for every unit in the table.
    """
    ascending_units = candidates[np.argsort(random_numbers[candidates])]
    return ascending_units[:n_units]


def _evenly_spaced_units(candidates: Ints, mean_uncertainty: Floats, n_units: int) -> Ints:
    """Return ``n_units`` candidates, spread evenly over the ascending uncertainties.

    ``mean_uncertainty`` has a number for every unit in the table. If there are at most ``n_units``
    candidates, all candidates are returned.
    """
    ascending_units = candidates[np.argsort(mean_uncertainty[candidates], kind="stable")]
    n_chosen = min(n_units, len(ascending_units))
    exact_positions = np.linspace(0, len(ascending_units) - 1, n_chosen)
    rounded_positions = exact_positions.round()
    return ascending_units[rounded_positions.astype(np.int64)]


def _askable_mask(
    table: AnswerTable, predictor: FailurePredictor, asked_ids: Collection[str]
) -> NDArray[np.bool_]:
    """Return a mask (N,): unlabelled rows that were neither asked for nor fitted on.

    If the table has no clusters, only the first of several exact copies is in the mask. In a table
    with clusters, all copies are in the mask, because the requests are for whole clusters.
    """
    was_asked = np.array([key in asked_ids for key in table.ids], dtype=np.bool_)
    was_fitted_on = predictor.seen(table).shared
    may_be_asked: NDArray[np.bool_] = (table.correct == UNKNOWN) & ~was_asked & ~was_fitted_on
    if table.cluster is None:
        pictures = table.picture_identities()
        _, first_copies = np.unique(pictures, return_index=True)
        is_first = np.zeros(len(table), dtype=np.bool_)
        is_first[first_copies] = True
        may_be_asked &= is_first
    return may_be_asked


def _rows_of_units(units: Ints, unit_of_row: Ints) -> Ints:
    """Return the indices of all rows in ``units``, in the units' order.

    ``unit_of_row`` (N,) is the unit of every table row.
    """
    last_unit = int(unit_of_row.max())
    # The rank of a unit is the position in ``units``. All units outside ``units`` have the rank
    # len(units).
    rank_of_unit = np.full(last_unit + 1, len(units))
    rank_of_unit[units] = np.arange(len(units))
    rank_of_row = rank_of_unit[unit_of_row]
    rows = np.flatnonzero(rank_of_row < len(units))
    return rows[np.argsort(rank_of_row[rows], kind="stable")]


def _random_number(key: str, seed: int) -> int:
    """Return a random number from 0 to 2^64 - 1, determined by the key and the seed only."""
    seed_and_key = f"{seed}\n{key}".encode()
    key_hash = hashlib.blake2b(seed_and_key, digest_size=8)
    digest = key_hash.digest()
    return int.from_bytes(digest, "little")


def read_asked_ids(files: Sequence[Path]) -> set[str]:
    """Read all row identifiers in ``files``, the earlier tables of ``vilu next``."""
    asked_ids: set[str] = set()
    for file in files:
        ids_of_file = open_table(file).ids
        asked_ids.update(ids_of_file)
    return asked_ids


def write_label_requests(path: Path, table: AnswerTable, purposes: Sequence[LabelPurpose]) -> None:
    """Write answers as a CSV table with an empty column ``correct``, to fill in.

    Features are written first, into a second file in the same folder.
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
        features_file = path.with_suffix(FEATURES_SUFFIX)
        with (
            convert_os_errors(f"cannot write {features_file}"),
            atomic_write(features_file) as file,
        ):
            np.save(file, table.features, allow_pickle=False)
    content = csv_bytes(columns)
    write_bytes(path, content)
