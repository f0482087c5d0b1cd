"""Parts of a store: what is in one, how it is written and read, and the classes beside them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.datasets.base import ImageDataset, ShardedDataset
from vilu.embeddings.checks import require_usable
from vilu.embeddings.columns import COLUMNS
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.files import RUN, file_hash, make_folder, read_document
from vilu.store.documents import (
    CLASSES,
    IMAGE,
    TEXT,
    ArrayInfo,
    ClassColumn,
    Inputs,
    Receipt,
    Run,
    StoredClasses,
)
from vilu.store.ledger import Ledger, write_hashed

SHARD = 2**32
"""Positions of each shard: an image's is the number of its shard times this, plus its number there."""


@dataclass(frozen=True)
class Part:
    """Images ``start`` ... ``stop - 1`` of the data set, or the images of so many shards; and what is kept of them.

    File names follow LAION's layout, so its tools read the vectors and the metadata as they are.

    Attributes:
        number: Of the part.
        start: Position of its first image, or number of its first shard.
        stop: Position after its last image, or number after its last shard.
        arrays: What is kept of each image, by name (``Inputs.arrays``).
    """

    number: int
    start: int
    stop: int
    arrays: tuple[str, ...] = (IMAGE,)

    def array(self, name: str) -> str:
        """(n_ok, ...) rows of an array."""
        return f"{name}/{name}_{self.number:05d}.npy"

    @property
    def metadata(self) -> str:
        """One row per embedding, in the same order."""
        return f"metadata/metadata_{self.number:05d}.parquet"

    @property
    def errors(self) -> str:
        """One row per image without an embedding."""
        return f"errors/errors_{self.number:05d}.parquet"

    @property
    def receipt(self) -> str:
        """Written last."""
        return f"receipts/{self.number:05d}.json"

    @property
    def attempts(self) -> str:
        """One byte for each time that the part was begun and its process died."""
        return f"attempts/{self.number:05d}"

    @property
    def files(self) -> tuple[str, ...]:
        """What the receipt vouches for, in the order in which it is written."""
        image, *others = map(self.array, self.arrays)
        return image, self.metadata, self.errors, *others

    def __len__(self) -> int:
        return self.stop - self.start


def plan(run: Inputs) -> list[Part]:
    """All parts of a run; they depend on nothing but the number of images (or shards) and the part size."""
    starts = range(0, run.extent, run.part_size)
    arrays = tuple(run.arrays)
    return [Part(i, start, min(start + run.part_size, run.extent), arrays) for i, start in enumerate(starts)]


def positions(run: Inputs, part: Part) -> range:
    """Where the positions of a part's images are; of shards not all of them are taken."""
    return range(part.start * SHARD, part.stop * SHARD) if run.shards else range(part.start, part.stop)


