"""The book of labels: what was asked and answered of every photo, and what a guarantee may rest on.

A photo is on one of two sides for ever, by the hash of its picture. Predictors are fitted on labels
of the fit side. Labels of the calibration side show what is guaranteed. No predictor ever sees a
label of the calibration side, whoever asked for it and why.

The same hash puts the photos of the calibration side into one random order. Of those that a rule
may accept, the labels of all up to a position in that order count. The position is fixed before
they are asked for, so they are an independent draw, whatever the rule, in which doubt had no say. A
label from further on counts for nothing. One that is missing holds everything up. A photo that is
skipped counts as answered wrong. Labels that came unasked count as well: the user says that they
were picked at random ("given"). So a label of a photo that was chosen for being doubtful never
counts for a guarantee, unless the draw has met that photo as well.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vilu.artifacts.tables import csv_rows, read_table, write_table
from vilu.datasets.files import path_of, portable_name, text_among
from vilu.embeddings.source import say_once
from vilu.errors import NO_NAME, DataError, UsageError, nearest

Stream = Literal["given", "fit", "calibration"]
STREAMS: Final = get_args(Stream)
SKIPPED: Final = NO_NAME

KEYS: Final = ("path", "file", "filename", "image", "key")
"""Columns of a file of labels that may name the photo."""

SHOWN: Final = 3
"""Paths that a message names."""


@dataclass(frozen=True)
class Entry:
    """One photo that was asked about, or has a label.

    Attributes:
        path: Of the photo, as tables have it.
        label: None where it was asked for and nobody has answered.
        stream: Why it was asked for; "given" if it was not.
        probability: With which the draw takes a photo of the calibration side; else NaN.
        predictor: Fingerprint of the predictor that it was asked for.
        asked: When, in seconds since 1970; 0 if it was not.
        answered: When the label came; 0 without one.
        picture: Digest of the picture that the label is of; empty where a book of 0.1.0 noted none.
    """

    path: str
    label: str | None
    stream: Stream
    probability: float = math.nan
    predictor: str = ""
    asked: int = 0
    answered: int = 0
    picture: str = ""

    def is_of_another(self, picture: bytes) -> bool:
        """Whether the label was given to another picture than this, which has its path now."""
        return self.picture not in {"", picture.hex()}


COLUMNS: Final = (
    "path",
    "label",
    "stream",
    "predictor",
    "picture",
    "probability",
    "asked",
    "answered",
)
NUMBERS: Final = {
    "probability": pa.float64(),
    "failure_probability": pa.float64(),
    "asked": pa.int64(),
    "answered": pa.int64(),
}
"""Columns of tables of photos that hold no text."""


def columns_of(rows: Sequence[object], names: Iterable[str]) -> dict[str, pa.Array]:
    """Attributes of rows as the columns of a table; NaN is an empty cell."""
    columns = {}
    for name in names:
        values = [getattr(row, name) for row in rows]
        columns[name] = pa.array(values, NUMBERS.get(name, pa.string()), from_pandas=True)
    return columns


@dataclass
class LabelBook:
    """All that was asked and answered, by the path of the photo; kept in a sealed table.

    Examples:
        >>> from vilu.triage.labels import LabelBook
        >>> book = LabelBook()
        >>> book.ask(["a.jpg", "b.jpg"], "calibration", probability=0.1, predictor="f00")
        >>> book.answer({"b.jpg": "cat", "c.jpg": "dog"})
        2
        >>> [(entry.path, entry.label, entry.stream) for entry in book]
        [('a.jpg', None, 'calibration'), ('b.jpg', 'cat', 'calibration'), ('c.jpg', 'dog', 'given')]
        >>> [entry.path for entry in book.waiting()]
        ['a.jpg']
    """

    entries: dict[str, Entry] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> dict[str, str]:
        """Path to label, of those that have one."""
        labels = {}
        for entry in self:
            if entry.label is not None and entry.label != SKIPPED:
                labels[entry.path] = entry.label
        return labels

    def ask(
        self, paths: Sequence[str], stream: Stream, *, predictor: str, probability: float = math.nan
    ) -> None:
        """Note what is asked for, of photos that have no label yet."""
        now = int(time.time())
        for path in paths:
            self.entries[path] = Entry(path, None, stream, probability, predictor, now)

    def answer(self, labels: Mapping[str, str], streams: Mapping[str, str] | None = None) -> int:
        """Note labels, with the ``streams`` of those that were not asked for here.

        Returns how many are new, or differ from those before.
        """
        now = int(time.time())
        n_changed = 0
        for path, label in labels.items():
            entry = self.entries.get(path)
            if entry is None:
                entry = Entry(path, None, _unasked_stream(path, streams or {}))
            if entry.label != label:
                self.entries[path] = replace(entry, label=label, answered=now, picture="")
                n_changed += 1
        return n_changed

    def note_pictures(self, pictures: Mapping[str, bytes]) -> int:
        """Note of which pictures, by path, the new labels and skips are.

        Returns how many labels are of another picture than the path has now.
        """
        n_of_another = 0
        for path, picture in pictures.items():
            entry = self.entries.get(path)
            if entry is None:
                continue
            if entry.label is not None and not entry.picture:
                entry = replace(entry, picture=picture.hex())
                self.entries[path] = entry
            n_of_another += entry.is_of_another(picture)
        return n_of_another

    def forget(self, which: Callable[[Entry], bool]) -> None:
        """Ask no more for some of what is waiting."""
        kept_entries = {}
        for path, entry in self.entries.items():
            if entry.label is not None or not which(entry):
                kept_entries[path] = entry
        self.entries = kept_entries

    def rename(self, former: Callable[[str], str], paths: Iterable[str]) -> None:
        """Give entries of photos whose paths 0.1.0 wrote in another way the names of today."""
        present = set(paths)
        for path in present - self.entries.keys():
            before = former(path)
            if before in self.entries and before not in present:
                self.entries[path] = replace(self.entries.pop(before), path=path)

    def waiting(self) -> list[Entry]:
        """What was asked and has no answer."""
        return [entry for entry in self if entry.label is None]

    def save(self, path: Path) -> None:
        """Write the table."""
        write_table(path, columns_of(list(self), COLUMNS), {"kind": "labels"})

    @classmethod
    def load(cls, path: Path) -> LabelBook:
        """Read it back; empty where there is none yet.

        Raises:
            DataError: If it is damaged, or no book.
        """
        if not path.exists():
            return cls()
        table, metadata = read_table(path, ())
        # a book of the first 0.1.0 has no column "picture"
        has_columns = {*table.column_names, "picture"} == set(COLUMNS)
        if metadata.get("kind") != "labels" or not has_columns:
            raise DataError(
                f"{path} is no book of labels of vilu. Give the folder that `vilu triage` made."
            )
        entries = {}
        for row in table.to_pylist():
            facts = {name: value for name, value in row.items() if value is not None}
            facts.setdefault("label", None)
            if facts["stream"] == "promise":  # as 0.1.0 wrote it
                facts["stream"] = "calibration"
            entries[row["path"]] = Entry(**facts)
        return cls(entries)


def _unasked_stream(path: str, streams: Mapping[str, str]) -> Stream:
    """Stream of a label that came unasked: a random pick, unless its file says otherwise."""
    return "given" if streams.get(path, "given") == "given" else "fit"


def side_of(pictures: Iterable[bytes], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """(N,) bool, whether a picture is of the calibration side; (N,) uint64, its random position.

    Both from SHA-256 of the seed and the picture's digest: equal pictures are on one side, whatever
    they are called.
    """
    hashes = [hashlib.sha256(b"vilu.side:%d:" % seed + picture).digest() for picture in pictures]
    positions = np.frombuffer(b"".join(digest[:8] for digest in hashes), "<u8")
    is_calibration = np.array([digest[8] & 1 for digest in hashes], dtype=np.bool_)
    return is_calibration, positions


def read_labels(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of a CSV or TSV file, by the name that it gives the photo, and its streams.

    A row without a label is left out: it was asked for and has no answer yet. The book of another
    triage, a Parquet file, is read as well; what its draw has met was chosen here.

    Raises:
        DataError: If it is no such file, or names a photo twice with two labels.
        StorageError: If it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return _labels_of_book(path)
    columns, rows = csv_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    key = next((name for name in KEYS if name in columns), None)
    if key is None or "label" not in columns:
        raise DataError(
            f"{path} must have the columns path (or {', '.join(KEYS[1:])}) and label. It has "
            f"{', '.join(columns) or 'none'}."
        )
    is_ours = "stream" in columns  # there " a.jpg" and "a.jpg" are two photos
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for row in rows:
        name = row[key] if is_ours else row[key].strip()
        label = row["label"].strip()
        if not name:
            raise DataError(f"{path} line {row.line}: it names no photo in the column {key!r}.")
        if not label:
            continue
        if labels.setdefault(name, label) != label:
            raise DataError(
                f"{path} line {row.line}: {name!r} has the labels {labels[name]!r} and {label!r}."
            )
        if row.get("stream"):
            streams[name] = row["stream"]
    return labels, streams


def _labels_of_book(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The labels of a book and their streams."""
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for entry in LabelBook.load(path):
        if entry.label is not None:
            labels[entry.path] = entry.label
            streams[entry.path] = entry.stream
    return labels, streams


