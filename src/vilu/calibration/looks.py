"""``looks.json``: all looks at the same rows, for a predictor.

A look is a target that was tried on the rows. The same target on changed rows is another look. An
exact test that is repeated until enough rows were added breaks its guarantee more often than a
single test.
"""

from __future__ import annotations

import math
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

MIN_COMMON_SHARE: Final = 0.5
"""Two row sets count as the same if they share at least this part of the smaller set."""

ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
"""Words for a look's number. Larger numbers are written in digits."""


class RowsWithTargets(FrozenModel):
    """A row set, with all looks at these rows."""

    # the smallest hashes of the rows, ascending
    hashes: tuple[int, ...] = Field(min_length=1, max_length=SKETCH_SIZE)
    # One digest per look, the earliest first. The digest is over the target and all pictures. In
    # files of vilu 0.2.0 it is over the target alone.
    targets: tuple[str, ...]

    def is_same_set(self, hashes: tuple[int, ...]) -> bool:
        """Return whether rows with these smallest hashes are the same set.

        The sets must share at least the part ``MIN_COMMON_SHARE`` of the smaller set. The share is
        estimated from the saved hashes. If one set has more than about ten times as many rows as
        the other, only few hashes can be compared, or none. Then the same set may go unnoticed.
        """
        # Up to this hash, all hashes of both sets are saved. They are a random sample of the rows.
        last_hash = min(_last_comparable_hash(self.hashes), _last_comparable_hash(hashes))
        known_hashes = {saved_hash for saved_hash in self.hashes if saved_hash <= last_hash}
        new_hashes = {new_hash for new_hash in hashes if new_hash <= last_hash}
        n_common = len(known_hashes & new_hashes)
        n_smaller = min(len(known_hashes), len(new_hashes))
        return n_common > 0 and n_common >= MIN_COMMON_SHARE * n_smaller


def _last_comparable_hash(hashes: tuple[int, ...]) -> float:
    """Return the largest number up to which ``hashes`` holds every hash of a row set."""
    # Fewer hashes than SKETCH_SIZE are all hashes of the set.
    return hashes[-1] if len(hashes) == SKETCH_SIZE else math.inf


class LookRecord(Document):
    """Record of all calibrations for a fit, with or without a resulting guarantee."""

    remedy = "Remove it, which forgets the earlier looks, and run `vilu calibrate` again"
    error_class = DataError

    kind: Literal["looks"] = "looks"
    weights_sha256: str  # hash of the fitted weights
    rows: tuple[RowsWithTargets, ...] = ()


def record_target(folder: Path, picture: Ints, target: dict[str, object]) -> int:
    """Record a look at rows. Return the number of looks at these rows, including this look.

    The same target on the same rows is no new look.

    Args:
        folder: The predictor's folder.
        picture: Identities (N,) of the rows' pictures. The identities are hashes.
        target: The target's fields.
    """
    pictures = np.unique(picture[picture >= 0])  # sorted; -1 stands for an unknown picture
    if not len(pictures):
        return 1  # without known pictures the rows cannot be recognised, so nothing is recorded
    hashes = tuple(pictures[:SKETCH_SIZE].tolist())
    record = _load_record(folder)
    same_sets = [known_set for known_set in record.rows if known_set.is_same_set(hashes)]
    other_sets = [known_set for known_set in record.rows if known_set not in same_sets]
    # Sets with mostly the same rows become a single set with all rows and all looks. If they were
    # counted separately, new rows would reset the count. Then the best of many looks would be
    # reported as the first.
    looks = _looks_at(same_sets, pictures, target)
    # The smallest hashes of all rows are among the smallest hashes of the single sets.
    all_hashes = set(hashes).union(*(known_set.hashes for known_set in same_sets))
    smallest_hashes = tuple(sorted(all_hashes)[:SKETCH_SIZE])
    merged_set = RowsWithTargets(hashes=smallest_hashes, targets=looks)
    updated_record = record.model_copy(update={"rows": (*other_sets, merged_set)})
    write_document(folder / LOOKS, updated_record)
    return len(looks)


def _looks_at(
    same_sets: list[RowsWithTargets], pictures: Ints, target: dict[str, object]
) -> tuple[str, ...]:
    """Return the digests of all looks at rows with these pictures, with this look.

    ``same_sets`` are the recorded sets with mostly the same rows.
    """
    look = digest({"target": target, "pictures": digest(pictures.tolist())})
    looks = [known_look for known_set in same_sets for known_look in known_set.targets]
    if look in looks:
        return tuple(looks)
    look_without_rows = digest(target)  # as vilu 0.2.0 recorded it
    hashes = tuple(pictures[:SKETCH_SIZE].tolist())
    for known_set in same_sets:
        # vilu 0.2.0 recorded this very look. The new digest replaces the old digest, because the
        # look must not count twice.
        if known_set.hashes == hashes and look_without_rows in known_set.targets:
            looks[looks.index(look_without_rows)] = look
            return tuple(looks)
    return (*looks, look)


def _load_record(folder: Path) -> LookRecord:
    """Load the record for the fit in this folder, or an empty record if no record exists."""
    weights_sha256 = read_description(folder / PREDICTOR)["weights_sha256"]
    if (folder / LOOKS).exists():
        record = read_document(folder / LOOKS, LookRecord)
        # After a new fit all scores are different, so looks at the old scores do not count.
        if record.weights_sha256 == weights_sha256:
            return record
    return LookRecord(weights_sha256=weights_sha256)


def looks_in_words(n_looks: int) -> str:
    """Say how many looks there were, and the consequence. "" for the first look."""
    if n_looks == 1:
        return ""
    look_in_words = f"look number {n_looks}"
    if n_looks <= len(ORDINALS):
        look_in_words = f"{ORDINALS[n_looks - 1]} look"
    return (
        f" ({look_in_words} at these rows: they were tested before, with other targets or with "
        "other rows, and the confidence holds only if target and rows were chosen before the first "
        "look)"
    )
