"""A sample of the rows of some outcomes, which shows whether two outcomes share rows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.errors import UNKNOWN

SAMPLED = 256
"""Number of rows of a sample.

The sample has the rows with the smallest hashes. If two outcomes share a part J of all their rows,
their samples have no row in common with a probability of about (1 - J)^256, which is 2e-6 for a
part of 5 %.
"""


class RowSample(NamedTuple):
    """Hashes of some rows, and what of a row is hashed: "pictures" or "names"."""

    by: Literal["pictures", "names"]
    hashes: frozenset[int]


def sample_of_rows(
    picture: NDArray[np.int64] | None, ids: Sequence[str] | None
) -> RowSample | None:
    """A sample of at most ``SAMPLED`` rows, by their pictures, or else by their identifiers.

    None if neither is known.

    Examples:
        >>> from vilu.outcomes.row_sample import sample_of_rows
        >>> first = sample_of_rows(None, ["a.jpg", "b.jpg"])
        >>> len(first.hashes & sample_of_rows(None, ["b.jpg", "c.jpg"]).hashes)
        1
    """
    if picture is not None and (picture != UNKNOWN).any():
        return RowSample("pictures", _smallest(picture[picture != UNKNOWN]))
    if ids:
        return RowSample("names", _smallest(np.fromiter(map(_hash, ids), np.int64, len(ids))))
    return None


def _smallest(hashes: NDArray[np.int64]) -> frozenset[int]:
    return frozenset(np.unique(hashes)[:SAMPLED].tolist())


def _hash(identifier: str) -> int:
    content = identifier.encode(errors="surrogatepass")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)


def are_disjoint(samples: Sequence[RowSample]) -> bool:
    """Whether no two samples share a row; False if that cannot be told."""
    if len(samples) < 2 or len({sample.by for sample in samples}) > 1:
        return False
    n_rows = sum(len(sample.hashes) for sample in samples)
    return len(frozenset[int]().union(*(sample.hashes for sample in samples))) == n_rows
