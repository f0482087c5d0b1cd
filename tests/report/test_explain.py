"""Test what an explanation says beside its attribution, and what is refused.

An explanation also names answers, competitors and neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, without_words
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.pairs import Pools
from vilu.embeddings.rows import SCORING_BATCH
from vilu.errors import DataError, NotFittedError, ProvenanceError, UsageError
from vilu.predictors.bank import search
from vilu.report.explain.competitors import strongest_competitor
from vilu.report.explain.explain import Depth

QUICK = {"hidden": (16, 8), "epochs": 3, "width": 16}


@pytest.fixture(scope="module")
def plus(train: Embeddings) -> vilu.ViLUPlus:
    return vilu.ViLUPlus(width=16, epochs=3).fit(without_words(train))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def zero_shot(data: Embeddings) -> np.ndarray:
    return softmax(data.space.logit_scale * (data.image @ data.text.T).double().numpy())


def test_answers_are_those_of_the_scores(plus, test: Embeddings) -> None:
    outcomes, p = vilu.score(plus, test), zero_shot(test)
    found = vilu.explain(plus, test, n=7)
    assert [row.row for row in found] == np.argsort(-outcomes.uncertainty, kind="stable")[
        :7
    ].tolist()
    for row in found:
        assert row.key == test.ids[row.row]
        assert row.answer == test.class_names[outcomes.prediction[row.row]]
        assert row.truth == test.class_names[int(test.target[row.row])]
        assert row.wrong == bool(outcomes.failure[row.row])
        # the two numbers are equal to the last bit
        assert row.uncertainty == outcomes.uncertainty[row.row]
        assert row.posterior == pytest.approx(p[row.row].max(), abs=1e-5)
    assert found.method == outcomes.method
    assert found.is_probability


@pytest.mark.parametrize("name", ["vilu_plus", "vilu", "mcm", "energy", "knn_distance"])
def test_a_few_rows_of_many_blocks_have_the_numbers_of_the_scores(
    train: Embeddings, name: str
) -> None:
    """Blocks with other rows or another size would round in another way."""
    data = toy_embeddings(n=2 * SCORING_BATCH + 300, seed=3, ids_from=20_000)
    quick = {"vilu_plus": {"width": 16, "epochs": 2}, "vilu": {"hidden": (8,), "epochs": 2}}
    predictor = vilu.PREDICTORS[name](**quick.get(name, {})).fit(train)
    outcomes = vilu.score(predictor, data)
    rows = [len(data) - 1, 5, SCORING_BATCH, 2 * SCORING_BATCH - 1, 2 * SCORING_BATCH + 7]
    for row in vilu.explain(predictor, data, rows=rows, depth=Depth(background=8)):
        assert row.uncertainty == outcomes.uncertainty[row.row]
        assert row.answer == data.class_names[outcomes.prediction[row.row]]
        has_one_input = len(vars(vilu.PREDICTORS[name]).get("looks_at", ())) == 1
        # so the whole score is attributed to this input, in the scale of the score
        if has_one_input:
            assert row.attribution.score == row.uncertainty


def test_rows_by_key_and_by_number(plus, test: Embeddings) -> None:
    found = vilu.explain(plus, test, rows=["row-10007", 3, "row-10000", 7])
    assert [row.row for row in found] == [7, 3, 0]
    unlabelled = Embeddings(
        test.image,
        test.text,
        target=None,
        logit_scale=20.0,
        columns={"features": test._columns["features"]},
    )
    row = vilu.explain(plus, unlabelled, rows=[3]).rows[0]
    assert (row.truth, row.wrong, row.key) == (None, None, "3")
    assert row.answer.startswith("candidate ")


def test_competitors_of_vilu_are_its_attention(train, test: Embeddings) -> None:
    for form in ("official", "paper"):
        predictor = vilu.ViLU(attention=form, hidden=(8,), epochs=3).fit(train)
        w = {
            name: m.detach().double().numpy()
            for name, m in predictor.heads[0].attention.named_parameters()
        }
        query, key, scale = (
            (w["query"], w["key"], 1 / math.sqrt(16))
            if form == "paper"
            else (w["image"], w["text"], 20.0)
        )
        z, t = test.image.double().numpy(), test.text.double().numpy()
        alpha = softmax(scale * (z @ query.T) @ (t @ key.T).T)
        found = vilu.explain(predictor, test, rows=[5, 17], depth=Depth(candidates=3))
        assert "attention" in found.weights
        for row in found:
            order = np.argsort(-alpha[row.row])[:3]
            assert [c.name for c in row.competitors] == [test.class_names[j] for j in order]
            assert [c.weight for c in row.competitors] == pytest.approx(
                alpha[row.row][order], abs=1e-5
            )
            assert [c.posterior for c in row.competitors] == pytest.approx(
                zero_shot(test)[row.row][order], abs=1e-5
            )


def test_competitors_of_vilu_plus_are_its_posterior(plus, test: Embeddings) -> None:
    found = vilu.explain(plus, test, n=20, depth=Depth(candidates=5))
    assert "pooled experts" in found.weights
    for row in found:
        weights = {c.name: c.weight for c in row.competitors}
        assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
        # u = 1 - q of the answer. q moves by at most half the change in a logit. Each of two
        # computations has a float32 sum over D + 1 products, at a scale of 20.
        assert 1 - weights[row.answer] == pytest.approx(row.uncertainty, abs=20 * 17 * 2**-24)


def test_the_strongest_competitor_is_never_the_answer(plus, test: Embeddings) -> None:
    competitor = strongest_competitor(vilu.MCM(), test)
    expected = np.argsort(-zero_shot(test), axis=1)[:, 1]
    assert np.array_equal(competitor, expected)
    assert (strongest_competitor(plus, test) != zero_shot(test).argmax(axis=1)).all()


@pytest.mark.parametrize("name", list(vilu.PREDICTORS))
def test_every_method_is_explained(train, test: Embeddings, name: str) -> None:
    cls = vilu.PREDICTORS[name]
    quick = {
        key: value
        for key, value in QUICK.items()
        if key in {f.name for f in dataclasses.fields(cls)}
    }
    if name == "stacking":
        quick["members"] = ("mcm", "knn_vote")
    predictor = cls(**quick).fit(train)
    found = vilu.explain(predictor, test, train, n=2, depth=Depth(background=8))
    for row in found:
        assert len(row.competitors) == 5
        assert sum(c.weight for c in row.competitors) == pytest.approx(
            1, abs=1e-5
        )  # there are five candidates
        assert all(n.answer != n.truth for n in row.failures)
        assert all(n.answer == n.truth for n in row.successes)
        if row.attribution is not None:
            total = row.attribution.baseline + sum(row.attribution.parts.values())
            assert total == pytest.approx(row.attribution.score, abs=1e-9)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["method"] == predictor.label
    assert found.rows[0].key in str(found)


def brute_neighbours(
    image: torch.Tensor, train: Embeddings, *, wrong: bool, without: str = ""
) -> list[int]:
    answer = (train.image @ train.text.T).argmax(dim=1)
    cosine = (
        (train.image.double() @ image.double())
        / train.image.double().norm(dim=1)
        / image.double().norm()
    )
    rows = np.argsort(-cosine.numpy(), kind="stable")
    return [
        i for i in rows if bool(answer[i] != train.target[i]) == wrong and train.ids[i] != without
    ]


def test_neighbours_are_the_nearest(
    plus, train, test: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCORING_BATCH", 64)  # so that a search spans several blocks
    answer = (train.image @ train.text.T).argmax(dim=1)
    for row in vilu.explain(plus, test, train, rows=[0, 8, 99], depth=Depth(neighbours=6)):
        for found, wrong in ((row.failures, True), (row.successes, False)):
            expected = brute_neighbours(test.image[row.row], train, wrong=wrong)[:6]
            assert [n.key for n in found] == [train.ids[i] for i in expected]
            cosines = [float(train.image[i] @ test.image[row.row]) for i in expected]
            assert [n.cosine for n in found] == pytest.approx(cosines, abs=1e-5)
            assert [n.answer for n in found] == [
                train.class_names[int(answer[i])] for i in expected
            ]
            assert [n.truth for n in found] == [
                train.class_names[int(train.target[i])] for i in expected
            ]


def test_a_training_row_is_not_its_own_neighbour_and_is_warned_of(plus, train: Embeddings) -> None:
    with pytest.warns(UserWarning, match="2 of 2 explained rows were used to fit this vilu_plus"):
        found = vilu.explain(plus, train, train, rows=[4, 5])
    assert found.n_seen == 2
    for row in found:
        for neighbours, wrong in ((row.failures, True), (row.successes, False)):
            expected = brute_neighbours(train.image[row.row], train, wrong=wrong, without=row.key)[
                :3
            ]
            assert [n.key for n in neighbours] == [train.ids[i] for i in expected]


def test_copies_of_the_explained_picture_do_not_hide_its_neighbours(test: Embeddings) -> None:
    """One wrong picture occurs thirty times. The next failures must show other pictures."""
    wrong = torch.nonzero((test.image @ test.text.T).argmax(dim=1) != test.target).flatten()
    copied = torch.cat([wrong[:1].repeat(30), torch.arange(len(test))])
    train = Embeddings(test.image[copied], test.text, target=test.target[copied], logit_scale=20.0)
    near = vilu.explain(
        vilu.MCM(), test, train, rows=[int(wrong[0])], depth=Depth(neighbours=3)
    ).rows[0]
    cosine = test.image[wrong[1:]] @ test.image[wrong[0]]
    assert near.failures is not None
    assert [n.cosine for n in near.failures] == pytest.approx(
        cosine.sort(descending=True).values[:3].tolist(), abs=1e-5
    )
    all_there_are = vilu.explain(
        vilu.MCM(), test, train, rows=[int(wrong[0])], depth=Depth(neighbours=10**4)
    ).rows[0]
    assert all_there_are.failures is not None
    assert len(all_there_are.failures) == len(wrong) - 1


def test_rows_without_keys_are_the_same_where_their_embeddings_are(test: Embeddings) -> None:
    """Row 0 in one array is row 1 in the other, so it is no neighbour to itself.

    Row 0 in the other array is another row.
    """
    one = Embeddings(test.image[:40], test.text, target=test.target[:40], logit_scale=20.0)
    order = torch.tensor([1, 0, *range(2, 40)])
    two = Embeddings(test.image[order], test.text, target=test.target[order], logit_scale=20.0)
    cosines = []
    for row in (0, 1):
        near = vilu.explain(vilu.MCM(), one, two, rows=[row], depth=Depth(neighbours=39)).rows[0]
        found = [*near.failures, *near.successes]
        assert sorted(int(n.key) for n in found) == [i for i in range(40) if i != 1 - row]
        cosines.append(max(n.cosine for n in found))
    assert max(cosines) < 0.9999


def test_training_rows_stand_in_where_the_data_are_few(plus, train, test: Embeddings) -> None:
    few = test.take(torch.arange(2))
    found = vilu.explain(plus, few, train, rows=[0, 1], depth=Depth(background=10))
    assert "10 training rows" in found.attribution
    assert "1 other rows" in vilu.explain(plus, few, rows=[0]).attribution
    with pytest.raises(DataError, match="compares with other rows"):
        vilu.explain(plus, few, rows=[0, 1])


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_captions_are_looked_at_in_their_pools(direction: str) -> None:
    base = toy_pairs()
    keys = [f"pair-{i}" for i in range(len(base))]
    pairs = vilu.PairEmbeddings(base.image, base.text, Pools(32, direction), 20.0, ids=keys)
    found = vilu.explain(vilu.MCM(), pairs, pairs, rows=["pair-7", "pair-100", "pair-3"])
    assert [row.key for row in found] == ["pair-7", "pair-100", "pair-3"]
    outcomes = vilu.score(vilu.MCM(), pairs)
    asks, found_in = (
        (base.image, base.text) if direction == "image_to_text" else (base.text, base.image)
    )
    for row in found:
        place = int((pairs.usable_rows == row.row).nonzero())
        pool = pairs.usable_rows[place // 32 * 32 :][:32]
        cosine = asks[row.row] @ found_in[pool].T
        assert row.answer == keys[int(pool[cosine.argmax()])]
        assert row.truth == row.key
        assert row.wrong == bool(outcomes.failure[row.row])
        assert row.uncertainty == outcomes.uncertainty[row.row]
        assert all(n.answer != n.truth and n.key != row.key for n in row.failures)
        assert all(n.truth == n.key for n in (*row.failures, *row.successes))


def test_what_cannot_be_explained_is_refused(plus, train, test: Embeddings) -> None:
    with pytest.raises(DataError, match=r"no row has the key 'nobody'.*row-10000"):
        vilu.explain(plus, test, rows=["nobody"])
    with pytest.raises(DataError, match="there is no row 600: the data have 600"):
        vilu.explain(plus, test, rows=[600])
    with pytest.raises(UsageError, match="must be positive"):
        vilu.explain(plus, test, n=0)
    with pytest.raises(NotFittedError):
        vilu.explain(vilu.PREDICTORS["deep_ensemble"](), test, rows=[0])
    image = test.image.clone()
    image[2] = 0
    broken = Embeddings(image, test.text, target=test.target, logit_scale=20.0)
    with pytest.raises(DataError, match=r"row 2 has no score to explain: .*zero_norm"):
        vilu.explain(vilu.MCM(), broken, rows=[2])
    with pytest.raises(DataError, match="one candidate"):
        vilu.explain(
            vilu.MCM(), Embeddings(test.image, test.text[:1], target=None, logit_scale=20.0)
        )
    with pytest.raises(ProvenanceError):
        vilu.explain(
            vilu.MCM(),
            test,
            Embeddings(train.image, train.text, target=train.target, logit_scale=50.0),
        )
    with pytest.raises(DataError, match="none of the 600 training rows has a label"):
        vilu.explain(
            vilu.MCM(),
            test,
            Embeddings(train.image, train.text, target=None, logit_scale=20.0),
            rows=[0],
        )


def test_a_constant_has_no_attribution() -> None:
    easy = toy_embeddings(n=80)
    right = (easy.image @ easy.text.T).argmax(dim=1) == easy.target
    only_right = Embeddings(
        easy.image[right], easy.text, target=easy.target[right], logit_scale=20.0
    )
    with pytest.warns(UserWarning, match="0 failures"):
        predictor = vilu.ViLU(epochs=1, allow_degenerate=True).fit(only_right)
    with pytest.warns(UserWarning, match="1 of 1 explained rows were used to fit"):
        found = vilu.explain(predictor, only_right, only_right, n=1)
    assert "constant" in found.attribution
    assert found.weights == "zero-shot posterior"
    assert found.rows[0].failures == ()
    assert "no training failures" in str(found)


def test_saved_as_json_alone(plus, test: Embeddings, tmp_path) -> None:
    found = vilu.explain(plus, test, n=2)
    found.save(tmp_path / "why.json")
    content = json.loads((tmp_path / "why.json").read_text())
    assert content["kind"] == "explanations"
    assert [row["key"] for row in content["rows"]] == [row.key for row in found]
    assert content["rows"][0]["attribution"]["parts"] == found.rows[0].attribution.parts
    with pytest.raises(UsageError, match=r"\.json file"):
        found.save(tmp_path / "why.csv")
