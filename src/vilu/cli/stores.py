"""Commands for stores: import, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vilu.cli.console import log_next_step, parse_pairs, print_outputs, print_result, resumable
from vilu.cli.help import CLASSIFIER, MODEL, MORE, SPEED
from vilu.cli.images import store_in_words
from vilu.cli.options import (
    Outside,
    Overwrite,
    StoredNumbers,
    StoreFolder,
    path_argument,
    path_option,
)
from vilu.errors import UsageError
from vilu.text import escape_unprintable, plural

PathOfArrays = Annotated[
    Path | None,
    path_argument(
        "An .npz file, or a folder of .npy files. Required: class_names (K) or --classes, and "
        "either image (N, D) with text (K, D), or logits (N, K). Optional: target (N), ids, "
        "logit_scale, logit_bias, negatives (M, D), views, features, prompts, ...",
        metavar="SOURCE",
    ),
]
Logits = Annotated[
    Path | None,
    path_option(
        "Logits (N, K) of any classifier in place of texts: an .npy file.",
        metavar="FILE",
        rich_help_panel=CLASSIFIER,
    ),
]
Features = Annotated[
    Path | None,
    path_option(
        "With --logits: vectors (N, D) of the rows, an .npy file.",
        metavar="FILE",
        rich_help_panel=CLASSIFIER,
    ),
]
Labels = Annotated[
    Path | None,
    path_option(
        "Labels for the rows, as the array target: an .npy file, or text with one class name per "
        "line.",
        metavar="FILE",
    ),
]
Answers = Annotated[
    Path | None,
    path_option(
        "Answers of another model, for --answer given: an .npy file, or text with one per line.",
        metavar="FILE",
        rich_help_panel=CLASSIFIER,
    ),
]
Keys = Annotated[
    list[str] | None,
    Option(
        "--key",
        metavar="NAME=KEY",
        help="Read array NAME from the array that SOURCE calls KEY (text=text_single); repeatable.",
    ),
]
Classes = Annotated[
    Path | None, path_option("Class names, one per line, instead of the array class_names.")
]
Dtype = Annotated[
    StoredNumbers | None,
    Option(
        help="Type of the numbers in the store. [float16 if image is float16, else float32]",
        rich_help_panel=MORE,
    ),
]
LogitScale = Annotated[
    float | None,
    Option(help="Multiplier of the cosine: 100 for OpenAI's CLIP. [logit_scale of SOURCE]"),
]
LogitBias = Annotated[
    float | None,
    Option(
        help="Added to each logit; 0 except for SigLIP. [logit_bias of SOURCE]",
        rich_help_panel=MODEL,
    ),
]
ModelName = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="Name of the model of the embeddings, if known.",
        rich_help_panel=MODEL,
    ),
]
Origin = Annotated[
    str | None,
    Option(
        "--source",
        metavar="TEXT",
        help="Origin of the arrays, stored as a note.",
        rich_help_panel=MORE,
    ),
]
SplitName = Annotated[
    str | None, Option(help="Name of the split, stored as a note.", rich_help_panel=MORE)
]
PartSize = Annotated[
    int,
    Option(
        min=1,
        help="Rows per part. If the run is killed, at most one part is lost.",
        rich_help_panel=SPEED,
    ),
]
MaxErrorRate = Annotated[
    float,
    Option(min=0, max=1, help="Share of rows that may be unusable.", rich_help_panel=MORE),
]


@resumable
def import_(  # noqa: PLR0913, PLR0917 - one parameter per flag
    output: StoreFolder,
    source: PathOfArrays = None,
    logits: Logits = None,
    features: Features = None,
    labels: Labels = None,
    answers: Answers = None,
    logit_scale: LogitScale = None,
    logit_bias: LogitBias = None,
    key: Keys = None,
    classes: Classes = None,
    outside: Outside = None,
    model: ModelName = None,
    origin: Origin = None,
    split: SplitName = None,
    part_size: PartSize = 16_384,
    dtype: Dtype = None,
    max_error_rate: MaxErrorRate = 0.01,
    overwrite: Overwrite = False,
) -> None:
    """Make a store from arrays of another program; resumes where an earlier run stopped.

    Prints the folder of the store. The values of target are row numbers of text, -1 if unknown, and
    -2 for none of the classes (or names of classes, "" if unknown). Rows are scaled to unit norm.
    Rows that are zero or not finite are unusable. If the share of such rows is more than
    --max-error-rate, the exit code is 3. Nothing is unpickled, and at most one part is in memory.
    Imported stores are compared by width, logit scale and logit bias, because little else is known
    of the model.
    """
    from vilu.datasets.classes import read_classes
    from vilu.store.importing import import_arrays

    names = None
    if classes is not None:
        folders, names = read_classes(classes)
        if folders is not None:
            raise UsageError(
                f"{classes} must have one name per line, without folders, because arrays have none."
            )
    file_options = {"logits": logits, "features": features, "target": labels, "answer": answers}
    files = {name: file for name, file in file_options.items() if file is not None}
    store = import_arrays(
        source,
        output,
        files=files,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        keys=parse_pairs("--key", key),
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
    print_outputs(output)
    log_next_step(store_in_words(output, store, split=split, source=str(source or logits)))


def _require_existing_path(path: Path) -> Path:
    """Return the path, as typer's callback. Raise UsageError if the path does not exist."""
    if not path.exists():
        raise UsageError(
            f"{path} does not exist. `vilu inspect PATH` takes one path, and recognises what it "
            "is: a store, a predictor, scores, a table of answers, ..."
        )
    return path


