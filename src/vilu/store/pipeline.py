"""Turn image records into rows: ``Decoder`` is called in many threads, ``Encoder`` in one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from operator import attrgetter
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vilu.backbones.base import Backbone
from vilu.datasets.base import ImageDataset, ImageRecord
from vilu.datasets.images import BadImage, ImageLimits, read_caption, read_image
from vilu.embeddings.checks import NONFINITE, STATUS, VALID, unit_rows
from vilu.errors import OUTSIDE, DataError, ProvenanceError
from vilu.progress import Task
from vilu.store.manifest import CAPTION, IMAGE, Run, Views
from vilu.store.parts import (
    MESSAGE_LENGTH,
    PICTURE_BYTES,
    ErrorRow,
    Part,
    PartRows,
    Row,
    possible_positions,
)

TEXT_TRUNCATED: Final = 1 << 16
"""Flag of a row whose caption is longer than the longest text that the model reads.

Smaller flags are those of ``ImageFlag``.
"""

ROW_WORDS = {IMAGE: "image", CAPTION: "caption", "views": "view"}
"""Names of the arrays whose rows are normalised. For each, the word for a row in messages."""

# Marks the end of a part, both among the records that go into the decoder and among the outcomes
# that come out of it.
END: Final = None


MAX_WAIT_SHARE: Final = 0.1
"""If the model waits for photos for a larger share of the time, the messages say so."""


@dataclass(frozen=True)
class Decoded:
    """An image ready for the model."""

    row: Row  # metadata
    pixels: Tensor  # (3, H, W) float32
    bytes: int  # encoded size of the image
    views: tuple[Tensor, ...] = ()  # pixels of the views, (3, H, W) float32 each


@dataclass(frozen=True)
class Decoder:
    """A function that reads, decodes and preprocesses one image.

    The outcome is a ``Decoded``, or an error row if the image is bad.
    """

    preprocess: Callable[[Image.Image], Tensor]  # returns (3, H, W) float32 pixels
    limits: ImageLimits
    n_classes: int
    views: Views | None = None  # augmented views to make of each image, if any
    captions: bool = False  # whether to read captions
    # least shorter side at which JPEGs may be decoded; None to decode them in full
    jpeg_side: int | None = None

    def __call__(self, item: tuple[int, ImageRecord] | None) -> Decoded | ErrorRow | None:
        """Return the outcome for a position and its record, and ``END`` for ``END``.

        Raises:
            DataError: If the label of the image is not a class.
        """
        if item is END:
            return END
        position, record = item
        return self._decode(position, record)

    def _decode(self, position: int, record: ImageRecord) -> Decoded | ErrorRow:
        """Read and preprocess an image; an image that cannot be read gives an error row."""
        self._require_class(record)
        reader = _RecordReader(record)
        try:
            remembering_record = replace(record, read=reader.read)
            image = read_image(remembering_record, self.limits, jpeg_side=self.jpeg_side)
            caption = read_caption(record) if self.captions else None
        except BadImage as error:
            cause = error.__cause__ or error
            return ErrorRow(
                key=record.key,
                position=position,
                stage=error.stage,
                kind=error.kind,
                exception=type(cause).__name__,
                message=str(error)[:MESSAGE_LENGTH],
                bytes=reader.size,
            )
        row = Row(
            position=position,
            key=record.key,
            label=record.label,
            width=image.width,
            height=image.height,
            n_frames=image.n_frames,
            exif_orientation=image.exif_orientation,
            flags=int(image.flags),
            caption=caption,
            picture=reader.picture,
        )
        pixels = self.preprocess(image.image)
        views: list[Tensor] = []
        if self.views is not None:
            for view in self.views.make_views(image.image, record.key):
                views.append(self.preprocess(view))
        return Decoded(row, pixels, reader.size or 0, tuple(views))

    def _require_class(self, record: ImageRecord) -> None:
        """Raise DataError if the label is not a class; labels are ignored if there are captions."""
        label = record.label
        has_class = label is not None and label != OUTSIDE
        if self.captions or not has_class:
            return
        if label not in range(self.n_classes):
            raise DataError(
                f"{record.key} has label {label}, expected 0 to {self.n_classes - 1}, -2 or none."
            )


class _RecordReader:
    """A reader of one record that remembers the size and the digest of what it has read."""

    def __init__(self, record: ImageRecord) -> None:
        self._record = record
        self.size: int | None = None  # number of bytes; None before ``read``
        self.picture = b""  # digest of the picture (``PICTURE_FIELD``); empty before ``read``

    def read(self) -> bytes:
        """Return the bytes of the record."""
        data = self._record.read()
        self.size = len(data)
        content = data if self._record.content is None else self._record.content()
        self.picture = sha256(content).digest()[:PICTURE_BYTES]
        return data


def records_with_positions(
    run: Run, part: Part, dataset: ImageDataset
) -> Iterator[tuple[int, ImageRecord]]:
    """Yield the records of a part with their positions.

    Raises:
        ValueError: If the data set returns too many or too few records, or wrong positions.
    """
    expected = possible_positions(run, part)
    records = dataset.records(part.start, part.stop)
    if not run.shards:
        yield from zip(expected, records, strict=True)
        return
    last_position = -1
    for record in records:
        position = record.position
        # positions must ascend, because the rows of a part are in the order of the images
        if position is None or position not in expected or position <= last_position:
            raise ValueError(
                f"{dataset.source} gave {record.key} the position {position} after "
                f"{last_position}; expected larger ones from {expected.start} to "
                f"{expected.stop - 1}."
            )
        last_position = position
        yield position, record


@dataclass
class Encoder:
    """Runs the model over batches of decoded images, which is the last step to the rows.

    A batch never contains images of two parts, and a bad image is not replaced by another one. So
    a part that is done again has the same batches, and gives the same bytes. Numbers too large for
    ``dtype`` become infinite.
    """

    backbone: Backbone
    batch_size: int
    strict: bool  # whether the first bad image raises DataError; if not, it becomes an error row
    task: Task  # progress bar of the images
    arrays: Mapping[str, tuple[int, ...]]  # shape of one row of each array of the images, by name
    dtype: str  # number format of the arrays
    n_errors: int = 0  # number of bad images so far
    begun: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds that the model has waited for decoded images

    def part(self, outcomes: Iterator[Decoded | ErrorRow | None]) -> PartRows:
        """Encode the outcomes up to the next ``END``; if ``strict``, DataError for a bad image."""
        content = PartRows()
        # iter(function, END) calls the function until it returns END
        until_end: Iterator[Decoded | ErrorRow] = iter(partial(self._next, outcomes), END)
        while True:
            # The batch is in no variable. So its memory is freed before the next batch is read.
            n_images = self._encode(list(islice(until_end, self.batch_size)), content)
            if n_images == 0:
                return content
            self.task.advance(n_images, f"{self.n_errors} errors, {self._waiting_text()}")

    def _next(self, outcomes: Iterator[Decoded | ErrorRow | None]) -> Decoded | ErrorRow | None:
        """Return the next outcome, and note how long the model waited for it."""
        begun_waiting = time.monotonic()
        outcome = next(outcomes)
        self.waited += time.monotonic() - begun_waiting
        return outcome

    def _waiting_text(self) -> str:
        """Say which waits for the other: decoding for the model, or the model for decoding."""
        share = self.waited / max(time.monotonic() - self.begun, 1e-9)
        if share > MAX_WAIT_SHARE:
            return f"the model waits for photos {share:.0%} of the time"
        return "decoding waits for the model"

    def _encode(self, batch: Sequence[Decoded | ErrorRow], content: PartRows) -> int:
        """Add the rows and errors of a batch to ``content``; return the size of the batch."""
        errors = [outcome for outcome in batch if isinstance(outcome, ErrorRow)]
        images = [outcome for outcome in batch if isinstance(outcome, Decoded)]
        if images:
            errors += self._add_rows(images, content)
        errors.sort(key=attrgetter("position"))
        if errors and self.strict:
            first = errors[0]
            raise DataError(
                f"{first.key}: {first.kind} in stage {first.stage}: {first.message}. Mend the "
                "image, or let bad images be set aside and counted with on_error='skip'."
            )
        content.errors += errors
        self.n_errors += len(errors)
        return len(batch)

    def _add_rows(self, images: Sequence[Decoded], content: PartRows) -> list[ErrorRow]:
        """Add the rows of decoded images; return errors for embeddings that cannot be used."""
        arrays, status = self._run_model(images)
        is_usable = torch.from_numpy(status == VALID)
        number_format = getattr(torch, self.dtype)
        for name, rows in arrays.items():
            blocks = content.arrays.setdefault(name, [])  # no blocks yet in the first batch
            blocks.append(rows[is_usable].to(number_format))
        errors: list[ErrorRow] = []
        for row, image, code in zip(self._metadata(images), images, status, strict=True):
            if code == VALID:
                content.rows.append(row)
                continue
            error = ErrorRow(
                key=row.key,
                position=row.position,
                stage="encode",
                kind=STATUS[code],
                exception=None,
                message="the model gave an embedding that has no direction",
                bytes=image.bytes,
            )
            errors.append(error)
        return errors

    def _metadata(self, batch: Sequence[Decoded]) -> list[Row]:
        """Return the metadata of images. Captions that the tokenizer shortens get a flag."""
        rows = [image.row for image in batch]
        if CAPTION not in self.arrays:
            return rows
        are_truncated = self.backbone.truncates([row.caption or "" for row in rows])
        flagged: list[Row] = []
        for row, is_truncated in zip(rows, are_truncated, strict=True):
            flags = row.flags
            if is_truncated:
                flags |= TEXT_TRUNCATED
            flagged.append(replace(row, flags=flags))
        return flagged

    def _run_model(self, batch: Sequence[Decoded]) -> tuple[dict[str, Tensor], NDArray[np.uint8]]:
        """Return arrays of images by name, and the worst status of each image (``STATUS``)."""
        arrays = self._forward(batch)
        status = np.full(len(batch), VALID, dtype=np.uint8)
        for name, row_name in ROW_WORDS.items():
            if name in arrays:
                arrays[name], status_in_array = _normalise(arrays[name], row_name)
                status = np.maximum(status, status_in_array)
        for name, shape in self.arrays.items():
            rows = arrays[name]
            if rows.shape != (len(batch), *shape):
                raise ProvenanceError(
                    f"the backbone gave {name} of shape {tuple(rows.shape)} for {len(batch)} "
                    f"images, where it says width {shape[-1]}."
                )
            is_finite = torch.isfinite(rows).flatten(1).all(dim=1).numpy()
            status[~is_finite] = NONFINITE
        return arrays, status

    def _forward(self, batch: Sequence[Decoded]) -> dict[str, Tensor]:
        """Return the (B, ...) outputs of the model by name, not normalised."""
        model = self.backbone
        arrays: dict[str, Tensor] = {}
        pixels = _stack_images([image.pixels for image in batch])
        if "features" in self.arrays:
            arrays[IMAGE], arrays["features"] = model.encode_images_and_features(pixels)
        else:
            arrays[IMAGE] = model.encode_images(pixels)
        if CAPTION in self.arrays:
            arrays[CAPTION] = model.encode_texts([image.row.caption or "" for image in batch])
        if "views" in self.arrays:
            # Each forward pass has one view of every image, so it is no larger than a batch.
            view_rows: list[Tensor] = []
            for number in range(len(batch[0].views)):
                views = [image.views[number] for image in batch]
                view_rows.append(model.encode_images(_stack_images(views)))
            arrays["views"] = torch.stack(view_rows, dim=1)
        return arrays


def _stack_images(images: list[Tensor]) -> Tensor:
    """Stack B images (3, H, W) to (B, 3, H, W), in the memory layout of the images.

    If the channels are last in the memory of the images, they are last in the memory of the stack,
    too, because moving them takes time.
    """
    channels_last = [image.permute(1, 2, 0) for image in images]
    if channels_last[0].is_contiguous():
        return torch.stack(channels_last).permute(0, 3, 1, 2)
    return torch.stack(images)


def _normalise(rows: Tensor, row_name: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Normalise rows (B, D), or views (B, V, D); also return the worst status of each image.

    ``row_name`` is the word for a row in messages.
    """
    flat_rows = rows.flatten(0, -2)  # (B, D) or (B * V, D)
    normalised, status = unit_rows(flat_rows, row_name)
    status_of_views = status.reshape(len(rows), -1)  # (B, 1) or (B, V)
    return normalised.view(rows.shape), status_of_views.max(axis=1)
