"""Folder layouts recognised by files in the folder, such as CIFAR's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vilu.datasets.base import ImageDataset, Selection
from vilu.errors import DataError, UsageError
from vilu.registry import REGISTER_FUNCTIONS, Catalogue

Opener = Callable[[Selection], ImageDataset]
"""Function that opens a folder with the user's options."""


@dataclass(frozen=True)
class FolderLayout:
    """A folder layout, with functions to recognise and open such a folder."""

    name: str
    description: str  # text for messages
    # returns a folder's opener, or None if the folder does not have this layout
    find: Callable[[Path], Opener | None]


LAYOUTS: Final = Catalogue[FolderLayout]("layout of folders", "vilu.layouts")


def find_opener(folder: Path) -> Opener | None:
    """Return the opener for a folder with a known layout. Return None if the layout is unknown.

    Raises:
        DataError: If the folder has two known layouts.
    """
    openers: dict[str, Opener] = {}
    for name, layout in LAYOUTS.items():
        opener = layout.find(folder)
        if opener is not None:
            openers[name] = opener
    if len(openers) > 1:
        listed_names = ", ".join(openers)
        raise DataError(
            f"{folder} holds more than one data set: {listed_names}. Give a folder with one."
        )
    return next(iter(openers.values()), None)


def _add_layout(layout: object) -> bool:
    """Add a layout to the catalogue. Return False if the object is not a layout."""
    if not isinstance(layout, FolderLayout):
        return False
    # setdefault adds the layout, or returns an earlier layout with this name
    if LAYOUTS.registered.setdefault(layout.name, layout) is not layout:
        raise UsageError(f"there is another layout {layout.name!r} already. Rename this one.")
    return True


REGISTER_FUNCTIONS["a vilu.datasets.layouts.FolderLayout"] = _add_layout
