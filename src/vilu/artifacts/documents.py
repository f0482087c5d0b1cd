"""JSON documents of ours: sealed with a digest, checked as any file from elsewhere."""

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
    """Digest of a document's content, whichever vilu made it, without the keys left out."""
    return digest(without_version(content, *left_out))


def without_version(content: Mapping[str, object], *left_out: str) -> dict[str, object]:
    """A document's content without the version of vilu, and without the keys left out."""
    return {key: value for key, value in content.items() if key not in {MADE_WITH, *left_out}}


MADE_WITH: Final = "vilu"
"""Key of the version of vilu that made something: for people, and no part of any comparison."""

SEAL: Final = "digest"  # last key of a document of ours: ``digest`` of all that stands before it
SCHEMA: Final = "schema_version"
"""Key of the number of the schema, in every document and table of ours."""

SCHEMA_VERSION: Final = 2
"""Of all documents and tables; 1 is of what was made before 0.2.0."""

MAX_DOCUMENT_BYTES = 64 * 2**20  # no document of ours comes near; a larger one is not read


class Model(BaseModel):
    """Immutable, refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Model):
    """A JSON file of ours."""

    again: ClassVar[str]  # how it is made again, for messages
    fault: ClassVar[type[ViLUError]] = StorageError  # error where it is missing or damaged

    schema_version: Literal[2] = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        """Write it atomically."""
        write_json(path, self.model_dump(mode="json"))


D = TypeVar("D", bound=Document)


def read_document(path: Path, kind: type[D]) -> D:
    """A document of ours, checked as any file from elsewhere."""
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
    """The content of a JSON document of ours without its seal, which is checked first.

    Args:
        path: The file.
        again: How the document is made again, for messages.
        fault: What is raised where it is missing or damaged.
        seal: Key of the digest; that of ``predictor.json`` is the predictor's fingerprint.

    Raises:
        ProvenanceError: If it has the schema of another version of vilu.
    """
    text = read_bounded(path, again, fault)
    try:
        content = parse_json(text)
        stated = content.pop(seal, None)
        right = digest(content)
    except (ValueError, RecursionError) as error:
        raise fault(
            f"{path} is damaged: it is not JSON of ours ({error}). {again} to repair it."
        ) from error
    if stated is not None and stated != right:
        raise fault(
            f"{path} is damaged: its content is not what its {seal} says. {again} to repair it."
        )
    require_schema(path, content, again, fault)
    if stated is None:
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
    """Refuse the content of a document, or the metadata of a table, of another schema.

    ``oldest`` is the lowest number that is read.
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
    """A JSON object.

    Raises:
        ValueError: If it is none, a key stands twice, or a number is none or infinite.
    """
    document = json.loads(
        content.decode(),
        object_pairs_hook=each_once,
        parse_float=_finite,
        parse_constant=_no_number,
    )
    # an escaped half of a character would be no text that can be written again
    if b"\\ud" in content.lower():
        json.dumps(document, ensure_ascii=False).encode()
    if not isinstance(document, dict):
        actual = type(document).__name__
        raise ValueError(f"it holds no object, but {actual}")  # noqa: TRY004 - as json's own
    return document


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for ``json.loads``; ValueError where it names something twice."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return document


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text)
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def read_bounded(path: Path, again: str, fault: type[ViLUError], limit: int | None = None) -> bytes:
    """The content of a file of at most ``limit`` bytes, by default ``MAX_DOCUMENT_BYTES``.

    Of a larger file no more is read.
    """
    if limit is None:
        limit = MAX_DOCUMENT_BYTES
    with or_refuse(f"read {path}"):
        if not path.is_file():
            raise fault(f"{path} is missing. {again} to complete the folder.")
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    if len(content) > limit:
        raise fault(f"{path} is larger than {limit} bytes, so it is no file of vilu.")
    return content


def explain(error: ValidationError) -> str:
    """First finding of pydantic, on one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(step) for step in first["loc"]) or "document"
    value = json.dumps(first["input"], default=str)
    return f"{where}: {first['msg']} (got {value:.80})"


def write_json(path: str | os.PathLike[str], value: Mapping[str, object], seal: str = SEAL) -> str:
    """Write plain JSON atomically; returns its digest.

    It is UTF-8, indented, its keys in their order, with the number of the schema, and sealed.
    """
    what = f"cannot write {path}: its content"
    content = {SCHEMA: SCHEMA_VERSION, **value}
    content.pop(seal, None)
    plain = json.loads(plain_json(content, what))
    plain[seal] = digest(plain)
    write_bytes(path, plain_json(plain, what, indent=2) + b"\n")
    return str(plain[seal])


def log(folder: Path, **facts: object) -> None:
    """Add a line to the log of a folder, at once, so that lines of several processes stay whole."""
    line = plain_json(facts, "a line of the log") + b"\n"
    with or_refuse(f"write to {folder / LOG}"), (folder / LOG).open("ab", buffering=0) as handle:
        handle.write(line)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's log, if it has one; a line that a crash has cut is left out."""
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
    """UTF-8 JSON; DataError if ``value`` is not plain JSON, which NaN and infinity are not."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be plain JSON, but {error}.") from error


Entry = TypeVar("Entry", bound="DataclassInstance")


def fill(kind: type[Entry], facts: Mapping[str, object], where: str) -> Entry:
    """A dataclass from facts by name; names and types are checked, ``where`` is for messages."""
    known = [field.name for field in fields(kind)]
    for name in facts:
        if name not in known:
            raise UsageError(f"{where} has no {name!r}; it has {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_python(facts)
    except ValidationError as error:
        raise UsageError(f"{where}, {explain(error)}.") from error
