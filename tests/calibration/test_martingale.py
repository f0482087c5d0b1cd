"""Test that bets integrate to one, and their wealth against the sum that defines it."""

from __future__ import annotations

import copy
from math import lcm

import numpy as np
import pytest
from scipy import stats

from vilu.calibration.monitor.martingale import (
    BETA_PARAMETERS,
    COUNT_DECAY,
    HISTOGRAM_SETTINGS,
    ROWS_PER_START,
    WEALTH_SHARES,
    Martingale,
    beta_log_densities,
    histogram_log_densities,
    unused_wealth_share,
)


def nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights for an integral over [0, 1] that is exact for the bets, up to
    rounding.

    The bets are smooth within the histograms' cells. At each end they have an integrable pole,
    which the substitution p = c s^8 removes.
    """
    cells = lcm(*(cells for cells, _ in HISTOGRAM_SETTINGS))
    x, w = np.polynomial.legendre.leggauss(24)
    s, w = (x + 1) / 2, w / 2
    low = (s**8 / cells, w * 8 * s**7 / cells)
    inner = [((i + s) / cells, w / cells) for i in range(1, cells - 1)]
    p = np.concatenate(
        [low[0], *(points for points, _ in inner), np.minimum(1 - low[0], 1 - 2.0**-53)]
    )
    return p, np.concatenate([low[1], *(weights for _, weights in inner), low[1]])


def test_every_beta_bet_integrates_to_one() -> None:
    p, weights = nodes()
    assert (weights @ np.exp(beta_log_densities(p))).tolist() == pytest.approx(
        [1] * len(BETA_PARAMETERS), abs=1e-9
    )
    assert np.allclose(
        np.exp(beta_log_densities(np.array([0.3])))[0],
        [stats.beta(a, b).pdf(0.3) for a, b in BETA_PARAMETERS],
    )


def test_every_histogram_bet_integrates_to_one_whatever_it_has_learnt() -> None:
    rng = np.random.default_rng(0)
    for cells, weight in HISTOGRAM_SETTINGS:
        counts = rng.random(cells) * 40
        middles = (np.arange(cells) + 0.5) / cells
        density = [
            np.exp(histogram_log_densities(np.array([p]), counts, weight)[0][0]) for p in middles
        ]
        assert np.mean(density) == pytest.approx(1, abs=1e-12)


def test_a_histogram_learns_after_it_has_bet() -> None:
    """Three p-values are worked by hand, with two cells and a prior weight of 2.

    Cell 0 starts with one count.
    """
    bets, counts = histogram_log_densities(np.array([0.1, 0.9, 1.0]), np.array([1.0, 0.0]), 2.0)
    a = COUNT_DECAY + 1  # cell 0 after the first row
    by_hand = [2 * 2 / 3, 2 * 1 / (2 + a), 2 * 2 / (2 + a * COUNT_DECAY + 1)]
    assert np.exp(bets).tolist() == pytest.approx(by_hand, abs=1e-12)
    assert counts.tolist() == pytest.approx([a * COUNT_DECAY**2, COUNT_DECAY + 1], abs=1e-12)


def test_shares_of_bets_and_of_starts_sum_to_one() -> None:
    assert WEALTH_SHARES.sum() == pytest.approx(1, abs=1e-12)
    starts = np.arange(1000.0)
    awakened = np.concatenate(
        [[1 - unused_wealth_share(np.array([0.0]))[0]], -np.diff(unused_wealth_share(starts))]
    )
    assert (awakened > 0).all()
    assert awakened.sum() + unused_wealth_share(starts)[-1] == pytest.approx(1, abs=1e-12)


def test_wealth_is_the_sum_over_bets_and_starts() -> None:
    n = 3 * ROWS_PER_START + 7
    p = np.random.default_rng(1).beta(1, 1.5, n)
    bets = [beta_log_densities(p)]
    for cells, weight in HISTOGRAM_SETTINGS:
        counts, column = np.zeros(cells), []
        for value in p:
            before = counts[min(int(value * cells), cells - 1)]
            column.append(np.log(cells * (weight / cells + before) / (weight + counts.sum())))
            counts = counts * COUNT_DECAY
            counts[min(int(value * cells), cells - 1)] += 1
        bets.append(np.array(column)[:, None])
    density = np.exp(np.concatenate(bets, axis=1))
    share = [1 - 2**-0.5, 2**-0.5 - 3**-0.5, 3**-0.5 - 4**-0.5, 4**-0.5 - 5**-0.5]
    expected = []
    for t in range(n):
        started = range(0, t + 1, ROWS_PER_START)
        wealth = sum(
            share[s // ROWS_PER_START] * (WEALTH_SHARES @ density[s : t + 1].prod(axis=0))
            for s in started
        )
        expected.append(wealth + 1 - sum(share[: len(started)]))
    assert np.exp(Martingale().update(p)).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("before", [0, 1, ROWS_PER_START - 1, ROWS_PER_START, 333])
def test_the_mean_of_the_next_wealth_is_the_wealth(before: int) -> None:
    """After any past, the expected wealth after the next p-value must be the wealth now.

    The expectation is an exact integral.
    """
    martingale = Martingale()
    wealth = (
        np.exp(martingale.update(np.random.default_rng(before).beta(0.8, 1.2, before))[-1])
        if before
        else 1.0
    )
    p, weights = nodes()
    after = [np.exp(copy.deepcopy(martingale).update(np.array([value]))[0]) for value in p]
    assert weights @ after == pytest.approx(wealth, rel=1e-8)


def test_batches_do_not_matter_and_the_ends_are_finite() -> None:
    p = np.random.default_rng(3).random(9000)
    p[[5, 70]] = 0.0, 1.0
    whole = Martingale().update(p)
    assert np.isfinite(whole).all()
    for size in (1000, 4096, 8999):
        martingale = Martingale()
        parts = np.concatenate([martingale.update(p[i : i + size]) for i in range(0, len(p), size)])
        assert np.array_equal(parts, whole)
    assert len(Martingale().update(p[:0])) == 0


@pytest.mark.parametrize(("a", "b"), [(1, 1.6), (1.6, 1), (2, 2), (0.5, 0.5)])
def test_a_late_change_of_any_kind_is_seen_soon(a: float, b: float) -> None:
    """After 20,000 uniform p-values, a change must be seen within 300 more.

    The changes are a shift up, a shift down, less spread and more spread.
    """
    rng = np.random.default_rng(4)
    p = np.concatenate([rng.random(20_000), rng.beta(a, b, 300)])
    wealth = Martingale().update(p)
    assert wealth[:20_000].max() < np.log(50)
    assert wealth[20_000:].max() > np.log(50)
