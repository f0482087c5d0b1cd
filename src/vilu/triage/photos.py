"""A folder's photos, each embedded once: new and changed photos get a new store."""

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

from vilu.artifacts.disk import MANIFEST_FILE, convert_os_errors, make_folder
from vilu.artifacts.tables import read_table, write_table
from vilu.datasets.files import portable_name
from vilu.datasets.folder import ListedPhoto, PhotoFiles
from vilu.datasets.images import NEEDS_PILLOW_HEIF
from vilu.embeddings.checks import IdentityKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import UNKNOWN, DataError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.job import BackboneSpec
from vilu.store.reader import EmbeddingStore

EMBEDDINGS_FOLDER: Final = "embeddings"
"""Name of the folder with the stores."""

MAX_ERROR_RATE: Final = 1.0
"""Largest share of bad photos in one store.

Bad photos never stop a run. The result names all bad photos.
"""

logger = logging.getLogger(__name__)

FileVersion = tuple[int, int]
"""Size in bytes and modification time in nanoseconds. If a photo changes, its version changes."""

NO_VERSION: Final[FileVersion] = (-1, -1)
"""Version of a file with an unreadable status. No real file has this version."""


def file_version(status: os.stat_result | OSError) -> FileVersion:
    """Return a listed file's version, or ``NO_VERSION`` if the status could not be read."""
    if isinstance(status, OSError):
        return NO_VERSION
    return (status.st_size, status.st_mtime_ns)


def file_versions(photos: Sequence[ListedPhoto]) -> dict[str, FileVersion]:
    """Map the path of every listed photo to its version. Paths are written as in tables."""
    return {portable_name(path): file_version(status) for path, status in photos}


@dataclass(frozen=True)
class EmbeddingSettings:
    """Settings for the embedding: the model, its classes and prompts, and the batches.

    Attributes:
        backbone: The model.
        names: Class names.
        templates: Prompts with ``{}`` for the class name, or None for the default prompts.
        negatives: Negative words. They name no class.
        batch_size: Photo count per batch.
        workers: How many threads decode photos. If None, one per core.
    """

    backbone: BackboneSpec
    names: tuple[str, ...]
    templates: tuple[str, ...] | None
    negatives: tuple[str, ...]
    batch_size: int = 32
    workers: int | None = None


@dataclass(frozen=True)
class PhotoFolder:
    """The listed photos in a folder, with the photos that were moved out of the folder.

    Attributes:
        root: The folder.
        listed_photos: Path and status of every photo.
        moved_photos: Maps each moved photo's path in the folder to the present location.
        follow_links: Whether links may lead anywhere, also to folders.
    """

    root: Path
    listed_photos: Sequence[ListedPhoto]
    moved_photos: Mapping[str, Path] = field(default_factory=dict)
    follow_links: bool = False

    @cached_property
    def paths(self) -> list[str]:
        """Paths of all photos, written as in tables (``portable_name``)."""
        return [portable_name(path) for path, _ in self.listed_photos]

    def files_of(self, paths: Collection[str], names: Sequence[str] = ()) -> PhotoFiles:
        """Make a data set with these photos and the class names ``names``."""
        chosen_photos = []
        for path, status in self.listed_photos:
            if portable_name(path) in paths:
                chosen_photos.append((path, status))
        return PhotoFiles(
            self.root, chosen_photos, names, self.moved_photos, follow_links=self.follow_links
        )


@dataclass(frozen=True)
class _StoredPhotos:
    """The photos in a folder's stores.

    Attributes:
        versions: Maps the path of every embedded or bad photo to the photo's version.
        unreadable_paths: Paths of photos that could not be read, but may be readable now.
        interrupted_store: Number of the store with an interrupted embedding, or None without such a
            store.
    """

    versions: dict[str, FileVersion]
    unreadable_paths: set[str]
    interrupted_store: int | None


