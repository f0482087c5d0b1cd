"""The routes of the service, and the refusals for clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vilu.artifacts.disk import convert_os_errors, make_folder, write_bytes
from vilu.artifacts.documents import plain_json
from vilu.datasets.images import detect_format, n_pixels_in_header
from vilu.embeddings.columns import DataKind
from vilu.errors import DataError, StorageError, UsageError
from vilu.service import pages
from vilu.service.bodies import (
    AnswerOut,
    AnswersOut,
    ChoiceIn,
    CorrectionsIn,
    EmbeddingsIn,
    ImagesIn,
    LabelsIn,
    RowsIn,
    RunnerUpOut,
    openapi_body,
    openapi_responses,
    read_images,
    read_json,
)
from vilu.service.journals import ContradictionError
from vilu.service.limits import (
    PROBLEM_TYPE,
    RETRY_HEADER,
    ClientLimits,
    Gate,
    InProgress,
    Refused,
    problem_document,
    require_at_most,
)
from vilu.service.measures import Measures

if TYPE_CHECKING:
    from vilu.service.engine import Engine, Judgement, PredictorReply

logger = logging.getLogger(__name__)

DESCRIPTION: Final = (
    "Answers about images: the answer of the model, the probability that it is wrong, and whether "
    "to accept it."
)
LOST_JOURNAL_DETAIL: Final = (
    "the journal was removed or replaced while the service ran, so no row can be kept and nothing "
    "is answered. Stop the service, restore the journal, and start again."
)
"""Detail in a refusal while a journal file is lost."""

NOT_WRITTEN_DETAIL: Final = (
    "the rows could not be written to the journal, so nothing is answered; the log of the service "
    "says why. The same request may be repeated."
)
"""Detail in a refusal after a journal could not be written."""

NOT_READY_DETAIL: Final = (
    "the journal cannot be written, so nothing is answered; the log of the service says why."
)
"""Detail in the answer from /readyz while a journal is locked or the disk is full."""

BODY_OF_DATA_KIND: Final[dict[DataKind, type[EmbeddingsIn] | type[RowsIn]]] = {
    "embeddings": EmbeddingsIn,
    "answers": RowsIn,
}
"""Maps the predictor's data kind to the body model for /v1/scores."""

Route = Callable[..., Any]
Responses = dict[int | str, dict[str, Any]]
"""OpenAPI's descriptions of a route's answers, by status."""


