"""Conformal test martingales: bets that detect a change in the rows.

Every row has a p-value. As long as nothing changes, p-values are uniform, and the bets win nothing
on average. After a change, the p-values are no longer uniform, and bets that fit them win.

Rows must come in the order of arrival. ``is_grouped``, ``is_rising`` and ``is_in_blocks`` recognise
sorted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy import signal, special

from vilu.metrics.counts import Floats, Ints

BETA_SHAPES: Final = tuple(1.3**power for power in range(-2, 4))
"""Values for the parameters a and b in the beta bets.

If a and b are below 1, the bet is on p-values near 0 and 1. If a and b are above 1, the bet is on
p-values near the middle. If a and b differ, the bet is on a shift to larger or smaller p-values.
"""

BETA_PARAMETERS: Final = tuple((a, b) for a in BETA_SHAPES for b in BETA_SHAPES if (a, b) != (1, 1))
"""Parameters (a, b) for every beta bet. The uniform density (1, 1) would never win or lose."""

HISTOGRAM_SETTINGS: Final = ((10, 50.0), (10, 150.0), (30, 50.0), (30, 150.0))
"""For every histogram bet: number of cells, and the uniform prior's weight in p-values."""

COUNT_DECAY: Final = 1 - 1 / 400
"""At every row, the weights of all earlier p-values are multiplied by this factor."""

N_BETS: Final = (len(BETA_PARAMETERS), len(HISTOGRAM_SETTINGS))
"""How many bets are beta bets, and how many are histogram bets."""

WEALTH_SHARES: Final = np.repeat([0.5 / N_BETS[0], 0.5 / N_BETS[1]], N_BETS)
"""Each bet's wealth share (K,): half for the beta densities, half for the histograms."""

ROWS_PER_START: Final = 50
"""How many rows lie between two starts of the bets."""

ROWS_PER_BLOCK: Final = 4096
"""Number of rows per computation block."""

LONGEST_MERGED_RUN: Final = 2**15
"""Sorted runs with more values than this number are never merged."""

EPS: Final = 2.0**-53
"""Smallest distance of a p-value from 0 and from 1."""


def beta_log_densities(p: Floats) -> Floats:
    """Return the log densities (B, K') for the K' beta bets at p-values (B,) in (0, 1)."""
    a, b = np.array(BETA_PARAMETERS).T
    p = p[:, None]  # (B, 1), because every bet is made at every p-value
    powers = (a - 1) * np.log(p) + (b - 1) * np.log1p(-p)
    # A fair bet has mean 1 under uniform p-values. So a bet must be a normalised density.
    log_density: Floats = powers - special.betaln(a, b)
    return log_density


@np.errstate(under="ignore")  # numbers far smaller than the largest number are rounded to 0
def histogram_log_densities(p: Floats, counts: Floats, weight: float) -> tuple[Floats, Floats]:
    """Return a histogram bet's log densities (B,) at p-values (B,), and updated counts (m,).

    The bet is a histogram over the last few hundred p-values in m equal cells, with a uniform
    prior. The prior has the weight of ``weight`` p-values. For each cell, N_t counts the p-values
    before row t. The counts are multiplied by ``COUNT_DECAY`` at every row. The density for the
    p-value p in row t is

        f_t(p) = m (weight/m + N_t[cell of p]) / (weight + sum N_t).

    (Plug-in martingale: Fedorova et al., ICML 2012.)

    Args:
        p: P-values (B,).
        counts: N_t (m,) before the first of these p-values.
        weight: Weight of the uniform prior.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.monitor.martingale import histogram_log_densities
        >>> # Two cells, and a prior with the weight of two p-values. Without counts the density is
        >>> # 1. After a p-value in the first cell, the densities are 2 (1 + 1) / (2 + 1) there, and
        >>> # 2 (1 + 0) / (2 + 1) in the second cell: the mean is 1.
        >>> first_cell_twice = np.array([0.1, 0.1])
        >>> log_density, _ = histogram_log_densities(first_cell_twice, np.zeros(2), weight=2.0)
        >>> np.exp(log_density).round(4).tolist()
        [1.0, 1.3333]
    """
    m = len(counts)
    row = np.arange(len(p))
    cell = np.minimum((p * m).astype(np.int64), m - 1)  # the last cell includes p = 1
    counts_after = _counts_after_rows(counts, cell)
    # The counts before a row are the counts after the previous row. A density that also depends on
    # the row's own p-value would win even when nothing changes.
    counts_before = np.concatenate([counts[None], counts_after[:-1]])  # (B, m), N_t for each row
    prior_and_count = weight / m + counts_before[row, cell]
    total_weight = weight + counts_before.sum(axis=1)
    density = m * prior_and_count / total_weight
    # A copy, because a view of the last row would keep the whole array in memory.
    return np.log(density), counts_after[-1].copy()


