"""The book of labels: what was asked and answered of every photo, and which answers a promise may rest on.

A photo is on one of two sides for ever, by the hash of its picture: labels of one side teach, those
of the other side vouch. No predictor ever sees a label of the second side, whoever asked for it and
why.

The same hash puts the photos that vouch into one random order. Of those that a rule may accept, the
labels of all up to a place in that order count, and it is fixed before they are asked for: an
independent draw, whatever the rule, in which doubt had no say. A label from further on counts for
nothing, one that is missing holds everything up, and a photo that is skipped counts as answered
wrong. Labels that came unasked count as well: the user says that they were picked at random
("given"). So a label of a photo that was chosen for being doubtful can vouch for nothing, unless
the draw has met that photo as well.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vilu.artifacts.tables import csv_rows, read_table, write_table
from vilu.datasets.files import portable_name, text_among
from vilu.embeddings.source import say_once
from vilu.errors import NO_NAME, DataError, UsageError, nearest

Stream = Literal["given", "fit", "promise"]
STREAMS: Final = get_args(Stream)
SKIPPED: Final = NO_NAME

KEYS: Final = ("path", "file", "filename", "image", "key")
"""Columns of a file of labels that may name the photo."""

SHOWN: Final = 3  # paths that a message names


@dataclass(frozen=True)
class Entry:
    """One photo that was asked about, or has a label."""

    path: str
    label: str | None  # None: asked and not answered
    stream: Stream  # why it was asked: "given" if it was not
    probability: float = (
        math.nan
    )  # with which the draw takes a photo that vouches; NaN where none did
    predictor: str = ""  # fingerprint of the predictor in force when it was asked
    asked: int = 0  # seconds since 1970; 0 where it was not
    answered: int = 0  # the same of the label
    picture: str = ""  # digest of the picture that it is of; empty where a book of 0.1.0 noted none

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
    **dict.fromkeys(("probability", "failure_probability"), pa.float64()),
    **dict.fromkeys(("asked", "answered"), pa.int64()),
}
"""Columns of tables of photos that hold no text."""


def columns_of(rows: Iterable[object], names: Iterable[str]) -> dict[str, pa.Array]:
    """Attributes of rows as the columns of a table; NaN is an empty cell."""
    found = list(rows)
    return {
        name: pa.array(
            [getattr(one, name) for one in found], NUMBERS.get(name, pa.string()), from_pandas=True
        )
        for name in names
    }


@dataclass
class LabelBook:
    """All that was asked and answered, by the path of the photo; kept in a sealed table.

    Examples:
        >>> from vilu.triage.labels import LabelBook
        >>> book = LabelBook()
        >>> book.ask(["a.jpg", "b.jpg"], "promise", probability=0.1, predictor="f00")
        >>> book.answer({"b.jpg": "cat", "c.jpg": "dog"})
        2
        >>> [(one.path, one.label, one.stream) for one in book]
        [('a.jpg', None, 'promise'), ('b.jpg', 'cat', 'promise'), ('c.jpg', 'dog', 'given')]
        >>> [one.path for one in book.waiting()]
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
        return {
            one.path: one.label for one in self if one.label is not None and one.label != SKIPPED
        }

    def ask(
        self, paths: Sequence[str], stream: Stream, *, predictor: str, probability: float = math.nan
    ) -> None:
        """Note what is asked for, of photos that have no label yet."""
        now = int(time.time())
        self.entries |= {
            path: Entry(path, None, stream, probability, predictor, now) for path in paths
        }

    def answer(self, labels: Mapping[str, str], streams: Mapping[str, str] | None = None) -> int:
        """Note labels; how many are new or other than before.

        ``streams``: of those that were not asked here.
        """
        now, changed = int(time.time()), 0
        for path, label in labels.items():
            old = self.entries.get(path)
            if old is None:
                old = Entry(
                    path, None, "given" if (streams or {}).get(path, "given") == "given" else "fit"
                )
            if old.label != label:
                self.entries[path] = replace(old, label=label, answered=now, picture="")
                changed += 1
        return changed

    def note_pictures(self, pictures: Mapping[str, bytes]) -> int:
        """Note what new labels, and skips, are of, by path; how many are of another picture than is there now."""
        for one in [one for one in self if one.label is not None and one.path in pictures]:
            self.entries[one.path] = replace(one, picture=one.picture or pictures[one.path].hex())
        return sum(one.is_of_another(pictures[one.path]) for one in self if one.path in pictures)

    def forget(self, which: Callable[[Entry], bool]) -> None:
        """Ask no more for some of what is waiting."""
        self.entries = {
            path: one
            for path, one in self.entries.items()
            if one.label is not None or not which(one)
        }

    def rename(self, former: Callable[[str], str], paths: Iterable[str]) -> None:
        """Give entries of photos whose paths 0.1.0 wrote in another way the names of today."""
        present = set(paths)
        for path in present - self.entries.keys():
            before = former(path)
            if before in self.entries and before not in present:
                self.entries[path] = replace(self.entries.pop(before), path=path)

    def waiting(self, stream: Stream | None = None) -> list[Entry]:
        """What was asked and has no answer."""
        return [one for one in self if one.label is None and stream in {None, one.stream}]

    def save(self, path: Path) -> None:
        """Write the table."""
        write_table(path, columns_of(self, COLUMNS), {"kind": "labels"})

    @classmethod
    def load(cls, path: Path) -> LabelBook:
        """Read it back; empty where there is none yet.

        Raises:
            DataError: If it is damaged, or no book.
        """
        if not path.exists():
            return cls()
        table, said = read_table(path, ())
        if said.get("kind") != "labels" or {*table.column_names, "picture"} != {*COLUMNS}:
            raise DataError(
                f"{path} is no book of labels of vilu. Give the folder that `vilu triage` made."
            )
        numbers = {"probability": math.nan}
        rows = [
            {k: v for k, v in row.items() if v is not None or k == "label"}
            for row in table.to_pylist()
        ]
        return cls({row["path"]: Entry(**{**numbers, **row}) for row in rows})


