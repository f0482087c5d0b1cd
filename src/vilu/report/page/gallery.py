"""The page's gallery: the chosen rows, thumbnails and cards."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from vilu.datasets.base import ImageDataset, ImageRecord
from vilu.datasets.images import BadImage, read_image
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.coalitions import NONE_OF_CLASSES
from vilu.progress import track
from vilu.report.page.choice import OperatingPoint

MAX_CARDS_PER_SECTION = 24  # maximum number of cards in a section
THUMBNAIL_SIDE = 128  # a thumbnail's longest side in pixels
THUMBNAIL_QUALITY = 70  # a thumbnail's WebP quality, from 0 to 100


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, or the reason why there is no picture."""

    uri: str | None = None  # the picture as ``data:`` URI
    width: int = 0  # in pixels
    height: int = 0  # in pixels
    why: str | None = None  # reason why there is no picture


@dataclass(frozen=True)
class Card:
    """The model's answer to one picture in the gallery. Unknown values are None."""

    key: str  # row identifier
    answer: str | None  # name of the class that the model answered
    true_class: str | None  # name of the true class, or "none of the classes"
    is_wrong: bool | None  # whether the answer is wrong
    uncertainty: float
    is_accepted: bool
    picture: Thumbnail | None = None
    competitors: Sequence[tuple[str, float]] = ()  # (class name, zero-shot probability)
    zero_shot: str | None = None  # the zero-shot answer if different from ``answer``


def pick_rows(outcomes: Outcomes, operating_point: OperatingPoint) -> dict[str, Ints]:
    """Pick the rows for each gallery section, at most ``MAX_CARDS_PER_SECTION``.

    Only rows with an uncertainty are picked. The sections are:

    - "suspicious": the answers with the largest uncertainty.
    - "confident": the wrong answers with the smallest uncertainty.
    - "nearest": the answers that are not accepted, with the smallest uncertainty among these.
    """
    has_score = np.isfinite(outcomes.uncertainty)
    n_scored = np.count_nonzero(has_score)
    # NaN is sorted after all numbers, so the rows with an uncertainty come first
    ascending_rows = np.argsort(outcomes.uncertainty, kind="stable")[:n_scored]
    descending_rows = np.argsort(-outcomes.uncertainty, kind="stable")[:n_scored]
    is_wrong = outcomes.failure[ascending_rows] == 1
    is_accepted = operating_point.accepted[ascending_rows]
    return {
        "suspicious": descending_rows[:MAX_CARDS_PER_SECTION],
        "confident": ascending_rows[is_wrong][:MAX_CARDS_PER_SECTION],
        "nearest": ascending_rows[~is_accepted][:MAX_CARDS_PER_SECTION],
    }


def make_card(
    outcomes: Outcomes,
    operating_point: OperatingPoint,
    row: int,
    picture: Thumbnail | None,
    competitors: Sequence[tuple[str, float]],
) -> Card:
    """Make a row's card."""
    true_class = _class_name(outcomes, outcomes.target, row)
    if outcomes.outside[row]:
        true_class = NONE_OF_CLASSES
    failure = outcomes.failure[row]
    answer = _class_name(outcomes, outcomes.prediction, row)
    zero_shot = outcomes.zero_shot_beside(row)
    return Card(
        key=str(row) if outcomes.ids is None else outcomes.ids[row],
        answer=answer,
        true_class=true_class,
        is_wrong=None if failure == UNKNOWN else bool(failure),
        uncertainty=float(outcomes.uncertainty[row]),
        is_accepted=bool(operating_point.accepted[row]),
        picture=picture,
        competitors=competitors,
        zero_shot=zero_shot,
    )


def _class_name(outcomes: Outcomes, codes: Ints | None, row: int) -> str | None:
    """Return a row's class name, or None if unknown. ``codes`` has every row's class index."""
    if codes is None or outcomes.class_names is None:
        return None
    if codes[row] == UNKNOWN:
        return None
    return str(outcomes.class_names[codes[row]])


def thumbnails(
    outcomes: Outcomes, rows: Iterable[int], images: ImageDataset
) -> dict[int, Thumbnail]:
    """Make a thumbnail for each row. A row's id is the key of the image in the data set."""
    if outcomes.ids is None:
        raise DataError(
            "these scores do not say which images they are about (they have no keys). "
            "Leave --images out."
        )
    row_of_key = {outcomes.ids[row]: row for row in map(int, rows)}
    no_picture = Thumbnail(why="not in the data set")
    pictures = dict.fromkeys(row_of_key.values(), no_picture)
    for record in find_pictures(images, row_of_key):
        pictures[row_of_key[record.key]] = thumbnail(record)
    return pictures


def find_pictures(images: ImageDataset, wanted_keys: Collection[str]) -> Iterator[ImageRecord]:
    """Yield a data set's images with these keys, each once. Raise DataError if all are missing."""
    keys_to_find = {*wanted_keys}
    with track("looking for pictures", len(keys_to_find), "images") as task:
        for record in images.records(0, len(images)):
            if record.key in keys_to_find:
                keys_to_find.remove(record.key)
                yield record
                task.advance(1)
            if not keys_to_find:
                return
    are_all_missing = len(keys_to_find) == len(wanted_keys)
    if keys_to_find and are_all_missing:
        raise DataError(
            f"{images.source} has none of the images that are shown, such as "
            f"{min(keys_to_find)!r}. Give the data set and the split that were embedded."
        )


def thumbnail(record: ImageRecord) -> Thumbnail:
    """Make a thumbnail. ``read_image`` refuses hostile files."""
    try:
        image = read_image(record).image
    except BadImage as error:
        return Thumbnail(why=str(error))
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=4)
    content = buffer.getvalue()
    text = base64.b64encode(content).decode()
    return Thumbnail(f"data:image/webp;base64,{text}", *image.size)
