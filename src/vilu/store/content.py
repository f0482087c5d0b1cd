"""Reading the binary files of a store, each checked against what the documents say of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.columns import COLUMNS
from vilu.errors import ProvenanceError, StorageError
from vilu.store.document import read_document
from vilu.store.manifest import CLASSES, RUN, TEXT, ArrayInfo, ClassColumn, ClassTable, Inputs, Run
from vilu.validate import require_usable

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


def read_classes(root: Path, run: Run) -> tuple[ClassTable, Tensor]:
    """The class table of a run and its (K, D) float32 text embeddings.

    Raises:
        StorageError: If a file is missing or damaged.
        ProvenanceError: If they belong to another run.
    """
    table = read_document(root / CLASSES, ClassTable)
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        StorageError: If it cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
