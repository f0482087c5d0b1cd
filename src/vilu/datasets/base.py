"""What every data set offers, its splits, and some of its rows."""

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
from vilu.datasets.files import Bounds, OutsideError
from vilu.errors import OUTSIDE, DataError, StorageError, UsageError, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """One image, not yet read or decoded.

    Attributes:
        key: Stable identifier, unique in the data set (relative POSIX path, or the ``key`` column,
            or row number).
        label: Index into the data set's class names; None where unknown, -2 where it is none of
            them.
        read: Returns the encoded bytes; may raise OSError or ``BadImage``. Called from a decoding
            thread.
        caption: Returns the caption; may raise OSError or ``BadImage`` (stage "text"). None where
            images have none.
        position: In the data set; None where it follows from the order of the records.
        content: Returns what the picture is recognised by, where that is not the encoded bytes.
            Called after ``read``.
    """

    key: str
    label: int | None
    read: Callable[[], bytes]
    caption: Callable[[], str] | None = None
    position: int | None = None
    content: Callable[[], bytes] | None = None


@runtime_checkable
class ImageDataset(Protocol):
    """Images in a fixed order, addressable by position so that any part can be redone alone.

    Attributes:
        source: Where it came from, for people.
        class_names: Names in label order (one table per data set, the same for all splits); None
            when unlabelled.
        captioned: Whether records have captions, which are then the candidates; such a set has no
            class names.
        fingerprint: Hash of the listing (keys, labels, sizes), so that a changed input is noticed
            on resume.
    """

    source: str
    class_names: tuple[str, ...] | None
    captioned: bool
    fingerprint: str

    def __len__(self) -> int:
        """Number of images, readable or not; of a ``ShardedDataset``, of shards."""

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The images at positions start ... stop - 1, in order; of a ``ShardedDataset``, those in these shards."""


SHARD: Final = (
    2**32
    # positions of each shard: an image's is the number of its shard times this, plus its number there
)


@runtime_checkable
class ShardedDataset(ImageDataset, Protocol):
    """Images in shards (tar files), of which only reading tells how many each holds; a part is some whole shards.

    Every sample is a record with a ``position``: the number of its shard times 2^32 plus its number
    there. A sample that cannot be used is a record whose ``read`` raises ``BadImage``, so that it
    is counted and listed. ``fingerprint`` covers the names of the shards; their content is
    ``shard_fingerprint``'s, part by part, so that a mended shard costs its own part only.
    """

    def shard_fingerprint(self, start: int, stop: int) -> str:
        """Hash of sizes and times of modification of shards start ... stop - 1."""


FINE, MISSING, ELSEWHERE, DENIED = range(4)
FAULTS: Final = {
    MISSING: "files are missing below {folder}",
    ELSEWHERE: "paths lead out of {folder}",
    DENIED: "files may not be read: permission denied",
}
"""What a listing knows of a file without reading it."""


def fault_of(status: os.stat_result | OSError | None, path: Callable[[], str]) -> int:
    """The fault of a file at a path whose status is this, or None, or this error."""
    if isinstance(status, os.stat_result):  # mostly all may read it, and nobody need be asked
        return FINE if status.st_mode & stat.S_IROTH or os.access(path(), os.R_OK) else DENIED
    if status is None:
        return MISSING
    return (
        ELSEWHERE
        if isinstance(status, OutsideError)
        else DENIED
        if status.errno == errno.EACCES
        else MISSING
    )


@dataclass(frozen=True)
class Faults:
    """Which files of a listing cannot be read, as far as the listing shows it."""

    kinds: NDArray[np.uint8]  # (N,) uint8
    folder: Path  # where they are looked for
    path: Callable[[int], str]  # position -> path as it is listed
    # positions of those that are out of bounds -> where files must lie, and what to do
    rule: Callable[[NDArray[np.int64]], str]

    def of(self, positions: Sequence[int]) -> Faults:
        """Those of some positions."""
        places = np.asarray(positions, dtype=np.int64)
        path, rule = self.path, self.rule
        return Faults(
            self.kinds[places],
            self.folder,
            lambda i: path(int(places[i])),
            lambda rows: rule(places[rows]),
        )

    def require(self, source: str, budget: float) -> None:
        """DataError (StorageError where rights are lacking) if more than a share cannot be read; a warning if fewer."""
        bad = np.flatnonzero(self.kinds)
        if not len(bad):
            return
        rows = {kind: np.flatnonzero(self.kinds == kind) for kind in FAULTS}
        found = [
            f"{len(of_kind):,} {FAULTS[kind].format(folder=self.folder)} (the first: {self.path(int(of_kind[0]))!r})"
            for kind, of_kind in rows.items()
            if len(of_kind)
        ]
        told = f"{source}: of {len(self.kinds):,} images, {'; '.join(found)}."
        if len(bad) <= budget * len(self.kinds):
            log.warning("%s They will be counted as errors", told)
            return
        rule = f" {self.rule(rows[ELSEWHERE])}" if len(rows[ELSEWHERE]) else ""
        error = StorageError if len(rows[DENIED]) == len(bad) else DataError
        raise error(
            f"{told}{rule} At most {budget:.2%} may be unreadable (--max-error-rate); nothing was begun."
        )


def require_files(images: ImageDataset, budget: float) -> None:
    """Refuse a listing of which a larger share than ``budget`` cannot be read, before anything slow is begun."""
    faults: Faults | None = getattr(images, "faults", None)
    if faults is not None:
        faults.require(images.source, budget)


class Chosen:
    """Some images of a data set, or its first shards; source, names and captions are the whole's.

    ``positions`` ascend; of a ``ShardedDataset``, whose records carry their positions, they are the
    first ones. ``mark`` is what sets them apart, for the fingerprint.
    """

    def __init__(
        self, images: ImageDataset, positions: Sequence[int], mark: Mapping[str, object]
    ) -> None:
        self.source = images.source
        self.class_names = images.class_names
        self.captioned = images.captioned
        self.fingerprint = digest({"dataset": images.fingerprint, **mark})
        self._images, self._positions = images, positions
        if isinstance(images, ShardedDataset):  # only then is this one too
            self.shard_fingerprint = images.shard_fingerprint
        self.outside: tuple[str, ...] = getattr(images, "outside", ())

    @property
    def faults(self) -> Faults | None:
        """Those of the whole that are of these; made when asked for, since other processes take no functions."""
        faults: Faults | None = getattr(self._images, "faults", None)
        return faults and faults.of(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The images at positions start ... stop - 1, read in one pass."""
        wanted = self._positions[start:stop]
        if not wanted:
            return
        passed = self._images.records(wanted[0], wanted[-1] + 1)
        if wanted[-1] - wanted[0] < len(
            wanted
        ):  # no gap, and of shards a position has many records
            yield from passed
            return
        kept = set(wanted)
        yield from (
            record for position, record in enumerate(passed, start=wanted[0]) if position in kept
        )


