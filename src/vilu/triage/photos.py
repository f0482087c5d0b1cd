"""The photos of a folder, embedded once each: what is new or has changed becomes a store of its own."""

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
from vilu.store.embed import embed
from vilu.store.job import BackboneSpec
from vilu.store.reader import EmbeddingStore

FOLDER: Final = "embeddings"
"""Name of the folder of stores."""

NEVER_MIND: Final = 1.0
"""Share of bad photos of one store: people's folders hold what they hold, and every bad one is told of by name."""

logger = logging.getLogger(__name__)

Version = tuple[int, int]
"""Size and time of modification of a file; another one is another photo."""


def version_of(status: os.stat_result | OSError) -> Version:
    """Of a file that cannot be looked at, none that ever was."""
    return (-1, -1) if isinstance(status, OSError) else (status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Embedding:
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

    def some(self, paths: Collection[str], names: Sequence[str] = ()) -> PhotoFiles:
        """Some of the photos."""
        chosen = [one for one in self.listing if portable_name(one[0]) in paths]
        return PhotoFiles(self.root, chosen, names, self.moved)


@dataclass
class PhotoStores:
    """The stores of a folder of photos, numbered, each with the list of the files that are in it."""

    root: Path

    def numbers(self) -> list[int]:
        """Those that were begun."""
        return sorted(int(path.stem) for path in self.root.glob("*.parquet") if path.stem.isdigit())

    def _list(self, number: int) -> Path:
        return self.root / f"{number:03}.parquet"

    def store(self, number: int) -> Path:
        """Its folder."""
        return self.root / f"{number:03}"

    def listed(self, number: int) -> dict[str, Version]:
        """The files of a store."""
        table, said = read_table(self._list(number), ())
        if said.get("kind") != "photos":
            raise DataError(
                f"{self._list(number)} is no list of photos of vilu. Remove the folder {self.root}."
            )
        columns = (table[name].to_pylist() for name in ("path", "size", "time"))
        return {path: (size, time) for path, size, time in zip(*columns, strict=True)}

    def update(self, photos: PhotoFolder, how: Embedding) -> int:
        """Embed what no store has yet, or could not be read and now can; how many photos that was."""
        now = {portable_name(path): version_of(status) for path, status in photos.listing}
        done, unread = dict[str, Version](), set[str]()
        begun = None
        for number in self.numbers():
            listed = self.listed(number)
            if (self.store(number) / MANIFEST).is_file():
                done |= listed
                bad = EmbeddingStore(self.store(number)).bad_images()
                unread = (unread - listed.keys()) | {
                    path for path, kind in bad if kind == "read_error"
                }
            elif all(now.get(path) == version for path, version in listed.items()):
                begun = number  # interrupted: it goes on, with the same photos
            else:
                self._remove(number)
        if begun is not None:
            self._embed(begun, photos, self.listed(begun), how)
            done |= self.listed(begun)
        again = photos.some(unread - (set() if begun is None else self.listed(begun).keys()))
        for record in again.records(0, len(again)):
            with suppress(OSError):
                record.read()
                del done[record.key]
        if new := {path: version for path, version in now.items() if done.get(path) != version}:
            number = max(self.numbers(), default=0) + 1
            make_folder(self.root)
            columns = {"path": pa.array(list(new), pa.string())}
            for place, name in enumerate(("size", "time")):
                columns[name] = pa.array([version[place] for version in new.values()], pa.int64())
            write_table(self._list(number), columns, {"kind": "photos"})
            self._embed(number, photos, new, how)
        return len(new)

    def _embed(
        self, number: int, photos: PhotoFolder, chosen: Collection[str], how: Embedding
    ) -> None:
        model = how.backbone.load()
        for done in [
            self.store(one) for one in self.numbers() if (self.store(one) / MANIFEST).is_file()
        ][:1]:
            # a store of another model, once made, would be in the way of all later runs
            EmbeddingStore(done).space.require_match(
                model.space, mine=str(done), theirs="the model of this run"
            )
        embed(
            photos.some(chosen, how.names),
            model,
            self.store(number),
            names=how.names,
            templates=how.templates,
            negatives=how.negatives,
            batch_size=how.batch_size,
            workers=how.workers,
            max_error_rate=NEVER_MIND,
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
        now = {portable_name(path): version_of(status) for path, status in photos}
        newest: dict[str, int] = {}
        for number in self.numbers():
            newest |= {
                path: number
                for path, version in self.listed(number).items()
                if now.get(path) == version
            }
        stores = [EmbeddingStore(self.store(number)) for number in self.numbers()]
        parts, bad = [], dict[str, str]()
        for number, store in zip(self.numbers(), stores, strict=True):
            rows = [row for row, key in enumerate(store.ids) if newest.get(key) == number]
            parts.append((store, np.array(rows, dtype=np.int64)))
            bad |= {key: kind for key, kind in store.bad_images() if newest.get(key) == number}
        return Photos(parts, bad)


class Photos(EmbeddingSource):
    """Rows of several stores of one model and the same classes, as one source; labels are given later.

    Attributes:
        bad: Path of every photo that has no embedding, and why.
        pictures: Per row the digest of the picture.
    """

    def __init__(
        self, parts: Sequence[tuple[EmbeddingStore, NDArray[np.int64]]], bad: Mapping[str, str]
    ) -> None:
        first = parts[0][0]
        for store, _ in parts[1:]:
            first.space.require_match(store.space, mine=str(first.path), theirs=str(store.path))
        self._parts = [(store, torch.from_numpy(rows)) for store, rows in parts]
        self._starts = np.cumsum([0, *(len(rows) for _, rows in parts)])
        self.space, self.text, self.class_names = first.space, first.text, first.class_names
        self.first, self.columns, self.bad = first, first.columns, dict(bad)
        self.ids = [store.ids[row] for store, rows in parts for row in rows.tolist()]
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
        places = np.arange(len(self)) if rows is None else rows
        found = np.empty(len(places), np.uint64)
        for part, at, inside in self._split(places):
            found[at] = self._parts[part][0].identities(by, inside)
        return found

    @property
    def pictures(self) -> list[bytes]:
        """(N,) what the pictures are recognised by."""
        return [value.tobytes() for value in self.identities(self.identified_by[0])]

    def image_rows(self, index: Tensor) -> Tensor:
        """(B, D) float32 rows, gathered from the stores."""
        found = torch.empty(len(index), self.space.embed_dim)
        for part, at, inside in self._split(index.numpy()):
            found[torch.from_numpy(at)] = self._parts[part][0].image_rows(torch.from_numpy(inside))
        return found

    def column(self, name: str, index: Tensor) -> Tensor:
        """A column of the classes or of the model; photos carry none of their own."""
        return self.first.column(name, index)

    def _split(
        self, places: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Store, positions among the places, and rows in the store."""
        owner = np.searchsorted(self._starts, places, side="right") - 1
        for part in np.unique(owner).tolist():
            at = np.flatnonzero(owner == part)
            yield part, at, self._parts[part][1].numpy()[places[at] - self._starts[part]]

    def label(self, labels: Mapping[str, str], outside: Sequence[str]) -> None:
        """Say what is known of the photos, by path: a class, one that is outside, or nothing."""
        place = self.class_places()
        for row, path in enumerate(self.ids):
            label = labels.get(path)
            self.outside[row] = label in outside
            self.target[row] = UNKNOWN if label is None or label in outside else place[label]

    def class_places(self) -> dict[str, int]:
        """Name of every class that was given to its candidate; classes of one text are one candidate."""
        names, merged = self.first.manifest.names, self.first.candidate_of
        return {
            name: place if merged is None else int(merged[place])
            for place, name in enumerate(names)
        }
