"""Files: atomic writes, locks, checked JSON documents, tables with metadata."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)

from vilu.errors import BusyError, DataError, ProvenanceError, StorageError, UsageError, ViLUError

if TYPE_CHECKING:
    import pyarrow as pa
    from _typeshed import DataclassInstance

LOCK = ".lock"
"""Name of the lock of a folder."""

RUN, MANIFEST = "run.json", "manifest.json"
"""First and last document of a folder that a run fills (``vilu.store.ledger``)."""

CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP}
"""What network file systems answer that cannot sync a folder."""

TEMPORARY = re.compile(r"\.(?P<name>.+?)(?:\.(?P<host>[0-9a-f]{8}))?\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
"""Names of files in the making: what they are to be, whose they are (before there were hosts: without), a number."""

STALE = 24 * 3600.0
"""Seconds after which a file in the making is one that nobody makes any more, whoever began it."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Binary handle of a new file that takes the place of ``path`` when the block ends without an exception.

    The bytes go to a temporary file in the same folder, are synced to the disk, and are then renamed. After an
    exception or a crash ``path`` is what it was before.

    Raises:
        StorageError: If the file system refuses (no such folder, read-only, disk full).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{host_hash()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with or_refuse(f"write {target}", "Give a folder that exists, is writable and has room."):
        try:
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


@contextmanager
def or_refuse(doing: str, hint: str = "") -> Iterator[None]:
    """A block in which the file system's refusal becomes "cannot ``doing``", a ``StorageError``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {doing}: {error.strerror or error}.{hint and ' '}{hint}") from error


def host_hash() -> str:
    """Eight hex digits that tell this machine from others that write to the same file system."""
    return hashlib.blake2b(socket.gethostname().encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


def is_leftover(path: Path) -> bool:
    """Whether a file in the making (a name as in ``TEMPORARY``) has lost its maker.

    That is so if a process of this machine made it that is no more, or if it has not been touched for a day: what
    another machine is writing now looks just like what it left behind.
    """
    match = TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its maker was quicker
        return False
    return age > STALE or (match["host"] == host_hash() and not _is_alive(int(match["pid"])))


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended, but nobody has asked how yet; in a container that may never happen."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # no Linux, or it is gone by now
        return False
    return state.rpartition(b")")[2].split()[:1] == [b"Z"]


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlast a power cut."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made with its parents where it is missing; StorageError if the file system refuses."""
    folder = Path(path)
    with or_refuse(f"make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def locked(folder: Path, doing: str, patience: float = 0.0, name: str = LOCK, who: str = "process") -> Iterator[None]:
    """Hold the lock of a folder that is there; the system lets go of it when the process dies.

    Args:
        folder: The folder.
        doing: What another process that holds it does, for the message: "embedding into".
        patience: Seconds to wait for another process.
        name: Of the lock, where a folder has several.
        who: The other one, for the message.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / name)
    with or_refuse(f"write to {folder}"):
        try:
            lock.acquire(timeout=patience)
        except Timeout as error:
            raise BusyError(f"another {who} is {doing} {folder}. Wait for it, or give another folder.") from error
    try:
        yield
    finally:
        lock.release()


def file_hash(path: Path) -> str:
    """SHA-256 of a file; StorageError if it cannot be read."""
    with or_refuse(f"read {path}"), path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


SCHEMA_VERSION: Final = 1
MAX_DOCUMENT_BYTES = 64 * 2**20
"""No document of ours comes near; a larger one is not read."""


class Model(BaseModel):
    """Immutable, refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Model):
    """A JSON file of ours.

    Attributes:
        again: How it is made again, for messages.
        fault: Error where it is missing or damaged.
        later: Fields that came after the first such files. Unused they are not written, so that documents, and the
            hashes over them, are what they were before.
    """

    again: ClassVar[str]
    fault: ClassVar[type[ViLUError]] = StorageError
    later: ClassVar[frozenset[str]] = frozenset()

    schema_version: Literal[1] = SCHEMA_VERSION

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name not in self.later}

    def write(self, path: Path) -> None:
        """Write it atomically."""
        write_json(path, self.model_dump(mode="json"))


