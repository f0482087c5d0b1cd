"""What labels show of a predictor: which of them count, and up to which threshold it may accept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vilu.calibration.anytime import Draw, Looks, level_of
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import keep_calibration
from vilu.calibration.rules import ALL, Rule, rule_at_any_time
from vilu.calibration.target import Target
from vilu.embeddings.copies import near_copies
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.probability import Logistic
from vilu.predictors.persistence.storage import write_card
from vilu.triage.labels import SKIPPED, LabelBook, side_of
from vilu.triage.photos import Photos
from vilu.triage.trial import Trial

POSITIONS: Final = 2**63
"""Positions in the random order."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PhotoSplit:
    """Of every photo: its side, its position in the random order, and what is known of its label.

    Attributes:
        usable: (N,) which photos can be used at all.
        is_calibration: (N,) which are of the calibration side; the others are of the fit side.
        position: (N,) in the random order.
        labelled: (N,) which have a label: a class, or one that is outside.
        answered: (N,) which have a label or were skipped.
        skipped: (N,) which were skipped.
        unasked: (N,) which have a label that came unasked.
    """

    usable: Mask
    is_calibration: Mask
    position: Ints
    labelled: Mask
    answered: Mask
    skipped: Mask
    unasked: Mask

    @classmethod
    def of(cls, photos: Photos, book: LabelBook, seed: int) -> PhotoSplit:
        """Of photos whose labels were set; of equal pictures the first one counts.

        One that has changed since its label was given may have changed sides with that, so it never
        counts as a calibration photo.
        """
        pictures = photos.pictures
        is_calibration, hashes = side_of(pictures, seed)
        n = len(photos)
        is_first = np.zeros(n, np.bool_)
        is_first[np.unique(hashes, return_index=True)[1]] = True
        usable = np.zeros(n, np.bool_)
        usable[photos.usable_rows.numpy()] = True
        answered = np.zeros(n, np.bool_)
        skipped = np.zeros(n, np.bool_)
        unasked = np.zeros(n, np.bool_)
        has_changed = np.zeros(n, np.bool_)
        for row, path in enumerate(photos.ids):
            entry = book.entries.get(path)
            if entry is not None:
                answered[row] = entry.label is not None
                skipped[row] = entry.label == SKIPPED
                unasked[row] = entry.stream == "given"
                has_changed[row] = entry.is_of_another(pictures[row])
        return cls(
            usable=usable & is_first & ~(is_calibration & has_changed),
            is_calibration=is_calibration,
            position=(hashes >> np.uint64(1)).astype(np.int64),
            labelled=answered & ~skipped,
            answered=answered,
            skipped=skipped,
            unasked=unasked & answered,
        )

    @property
    def for_calibration(self) -> Mask:
        """(N,) photos whose labels may count for a guarantee."""
        return self.usable & self.is_calibration

    @property
    def for_fit(self) -> Mask:
        """(N,) photos on whose labels a predictor may be fitted."""
        return self.usable & ~self.is_calibration

    @property
    def fit_rows(self) -> Ints:
        """(M,) rows that a predictor may be fitted on now."""
        return np.flatnonzero(self.for_fit & self.labelled)


def first_of_scene(photos: EmbeddingSource, known: Ints, rows: Ints) -> Mask:
    """(M,) which rows are nearly like no known row, and like no row before them."""
    both = np.concatenate([known, rows])
    is_first: Mask = near_copies(photos, both) == np.arange(len(both))
    return is_first[len(known) :]


@dataclass(frozen=True)
class GuaranteeProgress:
    """How far a guarantee is.

    Attributes:
        looks: Thresholds, risk and level.
        rows: Photos whose labels count.
        outcomes: Of these photos; one that nobody could name counts as answered wrong.
        missing: Photos whose labels are lacking before anything more can be said, in their order.
        certified: Index of the threshold that is certified; None where none is.
        more: About how many more labels would certify something; None where none would.
    """

    looks: Looks
    rows: Ints
    outcomes: Outcomes
    missing: Ints
    certified: int | None
    more: int | None

    @property
    def threshold(self) -> float:
        """What is certified; -inf where nothing is."""
        if self.certified is None:
            return -math.inf
        return float(self.looks.grid[self.certified])


def rule_of(
    all_progress: Mapping[str, GuaranteeProgress], max_risk: float, confidence: float
) -> Rule:
    """The guarantee of all answers, or of each class of answers, or what it lacks."""
    groups = {}
    for group, progress in all_progress.items():
        groups[group] = (progress.looks, progress.outcomes)
    return rule_at_any_time(groups, max_risk, confidence)


def progress_of(
    trial: Trial,
    outcomes: Outcomes,
    split: PhotoSplit,
    *,
    max_risk: float,
    delta: float,
    up_to: int,
    n_before: int,
) -> GuaranteeProgress:
    """What the labels up to a position in the order show, as soon as all of them are there.

    Args:
        trial: Of the predictor that is tested.
        outcomes: Of all photos, by that predictor.
        split: Which labels there are.
        max_risk: The error rate that is to be shown.
        delta: The level of all predictors together.
        up_to: The position.
        n_before: How many predictors were tested before it.
    """
    below_limit = split.for_calibration & (outcomes.uncertainty <= trial.limit)
    drawn = below_limit & (split.position < up_to)
    missing = np.flatnonzero(drawn & ~split.answered)
    missing = missing[np.argsort(split.position[missing])]
    if len(missing):
        rows = np.zeros(0, np.int64)
    else:
        rows = np.flatnonzero(drawn | (below_limit & split.unasked))
    level = level_of(trial.attempt or n_before + 1, delta)
    looks = Looks(np.array(trial.grid), max_risk, level, trial.limit)
    counted = outcomes.take(rows)
    failure = np.where(split.skipped[rows], 1, counted.failure)
    counted = dataclasses.replace(counted, failure=failure)
    return GuaranteeProgress(
        looks=looks,
        rows=rows,
        outcomes=counted,
        missing=missing,
        certified=looks.certified(counted.uncertainty, counted.failure),
        more=looks.more_needed(counted.uncertainty, counted.failure),
    )


def keep_guarantee(
    folder: Path,
    predictor: FailurePredictor,
    photos: Photos,
    all_progress: Mapping[str, GuaranteeProgress],
    rows: Outcomes,
    rule: Rule,
    dataset: str,
) -> Calibration:
    """Leave a rule beside the predictor, with its labelled ``rows``, as ``vilu calibrate`` does."""
    # it is a probability as it is; labels below the limit alone would bend it
    predictor.calibrator_ = Logistic(
        form="temperature",
        weights=(1.0,),
        intercept=0.0,
        n=len(rows),
        n_failures=int((rows.failure == 1).sum()),
    )
    target = Target(
        max_risk=rule.max_risk,
        confidence=rule.confidence,
        method="anytime",
        per_class=ALL not in all_progress,
    )
    draws = {group: Draw.of(progress.looks) for group, progress in all_progress.items()}
    calibration = keep_calibration(
        folder,
        predictor,
        rows,
        photos,
        target,
        rule,
        (dataset, None),
        dtype=photos.first.manifest.dtype,
        draws=draws,
    )
    write_card(folder)
    return calibration
