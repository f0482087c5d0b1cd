"""JSON documents on disk, read as what they are: input from outside."""

from __future__ import annotations

import json
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

SCHEMA_VERSION: Final = 1
MAX_DOCUMENT_BYTES = 64 * 2**20
"""No document of ours comes near; a larger one is not read."""


class Model(BaseModel):
    """Immutable, refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def explain(error: ValidationError) -> str:
    """First finding of pydantic, on one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    return f"{where or 'document'}: {first['msg']} (got {json.dumps(first['input'], default=str):.80})"
