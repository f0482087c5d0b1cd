"""The parts of a sealed store, checked and memory-mapped: what class and caption stores have in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vilu.errors import DataError, ProvenanceError
from vilu.store.content import METADATA, map_rows, read_columns
from vilu.store.document import read_document
from vilu.store.manifest import MANIFEST, RUN, Manifest
from vilu.store.mapped import MappedParts, PartStrings
from vilu.store.parts import Part, content_hash, plan, read_receipt


class Sealed:
    """Everything of a complete store but its classes; documents, sizes, shapes and numbers of rows are checked.

    Args:
        path: The folder that ``vilu embed`` wrote.

    Attributes:
        path: The folder.
        manifest: What made it.
        parts: Its parts.
        rows: Their rows, by the name of the array.

    Raises:
        DataError: If the folder is no store, or one that is not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.manifest = path, _read_sealed(path)
        self.parts = plan(self.manifest)
        receipts = [read_receipt(path, self.manifest, part) for part in self.parts]
        self.require_seal(content_hash(receipts) == self.manifest.content)
        starts = np.cumsum([0, *(receipt.n_ok for receipt in receipts)], dtype=np.int64)
        arrays = self.manifest.arrays
        self.rows = MappedParts(starts, arrays, partial(_map_part, path, self.manifest, self.parts, starts))
        for part in self.parts:
            for name in part.arrays:
                self.rows.part(name, part.number)

    def require_seal(self, whole: bool) -> None:
        """Refuse what the manifest does not vouch for.

        Raises:
            ProvenanceError: If it does not.
        """
        if not whole:
            raise ProvenanceError(
                f"{self.path / MANIFEST} seals other parts or classes than the folder holds. Run `vilu embed` again."
            )

    def metadata(self, name: str, number: int) -> pa.Array:
        """A column of the metadata of a part.

        Raises:
            StorageError: If the file is damaged.
        """
        n_rows = int(self.rows.starts[number + 1] - self.rows.starts[number])
        path = self.path / self.parts[number].metadata
        return read_columns(path, METADATA, [name], n_rows)[name].combine_chunks()

    def keys(self, rows: NDArray[np.int64] | None = None) -> PartStrings:
        """Keys of some rows, ascending, by default of all."""
        return PartStrings(self.rows.starts, partial(self.metadata, "key"), rows)


def _map_part(
    root: Path, manifest: Manifest, parts: list[Part], starts: NDArray[np.int64], name: str, number: int
) -> NDArray[np.floating]:
    shape = (int(starts[number + 1] - starts[number]), *manifest.arrays[name])
    return map_rows(root / parts[number].array(name), shape, manifest.dtype)


def _read_sealed(root: Path) -> Manifest:
    if not (root / RUN).is_file():
        raise DataError(f"{root} is no embedding store (it has no {RUN}). Make one with `vilu embed`.")
    if not (root / MANIFEST).is_file():
        raise DataError(
            f"{root} is not complete. Run the same `vilu embed` command again: it goes on where it stopped."
        )
    return read_document(root / MANIFEST, Manifest)
