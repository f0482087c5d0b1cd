"""The photos of a folder, each embedded once: new and changed photos get a new store."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import MANIFEST, convert_os_errors, make_folder
from vilu.artifacts.tables import read_table, write_table
from vilu.datasets.files import portable_name
from vilu.datasets.folder import ListedPhoto, PhotoFiles
from vilu.datasets.images import NEEDS_PILLOW_HEIF
from vilu.embeddings.checks import Identity
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.job import BackboneSpec
from vilu.store.reader import EmbeddingStore

FOLDER: Final = "embeddings"
"""Name of the folder that holds the stores."""

MAX_ERROR_RATE: Final = 1.0
"""Largest share of bad photos in one store.

Bad photos never stop a run: the result names every one of them.
"""

logger = logging.getLogger(__name__)

Version = tuple[int, int]
"""Size in bytes and modification time in nanoseconds. A photo that changes gets a new version."""

NO_VERSION: Final[Version] = (-1, -1)
"""Version of a file whose status cannot be read; no real file has it."""


def version_of(status: os.stat_result | OSError) -> Version:
    """Version of a listed file; ``NO_VERSION`` if its status could not be read."""
    if isinstance(status, OSError):
        return NO_VERSION
    return (status.st_size, status.st_mtime_ns)


def versions_of(photos: Sequence[ListedPhoto]) -> dict[str, Version]:
    """Version of every listed photo, by the path that tables use for the photo."""
    return {portable_name(path): version_of(status) for path, status in photos}


@dataclass(frozen=True)
class EmbeddingSettings:
    """How photos are embedded, and between which classes the model chooses.

    Attributes:
        backbone: The model.
        names: Names of the classes.
        templates: Prompts with ``{}`` for the name of a class; None for the default prompts.
        negatives: Negative words, which name no class.
        batch_size: Number of photos that are embedded at a time.
        workers: Number of threads that decode photos; None for one per core.
    """

    backbone: BackboneSpec
    names: tuple[str, ...]
    templates: tuple[str, ...] | None
    negatives: tuple[str, ...]
    batch_size: int = 32
    workers: int | None = None


@dataclass(frozen=True)
class PhotoFolder:
    """The listed photos of a folder, with the photos that were moved out of it.

    Attributes:
        root: The folder.
        listing: Path and status of every photo.
        moved: Present location of every photo that was moved, by its path in the folder.
        follow_links: Whether links may lead anywhere, also to folders.
    """

    root: Path
    listing: Sequence[ListedPhoto]
    moved: Mapping[str, Path] = field(default_factory=dict)
    follow_links: bool = False

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all photos, as tables write them."""
        return [portable_name(path) for path, _ in self.listing]

    def files_of(self, paths: Collection[str], names: Sequence[str] = ()) -> PhotoFiles:
        """A data set of the photos with these paths; ``names`` are its classes."""
        chosen_photos = [photo for photo in self.listing if portable_name(photo[0]) in paths]
        return PhotoFiles(
            self.root, chosen_photos, names, self.moved, follow_links=self.follow_links
        )


@dataclass(frozen=True)
class _StoredPhotos:
    """What the stores of a folder hold.

    Attributes:
        done: Version of every photo that was embedded or found to be bad, by path.
        unread: Paths of photos that could not be read.
        begun: Number of the store whose embedding was interrupted; None if there is none.
    """

    done: dict[str, Version]
    unread: set[str]
    begun: int | None


