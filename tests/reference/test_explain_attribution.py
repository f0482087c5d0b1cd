"""Test attributions against Shapley values over all permutations.

Coalition values are computed one input at a time.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, without_words
from vilu.embeddings.memory import Embeddings
from vilu.predictors.contract.coalitions import NoAttribution
from vilu.report.explain.attribution import coalitions_of, shapley
from vilu.report.explain.explain import Depth
from vilu.report.explain.rows import draw_rows

ROWS = [3, 141, 59, 26]
M = 24
DEPTH = Depth(background=M)
SETTINGS = {"epochs": 4, "hidden": (16, 8), "seed": 1}


@pytest.fixture(scope="module")
def heads(train: Embeddings) -> dict[str, vilu.FailurePredictor]:
    settings = {
        "all three": vilu.ViLU(mcm_input=True, **SETTINGS),
        "published": vilu.ViLU(**SETTINGS),
        "paper": vilu.ViLU(attention="paper", **SETTINGS),
        "no caption": vilu.ViLU(predicted_caption=False, **SETTINGS),
        "image only": vilu.LVU(**SETTINGS),
    }
    return {name: predictor.fit(train) for name, predictor in settings.items()}


@pytest.fixture(scope="module")
def plus(train: Embeddings) -> vilu.ViLUPlus:
    return vilu.ViLUPlus(width=16, epochs=4).fit(without_words(train))


def by_permutations(value, players: tuple[str, ...]) -> dict[str, float]:
    """Return what each player adds to the players before it, as a mean over all orders."""
    orders = list(itertools.permutations(players))
    parts = dict.fromkeys(players, 0.0)
    for order in orders:
        for place, player in enumerate(order):
            parts[player] += (value({*order[: place + 1]}) - value({*order[:place]})) / len(orders)
    return parts


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def inputs_of(head, data: Embeddings) -> dict[str, np.ndarray]:
    """Return the parts of z for every row, in float64, as the paper defines them."""
    z, t = data.image.double().numpy(), data.text.double().numpy()
    scale = data.space.logit_scale
    p = softmax(scale * z @ t.T)
    parts = {"image": z, "caption": t[p.argmax(axis=1)], "mcm": p.max(axis=1, keepdims=True)}
    if head.attention is not None:
        w = {name: m.detach().double().numpy() for name, m in head.attention.named_parameters()}
        if "query" in w:
            alpha = softmax((z @ w["query"].T) @ (t @ w["key"].T).T / math.sqrt(z.shape[1]))
            parts["attended"] = alpha @ t @ w["value_projection"].T
        else:
            parts["attended"] = (
                softmax(scale * (z @ w["image"].T) @ (t @ w["text"].T).T) @ t @ w["text"].T
            )
    return {name: parts[name] for name in head.first}


def logit(head, parts: dict[str, np.ndarray]) -> float:
    """Return the head's logit g for one z."""
    hidden = head.first_bias.detach().double().numpy().copy()
    for name, matrix in head.first.items():
        hidden += matrix.detach().double().numpy() @ parts[name]
    for layer in head.rest:
        if isinstance(layer, torch.nn.Linear):
            hidden = (
                layer.weight.detach().double().numpy() @ hidden
                + layer.bias.detach().double().numpy()
            )
        else:
            hidden = np.maximum(hidden, 0)
    return float(hidden[0])


GROUPS = {"image": "image", "attended": "texts", "caption": "texts", "mcm": "zero-shot score"}


@pytest.mark.parametrize("name", ["all three", "published", "paper", "no caption", "image only"])
def test_heads_against_inputs_swapped_one_by_one(heads, test: Embeddings, name: str) -> None:
    (head,) = heads[name].heads
    inputs = inputs_of(head, test)
    background = draw_rows(test, M, 0, torch.tensor(ROWS)).tolist()
    assert len(set(background)) == M
    assert not set(background) & set(ROWS)
    for row in vilu.explain(heads[name], test, rows=ROWS, depth=DEPTH):

        def value(coalition: set[str], own: int = row.row) -> float:
            mixed = (
                {part: x[own if GROUPS[part] in coalition else other] for part, x in inputs.items()}
                for other in background
            )
            return float(np.mean([logit(head, z) for z in mixed]))

        expected = by_permutations(value, tuple(row.attribution.parts))
        assert set(expected) == {GROUPS[part] for part in head.first}
        assert row.attribution.parts == pytest.approx(expected, abs=1e-5)
        assert row.attribution.score == pytest.approx(value(set(expected)), abs=1e-5)
        assert row.attribution.baseline == pytest.approx(value(set()), abs=1e-5)


