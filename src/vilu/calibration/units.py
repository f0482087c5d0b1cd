"""What a calibration counts: pictures, each once, however many files show it."""

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
"""Cosine from which on two pictures are one but for noise: they certify nothing by their number.

Two copies with noise of standard deviation 0.003 in each of 512 coordinates have about 0.995.
"""

MOST_COMPARED: Final = 20_000
"""Pictures among which near copies are looked for: 40 MB of vectors of width 512, ten seconds."""


class CountedRows(Model):
    """How many files, pictures and scenes calibration rows are, where these numbers differ."""

    files: int = Field(ge=1)
    pictures: int = Field(ge=1)
    scenes: int | None = Field(default=None, ge=1)  # near copies count once; None: as many

    def __str__(self) -> str:
        words = f"{self.files:,} files show {self.pictures:,} pictures"
        if self.files == self.pictures:
            words = f"{self.pictures:,} pictures"
        if self.scenes is not None:
            words += f", {self.scenes:,} where near copies count once"
        return words


def count_once(outcomes: Outcomes, keep: NDArray[np.bool_]) -> tuple[Ints, CountedRows | None]:
    """Places (M,) of one ``keep`` (N,) row of every picture, and the numbers if they differ.

    A picture with a wrong answer in any of its rows counts as answered wrong. With captions its
    rows ask for different answers, so the first one counts as it is. A row whose picture is not
    known is a picture of its own.
    """
    rows = np.flatnonzero(keep)
    if outcomes.picture is None:
        return rows, None
    failure = outcomes.failure[rows]
    if outcomes.provenance.get("pool_size") is not None:
        # Captions of one image are different questions. To take the one that was answered wrongly
        # would choose by failure, and the error rate of answers would be too high.
        failure = np.zeros_like(failure)
    # Rows of one picture are wrong together: m of them are one trial of the binomial law, and as m
    # trials the bound would be too sharp.
    chosen = rows[one_per_picture(outcomes.picture[rows], failure)]
    if len(chosen) == len(rows):
        return rows, None
    return chosen, CountedRows(files=len(rows), pictures=len(chosen))


def first_of_scenes(source: EmbeddingSource, rows: Ints, cosine: float) -> NDArray[np.bool_]:
    """(M,) which of the rows are near copies of none before them, from a cosine on."""
    # The first of each group by its place: one chosen by its failure would bias the error rate.
    first: NDArray[np.bool_] = near_copies(source, rows, cosine) == np.arange(len(rows))
    return first
