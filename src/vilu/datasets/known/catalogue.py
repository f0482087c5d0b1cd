"""The data sets that have a name: the paper's, from an asset, and whatever is added."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Final

from vilu.datasets.known.entry import KnownDataset
from vilu.datasets.known.layouts import make_reader
from vilu.errors import UsageError
from vilu.files import fill, toml_tables

KNOWN: Final[dict[str, KnownDataset]] = {}
"""By name: in the order of the paper, then in that in which they were added."""


def find_known(name: str) -> KnownDataset:
    """The entry of a data set; where there is none, the message names the nearest."""
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), KNOWN, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(KNOWN)}."
    raise UsageError(f"there is no data set {name!r}. {hint}")


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
    return fill(KnownDataset, {"name": name, **facts, "reader": reader}, where)


add_datasets(resources.files("vilu").joinpath("assets", "datasets.toml").read_text(encoding="utf-8"))
SHIPPED: Final = frozenset(KNOWN)
