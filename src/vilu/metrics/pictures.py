"""Scores of rows of which several show one picture.

What is resampled is the picture, with all its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilu.metrics.counts import Floats, Ints, TieCounts, repeated_pictures, tie_counts


@dataclass(frozen=True, eq=False)
class PictureScores:
    """Rows of pictures, counted.

    An entry is all rows of one picture that have one score and are right, or wrong.
    """

    value: Floats  # (G,) distinct scores, ascending
    picture: Ints  # (E,) number of the picture of every entry, ascending from 0
    group: Ints  # (E,) place of its score
    wrong: NDArray[np.bool_]  # (E,) whether its rows are wrong
    rows: Ints  # (E,) how many rows it has
    n_alike: Ints  # (P,) how many pictures are as this one is, itself among them

    @classmethod
    def of(
        cls, value: Floats, group: Ints, failure: NDArray[np.bool_], picture: Ints
    ) -> PictureScores:
        """Of rows (N,): indices of their scores, whether they are wrong, numbers of their pictures.

        Pictures are numbered from 0 on.
        """
        key = (picture * len(value) + group) * 2 + failure
        entry, rows = np.unique(key, return_counts=True)
        n_alike = np.ones(int(picture.max()) + 1, np.int64)
        place = entry // 2
        return cls(value, place // len(value), place % len(value), entry % 2 == 1, rows, n_alike)

    @cached_property
    def strata(self) -> tuple[Ints, Ints, Ints]:
        """Pictures whose rows are all right, pictures whose rows are all wrong, and the rest."""
        n_pictures = len(self.n_alike)
        is_wrong = np.bincount(self.picture[self.wrong], minlength=n_pictures) > 0
        is_right = np.bincount(self.picture[~self.wrong], minlength=n_pictures) > 0
        right = np.flatnonzero(~is_wrong)
        wrong = np.flatnonzero(~is_right)
        return right, wrong, np.flatnonzero(is_right & is_wrong)

    @property
    def width(self) -> int:
        """Numbers that a resample takes."""
        return len(self.picture)

    def counts(self, *drawn: Ints) -> TieCounts:
        """Counts (B, G) of the rows of pictures (B, ·) chosen with repetition."""
        pictures = np.concatenate(drawn, axis=1)
        n_resamples = len(pictures)
        n_pictures = len(self.n_alike)
        cells = pictures + n_pictures * np.arange(n_resamples)[:, None]
        times = np.bincount(cells.ravel(), minlength=n_resamples * n_pictures)
        return self.weighed(times.reshape(n_resamples, n_pictures))

    def observed(self) -> TieCounts:
        """Counts (1, G) of every row once."""
        return self.weighed(self.n_alike[None])

    def weighed(self, times: Ints) -> TieCounts:
        """Counts (B, G) of rows whose pictures were drawn so many times (B, P)."""
        return TieCounts(
            self.value,
            correct=self._tally(times, ~self.wrong),
            wrong=self._tally(times, self.wrong),
        )

    def _tally(self, times: Ints, chosen: NDArray[np.bool_]) -> Ints:
        n_resamples = len(times)
        n_scores = len(self.value)
        rows = times[:, self.picture[chosen]] * self.rows[chosen]
        cells = self.group[chosen] + n_scores * np.arange(n_resamples)[:, None]
        # sums of whole numbers below 2^53 are exact
        sums = np.bincount(cells.ravel(), rows.ravel(), n_resamples * n_scores)
        return sums.astype(np.int64).reshape(n_resamples, n_scores)

    def merged(self) -> PictureScores:
        """The same, with one picture for all that are alike.

        Alike are pictures of one entry that are equal to one another in it.
        """
        n_scores = len(self.value)
        n_pictures = len(self.n_alike)
        is_single = np.bincount(self.picture, minlength=n_pictures)[self.picture] == 1
        key = (self.rows * n_scores + self.group) * 2 + self.wrong
        kind, n_alike = np.unique(key[is_single], return_counts=True)
        mixed, rank = np.unique(self.picture[~is_single], return_inverse=True)
        place = kind // 2
        return PictureScores(
            self.value,
            picture=np.concatenate([np.arange(len(kind)), len(kind) + rank]),
            group=np.concatenate([place % n_scores, self.group[~is_single]]),
            wrong=np.concatenate([kind % 2 == 1, self.wrong[~is_single]]),
            rows=np.concatenate([place // n_scores, self.rows[~is_single]]),
            n_alike=np.concatenate([n_alike, np.ones(len(mixed), np.int64)]),
        )

    def drawn(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[TieCounts]:
        """Blocks of resamples, counts (B, G): by multinomials over pictures that are alike."""
        for size in sizes:
            times = np.zeros((size, len(self.n_alike)), np.int64)
            for stratum in self.strata:
                n_alike = self.n_alike[stratum]
                n = int(n_alike.sum())
                if n:
                    times[:, stratum] = rng.multinomial(n, n_alike / n, size=size)
            yield self.weighed(times)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows with known failures."""

    uncertainty: Floats  # (N,) scores
    failure: Ints  # (N,) 0 or 1
    note: str | None = None  # what to say beside metrics of these rows
    # (N,) numbers of their pictures from 0 on; None where every row has one of its own
    picture: Ints | None = None

    @property
    def n(self) -> int:
        """N."""
        return len(self.failure)

    @property
    def n_pictures(self) -> int:
        """How many pictures the rows show."""
        return self.n if self.picture is None else int(self.picture.max()) + 1

    @property
    def n_failures(self) -> int:
        """How many rows are wrong."""
        return int(self.failure.sum())

    @property
    def rows_per_independent(self) -> float:
        """How many rows say as much as an independent one."""
        return rows_per_independent(self.picture)

    def n_independent(self) -> tuple[int, int]:
        """How many pictures have a wrong answer, and how many a right one."""
        picture = np.arange(self.n) if self.picture is None else self.picture
        is_wrong = self.failure == 1
        return len(np.unique(picture[is_wrong])), len(np.unique(picture[~is_wrong]))

    def take(self, rows: NDArray[np.bool_]) -> ScoredRows:
        """Those of a mask (N,)."""
        picture = None if self.picture is None else repeated_pictures(self.picture[rows])
        return ScoredRows(self.uncertainty[rows], self.failure[rows], self.note, picture)

    def counts(self) -> TieCounts:
        """What every metric is computed from."""
        return tie_counts(self.uncertainty, self.failure)


def rows_per_independent(picture: Ints | None) -> float:
    """How many rows say as much as an independent one (Kish 1965).

    Rows of one picture say one and the same. That is sum m^2 / N for N rows of pictures with m rows
    each: their number where all pictures have as many, and more where some have more. None: every
    row has a picture of its own.

    Examples:
        >>> import numpy as np
        >>> from vilu.metrics.pictures import rows_per_independent
        >>> (
        ...     rows_per_independent(np.array([0, 0, 1, 1])),
        ...     rows_per_independent(np.array([0, 0, 0, 1])),
        ... )
        (2.0, 2.5)
    """
    if picture is None:
        return 1.0
    rows = np.bincount(picture)
    return int((rows**2).sum()) / int(rows.sum())


def independent(counts: TieCounts, picture: Ints) -> TieCounts:
    """Counts (G,) of as many rows as are independent."""
    several = rows_per_independent(picture)
    correct: NDArray[Any] = counts.correct / several
    wrong: NDArray[Any] = counts.wrong / several
    return TieCounts(counts.value, correct=correct, wrong=wrong)
