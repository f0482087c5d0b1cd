"""From images of many requests to batches of the model, and back to each request."""

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

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import STATUS, VALID, normalised
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.guard.guard import Answer, Guard, arrays_of, record_of
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.service.journals import NAMES, GuaranteeState, Journals, Scores, ServiceState, row_id
from vilu.store.manifest import IMAGE
from vilu.store.parts import ErrorRow
from vilu.store.pipeline import Decoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """The answer for one image, the predictor that gave it, and the state of its guarantee."""

    row: str
    answer: Answer
    predictor: str
    guarantee: GuaranteeState


@dataclass(frozen=True)
class Judgement:
    """What every predictor says of one image, by its name; no scores where it cannot be read."""

    row: str
    answers: Mapping[str, Answer]
    scores: Mapping[str, tuple[int, float]]  # answer and uncertainty


@dataclass(frozen=True)
class Unwritten:
    """The judgements of one request, which wait for the journal."""

    judgements: Sequence[Judgement]
    replies: Future[list[Reply]]


@dataclass(frozen=True)
class Waiting:
    """A decoded image that waits for the model."""

    row: str
    position: int  # among all images of this service
    item: Decoded | ErrorRow
    judgement: Future[Judgement]


class Served:
    """A predictor that judges every image."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.fingerprint = fit_fingerprint(guard.folder)[:16]
        calibration = guard.calibration
        self.rule = None if calibration is None else calibration.rule
        self.guarantee_text = None if calibration is None else calibration.guarantee_text

    def in_words(self, state: GuaranteeState) -> str:
        """What there is to rely on in this state, for people."""
        if self.rule is None:
            return "Nothing is guaranteed: this predictor has no rule that accepts answers."
        if state == "none":
            return (
                "Nothing is guaranteed: no threshold was certified, so the rule accepts no answer."
            )
        states = {
            "holds": "The guarantee holds, as far as what was answered shows.",
            "void": "The guarantee is void: what comes in is not like the calibration, "
            "or labels show too many errors.",
        }
        return f"{states[state]} Guaranteed: the rule {self.guarantee_text}."


class Engine:
    """One model, one or two predictors, and the images that wait for them.

    Images are decoded by threads as they come. One thread alone runs the model: over all that is
    decoded by then, at most ``guard.batch_size`` images at a time, so batches grow with the load
    and nobody waits for one to fill. A row goes to the journal when all of its request is judged,
    so that none is counted whose answer was given up; requests that are judged by then are written
    together.

    Args:
        guard: The model with the first predictor.
        journals: Of every predictor; they say which one answers, too.
        second: Folder of a predictor that judges the same embeddings.

    Raises:
        UsageError: If the second predictor asks the model for something else.
        ProvenanceError: If it was fitted on another model.
    """

    def __init__(self, guard: Guard, journals: Journals, second: Path | None = None) -> None:
        self.guard = guard
        self.journals = journals
        self.served = {NAMES[0]: Served(guard)}
        if second is not None:
            self.served[NAMES[1]] = Served(self._beside(second))
        self.on_batch: Callable[[int], None] | None = None
        self._positions = count()
        self._lock = threading.Lock()  # over the three below
        self._waiting: deque[Waiting] = deque()
        self._is_scheduled = False  # whether the model's thread is about to take what waits
        self._unwritten: deque[Unwritten] = deque()
        self._decoders = ThreadPoolExecutor(guard.workers, thread_name_prefix="vilu-decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="vilu-model")
        self._journal_writer = ThreadPoolExecutor(1, thread_name_prefix="vilu-journal")

    def _beside(self, folder: Path) -> Guard:
        """A predictor that looks at what the model of the first one makes."""
        first = self.guard
        second = Guard(folder, vectors_only=True)
        second.require_same_model(first.backbone)
        has_same_arrays = second.arrays == first.arrays
        has_same_dtype = second.vocabulary.dtype == first.vocabulary.dtype
        if has_same_arrays and has_same_dtype:
            return second
        raise UsageError(
            f"{folder} needs {', '.join(second.arrays)} of an image as {second.vocabulary.dtype}, "
            f"the first predictor {', '.join(first.arrays)} as {first.vocabulary.dtype}. Serve it "
            "by itself."
        )

    def images(self, request: str, images: Sequence[bytes]) -> list[Future[Judgement]]:
        """Judgements to come, one per image, in their order."""
        judgements = []
        for place, content in enumerate(images):
            judgement: Future[Judgement] = Future()
            judgements.append(judgement)
            self._decoders.submit(self._decode, request, place, content, judgement)
        return judgements

    def checked(
        self, embeddings: list[list[float]], features: list[list[float]] | None
    ) -> dict[str, Tensor]:
        """Rows as the model would give them, by the names of the arrays.

        They are of unit norm, and in the number format of the store.

        Raises:
            DataError: If there are too few rows, or they are of another width or without direction.
        """
        asked = {IMAGE: embeddings, FEATURES: features or []}
        dtype = getattr(torch, self.guard.vocabulary.dtype)
        arrays: dict[str, Tensor] = {}
        for name, width in self.guard.model.widths.items():
            rows = asked[name]
            _require_shape(name, rows, len(embeddings), width)
            array = torch.tensor(rows, dtype=torch.float32)
            if name == IMAGE:
                array = _unit_rows(array)
            arrays[name] = array.to(dtype)
        return arrays

    def rows(self, request: str, arrays: dict[str, Tensor]) -> list[Future[Judgement]]:
        """Judgements to come, one per row of embeddings (B, D)."""
        contents = torch.cat([*arrays.values()], dim=1).numpy()
        ids = [row_id(request, place, row.tobytes()) for place, row in enumerate(contents)]
        judgements: list[Future[Judgement]] = [Future() for _ in ids]
        self._model.submit(self._settle, judgements, lambda: self._judged(arrays, ids))
        return judgements

    def _decode(
        self, request: str, place: int, content: bytes, judgement: Future[Judgement]
    ) -> None:
        """Decode an image, and have a batch run if none is about to."""
        if judgement.cancelled():  # nobody waits any more
            return
        position = next(self._positions)
        try:
            row = row_id(request, place, hashlib.sha256(content).digest())
            item = self.guard.model.decoder((position, record_of(position, content)))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            judgement.set_exception(error)
            return
        assert item is not None  # noqa: S101 - which END alone becomes
        with self._lock:
            self._waiting.append(Waiting(row, position, item, judgement))
            self._schedule()

    def _schedule(self) -> None:
        """Have the model's thread take what waits, unless it is about to; with the lock held."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._model.submit(self._run_batch)

    def _run_batch(self) -> None:
        """Run the model over what waits, and come again if more does."""
        with self._lock:
            n = min(len(self._waiting), self.guard.batch_size)
            batch = [self._waiting.popleft() for _ in range(n)]
        if self.on_batch is not None:
            self.on_batch(n)
        awaited = [waiting for waiting in batch if not waiting.judgement.cancelled()]
        judgements = [waiting.judgement for waiting in awaited]
        self._settle(judgements, lambda: self._judge_images(awaited))
        with self._lock:
            self._is_scheduled = False
            if self._waiting:
                self._schedule()

    def _settle(
        self, judgements: Sequence[Future[Judgement]], judge: Callable[[], Sequence[Judgement]]
    ) -> None:
        """Judge, unless nobody waits any more, and hand the results to those who still wait."""
        awaited = [judgement.set_running_or_notify_cancel() for judgement in judgements]
        if not any(awaited):
            return
        try:
            results = judge()
        # not swallowed: an exception ends with its thread unless it is handed over; every request
        # raises it
        except BaseException as error:
            logger.exception("%d rows failed", len(judgements))
            for judgement, is_awaited in zip(judgements, awaited, strict=True):
                if is_awaited:
                    judgement.set_exception(error)
            return
        for judgement, is_awaited, result in zip(judgements, awaited, results, strict=True):
            if is_awaited:
                judgement.set_result(result)

    def _judge_images(self, batch: Sequence[Waiting]) -> list[Judgement]:
        """What every predictor says of decoded images; without scores of those that are bad."""
        content = self.guard.embed([waiting.item for waiting in batch])
        ids = {waiting.position: waiting.row for waiting in batch}
        judgements: dict[int, Judgement] = {}
        for error in content.errors:
            row = ids[error.position]
            answers = {
                name: served.guard.refused(row, error.kind) for name, served in self.served.items()
            }
            judgements[error.position] = Judgement(row, answers, {})
        positions = [row.position for row in content.rows]
        if positions:
            good = [ids[position] for position in positions]
            judged = self._judged(arrays_of(content), good)
            judgements.update(zip(positions, judged, strict=True))
        return [judgements[waiting.position] for waiting in batch]

    def _judged(self, arrays: dict[str, Tensor], ids: Sequence[str]) -> list[Judgement]:
        """What every predictor says of rows of embeddings."""
        answers: dict[str, list[Answer]] = {}
        scores: dict[str, list[tuple[int, float]]] = {}
        for name, served in self.served.items():
            answers[name], outcomes = served.guard.answer(arrays, ids)
            scores[name] = _scores(outcomes)
        judgements = []
        for place, row in enumerate(ids):
            answers_of_row = {name: answers[name][place] for name in self.served}
            scores_of_row = {name: scores[name][place] for name in self.served}
            judgements.append(Judgement(row, answers_of_row, scores_of_row))
        return judgements

    def record(self, judgements: Sequence[Judgement]) -> Future[list[Reply]]:
        """Replies to come, as soon as the rows of a request are in every journal."""
        request = Unwritten(judgements, Future())
        with self._lock:
            self._unwritten.append(request)
        self._journal_writer.submit(self._write)
        return request.replies

    def _write(self) -> None:
        """Write the rows of all requests that wait; none where an earlier turn has done so."""
        with self._lock:
            waiting = list(self._unwritten)
            self._unwritten.clear()
        requests = [
            request for request in waiting if request.replies.set_running_or_notify_cancel()
        ]
        if not requests:
            return
        judgements: list[Judgement] = []
        for request in requests:
            judgements += request.judgements
        try:
            state = self._recorded(judgements)
        # not swallowed: as in ``_settle``
        except BaseException as error:
            logger.exception("the rows of %d requests could not be written", len(requests))
            for request in requests:
                request.replies.set_exception(error)
            return
        for request in requests:
            replies = [self._reply(state, judgement) for judgement in request.judgements]
            request.replies.set_result(replies)

    def _recorded(self, judgements: Sequence[Judgement]) -> ServiceState:
        """Write rows, but for images that cannot be read; the state after it."""
        scored = [judgement for judgement in judgements if judgement.scores]
        ids = [judgement.row for judgement in scored]
        scores: dict[str, Scores] = {}
        for name in self.served:
            answers = [judgement.scores[name][0] for judgement in scored]
            uncertainty = [judgement.scores[name][1] for judgement in scored]
            scores[name] = (answers, uncertainty)
        return self.journals.record(ids, scores)

    def _reply(self, state: ServiceState, judgement: Judgement) -> Reply:
        """The answer of the predictor that answers now."""
        name = state.answering
        return Reply(
            judgement.row,
            judgement.answers[name],
            self.served[name].fingerprint,
            state.guarantees[name],
        )

    def close(self) -> None:
        """Answer what waits."""
        self._decoders.shutdown(wait=True)
        while self._is_scheduled:
            self._model.submit(lambda: None).result()
        self._model.shutdown(wait=True)
        self._journal_writer.shutdown(wait=True)


def _require_shape(name: str, rows: list[list[float]], n: int, width: int) -> None:
    """Refuse what is not n rows of so many numbers."""
    lengths = {len(row) for row in rows}
    if len(rows) == n and lengths == {width}:
        return
    shape = f"{len(rows)} rows"
    if rows:
        shape += f" of {min(lengths)} to {max(lengths)}"
    raise DataError(f"{name} must be {n} rows of {width} numbers. Found {shape}.")


def _unit_rows(embeddings: Tensor) -> Tensor:
    """Embeddings (B, D) scaled to unit norm; DataError where one has no direction."""
    scaled, status, _ = normalised(embeddings)
    bad = np.flatnonzero(status != VALID)
    if bad.size:
        why = STATUS[status[bad[0]]]
        raise DataError(f"embeddings.{bad[0]} has no direction ({why}).")
    return scaled


def _scores(outcomes: Outcomes) -> list[tuple[int, float]]:
    """Answer and uncertainty of every row."""
    answers = [UNKNOWN] * len(outcomes)
    if outcomes.prediction is not None:
        answers = outcomes.prediction.tolist()
    return list(zip(answers, outcomes.uncertainty.tolist(), strict=True))