def log_odds(uncertainty: np.ndarray) -> np.ndarray:
    return np.log(uncertainty) - np.log1p(-uncertainty)


@pytest.mark.parametrize(
    "name", ["all three", "published", "paper", "no caption", "image only", "plus"]
)
def test_parts_add_up_to_the_score_less_the_mean_of_the_background(
    heads, plus, test, name: str
) -> None:
    predictor = plus if name == "plus" else heads[name]
    g = log_odds(predictor.predict_uncertainty(test))
    mean = g[draw_rows(test, M, 0, torch.tensor(ROWS)).numpy()].mean()
    for row in vilu.explain(predictor, test, rows=ROWS, depth=DEPTH):
        # These are float32 logits up to a few units, summed in another order.
        assert row.attribution.score == pytest.approx(g[row.row], abs=1e-5)
        assert row.attribution.baseline == pytest.approx(mean, abs=1e-5)
        assert sum(row.attribution.parts.values()) == pytest.approx(g[row.row] - mean, abs=1e-5)


@pytest.mark.parametrize(
    ("dead", "player"),
    [(["mcm"], "zero-shot score"), (["attended", "caption"], "texts"), (["image"], "image")],
)
def test_a_part_without_weights_gets_nothing(train, test, dead: list[str], player: str) -> None:
    predictor = vilu.ViLU(mcm_input=True, **SETTINGS).fit(train)
    with torch.no_grad():
        for part in dead:
            predictor.heads[0].first[part].zero_()
    for row in vilu.explain(predictor, test, rows=ROWS, depth=DEPTH):
        assert row.attribution.parts[player] == 0
        assert all(
            abs(value) > 1e-3 for other, value in row.attribution.parts.items() if other != player
        )


def test_an_ensemble_shares_out_its_mean_probability(train, test) -> None:
    predictor = vilu.PREDICTORS["deep_ensemble"](members=2, **SETTINGS).fit(train)
    u = predictor.predict_uncertainty(test)
    mean = u[draw_rows(test, M, 0, torch.tensor(ROWS)).numpy()].mean()
    for row in vilu.explain(predictor, test, rows=ROWS, depth=DEPTH):
        assert row.attribution.score == pytest.approx(u[row.row], abs=1e-6)
        assert sum(row.attribution.parts.values()) == pytest.approx(u[row.row] - mean, abs=1e-6)


def plus_value(predictor, data: Embeddings, row: int, coalition: set[str]) -> float:
    """Return the answer's log-odds of failure.

    The softmax sees only the named parts of the pooled logits.
    """
    experts, w = predictor.experts, predictor.learned_["pool"].numpy()
    attention = experts.attention
    cosine = (data.image[row] @ data.text.T).double().numpy()
    zero_shot = w.sum() * float(attention.temperature) * data.space.logit_scale * cosine

    def residual(x: torch.Tensor) -> np.ndarray:
        keys = (
            math.sqrt(predictor.sharing)
            * (data.text - attention.text.mean)
            / attention.text.norm
            @ (attention.shared.T)
            + math.sqrt(1 - predictor.sharing) * attention.own
        )
        found = [torch.cat([x, torch.ones(1)]) @ keys.T]
        for companion in experts.companions.values():
            if hasattr(companion, "bank"):
                k = torch.exp(-(x - companion.bank).square().sum(dim=1) / 2)
                found.append(k @ companion.values)
            else:
                hidden = torch.nn.functional.gelu(companion.first(x * math.sqrt(len(x))))
                found.append(companion.last(hidden))
        return sum(weight * r.detach().double().numpy() for weight, r in zip(w, found, strict=True))

    inputs = attention.inputs
    x = (data.image[row] - inputs.image.mean) / inputs.image.norm
    if inputs.has_features:
        features = data.column("features", torch.tensor([row]))[0]
        x = torch.cat([x, (features - inputs.features.mean) / inputs.features.norm]) / math.sqrt(2)
    texts = residual(torch.zeros_like(x))
    parts = {"zero-shot score": zero_shot, "texts": texts, "image": residual(x) - texts}
    if not coalition:
        return 0.0
    logits = sum(parts[name] for name in coalition)
    p = softmax(logits)[cosine.argmax()]
    return float(np.log1p(-p) - np.log(p))


