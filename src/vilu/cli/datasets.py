"""``vilu datasets list`` and ``vilu datasets check``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vilu.cli.console import columns, next_step, printable

if TYPE_CHECKING:
    from vilu.datasets.known import KnownDataset, Presence
    from vilu.datasets.known.check import SplitPresence

datasets = typer.Typer(help="Data sets that vilu knows by name: what they are, and which are on this disk.")
BELOW = ("folder", "archives", "trouble", "to do")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@datasets.command("list")
def list_known(as_json: AsJson = False) -> None:
    """The data sets of the catalogue: classes, images by split, size of the download, licence, where to get them.

    Splits are named as in `vilu embed --dataset NAME --split SPLIT`. Sizes of downloads are approximate.
    """
    from vilu.datasets.known import KNOWN

    entries = list(KNOWN.values())
    if as_json:
        typer.echo(json.dumps([_facts(entry) for entry in entries], indent=2))
    else:
        typer.echo(columns([_in_brief(entry) for entry in entries], below=("how", "url")))
    next_step("which are here, and whether they are whole: vilu datasets check FOLDER")


@datasets.command("check")
def check_known(
    path: Annotated[Path, typer.Argument(help="Folder that holds data sets, or one data set's own.")],
    names: Annotated[list[str] | None, typer.Argument(help="Which data sets. [all]", metavar="NAME")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare checksums of archives, and count the pairs in tars.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is present, what is missing, and how to get it. Exit code 3 when a data set that is named is not whole."""
    from vilu.datasets.known import check
    from vilu.errors import DataError

    found = check(path, names or None, deep=deep)
    if as_json:
        typer.echo(json.dumps([presence.to_dict() for presence in found], indent=2))
    else:
        typer.echo(columns([_row(presence) for presence in found], below=BELOW))
    short = [presence.name for presence in found if presence.state in {"absent", "incomplete"}]
    if names and short:
        raise DataError(f"not whole: {', '.join(short)} ({len(short)} of {len(found)} data sets). See above.")
    next_step(f"{len(found) - len(short)} of {len(found)} data sets are here and whole")


def _facts(entry: KnownDataset) -> dict[str, object]:
    return {
        "name": entry.name,
        "title": entry.title,
        "n_classes": entry.n_classes,
        "captioned": entry.captioned,
        "sizes": dict(entry.sizes),
        "official_sizes": dict(entry.official_sizes),
        "licence": entry.licence,
        "n_bytes": entry.n_bytes,
        "url": entry.url,
        "how": entry.how,
        "folders": list(entry.folders),
        "archives": dict(entry.archives),
        "template": entry.template,
        "coop_template": entry.coop_template,
        "reference": entry.reference,
    }


def _in_brief(entry: KnownDataset) -> dict[str, str]:
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
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if n_bytes >= unit)
    return f"{n_bytes / unit:.3g} {name}"


def _row(presence: Presence) -> dict[str, str]:
    missing = [name for split in presence.splits.values() for name in split.missing]
    said = [presence.problem, *(split.problem for split in presence.splits.values())]
    said += [f"missing: {', '.join(missing)}"] if missing else []
    row = {
        "name": presence.name,
        "state": presence.state,
        "images": " ".join(f"{name} {_counts(split)}" for name, split in presence.splits.items()) or "-",
        "folder": f"{presence.folder}: {presence.origin}" if presence.origin else str(presence.folder or ""),
        "archives": "; ".join(f"{state}: {', '.join(names)}" for state, names in _by_state(presence.archives).items()),
        "trouble": " ".join(dict.fromkeys(text for text in said if text)),
        "to do": presence.advice,
    }
    return {key: printable(text) for key, text in row.items()}


def _by_state(archives: Mapping[str, str]) -> dict[str, list[str]]:
    return {state: [name for name in archives if archives[name] == state] for state in dict.fromkeys(archives.values())}


def _counts(split: SplitPresence) -> str:
    """Found of listed, and what was published where that is another number."""
    found = "?" if split.found is None else f"{split.found:,}"
    listed = split.expected if split.listed is None else split.listed
    said = found if listed is None else f"{found}/{listed:,}"
    return said if split.expected in {None, listed} else f"{said} (published {split.expected:,})"
