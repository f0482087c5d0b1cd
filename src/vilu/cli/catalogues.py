"""Commands to list the names known to vilu: list, datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from vilu.cli.console import format_columns, log_next_step, print_result
from vilu.cli.options import complete_datasets, path_argument
from vilu.text import escape_unprintable

if TYPE_CHECKING:
    from vilu.backbones.catalog import BackboneKind
    from vilu.datasets.known import KnownDataset, Presence
    from vilu.datasets.known.entry import Count
    from vilu.metrics.catalog import Metric
    from vilu.predictors.contract.predictor import FailurePredictor


COLUMNS_BELOW_ROW = ("folder", "archives", "trouble", "to do")
"""Columns of ``vilu datasets check`` to print on separate lines below the row."""

BENCH_HINT = "the data sets that have a name come with: pip install 'vilu[bench]'"
"""Closing line if vilu knows no data set by name, because vilu-bench is not installed."""

DATASET_FIELDS = (
    "name",
    "title",
    "n_classes",
    "captioned",
    "sizes",
    "official_sizes",
    "licence",
    "n_bytes",
    "url",
    "how",
    "folders",
    "archives",
    "template",
    "coop_template",
    "reference",
)
"""A data set's fields to print in ``vilu datasets list --json``."""


def list_datasets() -> None:
    """List the data sets of the catalogue: classes, images by split, licence, where to get them.

    Splits are named as in `vilu embed --dataset NAME --split SPLIT`. Sizes of downloads are
    approximate.
    """
    from vilu.datasets.known import KNOWN

    facts = []
    rows = []
    for entry in KNOWN.values():
        facts.append({name: getattr(entry, name) for name in DATASET_FIELDS})
        cells = _dataset_cells(entry)
        rows.append(cells)
    table = format_columns(rows, keys_below=("how", "url"))
    print_result(facts, table)
    if not rows:
        log_next_step(BENCH_HINT)
        return
    log_next_step("which are here, and whether they are whole: vilu datasets check FOLDER")


def check_datasets(
    path: Annotated[Path, path_argument("Folder of data sets, or folder of one data set.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Which data sets. [all]", metavar="NAME", autocompletion=complete_datasets
        ),
    ] = None,
    deep: Annotated[
        bool, Option("--deep", help="Also compare checksums of archives, count pairs in tars.")
    ] = False,
) -> None:
    """Show which data sets are present, what is missing, and how to get it.

    The exit code is 3 if a data set named on the command line is not complete.
    """
    from vilu.datasets.known import check
    from vilu.errors import DataError

    presences = check(path, names or None, deep=deep)  # None: all data sets
    facts = []
    rows = []
    for presence in presences:
        facts.append(presence.to_dict())
        rows.append(_presence_cells(presence))
    print_result(facts, format_columns(rows, keys_below=COLUMNS_BELOW_ROW))
    incomplete_names = []
    for presence in presences:
        if presence.state in {"absent", "incomplete"}:
            incomplete_names.append(presence.name)
    if names and incomplete_names:
        raise DataError(
            f"not whole: {', '.join(incomplete_names)} ({len(incomplete_names)} of "
            f"{len(presences)} data sets). See above."
        )
    if not presences:
        log_next_step(BENCH_HINT)
        return
    n_complete = len(presences) - len(incomplete_names)
    log_next_step(f"{n_complete} of {len(presences)} data sets are here and whole")


def _dataset_cells(entry: KnownDataset) -> dict[str, str]:
    """Return a data set's cells in the table of ``vilu datasets list``."""
    classes = "captions"
    if entry.n_classes is not None:
        classes = str(entry.n_classes)
    image_counts = [f"{split} {n:,}" for split, n in entry.sizes.items()]
    return {
        "name": entry.name,
        "classes": classes,
        "images": " ".join(image_counts),
        "download": _size_text(entry.n_bytes),
        "licence": entry.licence,
        "how": entry.how,
        "url": f"{entry.url}  {entry.reference}",
    }


def _size_text(n_bytes: int | None) -> str:
    """Format a size, such as "4.2 GB". Return "?" if the size is not known."""
    if n_bytes is None:
        return "?"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes / 1e3:.3g} kB"


