"""Bootstrap intervals, and paired comparison between two uncertainties on the same rows.

Resampling is stratified: every resample has as many wrong and as many correct answers as the
sample. So no metric becomes undefined, and an interval does not cover the uncertainty in the
frozen model's accuracy, which is not compared. Only ``values_without_strata`` draws without strata.

The rows are sorted once. A resample is a vector of counts over the sorted scores, and a metric is
computed for a block of resamples at a time. If there are many distinct scores, neighbouring scores
are grouped. Then the time grows as resamples · groups.

Rows that show the same picture are not independent. If some rows are known to show the same
picture, pictures are resampled, each with all its rows. There are three strata: pictures with only
right answers, with only wrong answers, and with both. Therefore, if every row in a data set is
repeated, no interval changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vilu.errors import UsageError
from vilu.metrics.catalog import Kernel, get_metric
from vilu.metrics.counts import (
    Floats,
    Ints,
    TieCounts,
    check_pictures,
    check_scores_and_failures,
    repeated_picture_numbers,
    tie_counts,
)
from vilu.metrics.histogram import Histogram
from vilu.metrics.pictures import PictureScores, ScoredRows, independent_counts
from vilu.metrics.reliability import probability_counts
from vilu.progress import track
from vilu.validation import checked, require_at_least, require_between

MAX_RESAMPLES = 1_000_000
"""Largest allowed resample count. More resamples would hardly change an interval."""
MAX_GROUPS = 2**13
"""Limit for the rows (or pictures) in the sample, and for the score groups.

Up to this limit, ``bootstrap_intervals`` draws single rows (or pictures). Above this limit, the
counts of the rows (or pictures) are drawn. If there are also more distinct scores than this limit,
neighbouring scores are grouped.
"""
MAX_RESAMPLED_CELLS = 2**18
"""Maximum number of entries in a temporary array. With 8 bytes each, 2 MB fit a usual cache."""


class Interval(NamedTuple):
    """A metric's value, and the ends of the value's interval.

    Examples:
        >>> import vilu
        >>> uncertainty = [0.1, 0.2, 0.8, 0.9] * 10
        >>> failure = [0, 0, 1, 1] * 10  # the wrong answers have the largest uncertainties
        >>> vilu.metrics.bootstrap_interval("auroc", uncertainty, failure)  # 1 in every resample
        Interval(value=1.0, ci_low=1.0, ci_high=1.0)
    """

    value: float
    ci_low: float
    ci_high: float


class Difference(NamedTuple):
    """A metric's difference between two uncertainties a and b, with interval and p-value.

    The difference is the metric for a minus the metric for b. The p-value is two-sided, for the
    hypothesis of no difference. If the differences on all n resamples have the same sign, the
    p-value is 2 / (n + 1).

    Examples:
        >>> import vilu
        >>> failure = [0, 0, 1, 1] * 10
        >>> good = [1, 2, 3, 4] * 10  # the wrong answers have the largest uncertainties: AUROC 1
        >>> bad = [4, 3, 2, 1] * 10  # the wrong answers have the smallest: AUROC 0
        >>> vilu.metrics.paired_bootstrap("auroc", good, bad, failure, n_resamples=199)
        Difference(difference=1.0, ci_low=1.0, ci_high=1.0, p_value=0.01)
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float


