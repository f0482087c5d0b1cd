"""Test the methods for tables against scikit-learn, by hand, and as predictors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression

import vilu
from tests.tables.answers import columns, table
from vilu.errors import DataError, NotFittedError, UsageError
from vilu.methods import AnswerProbe, AnswerScore, AnswerScores
from vilu.metrics import auroc
from vilu.predictors.persistence.storage import load_predictor
from vilu.tables.combine import (
    MAP_MAKERS,
    best_probe,
    log_losses,
    make_folds,
    platt_scaling,
    ridge_logistic,
    rising_logistic,
)

FITTED = (AnswerScores, AnswerProbe)


@pytest.mark.parametrize("method", FITTED)
def test_too_few_labels_for_a_cross_validation_are_named(method: type) -> None:
    content = columns(200)
    one_wrong = np.arange(200) != 7
    with (
        pytest.warns(UserWarning, match="only 1 failures"),
        pytest.raises(DataError, match="Got 1 wrong and 199 right"),
    ):
        method().fit({**content, "correct": one_wrong})
    one_page = ["page"] * 200
    with pytest.raises(DataError, match="in 1 cluster, and rows of one cluster are in one fold"):
        method().fit({**content, "cluster": one_page})


@pytest.mark.parametrize("method", FITTED)
def test_rows_of_a_fit_are_known_in_any_order_of_columns(method: type) -> None:
    content = columns(200, features=3)
    predictor = method().fit(content)
    ids = [f"new{row}" for row in range(200)]  # only the content shows that the rows are the same
    turned = dict(reversed({**content, "id": ids, "score_further": np.arange(200)}.items()))
    assert predictor.seen(vilu.open_table(turned)).shared.all()
    assert not predictor.seen(table(200, 5000, features=3)).shared.any()


def test_an_arranged_table_has_a_fingerprint_of_its_own() -> None:
    data = table(20)
    before = data.fingerprint
    names = ["width", "score_a"]
    assert data.arranged(names).fingerprint == table(20).arranged(names).fingerprint != before


def test_one_score_is_turned_by_its_name() -> None:
    data = {"id": ["a", "b"], "score_p": [0.9, 0.2], "uncertainty_h": [3.0, 4.0], "width": [1, 2]}
    assert AnswerScore(column="score_p").predict_uncertainty(data).tolist() == [-0.9, -0.2]
    assert AnswerScore(column="uncertainty_h").predict_uncertainty(data).tolist() == [3.0, 4.0]
    with pytest.raises(UsageError, match="does not say whether"):
        AnswerScore(column="width").predict_uncertainty(data)
    with pytest.raises(DataError, match="Missing: score"):
        AnswerScore().predict_uncertainty(data)


def test_rising_logistic_is_ridge_regression_where_all_weights_rise() -> None:
    """scikit-learn minimises the same loss without the bound, and the bound does not bind here."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 2))
    failure = (inputs.sum(axis=1) + rng.normal(size=500) > 1).astype(np.int64)
    for ridge in (1e-3, 0.1):
        ours = rising_logistic(inputs, failure, ridge)
        theirs = LogisticRegression(C=1 / (ridge * 500), tol=1e-10).fit(inputs, failure)
        # L-BFGS stops at a gradient of 1e-5, and the smallest curvature is above 0.05
        assert ours.weights == pytest.approx(theirs.coef_[0], abs=1e-3)
        assert ours.intercept == pytest.approx(theirs.intercept_[0], abs=1e-3)


def test_a_column_that_points_the_wrong_way_counts_nothing() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 2))
    failure = (inputs[:, 0] - inputs[:, 1] + rng.normal(size=500) > 0).astype(np.int64)
    weights, _ = rising_logistic(inputs, failure, 1e-3)
    assert weights[0] > 0.5
    assert weights[1] == 0


