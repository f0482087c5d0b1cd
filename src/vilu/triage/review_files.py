"""Writes tasks for labelling tools, and reads the labels in finished tasks.

The tools define the formats:

- Label Studio: tasks with predictions (JSON), and a labelling configuration (XML).
- FiftyOne: a data set on disk (``metadata.json`` and ``samples.json``).
- Other tools: a CSV.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, unquote
from xml.etree import ElementTree

import pyarrow as pa

from vilu.artifacts.disk import convert_os_errors, make_folder
from vilu.artifacts.documents import plain_json
from vilu.artifacts.tables import csv_bytes
from vilu.datasets.files import original_path, portable_name
from vilu.errors import DataError
from vilu.triage.carrying import all_labels
from vilu.triage.label_files import add_label, require_suffix, write_new_file
from vilu.triage.labels import SKIPPED, STREAMS, columns_of, labels_and_streams, read_labels
from vilu.triage.review import DEFAULT_STREAM, Review, ReviewTask
from vilu.triage.state import STATE_FILE

CHOICE: Final = "label"
"""Name of the Label Studio control with which people choose a label."""

IMAGE: Final = "image"
"""Name of the image in a task and in Label Studio's labelling configuration."""

MODEL_FIELD: Final = "vilu"
"""Field in a FiftyOne sample with the model's answer."""

TRUTH_FIELD: Final = "ground_truth"
"""Field in a FiftyOne sample with a person's label."""

FIFTYONE_VERSION: Final = "1.9.0"
"""FiftyOne version that the file format belongs to. Newer versions convert older files."""

MAX_EXPORT_BYTES: Final = 256 * 2**20
"""Maximum size of a file with finished tasks, in bytes (256 MiB)."""

Tool = Literal["label-studio", "fiftyone", "csv"]
"""Names of the labelling tools."""

LabelsAndStreams = tuple[dict[str, str], dict[str, str]]
"""Two mappings from photo paths: to labels, and to known streams."""


def write_review(review: Review, tool: Tool, output: Path, *, prefix: str = "") -> list[Path]:
    """Write the tasks for a labelling tool.

    Args:
        review: Photos to look at.
        tool: The labelling tool.
        output: The file, .json or .csv. For FiftyOne a folder.
        prefix: For Label Studio: start of every image address, before the photo's path below the
            photo folder. An example is "/data/local-files/?d=photos/".

    Returns:
        The written paths.
    """
    if tool == "label-studio":
        return _write_label_studio(review, output, prefix)
    if tool == "fiftyone":
        return _write_fiftyone(review, output)
    return _write_csv(review, output)


def _write_label_studio(review: Review, output: Path, prefix: str) -> list[Path]:
    """Write the tasks, and a file with the labelling configuration. Return both paths."""
    require_suffix(output, ".json")
    config = output.with_suffix(".xml")
    tasks = []
    for task in review.tasks:
        address = prefix + _relative_address(task, review)
        tasks.append(_label_studio_task(task, review.model, address))
    tasks_content = json.dumps(tasks, indent=1).encode()
    write_new_file(output, tasks_content)
    config_content = label_config(review.names).encode()
    write_new_file(config, config_content)
    return [output, config]


def _relative_address(task: ReviewTask, review: Review) -> str:
    """Return the address of a photo's file, relative to the photo folder's address.

    The address of a moved photo may begin with "..". Browsers resolve ".." in a path, but not in a
    query such as "?d=photos/".
    """
    path = original_path(task.path)
    moved_to = review.moved_photos.get(task.path)
    if moved_to is not None and review.photos is not None:
        path = os.path.relpath(moved_to, review.photos)
    path_bytes = os.fsencode(path)
    return quote(path_bytes)


def _label_studio_task(task: ReviewTask, model: str, address: str) -> dict[str, Any]:
    """Make the task for a photo at ``address``, with the answer by ``model`` as a prediction."""
    data = {
        IMAGE: address,
        "path": task.path,
        "vilu_uncertainty": task.failure_probability,
        "vilu_runner_up": task.runner_up,
        "vilu_stream": task.stream,
    }
    if task.zero_shot is not None:
        data["vilu_zero_shot"] = task.zero_shot
    if task.answer is None:
        return {"data": data}
    result = {
        "from_name": CHOICE,
        "to_name": IMAGE,
        "type": "choices",
        "value": {"choices": [task.answer]},
    }
    prediction = {"model_version": model, "score": _confidence(task), "result": [result]}
    return {"data": data, "predictions": [prediction]}


def _confidence(task: ReviewTask) -> float | None:
    """Return the probability that the answer is right, or None if it is not known."""
    return None if task.failure_probability is None else 1 - task.failure_probability


