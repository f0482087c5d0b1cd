"""``looks.json``: all targets that were tried for a predictor on the same rows.

Each tried target is a look at the rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, FrozenModel, read_document, write_document
from vilu.artifacts.hashing import digest
from vilu.errors import DataError
from vilu.metrics.counts import Ints
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import LOOKS, PREDICTOR

SKETCH_SIZE: Final = 64
"""Number of saved hashes for a row set. The smallest hashes are saved, to recognise the set."""

MIN_JACCARD_SIMILARITY: Final = 0.5
"""Two row sets A and B count as the same if |A and B| / |A or B| is at least this number."""

ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
"""Words for a look's number. Larger numbers are written in digits."""


class RowsWithTargets(FrozenModel):
    """A row set, with all targets that were tried on these rows."""

    # the smallest hashes of the rows
    hashes: tuple[int, ...] = Field(min_length=1, max_length=SKETCH_SIZE)
    targets: tuple[str, ...]  # target digests, the earliest first

    def is_same_set(self, hashes: tuple[int, ...]) -> bool:
        """Return whether rows with these smallest hashes are the same set.

        The similarity of the two sets must be at least ``MIN_JACCARD_SIMILARITY``.
        """
        # The 64 smallest hashes of the union are a random sample from it. The share of common
        # hashes in this sample estimates |A and B| / |A or B| (Broder 1997). All saved hashes of
        # both sets together would not be a random sample of the union: the 64 smallest hashes of a
        # small set reach up to larger numbers than the 64 smallest hashes of a large set.
        sample_of_union = sorted({*self.hashes, *hashes})[:SKETCH_SIZE]
        common_hashes = set(self.hashes) & set(hashes) & set(sample_of_union)
        return len(common_hashes) >= MIN_JACCARD_SIMILARITY * len(sample_of_union)


class LookRecord(Document):
    """Record of all calibrations for a fit, with or without a resulting guarantee."""

    remedy = "Remove it, which forgets the earlier looks, and run `vilu calibrate` again"
    error_class = DataError

    kind: Literal["looks"] = "looks"
    weights_sha256: str  # hash of the fitted weights
    rows: tuple[RowsWithTargets, ...] = ()


def record_target(folder: Path, picture: Ints, target: dict[str, object]) -> int:
    """Record a new target for rows. Return the number of tried targets, including this target.

    Args:
        folder: The predictor's folder.
        picture: Identities (N,) of the rows' pictures. The identities are hashes.
        target: The target's fields.
    """
    known_hashes = picture[picture >= 0]  # -1 stands for an unknown picture
    smallest_hashes = np.unique(known_hashes)[:SKETCH_SIZE]  # ``unique`` sorts
    if not len(smallest_hashes):
        return 1  # without known pictures the rows cannot be recognised, so nothing is recorded
    hashes = tuple(smallest_hashes.tolist())
    record = _load_record(folder)
    unchanged_sets = []
    target_digests: tuple[str, ...] = (digest(target),)
    for recorded_set in record.rows:
        if not recorded_set.is_same_set(hashes):
            unchanged_sets.append(recorded_set)
            continue
        # Recorded sets with mostly the same rows become a single set with all targets. If such sets
        # were counted separately, a few new rows would reset the count. Then the best of many
        # targets would be reported as the first.
        new_digests = [text for text in target_digests if text not in recorded_set.targets]
        target_digests = (*recorded_set.targets, *new_digests)
    updated_sets = (*unchanged_sets, RowsWithTargets(hashes=hashes, targets=target_digests))
    updated_record = record.model_copy(update={"rows": updated_sets})
    write_document(folder / LOOKS, updated_record)
    return len(target_digests)


def _load_record(folder: Path) -> LookRecord:
    """Load the record for the fit in this folder, or an empty record if no record exists."""
    weights_sha256 = read_description(folder / PREDICTOR)["weights_sha256"]
    if (folder / LOOKS).exists():
        record = read_document(folder / LOOKS, LookRecord)
        # After a new fit all scores are different, so looks at the old scores do not count.
        if record.weights_sha256 == weights_sha256:
            return record
    return LookRecord(weights_sha256=weights_sha256)


def tried_targets_in_words(n_tried_targets: int) -> str:
    """Say how many targets were tried, and the consequence. "" for the first target."""
    if n_tried_targets == 1:
        return ""
    look_in_words = f"look number {n_tried_targets}"
    if n_tried_targets <= len(ORDINALS):
        look_in_words = f"{ORDINALS[n_tried_targets - 1]} look"
    return (
        f" ({look_in_words} at these rows: {n_tried_targets} targets were tried on them, and the "
        "confidence is that of a target which is chosen before the first look)"
    )