class WithOutside:
    """A data set without some of its classes, whose images are of none of those that are left.

    ``outside`` names classes, as the data have them or as prompts do, or labels beyond the classes;
    those that the data set takes for outside are its ``strays``.

    Raises:
        UsageError: If there is no such class or label, or no class would be left.
    """

    def __init__(self, images: ImageDataset, outside: Sequence[str]) -> None:
        if images.class_names is None:
            raise UsageError(
                f"{images.source} has no classes, so nothing can be outside of them. Leave --outside out."
            )
        table: ClassTable | None = getattr(images, "classes", None)
        prompts = images.class_names
        names = list(zip(prompts if table is None else table.folders, prompts, strict=True))
        strays: frozenset[str] = getattr(images, "strays", frozenset())
        there = list(dict.fromkeys([*(name for both in names for name in both), *sorted(strays)]))
        unknown = next((name for name in outside if name not in there), None)
        if unknown is not None:
            hint = nearest(unknown, there, cutoff=0.5)
            shown = _listed([folder for folder, _ in names])
            raise UsageError(
                f"{images.source} has no class or label {unknown!r} for --outside; it has {shown}.{hint}"
            )
        kept = [label for label, both in enumerate(names) if set(outside).isdisjoint(both)]
        if not kept:
            raise UsageError(
                f"--outside leaves none of the {len(names)} classes of {images.source}."
            )
        self.source, self.captioned = images.source, images.captioned
        self.class_names: tuple[str, ...] | None = tuple(prompts[label] for label in kept)
        folders = tuple(names[label][0] for label in kept)
        self.classes = (
            None if table is None else replace(table, folders=folders, names=self.class_names)
        )
        self.fingerprint = images.fingerprint
        self.outside = tuple(sorted(set(outside)))
        self._images, self._label = images, {label: place for place, label in enumerate(kept)}
        if isinstance(images, ShardedDataset):  # only then is this one too
            self.shard_fingerprint = images.shard_fingerprint

    @property
    def faults(self) -> Faults | None:
        """What cannot be read, as far as the whole's listing shows it."""
        faults: Faults | None = getattr(self._images, "faults", None)
        return faults

    def __len__(self) -> int:
        return len(self._images)

    def records(self, start: int, stop: int) -> Iterator[ImageRecord]:
        """The images at positions start ... stop - 1."""
        for record in self._images.records(start, stop):
            label = None if record.label is None else self._label.get(record.label, OUTSIDE)
            yield replace(record, label=label)


