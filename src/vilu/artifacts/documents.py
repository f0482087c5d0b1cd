"""JSON documents that vilu writes: sealed with a digest, and checked when they are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
)

from vilu.artifacts.disk import LOG, or_refuse, write_bytes
from vilu.artifacts.hashing import digest
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def identity(content: Mapping[str, object], *left_out: str) -> str:
    """Digest of what ``without_version`` returns for the content of a document."""
    return digest(without_version(content, *left_out))


def without_version(content: Mapping[str, object], *left_out: str) -> dict[str, object]:
    """The content of a document, except the version of vilu and the keys in ``left_out``."""
    return {key: value for key, value in content.items() if key not in {MADE_WITH, *left_out}}


MADE_WITH: Final = "vilu"
"""Key of the version of vilu that wrote a document. Versions are information, never compared."""

SEAL: Final = "digest"
"""Last key of a document. The value is the ``digest`` of the content without this key."""

SCHEMA: Final = "schema_version"
"""Key of the schema version, in every document and table of vilu."""

SCHEMA_VERSION: Final = 2
"""Schema version of all documents and tables. Files from before vilu 0.2.0 have version 1."""

MAX_DOCUMENT_BYTES = 64 * 2**20  # larger files are not read; documents of vilu are far smaller


class Model(BaseModel):
    """Immutable pydantic model that refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Model):
    """A JSON file of vilu with a fixed schema."""

    again: ClassVar[str]  # how to make the document again, for messages
    fault: ClassVar[type[ViLUError]] = StorageError  # raised if the document is missing or damaged

    schema_version: Literal[2] = SCHEMA_VERSION


D = TypeVar("D", bound=Document)


def write_document(path: Path, document: Document) -> None:
    """Write a document atomically."""
    write_json(path, document.model_dump(mode="json"))


def read_document(path: Path, kind: type[D]) -> D:
    """Read a document of this kind, and check its digest, its schema and its fields."""
    content = read_json(path, kind.again, kind.fault)
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise kind.fault(
            f"{path} is damaged: {explain(error)}. {kind.again} to repair it."
        ) from error


def read_json(
    path: Path, again: str, fault: type[ViLUError] = DataError, *, seal: str = SEAL
) -> dict[str, Any]:
    """Read a JSON document of vilu, check its digest, and return its content without the digest.

    Args:
        path: The file.
        again: How to make the document again, for messages.
        fault: Exception to raise if the document is missing or damaged.
        seal: Key of the digest. In ``predictor.json`` it is "fingerprint".

    Raises:
        ProvenanceError: If the schema version is one that this vilu does not read.
    """
    text = read_bounded(path, again, fault)
    try:
        content = parse_json(text)
        stated_digest = content.pop(seal, None)
        actual_digest = digest(content)
    except (ValueError, RecursionError) as error:
        raise fault(
            f"{path} is damaged: it is not JSON of ours ({error}). {again} to repair it."
        ) from error
    if stated_digest is not None and stated_digest != actual_digest:
        raise fault(
            f"{path} is damaged: its content is not what its {seal} says. {again} to repair it."
        )
    require_schema(path, content, again, fault)
    if stated_digest is None:
        raise fault(f"{path} is damaged: it has no {seal}. {again} to repair it.")
    return content


def require_schema(
    path: str | os.PathLike[str],
    content: Mapping[str, object],
    again: str,
    fault: type[ViLUError] = DataError,
    *,
    oldest: int = SCHEMA_VERSION,
) -> None:
    """Raise unless a document or the metadata of a table have a schema version that can be read.

    Versions from ``oldest`` to ``SCHEMA_VERSION`` can be read.
    """
    version = content.get(SCHEMA)
    if version is None:
        raise ProvenanceError(
            f"{path} has no {SCHEMA}: it was made before vilu 0.2.0, or is no file of vilu. "
            f"{again}."
        )
    if type(version) is not int:
        raise fault(f"{path} is damaged: its {SCHEMA} is {version!r}, no whole number. {again}.")
    if version > SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {version}, this vilu reads {SCHEMA_VERSION}. Update vilu, "
            "or use the vilu that wrote it."
        )
    if version < oldest:
        raise ProvenanceError(f"{path} was made before vilu 0.2.0 (schema {version}). {again}.")