def test_vilu_plus_against_its_parts_one_by_one(plus, test: Embeddings) -> None:
    players = ("zero-shot score", "image", "texts")
    # Otherwise the test never reaches parts of the reference.
    assert set(plus.experts.companions) == {
        "adapter",
        "memory",
    }
    background = draw_rows(test, M, 0, torch.tensor(ROWS)).tolist()

    def shares(row: int) -> dict[str, float]:
        return by_permutations(lambda coalition: plus_value(plus, test, row, coalition), players)

    others = [shares(row) for row in background]
    for row in vilu.explain(plus, test, rows=ROWS, depth=DEPTH):
        own = shares(row.row)
        expected = {
            name: own[name] - np.mean([other[name] for other in others]) for name in players
        }
        # Cosines are float32 at a scale of 20, and residuals are a few units: 1e-5, with a margin
        # for 1 - p.
        assert row.attribution.parts == pytest.approx(expected, abs=5e-5)


def test_vilu_plus_that_learned_nothing_is_its_zero_shot_score(train, test) -> None:
    predictor = vilu.ViLUPlus(width=16, epochs=1).fit(without_words(train))
    experts = predictor.experts
    for tensor in (
        experts.attention.shared,
        experts.attention.own,
        experts.companions["memory"].values,
    ):
        tensor.zero_()
    for tensor in (
        experts.companions["adapter"].last.weight,
        experts.companions["adapter"].last.bias,
    ):
        tensor.zero_()
    for row in vilu.explain(predictor, test, rows=ROWS, depth=DEPTH):
        # Only logits up to 20 are left. They are rounded to float32 before they enter the residual.
        assert row.attribution.parts["image"] == pytest.approx(0, abs=1e-5)
        assert row.attribution.parts["texts"] == pytest.approx(0, abs=1e-5)
        distance = row.attribution.score - row.attribution.baseline
        assert row.attribution.parts["zero-shot score"] == pytest.approx(distance, abs=1e-5)


def test_other_candidates_than_the_training_classes(plus, test: Embeddings) -> None:
    """If one candidate is no training class, the parts must still add up to the score."""
    text = torch.cat(
        [test.text, torch.nn.functional.normalize(test.text[:1] + test.text[1:2], dim=1)]
    )
    features = {"features": test.column("features", torch.arange(len(test)))}
    data = Embeddings(test.image, text, target=test.target, logit_scale=20.0, columns=features)
    g = log_odds(plus.predict_uncertainty(data))
    mean = g[draw_rows(data, M, 0, torch.tensor(ROWS)).numpy()].mean()
    for row in vilu.explain(plus, data, rows=ROWS, depth=DEPTH):
        assert row.attribution.score == pytest.approx(g[row.row], abs=1e-5)
        assert sum(row.attribution.parts.values()) == pytest.approx(g[row.row] - mean, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*were used to fit")
def test_captions_add_up_too() -> None:
    pairs = toy_pairs()
    for predictor in (vilu.ViLUPlus(), vilu.ViLU(mcm_input=True, **SETTINGS)):
        g = log_odds(predictor.fit(pairs).predict_uncertainty(pairs))
        mean = g[draw_rows(pairs, M, 0, torch.tensor(ROWS)).numpy()].mean()
        for row in vilu.explain(predictor, pairs, rows=ROWS, depth=DEPTH):
            assert row.attribution.score == pytest.approx(g[row.row], abs=1e-5)
            assert sum(row.attribution.parts.values()) == pytest.approx(g[row.row] - mean, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "player"),
    [("mcm", "zero-shot score"), ("energy", "zero-shot score"), ("knn_distance", "image")],
)
def test_scores_of_one_input_are_all_of_it(train, test, name: str, player: str) -> None:
    predictor = vilu.PREDICTORS[name]().fit(train)
    u = predictor.predict_uncertainty(test)
    mean = u[draw_rows(test, M, 0, torch.tensor(ROWS)).numpy()].mean()
    for row in vilu.explain(predictor, test, rows=ROWS, depth=DEPTH):
        assert row.attribution.parts == pytest.approx({player: u[row.row] - mean}, abs=1e-12)


