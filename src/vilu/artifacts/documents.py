"""JSON documents of vilu: sealed with a digest when written, and checked when read."""

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

from vilu.artifacts.disk import LOG_FILE, convert_os_errors, write_bytes
from vilu.artifacts.hashing import digest
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError, ViLUError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


VERSION_KEY: Final = "vilu"
"""Key of the vilu version that wrote a document: information for people, never compared."""

DIGEST_KEY: Final = "digest"
"""A document's last key. The value is the digest of all entries before it (``hashing.digest``)."""

SCHEMA_KEY: Final = "schema_version"
"""Key of the schema version, in all documents and tables that vilu writes."""

SCHEMA_VERSION: Final = 2
"""Schema version of all documents and tables. Files from before vilu 0.2.0 have version 1."""

MAX_DOCUMENT_BYTES = 64 * 2**20  # larger files are not read, as vilu writes far smaller files


def content_digest(content: Mapping[str, object], *excluded_keys: str) -> str:
    """Return the digest of a document's content without the vilu version and ``excluded_keys``."""
    compared_content = without_version(content, *excluded_keys)
    return digest(compared_content)


def without_version(content: Mapping[str, object], *excluded_keys: str) -> dict[str, object]:
    """Copy a document's content without the vilu version and without ``excluded_keys``."""
    excluded = {VERSION_KEY, *excluded_keys}
    return {key: value for key, value in content.items() if key not in excluded}


class FrozenModel(BaseModel):
    """Immutable pydantic model without unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(FrozenModel):
    """A JSON file of vilu with a fixed schema."""

    # for messages: how to make the document again, such as "Run `vilu embed` again"
    remedy: ClassVar[str]
    # exception to raise if the document is missing or damaged
    error_class: ClassVar[type[ViLUError]] = StorageError

    schema_version: Literal[2] = SCHEMA_VERSION


D = TypeVar("D", bound=Document)


def write_document(path: Path, document: Document) -> None:
    """Write a document atomically."""
    content = document.model_dump(mode="json")
    write_json(path, content)


def read_document(path: Path, document_class: type[D]) -> D:
    """Read and return a document, after checking its digest, schema version and fields."""
    remedy = document_class.remedy
    error_class = document_class.error_class
    content = read_json(path, remedy, error_class)
    try:
        text = json.dumps(content)
        return document_class.model_validate_json(text)
    except ValidationError as error:
        problem = first_error(error)
        raise error_class(f"{path} is damaged: {problem}. {remedy} to repair it.") from error


def read_json(
    path: Path, remedy: str, error_class: type[ViLUError] = DataError, digest_key: str = DIGEST_KEY
) -> dict[str, Any]:
    """Read a JSON document, check the digest, and return the content without the digest.

    Args:
        path: The file.
        remedy: For messages: how to make the document again, such as "Run `vilu embed` again".
        error_class: Exception to raise if the document is missing or damaged.
        digest_key: The digest's key in the document: "fingerprint" in ``predictor.json``.

    Raises:
        ProvenanceError: If this vilu does not read the schema version.
    """
    try:
        content = parse_json(read_bounded(path, remedy, error_class))
        stated_digest = content.pop(digest_key, None)
        actual_digest = digest(content)
    except (ValueError, RecursionError) as error:
        raise error_class(
            f"{path} is damaged: it is not JSON of ours ({error}). {remedy} to repair it."
        ) from error
    if stated_digest is not None and stated_digest != actual_digest:
        problem = f"its content is not what its {digest_key} says"
        raise error_class(f"{path} is damaged: {problem}. {remedy} to repair it.")
    # checked before a missing digest is reported, because the version may explain why it is missing
    require_schema(path, content, remedy, error_class)
    if stated_digest is None:
        raise error_class(f"{path} is damaged: it has no {digest_key}. {remedy} to repair it.")
    return content


def require_schema(
    path: str | os.PathLike[str],
    content: Mapping[str, object],
    remedy: str,
    error_class: type[ViLUError] = DataError,
    *,
    oldest_version: int = SCHEMA_VERSION,
) -> None:
    """Raise an error if this vilu cannot read the schema version of a document or table.

    Versions from ``oldest_version`` to ``SCHEMA_VERSION`` can be read. ``content`` is the
    document's content or the table's metadata. The other arguments are as for ``read_json``.
    """
    version = content.get(SCHEMA_KEY)
    if version is None:
        raise ProvenanceError(
            f"{path} has no {SCHEMA_KEY}: it was made before vilu 0.2.0, or is no file of vilu. "
            f"{remedy}."
        )
    if type(version) is not int:
        raise error_class(
            f"{path} is damaged: its {SCHEMA_KEY} is {version!r}, no whole number. {remedy}."
        )
    if version > SCHEMA_VERSION:
        raise ProvenanceError(
            f"{path} has schema version {version}, this vilu reads {SCHEMA_VERSION}. Update vilu, "
            "or use the vilu that wrote it."
        )
    if version < oldest_version:
        raise ProvenanceError(f"{path} was made before vilu 0.2.0 (schema {version}). {remedy}.")


def parse_json(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: If the content is no JSON object, if a key occurs twice in an object, or if a
            number is NaN or infinite.
    """
    document = json.loads(
        content.decode(),
        object_pairs_hook=object_of_distinct_keys,
        parse_float=_parse_finite,
        parse_constant=_refuse_number,
    )
    # The escapes \ud800 to \udfff are halves of characters. A half without the other half cannot be
    # encoded as UTF-8: ``encode`` raises a ValueError.
    if b"\\ud" in content.lower():
        json.dumps(document, ensure_ascii=False).encode()
    if not isinstance(document, dict):
        actual_type = type(document).__name__
        raise ValueError(f"it holds no object, but {actual_type}")  # noqa: TRY004 - as json's own
    return document