def label_config(names: Sequence[str]) -> str:
    """Make Label Studio's labelling configuration (XML) for a choice from ``names``."""
    view = ElementTree.Element("View")
    # In Label Studio, "$image" stands for the field "image" of a task.
    ElementTree.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}")
    choices = ElementTree.SubElement(
        view, "Choices", name=CHOICE, toName=IMAGE, choice="single", showInLine="true"
    )
    for name in (*names, SKIPPED):
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _write_csv(review: Review, output: Path) -> list[Path]:
    require_suffix(output, ".csv")
    columns = {
        **columns_of(review.tasks, ("path",)),
        "label": pa.nulls(len(review.tasks), pa.string()),
        **columns_of(review.tasks, ("answer", "failure_probability", "runner_up", "stream")),
    }
    if review.answer != "zero_shot":
        columns |= columns_of(review.tasks, ("zero_shot",))
    content = csv_bytes(columns)
    write_new_file(output, content)
    return [output]


# Maps a field to the type, the embedded document's class (or None), and the database name.
SAMPLE_FIELDS: Final = {
    "id": ("ObjectIdField", None, "_id"),
    "filepath": ("StringField", None, "filepath"),
    "tags": ("ListField", None, "tags"),
    "metadata": ("EmbeddedDocumentField", "fiftyone.core.metadata.ImageMetadata", "metadata"),
    MODEL_FIELD: ("EmbeddedDocumentField", "fiftyone.core.labels.Classification", MODEL_FIELD),
    TRUTH_FIELD: ("EmbeddedDocumentField", "fiftyone.core.labels.Classification", TRUTH_FIELD),
    "uncertainty": ("FloatField", None, "uncertainty"),
    "decision": ("StringField", None, "decision"),
    "zero_shot": ("StringField", None, "zero_shot"),
    "path": ("StringField", None, "path"),
}
"""Fields of a FiftyOne sample: first FiftyOne's required fields, then vilu's fields."""


def _write_fiftyone(review: Review, output: Path) -> list[Path]:
    """Write the two files of a FiftyOne data set on disk. Return both paths."""
    make_folder(output)
    metadata = {
        "name": "vilu",
        "version": FIFTYONE_VERSION,
        "media_type": "image",
        "default_classes": list(review.names),
        "sample_fields": [_fiftyone_field(name) for name in SAMPLE_FIELDS],
    }
    metadata_file = output / "metadata.json"
    samples_file = output / "samples.json"
    metadata_content = plain_json(metadata, indent=1)
    write_new_file(metadata_file, metadata_content)
    samples = []
    for task in review.tasks:
        # FiftyOne takes a relative path as a path below the photo folder, and an absolute path as
        # it is. A moved photo lies elsewhere.
        moved_to = review.moved_photos.get(task.path)
        file_path = task.path if moved_to is None else portable_name(str(moved_to.absolute()))
        samples.append(_fiftyone_sample(task, file_path))
    samples_content = plain_json({"samples": samples}, indent=1)
    write_new_file(samples_file, samples_content)
    return [metadata_file, samples_file]


def _fiftyone_field(name: str) -> dict[str, object]:
    """Describe a field as in ``metadata.json``."""
    kind, embedded_class, database_name = SAMPLE_FIELDS[name]
    return {
        "name": name,
        "ftype": f"fiftyone.core.fields.{kind}",
        "embedded_doc_type": embedded_class,
        "subfield": "fiftyone.core.fields.StringField" if kind == "ListField" else None,
        "db_field": database_name,
    }


def _fiftyone_sample(task: ReviewTask, file_path: str) -> dict[str, Any]:
    """Make one photo's entry for ``samples.json``.

    ``file_path`` is the location of the photo's file, as tables write paths.
    """
    classification: dict[str, object] | None = None
    if task.answer is not None:
        classification = {
            "_id": _object_id(f"{MODEL_FIELD} {task.path}"),
            "_cls": "Classification",
            "tags": [],
            "label": task.answer,
            "confidence": _confidence(task),
        }
    identifier = _object_id(task.path)
    return {
        "_id": identifier,
        "filepath": _text_of_path(file_path),
        "tags": [task.stream] if task.stream else [],
        "metadata": None,
        "_media_type": "image",
        "_rand": _random_number(identifier["$oid"]),
        MODEL_FIELD: classification,
        TRUTH_FIELD: None,
        "uncertainty": task.failure_probability,
        "decision": task.decision,
        "zero_shot": task.zero_shot,
        "path": task.path,
    }


def _random_number(object_id: str) -> float:
    """Make a number in [0, 1) for FiftyOne's random samples, from the identifier's first digits."""
    return int(object_id[:8], 16) / 2**32  # 8 hexadecimal digits are 32 bits


def _text_of_path(portable: str) -> str:
    """Return a file path for JSON: the real path, or ``portable`` if UTF-8 cannot encode it."""
    path = original_path(portable)
    try:
        path.encode()
    except UnicodeEncodeError:
        return portable
    return path


def _object_id(text: str) -> dict[str, str]:
    """Make an identifier in MongoDB's extended JSON. Equal texts have equal identifiers."""
    content = text.encode(errors="surrogatepass")
    return {"$oid": hashlib.blake2b(content, digest_size=12).hexdigest()}