def test_what_is_said_to_be_of_one_input_is(train: Embeddings, test: Embeddings) -> None:
    """Methods must look at nothing else than ``looks_at`` says.

    If it says logits, two images with equal logits must score alike. If it says image, the texts
    must not matter.
    """
    # The last columns are orthogonal to all texts.
    plane = torch.linalg.qr(train.text.T, mode="complete").Q
    off = torch.linalg.qr(torch.randn(11, 11, generator=torch.Generator().manual_seed(0))).Q
    turned = test.image @ plane
    turned[:, 5:] = turned[:, 5:] @ off
    turned = Embeddings(turned @ plane.T, test.text, target=test.target, logit_scale=20.0)
    other = Embeddings(test.image, test.text.flip(1), target=test.target, logit_scale=20.0)
    looks = {}
    for name, cls in vilu.PREDICTORS.items():
        looks_at = vars(cls).get("looks_at", ())
        if len(looks_at) == 1:
            looks[name] = looks_at
    assert {name for name in looks if looks[name] == {"image"}} == {"pvu", "knn_distance"}
    assert looks.keys() >= {"mcm", "entropy", "margin"}
    for name, look in looks.items():
        quick = {"epochs": 2} if name == "pvu" else {}
        predictor = vilu.PREDICTORS[name](**quick).fit(train)
        u, changed = (
            predictor.predict_uncertainty(x)
            for x in (test, turned if look == {"logits"} else other)
        )
        assert changed == pytest.approx(u, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", ["mc_dropout", "mahalanobis", "lmn"])
def test_without_a_game_the_reason_is_given(train, test, name: str) -> None:
    quick = {"epochs": 1, "hidden": (4,)} if name != "mahalanobis" else {}
    predictor = vilu.PREDICTORS[name](**quick).fit(train)
    with pytest.raises(NoAttribution, match=name):
        coalitions_of(predictor)
    found = vilu.explain(predictor, test, rows=[0])
    assert found.rows[0].attribution is None
    assert found.attribution.startswith("left out")


def test_shapley_against_all_orders() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4):
        values = rng.normal(size=(1 << n, 5))
        parts = shapley(torch.from_numpy(values)).numpy()
        for column in range(5):
            expected = by_permutations(
                lambda s, v=values[:, column]: v[sum(1 << p for p in s)], tuple(range(n))
            )
            assert parts[:, column] == pytest.approx([expected[p] for p in range(n)], abs=1e-12)
        assert parts.sum(axis=0) == pytest.approx(values[-1] - values[0], abs=1e-12)


def test_interchangeable_players_share_alike() -> None:
    by_size = torch.tensor([0.0, 1.0, 5.0, 6.0]).double()
    values = torch.stack([by_size[s.bit_count()] for s in range(8)])[:, None]
    assert shapley(values).squeeze(1).numpy() == pytest.approx([2, 2, 2], abs=1e-12)
    with pytest.raises(ValueError, match="power of two"):
        shapley(values[:3])


def test_the_background_is_seeded() -> None:
    data = toy_embeddings(n=50)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(draw_rows(data, 9, 4, none), draw_rows(data, 9, 4, none))
    assert not torch.equal(draw_rows(data, 9, 4, none), draw_rows(data, 9, 5, none))
