"""Test the asymmetric duo against SciPy on arrays, numbers by hand, and its parts alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, special

import vilu
from tests.builders.bank_data import unit
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import OUTSIDE
from vilu.artifacts.documents import write_json
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError
from vilu.predictors import temperature as fitted
from vilu.predictors.stacking import Stacking
from vilu.predictors.temperature import MCMTS, Duo, duo_loss_and_derivatives

COLUMNS = ("second_image", "second_text")


def arrays(data: EmbeddingSource) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return both models' float64 logits (N, K), the targets (N,) and the first model's answers
    (N,).
    """
    found = list(data.batches(10_000, columns=COLUMNS))
    large = np.concatenate([batch.logits.double().numpy() for batch in found])
    second = [batch.columns[COLUMNS[0]] @ batch.columns[COLUMNS[1]].T for batch in found]
    small = np.concatenate([logits.double().numpy() for logits in second])
    target = np.concatenate([batch.target.numpy() for batch in found])
    return large, small, target, large.argmax(axis=1)


def likelihood(data: EmbeddingSource, point: np.ndarray) -> float:
    large, small, target, _ = arrays(data)
    log_p = special.log_softmax(point[0] * large + point[1] * small, axis=1)
    return -float(log_p[np.arange(len(target)), target].mean())


@pytest.mark.parametrize(
    "data", [toy_embeddings(), toy_embeddings(k=3, seed=4), toy_pairs()], ids=["5", "3", "pairs"]
)
def test_the_optimum_is_that_of_a_search_without_gradients(data: EmbeddingSource) -> None:
    found = Duo().fit(data).learned_["multipliers"].numpy()
    within = {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000}
    searched = optimize.minimize(
        lambda point: likelihood(data, point),
        [0.3, 0.3],
        method="Nelder-Mead",
        bounds=[(0, 100)] * 2,
        options=within,
    )
    assert likelihood(data, found) <= searched.fun + 1e-12
    # A search without gradients finds a minimum up to the square root of float64's precision, about
    # 1e-8 times f / f''. The two models agree on much. So f'' is some hundred times smaller in one
    # direction.
    assert found == pytest.approx(searched.x, abs=1e-5)


def test_scores_are_the_mass_off_the_first_models_answer(
    train: Embeddings, test: Embeddings
) -> None:
    duo = Duo().fit(train)
    large, small, _, answer = arrays(test)
    at = duo.learned_["multipliers"].numpy()
    p = special.softmax(at[0] * large + at[1] * small, axis=1)
    expected = 1 - p[np.arange(len(p)), answer]
    assert duo.predict_uncertainty(test) == pytest.approx(expected, abs=1e-12)
    # The first model's answer stays, even where both models together would answer otherwise.
    assert (p.argmax(axis=1) != answer).any()
    assert np.array_equal(vilu.score(duo, test).prediction, answer)


def test_by_hand() -> None:
    """Logits ln 2, 0 and 0, ln 8 with multipliers 1, 1 give masses 2 :

    8. The first model answers 0.
    """
    axes = np.eye(2)
    columns = {"second_image": [[0.0, np.log(8)]], "second_text": axes}
    data = Embeddings(axes[:1], axes, target=[1], logit_scale=np.log(2), columns=columns)
    duo = Duo()
    duo.take({"multipliers": torch.ones(2, dtype=torch.float64)}, data.space)
    assert duo.predict_uncertainty(data) == pytest.approx([0.8], abs=1e-7)  # logits are float32


def test_terms_are_a_value_and_its_derivatives() -> None:
    batch = next(toy_embeddings(n=50).batches(50, columns=COLUMNS))
    at = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    second = (batch.columns["second_image"] @ batch.columns["second_text"].T).double()
    value = torch.nn.functional.cross_entropy(
        batch.logits.double() * at[0] + second * at[1], batch.target, reduction="sum"
    )
    value.backward()
    assert torch.allclose(
        duo_loss_and_derivatives(batch, at.tolist()),
        torch.cat([value.detach()[None], at.grad]),
        rtol=1e-10,
    )


def test_a_second_model_that_says_nothing_leaves_the_fitted_temperature(
    train: Embeddings, test: Embeddings
) -> None:
    def silent(data: Embeddings) -> Embeddings:
        return variant(
            data,
            columns={"second_image": torch.ones(len(data), 1), "second_text": torch.ones(5, 1)},
        )

    duo, alone = Duo().fit(silent(train)), MCMTS().fit(train)
    assert duo.notes_["large"] == pytest.approx(alone.notes_["multiplier"], abs=1e-5)
    assert duo.predict_uncertainty(silent(test)) == pytest.approx(
        alone.predict_uncertainty(test), abs=1e-5
    )


def test_a_second_model_that_contradicts_is_not_used(train: Embeddings) -> None:
    columns = {name: train.column(name, torch.arange(len(train))) for name in COLUMNS}
    contrary = variant(train, columns={**columns, "second_text": -columns["second_text"]})
    assert Duo().fit(contrary).notes_["small"] == 0


