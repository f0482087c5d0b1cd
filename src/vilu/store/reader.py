"""An embedding store as a source of embeddings, memory-mapped: opening it reads no vector."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import check_columns
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.store.content import METADATA, column_path, map_rows, read_classes, read_columns
from vilu.store.document import read_document
from vilu.store.manifest import IMAGE, MANIFEST, RUN, ClassColumn, ClassTable, Manifest
from vilu.store.parts import Part, content_hash, plan, read_receipt
from vilu.types import UNKNOWN, Candidates, EmbeddingSource
from vilu.validate import VALID

OPEN_PARTS = 256
"""Parts kept mapped at a time; each takes a file descriptor, of which a process often has 1024."""


class EmbeddingStore(EmbeddingSource):
    """A sealed store, the same to every predictor as ``Embeddings`` in memory.

    Everything but the bytes of the vectors is checked on opening: documents, sizes, shapes, numbers of rows, labels.

    Args:
        path: The folder that ``vilu embed`` wrote.

    Attributes:
        path: The folder.
        manifest: What made it.
        text: (K, D) float32 unit-norm class texts.

    Raises:
        DataError: If the folder is no store, or one that is not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.
    """

    pool_size: int | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest = _read_sealed(self.path)
        self.space = self.manifest.space
        self.class_names = self.manifest.names
        self._classes, self.text = read_classes(self.path, self.manifest)
        self._parts = plan(self.manifest)
        receipts = [read_receipt(self.path, self.manifest, part) for part in self._parts]
        if (self._classes.hash, content_hash(receipts)) != (self.manifest.classes, self.manifest.content):
            raise ProvenanceError(
                f"{self.path / MANIFEST} seals other parts or classes than the folder holds. Run `vilu embed` again."
            )
        self._starts = np.cumsum([0, *(receipt.n_ok for receipt in receipts)])
        self._rows = lru_cache(OPEN_PARTS)(partial(_map_part, self.path, self.manifest, self._parts, self._starts))
        self._class_column = cache(partial(_read_class_column, self.path, self._classes))
        self.columns = frozenset(self.manifest.arrays) - {IMAGE} | frozenset(self._classes.columns)
        self.target = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *map(self._open_part, self._parts)]))
        self.status = np.full(len(self.target), VALID, dtype=np.uint8)  # the writer keeps unusable rows out
        self.ids = StoreIds(self.path, self._parts, self._starts)

    @property
    def n_candidates(self) -> int:
        """K."""
        return len(self.text)

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 rows, gathered from the parts that hold them.

        Raises:
            IndexError: If an index is not in 0 ... N-1.
        """
        return self._gather(IMAGE, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name``: rows of it, gathered from the parts, where it is of the images."""
        if name not in self.columns:
            return super().column(name, index)
        return self._gather(name, index) if name in self.manifest.arrays else self._class_column(name)

    def _gather(self, name: str, index: Tensor) -> Tensor:
        wanted = index.numpy()
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows must be from 0 to {len(self) - 1}. Got {wanted.min()} to {wanted.max()}.")
        rows = np.empty((len(wanted), *self.manifest.arrays[name]), dtype=np.float32)
        order = np.argsort(wanted, kind="stable")
        bounds = np.searchsorted(wanted, self._starts, sorter=order)
        for number in np.flatnonzero(np.diff(bounds)):
            places = order[bounds[number] : bounds[number + 1]]
            rows[places] = self._rows(name, int(number))[wanted[places] - self._starts[number]]
        return torch.from_numpy(rows)

    def candidates(self, index: Tensor) -> Candidates:
        """The same (K, D) texts for every batch, and the targets of the rows."""
        return Candidates(self.text, self.target[index])

    def _open_part(self, part: Part) -> NDArray[np.int64]:
        """Targets of a part, with its arrays checked for shape."""
        n_ok = min(len(self._rows(name, part.number)) for name in part.arrays)
        labels = read_columns(self.path / part.metadata, METADATA, ["label"], n_ok)["label"]
        target = np.asarray(labels.fill_null(UNKNOWN), dtype=np.int64)
        if n_ok and not (target.min() >= UNKNOWN and target.max() < self.n_candidates):
            raise StorageError(
                f"{self.path / part.metadata} has labels from {target.min()} to {target.max()}, "
                f"there are {self.n_candidates} classes. Run `vilu embed` again to redo the part."
            )
        return target


class StoreIds(Sequence[str]):
    """Keys of the rows, read part by part when asked for."""

    def __init__(self, root: Path, parts: Sequence[Part], starts: NDArray[np.int64]) -> None:
        self._parts, self._starts = parts, starts
        self._keys = lru_cache(16)(partial(_read_keys, root, parts, starts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        part = int(np.searchsorted(self._starts, rows, side="right")) - 1
        return self._keys(part)[rows - int(self._starts[part])]

    def __iter__(self) -> Iterator[str]:
        for part in range(len(self._parts)):
            yield from self._keys(part)


def _map_part(
    root: Path, manifest: Manifest, parts: Sequence[Part], starts: NDArray[np.int64], name: str, number: int
) -> NDArray[np.floating]:
    shape = (int(starts[number + 1] - starts[number]), *manifest.arrays[name])
    return map_rows(root / parts[number].array(name), shape, manifest.dtype)


def _read_class_column(root: Path, classes: ClassTable, name: ClassColumn) -> Tensor:
    values = map_rows(column_path(root, name), classes.columns[name].shape, "float32")
    return check_columns({name: values}, 0, len(classes.names))[name]


def _read_keys(root: Path, parts: Sequence[Part], starts: NDArray[np.int64], number: int) -> list[str]:
    n_rows = int(starts[number + 1] - starts[number])
    return list(read_columns(root / parts[number].metadata, METADATA, ["key"], n_rows)["key"].to_pylist())


def _read_sealed(root: Path) -> Manifest:
    if not (root / RUN).is_file():
        raise DataError(f"{root} is no embedding store (it has no {RUN}). Make one with `vilu embed`.")
    if not (root / MANIFEST).is_file():
        raise DataError(
            f"{root} is not complete. Run the same `vilu embed` command again: it goes on where it stopped."
        )
    return read_document(root / MANIFEST, Manifest)
