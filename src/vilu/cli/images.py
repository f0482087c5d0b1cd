"""The command for embedding images: embed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from vilu.cli import console
from vilu.cli.console import log_next_step
from vilu.cli.help import DATA, MODEL, MORE, SPEED
from vilu.cli.options import (
    MAX_WORKERS,
    Backbone,
    BatchSize,
    Device,
    FollowLinks,
    Models,
    Outside,
    Overwrite,
    Precision,
    StoredNumbers,
    StoreFolder,
    Template,
    complete_datasets,
    path_option,
)
from vilu.errors import UNKNOWN, UsageError
from vilu.text import plural

if TYPE_CHECKING:
    from vilu.datasets.base import ImageDataset
    from vilu.store.job import BackboneSpec, Executor
    from vilu.store.reader import CaptionStore, EmbeddingStore


Source = Annotated[
    str,
    typer.Argument(
        help="Folder of class sub-folders, CSV or Parquet, CIFAR folder, or tars as "
        "'DIR/{000..099}.tar'; see `vilu list datasets`. With --dataset: the folder of this data "
        "set, or a folder of data sets."
    ),
]
DatasetName = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="A data set by its name, as in `vilu datasets list`.",
        autocompletion=complete_datasets,
        rich_help_panel=DATA,
    ),
]
Classes = Annotated[
    Path | None,
    path_option("Class names, one per line, or folder<TAB>name; needed if the data have none."),
]
Where = Annotated[
    list[str] | None,
    Option(
        metavar="COLUMN=VALUE",
        help="Only the rows of a table that have this value; may be repeated.",
        rich_help_panel=DATA,
    ),
]
Root = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder that the paths in a table are relative to; absolute paths below it are "
        "allowed, too. [the folder of the table]",
        rich_help_panel=DATA,
    ),
]
Prompts = Annotated[
    list[str] | None,
    Option(
        help="Also store the text embeddings of every class in each of these prompts, without an "
        "average over prompts. The form is that of --template.",
        rich_help_panel=MODEL,
    ),
]
Workers = Annotated[
    int | None,
    Option(
        min=1,
        max=MAX_WORKERS,
        help="Decoding threads of each process. [one per core, divided among --processes]",
        rich_help_panel=SPEED,
    ),
]
PartSize = Annotated[
    int | None,
    Option(
        min=1,
        help="Images (or tars) per part. If the run is killed, at most the current parts are lost. "
        "[4096 images, 10 tars]",
        rich_help_panel=SPEED,
    ),
]
ExecutorName = Annotated[
    Literal["local", "ray", "spark", "rank"] | None,
    Option(
        help="What embeds: local processes, Ray, Spark, or this process as a rank of torchrun or "
        "Slurm. [this process alone]",
        rich_help_panel=SPEED,
    ),
]
Processes = Annotated[
    int | None,
    Option(
        min=1,
        max=MAX_WORKERS,
        help="Processes of the executor. [one per core, or all that the cluster offers]",
        rich_help_panel=SPEED,
    ),
]


TableCaptions = Annotated[
    bool,
    Option(
        "--captions",
        help="Use the captions of a table, even if it also has labels.",
        rich_help_panel=DATA,
    ),
]
Negatives = Annotated[
    bool,
    Option(
        "--negatives",
        help="Also embed everyday words, to detect images of none of the classes.",
        rich_help_panel=MODEL,
    ),
]
Views = Annotated[
    int,
    Option(
        min=0, help="Also keep this number of augmented views per image.", rich_help_panel=MODEL
    ),
]
Features = Annotated[
    bool,
    Option(
        "--features",
        help="Also keep the input of the model's last linear map, which some methods need.",
    ),
]
Split = Annotated[str | None, Option(help="Only this split, or several joined by +.")]
Limit = Annotated[
    int | None,
    Option(min=1, help="Only this number of images, the first in the fixed order."),
]
Dtype = Annotated[
    StoredNumbers, Option(help="Type of the numbers in the store.", rich_help_panel=MORE)
]
MaxErrorRate = Annotated[
    float, Option(min=0, max=1, help="Share of images that may fail.", rich_help_panel=MORE)
]
AllowBadShards = Annotated[
    bool,
    Option(
        "--allow-bad-shards",
        help="Accept tars that are cut short or cannot be read.",
        rich_help_panel=MORE,
    ),
]
FullDecode = Annotated[
    bool,
    Option(
        "--full-decode",
        help="Decode JPEGs in full. By default large ones are decoded at 1/2, 1/4 or 1/8, but no "
        "smaller than twice the size that the model reads.",
        rich_help_panel=SPEED,
    ),
]


@console.resumable
def embed(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Source,
    output: StoreFolder,
    backbone: Backbone = "compact",
    models: Models = None,
    dataset: DatasetName = None,
    classes: Classes = None,
    split: Split = None,
    limit: Limit = None,
    features: Features = False,
    captions: TableCaptions = False,
    outside: Outside = None,
    where: Where = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    template: Template = None,
    prompts: Prompts = None,
    negatives: Negatives = False,
    views: Views = 0,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    part_size: PartSize = None,
    executor: ExecutorName = None,
    processes: Processes = None,
    dtype: Dtype = "float16",
    max_error_rate: MaxErrorRate = 0.01,
    allow_bad_shards: AllowBadShards = False,
    device: Device = "auto",
    precision: Precision = "fp32",
    full_decode: FullDecode = False,
    overwrite: Overwrite = False,
) -> None:
    """Embed images once with a frozen model; resumes where an earlier run stopped.

    Prints the folder of the store. Unreadable images are counted, and listed in the errors/ folder
    of the store. The exit code is 3 if the share of such images is more than --max-error-rate. The
    exit code is also 3 if a tar is cut short, since the number of lost images is unknown.
    --features, --views, --prompts and --negatives store additional data, needed by some methods
    (see `vilu list predictors`). Captions of images are embedded, too, and need no classes.
    """
    conditions = console.parse_pairs("--where", where, form="COLUMN=VALUE")
    images = _open_images(
        source,
        max_error_rate,
        split=split,
        limit=limit,
        classes=classes,
        captions=captions,
        outside=outside or (),
        where=conditions,
        dataset=dataset,
        root=root,
        follow_links=follow_links,
    )
    from vilu.backbones.zeroshot import everyday_words
    from vilu.store.embed import ExtraColumns
    from vilu.store.embed import embed as embed_images

    negative_words: Sequence[str] = ()
    if negatives:
        negative_words = everyday_words()
    prompt_templates = templates_of(prompts) or ()
    columns = ExtraColumns(
        features=features, views=views, prompts=prompt_templates, negatives=negative_words
    )
    store = embed_images(
        images,
        backbone_spec(backbone, device, precision, models, full_decode=full_decode),
        output,
        names=images.class_names or (),
        templates=templates_of(template),
        columns=columns,
        batch_size=batch_size,
        workers=workers,
        part_size=part_size,
        dtype=dtype,
        max_error_rate=max_error_rate,
        allow_bad_shards=allow_bad_shards,
        split=split,
        overwrite=overwrite,
        executor=_make_executor(executor, processes),
        shared=executor == "rank",
    )
    console.print_outputs(output)
    closing_line = store_in_words(output, store, split=split, source=source)
    log_next_step(closing_line)


def backbone_spec(
    name: str,
    device: str,
    precision: Literal["fp32", "bf16", "auto"],
    models: Path | None,
    *,
    full_decode: bool = False,
) -> BackboneSpec:
    """Return the backbone from the flags. Log advice if the backbone is the compact model.

    The path of ``models`` is made absolute, because an executor's processes may start in another
    folder.
    """
    from vilu.store.job import BackboneSpec

    log_advice_on_compact(name)
    if models is not None:
        models = models.absolute()
    resolved_precision = _resolve_precision(precision, name, device)
    return BackboneSpec(name, device, resolved_precision, models, full_decode)


def _resolve_precision(
    wanted_precision: Literal["fp32", "bf16", "auto"], name: str, device: str
) -> str:
    """Resolve "auto" to the precision to use. Log advice if bfloat16 may be faster."""
    from vilu.device import multiplies_bf16, resolve_device

    if wanted_precision == "bf16":
        return wanted_precision
    resolved_device = resolve_device(device)
    has_fast_bf16 = multiplies_bf16(resolved_device)
    if wanted_precision == "auto":
        precision = "bf16" if has_fast_bf16 else "fp32"
        log_next_step(f"--precision auto: {precision}")
        return precision
    if has_fast_bf16 and not _is_compact(name):
        log_next_step(
            "this processor multiplies bfloat16, so that --precision bf16 may be faster: it is "
            "timed on the first 64 photos"
        )
    return wanted_precision


def log_advice_on_compact(backbone: str) -> None:
    """Log a description and a better model's name if the backbone is the compact model."""
    if not _is_compact(backbone):
        return
    log_next_step(
        f"{backbone} is a small stand-in for CLIP, for a first look. A CLIP names more photos "
        "right: --backbone clip-vit-b32, or clip-vit-l14, which is slower and better (pip install "
        "'vilu[clip]')"
    )


