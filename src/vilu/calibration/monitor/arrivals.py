"""Rows as they arrive at a monitor: whether they fit, came before, or lie sorted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.monitor.martingale import grouped, in_blocks, rising
from vilu.callers import warn_caller
from vilu.embeddings.checks import hash_names, hash_of_each
from vilu.errors import UNKNOWN, DataError, ProvenanceError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes

FEW_DISTINCT: Final = 16
"""Fewer different uncertainties without identifiers could come again by chance.

They are not taken for a repetition.
"""


class Seen:
    """Rows that were taken in, and their names, as 64-bit hashes in sorted runs of falling length.

    A hash takes 8 bytes. Of n rows one is mistaken for another, or for a name, with a probability
    of n^2 / 2^64: at 10^8 rows, one in 2,000.
    """

    def __init__(self) -> None:
        self.runs: list[Ints] = []

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def hashes(self) -> Ints:
        """All of them, in rising order."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self.runs]))

    def add(self, hashes: Ints) -> None:
        """Take hashes in; those that are there stay as they are."""
        run = np.unique(hashes[~self._holds(hashes)])
        if not len(run):
            return
        while self.runs and len(run) >= len(self.runs[-1]):
            run = np.union1d(self.runs.pop(), run)
        self.runs.append(run)

    def new(self, outcomes: Outcomes, *, labels: bool = False) -> tuple[Ints, NDArray[np.bool_]]:
        """Hashes to add, and (N,) which rows are not in here.

        Of rows without identifiers they are all or none.

        ``labels``: whether failures belong to what is recognised of rows without identifiers.
        """
        if outcomes.ids is not None:
            return self._new_by_name(outcomes, outcomes.ids)
        numbers = _content(outcomes)
        if labels:
            numbers = np.column_stack([numbers, outcomes.failure])
        return self._new_as_a_whole(outcomes, numbers)

    def _new_by_name(
        self, outcomes: Outcomes, ids: Sequence[str]
    ) -> tuple[Ints, NDArray[np.bool_]]:
        """As ``new``, of rows that have identifiers."""
        numbers = _content(outcomes)
        hashes = hash_of_each(_rows_as_bytes(ids, numbers)).view(np.int64)
        _, first = np.unique(hashes, return_index=True)
        is_first = np.isin(np.arange(len(outcomes)), first)
        names = hash_names(ids).view(np.int64)
        known = self._holds(hashes)
        is_mixed = known.any() and not known.all()
        # A score that many rows have comes with the same name by chance, too, where the names of
        # this batch come with other scores as well. Only scores of one row tell then.
        if is_mixed and not np.array_equal(self._holds(names), known):
            known &= ~_tied_by_chance(numbers, known)
        return np.concatenate([hashes, names]), is_first & ~known

    def _new_as_a_whole(self, outcomes: Outcomes, numbers: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """As ``new``, of rows without identifiers: the batch came before as it is, or not."""
        n = len(outcomes)
        if len(np.unique(outcomes.uncertainty)) < FEW_DISTINCT:
            return np.empty(0, np.int64), np.ones(n, dtype=np.bool_)
        # sorted, since the same rows in another order are the same batch
        in_order = numbers[np.lexsort(numbers.T)]
        whole = hash_of_each([np.ascontiguousarray(in_order).tobytes()]).view(np.int64)
        return whole, np.full(n, not self._holds(whole).all())

    def _holds(self, hashes: Ints) -> NDArray[np.bool_]:
        is_known = np.zeros(len(hashes), dtype=np.bool_)
        for run in self.runs:
            nearest = np.searchsorted(run, hashes).clip(max=len(run) - 1)
            is_known |= run[nearest] == hashes
        return is_known


def _content(outcomes: Outcomes) -> Ints:
    """(N, 2) what a row is recognised by beside its name: uncertainty, bit by bit, and answer."""
    answers = outcomes.prediction
    if answers is None:
        answers = np.full(len(outcomes), UNKNOWN)
    return np.stack([outcomes.uncertainty.view(np.int64), answers], axis=1)


def _rows_as_bytes(ids: Sequence[str], numbers: Ints) -> Iterator[bytes]:
    """The name of each row, followed by its numbers (N, 2)."""
    content = np.ascontiguousarray(numbers).tobytes()
    width = 2 * numbers.itemsize
    for row, name in enumerate(ids):
        start = width * row
        yield name.encode(errors="surrogatepass") + content[start : start + width]


def _tied_by_chance(numbers: Ints, known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) rows whose score others have too, if rows with a score of their own are rarely known.

    That is a tenth as often as the tied ones.
    """
    _, index, count = np.unique(numbers, axis=0, return_inverse=True, return_counts=True)
    is_tied = count[index.ravel()] > 1
    n_rows = np.bincount(is_tied, minlength=2).clip(1)
    n_known = np.bincount(is_tied, known, minlength=2)
    share_alone, share_tied = n_known / n_rows
    if 10 * share_alone >= share_tied:
        return np.zeros(len(known), np.bool_)
    return is_tied


def _is_numbered(ids: Sequence[str]) -> bool:
    """Whether identifiers are but the numbers of the rows: the next batch has the same."""
    if not len(ids) or not ids[0].isdigit():
        return False
    return set(ids) == {str(row) for row in range(len(ids))}


def refuse_sorted(outcomes: Outcomes) -> None:
    """Refuse rows that lie sorted.

    In what order exchangeable rows came has nothing to do with what they are.
    """
    scored = np.isfinite(outcomes.uncertainty)
    what = _sorted_by(outcomes, scored)
    if what is None:
        return
    raise DataError(
        f"these {len(outcomes)} rows lie sorted by their {what}. That is no order of arrival (a "
        "folder of classes has none), and would be taken for a shift. Give --shuffle (in Python: "
        "take them in random order), or --in-order (in_order=True) where they did arrive so. None "
        "of them was taken in."
    )


def _sorted_by(outcomes: Outcomes, scored: NDArray[np.bool_]) -> str | None:
    """What the rows with an uncertainty (N,) lie sorted by; None where they do not."""
    if outcomes.target is not None:
        labels = outcomes.target[scored]
        if (labels != UNKNOWN).all() and in_blocks(labels):
            return "right answer"
    if outcomes.prediction is not None and grouped(outcomes.prediction[scored]):
        return "answer"
    if rising(outcomes.uncertainty[scored]):
        return "uncertainty"
    return None


def admit(outcomes: Outcomes, calibration: Outcomes, risk: str | None) -> Outcomes:
    """Scores of new rows, of the same predictor and candidates.

    What a CSV leaves out is the calibration's.
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
    n_known = _n_known(outcomes, calibration)
    if n_known:
        warn_caller(
            f"{n_known} of {len(outcomes)} rows are calibration rows, which say nothing about new "
            "ones.",
        )
    # before any row is left out: what remains of numbers looks like keys
    if outcomes.ids is not None and _is_numbered(outcomes.ids):
        outcomes = replace(outcomes, ids=None)
    if outcomes.class_names is None and outcomes.prediction is not None:
        return replace(outcomes, class_names=calibration.class_names)
    return outcomes


def _differs(expected: object, present: object) -> bool:
    """Whether both are known, and are not the same."""
    if expected is None or present is None:
        return False
    return expected != present


def _n_known(outcomes: Outcomes, calibration: Outcomes) -> int:
    """Rows with the key and the uncertainty of a calibration row.

    A key alone may be of another data set.
    """
    if outcomes.ids is None or calibration.ids is None:
        return 0
    # first by uncertainty: a batch of a service is small, and few calibration rows have its scores
    alike = np.flatnonzero(np.isin(calibration.uncertainty, outcomes.uncertainty))
    known = {(calibration.ids[row], calibration.uncertainty[row]) for row in alike.tolist()}
    rows = zip(outcomes.ids, outcomes.uncertainty.tolist(), strict=True)
    return sum(row in known for row in rows)