class Service:
    """The application. It answers about images after ``start`` has set an engine.

    Args:
        limits: Limits for clients.
        image_folder: Folder for the answered images. If None, no image is kept.
    """

    def __init__(self, limits: ClientLimits, image_folder: Path | None = None) -> None:
        self.limits = limits
        self.image_folder = None if image_folder is None else make_folder(image_folder)
        self.engine: Engine | None = None
        self.in_progress = InProgress(limits)
        self.measures = Measures(self.in_progress, lambda: self.engine)
        self.api = FastAPI(
            title="vilu",
            version=metadata.version("vilu"),
            description=DESCRIPTION,
            docs_url=None,
            redoc_url=None,
        )
        self._add_routes()
        self._add_refusals()
        self.gate = Gate(
            self.api,
            limits,
            in_progress=self.in_progress,
            on_answered=self.measures.count_request,
            known_paths=frozenset(
                route.path for route in self.api.routes if hasattr(route, "path")
            ),
        )

    @property
    def loaded_engine(self) -> Engine:
        """The engine. Raises Refused (503) while the engine is loading."""
        if self.engine is None:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the model is still loading.",
                **RETRY_HEADER,
            )
        return self.engine

    def start(self, engine: Engine) -> None:
        """Answer with this engine from now on."""
        engine.on_batch = self.measures.batch_size_histogram.observe
        self.engine = engine

    def _add_routes(self) -> None:
        self._add_post("/v1/answers", self.answers, ImagesIn, AnswersOut)
        self._add_post("/v1/scores", self.scores, EmbeddingsIn, AnswersOut)
        self._add_post("/v1/labels", self.labels, LabelsIn)
        self._add_post("/v1/corrections", self.corrections, CorrectionsIn)
        self._add_get("/v1/monitor", self.monitor, responses=openapi_responses(takes_body=False))
        self._add_get(
            "/v1/predictors", self.predictors, responses=openapi_responses(takes_body=False)
        )
        self._add_post("/v1/predictors", self.switch, ChoiceIn)
        self._add_get("/healthz", self.alive)
        self._add_get("/readyz", self.is_ready)
        self._add_get("/metrics", self.metrics)
        self._add_get("/", pages.photo_page, include_in_schema=False)
        self._add_get("/docs", pages.docs_page, include_in_schema=False)
        self._add_get("/docs/{name}", pages.docs_file, include_in_schema=False)

    def _add_post(
        self,
        path: str,
        route: Route,
        body_model: type[BaseModel],
        answer_model: type[BaseModel] | None = None,
    ) -> None:
        """Let ``route`` answer POST requests, and describe both models in OpenAPI."""
        responses = openapi_responses(takes_body=True, answer_model=answer_model)
        body_description = openapi_body(body_model)
        self.api.add_api_route(
            path,
            route,
            methods=["POST"],
            responses=responses,
            response_model=None,
            openapi_extra=body_description,
        )

    def _add_get(
        self,
        path: str,
        route: Route,
        *,
        responses: Responses | None = None,
        include_in_schema: bool = True,
    ) -> None:
        """Let ``route`` answer GET requests."""
        self.api.add_api_route(
            path,
            route,
            methods=["GET"],
            responses=responses,
            response_model=None,
            include_in_schema=include_in_schema,
        )

    def _add_refusals(self) -> None:
        """Register the answers to requests that raise an exception."""
        self.api.add_exception_handler(Refused, _refusal_response)
        self.api.add_exception_handler(HTTPException, _unknown_route_response)
        self.api.add_exception_handler(ClientDisconnect, _disconnect_response)
        self.api.add_exception_handler(StorageError, self._write_error_response)
        self.api.add_exception_handler(Exception, _fault_response)

    async def answers(self, request: Request) -> Response:
        """Answer about images, with decisions.

        Every answer has the probability of being wrong, and whether to accept it.
        """
        engine = self.loaded_engine
        if engine.data_kind == "answers":
            raise Refused(
                HTTPStatus.NOT_FOUND,
                "this service judges rows of a table of answers, and no images: POST /v1/scores.",
            )
        images = await read_images(request, self.limits.max_images)
        request.state.admission.admit_images(len(images))
        await asyncio.to_thread(self._require_few_pixels, images)
        futures = engine.submit_images(request.state.request_id, images)
        return await self._write_and_answer(request, futures, images)

    async def scores(self, request: Request) -> Response:
        """Answer about embeddings of the same model as in the fit of the predictor.

        A service for tables of answers answers about rows of numbers instead.
        """
        engine = self.loaded_engine
        n_numbers = self.limits.max_images * engine.numbers_per_row
        body = await read_json(
            request, BODY_OF_DATA_KIND[engine.data_kind], limit=n_numbers, noun="numbers"
        )
        require_at_most(body.n_rows, self.limits.max_images, noun=body.row_noun)
        try:
            rows = await asyncio.to_thread(engine.check_rows, body.as_columns())
        except DataError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None
        request.state.admission.admit_images(body.n_rows)
        futures = engine.submit_rows(request.state.request_id, rows)
        return await self._write_and_answer(request, futures)

    async def _write_and_answer(
        self,
        request: Request,
        futures: Sequence[Future[Judgement]],
        images: Sequence[bytes] = (),
    ) -> Response:
        """Wait for a request's judgements, write the rows to the journals, and answer.

        If the client has disconnected before the rows are written, no row is written.

        Args:
            request: The request.
            futures: Futures for the judgements, which the engine is making now.
            images: The encoded images. They are kept if the service has a folder for images.
        """
        judgements = await self._wait_for_judgements(futures)
        if await request.is_disconnected():
            raise ClientDisconnect
        new_files: list[Path] = []
        if self.image_folder is not None and images:
            new_files = await asyncio.to_thread(
                _write_images, self.image_folder, images, judgements
            )
        try:
            replies_future = self.loaded_engine.record(judgements)
            replies = await asyncio.wrap_future(replies_future)
        except StorageError:  # the rows are not written, so the images must not be kept
            await asyncio.to_thread(_remove_files, new_files)
            raise
        request.scope["state"]["images"] = len(replies)  # for the gate's log
        self.measures.count_answers(reply.answer for reply in replies)
        # A request's rows are written together, so all replies have the same guarantee.
        guarantee = replies[0].guarantee
        body = AnswersOut(
            request_id=request.state.request_id,
            guarantee=guarantee,
            answers=[_answer_body(reply) for reply in replies],
        )
        headers = {"Guarantee": guarantee}
        return Response(body.model_dump_json(), media_type="application/json", headers=headers)

    async def _wait_for_judgements(self, futures: Sequence[Future[Judgement]]) -> list[Judgement]:
        """Wait for a request's judgements. Raise Refused (503) after a time limit."""
        try:
            async with asyncio.timeout(self.limits.answer_seconds):
                # With return_exceptions, gather waits for all judgements, even after an exception.
                # The exception is raised by result() in the return statement.
                await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
                return [future.result() for future in futures]
        except TimeoutError:  # the timeout has cancelled the unfinished judgements
            detail = (
                f"there was no answer within {self.limits.answer_seconds:g} seconds. The same "
                "request may be repeated."
            )
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, detail, **RETRY_HEADER) from None

    async def labels(self, request: Request) -> Response:
        """Take labels of answered rows, for the audit of the guarantee.

        Equal pictures count once in the audit. If a row already has another label, the request is
        refused, and no label of the request is written.
        """
        engine = self.loaded_engine
        body = await read_json(request, LabelsIn, limit=self.limits.max_images, noun="labels")
        try:
            counts = await asyncio.to_thread(engine.journals.label, body.labels)
        except ContradictionError as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from error
        except DataError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        if not counts:
            detail = "no predictor here is calibrated, so there is no guarantee to audit."
            raise Refused(HTTPStatus.CONFLICT, detail)
        state = await asyncio.to_thread(engine.journals.state)
        audits = []
        for name, counts_of_predictor in counts.items():
            audits.append(
                {
                    "predictor": engine.served_predictors[name].fingerprint,
                    "new": counts_of_predictor.n_new,
                    "unknown": counts_of_predictor.unknown_row_ids,
                    "guarantee": state.guarantees[name],
                }
            )
        return _json_response({"audited": audits})

    async def corrections(self, request: Request) -> Response:
        """Replace wrong labels. The journal keeps old and new labels; the monitor counts again.

        The reply's field "corrected" is the number of rows whose label was replaced.
        """
        engine = self.loaded_engine
        # a correction has two labels: the present label and the right label
        max_labels = 2 * self.limits.max_images
        body = await read_json(request, CorrectionsIn, limit=max_labels, noun="labels")
        if body.before.keys() != body.after.keys():
            detail = "before and after must name the same rows."
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        try:
            n_corrected = await asyncio.to_thread(engine.journals.correct, body.before, body.after)
        except ContradictionError as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from error
        except DataError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        state = await asyncio.to_thread(engine.journals.state)
        return _json_response({"corrected": n_corrected, "guarantees": state.guarantees})

    async def monitor(self) -> Response:
        """Return the state of every guarantee, and the monitor's evidence."""
        statuses = await asyncio.to_thread(self.loaded_engine.journals.statuses)
        monitors = await self._describe_predictors()
        for monitor in monitors:
            status = statuses.get(monitor["name"])
            if status is not None:
                monitor["summary"] = str(status)
                monitor["status"] = status.model_dump(mode="json")
        return _json_response({"monitors": monitors})

    async def predictors(self) -> Response:
        """Return the service's predictors, and which of them answers."""
        descriptions = await self._describe_predictors()
        return _json_response({"predictors": descriptions})

    async def switch(self, request: Request) -> Response:
        """Let another predictor answer.

        From then on, answers have the guarantee of the new predictor. The monitor of the previous
        predictor continues to run.
        """
        engine = self.loaded_engine
        choice = await read_json(request, ChoiceIn, limit=1, noun="choice")
        state_before = await asyncio.to_thread(engine.journals.state)
        try:
            await asyncio.to_thread(engine.journals.switch, choice.answers)
        except UsageError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        descriptions = {}
        for description in await self._describe_predictors():
            descriptions[description["name"]] = description
        before = descriptions[state_before.answering_name]
        return _json_response({"before": before, "now": descriptions[choice.answers]})

    async def _describe_predictors(self) -> list[dict[str, Any]]:
        """Describe all predictors and guarantees for clients."""
        engine = self.loaded_engine
        state = await asyncio.to_thread(engine.journals.state)
        descriptions = []
        for name, predictor in engine.served_predictors.items():
            guarantee = state.guarantees[name]
            guarantee_in_words = predictor.guarantee_in_words(guarantee)
            descriptions.append(
                {
                    "name": name,
                    "predictor": predictor.fingerprint,
                    "method": predictor.guard.predictor.label,
                    "answers": name == state.answering_name,
                    "guarantee": guarantee,
                    "guarantee_text": predictor.guarantee_text,
                    "in_words": guarantee_in_words,
                }
            )
        return descriptions

    async def alive(self) -> Response:
        """Answer as long as the process listens."""
        return _json_response({"alive": True})

    async def is_ready(self) -> Response:
        """Tell whether the model is loaded and tested, and whether rows can be written."""
        engine = self.loaded_engine
        state = await asyncio.to_thread(engine.journals.check_writable)
        if state.has_lost_journal:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, LOST_JOURNAL_DETAIL)
        if not state.is_writable:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, NOT_READY_DETAIL)
        fingerprint = engine.served_predictors[state.answering_name].fingerprint
        return _json_response({"ready": True, "answers": fingerprint})

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        content, media_type = await asyncio.to_thread(self.measures.render)
        return Response(content, media_type=media_type)

    async def _write_error_response(self, _: Request, error: Exception) -> Response:
        """Return the refusal after rows could not be written. Only the log names the file."""
        logger.error("a request could not be written to the journal: %s", error)
        state = await asyncio.to_thread(self.loaded_engine.journals.state)
        detail = LOST_JOURNAL_DETAIL if state.has_lost_journal else NOT_WRITTEN_DETAIL
        return _problem_response(HTTPStatus.SERVICE_UNAVAILABLE, detail, RETRY_HEADER)

    def _require_few_pixels(self, images: Sequence[bytes]) -> None:
        """Refuse images with too many pixels together.

        An image above the limit for a single image is not counted, because it is not decoded.
        """
        total_pixels = 0
        for content in images:
            image_pixels = n_pixels_in_header(content)
            if image_pixels <= self.limits.max_pixels:
                total_pixels += image_pixels
        require_at_most(total_pixels, self.limits.max_request_pixels, noun="pixels")


