"""Writes labels to files: as a CSV with paths and labels, or as scores with failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.files import matching_text
from vilu.errors import OUTSIDE, OUTSIDE_NAME, DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.text import plural
from vilu.triage.labels import SKIPPED, meant_name

MAX_CLASS_LIST_LENGTH: Final = 200
"""Maximum length of the class list in an error, in characters."""


def label_columns(labels: Mapping[str, str], streams: Mapping[str, str]) -> dict[str, pa.Array]:
    """Make the columns of a label table, sorted by path.

    Args:
        labels: Maps paths to labels.
        streams: Maps paths to streams.
    """
    paths = sorted(labels)
    columns = {
        "path": paths,
        "label": [labels[path] for path in paths],
        "stream": [streams.get(path) for path in paths],
    }
    return {name: pa.array(values, pa.string()) for name, values in columns.items()}


def write_labels(
    labels: Mapping[str, str],
    output: Path,
    scores: Path | None = None,
    streams: Mapping[str, str] | None = None,
) -> int:
    """Write labels as a CSV, or as scores with failures for ``vilu monitor --late-labels``.

    Args:
        labels: Maps paths to labels.
        output: The file to write.
        scores: Score file. The labelled rows in this file are written. None to write a CSV.
        streams: Maps paths to the labels' streams, for the CSV.

    Returns:
        The number of written labels.

    Raises:
        UsageError: If ``scores`` are given and the output exists. If ``scores`` are not given and
            the output has another suffix than .csv, or is an existing file with other content.
        DataError: If no label belongs to a row in the scores, or if a label is no class in the
            scores.
    """
    if scores is None:
        require_suffix(output, ".csv")
        columns = label_columns(labels, streams or {})
        write_new_file(output, csv_bytes(columns))
        return len(labels)
    if output.exists():
        raise UsageError(
            f"{output} is there, so it is left alone. Give another file, or remove it."
        )
    labelled = _labelled_scores(scores, labels)
    labelled.save(output)
    return len(labelled)


def _labelled_scores(scores: Path, labels: Mapping[str, str]) -> Outcomes:
    """Read scores and return the labelled rows, with targets and failures."""
    outcomes = Outcomes.load(scores)
    if outcomes.ids is None or outcomes.class_names is None or outcomes.prediction is None:
        raise DataError(
            f"{scores} does not name its images and classes, so labels cannot be matched with its "
            "rows."
        )
    known_keys = set(outcomes.ids)
    label_of_key: dict[str, str] = {}
    for path, label in labels.items():
        key = matching_text(path, known_keys) or path  # ``path`` if no row has this key
        add_label(label_of_key, scores, key, label)
    target_of = {name: index for index, name in enumerate(outcomes.class_names)}
    target_of.setdefault(OUTSIDE_NAME, OUTSIDE)  # has no effect if a class has this name
    rows = []
    targets = []
    for row, key in enumerate(outcomes.ids):
        label_of_row = label_of_key.get(key)
        if label_of_row is None or label_of_row == SKIPPED:
            continue
        name = meant_name(label_of_row, target_of)
        if name is None:
            class_list = ", ".join(map(str, outcomes.class_names))
            raise DataError(
                f"{label_of_row!r} is no class of {scores}. Its classes: "
                f"{class_list[:MAX_CLASS_LIST_LENGTH]}."
            )
        rows.append(row)
        targets.append(target_of[name])
    if not rows:
        raise DataError(
            f"not one of {plural(len(labels), 'label')} belongs to a row of {scores}. The key of "
            f"its first row is {outcomes.ids[0]!r}."
        )
    target = np.array(targets)
    is_wrong = np.array(outcomes.prediction)[rows] != target
    failure = is_wrong.astype(np.int64)
    return replace(outcomes.take(np.array(rows)), target=target, failure=failure)


def add_label(labels: dict[str, str], source: Path, path: str, label: str | None) -> None:
    """Add a label, or nothing if it is None. Raises DataError if the photo has another label."""
    if label is None:
        return
    first_label = labels.setdefault(path, label)  # adds the label if the photo has none
    if label != first_label:
        raise DataError(f"{source}: {path!r} has the labels {first_label!r} and {label!r}.")


def require_suffix(output: Path, suffix: str) -> None:
    """Raise UsageError unless a file name ends in ``suffix``."""
    if output.suffix.lower() != suffix:
        raise UsageError(f"the output must be a file that ends in {suffix}. Got {output} instead.")


def write_new_file(path: Path, content: bytes) -> None:
    """Write a file. An existing file must have the same content.

    Raises:
        UsageError: If a file with different content exists. It may be somebody's work.
    """
    with convert_os_errors(f"cannot read {path}"):
        has_same_content = path.is_file() and path.read_bytes() == bytes(content)
        if path.exists() and not has_same_content:
            raise UsageError(
                f"{path} is there and holds something else, so it is left alone. Give another file."
            )
    write_bytes(path, content)