def object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object for ``json.loads``. Raise ValueError if a key occurs twice."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return document


def _parse_finite(text: str) -> float:
    """Parse a number for ``json.loads``. Raise ValueError if it exceeds a float, as in "1e999"."""
    value = float(text)
    if not math.isfinite(value):
        _refuse_number(text)
    return value


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def read_bounded(
    path: Path, remedy: str, error_class: type[ViLUError], max_bytes: int | None = None
) -> bytes:
    """Read a file of at most ``max_bytes``, by default ``MAX_DOCUMENT_BYTES``.

    If the file is missing or larger, ``error_class`` is raised. A larger file is not read to the
    end. ``remedy`` is advice in the message: how to make a missing file.
    """
    if max_bytes is None:
        max_bytes = MAX_DOCUMENT_BYTES
    with convert_os_errors(f"cannot read {path}"):
        if not path.is_file():
            raise error_class(f"{path} is missing. {remedy} to complete the folder.")
        with path.open("rb") as handle:
            content = handle.read(max_bytes + 1)  # one byte more, to notice a file above the limit
    if len(content) > max_bytes:
        raise error_class(f"{path} is larger than {max_bytes} bytes, so it is no file of vilu.")
    return content


def first_error(error: ValidationError) -> str:
    """Describe the first error found by pydantic, on a single line."""
    first_problem, *_ = error.errors(include_url=False, include_context=False)
    field = ".".join(str(step) for step in first_problem["loc"]) or "document"
    value = json.dumps(first_problem["input"], default=str)
    return f"{field}: {first_problem['msg']} (got {value:.80})"


def write_json(
    path: str | os.PathLike[str], value: Mapping[str, object], digest_key: str = DIGEST_KEY
) -> str:
    """Write a JSON document atomically, and return its digest.

    The file begins with the schema version and ends with the digest, under ``digest_key``. The
    text is indented UTF-8, and the keys keep their order.
    """
    subject = f"cannot write {path}: its content"
    content = {SCHEMA_KEY: SCHEMA_VERSION, **value}
    content.pop(digest_key, None)  # a document that was read and changed may have an old digest
    # The digest is computed from the values as a later reader will see them. So the values are
    # encoded and parsed first: for example, a tuple becomes a list.
    document = json.loads(plain_json(content, subject=subject))
    document[digest_key] = digest(document)
    write_bytes(path, plain_json(document, subject=subject, indent=2) + b"\n")
    return str(document[digest_key])


def append_to_log(folder: Path, **facts: object) -> None:
    """Add ``facts`` to a folder's log, as a line of JSON.

    The line is written in a single call, so lines from several processes do not mix.
    """
    path = folder / LOG_FILE
    line = plain_json(facts, subject="a line of the log") + b"\n"
    with convert_os_errors(f"cannot write to {path}"), path.open("ab", buffering=0) as handle:
        handle.write(line)


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the facts in each line of a folder's log. Skip a line that a crash cut off."""
    path = folder / LOG_FILE
    lines: list[bytes] = []
    with convert_os_errors(f"cannot read {path}"):
        if path.is_file():
            lines = path.read_bytes().splitlines()
    for line in lines:
        with suppress(ValueError, RecursionError):
            facts = json.loads(line)
            if isinstance(facts, dict):
                yield facts


def plain_json(value: object, subject: str = "metadata", indent: int | None = None) -> bytes:
    """Encode a value as UTF-8 JSON. Raise DataError if this is impossible, as for NaN and infinity.

    The error message is "SUBJECT must be plain JSON, but REASON."
    """
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{subject} must be plain JSON, but {error}.") from error


Entry = TypeVar("Entry", bound="DataclassInstance")


def fill_dataclass(entry_class: type[Entry], values: Mapping[str, object], title: str) -> Entry:
    """Make an ``entry_class`` from field values, and check the fields' names and types.

    Args:
        entry_class: The dataclass.
        values: Maps field names to values.
        title: The entry's name in messages, such as "backbone 'compact'".
    """
    field_names = [field.name for field in fields(entry_class)]
    for name in values:
        if name not in field_names:
            listed_names = ", ".join(field_names)
            raise UsageError(f"{title} has no {name!r}; it has {listed_names}.")
    try:
        adapter = TypeAdapter(entry_class)
        return adapter.validate_python(values)
    except ValidationError as error:
        problem = first_error(error)
        raise UsageError(f"{title}, {problem}.") from error
