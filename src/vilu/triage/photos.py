"""The photos of a folder, embedded once each: what is new or has changed becomes a new store."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.disk import MANIFEST, make_folder, or_refuse
from vilu.artifacts.tables import read_table, write_table
from vilu.datasets.files import portable_name
from vilu.datasets.folder import Listed, PhotoFiles
from vilu.embeddings.checks import Identity
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.job import BackboneSpec
from vilu.store.reader import EmbeddingStore

FOLDER: Final = "embeddings"
"""Name of the folder of stores."""

MAX_ERROR_RATE: Final = 1.0
"""Share of bad photos of one store: folders hold what they hold, and every bad photo is named."""

logger = logging.getLogger(__name__)

Version = tuple[int, int]
"""Size and time of modification of a file; another one is another photo."""


def version_of(status: os.stat_result | OSError) -> Version:
    """Version of a listed file; of one that cannot be looked at, none that ever was."""
    if isinstance(status, OSError):
        return (-1, -1)
    return (status.st_size, status.st_mtime_ns)


def versions_of(photos: Sequence[Listed]) -> dict[str, Version]:
    """Version of every listed photo, by path as tables have it."""
    return {portable_name(path): version_of(status) for path, status in photos}


@dataclass(frozen=True)
class EmbeddingSettings:
    """How photos are embedded, and against which classes."""

    backbone: BackboneSpec
    names: tuple[str, ...]
    templates: tuple[str, ...] | None
    negatives: tuple[str, ...]
    batch_size: int = 32
    workers: int | None = None


@dataclass(frozen=True)
class PhotoFolder:
    """A folder of photos as it was listed, and where those lie that were moved out of it."""

    root: Path
    listing: Sequence[Listed]
    moved: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all photos, as tables have them."""
        return [portable_name(path) for path, _ in self.listing]

    def files_of(self, paths: Collection[str], names: Sequence[str] = ()) -> PhotoFiles:
        """The photos of these paths, as a data set."""
        chosen = [listed for listed in self.listing if portable_name(listed[0]) in paths]
        return PhotoFiles(self.root, chosen, names, self.moved)


@dataclass(frozen=True)
class _StoredPhotos:
    """What the stores of a folder hold.

    Attributes:
        done: Version of every photo that was embedded, or found to be bad.
        unread: Photos that could not be read.
        begun: Number of the store that was interrupted; None where none was.
    """

    done: dict[str, Version]
    unread: set[str]
    begun: int | None