@dataclass(frozen=True)
class Quantity:
    """A number, and the number's values on bootstrap resamples.

    Arithmetic with quantities also computes the bootstrap values, so every result has an interval.
    Quantities from the same test rows have the same resamples, so a difference between two such
    quantities is paired.
    """

    value: float  # the number
    draws: Floats  # (B,) the number's values on the B resamples

    @classmethod
    def over_seeds(cls, values: Floats, per_seed: Floats) -> Quantity:
        """Average over S seeds: ``values`` (S,), with their bootstrap values ``per_seed`` (S, B).

        The seeds are resampled, too.
        """
        n_seeds, n_resamples = per_seed.shape
        # The generator depends only on S. So two means over S seeds draw the same seeds, and the
        # difference between such means is paired.
        generator = np.random.default_rng(n_seeds)
        drawn_seeds = generator.integers(n_seeds, size=(n_seeds, n_resamples))
        # (S, B): column b has the values on resample b, with the S seeds drawn for this resample
        values_of_drawn_seeds = np.take_along_axis(per_seed, drawn_seeds, axis=0)
        value = float(np.mean(values))
        draws = values_of_drawn_seeds.mean(axis=0)
        return cls(value, draws)

    @classmethod
    def mean(cls, quantities: Sequence[Quantity]) -> Quantity:
        """Average several quantities, for example one method's values on several data sets."""
        draws = np.mean([quantity.draws for quantity in quantities], axis=0)
        values = [quantity.value for quantity in quantities]
        value = float(np.mean(values))
        return cls(value, draws)

    @classmethod
    def slope(cls, x: Floats, quantities: Sequence[Quantity]) -> Quantity:
        """Compute the least-squares slope through n quantities, where quantity i is at ``x[i]``."""
        centred = x - x.mean()
        weights = centred / np.square(centred).sum()  # the slope is the sum of weights * values
        values = np.array([quantity.value for quantity in quantities])
        draws = np.stack([quantity.draws for quantity in quantities])  # (n, B)
        return cls(float(weights @ values), weights @ draws)

    def __sub__(self, other: Quantity) -> Quantity:
        return Quantity(self.value - other.value, self.draws - other.draws)

    def __rmul__(self, factor: int) -> Quantity:
        return Quantity(factor * self.value, factor * self.draws)

    def interval(self, confidence: float) -> Interval:
        """Return a percentile interval, with the share ``confidence`` of the bootstrap values.

        The two tails outside have equal shares. If ``value`` is outside, the interval is extended
        to ``value``.
        """
        share_below = (1 - confidence) / 2
        low, high = np.quantile(self.draws, [share_below, 1 - share_below])
        return Interval(self.value, float(min(low, self.value)), float(max(high, self.value)))

    def p_value(self) -> float:
        """Compute the two-sided p-value of the hypothesis that the value is zero."""
        n_at_most_zero = np.count_nonzero(self.draws <= 0)
        n_at_least_zero = np.count_nonzero(self.draws >= 0)
        smaller_tail = min(n_at_most_zero, n_at_least_zero)
        # Adding 1 to both counts keeps the p-value above 0.
        one_sided = (1 + smaller_tail) / (1 + len(self.draws))
        return float(min(1.0, 2 * one_sided))

    def difference(self, confidence: float) -> Difference:
        """Return this quantity as a ``Difference``, with interval and p-value."""
        value, ci_low, ci_high = self.interval(confidence)
        return Difference(value, ci_low, ci_high, p_value=self.p_value())


@runtime_checkable
class OwnInterval(Protocol):
    """A kernel that computes its interval itself.

    The kernel's values on resamples are biased, so the usual percentile interval would be wrong.
    """

    interval_note: ClassVar[str]  # text on how the interval is computed

    def __call__(self, counts: TieCounts) -> Floats:
        """Compute metric values (...) from counts (..., G)."""

    def interval(
        self, counts: TieCounts, n_resamples: int, confidence: float, seed: int
    ) -> tuple[float, float]:
        """Return the interval's lower and upper end."""


