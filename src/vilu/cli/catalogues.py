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
    from vilu.backbones.catalog import BackboneKind
    from vilu.datasets.known import KnownDataset, Presence
    from vilu.datasets.known.entry import Count
    from vilu.predictors.contract.predictor import FailurePredictor


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

    presences = check(path, names or None, deep=deep)
    if as_json:
        facts = [presence.to_dict() for presence in presences]
        typer.echo(json.dumps(facts, indent=2))
    else:
        rows = [_row(presence) for presence in presences]
        typer.echo(columns(rows, below=BELOW))
    short = [p.name for p in presences if p.state in {"absent", "incomplete"}]
    if names and short:
        raise DataError(
            f"not whole: {', '.join(short)} ({len(short)} of {len(presences)} data sets). See above."
        )
    n_whole = len(presences) - len(short)
    next_step(f"{n_whole} of {len(presences)} data sets are here and whole")


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
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes / 1e3:.3g} kB"


def _row(presence: Presence) -> dict[str, str]:
    problems = [presence.problem]
    missing: list[str] = []
    counts = []
    for name, split in presence.splits.items():
        problems.append(split.problem)
        missing += split.missing
        counts.append(f"{name} {_counts(split)}")
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    folder = str(presence.folder or "")
    if presence.origin:
        folder = f"{presence.folder}: {presence.origin}"
    row = {
        "name": presence.name,
        "state": presence.state,
        "images": " ".join(counts) or "-",
        "folder": folder,
        "archives": _by_state(presence.archives),
        "trouble": " ".join(dict.fromkeys(filter(None, problems))),
        "to do": presence.advice,
    }
    return {key: printable(text) for key, text in row.items()}


def _by_state(archives: Mapping[str, str]) -> str:
    """The names of archives, state by state."""
    names: dict[str, list[str]] = {}
    for name, state in archives.items():
        names.setdefault(state, []).append(name)
    return "; ".join(f"{state}: {', '.join(of_state)}" for state, of_state in names.items())


def _counts(split: Count) -> str:
    """Found of listed, and what was published where that is another number."""
    listed = split.expected if split.listed is None else split.listed
    text = "?" if split.found is None else f"{split.found:,}"
    if listed is not None:
        text = f"{text}/{listed:,}"
    if split.expected in {None, listed}:
        return text
    return f"{text} (published {split.expected:,})"


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
        brief = [_predictor_in_brief(row) for row in rows]
        typer.echo(columns(brief, below=("what it is", "cost")))
    elif what == "backbones":
        typer.echo(columns(rows, below=("what it is",)))
    else:
        typer.echo(columns(rows))
    if what == "datasets":
        next_step("more of the data sets that have a name: vilu datasets list")


def _predictors() -> list[dict[str, Any]]:
    from vilu.predictors import PREDICTORS

    return [_predictor(name, cls) for name, cls in PREDICTORS.items()]


def _predictor(name: str, cls: type[FailurePredictor]) -> dict[str, Any]:
    needs = "no"
    if cls.needs_fit:
        needs = "yes" if cls.needs_labels else "images"
    return {
        "name": name,
        "needs labels": needs,
        "uses unlabelled": _yes_or_no(cls.uses_unlabelled),
        "needs columns": list(cls.columns),
        "uses columns": list(cls.optional_columns),
        "captions": _yes_or_no(not cls.no_captions),
        "why no captions": cls.no_captions,
        "classes": "those of training" if cls.closed_set else "any",
        "probability": _yes_or_no(cls.is_probability),
        "cost": cls.cost,
        "reference": cls.reference,
        "what it is": cls.summary,
    }


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


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
    flags = _flags(row["needs columns"])
    optional = _flags(row["uses columns"])
    if optional:
        flags.append(f"[{' '.join(optional)}]")
    return {
        "name": row["name"],
        "labels": row["needs labels"],
        "captions": row["captions"],
        "classes": "fitted" if row["classes"] != "any" else "any",
        "embed with": " ".join(flags) or "-",
        "reference": row["reference"],
        "what it is": row["what it is"],
        "cost": "" if row["cost"] == "none" else row["cost"],
    }


def _flags(needed: list[str]) -> list[str]:
    """The flags of `vilu embed` that keep some columns, each once."""
    from vilu.embeddings.columns import HOW

    flags = [HOW[column].removeprefix("vilu embed ") for column in needed]
    return list(dict.fromkeys(flags))


def _backbones() -> list[dict[str, Any]]:
    from vilu.backbones.catalog import BACKBONES, BackboneKind, named_backbones

    kinds = [
        {"name": name, "install": _installed_by(kind), "what it is": kind.description}
        for name, kind in BACKBONES.items()
        if isinstance(kind, BackboneKind)
    ]
    named = [
        {
            "name": name,
            "install": "vilu[clip]",
            "what it is": f"{model.title}, {model.image_size} px: open_clip:{model.open_clip}, or by {name}@hf "
            f"hf:{model.hf}",
            **asdict(model),
        }
        for name, model in named_backbones().items()
    ]
    return [*kinds, *named]


def _installed_by(kind: BackboneKind) -> str:
    if kind.extra == "":
        return "-"
    return f"vilu[{kind.extra}]"


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
