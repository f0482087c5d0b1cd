"""What a study would take, before it runs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from vilu.backbones.catalog import NAMED
from vilu.benchmark.cells import Cell, Origin, needed_parts, origin_of, plan, scored_set_of, sharing_a_fit
from vilu.benchmark.config import MAX_EPOCHS, Config, is_trained
from vilu.benchmark.parts import Data, Role
from vilu.benchmark.ranking import aligned
from vilu.benchmark.stores import PACKAGE, Part, is_complete, open_images, store_of
from vilu.datasets.base import ShardedDataset
from vilu.datasets.known import KNOWN, find_known
from vilu.datasets.known.entry import find_place
from vilu.errors import DataError, StorageError, UsageError
from vilu.files import MANIFEST, read_document
from vilu.predictors.parameters import parameters
from vilu.store.documents import Manifest
from vilu.store.folds import TRAIN, VALIDATION

COMPACT_RATE, COMPACT_SIDE = 42.0, 224
"""Images a second of the compact model on two cores at a picture size; the time goes with the number of pixels."""

DEFAULT_STEPS = 6000
"""What a head makes without ``epochs`` or ``steps`` (``vilu.predictors.nn.train``)."""

REFERENCE_WIDTH = 768
"""Embedding width of the run that the seconds per row are from."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a method on one core, at ``REFERENCE_WIDTH`` and ten classes.

    Attributes:
        fit: Per training row, and per pass over them where there are several; 0 where nothing is fitted.
        score: Per test row.
    """

    fit: float
    score: float


@cache
def costs() -> dict[str, Cost]:
    """By method, from a run of configs/here/main.toml (tools/make_rates.py)."""
    text = resources.files("vilu").joinpath("assets", "rates.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {row["method"]: Cost(float(row["fit_us"]) * 1e-6, float(row["score_us"]) * 1e-6) for row in rows}


def image_rate(backbone: str) -> float | None:
    """Images a second on two CPU cores; None where it is not known."""
    if backbone in NAMED:
        return NAMED[backbone].image_rate
    kind, _, side = backbone.partition(":")
    return COMPACT_RATE * (COMPACT_SIDE / int(side or COMPACT_SIDE)) ** 2 if kind == "compact" else None


def passed_rows(config: Config, label: str, n_train: int) -> int:
    """Rows that a fit passes over: those of every epoch of a trained network, once for the others."""
    entry, cls = config.entries[label], config.class_of(label)
    if not is_trained(str(entry.method)):
        return n_train
    values: dict[str, Any] = {name: field.default for name, field in parameters(cls).items()} | entry.params
    if values["epochs"] is not None:
        return int(values["epochs"]) * n_train
    by_steps = (entry.steps or DEFAULT_STEPS) * int(values["batch_size"])
    return min(max(by_steps, n_train), MAX_EPOCHS * n_train)


def cell_seconds(config: Config, label: str, n_train: int, n_test: int, width: int) -> tuple[float, float] | None:
    """Seconds of the fit and of scoring on one core; None where the method was not timed."""
    cost = costs().get(str(config.entries[label].method))
    if cost is None:
        return None
    wide = width / REFERENCE_WIDTH
    return cost.fit * passed_rows(config, label, n_train) * wide, cost.score * n_test * wide


COMPACT_WIDTHS = 768, 1280
"""Of the compact model: embeddings and features."""

HALF = 2
"""Bytes of a stored number."""

FOLDS = {"train": TRAIN, "validation": VALIDATION - TRAIN, "test": 1 - VALIDATION}
"""Shares of the captions that are in each role."""


@dataclass(frozen=True)
class PartPlan:
    """A part of a data set.

    Attributes:
        data: The data set.
        part: Which rows: a role, or "pairs" for all of them.
        backbone: The model.
        images: How many; None where that is not known.
        counted: Where the number is from: "store", "listing" or "catalogue".
        state: "embedded", "to embed", "no images here", or "unreadable".
        n_bytes: Of its embeddings and columns.
        seconds: Of embedding on two CPU cores; 0 where it is done.
        seconds_a100: The same on one A100, by published rates; None where none is.
        problem: Why images that are here cannot be read.
    """

    data: str
    part: str
    backbone: str
    images: int | None
    counted: str
    state: str
    n_bytes: int | None
    seconds: float | None
    seconds_a100: float | None
    problem: str | None = None


@dataclass(frozen=True)
class StudyPlan:
    """A benchmark.

    Attributes:
        name: Of it.
        title: What it is about.
        parts: The embeddings that it needs.
        cells: How many there are: a method, a data set, a setting, a seed.
        runs: Those with a result of their own.
        fits: Different fits behind them.
        seconds: Of all runs on one core, by methods that were timed.
        untimed: Runs of other methods, or on data of unknown size.
        listed: Every cell, with the cell that it shares a result with, if any.
    """

    name: str
    title: str
    parts: tuple[PartPlan, ...]
    cells: int
    runs: int
    fits: int
    seconds: float
    untimed: int
    listed: tuple[dict[str, object], ...]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON."""
        return asdict(self)


