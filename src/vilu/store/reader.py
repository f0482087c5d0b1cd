"""Open embeddings on disk: a sealed store, or embeddings from another tool."""

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
from vilu.embeddings.checks import HASH_BYTES, Identity, hash_items, hash_names
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import ANSWER, TEXT_COLUMNS
from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import OUTSIDE, UNKNOWN, DataError, ProvenanceError, StorageError, UsageError
from vilu.store.folds import Fold, rows_of_fold
from vilu.store.laion import LaionPairs, find_shards
from vilu.store.ledger import FileVerifier, PickledByPath, content_hash
from vilu.store.manifest import CAPTION, IMAGE, ClassColumn, Manifest, Run, StoredClasses
from vilu.store.mapped import ListedNumbers, MappedPairs, MappedParts, MappedSource, PartStrings
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
    """Open a store of classes or captions, or another tool's embeddings of image-caption pairs.

    Args:
        path: A folder written by ``vilu embed``, or a folder in a layout of ``LaionPairs``.
        pools: Grouping of pairs into pools. Captions and images are matched within a pool. By
            default a pool has 1024 pairs.
        fold: "train", "validation" or "test": only pairs with a caption in this fold are used.
            None: all pairs.
        logit_scale: Multiplier of the cosine. Required for embeddings of another tool, but not for
            a store.

    Raises:
        UsageError: If an argument does not fit the data, or the logit scale is missing.
        DataError: If the folder has another layout, or is not complete.
        StorageError: If a file is missing or damaged; the message names the file.
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
    if not (root / RUN).is_file():
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
    if read_document(root / RUN, Run).captions:
        return CaptionStore(root, pools, fold)
    if pools is not None or fold is not None:
        raise UsageError(
            f"{root} is a store of classes: there are no captions for pools or folds. Leave them "
            "out."
        )
    return EmbeddingStore(root)


class SealedStore(PickledByPath):
    """The documents and the parts of a complete store, without the classes.

    The constructor checks documents, sizes, shapes and numbers of rows. When a file is first read,
    ``verify_file`` compares the hash of the file with the receipt, and returns the path of the
    file.
    """

    def __init__(self, path: Path) -> None:
        StoreLedger.require_sealed(path)
        self.path = path
        self.manifest = read_document(path / MANIFEST, Manifest)
        self.folder_hash = digest(self.manifest.model_dump(mode="json"))
        ledger = StoreLedger(path, self.manifest)
        self.parts = ledger.parts
        receipts = ledger.receipts()
        self.require_agreement(content_hash(receipts) == self.manifest.content)
        for count_name in ("n_in", "n_ok", "n_error"):
            sum_of_parts = sum(getattr(receipt, count_name) for receipt in receipts)
            self.require_agreement(sum_of_parts == getattr(self.manifest, count_name))
        self.verify_file = FileVerifier(path, receipts)
        self.n_errors = [receipt.n_error for receipt in receipts]
        n_rows_of_parts = [receipt.n_ok for receipt in receipts]
        starts = np.cumsum([0, *n_rows_of_parts], dtype=np.int64)
        self.rows = MappedParts(
            starts,
            self.manifest.arrays,
            open_part=partial(_map_part, ledger, starts, self.verify_file),
        )
        # Every array is mapped once, to check the header. ``path.joinpath`` finds the files,
        # because ``verify_file`` would also hash every file. A file is hashed later, when a row of
        # the file is first read.
        for part in self.parts:
            for name in part.arrays:
                _map_part(ledger, starts, find_file=path.joinpath, name=name, number=part.number)

    @property
    def has_names(self) -> bool:
        """Whether rows have identifiers. Imported rows may have only row numbers."""
        return self.manifest.imported is None or self.manifest.imported.ids

    def require_agreement(self, agrees: bool) -> None:
        """Raise ProvenanceError if ``agrees`` is False: the manifest does not fit the folder."""
        if not agrees:
            raise ProvenanceError(
                f"{self.path / MANIFEST} seals other parts or classes than the folder holds. Make "
                "it again."
            )

    def metadata(self, name: str, number: int) -> pa.Array:
        """Return column ``name`` of the metadata of part ``number``."""
        n_rows = int(self.rows.starts[number + 1] - self.rows.starts[number])
        path = self.verify_file(self.parts[number].metadata_file)
        table = read_columns(path, metadata_schema(self.manifest), [name], n_rows)
        return table[name].combine_chunks()

    def keys(self, rows: NDArray[np.int64] | None = None) -> PartStrings:
        """Return the keys of ``rows`` (ascending indices), by default of all rows."""
        return PartStrings(self.rows.starts, partial(self.metadata, "key"), rows)

    def identities(
        self, by: Identity, rows: NDArray[np.int64], *, captions: bool = True
    ) -> NDArray[np.uint64]:
        """Return hashes (M,) of some rows: of the keys, or of pictures and captions.

        Each part is read once.

        Args:
            by: "names" to hash the keys, "pictures" to hash the pictures and captions.
            rows: (M,) numbers of the rows in the store.
            captions: Whether captions, if any, are hashed with the pictures.
        """
        # the rows of part p are at the positions order[bounds[p] : bounds[p + 1]] of ``rows``
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows, self.rows.starts, sorter=order)
        parts_in_use = np.flatnonzero(np.diff(bounds))
        hashes = np.empty(len(rows), np.uint64)
        for number in parts_in_use.tolist():
            positions = order[bounds[number] : bounds[number + 1]]
            index_in_part = pa.array(rows[positions] - self.rows.starts[number])
            hashes[positions] = self._hashes_in_part(by, number, index_in_part, captions=captions)
        return hashes

    def _hashes_in_part(
        self, by: Identity, number: int, index: pa.Array, *, captions: bool
    ) -> NDArray[np.uint64]:
        """Return hashes (m,) like ``identities``, but of the rows ``index`` in a single part.

        ``number`` is the number of the part.
        """
        if by == "names":
            return hash_names(self.metadata("key", number).take(index).to_pylist())
        pictures: list[bytes] = self.metadata("picture", number).take(index).to_pylist()
        has_captions = self.manifest.captions and captions
        if not has_captions:
            # the column "picture" has hashes of pictures; only the first bytes of a hash are used
            first_bytes = b"".join(picture[:HASH_BYTES] for picture in pictures)
            return np.frombuffer(first_bytes, "<u8").astype(np.uint64)
        texts: list[str] = self.metadata("caption", number).take(index).to_pylist()
        return hash_items(
            picture + text.encode() for picture, text in zip(pictures, texts, strict=True)
        )


def _map_part(
    ledger: StoreLedger,
    starts: NDArray[np.int64],
    find_file: Callable[[str], Path],
    name: str,
    number: int,
) -> NDArray[np.floating]:
    """Map array ``name`` of part ``number`` into memory.

    Args:
        ledger: The folder of the store.
        starts: (P + 1,) number of the first row of each of the P parts, and the number of rows.
        find_file: Function that takes the name of a file and returns the path.
        name: Name of the array.
        number: Number of the part.
    """
    n_rows = int(starts[number + 1] - starts[number])
    shape = (n_rows, *ledger.run.arrays[name])
    path = find_file(ledger.parts[number].array_file(name))
    return map_rows(path, shape, ledger.run.dtype)


class StoredRows(EmbeddingSource):
    """A source of all or some rows of a store. The metadata of the store identify the rows."""

    _sealed_store: SealedStore
    _chosen_rows: Tensor | None = None  # (M,) numbers of the rows in the store; None for all

    @property
    def identified_by(self) -> tuple[Identity, ...]:
        """Kinds of identity of the rows: "pictures" (with captions, if any) and "names".

        Imported rows have no picture. Their kinds are "embeddings", and "names" if there are names.
        """
        if self._sealed_store.manifest.imported is not None:
            return super().identified_by
        return ("pictures", "names")

    def identities(self, by: Identity, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """Return the identities (M,) of the rows, like ``EmbeddingSource.identities``."""
        if by == "embeddings":
            return super().identities(by, rows)
        index = np.arange(len(self)) if rows is None else rows
        return self._sealed_store.identities(by, self._rows_in_store(index))

    def _picture_hashes(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        if "pictures" not in self.identified_by:
            return super()._picture_hashes(rows)
        return self._sealed_store.identities("pictures", self._rows_in_store(rows), captions=False)

    def _rows_in_store(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Convert indices (M,) of rows in this source to indices in the whole store."""
        return rows if self._chosen_rows is None else self._chosen_rows.numpy()[rows]


