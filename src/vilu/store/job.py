"""One part of an embedding job, and its attempts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from vilu.artifacts.disk import RUN, or_refuse
from vilu.artifacts.documents import log
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.datasets.base import SHARD, ImageDataset, ImageRecord
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits
from vilu.errors import StorageError
from vilu.progress import Silence, Task
from vilu.store.manifest import Receipt, Run
from vilu.store.mapped import default_workers, in_threads
from vilu.store.parts import ErrorRow, Part, PartRows, StoreLedger, positions
from vilu.store.pipeline import END, Decoder, Encoder, place_records

MAX_ATTEMPTS = 3  # processes that may die in a part before it is given up
MESSAGE = (
    f"{MAX_ATTEMPTS} processes died while they worked on the part of this image, so the part was "
    "given up"
)


def attempts(root: Path, part: Part) -> int:
    """How many processes have begun a part and neither ended it nor failed: dead, or at work."""
    path = root / part.attempts
    with or_refuse(f"read {path}"):
        try:
            # a byte for each: appending one is atomic, so no count is lost between two processes
            return path.stat().st_size
        except FileNotFoundError:
            return 0


def forget_attempts(root: Path) -> None:
    """Take away all marks: whoever drives a store alone begins anew."""
    folder = root / "attempts"
    with or_refuse(f"clean {folder}"):
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            path.unlink(missing_ok=True)


class Marks:
    """The marks of this process, which are gone after the block, unless the process dies in it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._left: set[Part] = set()

    def __enter__(self) -> Marks:
        return self

    def __exit__(self, *_: object) -> None:
        # a mark too many costs a retry; the exception under way says more
        with suppress(StorageError):
            for part in tuple(self._left):
                self.end(part)

    def begin(self, part: Part) -> None:
        """Leave one, before the part is touched: a process that is killed writes nothing after."""
        path = self._root / part.attempts
        with or_refuse(f"write to {path.parent}"):
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as handle:
                handle.write(b"x")
        self._left.add(part)

    def end(self, part: Part) -> None:
        """Take it away, and the marks of processes that died before this one came through."""
        path = self._root / part.attempts
        with or_refuse(f"write to {path.parent}"):
            path.unlink(missing_ok=True)
        self._left.discard(part)


def give_up(run: Run, part: Part, dataset: ImageDataset, *, listing: bool) -> PartRows:
    """A part without rows: an error row of kind "crash" for every image, from the listing alone.

    Without ``listing``, which was tried already and killed the process, it is a row for every
    position, or for every shard, of kind "bad_shard": how many images that costs is unknown.
    """
    if listing:
        try:
            keys = [(at, record.key) for at, record in place_records(run, part, dataset)]
            return _error_rows("crash", keys)
        # these images have killed workers, so their listing may raise anything of a foreign reader;
        # it is logged, every row is recorded as a crash, and the other parts go on
        except Exception as error:  # noqa: BLE001
            logger.warning(
                "part %d cannot be listed either: %s: %s", part.number, type(error).__name__, error
            )
    possible = positions(run, part)
    if run.shards:
        first_of_shards = possible[::SHARD]
        return _error_rows("bad_shard", [(at, f"shard {at // SHARD}") for at in first_of_shards])
    return _error_rows("crash", [(at, f"image {at}") for at in possible])


def _error_rows(kind: str, keys: Sequence[tuple[int, str]]) -> PartRows:
    """An error row for every (position, key)."""
    rows = [ErrorRow(key, at, "process", kind, None, MESSAGE, None) for at, key in keys]
    return PartRows(errors=rows)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackboneSpec:
    """A model by name, for processes that load it themselves; each loads it once."""

    name: str
    device: str = "auto"
    precision: str = "fp32"
    models: Path | None = None

    def load(self) -> Backbone:
        """The model; raises as ``load_backbone``."""
        return _load(self)


@cache
def _load(spec: BackboneSpec) -> Backbone:
    return load_backbone(
        spec.name, device=spec.device, precision=spec.precision, models=spec.models
    )


