"""JSON documents of a store, read as what they are: input from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, ValidationError, model_serializer

from vilu.document import MAX_DOCUMENT_BYTES, SCHEMA_VERSION, Model, explain
from vilu.errors import ProvenanceError, StorageError


class Document(Model):
    """A file of the store.

    Attributes:
        later: Fields that came after the first stores. Unused they are not written, so that documents, and the hashes
            over them, are what they were before.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    schema_version: Literal[1] = SCHEMA_VERSION

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value or name not in self.later}


D = TypeVar("D", bound=Document)


class _Version(BaseModel):
    schema_version: int


def read_document(path: Path, kind: type[D]) -> D:
    """A document of the store, checked.

    Raises:
        StorageError: If the file is missing, too large, or not what it should be.
        ProvenanceError: If another version of vilu wrote it in a schema that this one does not know.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing. Run `vilu embed` again to complete the store.")
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}.") from error
    if len(content) > MAX_DOCUMENT_BYTES:
        raise StorageError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, so it is no file of vilu.")
    try:
        version = _Version.model_validate_json(content).schema_version
        if version != SCHEMA_VERSION:
            raise ProvenanceError(
                f"{path} has schema version {version}, this vilu reads {SCHEMA_VERSION}. "
                "Embed again, or use the vilu that wrote it."
            )
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(f"{path} is damaged: {explain(error)}. Run `vilu embed` again to repair it.") from error