def _is_compact(backbone: str) -> bool:
    """Return whether a backbone is a compact model. A size may follow after a colon."""
    return backbone.partition(":")[0] == "compact"


def templates_of(texts: list[str] | None) -> tuple[str, ...] | None:
    """Return the templates from the flags. A flag is a template, or names a set of templates.

    Return None if there is no flag.
    """
    from vilu.backbones.zeroshot import expand_template_names

    if not texts:
        return None
    return expand_template_names(texts)


def store_in_words(
    output: Path, store: EmbeddingStore | CaptionStore | None, *, split: str | None, source: str
) -> str:
    """Return the closing line after making a store: the counts, and the next command.

    Args:
        output: The store's folder.
        store: The store. None if other ranks still make parts of the store.
        split: The split's name, a hint for the next command. None if the split is not known.
        source: The source's name, a hint for the next command if the split gives no hint.
    """
    from vilu.store.embed import SHARD_ERROR_KINDS

    if store is None:
        return "this rank's parts are done; the rank that ends last makes the store complete"
    manifest = store.manifest
    n_bad_shards = 0
    for kind, count in manifest.errors.items():
        if kind in SHARD_ERROR_KINDS:
            n_bad_shards += count
    noun = "bad image"
    if manifest.imported is not None:
        noun = "unusable row"
    n_bad_images = manifest.n_error - n_bad_shards
    counts = [plural(manifest.n_ok, "embedding"), plural(n_bad_images, noun)]
    if n_bad_shards:
        counts.append(plural(n_bad_shards, "bad shard"))
    has_labels = bool(manifest.captions) or bool((store.target != UNKNOWN).any())
    if has_labels:
        command = next_command(output, split, source)
    else:
        command = _next_command_without_labels(output, split, source, store)
    return f"{', '.join(counts)}; next: {command}"


