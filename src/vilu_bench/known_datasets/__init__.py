"""The data sets of the paper by name, and data sets from TOML tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vilu.artifacts.documents import fill_dataclass
from vilu.datasets.known import KnownDataset, add_dataset, require_free_name
from vilu.errors import UsageError
from vilu.registry import toml_tables
from vilu_bench import read_asset
from vilu_bench.known_datasets.layouts import ShardReader, make_reader

__all__ = ["add_datasets", "add_tables"]


def add_datasets(source: Path | str) -> list[KnownDataset]:
    """Add the data sets in a TOML file or a TOML text.

    Each data set has a table with the keys of ``assets/datasets.toml``.

    Raises:
        UsageError: If the TOML cannot be read, if a key is missing, unknown or has a wrong type, or
            if a name is taken.
    """
    tables = toml_tables(source)
    return add_tables(tables)


def add_tables(tables: Mapping[str, dict[str, Any]]) -> list[KnownDataset]:
    """Add the data sets in ``tables``. A table's key is the data set's name.

    If any data set cannot be added, no data set is added.

    Raises:
        UsageError: If a key is missing, unknown or has a wrong type, or if a name is taken.
    """
    entries = [_known_dataset(name, dict(facts)) for name, facts in tables.items()]
    for entry in entries:
        require_free_name(entry)
    return [add_dataset(entry) for entry in entries]


def _known_dataset(name: str, facts: dict[str, object]) -> KnownDataset:
    """Make the data set with this name from a table of ``facts``."""
    where = f"data set {name!r}"
    layout = facts.pop("layout", None)
    reader = make_reader(layout, where)
    entry = fill_dataclass(KnownDataset, {"name": name, **facts, "reader": reader}, where)
    has_captions = isinstance(reader, ShardReader)
    if entry.captioned != has_captions:
        raise UsageError(
            f"{where} must have n_classes if it has classes, and no n_classes if it has captions "
            "(layout tars)."
        )
    return entry


def paper_datasets() -> list[KnownDataset]:
    """List the paper's data sets, in the paper's order, from ``assets/datasets.toml``."""
    text = read_asset("datasets.toml")
    tables = toml_tables(text)
    return [_known_dataset(name, facts) for name, facts in tables.items()]


for _dataset in paper_datasets():
    globals()[_dataset.name] = _dataset  # the entry points of pyproject.toml name these variables
