"""Object detectors' answers, from results and annotations in COCO format."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from vilu.artifacts.documents import first_error, read_bounded
from vilu.errors import DataError
from vilu.metrics.counts import Floats
from vilu.tables.sources.boxes import LARGEST_EDGE, areas, as_boxes, overlaps
from vilu.tables.sources.converted import Columns, Converted
from vilu.validation import checked, require_between

MAX_FILE_BYTES = 2**30
"""Maximum file size in bytes."""

MAX_BOXES_TO_MATCH = 2_000
"""Maximum box count for a category in an image. All pairs of these boxes are compared."""

Edge = Annotated[float, Field(ge=-LARGEST_EDGE, le=LARGEST_EDGE)]
ImageId = int | str
MatchKey = tuple[ImageId, int]
"""An image and a category. Only detections and objects with the same key are matched."""


class CocoEntry(BaseModel):
    """An entry in a file. Types are strict, and unneeded fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class CocoBox(CocoEntry):
    """A box in an image, with a category."""

    image_id: ImageId
    category_id: int
    bbox: Annotated[list[Edge], Field(min_length=4, max_length=4)]

    @field_validator("bbox")
    @classmethod
    def _require_sides(cls, bbox: list[float]) -> list[float]:
        """Refuse a negative width or height."""
        _, _, width, height = bbox
        if min(width, height) < 0:
            raise ValueError("bbox is left, top, width and height, and no side is negative")
        return bbox

    @property
    def match_key(self) -> MatchKey:
        """The image and category of the box, for matching."""
        return self.image_id, self.category_id


class Detection(CocoBox):
    """A detector's result."""

    score: float


class Annotation(CocoBox):
    """An annotated object, or a crowd of objects."""

    iscrowd: int = 0
    ignore: int = 0


class Image(CocoEntry):
    """An annotated image."""

    id: ImageId


class Category(CocoEntry):
    """A kind of object."""

    id: int
    name: str


