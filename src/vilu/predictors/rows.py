"""Rows of a fit: a few of every class, and a memory of which they were."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.source import UNKNOWN, EmbeddingSource
from vilu.errors import DataError, UsageError
from vilu.files.documents import digest


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


DIRECTIONS = 8
SAME_CANDIDATES = 0.02
"""How far two sketches of the same texts may be apart: bfloat16 moves one by less, another template by ten times it."""


def candidates_of(data: EmbeddingSource) -> dict[str, Any]:
    """What the images choose from, as plain JSON: how many, the hash of their names, and a sketch of their texts.

    The sketch is the mean text in eight fixed random directions: blind to the order of the candidates, and to rounding.
    Of captions there is the size of their pools alone.
    """
    if data.pool_size is not None:
        return {"pool_size": data.pool_size}
    names = {} if data.class_names is None else {"classes": digest(list(data.class_names))}
    directions = np.random.default_rng(0).standard_normal((DIRECTIONS, data.space.embed_dim))
    mean = data.candidates(torch.empty(0, dtype=torch.int64)).text.double().mean(dim=0).numpy(force=True)
    return {"n_candidates": data.n_candidates, **names, "texts": (directions @ mean).round(4).tolist()}


def same_candidates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of ``candidates_of`` may be the same: names count where one of them knows no texts."""
    sizes = ("n_candidates", "pool_size")
    if any(one.get(name) != other.get(name) for name in sizes):
        return False
    if one.get("texts") and other.get("texts"):
        if len(one["texts"]) != len(other["texts"]):
            return False
        return float(np.abs(np.subtract(one["texts"], other["texts"])).max()) <= SAME_CANDIDATES
    return None in (one.get("classes"), other.get("classes")) or one["classes"] == other["classes"]
