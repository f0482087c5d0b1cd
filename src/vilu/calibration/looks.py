"""``looks.json``: for which targets a predictor was calibrated on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, Model, read_document
from vilu.artifacts.hashing import digest
from vilu.errors import DataError
from vilu.metrics.counts import Ints
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import LOOKS, PREDICTOR

SKETCH: Final = 64
"""Smallest hashes that rows are recognised by."""

SAME_ROWS: Final = 0.5
"""Rows are the same where they have at least this share of all of them together in common."""

ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)


class LookedAt(Model):
    """Rows that were looked at, and the digests of the targets, the earliest first."""

    hashes: tuple[int, ...] = Field(min_length=1, max_length=SKETCH)
    targets: tuple[str, ...]

    def are(self, hashes: tuple[int, ...]) -> bool:
        """Whether half of them or more are these: from the smallest hashes of both together."""
        # The smallest hashes of both sets are a random sample of their union, so the share that is
        # common estimates |A and B| / |A or B| (Broder 1997). Of sets that differ in size, all kept
        # hashes of both would count too few: those of the smaller set reach further.
        together = sorted({*self.hashes, *hashes})[:SKETCH]
        common = set(self.hashes) & set(hashes) & set(together)
        return len(common) >= SAME_ROWS * len(together)


class LookRecord(Document):
    """All calibrations of one fit, those that ended without a guarantee, too."""

    again = "Remove it, which forgets the earlier looks, and run `vilu calibrate` again"
    fault = DataError

    kind: Literal["looks"] = "looks"
    weights_sha256: str  # of the fit
    rows: tuple[LookedAt, ...] = ()


def note_look(folder: Path, picture: Ints, target: dict[str, object]) -> int:
    """Note that rows, by the identities (N,) of their pictures, are looked at for a target.

    Returns how many targets these rows have been looked at for so far, this one included.
    """
    smallest = np.unique(picture[picture >= 0])[:SKETCH]
    if not len(smallest):
        return 1
    hashes = tuple(smallest.tolist())
    wanted = digest(target)
    before = _load(folder)
    entries = []
    targets: tuple[str, ...] = (wanted,)
    for rows in before.rows:
        if not rows.are(hashes):
            entries.append(rows)
            continue
        # Sets that overlap with these rows are one from now on. Counted apart, a few new rows would
        # begin the count anew, and the best of many targets would pass for the first.
        new = [name for name in targets if name not in rows.targets]
        targets = (*rows.targets, *new)
    after = (*entries, LookedAt(hashes=hashes, targets=targets))
    before.model_copy(update={"rows": after}).write(folder / LOOKS)
    return len(targets)


def _load(folder: Path) -> LookRecord:
    """What was noted of the fit that lies there."""
    weights = read_description(folder / PREDICTOR)["weights_sha256"]
    if (folder / LOOKS).exists():
        looks = read_document(folder / LOOKS, LookRecord)
        # another fit has other scores, of which the looks at this one have shown nothing
        if looks.weights_sha256 == weights:
            return looks
    return LookRecord(weights_sha256=weights)


def in_words(n_looks: int) -> str:
    """How many targets were tried, and what that means; nothing of the first."""
    if n_looks == 1:
        return ""
    which = f"look number {n_looks}"
    if n_looks <= len(ORDINALS):
        which = f"{ORDINALS[n_looks - 1]} look"
    return (
        f" ({which} at these rows: {n_looks} targets were tried on them, and the confidence is "
        "that of a target which is chosen before the first look)"
    )
