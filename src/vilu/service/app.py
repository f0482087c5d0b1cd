"""The routes: what is asked, what is answered, and how mistakes are told."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from vilu.artifacts.disk import make_folder, write_bytes
from vilu.artifacts.documents import plain_json
from vilu.datasets.images import sniff
from vilu.errors import DataError, StorageError, UsageError
from vilu.service.limits import PROBLEM, WORK, ClientLimits, Gate, Refused, Room, problem
from vilu.service.measures import Measures
from vilu.text import csp_hash, page_of

if TYPE_CHECKING:
    from vilu.service.engine import Engine, Judgement, Reply

logger = logging.getLogger(__name__)

CLOSED: Final = ConfigDict(extra="forbid")
Body = TypeVar("Body", bound=BaseModel)


class ImagesIn(BaseModel):
    """Encoded images in base64."""

    model_config = CLOSED
    images: Annotated[
        list[str],
        Field(min_length=1, description="Encoded images (JPEG, PNG, WebP, ...) in base64."),
    ]


class EmbeddingsIn(BaseModel):
    """Image embeddings of the model that the predictor was fitted on; they are scaled to unit norm."""

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
    """What is said of one image; see ``vilu.Answer``."""

    row: Annotated[str, Field(description="What it is known by to /v1/labels.")]
    label: str | None
    failure_probability: float | None
    uncertainty: float | None
    decision: str | None
    reason: str | None
    runners_up: list[RunnerUpOut]
    predictor: Annotated[str, Field(description="Fingerprint of the predictor that answered.")]


class AnswersOut(BaseModel):
    """The answers of one request, in its order."""

    request_id: str
    promise: Annotated[
        str, Field(description='"holds", "void", or "none" where nothing was promised.')
    ]
    answers: list[AnswerOut]


class InMemory(MultiPartParser):
    """Uploads never reach the disk: the bound on the body is the bound on their memory."""

    spool_max_size = 2**40

    def close(self, files: Sequence[UploadFile]) -> bool:
        """Close what was begun; whether that is these files alone."""
        begun = (
            self._files_to_close_on_error
        )  # also of a part that never ended, which is in no form
        for file in begun:
            file.close()
        return len(begun) == len(files)


class Service:
    """The application: it listens at once, and answers as soon as there is an engine.

    Args:
        limits: What clients may do.
        keep: Folder in which images are kept that were answered; None: nothing that a client sends
            is kept.
    """

    def __init__(self, limits: ClientLimits, keep: Path | None = None) -> None:
        self.limits, self.keep = limits, None if keep is None else make_folder(keep)
        self.engine: Engine | None = None
        self.room = Room(limits.queue)
        self.measures = Measures(self.room, lambda: self.engine)
        said = "Images in, decisions out: what the model answers, how likely that is wrong, and whether to accept it."
        version = metadata.version("vilu")
        self.api = FastAPI(
            title="vilu", version=version, description=said, docs_url=None, redoc_url=None
        )
        self._routes()
        paths = frozenset(route.path for route in self.api.routes if hasattr(route, "path"))
        self.gate = Gate(self.api, limits, lambda: self.room.left, self.measures.request, paths)

    @property
    def ready(self) -> Engine:
        """The engine; 503 while it loads."""
        if self.engine is None:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the model is still loading.",
                **{"Retry-After": "1"},
            )
        return self.engine

    def start(self, engine: Engine) -> None:
        """From now on answer."""
        engine.on_batch = self.measures.batch.observe
        self.engine = engine

    def _routes(self) -> None:
        api = self.api
        api.add_exception_handler(Refused, _refused)
        api.add_exception_handler(HTTPException, _http)
        api.add_exception_handler(ClientDisconnect, _gone)
        api.add_exception_handler(StorageError, self._cannot_write)
        api.add_exception_handler(Exception, _fault)
        for method, path, route, body in (
            (
                "POST",
                "/v1/answers",
                self.answers,
                {"multipart/form-data": FORM, "application/json": ImagesIn},
            ),
            ("POST", "/v1/scores", self.scores, {"application/json": EmbeddingsIn}),
            ("POST", "/v1/labels", self.labels, {"application/json": LabelsIn}),
            ("GET", "/v1/monitor", self.monitor, None),
            ("GET", "/v1/predictors", self.predictors, None),
            ("POST", "/v1/predictors", self.switch, {"application/json": ChoiceIn}),
        ):
            api.add_api_route(
                path,
                route,
                methods=[method],
                responses=_statuses(
                    AnswersOut if path in WORK else None, takes_body=body is not None
                ),
                response_model=None,
                openapi_extra=None
                if body is None
                else {"requestBody": {"required": True, "content": _content(body)}},
            )
        for path, route in (
            ("/healthz", self.alive),
            ("/readyz", self.is_ready),
            ("/metrics", self.metrics),
        ):
            api.add_api_route(path, route, methods=["GET"], response_model=None)
        ours: dict[str, Callable[..., Any]] = {
            "/": _page,
            "/docs": _docs,
            "/docs/{name}": _docs_file,
        }
        for path, show in ours.items():
            api.add_api_route(
                path, show, methods=["GET"], include_in_schema=False, response_model=None
            )

    async def answers(self, request: Request) -> Response:
        """Say of every image what the model answers, how likely that is wrong, and whether to accept it."""
        engine = self.ready
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        images = await (
            _uploads(request) if kind == "multipart/form-data" else self._decoded(request)
        )
        self._at_most(len(images), "images")
        return await self._replies(
            request, len(images), lambda name: engine.images(name, images), images
        )

    async def _decoded(self, request: Request) -> list[bytes]:
        body = await _body(request, ImagesIn)
        images = []
        for place, text in enumerate(body.images):
            try:
                images.append(base64.b64decode(text, validate=True))
            except (binascii.Error, ValueError) as error:
                raise Refused(
                    HTTPStatus.UNPROCESSABLE_ENTITY, f"images.{place} is no base64 ({error})."
                ) from None
        return images

    async def scores(self, request: Request) -> Response:
        """The same for embeddings of the model that the predictor was fitted on."""
        engine = self.ready
        body = await _body(request, EmbeddingsIn)
        self._at_most(len(body.embeddings), "embeddings")
        try:
            arrays = await asyncio.to_thread(engine.checked, body.embeddings, body.features)
        except DataError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None
        return await self._replies(
            request, len(body.embeddings), lambda name: engine.rows(name, arrays)
        )

    async def _replies(
        self,
        request: Request,
        n: int,
        begin: Callable[[str], Sequence[Future[Judgement]]],
        images: Sequence[bytes] = (),
    ) -> Response:
        """The answers, whose rows are in the journal by then; of a request that is given up none is."""
        engine = self.ready
        name = str(request.state.request_id)
        with self.room.of(n):
            awaited = begin(name)
            try:
                async with asyncio.timeout(self.limits.answer):
                    # a fault of one image is told when all are done
                    await asyncio.gather(*map(asyncio.wrap_future, awaited), return_exceptions=True)
                    judged = [judgement.result() for judgement in awaited]
            except TimeoutError:  # which has cancelled what nobody waits for any more
                detail = (
                    f"there was no answer within {self.limits.answer:g} seconds. The same request "
                    "may be repeated."
                )
                raise Refused(
                    HTTPStatus.SERVICE_UNAVAILABLE, detail, **{"Retry-After": "1"}
                ) from None
            if await request.is_disconnected():
                raise ClientDisconnect
            if self.keep is not None:
                await asyncio.to_thread(_keep, self.keep, images, judged)
            replies = await asyncio.wrap_future(engine.record(judged))
        request.scope["state"]["images"] = n
        self.measures.answered(reply.answer for reply in replies)
        promise = replies[0].promise  # of all alike: they were written together
        answers = [_out(reply) for reply in replies]
        content = AnswersOut(request_id=name, promise=promise, answers=answers).model_dump_json()
        return Response(content, media_type="application/json", headers={"Promise": promise})

    async def labels(self, request: Request) -> Response:
        """Late labels of rows that were answered, for the audit of the promise; each counts once."""
        engine = self.ready
        body = await _body(request, LabelsIn)
        self._at_most(len(body.labels), "labels")
        try:
            counts = await asyncio.to_thread(engine.keeper.label, body.labels)
        except DataError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        if not counts:
            raise Refused(
                HTTPStatus.CONFLICT,
                "no predictor here is calibrated, so there is no promise to audit.",
            )
        state = await asyncio.to_thread(engine.keeper.kept)
        audited = [
            {
                "predictor": engine.served[name].fingerprint,
                "new": n_new,
                "unknown": n_unknown,
                "promise": state.promises[name],
            }
            for name, (n_new, n_unknown) in counts.items()
        ]
        return _json({"audited": audited})

    async def monitor(self) -> Response:
        """Whether the promise still holds for what was answered, and by what evidence."""
        statuses = await asyncio.to_thread(self.ready.keeper.statuses)
        monitors = await self._named()
        for monitor in monitors:
            status = statuses.get(monitor["name"])
            if status is not None:
                monitor |= {"said": str(status), "status": status.model_dump(mode="json")}
        return _json({"monitors": monitors})

    async def predictors(self) -> Response:
        """Which predictors judge, and which of them answers."""
        return _json({"predictors": await self._named()})

    async def switch(self, request: Request) -> Response:
        """Have another predictor answer.

        Its own promise goes with it; that of the one before goes on being watched.
        """
        engine = self.ready
        choice = await _body(request, ChoiceIn)
        before = (await asyncio.to_thread(engine.keeper.kept)).answering
        try:
            await asyncio.to_thread(engine.keeper.switch, choice.answers)
        except UsageError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        by_name = {predictor["name"]: predictor for predictor in await self._named()}
        return _json({"before": by_name[before], "now": by_name[choice.answers]})

    async def _named(self) -> list[dict[str, Any]]:
        """What there is to say of every predictor."""
        engine = self.ready
        kept = await asyncio.to_thread(engine.keeper.kept)
        return [
            {
                "name": name,
                "predictor": one.fingerprint,
                "method": one.guard.predictor.label,
                "answers": name == kept.answering,
                "promise": kept.promises[name],
                "promised": one.promised,
                "in_words": one.in_words(kept.promises[name]),
            }
            for name, one in engine.served.items()
        ]

    async def alive(self) -> Response:
        """Whether the process listens."""
        return _json({"alive": True})

    async def is_ready(self) -> Response:
        """Whether the model is loaded and has answered about a picture, and rows can be kept."""
        kept = await asyncio.to_thread(self.ready.keeper.kept)
        if kept.lost:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, LOST)
        return _json({"ready": True, "answers": self.ready.served[kept.answering].fingerprint})

    async def metrics(self) -> Response:
        """For Prometheus."""
        content, kind = await asyncio.to_thread(self.measures.exposed)
        return Response(content, media_type=kind)

    async def _cannot_write(self, _: Request, error: Exception) -> Response:
        """What is not in the journal is not answered; the log alone names the file."""
        logger.error("a request could not be written to the journal: %s", error)
        state = await asyncio.to_thread(self.ready.keeper.kept)
        return _problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            LOST if state.lost else NOT_WRITTEN,
            {"Retry-After": "1"},
        )

    def _at_most(self, n: int, what: str) -> None:
        if n > self.limits.images:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request may have {self.limits.images:,} {what}. Found {n:,}; send several "
                "requests.",
            )


LOST: Final = (
    "the journal was removed or replaced while the service ran, so no row can be kept and nothing "
    "is answered. Stop the service, restore the journal, and start again."
)
NOT_WRITTEN: Final = (
    "the rows could not be written to the journal, so nothing is answered; the log of the service "
    "says why. The same request may be repeated."
)

FORM: Final = {
    "type": "object",
    "required": ["images"],
    "properties": {
        "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
    },
}


def _content(body: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of bodies that we read ourselves: models without models in them."""
    schemas = {
        kind: what if isinstance(what, dict) else what.model_json_schema()
        for kind, what in body.items()
    }
    return {kind: {"schema": schema} for kind, schema in schemas.items()}