@dataclass
class PhotoStores:
    """The numbered stores of a folder of photos.

    Beside every store is the list of its photos, which is written before the store.
    """

    root: Path

    def numbers(self) -> list[int]:
        """Numbers of all stores that were begun, ascending."""
        return sorted(int(path.stem) for path in self.root.glob("*.parquet") if path.stem.isdigit())

    def _list_file(self, number: int) -> Path:
        """File that lists the photos of a store."""
        return self.root / f"{number:03}.parquet"

    def store(self, number: int) -> Path:
        """Folder of a store."""
        return self.root / f"{number:03}"

    def is_complete(self, number: int) -> bool:
        """Whether the embedding of a store was finished."""
        return (self.store(number) / MANIFEST).is_file()

    def listed(self, number: int) -> dict[str, Version]:
        """Versions of the photos of a store, by path."""
        table, metadata = read_table(self._list_file(number), ())
        if metadata.get("kind") != "photos":
            raise DataError(
                f"{self._list_file(number)} is no list of photos of vilu. Remove the folder "
                f"{self.root}."
            )
        paths = table["path"].to_pylist()
        sizes = table["size"].to_pylist()
        times = table["time"].to_pylist()
        versions = zip(sizes, times, strict=True)
        return dict(zip(paths, versions, strict=True))

    def update(self, photos: PhotoFolder, settings: EmbeddingSettings) -> int:
        """Embed new and changed photos, and photos that have become readable.

        An interrupted store is finished first. Returns the number of photos in the new store, 0
        without a new store.
        """
        present_versions = versions_of(photos.listing)
        stored = self._stored(present_versions)
        done = stored.done
        unread = stored.unread
        if stored.begun is not None:
            resumed = self.listed(stored.begun)
            self._embed(stored.begun, photos, resumed, settings)
            done |= resumed
            unread -= resumed.keys()
        for path in self._readable_again(photos, unread):
            del done[path]  # so that the photo is embedded now
        new = {
            path: version for path, version in present_versions.items() if done.get(path) != version
        }
        if new:
            number = max(self.numbers(), default=0) + 1
            self._write_list(number, new)
            self._embed(number, photos, new, settings)
        return len(new)

    def _stored(self, present_versions: Mapping[str, Version]) -> _StoredPhotos:
        """What the stores hold; an interrupted store is removed if its photos have changed."""
        done: dict[str, Version] = {}
        unread: set[str] = set()
        begun = None
        for number in self.numbers():
            listed = self.listed(number)
            if self.is_complete(number):
                done |= listed
                # What this store says about its photos replaces what older stores say about them.
                unread -= listed.keys()
                unread |= self._unread(number)
            elif all(present_versions.get(path) == version for path, version in listed.items()):
                begun = number  # the listed photos are unchanged, so this store can be continued
            else:
                logger.info(
                    "%s was begun with photos that have changed since, so it is removed",
                    self.store(number),
                )
                self._remove(number)
        return _StoredPhotos(done, unread, begun)

    def _unread(self, number: int) -> set[str]:
        """Paths of the photos of a store that may be readable now, although they were not."""
        kinds_to_retry = {"read_error"}
        if find_spec("pillow_heif") is not None:
            kinds_to_retry.add(NEEDS_PILLOW_HEIF)
        bad = EmbeddingStore(self.store(number)).bad_images()
        return {path for path, kind in bad if kind in kinds_to_retry}

    @staticmethod
    def _readable_again(photos: PhotoFolder, unread: Collection[str]) -> list[str]:
        """Paths of the ``unread`` photos that can be read now."""
        files = photos.files_of(unread)
        readable = []
        for record in files.records(0, len(files)):
            with suppress(OSError):
                record.read()
                readable.append(record.key)
        return readable

    def _write_list(self, number: int, versions: Mapping[str, Version]) -> None:
        """Begin a store: write the list of its photos."""
        make_folder(self.root)
        sizes = [size for size, _ in versions.values()]
        times = [time for _, time in versions.values()]
        columns = {
            "path": pa.array(list(versions), pa.string()),
            "size": pa.array(sizes, pa.int64()),
            "time": pa.array(times, pa.int64()),
        }
        write_table(self._list_file(number), columns, {"kind": "photos"})

    def _embed(
        self,
        number: int,
        photos: PhotoFolder,
        chosen: Collection[str],
        settings: EmbeddingSettings,
    ) -> None:
        """Embed the ``chosen`` paths into a store, or finish a store that was interrupted."""
        model = settings.backbone.load()
        complete_stores = [n for n in self.numbers() if self.is_complete(n)]
        if complete_stores:
            # All stores must be of one model, or every later run fails. So this is checked before
            # the new store is written.
            folder = self.store(complete_stores[0])
            EmbeddingStore(folder).space.require_match(
                model.space, name=str(folder), other_name="the model of this run"
            )
        embed(
            photos.files_of(chosen, settings.names),
            model,
            self.store(number),
            names=settings.names,
            templates=settings.templates,
            columns=ExtraColumns(negatives=settings.negatives),
            batch_size=settings.batch_size,
            workers=settings.workers,
            max_error_rate=MAX_ERROR_RATE,
        )

    def _remove(self, number: int) -> None:
        """Remove a store and its list."""
        with convert_os_errors(f"cannot remove {self.store(number)}"):
            if self.store(number).exists():
                shutil.rmtree(self.store(number))
            self._list_file(number).unlink()

    def open(self, photos: Sequence[ListedPhoto]) -> Photos:
        """The listed photos, each from the newest store that holds its present version."""
        present_versions = versions_of(photos)
        numbers = self.numbers()
        newest: dict[str, int] = {}
        for number in numbers:
            for path, version in self.listed(number).items():
                if present_versions.get(path) == version:
                    newest[path] = number  # replaces the number of an older store
        parts = []
        bad: dict[str, str] = {}
        for number in numbers:
            store = EmbeddingStore(self.store(number))
            rows = [row for row, path in enumerate(store.ids) if newest.get(path) == number]
            parts.append((store, np.array(rows, dtype=np.int64)))
            for path, kind in store.bad_images():
                if newest.get(path) == number:
                    bad[path] = kind
        return Photos(parts, bad)


