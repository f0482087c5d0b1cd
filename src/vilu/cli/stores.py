"""Commands on stores: import, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from vilu.cli.console import Overwrite, goes_on, next_step, pairs_of, path_argument, path_option
from vilu.cli.images import Outside, embedded
from vilu.errors import UsageError
from vilu.text import printable

Arrays = Annotated[
    Path,
    path_argument(
        "An .npz file, or a folder of .npy files: image (N, D), text (K, D), class_names (K), target (N), ids, "
        "logit_scale, logit_bias, negatives (M, D), views, features, prompts, ...; the first three there must be.",
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
    Literal["float16", "float32"] | None,
    Option(help="Numbers in the store. [float16 where image is, else float32]"),
]


@goes_on
def import_(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Arrays,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder of the store to make or to resume.")
    ],
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

    folders, names = (None, None) if classes is None else read_classes(classes)
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
            "What a command of vilu wrote: a store, finished or not, a predictor, scores, results, ..."
        ),
    ],
    deep: Annotated[
        bool, Option("--deep", help="Read every byte of a store: hashes, norms, labels.")
    ] = False,
    seal: Annotated[
        bool,
        Option(
            "--seal",
            help="If all is well, give a digest to every file that an earlier vilu wrote without.",
        ),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """What an artefact of vilu holds, and whether it is sound.

    Exit code 3, 6 or 7 when something is wrong.
    """
    from vilu.cli.artefacts import check, is_store
    from vilu.errors import StorageError

    if is_store(path) and not seal:
        from vilu.store.inspect import inspect as inspect_store

        report = inspect_store(path, deep=deep)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
        if report.problems:
            raise StorageError(
                f"{len(report.problems)} problems in {path}; the first: {report.problems[0]}"
            )
        return
    found = list(check(path))
    sealed = [file for artefact in found for file in artefact.seal()] if seal else []
    facts = [{"path": str(one.path), "what": one.what} for one in found]
    content = (
        {"found": facts, "sealed": [str(file) for file in sealed]} if seal else {"found": facts}
    )
    lines = [f"{one.path}: {printable(one.what)}" for one in found]
    typer.echo(json.dumps(content, indent=2) if as_json else "\n".join(lines))
    next_step(f"nothing is damaged{f'; a digest was added to {len(sealed)} files' if seal else ''}")
