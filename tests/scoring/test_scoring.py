"""Test how a predictor scores embeddings, and how it recognises rows that it was fitted on."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, ProvenanceError
from vilu.predictors.persistence.storage import load_predictor
from vilu.scoring.score import score_parts, source_fingerprint


def test_outcomes_say_what_was_answered_and_where_from(test: Embeddings) -> None:
    outcomes = vilu.score(vilu.MCM(), test, dataset="toy", split="test")
    logits = test.image @ test.text.T
    assert np.array_equal(outcomes.prediction, logits.argmax(1).numpy())
    assert np.array_equal(outcomes.failure, (logits.argmax(1) != test.target).long().numpy())
    assert outcomes.uncertainty == pytest.approx(
        (1 - (20 * logits).double().softmax(1).amax(1)).numpy(), abs=1e-5
    )
    assert (outcomes.method, outcomes.dataset, outcomes.split) == ("mcm", "toy", "test")
    assert outcomes.provenance["n_candidates"] == 5
    assert outcomes.provenance["space"] == test.space.fingerprint
    assert list(outcomes.ids) == list(test.ids)


def test_unusable_rows_keep_their_place_with_a_reason(test: Embeddings, tmp_path) -> None:
    image = test.image.clone()
    image[2], image[4] = 0, float("inf")
    outcomes = vilu.score(
        vilu.MCM(), Embeddings(image, test.text, target=test.target, logit_scale=20.0)
    )
    assert [outcomes.reason[i] for i in (1, 2, 4)] == [None, "zero_norm", "nonfinite"]
    assert outcomes.prediction[2] == -1
    table = vilu.evaluate(outcomes, n_resamples=0)
    assert table.rows[0].n == 598
    assert table.rows[0].n_unusable == 2
    outcomes.save(tmp_path / "scores.parquet")
    assert np.isnan(vilu.Outcomes.load(tmp_path / "scores.parquet").uncertainty[2])


def test_one_candidate_is_no_question(test: Embeddings) -> None:
    outcomes = vilu.score(
        vilu.MCM(), Embeddings(test.image, test.text[:1], target=None, logit_scale=20.0)
    )
    assert set(outcomes.reason) == {"k<2"}
    with pytest.raises(DataError, match="no"):
        vilu.evaluate(outcomes)


def test_nothing_to_score(test: Embeddings) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        vilu.score(
            vilu.MCM(), Embeddings(np.empty((0, 16)), test.text, target=None, logit_scale=20.0)
        )


def test_pairs_carry_their_pool_size() -> None:
    outcomes = vilu.score(vilu.MCM(), toy_pairs())
    assert outcomes.provenance["pool_size"] == 32
    assert set(outcomes.failure) == {0, 1}


def test_rows_that_were_fitted_on_are_noticed(train: Embeddings) -> None:
    predictor = vilu.LVU(epochs=1, hidden=(4,)).fit(train)
    mixed = toy_embeddings(n=50, seed=5)
    mixed.image[:20] = toy_embeddings().image[580:]  # 20 training rows, under other names
    with pytest.warns(UserWarning, match="20 of 50 rows were used to fit this lvu"):
        outcomes = vilu.score(predictor, mixed)
    assert outcomes.provenance["n_seen_in_fit"] == 20


def with_texts(data: Embeddings, text: torch.Tensor, **changes: object) -> Embeddings:
    return variant(data, text=torch.nn.functional.normalize(text, dim=1), columns={}, **changes)


@pytest.fixture(scope="module")
def head() -> vilu.ViLU:
    return vilu.ViLU(hidden=(8,), epochs=2, seed=0).fit(toy_embeddings())


def test_candidates_without_a_fit_are_named_beside_probabilities(
    head: vilu.ViLU, test: Embeddings, tmp_path: Path
) -> None:
    """Other prompts for the same names, other classes, and fewer classes each give a warning.

    A predictor that was saved and loaded gives it too.
    """
    head.save(tmp_path)
    prompt = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 0.15
    others = {
        "prompts": with_texts(test, test.text + prompt),
        "classes": with_texts(test, torch.randn(5, 16, generator=torch.Generator().manual_seed(1))),
        "fewer": with_texts(
            test, test.text[:4], target=test.target.clamp(max=3), class_names=test.class_names[:4]
        ),
    }
    for predictor in (head, vilu.load(tmp_path)):
        for data in others.values():
            with pytest.warns(
                UserWarning,
                match=r"fitted on other candidates .* still rank the answers, but .* not cal",
            ):
                vilu.score(predictor, data)
        with pytest.warns(UserWarning, match="fitted on other candidates"):
            vilu.score_parts(predictor, others["prompts"], tmp_path / f"scores{id(predictor)}")


def test_candidates_that_are_the_same_are_not_told(head: vilu.ViLU, test: Embeddings) -> None:
    """Other rounding, another order, or other names for the same texts are no change.

    In this test a warning is an error.
    """
    noise = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 1e-3
    turned = [4, 2, 0, 1, 3]
    vilu.score(head, with_texts(test, test.text + noise))
    vilu.score(
        head,
        with_texts(
            test, test.text[turned], class_names=[test.class_names[i] for i in turned], target=None
        ),
    )
    vilu.score(head, variant(test, class_names=[f"n{i}" for i in range(5)]))


def test_what_knows_no_probability_or_no_candidates_says_nothing(
    head: vilu.ViLU, test: Embeddings
) -> None:
    prompts = with_texts(
        test, test.text + 0.15 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    )
    vilu.score(vilu.MCM().fit(test), prompts)  # learns nothing
    vilu.score(vilu.PREDICTORS["sirc"]().fit(toy_embeddings()), prompts)  # no probability
    old = copy.copy(head)
    old.notes_ = {"n_train": 600, "n_failures": 200}
    vilu.score(old, prompts)  # from older code: the candidates are not known
    vilu.score(
        copy.copy(head).calibrate_probability(toy_embeddings(seed=8, ids_from=40_000)), prompts
    )  # its calibration may have used these candidates


def test_a_guarantee_is_none_for_the_same_names_in_other_prompts(
    test: Embeddings, tmp_path: Path
) -> None:
    vilu.MCM().fit(test).save(tmp_path)
    calibrate_predictor(tmp_path, toy_embeddings(seed=8, ids_from=40_000), Target(max_risk=0.5))
    predictor = load_predictor(tmp_path)
    calibration = vilu.Calibration.load(tmp_path)
    vilu.score(predictor, test, calibration=calibration)
    prompts = with_texts(
        test,
        test.text + 0.15 * torch.randn(16, generator=torch.Generator().manual_seed(0)),
        class_names=test.class_names,
    )
    with pytest.raises(
        ProvenanceError, match="the same names in other prompts: its thresholds are not valid"
    ):
        vilu.score(predictor, prompts, calibration=calibration)


def test_a_probability_from_so_few_rows_is_told() -> None:
    rows = toy_embeddings()
    with pytest.warns(
        UserWarning, match="vilu_plus is fitted on 1 row: with fewer than 20 its probabilities"
    ):
        vilu.ViLUPlus().fit(rows.take(torch.tensor([0])))
    vilu.ViLUPlus(width=8, epochs=1).fit(rows.take(torch.arange(20)))


def test_scores_say_which_rows_are_of_none_of_the_classes(test: Embeddings, tmp_path: Path) -> None:
    target = test.target.clone()
    target[[1, 4]], target[7] = vilu.OUTSIDE, -1
    image = test.image.clone()
    image[4] = 0
    data = variant(test, image=image, target=target, class_names=test.class_names)
    outcomes = vilu.score(vilu.MCM(), data)
    assert np.flatnonzero(outcomes.outside).tolist() == [1, 4]
    assert outcomes.target[[1, 4, 7]].tolist() == [-1, -1, -1]
    assert outcomes.failure[[1, 4, 7]].tolist() == [
        1,
        -1,
        -1,
    ]  # row 4 has no answer that could be wrong
    other = np.delete(np.arange(len(data)), [1, 4])
    assert not outcomes.outside[other].any()
    outcomes.save(tmp_path / "a.parquet")
    assert np.flatnonzero(vilu.Outcomes.load(tmp_path / "a.parquet").outside).tolist() == [1, 4]
    folder = score_parts(vilu.MCM(), data, tmp_path / "parts", rows_per_part=1)
    assert np.flatnonzero(folder.outcomes().outside).tolist() == [1, 4]
    unknown = variant(data, target=data.target)
    assert source_fingerprint(data) != source_fingerprint(unknown)
