"""The embeddings that a benchmark needs: found, or made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

import vilu
from vilu.backbones.catalog import load_backbone
from vilu.backbones.zeroshot import named_templates
from vilu.benchmark.config import Config
from vilu.benchmark.parts import Data
from vilu.datasets.base import ImageDataset, Record
from vilu.datasets.catalog import open_dataset
from vilu.errors import UsageError
from vilu.space import digest
from vilu.store.embed import embed
from vilu.store.manifest import MANIFEST

PACKAGE = "package:"
Role = Literal["train", "test"]
ROLES: tuple[Role, ...] = ("train", "test")


@dataclass(frozen=True)
class Folders:
    """Where the two stores of a data set are, or are to be."""

    train: Path
    test: Path

    @property
    def complete(self) -> bool:
        """Whether both are there and sealed."""
        return all((folder / MANIFEST).is_file() for folder in (self.train, self.test))


def find_stores(config: Config, data: Path, output: Path) -> dict[str, Folders]:
    """Folders of every data set, embedding nothing.

    Raises:
        UsageError: If images are not where the file says, or their classes have no names.
    """
    return {name: _find(name, entry, data, output) for name, entry in config.data.items()}


def make_stores(config: Config, data: Path, output: Path) -> dict[str, Folders]:
    """The same, with whatever is missing embedded; an interrupted run goes on where it stopped.

    Raises:
        UsageError: If images are not where the file says, or their classes have no names.
        MissingModelError: If the backbone is not on this machine.
    """
    found = find_stores(config, data, output)
    for name, folders in found.items():
        for role in ROLES:
            folder = getattr(folders, role)
            if config.data[name].stores is None and not (folder / MANIFEST).is_file():
                _embed(config.data[name], role, data, folder)
    return found


def _find(name: str, entry: Data, data: Path, output: Path) -> Folders:
    if entry.stores is not None:
        return Folders(data / entry.stores.train, data / entry.stores.test)
    names = {}
    for role in ROLES:
        with _images(entry, role, data) as images:
            recipe = [
                vilu.__version__,
                images.fingerprint,
                entry.backbone,
                _names(entry, images),
                _columns(entry, role),
            ]
            names[role] = f"{name}-{role}-{digest(recipe)[:8]}"
    return Folders(output / "stores" / names["train"], output / "stores" / names["test"])


def _embed(entry: Data, role: Role, data: Path, folder: Path) -> None:
    with _images(entry, role, data) as images:
        features, views, prompts = _columns(entry, role)
        embed(
            images,
            load_backbone(entry.backbone),
            folder,
            names=_names(entry, images),
            features=features,
            views=views,
            prompts=prompts,
            split=getattr(entry, role),
        )


def _columns(entry: Data, role: Role) -> tuple[bool, int, tuple[str, ...]]:
    """Features, views and prompts to store beside the embeddings."""
    views = entry.views if role == "test" else 0  # of many training images, views would be most of the time
    return entry.features, views, tuple(named_templates(entry.prompts))


def _names(entry: Data, images: ImageDataset) -> tuple[str, ...]:
    names = entry.classes or images.class_names
    if names is None:
        raise UsageError(f"{entry.source} names no classes. List them in the benchmark file, as classes = [...].")
    return names


@contextmanager
def _images(entry: Data, role: Role, data: Path) -> Iterator[ImageDataset]:
    source = entry.source or ""
    if source.startswith(PACKAGE):
        asset = resources.files("vilu").joinpath("assets", source.removeprefix(PACKAGE))
        with resources.as_file(asset) as path:
            yield _thinned(open_dataset(path, split=getattr(entry, role)), entry.limit)
    else:
        yield _thinned(open_dataset(data / source, split=getattr(entry, role)), entry.limit)


def _thinned(images: ImageDataset, limit: int | None) -> ImageDataset:
    return images if limit is None or limit >= len(images) else EvenlySpaced(images, limit)


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
