"""Images to an embedding store."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from vilu.backbones.base import Backbone
from vilu.datasets.base import ImageDataset, Record
from vilu.datasets.images import DEFAULT_LIMITS, ImageLimits
from vilu.errors import DataError, UsageError
from vilu.progress import track
from vilu.store.folder import claim, clear, require_room
from vilu.store.manifest import Run
from vilu.store.parts import Part
from vilu.store.pipeline import Decoder, Encoder, default_workers, in_threads
from vilu.store.reader import EmbeddingStore
from vilu.store.run import begin, describe, missing_parts, seal
from vilu.store.writer import write_part
from vilu.validate import check_class_names

logger = logging.getLogger(__name__)


def embed(  # noqa: PLR0913 - one keyword per flag of the command
    dataset: ImageDataset,
    backbone: Backbone,
    output: str | os.PathLike[str],
    *,
    names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    batch_size: int = 32,
    workers: int | None = None,
    part_size: int = 4096,
    dtype: Literal["float16", "float32"] = "float16",
    limits: ImageLimits = DEFAULT_LIMITS,
    features: bool = False,
    views: int = 0,
    seed: int = 0,
    prompts: Sequence[str] = (),
    max_error_rate: float = 0.01,
    on_error: Literal["skip", "raise"] = "skip",
    split: str | None = None,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Embed all images of a data set, or what is still missing of an earlier run with the same inputs.

    Kill it at any moment: finished parts stay, and the next run gives the bytes that an undisturbed one would have
    given. Memory is bounded by ``batch_size`` images and ``part_size`` embeddings, whatever the size of the data (each
    times one more than ``views``). Progress is shown through ``vilu.progress``.

    Args:
        dataset: The images.
        backbone: The model.
        output: Folder of the store.
        names: K names as they are to stand in the prompts, in the order of the labels.
        templates: Prompts with ``{}`` for the name; a class text is the mean over them.
        batch_size: Images per forward pass.
        workers: Decoding threads; by default one per core.
        part_size: Images per part, which is what a kill can cost.
        dtype: Number format of what is stored of the images; what is stored of classes and model is float32.
        features: Also store the image tower's output before its last map, and where the last maps of both towers are
            linear, the maps and (with a single template) what the text's maps: the columns ``features``,
            ``image_projection``, ``text_projection`` and ``text_features``.
        views: Also store the embeddings of so many augmented views of each image, as the column ``views``.
        seed: Of the views.
        prompts: Also store the embeddings of every class in these templates, as the column ``prompts``.
        limits: What an image may be.
        max_error_rate: Largest share of images that may fail; above it the store is not sealed, and nothing is lost.
        on_error: "skip" sets bad images aside and counts them, "raise" stops at the first.
        split: Name of the split, recorded.
        overwrite: Replace the store that is there.

    Raises:
        UsageError: If an argument cannot be, or ``output`` holds something else than a store.
        ProvenanceError: If ``output`` holds a store of other inputs; the message names them.
        DataError: If the data do not fit the names, or too many images failed.
        StorageError: If the file system refuses; finished parts are intact.
        BusyError: If another process embeds into ``output``.
    """
    _check_settings(batch_size, workers, max_error_rate, on_error)
    names = _check_classes(dataset, names)
    run = describe(
        dataset,
        backbone.space,
        names=names,
        templates=templates,
        limits=asdict(limits),
        part_size=part_size,
        dtype=dtype,
        split=split,
        features=backbone.feature_dim if features else None,
        views={"n": views, "seed": seed} if views else None,
        prompts=prompts,
    )
    root = Path(output)
    with claim(root):
        if overwrite:
            clear(root)
        run = begin(root, run, backbone)
        missing = missing_parts(root, run)
        n_missing = sum(map(len, missing))
        require_room(root, n_missing, sum(map(math.prod, run.arrays.values())) * np.dtype(run.dtype).itemsize)
        with track("embed", run.n_in, "images") as task:
            task.advance(run.n_in - n_missing)
            encoder = Encoder(backbone, batch_size, on_error == "raise", task, run.arrays)
            decoder = Decoder(backbone.preprocess, limits, len(names), run.views)
            embed_parts(root, run, missing, dataset, decoder, encoder, workers or default_workers())
        seal(root, run, 0.0 if on_error == "raise" else max_error_rate)
    return EmbeddingStore(root)


def embed_parts(
    root: Path,
    run: Run,
    parts: Sequence[Part],
    dataset: ImageDataset,
    decoder: Decoder,
    encoder: Encoder,
    workers: int,
) -> None:
    """Embed and write some parts of a run; decoding runs ahead over the ends of batches and parts.

    Each part depends on its own images alone, so any parts may be done anywhere, in any order, more than once.

    Raises:
        ValueError: If the data set gives more or fewer records than it says.
        StorageError: If the file system refuses.
    """

    def items() -> Iterator[tuple[int, Record]]:
        for part in parts:
            yield from zip(range(part.start, part.stop), dataset.records(part.start, part.stop), strict=True)

    with in_threads(decoder, items(), workers, ahead=encoder.batch_size + workers) as outcomes:
        for part in parts:
            receipt = write_part(root, run, part, encoder.part(outcomes, len(part)), encoder.batch_size)
            logger.info(
                "part %d: %d rows, %d errors, %.1f s", part.number, receipt.n_ok, receipt.n_error, receipt.seconds
            )


def _check_settings(batch_size: int, workers: int | None, max_error_rate: float, on_error: str) -> None:
    for name, value in (("batch_size", batch_size), ("workers", 1 if workers is None else workers)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1. Got {value} instead.")
    if not 0 <= max_error_rate <= 1:
        raise UsageError(f"max_error_rate must be a share from 0 to 1. Got {max_error_rate} instead.")
    if on_error not in {"skip", "raise"}:
        raise UsageError(f"on_error must be 'skip' or 'raise'. Got {on_error!r} instead.")


def _check_classes(dataset: ImageDataset, names: Sequence[str]) -> tuple[str, ...]:
    folders = dataset.class_names
    if folders is not None and len(folders) != len(names):
        raise DataError(
            f"there must be one name per class of {dataset.source}. Got {len(names)} names for {len(folders)} classes."
        )
    if not names:
        raise DataError("names must have at least one class name. Got none.")
    return check_class_names(names, len(names)) or ()
