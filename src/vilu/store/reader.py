"""Open embeddings on disk: a sealed store, or embeddings from another tool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import MANIFEST_FILE, RUN_FILE
from vilu.artifacts.documents import read_document
from vilu.artifacts.hashing import digest
from vilu.device import torch_defaults
from vilu.embeddings.checks import HASH_BYTES, IdentityKind, hash_items, hash_names
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import ANSWER, TEXT_COLUMNS
from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import OUTSIDE, UNKNOWN, DataError, ProvenanceError, StorageError, UsageError
from vilu.store.folds import Fold, rows_of_fold
from vilu.store.laion import LaionPairs, find_shards
from vilu.store.ledger import FileVerifier, PickledByPath, content_hash, has_file
from vilu.store.manifest import CAPTION, IMAGE, ClassColumn, Manifest, Run, StoredClasses
from vilu.store.mapped import (
    ListedNumbers,
    MappedArrays,
    MappedPairs,
    MappedSource,
    StoredIdentifiers,
)
from vilu.store.parts import (
    ERROR_SCHEMA,
    REDO_HINT,
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
    """Open a store with classes or captions, or another tool's embeddings of pairs.

    Args:
        path: A folder written by ``vilu embed``, or a folder in a layout of ``LaionPairs``.
        pools: How pairs are grouped into pools. Captions and images are matched within a pool. By
            default a pool has 1024 pairs.
        fold: "train", "validation" or "test". Only pairs with a caption in this fold are used.
            None: all pairs.
        logit_scale: Multiplier of the cosine. Required for embeddings from another tool. Must be
            None for a store, because a store has its model's logit scale.

    Raises:
        UsageError: If an argument does not fit the data, or the logit scale is missing.
        DataError: If the folder has another layout, or is not complete.
        StorageError: If a file is missing or damaged. The message names the file.
        ProvenanceError: If files do not belong together.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> arrays = {"image": np.eye(2), "text": np.eye(2), "class_names": ["cat", "dog"]}
        >>> scale = {"logit_scale": 100, "logit_bias": 0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/arrays.npz", **arrays)
        ...     _ = vilu.import_arrays(f"{folder}/arrays.npz", f"{folder}/store", **scale)
        ...     source = vilu.open_source(f"{folder}/store")
        >>> source.class_names
        ('cat', 'dog')
    """
    root = Path(path)
    if not has_file(root / RUN_FILE):
        if logit_scale is None:
            find_shards(root)  # raises DataError if the folder has no known layout
            raise UsageError(
                f"{root} does not say which model made it. Give logit_scale, the multiplier of its "
                "cosines: 100 for OpenAI's CLIP, for others the exponential of the learned "
                "parameter."
            )
        return LaionPairs(root, pools, logit_scale=logit_scale, fold=fold)
    if logit_scale is not None:
        raise UsageError(
            f"{root} is a store, which has the logit scale of its model. Leave logit_scale out."
        )
    if read_document(root / RUN_FILE, Run).captions:
        return CaptionStore(root, pools, fold)
    if pools is not None or fold is not None:
        raise UsageError(
            f"{root} is a store of classes: there are no captions for pools or folds. Leave them "
            "out."
        )
    return EmbeddingStore(root)


class SealedStore(PickledByPath):
    """A complete store's documents and parts, without the classes.

    The constructor checks documents, sizes, shapes and row counts. ``verify_file`` returns a file's
    path. The first time, it compares the file's hash with the receipt.
    """

    def __init__(self, path: Path) -> None:
        StoreLedger.require_sealed(path)
        self.path = path
        self.manifest = read_document(path / MANIFEST_FILE, Manifest)
        manifest_fields = self.manifest.model_dump(mode="json")
        self.folder_hash = digest(manifest_fields)
        ledger = StoreLedger(path, self.manifest)
        self.parts = ledger.parts
        receipts = ledger.receipts()
        hash_of_receipts = content_hash(receipts)
        self.require_agreement(hash_of_receipts == self.manifest.content)
        for count_name in ("n_in", "n_ok", "n_error"):
            sum_of_parts = sum(getattr(receipt, count_name) for receipt in receipts)
            self.require_agreement(sum_of_parts == getattr(self.manifest, count_name))
        self.verify_file = FileVerifier(path, receipts)
        self.n_errors_of_parts = [receipt.n_error for receipt in receipts]
        n_rows_of_parts = [receipt.n_ok for receipt in receipts]
        part_starts = np.cumsum([0, *n_rows_of_parts], dtype=np.int64)
        map_part = partial(_map_part, ledger, part_starts)
        open_part = partial(map_part, self.verify_file)
        self.mapped_arrays = MappedArrays(part_starts, self.manifest.row_shapes, open_part)
        # Every array is mapped once, to check the header. Here ``path.joinpath`` finds the file,
        # because ``verify_file`` would also hash the file. It is hashed later, when one of its rows
        # is first read.
        for part in self.parts:
            for name in part.array_names:
                map_part(path.joinpath, name, part.number)

    @property
    def has_identifiers(self) -> bool:
        """Whether rows have identifiers. Imported rows may have only row numbers."""
        return self.manifest.imported is None or self.manifest.imported.ids

    def require_agreement(self, agrees: bool) -> None:
        """Raise ProvenanceError if the manifest does not fit the folder (``agrees`` is False)."""
        if not agrees:
            raise ProvenanceError(
                f"{self.path / MANIFEST_FILE} seals other parts or classes than the folder holds. "
                "Make it again."
            )

    def metadata_column(self, column_name: str, part_number: int) -> pa.Array:
        """Return the metadata column ``column_name`` for part ``part_number``."""
        part_starts = self.mapped_arrays.part_starts
        n_rows = int(part_starts[part_number + 1] - part_starts[part_number])
        path = self.verify_file(self.parts[part_number].metadata_file)
        schema = metadata_schema(self.manifest)
        table = read_columns(path, schema, [column_name], n_rows)
        return table[column_name].combine_chunks()

    def keys(self, rows: NDArray[np.int64] | None = None) -> StoredIdentifiers:
        """Return the keys of ``rows`` (ascending indices). By default, return all keys."""
        read_keys = partial(self.metadata_column, "key")
        return StoredIdentifiers(self.mapped_arrays.part_starts, read_keys, rows)

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64], *, with_captions: bool = True
    ) -> NDArray[np.uint64]:
        """Return hashes (M,) of some rows' keys, or of the rows' pictures and captions.

        Each part is read once.

        Args:
            by: "names" to hash the keys, "pictures" to hash the pictures and captions.
            rows: (M,) row numbers in the store.
            with_captions: Whether captions, if any, are hashed with the pictures.
        """
        # In sorted order, a part's rows stand together. Part p's rows are at the positions
        # ``sorting_order[part_bounds[p] : part_bounds[p + 1]]`` in ``rows``.
        sorting_order = np.argsort(rows, kind="stable")
        part_bounds = np.searchsorted(rows, self.mapped_arrays.part_starts, sorter=sorting_order)
        n_rows_of_parts = np.diff(part_bounds)
        used_part_numbers = np.flatnonzero(n_rows_of_parts)
        hashes = np.empty(len(rows), np.uint64)
        for part_number in used_part_numbers.tolist():
            positions = sorting_order[part_bounds[part_number] : part_bounds[part_number + 1]]
            first_row = self.mapped_arrays.part_starts[part_number]
            rows_in_part = rows[positions] - first_row
            hashes[positions] = self._hashes_in_part(
                by, part_number, rows_in_part, with_captions=with_captions
            )
        return hashes

    def _hashes_in_part(
        self,
        by: IdentityKind,
        part_number: int,
        rows_in_part: NDArray[np.int64],
        *,
        with_captions: bool,
    ) -> NDArray[np.uint64]:
        """Return hashes (m,) like ``identities``, for rows in a single part.

        Args:
            by: As for ``identities``.
            part_number: Number of the part.
            rows_in_part: (m,) row numbers, counted from the part's first row.
            with_captions: As for ``identities``.
        """
        if by == "names":
            keys = self._read_cells("key", part_number, rows_in_part)
            return hash_names(keys)
        pictures: list[bytes] = self._read_cells("picture", part_number, rows_in_part)
        has_captions = self.manifest.captions and with_captions
        if not has_captions:
            # the column "picture" already has hashes, and only their first bytes are used
            first_bytes = b"".join(picture[:HASH_BYTES] for picture in pictures)
            return np.frombuffer(first_bytes, "<u8").astype(np.uint64)
        texts: list[str] = self._read_cells("caption", part_number, rows_in_part)
        return hash_items(
            picture + text.encode() for picture, text in zip(pictures, texts, strict=True)
        )

    def _read_cells(
        self, column_name: str, part_number: int, rows_in_part: NDArray[np.int64]
    ) -> list[Any]:
        """Return the cells (m,) of a metadata column, for rows in a single part."""
        column = self.metadata_column(column_name, part_number)
        indices = pa.array(rows_in_part)
        cells: list[Any] = column.take(indices).to_pylist()
        return cells


def _map_part(
    ledger: StoreLedger,
    part_starts: NDArray[np.int64],
    find_file: Callable[[str], Path],
    array_name: str,
    part_number: int,
) -> NDArray[np.floating]:
    """Map array ``array_name`` of part ``part_number`` into memory.

    Args:
        ledger: The store's folder.
        part_starts: (P + 1,) first row number in each of the P parts, and the row count.
        find_file: Function that takes a file name and returns the path.
        array_name: Name of the array.
        part_number: Number of the part.
    """
    n_rows = int(part_starts[part_number + 1] - part_starts[part_number])
    shape = (n_rows, *ledger.run.row_shapes[array_name])
    file_name = ledger.parts[part_number].array_file(array_name)
    path = find_file(file_name)
    return map_rows(path, shape, ledger.run.dtype)


class StoredRows(EmbeddingSource):
    """A source with all or some rows of a store. The store's metadata identify the rows."""

    _sealed_store: SealedStore
    _chosen_rows: Tensor | None = None  # (M,) row numbers in the store. None: all rows.

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """The rows' identity kinds: "pictures" (with captions, if any) and "names".

        Imported rows have no picture. Their kinds are "embeddings", and "names" if there are names.
        """
        if self._sealed_store.manifest.imported is not None:
            return super().identified_by
        return ("pictures", "names")

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return the identities (M,) of the rows, like ``EmbeddingSource.identities``."""
        if by == "embeddings":
            return super().identities(by, rows)
        index = np.arange(len(self)) if rows is None else rows
        rows_in_store = self._rows_in_store(index)
        return self._sealed_store.identities(by, rows_in_store)

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        if "pictures" not in self.identified_by:
            return super()._picture_hashes(rows)
        rows_in_store = self._rows_in_store(rows)
        return self._sealed_store.identities("pictures", rows_in_store, with_captions=False)

    def _rows_in_store(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert row indices (M,) in this source to row indices in the whole store."""
        return rows if self._chosen_rows is None else self._chosen_rows.numpy()[rows]


class EmbeddingStore(PickledByPath, StoredRows, MappedSource):
    """A sealed store with images and classes. Predictors use it like ``Embeddings`` in memory.

    The constructor checks documents, sizes, shapes, row counts and labels. When a row in a part is
    first read in this process, the part's bytes are compared with the SHA-256 in the receipt. Later
    changes to an open file are not noticed. A store is pickled as its path. Unpickling opens the
    store again, and raises ProvenanceError if the store has changed.

    Args:
        path: The store's folder, from ``vilu embed`` or ``vilu import``.

    Attributes:
        path: The folder.
        manifest: The content of ``manifest.json``: the store's inputs and counts.
        text: (K, D) float32 unit-norm texts of the candidates. Classes with equal texts are merged,
            as in ``Embeddings``.

    Raises:
        DataError: If the folder is no store, is not complete, or is a caption store.
        StorageError: If a file is missing or damaged. The message names the file.
        ProvenanceError: If files do not belong together, or another schema wrote them.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> image = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]  # the last image has norm zero
        >>> names = {"class_names": ["cat", "dog"], "ids": ["a", "b", "c"]}
        >>> scale = {"logit_scale": 100, "logit_bias": 0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/arrays.npz", image=image, text=np.eye(2), **names, **scale)
        ...     path = f"{folder}/store"
        ...     _ = vilu.import_arrays(f"{folder}/arrays.npz", path, max_error_rate=0.5)
        ...     store = vilu.EmbeddingStore(path)
        ...     print(list(store.ids))
        ...     print(list(store.bad_images()))
        ['a', 'b']
        [('c', 'zero_norm')]
    """

    @checked
    @torch_defaults()
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sealed_store = SealedStore(self.path)
        self.manifest = self._sealed_store.manifest
        self.folder_hash = self._sealed_store.folder_hash
        if self.manifest.captions:
            raise DataError(
                f"{path} has captions and no classes. Open it with vilu.open_source, which takes "
                "both."
            )
        self.space = self.manifest.space
        self.stored_dtype = self.manifest.dtype
        self.class_names = self.manifest.names
        self._class_table, self.text = read_classes(self.path, self.manifest)
        self._sealed_store.require_agreement(self._class_table.hash == self.manifest.classes)
        self._read_class_column = cache(partial(_read_class_column, self.path, self._class_table))
        image_columns = frozenset(self.manifest.row_shapes) - {IMAGE}
        self.columns = image_columns | frozenset(self._class_table.columns)
        labels_of_parts = map(self._read_labels, self._sealed_store.parts)
        labels = torch.from_numpy(_join_numbers(labels_of_parts))
        # a row with the label -2 (outside) gets the target -1, and is marked in ``outside``
        self.target = labels.clamp(min=UNKNOWN)
        self.outside = labels == OUTSIDE
        self.ids = self._sealed_store.keys()
        if not self._sealed_store.has_identifiers:
            # The keys are only the row numbers in the imported arrays. ``ListedNumbers`` marks them
            # as numbers, which identify no row in another source.
            self.ids = ListedNumbers(self.ids)
        if self.manifest.has_answers:
            answers = map(self._read_answers, self._sealed_store.parts)
            answer = _join_numbers(answers)
            self._columns = {ANSWER: torch.from_numpy(answer)}
            self.columns |= {ANSWER}
        self._class_of_candidate = None
        if self.has_texts:
            self._class_of_candidate = self._merge_equal_classes()

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the (B, D) float32 image embeddings of the rows ``index``."""
        if not self.has_vectors:
            return torch.zeros(len(index), 0, dtype=torch.float32)
        return self._sealed_store.mapped_arrays.take(IMAGE, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return column ``name``. From an image column, return only the rows ``index``."""
        if name == ANSWER or name not in self.columns:
            return super().column(name, index)
        if name in self.manifest.row_shapes:
            return self._sealed_store.mapped_arrays.take(name, index)
        values = self._read_class_column(name)
        has_row_per_class = name in TEXT_COLUMNS
        if self._class_of_candidate is None or not has_row_per_class:
            return values
        # if classes with equal texts were merged, the column has a row for each candidate
        return values[self._class_of_candidate]

    def bad_images(self) -> Iterator[tuple[str, str]]:
        """Yield key and error kind, e.g. "truncated", for every image without a row."""
        for part, n_error in zip(
            self._sealed_store.parts, self._sealed_store.n_errors_of_parts, strict=True
        ):
            if n_error:
                path = self._sealed_store.verify_file(part.errors_file)
                table = read_columns(path, ERROR_SCHEMA, ["key", "kind"], n_error)
                yield from zip(table["key"].to_pylist(), table["kind"].to_pylist(), strict=True)

    def _read_labels(self, part: Part) -> NDArray[np.int64]:
        """Return a part's labels, -1 if unknown, -2 if outside. Raise StorageError if invalid."""
        column: pa.Array = self._sealed_store.metadata_column("label", part.number)
        labels = np.asarray(column.fill_null(UNKNOWN), dtype=np.int64)
        if not len(labels):
            return labels
        if labels.min() < OUTSIDE or labels.max() >= self.n_candidates:
            raise StorageError(
                f"{self.path / part.metadata_file} has labels from {labels.min()} to "
                f"{labels.max()}, there are {self.n_candidates} classes. {REDO_HINT}"
            )
        return labels

    def _read_answers(self, part: Part) -> NDArray[np.int64]:
        """Return a part's imported answers. Raise StorageError if an answer is no class."""
        column: pa.Array = self._sealed_store.metadata_column(ANSWER, part.number)
        answer = np.asarray(column, dtype=np.int64)
        n_classes = len(self.manifest.names)
        if len(answer) and (answer.min() < 0 or answer.max() >= n_classes):
            raise StorageError(
                f"{self.path / part.metadata_file} has answers from {answer.min()} to "
                f"{answer.max()}, there are {n_classes} classes. {REDO_HINT}"
            )
        return answer


def _join_numbers(numbers_of_parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Join the whole numbers from all parts, in the order of the parts."""
    no_numbers = np.empty(0, np.int64)  # np.concatenate refuses an empty list
    return np.concatenate([no_numbers, *numbers_of_parts])


def _read_class_column(root: Path, class_table: StoredClasses, name: ClassColumn) -> Tensor:
    """Read a class or model column, and check its numbers."""
    path = column_path(root, name)
    values = map_rows(path, class_table.columns[name].shape, "float32")
    # n_rows has no effect, because only image columns depend on n_rows
    checked_columns = check_columns({name: values}, n_rows=0, n_texts=len(class_table.names))
    return checked_columns[name]


class CaptionStore(PickledByPath, StoredRows, MappedPairs):
    """A sealed store with images and captions. Predictors use it like ``PairEmbeddings`` in memory.

    Checks, pickling and errors are as in ``EmbeddingStore``, except that a class store raises
    DataError here.

    Args:
        path: The folder, written by ``vilu embed``.
        pools: How pairs are grouped into pools. Captions and images are matched within a pool.
        fold: Only rows with a caption in this fold are used (``folds.fold_of``). None: all rows.
    """

    @checked
    @torch_defaults()
    def __init__(
        self, path: str | os.PathLike[str], pools: Pools | None = None, fold: Fold | None = None
    ) -> None:
        sealed_store = SealedStore(Path(path))
        self.manifest = sealed_store.manifest
        self.folder_hash = sealed_store.folder_hash
        self.options = {"pools": pools, "fold": fold}  # for unpickling
        if not self.manifest.captions:
            raise DataError(
                f"{path} has classes and no captions. Open it with vilu.EmbeddingStore."
            )
        has_class_table = bool(self.manifest.classes)
        sealed_store.require_agreement(not has_class_table)
        chosen_rows = None if fold is None else _rows_of_fold(sealed_store, fold)
        super().__init__(
            sealed_store.path,
            sealed_store.mapped_arrays,
            array_names=(IMAGE, CAPTION),
            space=self.manifest.space,
            pools=pools or Pools(),
            chosen_rows=chosen_rows,
        )
        self.columns = frozenset()
        if self.pools.direction == "image_to_text":
            # Columns belong to images. With "text_to_image", images are the candidates for a
            # caption, so the right image's columns would reveal the answer.
            self.columns = frozenset(self.manifest.row_shapes) - {IMAGE, CAPTION}
        self.ids = sealed_store.keys(chosen_rows)
        self._sealed_store = sealed_store

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return the rows ``index`` from the image column ``name``."""
        if name not in self.columns:
            return super().column(name, index)
        return self._take_rows(name, index)


def _rows_of_fold(sealed_store: SealedStore, fold: Fold) -> NDArray[np.int64]:
    """Return the ascending numbers (M,) of the rows with a caption in a fold."""
    n_rows_of_parts = np.diff(sealed_store.mapped_arrays.part_starts).tolist()
    parts = zip(sealed_store.parts, n_rows_of_parts, strict=True)
    metadata_files = (
        (sealed_store.verify_file(part.metadata_file), n_rows) for part, n_rows in parts
    )
    return rows_of_fold(metadata_files, ("caption",), fold, len(sealed_store.mapped_arrays))
