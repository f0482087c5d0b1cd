"""``looks.json``: the targets for which a predictor was calibrated on the same rows."""

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
"""Number of smallest hashes that are saved of a set of rows, to recognise the set later."""

SAME_ROWS: Final = 0.5
"""Two sets A and B of rows are taken for the same if |A and B| / |A or B| is at least this."""

ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)


class LookedAt(Model):
    """Set of rows, saved by its smallest hashes, and digests of its targets, earliest first."""

    hashes: tuple[int, ...] = Field(min_length=1, max_length=SKETCH)
    targets: tuple[str, ...]

    def is_same_set(self, hashes: tuple[int, ...]) -> bool:
        """Whether rows with these smallest hashes are the same set (``SAME_ROWS``)."""
        # The 64 smallest hashes of the union are a random sample of the union. The share of this
        # sample that is in both sets estimates |A and B| / |A or B| (Broder 1997). All saved hashes
        # of both sets would not be a random sample: the saved hashes of a smaller set are larger
        # numbers than those of a larger set.
        union = sorted({*self.hashes, *hashes})[:SKETCH]
        common = set(self.hashes) & set(hashes) & set(union)
        return len(common) >= SAME_ROWS * len(union)


class LookRecord(Document):
    """Record of all calibrations of one fit, including those that ended without a guarantee."""

    again = "Remove it, which forgets the earlier looks, and run `vilu calibrate` again"
    fault = DataError

    kind: Literal["looks"] = "looks"
    weights_sha256: str  # hash of the weights of the fit
    rows: tuple[LookedAt, ...] = ()


def note_look(folder: Path, picture: Ints, target: dict[str, object]) -> int:
    """Record that rows are tried for a target; return the number of their targets so far.

    ``picture`` (N,) holds the identities of the pictures of the rows. The number includes this
    target.
    """
    smallest = np.unique(picture[picture >= 0])[:SKETCH]
    if not len(smallest):
        return 1
    hashes = tuple(smallest.tolist())
    before = _load(folder)
    different = []
    targets: tuple[str, ...] = (digest(target),)
    for recorded in before.rows:
        if not recorded.is_same_set(hashes):
            different.append(recorded)
            continue
        # Recorded sets that overlap with these rows become one set with all their targets. If they
        # were counted separately, a few new rows would reset the count, and the best of many
        # targets would be reported as the first.
        new = [name for name in targets if name not in recorded.targets]
        targets = (*recorded.targets, *new)
    after = (*different, LookedAt(hashes=hashes, targets=targets))
    before.model_copy(update={"rows": after}).write(folder / LOOKS)
    return len(targets)


def _load(folder: Path) -> LookRecord:
    """The record of the fit in this folder, empty if there is none."""
    weights = read_description(folder / PREDICTOR)["weights_sha256"]
    if (folder / LOOKS).exists():
        looks = read_document(folder / LOOKS, LookRecord)
        # Another fit has other scores, so its looks do not count.
        if looks.weights_sha256 == weights:
            return looks
    return LookRecord(weights_sha256=weights)


def in_words(n_looks: int) -> str:
    """Text on the number of targets that were tried, and its meaning; "" for the first target."""
    if n_looks == 1:
        return ""
    look = f"look number {n_looks}"
    if n_looks <= len(ORDINALS):
        look = f"{ORDINALS[n_looks - 1]} look"
    return (
        f" ({look} at these rows: {n_looks} targets were tried on them, and the confidence is "
        "that of a target which is chosen before the first look)"
    )