COMMAND_OF_PREFIX = {"test": "score", "val": "calibrate", "calib": "calibrate"}
"""Maps the beginning of a split's name to the next command. The default command is fit."""


def next_command(output: Path, split: str | None, source: str) -> str:
    """Return the next command after making a store with labels.

    The hints are the names of the split, the source and the folder, in this order. The first name
    with a beginning in ``COMMAND_OF_PREFIX`` decides.
    """
    command = _first_suggestion(split, source, output.name)
    if command == "score":
        return console.shell_command("vilu", "score", "PREDICTOR", output, "-o", "scores.parquet")
    if command == "calibrate":
        return console.shell_command("vilu", "calibrate", "PREDICTOR", output, "--max-risk", "0.05")
    return console.shell_command("vilu", "fit", output, "-o", "predictor")


def _next_command_without_labels(
    output: Path, split: str | None, source: str, store: EmbeddingStore | CaptionStore
) -> str:
    """Return the next command after making a store without any label, like ``next_command``."""
    command = _first_suggestion(split, source, output.name)
    if command == "score":
        return next_command(output, split, source)
    if command == "calibrate" and store.identified_by:
        # A calibration needs labels. `vilu next` requests labels, but only for identified rows. 200
        # labels are enough to show a risk below 5 % if few of the answers are wrong.
        flags = ["--predictor", "PREDICTOR", "--for-guarantee", "-n", "200", "-o", "next.csv"]
        return console.shell_command("vilu", "next", output, *flags)
    method = "vilu_zero" if store.has_texts else "mcm"
    return console.shell_command("vilu", "fit", output, "--method", method, "-o", "predictor")


def _first_suggestion(*names: str | None) -> str:
    """Return the suggestion from the first name that suggests a command, or else "fit"."""
    for name in names:
        suggested_command = _suggested_command(name)
        if suggested_command is not None:
            return suggested_command
    return "fit"


def _suggested_command(name: str | None) -> str | None:
    """Return the command that a name's beginning suggests, or None."""
    if not name:
        return None
    lower_name = Path(name).name.lower()
    for prefix, command in COMMAND_OF_PREFIX.items():
        if lower_name.startswith(prefix):
            return command
    return None


def _open_images(
    source: str,
    max_error_rate: float,
    **options: Any,  # noqa: ANN401 - keyword arguments of ``open_dataset``
) -> ImageDataset:
    """Open the images. Raise an error if more than the share ``max_error_rate`` is unreadable.

    The images are opened before torch is imported, because the import of torch takes seconds.
    """
    from vilu.datasets.base import ShardedDataset, require_files
    from vilu.datasets.catalog import open_dataset

    images = open_dataset(source, **options)
    if images.class_names is None and not images.captioned:
        raise UsageError(
            f"{source} names no classes, so there is nothing to ask the model. Give them with "
            "--classes FILE."
        )
    require_files(images, max_error_rate)
    noun = "images"
    if isinstance(images, ShardedDataset):
        noun = "tars"
    log_next_step(f"{len(images):,} {noun} in {images.source}; loading the model")
    return images


def _make_executor(name: str | None, processes: int | None) -> Executor | None:
    """Make the executor from the flags. None if this process embeds alone."""
    if name is None:
        if processes is not None:
            raise UsageError(
                "--processes is for an executor. Give --executor local, too, or leave --processes "
                "out."
            )
        return None
    from vilu.store.executors import make_executor

    return make_executor(name, processes=processes)