@dataclass
class PhotoStores:
    """The numbered stores for a photo folder.

    Every store has a file that lists its photos. The list is written before the store.

    Attributes:
        root: Folder that contains the stores and the lists.
    """

    root: Path

    def store_numbers(self) -> list[int]:
        """Return the numbers of all stores, complete or not, ascending."""
        return sorted(int(path.stem) for path in self.root.glob("*.parquet") if path.stem.isdigit())

    def _photo_list_file(self, number: int) -> Path:
        """Return the file that lists a store's photos."""
        return self.root / f"{number:03}.parquet"

    def store_folder(self, number: int) -> Path:
        """Return the folder of a store."""
        return self.root / f"{number:03}"

    def is_complete(self, number: int) -> bool:
        """Return whether a store's embedding was finished."""
        manifest_file = self.store_folder(number) / MANIFEST_FILE
        return manifest_file.is_file()

    def listed_versions(self, number: int) -> dict[str, FileVersion]:
        """Map the paths in a store's photo list to the photos' versions."""
        list_file = self._photo_list_file(number)
        table, metadata = read_table(list_file, ())
        if metadata.get("kind") != "photos":
            raise DataError(
                f"{list_file} is no list of photos of vilu. Remove the folder {self.root}."
            )
        paths = table["path"].to_pylist()
        sizes = table["size"].to_pylist()
        times = table["time"].to_pylist()
        versions = zip(sizes, times, strict=True)
        return dict(zip(paths, versions, strict=True))

    def embed_new_photos(self, photo_folder: PhotoFolder, settings: EmbeddingSettings) -> int:
        """Embed new photos, changed photos, and photos that are readable again.

        An interrupted store is finished first. Returns the photo count in the new store, or 0 if no
        store was needed.
        """
        present_versions = file_versions(photo_folder.listed_photos)
        stored = self._read_stores(present_versions)
        stored_versions = stored.versions
        unreadable_paths = stored.unreadable_paths
        if stored.interrupted_store is not None:
            resumed_versions = self.listed_versions(stored.interrupted_store)
            self._embed(stored.interrupted_store, photo_folder, resumed_versions, settings)
            stored_versions |= resumed_versions
            unreadable_paths -= resumed_versions.keys()
        for path in self._readable_paths(photo_folder, unreadable_paths):
            del stored_versions[path]  # then the photo counts as new
        new_versions = {}
        for path, version in present_versions.items():
            if stored_versions.get(path) != version:
                new_versions[path] = version
        if new_versions:
            number = max(self.store_numbers(), default=0) + 1
            self._write_photo_list(number, new_versions)
            self._embed(number, photo_folder, new_versions, settings)
        return len(new_versions)

    def _read_stores(self, present_versions: Mapping[str, FileVersion]) -> _StoredPhotos:
        """Read all stores. If photos in an interrupted store have changed, remove this store."""
        versions: dict[str, FileVersion] = {}
        unreadable_paths: set[str] = set()
        interrupted_store = None
        for number in self.store_numbers():
            listed_versions = self.listed_versions(number)
            is_unchanged = all(
                present_versions.get(path) == version for path, version in listed_versions.items()
            )
            if self.is_complete(number):
                versions |= listed_versions
                # If older stores contain the same photos, this store replaces them.
                unreadable_paths -= listed_versions.keys()
                unreadable_paths |= self._unreadable_paths(number)
            elif is_unchanged:
                interrupted_store = number  # this store can be continued
            else:
                folder = self.store_folder(number)
                logger.info(
                    "%s was begun with photos that have changed since, so it is removed", folder
                )
                self._remove_store(number)
        return _StoredPhotos(versions, unreadable_paths, interrupted_store)

    def _unreadable_paths(self, number: int) -> set[str]:
        """Return paths of photos in a store that were unreadable, but may be readable now."""
        kinds_to_retry = {"read_error"}  # fault kinds
        if find_spec("pillow_heif") is not None:
            kinds_to_retry.add(NEEDS_PILLOW_HEIF)
        folder = self.store_folder(number)
        store = EmbeddingStore(folder)
        bad_images = store.bad_images()
        return {path for path, kind in bad_images if kind in kinds_to_retry}

    @staticmethod
    def _readable_paths(photo_folder: PhotoFolder, paths: Collection[str]) -> list[str]:
        """Return the ``paths`` of photos that can be read now."""
        files = photo_folder.files_of(paths)
        readable_paths = []
        for record in files.records(0, len(files)):
            with suppress(OSError):
                record.read()
                readable_paths.append(record.key)
        return readable_paths

    def _write_photo_list(self, number: int, versions: Mapping[str, FileVersion]) -> None:
        """Write the list of a store's photos. A store begins with this list."""
        make_folder(self.root)
        sizes = [size for size, _ in versions.values()]
        times = [time for _, time in versions.values()]
        columns = {
            "path": pa.array(list(versions), pa.string()),
            "size": pa.array(sizes, pa.int64()),
            "time": pa.array(times, pa.int64()),
        }
        list_file = self._photo_list_file(number)
        write_table(list_file, columns, {"kind": "photos"})

    def _embed(
        self,
        number: int,
        photo_folder: PhotoFolder,
        paths: Collection[str],
        settings: EmbeddingSettings,
    ) -> None:
        """Embed the photos with these paths into a store, or finish an interrupted store."""
        model = settings.backbone.load()
        complete_stores = [n for n in self.store_numbers() if self.is_complete(n)]
        if complete_stores:
            # If two stores had different models, every later run would fail. So the models are
            # compared before the new store is written.
            folder = self.store_folder(complete_stores[0])
            store = EmbeddingStore(folder)
            store.space.require_match(
                model.space, name=str(folder), other_name="the model of this run"
            )
        embed(
            photo_folder.files_of(paths, settings.names),
            model,
            self.store_folder(number),
            names=settings.names,
            templates=settings.templates,
            columns=ExtraColumns(negatives=settings.negatives),
            batch_size=settings.batch_size,
            workers=settings.workers,
            max_error_rate=MAX_ERROR_RATE,
        )

    def _remove_store(self, number: int) -> None:
        """Remove a store and its list."""
        folder = self.store_folder(number)
        with convert_os_errors(f"cannot remove {folder}"):
            if folder.exists():
                shutil.rmtree(folder)
            self._photo_list_file(number).unlink()

    def seen_pictures(self) -> Iterator[tuple[str, bytes]]:
        """Yield the path and the picture digest of every row in all complete stores.

        The oldest store comes first. Paths that no photo has any more are included.
        """
        for number in self.store_numbers():
            if self.is_complete(number):
                folder = self.store_folder(number)
                store = EmbeddingStore(folder)
                all_rows = np.arange(len(store))
                photos = Photos([(store, all_rows)], fault_of_path={})
                yield from zip(photos.ids, photos.pictures, strict=True)

    def open_photos(self, listed_photos: Sequence[ListedPhoto]) -> Photos:
        """Open the listed photos, each from the newest store with the present version."""
        present_versions = file_versions(listed_photos)
        numbers = self.store_numbers()
        # maps a photo's path to the number of the newest store with the present version
        newest_store_number: dict[str, int] = {}
        for number in numbers:
            for path, version in self.listed_versions(number).items():
                if present_versions.get(path) == version:
                    newest_store_number[path] = number  # replaces the number of an older store
        parts = []
        fault_of_path: dict[str, str] = {}
        for number in numbers:
            folder = self.store_folder(number)
            store = EmbeddingStore(folder)
            rows = [
                row for row, path in enumerate(store.ids) if newest_store_number.get(path) == number
            ]
            newest_rows = np.array(rows, dtype=np.int64)
            parts.append((store, newest_rows))
            for path, kind in store.bad_images():
                if newest_store_number.get(path) == number:
                    fault_of_path[path] = kind
        return Photos(parts, fault_of_path)


