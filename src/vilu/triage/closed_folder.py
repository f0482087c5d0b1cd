"""The photos of a triage whose guarantee is about its folder (``--about folder``).

Every photo that the tested predictor was not fitted on belongs to its population. The population is
labelled in the random order of the pictures, which is fixed before the first label.

A photo that is picked to fit on leaves the population of the predictors that are fitted on it. The
picks must not depend on which photos were drawn: only then are the drawn photos of a population a
random sample of it. So drawn photos are picked, too, and their labels are used again.

People choose what they label by what is already labelled. So after the first draw, a label that
came without a request is never fitted on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Self

import numpy as np

from vilu.artifacts.hashing import digest
from vilu.calibration.closed_set import ClosedCounts, ClosedLooks, ClosedPhotos
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.triage.guarantee import Mask, PhotoSplit
from vilu.triage.labels import LabelBook
from vilu.triage.photos import Photos
from vilu.triage.state import About
from vilu.triage.trial import Trial


class FolderSplit(PhotoSplit):
    """As ``PhotoSplit``, for a guarantee about the photos of the folder.

    A photo is on the calibration side until it is picked to fit on. Equal pictures are one photo:
    the first of them that has a label, or the first of all.
    """

    @classmethod
    def of(cls, photos: Photos, book: LabelBook, seed: int) -> Self:
        """Split photos by the book of their labels."""
        split = super().of(photos, book, seed)
        # Equal pictures have equal positions. The rows with a label are put first, so that
        # ``np.unique`` finds a labelled row of every picture that has any.
        labelled_first = np.argsort(~split.answered, kind="stable")
        _, index = np.unique(split.position[labelled_first], return_index=True)
        is_first = np.zeros(len(photos), np.bool_)
        is_first[labelled_first[index]] = True
        is_readable = np.zeros(len(photos), np.bool_)
        is_readable[photos.usable_rows.numpy()] = True
        picked_positions = split.position[_is_picked(photos, book)]
        return dataclasses.replace(
            split,
            usable=is_readable & is_first,
            is_calibration=~np.isin(split.position, picked_positions),
            unasked=np.zeros(len(photos), np.bool_),  # only drawn photos count
        )

    @staticmethod
    def streams_of(
        labels: Mapping[str, str],
        streams: Mapping[str, str],  # noqa: ARG004
        *,
        has_drawn: bool,
    ) -> Mapping[str, str]:
        """Streams of labels without a request: they are fitted on if nothing was drawn before."""
        return dict.fromkeys(labels, "given" if has_drawn else "fit")

    def bound_to(self, photos: Photos) -> str:
        """Digest of the pictures of the folder."""
        return digest(sorted({picture.hex() for picture in photos.pictures}))

    def for_predictor(self, predictor: FailurePredictor, photos: Photos) -> Self:
        """The split in which the population is all photos the predictor was not fitted on."""
        if not predictor.needs_labels:
            return self
        return dataclasses.replace(self, is_calibration=~predictor.seen(photos).shared)

    def rows_to_pick(self, photos: Photos, book: LabelBook) -> Ints:
        """(M,) rows that may be picked to fit on, whether they were drawn or not."""
        return np.flatnonzero(self.usable & ~_is_picked(photos, book))

    def looks(
        self, trial: Trial, outcomes: Outcomes, rows: Ints, max_risk: float, level: float
    ) -> ClosedLooks:
        """The tests of a trial, where the labels of ``rows`` (M,) count."""
        is_aside = self.for_calibration & self.answered
        is_aside[rows] = False
        failure = np.where(self.skipped, 1, outcomes.failure)
        uncertainty: Floats = outcomes.uncertainty
        grid = np.array(trial.grid)
        closed = ClosedCounts.of(
            grid,
            photos=uncertainty[self.for_calibration],
            aside=uncertainty[is_aside],
            failure=failure[is_aside],
        )
        return ClosedLooks(grid, max_risk, level, closed, trial.limit)

    @staticmethod
    def looks_before_labels(
        trial: Trial, scores: Floats, max_risk: float, level: float
    ) -> ClosedLooks:
        """The tests of a trial while no photo has a label."""
        grid = np.array(trial.grid)
        no_scores: Floats = np.zeros(0)
        no_failures: Ints = np.zeros(0, np.int64)
        closed = ClosedCounts.of(grid, photos=scores, aside=no_scores, failure=no_failures)
        return ClosedLooks(grid, max_risk, level, closed, trial.limit)

    def closed(self, photos: Photos, uncertainty: Floats, threshold: float) -> ClosedPhotos | None:
        """The photos without a label up to a threshold; None if there are none."""
        is_covered = self.for_calibration & ~self.answered & (uncertainty <= threshold)
        if not is_covered.any():
            return None
        identities = photos.picture_identities()
        pictures = np.unique(identities[is_covered])
        n_files = int(np.isin(identities, pictures).sum())
        return ClosedPhotos(pictures=tuple(pictures.tolist()), files=n_files)


def _is_picked(photos: Photos, book: LabelBook) -> Mask:
    """(N,) bool, which photos were picked to fit on."""
    is_picked = np.zeros(len(photos), np.bool_)
    for row, path in enumerate(photos.ids):
        entry = book.entries.get(path)
        is_picked[row] = entry is not None and entry.stream == "fit"
    return is_picked


SPLITS: Final[dict[About, type[PhotoSplit]]] = {"new": PhotoSplit, "folder": FolderSplit}
"""How photos are split, by what the guarantee is about."""