class SortedScores:
    """Scores that are sorted once. After that, any choice of rows can be counted fast."""

    def __init__(self, uncertainty: Floats, failure: NDArray[np.bool_]) -> None:
        # ``value`` (G,) holds the distinct scores, ascending. ``group`` (N,) holds, for each row,
        # the index of the row's score in ``value``.
        self.value, self.group = np.unique(uncertainty, return_inverse=True)
        right_rows = np.flatnonzero(~failure)
        wrong_rows = np.flatnonzero(failure)
        self.strata = right_rows, wrong_rows

    @property
    def cells_per_resample(self) -> int:
        """How many array entries one resample needs."""
        return len(self.group)

    def counts(self, *drawn_rows: Ints) -> TieCounts:
        """Count the rows (B, G) in B resamples.

        ``drawn_rows`` has two arrays of row indices: the drawn right rows (B, ·), and the drawn
        wrong rows (B, ·). If a row is drawn several times, the row counts several times.
        """
        right_rows, wrong_rows = drawn_rows
        correct = self._rows_per_score(right_rows)
        wrong = self._rows_per_score(wrong_rows)
        return TieCounts(self.value, correct, wrong)

    def observed_counts(self) -> TieCounts:
        """Count the rows (1, G) in the sample itself, with each row once."""
        right_rows, wrong_rows = self.strata
        return self.counts(right_rows[None], wrong_rows[None])

    def _rows_per_score(self, rows: Ints) -> Ints:
        """Count how many of the drawn ``rows`` (B, ·) have each score. The counts are (B, G)."""
        n_resamples = len(rows)
        n_scores = len(self.value)
        # One bincount call counts all resamples: the cells of resample b begin at b * n_scores.
        first_cell = n_scores * np.arange(n_resamples)[:, None]
        cells = self.group[rows] + first_cell
        counts = np.bincount(cells.ravel(), minlength=n_resamples * n_scores)
        return counts.reshape(n_resamples, n_scores)


ScoresToResample = SortedScores | PictureScores
"""Scores to resample by rows, or by pictures."""


def scores_to_resample(
    uncertainty: Floats, failure: NDArray[np.bool_], picture: Ints | None
) -> ScoresToResample:
    """Prepare scores for resampling by pictures, or by rows if ``picture`` is None.

    ``picture`` is the result of ``repeated_picture_numbers``.
    """
    if picture is None:
        return SortedScores(uncertainty, failure)
    value, group = np.unique(uncertainty, return_inverse=True)
    return PictureScores.of(value, group, failure, picture)


