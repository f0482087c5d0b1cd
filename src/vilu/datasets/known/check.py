"""Whether a data set is present and whole, and what to do if not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from vilu.datasets.known.entry import Count, KnownDataset, Place, Survey, find_place
from vilu.errors import DataError, StorageError, UsageError
from vilu.progress import track

ArchiveState = Literal["present", "right", "wrong"]
State = Literal["complete", "present", "incomplete", "absent"]
PACKED: Final = (".tar", ".gz", ".tgz", ".zip")
CHUNK: Final = 2**22
MEBIBYTE: Final = 2**20


@dataclass(frozen=True)
class Presence:
    """What there is of one data set.

    Attributes:
        name: Of the data set.
        title: For people.
        folder: Where it is; None where it is not.
        origin: Which list of splits is in use; "" where it is not there.
        splits: What there is of each split.
        archives: Archives and files with published checksums that were seen: present, or if checked right or wrong.
        problem: Why nothing more can be said; None where nothing is wrong.
        state: "complete"; "present" where nothing is wrong, and nothing lists what there should be; "incomplete";
            "absent".
        advice: What to do.
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
        """As plain JSON."""
        return {**asdict(self), "folder": None if self.folder is None else str(self.folder)}


def check_entry(entry: KnownDataset, root: Path, *, named: bool, deep: bool) -> Presence:
    """What there is of one data set."""
    place = find_place(entry, root, named=named)
    seen = dict(_archives(entry, root, place))
    archives = {name: _verify(entry, path, deep) for name, path in seen.items()}
    absent = Presence(entry.name, entry.title, None, archives=archives, advice=_how(entry, archives))
    if place is None:
        return absent
    there = replace(absent, folder=place.folder, state="incomplete")
    try:
        survey = entry.reader.survey(place, deep=deep)
    except (DataError, UsageError, StorageError) as error:
        return replace(there, problem=str(error))
    splits = _splits(entry, survey)
    damaged = [name for name, path in seen.items() if archives[name] == "wrong" and path.parent == place.folder]
    problem = f"wrong checksum: {', '.join(damaged)}" if damaged else None
    there = replace(there, origin=survey.origin, splits=splits, problem=problem)
    if damaged or not all(split.is_complete(binding=survey.binding) for split in splits.values()):
        return there
    state: State = "present" if any(split.listed is None for split in splits.values()) else "complete"
    return replace(there, state=state, advice=f"vilu embed {root} --dataset {entry.name} -o STORE")


def _splits(entry: KnownDataset, survey: Survey) -> dict[str, Count]:
    """Each split with its published size, or sums of splits where only those are published."""
    expected = entry.expected(survey.counts)
    return {
        key: Count.sum((survey.counts[name] for name in key.split("+")), expected.get(key))
        for key in expected or survey.counts
    }


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
        with path.open("rb") as file, track(f"hashing {path.name}", path.stat().st_size / MEBIBYTE, "MiB") as task:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                task.advance(len(chunk) / MEBIBYTE)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}. Mend its permissions.") from error
    return "right" if digest.hexdigest() == entry.archives[path.name] else "wrong"


def _how(entry: KnownDataset, archives: Mapping[str, ArchiveState]) -> str:
    here = [name for name, state in archives.items() if state != "wrong" and name.endswith(PACKED)]
    wrong = [name for name, state in archives.items() if state == "wrong"]
    said = f"{', '.join(here)} {'is' if len(here) == 1 else 'are'} here: unpack. " if here else ""
    said += f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} damaged: download again. " if wrong else ""
    return f"{said}{entry.how} ({entry.url})"