def _presence_cells(presence: Presence) -> dict[str, str]:
    """Return a data set's cells in the table of ``vilu datasets check``."""
    problems = [presence.problem]
    missing_files: list[str] = []
    counts: list[str] = []
    for name, split in presence.splits.items():
        problems.append(split.problem)
        missing_files += split.missing
        count = _count_text(split)
        counts.append(f"{name} {count}")
    if missing_files:
        listed_files = ", ".join(missing_files)
        problems.append(f"missing: {listed_files}")
    # without empty and repeated texts, in the same order
    distinct_problems = dict.fromkeys(problem for problem in problems if problem)
    folder = ""
    if presence.folder is not None:
        folder = str(presence.folder)
    if presence.origin:
        folder = f"{presence.folder}: {presence.origin}"
    row = {
        "name": presence.name,
        "state": presence.state,
        "images": " ".join(counts) or "-",
        "folder": folder,
        "archives": _grouped_by_state(presence.archives),
        "trouble": " ".join(distinct_problems),
        "to do": presence.advice,
    }
    return {key: escape_unprintable(text) for key, text in row.items()}


def _grouped_by_state(archives: Mapping[str, str]) -> str:
    """Join archive names, grouped by state: "right: a.zip, b.zip; wrong: c.zip"."""
    names_of_state: dict[str, list[str]] = {}
    for name, state in archives.items():
        names_of_state.setdefault(state, []).append(name)
    groups = [f"{state}: {', '.join(names)}" for state, names in names_of_state.items()]
    return "; ".join(groups)


def _count_text(split: Count) -> str:
    """Format image counts: "90/100 (published 120)" for 90 found, 100 listed, 120 published images.

    Without a list, the published number stands after the slash. A published number that is equal to
    the listed number is not repeated.
    """
    n_published = split.expected
    n_after_slash = n_published if split.listed is None else split.listed
    counts = "?"
    if split.found is not None:
        counts = f"{split.found:,}"
    if n_after_slash is not None:
        counts = f"{counts}/{n_after_slash:,}"
    if n_published is None or n_published == n_after_slash:
        return counts
    return f"{counts} (published {n_published:,})"


def list_(
    what: Annotated[
        Literal["predictors", "backbones", "datasets", "metrics"],
        typer.Argument(help="predictors, backbones, metrics, or datasets for layouts of data."),
    ],
) -> None:
    """List predictors, backbones, metrics or data set layouts.

    Data sets by name are listed by `vilu datasets list`.

    For predictors, the column "labels" says whether the fit needs labels ("images": the fit needs
    images without labels). "captions" says whether the predictor works on image-caption pairs.
    "classes" is "any", or "fitted" for only the classes of the fit. "embed with" has the needed
    flags of `vilu embed`, and optional flags in brackets. The description and the cost stand below
    each row.
    """
    rows_of_catalogue = {
        "predictors": _predictor_rows,
        "backbones": _backbone_rows,
        "datasets": _dataset_rows,
        "metrics": _metric_rows,
    }
    rows = rows_of_catalogue[what]()
    table = _catalogue_table(what, rows)
    print_result(rows, table)
    if what == "datasets":
        log_next_step("data sets that vilu knows by name: vilu datasets list")


def _catalogue_table(catalogue: str, rows: list[dict[str, Any]]) -> str:
    """Format a catalogue's rows as a table for people."""
    if catalogue == "predictors":
        short_rows = [_predictor_cells(row) for row in rows]
        return format_columns(short_rows, keys_below=("what it is", "cost"))
    if catalogue == "backbones":
        return format_columns(rows, keys_below=("what it is",))
    return format_columns(rows)


def _predictor_rows() -> list[dict[str, Any]]:
    """Make a row for every predictor."""
    from vilu.predictors import PREDICTORS
    from vilu.predictors.contract.catalogue import find_method
    from vilu.registry import METHODS_OF_TABLES

    rows = [_predictor_row(name, cls) for name, cls in PREDICTORS.items()]
    # the methods for tables of answers are not in ``PREDICTORS``
    rows += [_predictor_row(name, find_method(name)) for name in METHODS_OF_TABLES]
    return rows


