"""From records to rows: one decoder, which threads may share, and one encoder, which may not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from vilu.store.parts import MESSAGE_LENGTH, PICTURE_BYTES, ErrorRow, Part, PartRows, Row, positions

TEXT_TRUNCATED: Final = 1 << 16
"""Flag of a row whose caption is longer than the model reads; the flags below are ``ImageFlag``."""

DIRECTIONS = {IMAGE: "image", CAPTION: "caption", "views": "view"}
"""Arrays of which only the direction counts, with what messages call a row."""

# stands in the stream of records, and of what becomes of them, after the last one of each part
END: Final = None


@dataclass(frozen=True)
class Decoded:
    """An image ready for the model."""

    row: Row  # its metadata
    pixels: Tensor  # (3, H, W) float32
    bytes: int  # its encoded size
    views: tuple[Tensor, ...] = ()  # pixels of its views


@dataclass(frozen=True)
class Decoder:
    """Reads, decodes and preprocesses one image; a bad image is a result, not an exception."""

    preprocess: Callable[[Image.Image], Tensor]
    limits: ImageLimits
    n_classes: int
    views: Views | None = None
    captions: bool = False

    def __call__(self, item: tuple[int, ImageRecord] | None) -> Decoded | ErrorRow | None:
        """The outcome for the image at a position; of ``END`` itself.

        DataError if its label is no class.
        """
        return END if item is END else self._decode(*item)

    def _decode(self, position: int, record: ImageRecord) -> Decoded | ErrorRow:
        self._require_class(record)
        reading = _Reading(record)
        try:
            image = read_image(replace(record, read=reading.read), self.limits)
            caption = read_caption(record) if self.captions else None
        except BadImage as error:
            return ErrorRow(
                key=record.key,
                position=position,
                stage=error.stage,
                kind=error.kind,
                exception=type(error.__cause__ or error).__name__,
                message=str(error)[:MESSAGE_LENGTH],
                bytes=reading.size,
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
            picture=reading.picture,
        )
        pixels = self.preprocess(image.image)
        views: list[Tensor] = []
        if self.views is not None:
            views = [self.preprocess(view) for view in self.views.of(image.image, record.key)]
        return Decoded(row, pixels, reading.size or 0, tuple(views))

    def _require_class(self, record: ImageRecord) -> None:
        """Refuse a label that is no class; labels of images with captions are not looked at."""
        label = record.label
        if self.captions or label is None or label == OUTSIDE:
            return
        if label not in range(self.n_classes):
            raise DataError(
                f"{record.key} has label {label}, expected 0 to {self.n_classes - 1}, -2 or none."
            )


class _Reading:
    """The read of a record, with the size and the digest of what was read."""

    def __init__(self, record: ImageRecord) -> None:
        self._record = record
        self.size: int | None = None  # bytes; None until they are read
        self.picture = b""

    def read(self) -> bytes:
        """The bytes of the record."""
        data = self._record.read()
        self.size = len(data)
        content = data if self._record.content is None else self._record.content()
        self.picture = sha256(content).digest()[:PICTURE_BYTES]
        return data


def place_records(run: Run, part: Part, dataset: ImageDataset) -> Iterator[tuple[int, ImageRecord]]:
    """The records of a part with their positions; ValueError if the data set gives other ones."""
    possible = positions(run, part)
    records = dataset.records(part.start, part.stop)
    if not run.shards:
        yield from zip(possible, records, strict=True)
        return
    last = -1
    for record in records:
        position = record.position
        # ascending: the rows of a part are in the order of the images, whoever reads the shards
        if position is None or position not in possible or position <= last:
            raise ValueError(
                f"{dataset.source} gave {record.key} the position {position} after {last}; "
                f"expected larger ones from {possible.start} to {possible.stop - 1}."
            )
        last = position
        yield position, record


@dataclass
class Encoder:
    """Runs the model over decoded images and sets bad ones aside, or where ``strict`` raises.

    A batch never reaches over the end of a part and a bad image leaves its place empty, so that a
    part redone alone meets the same batches and gives the same bytes. What is too large for
    ``dtype`` becomes infinite.
    """

    backbone: Backbone
    batch_size: int
    strict: bool
    task: Task
    arrays: Mapping[str, tuple[int, ...]]
    dtype: str
    n_errors: int = 0

    def part(self, outcomes: Iterator[Decoded | ErrorRow | None]) -> PartRows:
        """Take the outcomes up to the next ``END``; DataError if ``strict`` and an image is bad."""
        content = PartRows()
        until_end: Iterator[Decoded | ErrorRow] = iter(outcomes.__next__, END)
        while True:
            # the batch has no name here: it is freed before the next one is gathered
            n_images = self._encode(list(islice(until_end, self.batch_size)), content)
            if n_images == 0:
                return content
            self.task.advance(n_images, f"{self.n_errors} errors")

    def _encode(self, batch: Sequence[Decoded | ErrorRow], content: PartRows) -> int:
        """Add what becomes of some images; their number."""
        bad = [outcome for outcome in batch if isinstance(outcome, ErrorRow)]
        good = [outcome for outcome in batch if isinstance(outcome, Decoded)]
        if good:
            bad += self._add_rows(good, content)
        bad.sort(key=attrgetter("position"))
        if bad and self.strict:
            first = bad[0]
            raise DataError(
                f"{first.key}: {first.kind} in stage {first.stage}: {first.message}. Mend the "
                "image, or let bad images be set aside and counted with --on-error skip."
            )
        content.errors += bad
        self.n_errors += len(bad)
        return len(batch)

    def _add_rows(self, images: Sequence[Decoded], content: PartRows) -> list[ErrorRow]:
        """Add the rows of decoded images; returned are those without a direction."""
        arrays, status = self._run_model(images)
        usable = torch.from_numpy(status == VALID)
        number_format = getattr(torch, self.dtype)
        for name, rows in arrays.items():
            blocks = content.arrays.setdefault(name, [])
            blocks.append(rows[usable].to(number_format))
        bad: list[ErrorRow] = []
        for row, image, code in zip(self._rows(images), images, status, strict=True):
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
            bad.append(error)
        return bad

    def _rows(self, batch: Sequence[Decoded]) -> list[Row]:
        """Metadata, with the captions flagged that the tokenizer cuts off."""
        rows = [image.row for image in batch]
        if CAPTION not in self.arrays:
            return rows
        cut = self.backbone.truncates([row.caption or "" for row in rows])
        flagged: list[Row] = []
        for row, is_cut in zip(rows, cut, strict=True):
            flags = row.flags | TEXT_TRUNCATED if is_cut else row.flags
            flagged.append(replace(row, flags=flags))
        return flagged

    def _run_model(self, batch: Sequence[Decoded]) -> tuple[dict[str, Tensor], NDArray[np.uint8]]:
        """Arrays of some images by name, and the worst status (``checks.STATUS``) of each image."""
        arrays = self._forward(batch)
        status = np.full(len(batch), VALID, dtype=np.uint8)
        for name, kind in DIRECTIONS.items():
            if name in arrays:
                arrays[name], worst = _unit(arrays[name], kind)
                status = np.maximum(status, worst)
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
        """(B, ...) outputs of the model by name, as it gives them."""
        model = self.backbone
        arrays: dict[str, Tensor] = {}
        pixels = _stacked([image.pixels for image in batch])
        if "features" in self.arrays:
            arrays[IMAGE], arrays["features"] = model.encode_images_and_features(pixels)
        else:
            arrays[IMAGE] = model.encode_images(pixels)
        if CAPTION in self.arrays:
            arrays[CAPTION] = model.encode_texts([image.row.caption or "" for image in batch])
        if "views" in self.arrays:
            # one view of every image at a time: no forward pass is larger than that of the images
            by_view = zip(*(image.views for image in batch), strict=True)
            rows = [model.encode_images(_stacked(views)) for views in by_view]
            arrays["views"] = torch.stack(rows, dim=1)
        return arrays


def _stacked(images: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """(B, 3, H, W) in the memory layout of the images (3, H, W).

    Where their channels come last in memory, they stay there: moving them takes time.
    """
    channels_last = [image.permute(1, 2, 0) for image in images]
    if channels_last[0].is_contiguous():
        return torch.stack(channels_last).permute(0, 3, 1, 2)
    return torch.stack(images)


def _unit(rows: Tensor, kind: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Rows (B, D), or (B, V, D) of views, of unit norm, and the worst status of each image."""
    flat, status = unit_rows(rows.flatten(0, -2), kind)
    worst = status.reshape(len(rows), -1).max(axis=1)
    return flat.view(rows.shape), worst