class EmbeddingStore(PickledByPath, StoredRows, MappedSource):
    """A sealed store of images and classes; predictors use it like ``Embeddings`` in memory.

    The constructor checks documents, sizes, shapes, numbers of rows and labels. When a row of a
    part is first read in this process, the bytes of the part are compared with the SHA-256 in the
    receipt. Later changes of an open file are not noticed. A store is pickled as the path of the
    store. Unpickling opens the store again, and raises ProvenanceError if the store has changed.

    Args:
        path: The folder of the store, from ``vilu embed`` or ``vilu import``.

    Attributes:
        path: The folder.
        manifest: The content of ``manifest.json``: inputs and counts of the store.
        text: (K, D) float32 unit-norm texts of the candidates. Classes with equal texts are merged,
            as in ``Embeddings``.

    Raises:
        DataError: If the folder is no store, is not complete, or is a store of captions.
        StorageError: If a file is missing or damaged; the message names the file.
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
        self._classes, self.text = read_classes(self.path, self.manifest)
        self._sealed_store.require_agreement(self._classes.hash == self.manifest.classes)
        self._class_column = cache(partial(_read_class_column, self.path, self._classes))
        image_columns = frozenset(self.manifest.arrays) - {IMAGE}
        self.columns = image_columns | frozenset(self._classes.columns)
        labels_of_parts = map(self._read_labels, self._sealed_store.parts)
        labels = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *labels_of_parts]))
        # a row with the label -2 (outside) gets the target -1, and is marked in ``outside``
        self.target = labels.clamp(min=UNKNOWN)
        self.outside = labels == OUTSIDE
        self.ids = self._sealed_store.keys()
        if not self._sealed_store.has_names:
            # The keys are the numbers of the rows in the imported arrays. ``ListedNumbers`` marks
            # the keys as numbers. Numbers identify no row of another source.
            self.ids = ListedNumbers(self._sealed_store.keys())
        if self.manifest.has_answers:
            answers = map(self._read_answers, self._sealed_store.parts)
            answer = np.concatenate([np.empty(0, np.int64), *answers])
            self._columns = {ANSWER: torch.from_numpy(answer)}
            self.columns |= {ANSWER}
        self._class_of_candidate = None
        if self.has_texts:
            self._class_of_candidate = self._merge_equal_classes()

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the (B, D) float32 image embeddings of the rows ``index``."""
        if not self.has_vectors:
            return torch.zeros(len(index), 0, dtype=torch.float32)
        return self._sealed_store.rows.take(IMAGE, index)

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return column ``name``. Of a column of the images, return only the rows ``index``."""
        if name == ANSWER or name not in self.columns:
            return super().column(name, index)
        if name in self.manifest.arrays:
            return self._sealed_store.rows.take(name, index)
        values = self._class_column(name)
        has_row_per_class = name in TEXT_COLUMNS
        if self._class_of_candidate is None or not has_row_per_class:
            return values
        # after a merge of classes with equal texts, the column has a row for each candidate
        return values[self._class_of_candidate]

    def bad_images(self) -> Iterator[tuple[str, str]]:
        """Yield key and kind of error, e.g. "truncated", of every image without a row."""
        for part, n_error in zip(
            self._sealed_store.parts, self._sealed_store.n_errors, strict=True
        ):
            if n_error:
                path = self._sealed_store.verify_file(part.errors_file)
                table = read_columns(path, ERROR_SCHEMA, ["key", "kind"], n_error)
                yield from zip(table["key"].to_pylist(), table["kind"].to_pylist(), strict=True)

    def _read_labels(self, part: Part) -> NDArray[np.int64]:
        """Return the labels of a part: -1 is unknown, -2 is outside. StorageError if invalid."""
        column: pa.Array = self._sealed_store.metadata("label", part.number)
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
        """Return the imported answers of a part. StorageError if an answer is no class."""
        column: pa.Array = self._sealed_store.metadata(ANSWER, part.number)
        answer = np.asarray(column, dtype=np.int64)
        n_classes = len(self.manifest.names)
        if len(answer) and (answer.min() < 0 or answer.max() >= n_classes):
            raise StorageError(
                f"{self.path / part.metadata_file} has answers from {answer.min()} to "
                f"{answer.max()}, there are {n_classes} classes. {REDO_HINT}"
            )
        return answer


def _read_class_column(root: Path, classes: StoredClasses, name: ClassColumn) -> Tensor:
    """Read a column of the classes or of the model, and check its numbers."""
    values = map_rows(column_path(root, name), classes.columns[name].shape, "float32")
    # n_rows has no effect, because only columns of images depend on n_rows
    checked_columns = check_columns({name: values}, n_rows=0, n_texts=len(classes.names))
    return checked_columns[name]


class CaptionStore(PickledByPath, StoredRows, MappedPairs):
    """A sealed store of images with captions; predictors use it like ``PairEmbeddings`` in memory.

    Checks, pickling and errors are as in ``EmbeddingStore``, except that a store of classes raises
    DataError here.

    Args:
        path: The folder, written by ``vilu embed``.
        pools: Grouping of pairs into pools. Captions and images are matched within a pool.
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
            sealed_store.rows,
            arrays=(IMAGE, CAPTION),
            space=self.manifest.space,
            pools=pools or Pools(),
            chosen_rows=chosen_rows,
        )
        self.columns = frozenset()
        if self.pools.direction == "image_to_text":
            # Columns belong to images. In the opposite direction, the images are the candidates of
            # a caption. Then a column of the right image would reveal the answer.
            self.columns = frozenset(self.manifest.arrays) - {IMAGE, CAPTION}
        self.ids = sealed_store.keys(chosen_rows)
        self._sealed_store = sealed_store

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return the rows ``index`` of column ``name`` of the images."""
        if name not in self.columns:
            return super().column(name, index)
        return self._take_rows(name, index)


def _rows_of_fold(sealed_store: SealedStore, fold: Fold) -> NDArray[np.int64]:
    """Return the ascending numbers (M,) of the rows with a caption in a fold."""
    part_sizes = np.diff(sealed_store.rows.starts).tolist()
    parts = zip(sealed_store.parts, part_sizes, strict=True)
    files = ((sealed_store.verify_file(part.metadata_file), n_rows) for part, n_rows in parts)
    return rows_of_fold(files, ("caption",), fold, len(sealed_store.rows))
