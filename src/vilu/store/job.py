"""Embed the parts of a store, count failed attempts, and give up parts that kill processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vilu.artifacts.disk import RUN, convert_os_errors
from vilu.artifacts.documents import append_to_log
from vilu.backbones.base import Backbone, jpeg_side_of
from vilu.backbones.catalog import load_backbone
from vilu.datasets.base import SHARD, ImageDataset, ImageRecord
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits
from vilu.errors import StorageError
from vilu.progress import Silence, Task
from vilu.store.manifest import Receipt, Run
from vilu.store.mapped import default_workers, in_threads
from vilu.store.parts import ErrorRow, Part, PartRows, Row, StoreLedger, possible_positions
from vilu.store.pipeline import END, Decoded, Decoder, Encoder, records_with_positions
from vilu.store.precision import check_precision
from vilu.text import plural

MAX_ATTEMPTS = 3  # number of processes that may die in a part before the part is given up
# message in the error rows of a part that was given up
GIVE_UP_MESSAGE = (
    f"{MAX_ATTEMPTS} processes died while they worked on the part of this image, so the part was "
    "given up"
)


def count_attempts(root: Path, part: Part) -> int:
    """Return how many processes have a mark on a part: they died in it, or are still at work.

    A process that ends the part, or fails with an exception, removes its mark.
    """
    path = root / part.attempts
    with convert_os_errors(f"cannot read {path}"):
        try:
            # A mark is one byte of the file. Appending one byte is atomic, so no mark is lost if
            # two processes append at the same time.
            return path.stat().st_size
        except FileNotFoundError:
            return 0


def forget_attempts(root: Path) -> None:
    """Remove the marks of all parts. To be called only if no other process works on the store."""
    folder = root / "attempts"
    with convert_os_errors(f"cannot clean {folder}"):
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            path.unlink(missing_ok=True)


class AttemptMarks:
    """The marks of this process on the parts that it has begun (``count_attempts``).

    At the end of the ``with`` block, the marks are removed. If the process dies in the block, they
    stay.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._begun: set[Part] = set()

    def __enter__(self) -> AttemptMarks:
        return self

    def __exit__(self, *_: object) -> None:
        # A mark that cannot be removed costs at most one more try of the part. The error must not
        # hide the exception that ended the block.
        with suppress(StorageError):
            for part in tuple(self._begun):
                self.end(part)

    def begin(self, part: Part) -> None:
        """Leave a mark on a part, before the work on it begins."""
        path = self._root / part.attempts
        with convert_os_errors(f"cannot write to {path.parent}"):
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as handle:
                handle.write(b"x")
        self._begun.add(part)

    def end(self, part: Part) -> None:
        """Remove all marks on a part, also those of processes that died in it before."""
        path = self._root / part.attempts
        with convert_os_errors(f"cannot write to {path.parent}"):
            path.unlink(missing_ok=True)
        self._begun.discard(part)


def given_up_rows(run: Run, part: Part, dataset: ImageDataset, *, may_list: bool) -> PartRows:
    """Return the content of a part that is given up: error rows, and no embeddings.

    If ``may_list`` is True, the images are listed without reading them, and every image gets an
    error row of kind "crash" with its key. If ``may_list`` is False, a process died while it listed
    the images. Then, or if listing raises an exception, the images are not known:

    - If parts are made of images, every position gets an error row of kind "crash".
    - If parts are made of shards, every shard gets one error row of kind "bad_shard", because the
      number of its images is unknown.
    """
    if may_list:
        try:
            records = records_with_positions(run, part, dataset)
            return _error_rows("crash", [(position, record.key) for position, record in records])
        # Listing may raise any exception, because these files have killed workers, and the reader
        # may be a plugin. The exception is logged, and the other parts are still done.
        except Exception as error:  # noqa: BLE001
            logger.warning(
                "part %d cannot be listed either: %s: %s", part.number, type(error).__name__, error
            )
    positions = possible_positions(run, part)
    if run.shards:
        first_positions = positions[::SHARD]  # of every shard of the part, its first position
        shards = [(position, f"shard {position // SHARD}") for position in first_positions]
        return _error_rows("bad_shard", shards)
    return _error_rows("crash", [(position, f"image {position}") for position in positions])


