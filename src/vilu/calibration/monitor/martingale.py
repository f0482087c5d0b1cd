"""Conformal test martingales: bets against p-values that are uniform as long as nothing changes.

Rows must come in their order of arrival. ``is_grouped``, ``is_rising`` and ``is_in_blocks``
recognise rows that are sorted instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy import signal, special

from vilu.metrics.counts import Floats, Ints

SHAPES: Final = tuple(1.3**power for power in range(-2, 4))
"""Values of the parameters a and b of the beta densities that are bets.

With both below 1, the bet is on p-values near 0 and 1. With both above 1, it is on p-values near
the middle. With unequal ones, it is on a shift to larger or smaller p-values.
"""

BETAS: Final = tuple((a, b) for a in SHAPES for b in SHAPES if (a, b) != (1, 1))
"""Parameters (a, b) of every beta bet. The uniform density (1, 1) would never win or lose."""

HISTOGRAMS: Final = ((10, 50.0), (10, 150.0), (30, 50.0), (30, 150.0))
"""For every histogram bet: number of cells, and weight of the uniform prior in p-values."""

DECAY: Final = 1 - 1 / 400  # factor by which the weight of an earlier p-value falls at every row

N_BETS: Final = (len(BETAS), len(HISTOGRAMS))
"""Number of beta bets, and number of histogram bets."""

SHARES: Final = np.repeat([0.5 / N_BETS[0], 0.5 / N_BETS[1]], N_BETS)
"""Share (K,) of the wealth of every bet: half for the beta densities, half for the histograms."""

ROWS_PER_START: Final = 50  # number of rows between two starts of the bets
ROWS_PER_BLOCK: Final = 4096  # number of rows that are processed at once
LONGEST_MERGED: Final = 2**15  # a sorted run of more values is never merged
EPS: Final = 2.0**-53  # smallest distance of a p-value from 0 and from 1


def beta_bets(p: Floats) -> Floats:
    """Log densities (B, K') of the K' beta bets at p-values (B,) in (0, 1)."""
    a, b = np.array(BETAS).T
    p = p[:, None]  # (B, 1), because every bet is made at every p-value
    powers = (a - 1) * np.log(p) + (b - 1) * np.log1p(-p)
    # A fair bet has mean 1 under uniform p-values. So it must be a normalised density.
    log_density: Floats = powers - special.betaln(a, b)
    return log_density


@np.errstate(under="ignore")  # a number far smaller than the others is rounded to 0
def histogram_bets(p: Floats, counts: Floats, weight: float) -> tuple[Floats, Floats]:
    """Log densities (B,) of a histogram bet at p-values (B,), and its updated counts (m,).

    The bet is a histogram of the last few hundred p-values in m equal cells, with a uniform prior
    that weighs as much as ``weight`` p-values:

        f_t(p) = m (weight/m + N_t[cell of p]) / (weight + sum N_t).

    N_t counts the p-values before t in every cell. The counts are multiplied by ``DECAY`` at every
    row. (Plug-in martingale: Fedorova et al., ICML 2012.)

    Args:
        p: P-values (B,).
        counts: N_t (m,) before the first of these p-values.
        weight: Weight of the uniform prior.
    """
    m = len(counts)
    row = np.arange(len(p))
    cell = np.minimum((p * m).astype(np.int64), m - 1)
    is_in_cell = np.zeros((len(p), m))
    is_in_cell[row, cell] = 1
    # a recursive filter computes N_{t+1} = DECAY N_t + is_in_cell for all rows at once
    first = counts[None]  # (1, m)
    after, _ = signal.lfilter([1.0], [1.0, -DECAY], is_in_cell, axis=0, zi=DECAY * first)
    # The density for a row depends only on the rows before it. If it also depended on the p-value
    # of the row itself, the bet would win even when nothing changes.
    before = np.concatenate([first, after[:-1]])
    density = m * (weight / m + before[row, cell]) / (weight + before.sum(axis=1))
    return np.log(density), after[-1].copy()  # a view would keep all rows


def unused_share(start: Floats) -> Floats:
    """Share of the initial wealth that no bet uses yet after start number 0, 1, 2, ...

    The share is (start + 2)^(-1/2). Before the first start it is 1.
    """
    return 1 / np.sqrt(start + 2)


@dataclass
class Martingale:
    """Total wealth of all bets from all starts.

    If bet j starts at row s, its wealth is the product of its densities f_j over the rows from s
    on. Let L_t be the sum of log f_j up to row t. Then the wealth of bet j from all starts together
    is

        exp(L_t) sum_s share_s exp(-L_{s-1}).

    So two running sums per bet are enough, and no number per start is saved.
    """

    n: int = 0  # number of rows so far
    # (K,) L_t of every bet
    growth: Floats = field(default_factory=lambda: np.zeros(len(SHARES)))
    # (K,) log sum_s share_s exp(-L_{s-1}) of every bet
    started: Floats = field(default_factory=lambda: np.full(len(SHARES), -np.inf))
    # counts N_t of every histogram bet
    counts: list[Floats] = field(
        default_factory=lambda: [np.zeros(n_cells) for n_cells, _ in HISTOGRAMS]
    )

    def update(self, p: Floats) -> Floats:
        """Log wealth (B,) after each of the next p-values (B,).

        The result does not depend on how the p-values are divided into calls.
        """
        wealth = [np.empty(0)]
        for start in range(0, len(p), ROWS_PER_BLOCK):
            wealth.append(self._update(p[start : start + ROWS_PER_BLOCK]))
        return np.concatenate(wealth)

    @np.errstate(under="ignore")  # a number far smaller than the others is rounded to 0
    def _update(self, p: Floats) -> Floats:
        """Log wealth (B,) after each p-value of a block."""
        p = np.clip(p, EPS, 1 - EPS)  # rounding can make a p-value exactly 0 or 1
        log_densities = self._bets(p)
        growth = np.cumsum(np.concatenate([self.growth[None], log_densities]), axis=0)
        growth_before = growth[:-1]  # L_{t-1} for each of the B rows
        growth_after = growth[1:]  # L_t
        row = self.n + np.arange(len(p))
        # Every start takes a share of the wealth that is not used yet. Bets that all start at row 0
        # would lose wealth as long as nothing changes. After a late shift they would first have to
        # win back these losses.
        start = (row // ROWS_PER_START).astype(np.float64)
        unused_before = np.where(start > 0, unused_share(start - 1), 1.0)
        share = unused_before - unused_share(start)
        share_of_row = np.where(row % ROWS_PER_START == 0, share, 0.0)[:, None]  # (B, 1)
        with np.errstate(divide="ignore"):  # log 0 = -inf at rows without a start
            started_here = np.log(share_of_row) - growth_before
        all_started = np.concatenate([self.started[None], started_here])
        started = np.logaddexp.accumulate(all_started, axis=0)
        started_after = started[1:]
        self.n = self.n + len(p)
        # A view of the last row would keep the whole block in memory.
        self.growth = growth[-1].copy()
        self.started = started[-1].copy()
        used = special.logsumexp(growth_after + started_after + np.log(SHARES), axis=1)
        wealth: Floats = np.logaddexp(used, np.log(unused_share(start)))
        return wealth

    def _bets(self, p: Floats) -> Floats:
        """Log densities (B, K) of all K bets at p-values (B,)."""
        bets = [beta_bets(p)]
        counts = []
        for before, (_, weight) in zip(self.counts, HISTOGRAMS, strict=True):
            log_density, after = histogram_bets(p, before, weight)
            bets.append(log_density[:, None])
            counts.append(after)
        self.counts = counts
        return np.concatenate(bets, axis=1)


@dataclass
class SortedRun:
    """Distinct values, ascending, and for each the number of values that are at most as large.

    A repeated value counts as often as it occurred.
    """

    values: Floats
    n_up_to: Ints

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n(self) -> int:
        """Number of values, where repeated values count as often as they occurred."""
        return int(self.n_up_to[-1])

    @classmethod
    def of(cls, values: Floats, counts: Ints) -> SortedRun:
        """The run of values in any order, each of which occurred ``counts`` times."""
        distinct, index = np.unique(values, return_inverse=True)
        return cls(distinct, np.cumsum(np.bincount(index, counts)).astype(np.int64))

    @classmethod
    def merged(cls, runs: Sequence[SortedRun]) -> SortedRun:
        """One run with the values of all these runs."""
        values = np.concatenate([run.values for run in runs])
        counts = np.concatenate([run.counts() for run in runs])
        return cls.of(values, counts)

    def counts(self) -> Ints:
        """How often each distinct value occurred."""
        return np.diff(self.n_up_to, prepend=0)

    def compare(self, values: Floats) -> tuple[Ints, Ints]:
        """For each of these values, how many in the run are greater, and how many are equal."""
        # The search gives the number k of distinct values up to (or below) each value. Entry k of
        # this array is the number of all values among the k smallest distinct ones.
        n_among_smallest = np.concatenate([[0], self.n_up_to])
        n_up_to = n_among_smallest[np.searchsorted(self.values, values, "right")]
        n_below = n_among_smallest[np.searchsorted(self.values, values, "left")]
        return self.n - n_up_to, n_up_to - n_below


@dataclass
class Reference:
    """All values so far, in sorted runs.

    About log n short runs and n / LONGEST_MERGED long ones are searched, for n values. Repeated
    values take no memory in a run.
    """

    runs: list[SortedRun] = field(default_factory=list)

    @classmethod
    def of(cls, values: Floats, counts: Ints | None = None) -> Reference:
        """A reference with these values, each once or ``counts`` times."""
        reference = cls()
        reference.add(values, counts)
        return reference

    @property
    def n(self) -> int:
        """Number of values so far."""
        return sum(run.n for run in self.runs)

    def __deepcopy__(self, _: object) -> Reference:
        """A copy that shares the runs; a run is replaced and never changed."""
        return Reference(list(self.runs))

    def add(self, values: Floats, counts: Ints | None = None) -> None:
        """Add values, each once or ``counts`` times."""
        if not len(values):
            return
        if counts is None:
            counts = np.ones(len(values), np.int64)
        run = SortedRun.of(values, counts)
        # Earlier runs that are no longer than the new one are merged into it. So every run is
        # shorter than the run before it, and there are few runs to search. Long runs are left as
        # they are, because a merge takes several times the memory of its runs.
        while self.runs and len(self.runs[-1]) <= min(len(run), LONGEST_MERGED):
            run = SortedRun.merged([self.runs.pop(), run])
        self.runs.append(run)

    def table(self) -> tuple[Floats, Ints]:
        """Distinct values, ascending, and how often each occurred."""
        if not self.runs:
            return np.empty(0), np.empty(0, np.int64)
        all_values = SortedRun.merged(self.runs)
        return all_values.values, all_values.counts()

    def p_values(self, values: Floats, uniform: Floats) -> Floats:
        """P-values (B,) of new values (B,), which are then added to the reference.

        Each value is compared with all values before it, new ones included.
        ``uniform`` (B,) are random numbers in [0, 1) that break ties.
        """
        greater, equal = compare_with_earlier(values)
        for run in self.runs:
            greater_in_run, equal_in_run = run.compare(values)
            greater = greater + greater_in_run
            equal = equal + equal_in_run
        n_before = self.n + np.arange(len(values))  # number of values before each new value
        self.add(values)
        # Ties are broken at random, and each row is also compared with itself. Otherwise p-values
        # of tied scores would not be uniform, and the bets would win although nothing changes
        # (Vovk et al. 2005).
        return (greater + uniform * (equal + 1)) / (n_before + 1)


def compare_with_earlier(values: Floats) -> tuple[Ints, Ints]:
    """For each value, how many earlier values are greater, and how many are equal.

    The values are divided into blocks of 1 value, then of 2, of 4, and so on. Blocks are numbered
    from 0. The values of every odd block are compared with the values of the block before it. Over
    all block sizes, every pair of values is compared once. This takes O(B log^2 B) time.
    """
    n = len(values)
    greater = np.zeros(n, np.int64)
    equal = np.zeros(n, np.int64)
    _, rank = np.unique(values, return_inverse=True)
    rank = rank.astype(np.int64)
    index = np.arange(n)
    width = 1
    while width < n:
        pair = index // (2 * width)
        is_odd_block = (index // width) % 2 == 1
        # The key sorts by pair of blocks, then by value. So one sorted array holds all even blocks,
        # and one search compares every odd block with its even block.
        key = pair * n + rank
        even_keys = np.sort(key[~is_odd_block])
        odd_keys = key[is_odd_block]
        n_up_to = np.searchsorted(even_keys, odd_keys, "right")
        n_below = np.searchsorted(even_keys, odd_keys, "left")
        # If an odd block has values, the even blocks of its pair and of all earlier pairs are full.
        # Together they hold (pair + 1) * width values.
        greater[is_odd_block] += (pair[is_odd_block] + 1) * width - n_up_to
        equal[is_odd_block] += n_up_to - n_below
        width *= 2
    return greater, equal


# Number of shuffles. Rows count as sorted only if every shuffle has less order. For exchangeable
# rows of any distribution this happens with probability 1/1000.
SHUFFLES: Final = 999
# Rows count as sorted only if their order exceeds the mean of the shuffles by at least this number
# of standard deviations. A normal variable does so with probability 3/100,000.
CLEAR_DEVIATIONS: Final = 4.0
# Maximum number of evenly spaced rows that are compared in each half of the rows.
ROWS_PER_HALF: Final = 4096
# Minimum number of rows; fewer rows never count as sorted.
FEWEST_ROWS: Final = 20


def is_grouped(codes: Ints) -> bool:
    """Whether equal codes (N,) are neighbours, as in a list of files by class.

    In both halves of the rows, the excess of equal neighbours over shuffled rows must be at least a
    tenth of the excess of sorted rows. So rows whose mix changes while they arrive are not taken
    for sorted: after one sudden change at least one half has no order, and a slow drift makes only
    few neighbours equal.
    """

    def n_equal_neighbours(codes: Floats) -> float:
        return float(np.count_nonzero(codes[1:] == codes[:-1]))

    def most_equal_neighbours(codes: Floats) -> float:
        return len(codes) - len(np.unique(codes))

    return _is_sorted_in_halves(
        codes.astype(np.float64),
        order=n_equal_neighbours,
        largest_order=most_equal_neighbours,
        least_share=0.1,
    )


def is_rising(values: Floats) -> bool:
    """Whether neighbours among values (N,) have similar ranks, as in sorted values.

    In both halves, the excess over shuffled rows must be at least three quarters of the excess of
    sorted rows. Two kinds of rows, one after the other, reach only one half of it.
    """

    # minus the total distance of neighbours, so that more order gives a larger number
    def nearness_of_neighbours(rank: Floats) -> float:
        return -float(np.abs(np.diff(rank)).sum())

    def nearness_if_sorted(rank: Floats) -> float:
        return float(rank.min() - rank.max())

    _, rank = np.unique(values, return_inverse=True)
    return _is_sorted_in_halves(
        rank.astype(np.float64),
        order=nearness_of_neighbours,
        largest_order=nearness_if_sorted,
        least_share=0.75,
    )


def is_in_blocks(codes: Ints) -> bool:
    """Whether every code (N,) has all its rows in one block, and chance hardly explains this.

    Chance hardly explains it if exchangeable rows have one block per code with a probability of
    less than 1e-6.
    """
    if not len(codes):
        return False
    _, sizes = np.unique(codes, return_counts=True)
    n_blocks = 1 + np.count_nonzero(codes[1:] != codes[:-1])
    if n_blocks != len(sizes):
        return False
    # Let n_k be the number of rows of code k. Of all N! orders, K! n_1! ... n_K! have one block for
    # each of the K codes.
    log_in_blocks = special.gammaln(len(sizes) + 1) + special.gammaln(sizes + 1).sum()
    log_all_orders = special.gammaln(len(codes) + 1)
    return bool(log_in_blocks - log_all_orders < np.log(1e-6))


def _is_sorted_in_halves(
    values: Floats,
    *,
    order: Callable[[Floats], float],
    largest_order: Callable[[Floats], float],
    least_share: float,
) -> bool:
    """Whether values are sorted within both halves of the rows.

    1. The values must have more order than every shuffle of them.
    2. In each half, the excess of order over shuffles must be at least the share ``least_share`` of
       the largest possible excess.

    A shuffle moves values only within their half. So a difference between the two halves does not
    count as order.

    Args:
        values: Values (N,) in the order of the rows.
        order: Measure of order of the values of a half.
        largest_order: Largest value of this measure that the values of a half can have.
        least_share: Smallest share of the largest possible excess.
    """
    if len(values) < FEWEST_ROWS:
        return False
    rng = np.random.default_rng(0)
    halves = []
    for half in np.array_split(values, 2):
        step = math.ceil(len(half) / ROWS_PER_HALF)
        halves.append(half[::step])
    order_of_half = np.array([order(half) for half in halves])
    total_order = order_of_half.sum()
    shuffled_order = np.empty((SHUFFLES, 2))  # one row per shuffle, one column per half
    for number in range(SHUFFLES):
        shuffled_order[number] = [order(rng.permutation(half)) for half in halves]
        if shuffled_order[number].sum() >= total_order:
            return False
    mean = shuffled_order.mean(axis=0)
    excess = order_of_half - mean
    largest_excess = np.array([largest_order(half) for half in halves]) - mean
    is_large_enough = (excess > 0) & (excess >= least_share * largest_excess)  # in each half
    shuffled_total = shuffled_order.sum(axis=1)
    total_excess = total_order - shuffled_total.mean()
    is_clear = total_excess >= CLEAR_DEVIATIONS * shuffled_total.std()
    return bool(is_large_enough.all() and is_clear)
