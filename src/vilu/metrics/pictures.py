"""Scores for rows, where several rows may show the same picture.

A bootstrap resample draws pictures, and has all rows that show the drawn pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilu.metrics.counts import Floats, Ints, TieCounts, repeated_picture_numbers, tie_counts


@dataclass(frozen=True, eq=False)
class PictureScores:
    """Row counts for the bootstrap over P pictures, in E entries.

    All rows in an entry show the same picture and have the same score. Their answers are either
    all right or all wrong.
    """

    value: Floats  # (G,) distinct scores, ascending
    picture: Ints  # (E,) picture number of each entry, ascending from 0
    group: Ints  # (E,) index of each entry's score in ``value``
    wrong: NDArray[np.bool_]  # (E,) whether each entry's answers are wrong
    n_rows: Ints  # (E,) row count of each entry
    # (P,) how many equal pictures were merged into each picture: 1 without a merge
    n_merged: Ints

    @classmethod
    def of(
        cls, value: Floats, group: Ints, failure: NDArray[np.bool_], picture: Ints
    ) -> PictureScores:
        """Join N rows to entries, without merging pictures.

        Args:
            value: (G,) distinct scores, ascending.
            group: (N,) index of each row's score in ``value``.
            failure: (N,) whether the answer in each row is wrong.
            picture: (N,) each row's picture number, from 0 on.
        """
        # Two rows belong to the same entry if their keys are equal.
        key = _join_key(picture, group, failure, n_groups=len(value))
        key_of_entry, n_rows = np.unique(key, return_counts=True)
        entry_picture, entry_group, entry_wrong = _split_key(key_of_entry, n_groups=len(value))
        n_pictures = int(picture.max()) + 1
        n_merged = np.ones(n_pictures, np.int64)
        return cls(
            value,
            picture=entry_picture,
            group=entry_group,
            wrong=entry_wrong,
            n_rows=n_rows,
            n_merged=n_merged,
        )

    @cached_property
    def strata(self) -> tuple[Ints, Ints, Ints]:
        """The picture numbers in each stratum.

        The three strata are the pictures with only right answers, with only wrong answers, and
        with both.
        """
        n_pictures = len(self.n_merged)
        has_wrong = np.bincount(self.picture[self.wrong], minlength=n_pictures) > 0
        has_right = np.bincount(self.picture[~self.wrong], minlength=n_pictures) > 0
        all_right = np.flatnonzero(~has_wrong)
        all_wrong = np.flatnonzero(~has_right)
        mixed = np.flatnonzero(has_right & has_wrong)
        return all_right, all_wrong, mixed

    @property
    def cells_per_resample(self) -> int:
        """How many array entries one resample needs."""
        return len(self.picture)

    def counts(self, *drawn_pictures: Ints) -> TieCounts:
        """Count the rows (B, G) in B resamples.

        ``drawn_pictures`` has, for each stratum, the numbers of the drawn pictures (B, ·). If a
        picture is drawn several times, the picture counts several times.
        """
        pictures = np.concatenate(drawn_pictures, axis=1)
        n_resamples = len(pictures)
        n_pictures = len(self.n_merged)
        # One bincount call counts all resamples: the cells of resample b begin at b * n_pictures.
        first_cell = n_pictures * np.arange(n_resamples)[:, None]
        cells = pictures + first_cell
        draws_of_cells = np.bincount(cells.ravel(), minlength=n_resamples * n_pictures)
        n_draws = draws_of_cells.reshape(n_resamples, n_pictures)
        return self._counts_of_draws(n_draws)

    def observed_counts(self) -> TieCounts:
        """Count the rows (1, G) in the sample itself, with each row once."""
        n_draws = self.n_merged[None]  # (1, P): each picture before a merge is drawn once
        return self._counts_of_draws(n_draws)

    def _counts_of_draws(self, n_draws: Ints) -> TieCounts:
        """Count the rows (B, G) if each picture is drawn ``n_draws`` (B, P) times."""
        correct = self._rows_per_score(n_draws, ~self.wrong)
        wrong = self._rows_per_score(n_draws, self.wrong)
        return TieCounts(self.value, correct, wrong)

    def _rows_per_score(self, n_draws: Ints, is_counted: NDArray[np.bool_]) -> Ints:
        """Count the drawn rows (B, G) at each score, for the entries in a mask.

        ``n_draws`` (B, P) says how often each picture is drawn. ``is_counted`` (E,) is the mask.
        """
        n_resamples = len(n_draws)
        n_scores = len(self.value)
        picture = self.picture[is_counted]
        n_rows = n_draws[:, picture] * self.n_rows[is_counted]
        # One bincount call counts all resamples: the cells of resample b begin at b * n_scores.
        first_cell = n_scores * np.arange(n_resamples)[:, None]
        cells = self.group[is_counted] + first_cell
        # With weights, bincount sums in float64. This is exact for whole numbers below 2^53.
        sums = np.bincount(cells.ravel(), weights=n_rows.ravel(), minlength=n_resamples * n_scores)
        n_drawn_rows = sums.astype(np.int64)
        return n_drawn_rows.reshape(n_resamples, n_scores)

    def merge_equal_pictures(self) -> PictureScores:
        """Merge equal pictures into one picture, which then counts several times.

        Only pictures with a single entry are merged. Two such pictures are equal if the entries
        agree in score, in row count, and in whether the answers are wrong.
        """
        n_pictures = len(self.n_merged)
        n_entries = np.bincount(self.picture, minlength=n_pictures)  # for each picture
        is_only_entry = n_entries[self.picture] == 1  # (E,) whether the picture has a single entry
        is_unmerged = ~is_only_entry
        # Two pictures are equal if their keys are equal. All equal pictures form a kind.
        key = _join_key(self.n_rows, self.group, self.wrong, n_groups=len(self.value))
        key_of_kind, n_of_kind = np.unique(key[is_only_entry], return_counts=True)
        kind_n_rows, kind_group, kind_wrong = _split_key(key_of_kind, n_groups=len(self.value))
        # Each kind becomes one picture. Pictures with several entries do not change, but get new
        # numbers after the numbers of the kinds.
        n_kinds = len(key_of_kind)
        kind_numbers = np.arange(n_kinds)
        unmerged_pictures, unmerged_index = np.unique(
            self.picture[is_unmerged], return_inverse=True
        )
        n_of_unmerged = np.ones(len(unmerged_pictures), np.int64)
        return PictureScores(
            self.value,
            picture=np.concatenate([kind_numbers, n_kinds + unmerged_index]),
            group=np.concatenate([kind_group, self.group[is_unmerged]]),
            wrong=np.concatenate([kind_wrong, self.wrong[is_unmerged]]),
            n_rows=np.concatenate([kind_n_rows, self.n_rows[is_unmerged]]),
            n_merged=np.concatenate([n_of_kind, n_of_unmerged]),
        )

    def resample_blocks(self, rng: np.random.Generator, sizes: list[int]) -> Iterator[TieCounts]:
        """Yield a block of counts (B, G) for each B in ``sizes``. A block has B resamples.

        From each stratum, as many pictures are drawn as the stratum has. The numbers of draws per
        picture follow a multinomial distribution.
        """
        for size in sizes:
            n_draws = np.zeros((size, len(self.n_merged)), np.int64)
            for stratum in self.strata:
                n_merged = self.n_merged[stratum]
                n = int(n_merged.sum())  # how many pictures the stratum had before a merge
                if n:
                    n_draws[:, stratum] = rng.multinomial(n, n_merged / n, size=size)
            yield self._counts_of_draws(n_draws)


def _join_key(number: Ints, group: Ints, wrong: NDArray[np.bool_], n_groups: int) -> Ints:
    """Pack three values (E,) into whole-number keys (E,). ``_split_key`` unpacks the keys.

    ``group`` is below ``n_groups``, so different values have different keys.
    """
    return (number * n_groups + group) * 2 + wrong


def _split_key(key: Ints, n_groups: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Unpack number (E,), group (E,) and wrong (E,) from the keys (E,) of ``_join_key``."""
    number_and_group = key // 2
    number = number_and_group // n_groups
    group = number_and_group % n_groups
    wrong = key % 2 == 1
    return number, group, wrong


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Uncertainties for rows whose answers are known to be right or wrong."""

    uncertainty: Floats  # (N,) scores
    failure: Ints  # (N,) 1 where the answer is wrong, else 0
    # (N,) picture numbers from 0 on, or None if every row shows a different picture
    picture: Ints | None = None

    @property
    def note(self) -> None:
        """Note on the precision of the metrics: None, because every distinct score is kept."""
        return None

    @property
    def n(self) -> int:
        """Row count N."""
        return len(self.failure)

    @property
    def n_pictures(self) -> int:
        """How many different pictures the rows show."""
        return self.n if self.picture is None else int(self.picture.max()) + 1

    @property
    def n_failures(self) -> int:
        """Count of wrong answers."""
        return int(self.failure.sum())

    @property
    def design_effect(self) -> float:
        """How many rows count as one independent row (see the function ``design_effect``)."""
        return design_effect(self.picture)

    def n_independent_answers(self) -> tuple[int, int]:
        """Count the pictures with a wrong answer, and the pictures with a right answer."""
        picture = np.arange(self.n) if self.picture is None else self.picture
        is_wrong = self.failure == 1
        return len(np.unique(picture[is_wrong])), len(np.unique(picture[~is_wrong]))

    def take(self, mask: NDArray[np.bool_]) -> ScoredRows:
        """Return only the rows where ``mask`` (N,) is True."""
        picture = None if self.picture is None else repeated_picture_numbers(self.picture[mask])
        return ScoredRows(self.uncertainty[mask], self.failure[mask], picture)

    def counts(self) -> TieCounts:
        """Return the counts per score, the input for every metric."""
        return tie_counts(self.uncertainty, self.failure)


def design_effect(picture: Ints | None) -> float:
    """Compute how many rows give as much information as one independent row (Kish 1965).

    The assumption is that all rows of a picture give the same information. If picture p has m_p of
    the N rows, the number is

        (sum_p m_p^2) / N

    If every picture has m rows, the number is m. If the m_p differ, the number is larger than the
    mean m_p. If ``picture`` is None, every row shows a different picture, and the number is 1.

    Examples:
        >>> import numpy as np
        >>> from vilu.metrics.pictures import design_effect
        >>> picture = np.array([0, 0, 1, 1])  # two rows of each picture
        >>> design_effect(picture)
        2.0
        >>> picture = np.array([0, 0, 0, 1])  # three rows of a picture, one row of another
        >>> design_effect(picture)  # (3^2 + 1^2) / 4
        2.5
    """
    if picture is None:
        return 1.0
    n_rows = np.bincount(picture)  # m_p for each picture
    return int((n_rows**2).sum()) / int(n_rows.sum())


def independent_counts(counts: TieCounts, picture: Ints) -> TieCounts:
    """Compute effective counts of independent rows.

    ``counts`` (G,) are divided by the design effect.
    """
    divisor = design_effect(picture)
    correct: NDArray[Any] = counts.correct / divisor
    wrong: NDArray[Any] = counts.wrong / divisor
    return TieCounts(counts.value, correct=correct, wrong=wrong)