def _error_rows(kind: str, positions_and_keys: Sequence[tuple[int, str]]) -> PartRows:
    """Return a part with an error row for every position and its key, and without embeddings."""
    content = PartRows()
    for position, key in positions_and_keys:
        error = ErrorRow(
            key=key,
            position=position,
            stage="process",
            kind=kind,
            exception=None,
            message=GIVE_UP_MESSAGE,
            bytes=None,
        )
        content.errors.append(error)
    return content


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackboneSpec:
    """The name and the options with which each worker process loads the model, once."""

    name: str
    device: str = "auto"
    precision: str = "fp32"
    models: Path | None = None
    full_decode: bool = False

    def load(self) -> Backbone:
        """Return the model; raises the errors of ``load_backbone``."""
        return _load(self)


@cache
def _load(spec: BackboneSpec) -> Backbone:
    """Load the backbone of a spec."""
    return load_backbone(
        spec.name,
        device=spec.device,
        precision=spec.precision,
        models=spec.models,
        full_decode=spec.full_decode,
    )


@dataclass(frozen=True)
class EmbedJob:
    """Everything that a process needs to embed any part of a run.

    ``vilu.store.embed.embed`` documents the fields. A job can be pickled if its data set and its
    model can.
    """

    root: Path
    run: Run
    dataset: ImageDataset
    backbone: BackboneSpec | Backbone
    batch_size: int = 32
    workers: int | None = None
    strict: bool = False
    limits: ImageLimits = DEFAULT_LIMITS

    @cached_property
    def ledger(self) -> StoreLedger:
        """The folder of the store, with the parts that are done and those that are to be done."""
        return StoreLedger(self.root, self.run, self.dataset)

    def process(self, part: int) -> Receipt:
        """Embed a part, write it and return its receipt. A part that is done is not done again.

        The bytes of a part depend only on its images, the model and the batch size. So any process
        may do the part, at any time, and more than once. A part in which ``MAX_ATTEMPTS`` processes
        died is given up, and its images become error rows.
        """
        (receipt,) = self.process_all([part])
        return receipt

    def process_all(self, parts: Sequence[int], progress: Task | None = None) -> Iterator[Receipt]:
        """Do several parts like ``process``, in order, and yield their receipts.

        The first images of a part are decoded while the part before it is still being embedded.
        """
        if progress is None:
            progress = Silence()
        untried: list[Part] = []  # parts to be embedded together, one after the other
        for number in parts:
            part = self.ledger.parts[number]
            outcome = self.ledger.look_up(part)
            is_done = isinstance(outcome, Receipt)
            n_deaths = 0 if is_done else count_attempts(self.root, part)
            if not is_done and n_deaths == 0:
                untried.append(part)
                continue
            # the untried parts before this part are done first, to keep the order
            yield from self._embed(untried, progress)
            untried = []
            if isinstance(outcome, Receipt):
                receipt = outcome
            elif n_deaths < MAX_ATTEMPTS:
                # alone, so that no other part has a mark if another process dies in this part
                yield from self._embed([part], progress)
                continue
            else:
                receipt = self._give_up(part, n_deaths)
            progress.advance(receipt.n_in)
            yield receipt
        yield from self._embed(untried, progress)

    def _embed(self, parts: Sequence[Part], progress: Task) -> Iterator[Receipt]:
        """Embed parts one after the other, and yield the receipt of each when it is written."""
        if not parts:
            return
        backbone = self._load_backbone()
        encoder = Encoder(
            backbone=backbone,
            batch_size=self.batch_size,
            strict=self.strict,
            task=progress,
            arrays=self.run.arrays,
            dtype=self.run.dtype,
        )
        decoder = self._decoder(backbone)
        workers = self.workers or default_workers()
        max_ahead = self.batch_size + workers  # maximum number of images decoded in advance
        fingerprints: dict[int, str] = {}  # of the shards of each part, by its number
        with (
            AttemptMarks(self.root) as marks,
            in_threads(
                decoder, self._records(parts, marks, fingerprints), workers, max_ahead
            ) as outcomes,
        ):
            for part in parts:
                content = encoder.part(outcomes)
                fingerprint = fingerprints[part.number]
                receipt = self.ledger.write_rows(part, content, self.batch_size, fingerprint)
                # The mark is removed after the receipt is written. If the process dies in between,
                # the mark stays on a part that is done, where it is ignored. In the other order, a
                # part that kills its process during the writing would have no mark, and would be
                # tried for ever.
                marks.end(part)
                self._log(part, receipt, content)
                self._log_animated(content)
                yield receipt

    def _decoder(self, backbone: Backbone) -> Decoder:
        """The decoder of the images, for a backbone."""
        return Decoder(
            preprocess=backbone.preprocess,
            limits=self.limits,
            n_classes=len(self.run.names),
            views=self.run.views,
            captions=self.run.captions,
            jpeg_side=jpeg_side_of(backbone),
        )

    def check_precision(self, backbone: Backbone) -> None:
        """Compare the first photos with float32 if the model has a lower precision, and log it.

        Raises:
            ProvenanceError: If the two differ too much.
        """
        decoder = replace(self._decoder(backbone), views=None)

        def first_pixels() -> Iterator[Tensor]:
            for part in self.ledger.parts[:1]:  # no part if there are no images
                for item in records_with_positions(self.run, part, self.dataset):
                    outcome = decoder(item)
                    if isinstance(outcome, Decoded):
                        yield outcome.pixels

        check = check_precision(backbone, self.run, first_pixels(), self.batch_size)
        if check is not None:
            append_to_log(self.root, checked=asdict(check))

    def _load_backbone(self) -> Backbone:
        """Return the model; ProvenanceError if it is not the model that the run began with."""
        backbone = self.backbone
        if isinstance(backbone, BackboneSpec):
            backbone = backbone.load()
        self.run.space.require_match(
            backbone.space, name=str(self.root / RUN), other_name="the model of this process"
        )
        return backbone

    def _log(self, part: Part, receipt: Receipt, content: PartRows) -> None:
        """Log a finished part, to the log of the store and to the log of the process."""
        seconds = round(time.monotonic() - content.started, 3)
        append_to_log(
            self.root,
            part=part.number,
            rows=receipt.n_ok,
            errors=receipt.n_error,
            seconds=seconds,
        )
        logger.info(
            "part %d: %d rows, %d errors, %.1f s",
            part.number,
            receipt.n_ok,
            receipt.n_error,
            seconds,
        )

    def _log_animated(self, content: PartRows) -> None:
        """Log the number of animated images, of which only the first frame is used."""
        n_animated = sum(isinstance(row, Row) and row.n_frames > 1 for row in content.rows)
        if n_animated:
            logger.info("%s: the first frame is used", plural(n_animated, "animated image"))

    def _records(
        self, parts: Sequence[Part], marks: AttemptMarks, fingerprints: dict[int, str]
    ) -> Iterator[tuple[int, ImageRecord] | None]:
        """Yield the records of all parts with their positions, and ``END`` after each part.

        Before its records, a part gets a mark, and its fingerprint is put into ``fingerprints``.
        """
        for part in parts:
            marks.begin(part)
            # The fingerprint is taken before the shards are read. So if a shard changes while it is
            # read, the next run notices the change.
            fingerprints[part.number] = self.ledger.source(part)
            yield from records_with_positions(self.run, part, self.dataset)
            yield END

    def _give_up(self, part: Part, n_deaths: int) -> Receipt:
        """Write a part in which ``n_deaths`` processes died: its images are all errors."""
        with AttemptMarks(self.root) as marks:
            # If listing the images kills this process, too, its mark stays. The next process then
            # sees more than MAX_ATTEMPTS marks, and does not list the images.
            marks.begin(part)
            fingerprint = self.ledger.source(part)
            has_died_in_listing = n_deaths > MAX_ATTEMPTS
            content = given_up_rows(self.run, part, self.dataset, may_list=not has_died_in_listing)
            receipt = self.ledger.write_rows(part, content, self.batch_size, fingerprint)
            marks.end(part)
        logger.warning(
            "part %d was given up after %d processes had died in it: its %d images are counted as "
            "errors. To try again, remove %s.",
            part.number,
            MAX_ATTEMPTS,
            receipt.n_error,
            self.root / part.receipt,
        )
        return receipt


class Executor(Protocol):
    """An object that decides where and when the parts of a job are done.

    The job decides what a part contains. ``EmbedJob.process`` is deterministic and idempotent, and
    gives up a part that keeps killing its process. So an executor may do a part twice, even at the
    same time. After the death of a worker, it only has to try the part again.
    """

    name: str

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipt of each part as soon as the part is done, in any order.

        An executor that shares the work with other processes does only its own parts.
        """
