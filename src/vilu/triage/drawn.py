"""Draws rows at random up to an uncertainty limit, and calibrates by the labels of all drawn rows.

Every row in a store is on one of two sides (``vilu.triage.labels``). The fit-side scores choose the
uncertainty limit. Then rows on the calibration side up to this limit are drawn at random. The limit
does not depend on the scores of these rows. So, for a fixed limit, the drawn rows are independent
draws from the answers up to the limit. Therefore
``vilu.calibration.thresholds.learn_then_test`` is valid for these rows, with thresholds up to the
limit. No label is spent on answers that would be reviewed.

Rows with a label are drawn like rows without a label. If only rows without a label were drawn, the
draw would depend on the choice of the labelled rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, read_document, write_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import calibrate_predictor, require_probability
from vilu.calibration.target import Target
from vilu.calibration.thresholds import n_right_needed, percent
from vilu.device import torch_defaults
from vilu.errors import OUTSIDE_NAME, DataError, ProvenanceError, UsageError
from vilu.guard.guard import Answer
from vilu.metrics.counts import Ints
from vilu.predictors.persistence.storage import load_uncalibrated
from vilu.scoring.score import source_fingerprint
from vilu.store.reader import EmbeddingStore
from vilu.text import plural
from vilu.triage.answers import answer_of, write_next
from vilu.triage.ask import CONFIDENCE, StoreDraws, fingerprint_of, unseen_rows
from vilu.triage.choose import choose_limit_of_draw
from vilu.triage.guarantee import Mask
from vilu.triage.labels import SKIPPED, Entry, LabelBook
from vilu.triage.store_labels import label_store
from vilu.validation import checked, require_between


class DrawRecord(Document):
    """The facts that decide a draw. The record is written before the drawn rows are labelled.

    Attributes:
        vilu: vilu's version at the draw.
        store: The store's fingerprint.
        predictor: The predictor's fingerprint (``fingerprint_of``).
        max_risk: Largest error rate for the guarantee from the draw.
        limit: Largest uncertainty of a row in the draw.
        seed: Seed for the sides and the random order.
        n_calibration: Number of calibration-side rows, with any uncertainty.
        n_below: Number of calibration-side rows with an uncertainty up to the limit.
        paths: The drawn rows, in the random order.
    """

    remedy = "Run `vilu next --for-guarantee` again, with --overwrite,"
    error_class = DataError

    kind: Literal["draw"] = "draw"
    vilu: str = Field(default_factory=partial(version, "vilu"))
    store: str
    predictor: str
    max_risk: float = Field(gt=0, lt=1)
    limit: float
    seed: int = Field(ge=0)
    n_calibration: int = Field(ge=1)
    n_below: int = Field(ge=1)
    paths: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class GuaranteeDraw:
    """A draw, after the record and the table were written.

    Attributes:
        record: The facts that decide the draw.
        n_open: How many drawn rows have no label.
        is_expected: Whether a guarantee up to the limit is expected, from the predictor's
            probabilities.
    """

    record: DrawRecord
    n_open: int
    is_expected: bool

    def in_words(self) -> str:
        """Write a text on the draw and on the next step."""
        record = self.record
        share = record.n_below / record.n_calibration
        text = (
            f"{plural(len(record.paths), 'row')} drawn from the {record.n_below:,} with an "
            f"uncertainty up to {record.limit:.6g}, which are {share:.1%} of the "
            f"{record.n_calibration:,} that could be drawn"
        )
        if not self.is_expected:
            text += (
                ". So many labels are not expected to show the risk: by the predictor's "
                "probabilities too many of these answers are wrong"
            )
        if not self.n_open:
            return f"{text}; all of them have a label"
        return f"{text}; fill in the column label of {plural(self.n_open, 'row')}"


def record_path(table: Path) -> Path:
    """Return the path of the draw's record, in the folder of ``table``, the table of drawn rows."""
    return table.with_suffix(".draw.json")


