"""Scores of rows where several rows may show the same picture.

A resample draws pictures, and takes a drawn picture with all its rows.
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
    """Counts of the rows of pictures, as E entries.

    The rows of a picture with equal score and equal correctness are one entry.
    """

    value: Floats  # (G,) distinct scores, ascending
    picture: Ints  # (E,) picture number of every entry, ascending from 0
    group: Ints  # (E,) index of the score of every entry in ``value``
    wrong: NDArray[np.bool_]  # (E,) whether the rows of every entry are wrong
    rows: Ints  # (E,) number of rows of every entry
    n_alike: Ints  # (P,) number of pictures that each picture stands for; 1 before ``merged``

    @classmethod
    def of(
        cls, value: Floats, group: Ints, failure: NDArray[np.bool_], picture: Ints
    ) -> PictureScores:
        """Scores of N rows.

        Args:
            value: (G,) distinct scores, ascending.
            group: (N,) index of the score of every row in ``value``.
            failure: (N,) whether every row is wrong.
            picture: (N,) picture number of every row, from 0 on.
        """
        # an entry is identified by one number, from which picture, score and failure are recovered
        key = (picture * len(value) + group) * 2 + failure
        entry, rows = np.unique(key, return_counts=True)
        n_alike = np.ones(int(picture.max()) + 1, np.int64)
        picture_and_group = entry // 2
        return cls(
            value,
            picture=picture_and_group // len(value),
            group=picture_and_group % len(value),
            wrong=entry % 2 == 1,
            rows=rows,
            n_alike=n_alike,
        )

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
        """Number of array entries that one resample needs."""
        return len(self.picture)

    def counts(self, *drawn: Ints) -> TieCounts:
        """Counts (B, G) of the rows of drawn pictures (B, ·), one array for each stratum.

        A picture that is drawn several times counts several times.
        """
        pictures = np.concatenate(drawn, axis=1)
        n_resamples = len(pictures)
        n_pictures = len(self.n_alike)
        cells = pictures + n_pictures * np.arange(n_resamples)[:, None]
        times = np.bincount(cells.ravel(), minlength=n_resamples * n_pictures)
        return self.weighed(times.reshape(n_resamples, n_pictures))

    def observed(self) -> TieCounts:
        """Counts (1, G) of the sample itself: every row counts once."""
        return self.weighed(self.n_alike[None])

    def weighed(self, times: Ints) -> TieCounts:
        """Counts (B, G), where ``times`` (B, P) is how often each picture is drawn."""
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
        """The same scores, in which one picture stands for all pictures with equal rows.

        Only pictures with a single entry are merged: they are equal if the score, the correctness
        and the number of rows are equal. ``n_alike`` counts the merged pictures.
        """
        n_scores = len(self.value)
        n_pictures = len(self.n_alike)
        is_single = np.bincount(self.picture, minlength=n_pictures)[self.picture] == 1
        key = (self.rows * n_scores + self.group) * 2 + self.wrong
        kind, n_alike = np.unique(key[is_single], return_counts=True)
        mixed, mixed_index = np.unique(self.picture[~is_single], return_inverse=True)
        rows_and_group = kind // 2
        return PictureScores(
            self.value,
            picture=np.concatenate([np.arange(len(kind)), len(kind) + mixed_index]),
            group=np.concatenate([rows_and_group % n_scores, self.group[~is_single]]),
            wrong=np.concatenate([kind % 2 == 1, self.wrong[~is_single]]),
            rows=np.concatenate([rows_and_group // n_scores, self.rows[~is_single]]),
            n_alike=np.concatenate([n_alike, np.ones(len(mixed), np.int64)]),
        )

    def drawn(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[TieCounts]:
        """Yield blocks of resamples as counts (B, G), one block for each of the ``sizes`` B.

        In each stratum as many pictures are drawn as it has, from a multinomial distribution.
        """
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
    """Uncertainties of rows whose failures are known."""

    uncertainty: Floats  # (N,) scores
    failure: Ints  # (N,) 1 where the answer is wrong, else 0
    note: str | None = None  # note that is shown with metrics of these rows
    # (N,) picture numbers from 0 on; None if every row has a picture of its own
    picture: Ints | None = None

    @property
    def n(self) -> int:
        """Number N of rows."""
        return len(self.failure)

    @property
    def n_pictures(self) -> int:
        """Number of different pictures."""
        return self.n if self.picture is None else int(self.picture.max()) + 1

    @property
    def n_failures(self) -> int:
        """Number of wrong answers."""
        return int(self.failure.sum())

    @property
    def rows_per_independent(self) -> float:
        """Number of rows per effective independent row; see ``rows_per_independent``."""
        return rows_per_independent(self.picture)

    def n_independent(self) -> tuple[int, int]:
        """Number of pictures with a wrong answer, and number of pictures with a right answer."""
        picture = np.arange(self.n) if self.picture is None else self.picture
        is_wrong = self.failure == 1
        return len(np.unique(picture[is_wrong])), len(np.unique(picture[~is_wrong]))

    def take(self, rows: NDArray[np.bool_]) -> ScoredRows:
        """The rows of a mask (N,)."""
        picture = None if self.picture is None else repeated_pictures(self.picture[rows])
        return ScoredRows(self.uncertainty[rows], self.failure[rows], self.note, picture)

    def counts(self) -> TieCounts:
        """Counts per score, from which every metric is computed."""
        return tie_counts(self.uncertainty, self.failure)


def rows_per_independent(picture: Ints | None) -> float:
    """Number of rows that give as much information as one independent row (Kish 1965).

    It is assumed that the rows of a picture all give the same information. For N rows, with m rows
    of each picture, the number is

        sum over pictures of m^2 / N

    If all pictures have m rows, it is m. If the numbers of rows differ, it is above their mean. If
    ``picture`` is None, every row has a picture of its own, and the number is 1.

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
    """Counts (G,) divided by ``rows_per_independent``: effective counts of independent rows."""
    rows_per_one = rows_per_independent(picture)
    correct: NDArray[Any] = counts.correct / rows_per_one
    wrong: NDArray[Any] = counts.wrong / rows_per_one
    return TieCounts(counts.value, correct=correct, wrong=wrong)
