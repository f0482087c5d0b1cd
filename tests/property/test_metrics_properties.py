"""Test properties that hold for every input.

The tolerance 1e-9 is far above rounding (1e-13) and far below any real effect.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilu import metrics
from vilu.errors import DataError
from vilu.metrics.bootstrap import SortedScores
from vilu.metrics.catalog import METRICS
from vilu.metrics.counts import TieCounts, check_scores_and_failures, tie_counts
from vilu.metrics.reliability import ece_kernel

CLOSE = 1e-9
RANKING = [name for name, metric in METRICS.items() if not metric.of_probability]

# There are few levels, so that many scores are tied. ece and brier need probabilities.
levels = st.integers(0, 6).map(lambda i: i / 6)
scores = st.lists(st.tuples(levels, st.integers(0, 1)), min_size=1, max_size=25)


def columns(rows: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    u, f = zip(*rows, strict=True)
    return np.array(u), np.array(f)


def every_metric(u: np.ndarray, f: np.ndarray, names: list[str] | None = None) -> dict[str, float]:
    counts = tie_counts(u, f)
    return {name: float(METRICS[name].kernel(counts)) for name in names or METRICS}


@given(scores, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_count(rows: list[tuple[float, int]], random) -> None:
    before = every_metric(*columns(rows))
    random.shuffle(rows)
    assert every_metric(*columns(rows)) == pytest.approx(before, abs=CLOSE, nan_ok=True)


@given(scores, st.sampled_from([np.exp, lambda u: 1e6 * u - 3, lambda u: -1 / (u + 0.1)]))
def test_only_the_ranking_counts(rows: list[tuple[float, int]], increasing) -> None:
    u, f = columns(rows)
    assert every_metric(increasing(u), f, RANKING) == pytest.approx(
        every_metric(u, f, RANKING), abs=0, nan_ok=True
    )


@given(scores)
def test_every_metric_is_a_share_or_undefined(rows: list[tuple[float, int]]) -> None:
    u, f = columns(rows)
    for name, value in every_metric(u, f).items():
        if np.isnan(value):
            assert name.startswith(("auroc", "fpr95", "aupr", "naurc")), name
            assert f.min() == f.max()
        elif name == "log_loss":
            assert 0 <= value < 27.7  # - ln 1e-12 = 27.63
        elif name != "naurc":  # worse than random is above one
            assert -CLOSE <= value <= 1 + CLOSE, name


@given(scores)
def test_symmetries(rows: list[tuple[float, int]]) -> None:
    u, f = columns(rows)
    value = metrics.auroc(u, f)
    assert metrics.auroc(-u, f) == pytest.approx(1 - value, abs=CLOSE, nan_ok=True)
    assert metrics.auroc(-u, 1 - f) == pytest.approx(value, abs=CLOSE, nan_ok=True)
    assert metrics.aupr_success(u, f) == pytest.approx(
        metrics.aupr_failure(-u, 1 - f), abs=CLOSE, nan_ok=True
    )
    swapped = metrics.fpr_at_tpr(-u, 1 - f, 0.8, positive="failure")
    assert metrics.fpr_at_tpr(u, f, 0.8, positive="correct") == pytest.approx(
        swapped, abs=CLOSE, nan_ok=True
    )


@given(scores)
def test_augrc_has_its_closed_form_and_bounds(rows: list[tuple[float, int]]) -> None:
    u, f = columns(rows)
    r = f.mean()
    value = metrics.augrc(u, f)
    assert r**2 / 2 - CLOSE <= value <= r - r**2 / 2 + CLOSE
    if 0 < r < 1:
        assert value == pytest.approx((1 - metrics.auroc(u, f)) * r * (1 - r) + r**2 / 2, abs=CLOSE)


@given(scores)
def test_fpr_rules_are_ordered(rows: list[tuple[float, int]]) -> None:
    u, f = columns(rows)
    curve = [metrics.fpr_at_tpr(u, f, level) for level in (0.2, 0.5, 0.95, 1.0)]
    if 0 < f.mean() < 1:
        assert np.all(np.diff(curve) >= -CLOSE)
        # A straight line ends in the first point at or beyond the level. It lies below this point,
        # unless the curve is level.
        assert (
            metrics.fpr_at_tpr(u, f, 0.949, rule="interpolate")
            <= metrics.fpr_at_tpr(u, f, 0.949, rule="first") + CLOSE
        )


@given(scores, st.data())
def test_weighted_counts_equal_repeated_rows(
    rows: list[tuple[float, int]], data: st.DataObject
) -> None:
    u, f = columns(rows)
    weight = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(u), max_size=len(u))))
    if not weight.sum():
        weight[0] = 1
    value, group = np.unique(u, return_inverse=True)
    tally = [
        np.bincount(group[f == k], weight[f == k], len(value)).astype(np.int64) for k in (0, 1)
    ]
    # There are two resamples at once. The second has every row once. So the first has zero counts,
    # beside a resample with another size.
    once = [np.bincount(group[f == k], minlength=len(value)) for k in (0, 1)]
    counts = TieCounts(value, *(np.stack(pair) for pair in zip(tally, once, strict=True)))
    repeated = every_metric(np.repeat(u, weight), np.repeat(f, weight))
    plain = every_metric(u, f)
    for name, metric in METRICS.items():
        assert metric.kernel(counts) == pytest.approx(
            [repeated[name], plain[name]], abs=CLOSE, nan_ok=True
        ), name


@given(scores, st.integers(0, 2**31))
def test_a_resample_is_counted_as_its_rows(rows: list[tuple[float, int]], seed: int) -> None:
    u, f = columns(rows)
    sorted_scores = SortedScores(*check_scores_and_failures(u, f))
    rng = np.random.default_rng(seed)
    correct, wrong = (
        rng.choice(of, (3, len(of))) if len(of) else np.empty((3, 0), dtype=np.int64)
        for of in sorted_scores.strata
    )
    counts = sorted_scores.counts(correct, wrong)
    for resample in range(3):
        chosen = np.r_[correct[resample], wrong[resample]]
        expected = every_metric(u[chosen], f[chosen])
        got = {name: metric.kernel(counts)[resample] for name, metric in METRICS.items()}
        assert got == pytest.approx(expected, abs=CLOSE, nan_ok=True)


@given(scores, st.integers(1, 20), st.sampled_from(["width", "mass"]))
def test_calibration_error_is_zero_for_the_truth_and_at_least_the_mean_gap(
    rows: list[tuple[float, int]], bins: int, binning: str
) -> None:
    p, f = columns(rows)
    error = float(ece_kernel(tie_counts(p, f), bins, binning))
    assert error >= abs(p.mean() - f.mean()) - CLOSE
    assert metrics.ece(p, f, 1, binning) == pytest.approx(abs(p.mean() - f.mean()), abs=CLOSE)
    assert metrics.ece(f, f, bins, binning) == 0
    assert metrics.brier(f, f) == 0


@given(scores)
def test_the_brier_score_falls_where_probabilities_are_observed_rates(
    rows: list[tuple[float, int]],
) -> None:
    p, f = columns(rows)
    value, group = np.unique(p, return_inverse=True)
    rate = (np.bincount(group, f, len(value)) / np.bincount(group))[group]
    assert metrics.brier(rate, f) <= metrics.brier(p, f) + CLOSE
    assert metrics.ece(rate, f) == pytest.approx(0, abs=CLOSE)


junk = st.one_of(
    st.lists(st.floats(), max_size=4),
    st.lists(st.integers(-2, 3), max_size=4),
    st.lists(st.text(max_size=2), max_size=3),
    st.lists(st.lists(st.floats(), max_size=2), max_size=3),
    st.none(),
    st.just(1j),
    st.text(max_size=3),
)


@given(junk, junk)
def test_junk_is_a_number_or_a_data_error(uncertainty, failure) -> None:
    try:
        value = metrics.auroc(uncertainty, failure)
    except DataError:
        return
    assert np.isnan(value) or 0 <= value <= 1
