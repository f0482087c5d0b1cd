"""Rows as they arrive at a monitor: whose they are, whether they came before, whether they lie sorted."""

from __future__ import annotations

from collections.abc import Sequence
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
"""Fewer different uncertainties without identifiers could come again by chance: they are not taken for a repetition."""


class Seen:
    """Rows that were taken in, and their names, as 64-bit hashes, 8 bytes each, in sorted runs of falling length.

    Of n rows one is mistaken for another, or for a name, with a probability of n^2 / 2^64: at 10^8
    rows, one in 2,000.
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
        while self.runs and 0 < len(run) >= len(self.runs[-1]):
            run = np.union1d(self.runs.pop(), run)
        self.runs += [run] if len(run) else []

    def new(self, outcomes: Outcomes, *, labels: bool = False) -> tuple[Ints, NDArray[np.bool_]]:
        """Hashes to add, and (N,) which rows are not in here; of rows without identifiers all or none.

        ``labels``: whether failures belong to what is recognised of rows without identifiers.
        """
        n = len(outcomes)
        answers = np.full(n, UNKNOWN) if outcomes.prediction is None else outcomes.prediction
        numbers = np.stack(
            [outcomes.uncertainty.view(np.int64), answers, *([outcomes.failure] if labels else [])],
            1,
        )
        if outcomes.ids is not None:
            content = np.ascontiguousarray(numbers[:, :2]).tobytes()
            rows = (
                key.encode(errors="surrogatepass") + content[16 * i : 16 * i + 16]
                for i, key in enumerate(outcomes.ids)
            )
            hashes = hash_of_each(rows).view(np.int64)
            first = np.isin(np.arange(n), np.unique(hashes, return_index=True)[1])
            names = hash_names(outcomes.ids).view(np.int64)
            known = self._holds(hashes)
            # a score that many rows have comes with the same name by chance, too, where names come
            # with other scores
            if known.any() and not known.all() and not np.array_equal(self._holds(names), known):
                _, place, count = np.unique(
                    numbers[:, :2], axis=0, return_inverse=True, return_counts=True
                )
                tied = count[place.ravel()] > 1
                alone, shared = np.bincount(tied, known, minlength=2) / np.bincount(
                    tied, minlength=2
                ).clip(1)
                known &= ~tied | (10 * alone >= shared)
            return np.concatenate([hashes, names]), first & ~known
        if len(np.unique(outcomes.uncertainty)) < FEW_DISTINCT:
            return np.empty(0, np.int64), np.ones(n, dtype=np.bool_)
        whole = hash_of_each([np.ascontiguousarray(numbers[np.lexsort(numbers.T)]).tobytes()]).view(
            np.int64
        )
        return whole, np.full(n, not self._holds(whole).all())

    def _holds(self, hashes: Ints) -> NDArray[np.bool_]:
        found = np.zeros(len(hashes), dtype=np.bool_)
        for run in self.runs:
            found |= run[np.searchsorted(run, hashes).clip(max=len(run) - 1)] == hashes
        return found


def _is_numbered(ids: Sequence[str]) -> bool:
    """Whether identifiers are but the numbers of the rows, in any order: the next batch has them, too."""
    return len(ids) > 0 and ids[0].isdigit() and set(ids) == {str(row) for row in range(len(ids))}


def refuse_sorted(outcomes: Outcomes) -> None:
    """Refuse rows that lie sorted.

    In what order exchangeable rows came has nothing to do with what they are.
    """
    scored = np.isfinite(outcomes.uncertainty)
    answers, labels = (
        codes if codes is None else codes[scored]
        for codes in (outcomes.prediction, outcomes.target)
    )
    if labels is not None and (labels != UNKNOWN).all() and in_blocks(labels):
        what = "right answer"
    elif answers is not None and grouped(answers):
        what = "answer"
    elif rising(outcomes.uncertainty[scored]):
        what = "uncertainty"
    else:
        return
    raise DataError(
        f"these {len(outcomes)} rows lie sorted by their {what}. That is no order of arrival (a "
        "folder of classes has none), and would be taken for a shift. Give --shuffle (in Python: "
        "take them in random order), or --in-order (in_order=True) where they did arrive so. None "
        "of them was taken in."
    )


def admit(outcomes: Outcomes, calibration: Outcomes, risk: str | None) -> Outcomes:
    """Scores of new rows, of the same predictor and candidates.

    What a CSV leaves out is the calibration's.
    """
    for name in ("method", "class_names"):
        ours = getattr(calibration, name)
        theirs = getattr(outcomes, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ProvenanceError(
                f"the calibration rows have the {name} {ours!r:.100}, these scores "
                f"{theirs!r:.100}. Score with the predictor that was calibrated."
            )
    theirs = outcomes.provenance.get("risk")
    if None not in (risk, theirs) and risk != theirs:
        raise ProvenanceError(
            f"these scores were decided on by the calibration {theirs}, the one monitored is "
            f"{risk}. Score again with the predictor as it is calibrated now."
        )
    if known := _n_known(outcomes, calibration):
        warn_caller(
            f"{known} of {len(outcomes)} rows are calibration rows, which say nothing about new "
            "ones."
        )
    if outcomes.ids is not None and _is_numbered(
        outcomes.ids
    ):  # seen here alone: what is left of them looks like keys
        outcomes = replace(outcomes, ids=None)
    if outcomes.class_names is None and outcomes.prediction is not None:
        return replace(outcomes, class_names=calibration.class_names)
    return outcomes


def _n_known(outcomes: Outcomes, calibration: Outcomes) -> int:
    """Rows with the key and the uncertainty of a calibration row.

    A key alone may be of another data set.
    """
    if outcomes.ids is None or calibration.ids is None:
        return 0
    alike = np.flatnonzero(
        np.isin(calibration.uncertainty, outcomes.uncertainty)
    )  # few, of a batch of a service
    rows = {(calibration.ids[place], calibration.uncertainty[place]) for place in alike.tolist()}
    return sum(row in rows for row in zip(outcomes.ids, outcomes.uncertainty.tolist(), strict=True))
