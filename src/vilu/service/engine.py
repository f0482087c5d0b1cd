"""From images of many requests to batches of the model, and back to each request."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vilu.embeddings.checks import STATUS, VALID, normalised
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.guard.guard import Answer, Guard, Judge, arrays_of, record_of
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.record import fit_fingerprint
from vilu.service.journal import PromiseState, row_id
from vilu.service.keeper import NAMES, Keeps, Kept, Scores
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
class Waiting:
    """A decoded image that waits for the model."""

    row: str
    position: int  # among all images of this service
    item: Decoded | ErrorRow
    reply: Future[Reply]


class Served:
    """A predictor that judges every image."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.fingerprint = fit_fingerprint(judge.folder)[:16]
        self.said = judge.decider.record.promise if judge.decider.record is not None else None


class Engine:
    """One model, one or two predictors, and the images that wait for them.

    Images are decoded by threads as they come. One thread alone runs the model: over all that is
    decoded by then, at most ``guard.batch_size`` images at a time, so batches grow with the load
    and nobody waits for one to fill.

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
        self.served = {NAMES[0]: Served(guard.judge)}
        if second is not None:
            self.served[NAMES[1]] = Served(self._beside(second))
        self.on_batch: Callable[[int], None] = lambda size: None  # noqa: ARG005 - whoever counts sets it
        self._places = count()
        self._waiting: deque[Waiting] = deque()
        self._scheduled, self._lock = False, threading.Lock()
        self._decoders = ThreadPoolExecutor(guard.workers, thread_name_prefix="vilu-decode")
        self._model = ThreadPoolExecutor(1, thread_name_prefix="vilu-model")

    def _beside(self, folder: Path) -> Judge:
        judge = Judge(folder)
        judge.vocabulary.space.require_match(
            self.guard.backbone.space,
            mine=str(folder),
            theirs=f"the model {self.guard.backbone.space.backbone}",
        )
        if (
            judge.arrays != self.guard.judge.arrays
            or judge.vocabulary.dtype != self.guard.vocabulary.dtype
        ):
            raise UsageError(
                f"{folder} needs {', '.join(judge.arrays)} of an image as {judge.vocabulary.dtype}, the first "
                f"predictor {', '.join(self.guard.judge.arrays)} as {self.guard.vocabulary.dtype}. Serve it by itself."
            )
        return judge

    def images(self, request: str, images: Sequence[bytes]) -> list[Future[Reply]]:
        """Replies to come, one per image, in their order."""
        replies: list[Future[Reply]] = [Future() for _ in images]
        for place, (content, reply) in enumerate(zip(images, replies, strict=True)):
            self._decoders.submit(self._decode, (request, place), content, reply)
        return replies

    def checked(
        self, embeddings: list[list[float]], features: list[list[float]] | None
    ) -> dict[str, Tensor]:
        """Rows as the model would give them, of unit norm and in the number format of the store; else DataError."""
        given, found = {IMAGE: embeddings, "features": features}, dict[str, Tensor]()
        for name, width in self.guard.widths.items():
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

    def rows(self, request: str, arrays: dict[str, Tensor]) -> list[Future[Reply]]:
        """Replies to come, one per row of embeddings (B, D)."""
        blocks = [row.tobytes() for row in torch.cat([*arrays.values()], dim=1).numpy()]
        ids = [row_id(request, place, block) for place, block in enumerate(blocks)]
        replies: list[Future[Reply]] = [Future() for _ in ids]
        self._model.submit(self._settle, replies, lambda: self._judged(arrays, ids))
        return replies

    def _decode(self, asked: tuple[str, int], content: bytes, reply: Future[Reply]) -> None:
        """Decode an image, and have a batch run if none is about to; nothing where nobody waits any more."""
        if reply.cancelled():
            return
        place = next(self._places)
        try:
            row = row_id(*asked, hashlib.sha256(content).digest())
            item = self.guard.decode((place, record_of(place, content)))
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
        self._settle([one.reply for one in alive], lambda: self._replies(alive))
        with self._lock:
            self._scheduled = bool(self._waiting)
            if self._scheduled:
                self._model.submit(self._batch)

    def _settle(
        self, replies: Sequence[Future[Reply]], work: Callable[[], Sequence[Reply]]
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

    def _replies(self, batch: Sequence[Waiting]) -> list[Reply]:
        content, rows = (
            self.guard.embed([one.item for one in batch]),
            {one.position: one.row for one in batch},
        )
        bad = [error.position for error in content.errors]
        good = [row.position for row in content.rows]
        said = self._judged(arrays_of(content), [rows[place] for place in good]) if good else []
        if bad:
            kept = self.keeper.kept()
            judge = self.served[kept.answering].judge
            refused = [judge.refused(rows[error.position], error.kind) for error in content.errors]
            said = self._heard(kept, [rows[place] for place in bad], refused) + said
        replies = dict(zip(bad + good, said, strict=True))
        return [replies[one.position] for one in batch]

    def _judged(self, arrays: dict[str, Tensor], ids: Sequence[str]) -> list[Reply]:
        """What every predictor says is in its journal before the one that answers is heard."""
        told = {name: one.judge.judge(arrays, ids) for name, one in self.served.items()}
        kept = self.keeper.record(
            ids, {name: _scores(outcomes) for name, (_, outcomes) in told.items()}
        )
        return self._heard(kept, ids, told[kept.answering][0])

    def _heard(self, kept: Kept, ids: Sequence[str], answers: Sequence[Answer]) -> list[Reply]:
        who, promise = self.served[kept.answering].fingerprint, kept.promises[kept.answering]
        return [Reply(row, answer, who, promise) for row, answer in zip(ids, answers, strict=True)]

    def close(self) -> None:
        """Answer what waits."""
        self._decoders.shutdown(wait=True)
        while self._scheduled:
            self._model.submit(lambda: None).result()
        self._model.shutdown(wait=True)


def _scores(outcomes: Outcomes) -> Scores:
    answers = (
        [UNKNOWN] * len(outcomes) if outcomes.prediction is None else outcomes.prediction.tolist()
    )
    return answers, outcomes.uncertainty.tolist()
