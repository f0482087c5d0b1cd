"""Data set protocols, and the selection of splits, rows and images."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vilu.artifacts.hashing import digest
from vilu.datasets.classes import ClassTable
from vilu.datasets.files import AllowedFolders, ForbiddenPathError
from vilu.errors import OUTSIDE, DataError, StorageError, UsageError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """An image, not yet read or decoded.

    Attributes:
        key: Stable identifier, unique in the data set: a relative POSIX path, a value in the column
            ``key``, or a row number.
        label: Index into the data set's class names. None if unknown, -2 if the image is outside
            all classes.
        read: Function that returns the encoded bytes. The function may raise OSError or
            ``BadImage``, and is called from a decoding thread.
        caption: Function that returns the caption. The function may raise OSError or ``BadImage``
            (stage "text"). None if the data set has no captions.
        position: Position in the data set. None if the record order gives the position.
        content: Function that returns bytes to identify the picture, called after ``read``. None if
            the bytes from ``read`` identify the picture.
    """

    key: str
    label: int | None
    read: Callable[[], bytes]
    caption: Callable[[], str] | None = None
    position: int | None = None
    content: Callable[[], bytes] | None = None


@runtime_checkable
class ImageDataset(Protocol):
    """Images in a fixed order. Images are read by position, so any part can be read separately.

    Attributes:
        source: The source's name, for messages.
        class_names: Class names in label order, equal for all splits. None if unlabelled.
        captioned: Whether records have captions. The captions are then the candidates, and there
            are no class names.
        fingerprint: Hash of keys, labels and sizes. If the hash has changed, a run is not resumed.
    """

    source: str
    class_names: tuple[str, ...] | None
    captioned: bool
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of images, readable or not.

        For a ``ShardedDataset``, return the number of shards.
        """

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1, in order.

        A ``ShardedDataset`` yields the images in the shards start ... stop - 1.
        """


POSITIONS_PER_SHARD: Final = 2**32
"""Number of positions reserved for each shard.

Image i of shard s has the position s * POSITIONS_PER_SHARD + i.
"""


@runtime_checkable
class ShardedDataset(ImageDataset, Protocol):
    """Images in shards (tar files). The number of images is unknown before the shards are read.

    Such a data set can be divided between two shards, but not within a shard.

    Every sample is a record with a ``position`` (see ``POSITIONS_PER_SHARD``). An unusable sample
    is a record, too: ``read`` raises ``BadImage``. So the sample is counted and listed.
    ``fingerprint`` covers only the shard names. ``shard_fingerprint`` covers shard sizes and times,
    and a store saves this hash for each part. So if a shard changes, only the part with this shard
    is embedded again.
    """

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Return a hash of sizes and modification times for shards start ... stop - 1."""


# A file's state before reading: the file seems readable, or has one of three faults.
READABLE, MISSING_FILE, FORBIDDEN_PATH, PERMISSION_DENIED = range(4)
FAULT_MESSAGES: Final = {
    MISSING_FILE: "files are missing below {folder}",
    FORBIDDEN_PATH: "paths lead out of {folder}",
    PERMISSION_DENIED: "files may not be read: permission denied",
}
"""Fault -> text in messages, after the number of files: "3 files are missing below photos"."""


def find_fault(status: os.stat_result | OSError | None, get_path: Callable[[], str]) -> int:
    """Return a file's fault, a key in ``FAULT_MESSAGES``, or ``READABLE`` without a fault.

    Args:
        status: The file's status, or the error of the system call. None if the file is missing.
        get_path: Function that returns the path. Called only if the status does not show whether
            this process may read the file.
    """
    if status is None:
        return MISSING_FILE
    if isinstance(status, ForbiddenPathError):
        return FORBIDDEN_PATH
    if isinstance(status, OSError):
        return PERMISSION_DENIED if status.errno == errno.EACCES else MISSING_FILE
    if status.st_mode & stat.S_IROTH:  # everyone may read the file, so os.access is not needed
        return READABLE
    return READABLE if os.access(get_path(), os.R_OK) else PERMISSION_DENIED


