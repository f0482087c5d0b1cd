"""The command estimate: error rates and class shares from few labels."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from vilu.cli import console
from vilu.cli.options import (
    POOL_FLAGS,
    STUDY_FLAGS,
    Data,
    LabelFiles,
    ReadingFlags,
    path_option,
    with_reading_flags,
)
from vilu.errors import UNKNOWN, UsageError
from vilu.text import escape_unprintable, plural

if TYPE_CHECKING:
    from vilu.calibration.estimates import Estimate
    from vilu.embeddings.source import EmbeddingSource
    from vilu.outcomes.outcomes import Outcomes
    from vilu.predictors.contract.predictor import FailurePredictor

MAX_CLASSES_SHOWN = 20
"""Maximum number of printed classes. --json has all."""

PredictorOption = Annotated[
    Path | None,
    path_option(
        "Predictor that `vilu fit` wrote, fitted on other rows. [the one column of scores of the "
        "table]",
        metavar="PREDICTOR",
    ),
]
Classes = Annotated[
    bool,
    Option(
        "--classes",
        help="Also estimate how many rows each class has. The classes of a table are its answers; "
        "where an answer is wrong, the column truth has the right one.",
    ),
]
Confidence = Annotated[
    float, Option(min=0, max=1, help="Confidence of every interval, by simulation.")
]


# the parameter ``reading_flags`` is replaced by several flags
@partial(with_reading_flags, excluded_flags=STUDY_FLAGS | POOL_FLAGS)
def estimate(
    data: Data,
    predictor: PredictorOption = None,
    labels: LabelFiles = None,
    confidence: Confidence = 0.95,
    *,
    reading_flags: ReadingFlags,
    classes: Classes = False,
) -> None:
    """Estimate how often the answers are wrong, from labels of a few rows drawn at random.

    The scores of all rows make the interval shorter than labels alone would (prediction-powered
    inference). The labelled rows must be a random sample. Labels of rows chosen by `vilu next` or
    by a person are refused if the files show the choice. The estimates are about the rows of DATA.
    """
    from vilu.calibration.estimates import estimate as estimate_outcomes

    source = reading_flags.open_with_second(data)
    _refuse_labels_chosen_to_fit(source)
    scoring_predictor = _find_predictor(source, data, predictor)
    if labels is not None:
        source = _with_labels_of_files(source, labels)
    outcomes = _score_unused_rows(scoring_predictor, source, data, with_classes=classes)
    estimates = estimate_outcomes(outcomes, confidence=confidence, of_classes=classes)
    facts = [asdict(share) for share in estimates]
    text = _estimates_in_words(estimates, confidence)
    console.print_result(facts, text)


def _refuse_labels_chosen_to_fit(source: EmbeddingSource) -> None:
    """Refuse a table with labels of rows that `vilu next` chose for a fit.

    These rows are not a random sample, so an estimate from them would be wrong.
    """
    from vilu.tables.table import AnswerTable

    if not isinstance(source, AnswerTable) or source.asked_for is None:
        return
    is_labelled = (source.correct != UNKNOWN).tolist()
    n_chosen_rows = 0
    for purpose, has_label in zip(source.asked_for, is_labelled, strict=True):
        if purpose == "fit" and has_label:
            n_chosen_rows += 1
    if n_chosen_rows:
        raise UsageError(
            f"`vilu next` chose {plural(n_chosen_rows, 'labelled row')} of this table to fit on, "
            "so they say nothing about all rows. Draw rows at random, label them, and give these "
            "labels only."
        )


def _find_predictor(
    source: EmbeddingSource, data: Path, predictor: Path | None
) -> FailurePredictor:
    """Return the predictor for scoring: the saved predictor, or else a table's only score column.

    ``data`` is the path of ``source``, for error messages.
    """
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.tables.methods import method_of_only_score
    from vilu.tables.table import AnswerTable

    if predictor is not None:
        return load_predictor(predictor)
    command = console.shell_command("vilu", "estimate", data, "--predictor", "PREDICTOR")
    if isinstance(source, AnswerTable):
        return method_of_only_score(source, command)
    raise UsageError(
        f"{data} has no scores. Fit a predictor on other rows and name it: `{command}`."
    )


def _with_labels_of_files(source: EmbeddingSource, files: list[Path]) -> EmbeddingSource:
    """Return all rows of a store. A row has a label only if a file has a label for this row."""
    from vilu.store.reader import EmbeddingStore
    from vilu.triage.store_labels import all_rows_with_random_labels

    if not isinstance(source, EmbeddingStore):
        raise UsageError(
            "--labels are for a single store with classes. Fill in the column correct of a table, "
            "and leave --labels out for pairs and for two models."
        )
    return all_rows_with_random_labels(source, files)


def _score_unused_rows(
    predictor: FailurePredictor, source: EmbeddingSource, data: Path, *, with_classes: bool
) -> Outcomes:
    """Score the rows that were not used to fit the predictor.

    The last part of the path ``data`` becomes the data set's name. With ``with_classes``, a
    table's answers become classes.
    """
    from vilu.scoring.score import score_unseen
    from vilu.tables import scores
    from vilu.tables.table import AnswerTable

    is_unused = predictor.unseen(source, role="estimated")
    outcomes = score_unseen(predictor, source, is_unused, dataset=data.name)
    if with_classes and isinstance(source, AnswerTable):
        return scores.outcomes_with_classes(outcomes, source)
    return outcomes


def _estimates_in_words(estimates: tuple[Estimate, ...], confidence: float) -> str:
    """Format the estimates as text, the error rate first, then the largest classes."""
    from vilu.calibration.thresholds import exact_percent

    error_rate, *class_shares = estimates
    low, high = error_rate.plain  # the interval from the labels alone
    lines = [
        f"{plural(error_rate.n, 'row')}, of which {error_rate.n_labelled:,} have a label; they "
        "must be a random sample",
        f"{error_rate} (intervals of {exact_percent(confidence)})",
        f"  by the labels alone: [{low:.1%}, {high:.1%}] (Clopper-Pearson)",
    ]
    largest_shares = sorted(class_shares, key=lambda estimate: estimate.share, reverse=True)
    for class_share in largest_shares[:MAX_CLASSES_SHOWN]:
        printable_share = escape_unprintable(str(class_share))
        lines.append(f"  {printable_share}")
    n_hidden_classes = len(largest_shares) - MAX_CLASSES_SHOWN
    if n_hidden_classes > 0:
        lines.append(f"  and {plural(n_hidden_classes, 'smaller class')}: --json has them all")
    return "\n".join(lines)