def _answer_body(reply: PredictorReply) -> AnswerOut:
    """Return a reply in the form that is sent to the client."""
    answer = reply.answer
    runners_up = [
        RunnerUpOut(label=label, probability=probability)
        for label, probability in answer.runners_up
    ]
    return AnswerOut(
        row=reply.row_id,
        predictor=reply.fingerprint,
        runners_up=runners_up,
        label=answer.label,
        failure_probability=answer.failure_probability,
        quantile=answer.quantile,
        uncertainty=answer.uncertainty,
        decision=answer.decision,
        reason=answer.reason,
        zero_shot=answer.zero_shot,
        likely=answer.likely,
    )


def _write_images(
    folder: Path, images: Sequence[bytes], judgements: Sequence[Judgement]
) -> list[Path]:
    """Write images to files named by the row ids. Skip undecodable images.

    Returns:
        The files that did not exist before. A repeated request finds its files written already.
    """
    new_files: list[Path] = []
    try:
        for content, judgement in zip(images, judgements, strict=True):
            was_decoded = bool(judgement.scores)
            if not was_decoded:
                continue
            suffix = (detect_format(content) or "bin").lower()
            path = folder / f"{judgement.row_id}.{suffix}"
            if not path.exists():
                write_bytes(path, content)
                new_files.append(path)
    except StorageError:
        _remove_files(new_files)
        raise
    return new_files


