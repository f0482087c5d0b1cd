"""Test the choice between zero-shot answers and a method's own answers."""

from __future__ import annotations

import numpy as np
import pytest

import vilu
from tests.conftest import few
from vilu.calibration.answer_choice import choose_answer
from vilu.embeddings.memory import Embeddings
from vilu.errors import UsageError
from vilu.predictors.contract.held_out import HeldOutAnswers
from vilu.predictors.plus.vilu_plus import ViLUPlus

K, D = 6, 512


def photos(n: int, noise: float, *, shift: float = 0.0, seed: int = 0) -> Embeddings:
    """Return images around their class, whose texts are ``shift`` away from the classes."""
    rng = np.random.default_rng(seed)
    target = np.arange(n) % K
    image = np.eye(K, D)[target] + noise * rng.normal(size=(n, D)) / np.sqrt(D)
    text = np.eye(K, D) + shift * np.eye(K, D)[np.roll(np.arange(K), 1)]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return Embeddings(image, text, target=target, logit_scale=20.0)


def probe(train: Embeddings) -> vilu.FailurePredictor:
    return vilu.PREDICTORS["linear_probe"]().fit(train)


def test_answers_that_labels_mend_are_adapted() -> None:
    # The texts are nearer to the next class, so zero-shot answers are wrong.
    train = photos(300, 1.0, shift=1.5)
    choice = choose_answer(probe(train), train, 0.05)
    assert choice.answer == "adapted"
    assert "of 300 held-out rows, 100% of the adapted" in choice.reason


def test_a_poor_posterior_leaves_zero_shot_answers() -> None:
    train = photos(30 * K, 7.0)  # the texts are right, and the labels are few and noisy
    choice = choose_answer(probe(train), train, 0.05)
    assert choice.answer == "zero_shot"
    assert str(choice).startswith("The zero-shot answers of the model are judged: of 180 held-out")


def test_no_comparison_where_a_class_has_one_label() -> None:
    train = photos(10 * K, 4.0)
    one_label = np.flatnonzero(train.target.numpy() == 0)[:1]
    rest = np.flatnonzero(train.target.numpy() != 0)
    unbalanced = train.take(np.sort(np.concatenate([one_label, rest])))
    choice = choose_answer(probe(unbalanced), unbalanced, 0.05)
    assert choice.answer == "adapted"
    assert "nothing was compared" in choice.reason


def test_a_method_without_a_posterior_stays_zero_shot() -> None:
    train = photos(60, 1.0)
    choice = choose_answer(vilu.MCM().fit(train), train, 0.05)
    assert choice.answer == "zero_shot"
    assert "mcm" in choice.reason


@pytest.mark.filterwarnings("ignore:.*were used to fit:UserWarning")
def test_the_fit_holds_out_the_rows_that_it_was_not_fitted_on() -> None:
    train, held = photos(30 * K, 2.0, shift=0.5), photos(90, 2.0, shift=0.5, seed=1)
    predictor = ViLUPlus(width=16, epochs=1).fit(train, held)
    for kind in ("zero_shot", "adapted"):
        scores = vilu.score(predictor.judging(kind), photos(90, 2.0, shift=0.5, seed=1))
        judged = getattr(predictor.held_out_, kind)
        # Float32 logits up to 100 leave a relative error near 1e-5 in a small probability.
        assert judged.uncertainty == pytest.approx(scores.uncertainty, rel=1e-4)
        assert judged.failure.tolist() == scores.failure.tolist()


def test_held_out_answers_by_hand() -> None:
    q = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    held_out = HeldOutAnswers.of_posterior(
        np.log(q), zero_shot=np.array([0, 2]), target=np.array([1, 1])
    )
    assert held_out.zero_shot.uncertainty == pytest.approx([0.3, 0.7])
    assert held_out.zero_shot.failure.tolist() == [1, 1]
    assert held_out.adapted.uncertainty == pytest.approx([0.3, 0.4])
    assert held_out.adapted.failure.tolist() == [1, 0]


@pytest.mark.parametrize(
    "name", few(["linear_probe", "class_gaussians", "vilu_zero", "vilu_plus"], 3)
)
def test_judging_is_the_fit_with_that_answer(name: str) -> None:
    train, new = photos(120, 1.5, shift=0.5), photos(50, 1.5, shift=0.5, seed=1)
    method = vilu.PREDICTORS[name]
    expected = vilu.score(method(answer="adapted").fit(train), new)
    judging = vilu.score(method().fit(train).judging("adapted"), new)
    assert np.array_equal(judging.uncertainty, expected.uncertainty)
    assert np.array_equal(judging.failure, expected.failure)


def test_learned_failures_are_of_one_kind_of_answers() -> None:
    train = photos(120, 11.0)
    predictor = vilu.LVU(hidden=(4,), epochs=1).fit(train)
    with pytest.raises(UsageError, match="Fit it again"):
        predictor.judging("given")


def test_selective_chooses_by_the_risk_that_is_asked() -> None:
    parts = photos(600, 1.0, shift=1.5).split(fit=0.5, calibration=0.5)
    model = vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(parts.fit)
    assert model.choice is None
    model.calibrate(parts.calibration, max_risk=0.1)
    assert model.choice is not None
    assert "0.1 risk" in model.choice.reason
    assert model.predictor.answer == model.choice.answer == "adapted"
    kept = model.choice
    assert model.calibrate(parts.calibration, max_risk=0.2).choice is kept


def test_selective_keeps_an_answer_that_was_asked_for() -> None:
    parts = photos(600, 1.0, shift=0.2).split(fit=0.5, calibration=0.5)
    model = vilu.Selective(vilu.PREDICTORS["linear_probe"](), answer="zero_shot").fit(parts.fit)
    model.calibrate(parts.calibration, max_risk=0.2)
    assert model.choice is None
    assert model.predictor.answer == "zero_shot"
