"""Commands on images: embed, inspect, list, datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vilu.cli import console
from vilu.cli.console import (
    MOST_SEED,
    MOST_WORKERS,
    Overwrite,
    columns,
    next_step,
)
from vilu.errors import UsageError
from vilu.text import printable

if TYPE_CHECKING:
    from vilu.datasets.base import ImageDataset
    from vilu.datasets.known import KnownDataset, Presence
    from vilu.datasets.known.entry import Count
    from vilu.store.documents import Manifest
    from vilu.store.job import Executor


Source = Annotated[
    str,
    typer.Argument(
        help="Folder of class sub-folders, CSV or Parquet, CIFAR folder, or tars as 'DIR/{000..099}.tar'; see "
        "`vilu list datasets`. With --dataset: the folder that holds data sets, or that one."
    ),
]
Backbone = Annotated[
    str,
    typer.Option(
        help="A name of `vilu list backbones`, compact[:SIZE], open_clip:NAME/TAG, hf:ID, kind:FOLDER.",
        autocompletion=console.complete_backbones,
    ),
]
Models = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with a sub-folder for each named backbone, in place of the model hub.",
        callback=console.existing,
    ),
]
Named = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A data set by its name, as in `vilu datasets list`.",
        autocompletion=console.complete_datasets,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="Class names, one a line, or folder<TAB>name; needed where data have none.", callback=console.existing
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN=VALUE", help="Only the rows of a table that hold this value; may be repeated."),
]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that the paths in a table are relative to; absolute ones below it are fine, too. "
        "[the table's own]",
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(help="Prompt with {} for the name, or a named set (default, ensemble); several are averaged."),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="Also keep every class in these prompts: as --template; none of them is averaged."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_WORKERS, help="Decoding threads of a process. [one per core, shared out among --processes]"
    ),
]
PartSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images (or tars) per part: the most that a kill can cost. [4096 images, 10 tars]"),
]
Who = Annotated[
    Literal["local", "ray", "spark", "rank"] | None,
    typer.Option(help="Who embeds: processes here, Ray, Spark, or this as a rank of torchrun or Slurm. [itself]"),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_WORKERS, help="Of the executor. [one per core, or what the cluster has]"),
]


def embed(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the store to make or to resume.")],
    backbone: Backbone = "compact",
    models: Models = None,
    dataset: Named = None,
    raw_names: Annotated[
        bool, typer.Option("--raw-names", help="With --dataset: class names as the data have them, not cleaned.")
    ] = False,
    classes: Classes = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Take the captions of a table that has labels too.")
    ] = False,
    where: Where = None,
    root: Root = None,
    template: Template = None,
    prompts: Prompts = None,
    views: Annotated[int, typer.Option(min=0, help="Also keep so many augmented views of each image.")] = 0,
    features: Annotated[
        bool, typer.Option("--features", help="Also keep what goes into the model's last map.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of what is random in the views.")] = 0,
    split: Annotated[str | None, typer.Option(help="Only this split, or several joined by +.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images of the fixed order.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    workers: Workers = None,
    part_size: PartSize = None,
    executor: Who = None,
    processes: Processes = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Numbers in the store.")] = "float16",
    max_error_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of images that may fail.")] = 0.01,
    allow_bad_shards: Annotated[
        bool, typer.Option("--allow-bad-shards", help="Accept tars that are cut short or cannot be read.")
    ] = False,
    on_error: Annotated[Literal["skip", "raise"], typer.Option(help="Set bad images aside, or stop.")] = "skip",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the image tower.")] = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """Embed images once with a frozen model; resumes where an earlier run stopped.

    Prints the folder of the store. Images that cannot be read are listed in its errors/ folder and counted; they end
    the command with exit code 3 when they are more than --max-error-rate, and so does a tar that is cut short or none:
    nobody can count what it has lost. --features, --views and --prompts keep what some methods need beside the
    embeddings (see `vilu list predictors`). Images with captions need no classes: the captions are embedded too.
    """
    images = _images(
        source,
        0.0 if on_error == "raise" else max_error_rate,
        split=split,
        limit=limit,
        classes=classes,
        captions=captions,
        where=_conditions(where),
        dataset=dataset,
        raw_names=raw_names,
        root=root,
    )
    from vilu.backbones.zeroshot import named_templates
    from vilu.store.embed import embed as embed_images
    from vilu.store.job import BackboneSpec

    store = embed_images(
        images,
        BackboneSpec(backbone, device, precision, models and models.absolute()),
        output,
        names=images.class_names or (),
        templates=named_templates(template) if template else None,
        prompts=named_templates(prompts or []),
        views=views,
        features=features,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        part_size=part_size,
        dtype=dtype,
        max_error_rate=max_error_rate,
        allow_bad_shards=allow_bad_shards,
        on_error=on_error,
        split=split,
        overwrite=overwrite,
        executor=_executor(executor, processes),
        shared=executor == "rank",
    )
    typer.echo(output)
    next_step(_embedded(output, None if store is None else store.manifest, (split, source)))


def _embedded(output: Path, manifest: Manifest | None, names: tuple[str | None, str]) -> str:
    from vilu.store.embed import BAD_SHARD

    if manifest is None:
        return "this rank's parts are done; the rank that ends last makes the store complete"
    shards = sum(count for kind, count in manifest.errors.items() if kind in BAD_SHARD)
    lost = f", {shards:,} bad shards" if shards else ""
    counts = f"{manifest.n_ok:,} embeddings, {manifest.n_error - shards:,} bad images{lost}"
    return f"{counts}; next: {_following(output, *names)}"


USES = {
    "test": ("vilu", "score", "PREDICTOR"),
    "val": ("vilu", "calibrate", "PREDICTOR"),
    "calib": ("vilu", "calibrate", "PREDICTOR"),
}
"""What a split is for, by how its name begins; any other is to be fitted on."""


def _following(output: Path, *names: str | None) -> str:
    """The command that fits what the store holds, as its split, its folder or its source are called."""
    said = [Path(name).name.lower() for name in (*names, output.name) if name]
    use = next((use for name in said for start, use in USES.items() if name.startswith(start)), ("vilu", "fit"))
    ends = {"score": ("-o", "scores.parquet"), "calibrate": ("--max-risk", "0.05"), "fit": ("-o", "predictor")}
    return console.shell(*use, output, *ends[use[1]])


def _images(source: str, budget: float, **asked: Any) -> ImageDataset:  # noqa: ANN401 - as ``open_dataset`` takes it
    """The images, looked at before torch is imported, which takes seconds."""
    from vilu.datasets.base import ShardedDataset, require_files
    from vilu.datasets.catalog import open_dataset

    images = open_dataset(source, **asked)
    if images.class_names is None and not images.captioned:
        raise UsageError(
            f"{source} names no classes, so there is nothing to ask the model. Give them with --classes FILE."
        )
    require_files(images, budget)
    what = "tars" if isinstance(images, ShardedDataset) else "images"
    next_step(f"{len(images):,} {what} in {images.source}; loading the model")
    return images


def _conditions(where: list[str] | None) -> dict[str, str]:
    """COLUMN=VALUE, ... as a dictionary."""
    pairs = [text.partition("=") for text in where or ()]
    for (column, sign, _), text in zip(pairs, where or (), strict=True):
        if not (column and sign):
            raise UsageError(f"--where must be COLUMN=VALUE. Got {text!r} instead.")
    conditions = {column: value for column, _, value in pairs}
    if len(conditions) < len(pairs):
        raise UsageError("--where can name a column only once: its rows hold one value.")
    return conditions


def _executor(name: str | None, processes: int | None) -> Executor | None:
    if name is None:
        if processes is not None:
            raise UsageError("--processes is of an executor. Give --executor local too, or leave it out.")
        return None
    from vilu.store.executors import make_executor

    return make_executor(name, processes=processes)


datasets = typer.Typer(help="Data sets that vilu knows by name: what they are, and which are on this disk.")
BELOW = ("folder", "archives", "trouble", "to do")
FACTS = (
    *("name", "title", "n_classes", "captioned", "sizes", "official_sizes", "licence", "n_bytes", "url", "how"),
    *("folders", "archives", "template", "coop_template", "reference"),
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@datasets.command("list")
def list_known(as_json: AsJson = False) -> None:
    """The data sets of the catalogue: classes, images by split, size of the download, licence, where to get them.

    Splits are named as in `vilu embed --dataset NAME --split SPLIT`. Sizes of downloads are approximate.
    """
    from vilu.datasets.known import KNOWN

    facts = [{name: getattr(entry, name) for name in FACTS} for entry in KNOWN.values()]
    table = columns([_dataset_in_brief(entry) for entry in KNOWN.values()], below=("how", "url"))
    typer.echo(json.dumps(facts, indent=2) if as_json else table)
    next_step("which are here, and whether they are whole: vilu datasets check FOLDER")


@datasets.command("check")
def check_known(
    path: Annotated[
        Path, typer.Argument(help="Folder that holds data sets, or one data set's own.", callback=console.existing)
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Which data sets. [all]", metavar="NAME", autocompletion=console.complete_datasets),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare checksums of archives, and count the pairs in tars.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What is present, what is missing, and how to get it. Exit code 3 when a data set that is named is not whole."""
    from vilu.datasets.known import check
    from vilu.errors import DataError

    found = check(path, names or None, deep=deep)
    facts, rows = [presence.to_dict() for presence in found], [_row(presence) for presence in found]
    typer.echo(json.dumps(facts, indent=2) if as_json else columns(rows, below=BELOW))
    short = [presence.name for presence in found if presence.state in {"absent", "incomplete"}]
    if names and short:
        raise DataError(f"not whole: {', '.join(short)} ({len(short)} of {len(found)} data sets). See above.")
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