@dataclass(frozen=True)
class Faults:
    """The faults of the N files in a listing, as far as known before reading the files.

    Attributes:
        kinds: (N,) uint8 fault for each file (``find_fault``).
        folder: The files' folder.
        path_at: Function that takes a position and returns the file's path, as listed.
        location_rule: Function that takes the positions of files outside the allowed folders, and
            returns a sentence on where files are allowed.
    """

    kinds: NDArray[np.uint8]
    folder: Path
    path_at: Callable[[int], str]
    location_rule: Callable[[NDArray[np.int64]], str]

    def take(self, positions: Sequence[int]) -> Faults:
        """Return the faults of the files at ``positions``, renumbered to positions 0, 1, ..."""
        old_positions = np.asarray(positions, dtype=np.int64)

        def path_at(new_position: int) -> str:
            return self.path_at(int(old_positions[new_position]))

        def location_rule(new_positions: NDArray[np.int64]) -> str:
            return self.location_rule(old_positions[new_positions])

        return Faults(
            self.kinds[old_positions], self.folder, path_at=path_at, location_rule=location_rule
        )

    def check(self, source: str, max_share: float) -> None:
        """Warn about unreadable files. Raise an error if their share is above ``max_share``.

        Raises:
            StorageError: If permission is denied for all unreadable files.
            DataError: If any unreadable file has a different fault.
        """
        n_files = len(self.kinds)
        n_bad = int(np.count_nonzero(self.kinds))
        if not n_bad:
            return
        faults = "; ".join(self._summaries())
        summary = f"{source}: of {n_files:,} images, {faults}."
        if n_bad <= max_share * n_files:
            logger.warning("%s They will be counted as errors", summary)
            return
        forbidden_positions = np.flatnonzero(self.kinds == FORBIDDEN_PATH)
        if len(forbidden_positions):
            summary += f" {self.location_rule(forbidden_positions)}"
        n_denied = int(np.count_nonzero(self.kinds == PERMISSION_DENIED))
        error_class = StorageError if n_denied == n_bad else DataError
        raise error_class(
            f"{summary} At most {max_share:.2%} may be unreadable (--max-error-rate); "
            "nothing was begun."
        )

    def _summaries(self) -> list[str]:
        """Return a text for each fault that occurs, with the number of files and the first file."""
        summaries = []
        for kind, message in FAULT_MESSAGES.items():
            positions = np.flatnonzero(self.kinds == kind)
            if len(positions):
                fault = message.format(folder=self.folder)
                first = self.path_at(int(positions[0]))
                summaries.append(f"{len(positions):,} {fault} (the first: {first!r})")
        return summaries


def require_files(images: ImageDataset, max_share: float) -> None:
    """Raise an error if the share of unreadable files in a listing is above ``max_share``.

    The files are not opened. So this check is fast, and is made before any slow work.
    """
    faults: Faults | None = getattr(images, "faults", None)
    if faults is not None:
        faults.check(images.source, max_share)


def require_outside_listing(images: ImageDataset, output: Path) -> None:
    """Raise UsageError if an output folder would change the listing of the images.

    A data set may have the attribute ``listed_folders``. In these folders every sub-folder is a
    class (folders of images), or an error (a folder of tar files).
    """
    listed_folders: tuple[Path, ...] = getattr(images, "listed_folders", ())
    output_folder = output.resolve()
    for folder in listed_folders:
        if _is_new_in_listing(output_folder, folder.resolve()):
            raise UsageError(
                f"{output} would change what the next run reads in {folder}, a folder of images. "
                f"Give an output folder outside {folder}."
            )


def _is_new_in_listing(output: Path, listed_folder: Path) -> bool:
    """Return whether a store in ``output`` would be new in the next listing of a folder.

    Hidden folders are not listed. If ``output`` lies deeper, in a sub-folder that is there already,
    the listing stays the same, because a store has no image files.
    """
    if not output.is_relative_to(listed_folder):
        return False
    names = output.relative_to(listed_folder).parts
    is_hidden = any(name.startswith(".") for name in names)
    is_in_subfolder = len(names) > 1 and (listed_folder / names[0]).is_dir()
    return not is_hidden and not is_in_subfolder


