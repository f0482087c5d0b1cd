"""Collects images from many requests in batches for the model, and answers every request."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import STATUS_NAMES, VALID, normalise_rows
from vilu.embeddings.columns import DataKind
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.guard.guard import (
    Answer,
    Guard,
    answer_without_score,
    join_arrays,
    make_record,
    require_same_model,
)
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import SavedModel
from vilu.service.journals import (
    FINGERPRINT_LENGTH,
    PREDICTOR_NAMES,
    GuaranteeState,
    Journals,
    ScoreColumns,
    ServiceState,
    make_row_id,
)
from vilu.store.manifest import IMAGE
from vilu.store.parts import ErrorRow
from vilu.store.pipeline import PreparedImage
from vilu.text import plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictorReply:
    """The answer about an image or row.

    Attributes:
        row_id: Id of the row.
        answer: The answer.
        fingerprint: Fingerprint of the predictor that gave the answer.
        guarantee: State of this predictor's guarantee.
    """

    row_id: str
    answer: Answer
    fingerprint: str
    guarantee: GuaranteeState


class Score(NamedTuple):
    """The part of a judgement that a journal stores."""

    answer: int  # index of the answer
    uncertainty: float


@dataclass(frozen=True)
class Judgement:
    """The answers from all predictors about an image or row.

    Attributes:
        row_id: Id of the row.
        answers: Maps each predictor name to an answer.
        scores: Maps each predictor name to a score. Empty if the image cannot be read.
    """

    row_id: str
    answers: Mapping[str, Answer]
    scores: Mapping[str, Score]


class ClientRows(NamedTuple):
    """Rows sent by a client in place of images, after a check."""

    arrays: dict[str, Tensor]  # the arrays (B, ...) read by the predictor, by name
    picture_keys: list[bytes]  # B keys. Rows with the same picture (or answer) have equal keys.


@dataclass(frozen=True)
class UnwrittenRequest:
    """A request's judgements that are not in the journals yet."""

    judgements: Sequence[Judgement]
    replies_future: Future[list[PredictorReply]]  # is set after the rows are written


@dataclass(frozen=True)
class WaitingImage:
    """A decoded image waiting for the model."""

    row_id: str
    position: int  # number of the image among all images decoded by this service
    decoded_image: PreparedImage | ErrorRow  # an ErrorRow if the image could not be decoded
    judgement_future: Future[Judgement]  # is set after the model has run