def _counts(split: Count) -> str:
    """Found of listed, and what was published where that is another number."""
    found = "?" if split.found is None else f"{split.found:,}"
    listed = split.expected if split.listed is None else split.listed
    said = found if listed is None else f"{found}/{listed:,}"
    return said if split.expected in {None, listed} else f"{said} (published {split.expected:,})"


def list_catalogue(
    what: Annotated[Literal["predictors", "backbones", "datasets", "metrics"], typer.Argument(help="Which catalogue.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What there is: predictors, backbones, metrics or data set layouts (data sets by name: `vilu datasets list`).

    Of a predictor: whether it needs labels, works on image-caption pairs, and on any classes or those that it was
    fitted on; what `vilu embed` must keep for it (in brackets: may), where it comes from, what it is, what it costs.
    """
    rows = {"predictors": _predictors, "backbones": _backbones, "datasets": _datasets, "metrics": _metrics}[what]()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif what == "predictors":
        typer.echo(columns(list(map(_predictor_in_brief, rows)), below=("what it is", "cost")))
    else:
        typer.echo(columns(rows, below=("what it is",) if what == "backbones" else ()))
    if what == "datasets":
        next_step("these are layouts; ImageNet, CIFAR, DTD and others by name: vilu datasets list")


def _predictors() -> list[dict[str, Any]]:
    from vilu.predictors.catalogue import find_method, method_names

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
        for name, cls in ((name, find_method(name)) for name in method_names())
    ]


def _metrics() -> list[dict[str, Any]]:
    from vilu.metrics.catalog import METRICS

    return [
        {
            "name": name,
            "title": metric.title,
            "better": "higher" if metric.higher_is_better else "lower",
            "of": "probability" if metric.of_probability else "any score",
            "computed": metric.wanted,
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
        "embed with": " ".join([*needed, *(f"[{flag}]" for flag in used)]) or "-",
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
    """Layouts, and data sets by name that did not come with vilu."""
    from vilu.datasets.catalog import DATASETS
    from vilu.datasets.known import KNOWN, SHIPPED

    added = {name: f"{entry.title}, by --dataset {name}" for name, entry in KNOWN.items() if name not in SHIPPED}
    return [{"name": name, "what it is": text} for name, text in {**DATASETS, **added}.items()]


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="What a command of vilu wrote: a store, finished or not, a predictor, scores, results, ...",
            callback=console.existing,
        ),
    ],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte of a store: hashes, norms, labels.")] = False,
    seal: Annotated[
        bool,
        typer.Option("--seal", help="If all is well, give a digest to every file that an earlier vilu wrote without."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What an artefact of vilu holds, and whether it is sound. Exit code 3, 6 or 7 when something is wrong."""
    from vilu.cli.artefacts import check, is_store
    from vilu.errors import StorageError

    if is_store(path) and not seal:
        from vilu.store.inspect import inspect as inspect_store

        report = inspect_store(path, deep=deep)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
        if report.problems:
            raise StorageError(f"{len(report.problems)} problems in {path}; the first: {report.problems[0]}")
        return
    found = list(check(path))
    sealed = [file for artefact in found for file in artefact.seal()] if seal else []
    facts = [{"path": str(one.path), "what": one.what} for one in found]
    content = {"found": facts, "sealed": [str(file) for file in sealed]} if seal else {"found": facts}
    lines = [f"{one.path}: {printable(one.what)}" for one in found]
    typer.echo(json.dumps(content, indent=2) if as_json else "\n".join(lines))
    next_step(f"nothing is damaged{f'; a digest was added to {len(sealed)} files' if seal else ''}")
