"""Make rows from image records: ``Decoder`` in many threads, ``Encoder`` in one."""

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
from vilu.embeddings.checks import NONFINITE, STATUS_NAMES, VALID, unit_rows
from vilu.errors import OUTSIDE, DataError, ProvenanceError
from vilu.progress import Task
from vilu.store.manifest import CAPTION, IMAGE, Run, Views
from vilu.store.parts import (
    MAX_MESSAGE_LENGTH,
    PICTURE_DIGEST_BYTES,
    ErrorRow,
    ImageMetadata,
    Part,
    PartContent,
    possible_positions,
)

TEXT_TRUNCATED: Final = 1 << 16
"""Flag for a row with a caption too long for the model. The tokenizer cuts such a caption.

Smaller flags are defined in ``ImageFlag``.
"""

ROW_WORDS = {IMAGE: "image", CAPTION: "caption", "views": "view"}
"""Maps each array with normalised rows to the word for a row in messages."""

# marks the end of a part, among the records for the decoder and among the decoder's results
END_OF_PART: Final = None

MAX_WAIT_SHARE: Final = 0.1
"""If the model waits for photos for more than this share of the time, the progress text says so."""


@dataclass(frozen=True)
class PreparedImage:
    """A decoded and preprocessed image, ready for the model."""

    metadata: ImageMetadata
    pixels: Tensor  # (3, H, W) float32
    n_bytes: int  # the image's encoded size
    views: tuple[Tensor, ...] = ()  # each view's pixels (3, H, W) float32


ImageOrError = PreparedImage | ErrorRow
"""Result from ``Decoder``: an image for the model, or a bad image's error row."""


@dataclass(frozen=True)
class Decoder:
    """Reads, decodes and preprocesses an image when called.

    The result is a ``PreparedImage``, or an error row if the image is bad.
    """

    preprocess: Callable[[Image.Image], Tensor]  # returns (3, H, W) float32 pixels
    limits: ImageLimits  # size and shape limits for valid images
    n_classes: int  # number of classes, to check labels
    views: Views | None = None  # augmented views for each image, if any
    captions: bool = False  # whether to read captions
    # JPEGs are decoded at a reduced size, but with at least this number of pixels on the shorter
    # side. None: JPEGs are decoded in full.
    jpeg_side: int | None = None

    def __call__(self, position_and_record: tuple[int, ImageRecord] | None) -> ImageOrError | None:
        """Return the image or the error for a position and a record.

        For ``END_OF_PART``, return ``END_OF_PART``.

        Raises:
            DataError: If the image's label is not a class.
        """
        if position_and_record is END_OF_PART:
            return END_OF_PART
        position, record = position_and_record
        return self._decode(position, record)

    def _decode(self, position: int, record: ImageRecord) -> ImageOrError:
        """Read and preprocess an image. Return an error row if the image cannot be read."""
        self._require_class(record)
        reader = _RecordReader(record)
        try:
            record_with_reader = replace(record, read=reader.read)
            image = read_image(record_with_reader, self.limits, jpeg_side=self.jpeg_side)
            caption = read_caption(record) if self.captions else None
        except BadImage as error:
            cause = error.__cause__ or error  # the original exception, if there is one
            return ErrorRow(
                key=record.key,
                position=position,
                stage=error.stage,
                kind=error.kind,
                exception=type(cause).__name__,
                message=str(error)[:MAX_MESSAGE_LENGTH],
                bytes=reader.n_bytes,
            )
        metadata = ImageMetadata(
            position=position,
            key=record.key,
            label=record.label,
            width=image.width,
            height=image.height,
            n_frames=image.n_frames,
            exif_orientation=image.exif_orientation,
            flags=int(image.flags),
            caption=caption,
            picture=reader.picture_digest,
        )
        pixels = self.preprocess(image.image)
        views: list[Tensor] = []
        if self.views is not None:
            for view in self.views.make_views(image.image, record.key):
                views.append(self.preprocess(view))
        return PreparedImage(metadata, pixels, reader.n_bytes or 0, tuple(views))

    def _require_class(self, record: ImageRecord) -> None:
        """Raise DataError if the label is no class. If there are captions, labels are ignored."""
        label = record.label
        has_class = label is not None and label != OUTSIDE
        if self.captions or not has_class:
            return
        if label not in range(self.n_classes):
            raise DataError(
                f"{record.key} has label {label}, expected 0 to {self.n_classes - 1}, -2 or none."
            )


