"""Stores of a study: made once, thinned and shared by its cells."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np

import vilu
from vilu.backbones.base import Backbone
from vilu.backbones.catalog import load_backbone
from vilu.backbones.zeroshot import named_templates
from vilu.benchmark.config import Config
from vilu.benchmark.parts import Data, Role
from vilu.datasets.base import ImageDataset, Record, ShardedDataset
from vilu.datasets.catalog import open_dataset
from vilu.datasets.shift import ShiftedImages
from vilu.embeddings.space import digest
from vilu.errors import UsageError
from vilu.files import MANIFEST, read_document
from vilu.store.documents import Manifest
from vilu.store.embed import embed


def thinned(images: ImageDataset, limit: int | None, shards: int | None) -> ImageDataset:
    """At most ``limit`` images; of tar files, whose images are not counted before, the first ``shards``.

    Raises:
        UsageError: If there is a limit for images in tar files, and no number of shards.
    """
    if isinstance(images, ShardedDataset):
        if shards is None and limit is not None:
            raise UsageError(
                f"{images.source} is in tar files, and only reading them tells how many images they hold: limit cannot "
                "be had. Say shards = N for the first N of them."
            )
        return images if shards is None or shards >= len(images) else FirstShards(images, shards)
    return images if limit is None or limit >= len(images) else EvenlySpaced(images, limit)


class FirstShards:
    """The first tar files of a data set.

    Attributes:
        source: As of the whole.
        class_names: As of the whole.
        captioned: As of the whole.
        fingerprint: Hash of the whole's and the number kept.
    """

    def __init__(self, images: ShardedDataset, number: int) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, "first_shards": number})
        self._images = images
        self._number = number

    def __len__(self) -> int:
        return self._number

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images in shards start ... stop - 1."""
        return self._images.records(start, stop)

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Of shards start ... stop - 1."""
        return self._images.shard_fingerprint(start, stop)


class EvenlySpaced:
    """Some images of a data set, evenly spaced: data sets are sorted by class, so the first ones are no sample.

    Attributes:
        source: As of the whole.
        class_names: As of the whole.
        captioned: As of the whole.
        fingerprint: Hash of the whole's and the number kept.
    """

    def __init__(self, images: ImageDataset, number: int) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, "evenly_spaced": number})
        self._images = images
        self._positions = evenly_spaced(len(images), number)

    def __len__(self) -> int:
        return len(self._positions)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """The images at positions start ... stop - 1, read in one pass."""
        wanted = self._positions[start:stop]
        if not len(wanted):
            return
        first, last = int(wanted[0]), int(wanted[-1])
        kept = set(wanted.tolist())
        for position, record in enumerate(self._images.records(first, last + 1), start=first):
            if position in kept:
                yield record


def evenly_spaced(n: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``number`` positions of 0 ... n - 1, in order."""
    return np.arange(number, dtype=np.int64) * n // number


PACKAGE = "package:"
Part = tuple[str, Role]
"""A data set by name, and one of its parts."""


def find_stores(config: Config, parts: Iterable[Part], data: Path, output: Path) -> dict[Part, Path]:
    """The folder where each part is, or is to be; nothing is embedded.

    Raises:
        UsageError: If images are not where the file says, or their classes have no names.
    """
    return {part: store_of(part, config.data[part[0]], data, output) for part in parts}


def make_stores(
    config: Config, parts: Iterable[Part], data: Path, output: Path, *, models: Path | None = None
) -> dict[Part, Path]:
    """The same, with whatever is missing embedded; an interrupted run goes on where it stopped.

    Args:
        config: The benchmark.
        parts: What is needed of it.
        data: Folder that its paths are relative to.
        output: Folder of the stores, in ``stores``.
        models: Folder with the named backbones (``load_backbone``); None: they come from where they are usually kept.

    Raises:
        UsageError: If images are not where the file says, or their classes have no names.
        MissingModelError: If the backbone is not on this machine.
        ProvenanceError: If embeddings that are there are of other weights than those in ``models``.
    """
    found = find_stores(config, parts, data, output)
    load = functools.cache(functools.partial(load_backbone, models=models))
    for (name, role), folder in found.items():
        entry = config.data[name]
        if entry.stores is not None:
            continue
        if not is_complete(folder):
            _embed(entry, role, data, folder, load(entry.backbone))
        elif models is not None:
            theirs = read_document(folder / MANIFEST, Manifest).space
            load(entry.backbone).space.require_match(theirs, mine=f"the model in {models}", theirs=f"{folder}")
    return found


