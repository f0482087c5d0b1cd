from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from vilu import metrics
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.outcomes.evaluate import compare, evaluate
from vilu.outcomes.outcomes import Outcomes


def sample(n: int = 200, seed: int = 0, **fields: object) -> Outcomes:
    rng = np.random.default_rng(seed)
    failure = (rng.random(n) < 0.4).astype(int)
    uncertainty = 1 / (1 + np.exp(-rng.normal(size=n) - failure))
    return Outcomes(
        uncertainty, failure, method="mcm", dataset="pets", split="test", seed=7, **fields
    )


def test_default_metrics_of_a_score() -> None:
    table = evaluate(sample())
    assert [row.metric for row in table] == [
        "auroc",
        "fpr95",
        "aupr_failure",
        "aupr_success",
        "aurc",
        "excess_aurc",
        "augrc",
        "risk_at_coverage_0.8",
        "coverage_at_risk_0.01",
        "coverage_at_risk_0.05",
        "coverage_at_risk_0.1",
    ]


def test_values_are_those_of_the_metrics() -> None:
    outcomes = sample(is_probability=True)
    table = evaluate(outcomes, metrics=list(metrics.METRICS))
    pair = outcomes.uncertainty, outcomes.failure
    expected = {
        "auroc": metrics.auroc(*pair),
        "fpr95": metrics.fpr_at_tpr(*pair),
        "fpr95_failure": metrics.fpr_at_tpr(*pair, positive="failure", rule="first"),
        "aupr_failure": metrics.aupr_failure(*pair),
        "aupr_success": metrics.aupr_success(*pair),
        "aurc": metrics.aurc(*pair),
        "aurc_trapezoid": metrics.aurc(*pair, convention="trapezoid"),
        "excess_aurc": metrics.excess_aurc(*pair),
        "naurc": metrics.naurc(*pair),
        "augrc": metrics.augrc(*pair),
        "risk_at_coverage_0.8": metrics.risk_at_coverage(*pair, 0.8),
        "coverage_at_risk_0.01": metrics.coverage_at_risk(*pair, 0.01),
        "coverage_at_risk_0.05": metrics.coverage_at_risk(*pair, 0.05),
        "coverage_at_risk_0.1": metrics.coverage_at_risk(*pair, 0.1),
        "ece": metrics.ece(*pair),
        "ece_mass": metrics.ece(*pair, binning="mass"),
        "brier": metrics.brier(*pair),
        "log_loss": metrics.log_loss(*pair),
        "auroc_within": metrics.auroc(*pair),  # all pictures are of the classes
        "fpr95_within": metrics.fpr_at_tpr(*pair),
        "auroc_outside": None,
        "fpr95_outside": None,
    }
    assert {row.metric: row.value for row in table} == pytest.approx(expected, abs=1e-15)
    for row in table:
        if row.value is None:
            assert row.why == "none of 200 answers is of none of the classes"
            continue
        interval = metrics.bootstrap_interval(row.metric, *pair)
        assert (row.value, row.ci_low, row.ci_high) == interval


def test_a_calibrated_probability_is_what_its_metrics_are_about() -> None:
    plain = sample()
    probability = np.linspace(0, 1, len(plain)) ** 2
    table = evaluate(replace(plain, failure_probability=probability), n_resamples=20)
    found = {row.metric: row for row in table}
    known = plain.evaluable
    p, failure = probability[known], plain.failure[known]
    assert found["ece_mass"].value == metrics.ece(p, failure, binning="mass")
    assert found["brier"].value == pytest.approx(brier_score_loss(failure, p), abs=1e-12)
    assert found["log_loss"].value == pytest.approx(
        log_loss(failure, p.clip(1e-12, 1 - 1e-12)), rel=1e-9
    )
    assert found["brier"].convention.endswith("of the calibrated failure_probability")
    assert found["auroc"].value == metrics.auroc(plain.uncertainty[known], failure)
    assert "calibrated" not in found["auroc"].convention
    calibrated = replace(plain, failure_probability=probability)
    assert (
        compare(calibrated, calibrated, metric="brier", n_resamples=5).value_a
        == found["brier"].value
    )
    with pytest.raises(DataError, match="exactly where the uncertainty is"):
        replace(plain, failure_probability=np.full(len(plain), np.nan))


def test_every_row_says_what_it_is_about() -> None:
    row = evaluate(sample(), metrics=["fpr95"], n_resamples=50, confidence=0.9).rows[0]
    assert (row.method, row.dataset, row.split, row.seed) == ("mcm", "pets", "test", 7)
    assert row.n == 200
    assert row.n_failures == sample().failure.sum()
    assert row.accuracy == pytest.approx(1 - row.n_failures / 200)
    assert row.convention == "positive=correct, TPR 0.95, linear interpolation"
    assert row.interval == "90 % stratified bootstrap, 50 resamples"
    assert row.why is None


