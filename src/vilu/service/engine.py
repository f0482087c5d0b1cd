"""From images of many requests to batches of the model, and back to each request."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import STATUS, VALID, normalised
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.guard.guard import Answer, Guard, arrays_of, record_of
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.record import fit_fingerprint
from vilu.service.kept import NAMES, Keeps, Kept, PromiseState, Scores, row_id
from vilu.store.documents import IMAGE
from vilu.store.parts import ErrorRow
from vilu.store.pipeline import Decoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What is said of one image, by whom, and what that one's promise is worth just now."""

    row: str
    answer: Answer
    predictor: str
    promise: PromiseState


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
    reply: Future[Judgement]


class Served:
    """A predictor that judges every image."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.fingerprint = fit_fingerprint(guard.folder)[:16]
        calibration = guard.calibration
        self.rule = None if calibration is None else calibration.rule
        self.promised = None if calibration is None else calibration.guarantee_text

    def in_words(self, state: PromiseState) -> str:
        """What there is to rely on in this state, for people."""
        if self.rule is None:
            return "Nothing is promised: this predictor has no rule that accepts answers."
        if state == "none":
            return "Nothing is promised: no threshold was certified, so the rule accepts no answer."
        states = {
            "holds": "The promise holds, as far as what was answered shows.",
            "void": "The promise is void: what comes in is not like the calibration, "
            "or labels show too many errors.",
        }
        return f"{states[state]} Promised: the rule {self.promised}."


class Engine:
    """One model, one or two predictors, and the images that wait for them.

    Images are decoded by threads as they come. One thread alone runs the model: over all that is
    decoded by then, at most ``guard.batch_size`` images at a time, so batches grow with the load
    and nobody waits for one to fill. A row goes to the journal when all of its request is judged,
    so that none is counted whose answer was given up; requests that are judged by then are written
    together.

    Args:
        guard: The model with the first predictor.
        keeper: Has the journal of each predictor, and says which one answers.
        second: Folder of a predictor that judges the same embeddings.

    Raises:
        UsageError: If the second predictor asks the model for something else.
        ProvenanceError: If it was fitted on another model.
    """

    def __init__(self, guard: Guard, keeper: Keeps, second: Path | None = None) -> None:
        self.guard, self.keeper = guard, keeper
        self.served = {NAMES[0]: Served(guard)}
        if second is not None:
            self.served[NAMES[1]] = Served(self._beside(second))
        self.on_batch: Callable[[int], None] = lambda size: None  # noqa: ARG005 - whoever counts sets it
        self._places = count()
        self._waiting: deque[Waiting] = deque()
        self._scheduled, self._lock = False, threading.Lock()
        self._decoders = ThreadPoolExecutor(guard.workers, thread_name_prefix="vilu-decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="vilu-model")
        self._unwritten: deque[Unwritten] = deque()
        self._journal = ThreadPoolExecutor(1, thread_name_prefix="vilu-journal")

    def _beside(self, folder: Path) -> Guard:
        """A predictor that looks at what the model of the first one makes."""
        first = self.guard
        second = Guard(folder, vectors_only=True)
        second.require_same_model(first.backbone)
        same_arrays = second.arrays == first.arrays
        if not same_arrays or second.vocabulary.dtype != first.vocabulary.dtype:
            raise UsageError(
                f"{folder} needs {', '.join(second.arrays)} of an image as {second.vocabulary.dtype}, the first "
                f"predictor {', '.join(first.arrays)} as {first.vocabulary.dtype}. Serve it by itself."
            )
        return second

    def images(self, request: str, images: Sequence[bytes]) -> list[Future[Judgement]]:
        """Judgements to come, one per image, in their order."""
        replies: list[Future[Judgement]] = [Future() for _ in images]
        for place, (content, reply) in enumerate(zip(images, replies, strict=True)):
            self._decoders.submit(self._decode, (request, place), content, reply)
        return replies

    def checked(
        self, embeddings: list[list[float]], features: list[list[float]] | None
    ) -> dict[str, Tensor]:
        """Rows as the model would give them, of unit norm and in the number format of the store; else DataError."""
        given, found = {IMAGE: embeddings, "features": features}, dict[str, Tensor]()
        for name, width in self.guard.model.widths.items():
            rows = given[name] or []
            lengths = {len(row) for row in rows}
            if lengths != {width} or len(rows) != len(embeddings):
                told = f"{len(rows)} rows" + (
                    f" of {min(lengths)} to {max(lengths)}" if rows else ""
                )
                raise DataError(
                    f"{name} must be {len(embeddings)} rows of {width} numbers. Found {told}."
                )
            array = torch.tensor(rows, dtype=torch.float32)
            if name == IMAGE:
                array, status, _ = normalised(array)
                if (bad := np.flatnonzero(status != VALID)).size:
                    raise DataError(
                        f"embeddings.{bad[0]} has no direction ({STATUS[status[bad[0]]]})."
                    )
            found[name] = array.to(getattr(torch, self.guard.vocabulary.dtype))
        return found

    def rows(self, request: str, arrays: dict[str, Tensor]) -> list[Future[Judgement]]:
        """Judgements to come, one per row of embeddings (B, D)."""
        blocks = [row.tobytes() for row in torch.cat([*arrays.values()], dim=1).numpy()]
        ids = [row_id(request, place, block) for place, block in enumerate(blocks)]
        replies: list[Future[Judgement]] = [Future() for _ in ids]
        self._model.submit(self._settle, replies, lambda: self._judged(arrays, ids))
        return replies

    def _decode(self, asked: tuple[str, int], content: bytes, reply: Future[Judgement]) -> None:
        """Decode an image, and have a batch run if none is about to; nothing where nobody waits any more."""
        if reply.cancelled():
            return
        place = next(self._places)
        try:
            row = row_id(*asked, hashlib.sha256(content).digest())
            item = self.guard.model.decoder((place, record_of(place, content)))
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            reply.set_exception(error)
            return
        assert item is not None  # noqa: S101 - which END alone becomes
        with self._lock:
            self._waiting.append(Waiting(row, place, item, reply))
            if not self._scheduled:
                self._scheduled = True
                self._model.submit(self._batch)

    def _batch(self) -> None:
        """Run the model over what waits, and come again if more does."""
        with self._lock:
            n = min(len(self._waiting), self.guard.batch_size)
            batch = [self._waiting.popleft() for _ in range(n)]
        self.on_batch(n)
        alive = [one for one in batch if not one.reply.cancelled()]
        self._settle([one.reply for one in alive], lambda: self._judgements(alive))
        with self._lock:
            self._scheduled = bool(self._waiting)
            if self._scheduled:
                self._model.submit(self._batch)

    def _settle(
        self, replies: Sequence[Future[Judgement]], work: Callable[[], Sequence[Judgement]]
    ) -> None:
        """Give what work leads to to those who still wait for it."""
        waits = [reply.set_running_or_notify_cancel() for reply in replies]
        if not any(waits):
            return
        try:
            found = work()
        # not swallowed: an exception ends with its thread unless it is handed over; every request
        # raises it
        except BaseException as error:
            logger.exception("%d rows failed", len(replies))
            for reply in compress(replies, waits):
                reply.set_exception(error)
            return
        for reply, said in compress(zip(replies, found, strict=True), waits):
            reply.set_result(said)

    def _judgements(self, batch: Sequence[Waiting]) -> list[Judgement]:
        content = self.guard.embed([waiting.item for waiting in batch])
        rows = {waiting.position: waiting.row for waiting in batch}
        judged: dict[int, Judgement] = {}
        for error in content.errors:
            row = rows[error.position]
            refusals = {
                name: served.guard.refused(row, error.kind) for name, served in self.served.items()
            }
            judged[error.position] = Judgement(row, refusals, {})
        places = [row.position for row in content.rows]
        if places:
            scored = self._judged(arrays_of(content), [rows[place] for place in places])
            judged |= zip(places, scored, strict=True)
        return [judged[waiting.position] for waiting in batch]

    def _judged(self, arrays: dict[str, Tensor], ids: Sequence[str]) -> list[Judgement]:
        """What every predictor says of rows of embeddings."""
        answers: dict[str, list[Answer]] = {}
        scores: dict[str, list[tuple[int, float]]] = {}
        for name, served in self.served.items():
            answers[name], outcomes = served.guard.answer(arrays, ids)
            scores[name] = _scores(outcomes)
        return [
            Judgement(
                row,
                {name: answers[name][place] for name in self.served},
                {name: scores[name][place] for name in self.served},
            )
            for place, row in enumerate(ids)
        ]

    def record(self, judgements: Sequence[Judgement]) -> Future[list[Reply]]:
        """Replies to come, as soon as the rows of a request are in every journal."""
        request = Unwritten(judgements, Future())
        with self._lock:
            self._unwritten.append(request)
        self._journal.submit(self._write)
        return request.replies

    def _write(self) -> None:
        """Write the rows of all requests that wait; none where an earlier turn has done so."""
        with self._lock:
            waiting = list(self._unwritten)
            self._unwritten.clear()
        requests = [item for item in waiting if item.replies.set_running_or_notify_cancel()]
        if not requests:
            return
        try:
            state = self._recorded([row for request in requests for row in request.judgements])
        # not swallowed: as in ``_settle``
        except BaseException as error:
            logger.exception("the rows of %d requests could not be written", len(requests))
            for request in requests:
                request.replies.set_exception(error)
            return
        for request in requests:
            request.replies.set_result([self._reply(state, row) for row in request.judgements])

    def _recorded(self, judgements: Sequence[Judgement]) -> Kept:
        """Write rows, but for images that cannot be read; the state after it."""
        scored = [judgement for judgement in judgements if judgement.scores]
        scores: dict[str, Scores] = {}
        for name in self.served:
            answers = [judgement.scores[name][0] for judgement in scored]
            uncertainty = [judgement.scores[name][1] for judgement in scored]
            scores[name] = answers, uncertainty
        return self.keeper.record([judgement.row for judgement in scored], scores)

    def _reply(self, state: Kept, judgement: Judgement) -> Reply:
        name = state.answering
        return Reply(
            judgement.row,
            judgement.answers[name],
            self.served[name].fingerprint,
            state.promises[name],
        )

    def close(self) -> None:
        """Answer what waits."""
        self._decoders.shutdown(wait=True)
        while self._scheduled:
            self._model.submit(lambda: None).result()
        self._model.shutdown(wait=True)
        self._journal.shutdown(wait=True)


def _scores(outcomes: Outcomes) -> list[tuple[int, float]]:
    """Answer and uncertainty of every row."""
    answers = [UNKNOWN] * len(outcomes)
    if outcomes.prediction is not None:
        answers = outcomes.prediction.tolist()
    return list(zip(answers, outcomes.uncertainty.tolist(), strict=True))