class Photos(EmbeddingSource):
    """Chosen rows of several stores with the same model and classes, joined in one source.

    No row has a label until ``label`` sets the labels.

    Args:
        parts: The stores, and the numbers of the chosen rows in each.
        bad: Why a photo has no embedding, by the path of the photo.

    Attributes:
        first: The first of the stores.
        bad: Why a photo has no embedding, by the path of the photo.
        pictures: (N,) digest of the picture of every row.
    """

    def __init__(
        self, parts: Sequence[tuple[EmbeddingStore, NDArray[np.int64]]], bad: Mapping[str, str]
    ) -> None:
        first, _ = parts[0]
        for store, _ in parts[1:]:
            first.space.require_match(store.space, name=str(first.path), other_name=str(store.path))
        self._parts = [(store, torch.from_numpy(rows)) for store, rows in parts]
        # Number of the first row of every part, and then the number of all rows.
        self._starts = np.cumsum([0, *(len(rows) for _, rows in parts)])
        self.space = first.space
        self.text = first.text
        self.class_names = first.class_names
        self.first = first
        self.columns = first.columns
        self.bad = dict(bad)
        self.ids = []
        for store, rows in parts:
            self.ids += [store.ids[row] for row in rows.tolist()]
        self.target = torch.full((len(self.ids),), UNKNOWN)
        self.outside = torch.zeros(len(self.ids), dtype=torch.bool)

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """(N,) status of every row, from its store: whether the row is usable."""
        return np.concatenate([store.status[rows.numpy()] for store, rows in self._parts])

    @property
    def identified_by(self) -> tuple[Identity, ...]:
        """Kinds of identity by which rows are recognised, as in the stores."""
        return self.first.identified_by

    def identities(self, by: Identity, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """(N,) or (M,) identities of all rows or of ``rows`` (M,), gathered from the stores."""
        if rows is None:
            rows = np.arange(len(self))
        identities = np.empty(len(rows), np.uint64)
        for store, positions, store_rows in self._split(rows):
            identities[positions] = store.identities(by, store_rows)
        return identities

    @property
    def pictures(self) -> list[bytes]:
        """(N,) digest of the picture of every row."""
        best_identity = self.identified_by[0]  # "pictures", unless the rows were imported
        return [value.tobytes() for value in self.identities(best_identity)]

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 embeddings of rows, gathered from the stores."""
        image = torch.empty(len(index), self.space.embed_dim, dtype=torch.float32)
        for store, positions, store_rows in self._split(index.numpy()):
            rows = store.image_rows(torch.from_numpy(store_rows))
            image[torch.from_numpy(positions)] = rows
        return image

    def column(self, name: str, index: Tensor) -> Tensor:
        """A column of the classes or of the model, which all stores share."""
        return self.first.column(name, index)

    def _split(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[EmbeddingStore, NDArray[np.int64], NDArray[np.int64]]]:
        """Split ``rows`` (M,) by store.

        Yields a store, the positions in ``rows`` of the rows from this store, and the numbers of
        these rows in the store.
        """
        # The part of a row is the last part that starts at this row or before it.
        part_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of_row).tolist():
            store, rows_of_part = self._parts[part]
            positions = np.flatnonzero(part_of_row == part)
            rows_inside = rows[positions] - self._starts[part]
            yield store, positions, rows_of_part.numpy()[rows_inside]

    def label(self, labels: Mapping[str, str], outside: Sequence[str]) -> None:
        """Set the labels of all photos.

        Args:
            labels: Label by path; a photo without an entry here has no label.
            outside: Labels that mean "none of the classes".
        """
        candidate_of = self.candidates_by_name()
        for row, path in enumerate(self.ids):
            label = labels.get(path)
            is_outside = label in outside
            self.outside[row] = is_outside
            if label is None or is_outside:
                self.target[row] = UNKNOWN
            else:
                self.target[row] = candidate_of[label]

    def candidates_by_name(self) -> dict[str, int]:
        """Index of the candidate of every class name; classes with equal text share a candidate."""
        names = self.first.manifest.names
        candidate_of_class = self.first.candidate_of
        if candidate_of_class is None:  # every class is a candidate of its own
            return {name: index for index, name in enumerate(names)}
        return {name: int(candidate_of_class[index]) for index, name in enumerate(names)}