def test_unlabelled_and_unusable_rows_are_left_out_and_counted() -> None:
    whole = sample()
    u, f = whole.uncertainty.copy(), whole.failure.copy()
    f[:5] = -1
    u[3:10] = math.nan
    reason = ["nonfinite" if math.isnan(x) else None for x in u]
    row = evaluate(Outcomes(u, f, reason=reason), metrics=["auroc"]).rows[0]
    assert (row.n, row.n_unlabelled, row.n_unusable) == (190, 3, 7)
    assert row.value == metrics.auroc(u[10:], f[10:])


def test_calibration_only_of_probabilities() -> None:
    assert {"ece", "brier"} < {row.metric for row in evaluate(sample(is_probability=True))}
    row = evaluate(sample(), metrics=["ece"]).rows[0]
    assert row.value is None
    assert row.why == "the uncertainty is not a probability"


@pytest.mark.parametrize(
    ("failure", "why"), [(0, "none of 40 answers is wrong"), (1, "all of 40 answers are wrong")]
)
def test_one_class_is_null_with_a_reason(failure: int, why: str) -> None:
    outcomes = Outcomes(np.linspace(0, 1, 40), [failure] * 40)
    with pytest.warns(UserWarning, match="only 0"):
        table = evaluate(outcomes)
    for row in table:
        assert row.ci_low is row.ci_high is row.interval is None
        assert (row.value is None) == (row.why is not None)
    assert table.filter(metric="auroc").rows[0].why == why
    assert table.value("aurc") == failure
    assert json.loads(json.dumps(table.to_dicts()))[0]["value"] is None


def test_few_failures_or_successes_warn_once_per_call() -> None:
    few = Outcomes(np.arange(100.0), [1] * 29 + [0] * 71, method="a", dataset="d")
    with pytest.warns(UserWarning, match="intervals are wide") as caught:
        evaluate(
            [few, replace(few, seed=1), replace(few, failure=1 - few.failure, method="b")],
            n_resamples=2,
        )
    (warning,) = caught
    assert str(warning.message) == (
        "intervals are wide: a on d has only 29 wrong answers; b on d has only 29 right answers."
    )
    assert warning.filename == __file__


def test_rows_that_the_predictor_was_fitted_on_warn() -> None:
    failure = [1, 0] * 50
    fresh = Outcomes(np.arange(100.0), failure, method="a", provenance={"n_seen_in_fit": 0})
    fitted = replace(fresh, method="b", provenance={"n_seen_in_fit": 7})
    with pytest.warns(UserWarning, match="scored: at least 7 of them for b") as caught:
        evaluate([fresh, fitted], n_resamples=0)
    assert len(caught) == 1


def test_without_intervals_no_warning_speaks_of_them() -> None:
    few = Outcomes(np.arange(40.0) % 20, [1, 0, 0, 0] * 10, picture=np.arange(40) % 20)
    with pytest.warns(UserWarning, match="wrong answers|independent") as caught:
        evaluate(few, metrics=["auroc"], n_resamples=0)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert messages[0].startswith("numbers rest on few answers: the scores has only ")
    assert not any("nterval" in message for message in messages)


def test_enough_failures_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(Outcomes(np.arange(60.0), [0, 1] * 30), n_resamples=2)


def test_no_intervals_on_request() -> None:
    row = evaluate(sample(), metrics=["auroc"], n_resamples=0).rows[0]
    assert row.value == metrics.auroc(sample().uncertainty, sample().failure)
    assert row.ci_low is row.ci_high is row.interval is None


def test_several_outcomes_give_the_rows_of_each() -> None:
    a, b = sample(), replace(sample(seed=1), method="b")
    assert evaluate([a, b]) == evaluate(a) + evaluate(b)
    assert evaluate(iter([a])) == evaluate(a)


def test_the_same_seed_gives_the_same_table() -> None:
    assert evaluate(sample(), seed=1) == evaluate(sample(), seed=1)
    assert evaluate(sample(), seed=1) != evaluate(sample(), seed=2)


