"""Embed a store's parts. After several processes have died in a part, give the part up."""

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

from vilu.artifacts.disk import RUN_FILE, convert_os_errors
from vilu.artifacts.documents import append_to_log
from vilu.backbones.base import Backbone, jpeg_side_of
from vilu.backbones.catalog import load_backbone
from vilu.datasets.base import POSITIONS_PER_SHARD, ImageDataset, ImageRecord
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits
from vilu.errors import StorageError
from vilu.progress import SilentProgress, Task
from vilu.store.manifest import Receipt, Run
from vilu.store.mapped import default_workers, map_in_threads
from vilu.store.parts import (
    ErrorRow,
    ImageMetadata,
    Part,
    PartContent,
    StoreLedger,
    possible_positions,
)
from vilu.store.pipeline import END_OF_PART, Decoder, Encoder, PreparedImage, records_with_positions
from vilu.store.precision import check_precision
from vilu.text import plural

MAX_ATTEMPTS = 3  # number of dead processes after which a part is given up
# message in a given-up part's error rows
GIVE_UP_MESSAGE = (
    f"{MAX_ATTEMPTS} processes died while they worked on the part of this image, so the part was "
    "given up"
)


def count_attempts(root: Path, part: Part) -> int:
    """Return the number of marks on a part.

    A process puts a mark on a part before the work. After finishing the part, or after an
    exception, the process removes the mark. So for each mark, a process has died while working on
    the part, or is still at work.
    """
    path = root / part.attempts_file
    with convert_os_errors(f"cannot read {path}"):
        try:
            # A mark is one byte in the file. Appending one byte is atomic, so no mark is lost if
            # two processes append at the same time.
            return path.stat().st_size
        except FileNotFoundError:
            return 0


def remove_attempt_marks(root: Path) -> None:
    """Remove the marks on all parts. No other process may be at work on the store."""
    folder = root / "attempts"
    with convert_os_errors(f"cannot clean {folder}"):
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            path.unlink(missing_ok=True)