D = TypeVar("D", bound=Document)


class _Version(BaseModel):
    schema_version: int


def read_document(path: Path, kind: type[D]) -> D:
    """A document of ours, checked as any file from elsewhere.

    Raises:
        StorageError: If it cannot be read; the document's own ``fault`` if it is missing, too large, or damaged.
        ProvenanceError: If another version of vilu wrote it in a schema that this one does not know.
    """
    content = read_bounded(path, kind.again, kind.fault)
    try:
        version = _Version.model_validate_json(content).schema_version
        if version != SCHEMA_VERSION:
            raise ProvenanceError(
                f"{path} has schema version {version}, this vilu reads {SCHEMA_VERSION}. "
                f"{kind.again}, or use the vilu that wrote it."
            )
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise kind.fault(f"{path} is damaged: {explain(error)}. {kind.again} to repair it.") from error


def read_json(path: Path, again: str, fault: type[ViLUError] = DataError) -> Any:  # noqa: ANN401 - whatever it holds
    """What is in a JSON file; refused like a document, but for what it says."""
    content = read_bounded(path, again, fault)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise fault(f"{path} is damaged: it is not JSON ({error}). {again} to repair it.") from error


def read_bounded(path: Path, again: str, fault: type[ViLUError], limit: int | None = None) -> bytes:
    """The content of a file, of which no more than ``limit`` bytes (by default ``MAX_DOCUMENT_BYTES``) are read."""
    limit = MAX_DOCUMENT_BYTES if limit is None else limit
    if not path.is_file():
        raise fault(f"{path} is missing. {again} to complete the folder.")
    with or_refuse(f"read {path}"), path.open("rb") as handle:
        content = handle.read(limit + 1)
    if len(content) > limit:
        raise fault(f"{path} is larger than {limit} bytes, so it is no file of vilu.")
    return content


def explain(error: ValidationError) -> str:
    """First finding of pydantic, on one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    return f"{where or 'document'}: {first['msg']} (got {json.dumps(first['input'], default=str):.80})"


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write plain JSON (UTF-8, indented, keys in their order) atomically."""
    content = plain_json(value, f"cannot write {path}: its content", indent=2) + b"\n"
    with atomic_write(path) as handle:
        handle.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 atomically."""
    with atomic_write(path) as handle:
        handle.write(text.encode())


def plain_json(value: object, what: str = "metadata", indent: int | None = None) -> bytes:
    """UTF-8 JSON; DataError if ``value`` is not plain JSON, which NaN and infinity are not."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be plain JSON, but {error}.") from error


METADATA_KEY = b"vilu"

# A spreadsheet runs a cell that starts with one of these. An apostrophe before it makes it text; apostrophes that are
# already there get one more, so that reading can take exactly one away.
_FORMULA = r"^('*[=+\-@\t\r])"
_DEFUSED = r"^'('*[=+\-@\t\r])"


Entry = TypeVar("Entry", bound="DataclassInstance")


