"""Which rows a predictor was fitted on, remembered in bounded space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

SIZE = 1 << 14


def hash_ids(ids: Iterable[str]) -> NDArray[np.int64]:
    """Sorted distinct 63-bit hashes of row identifiers."""
    digests = b"".join(blake2b(i.encode(errors="surrogatepass"), digest_size=8).digest() for i in ids)
    hashes: NDArray[np.int64] = np.unique(np.frombuffer(digests, dtype="<i8") & np.iinfo(np.int64).max)
    return hashes


@dataclass(frozen=True)
class RowSketch:
    """The smallest hashes of a set of row identifiers (a bottom-k sketch); exact up to 16,384 rows.

    Attributes:
        hashes: (M,) sorted int64, M <= 16,384.
        n_rows: Size of the whole set.
    """

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