class ServedPredictor:
    """A predictor in the service. All images are judged by every served predictor."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.fingerprint = fit_fingerprint(guard.folder)[:FINGERPRINT_LENGTH]
        calibration = guard.calibration
        self.rule = None if calibration is None else calibration.rule
        self.guarantee_text = None if calibration is None else calibration.guarantee_text

    def guarantee_in_words(self, state: GuaranteeState) -> str:
        """Return the guarantee's state and the guarantee's text, for people."""
        if self.rule is None:
            return "Nothing is guaranteed: this predictor has no rule that accepts answers."
        if state == "none":
            return (
                "Nothing is guaranteed: no threshold was certified, so the rule accepts no answer."
            )
        states = {
            "holds": "The guarantee holds: the answers so far show nothing against it.",
            "void": "The guarantee is void: the images differ from the calibration data, or the "
            "labels show too many errors.",
        }
        return f"{states[state]} Guaranteed: the rule {self.guarantee_text}."


class Engine:
    """A model, one or two predictors, and the waiting images.

    1. A pool of threads decodes images on arrival.
    2. A single thread runs the model on the images decoded so far, at most ``guard.batch_size`` at
       once. So batches grow with the load, and no image waits for a batch to fill.
    3. Another thread writes rows to the journals. A request's rows are written together, after all
       of them are judged. So an abandoned request leaves no rows. Requests that are ready at the
       same time are written together, too.

    Args:
        guard: The model with the first predictor.
        journals: Journals for all predictors, with the choice of the answering predictor.
        second: A second predictor for the same embeddings, as its folder or a ``vilu.Selective``.

    Raises:
        UsageError: If the second predictor needs other arrays or another number format than the
            first predictor.
        ProvenanceError: If the second predictor was fitted on another model than ``guard``'s.
    """

    data_kind: DataKind = "embeddings"  # the data that clients may send instead of images

    def __init__(
        self, guard: Guard, journals: Journals, second: Path | SavedModel | None = None
    ) -> None:
        self.guard = guard
        self.journals = journals
        self.served_predictors = {PREDICTOR_NAMES[0]: ServedPredictor(guard)}
        if second is not None:
            second_guard = self._open_second(second)
            self.served_predictors[PREDICTOR_NAMES[1]] = ServedPredictor(second_guard)
        self.on_batch: Callable[[int], None] | None = None  # called with the size of each batch
        self._next_positions = count()  # image numbers in decoding order
        self._lock = threading.Lock()  # for _waiting_images, _is_scheduled and _unwritten_requests
        self._waiting_images: deque[WaitingImage] = deque()
        self._is_scheduled = False  # whether a model run is submitted or in progress
        self._unwritten_requests: deque[UnwrittenRequest] = deque()
        self._decoder_pool = ThreadPoolExecutor(guard.workers, thread_name_prefix="vilu-decode")
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="vilu-model")
        self._journal_thread = ThreadPoolExecutor(1, thread_name_prefix="vilu-journal")

    def _open_second(self, model: Path | SavedModel) -> Guard:
        """Open a second predictor, for the same arrays and number format as the first predictor."""
        first_guard = self.guard
        second_guard = Guard(model, vectors_only=True)
        require_same_model(second_guard, first_guard.backbone)
        has_same_arrays = second_guard.arrays == first_guard.arrays
        has_same_dtype = second_guard.vocabulary.dtype == first_guard.vocabulary.dtype
        if has_same_arrays and has_same_dtype:
            return second_guard
        raise UsageError(
            f"{second_guard.folder} needs {', '.join(second_guard.arrays)} of an image as "
            f"{second_guard.vocabulary.dtype}, and the first predictor needs "
            f"{', '.join(first_guard.arrays)} as {first_guard.vocabulary.dtype}. Serve "
            f"{second_guard.folder} by itself."
        )

    def submit_images(self, request_id: str, images: Sequence[bytes]) -> list[Future[Judgement]]:
        """Submit the images for the request with this id.

        Returns:
            The futures for the judgements, in the order of the images.
        """
        futures = []
        for index, content in enumerate(images):
            future: Future[Judgement] = Future()
            futures.append(future)
            self._decoder_pool.submit(self._decode, request_id, index, content, future)
        return futures

    @property
    def numbers_per_row(self) -> int:
        """Number of values in a client's row."""
        return sum(self.guard.model.widths.values())

    def check_rows(self, columns: Mapping[str, Any]) -> ClientRows:
        """Check a client's rows, and convert them to arrays like the model's arrays.

        Args:
            columns: The rows' embeddings under the key "embeddings". Under "features", the rows'
                features or None.

        Returns:
            The arrays, in the store's number format. Embeddings are scaled to unit norm.

        Raises:
            DataError: If an array has the wrong shape, or an embedding has no direction.
        """
        embeddings = columns["embeddings"]
        client_arrays = {IMAGE: embeddings, FEATURES: columns["features"] or []}
        dtype = getattr(torch, self.guard.vocabulary.dtype)
        arrays: dict[str, Tensor] = {}
        for name, width in self.guard.model.widths.items():
            rows = client_arrays[name]
            field = "embeddings" if name == IMAGE else name
            _require_shape(field, rows, n_rows=len(embeddings), width=width)
            array = torch.tensor(rows, dtype=torch.float32)
            if name == IMAGE:
                array = _unit_rows(array)
            arrays[name] = array.to(dtype)
        # Rows with equal numbers count as the same picture.
        picture_keys = bytes_of_rows(arrays)
        return ClientRows(arrays, picture_keys=picture_keys)

    def submit_rows(self, request_id: str, rows: ClientRows) -> list[Future[Judgement]]:
        """Submit the B rows for the request with this id.

        Returns:
            The B futures for the judgements, in the order of the rows.
        """
        ids = []
        for index, content in enumerate(bytes_of_rows(rows.arrays)):
            row_id = make_row_id(request_id, index, content, picture=rows.picture_keys[index])
            ids.append(row_id)
        futures: list[Future[Judgement]] = [Future() for _ in ids]
        self._model_thread.submit(
            self._set_results, futures, lambda: self._judge_rows(rows.arrays, ids)
        )
        return futures

    def _decode(
        self, request_id: str, index: int, content: bytes, future: Future[Judgement]
    ) -> None:
        """Decode an image, add it to the waiting images, and schedule a model run.

        Args:
            request_id: Id of the request.
            index: Index of the image in the request.
            content: The encoded image.
            future: Where the judgement about the image will be set.
        """
        if future.cancelled():  # the request was given up
            return
        position = next(self._next_positions)
        try:
            record = make_record(position, content)
            decoded_image = self.guard.model.decoder((position, record))
            picture_bytes = _picture_bytes(content, decoded_image)
            content_digest = hashlib.sha256(content).digest()
            row_id = make_row_id(request_id, index, content_digest, picture_bytes)
        except BaseException as error:  # noqa: BLE001 - raised where the judgement is awaited
            future.set_exception(error)
            return
        # The decoder returns None only for a mark that ends a series of records. The service never
        # passes this mark to the decoder.
        assert decoded_image is not None  # noqa: S101
        with self._lock:
            waiting_image = WaitingImage(row_id, position, decoded_image, future)
            self._waiting_images.append(waiting_image)
            self._schedule()

    def _schedule(self) -> None:
        """Submit a model run unless one is scheduled. The caller must hold the lock."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._model_thread.submit(self._run_batch)

    def _run_batch(self) -> None:
        """Run the model on a batch of waiting images. Schedule the next run if any remain."""
        with self._lock:
            n_images = min(len(self._waiting_images), self.guard.batch_size)
            batch = [self._waiting_images.popleft() for _ in range(n_images)]
        if self.on_batch is not None:
            self.on_batch(n_images)
        # If a request was given up, its judgements are cancelled, and nobody waits for them.
        awaited_images = [image for image in batch if not image.judgement_future.cancelled()]
        futures = [image.judgement_future for image in awaited_images]
        self._set_results(futures, lambda: self._judge_images(awaited_images))
        with self._lock:
            self._is_scheduled = False
            if self._waiting_images:
                self._schedule()

    def _set_results(
        self, futures: Sequence[Future[Judgement]], judge: Callable[[], Sequence[Judgement]]
    ) -> None:
        """Call ``judge``, and set the results as the results of ``futures``.

        If ``judge`` raises an exception, the exception is set instead. A cancelled future stays
        cancelled. If all futures are cancelled, ``judge`` is not called.
        """
        # ``set_running_or_notify_cancel`` returns False for a cancelled future
        are_awaited = [future.set_running_or_notify_cancel() for future in futures]
        if not any(are_awaited):
            return
        try:
            results = judge()
        # In this thread the exception would be lost. So every future gets the exception, and
        # raises it in the request that awaits the future.
        except BaseException as error:
            logger.exception("%d rows failed", len(futures))
            for future, is_awaited in zip(futures, are_awaited, strict=True):
                if is_awaited:
                    future.set_exception(error)
            return
        for future, is_awaited, result in zip(futures, are_awaited, results, strict=True):
            if is_awaited:
                future.set_result(result)

    def _judge_images(self, batch: Sequence[WaitingImage]) -> list[Judgement]:
        """Return the images' judgements, in ``batch`` order. Unreadable images have no scores."""
        embedded = self.guard.model.embed([image.decoded_image for image in batch])
        ids_by_position = {image.position: image.row_id for image in batch}
        judgements: dict[int, Judgement] = {}  # by the image's position
        for error in embedded.errors:
            row_id = ids_by_position[error.position]
            answers = {
                name: answer_without_score(predictor.guard, row_id, error.kind)
                for name, predictor in self.served_predictors.items()
            }
            judgements[error.position] = Judgement(row_id, answers, scores={})
        positions = [row.position for row in embedded.metadata]
        if positions:
            readable_ids = [ids_by_position[position] for position in positions]
            new_judgements = self._judge_rows(join_arrays(embedded), readable_ids)
            judgements.update(zip(positions, new_judgements, strict=True))
        return [judgements[image.position] for image in batch]

    def _judge_rows(self, arrays: dict[str, Tensor], ids: Sequence[str]) -> list[Judgement]:
        """Return judgements about embedding rows by all predictors."""
        answers: dict[str, list[Answer]] = {}
        scores: dict[str, list[Score]] = {}
        for name, predictor in self.served_predictors.items():
            answers[name], outcomes = predictor.guard.answer(arrays, ids)
            scores[name] = _scores(outcomes)
        judgements = []
        for index, row_id in enumerate(ids):
            answers_of_row = {name: answers[name][index] for name in self.served_predictors}
            scores_of_row = {name: scores[name][index] for name in self.served_predictors}
            judgements.append(Judgement(row_id, answers_of_row, scores_of_row))
        return judgements

    def record(self, judgements: Sequence[Judgement]) -> Future[list[PredictorReply]]:
        """Submit a request's judgements to the journals.

        The returned future has the replies once all the request's rows are written.
        """
        request = UnwrittenRequest(judgements, Future())
        with self._lock:
            self._unwritten_requests.append(request)
        self._journal_thread.submit(self._write_requests)
        return request.replies_future

    def _write_requests(self) -> None:
        """Write the rows for all unwritten requests, and set the replies.

        This method is called once for every request. A call writes all requests that are ready, so
        a later call may find nothing to write.
        """
        with self._lock:
            unwritten_requests = list(self._unwritten_requests)
            self._unwritten_requests.clear()
        requests = [
            request
            for request in unwritten_requests
            if request.replies_future.set_running_or_notify_cancel()
        ]
        if not requests:
            return
        judgements: list[Judgement] = []
        for request in requests:
            judgements += request.judgements
        try:
            state = self._write_rows(judgements)
        # as in ``_set_results``, every request's future gets the exception, and raises it
        except BaseException as error:
            logger.exception("the rows of %d requests could not be written", len(requests))
            for request in requests:
                request.replies_future.set_exception(error)
            return
        for request in requests:
            replies = [self._make_reply(state, judgement) for judgement in request.judgements]
            request.replies_future.set_result(replies)

    def _write_rows(self, judgements: Sequence[Judgement]) -> ServiceState:
        """Write the rows with scores to the journals, and return the service's state."""
        scored_judgements = [judgement for judgement in judgements if judgement.scores]
        ids = [judgement.row_id for judgement in scored_judgements]
        scores: dict[str, ScoreColumns] = {}
        for name in self.served_predictors:
            answers = [judgement.scores[name].answer for judgement in scored_judgements]
            uncertainty = [judgement.scores[name].uncertainty for judgement in scored_judgements]
            scores[name] = (answers, uncertainty)
        return self.journals.record(ids, scores)

    def _make_reply(self, state: ServiceState, judgement: Judgement) -> PredictorReply:
        """Return the reply from the predictor chosen in this state."""
        name = state.answering_name
        return PredictorReply(
            row_id=judgement.row_id,
            answer=judgement.answers[name],
            fingerprint=self.served_predictors[name].fingerprint,
            guarantee=state.guarantees[name],
        )

    def close(self) -> None:
        """Finish all submitted work, then end the threads."""
        self._decoder_pool.shutdown(wait=True)
        # A model run may schedule the next run. So wait until no run is scheduled. The empty job
        # ends only after all runs submitted before it.
        while self._is_scheduled:
            empty_job = self._model_thread.submit(lambda: None)
            empty_job.result()
        self._model_thread.shutdown(wait=True)
        self._journal_thread.shutdown(wait=True)


