"""Bootstrap intervals, and paired comparison of two uncertainties on the same rows.

Resampling is stratified: every resample has as many wrong and as many correct answers as the
sample, so no metric becomes undefined. The intervals are conditional on the accuracy of the frozen
model, which is not what is compared. The rows are sorted once; a resample is a vector of counts
over the sorted scores, and a metric takes a block of them at a time. Of many distinct scores,
neighbours are resampled in groups, so that time is of order resamples · groups.

Rows of one picture are no independent answers. Where some are known, pictures are resampled with
all their rows, in three strata: all right, all wrong, or both. A set that stands several times
gives the interval of the set.
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
    check_pair,
    check_pictures,
    repeated_pictures,
    tie_counts,
)
from vilu.metrics.histogram import Histogram
from vilu.metrics.pictures import PictureScores, ScoredRows, independent
from vilu.metrics.reliability import probability_counts
from vilu.progress import track
from vilu.validation import checked, require_at_least, require_between

MAX_RESAMPLES = 1_000_000  # more do not change an interval
# more rows are resampled by counts; of more distinct scores, groups of neighbours are
RESAMPLED_GROUPS = 2**13
CELLS = 2**18  # counts held at a time: two megabytes per temporary array, about what a cache holds


class Interval(NamedTuple):
    """A metric and its percentile interval.

    Examples:
        >>> import vilu
        >>> interval = vilu.metrics.bootstrap_interval(
        ...     "auroc", [0.1, 0.2, 0.8, 0.9] * 10, [0, 0, 1, 1] * 10
        ... )
        >>> interval  # every resample of a perfect order is perfect
        Interval(value=1.0, ci_low=1.0, ci_high=1.0)
    """

    value: float
    ci_low: float
    ci_high: float


class Difference(NamedTuple):
    """Metric of a less metric of b, its percentile interval, and the p-value of no difference.

    The p-value is two-sided.

    Examples:
        >>> import vilu
        >>> failure, right, reverse = [0, 0, 1, 1] * 10, [1, 2, 3, 4] * 10, [4, 3, 2, 1] * 10
        >>> found = vilu.metrics.paired_bootstrap("auroc", right, reverse, failure, n_resamples=199)
        >>> found  # no resample of 199 has another sign, so p is 2 / 200
        Difference(difference=1.0, ci_low=1.0, ci_high=1.0, p_value=0.01)
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float


@dataclass(frozen=True)
class Quantity:
    """A number with its bootstrap values: whatever is computed from it has an interval, too.

    Quantities of the same test rows share their resamples, so a difference of them is paired.
    """

    value: float  # the number
    draws: Floats  # (B,) its bootstrap values

    @classmethod
    def over_seeds(cls, values: Floats, per_seed: Floats) -> Quantity:
        """The mean over seeds of values (S,) with bootstrap values (S, B).

        The seeds are resampled, too.
        """
        n_seeds, n_resamples = per_seed.shape
        seeds = np.random.default_rng(n_seeds).integers(n_seeds, size=(n_seeds, n_resamples))
        return cls(float(np.mean(values)), np.take_along_axis(per_seed, seeds, axis=0).mean(axis=0))

    @classmethod
    def mean(cls, quantities: Sequence[Quantity]) -> Quantity:
        """The mean of several, such as a method's on several data sets."""
        draws = np.mean([quantity.draws for quantity in quantities], axis=0)
        values = [quantity.value for quantity in quantities]
        return cls(float(np.mean(values)), draws)

    @classmethod
    def slope(cls, x: Floats, quantities: Sequence[Quantity]) -> Quantity:
        """Slope of the least-squares line through points at x (n,)."""
        centred = (x - x.mean()) / np.square(x - x.mean()).sum()
        values = np.array([quantity.value for quantity in quantities])
        draws = np.stack([quantity.draws for quantity in quantities])
        return cls(float(centred @ values), centred @ draws)

    def __sub__(self, other: Quantity) -> Quantity:
        return Quantity(self.value - other.value, self.draws - other.draws)

    def __rmul__(self, factor: int) -> Quantity:
        return Quantity(factor * self.value, factor * self.draws)

    def interval(self, confidence: float) -> Interval:
        """Percentile interval: the middle ``confidence`` of the bootstrap values.

        The value is inside in any case.
        """
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return Interval(self.value, float(min(low, self.value)), float(max(high, self.value)))

    def p_value(self) -> float:
        """Two-sided, of being zero; see ``paired_bootstrap``."""
        fewer = min(np.count_nonzero(self.draws <= 0), np.count_nonzero(self.draws >= 0))
        return float(min(1.0, 2 * (1 + fewer) / (1 + len(self.draws))))

    def difference(self, confidence: float) -> Difference:
        """Of two quantities, this being the one less the other."""
        return Difference(*self.interval(confidence), self.p_value())