@checked
@torch_defaults()
def draw_for_guarantee(
    folder: Path,
    store: EmbeddingStore,
    files: Sequence[Path],
    table: Path,
    *,
    n: int,
    max_risk: float,
    seed: int,
    overwrite: bool = False,
) -> GuaranteeDraw:
    """Draw ``n`` rows up to an uncertainty limit. Write a table with the rows, and a record.

    If fewer than ``n`` rows are up to the limit, all of them are drawn.

    Args:
        folder: The predictor's folder.
        store: The rows.
        files: Label tables with earlier requests.
        table: The table to write.
        n: How many rows to draw.
        max_risk: Largest error rate allowed by the guarantee.
        seed: Seed for the sides and the random order.
        overwrite: Whether an earlier draw's record may be replaced.

    Raises:
        UsageError: If the predictor gives no probability, if ``n`` rows are too few for any
            guarantee, or if there is a record already.
        DataError: If no score can be used to choose the limit, or if too few rows are up to the
            limit.
    """
    _require_no_record(table, overwrite=overwrite)
    _require_enough_rows(n, max_risk)
    predictor = load_uncalibrated(folder)
    require_probability(predictor)
    draws = StoreDraws.of(store, predictor, files, seed, max_risk, per_class=False)
    is_unseen = unseen_rows(predictor, draws.photos)
    limit, is_expected = _choose_limit(draws, is_unseen, n, max_risk)
    rows = _rows_up_to_limit(draws, limit, max_risk, store)
    drawn_rows = draws.split.in_random_order(rows)[:n]
    entries, answers = _entries_and_answers(draws, drawn_rows)
    record = DrawRecord(
        store=source_fingerprint(store),
        predictor=draws.predictor_fingerprint,
        max_risk=max_risk,
        limit=limit,
        seed=seed,
        n_calibration=int(draws.split.usable_calibration_mask.sum()),
        n_below=len(rows),
        paths=tuple(entry.path for entry in entries),
    )
    # The record is written before the table. So every table has a record, unless a file is moved.
    write_document(record_path(table), record)
    write_next(table, entries, answers, predictor.answer)
    n_open = sum(entry.label is None for entry in entries)
    return GuaranteeDraw(record, n_open, is_expected)


def _require_no_record(table: Path, *, overwrite: bool) -> None:
    """Refuse to replace an earlier draw's record, unless ``overwrite`` is True."""
    record_file = record_path(table)
    if record_file.exists() and not overwrite:
        raise UsageError(
            f"{record_file} is there, the record of an earlier draw. Give another file, or "
            "--overwrite to replace both."
        )


def _fewest_rows(max_risk: float) -> int:
    """Return the smallest number of drawn rows that can guarantee anything."""
    # The row at the threshold does not count for the test, so one more row is needed.
    return n_right_needed(max_risk, 1 - CONFIDENCE) + 1


def _require_enough_rows(n: int, max_risk: float) -> None:
    """Refuse to draw too few rows for any guarantee."""
    require_between("max_risk", max_risk)
    fewest = _fewest_rows(max_risk)
    if n < fewest:
        raise UsageError(
            f"a risk of {percent(max_risk)} with confidence {CONFIDENCE:.0%} needs at least "
            f"{fewest} drawn rows. Got -n {n}."
        )


def _rows_up_to_limit(
    draws: StoreDraws, limit: float, max_risk: float, store: EmbeddingStore
) -> Ints:
    """Return the rows (M,) that may be drawn up to a limit. Raises DataError if too few."""
    can_be_drawn = draws.split.usable_calibration_mask & (draws.outcomes.uncertainty <= limit)
    rows = np.flatnonzero(can_be_drawn)
    fewest = _fewest_rows(max_risk)
    if len(rows) < fewest:
        raise DataError(
            f"only {plural(len(rows), 'row')} can be drawn from {store.path}, and at least "
            f"{fewest} are needed. Such a row is on the calibration side, the predictor has not "
            f"seen it, and its uncertainty is at most the limit {limit:.6g}. Add images to the "
            "store, or ask for a larger --max-risk."
        )
    return rows


def _choose_limit(
    draws: StoreDraws, is_unseen: Mask, n: int, max_risk: float
) -> tuple[float, bool]:
    """Choose the limit by the fit-side scores. Also return whether a guarantee is expected.

    ``is_unseen`` (N,) is True for rows that the predictor was not fitted on.
    """
    uncertainty = draws.outcomes.uncertainty
    # The limit must not depend on the tested rows, so it is chosen without the calibration-side
    # scores. It is also chosen without the rows that the predictor was fitted on, because their
    # scores are too low.
    decides_limit = draws.split.usable_fit_mask & is_unseen & np.isfinite(uncertainty)
    if not decides_limit.any():
        raise DataError(
            "the predictor was fitted on all rows of the fit side. The limit of the draw is chosen "
            "by rows that it has not seen. A fit on a store has seen all of its rows, also rows "
            "without a label: fit on the labelled rows with `vilu fit STORE --labels FILE`."
        )
    n_possible = min(n, int(draws.split.usable_calibration_mask.sum()))
    return choose_limit_of_draw(uncertainty[decides_limit], n_possible, max_risk, 1 - CONFIDENCE)


