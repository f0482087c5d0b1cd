"""Commands on stores: import, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from vilu.cli.console import goes_on, next_step, pairs_of, print_result
from vilu.cli.images import embedded
from vilu.cli.options import (
    Outside,
    Overwrite,
    StoredNumbers,
    StoreFolder,
    path_argument,
    path_option,
)
from vilu.errors import UsageError
from vilu.text import printable

Arrays = Annotated[
    Path,
    path_argument(
        "An .npz file, or a folder of .npy files: image (N, D), text (K, D), class_names (K), "
        "target (N), ids, logit_scale, logit_bias, negatives (M, D), views, features, prompts, "
        "...; the first three there must be.",
        metavar="SOURCE",
    ),
]
Keys = Annotated[
    list[str] | None,
    Option(
        "--key",
        metavar="NAME=KEY",
        help="Array NAME is called KEY there (text=text_single); repeatable.",
    ),
]
Classes = Annotated[Path | None, path_option("Class names, one a line, in place of class_names.")]
Dtype = Annotated[
    StoredNumbers | None,
    Option(help="Numbers in the store. [float16 where image is, else float32]"),
]


@goes_on
def import_(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Arrays,
    output: StoreFolder,
    logit_scale: Annotated[
        float | None,
        Option(help="Multiplier of the cosine: 100 for OpenAI's CLIP. [logit_scale of SOURCE]"),
    ] = None,
    logit_bias: Annotated[
        float | None, Option(help="Added to each logit: 0 but for SigLIP. [that of SOURCE]")
    ] = None,
    key: Keys = None,
    classes: Classes = None,
    outside: Outside = None,
    model: Annotated[
        str | None, Option(metavar="NAME", help="Model that made them, if it is known.")
    ] = None,
    origin: Annotated[
        str | None, Option("--source", metavar="TEXT", help="Where they come from, recorded.")
    ] = None,
    split: Annotated[str | None, Option(help="Name of the split, recorded.")] = None,
    part_size: Annotated[
        int, Option(min=1, help="Rows per part: the most that a kill can cost.")
    ] = 16_384,
    dtype: Dtype = None,
    max_error_rate: Annotated[
        float, Option(min=0, max=1, help="Share of rows that may be unusable.")
    ] = 0.01,
    overwrite: Overwrite = False,
) -> None:
    """Make a store of arrays that another program made; resumes where an earlier run stopped.

    Prints the folder of the store. target holds rows of text, -1 where unknown, -2 for none of the
    classes (or names of classes, "" where unknown). Rows are brought to unit norm; those that are
    zero or not finite are set aside, and end the command with exit code 3 when they are more than
    --max-error-rate. Nothing is unpickled; no more than a part is in memory. What is not known of
    the model stays unknown: such stores are compared by width, scale and bias.
    """
    from vilu.datasets.classes import read_classes
    from vilu.store.importing import import_arrays

    names = None
    if classes is not None:
        folders, names = read_classes(classes)
        if folders is not None:
            raise UsageError(f"{classes} must have one name a line: arrays have no folders.")
    store = import_arrays(
        source,
        output,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        keys=pairs_of("--key", key),
        class_names=names,
        outside=outside or (),
        model=model,
        origin=origin,
        split=split,
        dtype=dtype,
        part_size=part_size,
        max_error_rate=max_error_rate,
        overwrite=overwrite,
    )
    typer.echo(output)
    next_step(embedded(output, store.manifest, (split, str(source))))


def inspect(
    path: Annotated[
        Path,
        path_argument(
            "What a command of vilu wrote: a store, finished or not, a predictor, scores, results, "
            "..."
        ),
    ],
    deep: Annotated[
        bool, Option("--deep", help="Read every byte of a store: hashes, norms, labels.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """What an artefact of vilu holds, and whether it is sound.

    Exit code 3, 6 or 7 when something is wrong.
    """
    from vilu.cli.artefacts import check, is_store

    if is_store(path):
        _inspect_store(path, deep=deep, as_json=as_json)
        return
    facts = []
    lines = []
    for artefact in check(path):
        facts.append({"path": str(artefact.path), "what": artefact.what})
        lines.append(f"{artefact.path}: {printable(artefact.what)}")
    print_result({"found": facts}, "\n".join(lines), as_json=as_json)
    next_step("nothing is damaged")


def _inspect_store(path: Path, *, deep: bool, as_json: bool) -> None:
    """Print what a store holds, sound or not."""
    from vilu.cli.artefacts import require_sound
    from vilu.store.inspect import inspect as inspect_store

    report = inspect_store(path, deep=deep)
    print_result(report.to_dict(), str(report), as_json=as_json)
    require_sound(report, path)
