"""Rows divided into parts: no picture is in two parts, and every part has a share of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vilu.errors import UsageError

PartType = TypeVar("PartType")

ROUNDING_TOLERANCE = 1e-9
"""The sum of the shares may exceed 1 by this number because of rounding errors."""


class SplitParts(NamedTuple, Generic[PartType]):
    """The parts of a source: rows to fit on, rows to calibrate on, and rows to test on."""

    fit: PartType
    calibration: PartType
    test: PartType


def require_shares(shares: Sequence[float]) -> None:
    """Raise UsageError if shares are not from 0 to 1, or add up to more than 1."""
    for share in shares:
        if not 0 <= share <= 1:
            raise UsageError(f"the share of a part must be from 0 to 1. Got {share}.")
    total = sum(shares)
    if total > 1 + ROUNDING_TOLERANCE:
        raise UsageError(f"the shares of the parts must add up to at most 1. Got {total:g}.")


def connected_row_groups(
    cluster: NDArray[np.int64], picture: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Compute the group number (N,) of every row. All connected rows are a group.

    Rows with the same cluster or picture are connected, so a group may have several clusters.

    Args:
        cluster: (N,) cluster number of every row.
        picture: (N,) picture identity of every row. -1: the picture is in no other row.
    """
    # imported here to keep `import vilu` fast
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # The rows are the nodes of a graph. Each row has an edge to the first row in the same cluster,
    # and to the first row with the same picture.
    n_rows = len(cluster)
    may_share_picture = picture >= 0  # not -1
    first_row_with_picture = _first_rows(picture)[may_share_picture]
    rows = np.arange(n_rows)
    rows_with_picture = np.flatnonzero(may_share_picture)
    edge_start = np.concatenate([rows, rows_with_picture])
    first_row_of_cluster = _first_rows(cluster)
    edge_end = np.concatenate([first_row_of_cluster, first_row_with_picture])
    weights = np.ones(len(edge_start))
    graph = coo_array((weights, (edge_start, edge_end)), shape=(n_rows, n_rows))
    group: NDArray[np.int32]
    _, group = connected_components(graph, directed=False)
    return group.astype(np.int64)


def _first_rows(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find, for every row, the first row (N,) with the same number in ``group`` (N,)."""
    _, first_row, group_of_row = np.unique(group, return_index=True, return_inverse=True)
    return first_row[group_of_row]


def _distinct_identities(picture: NDArray[np.int64]) -> NDArray[np.int64]:
    """Replace each identity -1 (the picture is in no other row) by a different unused identity."""
    identity = picture.copy()
    is_in_no_other_row = identity < 0
    first_unused = identity.max(initial=-1) + 1
    n_new_identities = np.count_nonzero(is_in_no_other_row)
    identity[is_in_no_other_row] = first_unused + np.arange(n_new_identities)
    return identity


def part_of_each_row(
    picture: NDArray[np.int64], stratum: NDArray[np.int64], shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Compute the part number (N,) of every row, from 0.

    A row in no part gets the number after the last part: 3 if there are three parts.

    Rows with the same picture are in the same part. The m pictures in a stratum are shuffled. With
    a random offset o in [0, 1), picture i gets the quantile (i + o) / m. The cumulative shares are
    the borders between the parts, so a quantile decides the part. Every part gets its share of
    every stratum, up to a single picture. On average the part gets exactly its share, even if a
    stratum has very few pictures.

    Args:
        picture: (N,) picture identity of every row. -1: the picture is in no other row.
        stratum: (N,) class of every row. The first row with a picture decides the picture's
            stratum.
        shares: Share of each part.
        seed: Seed for the division.
    """
    rng = np.random.default_rng(seed)
    identity = _distinct_identities(picture)
    _, first_row, picture_of_row = np.unique(identity, return_index=True, return_inverse=True)
    stratum_of_picture = stratum[first_row]
    borders = np.cumsum(shares)
    part_of_picture = np.empty(len(first_row), np.int64)
    for class_number in np.unique(stratum_of_picture):
        pictures = rng.permutation(np.flatnonzero(stratum_of_picture == class_number))
        quantile = (np.arange(len(pictures)) + rng.random()) / len(pictures)
        # A quantile at a border belongs to the part after the border, even if rounding made the
        # quantile a little smaller.
        tolerant_borders = borders - ROUNDING_TOLERANCE
        part = np.searchsorted(tolerant_borders, quantile, side="right")
        part_of_picture[pictures] = part
    parts_have_all_rows = sum(shares) >= 1 - ROUNDING_TOLERANCE
    if parts_have_all_rows:
        # Rounding may have made a quantile larger than the last border. The quantile's picture
        # is put into the last part that is not empty.
        nonempty_parts = np.flatnonzero(np.asarray(shares) > 0)
        part_of_picture = np.minimum(part_of_picture, nonempty_parts.max())
    return part_of_picture[picture_of_row]