def side_of(pictures: Iterable[bytes], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """(N,) bool, whether a picture vouches (else it teaches), and (N,) uint64, its place in the random order.

    Both from SHA-256 of the seed and the picture's digest: equal pictures are on one side, whatever
    they are called.
    """
    hashes = [hashlib.sha256(b"vilu.side:%d:" % seed + picture).digest() for picture in pictures]
    order = np.frombuffer(b"".join(one[:8] for one in hashes), "<u8")
    vouches = np.array([one[8] & 1 for one in hashes], dtype=np.bool_)
    return vouches, order


def read_labels(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Labels by the name that a CSV or TSV file gives the photo, and their streams where it has such a column.

    A row without a label is left out: it was asked for and has no answer yet.

    Raises:
        DataError: If it is no such file, or names a photo twice with two labels.
        StorageError: If it cannot be read.
    """
    columns, rows = csv_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    key = next((name for name in KEYS if name in columns), None)
    if key is None or "label" not in columns:
        raise DataError(
            f"{path} must have the columns path (or {', '.join(KEYS[1:])}) and label. It has "
            f"{', '.join(columns) or 'none'}."
        )
    exact = (
        str if "stream" in columns else str.strip
    )  # tables of ours: " a.jpg" and "a.jpg" are two photos
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for row in rows:
        name = exact(row[key])
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


def match_photos(
    labels: Mapping[str, str], photos: Sequence[str], root: Path, source: Path
) -> dict[str, str]:
    """Name in a file of labels to photo: by its path below the folder, its full path, or a name that only one has.

    Raises:
        DataError: If none of them is a photo of the folder, or two with two labels are one photo.
    """
    known, by_name = set(photos), dict[str, list[str]]()
    for photo in photos:
        by_name.setdefault(photo.rpartition("/")[2], []).append(photo)
    found, missing, first = {}, [], dict[str, str]()
    for name in labels:
        match = _match(name, known, by_name, (root.absolute(), root.resolve()))
        if match is None:
            missing.append(name)
        elif (label := labels[first.setdefault(match, name)]) != labels[name]:
            raise DataError(
                f"{source}: {match!r} has the labels {label!r} and, as {name!r}, {labels[name]!r}."
            )
        else:
            found[name] = match
        literal = portable_name(name)
        if literal != name and {name, literal} <= known:
            say_once(
                f"{source}: {name!r} is taken for the photo with this text in decisions.csv. The "
                f"photo with a backslash in its name is {literal!r} there"
            )
    if missing and not found:
        question = nearest(missing[0], photos)
        raise DataError(
            f"{source} names no photo of {root}. The first that is not there: {missing[0]!r}.{question} Paths are "
            "relative to the folder of photos."
        )
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        say_once(
            f"{source}: {len(missing)} labels are of no photo in {root} and are left out: "
            f"{', '.join(missing[:SHOWN])}{more}"
        )
    return found


def _match(
    name: str, known: set[str], by_name: Mapping[str, list[str]], roots: Iterable[Path]
) -> str | None:
    plain = name.removeprefix("./")
    text = text_among(plain, known)
    if text is not None:
        return text
    path = Path(name)
    if root := next(
        (one for one in roots if path.is_relative_to(one)), None
    ):  # a link to it, and where it leads
        return text_among(path.relative_to(root).as_posix(), known)
    same = by_name.get(text_among(plain, by_name) or "", ())
    if len(same) > 1:
        raise UsageError(
            f"{name!r} is the name of {len(same)} photos: {', '.join(same[:SHOWN])}. Give their paths."
        )
    return same[0] if same else None


def check_names(
    labels: Mapping[str, str], names: Sequence[str], outside: Sequence[str], source: Path
) -> None:
    """Refuse labels that are neither a class, nor one of those that are outside, nor a skipped photo."""
    known = {*names, *outside, SKIPPED}
    if unknown := sorted({label for label in labels.values() if label not in known}):
        of = [path for path, label in labels.items() if label == unknown[0]]
        raise DataError(
            f"{source}: {unknown[0]!r} (of {of[0]}"
            f"{f' and {len(of) - 1} more' if len(of) > 1 else ''}) is none of the {len(names)} classes."
            f"{nearest(unknown[0], known)} If it is none of them on purpose, say --outside {unknown[0]!r}; a photo "
            f"that nobody can name has the label {SKIPPED}."
        )
