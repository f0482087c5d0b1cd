"""The bodies of requests and answers: what they hold, and how they are read."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from vilu.service.limits import PROBLEM, Refused

CLOSED: Final = ConfigDict(extra="forbid")
Body = TypeVar("Body", bound=BaseModel)

JSON: Final = "application/json"
FORM: Final = "multipart/form-data"


class ImagesIn(BaseModel):
    """Encoded images in base64."""

    model_config = CLOSED
    images: Annotated[
        list[str],
        Field(min_length=1, description="Encoded images (JPEG, PNG, WebP, ...) in base64."),
    ]


class EmbeddingsIn(BaseModel):
    """Image embeddings of the model that the predictor was fitted on.

    They are scaled to unit norm.
    """

    model_config = CLOSED
    embeddings: Annotated[
        list[list[FiniteFloat]], Field(min_length=1, description="(B, D) image embeddings.")
    ]
    features: Annotated[
        list[list[FiniteFloat]] | None,
        Field(description="(B, F), for predictors that look at what comes before."),
    ] = None


class LabelsIn(BaseModel):
    """What rows that were answered really show: a random sample of the accepted ones, or of all."""

    model_config = CLOSED
    labels: Annotated[
        dict[str, str],
        Field(
            min_length=1, description='Row of an answer to the name of its class, or "(outside)".'
        ),
    ]


class ChoiceIn(BaseModel):
    """The predictor that is to answer."""

    model_config = CLOSED
    answers: Annotated[str, Field(description='"first" or "second".')]


class RunnerUpOut(BaseModel):
    """An answer after the first."""

    label: str
    probability: float


class AnswerOut(BaseModel):
    """The answer for one image; see ``vilu.Answer``."""

    row: Annotated[str, Field(description="What it is known by to /v1/labels.")]
    label: str | None
    failure_probability: float | None
    uncertainty: float | None
    decision: str | None
    reason: str | None
    runners_up: list[RunnerUpOut]
    zero_shot: Annotated[
        str | None, Field(description="The zero-shot answer, where it is another one.")
    ]
    predictor: Annotated[str, Field(description="Fingerprint of the predictor that answered.")]


class AnswersOut(BaseModel):
    """The answers of one request, in its order."""

    request_id: str
    guarantee: Annotated[
        str, Field(description='"holds", "void", or "none" where nothing was guaranteed.')
    ]
    answers: list[AnswerOut]


def content_type(request: Request) -> str:
    """The content type of a request, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The JSON body; 415 or 422 says what was found."""
    stated = content_type(request)
    if stated != JSON:
        expected = JSON
        if kind is ImagesIn:
            expected = f"{JSON} or {FORM}"
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body must be {expected}. Found {stated!r:.60}."
        )
    content = await request.body()
    try:
        return await asyncio.to_thread(kind.model_validate_json, content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        detail = f"{where:.100}: {first['msg']:.200}."
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from None


async def read_images(request: Request) -> list[bytes]:
    """The encoded images of a form, or of JSON."""
    if content_type(request) == FORM:
        return await _read_form(request)
    body = await read_json(request, ImagesIn)
    images = []
    for place, text in enumerate(body.images):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refused(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"images.{place} is no base64 ({error})."
            ) from None
    return images


class InMemory(MultiPartParser):
    """Uploads never reach the disk: the bound on the body is the bound on their memory."""

    spool_max_size = 2**40

    def close(self, files: Sequence[UploadFile]) -> bool:
        """Close every file that was begun; returns whether the form has all of them."""
        # a file whose part never ended is in no form
        begun = self._files_to_close_on_error
        for file in begun:
            file.close()
        return len(begun) == len(files)


async def _read_form(request: Request) -> list[bytes]:
    """The files of a form, whatever their fields are called."""
    parser = InMemory(request.headers, request.stream(), max_files=10_000, max_fields=100)
    files: list[UploadFile] = []
    try:
        form = await parser.parse()
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        contents = [await file.read() for file in files]
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        detail = f"the form cannot be read: {error}"[:200]
        raise Refused(HTTPStatus.BAD_REQUEST, detail) from None
    finally:
        is_whole = parser.close(files)
    if not is_whole:
        raise Refused(HTTPStatus.BAD_REQUEST, "the form cannot be read: it ends within a file.")
    if not files:
        raise Refused(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "the form has no file. Send images as files of the form.",
        )
    return contents


# What OpenAPI says of them.

IMAGE_FILES: Final = {
    "type": "object",
    "required": ["images"],
    "properties": {
        "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    },
}
"""Schema of a form."""


def described_body(kind: type[BaseModel]) -> dict[str, Any]:
    """A body that we read ourselves: a model without models in it, or for images a form, too."""
    content = {JSON: {"schema": kind.model_json_schema()}}
    if kind is ImagesIn:
        content = {FORM: {"schema": IMAGE_FILES}, **content}
    return {"requestBody": {"required": True, "content": content}}


def described_answers(
    *, takes_body: bool, answer: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The answer, and all refusals."""
    refusals = {
        401: "no key",
        403: "a page of another site",
        421: "an unknown host",
        503: "loading, too slow, or without a journal",
    }
    if takes_body:
        refusals |= {
            400: "a form that cannot be read",
            408: "the body came too slowly",
            409: "nothing to audit",
            413: "too large",
            415: "another kind of body",
            422: "the body says something else",
            429: "no room",
        }
    success: dict[str, Any] = {"description": "what was asked for"}
    if answer is not None:
        success["model"] = answer
    problem = {"type": "object", "required": ["type", "title", "status", "detail"]}
    described: dict[int | str, dict[str, Any]] = {200: success}
    for code, why in refusals.items():
        described[code] = {"description": why, "content": {PROBLEM: {"schema": problem}}}
    return described
