"""``vilu list`` and ``vilu inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from vilu.cli.console import columns


def list_catalogue(
    what: Annotated[Literal["predictors", "backbones", "datasets"], typer.Argument(help="Which catalogue.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What there is: predictors, backbones or data set layouts."""
    rows = {"predictors": _predictors, "backbones": _backbones, "datasets": _datasets}[what]()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(columns(rows))


def _predictors() -> list[dict[str, str]]:
    from vilu.predictors import PREDICTORS

    return [
        {"name": name, "needs labels": "yes" if cls.needs_fit else "no", "what it is": cls.summary}
        for name, cls in PREDICTORS.items()
    ]


def _backbones() -> list[dict[str, str]]:
    from vilu.backbones.catalog import BACKBONES

    return [
        {"name": name, "install": f"vilu[{kind.extra}]", "what it is": kind.description}
        for name, kind in BACKBONES.items()
    ]


def _datasets() -> list[dict[str, str]]:
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