def _statuses(
    answer: type[BaseModel] | None, *, takes_body: bool
) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of answers and refusals."""
    reasons = {
        401: "no key",
        403: "a page of another site",
        421: "an unknown host",
        503: "loading, too slow, or without a journal",
    }
    if takes_body:
        reasons |= {
            400: "a form that cannot be read",
            408: "the body came too slowly",
            409: "nothing to audit",
        }
        reasons |= {
            413: "too large",
            415: "another kind of body",
            422: "the body says something else",
            429: "no room",
        }
    schema = {"type": "object", "required": ["type", "title", "status", "detail"]}
    statuses: dict[int | str, dict[str, Any]] = {200: {"description": "what was asked for"}}
    if answer is not None:
        statuses[200]["model"] = answer
    return statuses | {
        code: {"description": why, "content": {PROBLEM: {"schema": schema}}}
        for code, why in reasons.items()
    }


async def _body(request: Request, kind: type[Body]) -> Body:
    """The JSON body; 415 or 422 says what was found."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        expected = "application/json" + (" or multipart/form-data" if kind is ImagesIn else "")
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body must be {expected}. Found {content_type!r:.60}.",
        )
    try:
        return await asyncio.to_thread(kind.model_validate_json, await request.body())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise Refused(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"{where:.100}: {first['msg']:.200}."
        ) from None


