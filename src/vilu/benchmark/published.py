"""Numbers that publications report, as data with their source, to stand beside ours."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from vilu.errors import DataError

Key = tuple[str, str, str, str]
"""Data set, setting, method, metric; each as publications are entered in the file."""


@dataclass(frozen=True)
class Published:
    """A number of a publication."""

    value: float  # the metric, as a fraction
    backbone: str  # the model behind it (``vilu.backbones.catalog``)
    source: str  # where it stands
    doubt: str  # why it is doubtful; "" where nothing speaks against it


@cache
def published_tables() -> dict[str, dict[Key, tuple[Published, ...]]]:
    """Every published table by name: numbers by data set, setting, method and metric, one for each backbone."""
    tables: dict[str, dict[Key, tuple[Published, ...]]] = {}
    text = resources.files("vilu").joinpath("assets", "published.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        key = row["dataset"], row["setting"], row["method"], row["metric"]
        cells = tables.setdefault(row["table"], {})
        number = Published(round(float(row["percent"]) / 100, 6), row["backbone"], row["source"], row["doubt"])
        if any(other.backbone == number.backbone for other in cells.get(key, ())):
            raise DataError(f"published.csv has {row['table']}, {', '.join(key)} twice for {number.backbone}.")
        cells[key] = (*cells.get(key, ()), number)
    return tables


def find_published(tables: Sequence[str], key: Key, backbone: str) -> Published | None:
    """The number of the first of some tables that has one: of this backbone, or of the only one there is.

    Numbers of several other backbones are none: which of them would be meant, nobody knows.
    """
    for name in tables:
        found = published_tables()[name].get(key, ())
        same = [number for number in found if number.backbone == backbone]
        if same or len(found) == 1:
            return (same or list(found))[0]
    return None
