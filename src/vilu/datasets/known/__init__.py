"""Data sets that have a name, by what registers them; opening and checking them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from vilu.datasets.base import ImageDataset
from vilu.datasets.known.entry import Count, KnownDataset, Place, Request, find_place, require_place
from vilu.errors import DataError, StorageError, UsageError, nearest
from vilu.progress import track
from vilu.registry import ADDERS, Catalogue

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
    """The entry of a data set; where there is none, the message names the nearest."""
    if name in KNOWN:
        return KNOWN[name]
    hint = (
        nearest(name.lower().replace("-", "_"), KNOWN, cutoff=0.5)
        or f" There are: {', '.join(KNOWN)}."
    )
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
    """Open a data set of the catalogue. ``source`` says which list of splits is in use."""
    entry = find_known(name)
    if raw_names and classes is not None:
        raise UsageError(
            "raw names and a classes file both name the classes. Give --raw-names or --classes."
        )
    return entry.reader.open(
        require_place(entry, Path(root)), Request(split, raw_names, classes, outside)
    )


def add_dataset(entry: KnownDataset) -> KnownDataset:
    """Add a data set to the catalogue of this process; ``entry.reader`` may be any ``Reader``.

    Raises:
        UsageError: If another data set has its name.
    """
    if KNOWN.here.setdefault(entry.name, entry) != entry:
        raise UsageError(
            f"there is another data set {entry.name!r} already. Give this one another name."
        )
    return entry


def _add(thing: object) -> bool:
    if isinstance(thing, KnownDataset):
        add_dataset(thing)
    return isinstance(thing, KnownDataset)


ADDERS["a vilu.datasets.known.KnownDataset"] = _add


ArchiveState = Literal["present", "right", "wrong"]
State = Literal["complete", "present", "incomplete", "absent"]
PACKED: Final = (".tar", ".gz", ".tgz", ".zip")
CHUNK: Final = 2**22
MEBIBYTE: Final = 2**20


@dataclass(frozen=True)
class Presence:
    """What there is of one data set."""

    name: str  # of the data set
    title: str  # for people
    folder: Path | None  # where it is; None where it is not
    origin: str = ""  # which list of splits is in use; "" where it is not there
    splits: Mapping[str, Count] = field(default_factory=dict)  # what there is of each split
    # archives and files with published checksums that were seen: present, or if checked right or
    # wrong
    archives: Mapping[str, ArchiveState] = field(default_factory=dict)
    problem: str | None = None  # why nothing more can be said; None where nothing is wrong
    # "complete"; "present" where nothing is wrong, and nothing lists what there should be;
    # "incomplete"; "absent"
    state: State = "absent"
    advice: str = ""  # what to do

    def to_dict(self) -> dict[str, object]:
        """As plain JSON."""
        return {**asdict(self), "folder": None if self.folder is None else str(self.folder)}


def check(
    root: Path | str, names: list[str] | None = None, *, deep: bool = False
) -> list[Presence]:
    """What is present of which data sets, what is missing, and how to get it.

    ``root`` holds all data sets, or is one's own. ``deep`` also compares archives with their
    published checksums, and lists the members of tars.
    """
    entries = list(KNOWN.values()) if names is None else [find_known(name) for name in names]
    return [check_entry(entry, Path(root), named=names is not None, deep=deep) for entry in entries]


def check_entry(entry: KnownDataset, root: Path, *, named: bool, deep: bool) -> Presence:
    """What there is of one data set."""
    place = find_place(entry, root, named=named)
    seen = dict(_archives(entry, root, place))
    archives = {name: _verify(entry, path, deep) for name, path in seen.items()}
    absent = Presence(
        entry.name, entry.title, None, archives=archives, advice=_how(entry, archives)
    )
    if place is None:
        return absent
    there = replace(absent, folder=place.folder, state="incomplete")
    try:
        survey = entry.reader.survey(place, deep=deep)
    except (DataError, UsageError, StorageError) as error:
        return replace(there, problem=str(error))
    counts, expected = (
        survey.counts,
        entry.expected(survey.counts),
    )  # sums of splits where only those are published
    splits = {
        key: Count.sum((counts[name] for name in key.split("+")), expected.get(key))
        for key in expected or counts
    }
    damaged = [
        name
        for name, path in seen.items()
        if archives[name] == "wrong" and path.parent == place.folder
    ]
    problem = f"wrong checksum: {', '.join(damaged)}" if damaged else None
    there = replace(there, origin=survey.origin, splits=splits, problem=problem)
    if damaged or not all(split.is_complete(binding=survey.binding) for split in splits.values()):
        return there
    state: State = (
        "present" if any(split.listed is None for split in splits.values()) else "complete"
    )
    return replace(there, state=state, advice=f"vilu embed {root} --dataset {entry.name} -o STORE")


def _archives(entry: KnownDataset, root: Path, place: Place | None) -> Iterator[tuple[str, Path]]:
    """Files with published checksums, where torchvision and people put them."""
    folders = [root, *(root / folder.split("/")[0] for folder in entry.folders)]
    folders = [*([place.folder, *place.around] if place else ()), *folders]
    for name in entry.archives:
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is not None:
            yield name, path


def _verify(entry: KnownDataset, path: Path, deep: bool) -> ArchiveState:
    if not deep:
        return "present"
    digest = hashlib.md5(usedforsecurity=False)  # what torchvision publishes
    try:
        with (
            path.open("rb") as file,
            track(f"hashing {path.name}", path.stat().st_size / MEBIBYTE, "MiB") as task,
        ):
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                task.advance(len(chunk) / MEBIBYTE)
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}. Mend its permissions."
        ) from error
    return "right" if digest.hexdigest() == entry.archives[path.name] else "wrong"


def _how(entry: KnownDataset, archives: Mapping[str, ArchiveState]) -> str:
    here = [name for name, state in archives.items() if state != "wrong" and name.endswith(PACKED)]
    wrong = [name for name, state in archives.items() if state == "wrong"]
    said = f"{', '.join(here)} {'is' if len(here) == 1 else 'are'} here: unpack. " if here else ""
    said += (
        f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} damaged: download again. "
        if wrong
        else ""
    )
    return f"{said}{entry.how} ({entry.url})"
