"""Commands that make a table of answers from another program's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from vilu.cli.console import (
    ResultWriter,
    log_next_step,
    prepare_output,
    print_outputs,
    shell_command,
)
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
        path_argument(
            "A JSONL file with one completion per line, in OpenAI's format.", metavar="RUN"
        ),
    ],
    output: TableFile,
    truth: Annotated[
        Path | None,
        path_option("Right answers: a CSV file with the columns id and truth.", metavar="FILE"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Answers of a language model.

    The file has completions with logprobs in the format of vLLM, or a batch. Columns: mean, least
    and first log-probability of the tokens, and the share of the n samples with the same answer.
    With --truth, answers are compared without case and white space.
    """
    from vilu.tables.sources import completion_answers
    from vilu.tables.sources.truth import read_truth

    input_paths = _require_files(run, truth)
    write_output = prepare_output(output, "answers", input_paths, overwrite=overwrite)
    truth_of_id = None if truth is None else read_truth(truth)
    converted = completion_answers(run, truth_of_id)
    _write_and_report(converted, output, write_output)


def detections_(
    results: Annotated[Path, path_argument("Detections in COCO's format.", metavar="RESULTS")],
    annotations: Annotated[
        Path, path_argument("Annotations in COCO's format.", metavar="ANNOTATIONS")
    ],
    output: TableFile,
    min_iou: Annotated[float, Option(help="Least overlap of a right detection.")] = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Boxes of a detector.

    The boxes are matched with the annotated objects as pycocotools does it.
    """
    from vilu.tables.sources import detection_answers

    input_paths = _require_files(results, annotations)
    # ``min_iou`` is part of the input digest, because another value gives another result.
    write_output = prepare_output(
        output, "answers", input_paths, overwrite=overwrite, min_iou=min_iou
    )
    converted = detection_answers(results, annotations, min_iou=min_iou)
    _write_and_report(converted, output, write_output)


def logits_(
    logits: Annotated[Path, path_argument("Logits (N, K): an .npy file.", metavar="LOGITS")],
    output: TableFile,
    labels: Annotated[
        Path | None,
        path_option("True classes (N,): an .npy file, or text with one per line.", metavar="FILE"),
    ] = None,
    classes: Annotated[
        Path | None, path_option("Names of the K classes, one per line.", metavar="FILE")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Answers of a classifier.

    Columns: largest softmax, margin, entropy and largest logit. Labels are numbers of classes
    from 0 (-1: unknown, -2: none of the classes), or their names.
    """
    from vilu.tables.sources import logit_answers

    input_paths = _require_files(logits, labels, classes)
    # ``has_labels`` is in the digest. Without it, the same file would give the same digest as
    # --labels and as --classes.
    has_labels = labels is not None
    write_output = prepare_output(
        output, "answers", input_paths, overwrite=overwrite, has_labels=has_labels
    )
    arrays = _read_arrays({"logits": logits, "target": labels, "class_names": classes})
    logit_array = arrays.pop("logits")
    converted = logit_answers(logit_array, **arrays)
    _write_and_report(converted, output, write_output)


def words_(
    pages: Annotated[
        list[Path], path_argument("TSV files of Tesseract, one per picture.", metavar="PAGE")
    ],
    output: TableFile,
    truth: Annotated[
        Path | None,
        path_option(
            "True words: a CSV file with the columns page, text, left, top, width, height.",
            metavar="FILE",
        ),
    ] = None,
    dictionary: Annotated[
        Path | None, path_option("Known words, one per line.", metavar="FILE")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Words read by Tesseract.

    `tesseract PAGE.png PAGE tsv` writes such a file. The closing line gives the share of true words
    that were never read. Such words have no row, so no guarantee covers them.
    """
    from vilu.tables.sources import word_answers
    from vilu.tables.sources.truth import read_dictionary, read_words

    input_paths = _require_files(*pages, truth, dictionary)
    has_truth = truth is not None
    write_output = prepare_output(
        output, "answers", input_paths, overwrite=overwrite, n_pages=len(pages), has_truth=has_truth
    )
    true_words = None if truth is None else read_words(truth)
    known_words = () if dictionary is None else read_dictionary(dictionary)
    converted = word_answers(pages, truth=true_words, dictionary=known_words)
    _write_and_report(converted, output, write_output)


def _require_files(*paths: Path | None) -> list[Path]:
    """Return the paths that are not None. Raise UsageError for a path that is no file."""
    files = [path for path in paths if path is not None]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} must be a file, and it is none. Give the file itself.")
    return files


def _read_arrays(files: dict[str, Path | None]) -> dict[str, Any]:
    """Read the arrays from ``files``, by name. A name without a file is left out."""
    from vilu.store.arrays import ArrayFiles, array_to_texts

    paths = {name: path for name, path in files.items() if path is not None}
    contents: dict[str, Any] = {}
    with ArrayFiles(None, paths) as array_files:
        for name in paths:
            array = array_files.open(name)
            contents[name] = array.read_whole()
            if contents[name].dtype.kind in "US":  # texts: Unicode or bytes
                contents[name] = array_to_texts(contents[name], array.location)
    return contents


def _write_and_report(
    converted: Converted,
    output: Path,
    write_output: Callable[[ResultWriter], None],
) -> None:
    """Write the table, print the path, and log the answer count and the next step."""
    write_output(converted.write)
    print_outputs(output)
    missed_text = ""
    if converted.missed_share is not None:
        missed_text = (
            f"; {converted.n_missed:,} of the {converted.n_wanted:,} true words or objects have no "
            f"row ({converted.missed_share:.1%}), and no guarantee covers them"
        )
    n_known = converted.n_known
    log_next_step(
        f"{len(converted):,} answers, of which {n_known:,} are known as right or wrong{missed_text}"
    )
    if n_known:
        fit_command = shell_command("vilu", "fit", output, "-o", "predictor")
        log_next_step(f"next: {fit_command}")
    else:
        log_next_step("next: write 1 (right) or 0 (wrong) into the column correct of some rows")
