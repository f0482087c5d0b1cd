"""Test histograms of scores.

They are exact while the bins suffice, do not depend on the order of merging, and stay close to
exact beyond that.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import same_histogram
from vilu.errors import DataError, UsageError
from vilu.metrics import METRICS, bootstrap
from vilu.metrics.bootstrap import bootstrap_intervals, intervals_from_counts, intervals_of
from vilu.metrics.counts import tie_counts
from vilu.metrics.histogram import Histogram, codes_of_scores, scores_of_codes

KERNELS = {name: metric.kernel for name, metric in METRICS.items()}
EDGES = [
    0.0,
    1.0,
    0.5,
    np.nextafter(0.5, 1),
    np.nextafter(1, 0),
    np.nextafter(1, 2),
    2.0**-512,
    -(2.0**-512),
]
EDGES += [1e308, -1e308, np.finfo(float).max, -np.finfo(float).max]
scores = st.one_of(
    st.sampled_from(EDGES),
    st.floats(0, 1).map(lambda x: x if x >= 2.0**-512 else 0.0),
    st.floats(-300, 0).map(lambda x: 1 - 10.0**x),
    st.floats(-1e300, 1e300).map(lambda x: x if abs(x) >= 2.0**-512 else 0.0),
)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def made(name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of one kind, and failures that the scores partly predict."""
    rng = np.random.default_rng(seed)
    failure = rng.random(n) < 0.3
    kinds = {
        "near zero": lambda: 1 - rng.beta(8, 1, n) ** np.where(failure, 1, 0.02),
        "both ends": lambda: logistic(rng.normal(size=n) * 10 + np.where(failure, 12, -6)),
        "near one": lambda: logistic(rng.normal(size=n) * 3 + np.where(failure, 22, 20)),
        "entropy": lambda: np.abs(rng.normal(size=n)) * np.where(failure, 2, 1),
        "energy": lambda: rng.normal(size=n) * 0.7 - 27 + failure,
        "ties": lambda: np.round(rng.normal(size=n) + failure, 2),
        "float32": lambda: (
            logistic(rng.normal(size=n) * 3 + 4 * failure - 2).astype(np.float32).astype(float)
        ),
    }
    return kinds[name](), failure.astype(np.int64)


@settings(max_examples=300, deadline=None)
@given(st.lists(scores, min_size=1, max_size=30))
def test_codes_keep_order_and_give_the_score_back(values: list[float]) -> None:
    x = np.array(values)
    code = codes_of_scores(x)
    assert np.array_equal(scores_of_codes(code), x)
    assert np.array_equal(code[:, None] < code, x[:, None] < x)


