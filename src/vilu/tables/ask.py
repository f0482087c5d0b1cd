"""Which answers of a table to label next: some to fit on, and a random sample to calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vilu.artifacts.disk import atomic_write, or_refuse, write_bytes
from vilu.artifacts.tables import csv_bytes
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

    Args:
        table: The answers.
        predictor: Scores the answers.
        asked: Identifiers of answers that were asked for before.
        n: Number of answers.
        seed: Seed of the hash.

    Returns:
        Indices (M,) of the chosen rows, and what each is for.
    """
    position = np.array([_position(key, seed) for key in table.ids], dtype=np.uint64)
    was_asked = np.array([key in asked for key in table.ids], dtype=np.bool_)
    is_free = (table.correct == UNKNOWN) & ~was_asked & ~predictor.seen(table).shared
    _, first_copies = np.unique(table.picture_identities(), return_index=True)
    is_first = np.zeros(len(table), dtype=np.bool_)
    is_first[first_copies] = True
    is_for_calibration = position % 2 == 1
    free = np.flatnonzero(is_free & is_first & is_for_calibration)
    to_calibrate = free[np.argsort(position[free])][: n // 2]
    free = np.flatnonzero(is_free & is_first & ~is_for_calibration)
    uncertainty = predictor.predict_uncertainty(table)
    in_order = free[np.argsort(uncertainty[free], kind="stable")]
    n_to_fit = min(n - len(to_calibrate), len(in_order))
    steps = np.linspace(0, len(in_order) - 1, n_to_fit).round().astype(np.int64)
    to_fit = in_order[steps]
    purposes: list[Purpose] = ["fit"] * len(to_fit)
    purposes += ["calibration"] * len(to_calibrate)
    return np.concatenate([to_fit, to_calibrate]), purposes


def _position(key: str, seed: int) -> int:
    """A random number of a row, from 0 to 2^64 - 1, which depends on nothing but these two."""
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
    for name in ("answer", "group", "cluster"):
        texts = getattr(table, name)
        if texts is not None:
            columns[name] = pa.array(texts)
    for name, numbers in table.numbers.items():
        columns[name] = pa.array(numbers)
    columns["asked_for"] = pa.array(purposes, pa.string())
    columns["correct"] = pa.nulls(len(table), pa.int8())
    if table.features is not None:
        beside = path.with_suffix(FEATURES_BESIDE)
        with or_refuse(f"write {beside}"), atomic_write(beside) as file:
            np.save(file, table.features, allow_pickle=False)
    write_bytes(path, csv_bytes(columns))
