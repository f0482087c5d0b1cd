"""Tests of "the error rate at a threshold is above max_risk", to compare in ``procedures``.

Each test gets the labels in draw order, and returns the laxest certified threshold. Thresholds are
tested as in ``vilu.calibration.anytime.ThresholdTests``: from strict to lax, in sequences from
``starts``, each sequence with a share of the level. A certified limit passes the share
``handed_on`` of the level to the next predictor.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

from vilu.calibration.anytime import (
    BETS_WITH_SHARES,
    N_THRESHOLDS_UP_TO_LIMIT,
    ThresholdTests,
    log_evidence,
)
from vilu.metrics.counts import Floats, Ints

Starts = tuple[tuple[int, float], ...]

ROUNDING: Final = 1 + 1e-9
"""A tail may exceed the level by this factor, because float64 sums are rounded."""


def index_of_laxest_certified_threshold(
    looks: ThresholdTests, starts: Starts, handed_on: float, rejects: Callable[[int, float], bool]
) -> int | None:
    """Return the index of the laxest threshold that sequences from ``starts`` reach, or None.

    ``rejects(index, level)`` is true if the labels reject, at this level, the hypothesis "the error
    rate at this threshold is above the risk".
    """
    share_at_start = dict(starts)
    level = 0.0
    reached = None
    for index in range(looks.last_tested_index + 1):
        number = index + 1
        level += looks.delta * share_at_start.get(number, 0.0)
        if level > 0 and rejects(index, level):
            reached = index
            if number == N_THRESHOLDS_UP_TO_LIMIT:
                level -= handed_on * looks.delta
        else:
            level = 0.0
    return reached


@dataclass(frozen=True)
class RiskTest(ABC):
    """A test for a threshold grid, and the probability that each photo is drawn."""

    starts: Starts
    handed_on: float

    @abstractmethod
    def certified_index(
        self, looks: ThresholdTests, uncertainty: Floats, failure: Ints
    ) -> int | None:
        """Return the index of the laxest threshold certified by the labels (N,), in draw order."""

    def draw_probability(self, uncertainty: Floats, planned_limit: float) -> Floats:  # noqa: ARG002 - a test may weight its draws
        """Return the probability (N,) that photos up to the limit are drawn: 1, unless weighted."""
        return np.ones(len(uncertainty))


@dataclass(frozen=True)
class Bets(RiskTest):
    """Bets, valid with a look after every label (``anytime.log_evidence``)."""

    def certified_index(
        self, looks: ThresholdTests, uncertainty: Floats, failure: Ints
    ) -> int | None:
        """Test like ``ThresholdTests.index_of_laxest_certified_threshold``, with given starts."""
        wrong, accepted = looks.count_wrong_and_accepted(uncertainty, failure)
        evidence = log_evidence(wrong, accepted, looks.max_risk)

        def rejects(index: int, level: float) -> bool:
            return bool(evidence[index] >= -math.log(level))

        return index_of_laxest_certified_threshold(looks, self.starts, self.handed_on, rejects)


@dataclass(frozen=True)
class PlannedLooks(RiskTest):
    """Exact binomial tests at a few label counts, with a shared level (group-sequential).

    Look number j (from 0) comes after n_j labels for photos up to the planned limit. All n_j, and
    the level spent until each look, are known before a label is read:

    - n_0 is the smallest count of right answers with which the first look certifies the limit.
    - n_j is ``growth`` times n_(j-1).
    - Until look j the share 1 - (1 - ``first_share``) ``decay``^j of the level is spent, and until
      the last look the whole level.

    At a stricter threshold the same looks have fewer labels: the labels of the accepted photos.
    """

    growth: float
    first_share: float
    decay: float
    n_looks: int

    def numbers(self, looks: ThresholdTests) -> list[int]:
        """Return the label counts n_j before the looks."""
        share_of_limit = dict(self.starts)[N_THRESHOLDS_UP_TO_LIMIT]
        first_level = looks.delta * share_of_limit * self.first_share
        first = math.ceil(math.log(first_level) / math.log1p(-looks.max_risk))
        numbers = [first]
        while len(numbers) < self.n_looks:
            next_number = math.ceil(numbers[-1] * self.growth)
            numbers.append(next_number)
        return numbers

    def spent(self) -> Floats:
        """Return the share (J,) of the level spent until every look."""
        left: Floats = (1 - self.first_share) * self.decay ** np.arange(self.n_looks, dtype=float)
        left[-1] = 0.0
        return 1 - left

    def certified_index(
        self, looks: ThresholdTests, uncertainty: Floats, failure: Ints
    ) -> int | None:
        """Return the index of the laxest threshold certified by any look so far."""
        # A look ends at a fixed position in the label order, for every present limit.
        is_below_planned = uncertainty <= looks.grid[N_THRESHOLDS_UP_TO_LIMIT - 1]
        n_below = np.cumsum(is_below_planned)
        planned_numbers = self.numbers(looks)
        ends = np.searchsorted(n_below, planned_numbers)
        ends = ends[ends < len(uncertainty)]
        if not len(ends):
            return None
        spent = self.spent()

        def rejects(index: int, level: float) -> bool:
            is_accepted = uncertainty <= looks.grid[index]
            accepted = np.cumsum(is_accepted)[ends]
            wrong = np.cumsum(is_accepted & (failure == 1))[ends]
            levels = level * spent[: len(ends)]
            bounds = boundaries(tuple(accepted.tolist()), tuple(levels), looks.max_risk)
            is_few_wrong = wrong <= np.array(bounds)
            return bool(is_few_wrong.any())

        return index_of_laxest_certified_threshold(looks, self.starts, self.handed_on, rejects)


@functools.lru_cache(maxsize=100_000)
def boundaries(
    n_accepted: tuple[int, ...], levels: tuple[float, ...], max_risk: float
) -> tuple[int, ...]:
    """Return the most wrong answers with which each look certifies, -1 if a look never certifies.

    If every answer is wrong with probability ``max_risk``, look j or an earlier look certifies with
    probability at most ``levels[j]``. If answers are wrong more often, looks certify less often,
    because a further wrong answer never helps to certify.

    Args:
        n_accepted: Labels at each look, ascending.
        levels: Level spent until each look, ascending.
        max_risk: Largest allowed error rate.
    """
    # alive[k]: probability that k answers are wrong so far and no look has certified
    alive = np.ones(1)
    spent = 0.0
    n_before = 0
    bounds = []
    for n, level in zip(n_accepted, levels, strict=True):
        n_new = n - n_before
        n_before = n
        alive = np.convolve(alive, wrong_among(n_new, max_risk))
        spent_up_to = spent + np.cumsum(alive)
        bound = int(np.searchsorted(spent_up_to, level * ROUNDING, side="right")) - 1
        if bound >= 0:
            spent = float(spent_up_to[bound])
            alive[: bound + 1] = 0.0
        bounds.append(bound)
    return tuple(bounds)


@functools.lru_cache(maxsize=10_000)
def wrong_among(n: int, rate: float) -> Floats:
    """Return the probabilities (n + 1,) of 0 to n wrong answers among n."""
    n_wrong = np.arange(n + 1)
    probabilities: Floats = stats.binom.pmf(n_wrong, n, rate)
    return probabilities


@dataclass(frozen=True)
class WeightedBets(RiskTest):
    """Draws with a probability rising with predicted risk, and bets on weighted failures.

    A photo with uncertainty u is drawn with probability q = √(u / planned limit), at least
    ``floor`` and at most 1. A drawn photo has the weight w = 1 / q. A bet b in (0, 1] multiplies
    the wealth by

        1 - λ w (wrong - r),    λ = b / ((1 - r) max w),    max w = 1 / floor,

    and a photo that is not drawn does not change the wealth. So the mean factor is 1 - λ
    (R(t) - r). This factor is at most 1 if R(t) >= r, and no factor is negative.

    Source: Xu et al., Active, anytime-valid risk controlling prediction sets, NeurIPS 2024.
    """

    floor: float

    def draw_probability(self, uncertainty: Floats, planned_limit: float) -> Floats:
        """Return the probability (N,) that photos up to the limit are drawn."""
        relative_risk = np.maximum(uncertainty, 0) / max(planned_limit, 1e-12)
        root_of_risk = np.sqrt(relative_risk)
        probability: Floats = np.clip(root_of_risk, self.floor, 1.0)
        return probability

    def log_factors(self, probability: Floats, failure: Ints, max_risk: float) -> Floats:
        """Return log factors (N, B), by which each drawn photo multiplies each bet's wealth."""
        bet, _ = np.array(BETS_WITH_SHARES).T
        excess = (failure - max_risk) / (1 - max_risk)
        share_of_largest_weight = self.floor / probability
        losses = np.outer(share_of_largest_weight * excess, bet)
        factors: Floats = np.log1p(-losses)
        return factors

    def certified_index(
        self, looks: ThresholdTests, uncertainty: Floats, failure: Ints
    ) -> int | None:
        """Return the index of the laxest threshold certified by the weighted labels (N,)."""
        _, share = np.array(BETS_WITH_SHARES).T
        probability = self.draw_probability(uncertainty, looks.grid[N_THRESHOLDS_UP_TO_LIMIT - 1])
        factors = self.log_factors(probability, failure, looks.max_risk)
        is_accepted = uncertainty <= looks.grid[:, None]  # (G, N)
        log_wealth = is_accepted @ factors + np.log(share)
        evidence = np.logaddexp.reduce(log_wealth, axis=1)

        def rejects(index: int, level: float) -> bool:
            return bool(evidence[index] >= -math.log(level))

        return index_of_laxest_certified_threshold(looks, self.starts, self.handed_on, rejects)


@dataclass(frozen=True)
class ExactLook(RiskTest):
    """The exact binomial test, valid for a single look only."""

    def certified_index(
        self, looks: ThresholdTests, uncertainty: Floats, failure: Ints
    ) -> int | None:
        """Return the index of the laxest threshold certified by the labels (N,) at one look."""
        wrong, accepted = looks.count_wrong_and_accepted(uncertainty, failure)
        tail = stats.binom.cdf(wrong, accepted, looks.max_risk)

        def rejects(index: int, level: float) -> bool:
            return bool(tail[index] <= level)

        return index_of_laxest_certified_threshold(looks, self.starts, self.handed_on, rejects)
