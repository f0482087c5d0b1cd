"""Parts of a store: what is in one, how it is written and read, and the classes beside them."""

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

from vilu.artifacts.disk import RUN, make_folder
from vilu.artifacts.documents import read_document
from vilu.datasets.base import SHARD, ImageDataset, ShardedDataset
from vilu.embeddings.checks import require_usable
from vilu.embeddings.columns import COLUMNS
from vilu.errors import DataError, ProvenanceError, StorageError
from vilu.store.ledger import FileInfo, Ledger, alone, require_hash_once, write_hashed
from vilu.store.manifest import (
    CLASSES,
    IMAGE,
    SHARED,
    TEXT,
    ArrayInfo,
    ClassColumn,
    ImageColumn,
    Receipt,
    Run,
    StoredClasses,
)
from vilu.store.unreadable import UNREADABLE_NPY, or_damaged


@dataclass(frozen=True)
class Part:
    """Images ``start`` ... ``stop - 1`` of the data set, or those shards, and their files.

    File names follow LAION's layout, so its tools read the vectors and the metadata as they are.
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
        """The files that the receipt vouches for, in the order in which they are written."""
        first, *more = map(self.array, self.arrays)
        return first, self.metadata, self.errors, *more

    def __len__(self) -> int:
        return self.stop - self.start


def plan(run: Run) -> list[Part]:
    """All parts of a run, from nothing but the number of images (or shards) and the part size."""
    arrays = tuple(run.arrays)
    parts: list[Part] = []
    for number, start in enumerate(range(0, run.extent, run.part_size)):
        stop = min(start + run.part_size, run.extent)
        parts.append(Part(number, start, stop, arrays))
    return parts


def positions(run: Run, part: Part) -> range:
    """Where the positions of a part's images are; of shards not all of them are taken."""
    if run.shards:
        return range(part.start * SHARD, part.stop * SHARD)
    return range(part.start, part.stop)


def holds_all(run: Run, part: Part, at: NDArray[np.int64], n_in: int) -> bool:
    """Whether the sorted positions ``at`` are those of the ``n_in`` images of a part.

    Without shards these are all positions of the part; with shards, the first ones in each shard.
    """
    possible = positions(run, part)
    if not run.shards:
        return np.array_equal(at, np.arange(possible.start, possible.stop))
    if len(at) != n_in:
        return False
    if n_in == 0:
        return True
    # Positions count within a shard from a multiple of SHARD, so number 0 begins one.
    number = at % SHARD
    if at[0] < possible.start or at[-1] >= possible.stop or number[0] != 0:
        return False
    goes_on = np.diff(at) == 1
    begins_shard = number[1:] == 0
    return bool(np.all(goes_on | begins_shard))


