"""Test estimates from few labels: error rates and class shares, against hand-worked numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks import estimate as benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import vilu
from vilu.calibration.estimates import mean_interval, tuned_weight
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes


def sample(n: int, n_labelled: int, seed: int = 0) -> tuple[Outcomes, float]:
    """Return rows with failure probabilities, and their true error rate. Some rows have a label."""
    random = np.random.default_rng(seed)
    probability = random.random(n) ** 3
    failure = (random.random(n) < probability).astype(np.int64)
    known = np.full(n, -1)
    labelled = random.permutation(n)[:n_labelled]
    known[labelled] = failure[labelled]
    return Outcomes(probability, known, is_probability=True), float(failure.mean())


def with_classes(n_labelled: int) -> Outcomes:
    """Return 1,000 rows in three classes with shares 50 %, 48 % and 2 %.

    90 % of the answers are right.
    """
    random = np.random.default_rng(1)
    target = random.choice(3, size=1_000, p=[0.5, 0.48, 0.02])
    is_wrong = random.random(1_000) < 0.1
    answer = np.where(is_wrong, (target + 1) % 3, target)
    is_labelled = np.arange(1_000) < n_labelled
    return Outcomes(
        uncertainty=random.random(1_000) * 0.2,
        failure=np.where(is_labelled, is_wrong, -1),
        prediction=answer,
        target=np.where(is_labelled, target, -1),
        class_names=["cat", "dog", "owl"],
        is_probability=True,
    )


# --- one interval ---------------------------------------------------------------------------


@given(st.integers(5, 300), st.data(), st.sampled_from([0.8, 0.95]))
@settings(max_examples=25, deadline=None)
def test_of_zeros_and_ones_the_interval_is_the_mid_p_one(
    n: int, data: st.DataObject, confidence: float
) -> None:
    k = data.draw(st.integers(0, n))
    values = (np.arange(n) < k).astype(np.float64)
    low, high = mean_interval(values, 0.0, 1.0, confidence)
    tail = (1 - confidence) / 2

    def mid_p(limit: float) -> float:
        return float(stats.binom.cdf(k, n, limit) - stats.binom.pmf(k, n, limit) / 2)

    # At the upper limit, P[X < k] + P[X = k] / 2 is the tail. At the lower limit, it is 1 - tail.
    # The 20,000 drawn means reach a probability up to four standard errors.
    error = 4 * math.sqrt(tail / 20_000)
    assert k == n or mid_p(high) == pytest.approx(tail, abs=error)
    assert k == 0 or mid_p(low) == pytest.approx(1 - tail, abs=error)


def test_interval_moves_and_scales_with_the_values() -> None:
    values = np.random.default_rng(0).random(50)
    low, high = mean_interval(values, 0.0, 1.0, 0.95)
    moved = mean_interval(2 * values - 3, -3.0, -1.0, 0.95)
    np.testing.assert_allclose(moved, (2 * low - 3, 2 * high - 3))


def test_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).random(4_000)
    low, high = mean_interval(values, 0.0, 1.0, 0.95)
    half = 1.96 * values.std() / math.sqrt(4_000)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_blocks_of_draws_do_not_change_what_an_interval_is(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(60)
    whole = mean_interval(values, 0.0, 1.0, 0.95)
    monkeypatch.setattr("vilu.calibration.estimates.MAX_WEIGHTS_IN_MEMORY", 61 * 700)  # 15 blocks
    in_blocks = mean_interval(values, 0.0, 1.0, 0.95)
    # A limit varies by 2 % of the half width (a 2.5 % quantile among 20,000 drawn means).
    np.testing.assert_allclose(in_blocks, whole, atol=4 * 0.02 * (whole[1] - whole[0]) / 2)


@pytest.mark.parametrize(
    ("predicted", "weight"),
    [
        ([0.0, 1.0, 1.0, 2.0], 0.5),  # slope ((-1)(-1/2) + 1 (1/2)) / 2
        ([2.0, 1.0, 1.0, 0.0], 0.0),  # opposite predictions get no weight
        ([0.0, 0.1, 0.1, 0.2], 1.0),  # a slope of 5 is cut to 1
        ([0.3, 0.3, 0.3, 0.3], 0.0),
    ],
)
def test_weight_of_predictions_by_hand(predicted: list[float], weight: float) -> None:
    truth = np.array([0.0, 0.0, 1.0, 1.0])
    assert tuned_weight(truth, np.array(predicted)) == pytest.approx(weight)


# --- error rates ----------------------------------------------------------------------------


def test_error_rate_is_the_mean_prediction_plus_the_mean_residual() -> None:
    outcomes, _ = sample(2_000, 100)
    (error_rate,) = vilu.estimate(outcomes)
    is_labelled = outcomes.failure >= 0
    residual = outcomes.failure[is_labelled] - error_rate.weight * outcomes.uncertainty[is_labelled]
    expected = error_rate.weight * outcomes.uncertainty.mean() + residual.mean()
    assert error_rate.share == pytest.approx(expected)
    assert (error_rate.n_labelled, error_rate.n) == (100, 2_000)
    assert error_rate.method == "prediction-powered"


def test_plain_interval_is_clopper_pearson() -> None:
    outcomes, _ = sample(2_000, 100)
    (error_rate,) = vilu.estimate(outcomes, confidence=0.9)
    wrong = int((outcomes.failure == 1).sum())
    exact = stats.binomtest(wrong, 100).proportion_ci(0.9, method="exact")
    assert error_rate.plain == pytest.approx((exact.low, exact.high))


def test_good_predictions_make_the_interval_shorter() -> None:
    random = np.random.default_rng(0)
    failure = (random.random(3_000) < 0.25).astype(np.int64)
    probability = np.where(failure == 1, 0.95, 0.05)
    known = np.where(np.arange(3_000) < 100, failure, -1)
    (error_rate,) = vilu.estimate(Outcomes(probability, known, is_probability=True))
    assert error_rate.low <= failure.mean() <= error_rate.high
    assert error_rate.relative_width < 0.5
    assert "times as wide as by the labels alone" in str(error_rate)


def test_predictions_that_know_nothing_do_little_harm() -> None:
    random = np.random.default_rng(0)
    failure = (random.random(3_000) < 0.25).astype(np.int64)
    known = np.where(np.arange(3_000) < 100, failure, -1)
    (error_rate,) = vilu.estimate(Outcomes(random.random(3_000), known, is_probability=True))
    assert error_rate.weight < 0.3
    assert 0.9 < error_rate.relative_width < 1.05


@pytest.mark.parametrize("n_labelled", [100, 400])
def test_scores_that_are_no_probabilities_are_calibrated_by_the_labels(n_labelled: int) -> None:
    outcomes, true_rate = sample(3_000, n_labelled)
    odds = np.log(outcomes.uncertainty / (1 - outcomes.uncertainty))
    (as_scores,) = vilu.estimate(Outcomes(50 * odds + 7, outcomes.failure))
    (as_probability,) = vilu.estimate(outcomes)
    assert as_scores.low <= true_rate <= as_scores.high
    assert as_scores.relative_width == pytest.approx(as_probability.relative_width, abs=0.1)


def test_calibrated_probabilities_go_before_uncertainties() -> None:
    outcomes, _ = sample(2_000, 100)
    calibrated = Outcomes(
        np.random.default_rng(0).random(2_000) * 1e-9,
        outcomes.failure,
        failure_probability=outcomes.uncertainty,
    )
    assert vilu.estimate(calibrated) == vilu.estimate(outcomes)


def test_fewer_than_thirty_labels_get_the_exact_interval() -> None:
    outcomes, _ = sample(2_000, 29)
    (error_rate,) = vilu.estimate(outcomes)
    assert error_rate.method == "exact"
    assert (error_rate.low, error_rate.high) == error_rate.plain
    outcomes, _ = sample(2_000, 30)
    (error_rate,) = vilu.estimate(outcomes)
    assert error_rate.method == "prediction-powered"


def test_rows_without_a_score_are_left_out() -> None:
    outcomes, _ = sample(2_000, 100)
    n_missing = 10
    longer = Outcomes(
        np.r_[outcomes.uncertainty, np.full(n_missing, math.nan)],
        np.r_[outcomes.failure, np.ones(n_missing, dtype=np.int64)],
        reason=[None] * 2_000 + ["zero_norm"] * n_missing,
        is_probability=True,
    )
    assert vilu.estimate(longer) == vilu.estimate(outcomes)


# --- classes --------------------------------------------------------------------------------


def test_shares_of_classes_and_the_exact_interval_of_a_rare_one() -> None:
    outcomes = with_classes(200)
    error_rate, cat, dog, owl = vilu.estimate(outcomes, of_classes=True)
    assert [share.name for share in (error_rate, cat, dog, owl)] == [
        "error rate",
        "cat",
        "dog",
        "owl",
    ]
    assert cat.low <= 0.5 <= cat.high
    assert (cat.method, dog.method) == ("prediction-powered", "prediction-powered")
    assert cat.relative_width < 0.8
    # About 6 % of the answers say owl, so 13 labelled owls are expected: fewer than 15.
    assert owl.method == "exact"
    n_owls = int((outcomes.target == 2).sum())
    exact = stats.binomtest(n_owls, 200).proportion_ci(0.95, method="exact")
    assert (owl.low, owl.high) == pytest.approx((exact.low, exact.high))


def test_classes_need_answers_and_the_right_class_of_wrong_rows() -> None:
    outcomes, _ = sample(2_000, 100)
    with pytest.raises(DataError, match="need answers, names of classes"):
        vilu.estimate(outcomes, of_classes=True)
    rows = with_classes(100)
    assert rows.target is not None
    unknown = Outcomes(
        rows.uncertainty,
        rows.failure,
        prediction=rows.prediction,
        target=np.where(rows.failure == 1, -1, rows.target),
        class_names=rows.class_names,
        is_probability=True,
    )
    n_wrong = int((rows.failure == 1).sum())
    with pytest.raises(DataError, match=f"right class of {n_wrong} labelled rows is not known"):
        vilu.estimate(unknown, of_classes=True)


# --- refusals -------------------------------------------------------------------------------


def test_labels_of_the_most_doubtful_rows_are_refused() -> None:
    outcomes, _ = sample(2_000, 2_000)
    doubtful = np.argsort(-outcomes.uncertainty)[:100]
    known = np.full(2_000, -1)
    known[doubtful] = outcomes.failure[doubtful]
    with pytest.raises(DataError, match="no random sample of the 2,000 rows"):
        vilu.estimate(Outcomes(outcomes.uncertainty, known, is_probability=True))


def test_no_label_fitted_rows_and_odd_arguments_are_refused() -> None:
    for n_labelled in (0, 1):
        outcomes, _ = sample(100, n_labelled)
        reason = f"{n_labelled} of the 100 rows has both a score and a label"
        with pytest.raises(DataError, match=reason):
            vilu.estimate(vilu.Outcomes(outcomes.uncertainty - 2, outcomes.failure))
    outcomes, _ = sample(2_000, 100)
    with pytest.raises(UsageError, match="confidence must be"):
        vilu.estimate(outcomes, confidence=1.0)
    fitted = Outcomes(
        outcomes.uncertainty,
        outcomes.failure,
        is_probability=True,
        provenance={"n_seen_in_fit": 100, "n_compared_with_fit": 2_000},
    )
    with pytest.raises(DataError, match="used to fit the predictor"):
        vilu.estimate(fitted)


# --- simulated ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(benchmark.WORLDS))
def test_simulated_intervals_hold_the_error_rate(name: str) -> None:
    # If an interval misses in 6 % of all draws, more than 12 misses among 80 have the probability
    # 0.1 %.
    world = benchmark.WORLDS[name]
    random = np.random.default_rng(5)
    held = {
        way: benchmark.IntervalCoverage() for way in ("predictions", "plain exact", "plain normal")
    }
    for _ in range(80):
        probability, predicted = world(random.random(2_000))
        failure = (random.random(2_000) < probability).astype(np.int64)
        benchmark.add_estimate(held, predicted, failure, 100, random)
    assert held["predictions"].n_held >= 68
    assert held["predictions"].width < 1.02 * held["plain exact"].width
