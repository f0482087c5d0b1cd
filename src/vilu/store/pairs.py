"""Image-caption pairs on disk as a source, memory-mapped; and the store of an embedding run with captions as one."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.errors import DataError
from vilu.pairs import PairSource, Pools, require_full_pools
from vilu.space import EmbeddingSpace
from vilu.store.folds import Fold, check_fold, read_captions, rows_of_fold
from vilu.store.manifest import CAPTION, IMAGE
from vilu.store.mapped import MappedParts, MappedSource
from vilu.store.sealed import Sealed
from vilu.types import UNKNOWN
from vilu.validate import SHORT_POOL, VALID


class MappedPairs(PairSource, MappedSource):
    """Pairs in memory-mapped parts: nothing of the vectors is in memory but what a batch or a block needs.

    Per row there are its place in the order of the pools and in the fold (8 bytes each) and its status (1 byte). Rows
    that fill no last pool have the status "short_pool". Hard pools are made of blocks of rows (``PairSource``).

    Args:
        path: Where the pairs are, for messages.
        rows: All rows, and the names of their arrays of images and captions.
        space: The embedding space.
        pools: What is matched against what.
        chosen: Ascending numbers of the rows that belong to the source; None for all.
    """

    def __init__(
        self,
        path: Path,
        rows: MappedParts,
        arrays: tuple[str, str],
        space: EmbeddingSpace,
        pools: Pools,
        chosen: NDArray[np.int64] | None,
    ) -> None:
        self.path, self.space, self.pools = path, space, pools
        self.pool_size = pools.size
        self._rows, self._arrays = rows, arrays
        self._chosen = None if chosen is None else torch.from_numpy(chosen)
        n_rows = len(rows) if chosen is None else len(chosen)
        # a target is a candidate of a pool, so only batches know it; one number stands for all rows
        self.target = torch.tensor(UNKNOWN).expand(n_rows)

    def picture_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm image embeddings.

        Raises:
            IndexError: If an index is not in 0 ... N-1.
        """
        return self._take(self._arrays[0], index)

    def caption_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 unit-norm caption embeddings.

        Raises:
            IndexError: If an index is not in 0 ... N-1.
        """
        return self._take(self._arrays[1], index)

    @cached_property
    def usable_rows(self) -> Tensor:
        """(M,) positions of the usable rows that fill pools, in the order of the pools.

        Raises:
            DataError: If they do not fill one pool.
        """
        usable = self.pair_rows
        require_full_pools(len(usable), self.pools.size, str(self.path))
        return self._order(usable)

    @property
    def pair_rows(self) -> Tensor:
        """(M,) positions of the usable rows, ascending."""
        return torch.from_numpy(np.flatnonzero(self._row_status == VALID))

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """(N,) status of the rows; it takes the order of the pools to know it."""
        status = np.where(self._row_status == VALID, np.uint8(SHORT_POOL), self._row_status)
        status[self.usable_rows.numpy()] = VALID
        return status

    @cached_property
    def _row_status(self) -> NDArray[np.uint8]:
        """(N,) status of the embeddings themselves."""
        return np.broadcast_to(np.uint8(VALID), len(self))

    def _take(self, name: str, index: Tensor) -> Tensor:
        return self._rows.take(name, index if self._chosen is None else self._chosen[index])


class CaptionStore(MappedPairs):
    """The sealed store of images with captions, the same to every predictor as ``PairEmbeddings`` in memory.

    Everything but the bytes of the vectors is checked on opening: documents, sizes, shapes, numbers of rows.

    Args:
        path: The folder that ``vilu embed`` wrote.
        pools: What is matched against what.
        fold: Only the rows whose caption is in this fold ("train", "validation" or "test", ``folds.fold_of``); None
            for all.

    Attributes:
        path: The folder.
        manifest: What made it.

    Raises:
        DataError: If the folder is no store, one that is not complete, or one of classes.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.
        UsageError: If the fold is unknown.
    """

    def __init__(self, path: str | os.PathLike[str], pools: Pools | None = None, fold: Fold | None = None) -> None:
        sealed = Sealed(Path(path))
        self.manifest = sealed.manifest
        if not self.manifest.captions:
            raise DataError(f"{path} has classes and no captions. Open it with vilu.EmbeddingStore.")
        sealed.require_seal(not self.manifest.classes)
        chosen = None if fold is None else _rows_of_fold(sealed, fold)
        arrays = (IMAGE, CAPTION)
        super().__init__(sealed.path, sealed.rows, arrays, self.manifest.space, pools or Pools(), chosen)
        # of the pictures: to a caption that asks for its picture they would tell which one it is
        kept = frozenset(self.manifest.arrays) - {IMAGE, CAPTION}
        self.columns = kept if self.pools.direction == "image_to_text" else frozenset()
        self.ids = sealed.keys(chosen)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name`` of the images: rows of it, gathered from the parts."""
        return self._take(name, index) if name in self.columns else super().column(name, index)


def _rows_of_fold(sealed: Sealed, fold: Fold) -> NDArray[np.int64]:
    check_fold(fold)
    counts = np.diff(sealed.rows.starts)
    blocks = (
        block
        for part, n_rows in zip(sealed.parts, counts, strict=True)
        for block in read_captions(sealed.path / part.metadata, ("caption",), int(n_rows))
    )
    return rows_of_fold(blocks, fold, len(sealed.rows))
