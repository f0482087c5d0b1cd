"""The command that makes embeddings of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from vilu.cli import console
from vilu.cli.console import MOST_SEED, MOST_WORKERS, Overwrite, next_step, path_option
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.datasets.base import ImageDataset
    from vilu.store.job import Executor
    from vilu.store.manifest import Manifest


Source = Annotated[
    str,
    typer.Argument(
        help="Folder of class sub-folders, CSV or Parquet, CIFAR folder, or tars as 'DIR/{000..099}.tar'; see "
        "`vilu list datasets`. With --dataset: the folder that holds data sets, or that one."
    ),
]
Backbone = Annotated[
    str,
    Option(
        help="A name of `vilu list backbones`, compact[:SIZE], open_clip:NAME/TAG, hf:ID, kind:FOLDER.",
        autocompletion=console.complete_backbones,
    ),
]
Models = Annotated[
    Path | None,
    path_option(
        "Folder with a sub-folder for each named backbone, in place of the model hub.",
        metavar="DIR",
    ),
]
Named = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="A data set by its name, as in `vilu datasets list`.",
        autocompletion=console.complete_datasets,
    ),
]
Classes = Annotated[
    Path | None,
    path_option("Class names, one a line, or folder<TAB>name; needed if data have none."),
]
Outside = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="A class (folder, label or name), or a number beyond the classes, that is none of them: any answer about "
        "its images is wrong. May be repeated.",
    ),
]
Where = Annotated[
    list[str] | None,
    Option(
        metavar="COLUMN=VALUE",
        help="Only the rows of a table that hold this value; may be repeated.",
    ),
]
Root = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder that the paths in a table are relative to; absolute ones below it are fine, too. "
        "[the table's own]",
    ),
]
Template = Annotated[
    list[str] | None,
    Option(
        help="Prompt with {} for the name, or a named set (default, ensemble); several are averaged."
    ),
]
Prompts = Annotated[
    list[str] | None,
    Option(help="Also keep every class in these prompts: as --template; none of them is averaged."),
]
Words = Annotated[
    Path | None,
    path_option(
        "The words of --negatives, one a line, in place of vilu's own; implies it.", metavar="FILE"
    ),
]
Workers = Annotated[
    int | None,
    Option(
        min=1,
        max=MOST_WORKERS,
        help="Decoding threads of a process. [one per core, shared out among --processes]",
    ),
]
PartSize = Annotated[
    int | None,
    Option(
        min=1,
        help="Images (or tars) per part: the most that a kill can cost. [4096 images, 10 tars]",
    ),
]
Who = Annotated[
    Literal["local", "ray", "spark", "rank"] | None,
    Option(
        help="Who embeds: processes here, Ray, Spark, or this as a rank of torchrun or Slurm. [itself]"
    ),
]
Processes = Annotated[
    int | None,
    Option(
        min=1, max=MOST_WORKERS, help="Of the executor. [one per core, or what the cluster has]"
    ),
]


@console.goes_on
def embed(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Source,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder of the store to make or to resume.")
    ],
    backbone: Backbone = "compact",
    models: Models = None,
    dataset: Named = None,
    raw_names: Annotated[
        bool,
        Option(
            "--raw-names", help="With --dataset: class names as the data have them, not cleaned."
        ),
    ] = False,
    classes: Classes = None,
    captions: Annotated[
        bool, Option("--captions", help="Take the captions of a table that has labels too.")
    ] = False,
    outside: Outside = None,
    where: Where = None,
    root: Root = None,
    template: Template = None,
    prompts: Prompts = None,
    negatives: Annotated[
        bool, Option("--negatives", help="Also keep everyday words, for images of no class.")
    ] = False,
    words: Words = None,
    views: Annotated[
        int, Option(min=0, help="Also keep so many augmented views of each image.")
    ] = 0,
    features: Annotated[
        bool, Option("--features", help="Also keep what goes into the model's last map.")
    ] = False,
    seed: Annotated[int, Option(min=0, max=MOST_SEED, help="Of what is random in the views.")] = 0,
    split: Annotated[str | None, Option(help="Only this split, or several joined by +.")] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Only the first images of the fixed order.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Images per forward pass.")] = 32,
    workers: Workers = None,
    part_size: PartSize = None,
    executor: Who = None,
    processes: Processes = None,
    dtype: Annotated[
        Literal["float16", "float32"], Option(help="Numbers in the store.")
    ] = "float16",
    max_error_rate: Annotated[
        float, Option(min=0, max=1, help="Share of images that may fail.")
    ] = 0.01,
    allow_bad_shards: Annotated[
        bool, Option("--allow-bad-shards", help="Accept tars that are cut short or cannot be read.")
    ] = False,
    on_error: Annotated[
        Literal["skip", "raise"], Option(help="Set bad images aside, or stop.")
    ] = "skip",
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"], Option(help="Arithmetic of the image tower.")
    ] = "fp32",
    overwrite: Overwrite = False,
) -> None:
    """Embed images once with a frozen model; resumes where an earlier run stopped.

    Prints the folder of the store. Images that cannot be read are listed in its errors/ folder and
    counted; they end the command with exit code 3 when they are more than --max-error-rate, and so
    does a tar that is cut short or none: nobody can count what it has lost. --features, --views,
    --prompts and --negatives keep what some methods need beside the embeddings (see `vilu list
    predictors`). Images with captions need no classes: the captions are embedded too.
    """
    images = _images(
        source,
        0.0 if on_error == "raise" else max_error_rate,
        split=split,
        limit=limit,
        classes=classes,
        captions=captions,
        outside=outside or (),
        where=console.pairs_of("--where", where, "COLUMN=VALUE"),
        dataset=dataset,
        raw_names=raw_names,
        root=root,
    )
    from vilu.backbones.zeroshot import named_templates
    from vilu.store.embed import ExtraColumns
    from vilu.store.embed import embed as embed_images
    from vilu.store.job import BackboneSpec

    columns = ExtraColumns(
        features=features,
        views=views,
        seed=seed,
        prompts=named_templates(prompts or []),
        negatives=_negatives(words, wanted=negatives),
    )
    store = embed_images(
        images,
        BackboneSpec(backbone, device, precision, models and models.absolute()),
        output,
        names=images.class_names or (),
        templates=named_templates(template) if template else None,
        columns=columns,
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
    next_step(embedded(output, None if store is None else store.manifest, (split, source)))


def _negatives(words: Path | None, *, wanted: bool) -> Sequence[str]:
    """Words that are none of the classes: those of a file, else everyday ones where they are wanted."""
    from vilu.backbones.zeroshot import everyday_words
    from vilu.datasets.classes import read_classes

    if words is not None:
        return read_classes(words)[1]
    return everyday_words() if wanted else ()


def embedded(output: Path, manifest: Manifest | None, names: tuple[str | None, str]) -> str:
    """What was done and what comes next."""
    from vilu.store.embed import BAD_SHARD

    if manifest is None:
        return "this rank's parts are done; the rank that ends last makes the store complete"
    shards = sum(count for kind, count in manifest.errors.items() if kind in BAD_SHARD)
    lost = f", {shards:,} bad shards" if shards else ""
    bad = "bad images" if manifest.imported is None else "unusable rows"
    counts = f"{manifest.n_ok:,} embeddings, {manifest.n_error - shards:,} {bad}{lost}"
    return f"{counts}; next: {_following(output, *names)}"


USES = {
    "test": ("vilu", "score", "PREDICTOR"),
    "val": ("vilu", "calibrate", "PREDICTOR"),
    "calib": ("vilu", "calibrate", "PREDICTOR"),
}
"""What a split is for, by how its name begins; any other is to be fitted on."""


def _following(output: Path, *names: str | None) -> str:
    """The command that fits what the store holds, as its split, its folder or its source are called."""
    command: tuple[str, ...] = ("vilu", "fit")
    for name in (*names, output.name):
        purpose = _purpose(name)
        if purpose is not None:
            command = purpose
            break
    ends = {
        "score": ("-o", "scores.parquet"),
        "calibrate": ("--max-risk", "0.05"),
        "fit": ("-o", "predictor"),
    }
    return console.shell(*command, output, *ends[command[1]])


def _purpose(name: str | None) -> tuple[str, ...] | None:
    """The command for a split, by how the name begins; None where it says nothing."""
    if not name:
        return None
    text = Path(name).name.lower()
    for start, command in USES.items():
        if text.startswith(start):
            return command
    return None


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


def _executor(name: str | None, processes: int | None) -> Executor | None:
    if name is None:
        if processes is not None:
            raise UsageError(
                "--processes is of an executor. Give --executor local too, or leave it out."
            )
        return None
    from vilu.store.executors import make_executor

    return make_executor(name, processes=processes)
