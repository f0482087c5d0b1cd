"""From records to rows: decoding in threads, ahead of the forward pass, in order, and never far ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor

from vilu.backbones.base import Backbone
from vilu.datasets.base import Record
from vilu.datasets.images import BadImage, ImageLimits, read_image
from vilu.errors import DataError, ProvenanceError
from vilu.progress import Task
from vilu.store.manifest import IMAGE
from vilu.store.views import Views
from vilu.store.writer import MESSAGE_LENGTH, ErrorRow, PartRows, Row
from vilu.validate import NONFINITE, STATUS, VALID, unit_rows

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Decoded:
    """An image ready for the model.

    Attributes:
        row: Its metadata.
        pixels: (3, H, W) float32.
        bytes: Its encoded size.
        views: Pixels of its augmented views.
    """

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

    def __call__(self, item: tuple[int, Record]) -> Decoded | ErrorRow:
        """The outcome for the image at a position.

        Raises:
            DataError: If its label is not one of the classes.
        """
        position, record = item
        if record.label is not None and not 0 <= record.label < self.n_classes:
            raise DataError(f"{record.key} has label {record.label}, expected 0 to {self.n_classes - 1} or none.")
        sizes: list[int] = []

        def read() -> bytes:
            data = record.read()
            sizes.append(len(data))
            return data

        try:
            image = read_image(replace(record, read=read), self.limits)
        except BadImage as error:
            return ErrorRow(
                key=record.key,
                position=position,
                stage=error.stage,
                kind=error.kind,
                exception=type(error.__cause__ or error).__name__,
                message=str(error)[:MESSAGE_LENGTH],
                bytes=sizes[0] if sizes else None,
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
        )
        views = [] if self.views is None else self.views.of(image.image, record.key)
        pixels, *others = map(self.preprocess, [image.image, *views])
        return Decoded(row, pixels, sizes[0], tuple(others))


@dataclass
class Encoder:
    """Runs the model over decoded images, and keeps the bad ones apart.

    Attributes:
        backbone: The model.
        batch_size: Consecutive positions per forward pass. A batch never reaches over the end of a part and a bad image
            leaves its place empty, so that a part redone alone meets the same batches and gives the same bytes.
        strict: Raise on the first bad image.
        task: Told of every batch.
        arrays: What to keep of an image, by name and shape (``Inputs.arrays``).
        n_errors: Bad images so far.
    """

    backbone: Backbone
    batch_size: int
    strict: bool
    task: Task
    arrays: Mapping[str, tuple[int, ...]]
    n_errors: int = 0

    def part(self, outcomes: Iterator[Decoded | ErrorRow], size: int) -> PartRows:
        """Take the next ``size`` outcomes.

        Raises:
            DataError: If ``strict`` and an image is bad.
            ProvenanceError: If the model's output is not as wide as its space says.
        """
        content = PartRows()
        for start in range(0, size, self.batch_size):
            n = min(self.batch_size, size - start)
            # the batch has no name here: it is freed before the next one is gathered
            self._encode(list(islice(outcomes, n)), content)
            self.task.advance(n, f"{self.n_errors} errors")
        return content

    def _encode(self, batch: list[Decoded | ErrorRow], content: PartRows) -> None:
        bad = [outcome for outcome in batch if isinstance(outcome, ErrorRow)]
        good = [outcome for outcome in batch if isinstance(outcome, Decoded)]
        if good:
            arrays, status = self._run_model(good)
            for name, rows in arrays.items():
                content.arrays.setdefault(name, []).append(rows[torch.from_numpy(status == VALID)])
            content.rows += [outcome.row for outcome, code in zip(good, status, strict=True) if code == VALID]
            bad += [_unusable(outcome, STATUS[code]) for outcome, code in zip(good, status, strict=True) if code]
        if bad and self.strict:
            first = min(bad, key=lambda error: error.position)
            raise DataError(
                f"{first.key}: {first.kind} in stage {first.stage}: {first.message}. Mend the image, or let bad images "
                "be set aside and counted with --on-error skip."
            )
        content.errors += sorted(bad, key=lambda error: error.position)
        self.n_errors += len(bad)

    def _run_model(self, batch: list[Decoded]) -> tuple[dict[str, Tensor], NDArray[np.uint8]]:
        """What to keep of some images, by name, and the worst status (``validate.STATUS``) of each."""
        arrays: dict[str, Tensor] = {}
        pixels = torch.stack([image.pixels for image in batch])
        if "features" in self.arrays:
            image, arrays["features"] = self.backbone.encode_images_and_features(pixels)
        else:
            image = self.backbone.encode_images(pixels)
        arrays[IMAGE], status = unit_rows(image, "image")
        # one view of every image at a time: no forward pass is larger than that of the images
        views = [self.backbone.encode_images(torch.stack(view)) for view in zip(*(i.views for i in batch), strict=True)]
        if views:
            usable = [unit_rows(rows, "view") for rows in views]
            arrays["views"] = torch.stack([rows for rows, _ in usable], dim=1)
            status = np.maximum.reduce([status, *(code for _, code in usable)])
        for name, shape in self.arrays.items():
            rows = arrays[name]
            if rows.shape != (len(batch), *shape):
                raise ProvenanceError(
                    f"the backbone gave {name} of shape {tuple(rows.shape)} for {len(batch)} images, where it says "
                    f"width {shape[-1]}."
                )
            status[~torch.isfinite(rows).flatten(1).all(dim=1).numpy()] = NONFINITE
        return arrays, status


def _unusable(image: Decoded, kind: str) -> ErrorRow:
    message = "the model gave an embedding that has no direction"
    return ErrorRow(image.row.key, image.row.position, "encode", kind, None, message, image.bytes)


@contextmanager
def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[Iterator[R]]:
    """Results of ``function`` in the order of ``items``, worked out by threads, at most ``ahead`` of them in advance.

    On leaving the block, also by an exception, nothing more is begun.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vilu-decode", initializer=_stay_on_one_core)

    def results() -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stay_on_one_core() -> None:
    """Otherwise every decoding thread has a team of threads for its tensors, and they all fight with the model's.

    ``torch.set_num_threads`` would change the whole process, the limit of OpenMP is this thread's own.
    """
    torch.get_num_threads()  # at its first use in a thread torch sets the limit itself
    threadpool_limits(1, user_api="openmp")


def default_workers() -> int:
    """Decoding threads: one per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)