def test_maps_rise_and_end_where_the_fit_ended() -> None:
    numbers = np.random.default_rng(0).normal(size=(300, 1)) ** 3
    beyond = np.array([[numbers.min() - 5], [numbers.max() + 5]])
    ordered = np.sort(numbers, axis=0)
    for make in MAP_MAKERS.values():
        maps = make(numbers)
        assert (np.diff(maps(ordered)[:, 0]) >= 0).all()
        assert maps(beyond) == pytest.approx(maps(ordered[[0, -1]]))
    # by hand: the standard deviation of 0, 0, 2, 2 is 1, so 0 and 2 are 2 deviations apart
    straight = MAP_MAKERS["straight"](np.array([[0.0], [0.0], [2.0], [2.0]]))
    assert straight(np.array([[1.0], [9.0]])).tolist() == [[1.0], [2.0]]
    constant = MAP_MAKERS["ranked"](np.full((5, 1), 7.0))
    assert constant(np.array([[1.0], [9.0]])).tolist() == [[0.0], [0.0]]


def test_platt_mends_log_odds_that_are_too_sure() -> None:
    rng = np.random.default_rng(0)
    log_odds = rng.normal(size=20_000)
    failure = (rng.random(20_000) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    slope, shift = platt_scaling(3 * log_odds + 1, failure)
    # The truth is log_odds = (x - 1) / 3. A slope from 20,000 rows has a standard error near
    # 0.02 / 3.
    assert slope == pytest.approx(1 / 3, abs=0.03)
    assert shift == pytest.approx(-1 / 3, abs=0.06)
    assert platt_scaling(-log_odds, failure) == (1.0, 0.0)


def test_folds_keep_clusters_together() -> None:
    cluster = np.repeat(np.arange(50), 4)
    failure = np.tile([0, 0, 0, 1], 50)
    held_out = [fold.held_out_mask for fold in make_folds(cluster, failure, seed=0)]
    assert np.sum(held_out, axis=0).tolist() == [1] * 200
    for mask in held_out:
        assert len(set(cluster[mask]) & set(cluster[~mask])) == 0


def test_probabilities_are_calibrated_on_new_rows() -> None:
    """A probe with many useless features is too sure, and the held-out folds correct this."""
    test = table(4000, 1000, features=150)
    u = AnswerProbe().fit(table(400, features=150)).predict_uncertainty(test)
    # standard errors: 0.6 points for 4,000 rows with 18 % wrong, and 2 points for the fit
    assert u.mean() == pytest.approx(test.failure.mean(), abs=0.07)
    slope, _ = platt_scaling(np.log(u) - np.log1p(-u), test.failure)
    assert 0.6 < slope < 1.6


def test_rows_of_one_cluster_stay_in_one_fold() -> None:
    data = vilu.open_table({**columns(6), "cluster": ["x", "y", "x", "z", "y", "x"]})
    assert data.inseparable().tolist() == [0, 1, 0, 2, 1, 0]
    copies = {**columns(3), "features": np.eye(3)[[0, 1, 0]]}
    copies["score_a"] = copies["uncertainty_b"] = copies["width"] = [1.0, 1.0, 1.0]
    first, second, third = vilu.open_table(copies).inseparable()
    assert first == third != second


def test_copies_in_two_clusters_join_these_clusters() -> None:
    content = {**columns(5), "features": np.eye(5)[[0, 1, 0, 2, 3]]}
    for name in ("score_a", "uncertainty_b", "width"):
        content[name] = [1.0, 2.0, 1.0, 3.0, 4.0]
    # rows 0 and 2 are copies, so the clusters x and y are one group, and z is alone
    data = vilu.open_table({**content, "cluster": ["x", "x", "y", "y", "z"]})
    assert data.inseparable().tolist() == [0, 0, 0, 0, 1]


def test_the_strength_of_the_probe_is_the_best_of_a_cross_validation() -> None:
    """The reference is scikit-learn's log-loss on each fold, from a fit without that fold."""
    data = table(400, features=40)
    inputs = np.hstack([data.matrix(list(data.numbers)), data.features])
    failure = data.failure
    folds = make_folds(np.arange(400), failure, seed=0)
    probe, compared = best_probe(inputs, failure, folds)
    for ridge, loss in compared.loss_of_option.items():
        losses = np.empty(400)
        for fitted, held_out in folds:
            mean, deviation = inputs[fitted].mean(axis=0), inputs[fitted].std(axis=0)
            model = LogisticRegression(C=1 / (ridge * fitted.sum()), max_iter=1000)
            model.fit((inputs[fitted] - mean) / deviation, failure[fitted])
            log_odds = model.decision_function((inputs[held_out] - mean) / deviation)
            losses[held_out] = log_losses(log_odds, failure[held_out])
        assert loss == pytest.approx(losses.mean(), rel=1e-6)
    assert compared.best_option == min(
        compared.loss_of_option, key=compared.loss_of_option.__getitem__
    )
    raw = ridge_logistic(
        (inputs - inputs.mean(axis=0)) / inputs.std(axis=0), failure, compared.best_option
    )
    assert probe.linear.weights == pytest.approx(compared.slope * raw.weights)
    assert probe.linear.intercept == pytest.approx(compared.slope * raw.intercept + compared.shift)


@pytest.mark.parametrize("method", FITTED)
def test_several_columns_beat_the_best_of_them(method: type) -> None:
    """Each column sees the hidden certainty with its own noise."""
    test = table(4000, 1000)
    predictor = method().fit(table(1000))
    combined = auroc(predictor.predict_uncertainty(test), test.failure)
    alone = auroc(-test.numbers["score_a"], test.failure)
    # the standard error of either is below 0.01
    assert combined > alone + 0.02


def test_the_sign_of_a_column_is_learned_and_stated() -> None:
    predictor = AnswerScores().fit(table(1000))
    assert predictor.notes_["signs"] == {"score_a": 1, "uncertainty_b": -1, "width": -1}
    shares = predictor.notes_["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares["score_a"], shares["uncertainty_b"]) > 0.25
    assert shares["width"] < 0.2


def test_a_score_that_is_inverted_by_mistake_is_not_used() -> None:
    content = columns(1000)
    content["score_a"] = -content["score_a"]
    shares = AnswerScores().fit(content).notes_["shares"]
    assert shares["score_a"] == 0


@pytest.mark.parametrize("method", FITTED)
def test_contributions_add_up_to_the_log_odds(method: type) -> None:
    data = table(500, features=40)
    predictor = method().fit(data)
    u = predictor.predict_uncertainty(data)
    log_odds = np.log(u) - np.log1p(-u)
    total = sum(predictor.contributions(data).values())
    assert total == pytest.approx(log_odds - log_odds.mean(), abs=1e-8)


@pytest.mark.parametrize("method", FITTED)
def test_a_saved_predictor_scores_the_same_in_any_order_of_columns(
    method: type, tmp_path: Path
) -> None:
    data = table(300, 500, features=40)
    predictor = method().fit(table(500, features=40))
    fingerprint = predictor.save(tmp_path / "p")
    again = load_predictor(tmp_path / "p")
    expected = predictor.predict_uncertainty(data)
    assert np.array_equal(again.predict_uncertainty(data), expected)
    assert again.save(tmp_path / "q") == fingerprint
    content = columns(300, 500, features=40)
    turned = dict(reversed(content.items())) | {"another": np.zeros(300)}
    assert np.array_equal(predictor.predict_uncertainty(turned), expected)


def test_one_seed_gives_the_same_fit() -> None:
    first = AnswerScores().fit(table(300)).state()
    second = AnswerScores().fit(table(300)).state()
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_what_does_not_fit_is_refused_in_words() -> None:
    data = table(300)
    with pytest.raises(UsageError, match="mcm takes embeddings of images"):
        vilu.MCM().predict_uncertainty(data)
    embeddings = vilu.Embeddings(np.eye(2), np.eye(2), target=[0, 1])
    with pytest.raises(UsageError, match="answer_scores takes a table of answers"):
        AnswerScores().fit(embeddings)
    with pytest.raises(NotFittedError):
        AnswerScores().predict_uncertainty(data)
    with pytest.raises(UsageError, match="judges the answers of a table"):
        AnswerScores(answer="zero_shot").fit(data)
    predictor = AnswerProbe().fit(table(300, features=40))
    with pytest.raises(DataError, match="this table has none"):
        predictor.predict_uncertainty(data)
    with pytest.raises(DataError, match="fitted on a table with 40 features"):
        predictor.predict_uncertainty(table(300, features=50))
    combined = AnswerScores().fit(table(300, features=40))
    with pytest.raises(DataError, match="fitted on a table with 40 features"):
        vilu.Selective(combined).calibrate(table(300, 500, features=50), max_risk=0.2)
    bare = vilu.Selective(combined).calibrate(table(300, 500), max_risk=0.2)
    assert bare.calibration.n == 300
    without = {name: values for name, values in columns(300).items() if name != "width"}
    with pytest.raises(DataError, match="Missing: width"):
        AnswerScores().fit(data).predict_uncertainty(without)
    bare = {"id": range(40), "features": np.eye(40), "correct": [0, 1] * 20}
    with pytest.raises(DataError, match="only features"):
        AnswerScores().fit(bare)
    with pytest.raises(DataError, match="none of the 2 training rows has a label"):
        AnswerScores().fit({"id": [1, 2], "score": [0.1, 0.2]})


def test_rows_of_the_fit_do_not_calibrate() -> None:
    data = table(600)
    model = vilu.Selective(AnswerScores().fit(data[:300]))
    with pytest.raises(DataError, match="100 of 400 calibration rows were used to fit"):
        model.calibrate(data[200:], max_risk=0.2)


def test_rows_with_copied_features_do_not_calibrate() -> None:
    """Copies are found even if they have other identifiers, and near copies are found too."""
    content = columns(600, features=40)
    predictor = AnswerProbe().fit(content)
    copied = {**content, "id": [f"copy{row}" for row in range(600)]}
    with pytest.raises(DataError, match="600 of 600 calibration rows were used to fit"):
        vilu.Selective(predictor).calibrate(vilu.open_table(copied), max_risk=0.2)
    noise = 0.01 * np.random.default_rng(0).normal(size=(600, 40))
    near = {**copied, "features": content["features"] + noise}
    with pytest.raises(DataError, match="have a cosine of at least"):
        vilu.Selective(predictor).calibrate(vilu.open_table(near), max_risk=0.2)


def test_a_calibrated_model_keeps_its_promise_on_new_rows() -> None:
    """At confidence 0.95, the probability that more than 3 in 10 calibrations miss is 0.1 %.

    The calibrations have 800 rows each.
    """
    predictor = AnswerScores().fit(table(1000))
    missed = 0
    for seed in range(10):
        model = vilu.Selective(predictor).calibrate(table(800, 10_000 * (seed + 1)), max_risk=0.05)
        test = table(20_000, 10_000_000)
        outcomes = model.predict(test)
        accepted = np.array(outcomes.decision) == "accept"
        assert accepted.mean() > 0.2
        missed += outcomes.failure[accepted].mean() > 0.05
    assert missed <= 3


def test_a_bare_frame_is_refused_with_what_opens_it() -> None:
    frame = pa.table({"id": [1, 2], "score": [0.5, 0.7]})
    with pytest.raises(UsageError, match=r"vilu\.open_table\(table\)\)\. Got a"):
        vilu.Selective(AnswerScore()).fit(frame)  # type: ignore[arg-type]


def test_rows_of_one_cluster_stay_in_one_part_of_a_split() -> None:
    cluster = [f"page{row // 5}" for row in range(300)]
    data = vilu.open_table({**columns(300), "cluster": cluster})
    parts = data.split(fit=0.5, calibration=0.3, test=0.2, seed=1)
    pages = [set(part.cluster) for part in parts]
    assert sum(map(len, pages)) == len(set.union(*pages)) == 60
    assert [len(names) for names in pages] == pytest.approx([30, 18, 12], abs=2)


def test_a_table_in_place_of_outcomes_is_refused_with_the_way_to_outcomes() -> None:
    with pytest.raises(UsageError, match=r"vilu\.score\(predictor, data\) gives them"):
        vilu.estimate(table(100))


def test_a_calibrated_model_says_how_to_give_it_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    model = vilu.Selective(AnswerScores().fit(table(500))).calibrate(table(800, 1000), max_risk=0.1)
    with pytest.raises(UsageError, match=r"Give vilu\.open_table\(data\)"):
        model.predict(pandas.DataFrame(columns(10, 5000)))
