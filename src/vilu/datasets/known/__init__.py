"""Data sets that have a name: the paper's, from an asset, and whatever is added; opening and checking them."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Final

from vilu.datasets.base import ImageDataset
from vilu.datasets.known.check import Presence, check_entry
from vilu.datasets.known.entry import KnownDataset, Request, require_place
from vilu.datasets.known.layouts import ShardReader, make_reader
from vilu.errors import UsageError
from vilu.files import fill, toml_tables

__all__ = ["KNOWN", "KnownDataset", "Presence", "add_dataset", "add_datasets", "check", "find_known", "open_known"]

KNOWN: Final[dict[str, KnownDataset]] = {}
"""By name: in the order of the paper, then in that in which they were added."""


def find_known(name: str) -> KnownDataset:
    """The entry of a data set; where there is none, the message names the nearest."""
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), KNOWN, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(KNOWN)}."
    raise UsageError(f"there is no data set {name!r}. {hint}")


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


def add_dataset(entry: KnownDataset) -> KnownDataset:
    """Add a data set to the catalogue of this process; ``entry.reader`` may be any ``Reader``.

    Raises:
        UsageError: If another data set has its name.
    """
    if KNOWN.setdefault(entry.name, entry) != entry:
        raise UsageError(f"there is another data set {entry.name!r} already. Give this one another name.")
    return entry


def add_datasets(source: Path | str) -> list[KnownDataset]:
    """Add the data sets of a TOML file, or of TOML text: a table for each, laid out as ``assets/datasets.toml``.

    Raises:
        UsageError: If it cannot be read, a key is missing, unknown or of another type, or a name is taken.
    """
    entries = [_entry(name, facts) for name, facts in toml_tables(source).items()]
    return [add_dataset(entry) for entry in entries]


def _entry(name: str, facts: dict[str, object]) -> KnownDataset:
    where = f"data set {name!r}"
    reader = make_reader(facts.pop("layout", None), where)
    entry = fill(KnownDataset, {"name": name, **facts, "reader": reader}, where)
    if entry.captioned != isinstance(reader, ShardReader):
        raise UsageError(f"{where} must have n_classes where it has classes; tars have captions, and no n_classes.")
    return entry


add_datasets(resources.files("vilu").joinpath("assets", "datasets.toml").read_text(encoding="utf-8"))
SHIPPED: Final = frozenset(KNOWN)