async def _uploads(request: Request) -> list[bytes]:
    """The files of a form, whatever their fields are called."""
    parser = InMemory(request.headers, request.stream(), max_files=10_000, max_fields=100)
    files: list[UploadFile] = []
    try:
        form = await parser.parse()
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        contents = [await file.read() for file in files]
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"the form cannot be read: {error}"[:200]) from None
    finally:
        whole = parser.close(files)
    if not whole:
        raise Refused(HTTPStatus.BAD_REQUEST, "the form cannot be read: it ends within a file.")
    if not files:
        raise Refused(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "the form has no file. Send images as files of the form.",
        )
    return contents


def _out(reply: Reply) -> AnswerOut:
    answer = reply.answer
    runners_up = [
        RunnerUpOut(label=label, probability=probability)
        for label, probability in answer.runners_up
    ]
    return AnswerOut(
        row=reply.row,
        predictor=reply.predictor,
        runners_up=runners_up,
        label=answer.label,
        failure_probability=answer.failure_probability,
        uncertainty=answer.uncertainty,
        decision=answer.decision,
        reason=answer.reason,
    )


def _keep(folder: Path, images: Sequence[bytes], judged: Sequence[Judgement]) -> None:
    """Keep images under the rows that they are known by; what cannot be decoded is not kept."""
    for content, judgement in zip(images, judged, strict=True):
        if judgement.scores:
            suffix = (sniff(content) or "bin").lower()
            write_bytes(folder / f"{judgement.row}.{suffix}", content)