class Photos(EmbeddingSource):
    """Rows chosen from several stores with the same model and classes, joined into one source.

    No row has a label until ``set_labels`` sets the labels.

    Args:
        parts: Pairs: a store, and the numbers of the chosen rows in this store.
        fault_of_path: Maps the path of a photo without an embedding to the reason.

    Attributes:
        first_store: The first store.
        fault_of_path: Maps the path of a photo without an embedding to the reason.
        pictures: (N,) picture digest of every row.
    """

    def __init__(
        self,
        parts: Sequence[tuple[EmbeddingStore, NDArray[np.int64]]],
        fault_of_path: Mapping[str, str],
    ) -> None:
        first_store, _ = parts[0]
        for store, _ in parts[1:]:
            first_store.space.require_match(
                store.space, name=str(first_store.path), other_name=str(store.path)
            )
        self._parts = [(store, torch.from_numpy(rows)) for store, rows in parts]
        # the first row number of every part, and at the end the number of all rows
        self._first_row_of_part = np.cumsum([0, *(len(rows) for _, rows in parts)])
        self.space = first_store.space
        self.text = first_store.text
        self.class_names = first_store.class_names
        self.first_store = first_store
        self.columns = first_store.columns
        self.fault_of_path = dict(fault_of_path)
        self.ids = []
        for store, rows in parts:
            self.ids += [store.ids[row] for row in rows.tolist()]
        self.target = torch.full((len(self.ids),), UNKNOWN)
        self.outside = torch.zeros(len(self.ids), dtype=torch.bool)

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """(N,) status of every row in its store: whether the row is usable."""
        return np.concatenate([store.status[rows.numpy()] for store, rows in self._parts])

    @property
    def identified_by(self) -> tuple[IdentityKind, ...]:
        """Identity kinds to recognise rows, as in the stores."""
        return self.first_store.identified_by

    def identities(
        self, by: IdentityKind, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint64]:
        """Return identities from the stores: of ``rows`` (M,), or of all N rows if None."""
        if rows is None:
            rows = np.arange(len(self))
        identities = np.empty(len(rows), np.uint64)
        for store, positions, store_rows in self._split_by_store(rows):
            identities[positions] = store.identities(by, store_rows)
        return identities

    @property
    def pictures(self) -> list[bytes]:
        """(N,) picture digest of every row.

        Raises:
            DataError: If nothing identifies the rows, as in a store of imported logits without ids.
        """
        if not self.identified_by:
            raise DataError(
                f"nothing identifies the rows of {self.first_store.path}: they have no picture, no "
                "embedding and no name, so a label could not be matched with its row. Import them "
                "again with the array ids (a name for each row)."
            )
        best_identity = self.identified_by[0]  # "pictures", unless the rows were imported
        return [value.tobytes() for value in self.identities(best_identity)]

    @property
    def picture_of_path(self) -> dict[str, bytes]:
        """Map the path of every row to the picture digest."""
        return dict(zip(self.ids, self.pictures, strict=True))

    def image_rows(self, index: Tensor) -> Tensor:
        """Return the embeddings (B, D) float32 for the rows ``index`` (B,), from the stores."""
        image = torch.empty(len(index), self.space.embed_dim, dtype=torch.float32)
        for store, positions, store_rows in self._split_by_store(index.numpy()):
            embeddings = store.image_rows(torch.from_numpy(store_rows))
            image[torch.from_numpy(positions)] = embeddings
        return image

    def column(self, name: str, index: Tensor) -> Tensor:
        """Return a column about the classes or the model. All stores share these columns."""
        return self.first_store.column(name, index)

    def _split_by_store(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[EmbeddingStore, NDArray[np.int64], NDArray[np.int64]]]:
        """Split ``rows`` (M,) by store.

        Yields for each store: the store, the positions in ``rows`` of this store's rows, and the
        numbers of these rows in the store.
        """
        # A row belongs to the last part with a start at this row or before this row.
        part_of_row = np.searchsorted(self._first_row_of_part, rows, side="right") - 1
        for part in np.unique(part_of_row).tolist():
            store, rows_of_part = self._parts[part]
            positions = np.flatnonzero(part_of_row == part)
            rows_inside = rows[positions] - self._first_row_of_part[part]
            yield store, positions, rows_of_part.numpy()[rows_inside]

    def set_labels(self, labels: Mapping[str, str], outside: Sequence[str]) -> None:
        """Set the labels of all photos.

        Args:
            labels: Maps paths to labels. A photo without an entry gets no label.
            outside: Labels for "none of the classes".
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
        """Map class names to candidate indices. Classes with equal texts share a candidate."""
        names = self.first_store.manifest.names
        candidate_of_class = self.first_store.candidate_of
        if candidate_of_class is None:  # every class is a separate candidate
            return {name: index for index, name in enumerate(names)}
        return {name: int(candidate_of_class[index]) for index, name in enumerate(names)}
