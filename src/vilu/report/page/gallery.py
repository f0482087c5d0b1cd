"""Pictures worth looking at: which rows, how they look, and what else the model considered."""

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
from vilu.predictors.contract.games import NONE
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
    """One answer of the model, as the gallery shows it; None for what is not known, or not given."""

    key: str
    said: str | None
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
    order = np.argsort(outcomes.uncertainty, kind="stable")[
        : np.count_nonzero(np.isfinite(outcomes.uncertainty))
    ]
    return {
        "suspicious": np.argsort(-outcomes.uncertainty, kind="stable")[: len(order)][:PER_SECTION],
        "confident": order[outcomes.failure[order] == 1][:PER_SECTION],
        "nearest": order[~choice.accepted[order]][:PER_SECTION],
    }


def make_card(
    outcomes: Outcomes,
    choice: Choice,
    row: int,
    picture: Thumbnail | None,
    competitors: Sequence[tuple[str, float]],
) -> Card:
    """The card of a row."""
    return Card(
        key=str(row) if outcomes.ids is None else outcomes.ids[row],
        said=_class_name(outcomes, outcomes.prediction, row),
        true=NONE if outcomes.outside[row] else _class_name(outcomes, outcomes.target, row),
        wrong=None if outcomes.failure[row] == UNKNOWN else bool(outcomes.failure[row]),
        uncertainty=float(outcomes.uncertainty[row]),
        accepted=bool(choice.accepted[row]),
        picture=picture,
        competitors=competitors,
    )


def _class_name(outcomes: Outcomes, codes: Ints | None, row: int) -> str | None:
    if codes is None or outcomes.class_names is None or codes[row] == UNKNOWN:
        return None
    return str(outcomes.class_names[codes[row]])


def thumbnails(
    outcomes: Outcomes, rows: Iterable[int], images: ImageDataset
) -> dict[int, Thumbnail]:
    """Small pictures of some rows; the ids of outcomes are the keys of the data set."""
    if outcomes.ids is None:
        raise DataError(
            "these scores do not say which images they are about (they have no keys). Leave --images out."
        )
    wanted, missing = (
        {outcomes.ids[row]: row for row in map(int, rows)},
        Thumbnail(why="not in the data set"),
    )
    found = {record.key: thumbnail(record) for record in find_pictures(images, wanted)}
    return {row: found.get(key, missing) for key, row in wanted.items()}


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
            f"{images.source} has none of the images that are shown, such as {min(left)!r}. Give the data set "
            "and the split that were embedded."
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
    return Thumbnail(
        f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size
    )
