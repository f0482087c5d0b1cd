"""Data sets by name: opening them, and checking what of them is on a disk."""

from __future__ import annotations

from pathlib import Path

from vilu.datasets.base import ImageDataset
from vilu.datasets.known.catalogue import KNOWN, add_dataset, add_datasets, find_known
from vilu.datasets.known.check import Presence, check_entry
from vilu.datasets.known.entry import KnownDataset, Request, require_place
from vilu.errors import UsageError

__all__ = ["KNOWN", "KnownDataset", "Presence", "add_dataset", "add_datasets", "check", "find_known", "open_known"]


def open_known(
    name: str,
    root: Path | str,
    *,
    split: str | None = None,
    raw_names: bool = False,
    classes: Path | None = None,
) -> ImageDataset:
    """Open a data set of the catalogue. ``source`` says which list of splits is in use.

    Args:
        name: Its name, a key of ``KNOWN``.
        root: The folder that holds all data sets, or the data set's own.
        split: Names of splits joined by ``+`` ("train+validation"); None for all.
        raw_names: Whether class names stay as the data have them; else they are cleaned for prompts.
        classes: A classes file that names the classes instead, in label order or as ``raw<TAB>name``.

    Raises:
        UsageError: If the name or the split is unknown, an option does not fit, or ``root`` is no folder.
        DataError: If the data set is not there, or contradicts itself.
        StorageError: If a folder cannot be listed.
    """
    entry = find_known(name)
    if raw_names and classes is not None:
        raise UsageError("raw names and a classes file both name the classes. Give --raw-names or --classes.")
    return entry.reader.open(require_place(entry, Path(root)), Request(split, raw_names, classes))


def check(root: Path | str, names: list[str] | None = None, *, deep: bool = False) -> list[Presence]:
    """What is present of which data sets, what is missing, and how to get it.

    Args:
        root: The folder that holds all data sets, or one's own.
        names: Which; None for all.
        deep: Also compare archives with their published checksums, and list the members of tars.

    Raises:
        UsageError: If a name is unknown, or ``root`` is no folder.
        StorageError: If it cannot be looked into, or an archive cannot be read.
    """
    entries = list(KNOWN.values()) if names is None else [find_known(name) for name in names]
    return [check_entry(entry, Path(root), named=names is not None, deep=deep) for entry in entries]