class ChosenImages:
    """Some of a data set's images, or its first shards.

    Args:
        images: The whole data set.
        positions: The images' positions, ascending. For a ``ShardedDataset``, the first n shard
            numbers: 0, 1, ..., n - 1.
        choice: How the images were chosen, such as {"limit": 100}, for the fingerprint.
    """

    def __init__(
        self, images: ImageDataset, positions: Sequence[int], choice: Mapping[str, object]
    ) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, **choice})
        self._images = images
        self._positions = positions
        # ``isinstance`` recognises a ShardedDataset by this method, so only shards may have it
        if isinstance(images, ShardedDataset):
            self.shard_fingerprint = images.shard_fingerprint
        self.outside: tuple[str, ...] = getattr(images, "outside", ())
        self.listed_folders: tuple[Path, ...] = getattr(images, "listed_folders", ())

    @property
    def faults(self) -> Faults | None:
        """These images' faults.

        The faults hold functions, and functions cannot be pickled. So no attribute stores the
        faults.
        """
        faults: Faults | None = getattr(self._images, "faults", None)
        if faults is None:
            return None
        return faults.take(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1, read in a single pass."""
        chosen_positions = self._positions[start:stop]
        if not chosen_positions:
            return
        first = chosen_positions[0]
        last = chosen_positions[-1]
        records = self._images.records(first, last + 1)
        n_records = last - first + 1
        has_gap = n_records > len(chosen_positions)
        if not has_gap:
            # Shards always end here, because shard numbers have no gap. The loop below would be
            # wrong for shards: the loop counts a record per position, but a shard has many records.
            yield from records
            return
        position_set = set(chosen_positions)
        for position, record in enumerate(records, start=first):
            if position in position_set:
                yield record


class ImagesWithOutside:
    """A data set without some classes. Images from the left-out classes get the label -2.

    Args:
        images: The data set with all classes.
        outside: Names (folder or prompt) of the classes to leave out, or labels without a class
            (the data set's ``labels_without_class``).

    Raises:
        UsageError: If there is no such class or label, or no class would be left.
    """

    def __init__(self, images: ImageDataset, outside: Sequence[str]) -> None:
        if images.class_names is None:
            raise UsageError(
                f"{images.source} has no classes, so nothing can be outside of them. "
                "Leave --outside out."
            )
        table: ClassTable | None = getattr(images, "classes", None)
        prompt_names = images.class_names
        data_names = prompt_names if table is None else table.data_names
        _require_known_names(outside, data_names, prompt_names, images)
        labels_to_keep = _labels_to_keep(outside, data_names, prompt_names)
        if not labels_to_keep:
            raise UsageError(
                f"--outside leaves none of the {len(prompt_names)} classes of {images.source}."
            )
        self.source = images.source
        self.captioned = images.captioned
        self.class_names: tuple[str, ...] | None = tuple(prompt_names[i] for i in labels_to_keep)
        self.classes: ClassTable | None = None
        if table is not None:
            names_to_keep = tuple(data_names[i] for i in labels_to_keep)
            self.classes = replace(table, data_names=names_to_keep, names=self.class_names)
        self.fingerprint = images.fingerprint  # without ``outside``, which a run compares, too
        self.listed_folders: tuple[Path, ...] = getattr(images, "listed_folders", ())
        self.outside = tuple(sorted(set(outside)))
        self._images = images
        self._new_label_of = {old: new for new, old in enumerate(labels_to_keep)}
        # ``isinstance`` recognises a ShardedDataset by this method, so only shards may have it
        if isinstance(images, ShardedDataset):
            self.shard_fingerprint = images.shard_fingerprint

    @property
    def faults(self) -> Faults | None:
        """The images' faults, as far as known before reading."""
        faults: Faults | None = getattr(self._images, "faults", None)
        return faults

    def __len__(self) -> int:
        return len(self._images)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """Yield the images at positions start ... stop - 1."""
        for record in self._images.records(start, stop):
            if record.label is None:
                yield record
            else:
                # a removed class is not in ``_new_label_of``
                new_label = self._new_label_of.get(record.label, OUTSIDE)
                yield replace(record, label=new_label)


def _require_known_names(
    outside: Sequence[str],
    data_names: Sequence[str],
    prompt_names: Sequence[str],
    images: ImageDataset,
) -> None:
    """Raise UsageError if a name in ``outside`` is neither a class nor a label without a class.

    ``data_names`` are the class names in the data, and ``prompt_names`` the names for prompts.
    """
    labels_without_class: frozenset[str] = getattr(images, "labels_without_class", frozenset())
    known_names = {*data_names, *prompt_names, *labels_without_class}
    unknown_names = [name for name in outside if name not in known_names]
    if not unknown_names:
        return
    first_unknown = unknown_names[0]
    hint = did_you_mean(first_unknown, sorted(known_names), cutoff=0.5)
    listed_names = _list_names(data_names)
    raise UsageError(
        f"{images.source} has no class or label {first_unknown!r} for --outside; "
        f"it has {listed_names}.{hint}"
    )


def _labels_to_keep(
    outside: Sequence[str], data_names: Sequence[str], prompt_names: Sequence[str]
) -> list[int]:
    """Return the labels of the classes with neither name in ``outside``."""
    labels = []
    name_pairs = zip(data_names, prompt_names, strict=True)
    for label, (data_name, prompt_name) in enumerate(name_pairs):
        is_outside = data_name in outside or prompt_name in outside
        if not is_outside:
            labels.append(label)
    return labels


def parse_split(split: str, existing_splits: Collection[str], source: str) -> tuple[str, ...]:
    """Return the names in ``split``, where "+" joins the names, as in "validation+test".

    If a name is not in ``existing_splits``, is empty or is repeated, raise UsageError.
    """
    names = tuple(name.strip() for name in split.split("+"))
    has_repeated = len(set(names)) < len(names)
    if "" in names or has_repeated:
        raise UsageError(
            f"--split must name each split once, joined by '+'. Got {split!r} instead."
        )
    unknown_names = [name for name in names if name not in existing_splits]
    if not unknown_names:
        return names
    if not existing_splits:
        raise UsageError(f"{source} has no splits. Leave --split {split} out.")
    first_unknown = unknown_names[0]
    hint = did_you_mean(first_unknown, existing_splits, cutoff=0.5)
    listed_splits = ", ".join(sorted(existing_splits))
    raise UsageError(f"{source} has no split {first_unknown!r}; it has {listed_splits}.{hint}")


CAPTIONS_OR_CLASSES: Final = "captions replace the classes. Give --captions or --classes, not both."
MAX_LISTED: Final = 10  # maximum number of names or values in a message


@dataclass(frozen=True)
class Selection:
    """Options for opening a table, a folder or tar files.

    Attributes:
        split: Split names joined by ``+``. None for all rows.
        classes: A classes file. None if the table has the class names.
        captions: Whether to use captions even if the table has labels.
        where: Column -> value. A row is used if the row has all these values, compared as texts.
        root: Folder where paths start. Paths must stay below this folder. None: the table's folder.
        outside: Classes to leave out, and labels without a class. Images with these labels are
            outside all classes.
        follow_links: Whether links in a folder of images may lead anywhere, also to folders.
    """

    split: str | None = None
    classes: Path | None = None
    captions: bool = False
    where: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    outside: tuple[str, ...] = ()
    follow_links: bool = False

    def allowed_folders(self, table: Path) -> AllowedFolders:
        """Return the folders where a table's files are allowed."""
        if self.root is None:
            return AllowedFolders(table.parent)
        return AllowedFolders(self.root, table_folder=table.parent)

    def where_columns(self, table_columns: Sequence[str], source: str) -> list[str]:
        """Return the columns in ``where``, after a check of the table.

        If a column is missing in ``table_columns``, raise UsageError. If a column occurs twice
        there, raise DataError.
        """
        for name in self.where:
            n_columns = table_columns.count(name)
            if n_columns == 0:
                listed_columns = _list_names(table_columns)
                raise UsageError(
                    f"{source} has no column {name!r} for --where; it has {listed_columns}."
                )
            if n_columns > 1:
                raise DataError(
                    f"{source}: column {name!r} occurs {n_columns} times. Rename all but one."
                )
        return list(self.where)

    def fingerprint_entries(self) -> dict[str, object]:
        """Return the fingerprint entries for ``where``, empty without ``where``."""
        if not self.where:
            return {}
        return {"where": sorted(self.where.items())}

    def find_rows(
        self, table: pa.Table, source: str, split_column: str | None
    ) -> NDArray[np.int64]:
        """Return the selected rows' positions (N,) in the table."""
        is_chosen = np.ones(len(table), dtype=bool)
        if self.split is not None:
            splits = pa.array([], pa.string())  # without the column, parse_split raises an error
            if split_column is not None:
                splits = table[split_column].cast(pa.string())
            distinct_splits = splits.unique()
            existing_splits = [name for name in distinct_splits.to_pylist() if name]
            chosen_splits = parse_split(self.split, existing_splits, source)
            accepted_splits = pa.array(chosen_splits)
            is_in_split = pc.is_in(splits, value_set=accepted_splits)
            is_chosen &= is_in_split.to_numpy()
        for name, value in self.where.items():
            cells = cells_as_bytes(table[name], f"{source}, column {name!r}")
            accepted_values = pa.array([value.encode()], cells.type)
            has_value = pc.is_in(cells, value_set=accepted_values).to_numpy(zero_copy_only=False)
            is_still_chosen = is_chosen & has_value
            if not is_still_chosen.any():
                message = _no_row_message(source, name, value, cells, is_chosen)
                raise UsageError(message)
            is_chosen = is_still_chosen
        return np.flatnonzero(is_chosen).astype(np.int64)


def _no_row_message(
    source: str, name: str, value: str, cells: pa.Array, is_chosen: NDArray[np.bool_]
) -> str:
    """Return the message that no row has ``value`` in column ``name``, with existing values.

    ``cells`` is the column. ``is_chosen`` marks the rows that fulfil the earlier conditions.
    """
    restriction = "" if is_chosen.all() else " among those chosen so far"
    mask = pa.array(is_chosen)
    chosen_cells = cells.filter(mask).drop_null()
    values = pc.unique(chosen_cells)
    # ``_list_names`` gets an extra value, to end the list with "..."
    first_values = values.slice(0, MAX_LISTED + 1)
    first_texts = [value.decode("utf-8", "backslashreplace") for value in first_values.to_pylist()]
    return (
        f"{source} has no row with {name}={value}{restriction}; "
        f"column {name!r} has {_list_names(first_texts)}."
    )


def cells_as_bytes(column: pa.ChunkedArray, location: str) -> pa.Array:
    """Return a column's cells as bytes. Texts are not checked, and may be invalid UTF-8.

    ``location`` names the file and the column, for a DataError's message.
    """
    column_type = column.type
    if pa.types.is_nested(column_type):
        raise DataError(
            f"{location}: text is expected, one per row. Found {column_type}. Write one row for "
            "each text."
        )
    if pa.types.is_dictionary(column_type):
        column = column.cast(column_type.value_type)
    if not is_bytes_type(column.type):
        column = column.cast(pa.large_string())
    bytes_type = pa.large_binary()
    cells = column.cast(bytes_type)
    return cells.combine_chunks()


def is_bytes_type(column_type: pa.DataType) -> bool:
    """Return whether cells are bytes, in any of Arrow's three byte types."""
    checks = [pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view]
    return any(check(column_type) for check in checks)


def _list_names(names: Collection[str]) -> str:
    """Return the first names for a message. A name with invisible characters is in quotes."""
    if not names:
        return "nothing"
    listed_names = []
    for name in list(names)[:MAX_LISTED]:
        is_visible = name != "" and name.isprintable()
        listed_names.append(name if is_visible else repr(name))
    if len(names) > MAX_LISTED:
        listed_names.append("...")
    return ", ".join(listed_names)
