"""Photos for people to look at: out to the tools that they use, and back as labels.

Formats as the tools define them: Label Studio's tasks with predictions (JSON) and its labelling
configuration (XML); FiftyOne's data set on disk (``metadata.json`` and ``samples.json``); a CSV for
everything else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa

from vilu.artifacts.disk import make_folder, or_refuse, write_bytes
from vilu.artifacts.documents import plain_json, read_document
from vilu.artifacts.tables import CsvRow, csv_bytes, csv_rows
from vilu.calibration.shares import OUTSIDE_NAME
from vilu.datasets.files import path_of, portable_name, text_among
from vilu.errors import OUTSIDE, UNKNOWN, DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.scoring.score import ACCEPT
from vilu.triage.labels import SKIPPED, STREAMS, columns_of, read_labels
from vilu.triage.triage import DECISIONS, NEXT, STATE, TriageState

CHOICE, IMAGE = "label", "image"
"""Names of the two parts of a labelling configuration; a person's choice goes to the first."""

MODEL_FIELD, TRUTH_FIELD = "vilu", "ground_truth"
"""Fields of a FiftyOne sample: what the model says, and what a person does."""

FIFTYONE_VERSION: Final = "1.9.0"
"""Version whose documents are written; newer ones migrate them."""

DATABASE_LIMIT: Final = 256 * 2**20
"""Bytes of a file of finished tasks at most."""

CHOSEN: Final = "fit"
"""Stream of a photo that no draw has asked for: no promise may rest on its label."""

Tool = Literal["label-studio", "fiftyone", "csv"]
Which = Literal["asked", "review", "all"]


@dataclass(frozen=True)
class ReviewTask:
    """One photo to look at."""

    path: str
    answer: str | None  # the model's
    failure_probability: float | None
    runner_up: str | None = None
    # why it was asked for; a photo that people look at for any other reason was chosen, so that it
    # can teach alone
    stream: str = CHOSEN


@dataclass(frozen=True)
class Review:
    """Photos to look at, the names to choose from, and where the photos are.

    Attributes:
        tasks: In the order in which to look at them.
        names: Classes, and after them what else may be said.
        photos: Folder that the paths are relative to; None where it is not known.
        model: What gave the answers.
    """

    tasks: list[ReviewTask]
    names: tuple[str, ...]
    photos: Path | None
    model: str


def open_review(source: Path, which: Which = "asked", n: int | None = None) -> Review:
    """The photos of a triage that are asked for, or to be reviewed; or rows of scores, the most doubtful first.

    Raises:
        DataError: If the source is neither, or its scores do not say which images they are of.
    """
    review = _of_triage(source, which) if (source / STATE).is_file() else _of_scores(source, which)
    return replace(review, tasks=review.tasks[:n])


def _of_triage(folder: Path, which: Which) -> Review:
    state = read_document(folder / STATE, TriageState)
    settings = state.settings
    outside = [name for name in _texts(settings, "outside") if name != OUTSIDE_NAME]
    names = (*_texts(settings, "classes"), *outside, OUTSIDE_NAME)
    rows = _written_rows(folder / f"{DECISIONS}.csv", DECIDED)
    streams = {row["path"]: row["stream"] for row in _written_rows(folder / NEXT, ASKED)}
    tasks = [
        _task(row, streams.get(row["path"], CHOSEN))
        for row in rows
        if _is_wanted(row, streams, which)
    ]
    place = {path: number for number, path in enumerate(streams)}
    tasks.sort(key=lambda one: (place.get(one.path, len(place)), -(one.failure_probability or 0.0)))
    return Review(tasks, names, Path(state.photos), "vilu triage")


DECIDED = ("path", "decision", "answer", "failure_probability", "runner_up")
ASKED = ("path", "stream")
"""Columns of a triage's tables that are looked at."""


def _written_rows(path: Path, wanted: Sequence[str]) -> list[CsvRow]:
    """The rows of a table that a triage has written; DataError where it is damaged."""
    columns, rows = csv_rows(path)
    again = "Run `vilu triage` again, which writes it."
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(f"{path} has no column {missing[0]!r}. {again}")
    for number, row in enumerate(rows, start=2):
        if row.ends_early:
            raise DataError(f"{path}: row {number} is not complete. {again}")
        if "failure_probability" in wanted and not _is_probability(row["failure_probability"]):
            said = f"{row['failure_probability']!r:.40}"
            raise DataError(f"{path}: row {number} has no failure_probability, but {said}. {again}")
    return rows


def _is_probability(cell: str) -> bool:
    """Whether a cell is empty, or a number from 0 to 1."""
    try:
        return not cell or 0 <= float(cell) <= 1
    except ValueError:
        return False


