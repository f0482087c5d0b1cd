"""``vilu list`` and ``vilu inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vilu.cli.console import columns, next_step


def list_catalogue(
    what: Annotated[Literal["predictors", "backbones", "datasets"], typer.Argument(help="Which catalogue.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What there is: predictors, backbones or data set layouts (data sets by name: `vilu datasets list`).

    Of a predictor: whether it needs labels, works on image-caption pairs, and on any classes or those that it was
    fitted on; what `vilu embed` must keep for it (in brackets: may), where it comes from, what it is, what it costs.
    """
    rows = {"predictors": _predictors, "backbones": _backbones, "datasets": _datasets}[what]()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif what == "predictors":
        typer.echo(columns(list(map(_in_brief, rows)), below=("what it is", "cost")))
    else:
        typer.echo(columns(rows, below=("what it is",) if what == "backbones" else ()))
    if what == "datasets":
        next_step("these are layouts; ImageNet, CIFAR, DTD and others by name: vilu datasets list")


def _predictors() -> list[dict[str, Any]]:
    from vilu.predictors import PREDICTORS

    return [
        {
            "name": name,
            "needs labels": "yes" if cls.needs_fit else "no",
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


def _in_brief(row: dict[str, Any]) -> dict[str, str]:
    """A predictor for a table of 120 columns."""
    from vilu.columns import HOW

    needed, used = (
        list(dict.fromkeys(HOW[column].removeprefix("vilu embed ") for column in row[key]))
        for key in ("needs columns", "uses columns")
    )
    return {
        "name": row["name"],
        "labels": row["needs labels"],
        "captions": row["captions"],
        "classes": "fitted" if row["classes"] != "any" else "any",
        "embed with": " ".join([*needed, *(f"[{flag}]" for flag in used)]) or "-",
        "reference": row["reference"],
        "what it is": row["what it is"],
        "cost": "" if row["cost"] == "none" else row["cost"],
    }


def _backbones() -> list[dict[str, Any]]:
    from vilu.backbones.catalog import BACKBONES
    from vilu.backbones.named import NAMED

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
    from vilu.datasets.catalog import DATASETS

    return [{"name": name, "what it is": text} for name, text in DATASETS.items()]


def inspect(
    store: Annotated[Path, typer.Argument(help="Folder that `vilu embed` wrote, finished or not.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: hashes, norms, labels.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is in a store, and whether it is sound. Exit code 7 when something is wrong."""
    from vilu.errors import StorageError
    from vilu.store.inspect import inspect as inspect_store

    report = inspect_store(store, deep=deep)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if report.problems:
        raise StorageError(f"{len(report.problems)} problems in {store}; the first: {report.problems[0]}")
