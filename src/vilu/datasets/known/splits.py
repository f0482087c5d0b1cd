"""Which image is in which split: the checks on every list, and the files that lists come in.

Lists are input like any other: a path that climbs, a label without a name or with two, or an image in two splits is
refused, naming the file and the entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, NoReturn, TypeVar

from vilu.datasets.files import read_file, stays_below
from vilu.datasets.known.listing import Listing, PathList
from vilu.errors import DataError

MAX_PATH: Final = 1024

T = TypeVar("T")


@dataclass
class SplitLists:
    """Paths and labels by split, no image twice; labels are 0 ... K-1 and each has one name.

    Attributes:
        splits: Pairs of path and label, by split.
    """

    splits: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)
    _labels: dict[str, int] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def add(self, split: str, path: str, label: int) -> None:
        """One image.

        Raises:
            ValueError: If its path leads out of the folder, could be spelt shorter or holds control characters, or was
                added before.
        """
        plain = len(path) <= MAX_PATH and path.isprintable() and "\\" not in path
        if not (plain and stays_below(path) and str(PurePosixPath(path)) == path):
            raise ValueError(f"the path {path[:80]!r} must be relative, plain, and stay below its folder")
        if path in self._seen:
            raise ValueError(f"{path!r} is listed more than once")
        self._seen.add(path)
        self.splits[split].append((path, label))

    def fill(self, split: str, file: Path, entries: Iterable[T], parse: Callable[[T], tuple[str, int]]) -> None:
        """All entries of a file.

        Args:
            split: Which split.
            file: Where they come from.
            entries: As they stand in the file.
            parse: Path and label of an entry; raises ValueError where it is none.

        Raises:
            DataError: If an entry is none or cannot be added; the message names file and entry.
        """
        for number, entry in enumerate(entries, start=1):
            try:
                self.add(split, *parse(entry))
            except ValueError as error:
                refuse(f"{file}, {split} entry {number} (counting from 1)", error)

    def name(self, label: int, name: str) -> None:
        """The name of a class.

        Raises:
            ValueError: If it has another, another class has this one, or it is blank or holds control characters.
        """
        if not name.strip() or not name.isprintable():
            raise ValueError(f"the class name {name[:80]!r} must be text")
        if self._names.setdefault(label, name) != name:
            raise ValueError(f"label {label} is {name!r} here and {self._names[label]!r} before")
        if self._labels.setdefault(name, label) != label:
            raise ValueError(f"{name!r} is label {label} here and label {self._labels[name]} before")

    def names(self) -> tuple[str, ...]:
        """Names in label order.

        Raises:
            ValueError: If there is none, or labels leave a number out.
        """
        if not self._names:
            raise ValueError("it names no class")
        gap = next((label for label in range(len(self._names)) if label not in self._names), None)
        if gap is not None:
            raise ValueError(f"labels must be 0 to K - 1, each with images; {gap} has none. Number them again")
        return tuple(self._names[label] for label in range(len(self._names)))

    def listing(self, folder: Path, images: str, origin: str, *, binding: bool) -> Listing:
        """The listing of a data set whose images lie in the folder ``images`` of its folder."""
        names = self.names()
        prefix = f"{images}/" if images else ""
        splits = {
            split: PathList(folder, ((prefix + path, label) for path, label in entries))
            for split, entries in self.splits.items()
        }
        return Listing(names, splits, origin, binding=binding)


def read_json_object(file: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        DataError: If it cannot be read, is no JSON object, or names something twice.
    """
    try:
        content = json.loads(read_file(file), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        refuse(file, f"cannot be read as JSON: {error}")
    if not isinstance(content, dict):
        refuse(file, f"expected an object of lists; found {type(content).__name__}")
    return content


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a text file, without those that are blank.

    Raises:
        DataError: If it cannot be read or is not UTF-8.
    """
    try:
        text = read_file(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(file, error)
    return (line.strip() for line in text.splitlines() if line.strip())


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def refuse(where: object, why: object) -> NoReturn:
    """Say what is wrong with a list.

    Raises:
        DataError: Always.
    """
    raise DataError(f"{where}: {why}. Mend it or get it again.")
