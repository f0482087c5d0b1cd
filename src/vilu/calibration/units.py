"""Counting calibration rows: each picture counts once, even if shown by several files."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vilu.artifacts.documents import FrozenModel
from vilu.embeddings.copies import near_copy_groups
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.seen import one_row_per_picture

NOISE_COPY_COSINE: Final = 0.99
"""Two pictures with at least this cosine count as copies that differ by noise only.

Several such copies are no more evidence than a single picture. Two copies with noise (standard
deviation 0.003 in each of 512 coordinates) have a cosine of about 0.995.
"""

MAX_COMPARED_PICTURES: Final = 20_000
"""Largest number of pictures in a search for near copies.

With vectors of width 512 the search takes 40 MB and ten seconds.
"""


class RowCounts(FrozenModel):
    """Counts of files, pictures and scenes among calibration rows, if these counts differ.

    A scene is a group of near copies, or a picture without near copies.
    """

    files: int = Field(ge=1)  # number of files
    pictures: int = Field(ge=1)  # number of different pictures
    scenes: int | None = Field(default=None, ge=1)  # number of scenes, None if as many as pictures

    def __str__(self) -> str:
        if self.files == self.pictures:
            text = f"{self.pictures:,} pictures"
        else:
            text = f"{self.files:,} files show {self.pictures:,} pictures"
        if self.scenes is None:
            return text
        return f"{text}, {self.scenes:,} where near copies count once"


def choose_picture_rows(
    outcomes: Outcomes, is_usable: NDArray[np.bool_]
) -> tuple[Ints, RowCounts | None]:
    """Choose a row for each picture among the rows in the mask ``is_usable`` (N,).

    With classes, all rows with one picture ask the same question. The picture counts as wrong if
    any row has a wrong answer. So the first wrong row is chosen, or the first row if all answers
    are right. With captions, each row asks a different question about the picture. A wrong answer
    to one question does not make the other answers wrong, so the first row is chosen, right or
    wrong. A row with an unknown picture counts as a separate picture.

    Returns:
        Indices (M,) of the chosen rows.
        Numbers of files and pictures. None if these numbers are equal.
    """
    usable_rows = np.flatnonzero(is_usable)
    if outcomes.picture is None:
        return usable_rows, None
    priority = outcomes.failure[usable_rows]  # 1 for a wrong answer: such a row is chosen first
    if outcomes.provenance.get("pool_size") is not None:  # only captions come in pools
        # Suppose that an image has five captions, and one of the five answers is wrong. If the
        # wrong row were chosen, the chosen rows would have a higher error rate than all captions.
        # So all rows have the same priority.
        priority = np.zeros_like(priority)
    # Rows with the same picture tend to be wrong together, so they are a single binomial trial. If
    # every row were counted as a trial, the bound would be too small.
    chosen_rows = usable_rows[one_row_per_picture(outcomes.picture[usable_rows], priority)]
    if len(chosen_rows) == len(usable_rows):
        return usable_rows, None
    return chosen_rows, RowCounts(files=len(usable_rows), pictures=len(chosen_rows))


def first_copy_mask(source: EmbeddingSource, rows: Ints, min_cosine: float) -> NDArray[np.bool_]:
    """Return the mask (M,), True for the first row in each group of near copies.

    Args:
        source: The source with the rows.
        rows: Row indices (M,) in the source.
        min_cosine: Smallest cosine between near copies.
    """
    # The first row of each group is chosen, right or wrong. A choice that depends on failures would
    # bias the error rate.
    # (M,) position of the first row in each row's group
    first_position = near_copy_groups(source, rows, min_cosine)
    position = np.arange(len(rows))
    is_first: NDArray[np.bool_] = position == first_position
    return is_first
