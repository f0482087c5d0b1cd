"""Read and write the parts of a store, and the class files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import RUN_FILE, make_folder
from vilu.artifacts.documents import read_document, write_document
from vilu.datasets.base import POSITIONS_PER_SHARD, ImageDataset, ShardedDataset
from vilu.embeddings.checks import require_usable_rows
from vilu.embeddings.columns import ANSWER, COLUMNS
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.store.ledger import FileInfo, Ledger, require_hash_once, single_thread_lock, write_hashed
from vilu.store.manifest import (
    CLASSES_FILE,
    IMAGE,
    SHARED_FIELDS,
    TEXT_FILE,
    ArrayInfo,
    ClassColumn,
    ImageColumn,
    Receipt,
    Run,
    StoredClasses,
)
from vilu.store.unreadable import NPY_READING_ERRORS, convert_damage_errors


@dataclass(frozen=True)
class Part:
    """A part of the data set: the images (or shards) ``start`` to ``stop - 1``, with file names.

    File names follow LAION's layout, so that LAION's tools can read the vectors and the metadata.
    """

    number: int  # number of the part, from 0
    start: int  # position of the first image, or number of the first shard
    stop: int  # position after the last image, or number after the last shard
    array_names: tuple[str, ...] = (IMAGE,)  # names of the image arrays

    def array_file(self, name: str) -> str:
        """Return the file for the array ``name``, with rows (n_ok, ...) for embedded images."""
        return f"{name}/{name}_{self.number:05d}.npy"

    @property
    def metadata_file(self) -> str:
        """File with the metadata: a row per embedded image, in the order of the arrays."""
        return f"metadata/metadata_{self.number:05d}.parquet"

    @property
    def errors_file(self) -> str:
        """File with the errors: a row per image without an embedding."""
        return f"errors/errors_{self.number:05d}.parquet"

    @property
    def receipt_file(self) -> str:
        """File with the receipt. The receipt is written last among the part's files."""
        return f"receipts/{self.number:05d}.json"

    @property
    def attempts_file(self) -> str:
        """File with a byte for each process that has begun the part but not finished it.

        Such a process is still at work, or died while working on the part.
        """
        return f"attempts/{self.number:05d}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files in the receipt, in the order of writing."""
        first_file, *further_files = [self.array_file(name) for name in self.array_names]
        return first_file, self.metadata_file, self.errors_file, *further_files

    def __len__(self) -> int:
        return self.stop - self.start


def plan_parts(run: Run) -> list[Part]:
    """Return all parts in a run, from the image (or shard) count and the part size."""
    array_names = tuple(run.row_shapes)
    parts: list[Part] = []
    for number, start in enumerate(range(0, run.n_units, run.part_size)):
        stop = min(start + run.part_size, run.n_units)
        parts.append(Part(number, start, stop, array_names))
    return parts


def possible_positions(run: Run, part: Part) -> range:
    """Return the range with the possible positions for the images in a part.

    Each shard reserves ``POSITIONS_PER_SHARD`` positions, far more than a shard has images.
    """
    if run.shards:
        return range(part.start * POSITIONS_PER_SHARD, part.stop * POSITIONS_PER_SHARD)
    return range(part.start, part.stop)


def has_all_positions(
    run: Run, part: Part, sorted_positions: NDArray[np.int64], n_images: int
) -> bool:
    """Return whether ``sorted_positions`` hold each of the part's ``n_images`` images once.

    Without shards, these must be all positions in the part. With shards, the positions in each
    shard must begin at the shard's first position and have no gap.
    """
    position_range = possible_positions(run, part)
    if not run.shards:
        all_positions = np.arange(position_range.start, position_range.stop)
        return np.array_equal(sorted_positions, all_positions)
    if len(sorted_positions) != n_images:
        return False
    if n_images == 0:
        return True
    first_position = int(sorted_positions[0])
    last_position = int(sorted_positions[-1])
    are_possible = first_position in position_range and last_position in position_range
    # a shard's first position is a multiple of POSITIONS_PER_SHARD
    begins_shard = sorted_positions % POSITIONS_PER_SHARD == 0
    if not are_possible or not begins_shard[0]:
        return False
    follows_previous = np.diff(sorted_positions) == 1  # for all positions except the first
    return bool(np.all(follows_previous | begins_shard[1:]))


