"""The catalogue of known data sets: register, open and check data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from vilu.datasets.base import ImageDataset
from vilu.datasets.known.entry import (
    Count,
    KnownDataset,
    Place,
    Request,
    Survey,
    find_place,
    require_place,
)
from vilu.errors import DataError, StorageError, UsageError, did_you_mean
from vilu.progress import track
from vilu.registry import REGISTER_FUNCTIONS, Catalogue, refuse_name_of_bench

__all__ = [
    "KNOWN",
    "KnownDataset",
    "Presence",
    "add_dataset",
    "check",
    "find_known",
    "open_known",
]

KNOWN: Final = Catalogue[KnownDataset]("data set", "vilu.datasets")


def find_known(name: str) -> KnownDataset:
    """Return a data set's entry.

    Raises:
        MissingModelError: If the data set is in vilu-bench, and vilu-bench is not installed.
        UsageError: If there is no such data set. The message has the most similar name, or all
            names.
    """
    if name in KNOWN:
        return KNOWN[name]
    refuse_name_of_bench(KNOWN.group, name)
    usual_spelling = name.lower().replace("-", "_")
    hint = did_you_mean(usual_spelling, KNOWN, cutoff=0.5)
    if hint == "":
        hint = f" There are: {', '.join(KNOWN)}."
    raise UsageError(f"there is no data set {name!r}.{hint}")


def open_known(
    name: str,
    root: Path | str,
    *,
    split: str | None = None,
    raw_names: bool = False,
    classes: Path | None = None,
    outside: tuple[str, ...] = (),
) -> ImageDataset:
    """Open a data set from the catalogue.

    The result's attribute ``source`` names the split list in use.
    """
    entry = find_known(name)
    if raw_names and classes is not None:
        raise UsageError(
            "Raw names and a classes file both name the classes. Give raw_names or classes."
        )
    place = require_place(entry, Path(root))
    request = Request(split=split, raw_names=raw_names, classes=classes, outside=outside)
    return entry.reader.open(place, request)


def add_dataset(entry: KnownDataset) -> KnownDataset:
    """Add a data set to this process's catalogue. ``entry.reader`` may be any ``Reader``.

    Raises:
        UsageError: If a different data set already has this name.
    """
    require_free_name(entry)
    # setdefault adds the entry, or returns an equal entry that was added before
    return KNOWN.registered.setdefault(entry.name, entry)


def require_free_name(entry: KnownDataset) -> None:
    """Raise UsageError if a different data set already has the name of ``entry``."""
    earlier_entry = KNOWN.registered.get(entry.name)
    if earlier_entry is not None and earlier_entry != entry:
        raise UsageError(
            f"there is another data set {entry.name!r} already. Give this one another name."
        )


def _add_dataset(entry: object) -> bool:
    """Add a ``KnownDataset`` to the catalogue. Return False for any other object."""
    if not isinstance(entry, KnownDataset):
        return False
    add_dataset(entry)
    return True


REGISTER_FUNCTIONS["a vilu.datasets.known.KnownDataset"] = _add_dataset


ArchiveState = Literal["present", "right", "wrong"]
State = Literal["complete", "present", "incomplete", "absent"]
PACKED_SUFFIXES: Final = (".tar", ".gz", ".tgz", ".zip")  # suffixes of files to be unpacked
CHUNK_BYTES: Final = 2**22  # number of bytes hashed at a time
MEBIBYTE: Final = 2**20


@dataclass(frozen=True)
class Presence:
    """A data set's state on a disk.

    Attributes:
        name: The data set's name in the catalogue.
        title: The data set's name in messages.
        folder: The data set's folder. None if the data set is absent.
        origin: Description of the split list in use. "" if the data set is absent.
        splits: Split -> file counts.
        archives: Name -> state, for every existing archive or file with a published checksum. The
            state is "right" or "wrong" if the checksum was compared, else "present".
        problem: Error that ended the check early, if any.
        state: "complete" means that all listed files exist. "present" means no error, but also no
            file list.
        advice: Text on the user's next step.
    """

    name: str
    title: str
    folder: Path | None
    origin: str = ""
    splits: Mapping[str, Count] = field(default_factory=dict)
    archives: Mapping[str, ArchiveState] = field(default_factory=dict)
    problem: str | None = None
    state: State = "absent"
    advice: str = ""

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain JSON values."""
        folder = None if self.folder is None else str(self.folder)
        return {**asdict(self), "folder": folder}


def check(
    root: Path | str, names: list[str] | None = None, *, deep: bool = False
) -> list[Presence]:
    """Check which files of data sets exist on a disk, and how to get missing files.

    Args:
        root: The folder with all data sets, or a single data set's folder.
        names: Data set names. None for all in the catalogue.
        deep: Whether to compare archives with published checksums, and to list tar files' members.
    """
    is_named = names is not None
    if names is None:
        entries = list(KNOWN.values())
    else:
        entries = [find_known(name) for name in names]
    return [check_entry(entry, Path(root), named=is_named, deep=deep) for entry in entries]


