"""Pictures worth looking at: the choice of rows, their thumbnails and their competitors."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from vilu.datasets.base import ImageDataset, ImageRecord
from vilu.datasets.images import BadImage, read_image
from vilu.errors import UNKNOWN, DataError
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.coalitions import NONE
from vilu.progress import track
from vilu.report.page.choice import Choice

PER_SECTION = 24
SIDE = 128  # longest side of a thumbnail in pixels
QUALITY = 70


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as ``data:`` URI with its size in pixels, or why there is none."""

    uri: str | None = None
    width: int = 0
    height: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Card:
    """One answer of the model, as the gallery shows it; None where something is not known."""

    key: str
    answer: str | None
    true: str | None
    wrong: bool | None
    uncertainty: float
    accepted: bool
    picture: Thumbnail | None = None
    competitors: Sequence[tuple[str, float]] = ()


def pick_rows(outcomes: Outcomes, choice: Choice) -> dict[str, Ints]:
    """Rows of every section, at most 24 each; rows without an uncertainty are in none.

    "suspicious": largest uncertainty. "confident": wrong answers of smallest uncertainty.
    "nearest": the least uncertain of those that are not accepted.
    """
    n_scored = np.count_nonzero(np.isfinite(outcomes.uncertainty))
    # NaN sorts behind all numbers, so the scored rows come first
    rising = np.argsort(outcomes.uncertainty, kind="stable")[:n_scored]
    falling = np.argsort(-outcomes.uncertainty, kind="stable")[:n_scored]
    wrong = rising[outcomes.failure[rising] == 1]
    not_accepted = rising[~choice.accepted[rising]]
    return {
        "suspicious": falling[:PER_SECTION],
        "confident": wrong[:PER_SECTION],
        "nearest": not_accepted[:PER_SECTION],
    }


def make_card(
    outcomes: Outcomes,
    choice: Choice,
    row: int,
    picture: Thumbnail | None,
    competitors: Sequence[tuple[str, float]],
) -> Card:
    """The card of a row."""
    true = _class_name(outcomes, outcomes.target, row)
    if outcomes.outside[row]:
        true = NONE
    failure = outcomes.failure[row]
    return Card(
        key=str(row) if outcomes.ids is None else outcomes.ids[row],
        answer=_class_name(outcomes, outcomes.prediction, row),
        true=true,
        wrong=None if failure == UNKNOWN else bool(failure),
        uncertainty=float(outcomes.uncertainty[row]),
        accepted=bool(choice.accepted[row]),
        picture=picture,
        competitors=competitors,
    )


def _class_name(outcomes: Outcomes, codes: Ints | None, row: int) -> str | None:
    """The name of the class that a row has among the codes; None where there is none."""
    if codes is None or outcomes.class_names is None:
        return None
    if codes[row] == UNKNOWN:
        return None
    return str(outcomes.class_names[codes[row]])


def thumbnails(
    outcomes: Outcomes, rows: Iterable[int], images: ImageDataset
) -> dict[int, Thumbnail]:
    """Small pictures of some rows; the ids of outcomes are the keys of the data set."""
    if outcomes.ids is None:
        raise DataError(
            "these scores do not say which images they are about (they have no keys). "
            "Leave --images out."
        )
    row_of_key = {outcomes.ids[row]: row for row in map(int, rows)}
    missing = Thumbnail(why="not in the data set")
    pictures = dict.fromkeys(row_of_key.values(), missing)
    for record in find_pictures(images, row_of_key):
        pictures[row_of_key[record.key]] = thumbnail(record)
    return pictures


def find_pictures(images: ImageDataset, wanted: Mapping[str, int]) -> Iterator[ImageRecord]:
    """The images of a data set with these keys, each once; DataError if there is none of them."""
    left = {*wanted}
    with track("looking for pictures", len(left), "images") as task:
        for record in images.records(0, len(images)):
            if record.key in left:
                left.remove(record.key)
                yield record
                task.advance(1)
            if not left:
                return
    if left and len(left) == len(wanted):
        raise DataError(
            f"{images.source} has none of the images that are shown, such as {min(left)!r}. "
            "Give the data set and the split that were embedded."
        )


def thumbnail(record: ImageRecord) -> Thumbnail:
    """A picture as small WebP, decoded with all that is done against hostile files."""
    try:
        image = read_image(record).image
    except BadImage as error:
        return Thumbnail(why=str(error))
    image.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/webp;base64,{text}", *image.size)