def _predictor_row(name: str, cls: type[FailurePredictor]) -> dict[str, Any]:
    """Make a predictor's row."""
    if not cls.needs_fit:
        label_need = "no"
    elif cls.needs_labels:
        label_need = "yes"
    else:
        label_need = "images"  # the method is fitted on images without labels
    classes = "any"
    if cls.closed_set:  # the method only works on the classes of the fit
        classes = "those of training"
    needed_columns = list(cls.columns)
    if cls.takes == "answers":  # ``cls.columns`` are columns of a table, not made by `vilu embed`
        needed_columns = []
    return {
        "name": name,
        "takes": cls.takes,
        "needs labels": label_need,
        "uses unlabelled": _yes_or_no(cls.uses_unlabelled),
        "needs columns": needed_columns,
        "uses columns": list(cls.optional_columns),
        "captions": _yes_or_no(not cls.no_captions),
        "why no captions": cls.no_captions,
        "classes": classes,
        "probability": _yes_or_no(cls.is_probability),
        "cost": cls.cost,
        "reference": cls.reference,
        "what it is": cls.summary,
    }


def _yes_or_no(value: bool) -> str:
    if value:
        return "yes"
    return "no"


def _metric_rows() -> list[dict[str, Any]]:
    """Make a row for every metric."""
    from vilu.metrics.catalog import METRICS

    return [_metric_row(name, metric) for name, metric in METRICS.items()]


def _metric_row(name: str, metric: Metric) -> dict[str, Any]:
    """Make a metric's row. The cell "computed" says when the metric is computed."""
    better_direction = "lower"
    if metric.higher_is_better:
        better_direction = "higher"
    measured_quantity = "any score"
    if metric.of_probability:
        measured_quantity = "probability"
    computed_when: str = metric.wanted
    if metric.question != "failure":  # the metric needs pictures outside all classes
        computed_when = "with outside rows"
    return {
        "name": name,
        "title": metric.title,
        "better": better_direction,
        "of": measured_quantity,
        "computed": computed_when,
        "convention": metric.convention,
    }


def _predictor_cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a predictor's cells, short enough for a table 120 characters wide."""
    flags = _embed_flags(row["needs columns"])
    optional_flags = _embed_flags(row["uses columns"])
    if optional_flags:
        listed_flags = " ".join(optional_flags)
        flags.append(f"[{listed_flags}]")
    classes = "fitted"
    if row["classes"] == "any":
        classes = "any"
    embed_with = " ".join(flags) or "-"
    if row["takes"] == "answers":
        embed_with = "no store: a table"
    cost = row["cost"]
    if cost == "none":
        cost = ""
    return {
        "name": row["name"],
        "labels": row["needs labels"],
        "captions": row["captions"],
        "classes": classes,
        "embed with": embed_with,
        "reference": row["reference"],
        "what it is": row["what it is"],
        "cost": cost,
    }


def _embed_flags(columns: list[str]) -> list[str]:
    """Return the `vilu embed` flags that store these columns, without repetition."""
    from vilu.embeddings.columns import COLUMN_COMMANDS

    flags = [COLUMN_COMMANDS[column].removeprefix("vilu embed ") for column in columns]
    return list(dict.fromkeys(flags))


def _backbone_rows() -> list[dict[str, Any]]:
    """Make a row for every backbone."""
    from vilu.backbones.catalog import BACKBONES, BackboneKind, named_backbones

    rows = []
    for name, kind in BACKBONES.items():
        if isinstance(kind, BackboneKind):  # named backbones follow below
            facts = {"name": name, "install": _extra_text(kind), "what it is": kind.description}
            rows.append(facts)
    models = named_backbones()
    for name, model in models.items():
        description = (
            f"{model.title}, {model.image_size} px: open_clip:{model.open_clip}, or by {name}@hf "
            f"hf:{model.hf}"
        )
        row = {"name": name, "install": "vilu[clip]", "what it is": description}
        rows.append(row | asdict(model))  # the model's facts are printed only with --json
    return rows


def _extra_text(kind: BackboneKind) -> str:
    """Name the vilu extra that a backbone needs. Return "-" if no extra is needed."""
    if kind.extra == "":
        return "-"
    return f"vilu[{kind.extra}]"


def _dataset_rows() -> list[dict[str, Any]]:
    """Return the names and descriptions of layouts, and of data sets with a name."""
    from vilu.datasets.catalog import SOURCE_KINDS
    from vilu.datasets.known import KNOWN
    from vilu.datasets.layouts import LAYOUTS

    descriptions = dict(SOURCE_KINDS)
    for name, layout in LAYOUTS.items():
        descriptions[name] = layout.description
    for name, entry in KNOWN.items():
        # a layout with the same name keeps the layout's description
        descriptions.setdefault(name, f"{entry.title}, by --dataset {name}")
    return [{"name": name, "what it is": text} for name, text in descriptions.items()]