def estimate(config: Config, data: Path, output: Path) -> StudyPlan:
    """What a benchmark would do with the folder of data and the output as they are; embeds and runs nothing.

    Raises:
        UsageError: If something in the benchmark cannot be.
    """
    cells = plan(config)
    parts = {part: _part(part, config.data[part[0]], data, output) for part in needed_parts(config, cells)}
    runs = [cell for cell in cells if cell.same_as is None]
    groups = sharing_a_fit(config, runs)
    seconds = [_seconds(config, group, parts) for group in groups]
    return StudyPlan(
        name=config.name,
        title=config.study.title if config.study else "",
        parts=tuple(dict.fromkeys(parts.values())),
        cells=len(cells),
        runs=len(runs),
        fits=sum(bool(origin_of(config, group[0]).train) for group in groups),
        seconds=sum(spent for spent, _ in seconds),
        untimed=sum(untimed for _, untimed in seconds),
        listed=tuple(
            {**asdict(cell), "same_as": None if cell.same_as is None else str(cell.same_as)} for cell in cells
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
    except (UsageError, DataError, StorageError) as error:  # a plan says all that is wrong, not the first alone
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
    n_bytes = manifest.n_ok * sum(map(math.prod, manifest.arrays.values())) * np.dtype(manifest.dtype).itemsize
    name = str(manifest.space.backbone)
    return PartPlan(part[0], _title(part, entry), name, manifest.n_ok, "store", "embedded", n_bytes, 0.0, 0.0)


def _expected(part: Part, entry: Data, images: int | None, counted: str, state: str) -> PartPlan:
    width, features = _widths(entry.backbone)
    views = entry.views if part[1] == "test" and not entry.captions else 0
    numbers = width * (1 + views + entry.captions) + (features if entry.features else 0)
    rate = image_rate(entry.backbone)
    a100 = NAMED[entry.backbone].a100_rate if entry.backbone in NAMED else None
    passes = None if images is None else images * (1 + views)
    return PartPlan(
        data=part[0],
        part=_title(part, entry),
        backbone=entry.backbone,
        images=images,
        counted=counted,
        state=state,
        n_bytes=None if images is None or not width else images * numbers * HALF,
        seconds=None if rate is None or passes is None else passes / rate,
        seconds_a100=None if a100 is None or passes is None else passes / a100,
    )


def _title(part: Part, entry: Data) -> str:
    """The part; captions are in one store for all roles."""
    return "pairs" if entry.captions else part[1]


def _catalogued(entry: Data, role: Role) -> int | None:
    """Number of images by the catalogue."""
    if entry.dataset is None or entry.shards is not None:
        return None
    sizes, wanted = KNOWN[entry.dataset].sizes, getattr(entry, role)
    if entry.captions:
        return sum(sizes.values())
    split = str(wanted)
    names = [split] if split in sizes else split.split("+")
    known = [sizes[name] for name in names if name in sizes]
    total = sum(known) if len(known) == len(names) else None
    limit = entry.limit_of(role)
    return total if total is None or limit is None else min(total, limit)


def _widths(backbone: str) -> tuple[int, int]:
    """Widths of embeddings and features; zeros where they are not known."""
    if backbone in NAMED:
        return NAMED[backbone].embed_dim, NAMED[backbone].feature_dim
    return COMPACT_WIDTHS if backbone.partition(":")[0] == "compact" else (0, 0)


def _seconds(config: Config, group: Sequence[Cell], parts: dict[Part, PartPlan]) -> tuple[float, int]:
    """Seconds of cells that share a fit, and how many of them have no estimate."""
    spent, untimed, fitted = 0.0, 0, set[Origin]()
    for cell in group:
        origin, scored = origin_of(config, cell), scored_set_of(config, cell)
        n_train, n_test = _rows(config, origin, parts), _rows_of(config, scored.data, scored.role, parts)
        if n_train is None or n_test is None:
            untimed += 1
            continue
        width = _widths(config.data[scored.data].backbone)[0]
        found = cell_seconds(config, cell.method, n_train, n_test, width)
        untimed += found is None
        if found is not None:
            spent += found[1] + (0.0 if origin in fitted else found[0])
            fitted.add(origin)
    return spent, untimed


def _rows(config: Config, origin: Origin, parts: dict[Part, PartPlan]) -> int | None:
    """Training rows of a fit."""
    counts = [_rows_of(config, data, "train", parts) for data in origin.train]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    if isinstance(origin.budget, float):
        return round(origin.budget * sum(known))
    if isinstance(origin.budget, int):
        return min(origin.budget * _n_classes(config.data[origin.train[0]]), sum(known))
    return sum(known)


def _rows_of(config: Config, data: str, role: Role, parts: dict[Part, PartPlan]) -> int | None:
    """Rows of a role: of captions, its share of the store; of held-out training rows, theirs."""
    entry = config.data[data]
    if entry.captions:
        images = parts[data, role].images
        return None if images is None else round(FOLDS[role] * images)
    if isinstance(entry.validation, float) and role != "test":
        images = parts[data, "train"].images
        share = entry.validation if role == "validation" else 1 - entry.validation
        return None if images is None else round(share * images)
    return parts[data, role].images


def _n_classes(entry: Data) -> int:
    """Number of classes; ten where it is not known before the data are read."""
    known = KNOWN[entry.dataset].n_classes if entry.dataset else None
    return len(entry.classes) if entry.classes else known or 10


def describe(plans: Sequence[StudyPlan]) -> str:
    """The plans as text: a table of embeddings and one of cells for each, then the sums."""
    texts = [_describe(one) for one in plans]
    parts = {(part.data, part.part, part.backbone): part for one in plans for part in one.parts}
    total = [
        f"together: {len(parts)} sets of embeddings, {_gib(part.n_bytes for part in parts.values())}, "
        f"{_hours(part.seconds for part in parts.values())} of embedding on two CPU cores "
        f"({_hours(part.seconds_a100 for part in parts.values())} on an A100 by published rates); "
        f"{sum(one.runs for one in plans):,} runs (studies in one output share those that they have in common), "
        f"{_hours(one.seconds for one in plans)} on one core",
        "Numbers of images marked * are the catalogue's; times are guesses from rates measured on two CPU cores "
        "(embedding by vilu.backbones.catalog, methods by one run with ten classes, scaled with rows and width).",
    ]
    return "\n\n".join([*texts, "\n".join(total)])


def _describe(one: StudyPlan) -> str:
    heading = ["data", "part", "backbone", "images", "state", "MB", "CPU h", "A100 min"]
    rows = [
        [
            part.data,
            part.part,
            part.backbone,
            "?" if part.images is None else f"{part.images:,}" + ("*" if part.counted == "catalogue" else ""),
            part.state,
            "?" if part.n_bytes is None else f"{part.n_bytes / 1e6:,.1f}",
            "?" if part.seconds is None else f"{part.seconds / 3600:.2f}",
            "?" if part.seconds_a100 is None else f"{part.seconds_a100 / 60:.1f}",
        ]
        for part in one.parts
    ]
    counted = Counter((str(cell["data"]), str(cell["setting"])) for cell in one.listed)
    cells = ", ".join(f"{data}/{setting} {n}" for (data, setting), n in counted.items())
    problems = [f"{part.data} ({part.part}) cannot be read: {part.problem}" for part in one.parts if part.problem]
    untimed = f", {one.untimed} runs without an estimate" if one.untimed else ""
    return "\n".join(
        [
            f"{one.name}: {one.title}",
            *aligned([heading, *rows]),
            *problems,
            f"cells: {one.cells} ({cells})",
            f"runs: {one.runs} results from {one.fits} fits, about {_hours([one.seconds])} on one core{untimed}",
        ]
    )


def _hours(seconds: Iterable[float | None]) -> str:
    return f"{sum(filter(None, seconds)) / 3600:,.1f} h"


def _gib(sizes: Iterable[int | None]) -> str:
    return f"{sum(filter(None, sizes)) / 2**30:,.2f} GiB"