class _RecordReader:
    """Reads a single record, and keeps the number of bytes and the picture's digest."""

    def __init__(self, record: ImageRecord) -> None:
        self._record = record
        self.n_bytes: int | None = None  # number of bytes, None before ``read``
        self.picture_digest = b""  # as in ``PICTURE_FIELD``, empty before ``read``

    def read(self) -> bytes:
        """Return the record's bytes."""
        data = self._record.read()
        self.n_bytes = len(data)
        # some records have other bytes that identify the picture
        hashed_content = data if self._record.content is None else self._record.content()
        self.picture_digest = sha256(hashed_content).digest()[:PICTURE_DIGEST_BYTES]
        return data


def records_with_positions(
    run: Run, part: Part, dataset: ImageDataset
) -> Iterator[tuple[int, ImageRecord]]:
    """Yield the records in a part with their positions.

    Raises:
        ValueError: If the data set returns too many or too few records, or wrong positions.
    """
    position_range = possible_positions(run, part)
    records = dataset.records(part.start, part.stop)
    if not run.shards:
        yield from zip(position_range, records, strict=True)
        return
    last_position = -1
    for record in records:
        position = record.position
        # positions must ascend, because a part's rows are in the order of the images
        if position is None or position not in position_range or position <= last_position:
            raise ValueError(
                f"{dataset.source} gave {record.key} the position {position} after "
                f"{last_position}; expected larger ones from {position_range.start} to "
                f"{position_range.stop - 1}."
            )
        last_position = position
        yield position, record