class StoreLedger(Ledger[Part, Receipt]):
    """A store's folder, with finished parts and missing parts.

    ``dataset`` is the data set to embed. None: the store is only read, or the store is imported.
    """

    folder_kind = "embedding store"
    command = "vilu embed` or `vilu import"  # messages put backticks around this text
    activity = "embedding into"
    documents = (*Ledger.documents, CLASSES_FILE)
    # sub-folders in every store
    required_folders = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
    folders = (*required_folders, *get_args(ImageColumn), "columns")
    further_files = (TEXT_FILE, *(f"columns/{name}.npy" for name in get_args(ClassColumn)))

    def __init__(self, root: Path, run: Run, dataset: ImageDataset | None = None) -> None:
        parts = plan_parts(run)
        super().__init__(root, run.fingerprint, parts, Receipt)
        self.run = run
        self.dataset = dataset

    @classmethod
    def command_of(cls, root: Path) -> str:
        """Return the command that began the store, according to ``run.json``."""
        run = read_document(root / RUN_FILE, Run)
        return "vilu embed" if run.imported is None else "vilu import"

    def facts_of_receipt_and_plan(
        self, part: Part, receipt: Receipt
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Return (number, start, stop, image count) from the receipt, and from the plan.

        With shards, the plan has no image count, so both results have the receipt's count.
        """
        n_planned = receipt.n_in if self.run.shards else len(part)
        receipt_facts = (receipt.part, receipt.start, receipt.stop, receipt.n_in)
        planned_facts = (part.number, part.start, part.stop, n_planned)
        return receipt_facts, planned_facts

    def receipt_or_reason(self, part: Part, *, check_hashes: bool = True) -> Receipt | str:
        """Return a finished part's receipt. If the part is not done, return the reason.

        If the part's shards have changed since the part was written, the part is not done.
        """
        receipt_or_reason = super().receipt_or_reason(part, check_hashes=check_hashes)
        if isinstance(receipt_or_reason, Receipt):
            receipt = receipt_or_reason
            if receipt.source != self.shard_fingerprint(part):
                return "its shards have changed"
        return receipt_or_reason

    def shard_fingerprint(self, part: Part) -> str:
        """Return the current fingerprint of a part's shards, or "" if there are no shards."""
        if not self.run.shards:
            return ""
        dataset = cast("ShardedDataset", self.dataset)
        return dataset.shard_fingerprint(part.start, part.stop)

    def write_part(
        self, part: Part, content: PartContent, batch_size: int, shard_fingerprint: str
    ) -> Receipt:
        """Write a part's rows and errors, and return the receipt.

        ``batch_size`` counts images per forward pass. ``shard_fingerprint`` is the fingerprint that
        the part's shards had before they were read.
        """
        self._require_unchanged_shards(part, shard_fingerprint)
        n_ok = len(content.metadata)
        n_error = len(content.errors)
        n_errors_of_kind = Counter(error.kind for error in content.errors)

        def make_receipt(files: dict[str, FileInfo]) -> Receipt:
            return Receipt(
                fingerprint=self.run.fingerprint,
                part=part.number,
                start=part.start,
                stop=part.stop,
                n_in=n_ok + n_error,
                n_ok=n_ok,
                n_error=n_error,
                errors=dict(sorted(n_errors_of_kind.items())),
                files=files,
                batch_size=batch_size,
                source=shard_fingerprint,
            )

        payloads = self._payloads(part, content)
        return self.write_files(part, payloads, make_receipt)

    def _require_unchanged_shards(self, part: Part, shard_fingerprint: str) -> None:
        """Raise DataError unless a part's shards still have the given fingerprint."""
        # after a change, some rows could be from the old shards and some from the new ones
        if self.shard_fingerprint(part) != shard_fingerprint:
            raise DataError(
                f"shards of part {part.number} changed while they were read. When nothing writes "
                "to them any more, run the same command again: finished parts are kept."
            )

    def _payloads(self, part: Part, content: PartContent) -> dict[str, bytes]:
        """Map each file name in a part to the file's bytes."""
        payloads: dict[str, bytes] = {}
        for name, shape in self.run.row_shapes.items():
            blocks = content.array_blocks.get(name, [])  # if all images failed, there are no blocks
            array_shape = (len(content.metadata), *shape)
            rows = _join_blocks(name, blocks, array_shape, self.run.dtype)
            payloads[part.array_file(name)] = _npy_bytes(rows)
        schema = metadata_schema(self.run)
        payloads[part.metadata_file] = _parquet_bytes(content.metadata, schema)
        payloads[part.errors_file] = _parquet_bytes(content.errors, ERROR_SCHEMA)
        return payloads


INT8 = pa.int8()
INT32 = pa.int32()
INT64 = pa.int64()
STRING = pa.string()
NULLABLE_COLUMNS = {"label", "exif_orientation", "exception", "bytes"}  # columns that may hold null


def _make_schema(types: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return a schema. ``types`` maps column names to types."""
    fields: list[pa.Field] = []
    for name, column_type in types.items():
        fields.append(pa.field(name, column_type, nullable=name in NULLABLE_COLUMNS))
    return pa.schema(fields)


METADATA_SCHEMA = _make_schema(
    {
        "position": INT64,
        "key": STRING,
        "label": INT32,
        "width": INT32,
        "height": INT32,
        "n_frames": INT32,
        "exif_orientation": INT8,
        "flags": INT32,
    }
)
"""Columns of the metadata. ``position`` is the image's position in the data set.

The metadata do not contain the row number in the store. This number depends on the failed images
in earlier parts, and earlier parts may not be written yet. So the reader counts the rows.
"""

# further metadata column if images have captions
CAPTION_FIELD = pa.field("caption", STRING, nullable=False)
# further metadata column if another model's answers were imported
ANSWER_FIELD = pa.field(ANSWER, INT32, nullable=False)
PICTURE_DIGEST_BYTES = 16
PICTURE_FIELD = pa.field("picture", pa.binary(PICTURE_DIGEST_BYTES), nullable=False)
"""Further metadata column, if ``Run.has_picture_column`` is true.

The value is the first half of the SHA-256 of ``ImageRecord.content``.
"""

ERROR_SCHEMA = _make_schema(
    {
        "key": STRING,
        "position": INT64,
        "stage": STRING,
        "kind": STRING,
        "exception": STRING,
        "message": STRING,
        "bytes": INT64,
    }
)
"""Columns in the error table. ``bytes`` is a readable image's encoded size, or null."""

REDO_HINT = "Run `vilu embed` (or `vilu import`) again to redo the part."


def metadata_schema(run: Run) -> pa.Schema:
    """Return the metadata columns in a run's store.

    An imported store has only position, key and label, and also the answer if there are answers.
    """
    if run.imported is not None:
        imported_fields = [METADATA_SCHEMA.field(name) for name in ("position", "key", "label")]
        if run.has_answers:
            imported_fields.append(ANSWER_FIELD)
        return pa.schema(imported_fields)
    fields = list(METADATA_SCHEMA)
    if run.captions:
        fields.append(CAPTION_FIELD)
    if run.has_picture_column:
        fields.append(PICTURE_FIELD)
    return pa.schema(fields)


def open_npy(path: Path, hint: str) -> tuple[NDArray[np.floating], int]:
    """Map the array in a ``.npy`` file into memory. Also return the data size in bytes.

    Only the header is read. ``hint`` is the advice in the message if the file is damaged.
    """
    # Only one thread at a time may read headers. Reading headers in two threads can fail in Python
    # 3.11 (gh-106905, a bug in ast.literal_eval).
    with convert_damage_errors(path, hint, NPY_READING_ERRORS), single_thread_lock():
        rows = np.lib.format.open_memmap(path, mode="r")
        n_data_bytes = path.stat().st_size - rows.offset  # the data begin at ``rows.offset``
        return rows, n_data_bytes


def map_rows(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    """Map a stored array into memory. Raise StorageError on a wrong shape, dtype or order."""
    rows, n_bytes = open_npy(path, REDO_HINT)
    # shape, dtype, whether the rows are in C order, and the data's size in bytes
    stored_facts = (rows.shape, rows.dtype.str, rows.flags.c_contiguous, n_bytes)
    little_endian = np.dtype(dtype).newbyteorder("<").str
    expected_facts = (shape, little_endian, True, rows.nbytes)
    if stored_facts != expected_facts:
        raise StorageError(
            f"{path} has (shape, dtype, C order, bytes of data) {stored_facts}. By the documents "
            f"of the store, it must have {expected_facts}. {REDO_HINT}"
        )
    return rows


def read_columns(
    path: Path, schema: pa.Schema, column_names: Sequence[str], n_rows: int
) -> pa.Table:
    """Return the columns ``column_names`` from a Parquet file.

    Raises:
        StorageError: If the file is damaged, does not have ``n_rows`` rows, or if a column has
            another type than in ``schema``.
    """
    with convert_damage_errors(path, REDO_HINT), pq.ParquetFile(path) as file:
        # checked before reading, because a forged file may state more rows than fit into memory
        if file.metadata.num_rows != n_rows:
            raise StorageError(
                f"{path} has {file.metadata.num_rows} rows, expected {n_rows}. {REDO_HINT}"
            )
        table = file.read(columns=list(column_names))
        table.validate(full=True)  # checks that strings are UTF-8, and offsets within buffers
    if len(table) != n_rows:  # the row count in the file's metadata was wrong
        raise StorageError(f"{path} has {len(table)} rows, expected {n_rows}. {REDO_HINT}")
    expected_fields = [schema.field(name) for name in column_names]
    expected_schema = pa.schema(expected_fields)
    if not table.schema.equals(expected_schema):
        raise StorageError(
            f"{path} has columns {table.schema.to_string()!r}, expected "
            f"{expected_schema.to_string()!r}. {REDO_HINT}"
        )
    return table


def read_classes(root: Path, run: Run) -> tuple[StoredClasses, Tensor]:
    """Return a run's class table, and the (K, D) float32 text embeddings.

    Raises:
        ProvenanceError: If the class table belongs to another run.
        StorageError: If a file is damaged.
    """
    class_table = read_document(root / CLASSES_FILE, StoredClasses)
    for field_name in SHARED_FIELDS:
        if getattr(run, field_name) != getattr(class_table, field_name):
            raise ProvenanceError(
                f"{root / CLASSES_FILE} holds other classes, templates or columns than "
                f"{root / RUN_FILE}."
            )
    rows = map_rows(root / TEXT_FILE, (len(run.names), run.space.embed_dim), "float32")
    hash_of_file = {root / TEXT_FILE: class_table.text_file.sha256}
    for name, info in class_table.columns.items():
        if not _is_column_shape(run, name, info.shape):
            raise StorageError(
                f"{root / CLASSES_FILE} is damaged: it says that {name} is of shape {info.shape}."
            )
        map_rows(column_path(root, name), info.shape, "float32")
        hash_of_file[column_path(root, name)] = info.sha256
    # hashing reads all bytes, so hashes are compared last, after the quick checks of all shapes
    for path, sha256 in hash_of_file.items():
        require_hash_once(path, sha256, class_table.remedy, CLASSES_FILE)
    text = torch.from_numpy(np.array(rows))
    if not run.has_texts:  # with logits the text embeddings are zeros, so not usable
        return class_table, text
    return class_table, require_usable_rows(text, "class text")


def _is_column_shape(run: Run, name: ClassColumn, shape: tuple[int, ...]) -> bool:
    """Return whether ``shape`` has the right number of dimensions, and sizes that fit this run."""
    n_dims, _ = COLUMNS[name]
    return len(shape) == n_dims and is_possible_shape(run, name, shape)


def column_path(root: Path, name: ClassColumn) -> Path:
    """Return the file of a class or model column."""
    return root / "columns" / f"{name}.npy"


def is_possible_shape(run: Run, name: ClassColumn, shape: tuple[int, ...]) -> bool:
    """Return whether the class or model column ``name`` can have ``shape`` in this run."""
    n_classes = len(run.names)
    dim = run.space.embed_dim
    n_prompts = len(run.prompts)
    n_words = len(run.negatives)
    if run.imported is not None:
        # an imported run lists no prompts and no words, so any number of them is possible
        n_prompts = shape[1]
        n_words = shape[0]
    # the sizes that the run determines: the first sizes in each column's shape
    first_sizes: dict[str, tuple[int, ...]] = {
        "prompts": (n_classes, n_prompts, dim),
        "text_features": (n_classes,),
        "second_text": (n_classes,),
        "negatives": (n_words, dim),
        "image_projection": (dim,),
        "text_projection": (dim,),
    }
    expected_sizes = first_sizes[name]
    return shape[: len(expected_sizes)] == expected_sizes


MAX_MESSAGE_LENGTH = 300  # longer messages are shortened in the error table


@dataclass(frozen=True)
class RowMetadata:
    """The metadata that every row has. The fields are as in ``METADATA_SCHEMA``."""

    position: int
    key: str
    label: int | None


@dataclass(frozen=True)
class MetadataWithAnswer(RowMetadata):
    """The metadata for a row with another model's imported answer."""

    answer: int  # class index in the class table


@dataclass(frozen=True)
class ImageMetadata(RowMetadata):
    """Metadata for an image with an embedding. The fields are as in ``metadata_schema``."""

    width: int
    height: int
    n_frames: int
    exif_orientation: int | None
    flags: int
    caption: str | None
    picture: bytes


@dataclass(frozen=True)
class ErrorRow:
    """An image without an embedding. The fields are as in ``ERROR_SCHEMA``."""

    key: str
    position: int
    stage: str
    kind: str
    exception: str | None
    message: str
    bytes: int | None


@dataclass
class PartContent:
    """A part's content: arrays and metadata for embedded images, and errors for failed images.

    Attributes:
        array_blocks: Maps each array name to the array's rows: a list of blocks (n, ...), in the
            order of ``metadata``.
        metadata: Metadata for the embedded images.
        errors: Errors for the failed images.
        begun_at: When the part was begun, in seconds on the monotonic clock.
    """

    array_blocks: dict[str, list[Tensor]] = field(default_factory=dict)
    metadata: list[RowMetadata] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    begun_at: float = field(default_factory=time.monotonic)


def write_classes(
    root: Path, run: Run, text: Tensor, columns: Mapping[ClassColumn, Tensor]
) -> None:
    """Write the (K, D) float32 text embeddings, the columns, and finally the class table."""
    text_rows = text.numpy()
    text_file = _write_npy(root / TEXT_FILE, text_rows.astype("<f4"))
    column_files: dict[ClassColumn, ArrayInfo] = {}
    for name, values in columns.items():
        path = column_path(root, name)
        make_folder(path.parent)
        rows = np.ascontiguousarray(values.numpy(), dtype="<f4")
        info = _write_npy(path, rows)
        column_files[name] = ArrayInfo(**dict(info), shape=tuple(values.shape))
    # like a receipt, the table states the hashes of the files above, so the table is written last
    class_table = StoredClasses.from_files(run, text_file, column_files)
    write_document(root / CLASSES_FILE, class_table)


def _write_npy(path: Path, array: NDArray[np.floating]) -> FileInfo:
    """Write an array to a ``.npy`` file atomically, and return the file's size and hash."""
    payload = _npy_bytes(array)
    return write_hashed(path, payload)


def _join_blocks(
    name: str, blocks: Sequence[Tensor], shape: tuple[int, ...], dtype: str
) -> NDArray[np.floating]:
    """Join blocks of rows to a little-endian array. Raise DataError if a number is not finite.

    Args:
        name: The array's name, for the message.
        blocks: The blocks.
        shape: The array's shape.
        dtype: The array's number format.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    rows = np.zeros(shape, dtype=little_endian)
    if blocks:
        np.concatenate([block.numpy() for block in blocks], out=rows)
    if not np.isfinite(rows).all():
        raise DataError(
            f"{name} has numbers beyond the range of {dtype}. Make the store again with --dtype "
            "float32."
        )
    return rows


def _npy_bytes(array: NDArray[np.floating]) -> bytes:
    """Encode an array as a ``.npy`` file."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _parquet_bytes(rows: Sequence[RowMetadata | ErrorRow], schema: pa.Schema) -> bytes:
    """Encode rows as a Parquet file with the columns in a schema."""
    columns: dict[str, list[int | str | bytes | None]] = {}
    for name in schema.names:
        columns[name] = [_escape_surrogates(getattr(row, name)) for row in rows]
    buffer = BytesIO()
    table = pa.table(columns, schema=schema)
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _escape_surrogates(value: int | str | bytes | None) -> int | str | bytes | None:
    r"""Return the value. In a text, surrogates are escaped as ``\uNNNN``.

    UTF-8 cannot encode surrogates.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value
