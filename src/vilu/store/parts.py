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
from vilu.store.documents import (
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
from vilu.store.ledger import Ledger, alone, require_hash_once, write_hashed
from vilu.store.unreadable import UNREADABLE_NPY, or_damaged


@dataclass(frozen=True)
class Part:
    """Images ``start`` ... ``stop - 1`` of the data set, or the images of so many shards; and what is kept of them.

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
        """What the receipt vouches for, in the order in which it is written."""
        image, *others = map(self.array, self.arrays)
        return image, self.metadata, self.errors, *others

    def __len__(self) -> int:
        return self.stop - self.start


def plan(run: Run) -> list[Part]:
    """All parts of a run; they depend on nothing but the number of images (or shards) and the part size."""
    starts = range(0, run.extent, run.part_size)
    arrays = tuple(run.arrays)
    return [
        Part(i, start, min(start + run.part_size, run.extent), arrays)
        for i, start in enumerate(starts)
    ]


def positions(run: Run, part: Part) -> range:
    """Where the positions of a part's images are; of shards not all of them are taken."""
    return (
        range(part.start * SHARD, part.stop * SHARD) if run.shards else range(part.start, part.stop)
    )


def holds_all(run: Run, part: Part, found: NDArray[np.int64], n_in: int) -> bool:
    """Whether sorted positions are those of ``n_in`` images of the part: all, or in each shard the first ones."""
    places = positions(run, part)
    if not run.shards:
        return np.array_equal(found, np.arange(places.start, places.stop))
    number = found % SHARD
    inside = len(found) == 0 or (
        found[0] >= places.start and found[-1] < places.stop and number[0] == 0
    )
    return (
        len(found) == n_in
        and bool(inside)
        and bool(np.all((np.diff(found) == 1) | (number[1:] == 0)))
    )


class StoreLedger(Ledger[Part, Receipt]):
    """What is to be done and done in the folder of a store; ``data`` are the images, for those who embed."""

    what, command, doing = "embedding store", "vilu embed` or `vilu import", "embedding into"
    documents = (*Ledger.documents, CLASSES)
    always = ("img_emb", "text_emb", "metadata", "errors", "receipts", "attempts")
    folders = (*always, *get_args(ImageColumn), "columns")

    def __init__(self, root: Path, run: Run, data: ImageDataset | None = None) -> None:
        super().__init__(root, run.fingerprint, plan(run), Receipt)
        self.run, self.data = run, data

    @classmethod
    def made_by(cls, root: Path) -> str:
        """The command that has begun the store, as its ``run.json`` says."""
        return "vilu embed" if read_document(root / RUN, Run).imported is None else "vilu import"

    def said(self, part: Part, receipt: Receipt) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """Number, bounds and images; how many images shards hold, only the receipt knows."""
        n_in = receipt.n_in if self.run.shards else len(part)
        return (receipt.part, receipt.start, receipt.stop, receipt.n_in), (
            part.number,
            part.start,
            part.stop,
            n_in,
        )

    def look_up(self, part: Part, *, deep: bool = True) -> Receipt | str:
        """The receipt of a part that is there in full, and of shards as they are now; or else what it lacks."""
        found = super().look_up(part, deep=deep)
        stale = isinstance(found, Receipt) and found.source != self.source(part)
        return "its shards have changed" if stale else found

    def source(self, part: Part) -> str:
        """Fingerprint of the shards of a part as they are now; empty where parts are made of images."""
        return (
            cast("ShardedDataset", self.data).shard_fingerprint(part.start, part.stop)
            if self.run.shards
            else ""
        )

    def write_rows(self, part: Part, content: PartRows, batch_size: int, source: str) -> Receipt:
        """Write what became of the images of a part, with the fingerprint of the shards that they were read from."""
        run, n_ok, n_error = self.run, len(content.rows), len(content.errors)
        payloads = {
            part.array(name): _npy(
                _rows(name, content.arrays.get(name, []), (n_ok, *shape), run.dtype)
            )
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
                source=source,
            ),
        )


INT8, INT32, INT64, STRING = pa.int8(), pa.int32(), pa.int64(), pa.string()
OPTIONAL = {"label", "exif_orientation", "exception", "bytes"}


def _schema(kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, nullable=name in OPTIONAL) for name, kind in kinds.items()]
    )


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
"""Of each row. ``position`` is that of the image in the data set, not the number of the row: the latter depends on how
many images fail in earlier parts, which a part that is written alone cannot know. The reader counts
rows.
"""

CAPTION_FIELD = pa.field(
    "caption", STRING, nullable=False
)  # of each row too where images have captions
PICTURE_BYTES = 16
PICTURE_FIELD = pa.field("picture", pa.binary(PICTURE_BYTES), nullable=False)
"""Of each row too but of old stores: the first half of the SHA-256 of the picture's bytes (``ImageRecord.content``)."""

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
    more = [*([CAPTION_FIELD] if run.captions else []), *([PICTURE_FIELD] if run.pictures else [])]
    return pa.schema([*METADATA, *more])


def open_npy(path: Path, hint: str) -> tuple[NDArray[np.floating], int]:
    """A ``.npy`` file, memory-mapped (nothing but the header is read), and how many bytes follow its header."""
    # alone: Python 3.11 can fail where two threads read headers (ast.literal_eval, gh-106905)
    with or_damaged(path, hint, UNREADABLE_NPY), alone():
        rows = np.lib.format.open_memmap(path, mode="r")
        return rows, path.stat().st_size - rows.offset


