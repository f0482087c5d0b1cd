"""Commands on what vilu knows by name: list, datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from vilu.cli import console
from vilu.cli.console import columns, next_step, path_argument
from vilu.text import printable

if TYPE_CHECKING:
    from vilu.datasets.known import KnownDataset, Presence
    from vilu.datasets.known.entry import Count


datasets = typer.Typer(
    help="Data sets that vilu knows by name: what they are, and which are on this disk."
)
BELOW = ("folder", "archives", "trouble", "to do")
FACTS = (
    *(
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
    ),
    *("folders", "archives", "template", "coop_template", "reference"),
)
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]


@datasets.command("list")
def list_known(as_json: AsJson = False) -> None:
    """The data sets of the catalogue: classes, images by split, size of the download, licence, where to get them.

    Splits are named as in `vilu embed --dataset NAME --split SPLIT`. Sizes of downloads are
    approximate.
    """
    from vilu.datasets.known import KNOWN

    facts = [{name: getattr(entry, name) for name in FACTS} for entry in KNOWN.values()]
    table = columns([_dataset_in_brief(entry) for entry in KNOWN.values()], below=("how", "url"))
    typer.echo(json.dumps(facts, indent=2) if as_json else table)
    next_step("which are here, and whether they are whole: vilu datasets check FOLDER")


@datasets.command("check")
def check_known(
    path: Annotated[Path, path_argument("Folder that holds data sets, or one data set's own.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Which data sets. [all]", metavar="NAME", autocompletion=console.complete_datasets
        ),
    ] = None,
    deep: Annotated[
        bool, Option("--deep", help="Also compare checksums of archives, count pairs in tars.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is present, what is missing, and how to get it.

    Exit code 3 when a data set that is named is not whole.
    """
    from vilu.datasets.known import check
    from vilu.errors import DataError

    found = check(path, names or None, deep=deep)
    facts, rows = [presence.to_dict() for presence in found], [_row(presence) for presence in found]
    typer.echo(json.dumps(facts, indent=2) if as_json else columns(rows, below=BELOW))
    short = [presence.name for presence in found if presence.state in {"absent", "incomplete"}]
    if names and short:
        raise DataError(
            f"not whole: {', '.join(short)} ({len(short)} of {len(found)} data sets). See above."
        )
    next_step(f"{len(found) - len(short)} of {len(found)} data sets are here and whole")


def _dataset_in_brief(entry: KnownDataset) -> dict[str, str]:
    return {
        "name": entry.name,
        "classes": "captions" if entry.n_classes is None else str(entry.n_classes),
        "images": " ".join(f"{split} {n:,}" for split, n in entry.sizes.items()),
        "download": _size(entry.n_bytes),
        "licence": entry.licence,
        "how": entry.how,
        "url": f"{entry.url}  {entry.reference}",
    }


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "?"
    unit, name = next(
        (one for one in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if n_bytes >= one[0]), (1e3, "kB")
    )
    return f"{n_bytes / unit:.3g} {name}"


def _row(presence: Presence) -> dict[str, str]:
    missing = [name for split in presence.splits.values() for name in split.missing]
    said = [presence.problem, *(split.problem for split in presence.splits.values())]
    said += [f"missing: {', '.join(missing)}"] if missing else []
    row = {
        "name": presence.name,
        "state": presence.state,
        "images": " ".join(f"{name} {_counts(split)}" for name, split in presence.splits.items())
        or "-",
        "folder": f"{presence.folder}: {presence.origin}"
        if presence.origin
        else str(presence.folder or ""),
        "archives": "; ".join(
            f"{state}: {', '.join(names)}" for state, names in _by_state(presence.archives).items()
        ),
        "trouble": " ".join(dict.fromkeys(text for text in said if text)),
        "to do": presence.advice,
    }
    return {key: printable(text) for key, text in row.items()}


def _by_state(archives: Mapping[str, str]) -> dict[str, list[str]]:
    return {
        state: [name for name in archives if archives[name] == state]
        for state in dict.fromkeys(archives.values())
    }


def _counts(split: Count) -> str:
    """Found of listed, and what was published where that is another number."""
    found = "?" if split.found is None else f"{split.found:,}"
    listed = split.expected if split.listed is None else split.listed
    said = found if listed is None else f"{found}/{listed:,}"
    return said if split.expected in {None, listed} else f"{said} (published {split.expected:,})"