def _json(value: object) -> Response:
    return Response(plain_json(value), media_type="application/json")


def _problem(status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(problem(status, detail), status, dict(headers or {}), PROBLEM)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 - what it is registered for
    return _problem(error.status, error.detail, error.headers)


async def _http(_: Request, error: Exception) -> Response:
    """No such path, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    return _problem(
        HTTPStatus(error.status_code), f"{error.detail}. /docs tells what there is.", error.headers
    )


async def _gone(_: Request, error: Exception) -> Response:  # noqa: ARG001 - the log has a line, and nobody listens
    return _problem(HTTPStatus.BAD_REQUEST, "the connection ended before there was an answer.")


async def _fault(_: Request, error: Exception) -> Response:
    """A fault of ours: the log has it, the client does not."""
    logger.error("a request failed", exc_info=error)
    return _problem(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed at this request; its log says why."
    )


async def _page() -> Response:
    content, policy = page_of("vilu.service", "page", "blob:")
    return Response(
        content, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy}
    )


BEGIN: Final = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null});'
"""What starts Swagger UI."""


async def _docs() -> Response:
    """Swagger UI from this machine: nothing is loaded from elsewhere."""
    policy = (
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
        f"script-src 'self' '{csp_hash(BEGIN)}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    content = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>vilu</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        '<link rel="stylesheet" href="/docs/swagger-ui.css"></head><body><div id="api"></div>'
        f'<script src="/docs/swagger-ui-bundle.js"></script><script>{BEGIN}</script></body></html>'
    )
    return Response(
        content, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy}
    )


async def _docs_file(name: str) -> Response:
    kinds = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
    if name not in kinds:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    content = resources.files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(content, media_type=kinds[name], headers={"Cache-Control": "max-age=86400"})