class AttemptMarks:
    """This process's marks on the parts that this process has begun (see ``count_attempts``).

    At the end of the ``with`` block, the marks are removed. If the process dies in the block, the
    marks stay.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._marked_parts: set[Part] = set()

    def __enter__(self) -> AttemptMarks:
        return self

    def __exit__(self, *_: object) -> None:
        # If a mark cannot be removed, the part may be given up one try earlier. This error must not
        # hide the exception that ended the block.
        with suppress(StorageError):
            for part in tuple(self._marked_parts):
                self.remove(part)

    def add(self, part: Part) -> None:
        """Put a mark on a part, before the work on the part begins."""
        path = self._root / part.attempts_file
        with convert_os_errors(f"cannot write to {path.parent}"):
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as handle:
                handle.write(b"x")
        self._marked_parts.add(part)

    def remove(self, part: Part) -> None:
        """Remove all marks on a part, including the marks by dead processes."""
        path = self._root / part.attempts_file
        with convert_os_errors(f"cannot write to {path.parent}"):
            path.unlink(missing_ok=True)
        self._marked_parts.discard(part)


def given_up_content(
    run: Run, part: Part, dataset: ImageDataset, *, can_list_images: bool
) -> PartContent:
    """Return the content of a given-up part: error rows, and no embeddings.

    If ``can_list_images`` is True, the images are listed but not read. Every image gets an error
    row with the kind "crash" and the image key. If listing raises an exception, or if
    ``can_list_images`` is False because a process died while listing the images, the images are
    unknown. Then the keys in the error rows are made from positions or shard numbers.
    """
    if can_list_images:
        try:
            records = records_with_positions(run, part, dataset)
            positions_and_keys = [(position, record.key) for position, record in records]
            return _content_of_errors("crash", positions_and_keys)
        # Listing may raise any exception, because these files have killed workers, and the reader
        # may be a plugin. The other parts must still be done, so it is logged, and the error rows
        # below count as failed images or bad shards.
        except Exception as error:  # noqa: BLE001
            logger.warning(
                "part %d cannot be listed either: %s: %s", part.number, type(error).__name__, error
            )
    return _content_without_keys(run, part)


def _content_without_keys(run: Run, part: Part) -> PartContent:
    """Return the content of a given-up part with unknown images: error rows, and no embeddings.

    If parts are made of images, every position gets an error row with the kind "crash". If parts
    are made of shards, every shard gets a single error row with the kind "bad_shard", because the
    image count in the shard is unknown.
    """
    positions = possible_positions(run, part)
    if run.shards:
        # the first position of every shard in the part
        first_positions = positions[::POSITIONS_PER_SHARD]
        shards = [(start, f"shard {start // POSITIONS_PER_SHARD}") for start in first_positions]
        return _content_of_errors("bad_shard", shards)
    images = [(position, f"image {position}") for position in positions]
    return _content_of_errors("crash", images)


def _content_of_errors(kind: str, positions_and_keys: Sequence[tuple[int, str]]) -> PartContent:
    """Return the content of a part with an error row for each position, and no embeddings."""
    content = PartContent()
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
    """A model's name and options, with which each worker process loads the model once.

    The fields are parameters of ``load_backbone``.
    """

    name: str
    device: str = "auto"
    precision: str = "fp32"
    models: Path | None = None
    full_decode: bool = False

    def load(self) -> Backbone:
        """Return the model. Raise the same errors as ``load_backbone``."""
        return _load(self)


@cache
def _load(spec: BackboneSpec) -> Backbone:
    """Load the backbone for a spec."""
    return load_backbone(
        spec.name,
        device=spec.device,
        precision=spec.precision,
        models=spec.models,
        full_decode=spec.full_decode,
    )


@dataclass(frozen=True)
class EmbedJob:
    """All settings and inputs for embedding any part in a run.

    A job can be pickled if its data set and its model can be pickled.
    """

    root: Path  # the store's folder
    run: Run  # the run, with all inputs
    dataset: ImageDataset
    backbone: BackboneSpec | Backbone
    batch_size: int = 32  # images per forward pass
    workers: int | None = None  # number of decoding threads. None: one per core, at most 16.
    strict: bool = False  # whether the job stops at the first bad image
    limits: ImageLimits = DEFAULT_LIMITS  # size and shape limits for valid images

    @cached_property
    def ledger(self) -> StoreLedger:
        """The ledger, which reads and writes the parts in the store's folder."""
        return StoreLedger(self.root, self.run, self.dataset)

    def process(self, part: int) -> Receipt:
        """Embed and write a part unless the part is done. Return the receipt.

        ``part`` is the part number. A part's bytes depend only on the part's images, the model and
        the batch size. So any process may do the part, at any time, and more than once. If
        ``MAX_ATTEMPTS`` processes have died in a part, the part is given up, and the part's images
        become error rows.
        """
        (receipt,) = self.process_all([part])
        return receipt

    def process_all(self, parts: Sequence[int], progress: Task | None = None) -> Iterator[Receipt]:
        """Do the parts with these numbers in order, like ``process``, and yield the receipts.

        A part's first images are decoded while the previous part is still being embedded.
        """
        if progress is None:
            progress = SilentProgress()
        untried_parts: list[Part] = []  # parts without marks, to embed together in order
        for part_number in parts:
            part = self.ledger.parts[part_number]
            receipt_or_reason = self.ledger.receipt_or_reason(part)
            is_done = isinstance(receipt_or_reason, Receipt)
            n_deaths = 0 if is_done else count_attempts(self.root, part)
            if not is_done and n_deaths == 0:
                untried_parts.append(part)
                continue
            # to keep the order, the untried parts before this part are done first
            yield from self._embed(untried_parts, progress)
            untried_parts = []
            if isinstance(receipt_or_reason, Receipt):
                receipt = receipt_or_reason
            elif n_deaths < MAX_ATTEMPTS:
                # Embedded alone. So if this process dies, too, no other part has a mark.
                yield from self._embed([part], progress)
                continue
            else:
                receipt = self._give_up(part, n_deaths)
            progress.advance(receipt.n_in)
            yield receipt
        yield from self._embed(untried_parts, progress)

    def _embed(self, parts: Sequence[Part], progress: Task) -> Iterator[Receipt]:
        """Embed parts in order. Yield each part's receipt right after the part is written."""
        if not parts:
            return
        backbone = self._load_backbone()
        encoder = self._encoder(backbone, progress)
        decoder = self._decoder(backbone)
        n_threads = self.workers or default_workers()
        # part number -> fingerprint of the part's shards
        shard_fingerprints: dict[int, str] = {}
        with (
            AttemptMarks(self.root) as marks,
            map_in_threads(
                decoder,
                self._records_of_parts(parts, marks, shard_fingerprints),
                n_threads=n_threads,
                max_results_ahead=self.batch_size + n_threads,
            ) as images_or_errors,
        ):
            for part in parts:
                content = encoder.encode_part(images_or_errors)
                receipt = self.ledger.write_part(
                    part,
                    content,
                    batch_size=self.batch_size,
                    shard_fingerprint=shard_fingerprints[part.number],
                )
                # The mark is removed only after the part is written. In the opposite order, a part
                # whose writing kills every process would have no mark, and would be tried for ever.
                # If this process dies before the removal, the finished part keeps a mark. Such a
                # mark is ignored.
                marks.remove(part)
                self._log_part(part, receipt, content)
                self._log_animated(content)
                yield receipt

    def _encoder(self, backbone: Backbone, progress: Task) -> Encoder:
        """Return the encoder that runs a backbone over images."""
        return Encoder(
            backbone=backbone,
            batch_size=self.batch_size,
            strict=self.strict,
            task=progress,
            row_shapes=self.run.row_shapes,
            dtype=self.run.dtype,
        )

    def _decoder(self, backbone: Backbone) -> Decoder:
        """Return the decoder that prepares images for a backbone."""
        return Decoder(
            preprocess=backbone.preprocess,
            limits=self.limits,
            n_classes=len(self.run.names),
            views=self.run.views,
            captions=self.run.captions,
            jpeg_side=jpeg_side_of(backbone),
        )

    def check_precision(self, backbone: Backbone) -> None:
        """Compare the model's lower precision, if any, with float32 on the first photos.

        The result is written into the store's log.

        Raises:
            ProvenanceError: If embeddings or answers differ too much.
        """
        decoder_with_views = self._decoder(backbone)
        decoder = replace(decoder_with_views, views=None)  # only the whole photos are compared

        def first_pixels() -> Iterator[Tensor]:
            for part in self.ledger.parts[:1]:  # the first part, if there is any
                for position_and_record in records_with_positions(self.run, part, self.dataset):
                    image_or_error = decoder(position_and_record)
                    if isinstance(image_or_error, PreparedImage):
                        yield image_or_error.pixels

        precision_check = check_precision(backbone, self.run, first_pixels(), self.batch_size)
        if precision_check is not None:
            append_to_log(self.root, checked=asdict(precision_check))

    def _load_backbone(self) -> Backbone:
        """Return the model. Raise ProvenanceError if the run began with another model."""
        backbone = self.backbone
        if isinstance(backbone, BackboneSpec):
            backbone = backbone.load()
        self.run.space.require_match(
            backbone.space, name=str(self.root / RUN_FILE), other_name="the model of this process"
        )
        return backbone

    def _log_part(self, part: Part, receipt: Receipt, content: PartContent) -> None:
        """Write a finished part into the store's log and into the process's log."""
        seconds = round(time.monotonic() - content.begun_at, 3)
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

    def _log_animated(self, content: PartContent) -> None:
        """Log the number of animated images. Only an animated image's first frame is used."""
        n_animated = 0
        for metadata in content.metadata:
            if isinstance(metadata, ImageMetadata) and metadata.n_frames > 1:
                n_animated += 1
        if n_animated:
            logger.info("%s: the first frame is used", plural(n_animated, "animated image"))

    def _records_of_parts(
        self, parts: Sequence[Part], marks: AttemptMarks, shard_fingerprints: dict[int, str]
    ) -> Iterator[tuple[int, ImageRecord] | None]:
        """Yield the records in all parts with their positions, and ``END_OF_PART`` after each part.

        Before a part's records are read, the part gets a mark, and the fingerprint of the part's
        shards is put into ``shard_fingerprints``.
        """
        for part in parts:
            marks.add(part)
            # The fingerprint is computed before the shards are read. So ``write_part`` notices if a
            # shard changes during the reading.
            shard_fingerprints[part.number] = self.ledger.shard_fingerprint(part)
            yield from records_with_positions(self.run, part, self.dataset)
            yield END_OF_PART

    def _give_up(self, part: Part, n_deaths: int) -> Receipt:
        """Give up a part after ``n_deaths`` processes have died: write only error rows."""
        with AttemptMarks(self.root) as marks:
            # If listing the images also kills this process, this process's mark stays. Then the
            # next process sees more than MAX_ATTEMPTS marks, and does not list the images.
            marks.add(part)
            shard_fingerprint = self.ledger.shard_fingerprint(part)
            listing_killed_process = n_deaths > MAX_ATTEMPTS
            content = given_up_content(
                self.run, part, self.dataset, can_list_images=not listing_killed_process
            )
            receipt = self.ledger.write_part(
                part,
                content,
                batch_size=self.batch_size,
                shard_fingerprint=shard_fingerprint,
            )
            marks.remove(part)
        logger.warning(
            "part %d was given up after %d processes had died in it: its %d images are counted as "
            "errors. To try again, remove %s.",
            part.number,
            MAX_ATTEMPTS,
            receipt.n_error,
            self.root / part.receipt_file,
        )
        return receipt


class Executor(Protocol):
    """An object that decides where and when a job's parts are done.

    The job decides a part's content. ``EmbedJob.process`` is deterministic and idempotent, so an
    executor may do a part twice, even at the same time. If a worker dies, an executor only has to
    try the part again, because ``EmbedJob.process`` gives up a part after several deaths.
    """

    name: str

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipt for each part as soon as the part is done, in any order.

        ``parts`` are the part numbers. If several processes share the work, each process has its
        own executor, which does only this process's parts.
        """
