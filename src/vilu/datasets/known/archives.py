"""Data sets that are read as they come: CIFAR's pickles, and tars of image-caption pairs."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vilu.datasets.files import subfolders
from vilu.datasets.known.entry import Place, Request
from vilu.datasets.known.survey import SHOWN, Count, Survey
from vilu.datasets.shards import MAX_SHARDS, find_shards
from vilu.datasets.tar import TarShards
from vilu.datasets.tar_samples import CAPTION, list_samples
from vilu.datasets.torchvision_layout import CifarDataset, Layout
from vilu.errors import DataError, UsageError
from vilu.progress import track


@dataclass(frozen=True)
class CifarReader:
    """CIFAR-10 or CIFAR-100, read without running its pickles."""

    layout: Layout

    def open(self, place: Place, request: Request) -> CifarDataset:
        """The pictures of the splits asked for."""
        dataset = CifarDataset(
            place.folder,
            self.layout,
            split=request.split,
            classes=request.classes,
            raw_names=request.raw_names,
        )
        dataset.source = f"{place.folder} (official split)"
        return dataset

    def survey(self, place: Place, *, deep: bool) -> Survey:  # noqa: ARG002 - its files are small: always read
        """Pictures in each file that is there."""
        return Survey("official split", {split: self._count(place, split) for split in self.layout.splits})

    def _count(self, place: Place, split: str) -> Count:
        expected = place.entry.sizes[split]
        names = (*self.layout.splits[split], self.layout.meta)
        missing = tuple(name for name in names if not (place.folder / name).is_file())
        if missing:
            return Count(0, expected, missing)
        try:
            found = len(self.open(place, Request(split)))
        except DataError as error:  # told with the split, so that the other is counted too
            return Count(None, expected, (), str(error))
        return Count(found, found)


class ShardReader:
    """Image-caption pairs in tars, in a data set's folder or one below it, as img2dataset writes them."""

    def open(self, place: Place, request: Request) -> TarShards:
        """All pairs; folds go by the hash of the caption, later."""
        unfit = request.unfit()
        if unfit:
            raise UsageError(f"{place.entry.title} has captions, no classes and no splits. Leave {unfit[0]} out.")
        return TarShards(f"{place.folder} (all pairs)", find_known_shards(place.folder))

    def survey(self, place: Place, *, deep: bool) -> Survey:
        """Tars and gaps in their numbers; ``deep`` lists their members, so that it counts pairs and finds damage."""
        shards = find_known_shards(place.folder)
        found, problem = _count_pairs(place, shards) if deep else (None, None)
        gaps = missing_numbers(place.folder, shards)
        return Survey(f"{len(shards)} tar files", {"all": Count(found, None, gaps, problem)}, binding=False)


def find_known_shards(folder: Path) -> list[Path]:
    """The tars in a folder, else those in the folders below it (train, validation), in the order of their names.

    Raises:
        DataError: If there is none.
        UsageError: If a folder holds something else to read as well.
    """
    parts = [folder, *(folder / name for name in subfolders(folder))]
    shards = find_shards(folder) or [shard for part in parts[1:] for shard in find_shards(part) or ()]
    if not shards:
        raise DataError(f"{folder} holds no tar files. Expected 00000.tar, 00001.tar, ... as img2dataset writes them.")
    return shards


def missing_numbers(folder: Path, shards: list[Path]) -> tuple[str, ...]:
    """The first names that a sequence of numbered shards leaves out."""
    numbers: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for shard in shards:
        match = re.fullmatch(r"(.*?)([0-9]{1,18})", shard.stem)
        if match is not None:
            numbers[shard.parent, match[1], len(match[2])].add(int(match[2]))
    gaps: list[str] = []
    for (parent, prefix, width), present in numbers.items():
        for number in range(min(max(present), MAX_SHARDS)):
            if number not in present:
                gaps.append(str((parent / f"{prefix}{number:0{width}}.tar").relative_to(folder).as_posix()))
                if len(gaps) == SHOWN:
                    return tuple(gaps)
    return tuple(gaps)


def _count_pairs(place: Place, shards: list[Path]) -> tuple[int, str | None]:
    """Whole pairs in all shards, and what is wrong with the first damaged one."""
    found, problem = 0, None
    with track(f"checking {place.entry.name}", len(shards), "shards") as task:
        for shard in shards:
            samples, trouble = list_samples(shard, CAPTION)
            found += sum(sample.is_whole(CAPTION) for sample in samples)
            if trouble is not None and problem is None:
                problem = f"{shard.relative_to(place.folder)}: {trouble}. Download this shard again."
            task.advance(1)
    return found, problem