def _is_wanted(row: Mapping[str, str], streams: Mapping[str, str], which: Which) -> bool:
    return (
        row["path"] in streams
        if which == "asked"
        else which == "all" or row["decision"] == "review"
    )


def _task(row: Mapping[str, str], stream: str) -> ReviewTask:
    probability = float(row["failure_probability"]) if row["failure_probability"] else None
    return ReviewTask(
        row["path"], row["answer"] or None, probability, row["runner_up"] or None, stream
    )


def _texts(settings: Mapping[str, object], name: str) -> list[str]:
    found = settings.get(name)
    return [str(one) for one in found] if isinstance(found, list) else []


def _of_scores(path: Path, which: Which) -> Review:
    outcomes = Outcomes.load(path)
    names, said, ids = outcomes.class_names, outcomes.prediction, outcomes.ids
    if names is None or said is None or ids is None:
        raise DataError(
            f"{path} does not say which images and classes it is of. Give scores that `vilu score` wrote."
        )
    probability = (
        outcomes.uncertainty
        if outcomes.failure_probability is None
        else outcomes.failure_probability
    )
    known = outcomes.is_probability or outcomes.failure_probability is not None
    doubtful = np.argsort(
        -np.where(np.isnan(outcomes.uncertainty), np.inf, outcomes.uncertainty), kind="stable"
    )
    tasks = [
        ReviewTask(
            ids[row],
            None if said[row] == UNKNOWN else str(names[said[row]]),
            float(probability[row]) if known and math.isfinite(probability[row]) else None,
        )
        for row in doubtful.tolist()
        if which == "all" or outcomes.decision is None or outcomes.decision[row] != ACCEPT
    ]
    return Review(tasks, (*map(str, names), OUTSIDE_NAME), None, outcomes.method or "vilu")


def write_review(review: Review, tool: Tool, output: Path, *, prefix: str = "") -> list[Path]:
    """Write the tasks for a tool; the files that were written.

    Args:
        review: What to look at.
        tool: For whom.
        output: File, .json or .csv; for FiftyOne a folder.
        prefix: What stands before the path of a photo for Label Studio, such as
            "/data/local-files/?d=photos/".
    """
    return WRITERS[tool](review, output, prefix)


def _write_label_studio(review: Review, output: Path, prefix: str) -> list[Path]:
    _require_suffix(output, ".json")
    config = output.with_suffix(".xml")
    write_new(
        output,
        json.dumps(
            [_label_studio(one, review.model, prefix) for one in review.tasks], indent=1
        ).encode(),
    )
    write_new(config, label_config(review.names).encode())
    return [output, config]


def _label_studio(task: ReviewTask, model: str, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {
            IMAGE: prefix + quote(os.fsencode(path_of(task.path))),
            "path": task.path,
            "vilu_uncertainty": task.failure_probability,
            "vilu_runner_up": task.runner_up,
            "vilu_stream": task.stream,
        }
    }
    if task.answer is not None:
        choice = {"choices": [task.answer]}
        result = {"from_name": CHOICE, "to_name": IMAGE, "type": "choices", "value": choice}
        score = None if task.failure_probability is None else 1 - task.failure_probability
        found["predictions"] = [{"model_version": model, "score": score, "result": [result]}]
    return found


