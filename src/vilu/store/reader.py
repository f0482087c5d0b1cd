"""An embedding store as a source of embeddings, memory-mapped: opening it reads no vector."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import check_columns
from vilu.errors import DataError, StorageError
from vilu.store.content import column_path, map_rows, read_classes
from vilu.store.manifest import IMAGE, ClassColumn, ClassTable
from vilu.store.mapped import MappedSource
from vilu.store.parts import Part
from vilu.store.sealed import Sealed
from vilu.types import UNKNOWN, Candidates


class EmbeddingStore(MappedSource):
    """A sealed store, the same to every predictor as ``Embeddings`` in memory.

    Everything but the bytes of the vectors is checked on opening: documents, sizes, shapes, numbers of rows, labels.

    Args:
        path: The folder that ``vilu embed`` wrote.

    Attributes:
        path: The folder.
        manifest: What made it.
        text: (K, D) float32 unit-norm class texts.

    Raises:
        DataError: If the folder is no store, one that is not complete, or one of captions.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.
    """

    pool_size: int | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sealed = Sealed(self.path)
        self.manifest = self._sealed.manifest
        if self.manifest.captions:
            raise DataError(f"{path} has captions and no classes. Open it with vilu.open_source, which takes both.")
        self.space = self.manifest.space
        self.class_names = self.manifest.names
        self._classes, self.text = read_classes(self.path, self.manifest)
        self._sealed.require_seal(self._classes.hash == self.manifest.classes)
        self._class_column = cache(partial(_read_class_column, self.path, self._classes))
        self.columns = frozenset(self.manifest.arrays) - {IMAGE} | frozenset(self._classes.columns)
        targets = map(self._read_targets, self._sealed.parts)
        self.target = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *targets]))
        self.ids = self._sealed.keys()

    @property
    def n_candidates(self) -> int:
        """K."""
        return len(self.text)

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 rows, gathered from the parts that hold them.

        Raises:
            IndexError: If an index is not in 0 ... N-1.
        """
        return self._sealed.rows.take(IMAGE, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name``: rows of it, gathered from the parts, where it is of the images."""
        if name not in self.columns:
            return super().column(name, index)
        return self._sealed.rows.take(name, index) if name in self.manifest.arrays else self._class_column(name)

    def candidates(self, index: Tensor) -> Candidates:
        """The same (K, D) texts for every batch, and the targets of the rows."""
        return Candidates(self.text, self.target[index])

    def _read_targets(self, part: Part) -> NDArray[np.int64]:
        labels: pa.Array = self._sealed.metadata("label", part.number)
        target = np.asarray(labels.fill_null(UNKNOWN), dtype=np.int64)
        if len(target) and not (target.min() >= UNKNOWN and target.max() < self.n_candidates):
            raise StorageError(
                f"{self.path / part.metadata} has labels from {target.min()} to {target.max()}, "
                f"there are {self.n_candidates} classes. Run `vilu embed` again to redo the part."
            )
        return target


def _read_class_column(root: Path, classes: ClassTable, name: ClassColumn) -> Tensor:
    values = map_rows(column_path(root, name), classes.columns[name].shape, "float32")
    return check_columns({name: values}, 0, len(classes.names))[name]