def fill(kind: type[Entry], facts: Mapping[str, object], where: str) -> Entry:
    """A dataclass from facts by name, whose names and types are checked; ``where`` is for messages."""
    known = [field.name for field in fields(kind)]
    unknown = next((name for name in facts if name not in known), None)
    if unknown is not None:
        raise UsageError(f"{where} has no {unknown!r}; it has {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_python(facts)
    except ValidationError as error:
        raise UsageError(f"{where}, {explain(error)}.") from error


def write_table(path: str | Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> None:
    """Write columns of one length atomically, as Parquet (with the metadata in its schema) or CSV (without)."""
    import pyarrow as pa
    import pyarrow.csv

    if table_suffix(path) == ".parquet":
        content = parquet_bytes(columns, metadata)
        with atomic_write(path) as handle:
            handle.write(content)
        return
    table = _replaced(pa.table(dict(columns)), None, _FORMULA, r"'\1")
    with atomic_write(path) as handle:
        handle.write((",".join(table.column_names) + "\n").encode())
        options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")
        pyarrow.csv.write_csv(table, handle, options)


def parquet_bytes(columns: Mapping[str, pa.Array], metadata: Mapping[str, object]) -> memoryview:
    """Columns of one length, with the metadata (plain JSON) in their schema, as the content of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    content = plain_json({"schema_version": SCHEMA_VERSION, **metadata})
    buffer = BytesIO()
    pyarrow.parquet.write_table(pa.table(dict(columns)).replace_schema_metadata({METADATA_KEY: content}), buffer)
    return buffer.getbuffer()


def _replaced(table: pa.Table, names: Collection[str] | None, pattern: str, replacement: str) -> pa.Table:
    """The table with a pattern replaced in its columns of text, by default all of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for index, column in enumerate(table.schema):
        if pa.types.is_string(column.type) if names is None else column.name in names:
            text = pc.replace_substring_regex(table.column(index), pattern=pattern, replacement=replacement)
            table = table.set_column(index, column.name, text)
    return table


def read_table(path: str | Path, text_columns: Collection[str]) -> tuple[pa.Table, dict[str, object]]:
    """A Parquet or CSV table and its metadata (empty for CSV and for tables of other programs).

    Args:
        path: The file.
        text_columns: Columns that hold text, whatever their content looks like.

    Raises:
        UsageError: If the suffix is neither ``.parquet`` nor ``.csv``.
        StorageError: If the file cannot be opened.
        DataError: If it is not such a table.
        ProvenanceError: If a newer version of vilu wrote it.
    """
    import pyarrow as pa
    import pyarrow.parquet

    suffix = table_suffix(path)
    try:
        source = pa.OSFile(str(path))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist.") from error
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error}") from error
    with source:
        try:
            table = pyarrow.parquet.read_table(source) if suffix == ".parquet" else _parse_csv(source, text_columns)
            names = table.column_names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a readable {suffix[1:]} table: {error}") from error
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{path} must have distinct columns. Repeated: {', '.join(sorted(repeated))}.")
    return table, _metadata(path, table)


def read_column(path: str | Path, table: pa.Table, name: str, kind: str) -> pa.ChunkedArray:
    """A column as Arrow type ``kind`` ("float64", "int64", "string", ...); all null if the table lacks it."""
    import pyarrow as pa

    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.type_for_alias(kind))])
    try:
        return table[name].cast(pa.type_for_alias(kind))
    except pa.ArrowException as error:
        raise DataError(f"column {name!r} of {path} must hold {kind} values: {error}") from error


def table_suffix(path: str | Path) -> str:
    """``.parquet`` or ``.csv``; UsageError if it is neither."""
    suffix = Path(path).suffix.lower()
    if suffix not in {".parquet", ".csv"}:
        raise UsageError(f"a table is a .parquet or a .csv file. Got {Path(path).name!r} instead.")
    return suffix


def _parse_csv(source: pa.NativeFile, text_columns: Collection[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv

    table = pyarrow.csv.read_csv(
        source,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(text_columns, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    return _replaced(table, text_columns, _DEFUSED, r"\1")


def _metadata(path: str | Path, table: pa.Table) -> dict[str, object]:
    content = (table.schema.metadata or {}).get(METADATA_KEY)
    if content is None:
        return {}
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise DataError(f"the metadata of {path} must be JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise DataError(f"the metadata of {path} must be a JSON object. Got {type(metadata).__name__} instead.")
    require_schema(path, metadata.pop("schema_version", None))
    return metadata


def require_schema(path: str | Path, version: object) -> None:
    """Refuse what another version of vilu wrote."""
    if version != SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {version!r}, this vilu reads version {SCHEMA_VERSION}. "
            "Install the vilu that wrote it."
        )