def read_finished_tasks(path: Path) -> LabelsAndStreams:
    """Read the labels in finished tasks, and the labels' streams.

    ``path`` is a triage folder, an export from Label Studio, a FiftyOne data set on disk, or a
    file with labels (``labels.read_labels``). A skipped task has the label "(skip)". Tasks without
    a label are left out.

    Raises:
        DataError: If the file has another format, or if a photo has two labels.
    """
    if (path / STATE_FILE).is_file():
        book = all_labels(path)
        return labels_and_streams(book)
    if path.is_dir():
        samples = _read_json(path / "samples.json")
        return _labels_of_samples(samples, path)
    if path.suffix.lower() != ".json":
        return read_labels(path)
    content = _read_json(path)
    if isinstance(content, dict) and "samples" in content:
        return _labels_of_samples(content, path)
    if not isinstance(content, list):
        raise DataError(
            f"{path} is no list of tasks. Export them from Label Studio as JSON or JSON-MIN."
        )
    return _labels_of_tasks(content, path)


def _read_json(path: Path) -> Any:  # noqa: ANN401 - any content
    """Read a JSON file. Raises DataError if the file is too large, or no JSON."""
    with convert_os_errors(f"cannot read {path}"):
        if path.stat().st_size > MAX_EXPORT_BYTES:
            raise DataError(
                f"{path} is larger than {MAX_EXPORT_BYTES:,} bytes. Export fewer tasks at a time."
            )
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error


def _labels_of_tasks(tasks: list[Any], source: Path) -> LabelsAndStreams:
    """Return labels and streams from Label Studio's tasks."""
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for task in tasks:
        if not isinstance(task, dict):
            raise DataError(f"{source} is no list of tasks: it holds {task!r:.60}.")
        path = _path_of_task(task, source)
        label = _label_of_task(task, path, source)
        add_label(labels, source, path, label)
        data = task.get("data", task)
        stream = data.get("vilu_stream")
        if label is not None and isinstance(stream, str):
            streams[path] = stream
    return labels, streams


def _path_of_task(task: Mapping[str, Any], source: Path) -> str:
    """Return the photo path in a task, or else the path in the image address."""
    # An export as JSON-MIN has no "data". There the data fields are fields of the task.
    data = task.get("data", task)
    if not isinstance(data, dict):
        data = {}
    path = data.get("path")
    if path is None and isinstance(data.get(IMAGE), str):
        # The path is everything after "?d=", or the whole address without "?d=".
        _, _, quoted_path = data[IMAGE].rpartition("?d=")
        image_path = unquote(quoted_path, errors="surrogateescape")
        path = portable_name(image_path)
    if not isinstance(path, str):
        raise DataError(f"{source}: a task does not say which photo it is about: {task!r:.100}.")
    return path


def _label_of_task(task: Mapping[str, Any], path: str, source: Path) -> str | None:
    """Return a task's label, or None without a label."""
    if "annotations" not in task:  # an export as JSON-MIN
        choice = task.get(CHOICE)
        return _only_choice(choice, path, source)
    annotations = [item for item in task["annotations"] if isinstance(item, dict)]
    if not annotations:
        return None
    last = annotations[-1]  # a later annotation replaces the earlier annotations
    if last.get("was_cancelled"):  # the person skipped the task
        return SKIPPED
    choices = []
    for result in last.get("result", []):
        if isinstance(result, dict) and result.get("type") == "choices":
            choices += result.get("value", {}).get("choices", [])
    return _only_choice(choices, path, source)


def _only_choice(choice: object, path: str, source: Path) -> str | None:
    """Return a choice's name, or None without a name. Raises DataError if there are several."""
    if choice is None or choice == []:
        return None
    names = choice if isinstance(choice, list) else [choice]
    if len(names) != 1 or not isinstance(names[0], str):
        raise DataError(
            f"{source}: {path!r} has the choices {names!r:.100}, where one name is expected."
        )
    return names[0]


def _labels_of_samples(
    content: Any,  # noqa: ANN401 - any content
    source: Path,
) -> LabelsAndStreams:
    """Return labels and streams from FiftyOne's samples."""
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        raise DataError(f"{source} is no FiftyOne data set: samples.json holds no samples.")
    labels: dict[str, str] = {}
    streams: dict[str, str] = {}
    for sample in samples:
        truth = sample.get(TRUTH_FIELD) if isinstance(sample, dict) else None
        label = truth.get("label") if isinstance(truth, dict) else None
        if label is not None:
            # Another program's samples have no field "path".
            path = str(sample.get("path") or sample.get("filepath"))
            add_label(labels, source, path, str(label))
            tags = sample.get("tags") or ()
            streams[path] = _stream_of_tags(tags)
    return labels, streams


def _stream_of_tags(tags: Sequence[object]) -> str:
    """Return the first tag with a stream's name, or ``DEFAULT_STREAM`` without such a tag."""
    for tag in tags:
        if tag in STREAMS:
            return str(tag)
    return DEFAULT_STREAM