def _entries_and_answers(
    draws: StoreDraws, drawn_rows: Ints
) -> tuple[list[Entry], dict[str, Answer]]:
    """Return the entries of the drawn rows (M,), and the answers by path."""
    paths = [draws.photos.ids[row] for row in drawn_rows.tolist()]
    draws.book.request_labels(paths, "calibration", predictor=draws.predictor_fingerprint)
    entries = [draws.book.entries[path] for path in paths]
    answers = {}
    for row, path in zip(drawn_rows.tolist(), paths, strict=True):
        answers[path] = answer_of(draws.outcomes, row)
    return entries, answers


@checked
def calibrate_by_draw(
    folder: Path,
    store: EmbeddingStore,
    table: Path,
    target: Target,
    *,
    overwrite: bool = False,
) -> Calibration:
    """Calibrate a predictor by the labels of the rows drawn by ``draw_for_guarantee``.

    Args:
        folder: The predictor's folder.
        store: The store with the drawn rows.
        table: The draw's table, filled in. The draw's record is in the same folder.
        target: The target for the calibration. Without a ``max_risk``, the ``max_risk`` in the
            record is used.
        overwrite: Whether an earlier calibration may be replaced.

    Raises:
        ProvenanceError: If the draw used another predictor or another store.
        DataError: If labels are missing, if there are labels for rows outside the draw, or if the
            record is missing or damaged.
        UsageError, InfeasibleError: Under the same conditions as in ``calibrate_predictor``.
    """
    record = _read_record(table)
    _require_same_origin(record, folder, store)
    photos, book = label_store(store, [table])
    _require_only_drawn(record, store, book, table)
    _require_all_labels(record.paths, book, table)
    row_of = {path: row for row, path in enumerate(photos.ids)}
    rows = np.sort([row_of[path] for path in record.paths])
    if target.max_risk is None:
        target = dataclasses.replace(target, max_risk=record.max_risk)
    return calibrate_predictor(
        folder,
        photos.take(rows),
        target,
        dataset=store.path.name,
        overwrite=overwrite,
        drawn_below=record.limit,
    )


def _read_record(table: Path) -> DrawRecord:
    path = record_path(table)
    if not path.is_file():
        raise DataError(
            f"{path} is missing, the record of the draw. `vilu next --for-guarantee -o {table}` "
            "writes it beside the table. Keep both files in one folder, under their names."
        )
    return read_document(path, DrawRecord)


def _require_same_origin(record: DrawRecord, folder: Path, store: EmbeddingStore) -> None:
    """Refuse a predictor or a store that differs from the draw's record."""
    predictor = load_uncalibrated(folder)
    fingerprints = {"predictor": fingerprint_of(predictor), "store": source_fingerprint(store)}
    path_of = {"predictor": folder, "store": store.path}
    for name, fingerprint in fingerprints.items():
        recorded_fingerprint = getattr(record, name)
        if fingerprint != recorded_fingerprint:
            raise ProvenanceError(
                f"the rows were drawn with the {name} {recorded_fingerprint}, and {path_of[name]} "
                f"is {fingerprint}. Give the {name} of the draw, or draw again with `vilu next "
                "--for-guarantee`."
            )


def _require_only_drawn(
    record: DrawRecord, store: EmbeddingStore, book: LabelBook, table: Path
) -> None:
    """Refuse a table with rows that were not drawn."""
    _, book_of_store = label_store(store, ())  # the store's own labels are allowed
    paths_of_table = book.entries.keys() - book_of_store.entries.keys()
    paths_not_drawn = sorted(paths_of_table - set(record.paths))
    if paths_not_drawn:
        raise DataError(
            f"{table} has {plural(len(paths_not_drawn), 'row')} outside the draw, first "
            f"{paths_not_drawn[0]}. Only drawn rows count for this guarantee: remove the rest."
        )


def _require_all_labels(paths: Collection[str], book: LabelBook, table: Path) -> None:
    """Refuse a draw if a row was skipped or has no label."""
    unlabelled_paths = [path for path in paths if path not in book.labels]
    if unlabelled_paths:
        raise DataError(
            f"{len(unlabelled_paths):,} of {len(paths):,} drawn rows in {table} have no label, "
            f"first {unlabelled_paths[0]}. Fill in the column label. Write {OUTSIDE_NAME} instead "
            f"of {SKIPPED} where nobody can name the picture: its answer counts as wrong. Without "
            "such rows the others would be no random sample."
        )