@runtime_checkable
class OwnInterval(Protocol):
    """A kernel whose values on resamples say too little: it makes its interval itself."""

    interval_note: ClassVar[str]

    def __call__(self, counts: TieCounts) -> Floats:
        """The metric (...)."""

    def interval(
        self, counts: TieCounts, n_resamples: int, confidence: float, seed: int
    ) -> tuple[float, float]:
        """Lower and upper end."""


class SortedScores:
    """Scores sorted once, from which any choice of rows is counted."""

    def __init__(self, uncertainty: Floats, failure: NDArray[np.bool_]) -> None:
        self.value, self.group = np.unique(uncertainty, return_inverse=True)
        self.strata = np.flatnonzero(~failure), np.flatnonzero(failure)

    @property
    def width(self) -> int:
        """Numbers that a resample takes."""
        return len(self.group)

    def counts(self, *drawn: Ints) -> TieCounts:
        """Counts (B, G) of rows (B, ·) chosen with repetition, right ones and wrong ones."""
        correct_rows, wrong_rows = drawn
        return TieCounts(
            self.value, correct=self._tally(correct_rows), wrong=self._tally(wrong_rows)
        )

    def observed(self) -> TieCounts:
        """Counts (1, G) of every row once."""
        return self.counts(*(rows[None] for rows in self.strata))

    def _tally(self, rows: Ints) -> Ints:
        n_resamples = len(rows)
        n_scores = len(self.value)
        cells = self.group[rows] + n_scores * np.arange(n_resamples)[:, None]
        return np.bincount(cells.ravel(), minlength=n_resamples * n_scores).reshape(
            n_resamples, n_scores
        )


AnyScores = SortedScores | PictureScores


def sorted_scores(
    uncertainty: Floats, failure: NDArray[np.bool_], picture: Ints | None
) -> AnyScores:
    """What is resampled: rows, or pictures where some have several (``repeated_pictures``)."""
    if picture is None:
        return SortedScores(uncertainty, failure)
    value, group = np.unique(uncertainty, return_inverse=True)
    return PictureScores.of(value, group, failure, picture)