@dataclass
class Encoder:
    """Makes rows: runs the model over batches of decoded images.

    A batch never has images from two parts, and a bad image's place in the batch stays empty. So a
    repeated part has the same batches as before, and gives the same bytes. Numbers too large for
    ``dtype`` become infinite.
    """

    backbone: Backbone  # the model
    batch_size: int  # images per forward pass
    strict: bool  # whether a bad image raises DataError. If not, it becomes an error row.
    task: Task  # progress bar for the images
    row_shapes: Mapping[str, tuple[int, ...]]  # name of each image array -> row shape
    dtype: str  # number format of the arrays
    n_errors: int = 0  # number of bad images so far
    # when the encoder was made, in seconds on the monotonic clock
    begun_at: float = field(default_factory=time.monotonic)
    seconds_waited: float = 0.0  # seconds spent waiting for decoded images

    def encode_part(self, images_or_errors: Iterator[ImageOrError | None]) -> PartContent:
        """Encode a part's images: the items up to the next ``END_OF_PART``.

        Raises:
            DataError: If ``strict`` is true and an image is bad.
        """
        content = PartContent()
        next_image_or_error = partial(self._next_image_or_error, images_or_errors)
        # iter(function, END_OF_PART) calls the function until it returns END_OF_PART
        images_or_errors_of_part: Iterator[ImageOrError] = iter(next_image_or_error, END_OF_PART)
        while True:
            # no variable holds the batch, so its memory is free before the next batch is read
            n_images = self._encode_batch(
                list(islice(images_or_errors_of_part, self.batch_size)), content
            )
            if n_images == 0:
                return content
            waiting_text = self._waiting_text()
            self.task.advance(n_images, f"{self.n_errors} errors, {waiting_text}")

    def _next_image_or_error(
        self, images_or_errors: Iterator[ImageOrError | None]
    ) -> ImageOrError | None:
        """Return the next image or error, and add the waiting time to ``seconds_waited``."""
        wait_begun_at = time.monotonic()
        image_or_error = next(images_or_errors)
        self.seconds_waited += time.monotonic() - wait_begun_at
        return image_or_error

    def _waiting_text(self) -> str:
        """Return a text that says what waits: decoding for the model, or the model for photos."""
        seconds = max(time.monotonic() - self.begun_at, 1e-9)  # never 0, to divide by
        share = self.seconds_waited / seconds
        if share > MAX_WAIT_SHARE:
            return f"the model waits for photos {share:.0%} of the time"
        return "decoding waits for the model"

    def _encode_batch(self, batch: Sequence[ImageOrError], content: PartContent) -> int:
        """Add a batch's rows and errors to ``content``, and return the batch size."""
        errors = [item for item in batch if isinstance(item, ErrorRow)]
        images = [item for item in batch if isinstance(item, PreparedImage)]
        if images:
            errors += self._add_rows(images, content)
        errors.sort(key=attrgetter("position"))
        if errors and self.strict:
            first_error = errors[0]
            raise DataError(
                f"{first_error.key}: {first_error.kind} in stage {first_error.stage}: "
                f"{first_error.message}. Mend the image, or let bad images be set aside and "
                "counted with on_error='skip'."
            )
        content.errors += errors
        self.n_errors += len(errors)
        return len(batch)

    def _add_rows(self, images: Sequence[PreparedImage], content: PartContent) -> list[ErrorRow]:
        """Add the images' rows to ``content``. Return errors for unusable embeddings."""
        arrays, status = self._run_model(images)
        is_usable = torch.from_numpy(status == VALID)
        number_format = getattr(torch, self.dtype)
        for name, rows in arrays.items():
            blocks = content.array_blocks.setdefault(name, [])  # a new list in the first batch
            blocks.append(rows[is_usable].to(number_format))
        errors: list[ErrorRow] = []
        facts_of_images = zip(self._metadata(images), images, status, strict=True)
        for metadata, image, status_code in facts_of_images:
            if status_code == VALID:
                content.metadata.append(metadata)
                continue
            error = ErrorRow(
                key=metadata.key,
                position=metadata.position,
                stage="encode",
                kind=STATUS_NAMES[status_code],
                exception=None,
                message="the model gave an embedding that has no direction",
                bytes=image.n_bytes,
            )
            errors.append(error)
        return errors

    def _metadata(self, batch: Sequence[PreparedImage]) -> list[ImageMetadata]:
        """Return the images' metadata. A truncated caption sets a flag in the row."""
        metadata_of_batch = [image.metadata for image in batch]
        if CAPTION not in self.row_shapes:
            return metadata_of_batch
        captions = [metadata.caption or "" for metadata in metadata_of_batch]
        are_truncated = self.backbone.truncates(captions)
        flagged_metadata: list[ImageMetadata] = []
        for metadata, is_truncated in zip(metadata_of_batch, are_truncated, strict=True):
            flags = metadata.flags
            if is_truncated:
                flags |= TEXT_TRUNCATED
            flagged_metadata.append(replace(metadata, flags=flags))
        return flagged_metadata

    def _run_model(
        self, batch: Sequence[PreparedImage]
    ) -> tuple[dict[str, Tensor], NDArray[np.uint8]]:
        """Run the model. Return arrays by name, and each image's worst status code (B,).

        The worst status code is the highest.
        """
        arrays = self._forward(batch)
        status = np.full(len(batch), VALID, dtype=np.uint8)
        for name, row_word in ROW_WORDS.items():
            if name in arrays:
                arrays[name], status_in_array = _normalise(arrays[name], row_word)
                status = np.maximum(status, status_in_array)
        for name, shape in self.row_shapes.items():
            rows = arrays[name]
            if rows.shape != (len(batch), *shape):
                raise ProvenanceError(
                    f"the backbone gave {name} of shape {tuple(rows.shape)} for {len(batch)} "
                    f"images, where it says width {shape[-1]}."
                )
            flat_rows = rows.flatten(1)  # (B, D) or (B, V * D)
            is_finite = torch.isfinite(flat_rows).all(dim=1)
            status[~is_finite.numpy()] = NONFINITE
        return arrays, status

    def _forward(self, batch: Sequence[PreparedImage]) -> dict[str, Tensor]:
        """Map each array name to the model's outputs (B, ...), not normalised."""
        model = self.backbone
        arrays: dict[str, Tensor] = {}
        pixels = _stack_images([image.pixels for image in batch])
        if "features" in self.row_shapes:
            arrays[IMAGE], arrays["features"] = model.encode_images_and_features(pixels)
        else:
            arrays[IMAGE] = model.encode_images(pixels)
        if CAPTION in self.row_shapes:
            arrays[CAPTION] = model.encode_texts([image.metadata.caption or "" for image in batch])
        if "views" in self.row_shapes:
            # one view from every image at a time, so that no forward pass is larger than a batch
            view_rows: list[Tensor] = []
            for view_number in range(len(batch[0].views)):
                views = [image.views[view_number] for image in batch]
                rows = model.encode_images(_stack_images(views))
                view_rows.append(rows)
            arrays["views"] = torch.stack(view_rows, dim=1)
        return arrays


def _stack_images(images: list[Tensor]) -> Tensor:
    """Stack B images (3, H, W) to (B, 3, H, W), in the images' memory layout.

    If the images have the channels last in memory, so has the stack, because moving the channels
    would take time.
    """
    channels_last = [image.permute(1, 2, 0) for image in images]
    if channels_last[0].is_contiguous():  # the images have the channels last in memory
        return torch.stack(channels_last).permute(0, 3, 1, 2)
    return torch.stack(images)


def _normalise(rows: Tensor, row_word: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Normalise rows (B, D) or views (B, V, D). Also return each image's worst status code.

    ``row_word`` is the word for a row in messages.
    """
    flat_rows = rows.flatten(0, -2)  # (B, D) or (B * V, D)
    normalised_rows, status = unit_rows(flat_rows, row_word)
    status_of_views = status.reshape(len(rows), -1)  # (B, 1) or (B, V)
    return normalised_rows.view(rows.shape), status_of_views.max(axis=1)