@pytest.mark.parametrize(
    "outcomes",
    [Outcomes([], []), Outcomes([0.1], [-1]), Outcomes([math.nan], [1], reason=["nonfinite"])],
)
def test_nothing_to_evaluate_is_refused(outcomes: Outcomes) -> None:
    with pytest.raises(
        DataError, match=r"no row to evaluate: \d have an unknown failure and \d no uncertainty"
    ):
        evaluate(outcomes)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match=r"'aurc2'\. Did you mean 'aurc'"):
        evaluate(sample(), metrics=["aurc2"])
    with pytest.raises(UsageError, match="at least one set of outcomes"):
        evaluate([])
    with pytest.raises(UsageError, match=r"n_resamples must be at least 0\. Got -1"):
        evaluate(sample(), n_resamples=-1)
    with pytest.raises(UsageError, match="confidence"):
        evaluate(sample(), confidence=1.0)


def other_scores(outcomes: Outcomes, **fields: object) -> Outcomes:
    noise = np.random.default_rng(9).normal(size=len(outcomes))
    return replace(outcomes, uncertainty=outcomes.uncertainty + noise, method="noisy", **fields)


def test_compare_is_the_paired_bootstrap() -> None:
    a = sample()
    b = other_scores(a)
    result = compare(a, b, metric="augrc", n_resamples=300, seed=5)
    expected = metrics.paired_bootstrap(
        "augrc", a.uncertainty, b.uncertainty, a.failure, n_resamples=300, seed=5
    )
    assert (result.difference, result.ci_low, result.ci_high, result.p_value) == expected
    assert result.value_a == metrics.augrc(a.uncertainty, a.failure)
    assert result.value_b == metrics.augrc(b.uncertainty, b.failure)
    assert (result.method_a, result.method_b, result.n, result.n_failures) == (
        "mcm",
        "noisy",
        200,
        a.failure.sum(),
    )
    assert str(result).startswith("AUGRC, mcm against noisy: ")
    assert f"p = {result.p_value:.3g}" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["difference"] == result.difference


@pytest.mark.parametrize("failure_is_known", [True, False])
def test_compare_leaves_out_rows_that_either_could_not_score(failure_is_known: bool) -> None:
    """``vilu.score`` gives no failure in a row that it cannot score."""
    a, b = sample(), other_scores(sample())
    u, failure = b.uncertainty.copy(), b.failure.copy()
    u[:4] = math.nan
    if not failure_is_known:
        failure[:4] = -1
    b = replace(b, uncertainty=u, failure=failure, reason=["k<2"] * 4 + [None] * 196)
    result = compare(a, b, n_resamples=10)
    assert result.n == 196
    assert result.value_a == metrics.auroc(a.uncertainty[4:], a.failure[4:])


def test_compare_refuses_other_rows() -> None:
    a = sample(ids=[f"image {i}" for i in range(200)])
    assert (
        compare(a, other_scores(a, ids=None), n_resamples=10).n == 200
    )  # ids are checked if both have them
    with pytest.raises(ProvenanceError, match="Row 0 is 'image 0' in one and 'x' in the other"):
        compare(a, other_scores(a, ids=["x", *a.ids[1:]]))
    failure = a.failure.copy()
    failure[7] = 1 - failure[7]
    with pytest.raises(ProvenanceError, match="1 failures differ, the first in row 7"):
        compare(a, other_scores(a, failure=failure))
    with pytest.raises(ProvenanceError, match="Got 200 and 100 rows"):
        compare(a, sample(100))


def test_compare_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(
        DataError, match="ece needs failure probabilities, but the scores of noisy on pets are not"
    ):
        compare(sample(is_probability=True), other_scores(sample()), metric="ece")
    unlabelled = Outcomes([0.1, 0.2], [-1, -1])
    with pytest.raises(DataError, match="no row to evaluate"):
        compare(unlabelled, unlabelled)
    with pytest.raises(UsageError, match="no metric is called"):
        compare(sample(), sample(), metric="p")


def test_compare_of_one_class_is_undefined_with_a_reason() -> None:
    a = Outcomes([0.1, 0.2], [0, 0])
    result = compare(a, a)
    assert math.isnan(result.difference)
    assert result.why == "none of 2 answers is wrong"
    assert str(result) == "AUROC, a against b: undefined, none of 2 answers is wrong"
    nulls = [name for name, value in result.to_dict().items() if value is None]
    assert {"value_a", "value_b", "difference", "ci_low", "ci_high", "p_value"} < set(nulls)


def test_evaluation_needs_neither_torch_nor_pandas() -> None:
    code = (
        "import sys, vilu.outcomes.evaluate as e, vilu.outcomes.outcomes as o\n"
        "str(e.evaluate(o.Outcomes([0.1, 0.2] * 30, [0, 1] * 30), n_resamples=5))\n"
        "print([m for m in ('torch', 'pandas', 'sklearn', 'pyarrow', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
