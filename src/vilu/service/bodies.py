"""Models for request and answer bodies, and functions to read requests."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vilu.service.limits import PROBLEM_TYPE, Refused, require_at_most

NO_UNKNOWN_FIELDS: Final = ConfigDict(extra="forbid")  # refuses bodies with unknown fields
Body = TypeVar("Body", bound=BaseModel)

JSON_TYPE: Final = "application/json"
FORM_TYPE: Final = "multipart/form-data"

JSON_TEXT_PATTERN: Final = re.compile(rb'"[^"]*"')
"""Pattern for a JSON text without escaped characters."""


class ImagesIn(BaseModel):
    """Encoded images in base64."""

    model_config = NO_UNKNOWN_FIELDS
    images: Annotated[
        list[str],
        Field(min_length=1, description="Encoded images (JPEG, PNG, WebP, ...) in base64."),
    ]


class EmbeddingsIn(BaseModel):
    """Image embeddings. The predictor was fitted on embeddings from the same model.

    The embeddings are scaled to unit norm.
    """

    model_config = NO_UNKNOWN_FIELDS
    embeddings: Annotated[
        list[list[FiniteFloat]], Field(min_length=1, description="(B, D) image embeddings.")
    ]
    features: Annotated[
        list[list[FiniteFloat]] | None,
        Field(description="(B, F) image features, for predictors that use them."),
    ] = None

    row_noun: ClassVar[str] = "embeddings"  # for refusals

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.embeddings)

    def as_columns(self) -> dict[str, Any]:
        """Return the rows under the keys read by ``Engine.check_rows``."""
        return {"embeddings": self.embeddings, "features": self.features}


class RowsIn(BaseModel):
    """Rows of a table of answers, as columns, for a predictor fitted on tables."""

    model_config = NO_UNKNOWN_FIELDS
    id: Annotated[
        list[str],
        Field(min_length=1, description="Identifiers of B answers, which all differ."),
    ]
    numbers: Annotated[
        dict[str, list[FiniteFloat]],
        Field(description="Maps the name of a column, such as score_confidence, to B numbers."),
    ]
    features: Annotated[
        list[list[FiniteFloat]] | None,
        Field(description="(B, F) features, for predictors that use them."),
    ] = None

    row_noun: ClassVar[str] = "rows"  # for refusals

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.id)

    def as_columns(self) -> dict[str, Any]:
        """Map each column name to a list of values."""
        columns: dict[str, Any] = {**self.numbers, "id": self.id}
        if self.features is not None:
            columns["features"] = self.features
        return columns


class LabelsIn(BaseModel):
    """True labels of answered rows: of a random sample of the accepted rows, or of all rows."""

    model_config = NO_UNKNOWN_FIELDS
    labels: Annotated[
        dict[str, str],
        Field(
            min_length=1,
            description='Maps the row of an answer to the name of its class, or to "(outside)". '
            'For answers of a table: to "1" if the answer is right, to "0" if it is wrong.',
        ),
    ]


class CorrectionsIn(BaseModel):
    """New labels for rows with wrong labels."""

    model_config = NO_UNKNOWN_FIELDS
    before: Annotated[
        dict[str, str], Field(min_length=1, description="The present label of every row.")
    ]
    after: Annotated[
        dict[str, str], Field(min_length=1, description="The right label of the same rows.")
    ]


BODIES_WITH_TEXTS: Final[frozenset[type[BaseModel]]] = frozenset({RowsIn, LabelsIn, CorrectionsIn})
"""Models for bodies with texts from the client. Such texts may contain commas."""


class ChoiceIn(BaseModel):
    """The choice of the answering predictor."""

    model_config = NO_UNKNOWN_FIELDS
    answers: Annotated[
        str, Field(description='Name of the predictor that answers: "first" or "second".')
    ]


class RunnerUpOut(BaseModel):
    """A runner-up: a likely alternative to the answer."""

    label: str
    probability: float


class AnswerOut(BaseModel):
    """The answer about an image; see ``vilu.Answer``."""

    row: Annotated[
        str, Field(description="Id of this answer. Send it to /v1/labels with the label.")
    ]
    label: str | None
    failure_probability: float | None
    quantile: Annotated[
        float | None,
        Field(
            description="Share of the photos of the fit that are at most as doubtful, if the "
            "predictor has learned from no label; null otherwise."
        ),
    ] = None
    uncertainty: float | None
    decision: str | None
    reason: Annotated[
        str | None, Field(description="Why the answer is not accepted; null if it is.")
    ]
    runners_up: list[RunnerUpOut]
    zero_shot: Annotated[
        str | None, Field(description="The zero-shot answer if it differs from the label.")
    ]
    likely: Annotated[
        bool | None,
        Field(
            description="Whether the answer is likely right. This is an estimate, not a guarantee, "
            "and never changes the decision; null without an estimate."
        ),
    ]
    predictor: Annotated[str, Field(description="Fingerprint of the predictor that answered.")]


class AnswersOut(BaseModel):
    """The answers of a request, in the order of the images or rows."""

    request_id: str
    guarantee: Annotated[
        str, Field(description='"holds" or "void"; "none" if the predictor has no guarantee.')
    ]
    answers: list[AnswerOut]


def content_type(request: Request) -> str:
    """Return the content type of a request, without parameters."""
    content_type_header = request.headers.get("content-type", "")
    media_type, _, _ = content_type_header.partition(";")
    return media_type.strip().lower()


def count_values(content: bytes) -> int:
    """Count the commas in a JSON document, plus one. The document has at most as many values.

    Every value but the last is followed by a comma. The document is not parsed, so commas within
    texts are counted, too.
    """
    return content.count(b",") + 1


def count_values_outside_texts(content: bytes, limit: int) -> int:
    """Count the values in a JSON document. Unlike ``count_values``, leave out commas in texts.

    A document with ``limit`` labels has at most 2 * ``limit`` + 2 texts. If there are more texts,
    the document has too many values. Then half the number of texts is returned. This number is
    above ``limit``, too, and is found faster.
    """
    # without escaped characters, every quote begins or ends a text
    unescaped = content.replace(rb"\\", b"").replace(rb"\"", b"")
    n_texts = unescaped.count(b'"') // 2
    # A label and a row id are two texts. The two field names in a correction are texts, too.
    max_texts = 2 * limit + 2
    if n_texts > max_texts:
        return n_texts // 2
    content_without_texts = JSON_TEXT_PATTERN.sub(b"", unescaped)
    return count_values(content_without_texts)


async def read_json(request: Request, body_model: type[Body], *, limit: int, noun: str) -> Body:
    """Read a JSON body.

    Args:
        request: The request.
        body_model: Model for the body.
        limit: Maximum number of values in the body.
        noun: What a refusal calls these values, in the plural, such as "labels".

    Raises:
        Refused: 415 for a different content type, 413 for too many values, 422 for invalid content,
            such as two labels for a row.
    """
    found_type = content_type(request)
    if found_type != JSON_TYPE:
        expected_type = JSON_TYPE
        if body_model is ImagesIn:
            expected_type = f"{JSON_TYPE} or {FORM_TYPE}"
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body must be {expected_type}. Found {found_type!r:.60}.",
        )
    content = await request.body()
    n_values = count_values(content)
    if n_values > limit and body_model in BODIES_WITH_TEXTS:
        n_values = await asyncio.to_thread(count_values_outside_texts, content, limit)
    require_at_most(n_values, limit, noun=noun)
    return await asyncio.to_thread(_parse, content, body_model)


def _parse(content: bytes, body_model: type[Body]) -> Body:
    """Parse and check a JSON body. Raise Refused (422) if it is not valid."""
    try:
        body = body_model.model_validate_json(content)
    except ValidationError as error:
        first_error, *_ = error.errors(include_input=False, include_url=False)
        field = ".".join(map(str, first_error["loc"])) or "the body"
        detail = f"{field:.100}: {first_error['msg']:.200}."
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from None
    if body_model in BODIES_WITH_TEXTS:
        _require_distinct_names(content)
    return body


def _require_distinct_names(content: bytes) -> None:
    """Refuse a valid JSON document if a name, such as a row id, occurs twice in an object.

    Only the last value under this name would be taken, so a label or a number would be lost.
    """

    def check_object(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(name for name, _ in pairs)
        for name, count in counts.items():
            if count > 1:
                detail = f"{name!r:.60} occurs {count} times in one object. Give it one value."
                raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail)

    json.loads(content, object_pairs_hook=check_object)


async def read_images(request: Request, limit: int) -> list[bytes]:
    """Read the encoded images, at most ``limit``, from a form or from a JSON body."""
    if content_type(request) == FORM_TYPE:
        images = await _read_form(request)
        require_at_most(len(images), limit, noun="images")
        return images
    body = await read_json(request, ImagesIn, limit=limit, noun="images")
    return await asyncio.to_thread(_decode_base64, body.images)


def _decode_base64(texts: Sequence[str]) -> list[bytes]:
    images = []
    for index, text in enumerate(texts):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refused(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"images.{index} is no base64 ({error})."
            ) from None
    return images


class InMemoryParser(MultiPartParser):
    """A form parser with files in memory. The limit on the body limits this memory."""

    spool_max_size = 2**40  # larger than any body, so no upload is written to disk

    def close(self, files: Sequence[UploadFile]) -> bool:
        """Close all the parser's files, and return whether the form was complete."""
        # The parser has all files that begin in the form. ``files`` has only the complete files:
        # fewer if the form was cut off within a file.
        begun_files = self._files_to_close_on_error
        for file in begun_files:
            file.close()
        return len(begun_files) == len(files)


