"""Rows divided into parts that share no picture and have the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vilu.errors import UsageError

Rows = TypeVar("Rows")

ROUNDING_TOLERANCE = 1e-9
"""Tolerance of rounding errors: the sum of the shares may exceed 1 by this number."""


class SplitParts(NamedTuple, Generic[Rows]):
    """The parts of a source: rows to fit on, rows to calibrate on, and rows to test on."""

    fit: Rows
    calibration: Rows
    test: Rows


def require_shares(shares: Sequence[float]) -> None:
    """Raise UsageError if shares are not from 0 to 1, or add up to more than 1."""
    for share in shares:
        if not 0 <= share <= 1:
            raise UsageError(f"the share of a part must be from 0 to 1. Got {share}.")
    total = sum(shares)
    if total > 1 + ROUNDING_TOLERANCE:
        raise UsageError(f"the shares of the parts must add up to at most 1. Got {total:g}.")


def connected_rows(cluster: NDArray[np.int64], picture: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers (N,) of groups of rows that are connected by a cluster or by a picture.

    A group may have several clusters, because copies of one picture may lie in two of them.

    Args:
        cluster: (N,) numbers of the clusters of the rows.
        picture: (N,) identities of the pictures. -1: the picture is in no other row.
    """
    # imported here to keep `import vilu` fast
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # every row is connected with the first row of its cluster, and with that of its picture
    n_rows = len(cluster)
    has_picture = picture >= 0
    start = np.concatenate([np.arange(n_rows), np.flatnonzero(has_picture)])
    end = np.concatenate([_first_rows(cluster), _first_rows(picture)[has_picture]])
    graph = coo_array((np.ones(len(start)), (start, end)), shape=(n_rows, n_rows))
    group: NDArray[np.int32]
    _, group = connected_components(graph, directed=False)
    return group.astype(np.int64)


def _first_rows(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every row, the first row (N,) of its group."""
    _, first_row, group_of_row = np.unique(group, return_index=True, return_inverse=True)
    return first_row[group_of_row]


def part_of_rows(
    picture: NDArray[np.int64], stratum: NDArray[np.int64], shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Number (N,) of the part of every row, from 0.

    A row that is in no part has the number of parts, for example 3 if there are three parts.

    Rows of one picture are in one part. The m pictures of a stratum are shuffled. With one random
    offset o in [0, 1), picture i is put at the quantile (i + o) / m. The cumulative shares are the
    borders of the parts between these quantiles. So every part gets its share of every stratum, up
    to one picture. On average it gets exactly its share, however few pictures the stratum has.

    Args:
        picture: (N,) identities of the pictures. -1: the picture is in no other row.
        stratum: (N,) classes of the rows. A picture is in the stratum of its first row.
        shares: Shares of the parts.
        seed: Seed of the division.
    """
    rng = np.random.default_rng(seed)
    identity = picture.copy()
    is_alone = identity < 0
    # a picture that is in no other row gets an identity that no other picture has
    first_unused = identity.max(initial=-1) + 1
    identity[is_alone] = first_unused + np.arange(np.count_nonzero(is_alone))
    _, first_row, picture_of_row = np.unique(identity, return_index=True, return_inverse=True)
    stratum_of_picture = stratum[first_row]
    borders = np.cumsum(shares)
    part_of_picture = np.empty(len(first_row), np.int64)
    for class_number in np.unique(stratum_of_picture):
        pictures = rng.permutation(np.flatnonzero(stratum_of_picture == class_number))
        quantile = (np.arange(len(pictures)) + rng.random()) / len(pictures)
        # A quantile at a border belongs to the part after the border, even if rounding made the
        # quantile a little smaller.
        part = np.searchsorted(borders - ROUNDING_TOLERANCE, quantile, side="right")
        part_of_picture[pictures] = part
    parts_have_all_rows = sum(shares) >= 1 - ROUNDING_TOLERANCE
    if parts_have_all_rows:
        # Rounding may have put a quantile above the last border. Its picture is put into the last
        # part that is not empty.
        nonempty_parts = np.flatnonzero(np.asarray(shares) > 0)
        part_of_picture = np.minimum(part_of_picture, nonempty_parts.max())
    return part_of_picture[picture_of_row]
