"""Plans of studies: what a study would run, and how much disk space the study would need."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vilu.artifacts.disk import MANIFEST_FILE
from vilu.artifacts.documents import read_document
from vilu.backbones.catalog import BACKBONES, NamedBackbone
from vilu.datasets.base import ShardedDataset
from vilu.datasets.known import KNOWN, find_known
from vilu.datasets.known.entry import find_place
from vilu.errors import DataError, StorageError, UsageError
from vilu.store.manifest import Manifest
from vilu.text import align_columns
from vilu_bench.studies.cells import (
    Cell,
    cells_to_run,
    fit_inputs_of,
    group_by_fit,
    needed_parts,
    plan_cells,
)
from vilu_bench.studies.config import Config
from vilu_bench.studies.parts import Data, Role
from vilu_bench.studies.stores import PACKAGE_PREFIX, Part, is_complete, open_images, store_of

COMPACT_WIDTHS = (768, 1280)  # widths of the compact model's embeddings and features
FLOAT16_BYTES = 2  # bytes per stored number (float16)


@dataclass(frozen=True)
class PartPlan:
    """Plan for one part of a data set."""

    data: str
    part: str  # a role, or "pairs" for the pairs of all roles
    backbone: str
    images: int | None  # number of images, or None if unknown
    counted: str  # where ``images`` comes from: "store", "listing" or "catalogue"
    state: str  # "embedded", "to embed", "no images here", or "unreadable"
    n_bytes: int | None  # size of the embeddings and columns, or None if unknown
    problem: str | None = None  # why the images are "unreadable"


@dataclass(frozen=True)
class StudyPlan:
    """Plan for a benchmark."""

    name: str
    title: str
    parts: tuple[PartPlan, ...]
    cells: int  # number of cells, where a cell is a method, a data set, a setting and a seed
    runs: int  # number of cells to run, without cells that share another cell's result
    # number of different fits that the runs need, without fits that start from an earlier fit
    fits: int
    # Every cell as plain JSON. ``same_as`` names the cell whose result this cell shares.
    listed: tuple[dict[str, object], ...]

    def to_dict(self) -> dict[str, object]:
        """Return the plan as plain JSON."""
        return asdict(self)


def plan_study(config: Config, data: Path, output: Path) -> StudyPlan:
    """Plan a benchmark with the present data and output. Nothing is run."""
    cells = plan_cells(config)
    cells_run = cells_to_run(cells)
    parts = []
    for part in needed_parts(config, cells):
        name, _role = part
        parts.append(_plan_of_part(part, config.data[name], data, output))
    n_fits = 0
    for group in group_by_fit(config, cells_run):
        if fit_inputs_of(config, group[0]).train:
            n_fits += 1
    distinct_parts = dict.fromkeys(parts)  # with captions, all roles are one part
    listed_cells = [_cell_to_dict(cell) for cell in cells]
    return StudyPlan(
        name=config.name,
        title=config.study.title if config.study else "",
        parts=tuple(distinct_parts),
        cells=len(cells),
        runs=len(cells_run),
        fits=n_fits,
        listed=tuple(listed_cells),
    )


def _cell_to_dict(cell: Cell) -> dict[str, object]:
    """Return a cell as plain JSON."""
    content = asdict(cell)
    if cell.same_as is not None:
        content["same_as"] = str(cell.same_as)
    return content


def _plan_of_part(part: Part, entry: Data, data_folder: Path, output: Path) -> PartPlan:
    """Plan a part by the store, or else by the images, or else by the catalogue."""
    _name, role = part
    catalogue_plan = _plan_by_catalogue(part, entry)
    if not _has_data_here(entry, data_folder):
        return replace(catalogue_plan, state="no images here")
    try:
        folder = store_of(part, entry, data_folder, output)
        if is_complete(folder):
            manifest = read_document(folder / MANIFEST_FILE, Manifest)
            return _plan_of_store(part, entry, manifest)
        with open_images(entry, role, data_folder) as images:
            if not isinstance(images, ShardedDataset):  # images in tar files are not counted
                return _plan_to_embed(part, entry, len(images), counted="listing")
    except (UsageError, DataError, StorageError) as error:
        # not raised, because the plan reports the problems of all parts
        return replace(catalogue_plan, state="unreadable", problem=str(error))
    return catalogue_plan


def _has_data_here(entry: Data, data_folder: Path) -> bool:
    """Return whether an entry's images or stores seem to be on this disk."""
    source = entry.source or "."
    if entry.stores is not None or source.startswith(PACKAGE_PREFIX):
        return True
    folder = data_folder / source
    if entry.dataset is None:
        is_pattern = "{" in source  # a pattern of tar files, such as {000..099}.tar, and no file
        return is_pattern or folder.exists()
    if not folder.is_dir():
        return False
    dataset = find_known(entry.dataset)
    return find_place(dataset, folder, named=True) is not None


def _plan_of_store(part: Part, entry: Data, manifest: Manifest) -> PartPlan:
    """Plan a part with a complete store."""
    name, _role = part
    numbers_per_image = sum(math.prod(shape) for shape in manifest.row_shapes.values())
    n_bytes = manifest.n_ok * numbers_per_image * np.dtype(manifest.dtype).itemsize
    title = _part_title(part, entry)
    return PartPlan(
        data=name,
        part=title,
        backbone=str(manifest.space.backbone),
        images=manifest.n_ok,
        counted="store",
        state="embedded",
        n_bytes=n_bytes,
    )


