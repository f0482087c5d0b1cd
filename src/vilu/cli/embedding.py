"""``vilu embed``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vilu.cli.console import next_step
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.store.job import Executor


def embed(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of class sub-folders, CSV or Parquet, CIFAR folder, or tars as 'DIR/{000..099}.tar'; see "
            "`vilu list datasets`. With --dataset: the folder that holds data sets, or that one."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the store to make or to resume.")],
    backbone: Annotated[
        str,
        typer.Option(help="A name of `vilu list backbones`, compact[:SIZE], open_clip:NAME/TAG, hf:ID, kind:FOLDER."),
    ] = "compact",
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with a sub-folder for each named backbone, in place of the model hub."
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set by its name, as in `vilu datasets list`.")
    ] = None,
    raw_names: Annotated[
        bool, typer.Option("--raw-names", help="With --dataset: class names as the data have them, not cleaned.")
    ] = False,
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line, or folder<TAB>name; needed where data have none.")
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Take the captions of a table that has labels too.")
    ] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only the rows of a table that hold this value; may be repeated."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help="Prompt with {} for the name, or a named set (default, ensemble); several are averaged."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Also keep every class in these prompts: as --template; none of them is averaged."),
    ] = None,
    views: Annotated[int, typer.Option(min=0, help="Also keep so many augmented views of each image.")] = 0,
    features: Annotated[
        bool, typer.Option("--features", help="Also keep what goes into the model's last map.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is random in the views.")] = 0,
    split: Annotated[str | None, typer.Option(help="Only this split, or several joined by +.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images of the fixed order.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Decoding threads of a process. [one per core, shared out among --processes]"),
    ] = None,
    part_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images (or tars) per part: the most that a kill can cost. [4096 images, 10 tars]"),
    ] = None,
    executor: Annotated[
        Literal["local", "ray", "spark", "rank"] | None,
        typer.Option(help="Who embeds: processes here, Ray, Spark, or this as a rank of torchrun or Slurm. [itself]"),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of the executor. [one per core, or what the cluster has]")
    ] = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Numbers in the store.")] = "float16",
    max_error_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of images that may fail.")] = 0.01,
    on_error: Annotated[Literal["skip", "raise"], typer.Option(help="Set bad images aside, or stop.")] = "skip",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Arithmetic of the image tower.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the store instead of resuming it.")] = False,
) -> None:
    """Embed images once with a frozen model; resumes where an earlier run stopped.

    Prints the folder of the store. Images that cannot be read are listed in its errors/ folder and counted; they end
    the command with exit code 3 when they are more than --max-error-rate. --features, --views and --prompts keep what
    some methods need beside the embeddings (see `vilu list predictors`). Images with captions need no classes: the
    captions are embedded too.
    """
    from vilu.backbones.zeroshot import named_templates
    from vilu.datasets.catalog import open_dataset
    from vilu.store.embed import embed as embed_images
    from vilu.store.job import BackboneSpec

    images = open_dataset(
        source,
        split=split,
        limit=limit,
        classes=classes,
        captions=captions,
        where=_conditions(where),
        dataset=dataset,
        raw_names=raw_names,
    )
    if images.class_names is None and not images.captioned:
        raise UsageError(
            f"{source} names no classes, so there is nothing to ask the model. Give them with --classes FILE."
        )
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
        on_error=on_error,
        split=split,
        overwrite=overwrite,
        executor=_executor(executor, processes),
        shared=executor == "rank",
    )
    typer.echo(output)
    if store is None:
        next_step("this rank's parts are done; the rank that ends last makes the store complete")
    else:
        errors = store.manifest.n_error
        next_step(f"{len(store):,} embeddings, {errors:,} bad images; next: vilu fit {output} -o predictor")


def _conditions(where: list[str] | None) -> dict[str, str]:
    """COLUMN=VALUE, ... as a dictionary.

    Raises:
        UsageError: If one is no such pair, or a column comes twice.
    """
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
    from vilu.executors import make_executor

    return make_executor(name, processes=processes)
