"""The label book: the requested labels, the given labels, and the labels that count.

Every photo is on the fit side or on the calibration side, and never changes sides. The picture's
hash decides:

- Fit side: predictors are fitted on the labels of these photos.
- Calibration side: guarantees rest on the labels of these photos. No predictor is fitted on them.

The same hash puts the calibration-side photos into a random order. These labels count for a
guarantee:

1. First a position in the order is fixed. Then a run asks for the labels of all photos before this
   position that the rule may accept. These labels count once all have come. Because the order is
   random, they are a random sample of the photos that the rule may accept.
2. A skipped photo, which nobody can name, counts as a wrong answer.
3. Labels that nobody asked for ("given") count, too, because the photos are assumed to be picked at
   random. Such a label does not count if the file names another stream.
4. No other label counts. So if a photo was chosen for its uncertainty, the label counts only if the
   photo is also in the draw.
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
from vilu.datasets.files import matching_text, original_path, portable_name
from vilu.embeddings.source import warn_once
from vilu.errors import NO_NAME, OUTSIDE_NAME, DataError, UsageError, did_you_mean
from vilu.text import plural

Stream = Literal["given", "fit", "calibration"]
"""Why a label was asked for, or "given" if nobody asked for the label (``Entry.stream``)."""

STREAMS: Final = get_args(Stream)
"""All streams."""

SKIPPED: Final = NO_NAME
"""The label for a photo that nobody can name."""

PATH_COLUMNS: Final = ("path", "file", "filename", "image", "key")
"""Possible names for the photo column in a label file. The first match is used."""

PATHS_SHOWN: Final = 3
"""Maximum number of paths in a message."""


@dataclass(frozen=True)
class Entry:
    """A photo's label, with the time and the reason of the request.

    Attributes:
        path: The photo's path, as tables write it.
        label: The label, or None if the label was requested and has not come.
        stream: Why the label was requested: "fit" or "calibration". "given" if nobody requested the
            label. Then the photo counts as picked at random.
        probability: Probability with which the draw takes a calibration-side photo. NaN if no draw
            has requested the label.
        predictor: Fingerprint of the predictor for which the label was requested.
        asked: Request time in seconds since 1970, or 0 if nobody asked for the label.
        answered: Label time in seconds since 1970, or 0 without a label.
        picture: Digest of the labelled picture. Empty if the picture is not known, as in books by
            version 0.1.0.
    """

    path: str
    label: str | None
    stream: Stream
    probability: float = math.nan
    predictor: str = ""
    asked: int = 0
    answered: int = 0
    picture: str = ""

    def was_another_picture(self, picture: bytes) -> bool:
        """Return whether the photo had a different picture than ``picture`` when it was labelled.

        If the labelled picture is not known, return False.
        """
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
"""The columns of a book, in file order: the attributes of ``Entry``."""

NUMBER_TYPES: Final = {
    "probability": pa.float64(),
    "failure_probability": pa.float64(),
    "quantile": pa.float64(),
    "asked": pa.int64(),
    "answered": pa.int64(),
}
"""Maps the number columns, in all photo tables, to types."""


def columns_of(rows: Sequence[object], names: Iterable[str]) -> dict[str, pa.Array]:
    """Make columns from attributes of the rows, a column per name. NaN becomes an empty cell."""
    columns = {}
    for name in names:
        values = [getattr(row, name) for row in rows]
        column_type = NUMBER_TYPES.get(name, pa.string())
        columns[name] = pa.array(values, column_type, from_pandas=True)
    return columns


@dataclass(frozen=True)
class GivenFile:
    """The labels in a file given to a run.

    Attributes:
        labels: Maps photo paths to labels.
        streams: Maps photo paths to the streams of these labels, as named in the file.
        answers: Maps former paths of renamed photos to labels. Each label answers an open request.
        names: All photo names to match by name, also names without a photo.
        labelled_pictures: Entries to match by picture, whatever the paths, if the file is a book.
    """

    labels: dict[str, str]
    streams: dict[str, str]
    answers: dict[str, str]
    names: list[str]
    labelled_pictures: list[Entry] = field(default_factory=list)


@dataclass
class LabelBook:
    """All requested and all given labels.

    Attributes:
        entries: Maps a photo's path to its entry.

    Examples:
        >>> from vilu.triage.labels import LabelBook
        >>> book = LabelBook()
        >>> book.request_labels(["a.jpg", "b.jpg"], "calibration", predictor="8a41b0")
        >>> n_noted = book.note_labels({"b.jpg": "cat", "c.jpg": "dog"})
        >>> book.entries["c.jpg"].stream  # nobody asked for this label
        'given'
        >>> [entry.path for entry in book.waiting_entries()]  # asked for, but not answered
        ['a.jpg']
    """

    entries: dict[str, Entry] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> dict[str, str]:
        """Map paths to labels. Photos without a label and skipped photos are left out."""
        labels = {}
        for entry in self:
            if entry.label is not None and entry.label != SKIPPED:
                labels[entry.path] = entry.label
        return labels

    def has_label(self, path: str) -> bool:
        """Return whether a photo has a label, or was skipped."""
        entry = self.entries.get(path)
        return entry is not None and entry.label is not None

    def request_labels(
        self, paths: Sequence[str], stream: Stream, *, predictor: str, probability: float = math.nan
    ) -> None:
        """Note requests for photo labels. Existing labels of the photos stay.

        Args:
            paths: Photo paths.
            stream: Why the labels are asked for.
            predictor: Fingerprint of the predictor for which the labels are asked.
            probability: The draw's probability (``Entry.probability``).
        """
        now = int(time.time())
        for path in paths:
            new_entry = Entry(path, label=None, stream=stream)
            entry = self.entries.get(path, new_entry)
            self.entries[path] = replace(
                entry, stream=stream, probability=probability, predictor=predictor, asked=now
            )

    def note_labels(
        self, labels: Mapping[str, str], streams: Mapping[str, str] | None = None
    ) -> int:
        """Note labels. Return how many labels are new or changed.

        Args:
            labels: Maps paths to labels.
            streams: Maps paths to streams, for photos without an entry.
        """
        now = int(time.time())
        n_noted = 0
        for path, label in labels.items():
            entry = self.entries.get(path)
            if entry is None:
                stream = _unasked_stream(path, streams or {})
                entry = Entry(path, label=None, stream=stream)
            if entry.label != label:
                # The labelled picture is not known yet. ``note_pictures`` notes it later.
                self.entries[path] = replace(entry, label=label, answered=now, picture="")
                n_noted += 1
        return n_noted

    def note_pictures(self, pictures: Mapping[str, bytes]) -> int:
        """Note the pictures of new requests and of new labels.

        ``pictures`` maps paths to picture digests. Returns how many labelled photos have another
        picture now than the labelled picture.
        """
        n_photos_changed = 0
        for path, picture in pictures.items():
            entry = self.entries.get(path)
            if entry is None:
                continue
            if not entry.picture:
                self.entries[path] = replace(entry, picture=picture.hex())
            elif entry.label is not None:
                n_photos_changed += entry.was_another_picture(picture)
        return n_photos_changed

    def add_label(self, entry: Entry) -> None:
        """Add an entry with a label. An entry for another picture at its path is set aside."""
        present = self.entries.get(entry.path)
        if present is not None and present.picture not in {"", entry.picture}:
            self._set_aside(present)
        self.entries[entry.path] = entry

    def answer_requests(self, answers: Mapping[str, str]) -> None:
        """Note answers to open requests. Each entry keeps the picture of the request."""
        now = int(time.time())
        for path, label in answers.items():
            entry = self.entries.get(path)
            if entry is not None and entry.label is None:
                self.entries[path] = replace(entry, label=label, answered=now)

    def set_aside_other_pictures(
        self, labels: Mapping[str, str], picture_of_path: Mapping[str, bytes]
    ) -> None:
        """Set a label aside if its path has another picture now, and a new label in ``labels``.

        So the new label does not replace the label of the earlier picture.
        """
        for path, label in labels.items():
            entry = self.entries.get(path)
            if entry is None or entry.label in {None, label} or path not in picture_of_path:
                continue
            if entry.was_another_picture(picture_of_path[path]):
                del self.entries[path]
                self._set_aside(entry)

    def _set_aside(self, entry: Entry) -> None:
        """Keep an entry under a path that no photo has, because its path has another picture.

        The new path is, for example, "a.jpg (8a41b0c2)".
        """
        path = f"{entry.path} ({entry.picture[:8]})"
        while path in self.entries:
            path += "'"
        self.entries[path] = replace(entry, path=path)

    def follow_pictures(self, picture_of_path: Mapping[str, bytes]) -> int:
        """Move every entry to a photo that has the entry's picture now (``places_of_entries``).

        An entry that is not moved stays at its path, or is displaced (``_displaced_entries``). A
        displaced label is set aside, and a displaced request is removed.

        ``picture_of_path`` maps the paths of all photos to picture digests. Returns how many
        entries have lost their path.
        """
        entries = [entry for entry in self if entry.picture]
        # a label without a known picture stays at its path
        reserved_paths = {entry.path for entry in self if entry.label and not entry.picture}
        places = places_of_entries(entries, picture_of_path, reserved_paths)
        taken_paths = {*places.values(), *reserved_paths}
        moved_entries = []
        for entry in entries:
            place = places.get(entry.path)
            if place is not None and place != entry.path:
                moved_entries.append(entry)
        displaced_entries = _displaced_entries(entries, places, taken_paths, picture_of_path)
        for entry in (*moved_entries, *displaced_entries):
            del self.entries[entry.path]
        for entry in moved_entries:
            path = places[entry.path]
            self.entries[path] = replace(entry, path=path)
        for entry in displaced_entries:
            if entry.label is not None:
                self._set_aside(entry)
        return len(moved_entries) + len(displaced_entries)

    def withdraw_requests(self, is_to_withdraw: Callable[[Entry], bool]) -> None:
        """Remove entries for which ``is_to_withdraw`` is True. Entries with a label always stay."""
        remaining_entries = {}
        for path, entry in self.entries.items():
            is_removed = entry.label is None and is_to_withdraw(entry)
            if not is_removed:
                remaining_entries[path] = entry
        self.entries = remaining_entries

    def rename_paths(self, former_text_of: Callable[[str], str], paths: Iterable[str]) -> None:
        """Rename entries from books by version 0.1.0 to the present path form.

        Args:
            former_text_of: Returns version 0.1.0's text for a path.
            paths: The paths of all photos, as tables write them now.
        """
        present_paths = set(paths)
        for path in present_paths - self.entries.keys():
            former_path = former_text_of(path)
            # If the former path is now another photo's path, the entry belongs to that photo.
            if former_path in self.entries and former_path not in present_paths:
                entry = self.entries.pop(former_path)
                self.entries[path] = replace(entry, path=path)

    @property
    def has_drawn(self) -> bool:
        """Whether a draw has ever asked for a label, for a guarantee."""
        return any(entry.stream == "calibration" for entry in self)

    def waiting_entries(self) -> list[Entry]:
        """Return the entries that still wait for a label."""
        return [entry for entry in self if entry.label is None]

    def save(self, path: Path) -> None:
        """Write the book as a table."""
        columns = columns_of(list(self), COLUMNS)
        write_table(path, columns, {"kind": "labels"})

    @classmethod
    def load(cls, path: Path) -> LabelBook:
        """Read a book. Without a file, return an empty book.

        Raises:
            DataError: If the file is damaged or is no label book.
        """
        if not path.exists():
            return cls()
        table, metadata = read_table(path, ())
        # Early books by version 0.1.0 have no column "picture".
        has_columns = {*table.column_names, "picture"} == set(COLUMNS)
        if metadata.get("kind") != "labels" or not has_columns:
            raise DataError(
                f"{path} is no book of labels of vilu. Give the folder that `vilu triage` made."
            )
        entries = {}
        for row in table.to_pylist():
            facts = {name: value for name, value in row.items() if value is not None}
            facts.setdefault("label", None)  # an entry without a label has an empty cell
            if facts["stream"] == "promise":  # the stream's name in version 0.1.0
                facts["stream"] = "calibration"
            entries[row["path"]] = Entry(**facts)
        return cls(entries)


def places_of_entries(
    entries: Iterable[Entry],
    picture_of_path: Mapping[str, bytes],
    reserved_paths: Collection[str] = (),
) -> dict[str, str]:
    """Find for every entry a photo that has the entry's picture now.

    No photo gets two entries. An entry whose path still has the picture keeps the path. Each other
    entry gets the first path that has the picture and no entry yet. Labels come before requests,
    and a later label before an earlier one. An entry is left out if there is no such path.

    Args:
        entries: Entries with a known picture, each with another path.
        picture_of_path: Maps the paths of all photos to picture digests.
        reserved_paths: Paths that no entry may get.

    Returns:
        Maps the paths of the entries to the present paths.
    """
    paths_of_picture: dict[str, list[str]] = {}
    for path, picture in picture_of_path.items():
        paths_of_picture.setdefault(picture.hex(), []).append(path)
    places = {}
    entries_elsewhere = []
    for entry in entries:
        if entry.path in paths_of_picture.get(entry.picture, ()):
            places[entry.path] = entry.path
        else:
            entries_elsewhere.append(entry)
    entries_elsewhere.sort(key=_latest_label_first)
    taken_paths = {*places, *reserved_paths}
    for entry in entries_elsewhere:
        for path in paths_of_picture.get(entry.picture, ()):
            if path not in taken_paths:
                places[entry.path] = path
                taken_paths.add(path)
                break
    return places


def _displaced_entries(
    entries: Iterable[Entry],
    places: Mapping[str, str],
    taken_paths: Collection[str],
    picture_of_path: Mapping[str, bytes],
) -> list[Entry]:
    """Return the entries that have no place (``places_of_entries``) and lose their path.

    Such an entry loses its path in two cases:

    - The entry of another photo takes the path.
    - The path has another picture now, and only other photos have the entry's picture. If no photo
      has this picture, the photo may only have been edited, and the entry keeps its path.
    """
    present_pictures = {picture.hex() for picture in picture_of_path.values()}
    displaced_entries = []
    for entry in entries:
        is_replaced = entry.path in picture_of_path and entry.picture in present_pictures
        if entry.path not in places and (is_replaced or entry.path in taken_paths):
            displaced_entries.append(entry)
    return displaced_entries


def _latest_label_first(entry: Entry) -> tuple[bool, int]:
    """Return a sort key: labels before requests, and later labels before earlier labels."""
    return entry.label is None, -entry.answered


def _unasked_stream(path: str, streams: Mapping[str, str]) -> Stream:
    """Return the stream of a label that nobody requested: "given" or "fit".

    The stream is "given" if ``streams`` names "given" or no stream, and otherwise "fit". It cannot
    be "calibration", because this triage has not drawn the photo.
    """
    stream = streams.get(path, "given")
    return "given" if stream == "given" else "fit"


def sides_and_positions(
    pictures: Iterable[bytes], seed: int
) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """Return each picture's side and random position, by a SHA-256 hash over seed and digest.

    Equal pictures are on the same side, whatever the file names.

    Args:
        pictures: N picture digests.
        seed: Seed for the sides and the order.

    Returns:
        (N,) bool, True on the calibration side, and (N,) uint64 positions in the random order.
    """
    prefix = b"vilu.side:%d:" % seed
    hashes = [hashlib.sha256(prefix + picture).digest() for picture in pictures]
    # The first 8 bytes of a hash are the position. The lowest bit of the next byte is the side.
    positions = np.frombuffer(b"".join(digest[:8] for digest in hashes), "<u8")
    is_calibration = np.array([digest[8] & 1 for digest in hashes], dtype=np.bool_)
    return is_calibration, positions


def read_labels(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read labels and streams from a file.

    The file is a CSV or TSV table, or the book of another triage (Parquet). Rows without a label
    are left out, because these labels were requested and have not come yet.

    Returns:
        Two mappings from the photo names in the file: to labels, and to streams.

    Raises:
        DataError: If the file is no label table, or gives a photo two different labels.
        StorageError: If the file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return labels_and_streams(LabelBook.load(path))
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    columns, rows = csv_rows(path, separator)
    path_column = next((name for name in PATH_COLUMNS if name in columns), None)
    if path_column is None or "label" not in columns:
        other_names = ", ".join(PATH_COLUMNS[1:])
        raise DataError(
            f"{path} must have the columns path (or {other_names}) and label. It "
            f"has {', '.join(columns) or 'none'}."
        )
    # In vilu's tables " a.jpg" and "a.jpg" are two photos, so names are not stripped.
    is_own_table = "stream" in columns
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for row in rows:
        name = row[path_column] if is_own_table else row[path_column].strip()
        label = row["label"].strip()
        if not name:
            raise DataError(
                f"{path} line {row.line}: it names no photo in the column {path_column!r}."
            )
        if not label:
            continue
        # The first line of a photo sets its label. Further lines must have the same label.
        first_label = labels.setdefault(name, label)
        if label != first_label:
            raise DataError(
                f"{path} line {row.line}: {name!r} has the labels {first_label!r} and {label!r}."
            )
        if row.get("stream"):
            streams[name] = row["stream"]
    return labels, streams


def labels_and_streams(book: LabelBook) -> tuple[dict[str, str], dict[str, str]]:
    """Map the paths in a book to labels as tables write them, and to streams."""
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for entry in book:
        if entry.label is not None:
            labels[entry.path] = portable_name(entry.label)
            streams[entry.path] = entry.stream
    return labels, streams


class PhotoNames:
    """Finds photos in a folder by the names in a label file.

    Args:
        photos: Paths of all photos, relative to the folder.
        root: The folder.
    """

    def __init__(self, photos: Sequence[str], root: Path) -> None:
        self.photos = photos
        self.root = root
        self.paths = set(photos)
        self.photos_of_name: dict[str, list[str]] = {}  # maps a file name to its photos
        for photo in photos:
            _, _, file_name = photo.rpartition("/")
            self.photos_of_name.setdefault(file_name, []).append(photo)

    def find(self, name: str) -> str | None:
        """Return the photo with a name, or None if no photo has the name.

        The name is a path relative to the folder, a full path, or a file name.

        Raises:
            UsageError: If several photos have this file name.
        """
        relative = name.removeprefix("./")
        photo = matching_text(relative, self.paths)
        if photo is not None:
            return photo
        path = Path(name)
        # The folder may be a link. The path may start with the link or with the link's target.
        for root in (self.root.absolute(), self.root.resolve()):
            if path.is_relative_to(root):
                path_in_folder = path.relative_to(root)
                return matching_text(path_in_folder.as_posix(), self.paths)
        file_name = matching_text(relative, self.photos_of_name)
        if file_name is None:
            return None
        matches = self.photos_of_name[file_name]
        if len(matches) > 1:
            first_paths = ", ".join(matches[:PATHS_SHOWN])
            raise UsageError(
                f"{name!r} is the name of {plural(len(matches), 'photo')}: {first_paths}. Give "
                "their paths."
            )
        return matches[0]

    def warn_of_backslash(self, name: str, source: Path) -> None:
        """Warn if a name with a backslash can mean two photos.

        Tables write some backslashes in file names as escapes (``portable_name``). So the name may
        be the text for one photo in a table, and also the real file name of a second photo.
        """
        literal = portable_name(name)  # table text for the photo with the real file name ``name``
        if literal != name and {name, literal} <= self.paths:
            warn_once(
                f"{source}: {name!r} is taken for the photo with this text in decisions.csv. The "
                f"photo whose file name has this backslash is {literal!r} in decisions.csv"
            )

    def report_missing(self, missing: Sequence[str], source: Path, *, none_matches: bool) -> None:
        """Warn about names without a photo, or raise DataError if ``none_matches``.

        Args:
            missing: Names in the file without a photo.
            source: The file.
            none_matches: Whether all names in the file are missing.
        """
        if not missing:
            return
        if none_matches:
            question = did_you_mean(missing[0], self.photos)
            raise DataError(
                f"{source} names no photo of {self.root}. The first name without a photo: "
                f"{missing[0]!r}.{question} Paths are relative to the folder of photos."
            )
        names = ", ".join(missing[:PATHS_SHOWN])
        if len(missing) > PATHS_SHOWN:
            names += f" and {len(missing) - PATHS_SHOWN} more"
        warn_once(
            f"{source}: {plural(len(missing), 'label')} left out, since no photo in {self.root} "
            f"has the name: {names}"
        )


def match_photos(
    labels: Mapping[str, str], photos: Sequence[str], root: Path, source: Path
) -> dict[str, str]:
    """Find the photos for the names in a label file (``PhotoNames.find``).

    Args:
        labels: Maps the photo names in the file to labels.
        photos: Paths of all photos.
        root: The photo folder.
        source: The file, for messages.

    Returns:
        Maps the names to the photo paths. Names without a photo are left out, with a
        warning.

    Raises:
        DataError: If no name is a photo in the folder, or if two names for the same photo have
            different labels.
    """
    photo_names = PhotoNames(photos, root)
    matches: dict[str, str] = {}
    missing = []
    first_name_of: dict[str, str] = {}  # maps a photo to its first name in the file
    for name, label in labels.items():
        photo = photo_names.find(name)
        if photo is None:
            missing.append(name)
        else:
            # The first name of a photo is compared with the same name, so it raises no error.
            first_name = first_name_of.setdefault(photo, name)
            first_label = labels[first_name]
            if label != first_label:
                raise DataError(
                    f"{source}: two labels for the photo {photo!r}: {first_label!r} (as "
                    f"{first_name!r}) and {label!r} (as {name!r})."
                )
            matches[name] = photo
        photo_names.warn_of_backslash(name, source)
    photo_names.report_missing(missing, source, none_matches=not matches)
    return matches


def meant_name(label: str, names: Collection[str]) -> str | None:
    """Find the name in ``names`` for a label from a table. Return None if there is no such name.

    The label is the name, or the text for the name in tables (``portable_name``).
    """
    without_escapes = original_path(label)
    for candidate in (label, without_escapes):
        if candidate in names:
            return candidate
    return None


def names_of_labels(
    labels: Mapping[str, str], names: Sequence[str], outside_labels: Sequence[str], source: Path
) -> dict[str, str]:
    """Replace each label, a text from a table, by a class name (``meant_name``).

    Args:
        labels: Maps paths to texts from a table.
        names: Class names.
        outside_labels: Labels that mean "none of the classes".
        source: The label file, for the error.

    Returns:
        Maps the paths to names.

    Raises:
        DataError: If a label is neither a class, nor in ``outside_labels``, nor "(skip)".
    """
    known_names = {*names, *outside_labels, SKIPPED}
    name_of_path: dict[str, str] = {}
    unknown_labels = set()
    for path, label in labels.items():
        name = meant_name(label, known_names)
        if name is None:
            unknown_labels.add(label)
        else:
            name_of_path[path] = name
    if unknown_labels:
        label = min(unknown_labels)
        raise _unknown_label_error(label, labels, source, known_names, n_classes=len(names))
    return name_of_path


def _unknown_label_error(
    label: str,
    labels: Mapping[str, str],
    source: Path,
    known_names: Collection[str],
    *,
    n_classes: int,
) -> DataError:
    """Make the error for a label that is not a known name."""
    paths = [path for path in labels if labels[path] == label]
    photos = paths[0]
    if len(paths) > 1:
        photos += f" and {len(paths) - 1} more"
    question = did_you_mean(label, known_names)
    return DataError(
        f"{source}: {label!r} (of {photos}) is none of the {n_classes} classes.{question} If the "
        f"label means none of the classes, write {OUTSIDE_NAME} in its place, or give --outside "
        f"{label!r} to `vilu triage`. Give the label {SKIPPED} to a photo that nobody can name."
    )