class Annotations(CocoEntry):
    """The annotation file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


T = TypeVar("T")


@dataclass(frozen=True)
class Objects:
    """One category's annotated objects in one image.

    Attributes:
        boxes: (M, 4) left edge, top edge, width and height.
        is_crowd: (M,) whether the box is around a crowd. A crowd may have any number of detections.
        is_ignored: (M,) whether a detection of the object counts neither as right nor as wrong.
            True for every crowd.
    """

    boxes: Floats
    is_crowd: NDArray[np.bool_]
    is_ignored: NDArray[np.bool_]


@checked
def detection_answers(
    results: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    *,
    min_iou: float = 0.5,
) -> Converted:
    """Match detections with annotated objects by COCO's rules, one row per detection.

    Detections and objects are matched within an image and a category, in the order of falling
    scores. A detection takes the free object with the largest overlap. The detection is right
    (``correct`` is 1) if the overlap, intersection over union, is at least ``min_iou``. ``correct``
    is empty if the detection can only take an object with ``ignore`` or ``iscrowd``. The overlap
    with a crowd is the detection's share inside the crowd. pycocotools matches in the same
    way, with two differences: pycocotools does not read ``ignore``, and keeps only the 100 best
    detections per image and category.

    The columns are ``id`` (the detection's number in ``results``, from 0), ``answer`` (category
    name), ``correct``, ``score_confidence``, ``area`` and ``flatness`` of the box (flatness is
    width / (width + height)), ``n_detections`` in the image, ``largest_overlap`` with another
    detection in the same image and category, ``group`` (the category) and ``cluster`` (the image).

    Args:
        results: JSON list of detections with ``image_id``, ``category_id``, ``bbox`` and ``score``.
        annotations: JSON object with ``images``, ``annotations`` and ``categories``.
        min_iou: Least overlap for a right detection.

    Returns:
        The table. ``n_wanted`` counts the objects that are neither crowds nor ignored. ``n_missed``
        counts how many of these objects no detection took.

    Raises:
        DataError: If a file is no JSON in this format, or if there are no detections. Also if a
            detection's image or category is missing in the annotations.
        UsageError: If ``min_iou`` is not in (0, 1].
        StorageError: If a file cannot be read.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from vilu.tables.sources import detection_answers
        >>> known = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
        >>> truth = {"images": [{"id": 1}], "annotations": [known]}
        >>> truth["categories"] = [{"id": 1, "name": "cat"}]
        >>> best, copy = {**known, "score": 0.9}, {**known, "score": 0.6}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [pathlib.Path(folder) / name for name in ("results.json", "truth.json")]
        ...     for file, content in zip(files, ([copy, best], truth)):
        ...         _ = file.write_text(json.dumps(content))
        ...     table = detection_answers(*files)
        >>> table.columns["correct"], table.n_missed  # the second box on an object is wrong
        ([0, 1], 0)
    """
    require_between("min_iou", min_iou, "(0, 1]")
    truth = _read_coco(Path(annotations), TypeAdapter(Annotations))
    detections = _read_coco(Path(results), TypeAdapter(list[Detection]))
    names = {category.id: category.name for category in truth.categories}
    image_ids = {image.id for image in truth.images}
    _require_known_ids(detections, names, image_ids, results)
    objects_of_match_key = {}
    n_wanted = 0
    object_indices = _indices_by_match_key(truth.annotations, annotations)
    for match_key, indices in object_indices.items():
        objects = _make_objects([truth.annotations[index] for index in indices])
        objects_of_match_key[match_key] = objects
        n_wanted += int((~objects.is_ignored).sum())
    columns = _columns(detections, names)
    detection_indices = _indices_by_match_key(detections, results)
    for match_key, indices in detection_indices.items():
        boxes = as_boxes([detections[index].bbox for index in indices])
        scores = np.array([detections[index].score for index in indices])
        objects = objects_of_match_key.get(match_key, NO_OBJECTS)
        correct = match_detections(boxes, scores, objects, min_iou)
        overlap_with_others = _overlap_with_others(boxes).tolist()
        for position, index in enumerate(indices):
            columns["correct"][index] = correct[position]
            columns["largest_overlap"][index] = overlap_with_others[position]
    n_taken = columns["correct"].count(1)
    return Converted(columns, n_wanted=n_wanted, n_missed=n_wanted - n_taken)


def match_detections(
    boxes: Floats, scores: Floats, objects: Objects, min_iou: float
) -> list[int | None]:
    """Return whether each of N detections is right: 1, 0, or None if it took an ignored object.

    All detections and objects have one category and one image. Detections take objects greedily, in
    the order of falling scores. ``boxes`` (N, 4) and ``scores`` (N,) belong to the detections.
    """
    overlap = overlaps(boxes, objects.boxes, objects.is_crowd)
    # As in pycocotools: if min_iou is 1, an overlap of 1 is enough even if rounded down.
    overlaps_enough = overlap >= min(min_iou, 1 - 1e-10)
    is_free = np.ones(len(objects.boxes), dtype=bool)
    correct: list[int | None] = [0] * len(boxes)
    order = np.argsort(-scores, kind="stable")
    for detection in order.tolist():
        # The first choice is an object that is not ignored. With such an object the detection is
        # right: 1. The second choice is an ignored object, with the result None.
        for is_ignored, result in ((False, 1), (True, None)):
            can_be_taken = overlaps_enough[detection] & is_free & (objects.is_ignored == is_ignored)
            if can_be_taken.any():
                object_index = _last_argmax(overlap[detection], can_be_taken)
                is_free[object_index] = objects.is_crowd[object_index]  # a crowd stays free
                correct[detection] = result
                break
    return correct


def _last_argmax(numbers: Floats, mask: NDArray[np.bool_]) -> int:
    """Return the index of the largest of the numbers where ``mask`` is True.

    If several numbers are largest, the index is the last, as in pycocotools.
    """
    largest = numbers[mask].max()
    indices_of_largest = np.flatnonzero(mask & (numbers == largest))
    return int(indices_of_largest[-1])


def _overlap_with_others(boxes: Floats) -> Floats:
    """Return each detection's largest overlap (N,) with another detection, 0 without another."""
    overlap = overlaps(boxes, boxes)
    np.fill_diagonal(overlap, 0)
    largest: Floats = overlap.max(axis=1)
    return largest


