"""Commands that make a table of answers from files of another program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vilu.cli.console import keeping, next_step, print_outputs, shell
from vilu.cli.options import Overwrite, path_argument, path_option
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.tables.sources import Converted

TableFile = Annotated[
    Path, Option("--output", "-o", help="Table to write: a .csv or a .parquet file.")
]


def completions_(
    run: Annotated[
        Path,
        path_argument("A JSONL file with one completion per line, in OpenAI's format.", "RUN"),
    ],
    output: TableFile,
    truth: Annotated[
        Path | None,
        path_option("Right answers: a CSV file with the columns id and truth.", "FILE"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Answers of a language model.

    They are completions with logprobs, as vLLM writes them, or a batch. Columns: mean, least
    and first log-probability of the tokens, and the share of the n samples
    that give the answer. With --truth, answers are compared without case and white space.
    """
    from vilu.tables.sources import completion_answers
    from vilu.tables.sources.truth import read_truth

    keep = keeping(output, "answers", _files(run, truth), overwrite=overwrite)
    known = None if truth is None else read_truth(truth)
    _finish(completion_answers(run, known), output, keep)


def detections_(
    results: Annotated[Path, path_argument("Detections in COCO's format.", "RESULTS")],
    annotations: Annotated[Path, path_argument("Annotations in COCO's format.", "ANNOTATIONS")],
    output: TableFile,
    min_iou: Annotated[float, Option(help="Least overlap of a right detection.")] = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Boxes of a detector.

    They are matched with the annotated objects as pycocotools does it.
    """
    from vilu.tables.sources import detection_answers

    read = _files(results, annotations)
    keep = keeping(output, "answers", read, overwrite=overwrite, min_iou=min_iou)
    _finish(detection_answers(results, annotations, min_iou=min_iou), output, keep)


def logits_(
    logits: Annotated[Path, path_argument("Logits (N, K): an .npy file.", "LOGITS")],
    output: TableFile,
    labels: Annotated[
        Path | None,
        path_option("True classes (N,): an .npy file, or text with one per line.", "FILE"),
    ] = None,
    classes: Annotated[
        Path | None, path_option("Names of the K classes, one per line.", "FILE")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Answers of a classifier.

    Columns: largest softmax, margin, entropy and largest logit. Labels are numbers of classes
    from 0 (-1: unknown, -2: none of the classes), or their names.
    """
    from vilu.tables.sources import logit_answers

    keep = keeping(
        output,
        "answers",
        _files(logits, labels, classes),
        overwrite=overwrite,
        # Without this, the digest would be the same whether a single file has labels or names.
        has_labels=labels is not None,
    )
    arrays = _arrays({"logits": logits, "target": labels, "class_names": classes})
    numbers = arrays.pop("logits")
    _finish(logit_answers(numbers, **arrays), output, keep)


def words_(
    pages: Annotated[list[Path], path_argument("TSV files of Tesseract, one per picture.", "PAGE")],
    output: TableFile,
    truth: Annotated[
        Path | None,
        path_option(
            "True words: a CSV file with the columns page, text, left, top, width, height.", "FILE"
        ),
    ] = None,
    dictionary: Annotated[Path | None, path_option("Known words, one per line.", "FILE")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Words that Tesseract read.

    `tesseract PAGE.png PAGE tsv` writes such a file. The closing line says which share of the
    true words was never read: they have no row, so no guarantee covers them.
    """
    from vilu.tables.sources import word_answers
    from vilu.tables.sources.truth import read_dictionary, read_words

    keep = keeping(
        output,
        "answers",
        _files(*pages, truth, dictionary),
        overwrite=overwrite,
        n_pages=len(pages),
        has_truth=truth is not None,
    )
    true_words = None if truth is None else read_words(truth)
    known_words = () if dictionary is None else read_dictionary(dictionary)
    _finish(word_answers(pages, truth=true_words, dictionary=known_words), output, keep)


def _files(*paths: Path | None) -> list[Path]:
    """The paths that are given; UsageError for a folder, or another path that is no file."""
    files = [path for path in paths if path is not None]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} must be a file, and it is none. Give the file itself.")
    return files


def _arrays(files: dict[str, Path | None]) -> dict[str, Any]:
    """Arrays by name, read whole; names without a file are left out."""
    from vilu.store.arrays import Arrays, array_to_texts

    paths = {name: path for name, path in files.items() if path is not None}
    contents: dict[str, Any] = {}
    with Arrays(None, paths) as arrays:
        for name in paths:
            array = arrays.open(name)
            contents[name] = array.read_whole()
            if contents[name].dtype.kind in "US":
                contents[name] = array_to_texts(contents[name], array.location)
    return contents


def _finish(
    converted: Converted, output: Path, keep: Callable[[Callable[[Path, str], None]], None]
) -> None:
    """Write the table, print its path, and log its number of answers and the next step."""
    keep(converted.write)
    print_outputs(output)
    missed = ""
    if converted.missed_share is not None:
        missed = (
            f"; {converted.n_missed:,} of {converted.n_wanted:,} that are there have no row "
            f"({converted.missed_share:.1%}), and no guarantee covers them"
        )
    n_known = converted.n_known
    next_step(
        f"{len(converted):,} answers, of which {n_known:,} are known as right or wrong{missed}"
    )
    if n_known:
        next_step(f"next: {shell('vilu', 'fit', output, '-o', 'predictor')}")
    else:
        next_step("next: write 1 (right) or 0 (wrong) into the column correct of some rows")
