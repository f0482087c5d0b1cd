"""Test which answer is judged: the zero-shot answer, the method's own, or a given one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import PREDICTORS
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary

QUICK = {"hidden": (16, 8), "epochs": 4, "batch_size": 64, "width": 16, "members": 2}
WITH_POSTERIOR = [name for name, cls in PREDICTORS.items() if cls.has_posterior]
OF_IMAGE_OR_ALL_LOGITS = ("pvu", "knn_distance", "entropy", "doctor", "energy", "gen", "kl_uniform")
"""Scores that do not depend on the answer."""


@pytest.fixture(scope="module")
def train() -> Embeddings:
    return of_the_classes(400, seed=1)


@pytest.fixture(scope="module")
def test() -> Embeddings:
    return of_the_classes(300, seed=2)


def of_the_classes(n: int, seed: int) -> Embeddings:
    """Return toy rows without everyday words.

    Then no method has the outcome "outside", so u = 1 - q_a.
    """
    data = toy_embeddings(n, seed=seed)
    names = data.columns - {"negatives"}
    return variant(data, columns={name: data.column(name, torch.arange(n)) for name in names})


def make(name: str, **more: object) -> vilu.FailurePredictor:
    cls = PREDICTORS[name]
    quick = {
        key: value
        for key, value in QUICK.items()
        if key in parameters(cls) and not (key == "members" and name == "stacking")
    }
    return cls(**quick, **more)


def with_answers(data: Embeddings, answer: np.ndarray) -> Embeddings:
    columns = {name: data.column(name, torch.arange(len(data))) for name in data.columns}
    return variant(data, columns={**columns, "answer": answer})


def probabilities(data: Embeddings) -> np.ndarray:
    logits = data.space.logit_scale * (data.image.double() @ data.text.double().T).numpy()
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def zero_shot(data: Embeddings) -> np.ndarray:
    return (data.image @ data.text.T).argmax(dim=1).numpy()


@pytest.mark.parametrize("name", WITH_POSTERIOR)
def test_an_adapted_answer_is_the_likeliest_of_the_posterior(
    name: str, train: Embeddings, test: Embeddings
) -> None:
    outcomes = vilu.score(make(name, answer="adapted").fit(train), test)
    predictor = make(name).fit(train)
    (batch,) = test.batches(len(test), columns=predictor.columns_to_score)
    posterior = predictor.log_posterior(batch).exp().numpy()
    assert np.array_equal(outcomes.prediction, posterior.argmax(axis=1))
    assert np.array_equal(outcomes.zero_shot, zero_shot(test))
    assert np.array_equal(outcomes.failure, outcomes.prediction != test.target.numpy())
    assert outcomes.answer == "adapted"
    assert np.allclose(outcomes.uncertainty, 1 - posterior.max(axis=1), atol=1e-6)


def test_adapted_answers_are_better_where_texts_are_poor(
    train: Embeddings, test: Embeddings
) -> None:
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=tuple(train.text.shape)))
    text = torch.nn.functional.normalize(train.text + 0.4 * noise.float(), dim=1)
    fit_rows, new_rows = variant(train, text=text), variant(test, text=text)
    failure = vilu.score(make("linear_probe").fit(fit_rows), new_rows).failure
    adapted = make("linear_probe", answer="adapted").fit(fit_rows)
    # Both risks are shares on the same 300 rows. Three standard errors of their difference are
    # below 10 points.
    assert vilu.score(adapted, new_rows).failure.mean() < failure.mean() - 0.1


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_given_zero_shot_answers_change_no_score(
    name: str, train: Embeddings, test: Embeddings
) -> None:
    if name == "neglabel":  # it compares with words, and these rows have no words
        train, test = toy_embeddings(400, seed=1), toy_embeddings(300, seed=2)
    plain = make(name).fit(train).predict_uncertainty(test)
    given = make(name, answer="given").fit(with_answers(train, zero_shot(train)))
    same = given.predict_uncertainty(with_answers(test, zero_shot(test)))
    assert np.allclose(same, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WITH_POSTERIOR)
def test_a_given_answer_is_as_uncertain_as_it_is_unlikely(
    name: str, train: Embeddings, test: Embeddings
) -> None:
    answer = np.roll(test.target.numpy(), 1)
    predictor = make(name, answer="given")
    predictor.fit(with_answers(train, zero_shot(train)))
    (batch,) = test.batches(len(test), columns=predictor.columns_to_score)
    posterior = predictor.log_posterior(batch).exp().numpy()
    uncertainty = predictor.predict_uncertainty(with_answers(test, answer))
    assert np.allclose(uncertainty, 1 - posterior[np.arange(len(test)), answer], atol=1e-6)


def test_scores_of_the_logits_judge_the_given_answer(test: Embeddings) -> None:
    answer = np.random.default_rng(0).integers(test.n_candidates, size=len(test))
    data = with_answers(test, answer)
    p = probabilities(test)
    rows = np.arange(len(test))
    of_answer = p[rows, answer]
    others = p.copy()
    others[rows, answer] = 0
    logit = np.log(p)
    expected = {
        "mcm": 1 - of_answer,
        "prob_margin": 1 - of_answer + others.max(axis=1),
        "margin": np.log(others.max(axis=1)) - np.log(of_answer),
    }
    for name, uncertainty in expected.items():
        scores = make(name, answer="given").predict_uncertainty(data)
        assert np.allclose(scores, uncertainty, rtol=1e-4, atol=1e-6), name
    # In each row, the logits and their logarithms differ by a constant.
    scores = make("max_logit", answer="given").predict_uncertainty(data)
    difference = scores + logit[rows, answer]
    assert np.allclose(
        difference, make("max_logit").predict_uncertainty(test) + logit.max(axis=1), atol=1e-3
    )


def test_an_answer_far_below_the_largest_logit_is_wrong() -> None:
    """exp(1000) is infinite, but the probability of the answer is 0."""
    data = Embeddings.from_logits([[1000.0, 0.0, 0.0], [0.0, 2.0, 1.0]], answer=[1, 1])
    expected = {"mcm": 1.0, "prob_margin": 2.0, "margin": 1000.0}
    for name, uncertainty in expected.items():
        scores = make(name, answer="given").predict_uncertainty(data)
        assert scores[0] == uncertainty
        assert np.isfinite(scores).all()


def test_answers_follow_candidates_that_are_taken(test: Embeddings) -> None:
    data = with_answers(test, zero_shot(test))
    turned = data.take(np.arange(len(data)), classes=[4, 3, 2, 1, 0])
    scores = [vilu.score(make("mcm", answer="given"), rows) for rows in (data, turned)]
    assert np.array_equal(scores[0].failure, scores[1].failure)
    assert np.allclose(scores[0].uncertainty, scores[1].uncertainty, atol=1e-6)
    fewer = data.take(np.arange(len(data)), classes=[0, 1])
    with pytest.raises(DataError, match=r"some answers are classes that take\("):
        vilu.score(make("mcm", answer="given"), fewer)


@pytest.mark.parametrize("name", OF_IMAGE_OR_ALL_LOGITS)
def test_a_score_that_knows_no_answer_stays(name: str, train: Embeddings, test: Embeddings) -> None:
    if name in ("pvu", "knn_distance"):
        predictor = make(name, answer="given").fit(with_answers(train, zero_shot(train)))
    else:
        predictor = make(name, answer="given")
    first = predictor.predict_uncertainty(with_answers(test, zero_shot(test)))
    second = predictor.predict_uncertainty(with_answers(test, test.target.numpy()))
    assert np.array_equal(first, second)


def test_failures_to_learn_from_are_those_of_the_given_answers(train: Embeddings) -> None:
    all_right = with_answers(train, train.target.numpy())
    with pytest.raises(DataError, match="Found 0 failures"):
        make("lvu", answer="given").fit(all_right)


def test_names_are_answers_too(test: Embeddings) -> None:
    names = [f"class {number}" for number in range(test.n_candidates)]
    by_name = vilu.Embeddings(
        test.image,
        test.text,
        class_names=names,
        columns={"answer": [names[row] for row in zero_shot(test)]},
    )
    (batch,) = by_name.batches(len(test), columns=["answer"])
    assert batch.prediction.tolist() == zero_shot(test).tolist()


def test_an_answer_outside_the_candidates_is_refused(test: Embeddings) -> None:
    answer = zero_shot(test)
    with pytest.raises(DataError, match="none of the candidates cannot be judged"):
        with_answers(test, np.where(answer == answer[0], -1, answer))
    with pytest.raises(DataError, match="Got 'zebra' too"):
        vilu.Embeddings(
            np.eye(2), np.eye(2), class_names=["cat", "dog"], columns={"answer": ["cat", "zebra"]}
        )
    with pytest.raises(DataError, match="give class_names"):
        vilu.Embeddings(np.eye(2), np.eye(2), columns={"answer": ["cat", "dog"]})


def test_answers_follow_candidates_that_are_merged() -> None:
    text = np.eye(3)[[0, 1, 1, 2]]
    data = vilu.Embeddings(np.eye(3), text, columns={"answer": [0, 2, 3]})
    (batch,) = data.batches(3, columns=["answer"])
    assert batch.prediction.tolist() == [0, 1, 2]


def test_data_without_answers_are_refused(train: Embeddings, test: Embeddings) -> None:
    predictor = make("mcm", answer="given")
    with pytest.raises(DataError, match="needs the column 'answer'"):
        predictor.predict_uncertainty(test)
    with pytest.raises(DataError, match="needs the column 'answer'"):
        make("vilu_plus", answer="given").fit(train)


def test_a_method_without_a_posterior_refuses_adapted_answers(
    train: Embeddings, test: Embeddings
) -> None:
    for name in PREDICTORS:
        if name in WITH_POSTERIOR:
            continue
        with pytest.raises(UsageError, match=f"{name} has no posterior.*vilu_plus"):
            make(name, answer="adapted").fit(train)
    with pytest.raises(UsageError, match="mcm has no posterior"):
        make("mcm", answer="adapted").predict_uncertainty(test)


def test_captions_have_adapted_answers_of_their_pools() -> None:
    pairs = toy_pairs(256, 32)
    outcomes = vilu.score(make("vilu_plus", answer="adapted").fit(pairs), toy_pairs(64, 32, seed=3))
    assert outcomes.prediction.max() < 32


def test_the_answer_is_saved_and_in_the_fingerprint(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    adapted = make("linear_probe", answer="adapted").fit(train)
    fingerprint = adapted.save(tmp_path / "adapted")
    assert fingerprint != make("linear_probe").fit(train).save(tmp_path / "zero_shot")
    again = vilu.load(tmp_path / "adapted")
    assert again.answer == "adapted"
    assert np.array_equal(again.predict_uncertainty(test), adapted.predict_uncertainty(test))


def test_tables_name_the_answer_and_the_zero_shot_one(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    outcomes = vilu.score(make("linear_probe", answer="adapted").fit(train), test)
    columns, _ = outcomes.table()
    assert set(columns["answer"].to_pylist()) == {"adapted"}
    assert columns["zero_shot"].to_pylist() == zero_shot(test).tolist()
    for suffix in ("parquet", "csv"):
        outcomes.save(tmp_path / f"scores.{suffix}")
        again = vilu.Outcomes.load(tmp_path / f"scores.{suffix}")
        assert again.answer == "adapted"
        assert np.array_equal(again.zero_shot, outcomes.zero_shot)
    table = vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=0)
    assert table.to_dicts()[0]["answer"] == "adapted"
    assert "linear_probe (adapted)" in str(table)
    zero = vilu.score(make("linear_probe").fit(train), test)
    both = vilu.evaluate([outcomes, zero], metrics=["aurc"], n_resamples=0)
    assert [row.answer for row in both.mean_over_seeds()] == ["adapted", "zero_shot"]
    assert "not to be compared" not in str(both)
    ranked = vilu.evaluate([outcomes, zero], metrics=["auroc", "aurc"], n_resamples=0)
    assert "AUROC: not to be compared between kinds of answers" in str(ranked)


def test_parts_of_scores_keep_the_answer(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    predictor = make("linear_probe", answer="adapted").fit(train)
    folder = vilu.score_parts(predictor, test, tmp_path / "scores")
    outcomes = vilu.score(predictor, test)
    assert np.array_equal(folder.outcomes().zero_shot, outcomes.zero_shot)
    assert folder.outcomes().answer == folder.tally().answer == "adapted"


def test_a_guard_files_the_judged_answer_and_shows_the_zero_shot_one(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    names = [f"class {number}" for number in range(5)]
    rows = torch.arange(len(test))
    plain = vilu.Embeddings(
        train.image, train.text, target=train.target, logit_scale=20.0, class_names=names
    )
    predictor = make("linear_probe", answer="adapted").fit(plain)
    predictor.save(tmp_path)
    Vocabulary(tuple(names), plain.text, plain.space, "float32", {}).save(tmp_path)
    guard = vilu.Guard(tmp_path, vectors_only=True)
    arrays = {guard.arrays[0]: test.image_rows(rows)}
    answers, _ = guard.answer(arrays, [str(row) for row in rows.tolist()])
    outcomes = vilu.score(
        predictor, vilu.Embeddings(test.image, test.text, target=None, logit_scale=20.0)
    )
    first = zero_shot(test)
    n_others = 0
    for row, answer in enumerate(answers):
        adapted = names[outcomes.prediction[row]]
        assert answer.label == adapted
        assert adapted not in dict(answer.runners_up)
        is_other = names[first[row]] != adapted
        assert answer.zero_shot == (names[first[row]] if is_other else None)
        n_others += is_other
    assert n_others > 0


def test_a_calibration_holds_for_its_kind_of_answers(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    make("linear_probe", answer="adapted").fit(train).save(tmp_path)
    calibration = vilu.calibrate_predictor(tmp_path, test, vilu.Target(max_risk=0.3))
    predictor = load_predictor(tmp_path)
    assert calibration.rows.answer == "adapted"
    assert "accept" in vilu.score(predictor, test, calibration=calibration).decision
    predictor.answer = "zero_shot"
    with pytest.raises(ProvenanceError, match=r"judge adapted answers.*judges zero_shot"):
        vilu.score(predictor, test, calibration=calibration)
    monitor = vilu.Monitor(calibration.rows, calibration.rule)
    zero = vilu.score(make("linear_probe").fit(train), test)
    with pytest.raises(ProvenanceError, match="these scores judge zero_shot answers"):
        monitor.update(zero)


def test_rankings_of_other_answers_are_not_compared(train: Embeddings, test: Embeddings) -> None:
    zero = vilu.score(make("linear_probe").fit(train), test)
    adapted = vilu.score(make("linear_probe", answer="adapted").fit(train), test)
    with pytest.raises(UsageError, match="Compare one of aurc, risk_at_coverage"):
        vilu.compare(adapted, zero)
    comparison = vilu.compare(adapted, zero, metric="aurc", n_resamples=300)
    expected = [vilu.metrics.aurc(o.uncertainty, o.failure) for o in (adapted, zero)]
    assert comparison.difference == pytest.approx(expected[0] - expected[1])
    assert comparison.ci_low < comparison.difference < comparison.ci_high


def test_a_comparison_across_answers_covers_the_truth() -> None:
    # Two independent judges have the same quality, so the difference between their risks is 0.
    rng = np.random.default_rng(5)
    n_missed = 0
    n_sets = 200
    for _ in range(n_sets):
        sides = []
        for kind in ("zero_shot", "adapted"):
            probability = rng.random(150)
            failure = (rng.random(150) < probability).astype(int)
            sides.append(vilu.Outcomes(probability, failure, answer=kind))
        comparison = vilu.compare(*sides, metric="risk_at_coverage_0.8", n_resamples=200)
        n_missed += not comparison.ci_low <= 0 <= comparison.ci_high
    # 5 % of 200 are 10. 21 or more have a probability of 0.12 %.
    assert n_missed <= 20