def _plan_by_catalogue(part: Part, entry: Data) -> PartPlan:
    """Plan a part, with the image count from the catalogue."""
    _name, role = part
    n_images = _catalogued_images(entry, role)
    return _plan_to_embed(part, entry, n_images, counted="catalogue")


def _plan_to_embed(part: Part, entry: Data, images: int | None, counted: str) -> PartPlan:
    """Plan a part that is still to be embedded. ``counted`` says where ``images`` comes from."""
    name, _role = part
    numbers_per_image = _numbers_per_image(part, entry)
    n_bytes = None
    if images is not None and numbers_per_image is not None:
        n_bytes = images * numbers_per_image * FLOAT16_BYTES
    title = _part_title(part, entry)
    return PartPlan(
        data=name,
        part=title,
        backbone=entry.backbone,
        images=images,
        counted=counted,
        state="to embed",
        n_bytes=n_bytes,
    )


def _numbers_per_image(part: Part, entry: Data) -> int | None:
    """Count the numbers stored per image, or return None if the model's widths are unknown."""
    _name, role = part
    widths = _widths_of_model(entry.backbone)
    if widths is None:
        return None
    embed_width, feature_width = widths
    n_embeddings = 1  # the image's embedding
    if entry.captions:
        n_embeddings += 1  # the caption's embedding
    elif role == "test":
        n_embeddings += entry.views  # an embedding for every view
    if not entry.features:
        feature_width = 0
    return embed_width * n_embeddings + feature_width


def _widths_of_model(backbone: str) -> tuple[int, int] | None:
    """Return the widths of a model's embeddings and features, or None if unknown."""
    named = BACKBONES.get(backbone)
    if isinstance(named, NamedBackbone):
        return named.embed_dim, named.feature_dim
    family, _, _ = backbone.partition(":")
    if family == "compact":
        return COMPACT_WIDTHS
    return None


def _part_title(part: Part, entry: Data) -> str:
    """Name the part by its role, or "pairs" for captions, because one store holds all roles."""
    if entry.captions:
        return "pairs"
    _name, role = part
    return role


def _catalogued_images(entry: Data, role: Role) -> int | None:
    """Look up a role's image count in the catalogue, or return None if no count is there."""
    if entry.dataset is None:
        return None
    if entry.shards is not None:
        return None
    sizes = KNOWN[entry.dataset].sizes
    if entry.captions:
        return sum(sizes.values())
    split = str(getattr(entry, role))
    # ``+`` joins several splits, but may also be in the name of one split
    names = [split] if split in sizes else split.split("+")
    has_all_sizes = sizes.keys() >= set(names)
    if not has_all_sizes:
        return None
    total = sum(sizes[name] for name in names)
    limit = entry.limit_of(role)
    if limit is None:
        return total
    return min(total, limit)


def describe_plans(plans: Sequence[StudyPlan]) -> str:
    """Describe the plans as text: each study's embeddings, cells and runs, then the totals."""
    # The keys are data set, part and backbone. So a part that several studies need counts once.
    bytes_of: dict[tuple[str, str, str], int] = {}
    n_runs = 0
    for study in plans:
        n_runs += study.runs
        for part in study.parts:
            bytes_of[part.data, part.part, part.backbone] = part.n_bytes or 0
    gib = sum(bytes_of.values()) / 2**30
    totals = (
        f"together: {len(bytes_of)} sets of embeddings, {gib:,.2f} GiB; {n_runs:,} runs "
        "(studies in one output share those that they have in common)\n"
        "Numbers of images marked * are the catalogue's."
    )
    descriptions = [_describe_study(study) for study in plans]
    return "\n\n".join([*descriptions, totals])


def _describe_study(study: StudyPlan) -> str:
    """Describe a study's plan: a table with the parts, and numbers of cells and fits."""
    rows = [["data", "part", "backbone", "images", "state", "MB"]]
    problems = []
    for part in study.parts:
        size = "?" if part.n_bytes is None else f"{part.n_bytes / 1e6:,.1f}"
        images_in_words = _images_in_words(part)
        rows.append([part.data, part.part, part.backbone, images_in_words, part.state, size])
        if part.problem:
            problems.append(f"{part.data} ({part.part}) cannot be read: {part.problem}")
    cell_counts = Counter(f"{cell['data']}/{cell['setting']}" for cell in study.listed)
    cells = ", ".join(f"{data_and_setting} {n}" for data_and_setting, n in cell_counts.items())
    lines = [
        f"{study.name}: {study.title}",
        *align_columns(rows),
        *problems,
        f"cells: {study.cells} ({cells})",
        f"runs: {study.runs} results from {study.fits} fits",
    ]
    return "\n".join(lines)


def _images_in_words(part: PartPlan) -> str:
    """Write the image count as text. A star marks a count from the catalogue."""
    if part.images is None:
        return "?"
    if part.counted == "catalogue":
        return f"{part.images:,}*"
    return f"{part.images:,}"