class StoreLedger(Ledger[Part, Receipt]):
    """What is to be done and done in the folder of a store; ``data`` are the images, for those who embed."""

    what, doing = "embedding store", "embedding into"
    always = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
    folders = (*always, "features", "views", "columns")

    def __init__(self, root: Path, run: Run, data: ImageDataset | None = None) -> None:
        super().__init__(root, run.fingerprint, plan(run), Receipt)
        self.run, self.data = run, data

    def said(self, part: Part, receipt: Receipt) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Number, bounds and images; how many images shards hold, only the receipt knows."""
        n_in = receipt.n_in if self.run.shards else len(part)
        found = (receipt.part, receipt.start, receipt.stop, receipt.n_in)
        return found, (part.number, part.start, part.stop, n_in)

    def look_up(self, part: Part) -> Receipt | str:
        """The receipt of a part that is there in full, and of shards as they are now; or else what it lacks."""
        found = super().look_up(part)
        stale = isinstance(found, Receipt) and found.source != self.source(part)
        return "its shards have changed" if stale else found

    def source(self, part: Part) -> str:
        """Fingerprint of the shards of a part as they are now; empty where parts are made of images."""
        return cast("ShardedDataset", self.data).shard_fingerprint(part.start, part.stop) if self.run.shards else ""

    def write_rows(self, part: Part, content: PartRows, batch_size: int, source: str) -> Receipt:
        """Write what became of the images of a part, with the fingerprint of the shards that they were read from.

        Raises:
            DataError: If a number is too large for the store's number format.
            StorageError: If the file system refuses.
        """
        run, n_ok, n_error = self.run, len(content.rows), len(content.errors)
        payloads = {
            part.array(name): _npy(_rows(name, content.arrays.get(name, []), (n_ok, *shape), run.dtype))
            for name, shape in run.arrays.items()
        }
        payloads[part.metadata] = _parquet(content.rows, metadata_schema(run))
        payloads[part.errors] = _parquet(content.errors, ERRORS)
        return self.write(
            part,
            payloads,
            lambda files: Receipt(
                fingerprint=run.fingerprint,
                part=part.number,
                start=part.start,
                stop=part.stop,
                n_in=n_ok + n_error,
                n_ok=n_ok,
                n_error=n_error,
                errors=dict(sorted(Counter(error.kind for error in content.errors).items())),
                files=files,
                batch_size=batch_size,
                seconds=round(time.monotonic() - content.started, 3),
                source=source,
            ),
        )


METADATA = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("n_frames", pa.int32(), nullable=False),
        pa.field("exif_orientation", pa.int8()),
        pa.field("flags", pa.int32(), nullable=False),
    ]
)
"""Of each row. ``position`` is that of the image in the data set, not the number of the row: the latter depends on how
many images fail in earlier parts, which a part that is written alone cannot know. The reader counts rows."""

CAPTION_FIELD = pa.field("caption", pa.string(), nullable=False)
"""Of each row too where images have captions."""

ERRORS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("exception", pa.string()),
        pa.field("message", pa.string(), nullable=False),
        pa.field("bytes", pa.int64()),
    ]
)
"""Of each image without a row; ``bytes`` is its encoded size where it could be read."""

SHARED = ("names", "folders", "templates", "features", "prompts")
"""What the class table repeats of the run."""

UNREADABLE_NPY = (OSError, ValueError, OverflowError, SyntaxError, TokenError, RecursionError, MemoryError)
"""What numpy raises on a damaged or hostile file (the last four from parsing its header as a Python literal)."""

UNREADABLE_PARQUET = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on one (ValueError also for names that are no text)."""


def metadata_schema(run: Inputs) -> pa.Schema:
    """Columns of the metadata."""
    return METADATA.append(CAPTION_FIELD) if run.captions else METADATA


