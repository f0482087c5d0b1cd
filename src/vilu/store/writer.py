"""Writing a part: vectors, metadata, errors, and last the receipt that makes it exist."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from vilu.errors import DataError
from vilu.files import atomic_write, make_folder, write_json
from vilu.store.content import ERRORS, column_path, metadata_schema
from vilu.store.manifest import CLASSES, TEXT, ArrayInfo, ClassColumn, ClassTable, FileInfo, Receipt, Run
from vilu.store.parts import Part

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


def write_part(root: Path, run: Run, part: Part, content: PartRows, batch_size: int, source: str = "") -> Receipt:
    """Write the files of a part and then its receipt, each atomically; a kill in between leaves no part.

    Args:
        root: The store.
        run: What it is made from.
        part: The part.
        content: What became of its images.
        batch_size: Images per forward pass.
        source: Fingerprint of the shards that it was made from, if it was.

    Raises:
        DataError: If a number is too large for the store's number format.
        StorageError: If the file system refuses.
    """
    payloads = {
        part.array(name): _npy(_rows(name, content.arrays.get(name, []), (len(content.rows), *shape), run.dtype))
        for name, shape in run.arrays.items()
    }
    payloads[part.metadata] = _parquet(content.rows, metadata_schema(run))
    payloads[part.errors] = _parquet(content.errors, ERRORS)
    files = {name: write_hashed(root / name, payloads[name]) for name in part.files}
    receipt = Receipt(
        fingerprint=run.fingerprint,
        part=part.number,
        start=part.start,
        stop=part.stop,
        n_in=len(content.rows) + len(content.errors),
        n_ok=len(content.rows),
        n_error=len(content.errors),
        errors=dict(sorted(Counter(error.kind for error in content.errors).items())),
        files=files,
        batch_size=batch_size,
        seconds=round(time.monotonic() - content.started, 3),
        source=source,
    )
    write_json(root / part.receipt, receipt.model_dump(mode="json"))
    return receipt


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
    write_json(root / CLASSES, ClassTable.of(run, info, files).model_dump(mode="json"))


def write_hashed(path: Path, payload: memoryview) -> FileInfo:
    """Write a file atomically; its size and hash are of what was meant to be written."""
    with atomic_write(path) as handle:
        handle.write(payload)
    return FileInfo(bytes=len(payload), sha256=hashlib.sha256(payload).hexdigest())


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
