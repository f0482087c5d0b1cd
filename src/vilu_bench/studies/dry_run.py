"""What a study would take, before it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vilu.artifacts.disk import MANIFEST
from vilu.artifacts.documents import read_document
from vilu.backbones.catalog import NAMED
from vilu.datasets.base import ShardedDataset
from vilu.datasets.known import KNOWN, find_known
from vilu.datasets.known.entry import find_place
from vilu.errors import DataError, StorageError, UsageError
from vilu.store.documents import Manifest
from vilu.text import aligned
from vilu_bench.studies.cells import needed_parts, origin_of, own_results, plan, sharing_a_fit
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import Data, Role
from vilu_bench.studies.stores import PACKAGE, Part, is_complete, open_images, store_of

COMPACT_WIDTHS = 768, 1280  # of the compact model: embeddings and features
HALF = 2  # bytes of a stored number


@dataclass(frozen=True)
class PartPlan:
    """A part of a data set."""

    data: str
    part: str  # which rows: a role, or "pairs" for all of them
    backbone: str
    images: int | None  # how many; None where that is not known
    counted: str  # where the number is from: "store", "listing" or "catalogue"
    state: str  # "embedded", "to embed", "no images here", or "unreadable"
    n_bytes: int | None  # of its embeddings and columns
    problem: str | None = None  # why images that are here cannot be read


@dataclass(frozen=True)
class StudyPlan:
    """A benchmark."""

    name: str
    title: str
    parts: tuple[PartPlan, ...]
    cells: int  # how many there are: a method, a data set, a setting, a seed
    runs: int  # those with a result of their own
    fits: int  # different fits behind them
    listed: tuple[
        dict[str, object], ...
    ]  # every cell, with the cell that it shares a result with, if any

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        return asdict(self)


def estimate(config: Config, data: Path, output: Path) -> StudyPlan:
    """What a benchmark would do with the folder of data and the output as they are; embeds and runs nothing."""
    cells = plan(config)
    parts = {
        part: _part(part, config.data[part[0]], data, output)
        for part in needed_parts(config, cells)
    }
    runs = own_results(cells)
    groups = sharing_a_fit(config, runs)
    return StudyPlan(
        name=config.name,
        title=config.study.title if config.study else "",
        parts=tuple(dict.fromkeys(parts.values())),
        cells=len(cells),
        runs=len(runs),
        fits=sum(bool(origin_of(config, group[0]).train) for group in groups),
        listed=tuple(
            {**asdict(cell), "same_as": None if cell.same_as is None else str(cell.same_as)}
            for cell in cells
        ),
    )


def _part(part: Part, entry: Data, data: Path, output: Path) -> PartPlan:
    if not _is_here(entry, data):
        return _expected(part, entry, _catalogued(entry, part[1]), "catalogue", "no images here")
    try:
        folder = store_of(part, entry, data, output)
        if is_complete(folder):
            return _embedded(part, entry, read_document(folder / MANIFEST, Manifest))
        with open_images(entry, part[1], data) as images:
            if not isinstance(images, ShardedDataset):
                return _expected(part, entry, len(images), "listing", "to embed")
        return _expected(part, entry, _catalogued(entry, part[1]), "catalogue", "to embed")
    except (
        UsageError,
        DataError,
        StorageError,
    ) as error:  # a plan says all that is wrong, not the first alone
        found = _expected(part, entry, _catalogued(entry, part[1]), "catalogue", "unreadable")
        return replace(found, problem=str(error))


def _is_here(entry: Data, data: Path) -> bool:
    """Whether there is anything where the images, or the stores, are said to be."""
    source = entry.source or "."
    if entry.stores is not None or source.startswith(PACKAGE):
        return True
    folder = data / source
    if entry.dataset is None:
        return folder.exists() or "{" in source  # a pattern of tar files is no name of one
    return folder.is_dir() and find_place(find_known(entry.dataset), folder, named=True) is not None


def _embedded(part: Part, entry: Data, manifest: Manifest) -> PartPlan:
    n_bytes = (
        manifest.n_ok
        * sum(map(math.prod, manifest.arrays.values()))
        * np.dtype(manifest.dtype).itemsize
    )
    name = str(manifest.space.backbone)
    return PartPlan(part[0], _title(part, entry), name, manifest.n_ok, "store", "embedded", n_bytes)


def _expected(part: Part, entry: Data, images: int | None, counted: str, state: str) -> PartPlan:
    named, is_compact = NAMED.get(entry.backbone), entry.backbone.partition(":")[0] == "compact"
    width, features = (
        (named.embed_dim, named.feature_dim) if named else COMPACT_WIDTHS if is_compact else (0, 0)
    )
    views = entry.views if part[1] == "test" and not entry.captions else 0
    numbers = width * (1 + views + entry.captions) + (features if entry.features else 0)
    n_bytes = None if images is None or not width else images * numbers * HALF
    return PartPlan(part[0], _title(part, entry), entry.backbone, images, counted, state, n_bytes)


def _title(part: Part, entry: Data) -> str:
    """The part; captions are in one store for all roles."""
    return "pairs" if entry.captions else part[1]


def _catalogued(entry: Data, role: Role) -> int | None:
    """Number of images by the catalogue."""
    if entry.dataset is None or entry.shards is not None:
        return None
    sizes, split = KNOWN[entry.dataset].sizes, str(getattr(entry, role))
    if entry.captions:
        return sum(sizes.values())
    names = [split] if split in sizes else split.split("+")
    known = [sizes[name] for name in names if name in sizes]
    total = sum(known) if len(known) == len(names) else None
    limit = entry.limit_of(role)
    return total if total is None or limit is None else min(total, limit)


def describe(plans: Sequence[StudyPlan]) -> str:
    """The plans as text: a table of embeddings and one of cells for each, then the sums."""
    parts = {(part.data, part.part, part.backbone): part for one in plans for part in one.parts}
    n_bytes = sum(part.n_bytes or 0 for part in parts.values())
    total = [
        f"together: {len(parts)} sets of embeddings, {n_bytes / 2**30:,.2f} GiB; {sum(one.runs for one in plans):,} "
        "runs (studies in one output share those that they have in common)",
        "Numbers of images marked * are the catalogue's.",
    ]
    return "\n\n".join([*map(_describe, plans), "\n".join(total)])


def _describe(one: StudyPlan) -> str:
    rows = [
        [
            part.data,
            part.part,
            part.backbone,
            "?"
            if part.images is None
            else f"{part.images:,}" + ("*" if part.counted == "catalogue" else ""),
            part.state,
            "?" if part.n_bytes is None else f"{part.n_bytes / 1e6:,.1f}",
        ]
        for part in one.parts
    ]
    counted = Counter((str(cell["data"]), str(cell["setting"])) for cell in one.listed)
    cells = ", ".join(f"{data}/{setting} {n}" for (data, setting), n in counted.items())
    problems = [
        f"{part.data} ({part.part}) cannot be read: {part.problem}"
        for part in one.parts
        if part.problem
    ]
    return "\n".join(
        [
            f"{one.name}: {one.title}",
            *aligned([["data", "part", "backbone", "images", "state", "MB"], *rows]),
            *problems,
            f"cells: {one.cells} ({cells})",
            f"runs: {one.runs} results from {one.fits} fits",
        ]
    )
