"""Checks of rows that arrive at a monitor: origin, repeated rows, and sorted rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.monitor.martingale import LONGEST_MERGED, is_grouped, is_in_blocks, is_rising
from vilu.callers import warn_caller
from vilu.embeddings.checks import hash_items, hash_names
from vilu.errors import UNKNOWN, DataError, ProvenanceError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes

FEW_DISTINCT: Final = 16
"""Smallest number of distinct uncertainties by which a batch without identifiers is recognised.

A batch with fewer distinct uncertainties could occur again by chance, so it is never taken for a
repetition.
"""


class SeenRows:
    """Set of rows and their names, as 64-bit hashes in sorted runs.

    A hash takes 8 bytes. The probability that any two of n rows and names have the same hash is
    about n^2 / 2^64: 1 in 2,000 for 10^8 rows.
    """

    def __init__(self, runs: Sequence[Ints] = ()) -> None:
        self.runs = list(runs)

    def __deepcopy__(self, _: object) -> SeenRows:
        """A copy that shares the runs; a run is replaced and never changed."""
        return SeenRows(self.runs)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def hashes(self) -> Ints:
        """All hashes, ascending."""
        hashes = np.concatenate([np.empty(0, np.int64), *self.runs])
        hashes.sort()
        return hashes

    def add(self, hashes: Ints) -> None:
        """Add hashes; hashes that are already there are ignored."""
        run = np.unique(hashes[~self._contains(hashes)])
        if not len(run):
            return
        # Earlier runs that are no longer than the new one are merged into it. So every run is
        # shorter than the run before it, and there are few runs to search. Long runs are left as
        # they are, because a merge takes several times the memory of its runs.
        while self.runs and len(self.runs[-1]) <= min(len(run), LONGEST_MERGED):
            # Both are sorted, and no hash is in two runs. So a sort joins them.
            run = np.concatenate([self.runs.pop(), run])
            run.sort(kind="stable")
        self.runs.append(run)

    def find_new(
        self, outcomes: Outcomes, *, labels: bool = False
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """Hashes of the rows of ``outcomes``, and a mask (N,) of the rows that are new.

        Rows without identifiers are recognised as a whole batch: all are new, or none.
        ``labels``: whether two such batches must also have the same failures to be the same.
        """
        if outcomes.ids is not None:
            return self._new_by_name(outcomes, outcomes.ids)
        numbers = _identifying_numbers(outcomes)
        if labels:
            numbers = np.column_stack([numbers, outcomes.failure])
        return self._new_as_a_whole(outcomes, numbers)

    def _new_by_name(
        self, outcomes: Outcomes, ids: Sequence[str]
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """As ``find_new``, for rows with identifiers."""
        numbers = _identifying_numbers(outcomes)
        hashes = hash_items(_rows_as_bytes(ids, numbers)).view(np.int64)
        # equal rows of this batch count once
        _, first_of_equals = np.unique(hashes, return_index=True)
        is_first = np.isin(np.arange(len(outcomes)), first_of_equals)
        name_hashes = hash_names(ids).view(np.int64)
        is_known = self._contains(hashes)
        is_mixed = is_known.any() and not is_known.all()
        # If some names of this batch were seen with other scores, the names are used again for new
        # rows. Then a name may occur by chance with the same score as before, if many rows share
        # this score. So only a score of a single row shows a repetition.
        has_reused_names = not np.array_equal(self._contains(name_hashes), is_known)
        if is_mixed and has_reused_names:
            is_known &= ~_known_by_chance(numbers, is_known)
        return np.concatenate([hashes, name_hashes]), is_first & ~is_known

    def _new_as_a_whole(self, outcomes: Outcomes, numbers: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """As ``find_new``, for rows without identifiers: the whole batch is new, or none of it."""
        n = len(outcomes)
        if len(np.unique(outcomes.uncertainty)) < FEW_DISTINCT:
            return np.empty(0, np.int64), np.ones(n, dtype=np.bool_)
        # The rows are sorted, because the same rows in another order are the same batch.
        in_order = numbers[np.lexsort(numbers.T)]
        content = np.ascontiguousarray(in_order).tobytes()
        batch_hash = hash_items([content]).view(np.int64)  # (1,)
        is_new = not self._contains(batch_hash)[0]
        return batch_hash, np.full(n, is_new)

    def _contains(self, hashes: Ints) -> NDArray[np.bool_]:
        """Mask of the hashes that are in this set."""
        is_known = np.zeros(len(hashes), dtype=np.bool_)
        for run in self.runs:
            # Index of the first hash of the run that is not smaller than the wanted one. If all are
            # smaller, it is the last index.
            index = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            is_known |= run[index] == hashes
        return is_known


def _identifying_numbers(outcomes: Outcomes) -> Ints:
    """Numbers (N, 2) by which rows are recognised: the bits of the uncertainty, and the answer."""
    answers = outcomes.prediction
    if answers is None:
        answers = np.full(len(outcomes), UNKNOWN)
    return np.stack([outcomes.uncertainty.view(np.int64), answers], axis=1)


def _rows_as_bytes(ids: Sequence[str], numbers: Ints) -> Iterator[bytes]:
    """Yield for each row its name and its two numbers, as bytes."""
    content = np.ascontiguousarray(numbers).tobytes()
    width = 2 * numbers.itemsize
    for row, name in enumerate(ids):
        start = width * row
        yield name.encode(errors="surrogatepass") + content[start : start + width]


def _known_by_chance(numbers: Ints, is_known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mask (N,) of the rows with tied scores, if these rows seem to be known only by chance.

    They seem so if the share of known rows is more than ten times as large among rows with tied
    scores as among all other rows. Otherwise the mask is False everywhere.
    """
    _, index, n_equal = np.unique(numbers, axis=0, return_inverse=True, return_counts=True)
    is_tied = n_equal[index.ravel()] > 1
    # each a pair: counts of the untied rows, and of the tied rows; the divisors are at least 1
    n_rows = np.bincount(is_tied, minlength=2).clip(1)
    n_known = np.bincount(is_tied, is_known, minlength=2)
    share_untied, share_tied = n_known / n_rows
    if 10 * share_untied >= share_tied:
        return np.zeros(len(is_known), np.bool_)
    return is_tied