def _remove_files(paths: Sequence[Path]) -> None:
    """Remove the new files for a request."""
    for path in paths:
        with convert_os_errors(f"cannot remove {path}"):
            path.unlink(missing_ok=True)


def _json_response(value: object) -> Response:
    content = plain_json(value)
    return Response(content, media_type="application/json")


def _problem_response(
    status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    content = problem_document(status, detail)
    return Response(
        content,
        status_code=status,
        headers=dict(headers or {}),
        media_type=PROBLEM_TYPE,
    )


async def _refusal_response(_: Request, error: Exception) -> Response:
    """Return the answer to a refused request."""
    assert isinstance(error, Refused)  # noqa: S101 - the handler is registered for this type
    return _problem_response(error.status, error.detail, error.headers)


async def _unknown_route_response(_: Request, error: Exception) -> Response:
    """Return the answer to a request for an unknown path or with an unknown method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - the handler is registered for this type
    detail = f"{error.detail}. The paths are listed at /docs."
    status = HTTPStatus(error.status_code)
    return _problem_response(status, detail, error.headers)


async def _disconnect_response(_: Request, _error: Exception) -> Response:
    """Return the answer after the client has disconnected. It is logged but reaches nobody."""
    detail = "the connection ended before there was an answer."
    return _problem_response(HTTPStatus.BAD_REQUEST, detail)


async def _fault_response(_: Request, error: Exception) -> Response:
    """Return the answer after an unexpected exception. Only the log shows the exception."""
    logger.error("a request failed", exc_info=error)
    return _problem_response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed at this request; its log says why."
    )
