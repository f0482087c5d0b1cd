"""A triage's photos with a guarantee about the triage's folder (``--about folder``).

A predictor's population is all photos in the folder that the predictor was not fitted on. The
guarantee is about this population. The photos are drawn in the random order of the pictures. This
order is fixed before the first label.

Some photos are picked to fit on. A picked photo leaves the population of every predictor fitted on
this photo. The picks must not depend on the drawn photos. Otherwise the remaining drawn photos
would be no random sample of the population. So a drawn photo may be picked, too. Then the label is
used for both purposes.

People look at earlier labels when they choose further photos to label. So after the first draw, no
predictor is fitted on a label without a request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Self

import numpy as np

from vilu.artifacts.hashing import digest
from vilu.calibration.closed_set import ClosedCounts, ClosedPhotos, ClosedSetTests
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.triage.guarantee import Mask, PhotoSplit, one_row_per_picture
from vilu.triage.labels import LabelBook
from vilu.triage.photos import Photos
from vilu.triage.state import GuaranteePopulation
from vilu.triage.trial import Trial


class FolderSplit(PhotoSplit):
    """Like ``PhotoSplit``, for a guarantee about the photos in the folder.

    A photo is on the calibration side until the photo is picked to fit on.
    """

    @classmethod
    def of(cls, photos: Photos, book: LabelBook, seed: int) -> Self:
        """Split photos by their label book."""
        split = super().of(photos, book, seed)
        is_first = one_row_per_picture(split.random_position, split.is_answered)
        is_readable = np.zeros(len(photos), np.bool_)
        is_readable[photos.usable_rows.numpy()] = True
        # If a photo is picked, all photos with the same picture count as picked. They have the same
        # position.
        picked_positions = split.random_position[_picked_mask(photos, book)]
        has_picked_picture = np.isin(split.random_position, picked_positions)
        no_given_label = np.zeros(len(photos), np.bool_)  # only drawn photos count
        return dataclasses.replace(
            split,
            is_usable=is_readable & is_first,
            is_calibration=~has_picked_picture,
            has_given_label=no_given_label,
        )

    @staticmethod
    def streams_of_unasked_labels(
        labels: Mapping[str, str],
        streams: Mapping[str, str],  # noqa: ARG004
        *,
        has_drawn: bool,
    ) -> Mapping[str, str]:
        """Give the same stream to all labels without a request.

        Before the first draw this stream is "fit": predictors are fitted on these labels. After the
        first draw the stream is "given": these labels are never used.
        """
        return dict.fromkeys(labels, "given" if has_drawn else "fit")

    def pictures_digest(self, photos: Photos) -> str:
        """Compute a digest of the pictures in the folder."""
        picture_digests = sorted({picture.hex() for picture in photos.pictures})
        return digest(picture_digests)

    def for_predictor(self, predictor: FailurePredictor, photos: Photos) -> Self:
        """Return the split with the predictor's population as the calibration side.

        A predictor that needs no labels was not fitted on any label. So the split is unchanged.
        """
        if not predictor.needs_labels:
            return self
        was_fitted_on = predictor.seen(photos).shared
        return dataclasses.replace(self, is_calibration=~was_fitted_on)

    def rows_to_pick(self, photos: Photos, book: LabelBook) -> Ints:
        """Return rows (M,) that may be picked to fit on, whether drawn or not."""
        is_picked = _picked_mask(photos, book)
        return np.flatnonzero(self.is_usable & ~is_picked)

    def threshold_tests(
        self, trial: Trial, outcomes: Outcomes, rows: Ints, max_risk: float, level: float
    ) -> ClosedSetTests:
        """Make a trial's tests, with the labels of ``rows`` (M,) as the random sample.

        The population's labelled photos outside ``rows`` were not drawn at random. The labels of
        these photos are known, so the tests count these photos apart from the sample.
        """
        is_in_sample = np.zeros(len(self.is_answered), np.bool_)
        is_in_sample[rows] = True
        is_not_drawn = self.usable_calibration_mask & self.is_answered & ~is_in_sample
        failure = np.where(self.is_skipped, 1, outcomes.failure)  # a skipped photo counts as wrong
        uncertainty: Floats = outcomes.uncertainty
        grid = np.array(trial.grid)
        counts = ClosedCounts.of(
            grid,
            photo_scores=uncertainty[self.usable_calibration_mask],
            aside_scores=uncertainty[is_not_drawn],
            aside_failure=failure[is_not_drawn],
        )
        return ClosedSetTests(grid, max_risk, level, counts, trial.limit)

    @staticmethod
    def tests_before_labels(
        trial: Trial, scores: Floats, max_risk: float, level: float
    ) -> ClosedSetTests:
        """Make a trial's tests while no photo has a label.

        ``scores`` (M,) are the uncertainties in the population.
        """
        grid = np.array(trial.grid)
        no_scores: Floats = np.zeros(0)
        no_failures: Ints = np.zeros(0, np.int64)
        counts = ClosedCounts.of(
            grid, photo_scores=scores, aside_scores=no_scores, aside_failure=no_failures
        )
        return ClosedSetTests(grid, max_risk, level, counts, trial.limit)

    def closed_photos(
        self, photos: Photos, uncertainty: Floats, threshold: float
    ) -> ClosedPhotos | None:
        """Return the population's unlabelled photos up to a threshold, or None if none are left."""
        is_covered = self.usable_calibration_mask & ~self.is_answered & (uncertainty <= threshold)
        if not is_covered.any():
            return None
        identities = photos.picture_identities()
        pictures = np.unique(identities[is_covered])
        n_files = int(np.isin(identities, pictures).sum())  # copies of these pictures count, too
        return ClosedPhotos(pictures=tuple(pictures.tolist()), files=n_files)


def _picked_mask(photos: Photos, book: LabelBook) -> Mask:
    """Return a mask (N,) of photos picked to fit on."""
    is_picked = np.zeros(len(photos), np.bool_)
    for row, path in enumerate(photos.ids):
        entry = book.entries.get(path)
        is_picked[row] = entry is not None and entry.stream == "fit"
    return is_picked


SPLIT_CLASSES: Final[dict[GuaranteePopulation, type[PhotoSplit]]] = {
    "new": PhotoSplit,
    "folder": FolderSplit,
}
"""Maps the setting ``about`` to the class that splits the photos."""
