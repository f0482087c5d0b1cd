"""Data sets with splits of their own: FGVC-Aircraft, Food-101 and SUN397."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from vilu.datasets.classes import clean_name
from vilu.datasets.known.coop import user_list
from vilu.datasets.known.entry import Place
from vilu.datasets.known.listing import Listing
from vilu.datasets.known.splits import SplitLists, read_json_object, read_lines, refuse
from vilu.errors import DataError

OFFICIAL: Final = "official split"


def fgvc_aircraft(place: Place) -> Listing:
    """100 variants; the official training, validation and test images."""
    files = {"train": "train", "validation": "val", "test": "test"}
    variants = _require(place, "variants.txt")
    lists = _of_classes(files, read_lines(variants), variants)
    labels = {name: label for label, name in enumerate(lists.names())}

    def parse(line: str) -> tuple[str, int]:
        number, _, variant = line.partition(" ")
        return f"{number}.jpg", _label(labels, variant)

    for split, key in files.items():
        file = _require(place, f"images_variant_{key}.txt")
        lists.fill(split, file, read_lines(file), parse)
    return lists.listing(place.folder, "images", OFFICIAL, binding=True)


def food101(place: Place) -> Listing:
    """101 dishes; the user's CoOp list, else the official split, which has no validation images."""
    own = user_list(place, "split_zhou_Food101.json", "images")
    return _food101_official(place) if own is None else own


def sun397(place: Place) -> Listing:
    """397 scenes; the user's CoOp list, else the first official partition, which has no validation images."""
    own = user_list(place, "split_zhou_SUN397.json", "")
    return _sun397_official(place) if own is None else own


def _food101_official(place: Place) -> Listing:
    files = {split: _require(place, f"meta/{split}.json") for split in ("train", "test")}
    content = {split: read_json_object(file) for split, file in files.items()}
    lists = _of_classes(files, sorted({name for dishes in content.values() for name in dishes}), files["train"])
    labels = {name: label for label, name in enumerate(lists.names())}

    def parse(entry: tuple[str, object]) -> tuple[str, int]:
        name, path = entry
        if not isinstance(path, str):
            raise ValueError(f"expected a path below images/; found {path!r:.80}")  # noqa: TRY004 - told with the entry
        return f"{path}.jpg", labels[name]

    for split, file in files.items():
        lists.fill(split, file, _flat(content[split], file), parse)
    return lists.listing(place.folder, "images", OFFICIAL, binding=True)


def _sun397_official(place: Place) -> Listing:
    wanted = {"train": "Training_01.txt", "test": "Testing_01.txt"}
    files = {split: _require(place, name, f"Partitions/{name}") for split, name in wanted.items()}
    scenes = _require(place, "ClassName.txt", "Partitions/ClassName.txt")
    lists = _of_classes(files, read_lines(scenes), scenes)
    labels = {name: label for label, name in enumerate(lists.names())}

    def parse(line: str) -> tuple[str, int]:
        return line.removeprefix("/"), _label(labels, line.rpartition("/")[0])

    for split, file in files.items():
        lists.fill(split, file, read_lines(file), parse)
    found = lists.listing(place.folder, "", OFFICIAL, binding=True)
    below_letter = [name.split("/")[2:] for name in found.classes]  # /a/apartment_building/outdoor
    raw = tuple("/".join(parts) for parts in below_letter)
    return replace(found, classes=raw, names=tuple(clean_name(" ".join(reversed(parts))) for parts in below_letter))


def _of_classes(splits: Iterable[str], names: Iterable[str], file: Path) -> SplitLists:
    """Empty lists of these splits and classes, which ``file`` names."""
    lists = SplitLists({split: [] for split in splits})
    try:
        for label, name in enumerate(names):
            lists.name(label, name)
        lists.names()
    except ValueError as error:
        refuse(file, error)
    return lists


def _label(labels: dict[str, int], name: str) -> int:
    if name not in labels:
        raise ValueError(f"{name[:80]!r} is none of the {len(labels)} classes")
    return labels[name]


def _flat(content: dict[str, object], file: Path) -> Iterator[tuple[str, object]]:
    for name, paths in content.items():
        if not isinstance(paths, list):
            raise DataError(f"{file}: expected a list of paths per class; {name[:80]!r} has {type(paths).__name__}.")
        yield from ((name, path) for path in paths)


def _require(place: Place, *names: str) -> Path:
    path = place.find(*names)
    if path is None:
        raise DataError(
            f"{place.entry.title} in {place.folder} has no {' or '.join(names)}, so nothing says which image is in "
            f"which split. {place.entry.how} ({place.entry.url})"
        )
    return path
