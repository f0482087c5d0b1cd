"""Folders of images that are told by the files in them, such as CIFAR's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vilu.datasets.base import ImageDataset, Selection
from vilu.errors import DataError, UsageError
from vilu.registry import ADDERS, Catalogue

Opener = Callable[[Selection], ImageDataset]


@dataclass(frozen=True)
class FolderLayout:
    """One layout; ``find`` gives what opens a folder of it, or None where a folder is none."""

    name: str
    description: str  # for people
    find: Callable[[Path], Opener | None]


LAYOUTS: Final = Catalogue[FolderLayout]("layout of folders", "vilu.layouts")


def find_opener(folder: Path) -> Opener | None:
    """The opener of a folder that has one of the layouts; None where it has none.

    Raises:
        DataError: If two layouts take it for theirs.
    """
    openers: dict[str, Opener] = {}
    for name, layout in LAYOUTS.items():
        opener = layout.find(folder)
        if opener is not None:
            openers[name] = opener
    if len(openers) > 1:
        raise DataError(
            f"{folder} holds more than one data set: {', '.join(openers)}. Name the folder of one."
        )
    return next(iter(openers.values()), None)


def _add(layout: object) -> bool:
    if not isinstance(layout, FolderLayout):
        return False
    if LAYOUTS.here.setdefault(layout.name, layout) is not layout:
        raise UsageError(f"there is another layout {layout.name!r} already. Rename this one.")
    return True


ADDERS["a vilu.datasets.layouts.FolderLayout"] = _add
