"""Some rows of a source, as a source: nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import IMAGE_COLUMNS
from vilu.errors import UsageError
from vilu.types import Candidates, EmbeddingSource
from vilu.validate import RowNumbers


class Subset(EmbeddingSource):
    """The rows of a source with shared candidates that are at some positions.

    Args:
        source: The whole.
        rows: (M,) positions in it, ascending.

    Raises:
        UsageError: If the source has captions: its pools are made of all its rows.
    """

    pool_size: int | None = None

    def __init__(self, source: EmbeddingSource, rows: NDArray[np.int64]) -> None:
        if source.pool_size is not None:
            raise UsageError("image-caption pairs are matched in pools, so some of them are another problem.")
        self._source, self._rows = source, torch.from_numpy(rows)
        self.space, self.class_names, self.columns = source.space, source.class_names, source.columns
        self.target, self.status = source.target[self._rows], source.status[rows]
        self.ids: Sequence[str] = RowNumbers(len(rows)) if isinstance(source.ids, RowNumbers) else Picked(source, rows)

    @property
    def n_candidates(self) -> int:
        """K."""
        return self._source.n_candidates

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) rows of the whole."""
        return self._source.image_rows(self._rows[index])

    def candidates(self, index: Tensor) -> Candidates:
        """The (K, D) texts of the whole, and the targets of the rows."""
        return self._source.candidates(self._rows[index])

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name`` of the whole: rows of it where it is of the images."""
        return self._source.column(name, self._rows[index] if name in IMAGE_COLUMNS else index)


class Picked(Sequence[str]):
    """Identifiers of some rows of a source, read when asked for."""

    def __init__(self, source: EmbeddingSource, rows: NDArray[np.int64]) -> None:
        self._ids, self._rows = source.ids, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        chosen = np.zeros(len(self._ids), dtype=bool)
        chosen[self._rows] = True
        return compress(self._ids, chosen)  # one pass: identifiers on disk are read part by part

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._ids[row] for row in self._rows[index].tolist()]
        return self._ids[int(self._rows[index])]