def _counts_after_rows(counts: Floats, cell: Ints) -> Floats:
    """Return the counts (B, m) after each of B rows, from the counts (m,) before the first row.

    ``cell`` (B,) is the cell with each row's p-value.
    """
    is_in_cell = np.zeros((len(cell), len(counts)))
    is_in_cell[np.arange(len(cell)), cell] = 1
    # A recursive filter computes N_{t+1} = COUNT_DECAY N_t + is_in_cell for all rows at once. The
    # filter starts from ``zi``, the term COUNT_DECAY N_t for the first row.
    counts_after: Floats
    counts_after, _ = signal.lfilter(
        [1.0], [1.0, -COUNT_DECAY], is_in_cell, axis=0, zi=COUNT_DECAY * counts[None]
    )
    return counts_after


def unused_wealth_share(start: Floats) -> Floats:
    """Return the unused share of the initial wealth after start number ``start`` (from 0).

    The share is (start + 2)^(-1/2). Before the first start the share is 1.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.monitor.martingale import unused_wealth_share
        >>> unused_wealth_share(np.array([2.0, 7.0])).round(4).tolist()  # 1/2, 1/3
        [0.5, 0.3333]
    """
    return 1 / np.sqrt(start + 2)


@dataclass
class Martingale:
    """Total wealth of all bets from all starts.

    Each start s uses a share of the initial wealth, share_s. If bet j starts at row s, the bet's
    wealth is multiplied by the density f_j at each row from s on. Let L_t be the sum of log f_j up
    to row t. Then bet j has, from all starts together, the wealth

        exp(L_t) sum_s share_s exp(-L_{s-1}).

    So two running sums per bet are enough, and no number per start is saved.
    """

    n: int = 0  # number of rows so far
    # (K,) each bet's L_t
    growth: Floats = field(default_factory=lambda: np.zeros(len(WEALTH_SHARES)))
    # (K,) each bet's log sum_s share_s exp(-L_{s-1})
    started: Floats = field(default_factory=lambda: np.full(len(WEALTH_SHARES), -np.inf))
    # counts N_t (m,) in each histogram bet
    counts: list[Floats] = field(
        default_factory=lambda: [np.zeros(n_cells) for n_cells, _ in HISTOGRAM_SETTINGS]
    )

    def update(self, p: Floats) -> Floats:
        """Return the log wealth (B,) after each of the next p-values (B,).

        The result does not depend on how the p-values are divided into calls.
        """
        log_wealth = [np.empty(0)]
        for first_row in range(0, len(p), ROWS_PER_BLOCK):
            log_wealth_of_block = self._update_block(p[first_row : first_row + ROWS_PER_BLOCK])
            log_wealth.append(log_wealth_of_block)
        return np.concatenate(log_wealth)

    @np.errstate(under="ignore")  # numbers far smaller than the largest number are rounded to 0
    def _update_block(self, p: Floats) -> Floats:
        """Return the log wealth (B,) after each p-value in a block (B,)."""
        p = np.clip(p, EPS, 1 - EPS)  # rounding can make a p-value exactly 0 or 1
        log_densities = self._bet_and_count(p)
        growth = np.cumsum(np.concatenate([self.growth[None], log_densities]), axis=0)
        growth_before = growth[:-1]  # L_{t-1} for each of the B rows
        growth_after = growth[1:]  # L_t
        row = self.n + np.arange(len(p))
        # Every start takes a share of the unused wealth. If all bets started at row 0, the bets
        # would lose wealth as long as nothing changes. After a late shift the bets would first have
        # to win back these losses.
        start = (row // ROWS_PER_START).astype(np.float64)  # number of the last start, from 0
        unused_before_start = np.where(start > 0, unused_wealth_share(start - 1), 1.0)
        share_of_start = unused_before_start - unused_wealth_share(start)
        is_start = row % ROWS_PER_START == 0
        share_of_row = np.where(is_start, share_of_start, 0.0)[:, None]  # (B, 1)
        with np.errstate(divide="ignore"):  # log 0 = -inf at rows without a start
            log_terms = np.log(share_of_row) - growth_before  # log of share_s exp(-L_{s-1})
        all_terms = np.concatenate([self.started[None], log_terms])
        started = np.logaddexp.accumulate(all_terms, axis=0)
        started_after = started[1:]
        self.n = self.n + len(p)
        # A view of the last row would keep the whole block in memory.
        self.growth = growth[-1].copy()
        self.started = started[-1].copy()
        log_used = special.logsumexp(growth_after + started_after + np.log(WEALTH_SHARES), axis=1)
        unused_share = unused_wealth_share(start)
        log_unused = np.log(unused_share)
        log_wealth: Floats = np.logaddexp(log_used, log_unused)
        return log_wealth

    def _bet_and_count(self, p: Floats) -> Floats:
        """Return the log densities (B, K) for all K bets at p-values (B,), and count the p-values.

        The histograms count the p-values after the bets.
        """
        log_densities = [beta_log_densities(p)]
        updated_counts = []
        for counts, (_, weight) in zip(self.counts, HISTOGRAM_SETTINGS, strict=True):
            log_density, counts_after = histogram_log_densities(p, counts, weight)
            log_densities.append(log_density[:, None])
            updated_counts.append(counts_after)
        self.counts = updated_counts
        return np.concatenate(log_densities, axis=1)


@dataclass
class SortedRun:
    """Sorted distinct values with counts.

    A repeated value is saved once, together with the number of occurrences.
    """

    values: Floats  # (G,) distinct values, ascending
    cumulated_counts: Ints  # (G,) for each distinct value, number of all values up to this value

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n(self) -> int:
        """Number of values, where every occurrence of a repeated value counts."""
        return int(self.cumulated_counts[-1])

    @classmethod
    def of(cls, values: Floats, counts: Ints) -> SortedRun:
        """Make a run from values (N,) in any order. Each value occurred ``counts`` (N,) times."""
        distinct_values, index = np.unique(values, return_inverse=True)
        counts_of_distinct = np.bincount(index, weights=counts)
        cumulated_counts = np.cumsum(counts_of_distinct).astype(np.int64)
        return cls(distinct_values, cumulated_counts)

    @classmethod
    def merge(cls, runs: Sequence[SortedRun]) -> SortedRun:
        """Merge runs into a single run with all values."""
        values = np.concatenate([run.values for run in runs])
        counts = np.concatenate([run.counts() for run in runs])
        return cls.of(values, counts)

    def counts(self) -> Ints:
        """Return how often each distinct value occurs (G,)."""
        return np.diff(self.cumulated_counts, prepend=0)

    def count_greater_and_equal(self, values: Floats) -> tuple[Ints, Ints]:
        """Count for each value in ``values`` the greater and the equal values in the run.

        Every occurrence of a repeated value counts.
        """
        # Entry k in this array counts all occurrences of the k smallest distinct values.
        # The search gives k.
        n_among_smallest = np.concatenate([[0], self.cumulated_counts])
        n_up_to = n_among_smallest[np.searchsorted(self.values, values, "right")]
        n_below = n_among_smallest[np.searchsorted(self.values, values, "left")]
        n_greater = self.n - n_up_to
        n_equal = n_up_to - n_below
        return n_greater, n_equal


@dataclass
class ReferenceValues:
    """All values so far, in sorted runs.

    n values are in about log n short runs and n / LONGEST_MERGED_RUN long runs. A repeated value in
    a run takes memory only once.
    """

    runs: list[SortedRun] = field(default_factory=list)

    @classmethod
    def of(cls, values: Floats, counts: Ints | None = None) -> ReferenceValues:
        """Make a reference. ``counts`` says how often each value occurs (None: once)."""
        reference = cls()
        reference.add(values, counts)
        return reference

    @property
    def n(self) -> int:
        """Number of values so far."""
        return sum(run.n for run in self.runs)

    def __deepcopy__(self, _: object) -> ReferenceValues:
        """Copy the reference with shared runs. This is safe: runs are replaced, never changed."""
        return ReferenceValues(list(self.runs))

    def add(self, values: Floats, counts: Ints | None = None) -> None:
        """Add values. ``counts`` says how often each value occurs (None: once)."""
        if not len(values):
            return
        if counts is None:
            counts = np.ones(len(values), np.int64)
        run = SortedRun.of(values, counts)
        # The new run takes in the last run, then the run before, and so on, until it meets a longer
        # run. So there are few runs to search. Runs above LONGEST_MERGED_RUN are not taken in,
        # because a merge takes several times the memory of the merged runs.
        while self.runs and len(self.runs[-1]) <= min(len(run), LONGEST_MERGED_RUN):
            run = SortedRun.merge([self.runs.pop(), run])
        self.runs.append(run)

    def value_counts(self) -> tuple[Floats, Ints]:
        """Return the distinct values, ascending, and how often each value occurs."""
        if not self.runs:
            return np.empty(0), np.empty(0, np.int64)
        all_values = SortedRun.merge(self.runs)
        return all_values.values, all_values.counts()

    def p_values(self, values: Floats, uniform_numbers: Floats) -> Floats:
        """Return the p-values (B,) for new values (B,), and add the new values to the reference.

        Each new value is compared with all values in the reference and with earlier new values.
        ``uniform_numbers`` (B,) are random numbers in [0, 1) for breaking ties.

        Examples:
            >>> import numpy as np
            >>> from vilu.calibration.monitor.martingale import ReferenceValues
            >>> reference = ReferenceValues.of(np.array([0.1, 0.2, 0.2, 0.3]))
            >>> # 0.2: one value is greater, two are equal, so (1 + 3/2) / 5. 0.4: none is greater
            >>> # or equal among now five values, so (0 + 1/2) / 6.
            >>> half = np.array([0.5, 0.5])  # in place of random numbers
            >>> reference.p_values(np.array([0.2, 0.4]), half).round(4).tolist()
            [0.5, 0.0833]
        """
        n_greater, n_equal = count_in_earlier_values(values)
        for run in self.runs:
            n_greater_in_run, n_equal_in_run = run.count_greater_and_equal(values)
            n_greater = n_greater + n_greater_in_run
            n_equal = n_equal + n_equal_in_run
        n_before = self.n + np.arange(len(values))  # number of values before each new value
        self.add(values)
        # Ties are broken at random, and each row is also compared with itself. Otherwise p-values
        # for tied scores would not be uniform, and the bets would win although nothing changes
        # (Vovk et al. 2005).
        return (n_greater + uniform_numbers * (n_equal + 1)) / (n_before + 1)


def count_in_earlier_values(values: Floats) -> tuple[Ints, Ints]:
    """Count for each value the greater and the equal values among earlier values.

    The values are divided into blocks with 1 value, then with 2 values, with 4 values, and so on.
    Blocks are numbered from 0. Every odd block is compared with the previous, even block. Over all
    block sizes, every pair of values is compared once. This takes O(B log^2 B) time for B values.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.monitor.martingale import count_in_earlier_values
        >>> n_greater, n_equal = count_in_earlier_values(np.array([2.0, 3.0, 2.0, 1.0]))
        >>> n_greater.tolist(), n_equal.tolist()
        ([0, 0, 1, 3], [0, 0, 1, 0])
    """
    n = len(values)
    n_greater = np.zeros(n, np.int64)
    n_equal = np.zeros(n, np.int64)
    _, rank = np.unique(values, return_inverse=True)
    rank = rank.astype(np.int64)
    index = np.arange(n)
    width = 1
    while width < n:
        pair_number = index // (2 * width)  # a pair has an even block and an odd block
        is_odd_block = (index // width) % 2 == 1
        # ``key`` sorts by pair, then by value. After this sort, one array holds all even blocks.
        # One search compares every odd block with the even block in the same pair.
        key = pair_number * n + rank
        even_keys = np.sort(key[~is_odd_block])
        odd_keys = key[is_odd_block]
        n_up_to = np.searchsorted(even_keys, odd_keys, "right")
        n_below = np.searchsorted(even_keys, odd_keys, "left")
        # If an odd block has values, the even blocks in this pair and in all earlier pairs are
        # full. Together these even blocks hold (pair_number + 1) * width values.
        n_greater[is_odd_block] += (pair_number[is_odd_block] + 1) * width - n_up_to
        n_equal[is_odd_block] += n_up_to - n_below
        width *= 2
    return n_greater, n_equal


N_SHUFFLES: Final = 999
"""Number of row shuffles. Rows count as sorted only if all shuffles have less order.

For exchangeable rows from any distribution this happens with probability 1/1000.
"""

MIN_DEVIATIONS: Final = 4.0
"""Rows count as sorted only if the order is this many standard deviations or more above chance.

Chance is the mean over the shuffles, and the standard deviation is over the shuffles, too. A normal
variable is so far above the mean with probability 3/100,000.
"""

MAX_ROWS_PER_HALF: Final = 4096
"""At most this many rows from each half are compared. The compared rows are evenly spaced."""

MIN_ROWS: Final = 20
"""Fewer rows than this number never count as sorted."""


def is_grouped(codes: Ints) -> bool:
    """Return whether equal codes (N,) are neighbours, as in a list of files by class.

    The excess is the number of equal neighbours, minus the mean number in shuffled rows. In both
    halves, the excess must be at least a tenth of the excess in sorted rows. So rows with a
    changing mix do not count as sorted. After a single sudden change at least one half has no
    order, and a slow drift makes only few neighbours equal.
    """

    def count_equal_neighbours(codes: Floats) -> float:
        return float(np.count_nonzero(codes[1:] == codes[:-1]))

    def count_equal_if_sorted(codes: Floats) -> float:
        return len(codes) - len(np.unique(codes))

    codes_as_floats = codes.astype(np.float64)
    return _is_sorted_in_halves(
        codes_as_floats,
        measure_order=count_equal_neighbours,
        measure_largest_order=count_equal_if_sorted,
        min_excess_share=0.1,
    )


def is_rising(values: Floats) -> bool:
    """Return whether neighbours among values (N,) have similar ranks, as in sorted values.

    The excess is the mean distance between neighbours in shuffled rows, minus the distance here. In
    both halves, the excess must be at least three quarters of the excess in sorted rows. If a first
    kind of rows is followed by a second kind, the excess is only half as large.
    """

    # minus the total distance between neighbours, so that more order gives a larger number
    def measure_nearness(rank: Floats) -> float:
        steps = np.diff(rank)
        return -float(np.abs(steps).sum())

    def measure_nearness_if_sorted(rank: Floats) -> float:
        return float(rank.min() - rank.max())

    _, rank = np.unique(values, return_inverse=True)
    ranks_as_floats = rank.astype(np.float64)
    return _is_sorted_in_halves(
        ranks_as_floats,
        measure_order=measure_nearness,
        measure_largest_order=measure_nearness_if_sorted,
        min_excess_share=0.75,
    )


def is_in_blocks(codes: Ints) -> bool:
    """Return whether the rows of every code (N,) form one block, and hardly by chance.

    Chance hardly explains this if exchangeable rows have a single block per code with a probability
    below 1e-6.
    """
    if not len(codes):
        return False
    _, sizes = np.unique(codes, return_counts=True)
    n_blocks = 1 + np.count_nonzero(codes[1:] != codes[:-1])
    if n_blocks != len(sizes):
        return False
    # Let n_k be the number of rows with code k. Of all N! orders, K! n_1! ... n_K! have a single
    # block for each of the K codes.
    log_n_orders_in_blocks = special.gammaln(len(sizes) + 1) + special.gammaln(sizes + 1).sum()
    log_n_orders = special.gammaln(len(codes) + 1)
    return bool(log_n_orders_in_blocks - log_n_orders < np.log(1e-6))


def _is_sorted_in_halves(
    values: Floats,
    *,
    measure_order: Callable[[Floats], float],
    measure_largest_order: Callable[[Floats], float],
    min_excess_share: float,
) -> bool:
    """Return whether values are sorted within both halves of the rows.

    1. The values must have more order than every shuffle of the values.
    2. In each half, the excess order over shuffles must be at least the share ``min_excess_share``
       of the largest possible excess.

    A shuffle moves values only within a half. So a difference between the two halves does not count
    as order.

    Args:
        values: Values (N,) in row order.
        measure_order: Maps the values in a half to a measure of order.
        measure_largest_order: Maps the values in a half to the largest possible measure.
        min_excess_share: Smallest share of the largest possible excess.
    """
    if len(values) < MIN_ROWS:
        return False
    rng = np.random.default_rng(0)
    halves = []
    for half in np.array_split(values, 2):
        step = math.ceil(len(half) / MAX_ROWS_PER_HALF)
        halves.append(half[::step])
    order_of_half = np.array([measure_order(half) for half in halves])  # (2,)
    total_order = order_of_half.sum()
    shuffled_order = np.empty((N_SHUFFLES, 2))  # one row per shuffle, one column per half
    for shuffle_number in range(N_SHUFFLES):
        shuffled_order[shuffle_number] = [measure_order(rng.permutation(half)) for half in halves]
        if shuffled_order[shuffle_number].sum() >= total_order:
            return False
    mean_shuffled_order = shuffled_order.mean(axis=0)
    excess = order_of_half - mean_shuffled_order
    largest_order_of_half = np.array([measure_largest_order(half) for half in halves])
    largest_excess = largest_order_of_half - mean_shuffled_order
    is_half_sorted = (excess > 0) & (excess >= min_excess_share * largest_excess)
    shuffled_total = shuffled_order.sum(axis=1)
    total_excess = total_order - shuffled_total.mean()
    is_clear = total_excess >= MIN_DEVIATIONS * shuffled_total.std()
    return bool(is_half_sorted.all() and is_clear)