class PhotoNames:
    """The photos of a folder, found by what a file of labels calls them."""

    def __init__(self, photos: Sequence[str], root: Path) -> None:
        self.photos = photos
        self.root = root
        self.paths = set(photos)
        self.by_name: dict[str, list[str]] = {}
        for photo in photos:
            self.by_name.setdefault(photo.rpartition("/")[2], []).append(photo)

    def find(self, name: str) -> str | None:
        """The photo of a path below the folder, a full path, or a name that only one photo has."""
        plain = name.removeprefix("./")
        photo = text_among(plain, self.paths)
        if photo is not None:
            return photo
        path = Path(name)
        for root in (self.root.absolute(), self.root.resolve()):  # a link, and where it leads
            if path.is_relative_to(root):
                return text_among(path.relative_to(root).as_posix(), self.paths)
        same_name = self.by_name.get(text_among(plain, self.by_name) or "", [])
        if not same_name:
            return None
        if len(same_name) > 1:
            raise UsageError(
                f"{name!r} is the name of {len(same_name)} photos: "
                f"{', '.join(same_name[:SHOWN])}. Give their paths."
            )
        return same_name[0]

    def warn_of_backslash(self, name: str, source: Path) -> None:
        """Say so where a name is the text of one photo and the file name of another."""
        literal = portable_name(name)
        if literal != name and {name, literal} <= self.paths:
            say_once(
                f"{source}: {name!r} is taken for the photo with this text in decisions.csv. The "
                f"photo with a backslash in its name is {literal!r} there"
            )

    def report_missing(self, missing: Sequence[str], source: Path, *, none_matches: bool) -> None:
        """Say which names of a file are no photo; DataError where none of them is one."""
        if not missing:
            return
        if none_matches:
            raise DataError(
                f"{source} names no photo of {self.root}. The first that is not there: "
                f"{missing[0]!r}.{nearest(missing[0], self.photos)} Paths are relative to the "
                "folder of photos."
            )
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        say_once(
            f"{source}: {len(missing)} labels are of no photo in {self.root} and are left out: "
            f"{', '.join(missing[:SHOWN])}{more}"
        )