def test_a_second_model_with_other_errors_helps() -> None:
    """The duo must rank the first model's failures better than the first model alone.

    The two models see the same image with independent noise.
    """
    rng = np.random.default_rng(5)
    text = np.eye(6)

    def drawn(n: int) -> Embeddings:
        target = rng.integers(6, size=n)
        one, other = (unit(text[target] + 0.5 * rng.normal(size=(n, 6))) for _ in range(2))
        return Embeddings(
            one,
            text,
            target=target,
            logit_scale=10.0,
            columns={"second_image": other, "second_text": text},
        )

    train, test = drawn(2000), drawn(4000)
    found = [vilu.score(model.fit(train), test) for model in (MCMTS(), Duo())]
    values = [vilu.metrics.auroc(one.uncertainty, one.failure) for one in found]
    # With 4,000 rows each AUROC has a standard error below 0.01. The AUROCs are paired, and the
    # gain is about ten standard errors.
    assert values[1] > values[0] + 0.05


def test_blocks_change_nothing_and_outside_rows_count_for_nothing(
    train: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Duo().fit(train).learned_["multipliers"]
    target = train.target.clone()
    target[::7] = OUTSIDE
    with pytest.warns(UserWarning, match="86 of none of the classes"):
        without = Duo().fit(variant(train, target=target)).learned_["multipliers"]
    inside = train.take(np.flatnonzero(np.arange(len(train)) % 7))
    assert torch.equal(without, Duo().fit(inside).learned_["multipliers"])
    monkeypatch.setattr(fitted, "SCORING_BATCH", 37)
    assert torch.allclose(Duo().fit(train).learned_["multipliers"], whole, atol=1e-6)


def test_without_failures_both_count_alike_and_it_says_so(train: Embeddings) -> None:
    right = train.take(np.flatnonzero(next(train.batches(600)).failure.numpy() == 0))
    with pytest.warns(
        UserWarning, match="only 0 failures among .* takes the mean of the two models' logits"
    ):
        duo = Duo().fit(right)
    assert duo.learned_["multipliers"].tolist() == [0.5, 0.5]


def test_without_a_second_model_it_says_how_to_get_one(train: Embeddings) -> None:
    with pytest.raises(DataError, match=r"needs the column 'second_image'.*--second STORE"):
        Duo().fit(train.take(range(600), columns=()))


def two(data: Embeddings, second: EmbeddingSpace) -> vilu.TwoModels:
    """Return ``data`` as the first model, and half its width as the second model."""
    image, text = unit(data.image[:, :8].numpy()), unit(data.text[:, :8].numpy())
    small = Embeddings(image, text, ids=data.ids, class_names=data.class_names, space=second)
    return vilu.TwoModels(data.take(range(len(data)), columns=()), small)


def test_it_remembers_the_second_model(tmp_path: Path, train: Embeddings, test: Embeddings) -> None:
    first = EmbeddingSpace(8, 30.0, backbone="small", weights="aa")
    duo = Duo().fit(two(train, first))
    duo.save(tmp_path)
    again = vilu.load(tmp_path)
    assert np.array_equal(
        again.predict_uncertainty(two(test, first)), duo.predict_uncertainty(two(test, first))
    )
    other = dataclasses.replace(first, weights="bb")
    for refusing in (duo, again):
        with pytest.raises(
            ProvenanceError,
            match=r"weights: 'aa' \(the second model of the fitted duo\) against 'bb'",
        ):
            refusing.predict_uncertainty(two(test, other))
        part = two(test, other).take(range(10))
        with pytest.raises(ProvenanceError, match="second model"):
            vilu.score(refusing, part)
    assert duo.fit(two(train, other)).second_space_ == other


def test_a_stack_remembers_the_second_model_of_its_members(
    tmp_path: Path, train: Embeddings, test: Embeddings
) -> None:
    first = EmbeddingSpace(8, 30.0, backbone="small", weights="aa")
    Stacking(members=("mcm", "duo")).fit(two(train, first)).save(tmp_path)
    stack = vilu.load(tmp_path)
    assert np.isfinite(stack.predict_uncertainty(two(test, first))).all()
    with pytest.raises(
        ProvenanceError, match=r"\(the second model of the fitted stacking\) against 'bb'"
    ):
        stack.predict_uncertainty(two(test, dataclasses.replace(first, weights="bb")))
    assert "second" not in Stacking(members=("mcm", "margin")).fit(two(train, first)).notes_


def test_damaged_notes_of_the_second_model_are_refused(tmp_path: Path, train: Embeddings) -> None:
    Duo().fit(two(train, EmbeddingSpace(8, 30.0))).save(tmp_path)
    path = tmp_path / "predictor.json"
    document = json.loads(path.read_text())
    document["notes"]["second"] = {"embed_dim": "wide"}
    del document["fingerprint"]
    write_json(path, document, digest_key="fingerprint")
    with pytest.raises(DataError, match="is damaged"):
        vilu.load(tmp_path)
