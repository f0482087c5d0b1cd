"""Checks on a monitor's new rows: origin, repeated rows, and sorted rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.monitor.martingale import (
    LONGEST_MERGED_RUN,
    is_grouped,
    is_in_blocks,
    is_rising,
)
from vilu.callers import warn_caller
from vilu.embeddings.checks import hash_items, hash_names
from vilu.errors import UNKNOWN, DataError, ProvenanceError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes

MIN_DISTINCT_SCORES: Final = 16
"""Smallest number of distinct uncertainties for recognising a batch without identifiers.

A batch with fewer distinct uncertainties could occur again by chance, and always counts as new.
"""


class SeenRows:
    """Set of rows and row names, saved as 64-bit hashes in sorted arrays called runs.

    A hash takes 8 bytes. The probability that any two of n rows and names have the same hash is
    about n^2 / 2^64: 1 in 2,000 for 10^8 rows.
    """

    def __init__(self, runs: Sequence[Ints] = ()) -> None:
        self.runs = list(runs)

    def __deepcopy__(self, _: object) -> SeenRows:
        """Copy the set with shared runs. This is safe: runs are replaced, never changed."""
        return SeenRows(self.runs)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def hashes(self) -> Ints:
        """Return all hashes, ascending."""
        hashes = np.concatenate([np.empty(0, np.int64), *self.runs])
        hashes.sort()
        return hashes

    def add(self, hashes: Ints) -> None:
        """Add hashes. Known hashes are ignored."""
        is_known = self._contains(hashes)
        run = np.unique(hashes[~is_known])
        if not len(run):
            return
        # The new run takes in the last run, then the run before, and so on, until it meets a longer
        # run. So there are few runs to search. Runs above LONGEST_MERGED_RUN are not taken in,
        # because a merge takes several times the memory of the merged runs.
        while self.runs and len(self.runs[-1]) <= min(len(run), LONGEST_MERGED_RUN):
            run = np.concatenate([self.runs.pop(), run])
            run.sort(kind="stable")  # fast, because both parts are sorted, and no hash is in both
        self.runs.append(run)

    def find_new(
        self, outcomes: Outcomes, *, compare_failures: bool = False
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """Return the hashes to add for ``outcomes``, and a mask (N,) of the new rows.

        Rows without identifiers are recognised as a whole batch: all rows are new, or no row. With
        ``compare_failures``, two such batches are the same only if the failures are equal, too.
        """
        if outcomes.ids is not None:
            return self._find_new_by_name(outcomes, outcomes.ids)
        identifying_numbers = _identifying_numbers(outcomes)
        if compare_failures:
            identifying_numbers = np.column_stack([identifying_numbers, outcomes.failure])
        return self._find_new_batch(outcomes, identifying_numbers)

    def _find_new_by_name(
        self, outcomes: Outcomes, ids: Sequence[str]
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """Return the result of ``find_new``, for rows with identifiers."""
        identifying_numbers = _identifying_numbers(outcomes)
        bytes_of_rows = _rows_as_bytes(ids, identifying_numbers)
        hashes = hash_items(bytes_of_rows).view(np.int64)
        # Equal rows in this batch count once: the first among the equal rows may be new.
        _, first_of_equals = np.unique(hashes, return_index=True)
        is_first = np.isin(np.arange(len(outcomes)), first_of_equals)
        name_hashes = hash_names(ids).view(np.int64)
        is_known = self._contains(hashes)
        is_name_known = self._contains(name_hashes)
        is_mixed = is_known.any() and not is_known.all()
        # If some names in this batch were seen with different scores, the names are used again for
        # new rows. Then, if many rows share one score, a new row may have an old row's name and
        # score by chance. So only a unique score shows a repetition.
        has_reused_names = not np.array_equal(is_name_known, is_known)
        if is_mixed and has_reused_names:
            is_known &= ~_is_known_by_chance(identifying_numbers, is_known)
        return np.concatenate([hashes, name_hashes]), is_first & ~is_known

    def _find_new_batch(
        self, outcomes: Outcomes, identifying_numbers: Ints
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """Return the result of ``find_new``, for rows without identifiers.

        Either all rows in the batch are new, or none is. ``identifying_numbers`` (N, M) identify
        each row by M numbers.
        """
        n = len(outcomes)
        if len(np.unique(outcomes.uncertainty)) < MIN_DISTINCT_SCORES:
            return np.empty(0, np.int64), np.ones(n, dtype=np.bool_)
        # The rows are sorted, because the same rows in another order are the same batch.
        sorted_numbers = identifying_numbers[np.lexsort(identifying_numbers.T)]
        batch_bytes = np.ascontiguousarray(sorted_numbers).tobytes()
        batch_hash = hash_items([batch_bytes]).view(np.int64)  # (1,)
        is_new = not self._contains(batch_hash)[0]
        return batch_hash, np.full(n, is_new)

    def _contains(self, hashes: Ints) -> NDArray[np.bool_]:
        """Return the mask (N,) of known hashes among ``hashes`` (N,)."""
        is_known = np.zeros(len(hashes), dtype=np.bool_)
        for run in self.runs:
            # If the run contains a hash, the hash must be at this index. The clip keeps the index
            # valid for hashes above all hashes in the run.
            index = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            is_known |= run[index] == hashes
        return is_known


def _identifying_numbers(outcomes: Outcomes) -> Ints:
    """Return numbers (N, 2) that identify each row: the uncertainty's bits, and the answer."""
    answers = outcomes.prediction
    if answers is None:
        answers = np.full(len(outcomes), UNKNOWN)
    return np.stack([outcomes.uncertainty.view(np.int64), answers], axis=1)