@dataclass(frozen=True)
class EmbedJob:
    """All that a process needs to embed any part of a run (``embed`` says what it is made of).

    It can be pickled, if its data set and model can.
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
        """What is done and to be done."""
        return StoreLedger(self.root, self.run, self.dataset)

    def process(self, part: int) -> Receipt:
        """Embed a part and write it; if it is there already, nothing is computed.

        Its bytes depend on its own images, the model and the batch size alone, so any process may
        do it, at any time, and more than once. A part in which ``MAX_ATTEMPTS`` processes died is
        given up: its images become error rows.
        """
        (receipt,) = self.process_all([part])
        return receipt

    def process_all(self, parts: Sequence[int], progress: Task | None = None) -> Iterator[Receipt]:
        """``process`` of some parts, in order; decoding runs ahead over the ends of parts."""
        if progress is None:
            progress = Silence()
        fresh: list[Part] = []  # parts to be embedded together, one after the other
        for number in parts:
            part = self.ledger.parts[number]
            outcome = self.ledger.look_up(part)
            is_done = isinstance(outcome, Receipt)
            deaths = 0 if is_done else attempts(self.root, part)
            if not is_done and deaths == 0:
                fresh.append(part)
                continue
            yield from self._embed(fresh, progress)
            fresh = []
            if isinstance(outcome, Receipt):
                receipt = outcome
            elif deaths < MAX_ATTEMPTS:
                # alone: a death in it must not be laid at another part's door
                yield from self._embed([part], progress)
                continue
            else:
                receipt = self._give_up(part, deaths)
            progress.advance(receipt.n_in)
            yield receipt
        yield from self._embed(fresh, progress)

    def _embed(self, parts: Sequence[Part], progress: Task) -> Iterator[Receipt]:
        """Embed parts that are missing, one after the other, and write each as it ends."""
        if not parts:
            return
        backbone = self._load_backbone()
        encoder = Encoder(
            backbone, self.batch_size, self.strict, progress, self.run.arrays, self.run.dtype
        )
        decoder = Decoder(
            backbone.preprocess, self.limits, len(self.run.names), self.run.views, self.run.captions
        )
        workers = self.workers or default_workers()
        ahead = self.batch_size + workers
        sources: dict[int, str] = {}
        with (
            Marks(self.root) as marks,
            in_threads(decoder, self._items(parts, marks, sources), workers, ahead) as outcomes,
        ):
            for part in parts:
                content = encoder.part(outcomes)
                source = sources[part.number]
                receipt = self.ledger.write_rows(part, content, self.batch_size, source)
                # after the receipt: a death in between leaves a mark on a part that is done, which
                # nobody counts; before it, a part that kills at its end would be tried for ever
                marks.end(part)
                self._log(part, receipt, content)
                yield receipt

    def _load_backbone(self) -> Backbone:
        """The model, which must be the one that the run was begun with."""
        backbone = self.backbone
        if isinstance(backbone, BackboneSpec):
            backbone = backbone.load()
        self.run.space.require_match(
            backbone.space, name=str(self.root / RUN), other_name="the model of this process"
        )
        return backbone

    def _log(self, part: Part, receipt: Receipt, content: PartRows) -> None:
        seconds = round(time.monotonic() - content.started, 3)
        log(
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

    def _items(
        self, parts: Sequence[Part], marks: Marks, sources: dict[int, str]
    ) -> Iterator[tuple[int, ImageRecord] | None]:
        """The records of all parts, each part with ``END`` after it."""
        for part in parts:
            marks.begin(part)
            # before the part is read: a shard that changes meanwhile is then seen as changed
            sources[part.number] = self.ledger.source(part)
            yield from place_records(self.run, part, self.dataset)
            yield END

    def _give_up(self, part: Part, deaths: int) -> Receipt:
        """Write a part as errors; one mark more tells whether listing it kills the process too."""
        with Marks(self.root) as marks:
            marks.begin(part)
            source = self.ledger.source(part)
            content = give_up(self.run, part, self.dataset, listing=deaths == MAX_ATTEMPTS)
            receipt = self.ledger.write_rows(part, content, self.batch_size, source)
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
    """Decides where and when the parts of a job are done; their content is the job's own matter.

    ``EmbedJob.process`` is deterministic and idempotent, and sets aside a part that keeps killing
    its process. So an executor may do a part twice, at the same time even, and has nothing to do
    but to try again after a worker's death.
    """

    name: str

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipt of each part that it does, as soon as it is done, in any order."""
