"""A sample from the rows of some outcomes, to find out whether two outcomes share rows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.errors import UNKNOWN

SAMPLE_SIZE = 256
"""Number of rows in a sample.

The sample has the rows with the smallest hashes. Of the rows in either of two outcomes, let J be
the share in both. The probability that the two samples share no row is near (1 - J)^256. For
J = 5 % this is 2e-6.
"""


class RowSample(NamedTuple):
    """Hashes for some rows. ``kind`` says whether pictures are hashed, or the names of the rows."""

    kind: Literal["pictures", "names"]
    hashes: frozenset[int]


def sample_of_rows(
    picture: NDArray[np.int64] | None, ids: Sequence[str] | None
) -> RowSample | None:
    """Sample at most ``SAMPLE_SIZE`` rows by picture, or else by identifier.

    Returns None if no picture and no identifier is known.

    Examples:
        >>> from vilu.outcomes.row_sample import sample_of_rows
        >>> first = sample_of_rows(None, ["a.jpg", "b.jpg"])
        >>> second = sample_of_rows(None, ["b.jpg", "c.jpg"])
        >>> len(first.hashes & second.hashes)
        1
    """
    if picture is not None and (picture != UNKNOWN).any():
        known_pictures = picture[picture != UNKNOWN]
        sampled_pictures = _smallest_hashes(known_pictures)
        return RowSample("pictures", sampled_pictures)
    if ids:
        hashes = np.fromiter(map(hash_of_text, ids), np.int64, len(ids))
        sampled_hashes = _smallest_hashes(hashes)
        return RowSample("names", sampled_hashes)
    return None


def _smallest_hashes(hashes: NDArray[np.int64]) -> frozenset[int]:
    """Return the ``SAMPLE_SIZE`` smallest hashes, each hash once."""
    return frozenset(np.unique(hashes)[:SAMPLE_SIZE].tolist())


def hash_of_text(text: str) -> int:
    """Hash a text, such as an identifier, to a signed 64-bit integer."""
    content = text.encode(errors="surrogatepass")
    digest = blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def are_disjoint(samples: Sequence[RowSample]) -> bool:
    """Return whether all samples have different rows. Return False if this cannot be compared."""
    kinds = {sample.kind for sample in samples}
    if len(samples) < 2 or len(kinds) > 1:
        return False
    hashes: set[int] = set()
    for sample in samples:
        if not hashes.isdisjoint(sample.hashes):
            return False
        hashes |= sample.hashes
    return True