async def _read_form(request: Request) -> list[bytes]:
    """Read the files of a form. The field names do not matter."""
    # the service's own limit on the number of images is checked by ``read_images``
    parser = InMemoryParser(request.headers, request.stream(), max_files=10_000, max_fields=100)
    files: list[UploadFile] = []
    try:
        form = await parser.parse()
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        contents = [await file.read() for file in files]
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        detail = f"the form cannot be read: {error}"[:200]
        raise Refused(HTTPStatus.BAD_REQUEST, detail) from None
    finally:
        is_complete = parser.close(files)
    if not is_complete:
        raise Refused(HTTPStatus.BAD_REQUEST, "the form cannot be read: it ends within a file.")
    if not files:
        raise Refused(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "the form has no file. Send images as files of the form.",
        )
    return contents


# The rest of this module describes requests and answers in OpenAPI.

IMAGE_FORM_SCHEMA: Final = {
    "type": "object",
    "required": ["images"],
    "properties": {
        "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    },
}
"""Schema for a form with images."""


def openapi_body(body_model: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's description of a body that the route reads itself, without FastAPI.

    The body is JSON. A body with images is JSON or a form. In a service for tables, a body with
    embeddings may also be table rows (``RowsIn``). The model must not contain nested models.
    """
    schema = body_model.model_json_schema()
    if body_model is EmbeddingsIn:
        schema = {"anyOf": [schema, RowsIn.model_json_schema()]}
    content = {JSON_TYPE: {"schema": schema}}
    if body_model is ImagesIn:
        content = {FORM_TYPE: {"schema": IMAGE_FORM_SCHEMA}, **content}
    return {"requestBody": {"required": True, "content": content}}


def openapi_responses(
    *, takes_body: bool, answer_model: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's descriptions of a route's answer and all refusals."""
    refusals = {
        401: "no valid key",
        403: "a page of another site, or a key without the scope",
        421: "a host name that is not allowed",
        503: "the model is loading, the answer took too long, or no row can be written",
    }
    if takes_body:
        refusals |= {
            400: "the form cannot be read",
            408: "the body came too slowly",
            409: "there is no guarantee to audit, or a row has another label",
            413: "the body is too large, or has too many images, pixels, rows or labels",
            415: "the body has another content type",
            422: "the content of the body is not valid",
            429: "too many images, bytes or requests are in progress",
        }
    success_response: dict[str, Any] = {"description": "the answer"}
    if answer_model is not None:
        success_response["model"] = answer_model
    problem_schema = {"type": "object", "required": ["type", "title", "status", "detail"]}
    responses: dict[int | str, dict[str, Any]] = {200: success_response}
    content = {PROBLEM_TYPE: {"schema": problem_schema}}
    for code, description in refusals.items():
        responses[code] = {"description": description, "content": content}
    return responses
