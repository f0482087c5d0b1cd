"""Rows of a fit: a few of every class, and a memory of which they were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.source import UNKNOWN, EmbeddingSource
from vilu.errors import DataError, UsageError


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
    classes = [rows[target == label] for label in range(source.n_candidates)]
    orders = [np.random.default_rng([seed, label]).permutation(len(members)) for label, members in enumerate(classes)]
    parts = [members[order[:n]] for members, order in zip(classes, orders, strict=True)]
    sizes = [len(part) for part in parts]
    if min(sizes) < n:
        few = sum(size < n for size in sizes)
        warnings.warn(
            f"{few} of {len(sizes)} classes have fewer than {n} labelled rows (the fewest: {min(sizes)}); "
            "all of theirs are taken.",
            stacklevel=2,
        )
    return torch.cat(parts).sort().values


SIZE = 1 << 14


def hash_ids(ids: Iterable[str]) -> NDArray[np.int64]:
    """Sorted distinct 63-bit hashes of row identifiers."""
    digests = b"".join(blake2b(i.encode(errors="surrogatepass"), digest_size=8).digest() for i in ids)
    return np.unique(np.frombuffer(digests, dtype="<i8") & np.iinfo(np.int64).max)


@dataclass(frozen=True)
class RowSketch:
    """The smallest hashes of a set of row identifiers, sorted (a bottom-k sketch), and its size; exact up to 16,384."""

    hashes: torch.Tensor
    n_rows: int

    @classmethod
    def of(cls, ids: Iterable[str]) -> RowSketch:
        """Sketch of a set of identifiers."""
        hashes = hash_ids(ids)
        return cls(torch.from_numpy(hashes[:SIZE].copy()), len(hashes))

    @classmethod
    def union(cls, first: RowSketch | None, second: RowSketch | None) -> RowSketch | None:
        """Sketch of two disjoint sets together; None stands for rows without identifiers."""
        if first is None or second is None:
            return first or second
        hashes = torch.cat([first.hashes, second.hashes]).unique()
        return cls(hashes[:SIZE], first.n_rows + second.n_rows)

    def overlap(self, ids: Iterable[str]) -> int:
        """How many of ``ids`` are known to be in the set (a lower bound; exact while the set fits the sketch)."""
        return int(np.isin(hash_ids(ids), self.hashes.numpy(), assume_unique=True).sum())


SIMILARITY_ROWS = 100


def similarity_range(data: EmbeddingSource) -> tuple[float, float]:
    """Mean and standard deviation, over the first 100 usable rows, of the largest cosine with a candidate."""
    rows = data.usable_rows[: max(SIMILARITY_ROWS, data.pool_size or 0)]
    batch = next(data.batches(SIMILARITY_ROWS, rows=rows))
    best = (batch.image @ batch.text.T).amax(dim=1)
    return float(best.mean()), max(float(best.std()) if len(best) > 1 else 0.0, 1e-3 * math.sqrt(len(best)))


def warn_of_other_space(data: EmbeddingSource, mean: float, deviation: float) -> None:
    """Without provenance, the largest cosines are all that can tell a foreign space of the same width."""
    if data.n_candidates < 2 or not len(data.usable_rows):
        return
    found, _ = similarity_range(data)
    if abs(found - mean) > 4 * deviation:
        warnings.warn(
            f"the largest cosine of a row is {found:.3f} on average here and was {mean:.3f} ± {deviation:.3f} in "
            "training: are these embeddings from another model? They carry no provenance to check.",
            stacklevel=7,
        )
