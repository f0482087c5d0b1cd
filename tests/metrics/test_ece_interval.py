"""Test the interval for the ECE.

The interval must hold the truth as often as stated, must always hold its own estimate, and must
not depend on the order of rows.
"""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.ece_coverage import WORLDS, coverage_of
from hypothesis import given, settings
from hypothesis import strategies as st

import vilu
from vilu.metrics import METRICS, bootstrap_interval, ece, paired_bootstrap
from vilu.metrics.bootstrap import intervals_of
from vilu.metrics.counts import tie_counts
from vilu.metrics.histogram import Histogram
from vilu.metrics.reliability import BinnedError

STREAMS = 200


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("n", [60, 180, 2000])
@pytest.mark.parametrize("name", ["calibrated, mostly low", "a little too low", "far too sure"])
def test_the_truth_is_missed_as_rarely_as_stated(name: str, n: int, binning) -> None:
    """5 % of misses are allowed.

    With 200 test sets, three standard errors (1.5 % each) are allowed on top.
    """
    found = coverage_of(WORLDS[name], binning, n, STREAMS, draws=300)
    assert found.above + found.below <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / STREAMS), found
    if n == 2000 and name == "far too sure":
        assert found.width < found.truth  # the interval is narrow enough to be useful


def test_percentiles_would_miss_it() -> None:
    """For a calibrated predictor on 180 rows, no percentile interval holds the truth, 0.

    This is the error that the interval corrects.
    """
    found = coverage_of(
        WORLDS["calibrated, mostly low"], "width", 180, 20, draws=100, percentile=True
    )
    assert found.above == 1
    assert found.estimate > 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.97, 1.0]), st.integers(0, 1)),
        min_size=1,
        max_size=80,
    ),
    st.sampled_from(sorted(METRICS)),
)
def test_an_interval_holds_its_own_estimate(rows: list[tuple[float, int]], metric: str) -> None:
    p, failure = zip(*rows, strict=True)
    value, low, high = bootstrap_interval(metric, p, failure, n_resamples=20)
    assert np.isnan(value) or low <= value <= high


def test_rows_in_any_form_give_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    failure = (rng.random(500) < p**1.5).astype(int)
    first, order = bootstrap_interval("ece", p, failure), rng.permutation(500)
    assert first == bootstrap_interval("ece", p[order], failure[order])
    assert first.value == ece(p, failure)
    kernels = {"ece": METRICS["ece"].kernel, "auroc": METRICS["auroc"].kernel}
    assert (
        intervals_of(Histogram.of(p, failure), kernels, n_resamples=1000, confidence=0.95, seed=0)[
            "ece"
        ]
        == first
    )
    assert vilu.evaluate(vilu.Outcomes(p, failure, is_probability=True), metrics=["ece"]).rows[
        0
    ].interval == ("95 %, corrected for the bias of the bins, 1000 draws")


def test_two_bins_by_hand() -> None:
    """Two bins have gaps of .2 and .3, each with 5,000 rows, so the ECE is .25.

    The errors around it are normal with known size.
    """
    p = np.repeat([0.2, 0.7], 5000)
    failure = np.concatenate([np.arange(5000) % 5 < 2, np.arange(5000) % 5 < 2]).astype(
        int
    )  # a failure rate of 0.4 in both bins
    low, high = BinnedError(bins=2).interval(tie_counts(p, failure), 20_000, 0.95, 0)
    # For x = (failure - p) 1[bin], the variance of the data is larger than the calibrated p (1 -
    # p).
    squares = np.array([0.4 * 0.8**2 + 0.6 * 0.2**2, 0.4 * 0.3**2 + 0.6 * 0.7**2]) / 2
    error = np.sqrt(
        (
            np.maximum(squares - np.array([0.1, 0.15]) ** 2, np.array([0.16, 0.21]) / 2) / 10_000
        ).sum()
    )
    # a 97.5 % quantile from 20,000 draws has a standard error of 0.019 standard deviations
    assert [low, high] == pytest.approx([0.25 - 1.96 * error, 0.25 + 1.96 * error], abs=0.1 * error)


@pytest.mark.parametrize(("p", "failure"), [([0.3], [1]), ([0.5], [0]), ([0.5, 0.5], [1, 1])])
def test_the_common_result_for_one_or_two_rows_includes_zero(p, failure) -> None:
    """If all rows are off by the same amount, their errors do not spread.

    A calibrated predictor's errors do spread, so the interval must reach 0.
    """
    assert BinnedError().interval(tie_counts(p, failure), 1000, 0.95, 0)[0] == 0


def test_a_difference_of_two_is_around_its_estimate() -> None:
    rng = np.random.default_rng(1)
    p = rng.random(180)
    failure = (rng.random(180) < p).astype(int)
    found = paired_bootstrap("ece", p, np.full(180, failure.mean()), failure)
    assert found.ci_low < found.difference < found.ci_high
    assert found.difference == pytest.approx(
        ece(p, failure), abs=1e-12
    )  # the other predictor states the failure rate of these rows
