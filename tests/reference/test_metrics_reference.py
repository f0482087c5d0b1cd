"""Test the metrics against independent references.

These are scikit-learn, the reference code's route, brute force and hand-worked ties.

The tolerance is 1e-12. Sums have at most a few thousand terms up to 1, each rounded to 1e-16, and
so stay below 1e-12.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import interp1d
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from vilu import metrics

EXACT = 1e-12
GOLDEN = Path(__file__).parents[1] / "data" / "metrics_golden.npz"


def sample(seed: int, n: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    failure = rng.random(n) < rng.uniform(0.1, 0.9)
    failure[:2] = [True, False]
    return np.round(rng.normal(size=n) + failure, decimals), failure.astype(int)


SAMPLES = [
    sample(seed, n, decimals)
    for seed, (n, decimals) in enumerate(itertools.product([7, 40, 600], [0, 1, 12]))
]
samples = pytest.mark.parametrize(("u", "f"), SAMPLES)


@pytest.mark.parametrize("case", range(5))
def test_golden_file(case: int) -> None:
    golden = np.load(GOLDEN)
    uncertainty, failure = -golden[f"{case}/confidence"], ~golden[f"{case}/correct"]
    computed = {
        "auroc": metrics.auroc(uncertainty, failure),
        "fpr95": metrics.fpr_at_tpr(uncertainty, failure),
        "aupr_error": metrics.aupr_failure(uncertainty, failure),
        "aupr_success": metrics.aupr_success(uncertainty, failure),
    }
    expected = {name: float(golden[f"{case}/{name}"]) for name in computed}
    assert computed == pytest.approx(expected, abs=EXACT, rel=0)


@samples
def test_ranking_equals_scikit_learn(u: np.ndarray, f: np.ndarray) -> None:
    assert metrics.auroc(u, f) == pytest.approx(roc_auc_score(f, u), abs=EXACT)
    assert metrics.aupr_failure(u, f) == pytest.approx(average_precision_score(f, u), abs=EXACT)
    assert metrics.aupr_success(u, f) == pytest.approx(
        average_precision_score(1 - f, -u), abs=EXACT
    )


@samples
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 1.0])
def test_interpolated_fpr_equals_the_route_of_the_reference_code(
    u: np.ndarray, f: np.ndarray, level: float
) -> None:
    fpr, tpr, _ = roc_curve(1 - f, -u)  # drops collinear points
    assert metrics.fpr_at_tpr(u, f, level) == pytest.approx(
        float(interp1d(tpr, fpr)(level)), abs=EXACT
    )
    fpr, tpr, _ = roc_curve(f, u)
    by_failure = metrics.fpr_at_tpr(u, f, level, positive="failure")
    assert by_failure == pytest.approx(float(interp1d(tpr, fpr)(level)), abs=EXACT)


@samples
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 1.0])
def test_other_fpr_rules_equal_a_search_over_all_thresholds(
    u: np.ndarray, f: np.ndarray, level: float
) -> None:
    sides = {"correct": (u, f == 0), "failure": (-u, f == 1)}
    for positive, (score, is_positive) in sides.items():
        points = [(0.0, 0.0)]
        for threshold in np.unique(score):
            kept = score <= threshold
            points.append((np.mean(kept[is_positive]), np.mean(kept[~is_positive])))
        first = min(fpr for tpr, fpr in points if tpr >= level)
        nearest = min(points, key=lambda point: (abs(point[0] - level), point[0], point[1]))[1]
        assert metrics.fpr_at_tpr(u, f, level, positive, "first") == pytest.approx(first, abs=EXACT)
        assert metrics.fpr_at_tpr(u, f, level, positive, "nearest") == pytest.approx(
            nearest, abs=EXACT
        )


def test_fpr_where_the_curve_runs_level_at_the_rate() -> None:
    # There are 20 right answers. After the first 19 come 3 wrong answers, all exactly at TPR 0.95.
    # Then one right and one wrong answer follow.
    failure = np.array([0] * 19 + [1] * 3 + [0, 1])
    u = np.arange(len(failure))
    # The far end counts, as in numpy.interp.
    assert metrics.fpr_at_tpr(u, failure) == pytest.approx(3 / 4, abs=EXACT)
    assert metrics.fpr_at_tpr(u, failure, rule="first") == 0
    assert metrics.fpr_at_tpr(u, failure, rule="nearest") == 0


def test_hand_worked_ties() -> None:
    # scores    1        2          3     4
    # rows    right  right,wrong  wrong  right
    u, f = [2, 1, 4, 3, 2], [1, 0, 0, 1, 0]
    # Pairs are (wrong, right). The tied wrong row beats 1, ties with 1 and loses to 1. The other
    # wrong row beats 2 and loses to 1. That makes 3.5 of 6.
    assert metrics.auroc(u, f) == pytest.approx(3.5 / 6, abs=EXACT)
    # The expected wrong answers among the top i are 0, 1/2, 1, 2, 2.
    risks = [0, 1 / 4, 1 / 3, 2 / 4, 2 / 5]
    assert metrics.aurc(u, f) == pytest.approx(sum(risks) / 5, abs=EXACT)
    assert metrics.risk_at_coverage(u, f, 0.4) == pytest.approx(1 / 4, abs=EXACT)
    assert metrics.risk_at_coverage(u, f, 0.41) == pytest.approx(1 / 3, abs=EXACT)
    # Thresholds keep 1, 3, 4, 5 rows with risk 0, 1/3, 2/4, 2/5.
    coverage, risk = metrics.risk_coverage_curve(u, f)
    np.testing.assert_allclose(coverage, [0.2, 0.6, 0.8, 1.0], atol=EXACT)
    np.testing.assert_allclose(risk, [0, 1 / 3, 1 / 2, 2 / 5], atol=EXACT)
    assert metrics.coverage_at_risk(u, f, 1 / 3) == pytest.approx(0.6, abs=EXACT)
    assert metrics.coverage_at_risk(u, f, 0.45) == 1.0  # the risk is not monotone
    assert metrics.coverage_at_risk(u, f, 0.3) == pytest.approx(0.2, abs=EXACT)
    trapezoids = 0.2 * 0 + 0.4 * (1 / 3) / 2 + 0.2 * (1 / 3 + 1 / 2) / 2 + 0.2 * (1 / 2 + 2 / 5) / 2
    assert metrics.aurc(u, f, "trapezoid") == pytest.approx(trapezoids, abs=EXACT)
    # At coverages .2 .6 .8 1 the rule keeps 0, 1, 2, 2 wrong answers, over 5.
    generalised = (0.4 * 1 / 2 + 0.2 * (1 + 2) / 2 + 0.2 * 2) / 5
    assert metrics.augrc(u, f) == pytest.approx(generalised, abs=EXACT)
    fpr, tpr = metrics.roc_curve_points(u, f)
    np.testing.assert_allclose(fpr, [0, 0, 1 / 2, 1, 1], atol=EXACT)
    np.testing.assert_allclose(tpr, [0, 1 / 3, 2 / 3, 2 / 3, 1], atol=EXACT)


def test_no_threshold_meets_the_risk() -> None:
    assert metrics.coverage_at_risk([1, 1, 2], [1, 1, 0], 0.5) == 0.0


def test_all_tied_gives_the_chance_values() -> None:
    u, f = np.zeros(10), np.array([1, 1, 1] + [0] * 7)
    assert metrics.auroc(u, f) == 0.5
    assert metrics.fpr_at_tpr(u, f) == pytest.approx(0.95, abs=EXACT)
    assert metrics.aupr_failure(u, f) == pytest.approx(0.3, abs=EXACT)
    assert metrics.aupr_success(u, f) == pytest.approx(0.7, abs=EXACT)
    assert metrics.aurc(u, f) == pytest.approx(0.3, abs=EXACT)
    assert metrics.aurc(u, f, "trapezoid") == pytest.approx(0.3, abs=EXACT)
    assert metrics.naurc(u, f) == pytest.approx(1, abs=EXACT)
    assert metrics.augrc(u, f) == pytest.approx(0.15, abs=EXACT)


@pytest.mark.parametrize(
    ("u", "f"),
    [
        ([1, 1, 1, 2, 3, 3], [1, 0, 0, 1, 0, 1]),
        ([2, 2, 2, 2, 2], [1, 0, 1, 0, 0]),
        ([1, 2, 2, 1], [0, 1, 0, 1]),
    ],
)
def test_tied_selective_metrics_are_the_mean_over_all_orders(u: list[int], f: list[int]) -> None:
    orders = [
        sorted(order, key=lambda row: u[row]) for order in itertools.permutations(range(len(u)))
    ]
    wrong = np.cumsum(np.array(f)[np.array(orders)], axis=1)
    mean_risk = (wrong / np.arange(1, len(u) + 1)).mean(axis=0)
    assert metrics.aurc(u, f) == pytest.approx(mean_risk.mean(), abs=EXACT)
    for kept, risk in enumerate(mean_risk, start=1):
        assert metrics.risk_at_coverage(u, f, kept / len(u)) == pytest.approx(risk, abs=EXACT)


@samples
def test_selective_metrics_equal_direct_sums(u: np.ndarray, f: np.ndarray) -> None:
    n, n_correct, r = len(f), int((f == 0).sum()), f.mean()
    oracle = sum(max(0, i - n_correct) / i for i in range(1, n + 1)) / n
    assert metrics.excess_aurc(u, f) == pytest.approx(metrics.aurc(u, f) - oracle, abs=EXACT)
    # The divisor is small.
    assert metrics.naurc(u, f) == pytest.approx(
        (metrics.aurc(u, f) - oracle) / (r - oracle), abs=1e-10
    )
    closed = (1 - roc_auc_score(f, u)) * r * (1 - r) + r**2 / 2
    assert metrics.augrc(u, f) == pytest.approx(closed, abs=EXACT)
    thresholds = np.unique(u)
    coverage = np.array([np.mean(u <= t) for t in thresholds])
    risk = np.array([f[u <= t].mean() for t in thresholds])
    joint = coverage * risk
    area = np.trapezoid(np.r_[0, joint], np.r_[0, coverage])
    assert metrics.augrc(u, f) == pytest.approx(area, abs=EXACT)
    area = np.trapezoid(np.r_[risk[0], risk], np.r_[0, coverage])
    assert metrics.aurc(u, f, "trapezoid") == pytest.approx(area, abs=EXACT)
    for target in (0.01, 0.1, 0.3, 0.9):
        expected = max((c for c, q in zip(coverage, risk, strict=True) if q <= target), default=0.0)
        assert metrics.coverage_at_risk(u, f, target) == pytest.approx(expected, abs=EXACT)
    for kept in range(1, n + 1, max(1, n // 7)):
        t = np.sort(u)[kept - 1]
        before, block = f[u < t], f[u == t]
        expected = (before.sum() + block.mean() * (kept - len(before))) / kept
        assert metrics.risk_at_coverage(u, f, kept / n) == pytest.approx(expected, abs=EXACT)


def test_oracle_at_the_dossier_example() -> None:
    # The best order has 20 answers, 4 of them wrong: (1/17 · 1 + 1/18 · 2 + 1/19 · 3 + 1/20 · 4) /
    # 20.
    f = [0] * 16 + [1] * 4
    assert metrics.aurc(range(20), f) == pytest.approx(
        (1 / 17 + 2 / 18 + 3 / 19 + 4 / 20) / 20, abs=EXACT
    )
    assert metrics.aurc(range(20), f) == pytest.approx(0.0264, abs=5e-5)
    assert metrics.excess_aurc(range(20), f) == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize("n_correct", [1, 3, 10, 50])
def test_a_perfect_order_has_no_excess_and_no_minus_sign(n_correct: int) -> None:
    for n_wrong in range(1, 60):
        excess = metrics.excess_aurc(range(n_correct + n_wrong), [0] * n_correct + [1] * n_wrong)
        assert 0 <= excess < EXACT


def ece_by_loop(p: np.ndarray, f: np.ndarray, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = (p > b / bins) & (p <= (b + 1) / bins) if b else p <= 1 / bins
        if inside.any():
            total += inside.mean() * abs(f[inside].mean() - p[inside].mean())
    return total


@samples
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_equals_scikit_learn_and_a_loop(
    u: np.ndarray, f: np.ndarray, bins: int
) -> None:
    p = np.round(1 / (1 + np.exp(-u)), 3)
    assert metrics.brier(p, f) == pytest.approx(brier_score_loss(f, p), abs=EXACT)
    assert metrics.ece(p, f, bins) == pytest.approx(ece_by_loop(p, f, bins), abs=EXACT)


def test_bins_are_closed_on_the_right() -> None:
    # 0.5 and 0.3 both belong to (0.25, 0.5]. If 0.5 were alone, its bin would have another gap.
    p, f = [0.5, 0.3, 0.51, 0.0], [1, 0, 0, 0]
    assert metrics.ece(p, f, bins=4) == pytest.approx((abs(1 - 0.8) + 0.51 + 0.0) / 4, abs=EXACT)


def test_bins_of_equal_mass() -> None:
    # There are two bins with three rows. The tied 0.4 go together into the bin where they start.
    p, f = np.array([0.1, 0.2, 0.4, 0.4, 0.8, 0.9]), np.array([0, 0, 1, 0, 1, 1])
    assert metrics.ece(p, f, 2, "mass") == pytest.approx(
        (abs(1 - 1.1) + abs(2 - 1.7)) / 6, abs=EXACT
    )
    distinct = np.array([0.05, 0.1, 0.2, 0.3, 0.6, 0.7])
    by_hand = (
        sum(abs(f[half].sum() - distinct[half].sum()) for half in (slice(0, 3), slice(3, 6))) / 6
    )
    assert metrics.ece(distinct, f, 2, "mass") == pytest.approx(by_hand, abs=EXACT)


ONE_CLASS: list[tuple[Callable[..., float], float, float]] = [
    # metric, all right, all wrong
    (metrics.auroc, math.nan, math.nan),
    (metrics.fpr_at_tpr, math.nan, math.nan),
    (metrics.aupr_failure, math.nan, 1.0),
    (metrics.aupr_success, 1.0, math.nan),
    (metrics.naurc, math.nan, math.nan),
    (metrics.aurc, 0.0, 1.0),
    (metrics.excess_aurc, 0.0, 0.0),
    (metrics.augrc, 0.0, 0.5),
    (metrics.risk_at_coverage, 0.0, 1.0),
    (metrics.coverage_at_risk, 1.0, 0.0),
]


@pytest.mark.parametrize(("metric", "all_right", "all_wrong"), ONE_CLASS)
@pytest.mark.parametrize("n", [1, 5])
def test_one_class(
    metric: Callable[..., float], all_right: float, all_wrong: float, n: int
) -> None:
    u = np.linspace(0, 1, n)
    assert metric(u, np.zeros(n)) == pytest.approx(all_right, abs=EXACT, nan_ok=True)
    assert metric(u, np.ones(n)) == pytest.approx(all_wrong, abs=EXACT, nan_ok=True)


@pytest.mark.parametrize("positive", ["correct", "failure"])
@pytest.mark.parametrize("rule", ["interpolate", "first", "nearest"])
@pytest.mark.parametrize("failure", [0, 1])
def test_fpr_of_one_class_is_undefined_by_every_rule(
    positive: str, rule: str, failure: int
) -> None:
    assert math.isnan(
        metrics.fpr_at_tpr([1.0, 2.0], [failure, failure], positive=positive, rule=rule)
    )
    fpr, tpr = metrics.roc_curve_points([1.0, 2.0], [failure, failure], positive)
    assert np.isnan(fpr).all()
    assert np.isnan(tpr).all()


def test_a_million_rows_stay_exact() -> None:
    n = 10**6
    rng = np.random.default_rng(0)
    f = rng.random(n) < 0.3
    u = rng.random(n)
    order = np.argsort(u)
    risk = np.cumsum(f[order]) / np.arange(1, n + 1)
    assert metrics.aurc(u, f) == pytest.approx(math.fsum(risk) / n, abs=EXACT)
    tied = np.round(u, 3)
    block = np.round(tied * 1000).astype(int)
    size, wrong = np.bincount(block), np.bincount(block, weights=f)
    inside = np.concatenate(
        [np.arange(1, m + 1) * (w / m) for m, w in zip(size, wrong, strict=True)]
    )
    expected = (np.repeat(np.cumsum(wrong) - wrong, size) + inside) / np.arange(1, n + 1)
    assert metrics.aurc(tied, f) == pytest.approx(math.fsum(expected) / n, abs=EXACT)