def _picture_bytes(content: bytes, decoded_image: PreparedImage | ErrorRow | None) -> bytes:
    """Return the bytes that equal pictures share: the pixels, or an undecodable image's content."""
    if not isinstance(decoded_image, PreparedImage):
        return content
    # 16-bit numbers still tell a colour's 256 levels apart, and are hashed faster than 32-bit ones
    half_pixels = decoded_image.pixels.half()
    return half_pixels.numpy().tobytes()


def bytes_of_rows(arrays: Mapping[str, Tensor]) -> list[bytes]:
    """Return the bytes of each row's numbers in all arrays (B, ...), as B byte strings."""
    joined_rows = torch.cat([*arrays.values()], dim=1)
    return [row.tobytes() for row in joined_rows.numpy()]


def _require_shape(name: str, rows: list[list[float]], *, n_rows: int, width: int) -> None:
    """Raise DataError if ``rows`` are not ``n_rows`` rows with ``width`` numbers each."""
    lengths = {len(row) for row in rows}
    if len(rows) == n_rows and lengths == {width}:
        return
    shape_text = plural(len(rows), "row")
    if rows:
        shape_text += f" of {min(lengths)} to {max(lengths)} numbers"
    raise DataError(
        f"{name} must be {plural(n_rows, 'row')} of {width} numbers. Found {shape_text}."
    )


def _unit_rows(embeddings: Tensor) -> Tensor:
    """Scale embeddings (B, D) to unit norm. Raise DataError if one has no direction."""
    unit_embeddings, status, _ = normalise_rows(embeddings)
    bad_rows = np.flatnonzero(status != VALID)
    if bad_rows.size:
        first_bad_row = int(bad_rows[0])
        reason = STATUS_NAMES[status[first_bad_row]]
        raise DataError(f"embeddings.{first_bad_row} has no direction ({reason}).")
    return unit_embeddings


def _scores(outcomes: Outcomes) -> list[Score]:
    """Return the scores for all rows, as stored in the journals."""
    answers = [UNKNOWN] * len(outcomes)  # used if the outcomes hold no answers
    if outcomes.prediction is not None:
        answers = outcomes.prediction.tolist()
    return list(map(Score, answers, outcomes.uncertainty.tolist()))
