"""A few labelled rows of every class."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings import Embeddings
from vilu.errors import DataError, UsageError
from vilu.types import UNKNOWN, EmbeddingSource


def shots(source: EmbeddingSource, n: int, seed: int = 0) -> Tensor:
    """Sorted positions of ``n`` random usable labelled rows of every class; of all rows where a class has fewer.

    Args:
        source: Rows with shared candidates.
        n: Rows per class.
        seed: Of the choice. A larger ``n`` only adds rows, and the other classes do not matter.

    Raises:
        UsageError: If the source has captions, which have no classes to take rows of, or ``n`` is not positive.
        DataError: If no row has a label.
    """
    if n < 1:
        raise UsageError(f"shots must be at least 1. Got {n} instead.")
    if source.pool_size is not None:
        raise UsageError("shots are rows per class, and image-caption pairs have no classes. Leave shots out.")
    rows = source.usable_rows[source.target[source.usable_rows] != UNKNOWN].sort().values
    if not len(rows):
        raise DataError(f"none of the {len(source)} rows has a label, so no class has a shot.")
    target = source.target[rows]
    parts = []
    for label in range(source.n_candidates):
        members = rows[target == label].numpy()
        order = np.random.default_rng([seed, label]).permutation(len(members))
        parts.append(torch.from_numpy(members[order[:n]]))
    sizes = [len(part) for part in parts]
    if min(sizes) < n:
        few = sum(size < n for size in sizes)
        warnings.warn(
            f"{few} of {len(sizes)} classes have fewer than {n} labelled rows (the fewest: {min(sizes)}); "
            "all of theirs are taken.",
            stacklevel=2,
        )
    return torch.cat(parts).sort().values


def few_shot(source: EmbeddingSource, n: int, seed: int = 0) -> Embeddings:
    """A copy in memory of the rows that ``shots`` chooses; errors as there."""
    return Embeddings.from_rows(source, shots(source, n, seed))