def _are_row_numbers(ids: Sequence[str]) -> bool:
    """Whether identifiers are only the numbers 0, 1, 2, ... of the rows, as in every batch."""
    if not len(ids) or not ids[0].isdigit():
        return False
    return set(ids) == {str(row) for row in range(len(ids))}


def refuse_sorted(outcomes: Outcomes) -> None:
    """Refuse rows that are sorted, because rows that arrive at random are not."""
    scored = np.isfinite(outcomes.uncertainty)
    sorted_by = _sorted_by(outcomes, scored)
    if sorted_by is None:
        return
    raise DataError(
        f"these {len(outcomes)} rows lie sorted by their {sorted_by}. That is no order of arrival "
        "(a folder of classes has none), and would be taken for a shift. Give --shuffle (in "
        "Python: take them in random order), or --in-order (in_order=True) if they did arrive in "
        "this order. None of them was taken in."
    )


def _sorted_by(outcomes: Outcomes, scored: NDArray[np.bool_]) -> str | None:
    """What rows are sorted by, as a word; None if they are not sorted.

    Only the rows in the mask ``scored`` (N,) are looked at.
    """
    if outcomes.target is not None:
        labels = outcomes.target[scored]
        if (labels != UNKNOWN).all() and is_in_blocks(labels):
            return "right answer"
    if outcomes.prediction is not None and is_grouped(outcomes.prediction[scored]):
        return "answer"
    if is_rising(outcomes.uncertainty[scored]):
        return "uncertainty"
    return None


def admit(outcomes: Outcomes, calibration: Outcomes, risk: str | None) -> Outcomes:
    """Check that scores of new rows are of the calibrated predictor and its candidates.

    The outcomes are returned, without identifiers that are only numbers of rows. If class names are
    missing, as in a CSV file, those of the calibration are added. ``risk`` is the hash of the saved
    calibration; None if the calibration is not saved.
    """
    for name in ("method", "class_names"):
        expected = getattr(calibration, name)
        present = getattr(outcomes, name)
        if _differs(expected, present):
            raise ProvenanceError(
                f"the calibration rows have the {name} {expected!r:.100}, these scores "
                f"{present!r:.100}. Score with the predictor that was calibrated."
            )
    if outcomes.answer != calibration.answer:
        raise ProvenanceError(
            f"the calibration rows judge {calibration.answer} answers, these scores "
            f"{outcomes.answer} ones. Score with the predictor that was calibrated."
        )
    decided_by = outcomes.provenance.get("risk")
    if _differs(risk, decided_by):
        raise ProvenanceError(
            f"these scores were decided on by the calibration {decided_by}, the one monitored is "
            f"{risk}. Score again with the predictor as it is calibrated now."
        )
    n_calibration_rows = _n_calibration_rows(outcomes, calibration)
    if n_calibration_rows:
        warn_caller(
            f"{n_calibration_rows} of {len(outcomes)} rows are calibration rows, which say nothing "
            "about new ones.",
        )
    # Numbers of rows are recognised here, before any rows are left out. Afterwards there would be
    # gaps in the numbers, and they would look like keys.
    if outcomes.ids is not None and _are_row_numbers(outcomes.ids):
        outcomes = replace(outcomes, ids=None)
    if outcomes.class_names is None and outcomes.prediction is not None:
        return replace(outcomes, class_names=calibration.class_names)
    return outcomes


def _differs(expected: object, present: object) -> bool:
    """Whether both values are known and different."""
    if expected is None or present is None:
        return False
    return expected != present


def _n_calibration_rows(outcomes: Outcomes, calibration: Outcomes) -> int:
    """Number of rows with the same key and the same uncertainty as a calibration row.

    Equal keys alone are not enough, because a row of another data set may have the same key.
    """
    if outcomes.ids is None or calibration.ids is None:
        return 0
    # Uncertainties are compared first, because this is fast and only few calibration rows have the
    # uncertainties of a small batch.
    candidate_rows = np.flatnonzero(np.isin(calibration.uncertainty, outcomes.uncertainty))
    known = {
        (calibration.ids[row], calibration.uncertainty[row]) for row in candidate_rows.tolist()
    }
    rows = zip(outcomes.ids, outcomes.uncertainty.tolist(), strict=True)
    return sum(row in known for row in rows)
