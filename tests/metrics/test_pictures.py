"""Test intervals where several rows show one picture."""

from __future__ import annotations

import numpy as np
import pytest

from vilu.metrics import bootstrap_interval, paired_bootstrap
from vilu.metrics.bootstrap import MAX_GROUPS, bootstrap_intervals
from vilu.metrics.catalog import METRICS

# AURC averages over the orders of equal scores, so repeats change its value
SHARES = (
    "auroc",
    "fpr95",
    "augrc",
    "coverage_at_risk_0.05",
    "brier",
    "log_loss",
    "ece",
    "ece_mass",
)
KERNELS = {name: METRICS[name].kernel for name in SHARES}


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    failure = rng.random(n) < 0.2
    score = np.clip(0.3 + 0.3 * failure + 0.15 * rng.normal(size=n), 0, 1)
    return score, failure.astype(np.int64)


@pytest.mark.parametrize("n", [300, MAX_GROUPS + 500])
@pytest.mark.parametrize("times", [2, 20])
def test_a_set_that_stands_several_times_has_its_interval(n: int, times: int) -> None:
    u, f = sample(n)
    once = bootstrap_intervals(KERNELS, u, f, n_resamples=100)
    several = bootstrap_intervals(
        KERNELS,
        np.tile(u, times),
        np.tile(f, times),
        n_resamples=100,
        picture=np.tile(np.arange(n), times),
    )
    for name in SHARES:  # the draws are the same, but the sums round in another way
        assert several[name] == pytest.approx(once[name], abs=1e-12), name


def test_pictures_of_their_own_change_nothing() -> None:
    u, f = sample(400)
    plain = bootstrap_intervals(KERNELS, u, f, n_resamples=100)
    for picture in (np.arange(400)[::-1], np.full(400, -1)):
        assert bootstrap_intervals(KERNELS, u, f, n_resamples=100, picture=picture) == plain


def test_a_comparison_of_repeated_rows_is_that_of_the_rows() -> None:
    (a, f), (b, _) = sample(300), sample(300, seed=1)
    b = (a + b) / 2
    once = paired_bootstrap("auroc", a, b, f, n_resamples=200)
    rows = [np.tile(values, 5) for values in (a, b, f)]
    several = paired_bootstrap("auroc", *rows, n_resamples=200, picture=np.tile(np.arange(300), 5))
    assert several == pytest.approx(once, abs=1e-12)
    wrong = paired_bootstrap("auroc", *rows, n_resamples=200)
    assert wrong.ci_high - wrong.ci_low < 0.6 * (once.ci_high - once.ci_low)


@pytest.mark.parametrize("n", [200, MAX_GROUPS + 500])
def test_answers_about_one_picture_are_drawn_together(n: int) -> None:
    """By hand: the Brier interval over pairs is about the interval over picture means.

    Half the pictures have right and wrong answers, so no stratum fixes the number of wrong ones.
    """
    rng = np.random.default_rng(0)
    score = rng.random((n, 2)).round(3)
    failure = np.stack([np.arange(n) % 4 == 0, np.arange(n) % 2 == 0], axis=1).astype(np.int64)
    picture = np.repeat(np.arange(n), 2)
    found = bootstrap_interval(
        "brier", score.ravel(), failure.ravel(), n_resamples=2000, picture=picture
    )
    means = ((score - failure) ** 2).mean(axis=1)
    kinds = [failure.sum(axis=1) == number for number in range(3)]
    variance = sum(means[kind].var() * kind.sum() for kind in kinds) / n**2
    assert found.value == pytest.approx(means.mean())
    # with 2,000 resamples, a 2.5 % quantile has a standard error of 6 % at each end
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.15)