def list_catalogue(
    what: Annotated[
        Literal["predictors", "backbones", "datasets", "metrics"],
        typer.Argument(help="Which catalogue."),
    ],
    as_json: AsJson = False,
) -> None:
    """What there is: predictors, backbones, metrics or data set layouts (data sets by name: `vilu datasets list`).

    Of a predictor: whether it needs labels ("images": rows without any), works on image-caption
    pairs, and on any classes or those that it was fitted on; what `vilu embed` must keep for it (in
    brackets: may), where it comes from, what it is, what it costs.
    """
    rows = {
        "predictors": _predictors,
        "backbones": _backbones,
        "datasets": _datasets,
        "metrics": _metrics,
    }[what]()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif what == "predictors":
        typer.echo(columns(list(map(_predictor_in_brief, rows)), below=("what it is", "cost")))
    else:
        typer.echo(columns(rows, below=("what it is",) if what == "backbones" else ()))
    if what == "datasets":
        next_step("more of the data sets that have a name: vilu datasets list")


def _predictors() -> list[dict[str, Any]]:
    from vilu.predictors import PREDICTORS

    return [
        {
            "name": name,
            "needs labels": "no" if not cls.needs_fit else "yes" if cls.needs_labels else "images",
            "uses unlabelled": "yes" if cls.uses_unlabelled else "no",
            "needs columns": list(cls.columns),
            "uses columns": list(cls.optional_columns),
            "captions": "no" if cls.no_captions else "yes",
            "why no captions": cls.no_captions,
            "classes": "those of training" if cls.closed_set else "any",
            "probability": "yes" if cls.is_probability else "no",
            "cost": cls.cost,
            "reference": cls.reference,
            "what it is": cls.summary,
        }
        for name, cls in PREDICTORS.items()
    ]


def _metrics() -> list[dict[str, Any]]:
    from vilu.metrics.catalog import METRICS

    return [
        {
            "name": name,
            "title": metric.title,
            "better": "higher" if metric.higher_is_better else "lower",
            "of": "probability" if metric.of_probability else "any score",
            "computed": metric.wanted if metric.question == "failure" else "with outside rows",
            "convention": metric.convention,
        }
        for name, metric in METRICS.items()
    ]


def _predictor_in_brief(row: dict[str, Any]) -> dict[str, str]:
    """A predictor for a table of 120 columns."""
    from vilu.embeddings.columns import HOW

    needed, used = (
        list(dict.fromkeys(HOW[column].removeprefix("vilu embed ") for column in row[key]))
        for key in ("needs columns", "uses columns")
    )
    return {
        "name": row["name"],
        "labels": row["needs labels"],
        "captions": row["captions"],
        "classes": "fitted" if row["classes"] != "any" else "any",
        "embed with": " ".join([*needed, *([f"[{' '.join(used)}]"] if used else [])]) or "-",
        "reference": row["reference"],
        "what it is": row["what it is"],
        "cost": "" if row["cost"] == "none" else row["cost"],
    }


def _backbones() -> list[dict[str, Any]]:
    from vilu.backbones.catalog import BACKBONES, NAMED

    kinds = [
        {"name": name, "install": f"vilu[{kind.extra}]", "what it is": kind.description}
        for name, kind in BACKBONES.items()
    ]
    named = [
        {
            "name": name,
            "install": "vilu[clip]",
            "what it is": f"{model.title}, {model.image_size} px: open_clip:{model.open_clip}, or by {name}@hf "
            f"hf:{model.hf}",
            **asdict(model),
        }
        for name, model in NAMED.items()
    ]
    return [*kinds, *named]


def _datasets() -> list[dict[str, Any]]:
    """Layouts, and data sets by name."""
    from vilu.datasets.catalog import DATASETS
    from vilu.datasets.known import KNOWN
    from vilu.datasets.layouts import LAYOUTS

    descriptions = dict(DATASETS)
    for name, layout in LAYOUTS.items():
        descriptions[name] = layout.description
    for name, entry in KNOWN.items():
        descriptions.setdefault(name, f"{entry.title}, by --dataset {name}")
    return [{"name": name, "what it is": text} for name, text in descriptions.items()]