def test_magnitudes_below_the_range_are_zero() -> None:
    tiny = np.array([5e-324, -5e-324, -0.0, 2.0**-513])
    assert not codes_of_scores(tiny).any()
    assert same_histogram(Histogram.of(tiny, [0, 1, 0, 1]), Histogram.of(np.zeros(4), [0, 0, 1, 1]))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_few_distinct_scores_are_exact_in_every_metric(n: int) -> None:
    rng = np.random.default_rng(n)
    u, failure = np.round(rng.random(n), 2), rng.integers(2, size=n)
    counts, exact = Histogram.of(u, failure).counts(), tie_counts(u, failure)
    assert np.array_equal(counts.value, exact.value)
    for name, kernel in KERNELS.items():
        np.testing.assert_array_equal(kernel(counts), kernel(exact), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_partition_in_any_order_gives_the_same(data: st.DataObject) -> None:
    """Few bins are allowed, so the levels differ between the parts."""
    n = data.draw(st.integers(1, 60))
    u = np.array(data.draw(st.lists(scores, min_size=n, max_size=n)))
    failure = np.array(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    order = np.array(data.draw(st.permutations(range(n))))
    cuts = data.draw(st.lists(st.integers(0, n), max_size=5))
    parts = np.split(order, sorted(cuts))
    max_bins = data.draw(st.integers(2, 12))
    whole = Histogram.of(u, failure, max_bins)
    made_of = [Histogram.of(u[part], failure[part], max_bins) for part in parts]
    assert same_histogram(Histogram.total(made_of), whole)
    left = Histogram.empty()
    for one in reversed(made_of):
        left = one + left
    assert same_histogram(left, whole)
    assert (whole.n, whole.n_failures) == (n, failure.sum())
    assert len(whole.bins) <= max_bins
    # The level is the smallest possible: with one bit more there would be too many bins.
    if whole.level:
        assert len(np.unique(codes_of_scores(u) >> (whole.level - 1))) > max_bins


@pytest.mark.parametrize(
    ("kind", "n", "bins"),
    [
        *(
            (kind, 100_000, 2**14)
            for kind in ("near zero", "both ends", "near one", "entropy", "energy", "float32")
        ),
        ("ties", 100_000, 2**14),
        ("both ends", 1_500_000, 2**20),
    ],
)
def test_close_to_exact_beyond_the_bins(kind: str, n: int, bins: int) -> None:
    u, failure = made(kind, n)
    found = Histogram.total(
        Histogram.of(u[i : i + 2**17], failure[i : i + 2**17], bins) for i in range(0, n, 2**17)
    )
    counts, exact = found.counts(), tie_counts(u, failure)
    error = {
        name: abs(float(kernel(counts)) - float(kernel(exact))) for name, kernel in KERNELS.items()
    }
    if kind == "ties":
        assert found.exact
        assert set(error.values()) == {0.0}
        return
    assert not found.exact
    # Pairs in one bin count half instead of 0 or 1.
    assert error["auroc"] <= found.tied_pairs / 2 + 1e-12
    assert error["auroc"] <= 1e-6
    assert error["fpr95"] <= 1e-3
    # Any other metric moves by at most a bin's content, on either side of a threshold.
    largest = (counts.size / n).max()
    for name in ("augrc", "aurc", "risk_at_coverage_0.8"):
        assert error[name] <= 2 * largest, name
    if u.min() >= 0 and u.max() <= 1:
        # Every score moves by at most half its bin's width. The width is 2^(level - 52) of its
        # octave.
        assert error["brier"] <= 2 * 2.0 ** (found.level - 53)
    assert f"{52 - found.level} bits" in str(found.note)


def test_the_value_of_a_bin_is_in_it_and_within_the_scores() -> None:
    u, failure = made("both ends", 5000)
    found = Histogram.of(u, failure, max_bins=64)
    assert np.array_equal(codes_of_scores(found.values) >> found.level, found.bins)
    assert (found.low, found.high) == (u.min(), u.max())
    assert found.low <= found.values.min() <= found.values.max() <= found.high


def test_zero_and_one_share_no_bin_with_what_is_below() -> None:
    """Saturated probabilities stay apart from nearly saturated ones in bins of any width."""
    u = np.array([-1e-9, 0.0, 1e-300, 1 - 2.0**-53, 1.0])
    for level in range(53):
        bins = codes_of_scores(u) >> level
        assert bins[0] < bins[1]
        assert bins[3] < bins[4]


@pytest.mark.parametrize(("kind", "groups"), [("ties", 2**14), ("both ends", 256)])
def test_intervals_are_those_of_the_bootstrap_over_rows(kind: str, groups: int) -> None:
    u, failure = made(kind, 3000)
    names = ("auroc", "fpr95", "aupr_failure", "augrc", "risk_at_coverage_0.8")
    kernels = {name: KERNELS[name] for name in names}
    r = 2000
    rows = bootstrap_intervals(kernels, u, failure, n_resamples=r, seed=1)
    counts = Histogram.of(u, failure).counts()
    found = intervals_from_counts(kernels, counts, r, 0.95, seed=2, max_groups=groups)
    for name in names:
        assert found[name].value == pytest.approx(rows[name].value, abs=1e-12)
        # The 2.5 % quantile of R normal values has standard error sigma sqrt(.025 * .975 / R) /
        # .0584. Two such quantiles are compared, and four standard deviations are allowed.
        sigma = (rows[name].ci_high - rows[name].ci_low) / (2 * 1.96)
        tolerance = 4 * math.sqrt(2) * sigma * math.sqrt(0.025 * 0.975 / r) / 0.0584
        assert found[name].ci_low == pytest.approx(rows[name].ci_low, abs=tolerance), name
        assert found[name].ci_high == pytest.approx(rows[name].ci_high, abs=tolerance), name


def test_intervals_are_seeded_and_do_not_see_the_order_of_merging() -> None:
    u, failure = made("near one", 4000)
    whole = Histogram.of(u, failure)
    merged = Histogram.of(u[2500:], failure[2500:]) + Histogram.of(u[:2500], failure[:2500])
    settings_ = {"n_resamples": 20, "confidence": 0.9}
    first = intervals_of(whole, {"auroc": KERNELS["auroc"]}, seed=3, **settings_)
    assert intervals_of(merged, {"auroc": KERNELS["auroc"]}, seed=3, **settings_) == first
    assert intervals_of(whole, {"auroc": KERNELS["auroc"]}, seed=4, **settings_) != first


def test_resamples_keep_the_numbers_of_both_classes() -> None:
    u, failure = made("entropy", 1000)
    seen: list[np.ndarray] = []

    def spy(counts: bootstrap.TieCounts) -> np.ndarray:
        seen.append(np.stack([np.atleast_1d(counts.n_correct), np.atleast_1d(counts.n_wrong)]))
        return np.zeros(counts.n.shape)

    most = bootstrap.MAX_RESAMPLED_CELLS // 1000  # resamples that are held at one time
    n_resamples = 2 * most + 2
    counts = Histogram.of(u, failure)
    intervals_of(counts, {"spy": spy}, n_resamples=n_resamples, confidence=0.95, seed=0)
    assert [block.shape[1] for block in seen if block.shape[1] > 1] == [most, most, 2]
    assert {(c, w) for block in seen for c, w in block.T.tolist()} == {
        (1000 - failure.sum(), failure.sum())
    }


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="at least one row"):
        Histogram.empty().counts()
    with pytest.raises(DataError, match="finite"):
        Histogram.of([0.1, math.nan], [0, 1])
    with pytest.raises(DataError, match="one entry per row"):
        Histogram.of([0.1], [])
    with pytest.raises(UsageError, match="n_resamples"):
        intervals_of(Histogram.of([0.1], [1]), {}, n_resamples=0, confidence=0.95, seed=0)
    assert same_histogram(Histogram.total([]), Histogram.empty())
    assert math.isnan(Histogram.of([0.1], [1]).tied_pairs)


def test_aurc_of_more_rows_than_the_table_of_harmonic_numbers() -> None:
    """The reference is the sum itself: the mean over i of (wrong among the first i) / i."""
    u, failure = made("entropy", 200_000)
    sorted_failure = failure[np.argsort(u)]
    i = np.arange(1, len(u) + 1)
    exact = (np.cumsum(sorted_failure) / i).mean()
    tied = np.full(len(u), 0.5)
    assert float(KERNELS["aurc"](tie_counts(u, failure))) == pytest.approx(exact, abs=1e-12)
    assert float(KERNELS["aurc"](tie_counts(tied, failure))) == pytest.approx(
        failure.mean(), abs=1e-12
    )
    oracle = np.maximum(0, i - (1 - failure).sum()) / i
    assert float(KERNELS["excess_aurc"](tie_counts(u, failure))) == pytest.approx(
        exact - oracle.mean(), abs=1e-12
    )
