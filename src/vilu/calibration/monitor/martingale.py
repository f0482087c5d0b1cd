"""Conformal test martingales: p-values that are uniform while nothing changes, and bets on them.

They take rows in the order of arrival; ``grouped`` and ``rising`` tell rows that lie in another
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy import signal, special

from vilu.metrics.counts import Floats, Ints

SHAPES: Final = tuple(1.3**power for power in (-2, -1, 0, 1, 2, 3))
"""Of beta densities: both below 1 for more spread, both above 1 for less, unequal for a shift."""

BETAS: Final = tuple((a, b) for a in SHAPES for b in SHAPES if (a, b) != (1, 1))

HISTOGRAMS: Final = ((10, 50.0), (10, 150.0), (30, 50.0), (30, 150.0))
"""Cells of the bets that learn, and for how many p-values their uniform beginning counts."""

DECAY: Final = 1 - 1 / 400  # what is left of a learnt p-value one row later

SHARES: Final = np.repeat([0.5 / len(BETAS), 0.5 / len(HISTOGRAMS)], [len(BETAS), len(HISTOGRAMS)])
"""(K,) share of the wealth of every bet."""

EVERY: Final = 50  # rows between two starts
BLOCK: Final = 4096  # rows that are worked on at once
EPS: Final = 2.0**-53


def beta_bets(p: Floats) -> Floats:
    """(B, K') log densities of ``BETAS`` at p-values in (0, 1)."""
    a, b = np.array(BETAS).T
    powers = (a - 1) * np.log(p)[:, None] + (b - 1) * np.log1p(-p)[:, None]
    # normalised: only a density has mean 1 under uniform p-values, as a fair bet must
    log_density: Floats = powers - special.betaln(a, b)
    return log_density


@np.errstate(under="ignore")  # what is small beside the others is 0
def histogram_bets(p: Floats, counts: Floats, weight: float) -> tuple[Floats, Floats]:
    """A bet that learns: the density of the last few hundred p-values in m equal cells.

    It is drawn towards the uniform one, which counts for ``weight`` p-values:

        f_t(p) = m (weight/m + N_t[cell of p]) / (weight + sum N_t),

    where N_t counts the p-values before t and keeps ``DECAY`` of every count from row to row
    (plug-in martingale: Fedorova et al., ICML 2012). From p-values (B,) and N (m,) come log
    densities (B,), each before its p-value is learnt from, and N after the last.
    """
    m = len(counts)
    row = np.arange(len(p))
    cell = np.minimum((p * m).astype(np.int64), m - 1)
    is_in_cell = np.zeros((len(p), m))
    is_in_cell[row, cell] = 1
    after, _ = signal.lfilter([1.0], [1.0, -DECAY], is_in_cell, axis=0, zi=DECAY * counts[None])
    # The density of a row knows the rows before it alone. One that had learnt from its own p-value
    # would bet on what it has seen, and win while nothing changes.
    before = np.concatenate([counts[None], after[:-1]])
    density = m * (weight / m + before[row, cell]) / (weight + before.sum(axis=1))
    return np.log(density), after[-1]


def asleep(start: Floats) -> Floats:
    """(start + 2)^(-1/2): share of the wealth that sleeps on after start number 0, 1, 2 and so on.

    Before all it is 1.
    """
    return 1 / np.sqrt(start + 2)


@dataclass
class Martingale:
    """Wealth of all bets and all starts together.

    Bet j that started at row s has wealth prod f_j over the rows from s on. With L_t the sum of log
    f_j up to t, all starts of j together have exp(L_t) sum_s share_s exp(-L_{s-1}): two running
    sums in place of a number per start.
    """

    n: int = 0  # rows so far
    growth: Floats = field(default_factory=lambda: np.zeros(len(SHARES)))  # (K,) L_t
    # (K,) log sum_s share_s exp(-L_{s-1})
    started: Floats = field(default_factory=lambda: np.full(len(SHARES), -np.inf))
    # of each of ``HISTOGRAMS`` what it has learnt
    counts: list[Floats] = field(
        default_factory=lambda: [np.zeros(cells) for cells, _ in HISTOGRAMS]
    )

    def update(self, p: Floats) -> Floats:
        """(B,) log wealth after each of the next p-values.

        It does not depend on how they are divided into calls.
        """
        blocks = [self._update(p[start : start + BLOCK]) for start in range(0, len(p), BLOCK)]
        return np.concatenate(blocks) if blocks else np.empty(0)

    @np.errstate(under="ignore")  # what is small beside the others is 0
    def _update(self, p: Floats) -> Floats:
        p = np.clip(p, EPS, 1 - EPS)  # the ends have probability 0, but not in float64
        growth = np.cumsum(np.concatenate([self.growth[None], self._bets(p)]), axis=0)
        row = self.n + np.arange(len(p))
        # Each start takes a share of the wealth that still sleeps. One start at row 0 alone would
        # lose during a long calm, and a late shift would have to win all of that back first.
        start = (row // EVERY).astype(np.float64)
        share = np.where(start > 0, asleep(start - 1), 1.0) - asleep(start)
        with np.errstate(divide="ignore"):  # where nothing starts
            new = np.log(np.where(row % EVERY == 0, share, 0.0))[:, None] - growth[:-1]
        started = np.logaddexp.accumulate(np.concatenate([self.started[None], new]), axis=0)
        self.n = self.n + len(p)
        self.growth = growth[-1]
        self.started = started[-1]
        awake = special.logsumexp(growth[1:] + started[1:] + np.log(SHARES), axis=1)
        wealth: Floats = np.logaddexp(awake, np.log(asleep(start)))
        return wealth

    def _bets(self, p: Floats) -> Floats:
        """(B, K) log densities of all bets."""
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
    """Distinct values in rising order, and how many values are at most each."""

    values: Floats
    up_to: Ints

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n(self) -> int:
        """Values, repeated ones as often as they came."""
        return int(self.up_to[-1])

    @classmethod
    def of(cls, values: Floats, counts: Ints) -> SortedRun:
        """The run of values, in any order, that came so often each."""
        distinct, place = np.unique(values, return_inverse=True)
        return cls(distinct, np.cumsum(np.bincount(place, counts)).astype(np.int64))

    @classmethod
    def merged(cls, runs: Sequence[SortedRun]) -> SortedRun:
        """The run of all their values."""
        values = np.concatenate([run.values for run in runs])
        counts = np.concatenate([run.counts() for run in runs])
        return cls.of(values, counts)

    def counts(self) -> Ints:
        """How often each value came."""
        return np.diff(self.up_to, prepend=0)

    def compare(self, values: Floats) -> tuple[Ints, Ints]:
        """Per value how many of the run are greater, and how many equal."""
        padded = np.concatenate([[0], self.up_to])
        up_to = padded[np.searchsorted(self.values, values, "right")]
        below = padded[np.searchsorted(self.values, values, "left")]
        return self.n - up_to, up_to - below


@dataclass
class Reference:
    """All values so far, in sorted runs of falling length.

    A new one costs O(log^2 n), and repeats cost no memory.
    """

    runs: list[SortedRun] = field(default_factory=list)

    @classmethod
    def of(cls, values: Floats, counts: Ints | None = None) -> Reference:
        """What holds these values, each once or as often as ``counts`` says."""
        reference = cls()
        reference.add(values, counts)
        return reference

    @property
    def n(self) -> int:
        """Values so far."""
        return sum(run.n for run in self.runs)

    def add(self, values: Floats, counts: Ints | None = None) -> None:
        """Take values in, each once or as often as ``counts`` says."""
        if not len(values):
            return
        if counts is None:
            counts = np.ones(len(values), np.int64)
        run = SortedRun.of(values, counts)
        while self.runs and len(self.runs[-1]) <= len(run):
            run = SortedRun.merged([self.runs.pop(), run])
        self.runs.append(run)

    def table(self) -> tuple[Floats, Ints]:
        """Distinct values in rising order, and how often each came."""
        if not self.runs:
            return np.empty(0), np.empty(0, np.int64)
        every = SortedRun.merged(self.runs)
        return every.values, every.counts()

    def p_values(self, values: Floats, uniform: Floats) -> Floats:
        """(B,) p-values of new values (B,), taken in in their order.

        ``uniform`` (B,) in [0, 1) breaks ties.
        """
        greater, equal = earlier(values)
        for run in self.runs:
            more, same = run.compare(values)
            greater = greater + more
            equal = equal + same
        before = self.n + np.arange(len(values))
        self.add(values)
        # Ties are broken at random, and the row is compared with itself, too: else p-values of
        # tied scores are not uniform, and the bets win without any change (Vovk et al. 2005).
        return (greater + uniform * (equal + 1)) / (before + 1)


def earlier(values: Floats) -> tuple[Ints, Ints]:
    """Per value how many of those before it are greater, and how many equal, in O(B log^2 B).

    Blocks of 1, 2, 4, ... values: those of every odd block are looked up among those of the block
    before it.
    """
    n = len(values)
    greater = np.zeros(n, np.int64)
    equal = np.zeros(n, np.int64)
    rank = np.unique(values, return_inverse=True)[1].astype(np.int64)
    place = np.arange(n)
    width = 1
    while width < n:
        pair = place // (2 * width)
        odd = (place // width) % 2 == 1
        # one sorted array of all even blocks: the block is the leading part of the key
        key = pair * n + rank
        left = np.sort(key[~odd])
        asked = key[odd]
        up_to = np.searchsorted(left, asked, "right")
        below = np.searchsorted(left, asked, "left")
        # where an odd block has values, its even one is full
        greater[odd] += (pair[odd] + 1) * width - up_to
        equal[odd] += up_to - below
        width *= 2
    return greater, equal


# that must all be beaten, which exchangeable rows do with probability 1/1000, whatever they are
SHUFFLES: Final = 999
# standard deviations of the shuffles by which, too; of normal sums three in 100,000 are
CLEAR: Final = 4.0
SAMPLED: Final = 4096  # rows of a half that are looked at, evenly spaced
FEWEST: Final = 20  # rows below which no order is looked for


def grouped(codes: Ints) -> bool:
    """Whether equal codes (N,) lie together, as in a folder of classes.

    They do so in both halves a tenth as much as sorted ones. One change of the mix leaves a half
    without an order, and a slow drift moves neighbours little: such rows may have arrived so.
    """

    def together(codes: Floats) -> float:
        return float(np.count_nonzero(codes[1:] == codes[:-1]))

    def most_together(codes: Floats) -> float:
        return len(codes) - len(np.unique(codes))

    return _in_order(codes.astype(np.float64), together, most_together, 0.1)


def rising(values: Floats) -> bool:
    """Whether values (N,) lie near their neighbours in rank, as sorted ones do.

    They do so by three quarters of what is possible. Two kinds of rows, one after the other, reach
    a half of it.
    """

    def near(rank: Floats) -> float:
        return -float(np.abs(np.diff(rank)).sum())

    def nearest(rank: Floats) -> float:
        return float(rank.min() - rank.max())

    _, rank = np.unique(values, return_inverse=True)
    return _in_order(rank.astype(np.float64), near, nearest, 0.75)


def in_blocks(codes: Ints) -> bool:
    """Whether every code (N,) lies in one block, too rarely for exchangeable rows.

    To such rows it happens at most once in a million files.
    """
    if not len(codes):
        return False
    _, sizes = np.unique(codes, return_counts=True)
    n_blocks = 1 + np.count_nonzero(codes[1:] != codes[:-1])
    if n_blocks != len(sizes):
        return False
    # of all N! orders K! n_1! ... n_K! have one block for each of the K codes
    in_one_block = special.gammaln(len(sizes) + 1) + special.gammaln(sizes + 1).sum()
    return bool(in_one_block - special.gammaln(len(codes) + 1) < np.log(1e-6))


def _in_order(
    values: Floats, order: Callable[[Floats], float], most: Callable[[Floats], float], least: float
) -> bool:
    """Whether values have more order within their halves than every shuffle of them.

    And each half has a share ``least`` of the most that is possible. A shuffle leaves every value
    in its half, so that a change between the halves is no order.
    """
    if len(values) < FEWEST:
        return False
    rng = np.random.default_rng(0)
    halves = [half[:: -(-len(half) // SAMPLED)] for half in np.array_split(values, 2)]
    present = np.array([order(half) for half in halves])
    shuffled = np.empty((SHUFFLES, 2))
    for number in range(SHUFFLES):
        shuffled[number] = [order(rng.permutation(half)) for half in halves]
        if shuffled[number].sum() >= present.sum():
            return False
    mean = shuffled.mean(axis=0)
    total = shuffled.sum(axis=1)
    possible = np.array([most(half) for half in halves]) - mean
    is_much = (present > mean) & (present - mean >= least * possible)
    is_clear = present.sum() - total.mean() >= CLEAR * total.std()
    return bool(is_much.all() and is_clear)