def _rows_as_bytes(ids: Sequence[str], identifying_numbers: Ints) -> Iterator[bytes]:
    """Yield for each row the name and the two ``identifying_numbers``, as bytes."""
    number_bytes = np.ascontiguousarray(identifying_numbers).tobytes()
    bytes_per_row = 2 * identifying_numbers.itemsize
    for row, name in enumerate(ids):
        start = bytes_per_row * row
        yield name.encode(errors="surrogatepass") + number_bytes[start : start + bytes_per_row]


def _is_known_by_chance(
    identifying_numbers: Ints, is_known: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the mask (N,) of rows with tied scores, if these rows seem to be known by chance.

    Rows with tied scores seem to be known by chance if the share of known rows among tied rows is
    more than ten times the share among untied rows. Otherwise the mask is False everywhere.
    """
    _, index, n_equal_rows = np.unique(
        identifying_numbers, axis=0, return_inverse=True, return_counts=True
    )
    index = index.ravel()  # some versions of NumPy return two dimensions
    is_tied = n_equal_rows[index] > 1
    # Both arrays have two entries: for the untied rows, and for the tied rows. No divisor is 0.
    n_rows = np.bincount(is_tied, minlength=2).clip(1)
    n_known = np.bincount(is_tied, weights=is_known, minlength=2)
    known_share_of_untied, known_share_of_tied = n_known / n_rows
    if 10 * known_share_of_untied >= known_share_of_tied:
        return np.zeros(len(is_known), np.bool_)
    return is_tied


def _are_row_numbers(ids: Sequence[str]) -> bool:
    """Return whether identifiers are only the row numbers 0, 1, 2, ..., as in every batch."""
    if not len(ids) or not ids[0].isdigit():
        return False
    return set(ids) == {str(row) for row in range(len(ids))}


def refuse_sorted(outcomes: Outcomes) -> None:
    """Refuse sorted rows, because the tests would take the sorting for a shift."""
    quantity = _sorting_quantity(outcomes)
    if quantity is None:
        return
    raise DataError(
        f"these {len(outcomes)} rows lie sorted by their {quantity}. That is no order of arrival "
        "(a folder of classes has none), and would be taken for a shift. Give --shuffle (in "
        "Python: take them in random order), or --in-order (in_order=True) if they did arrive in "
        "this order. None of them was taken in."
    )


def _sorting_quantity(outcomes: Outcomes) -> str | None:
    """Name the quantity by which the rows with an uncertainty are sorted, or return None."""
    is_scored = np.isfinite(outcomes.uncertainty)
    if outcomes.target is not None:
        labels = outcomes.target[is_scored]
        if (labels != UNKNOWN).all() and is_in_blocks(labels):
            return "right answer"
    if outcomes.prediction is not None and is_grouped(outcomes.prediction[is_scored]):
        return "answer"
    if is_rising(outcomes.uncertainty[is_scored]):
        return "uncertainty"
    return None


def admit_rows(outcomes: Outcomes, calibration: Outcomes, calibration_hash: str | None) -> Outcomes:
    """Check that new rows were scored by the calibrated predictor, with the same candidates.

    Return the outcomes, without identifiers that are only row numbers. If class names are missing,
    as in a CSV file, the calibration's class names are added.

    Args:
        outcomes: Scores for new rows.
        calibration: The calibration rows.
        calibration_hash: Hash of the saved calibration. None if the calibration is not saved.
    """
    _require_same_predictor(outcomes, calibration, calibration_hash)
    n_calibration_rows = count_calibration_rows(outcomes, calibration)
    if n_calibration_rows:
        warn_caller(
            f"{n_calibration_rows} of {len(outcomes)} rows are calibration rows, which say nothing "
            "about new rows.",
        )
    # Identifiers that are row numbers must be recognised here, before rows are left out. Afterwards
    # there would be gaps in the numbers, and the numbers would look like keys.
    if outcomes.ids is not None and _are_row_numbers(outcomes.ids):
        outcomes = replace(outcomes, ids=None)
    if outcomes.class_names is None and outcomes.prediction is not None:
        return replace(outcomes, class_names=calibration.class_names)
    return outcomes


def _require_same_predictor(
    outcomes: Outcomes, calibration: Outcomes, calibration_hash: str | None
) -> None:
    """Refuse scores by another predictor or calibration, or with another candidate list."""
    for name in ("method", "class_names"):
        expected = getattr(calibration, name)
        actual = getattr(outcomes, name)
        if _differs(expected, actual):
            raise ProvenanceError(
                f"the calibration rows have the {name} {expected!r:.100}, these scores have "
                f"{actual!r:.100}. Score with the predictor that was calibrated."
            )
    if outcomes.answer != calibration.answer:
        raise ProvenanceError(
            f"the calibration rows judge {calibration.answer} answers, these scores judge "
            f"{outcomes.answer} answers. Score with the predictor that was calibrated."
        )
    deciding_hash = outcomes.provenance.get("risk")
    if _differs(calibration_hash, deciding_hash):
        raise ProvenanceError(
            f"these scores were decided on by the calibration {deciding_hash}, and this monitor "
            f"is for the calibration {calibration_hash}. Score again with the predictor as it is "
            "calibrated now."
        )


def _differs(expected: object, actual: object) -> bool:
    """Return whether both values are known and different."""
    if expected is None or actual is None:
        return False
    return expected != actual


def count_calibration_rows(outcomes: Outcomes, calibration: Outcomes) -> int:
    """Count the rows with the key and the uncertainty of a calibration row.

    Equal keys alone are not enough, because a row in another data set may have the same key.
    """
    if outcomes.ids is None or calibration.ids is None:
        return 0
    # Uncertainties are compared first, because this is fast. A small batch shares only few
    # uncertainties with the calibration rows, so few pairs are left to compare.
    has_uncertainty_of_batch = np.isin(calibration.uncertainty, outcomes.uncertainty)
    calibration_pairs = {
        (calibration.ids[row], calibration.uncertainty[row])
        for row in np.flatnonzero(has_uncertainty_of_batch).tolist()
    }
    pairs = zip(outcomes.ids, outcomes.uncertainty.tolist(), strict=True)
    return sum(pair in calibration_pairs for pair in pairs)