def check_entry(entry: KnownDataset, root: Path, *, named: bool, deep: bool) -> Presence:
    """Check a data set. ``named`` is true if the user has named the data set (``find_place``)."""
    place = find_place(entry, root, named=named)
    archive_paths = _find_archives(entry, root, place)
    archives = {name: _archive_state(entry, path, deep) for name, path in archive_paths.items()}
    advice = _advice(entry, archives)
    presence = Presence(entry.name, entry.title, folder=None, archives=archives, advice=advice)
    if place is None:
        return presence
    presence = replace(presence, folder=place.folder, state="incomplete")
    try:
        survey = entry.reader.survey(place, deep=deep)
    except (DataError, UsageError, StorageError) as error:
        return replace(presence, problem=str(error))
    splits = _published_splits(entry, survey)
    presence = replace(presence, origin=survey.origin, splits=splits)
    damaged_names = _damaged_archives(archives, archive_paths, place)
    if damaged_names:
        listed_names = ", ".join(damaged_names)
        return replace(presence, problem=f"wrong checksum: {listed_names}")
    state = _state_by_counts(splits.values(), survey)
    if state == "incomplete":
        return presence
    return replace(
        presence, state=state, advice=f"vilu embed {root} --dataset {entry.name} -o STORE"
    )


def _published_splits(entry: KnownDataset, survey: Survey) -> dict[str, Count]:
    """Return split -> counts, with the published sizes.

    If only some splits' sum is published ("train+val"), these splits' counts are added up.
    """
    published_sizes = entry.published_sizes(survey.counts)
    # if no sizes are published, each split has a separate count
    names_of_splits = published_sizes or survey.counts
    counts_of_splits = {}
    for joined_names in names_of_splits:
        counts = [survey.counts[name] for name in joined_names.split("+")]
        size = published_sizes.get(joined_names)
        counts_of_splits[joined_names] = Count.sum(counts, expected=size)
    return counts_of_splits


def _damaged_archives(
    archives: Mapping[str, ArchiveState], archive_paths: Mapping[str, Path], place: Place
) -> list[str]:
    """Return the names of the archives with a wrong checksum in the data set's folder."""
    damaged_names: list[str] = []
    for name, state in archives.items():
        is_in_folder = archive_paths[name].parent == place.folder
        if state == "wrong" and is_in_folder:
            damaged_names.append(name)
    return damaged_names


def _state_by_counts(splits: Collection[Count], survey: Survey) -> State:
    """Return the state of a data set without errors, from the splits' counts."""
    for split in splits:
        if not split.is_complete(binding=survey.binding):
            return "incomplete"
    is_listed = all(split.listed is not None for split in splits)
    return "complete" if is_listed else "present"


def _find_archives(entry: KnownDataset, root: Path, place: Place | None) -> dict[str, Path]:
    """Return name -> path for the existing files with a published checksum.

    The places to search are the data set's folder and the usual folders for archives. If several
    folders have a file with the same name, the first file is taken.
    """
    folders = [root]
    for usual_folder in entry.folders:
        top_name, _, _ = usual_folder.partition("/")
        folders.append(root / top_name)
    if place is not None:
        folders = [place.folder, *place.outer_folders, *folders]
    archive_paths = {}
    for name in entry.archives:
        for folder in folders:
            path = folder / name
            if path.is_file():
                archive_paths[name] = path
                break
    return archive_paths


def _archive_state(entry: KnownDataset, path: Path, deep: bool) -> ArchiveState:
    """Return an archive's state. The checksum is computed only if ``deep`` is True."""
    if not deep:
        return "present"
    try:
        checksum = _md5(path)
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}. Check its permissions."
        ) from error
    return "right" if checksum == entry.archives[path.name] else "wrong"


def _md5(path: Path) -> str:
    """Return a file's MD5 checksum. torchvision publishes MD5 checksums."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        size = path.stat().st_size
        with track(f"hashing {path.name}", size / MEBIBYTE, "MiB") as task:
            chunk = file.read(CHUNK_BYTES)
            while chunk:
                digest.update(chunk)
                task.advance(len(chunk) / MEBIBYTE)
                chunk = file.read(CHUNK_BYTES)
    return digest.hexdigest()


def _advice(entry: KnownDataset, archives: Mapping[str, ArchiveState]) -> str:
    """Return advice on the existing archives, and how to get the data set."""
    packed_names = []
    damaged_names = []
    for name, state in archives.items():
        if state == "wrong":
            damaged_names.append(name)
        elif name.endswith(PACKED_SUFFIXES):
            packed_names.append(name)
    advice = ""
    if packed_names:
        advice += f"{_names_and_verb(packed_names)} here: unpack. "
    if damaged_names:
        advice += f"{_names_and_verb(damaged_names)} damaged: download again. "
    return f"{advice}{entry.how} ({entry.url})"


def _names_and_verb(names: Sequence[str]) -> str:
    """Return the names, followed by "is" or "are"."""
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)} {verb}"