def draw_resamples(
    scores: ScoresToResample, n_resamples: int, seed: int
) -> Iterator[tuple[Ints, ...]]:
    """Yield a tuple for each block of B resamples: each stratum's drawn members (B, N).

    The members are row indices or picture numbers (see ``scores.strata``). From a stratum with N
    members, N are drawn with repetition.
    """
    rng = np.random.default_rng(seed)
    for size in block_sizes(n_resamples, max_size=MAX_RESAMPLED_CELLS // scores.cells_per_resample):
        yield tuple([_draw_members(rng, stratum, size) for stratum in scores.strata])


def block_sizes(n_resamples: int, max_size: int) -> list[int]:
    """Divide the resamples into blocks, and return the sizes: at most ``max_size``, at least 1."""
    size = max(1, max_size)  # ``max_size`` is 0 if one resample alone exceeds the memory limit
    return [min(size, n_resamples - start) for start in range(0, n_resamples, size)]


def _draw_members(rng: np.random.Generator, stratum: Ints, n_resamples: int) -> Ints:
    """Draw members (B, N) from a ``stratum`` (N,), with repetition, for B resamples."""
    n = len(stratum)
    bound = max(1, n)  # n may be 0, but numpy refuses a bound of 0
    positions = rng.integers(bound, size=(n_resamples, n))
    return stratum[positions]


def bootstrap_intervals(
    kernels: Mapping[str, Kernel],
    uncertainty: ArrayLike,
    failure: ArrayLike,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    picture: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Compute several metrics' intervals from the same resamples, as in ``bootstrap_interval``."""
    check_settings(n_resamples, confidence)
    counts = tie_counts(uncertainty, failure)
    scores_and_failures = check_scores_and_failures(uncertainty, failure)
    picture_number = repeated_picture_numbers(check_pictures(picture, int(counts.n)))
    if picture_number is None:
        n_units = counts.n  # rows are resampled
    else:
        n_units = picture_number.max() + 1  # pictures are resampled
    if n_units > MAX_GROUPS:
        # Counts are drawn directly, not rows or pictures. The distribution is the same as for
        # counts of drawn rows or pictures, and the time for a draw does not grow with their number.
        if picture_number is None:
            return intervals_from_counts(kernels, counts, n_resamples, confidence, seed)
        return _intervals_over_pictures(
            kernels, scores_and_failures, picture_number, n_resamples, confidence, seed
        )
    scores = scores_to_resample(*scores_and_failures, picture_number)
    intervals, other_kernels = split_own_intervals(
        kernels, counts, n_resamples, confidence, seed, picture_number
    )
    if not other_kernels:
        return intervals
    observed_counts = scores.observed_counts()  # (1, G): the sample itself, as a resample
    draws = values_on_resamples(other_kernels, scores, n_resamples, seed)
    for name, kernel in other_kernels.items():
        value = float(kernel(observed_counts)[0])
        intervals[name] = Quantity(value, draws[name]).interval(confidence)
    return intervals


def intervals_of(
    scores: ScoredRows | Histogram,
    kernels: Mapping[str, Kernel],
    *,
    n_resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """Compute intervals for several metrics from the same resamples, for rows or a histogram."""
    if isinstance(scores, Histogram):
        check_settings(n_resamples, confidence)
        counts = scores.counts()
        return intervals_from_counts(kernels, counts, n_resamples, confidence, seed)
    return bootstrap_intervals(
        kernels,
        scores.uncertainty,
        scores.failure,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
        picture=scores.picture,
    )


def intervals_from_counts(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    n_resamples: int,
    confidence: float,
    seed: int,
    max_groups: int = MAX_GROUPS,
) -> dict[str, Interval]:
    """Compute metrics with stratified percentile bootstrap intervals, from counts (G,).

    A resample has as many correct and as many wrong answers as the sample. Correct and wrong
    answers are drawn separately, each from a multinomial distribution over the scores. With at
    most ``max_groups`` distinct scores, the resamples are distributed exactly as in the bootstrap
    over rows.

    With more distinct scores, neighbouring scores are grouped, into groups with about equal sizes.
    Grouping changes the metric slightly. So the bootstrap values are shifted back by this change,
    and clipped to the metric's range.
    """
    groups = group_scores(counts, max_groups)
    intervals, other_kernels = split_own_intervals(kernels, counts, n_resamples, confidence, seed)
    blocks = _draw_blocks(groups, n_resamples, seed)
    resampled_intervals = _intervals_from_groups(
        other_kernels, counts, groups, blocks, n_resamples, confidence
    )
    return intervals | resampled_intervals


def _draw_blocks(groups: TieCounts, n_resamples: int, seed: int) -> Iterator[TieCounts]:
    """Yield blocks of resampled counts (B, G), drawn from the counts (G,) in ``groups``.

    Right and wrong answers are drawn separately.
    """
    rng = np.random.default_rng(seed)
    for size in block_sizes(n_resamples, max_size=MAX_RESAMPLED_CELLS // len(groups.value)):
        correct = _draw_counts(rng, groups.correct, size)
        wrong = _draw_counts(rng, groups.wrong, size)
        yield TieCounts(groups.value, correct, wrong)


def _intervals_over_pictures(
    kernels: Mapping[str, Kernel],
    scores_and_failures: tuple[Floats, NDArray[np.bool_]],
    picture: Ints,
    n_resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """Compute intervals as in ``intervals_from_counts``, but resample pictures, not rows.

    The multinomial distributions are over kinds of equal pictures (see
    ``PictureScores.merge_equal_pictures``).

    Args:
        kernels: Kernels by name.
        scores_and_failures: Uncertainties (N,) and failures (N,) for N rows.
        picture: Each row's picture number (N,), from 0 on.
        n_resamples: Resample count.
        confidence: The intervals' coverage.
        seed: Resampling seed.
    """
    uncertainty, failure = scores_and_failures
    counts = tie_counts(uncertainty, failure)
    intervals, other_kernels = split_own_intervals(
        kernels, counts, n_resamples, confidence, seed, picture
    )
    groups = group_scores(counts)
    scores = _kinds_of_pictures(counts, groups, uncertainty, failure, picture)
    # Right and wrong rows with the same score are different entries. So half the entry count is
    # comparable with the score count.
    cells_per_resample = max(len(groups.value), scores.cells_per_resample // 2)
    sizes = block_sizes(n_resamples, max_size=MAX_RESAMPLED_CELLS // cells_per_resample)
    rng = np.random.default_rng(seed)
    blocks = scores.resample_blocks(rng, sizes)
    resampled_intervals = _intervals_from_groups(
        other_kernels, counts, groups, blocks, n_resamples, confidence
    )
    return intervals | resampled_intervals


def _kinds_of_pictures(
    counts: TieCounts,
    groups: TieCounts,
    uncertainty: Floats,
    failure: NDArray[np.bool_],
    picture: Ints,
) -> PictureScores:
    """Make PictureScores of N rows with grouped scores, and merge equal pictures.

    ``counts`` (G,) are the rows' counts, and ``groups`` the result of ``group_scores`` on them.
    """
    score_index = np.searchsorted(counts.value, uncertainty)  # (N,) every score is in the values
    group_of_row = group_indices(counts)[score_index]
    scores = PictureScores.of(groups.value, group_of_row, failure, picture)
    return scores.merge_equal_pictures()


def _intervals_from_groups(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    groups: TieCounts,
    blocks: Iterable[TieCounts],
    n_resamples: int,
    confidence: float,
) -> dict[str, Interval]:
    """Compute intervals for the metrics on ``counts`` (G,), from resamples of ``groups``.

    ``groups`` are the counts for groups of neighbouring scores. ``blocks`` has the groups' counts
    in ``n_resamples`` resamples.
    """
    if not kernels:
        return {}
    draws = values_on_blocks(kernels, blocks, n_resamples)
    intervals = {}
    for name, kernel in kernels.items():
        value = float(kernel(counts))
        drawn_values = draws[name]
        # Nearly every metric is between 0 and 1. The clipped values stay in this range, unless the
        # value or a drawn value lies outside the range.
        lowest = min(drawn_values.min(), value, 0.0)
        highest = max(drawn_values.max(), value, 1.0)
        value_of_groups = float(kernel(groups))
        shifted_values = drawn_values + value - value_of_groups  # undoes the effect of grouping
        clipped_values = np.clip(shifted_values, lowest, highest)
        quantity = Quantity(value, clipped_values)
        intervals[name] = quantity.interval(confidence)
    return intervals


def group_scores(counts: TieCounts, max_groups: int = MAX_GROUPS) -> TieCounts:
    """Group neighbouring scores, and return the counts for at most ``max_groups`` groups.

    A group's value is the mean score over the group's rows.
    """
    if len(counts.value) <= max_groups:
        return counts
    group = group_indices(counts, max_groups)
    # Index of every group's first score. No group has number -1, so index 0 is always a start.
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    size = np.add.reduceat(counts.size, starts)
    correct = np.add.reduceat(counts.correct, starts)
    wrong = np.add.reduceat(counts.wrong, starts)
    sum_of_scores = np.add.reduceat(counts.value * counts.size, starts)
    return TieCounts(sum_of_scores / size, correct, wrong)


def group_indices(counts: TieCounts, max_groups: int = MAX_GROUPS) -> Ints:
    """Return, for each score (G,), the index of the score's group, from 0 on."""
    if len(counts.value) <= max_groups:
        return np.arange(len(counts.value))
    # The rows in ascending order are divided into ``max_groups`` equal parts. A score belongs to
    # the part that has the first row with this score, so a part may have no score.
    n_below = counts.accepted - counts.size  # how many rows have a smaller score
    part = n_below * max_groups // counts.n
    is_new_group = np.diff(part, prepend=part[0]) > 0
    return np.cumsum(is_new_group)  # group numbers without a gap


def _draw_counts(rng: np.random.Generator, counts: Ints, n_resamples: int) -> Ints:
    """Draw as many rows as ``counts`` (G,) has, with repetition. Return the drawn counts (B, G)."""
    drawn_counts = np.zeros((n_resamples, len(counts)), np.int64)
    filled_scores = np.flatnonzero(counts)  # indices for the scores with at least one row
    if len(filled_scores):
        n = int(counts.sum())
        share = counts[filled_scores] / n
        drawn_counts[:, filled_scores] = rng.multinomial(n, share, size=n_resamples)
    return drawn_counts


def split_own_intervals(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    n_resamples: int,
    confidence: float,
    seed: int,
    picture: Ints | None = None,
) -> tuple[dict[str, Interval], dict[str, Kernel]]:
    """Compute the intervals for ``OwnInterval`` kernels. Return the remaining kernels, too.

    Both results are by name. ``counts`` (G,) are the sample's counts. ``picture`` (N,) are the
    rows' picture numbers, or None if no picture has several rows. With picture numbers, an
    interval comes from effective counts of independent rows (see ``independent_counts``).
    """
    effective_counts = counts if picture is None else independent_counts(counts, picture)
    intervals: dict[str, Interval] = {}
    other_kernels: dict[str, Kernel] = {}
    for name, kernel in kernels.items():
        if not isinstance(kernel, OwnInterval):
            other_kernels[name] = kernel
            continue
        value = float(kernel(counts))
        low, high = kernel.interval(effective_counts, n_resamples, confidence, seed)
        if picture is not None:  # after rounding, the value may be just outside the interval
            low = min(low, value)
            high = max(high, value)
        intervals[name] = Interval(value, low, high)
    return intervals, other_kernels


def values_on_resamples(
    kernels: Mapping[str, Kernel], scores: ScoresToResample, n_resamples: int, seed: int
) -> dict[str, Floats]:
    """Compute the values (B,) of several metrics on the same resamples.

    If a resample has no wrong or no right answers, a metric that needs both is NaN.
    """

    def resampled_counts() -> Iterator[TieCounts]:
        for drawn_members in draw_resamples(scores, n_resamples, seed):
            yield scores.counts(*drawn_members)

    return values_on_blocks(kernels, resampled_counts(), n_resamples)


def values_on_blocks(
    kernels: Mapping[str, Kernel], blocks: Iterable[TieCounts], n_resamples: int
) -> dict[str, Floats]:
    """Compute the values (B,) of several metrics, with only one block of resamples in memory."""
    values: dict[str, list[Floats]] = {name: [] for name in kernels}
    with track("bootstrap", n_resamples, "resamples") as task:
        for counts in blocks:
            for name, kernel in kernels.items():
                values_of_block = kernel(counts)
                values[name].append(values_of_block)
            n_resamples_in_block = len(counts.n)
            task.advance(n_resamples_in_block)
    return {name: np.concatenate(per_block) for name, per_block in values.items()}


@checked
def bootstrap_interval(
    metric: str | Kernel,
    uncertainty: ArrayLike,
    failure: ArrayLike,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    picture: ArrayLike | None = None,
) -> Interval:
    """Compute a metric with a stratified percentile bootstrap interval.

    Args:
        metric: A name in ``METRICS``, or a kernel from ``TieCounts`` (B, G) to values (B,).
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        n_resamples: Resample count.
        confidence: The interval's coverage, in (0, 1).
        seed: Resampling seed.
        picture: (N,) whole numbers, equal for rows that show the same picture, -1 where the picture
            is not known. If some pictures have several rows, pictures are resampled, each with all
            its rows.

    Returns:
        Value, lower end and upper end. All three are NaN if the metric is undefined.

    Raises:
        DataError: If the vectors are empty, differ in length, or hold invalid values. A metric for
            probabilities, such as ECE, also refuses values outside [0, 1].
        UsageError: If the metric is unknown or a setting is invalid.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> failure = rng.random(400) < 0.25
        >>> uncertainty = rng.normal(size=400) + failure  # larger by 1 for wrong answers
        >>> for n in (100, 400):  # more rows give a shorter interval
        ...     auroc = vilu.metrics.bootstrap_interval("auroc", uncertainty[:n], failure[:n])
        ...     print(round(auroc.value, 2), round(auroc.ci_low, 2), round(auroc.ci_high, 2))
        0.82 0.7 0.93
        0.75 0.7 0.81
    """
    kernels = {"metric": _kernel(metric, failure, uncertainty)}
    return bootstrap_intervals(
        kernels,
        uncertainty,
        failure,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
        picture=picture,
    )["metric"]


@checked
def paired_bootstrap(
    metric: str | Kernel,
    uncertainty_a: ArrayLike,
    uncertainty_b: ArrayLike,
    failure: ArrayLike,
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    picture: ArrayLike | None = None,
) -> Difference:
    """Compare a metric between two uncertainties for the same answers.

    The metric for a and the metric for b are computed on the same resampled rows. With n resamples,
    the two-sided p-value is

        p = min(1, 2 (1 + k) / (1 + n))

    k is the smaller of two counts: the resamples with a difference of at most 0, and the resamples
    with a difference of at least 0. p is never 0, because 1 is added to k.

    Arguments and errors are as in ``bootstrap_interval``, but with two uncertainties (N,). The
    result is the metric for a minus the metric for b, the interval's two ends, and the p-value.
    If the metric is undefined, all four numbers are NaN.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> failure = rng.random(400) < 0.25
        >>> noise = rng.normal(size=400)
        >>> good = failure + noise
        >>> better = failure + 0.8 * noise  # less noise gives a higher AUROC
        >>> test = vilu.metrics.paired_bootstrap("auroc", better, good, failure, n_resamples=199)
        >>> round(test.difference, 2), round(test.p_value, 2)  # p is at least 2 / 200
        (0.05, 0.01)
    """
    check_settings(n_resamples, confidence)
    kernel = _kernel(metric, failure, uncertainty_a, uncertainty_b)
    scores_a, failures = check_scores_and_failures(uncertainty_a, failure)
    scores_b, _ = check_scores_and_failures(uncertainty_b, failure)
    picture_identity = check_pictures(picture, len(failures))
    picture_number = repeated_picture_numbers(picture_identity)
    a = scores_to_resample(scores_a, failures, picture_number)
    b = scores_to_resample(scores_b, failures, picture_number)
    observed = kernel(a.observed_counts()) - kernel(b.observed_counts())  # (1,)
    observed_difference = float(observed[0])
    if np.isnan(observed_difference):
        return Difference(difference=np.nan, ci_low=np.nan, ci_high=np.nan, p_value=np.nan)
    differences = _drawn_differences(kernel, a, b, n_resamples, seed)
    # An ``OwnInterval`` kernel is biased, and resampling adds the bias once more. The bias may be
    # different for a and b. So the differences are centred on the observed difference.
    if isinstance(kernel, OwnInterval):
        differences += observed_difference - differences.mean()
    quantity = Quantity(observed_difference, differences)
    return quantity.difference(confidence)


def _drawn_differences(
    kernel: Kernel, a: ScoresToResample, b: ScoresToResample, n_resamples: int, seed: int
) -> Floats:
    """Compute a metric's differences (B,) between ``a`` and ``b`` on the same resamples."""
    blocks = []
    # a and b have the same strata, so the same drawn rows or pictures are counted in both. The
    # scores with more cells per resample decide on the block size.
    larger_scores = b if b.cells_per_resample > a.cells_per_resample else a
    with track("bootstrap", n_resamples, "resamples") as task:
        for drawn_members in draw_resamples(larger_scores, n_resamples, seed):
            values_of_a = kernel(a.counts(*drawn_members))  # (B,)
            values_of_b = kernel(b.counts(*drawn_members))
            difference = values_of_a - values_of_b
            blocks.append(difference)
            task.advance(len(difference))
    return np.concatenate(blocks)


def paired_across_answers(
    kernel: Kernel,
    a: tuple[Floats, Ints],
    b: tuple[Floats, Ints],
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    picture: Ints | None = None,
) -> Difference:
    """Compare a metric between two kinds of answers to the same rows.

    ``a`` and ``b`` are pairs of uncertainties (N,) and failures (N,). The two kinds of answers are
    wrong in different rows, so a resample cannot keep both counts of wrong answers. Therefore rows
    are drawn without strata. Rows with the same ``picture`` (N,) are drawn together.
    """
    check_settings(n_resamples, confidence)
    observed_difference = observed_value(kernel, *a) - observed_value(kernel, *b)
    draws = []
    for uncertainty, failure in (a, b):
        values = values_without_strata(
            {"metric": kernel}, uncertainty, failure, n_resamples, seed, picture=picture
        )
        draws.append(values["metric"])
    draws_a, draws_b = draws
    quantity = Quantity(observed_difference, draws_a - draws_b)
    return quantity.difference(confidence)


def observed_value(kernel: Kernel, uncertainty: Floats, failure: Ints) -> float:
    """Compute the metric on the rows themselves, with each row once."""
    counts = tie_counts(uncertainty, failure)
    return float(kernel(counts))


def values_without_strata(
    kernels: Mapping[str, Kernel],
    uncertainty: Floats,
    failure: Ints,
    n_resamples: int,
    seed: int,
    *,
    picture: Ints | None = None,
) -> dict[str, Floats]:
    """Compute the values (B,) of several metrics on resamples without strata.

    The resamples depend only on the row count, the seed and the pictures. So all kinds of
    answers to the same rows have the same resamples, and differences between values are paired.
    """
    # A unit is drawn as a whole: a picture with all its rows, or a single row. ``unit`` (N,) is
    # each row's unit number.
    unit = np.arange(len(uncertainty)) if picture is None else picture
    n_units = int(unit.max(initial=-1)) + 1  # 0 without rows
    rows = _TiedRows.of(uncertainty, failure)
    rng = np.random.default_rng(seed)

    def blocks() -> Iterator[TieCounts]:
        equal_shares = np.full(n_units, 1 / max(n_units, 1))
        for size in block_sizes(n_resamples, max_size=MAX_RESAMPLED_CELLS // max(len(unit), 1)):
            n_draws_of_unit = rng.multinomial(n_units, equal_shares, size=size)  # (B, n_units)
            yield rows.counts(n_draws_of_unit[:, unit])

    resampled_counts = blocks()
    return values_on_blocks(kernels, resampled_counts, n_resamples)


class _TiedRows(NamedTuple):
    """Rows in ascending order by uncertainty, so tied rows are neighbours."""

    order: Ints  # (N,) row indices, in ascending order by uncertainty
    starts: Ints  # (G,) index in ``order`` of the first row with each distinct uncertainty
    value: Floats  # (G,) distinct uncertainties, ascending
    wrong: Ints  # (N,) 1 where the answer is wrong, else 0, for the rows in ``order``

    @classmethod
    def of(cls, uncertainty: Floats, failure: Ints) -> _TiedRows:
        order = np.argsort(uncertainty, kind="stable")
        value, starts = np.unique(uncertainty[order], return_index=True)
        return cls(order, starts, value, failure[order])

    def counts(self, n_draws: Ints) -> TieCounts:
        """Count the rows (B, G) if each row is drawn ``n_draws`` (B, N) times."""
        n_draws_in_order = n_draws[:, self.order]
        size = np.add.reduceat(n_draws_in_order, self.starts, axis=1)
        wrong = np.add.reduceat(n_draws_in_order * self.wrong, self.starts, axis=1)
        return TieCounts(self.value, size - wrong, wrong)


def _kernel(metric: str | Kernel, failure: ArrayLike, *uncertainty: ArrayLike) -> Kernel:
    """Return the kernel for ``metric``.

    If the metric is defined for probabilities only, the uncertainties are checked first.
    """
    if not isinstance(metric, str):
        return metric  # ``metric`` is a kernel already
    named_metric = get_metric(metric)
    if named_metric.of_probability:
        for scores in uncertainty:
            probability_counts(scores, failure)  # raises DataError if a score is no probability
    return named_metric.kernel


def check_settings(n_resamples: int, confidence: float) -> None:
    """Refuse an invalid resample count, or a confidence outside (0, 1)."""
    require_at_least("n_resamples", n_resamples, 1)
    if n_resamples > MAX_RESAMPLES:
        raise UsageError(
            f"n_resamples must be at most {MAX_RESAMPLES:,}. Got {n_resamples} instead."
        )
    require_between("confidence", confidence)