def inspect(
    path: Annotated[
        Path,
        Argument(
            help="Output of a command of vilu: a store (finished or not), a predictor, scores, "
            "results, ...; or a table of answers. Of a table, the role of each column is shown.",
            callback=_require_existing_path,
        ),
    ],
    deep: Annotated[
        bool, Option("--deep", help="Read every byte of a store: hashes, norms, labels.")
    ] = False,
) -> None:
    """Show the content of an artefact of vilu, and check whether it is damaged.

    The exit code is 3, 6 or 7 if something is wrong.
    """
    from vilu.cli.inspecting import check_artefacts, is_store
    from vilu.tables.files import is_answer_table

    if is_store(path):
        _inspect_store(path, deep=deep)
        return
    if is_answer_table(path):
        _inspect_table(path)
        return
    facts = []
    lines = []
    for artefact in check_artefacts(path):
        facts.append({"path": str(artefact.path), "what": artefact.description})
        lines.append(f"{artefact.path}: {escape_unprintable(artefact.description)}")
    print_result({"found": facts}, "\n".join(lines))
    log_next_step("nothing is damaged")


def _inspect_store(path: Path, *, deep: bool) -> None:
    """Print a store's content. Raise StorageError if the store has problems."""
    from vilu.cli.inspecting import require_sound
    from vilu.store.inspect import inspect as inspect_store

    report = inspect_store(path, deep=deep)
    facts = report.to_dict()
    print_result(facts, str(report))
    require_sound(report, path)


def _inspect_table(path: Path) -> None:
    """Print an answer table's row counts, and the role of each column."""
    from vilu.cli.inspecting import refuse_list_for_people
    from vilu.tables.read import open_table

    refuse_list_for_people(path)
    table = open_table(path)
    n_right = int((table.correct == 1).sum())
    n_wrong = int((table.correct == 0).sum())
    facts = {
        "path": str(path),
        "what": "table of answers",
        "rows": len(table),
        "right": n_right,
        "wrong": n_wrong,
        "columns": table.roles,
    }
    n_unknown = len(table) - n_right - n_wrong
    lines = [
        f"{path}: table of answers, {plural(len(table), 'row')}: {n_right:,} right, "
        f"{n_wrong:,} wrong, {n_unknown:,} not known"
    ]
    width = max(map(len, table.roles))
    for name, role in table.roles.items():
        printable_name = escape_unprintable(name)
        lines.append(f"  {printable_name:{width}}  {role}")
    text = "\n".join(lines)
    print_result(facts, text)
    log_next_step("every cell that is used has the type that its column needs")