def resampled_rows(scores: AnyScores, n_resamples: int, seed: int) -> Iterator[tuple[Ints, ...]]:
    """Blocks of resamples: (B, N) of every stratum of N rows or pictures.

    They are drawn with repetition within it. Of rows these are the right ones and the wrong ones.
    """
    rng = np.random.default_rng(seed)
    for size in block_sizes(n_resamples, CELLS // scores.width):
        yield tuple([_draw(rng, stratum, size) for stratum in scores.strata])


def block_sizes(n_resamples: int, most: int) -> list[int]:
    """Resamples of each block: as many as fit, at least one."""
    return [min(max(1, most), n_resamples - start) for start in range(0, n_resamples, max(1, most))]


def _draw(rng: np.random.Generator, rows: Ints, n_resamples: int) -> Ints:
    return rows[rng.integers(max(1, len(rows)), size=(n_resamples, len(rows)))]


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
    """Intervals of several metrics from the same resamples; see ``bootstrap_interval``."""
    check_settings(n_resamples, confidence)
    counts = tie_counts(uncertainty, failure)
    pair = check_pair(uncertainty, failure)
    shown = repeated_pictures(check_pictures(picture, len(pair[0])))
    n_units = counts.n if shown is None else shown.max() + 1
    if n_units > RESAMPLED_GROUPS:
        # the same distribution, in a time that does not grow with the rows
        if shown is None:
            return counted_intervals(kernels, counts, n_resamples, confidence, seed)
        return _picture_intervals(kernels, pair, shown, n_resamples, confidence, seed)
    scores = sorted_scores(*pair, shown)
    intervals, usual = own_intervals(kernels, counts, n_resamples, confidence, seed, shown)
    if not usual:
        return intervals
    observed = scores.observed()
    draws = resampled(usual, scores, n_resamples, seed)
    for name, kernel in usual.items():
        value = float(kernel(observed)[0])
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
    """Intervals of several metrics of rows, or of counts of them, from the same resamples."""
    if isinstance(scores, Histogram):
        check_settings(n_resamples, confidence)
        return counted_intervals(kernels, scores.counts(), n_resamples, confidence, seed)
    return bootstrap_intervals(
        kernels,
        scores.uncertainty,
        scores.failure,
        n_resamples=n_resamples,
        confidence=confidence,
        seed=seed,
        picture=scores.picture,
    )


def counted_intervals(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    n_resamples: int,
    confidence: float,
    seed: int,
    most_groups: int = RESAMPLED_GROUPS,
) -> dict[str, Interval]:
    """Metrics with stratified percentile bootstrap intervals, from counts (G,).

    A resample draws as many correct and as many wrong answers as there are, by multinomials over
    the scores: with as few distinct ones as ``most_groups`` the distribution of the bootstrap
    over rows. With more, neighbouring scores go together in groups of about equal size, and the
    ends move by what that does to the metric, in its range.
    """
    group = grouped(counts, most_groups)
    intervals, usual = own_intervals(kernels, counts, n_resamples, confidence, seed)
    blocks = _drawn_blocks(group, n_resamples, seed)
    return intervals | _intervals_around(usual, counts, group, blocks, n_resamples, confidence)


def _drawn_blocks(group: TieCounts, n_resamples: int, seed: int) -> Iterator[TieCounts]:
    """Blocks of resamples (B, G) of counts (G,): right and wrong answers are drawn apart."""
    rng = np.random.default_rng(seed)
    for size in block_sizes(n_resamples, CELLS // len(group.value)):
        correct = _drawn(rng, group.correct, size)
        wrong = _drawn(rng, group.wrong, size)
        yield TieCounts(group.value, correct, wrong)


def _picture_intervals(
    kernels: Mapping[str, Kernel],
    pair: tuple[Floats, NDArray[np.bool_]],
    picture: Ints,
    n_resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Interval]:
    """As ``counted_intervals``, of pictures (N,) of which some have several rows.

    Multinomials are over pictures that are alike.
    """
    uncertainty, failure = pair
    counts = tie_counts(uncertainty, failure)
    intervals, usual = own_intervals(kernels, counts, n_resamples, confidence, seed, picture)
    group = grouped(counts)
    group_of_row = group_indices(counts)[np.searchsorted(counts.value, uncertainty)]
    scores = PictureScores.of(group.value, group_of_row, failure, picture).merged()
    # right and wrong rows of one score are two entries, and as many counts as for rows
    width = max(len(group.value), scores.width // 2)
    sizes = block_sizes(n_resamples, CELLS // width)
    blocks = scores.drawn(np.random.default_rng(seed), sizes)
    return intervals | _intervals_around(usual, counts, group, blocks, n_resamples, confidence)


def _intervals_around(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    group: TieCounts,
    blocks: Iterable[TieCounts],
    n_resamples: int,
    confidence: float,
) -> dict[str, Interval]:
    """Intervals of metrics of counts (G,) from resamples of their groups."""
    if not kernels:
        return {}
    draws = values_of(kernels, blocks, n_resamples)
    intervals = {}
    for name, kernel in kernels.items():
        value = float(kernel(counts))
        drawn = draws[name]
        # nearly every metric is within 0 and 1
        least = min(drawn.min(), value, 0.0)
        most = max(drawn.max(), value, 1.0)
        moved = drawn + value - float(kernel(group))
        quantity = Quantity(value, np.clip(moved, least, most))
        intervals[name] = quantity.interval(confidence)
    return intervals


def grouped(counts: TieCounts, most: int = RESAMPLED_GROUPS) -> TieCounts:
    """Counts (G,) in at most ``most`` groups of neighbours, each with their mean."""
    if len(counts.value) <= most:
        return counts
    starts = np.flatnonzero(np.diff(group_indices(counts, most), prepend=-1))
    size = np.add.reduceat(counts.size, starts)
    correct = np.add.reduceat(counts.correct, starts)
    wrong = np.add.reduceat(counts.wrong, starts)
    return TieCounts(np.add.reduceat(counts.value * counts.size, starts) / size, correct, wrong)


def group_indices(counts: TieCounts, most: int = RESAMPLED_GROUPS) -> Ints:
    """(G,) index of the group of every score, from 0 on."""
    if len(counts.value) <= most:
        return np.arange(len(counts.value))
    group = (counts.accepted - counts.size) * most // counts.n
    return np.cumsum(np.diff(group, prepend=group[0]) > 0)


def _drawn(rng: np.random.Generator, counts: Ints, n_resamples: int) -> Ints:
    """(B, G) of as many rows as counts (G,) have, drawn with repetition."""
    drawn = np.zeros((n_resamples, len(counts)), np.int64)
    occupied = np.flatnonzero(counts)
    if len(occupied):
        n = int(counts.sum())
        drawn[:, occupied] = rng.multinomial(n, counts[occupied] / n, size=n_resamples)
    return drawn


def own_intervals(
    kernels: Mapping[str, Kernel],
    counts: TieCounts,
    n_resamples: int,
    confidence: float,
    seed: int,
    picture: Ints | None = None,
) -> tuple[dict[str, Interval], dict[str, Kernel]]:
    """Intervals of the kernels that make them themselves, from counts (G,), and the other kernels.

    Of pictures of which some have several rows the counts are those of ``independent`` rows.
    """
    of_rows = counts if picture is None else independent(counts, picture)
    intervals: dict[str, Interval] = {}
    usual: dict[str, Kernel] = {}
    for name, kernel in kernels.items():
        if not isinstance(kernel, OwnInterval):
            usual[name] = kernel
            continue
        value = float(kernel(counts))
        low, high = kernel.interval(of_rows, n_resamples, confidence, seed)
        if picture is not None:  # rounding may have moved it
            low = min(low, value)
            high = max(high, value)
        intervals[name] = Interval(value, low, high)
    return intervals, usual


def resampled(
    kernels: Mapping[str, Kernel], scores: AnyScores, n_resamples: int, seed: int
) -> dict[str, Floats]:
    """Values (B,) of several metrics on the same resamples.

    NaN where there is no wrong or no right answer.
    """
    blocks = (scores.counts(*rows) for rows in resampled_rows(scores, n_resamples, seed))
    return values_of(kernels, blocks, n_resamples)


def values_of(
    kernels: Mapping[str, Kernel], blocks: Iterable[TieCounts], n_resamples: int
) -> dict[str, Floats]:
    """Values (B,) of several metrics on blocks of resamples, of which one is held at a time."""
    values: dict[str, list[Floats]] = {name: [] for name in kernels}
    with track("bootstrap", n_resamples, "resamples") as task:
        for counts in blocks:
            for name, kernel in kernels.items():
                values[name].append(kernel(counts))
            task.advance(len(counts.n))
    return {name: np.concatenate(blocks_of_one) for name, blocks_of_one in values.items()}


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
    """A metric with its stratified percentile bootstrap interval.

    Args:
        metric: A name of ``METRICS``, or a kernel that maps ``TieCounts`` (B, G) to values (B,).
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        n_resamples: Number of resamples.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling.
        picture: (N,) whole numbers, equal for rows of one picture, -1 where it is not known. Where
            some are equal, pictures are resampled with all their rows.

    Returns:
        Value, lower and upper end; all NaN where the metric is undefined.

    Raises:
        DataError: If the vectors are empty, differ in length, or hold anything else (ECE: what is
            no probability).
        UsageError: If the metric is unknown or a setting cannot be.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> failure = rng.random(400) < 0.25
        >>> uncertainty = (
        ...     rng.normal(size=400) + failure
        ... )  # wrong answers are one standard deviation more uncertain
        >>> few, many = (
        ...     vilu.metrics.bootstrap_interval("auroc", uncertainty[:n], failure[:n])
        ...     for n in (100, 400)
        ... )
        >>> [round(number, 2) for number in few], [round(number, 2) for number in many]
        ([0.82, 0.7, 0.93], [0.75, 0.7, 0.81])
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
    """Difference of a metric between two uncertainties of the same answers.

    Both are computed on the same resampled rows. The p-value is twice the smaller share of
    resamples whose difference is not above, or not below, zero, with one added to count and total,
    so that it is never 0.

    Arguments and errors are as of ``bootstrap_interval``, with two uncertainties (N,). Returned is
    the metric of a less that of b, lower and upper end, and p-value; all NaN where the metric is
    undefined.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> failure, noise = rng.random(400) < 0.25, rng.normal(size=400)
        >>> good, better = failure + noise, failure + 0.8 * noise
        >>> found = vilu.metrics.paired_bootstrap("auroc", better, good, failure, n_resamples=199)
        >>> [round(number, 2) for number in found]  # p is at least 2 / 200
        [0.05, 0.05, 0.07, 0.01]
    """
    check_settings(n_resamples, confidence)
    kernel = _kernel(metric, failure, uncertainty_a, uncertainty_b)
    scores_a, failures = check_pair(uncertainty_a, failure)
    scores_b, _ = check_pair(uncertainty_b, failure)
    shown = repeated_pictures(check_pictures(picture, len(failures)))
    a = sorted_scores(scores_a, failures, shown)
    b = sorted_scores(scores_b, failures, shown)
    observed = float((kernel(a.observed()) - kernel(b.observed()))[0])
    if np.isnan(observed):
        return Difference(observed, observed, observed, observed)
    blocks = []
    # both have the same strata; the wider one says how many resamples are held at a time
    wider = b if b.width > a.width else a
    with track("bootstrap", n_resamples, "resamples") as task:
        for rows in resampled_rows(wider, n_resamples, seed):
            blocks.append(kernel(a.counts(*rows)) - kernel(b.counts(*rows)))
            task.advance(len(blocks[-1]))
    differences = np.concatenate(blocks)
    # resampling adds its bias once more, to both, but not the same
    if isinstance(kernel, OwnInterval):
        differences += observed - differences.mean()
    return Quantity(observed, differences).difference(confidence)


def paired_across(
    kernel: Kernel,
    a: tuple[Floats, Ints],
    b: tuple[Floats, Ints],
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    picture: Ints | None = None,
) -> Difference:
    """Difference of a metric between two kinds of answers to the same rows.

    Each of ``a`` and ``b`` are uncertainties (N,) and failures (N,). Both kinds are wrong in other
    rows, so no resample can keep both numbers of wrong answers: rows are drawn, all alike. Rows of
    one picture (N,) are drawn together.
    """
    check_settings(n_resamples, confidence)
    unit = np.arange(len(a[0])) if picture is None else picture
    n_units = int(unit.max()) + 1
    sides = [_TiedRows.of(*side) for side in (a, b)]
    observed = float(kernel(tie_counts(*a))) - float(kernel(tie_counts(*b)))
    rng = np.random.default_rng(seed)
    blocks = []
    with track("bootstrap", n_resamples, "resamples") as task:
        for size in block_sizes(n_resamples, CELLS // len(unit)):
            drawn = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=size)
            of_rows = drawn[:, unit]
            first, second = (kernel(side.counts(of_rows)) for side in sides)
            blocks.append(first - second)
            task.advance(size)
    return Quantity(observed, np.concatenate(blocks)).difference(confidence)


class _TiedRows(NamedTuple):
    """Rows in the order of their uncertainties, equal ones side by side."""

    order: Ints  # (N,) rows by their uncertainty
    starts: Ints  # (G,) where each distinct uncertainty begins in this order
    value: Floats  # (G,) distinct uncertainties
    wrong: Ints  # (N,) 1 where the answer is wrong, in this order

    @classmethod
    def of(cls, uncertainty: Floats, failure: Ints) -> _TiedRows:
        order = np.argsort(uncertainty, kind="stable")
        value, starts = np.unique(uncertainty[order], return_index=True)
        return cls(order, starts, value, failure[order])

    def counts(self, times: Ints) -> TieCounts:
        """Counts (B, G) of rows that are drawn so many ``times`` (B, N)."""
        drawn = times[:, self.order]
        size = np.add.reduceat(drawn, self.starts, axis=1)
        wrong = np.add.reduceat(drawn * self.wrong, self.starts, axis=1)
        return TieCounts(self.value, size - wrong, wrong)


def _kernel(metric: str | Kernel, failure: ArrayLike, *uncertainty: ArrayLike) -> Kernel:
    if not isinstance(metric, str):
        return metric
    chosen = get_metric(metric)
    if chosen.of_probability:
        for scores in uncertainty:
            probability_counts(scores, failure)  # refuses what is no probability
    return chosen.kernel


def check_settings(n_resamples: int, confidence: float) -> None:
    """Refuse no resample, or a confidence that is not in (0, 1)."""
    require_at_least("n_resamples", n_resamples, 1)
    if n_resamples > MAX_RESAMPLES:
        raise UsageError(
            f"n_resamples must be at most {MAX_RESAMPLES:,}. Got {n_resamples} instead."
        )
    require_between("confidence", confidence)
