"""Embeddings on disk as a source: a sealed store, or what another tool wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import MANIFEST, RUN
from vilu.artifacts.documents import read_document
from vilu.artifacts.hashing import digest
from vilu.device import torch_defaults
from vilu.embeddings.checks import HASH_BYTES, Identity, hash_names, hash_of_each
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import TEXT_COLUMNS
from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import OUTSIDE, UNKNOWN, DataError, ProvenanceError, StorageError, UsageError
from vilu.store.folds import Fold, rows_of_fold
from vilu.store.laion import LaionPairs, find_shards
from vilu.store.ledger import Reopened, Vouched, content_hash
from vilu.store.manifest import CAPTION, IMAGE, ClassColumn, Manifest, Run, StoredClasses
from vilu.store.mapped import ChosenNumbers, MappedPairs, MappedParts, MappedSource, PartStrings
from vilu.store.parts import (
    ERRORS,
    REDO,
    Part,
    StoreLedger,
    column_path,
    map_rows,
    metadata_schema,
    read_classes,
    read_columns,
)
from vilu.validation import checked


@checked
@torch_defaults()
def open_source(
    path: str | os.PathLike[str],
    *,
    pools: Pools | None = None,
    fold: Fold | None = None,
    logit_scale: float | None = None,
) -> EmbeddingSource:
    """A store of classes or of captions, or another tool's embeddings of image-caption pairs.

    Args:
        path: A folder that ``vilu embed`` wrote, or one in a layout of ``LaionPairs``.
        pools: What captions are matched against; by default pools of 1024.
        fold: Only the pairs whose caption is in this fold: "train", "validation" or "test".
        logit_scale: Multiplier of the cosine, where the folder does not know it.

    Raises:
        UsageError: If an argument is given that the data do not take, or the logit scale is
            missing.
        DataError: If the folder is none of these, or not complete.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> arrays = {
        ...     "image": np.eye(3),
        ...     "text": np.eye(3),
        ...     "target": [0, 1, 1],
        ...     "class_names": ["cat", "dog", "cup"],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/a.npz", **arrays)
        ...     _ = vilu.import_arrays(
        ...         f"{folder}/a.npz", f"{folder}/store", logit_scale=100, logit_bias=0
        ...     )
        ...     source = vilu.open_source(
        ...         f"{folder}/store"
        ...     )  # of classes, of captions, or what another tool wrote
        ...     print(source.class_names, vilu.score(vilu.MCM(), source).failure.tolist())
        ('cat', 'dog', 'cup') [0, 0, 1]
    """
    root = Path(path)
    if not (root / RUN).is_file():
        if logit_scale is None:
            find_shards(root)  # a folder of another kind is told so first
            raise UsageError(
                f"{root} does not say which model made it. Give logit_scale, the multiplier of its "
                "cosines: 100 for OpenAI's CLIP, for others the exponential of the learned "
                "parameter."
            )
        return LaionPairs(root, pools, logit_scale=logit_scale, fold=fold)
    if logit_scale is not None:
        raise UsageError(
            f"{root} is a store, which knows the logit scale of its model. Leave logit_scale out."
        )
    if read_document(root / RUN, Run).captions:
        return CaptionStore(root, pools, fold)
    if pools is not None or fold is not None:
        raise UsageError(
            f"{root} is a store of classes: there are no captions for pools or folds. Leave them "
            "out."
        )
    return EmbeddingStore(root)


class Sealed(Reopened):
    """Everything of a complete store but its classes.

    Documents, sizes, shapes and numbers of rows are checked. The bytes of a file are compared with
    its receipt when it is first read (``files``).
    """

    def __init__(self, path: Path) -> None:
        StoreLedger.require_sealed(path)
        self.path = path
        self.manifest = read_document(path / MANIFEST, Manifest)
        self.seal = digest(self.manifest.model_dump(mode="json"))
        ledger = StoreLedger(path, self.manifest)
        self.parts = ledger.parts
        receipts = ledger.receipts()
        self.require_seal(content_hash(receipts) == self.manifest.content)
        for count in ("n_in", "n_ok", "n_error"):
            of_parts = sum(getattr(receipt, count) for receipt in receipts)
            self.require_seal(of_parts == getattr(self.manifest, count))
        self.files = Vouched(path, receipts)
        self.n_errors = [receipt.n_error for receipt in receipts]
        starts = np.cumsum([0, *(receipt.n_ok for receipt in receipts)], dtype=np.int64)
        self.rows = MappedParts(
            starts, self.manifest.arrays, partial(_map_part, ledger, starts, self.files)
        )
        # headers alone: no bytes are hashed until a row of the part is asked for
        for part in self.parts:
            for name in part.arrays:
                _map_part(ledger, starts, path.joinpath, name, part.number)

    @property
    def named(self) -> bool:
        """Whether rows have identifiers of their own."""
        return self.manifest.imported is None or self.manifest.imported.ids

    def require_seal(self, whole: bool) -> None:
        """Refuse what the manifest does not vouch for."""
        if not whole:
            raise ProvenanceError(
                f"{self.path / MANIFEST} seals other parts or classes than the folder holds. Make "
                "it again."
            )

    def metadata(self, name: str, number: int) -> pa.Array:
        """A column of the metadata of a part."""
        n_rows = int(self.rows.starts[number + 1] - self.rows.starts[number])
        path = self.files(self.parts[number].metadata)
        table = read_columns(path, metadata_schema(self.manifest), [name], n_rows)
        return table[name].combine_chunks()

    def keys(self, rows: NDArray[np.int64] | None = None) -> PartStrings:
        """Keys of some rows, ascending, by default of all."""
        return PartStrings(self.rows.starts, partial(self.metadata, "key"), rows)

    def identities(
        self, by: Identity, rows: NDArray[np.int64], *, captions: bool = True
    ) -> NDArray[np.uint64]:
        """(M,) hashes of keys, or of pictures (and captions), each part of the rows read once."""
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows, self.rows.starts, sorter=order)
        hashes = np.empty(len(rows), np.uint64)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            of_part = order[bounds[number] : bounds[number + 1]]
            inside = pa.array(rows[of_part] - self.rows.starts[number])
            hashes[of_part] = self._hashes(by, number, inside, captions=captions)
        return hashes

    def _hashes(
        self, by: Identity, number: int, rows: pa.Array, *, captions: bool
    ) -> NDArray[np.uint64]:
        if by == "names":
            return hash_names(self.metadata("key", number).take(rows).to_pylist())
        pictures: list[bytes] = self.metadata("picture", number).take(rows).to_pylist()
        if not self.manifest.captions or not captions:
            return np.frombuffer(
                b"".join(picture[:HASH_BYTES] for picture in pictures), "<u8"
            ).astype(np.uint64)
        texts: list[str] = self.metadata("caption", number).take(rows).to_pylist()
        return hash_of_each(
            picture + text.encode() for picture, text in zip(pictures, texts, strict=True)
        )


def _map_part(
    ledger: StoreLedger,
    starts: NDArray[np.int64],
    find: Callable[[str], Path],
    name: str,
    number: int,
) -> NDArray[np.floating]:
    shape = (int(starts[number + 1] - starts[number]), *ledger.run.arrays[name])
    return map_rows(find(ledger.parts[number].array(name)), shape, ledger.run.dtype)


class StoredRows(EmbeddingSource):
    """Rows of a store, whose metadata say what they are recognised by.

    They are those ``_chosen``, by default all.
    """

    _sealed: Sealed
    _chosen: Tensor | None = None

    @property
    def identified_by(self) -> tuple[Identity, ...]:
        """Pictures (with captions), else names; of what was imported, embeddings.

        Imported rows are recognised by names too, if they have any.
        """
        if self._sealed.manifest.imported is not None:
            return ("embeddings", "names") if self._sealed.named else ("embeddings",)
        return ("pictures", "names")

    def identities(self, by: Identity, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """As every source's."""
        if by == "embeddings":
            return super().identities(by, rows)
        index = np.arange(len(self)) if rows is None else rows
        return self._sealed.identities(by, self._stored(index))

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        if "pictures" not in self.identified_by:
            return super()._picture_hashes(rows)
        return self._sealed.identities("pictures", self._stored(rows), captions=False)

    def _stored(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(M,) indices in the store of the rows (M,)."""
        return rows if self._chosen is None else self._chosen.numpy()[rows]


class EmbeddingStore(Reopened, StoredRows, MappedSource):
    """A sealed store, the same to every predictor as ``Embeddings`` in memory.

    Everything but the bytes of the vectors is checked on opening: documents, sizes, shapes, numbers
    of rows, labels. The bytes of a part are compared with the SHA-256 in its receipt when a row of
    it is first read in this process. What happens to a file after that, while it is open, is not
    seen. Pickled, a store is its path: it is opened again where it arrives, and refused there
    (ProvenanceError) if it has changed.

    Args:
        path: The folder that ``vilu embed`` wrote.

    Attributes:
        path: The folder.
        manifest: What made it.
        text: (K, D) float32 unit-norm texts of the candidates; classes with equal texts are one
            (``Embeddings``).

    Raises:
        DataError: If the folder is no store, one that is not complete, or one of captions.
        StorageError: If a file is missing or damaged; the message names it.
        ProvenanceError: If files do not belong together, or another schema wrote them.

    Examples:
        >>> import numpy as np, tempfile, torch, vilu
        >>> image = np.vstack([np.eye(2), np.zeros((1, 2))])  # the last row says nothing
        >>> arrays = {
        ...     "image": image,
        ...     "text": np.eye(2),
        ...     "class_names": ["cat", "dog"],
        ...     "ids": ["a", "b", "c"],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/a.npz", **arrays, logit_scale=100.0, logit_bias=0.0)
        ...     _ = vilu.import_arrays(f"{folder}/a.npz", f"{folder}/store", max_error_rate=0.5)
        ...     store = vilu.EmbeddingStore(f"{folder}/store")
        ...     print(
        ...         list(store.ids),
        ...         store.image_rows(torch.tensor([1])).tolist(),
        ...         list(store.bad_images()),
        ...     )
        ['a', 'b'] [[0.0, 1.0]] [('c', 'zero_norm')]
    """

    @checked
    @torch_defaults()
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sealed = Sealed(self.path)
        self.manifest = self._sealed.manifest
        self.seal = self._sealed.seal
        if self.manifest.captions:
            raise DataError(
                f"{path} has captions and no classes. Open it with vilu.open_source, which takes "
                "both."
            )
        self.space = self.manifest.space
        self.class_names = self.manifest.names
        self._classes, self.text = read_classes(self.path, self.manifest)
        self._sealed.require_seal(self._classes.hash == self.manifest.classes)
        self._class_column = cache(partial(_read_class_column, self.path, self._classes))
        of_images = frozenset(self.manifest.arrays) - {IMAGE}
        self.columns = of_images | frozenset(self._classes.columns)
        targets = map(self._read_targets, self._sealed.parts)
        labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *targets]))
        self.target = labels.clamp(min=UNKNOWN)
        self.outside = labels == OUTSIDE
        self.ids = self._sealed.keys() if self._sealed.named else ChosenNumbers(self._sealed.keys())
        self._kept = self._merge_same()

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 rows, gathered from the parts that hold them."""
        return self._sealed.rows.take(IMAGE, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name``: rows of it, gathered from the parts, where it is of the images."""
        if name not in self.columns:
            return super().column(name, index)
        if name in self.manifest.arrays:
            return self._sealed.rows.take(name, index)
        values = self._class_column(name)
        if self._kept is None or name not in TEXT_COLUMNS:
            return values
        # classes with equal texts are one
        return values[self._kept]

    def bad_images(self) -> Iterator[tuple[str, str]]:
        """Key of every image without a row, and what was wrong with it ("truncated", ...)."""
        for part, n_error in zip(self._sealed.parts, self._sealed.n_errors, strict=True):
            if n_error:
                path = self._sealed.files(part.errors)
                table = read_columns(path, ERRORS, ["key", "kind"], n_error)
                yield from zip(table["key"].to_pylist(), table["kind"].to_pylist(), strict=True)

    def _read_targets(self, part: Part) -> NDArray[np.int64]:
        labels: pa.Array = self._sealed.metadata("label", part.number)
        target = np.asarray(labels.fill_null(UNKNOWN), dtype=np.int64)
        if not len(target):
            return target
        if target.min() < OUTSIDE or target.max() >= self.n_candidates:
            raise StorageError(
                f"{self.path / part.metadata} has labels from {target.min()} to {target.max()}, "
                f"there are {self.n_candidates} classes. {REDO}"
            )
        return target


def _read_class_column(root: Path, classes: StoredClasses, name: ClassColumn) -> Tensor:
    values = map_rows(column_path(root, name), classes.columns[name].shape, "float32")
    return check_columns({name: values}, 0, len(classes.names))[name]


class CaptionStore(Reopened, StoredRows, MappedPairs):
    """The sealed store of images with captions.

    To every predictor it is the same as ``PairEmbeddings`` in memory. What is checked when, what a
    pickled one is, and the errors are as of ``EmbeddingStore``; here a DataError is one of classes.

    Args:
        path: The folder that ``vilu embed`` wrote.
        pools: What is matched against what.
        fold: Only the rows whose caption is in this fold (``folds.fold_of``); None for all.
    """

    @checked
    @torch_defaults()
    def __init__(
        self, path: str | os.PathLike[str], pools: Pools | None = None, fold: Fold | None = None
    ) -> None:
        sealed = Sealed(Path(path))
        self.manifest = sealed.manifest
        self.seal = sealed.seal
        self.options = {"pools": pools, "fold": fold}
        if not self.manifest.captions:
            raise DataError(
                f"{path} has classes and no captions. Open it with vilu.EmbeddingStore."
            )
        sealed.require_seal(not self.manifest.classes)
        chosen = None if fold is None else _rows_of_fold(sealed, fold)
        super().__init__(
            sealed.path,
            sealed.rows,
            (IMAGE, CAPTION),
            self.manifest.space,
            pools or Pools(),
            chosen,
        )
        self.columns = frozenset()
        if self.pools.direction == "image_to_text":
            # of the pictures: to a caption that asks for its picture they would tell which it is
            self.columns = frozenset(self.manifest.arrays) - {IMAGE, CAPTION}
        self.ids = sealed.keys(chosen)
        self._sealed = sealed

    def column(self, name: str, index: Tensor) -> Tensor:
        """Column ``name`` of the images: rows of it, gathered from the parts."""
        if name not in self.columns:
            return super().column(name, index)
        return self._take(name, index)


def _rows_of_fold(sealed: Sealed, fold: Fold) -> NDArray[np.int64]:
    """(M,) ascending numbers of the rows whose caption is in a fold."""
    counts = np.diff(sealed.rows.starts).tolist()
    parts = zip(sealed.parts, counts, strict=True)
    files = ((sealed.files(part.metadata), n_rows) for part, n_rows in parts)
    return rows_of_fold(files, ("caption",), fold, len(sealed.rows))