def parse_split(split: str, available: Collection[str], source: str) -> tuple[str, ...]:
    """The names in ``split``, each once and each available."""
    names = tuple(name.strip() for name in split.split("+"))
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(
            f"--split must name each split once, joined by '+'. Got {split!r} instead."
        )
    unknown = next((name for name in names if name not in available), None)
    if unknown is None:
        return names
    if not available:
        raise UsageError(f"{source} has no splits. Leave --split {split} out.")
    hint = nearest(unknown, available, cutoff=0.5)
    raise UsageError(
        f"{source} has no split {unknown!r}; it has {', '.join(sorted(available))}.{hint}"
    )


CAPTIONS_OR_CLASSES: Final = (
    "captions take the place of classes. Give --captions or --classes, not both."
)
SHOWN: Final = 10  # values of a column that a message lists


@dataclass(frozen=True)
class Selection:
    """What is asked of a table."""

    split: str | None = None  # names of splits joined by ``+``; None for all rows
    classes: Path | None = None  # a classes file; None where the table names its classes itself
    captions: bool = False  # whether captions are asked for even where there are labels
    # only rows that hold these values, by column; values are compared as text
    where: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = (
        None  # folder that paths of images are relative to and stay below; None for the table's own
    )
    outside: tuple[
        str, ...
    ] = ()  # names of classes, or labels beyond them, whose images are of none of the classes

    def bounds(self, table: Path) -> Bounds:
        """Where the files of a table may be."""
        return Bounds(table.parent) if self.root is None else Bounds(self.root, home=table.parent)

    def columns(self, names: Sequence[str], source: str) -> list[str]:
        """The columns of ``where``."""
        for name in self.where:
            if name not in names:
                raise UsageError(
                    f"{source} has no column {name!r} for --where; it has {_listed(names)}."
                )
            if names.count(name) > 1:
                raise DataError(
                    f"{source}: column {name!r} occurs {names.count(name)} times. Rename all but one."
                )
        return list(self.where)

    def fingerprint(self) -> dict[str, object]:
        """What of it decides which rows there are, beside the split; empty for all rows."""
        return {"where": sorted(self.where.items())} if self.where else {}

    def rows(self, table: pa.Table, source: str, split_column: str | None) -> NDArray[np.int64]:
        """(N,) positions of the rows."""
        chosen = np.ones(len(table), dtype=bool)
        if self.split is not None:
            column = (
                pa.array([], pa.string())
                if split_column is None
                else table[split_column].cast(pa.string())
            )
            wanted = parse_split(
                self.split, [value for value in column.unique().to_pylist() if value], source
            )
            chosen &= pc.is_in(column, value_set=pa.array(wanted)).to_numpy()
        for name, value in self.where.items():
            cells = bytes_of(table[name], f"{source}, column {name!r}")
            kept = chosen & pc.is_in(
                cells, value_set=pa.array([value.encode()], cells.type)
            ).to_numpy(False)
            if not kept.any():
                present = (
                    pc.unique(cells.filter(pa.array(chosen)).drop_null())
                    .slice(0, SHOWN + 1)
                    .to_pylist()
                )
                raise UsageError(
                    f"{source} has no row with {name}={value}"
                    f"{' among those chosen so far' if not chosen.all() else ''}; column {name!r} has "
                    f"{_listed([data.decode('utf-8', 'backslashreplace') for data in present])}."
                )
            chosen = kept
        return np.flatnonzero(chosen).astype(np.int64)


def bytes_of(column: pa.ChunkedArray, where: str) -> pa.Array:
    """The cells of a column as the UTF-8 bytes of their text; those of strings are not checked."""
    kind = column.type
    if pa.types.is_nested(kind):
        raise DataError(
            f"{where}: text is expected, one per row. Found {kind}. Write one row for each."
        )
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if not is_binary(column.type):
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary()).combine_chunks()


def is_binary(kind: pa.DataType) -> bool:
    """Whether cells are bytes, in any of the three layouts."""
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(
        repr(name) if not name.isprintable() or not name else name for name in list(names)[:SHOWN]
    )
    return (shown or "nothing") + (", ..." if len(names) > SHOWN else "")
