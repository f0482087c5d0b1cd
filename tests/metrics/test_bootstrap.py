from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from vilu.errors import DataError, UsageError
from vilu.metrics import METRICS, auroc, bootstrap_interval, fpr_at_tpr, paired_bootstrap
from vilu.metrics.bootstrap import (
    MAX_RESAMPLED_CELLS,
    SortedScores,
    bootstrap_intervals,
    draw_resamples,
    intervals_of,
)
from vilu.metrics.counts import check_scores_and_failures
from vilu.metrics.histogram import Histogram
from vilu.metrics.ranking import fpr_at_tpr_kernel
from vilu.metrics.selective import _harmonic
from vilu.progress import SilentProgress, reporting


def sample(n: int = 400, seed: int = 0, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    failure = (rng.random(n) < 0.3).astype(int)
    return rng.normal(size=n) + shift * failure, failure


def test_value_and_interval() -> None:
    u, f = sample()
    value, low, high = bootstrap_interval("auroc", u, f)
    assert value == auroc(u, f)
    assert low < value < high


def test_the_spread_is_that_of_the_asymptotic_theory() -> None:
    """The placement values give an independent standard error for AUROC (DeLong et al. 1988).

    A standard deviation from B = 2000 resamples is within 1 / sqrt(2 B) = 1.6 % of its limit. Four
    times that is 6 %. The two estimates themselves differ by order 1 / n, which is below 2 % at n
    = 400.
    """
    u, f = sample()
    correct, wrong = u[f == 0], u[f == 1]
    wins = (wrong[:, None] > correct).astype(float)
    analytic = math.sqrt(
        wins.mean(1).var(ddof=1) / len(wrong) + wins.mean(0).var(ddof=1) / len(correct)
    )
    _, low, high = bootstrap_interval("auroc", u, f, n_resamples=2000, confidence=0.6827)
    assert (high - low) / 2 == pytest.approx(analytic, rel=0.08)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    u, f = sample()
    first = bootstrap_interval("aurc", u, f, seed=3)
    assert bootstrap_interval("aurc", u, f, seed=3) == first
    assert bootstrap_interval("aurc", u, f, seed=4) != first


def test_rows_may_come_in_any_order_up_to_resampling_noise() -> None:
    u, f = sample()
    order = np.random.default_rng(1).permutation(len(u))
    a, b = bootstrap_interval("auroc", u, f), bootstrap_interval("auroc", u[order], f[order])
    assert a.value == b.value
    # The standard error of a 2.5 % quantile from 1000 resamples is about 0.084 standard
    # deviations. Five such errors are allowed.
    assert a.ci_low == pytest.approx(
        b.ci_low, abs=0.42 * (a.ci_high - a.ci_low) / 3.92 * math.sqrt(2)
    )


def test_more_confidence_is_a_wider_interval() -> None:
    u, f = sample()
    _, low, high = bootstrap_interval("auroc", u, f, confidence=0.5)
    _, lower, higher = bootstrap_interval("auroc", u, f, confidence=0.99)
    assert lower < low < high < higher


def test_several_metrics_share_their_resamples() -> None:
    u, f = sample()
    kernels = {name: METRICS[name].kernel for name in ("auroc", "augrc", "fpr95")}
    together = bootstrap_intervals(kernels, u, f)
    assert together == {name: bootstrap_interval(name, u, f) for name in kernels}
    # with fixed accuracy, AUGRC is a decreasing linear function of AUROC in every resample
    r = f.mean()
    ends = [
        (1 - x) * r * (1 - r) + r**2 / 2
        for x in (together["auroc"].ci_high, together["auroc"].ci_low)
    ]
    assert together["augrc"][1:] == pytest.approx(ends, abs=1e-12)


def test_a_kernel_with_other_choices() -> None:
    u, f = sample()
    kernel = partial(fpr_at_tpr_kernel, level=0.8, positive="failure", rule="first")
    value, low, high = bootstrap_interval(kernel, u, f)
    assert value == fpr_at_tpr(u, f, 0.8, "failure", "first")
    assert low <= value <= high


def test_resamples_are_stratified_complete_and_bounded_in_memory() -> None:
    u, f = sample(10_000)
    scores = SortedScores(*check_scores_and_failures(u, f))
    blocks = list(draw_resamples(scores, 100, 0))
    assert sum(len(correct) for correct, _ in blocks) == 100
    assert all(correct.size + wrong.size <= MAX_RESAMPLED_CELLS for correct, wrong in blocks)
    assert all((f[correct] == 0).all() and (f[wrong] == 1).all() for correct, wrong in blocks)
    assert blocks[0][1].shape[1] == f.sum()
    counts = scores.counts(*blocks[0])
    assert (counts.n_wrong == f.sum()).all()
    assert (counts.n == len(f)).all()


def test_every_row_is_drawn_about_equally_often() -> None:
    u, f = sample(200)
    scores = SortedScores(*check_scores_and_failures(u, f))
    drawn = np.concatenate(
        [np.concatenate(rows, axis=1).ravel() for rows in draw_resamples(scores, 2000, 0)]
    )
    times = np.bincount(drawn, minlength=200)
    # each count is Poisson with mean 2000, and five standard deviations are allowed
    assert abs(times - 2000).max() < 5 * math.sqrt(2000)


@pytest.mark.parametrize("failure", [0, 1])
def test_one_class_has_no_interval_where_the_metric_is_undefined(failure: int) -> None:
    u = [0.1, 0.5, 0.7]
    assert all(math.isnan(x) for x in bootstrap_interval("auroc", u, [failure] * 3))
    assert bootstrap_interval("aurc", u, [failure] * 3) == pytest.approx((failure,) * 3)
    assert all(math.isnan(x) for x in paired_bootstrap("auroc", u, u, [failure] * 3))


@pytest.mark.parametrize("best", ["lowest", "highest"])
def test_intervals_of_many_scores_stay_within_what_a_metric_can_be(best: str) -> None:
    """The scores have a perfect order or the worst one.

    Every metric named here is a share, or an area within a unit square.
    """
    failure = np.arange(20_000) >= 19_994
    uncertainty = np.arange(20_000.0) * (1 if best == "highest" else -1)
    names = (
        "auroc",
        "fpr95",
        "fpr95_failure",
        "aupr_failure",
        "aupr_success",
        "aurc",
        "excess_aurc",
        "augrc",
    )
    found = bootstrap_intervals(
        {name: METRICS[name].kernel for name in names}, uncertainty, failure, n_resamples=50
    )
    for name, (value, low, high) in found.items():
        assert 0 <= low <= value <= high <= 1, name
    assert (found["aupr_failure"].value == 1) == (best == "highest")


def test_an_interval_of_many_scores_and_few_failures_reaches_to_both_sides() -> None:
    """A group with 122 rows holds most of the 200 failures.

    So the ends move by more than the resamples spread.
    """
    rng = np.random.default_rng(0)
    failure = np.arange(1_000_000) < 200
    uncertainty = rng.normal(size=len(failure)) + 4.5 * failure
    kernels = {"aupr_failure": METRICS["aupr_failure"].kernel}
    value, low, high = bootstrap_intervals(kernels, uncertainty, failure, n_resamples=100)[
        "aupr_failure"
    ]
    assert 0.5 < (high - value) / (value - low) < 2


def test_many_rows_with_few_distinct_scores_are_not_drawn_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The counts of distinct scores are drawn instead.

    So the time does not grow with the rows. test_histogram checks that the distribution is the
    same.
    """
    monkeypatch.delattr("vilu.metrics.bootstrap.draw_resamples")
    u, f = sample(10_000)
    value, low, high = bootstrap_interval("auroc", u.round(1), f, n_resamples=50)
    assert low < value == auroc(u.round(1), f) < high


def test_paired_difference_of_equal_rankings_is_nothing() -> None:
    u, f = sample()
    assert paired_bootstrap("fpr95", u, np.exp(u), f) == (0.0, 0.0, 0.0, 1.0)


def test_paired_difference_is_antisymmetric() -> None:
    u, f = sample()
    v = u + np.random.default_rng(5).normal(size=len(u))
    forth, back = paired_bootstrap("auroc", u, v, f), paired_bootstrap("auroc", v, u, f)
    assert forth.difference == pytest.approx(auroc(u, f) - auroc(v, f), abs=1e-15)
    assert (forth.difference, forth.ci_low, forth.ci_high) == pytest.approx(
        (-back.difference, -back.ci_high, -back.ci_low), abs=1e-12
    )
    assert forth.p_value == back.p_value


def test_pairing_narrows_the_interval() -> None:
    """Two scores share their noise, so their difference varies less than with independent noise."""
    u, f = sample()
    v = u + 0.1 * np.random.default_rng(5).normal(size=len(u))
    _, low, high, _ = paired_bootstrap("auroc", u, v, f)
    alone = bootstrap_interval("auroc", u, f)
    assert high - low < 0.5 * (alone.ci_high - alone.ci_low)


def test_a_clear_difference_has_the_smallest_p_value_there_is() -> None:
    u, f = sample()
    noise = np.random.default_rng(5).normal(size=len(u))
    difference, low, high, p_value = paired_bootstrap(
        "auroc", f + 0.01 * noise, noise, f, n_resamples=499
    )
    assert 0 < low < difference < high
    assert p_value == pytest.approx(2 / 500)


def test_p_values_without_a_difference_are_rarely_small() -> None:
    """With 300 pairs of equally good scores, p < 0.1 must occur in a share near 0.1.

    Four binomial standard errors are 0.07. The percentile bootstrap is a little liberal on 150
    rows, so the lower side is the looser one.
    """
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(300):
        f = np.repeat([0, 1], [100, 50])
        shared = rng.normal(size=150) + f
        a, b = (shared + rng.normal(size=150) for _ in range(2))
        small += paired_bootstrap("auroc", a, b, f, n_resamples=199).p_value < 0.1
    assert 0.03 < small / 300 < 0.17


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_resamples": 0}, "n_resamples must be at least 1. Got 0"),
        ({"confidence": 95}, r"confidence must be in \(0, 1\). Got 95"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    u, f = sample(20)
    with pytest.raises(UsageError, match=message):
        bootstrap_interval("auroc", u, f, **settings)
    with pytest.raises(UsageError, match=message):
        paired_bootstrap("auroc", u, u, f, **settings)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'aurocc'\. Did you mean 'auroc'"):
        bootstrap_interval("aurocc", [1, 2], [0, 1])
    with pytest.raises(UsageError, match=r"no metric is called 'zzz'\. There are: auroc, fpr95"):
        bootstrap_interval("zzz", [1, 2], [0, 1])


@pytest.mark.parametrize(
    "metric", [name for name, metric in METRICS.items() if metric.of_probability]
)
def test_metrics_of_probabilities_refuse_other_scores(metric: str) -> None:
    good, bad, failure = [0.1, 0.9] * 10, [0.1, 1.5] * 10, [0, 1] * 10
    message = r"a failure probability must be in \[0, 1\]\. Got values from 0\.1 to 1\.5"
    with pytest.raises(DataError, match=message):
        bootstrap_interval(metric, bad, failure)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(DataError, match=message):
            paired_bootstrap(metric, *pair, failure)
    assert bootstrap_interval(metric, good, failure, n_resamples=10).value >= 0
    assert paired_bootstrap(metric, good, good, failure, n_resamples=10).difference == 0


def test_paired_scores_must_be_of_one_length() -> None:
    with pytest.raises(DataError, match="Got 3 and 2"):
        paired_bootstrap("auroc", [1, 2], [1, 2, 3], [0, 1])


def test_long_work_says_how_far_it_is() -> None:
    steps: list[float] = []

    class Watcher(SilentProgress):
        def advance(self, done: float, note: str = "") -> None:
            steps.append(done)

    u, f = sample(3000)
    with reporting(Watcher()):
        bootstrap_interval("auroc", u, f, n_resamples=500)
        intervals_of(
            Histogram.of(u, f),
            {"auroc": METRICS["auroc"].kernel},
            n_resamples=500,
            confidence=0.9,
            seed=0,
        )
        paired_bootstrap("auroc", u, -u, f, n_resamples=500)
    assert sum(steps) == 1500
    assert len(steps) >= 10  # not all at once at the end


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**21 - 1, 2**21, 2**21 + 5])
def test_harmonic_numbers_by_their_sum(n: int) -> None:
    ranks = np.array([n, n - 1, 7])
    exact = math.fsum(1 / i for i in range(1, n + 1))
    assert _harmonic(ranks) == pytest.approx([exact, exact - 1 / n, 363 / 140], abs=1e-13)