@dataclass
class PhotoStores:
    """The numbered stores of a folder of photos, each with the list of its files."""

    root: Path

    def numbers(self) -> list[int]:
        """Those that were begun."""
        return sorted(int(path.stem) for path in self.root.glob("*.parquet") if path.stem.isdigit())

    def _list(self, number: int) -> Path:
        return self.root / f"{number:03}.parquet"

    def store(self, number: int) -> Path:
        """Its folder."""
        return self.root / f"{number:03}"

    def is_complete(self, number: int) -> bool:
        """Whether all of its photos were embedded."""
        return (self.store(number) / MANIFEST).is_file()

    def listed(self, number: int) -> dict[str, Version]:
        """The files of a store."""
        table, metadata = read_table(self._list(number), ())
        if metadata.get("kind") != "photos":
            raise DataError(
                f"{self._list(number)} is no list of photos of vilu. Remove the folder {self.root}."
            )
        columns = [table[name].to_pylist() for name in ("path", "size", "time")]
        return {path: (size, time) for path, size, time in zip(*columns, strict=True)}

    def update(self, photos: PhotoFolder, settings: EmbeddingSettings) -> int:
        """Embed new photos, and those that can be read now but could not; returns how many."""
        now = versions_of(photos.listing)
        stored = self._stored(now)
        done = stored.done
        unread = stored.unread
        if stored.begun is not None:
            resumed = self.listed(stored.begun)
            self._embed(stored.begun, photos, resumed, settings)
            done |= resumed
            unread -= resumed.keys()
        for path in self._readable_again(photos, unread):
            del done[path]
        new = {path: version for path, version in now.items() if done.get(path) != version}
        if new:
            number = max(self.numbers(), default=0) + 1
            self._write_list(number, new)
            self._embed(number, photos, new, settings)
        return len(new)

    def _stored(self, now: Mapping[str, Version]) -> _StoredPhotos:
        """What the stores hold; one that was begun with photos that are others now is removed."""
        done: dict[str, Version] = {}
        unread: set[str] = set()
        begun = None
        for number in self.numbers():
            listed = self.listed(number)
            if self.is_complete(number):
                done |= listed
                unread -= listed.keys()
                unread |= self._unread(number)
            elif all(now.get(path) == version for path, version in listed.items()):
                begun = number  # interrupted: it goes on, with the same photos
            else:
                self._remove(number)
        return _StoredPhotos(done, unread, begun)

    def _unread(self, number: int) -> set[str]:
        """Photos of a store that could not be read."""
        bad = EmbeddingStore(self.store(number)).bad_images()
        return {path for path, kind in bad if kind == "read_error"}

    @staticmethod
    def _readable_again(photos: PhotoFolder, unread: Collection[str]) -> list[str]:
        """Which of the photos that could not be read can be read now."""
        files = photos.files_of(unread)
        readable = []
        for record in files.records(0, len(files)):
            with suppress(OSError):
                record.read()
                readable.append(record.key)
        return readable

    def _write_list(self, number: int, versions: Mapping[str, Version]) -> None:
        """Begin a store: the list of its files."""
        make_folder(self.root)
        sizes = [size for size, _ in versions.values()]
        times = [time for _, time in versions.values()]
        columns = {
            "path": pa.array(list(versions), pa.string()),
            "size": pa.array(sizes, pa.int64()),
            "time": pa.array(times, pa.int64()),
        }
        write_table(self._list(number), columns, {"kind": "photos"})

    def _embed(
        self,
        number: int,
        photos: PhotoFolder,
        chosen: Collection[str],
        settings: EmbeddingSettings,
    ) -> None:
        model = settings.backbone.load()
        complete = next((store for store in self.numbers() if self.is_complete(store)), None)
        if complete is not None:
            # a store of another model, once made, would be in the way of all later runs
            store = self.store(complete)
            EmbeddingStore(store).space.require_match(
                model.space, name=str(store), other_name="the model of this run"
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
        logger.info(
            "%s was begun with photos that have changed: it is begun anew", self.store(number)
        )
        with or_refuse(f"remove {self.store(number)}"):
            if self.store(number).exists():
                shutil.rmtree(self.store(number))
            self._list(number).unlink()

    def open(self, photos: Sequence[Listed]) -> Photos:
        """All photos that are there now, from the stores that have them."""
        now = versions_of(photos)
        numbers = self.numbers()
        newest: dict[str, int] = {}
        for number in numbers:
            for path, version in self.listed(number).items():
                if now.get(path) == version:
                    newest[path] = number
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
    """Rows of several stores of one model and the same classes, as one source.

    Labels are set later (``label``).

    Attributes:
        bad: Path of every photo that has no embedding, and why.
        pictures: Per row the digest of the picture.
    """

    def __init__(
        self, parts: Sequence[tuple[EmbeddingStore, NDArray[np.int64]]], bad: Mapping[str, str]
    ) -> None:
        first = parts[0][0]
        for store, _ in parts[1:]:
            first.space.require_match(store.space, name=str(first.path), other_name=str(store.path))
        self._parts = [(store, torch.from_numpy(rows)) for store, rows in parts]
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
        """(N,) usable or not, as the stores say."""
        return np.concatenate([store.status[rows.numpy()] for store, rows in self._parts])

    @property
    def identified_by(self) -> tuple[Identity, ...]:
        """As the stores: pictures, and paths."""
        return self.first.identified_by

    def identities(self, by: Identity, rows: NDArray[np.int64] | None = None) -> NDArray[np.uint64]:
        """As every source's."""
        if rows is None:
            rows = np.arange(len(self))
        identities = np.empty(len(rows), np.uint64)
        for part, positions, inside in self._split(rows):
            identities[positions] = self._parts[part][0].identities(by, inside)
        return identities

    @property
    def pictures(self) -> list[bytes]:
        """(N,) what the pictures are recognised by."""
        return [value.tobytes() for value in self.identities(self.identified_by[0])]

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 rows, gathered from the stores."""
        image = torch.empty(len(index), self.space.embed_dim, dtype=torch.float32)
        for part, positions, inside in self._split(index.numpy()):
            rows = self._parts[part][0].image_rows(torch.from_numpy(inside))
            image[torch.from_numpy(positions)] = rows
        return image

    def column(self, name: str, index: Tensor) -> Tensor:
        """A column of the classes or of the model; photos carry none of their own."""
        return self.first.column(name, index)

    def _split(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Number of a part, the positions of its rows among ``rows`` (M,), and its own rows."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(owner).tolist():
            positions = np.flatnonzero(owner == part)
            inside = rows[positions] - self._starts[part]
            yield part, positions, self._parts[part][1].numpy()[inside]

    def label(self, labels: Mapping[str, str], outside: Sequence[str]) -> None:
        """Set what is known of the photos, by path: a class, one that is outside, or nothing."""
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
        """Candidate of every class that was given; classes of one text are one candidate."""
        names = self.first.manifest.names
        merged = self.first.candidate_of
        if merged is None:
            return {name: index for index, name in enumerate(names)}
        return {name: int(merged[index]) for index, name in enumerate(names)}
