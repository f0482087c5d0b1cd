"""Counting of calibration rows: every picture counts once, however many files show it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.embeddings.copies import near_copies
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.seen import one_per_picture

ALIKE: Final = 0.99
"""Smallest cosine of two pictures that are taken for near copies, which differ by noise only.

Several near copies are no more evidence than one picture. Two copies with noise of standard
deviation 0.003 in each of 512 coordinates have a cosine of about 0.995.
"""

MOST_COMPARED: Final = 20_000
"""Largest number of pictures among which near copies are searched.

With vectors of width 512 the search takes 40 MB and ten seconds.
"""


class CountedRows(Model):
    """Numbers of files, pictures and scenes among calibration rows, if these numbers differ."""

    files: int = Field(ge=1)
    pictures: int = Field(ge=1)
    # number of pictures if near copies count once; None: the same number as ``pictures``
    scenes: int | None = Field(default=None, ge=1)

    def __str__(self) -> str:
        words = f"{self.files:,} files show {self.pictures:,} pictures"
        if self.files == self.pictures:
            words = f"{self.pictures:,} pictures"
        if self.scenes is not None:
            words += f", {self.scenes:,} where near copies count once"
        return words


def count_once(outcomes: Outcomes, keep: NDArray[np.bool_]) -> tuple[Ints, CountedRows | None]:
    """Indices (M,) of one row per picture, and the numbers of files and pictures if they differ.

    Only rows where ``keep`` (N,) is True are used. If any row of a picture has a wrong answer, a
    wrong row is chosen. With captions the rows of a picture ask for different answers, so the first
    row is chosen, right or wrong. A row whose picture is not known counts as a separate picture.
    """
    rows = np.flatnonzero(keep)
    if outcomes.picture is None:
        return rows, None
    failure = outcomes.failure[rows]
    if outcomes.provenance.get("pool_size") is not None:
        # Captions of one image are different questions. If a wrong row were preferred, the error
        # rate would be too high.
        failure = np.zeros_like(failure)
    # Rows of one picture tend to be wrong together, so they are one trial of the binomial law. If
    # every row were counted as a trial, the bound would be too small.
    chosen = rows[one_per_picture(outcomes.picture[rows], failure)]
    if len(chosen) == len(rows):
        return rows, None
    return chosen, CountedRows(files=len(rows), pictures=len(chosen))


def first_of_scenes(source: EmbeddingSource, rows: Ints, cosine: float) -> NDArray[np.bool_]:
    """Mask (M,) of the rows that have no earlier row with at least this cosine (near copies)."""
    # The first row of each group is chosen, whether it is right or wrong. A choice that depends on
    # failures would bias the error rate.
    first: NDArray[np.bool_] = near_copies(source, rows, cosine) == np.arange(len(rows))
    return first