def is_complete(folder: Path) -> bool:
    """Whether a store is there and sealed."""
    return (folder / MANIFEST).is_file()


def require_complete(folders: Mapping[Part, Path]) -> None:
    """Refuse to go on where embeddings are missing.

    Raises:
        UsageError: Naming the first.
    """
    missing = [f"{name} ({role})" for (name, role), folder in folders.items() if not is_complete(folder)]
    if missing:
        raise UsageError(
            f"a share of the cells needs embeddings that are there; {len(missing)} sets are not, the first is "
            f"{missing[0]}. Make them all with --embed-only, once."
        )


def store_of(part: Part, entry: Data, data: Path, output: Path) -> Path:
    """The folder of a part; errors as ``find_stores``."""
    name, role = part
    if entry.stores is not None:
        folder = getattr(entry.stores, role)
        if folder is None:
            raise UsageError(f"data.{name} has no store of its {role} rows. Name it, as stores.{role} = ....")
        return data / str(folder)
    with open_images(entry, role, data) as images:
        recipe = [
            vilu.__version__,
            images.fingerprint,
            entry.backbone,
            _names(entry, images),
            _columns(entry, role),
        ]
    stem = entry.dataset or Path(str(entry.source).removeprefix(PACKAGE)).stem  # so that entries of one recipe share it
    return output / "stores" / f"{stem}-{'pairs' if entry.captions else role}-{digest(recipe)[:8]}"


def _embed(entry: Data, role: Role, data: Path, folder: Path, backbone: Backbone) -> None:
    with open_images(entry, role, data) as images:
        features, views, prompts = _columns(entry, role)
        embed(
            images,
            backbone,
            folder,
            names=_names(entry, images),
            features=features,
            views=views,
            prompts=() if entry.captions else prompts,
            split=None if entry.captions else getattr(entry, role),
        )


def _columns(entry: Data, role: Role) -> tuple[bool, int, tuple[str, ...]]:
    """Features, views and prompts to store beside the embeddings."""
    views = entry.views if role == "test" and not entry.captions else 0  # of training images they would be all the time
    return entry.features, views, tuple(named_templates(entry.prompts))


def _names(entry: Data, images: ImageDataset) -> tuple[str, ...]:
    if entry.captions:
        return ()
    names = entry.classes or images.class_names
    if names is None:
        raise UsageError(f"{images.source} names no classes. List them in the benchmark file, as classes = [...].")
    return names


@contextmanager
def open_images(entry: Data, role: Role, data: Path) -> Iterator[ImageDataset]:
    """The pictures of a part: those of its split, or of captions all of them; thinned, then shifted."""
    source = entry.source or "."
    if source.startswith(PACKAGE):
        asset = resources.files("vilu").joinpath("assets", source.removeprefix(PACKAGE))
        with resources.as_file(asset) as path:
            yield _prepared(entry, role, path)
    else:
        yield _prepared(entry, role, data / source)


def _prepared(entry: Data, role: Role, path: Path) -> ImageDataset:
    images = open_dataset(
        path,
        split=None if entry.captions else getattr(entry, role),
        captions=entry.captions and entry.dataset is None,  # a known one has nothing else
        where=entry.where,
        dataset=entry.dataset,
        raw_names=entry.raw_names,
    )
    images = thinned(images, entry.limit_of(role), entry.shards)
    if entry.shift is None:
        return images
    if isinstance(images, ShardedDataset):
        raise UsageError(f"{images.source} is in tar files, whose images cannot be shifted. Leave out shift.")
    return ShiftedImages(images, entry.shift.kinds, entry.shift.severity)