def map_rows(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    """The rows of a ``.npy`` file, memory-mapped: nothing but the header is read.

    Raises:
        StorageError: If the file is no C-order array of this shape and dtype, or is longer or shorter than that.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except UNREADABLE_NPY as error:
        raise StorageError(f"{path} is damaged: {error}. Run `vilu embed` again to redo the part.") from error
    found = (rows.shape, rows.dtype.str, rows.flags.c_contiguous, size - rows.offset)
    expected = (shape, np.dtype(dtype).newbyteorder("<").str, True, rows.nbytes)
    if found != expected:
        raise StorageError(
            f"{path} has (shape, dtype, C order, bytes of data) {found}, the documents of the store say {expected}. "
            "Run `vilu embed` again to redo the part."
        )
    return rows


def read_columns(path: Path, schema: pa.Schema, names: Sequence[str], n_rows: int) -> pa.Table:
    """Some columns of a parquet file.

    Raises:
        StorageError: If it cannot be read, has another number of rows, or its columns are not those of the schema.
    """
    try:
        with pq.ParquetFile(path) as file:
            found = file.metadata.num_rows
            table = file.read(columns=list(names)) if found == n_rows else None
        if table is not None:
            table.validate(full=True)  # strings are UTF-8, offsets are within their buffers
            found = len(table)
    except UNREADABLE_PARQUET as error:
        raise StorageError(f"{path} is damaged: {error}. Run `vilu embed` again to redo the part.") from error
    if table is None or found != n_rows:
        raise StorageError(f"{path} has {found} rows, expected {n_rows}. Run `vilu embed` again to redo the part.")
    expected = pa.schema([schema.field(name) for name in names])
    if not table.schema.equals(expected):
        raise StorageError(
            f"{path} has columns {table.schema.to_string()!r}, expected {expected.to_string()!r}. "
            "Run `vilu embed` again to redo the part."
        )
    return table


def read_classes(root: Path, run: Run) -> tuple[StoredClasses, Tensor]:
    """The class table of a run and its (K, D) float32 text embeddings.

    Raises:
        StorageError: If a file is missing or damaged.
        ProvenanceError: If they belong to another run.
    """
    table = read_document(root / CLASSES, StoredClasses)
    if any(getattr(run, name) != getattr(table, name) for name in SHARED):
        raise ProvenanceError(f"{root / CLASSES} holds other classes, templates or columns than {root / RUN}.")
    rows = map_rows(root / TEXT, (len(run.names), run.space.embed_dim), "float32")
    files = {root / TEXT: table.text_file.sha256}
    for name, info in table.columns.items():
        _check_shape(root, run, name, info)
        files[column_path(root, name)] = info.sha256
    for path, sha256 in files.items():
        if file_hash(path) != sha256:
            raise StorageError(f"{path} is not the file that {CLASSES} vouches for. Run `vilu embed` again.")
    return table, require_usable(torch.from_numpy(np.array(rows)), "class text")


def column_path(root: Path, name: ClassColumn) -> Path:
    """File of a column of the classes or of the model."""
    return root / "columns" / f"{name}.npy"


def _check_shape(root: Path, run: Run, name: ClassColumn, info: ArrayInfo) -> None:
    n_classes, dim = len(run.names), run.space.embed_dim
    fixed = {"prompts": (n_classes, len(run.prompts), dim), "text_features": (n_classes,)}.get(name, (dim,))
    if info.shape[: len(fixed)] != fixed or len(info.shape) != COLUMNS[name][0]:
        raise StorageError(f"{root / CLASSES} is damaged: it says that {name} is of shape {info.shape}.")
    map_rows(column_path(root, name), info.shape, "float32")


MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Row:
    """Metadata of an image with an embedding; fields as in ``metadata_schema``."""

    position: int
    key: str
    label: int | None
    width: int
    height: int
    n_frames: int
    exif_orientation: int | None
    flags: int
    caption: str | None = None


@dataclass(frozen=True)
class ErrorRow:
    """An image without an embedding; fields as in ``ERRORS``."""

    key: str
    position: int
    stage: str
    kind: str
    exception: str | None
    message: str
    bytes: int | None


@dataclass
class PartRows:
    """What becomes of the images of a part, before it is written.

    Attributes:
        arrays: What is kept of the good images, by name: (n, ...) blocks in order, in the store's number format.
        rows: Their metadata.
        errors: The other images.
        started: Clock reading when the part was begun.
    """

    arrays: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def write_classes(root: Path, run: Run, text: Tensor, columns: Mapping[ClassColumn, Tensor]) -> None:
    """Write the (K, D) float32 text embeddings and the columns, then the class table that vouches for them.

    Raises:
        StorageError: If the file system refuses.
    """
    info = write_hashed(root / TEXT, _npy(text.numpy().astype("<f4")))
    files: dict[ClassColumn, ArrayInfo] = {}
    for name, values in columns.items():
        path = column_path(root, name)
        make_folder(path.parent)
        written = write_hashed(path, _npy(np.ascontiguousarray(values.numpy(), dtype="<f4")))
        files[name] = ArrayInfo(**dict(written), shape=tuple(values.shape))
    StoredClasses.of(run, info, files).write(root / CLASSES)


def _rows(name: str, blocks: Sequence[Tensor], shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    """Blocks of rows as one array, little-endian."""
    rows = np.zeros(shape, dtype=np.dtype(dtype).newbyteorder("<"))
    if blocks:
        np.concatenate([block.numpy() for block in blocks], out=rows)
    if not np.isfinite(rows).all():
        raise DataError(f"{name} has numbers beyond the range of {dtype}. Embed again with --dtype float32.")
    return rows


def _npy(array: NDArray[np.floating]) -> memoryview:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getbuffer()


def _parquet(rows: Sequence[Row | ErrorRow], schema: pa.Schema) -> memoryview:
    columns = {name: [_storable(getattr(row, name)) for row in rows] for name in schema.names}
    buffer = BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getbuffer()


def _storable(value: int | str | None) -> int | str | None:
    """Strings as UTF-8 can hold them: file names that are no text keep their odd bytes as escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