class StoreLedger(Ledger[Part, Receipt]):
    """What is to be done and done in the folder of a store.

    ``data`` are the images, for those who embed.
    """

    what = "embedding store"
    command = "vilu embed` or `vilu import"
    doing = "embedding into"
    documents = (*Ledger.documents, CLASSES)
    always = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
    folders = (*always, *get_args(ImageColumn), "columns")

    def __init__(self, root: Path, run: Run, data: ImageDataset | None = None) -> None:
        super().__init__(root, run.fingerprint, plan(run), Receipt)
        self.run = run
        self.data = data

    @classmethod
    def made_by(cls, root: Path) -> str:
        """The command that has begun the store, as its ``run.json`` says."""
        run = read_document(root / RUN, Run)
        return "vilu embed" if run.imported is None else "vilu import"

    def stated_and_planned(
        self, part: Part, receipt: Receipt
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Number, bounds and images; how many images shards hold, only the receipt knows."""
        n_in = receipt.n_in if self.run.shards else len(part)
        stated = (receipt.part, receipt.start, receipt.stop, receipt.n_in)
        planned = (part.number, part.start, part.stop, n_in)
        return stated, planned

    def look_up(self, part: Part, *, deep: bool = True) -> Receipt | str:
        """The receipt of a part that is there in full, or else what it lacks.

        Of shards it must be of the shards as they are now.
        """
        outcome = super().look_up(part, deep=deep)
        if isinstance(outcome, Receipt) and outcome.source != self.source(part):
            return "its shards have changed"
        return outcome

    def source(self, part: Part) -> str:
        """Fingerprint of a part's shards as they are now; empty where parts are made of images."""
        if not self.run.shards:
            return ""
        return cast("ShardedDataset", self.data).shard_fingerprint(part.start, part.stop)

    def write_rows(self, part: Part, content: PartRows, batch_size: int, source: str) -> Receipt:
        """Write a part's rows and errors; ``source``: fingerprint of the shards of them."""
        n_ok = len(content.rows)
        n_error = len(content.errors)
        kinds = Counter(error.kind for error in content.errors)

        def receipt_of(files: dict[str, FileInfo]) -> Receipt:
            return Receipt(
                fingerprint=self.run.fingerprint,
                part=part.number,
                start=part.start,
                stop=part.stop,
                n_in=n_ok + n_error,
                n_ok=n_ok,
                n_error=n_error,
                errors=dict(sorted(kinds.items())),
                files=files,
                batch_size=batch_size,
                source=source,
            )

        return self.write(part, self._payloads(part, content), receipt_of)

    def _payloads(self, part: Part, content: PartRows) -> dict[str, bytes]:
        """The bytes of every file of a part, by name."""
        payloads: dict[str, bytes] = {}
        for name, shape in self.run.arrays.items():
            blocks = content.arrays.get(name, [])
            rows = _rows(name, blocks, (len(content.rows), *shape), self.run.dtype)
            payloads[part.array(name)] = _npy(rows)
        payloads[part.metadata] = _parquet(content.rows, metadata_schema(self.run))
        payloads[part.errors] = _parquet(content.errors, ERRORS)
        return payloads


INT8 = pa.int8()
INT32 = pa.int32()
INT64 = pa.int64()
STRING = pa.string()
OPTIONAL = {"label", "exif_orientation", "exception", "bytes"}


def _schema(kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    fields = [pa.field(name, kind, nullable=name in OPTIONAL) for name, kind in kinds.items()]
    return pa.schema(fields)


METADATA = _schema(
    {
        "position": INT64,
        "key": STRING,
        "label": INT32,
        "width": INT32,
        "height": INT32,
        "n_frames": INT32,
    }
    | {"exif_orientation": INT8, "flags": INT32}
)
"""Of each row. ``position`` is that of the image in the data set, not the number of the row.

The latter depends on how many images fail in earlier parts, which a part that is written alone
cannot know. The reader counts rows.
"""

# of each row too where images have captions
CAPTION_FIELD = pa.field("caption", STRING, nullable=False)
PICTURE_BYTES = 16
PICTURE_FIELD = pa.field("picture", pa.binary(PICTURE_BYTES), nullable=False)
"""Of each row that was embedded: the first half of the SHA-256 of ``ImageRecord.content``."""

ERRORS = _schema(
    {"key": STRING, "position": INT64, "stage": STRING, "kind": STRING}
    | {"exception": STRING, "message": STRING, "bytes": INT64}
)
"""Of each image without a row; ``bytes`` is its encoded size where it could be read."""

REDO = "Run `vilu embed` (or `vilu import`) again to redo the part."


def metadata_schema(run: Run) -> pa.Schema:
    """Columns of the metadata; of what was imported no picture is known."""
    if run.imported is not None:
        return pa.schema([METADATA.field(name) for name in ("position", "key", "label")])
    fields = list(METADATA)
    if run.captions:
        fields.append(CAPTION_FIELD)
    if run.pictures:
        fields.append(PICTURE_FIELD)
    return pa.schema(fields)


def open_npy(path: Path, hint: str) -> tuple[NDArray[np.floating], int]:
    """A ``.npy`` file, memory-mapped (its header alone is read), and the bytes after its header."""
    # alone: Python 3.11 can fail where two threads read headers (ast.literal_eval, gh-106905)
    with or_damaged(path, hint, UNREADABLE_NPY), alone():
        rows = np.lib.format.open_memmap(path, mode="r")
        return rows, path.stat().st_size - rows.offset


def map_rows(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    """The rows of an array of the store; StorageError if shape, dtype or order is another."""
    rows, n_bytes = open_npy(path, REDO)
    stored = (rows.shape, rows.dtype.str, rows.flags.c_contiguous, n_bytes)
    little_endian = np.dtype(dtype).newbyteorder("<").str
    expected = (shape, little_endian, True, rows.nbytes)
    if stored != expected:
        raise StorageError(
            f"{path} has (shape, dtype, C order, bytes of data) {stored}, the documents of the "
            f"store say {expected}. {REDO}"
        )
    return rows


def read_columns(path: Path, schema: pa.Schema, names: Sequence[str], n_rows: int) -> pa.Table:
    """Some columns of a parquet file; StorageError where rows or types are not as expected."""
    with or_damaged(path, REDO), pq.ParquetFile(path) as file:
        # before anything is read: a forged file may promise more rows than memory holds
        if file.metadata.num_rows != n_rows:
            raise StorageError(
                f"{path} has {file.metadata.num_rows} rows, expected {n_rows}. {REDO}"
            )
        table = file.read(columns=list(names))
        table.validate(full=True)  # strings are UTF-8, offsets are within their buffers
    if len(table) != n_rows:
        raise StorageError(f"{path} has {len(table)} rows, expected {n_rows}. {REDO}")
    expected = pa.schema([schema.field(name) for name in names])
    if not table.schema.equals(expected):
        raise StorageError(
            f"{path} has columns {table.schema.to_string()!r}, expected {expected.to_string()!r}. "
            f"{REDO}"
        )
    return table


def read_classes(root: Path, run: Run) -> tuple[StoredClasses, Tensor]:
    """The class table of a run and its (K, D) float32 text embeddings."""
    table = read_document(root / CLASSES, StoredClasses)
    for name in SHARED:
        if getattr(run, name) != getattr(table, name):
            raise ProvenanceError(
                f"{root / CLASSES} holds other classes, templates or columns than {root / RUN}."
            )
    rows = map_rows(root / TEXT, (len(run.names), run.space.embed_dim), "float32")
    hashes = {root / TEXT: table.text_file.sha256}
    for column, info in table.columns.items():
        if not _is_column_shape(run, column, info.shape):
            raise StorageError(
                f"{root / CLASSES} is damaged: it says that {column} is of shape {info.shape}."
            )
        map_rows(column_path(root, column), info.shape, "float32")
        hashes[column_path(root, column)] = info.sha256
    # last, since it reads all bytes: a wrong shape is told before
    for path, sha256 in hashes.items():
        require_hash_once(path, sha256, table.again, CLASSES)
    return table, require_usable(torch.from_numpy(np.array(rows)), "class text")


def _is_column_shape(run: Run, name: ClassColumn, shape: tuple[int, ...]) -> bool:
    """Whether a column has as many dimensions as its kind, and sizes that fit the run."""
    n_dims, _ = COLUMNS[name]
    return len(shape) == n_dims and has_shape(run, name, shape)


def column_path(root: Path, name: ClassColumn) -> Path:
    """File of a column of the classes or of the model."""
    return root / "columns" / f"{name}.npy"


def has_shape(run: Run, name: ClassColumn, shape: tuple[int, ...]) -> bool:
    """Whether a column of the classes or of the model may have a shape."""
    n_classes = len(run.names)
    dim = run.space.embed_dim
    n_prompts = len(run.prompts)
    n_words = len(run.negatives)
    if run.imported is not None:  # of texts unknown, so any number of them fits
        n_prompts = shape[1]
        n_words = shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "prompts": (n_classes, n_prompts, dim),
        "text_features": (n_classes,),
        "second_text": (n_classes,),
        "negatives": (n_words, dim),
    }
    fixed = shapes.get(name, (dim,))
    return shape[: len(fixed)] == fixed


MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class LabelledRow:
    """What is known of every row."""

    position: int
    key: str
    label: int | None


@dataclass(frozen=True)
class Row(LabelledRow):
    """Metadata of an image with an embedding; fields as in ``metadata_schema``."""

    width: int
    height: int
    n_frames: int
    exif_orientation: int | None
    flags: int
    caption: str | None
    picture: bytes


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
    """What becomes of the images of a part: metadata of the good ones, and the bad ones.

    ``arrays`` has (n, ...) blocks of the good ones by the name of the array.
    """

    arrays: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[LabelledRow] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def write_classes(
    root: Path, run: Run, text: Tensor, columns: Mapping[ClassColumn, Tensor]
) -> None:
    """Write the (K, D) float32 text embeddings, the columns, and last their class table."""
    text_file = write_hashed(root / TEXT, _npy(text.numpy().astype("<f4")))
    column_files: dict[ClassColumn, ArrayInfo] = {}
    for name, values in columns.items():
        path = column_path(root, name)
        make_folder(path.parent)
        rows = np.ascontiguousarray(values.numpy(), dtype="<f4")
        info = write_hashed(path, _npy(rows))
        column_files[name] = ArrayInfo(**dict(info), shape=tuple(values.shape))
    # as a receipt: the table vouches for the files, so it comes after them
    StoredClasses.of(run, text_file, column_files).write(root / CLASSES)


def _rows(
    name: str, blocks: Sequence[Tensor], shape: tuple[int, ...], dtype: str
) -> NDArray[np.floating]:
    """Blocks of rows as one array, little-endian."""
    rows = np.zeros(shape, dtype=np.dtype(dtype).newbyteorder("<"))
    if blocks:
        np.concatenate([block.numpy() for block in blocks], out=rows)
    if not np.isfinite(rows).all():
        raise DataError(
            f"{name} has numbers beyond the range of {dtype}. Make the store again with --dtype "
            "float32."
        )
    return rows


def _npy(array: NDArray[np.floating]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _parquet(rows: Sequence[LabelledRow | ErrorRow], schema: pa.Schema) -> bytes:
    columns: dict[str, list[int | str | bytes | None]] = {}
    for name in schema.names:
        columns[name] = [_storable(getattr(row, name)) for row in rows]
    buffer = BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _storable(value: int | str | bytes | None) -> int | str | bytes | None:
    """Strings as UTF-8 can hold them: file names that are no text keep odd bytes as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value