def label_config(names: Sequence[str]) -> str:
    """Label Studio's labelling configuration for one choice among names."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}")
    choices = ElementTree.SubElement(
        view, "Choices", name=CHOICE, toName=IMAGE, choice="single", showInLine="true"
    )
    for name in (*names, SKIPPED):
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _write_csv(review: Review, output: Path, _prefix: str) -> list[Path]:
    _require_suffix(output, ".csv")
    columns = columns_of(review.tasks, ("path",)) | {
        "label": pa.nulls(len(review.tasks), pa.string())
    }
    columns |= columns_of(review.tasks, ("answer", "failure_probability", "runner_up", "stream"))
    write_new(output, csv_bytes(columns))
    return [output]


FIELDS: Final = {
    "id": ("ObjectIdField", None, "_id"),
    "filepath": ("StringField", None, "filepath"),
    "tags": ("ListField", None, "tags"),
    "metadata": ("EmbeddedDocumentField", "fiftyone.core.metadata.ImageMetadata", "metadata"),
    MODEL_FIELD: ("EmbeddedDocumentField", "fiftyone.core.labels.Classification", MODEL_FIELD),
    TRUTH_FIELD: ("EmbeddedDocumentField", "fiftyone.core.labels.Classification", TRUTH_FIELD),
    "uncertainty": ("FloatField", None, "uncertainty"),
    "decision": ("StringField", None, "decision"),
    "path": ("StringField", None, "path"),
}
"""Fields of a sample: their type, what is embedded in them, and their name in the database."""


def _write_fiftyone(review: Review, output: Path, _prefix: str) -> list[Path]:
    make_folder(output)
    fields = [
        {
            "name": name,
            "ftype": f"fiftyone.core.fields.{kind}",
            "embedded_doc_type": embedded,
            "subfield": "fiftyone.core.fields.StringField" if kind == "ListField" else None,
            "db_field": column,
        }
        for name, (kind, embedded, column) in FIELDS.items()
    ]
    metadata = {
        "name": "vilu",
        "version": FIFTYONE_VERSION,
        "media_type": "image",
        "default_classes": list(review.names),
        "sample_fields": fields,
    }
    files = [output / "metadata.json", output / "samples.json"]
    write_new(files[0], plain_json(metadata, indent=1))
    write_new(files[1], plain_json({"samples": [_sample(one) for one in review.tasks]}, indent=1))
    return files


def _sample(task: ReviewTask) -> dict[str, Any]:
    p = task.failure_probability
    said: dict[str, object] = {
        "_id": _object_id(f"{MODEL_FIELD} {task.path}"),
        "_cls": "Classification",
        "tags": [],
        "label": task.answer,
        "confidence": None if p is None else 1 - p,
    }
    return {
        "_id": _object_id(task.path),
        "filepath": _in_json(path_of(task.path), task.path),
        "tags": [task.stream] if task.stream else [],
        "metadata": None,
        "_media_type": "image",
        "_rand": int(_object_id(task.path)["$oid"][:8], 16) / 2**32,
        MODEL_FIELD: None if task.answer is None else said,
        TRUTH_FIELD: None,
        "uncertainty": p,
        "decision": "review",
        "path": task.path,
    }


def _in_json(path: str, text: str) -> str:
    """A path, or where it is no UTF-8, which JSON has to be, its text."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return text
    return path


def _object_id(of: str) -> dict[str, str]:
    """An identifier as MongoDB's extended JSON has it; the same of the same."""
    return {"$oid": hashlib.blake2b(of.encode(errors="surrogatepass"), digest_size=12).hexdigest()}


WRITERS: Final[dict[str, Callable[[Review, Path, str], list[Path]]]] = {
    "label-studio": _write_label_studio,
    "fiftyone": _write_fiftyone,
    "csv": _write_csv,
}


def _require_suffix(output: Path, suffix: str) -> None:
    if output.suffix.lower() != suffix:
        raise UsageError(f"these tasks go to a file that ends in {suffix}. Got {output} instead.")


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, or that holds the same already.

    Raises:
        UsageError: If another file is there: it may be somebody's work.
    """
    with or_refuse(f"read {path}"):
        if path.exists() and (not path.is_file() or path.read_bytes() != bytes(content)):
            raise UsageError(
                f"{path} is there and holds something else, so it is left alone. Give another file."
            )
    write_bytes(path, content)


def read_done(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of finished tasks by path, and their streams where those are known.

    Of an export of Label Studio, a FiftyOne data set on disk, or a CSV.

    A task that was skipped has the label "(skip)"; one that nobody has looked at is left out.

    Raises:
        DataError: If it is none of these, or a photo has two labels.
    """
    if path.is_dir():
        return _of_samples(_json(path / "samples.json"), path)
    if path.suffix.lower() != ".json":
        return read_labels(path)
    content = _json(path)
    if isinstance(content, dict) and "samples" in content:
        return _of_samples(content, path)
    if not isinstance(content, list):
        raise DataError(
            f"{path} is no list of tasks. Export them from Label Studio as JSON or JSON-MIN."
        )
    found, streams = dict[str, str](), dict[str, str]()
    for task in content:
        name, label = _done(task, path)
        _add(found, path, name, label)
        stream = task.get("data", task).get("vilu_stream")
        if label is not None and isinstance(stream, str):
            streams[name] = stream
    return found, streams


def _json(path: Path) -> Any:  # noqa: ANN401 - whatever is in the file
    with or_refuse(f"read {path}"):
        if path.stat().st_size > DATABASE_LIMIT:
            raise DataError(
                f"{path} is larger than {DATABASE_LIMIT:,} bytes. Export fewer tasks at a time."
            )
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error