def map_rows(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[np.floating]:
    """The rows of an array of the store; StorageError if it is no C-order array of just this shape and dtype."""
    rows, n_bytes = open_npy(path, REDO)
    found = (rows.shape, rows.dtype.str, rows.flags.c_contiguous, n_bytes)
    expected = (shape, np.dtype(dtype).newbyteorder("<").str, True, rows.nbytes)
    if found != expected:
        raise StorageError(
            f"{path} has (shape, dtype, C order, bytes of data) {found}, the documents of the store say {expected}. "
            f"{REDO}"
        )
    return rows


def read_columns(path: Path, schema: pa.Schema, names: Sequence[str], n_rows: int) -> pa.Table:
    """Some columns of a parquet file; StorageError if it has other rows, or its columns are not those of the schema."""
    with or_damaged(path, REDO), pq.ParquetFile(path) as file:
        if file.metadata.num_rows != n_rows:
            raise StorageError(
                f"{path} has {file.metadata.num_rows} rows, expected {n_rows}. {REDO}"
            )
        table = file.read(columns=list(names))
        table.validate(full=True)  # strings are UTF-8, offsets are within their buffers
    if len(table) != n_rows:
        raise StorageError(f"{path} has {len(table)} rows, expected {n_rows}. {REDO}")
    found, expected = table.schema, pa.schema([schema.field(name) for name in names])
    if not found.equals(expected):
        raise StorageError(
            f"{path} has columns {found.to_string()!r}, expected {expected.to_string()!r}. {REDO}"
        )
    return table


def read_classes(root: Path, run: Run) -> tuple[StoredClasses, Tensor]:
    """The class table of a run and its (K, D) float32 text embeddings."""
    table = read_document(root / CLASSES, StoredClasses)
    if any(getattr(run, name) != getattr(table, name) for name in SHARED):
        raise ProvenanceError(
            f"{root / CLASSES} holds other classes, templates or columns than {root / RUN}."
        )
    rows = map_rows(root / TEXT, (len(run.names), run.space.embed_dim), "float32")
    files = {root / TEXT: table.text_file.sha256}
    for name, info in table.columns.items():
        if len(info.shape) != COLUMNS[name][0] or not has_shape(run, name, info.shape):
            raise StorageError(
                f"{root / CLASSES} is damaged: it says that {name} is of shape {info.shape}."
            )
        map_rows(column_path(root, name), info.shape, "float32")
        files[column_path(root, name)] = info.sha256
    for path, sha256 in files.items():
        require_hash_once(path, sha256, table.again, CLASSES)
    return table, require_usable(torch.from_numpy(np.array(rows)), "class text")


def column_path(root: Path, name: ClassColumn) -> Path:
    """File of a column of the classes or of the model."""
    return root / "columns" / f"{name}.npy"


def has_shape(run: Run, name: ClassColumn, shape: tuple[int, ...]) -> bool:
    """Whether a column of the classes or of the model may have a shape; what was imported is of texts unknown."""
    n_classes, dim = len(run.names), run.space.embed_dim
    n_prompts, n_words = len(run.prompts), len(run.negatives)
    if run.imported is not None:
        n_prompts, n_words = shape[1], shape[0]
    shapes = {
        "prompts": (n_classes, n_prompts, dim),
        **dict.fromkeys(("text_features", "second_text"), (n_classes,)),
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
    """What becomes of the images of a part: of the good ones (n, ...) blocks of what is kept, by name, and metadata."""

    arrays: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: list[LabelledRow] = field(default_factory=list)
    errors: list[ErrorRow] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def write_classes(
    root: Path, run: Run, text: Tensor, columns: Mapping[ClassColumn, Tensor]
) -> None:
    """Write the (K, D) float32 text embeddings and the columns, then the class table that vouches for them."""
    info = write_hashed(root / TEXT, _npy(text.numpy().astype("<f4")))
    files: dict[ClassColumn, ArrayInfo] = {}
    for name, values in columns.items():
        path = column_path(root, name)
        make_folder(path.parent)
        written = write_hashed(path, _npy(np.ascontiguousarray(values.numpy(), dtype="<f4")))
        files[name] = ArrayInfo(**dict(written), shape=tuple(values.shape))
    StoredClasses.of(run, info, files).write(root / CLASSES)


def _rows(
    name: str, blocks: Sequence[Tensor], shape: tuple[int, ...], dtype: str
) -> NDArray[np.floating]:
    """Blocks of rows as one array, little-endian."""
    rows = np.zeros(shape, dtype=np.dtype(dtype).newbyteorder("<"))
    if blocks:
        np.concatenate([block.numpy() for block in blocks], out=rows)
    if not np.isfinite(rows).all():
        raise DataError(
            f"{name} has numbers beyond the range of {dtype}. Make the store again with --dtype float32."
        )
    return rows


def _npy(array: NDArray[np.floating]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _parquet(rows: Sequence[LabelledRow | ErrorRow], schema: pa.Schema) -> bytes:
    columns = {name: [_storable(getattr(row, name)) for row in rows] for name in schema.names}
    buffer = BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _storable(value: int | str | bytes | None) -> int | str | bytes | None:
    """Strings as UTF-8 can hold them: file names that are no text keep their odd bytes as escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
