"""From records to rows: one decoder, which threads may share, and one encoder, which may not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vilu.backbones.base import Backbone
from vilu.datasets.base import ImageDataset, ImageRecord
from vilu.datasets.images import BadImage, ImageLimits, read_caption, read_image
from vilu.device import keep_freed_memory
from vilu.embeddings.checks import NONFINITE, STATUS, VALID, unit_rows
from vilu.errors import OUTSIDE, DataError, ProvenanceError
from vilu.progress import Task
from vilu.store.documents import CAPTION, IMAGE, Run, Views
from vilu.store.parts import MESSAGE_LENGTH, PICTURE_BYTES, ErrorRow, Part, PartRows, Row, positions

TEXT_TRUNCATED: Final = 1 << 16
"""Flag of a row whose caption is longer than the model reads; the flags below are ``ImageFlag``."""

# stands in the stream of records, and of what becomes of them, after the last one of each part
END: Final = None


@dataclass(frozen=True)
class Decoded:
    """An image ready for the model: its metadata, (3, H, W) float32 pixels, encoded size, and pixels of its views."""

    row: Row
    pixels: Tensor
    bytes: int
    views: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """Reads, decodes and preprocesses one image; what is wrong with an image is a result, not an exception."""

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
        label, known = record.label, range(self.n_classes)
        if not self.captions and label is not None and label not in known and label != OUTSIDE:
            raise DataError(
                f"{record.key} has label {label}, expected 0 to {self.n_classes - 1}, -2 or none."
            )
        sizes: list[int] = []
        pictures: list[bytes] = []

        def read() -> bytes:
            data = record.read()
            sizes.append(len(data))
            content = data if record.content is None else record.content()
            pictures.append(sha256(content).digest()[:PICTURE_BYTES])
            return data

        try:
            image = read_image(replace(record, read=read), self.limits)
            caption = read_caption(record) if self.captions else None
        except BadImage as error:
            cause, size = type(error.__cause__ or error).__name__, sizes[0] if sizes else None
            return ErrorRow(
                record.key,
                position,
                error.stage,
                error.kind,
                cause,
                str(error)[:MESSAGE_LENGTH],
                size,
            )
        facts = image.width, image.height, image.n_frames, image.exif_orientation, int(image.flags)
        row = Row(position, record.key, record.label, *facts, caption, pictures[0])
        views = [] if self.views is None else self.views.of(image.image, record.key)
        pixels, *others = map(self.preprocess, [image.image, *views])
        return Decoded(row, pixels, sizes[0], tuple(others))


def place_records(run: Run, part: Part, dataset: ImageDataset) -> Iterator[tuple[int, ImageRecord]]:
    """The records of a part with their positions; ValueError if there are others than the data set says."""
    places = positions(run, part)
    records = dataset.records(part.start, part.stop)
    if not run.shards:
        yield from zip(places, records, strict=True)
        return
    last = -1
    for record in records:
        if record.position is None or record.position not in places or record.position <= last:
            raise ValueError(
                f"{dataset.source} gave {record.key} the position {record.position} after {last}; expected larger ones "
                f"from {places.start} to {places.stop - 1}."
            )
        last = record.position
        yield last, record


@dataclass
class Encoder:
    """Runs the model over decoded images, and keeps the bad ones apart, or raises on the first where it is ``strict``.

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
        part: Iterator[Decoded | ErrorRow] = iter(outcomes.__next__, None)  # which is END
        # the batch has no name here: it is freed before the next one is gathered
        while n := self._encode(list(islice(part, self.batch_size)), content):
            self.task.advance(n, f"{self.n_errors} errors")
        return content

    def _encode(self, batch: Sequence[Decoded | ErrorRow], content: PartRows) -> int:
        """Add what becomes of some images; their number."""
        bad = [outcome for outcome in batch if isinstance(outcome, ErrorRow)]
        if good := [outcome for outcome in batch if isinstance(outcome, Decoded)]:
            arrays, status = self._run_model(good)
            usable, number_format = torch.from_numpy(status == VALID), getattr(torch, self.dtype)
            for name, rows in arrays.items():
                content.arrays.setdefault(name, []).append(rows[usable].to(number_format))
            for row, image, code in zip(self._rows(good), good, status, strict=True):
                if code == VALID:
                    content.rows.append(row)
                else:
                    told = "the model gave an embedding that has no direction"
                    bad.append(
                        ErrorRow(
                            row.key, row.position, "encode", STATUS[code], None, told, image.bytes
                        )
                    )
        if bad and self.strict:
            first = min(bad, key=lambda error: error.position)
            raise DataError(
                f"{first.key}: {first.kind} in stage {first.stage}: {first.message}. Mend the image, or let bad images "
                "be set aside and counted with --on-error skip."
            )
        content.errors += sorted(bad, key=lambda error: error.position)
        self.n_errors += len(bad)
        return len(batch)

    def _rows(self, batch: Sequence[Decoded]) -> list[Row]:
        """Metadata, with the captions flagged that the tokenizer cuts off."""
        rows = [image.row for image in batch]
        if CAPTION not in self.arrays:
            return rows
        cut = self.backbone.truncates([row.caption or "" for row in rows])
        return [
            replace(row, flags=row.flags | TEXT_TRUNCATED * long)
            for row, long in zip(rows, cut, strict=True)
        ]

    def _run_model(self, batch: Sequence[Decoded]) -> tuple[dict[str, Tensor], NDArray[np.uint8]]:
        """What to keep of some images, by name, and the worst status (``checks.STATUS``) of each."""
        arrays = self._forward(batch)
        status = np.full(len(batch), VALID, dtype=np.uint8)
        for name, kind in ((IMAGE, "image"), (CAPTION, "caption"), ("views", "view")):
            if name in arrays:
                arrays[name], worst = _unit(arrays[name], kind)
                status = np.maximum(status, worst)
        for name, shape in self.arrays.items():
            rows = arrays[name]
            if rows.shape != (len(batch), *shape):
                raise ProvenanceError(
                    f"the backbone gave {name} of shape {tuple(rows.shape)} for {len(batch)} images, where it says "
                    f"width {shape[-1]}."
                )
            status[~torch.isfinite(rows).flatten(1).all(dim=1).numpy()] = NONFINITE
        return arrays, status

    def _forward(self, batch: Sequence[Decoded]) -> dict[str, Tensor]:
        """(B, ...) outputs of the model by name, as it gives them."""
        keep_freed_memory()  # this may be a process of its own
        model, arrays = self.backbone, dict[str, Tensor]()
        pixels = _stacked([image.pixels for image in batch])
        if "features" in self.arrays:
            arrays[IMAGE], arrays["features"] = model.encode_images_and_features(pixels)
        else:
            arrays[IMAGE] = model.encode_images(pixels)
        if CAPTION in self.arrays:
            arrays[CAPTION] = model.encode_texts([image.row.caption or "" for image in batch])
        if (
            "views" in self.arrays
        ):  # one of every image at a time: no forward pass is larger than that of the images
            views = zip(*(image.views for image in batch), strict=True)
            arrays["views"] = torch.stack(
                [model.encode_images(_stacked(view)) for view in views], dim=1
            )
        return arrays


def _stacked(images: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """(B, 3, H, W) in the memory layout of the images (3, H, W): channels may come last, and need not be moved."""
    last = [image.permute(1, 2, 0) for image in images]
    return torch.stack(last).permute(0, 3, 1, 2) if last[0].is_contiguous() else torch.stack(images)


def _unit(rows: Tensor, kind: str) -> tuple[Tensor, NDArray[np.uint8]]:
    """Rows (B, D), or (B, V, D) of several views, of unit norm, and the worst status of each image."""
    each, status = unit_rows(rows.flatten(0, -2), kind)
    return each.view(rows.shape), status.reshape(len(rows), -1).max(axis=1)