def _done(task: object, source: Path) -> tuple[str, str | None]:
    """Path and label of a task; None where there is no label."""
    if not isinstance(task, dict):
        raise DataError(f"{source} is no list of tasks: it holds {task!r:.60}.")
    data = task.get("data", task)
    path = data.get("path") if isinstance(data, dict) else None
    if path is None and isinstance(data, dict) and isinstance(data.get(IMAGE), str):
        address = str(data[IMAGE]).rpartition("?d=")[2]
        path = portable_name(unquote(address, errors="surrogateescape"))
    if not isinstance(path, str):
        raise DataError(f"{source}: a task does not say which photo it is about: {task!r:.100}.")
    if "annotations" not in task:  # JSON-MIN
        return path, _one_choice(task.get(CHOICE), path, source)
    last = [one for one in task["annotations"] if isinstance(one, dict)][-1:]
    if not last:
        return path, None
    if last[0].get("was_cancelled"):
        return path, SKIPPED
    chosen = [
        choice
        for result in last[0].get("result", [])
        if isinstance(result, dict) and result.get("type") == "choices"
        for choice in result.get("value", {}).get("choices", [])
    ]
    return path, _one_choice(chosen, path, source)


def _one_choice(chosen: object, path: str, source: Path) -> str | None:
    if chosen is None or chosen == []:
        return None
    names = chosen if isinstance(chosen, list) else [chosen]
    if len(names) != 1 or not isinstance(names[0], str):
        raise DataError(
            f"{source}: {path!r} has the choices {names!r:.100}, where one name is expected."
        )
    return names[0]


def _of_samples(content: Any, source: Path) -> tuple[dict[str, str], dict[str, str]]:  # noqa: ANN401 - whatever was in the file
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        raise DataError(f"{source} is no FiftyOne data set: samples.json holds no samples.")
    found, streams = dict[str, str](), dict[str, str]()
    for sample in samples:
        truth = sample.get(TRUTH_FIELD) if isinstance(sample, dict) else None
        label = truth.get("label") if isinstance(truth, dict) else None
        if label is not None:
            name = str(sample.get("path") or sample.get("filepath"))
            _add(found, source, name, str(label))
            streams[name] = next(
                (str(tag) for tag in sample.get("tags") or () if tag in STREAMS), CHOSEN
            )
    return found, streams


def _add(found: dict[str, str], source: Path, path: str, label: str | None) -> None:
    if label is not None and found.setdefault(path, label) != label:
        raise DataError(f"{source}: {path!r} has the labels {found[path]!r} and {label!r}.")


def label_columns(labels: Mapping[str, str], streams: Mapping[str, str]) -> dict[str, pa.Array]:
    """Photos with their labels and streams."""
    names = sorted(labels)
    said = {
        "path": names,
        "label": [labels[name] for name in names],
        "stream": [streams.get(name) for name in names],
    }
    return {name: pa.array(values, pa.string()) for name, values in said.items()}


def write_labels(
    labels: Mapping[str, str],
    output: Path,
    scores: Path | None = None,
    streams: Mapping[str, str] | None = None,
) -> int:
    """Labels as a CSV; with ``scores`` as those scores with their failures, for ``vilu monitor --late-labels``.

    Returns how many labels that is.

    Raises:
        UsageError: If the output is of another kind, or is there already, but for a CSV of the same
            labels.
        DataError: If no label is of a row of the scores, or one is no class of theirs.
    """
    if scores is None:
        _require_suffix(output, ".csv")
        write_new(output, csv_bytes(label_columns(labels, streams or {})))
        return len(labels)
    if output.exists():
        raise UsageError(
            f"{output} is there, so it is left alone. Give another file, or remove it."
        )
    outcomes = Outcomes.load(scores)
    ids, names_, said = outcomes.ids, outcomes.class_names, outcomes.prediction
    if ids is None or names_ is None or said is None:
        raise DataError(
            f"{scores} does not say which images and classes it is of, so labels cannot be put to it."
        )
    known = set(ids)
    of_rows: dict[str, str] = {}
    for name, label in labels.items():
        _add(of_rows, scores, text_among(name, known) or name, label)
    places = [row for row, key in enumerate(ids) if of_rows.get(key, SKIPPED) != SKIPPED]
    if not places:
        raise DataError(
            f"none of the {len(labels)} labels is of a row of {scores}. Its keys are such as {ids[0]!r}."
        )
    place = {name: number for number, name in enumerate(names_)}
    targets = [
        place.get(of_rows[ids[row]], OUTSIDE if of_rows[ids[row]] == OUTSIDE_NAME else UNKNOWN)
        for row in places
    ]
    if UNKNOWN in targets:
        bad = of_rows[ids[places[targets.index(UNKNOWN)]]]
        raise DataError(
            f"{bad!r} is no class of {scores}. Its classes: {', '.join(map(str, names_))[:200]}."
        )
    taken = outcomes.take(np.array(places))
    target = np.array(targets)
    failure = (np.array(said)[places] != target).astype(np.int64)
    replace(taken, target=target, failure=failure).save(output)
    return len(places)