def match_photos(
    labels: Mapping[str, str], photos: Sequence[str], root: Path, source: Path
) -> dict[str, str]:
    """Photos by their names in the file ``source`` of labels; ``PhotoNames.find`` says how.

    Raises:
        DataError: If none of them is a photo of the folder, or two with two labels are one photo.
    """
    names = PhotoNames(photos, root)
    matches: dict[str, str] = {}
    missing = []
    first_name: dict[str, str] = {}
    for name, label in labels.items():
        photo = names.find(name)
        if photo is None:
            missing.append(name)
        else:
            before = labels[first_name.setdefault(photo, name)]
            if before != label:
                raise DataError(
                    f"{source}: {photo!r} has the labels {before!r} and, as {name!r}, {label!r}."
                )
            matches[name] = photo
        names.warn_of_backslash(name, source)
    names.report_missing(missing, source, none_matches=not matches)
    return matches


def name_of(label: str, names: Collection[str]) -> str | None:
    """The name that a label in a table means: itself, or the one with this text in tables."""
    name = path_of(label)
    for candidate in (label, name):
        if candidate in names:
            return candidate
    return None


def require_names(
    labels: Mapping[str, str], names: Sequence[str], outside: Sequence[str], source: Path
) -> dict[str, str]:
    """The labels by the names of their classes.

    Raises:
        DataError: If one is no class, none of those that are outside, and no skipped photo.
    """
    known = {*names, *outside, SKIPPED}
    by_path: dict[str, str] = {}
    unknown = set()
    for path, label in labels.items():
        name = name_of(label, known)
        if name is None:
            unknown.add(label)
        else:
            by_path[path] = name
    if unknown:
        raise _no_class(min(unknown), labels, len(names), known, source)
    return by_path


def _no_class(
    label: str, labels: Mapping[str, str], n_classes: int, known: Collection[str], source: Path
) -> DataError:
    """The error about a label that is no class."""
    paths = [path for path in labels if labels[path] == label]
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return DataError(
        f"{source}: {label!r} (of {paths[0]}{more}) is none of the {n_classes} classes."
        f"{nearest(label, known)} If it is none of them on purpose, say --outside {label!r}; a "
        f"photo that nobody can name has the label {SKIPPED}."
    )