def parse_json(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: If the content is no JSON object, if a key occurs twice in an object, or if a
            number is NaN or infinite.
    """
    document = json.loads(
        content.decode(),
        object_pairs_hook=each_once,
        parse_float=_parse_finite,
        parse_constant=_refuse_number,
    )
    # An escape from \ud800 to \udfff without its other half is no character. Encoding it as UTF-8
    # raises a ValueError.
    if b"\\ud" in content.lower():
        json.dumps(document, ensure_ascii=False).encode()
    if not isinstance(document, dict):
        actual = type(document).__name__
        raise ValueError(f"it holds no object, but {actual}")  # noqa: TRY004 - as json's own
    return document


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object for ``json.loads``; ValueError if a key occurs twice."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return document


def _parse_finite(text: str) -> float:
    """Parse a number for ``json.loads``; ValueError if it is too large for a float ("1e999")."""
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def read_bounded(path: Path, again: str, fault: type[ViLUError], limit: int | None = None) -> bytes:
    """Read a file of at most ``limit`` bytes, by default ``MAX_DOCUMENT_BYTES``.

    A larger file raises ``fault`` and is not read to its end.
    """
    if limit is None:
        limit = MAX_DOCUMENT_BYTES
    with or_refuse(f"read {path}"):
        if not path.is_file():
            raise fault(f"{path} is missing. {again} to complete the folder.")
        with path.open("rb") as handle:
            content = handle.read(limit + 1)  # one byte more shows that a file is too large
    if len(content) > limit:
        raise fault(f"{path} is larger than {limit} bytes, so it is no file of vilu.")
    return content


def explain(error: ValidationError) -> str:
    """Describe the first error that pydantic found, on one line."""
    first, *_ = error.errors(include_url=False, include_context=False)
    where = ".".join(str(step) for step in first["loc"]) or "document"
    value = json.dumps(first["input"], default=str)
    return f"{where}: {first['msg']} (got {value:.80})"


def write_json(path: str | os.PathLike[str], value: Mapping[str, object], seal: str = SEAL) -> str:
    """Write a JSON document atomically, and return its digest.

    The file begins with the schema version and ends with the digest. It is UTF-8 and indented, and
    the keys keep their order.
    """
    what = f"cannot write {path}: its content"
    content = {SCHEMA: SCHEMA_VERSION, **value}
    content.pop(seal, None)  # a document that was read and changed may have its earlier digest
    # the digest is that of the values as they will be read: a tuple becomes a list
    plain = json.loads(plain_json(content, what))
    plain[seal] = digest(plain)
    write_bytes(path, plain_json(plain, what, indent=2) + b"\n")
    return str(plain[seal])


def log(folder: Path, **facts: object) -> None:
    """Add a line to the log of a folder.

    The line is written in a single call, so that lines of several processes do not mix.
    """
    line = plain_json(facts, "a line of the log") + b"\n"
    with or_refuse(f"write to {folder / LOG}"), (folder / LOG).open("ab", buffering=0) as handle:
        handle.write(line)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a folder's log, if any; a line that a crash cut off is left out."""
    path = folder / LOG
    lines: list[bytes] = []
    with or_refuse(f"read {path}"):
        if path.is_file():
            lines = path.read_bytes().splitlines()
    for line in lines:
        with suppress(ValueError, RecursionError):
            facts = json.loads(line)
            if isinstance(facts, dict):
                yield facts


def plain_json(value: object, what: str = "metadata", indent: int | None = None) -> bytes:
    """Encode a value as UTF-8 JSON; DataError if this is impossible, as for NaN and infinity."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be plain JSON, but {error}.") from error


Entry = TypeVar("Entry", bound="DataclassInstance")


def fill(kind: type[Entry], facts: Mapping[str, object], where: str) -> Entry:
    """Make a dataclass from values by field name, after a check of names and types.

    Messages call the origin of the values ``where``.
    """
    known = [field.name for field in fields(kind)]
    for name in facts:
        if name not in known:
            raise UsageError(f"{where} has no {name!r}; it has {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_python(facts)
    except ValidationError as error:
        raise UsageError(f"{where}, {explain(error)}.") from error