def _read_coco(path: Path, adapter: TypeAdapter[T]) -> T:
    """Read a JSON file, and check the content with ``adapter``."""
    content = read_bounded(path, "Give a JSON file in COCO's format", DataError, MAX_FILE_BYTES)
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        problem = first_error(error)
        raise DataError(f"{path} must be JSON in COCO's format: {problem}.") from error


def _require_known_ids(
    detections: Sequence[Detection],
    names: Mapping[int, str],
    images: Collection[ImageId],
    results: str | os.PathLike[str],
) -> None:
    """Raise DataError unless all detections have annotated images and categories.

    ``names`` maps the annotated category ids to names. ``images`` are the image ids.
    """
    if not detections:
        raise DataError(f"{results} must have at least one detection. It has none.")
    for index, detection in enumerate(detections):
        location = f"{results}: detection {index} (counted from 0)"
        if detection.category_id not in names:
            raise DataError(
                f"{location} has category_id {detection.category_id}, which is none of the "
                "categories of the annotations. Give the numbers of the annotations, not those of "
                "the model."
            )
        if detection.image_id not in images:
            raise DataError(
                f"{location} has image_id {detection.image_id!r}, which is none of the images of "
                "the annotations. Nobody knows which objects are in it, so leave it out."
            )


def _indices_by_match_key(
    entries: Sequence[CocoBox], path: str | os.PathLike[str]
) -> dict[MatchKey, list[int]]:
    """Return (image, category) -> indices in ``entries``. ``path`` is for the message."""
    indices: dict[MatchKey, list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        indices[entry.match_key].append(index)
    for (image, category), indices_of_key in indices.items():
        if len(indices_of_key) > MAX_BOXES_TO_MATCH:
            raise DataError(
                f"{path} must have at most {MAX_BOXES_TO_MATCH:,} boxes of a category in an image. "
                f"Got {len(indices_of_key):,} of category {category} in image {image!r}. "
                "Keep the best."
            )
    return indices


def _make_objects(annotations: Sequence[Annotation]) -> Objects:
    """Make the objects for one category in one image."""
    is_crowd = np.array([bool(annotation.iscrowd) for annotation in annotations], dtype=bool)
    is_ignored = np.array([bool(annotation.ignore) for annotation in annotations], dtype=bool)
    boxes = as_boxes([annotation.bbox for annotation in annotations])
    return Objects(boxes, is_crowd, is_ignored | is_crowd)


NO_OBJECTS = _make_objects([])


def _columns(detections: Sequence[Detection], names: Mapping[int, str]) -> Columns:
    """Make the table's columns. ``correct`` and ``largest_overlap`` are filled later.

    ``names`` maps category ids to names.
    """
    n_in_image = Counter(detection.image_id for detection in detections)
    categories = [names[detection.category_id] for detection in detections]
    boxes = as_boxes([detection.bbox for detection in detections])
    width = boxes[:, 2]
    height = boxes[:, 3]
    smallest_number = np.finfo(np.float64).tiny
    half_perimeter = np.maximum(width + height, smallest_number)  # never 0
    area = areas(boxes)
    flatness = width / half_perimeter
    return {
        "id": [str(index) for index in range(len(detections))],
        "answer": categories,
        "correct": [None] * len(detections),
        "score_confidence": [detection.score for detection in detections],
        "area": area.tolist(),
        "flatness": flatness.tolist(),
        "n_detections": [n_in_image[detection.image_id] for detection in detections],
        "largest_overlap": [0.0] * len(detections),
        "group": categories,
        "cluster": [str(detection.image_id) for detection in detections],
    }
