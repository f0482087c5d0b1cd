"""What holds for every entry of ``vilu.PREDICTORS``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu import PREDICTORS
from vilu.errors import DataError, NotFittedError, ProvenanceError, UsageError
from vilu.metrics import auroc
from vilu.predictors.learned import LearnedPredictor
from vilu.predictors.parameters import build, parameters
from vilu.space import EmbeddingSpace
from vilu.types import Embeddings

QUICK = {"hidden": (16, 8), "epochs": 12, "batch_size": 64}
LEARNED = [name for name, cls in PREDICTORS.items() if issubclass(cls, LearnedPredictor)]


def make(name: str, **more: object) -> vilu.FailurePredictor:
    cls = PREDICTORS[name]
    quick = {key: value for key, value in QUICK.items() if key in parameters(cls)}
    return cls(**quick, **more)


@pytest.fixture(params=list(PREDICTORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LEARNED)
def learned(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted(train: Embeddings) -> dict[str, vilu.FailurePredictor]:
    return {name: make(name).fit(train) for name in PREDICTORS}


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def failures(data: Embeddings) -> np.ndarray:
    return torch.cat([batch.failure for batch in data.batches(1024)]).numpy()


def test_catalogue_key_is_the_name(name: str) -> None:
    assert PREDICTORS[name].name == name
    assert len(PREDICTORS[name].summary) > 10
    assert PREDICTORS[name].__doc__


def test_constructor_only_stores_its_parameters(name: str) -> None:
    predictor = PREDICTORS[name]()
    for key, field in parameters(predictor).items():
        assert getattr(predictor, key) == field.default
    fitted_attributes = [key for key in vars(predictor) if key.endswith("_")]
    assert all(getattr(predictor, key) in (None, {}) for key in fitted_attributes)


def test_unfitted_is_refused_where_a_fit_is_needed(name: str, test: Embeddings) -> None:
    predictor = PREDICTORS[name]()
    if predictor.needs_fit:
        with pytest.raises(NotFittedError, match="Call fit"):
            predictor.predict_uncertainty(test)
    else:
        assert np.isfinite(predictor.predict_uncertainty(test)).all()


def test_scores_are_float64_of_one_sign(name: str, fitted: dict, test: Embeddings) -> None:
    uncertainty = fitted[name].predict_uncertainty(test)
    assert uncertainty.dtype == np.float64
    assert uncertainty.shape == (len(test),)
    # 600 rows with about 150 failures: chance has a standard error near 0.03, so 0.6 is more than three away.
    assert auroc(uncertainty, failures(test)) > 0.6


def test_fit_returns_self_and_leaves_parameters_alone(name: str, train: Embeddings) -> None:
    predictor = make(name)
    before = {key: getattr(predictor, key) for key in parameters(predictor)}
    assert predictor.fit(train) is predictor
    assert {key: getattr(predictor, key) for key in parameters(predictor)} == before


def test_refit_and_same_seed_give_the_same_bytes(name: str, fitted: dict, train: Embeddings, test: Embeddings) -> None:
    first = fitted[name].predict_uncertainty(test)
    again = make(name).fit(train)
    assert np.array_equal(again.predict_uncertainty(test), first)
    assert np.array_equal(again.fit(train).predict_uncertainty(test), first)


def test_seed_matters(learned: str, fitted: dict, train: Embeddings, test: Embeddings) -> None:
    other = make(learned, seed=1).fit(train).predict_uncertainty(test)
    assert not np.array_equal(other, fitted[learned].predict_uncertainty(test))


def test_fit_leaves_the_global_generator_alone(name: str, train: Embeddings) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make(name).fit(train)
    assert torch.equal(torch.rand(3), expected)


def test_rows_are_scored_one_by_one(name: str, fitted: dict, test: Embeddings) -> None:
    """Neither the order of the rows nor which others are there matters, up to float32 sums in another order."""
    whole = fitted[name].predict_uncertainty(test)
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(3))[:37]
    part = Embeddings.from_rows(test, rows)
    assert np.allclose(fitted[name].predict_uncertainty(part), whole[rows.numpy()], rtol=1e-4, atol=1e-5)


def test_order_of_the_classes_does_not_matter(name: str, fitted: dict, test: Embeddings) -> None:
    order = [3, 0, 4, 1, 2]
    inverse = np.argsort(order)
    permuted = Embeddings(test.image, test.text[order], inverse[test.target.numpy()], test.space.logit_scale)
    assert np.allclose(
        fitted[name].predict_uncertainty(permuted), fitted[name].predict_uncertainty(test), rtol=1e-4, atol=1e-5
    )


def test_saved_and_loaded_scores_are_equal_bit_for_bit(name: str, fitted: dict, test: Embeddings, tmp_path) -> None:
    fingerprint = fitted[name].save(tmp_path / "predictor")
    loaded = vilu.load(tmp_path / "predictor")
    assert loaded == fitted[name]
    assert np.array_equal(loaded.predict_uncertainty(test), fitted[name].predict_uncertainty(test))
    assert loaded.save(tmp_path / "again") == fingerprint
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (
        tmp_path / "predictor/weights.safetensors"
    ).read_bytes()


def test_foreign_space_is_refused(name: str, fitted: dict, test: Embeddings, train: Embeddings) -> None:
    other_scale = Embeddings(test.image, test.text, test.target, 100.0)
    with pytest.raises(ProvenanceError, match=r"logit_scale: 20\.0 .* against 100\.0"):
        fitted[name].predict_uncertainty(other_scale)
    here = EmbeddingSpace(16, 20.0, backbone="compact", weights="aa")
    there = dataclasses.replace(here, weights="bb")
    named = make(name).fit(Embeddings(train.image, train.text, train.target, space=here))
    with pytest.raises(ProvenanceError, match=r"weights: 'aa' .* against 'bb'"):
        named.predict_uncertainty(Embeddings(test.image, test.text, test.target, space=there))


def test_unusable_rows_get_nan_and_change_no_other(name: str, fitted: dict, test: Embeddings) -> None:
    image = test.image.clone()
    image[3], image[7, 2] = 0, float("nan")
    damaged = Embeddings(image, test.text, test.target, 20.0)
    uncertainty = fitted[name].predict_uncertainty(damaged)
    assert np.flatnonzero(np.isnan(uncertainty)).tolist() == [3, 7]
    usable = np.isfinite(uncertainty)
    assert np.allclose(uncertainty[usable], fitted[name].predict_uncertainty(test)[usable], rtol=1e-4, atol=1e-5)


def test_one_candidate_has_no_uncertainty(name: str, fitted: dict, test: Embeddings) -> None:
    single = Embeddings(test.image, test.text[:1], None, 20.0)
    assert np.isnan(fitted[name].predict_uncertainty(single)).all()


@pytest.mark.parametrize("k", [2, 1000])
def test_number_of_candidates_may_differ_from_training(name: str, fitted: dict, k: int) -> None:
    data = toy_embeddings(n=50, k=k)
    assert np.isfinite(fitted[name].predict_uncertainty(data)).all()


def test_half_precision_input(name: str, fitted: dict, test: Embeddings) -> None:
    half = Embeddings(test.image.half(), test.text.half(), test.target, 20.0)
    # Rounding to float16 moves a coordinate by 2^-11 of itself, a logit by at most 20 * 2^-10 * 2 < 0.05.
    assert np.allclose(fitted[name].predict_uncertainty(half), fitted[name].predict_uncertainty(test), atol=0.05)


def test_in_batch_candidates(name: str) -> None:
    train, test = toy_pairs(), toy_pairs(seed=1)
    uncertainty = make(name).fit(train).predict_uncertainty(test)
    assert np.isfinite(uncertainty).all()
    assert auroc(uncertainty, failures(test)) > 0.5


@pytest.mark.parametrize("wrong", [True, False])
def test_nothing_to_learn(learned: str, train: Embeddings, test: Embeddings, wrong: bool) -> None:
    rows = torch.from_numpy(np.flatnonzero(failures(train) == wrong))
    degenerate = Embeddings.from_rows(train, rows)
    with pytest.raises(DataError, match=f"Found 0 {'successes' if wrong else 'failures'} among {len(rows)}"):
        make(learned).fit(degenerate)
    with pytest.warns(UserWarning, match="only 0"):
        constant = make(learned, allow_degenerate=True).fit(degenerate)
    assert np.array_equal(constant.predict_uncertainty(test), np.full(len(test), float(wrong)))


def test_one_failure_is_enough_to_fit(learned: str, train: Embeddings, test: Embeddings) -> None:
    failure = failures(train)
    rows = np.concatenate([np.flatnonzero(failure == 0), np.flatnonzero(failure == 1)[:1]])
    with pytest.warns(UserWarning, match="only 1 failures"):
        predictor = make(learned).fit(Embeddings.from_rows(train, torch.from_numpy(rows)))
    assert np.isfinite(predictor.predict_uncertainty(test)).all()


def test_constant_survives_saving(learned: str, train: Embeddings, test: Embeddings, tmp_path) -> None:
    rows = torch.from_numpy(np.flatnonzero(failures(train) == 0))
    with pytest.warns(UserWarning, match="only 0"):
        constant = make(learned, allow_degenerate=True).fit(Embeddings.from_rows(train, rows))
    constant.save(tmp_path)
    assert np.array_equal(vilu.load(tmp_path).predict_uncertainty(test), np.zeros(len(test)))


def test_bad_training_sets(learned: str, train: Embeddings) -> None:
    empty = Embeddings(np.empty((0, 16)), train.text, np.empty(0, dtype=int), 20.0)
    with pytest.raises(DataError, match="training set is empty"):
        make(learned).fit(empty)
    with pytest.raises(DataError, match="one candidate"):
        make(learned).fit(Embeddings(train.image, train.text[:1], None, 20.0))
    with pytest.raises(DataError, match="none of the 600 training rows has a label"):
        make(learned).fit(Embeddings(train.image, train.text, None, 20.0))
    spoiled = train.image.clone()
    spoiled[:7] = float("inf")
    with pytest.raises(DataError, match="7 of 600 training rows are not finite"):
        make(learned).fit(Embeddings(spoiled, train.text, train.target, 20.0))


def test_a_few_bad_or_unlabelled_rows_are_left_out_aloud(learned: str, train: Embeddings) -> None:
    image, target = train.image.clone(), train.target.clone()
    image[0], target[1:4] = 0, -1
    with pytest.warns(UserWarning, match=r"4 of 600 training rows are left out \(1 unusable, the rest without label\)"):
        predictor = make(learned).fit(Embeddings(image, train.text, target, 20.0))
    assert predictor.notes_["n_train"] == 596


def test_overlap_of_training_and_validation_is_refused(learned: str, train: Embeddings, test: Embeddings) -> None:
    with pytest.raises(DataError, match="600 rows are in both"):
        make(learned).fit(train, validation=train)
    assert make(learned).fit(train, validation=test).seen_.overlap(train.ids) == 600


def test_parameters_out_of_range_are_named(learned: str, train: Embeddings) -> None:
    with pytest.raises(UsageError, match=r"'epochs' parameter of .* must be greater than or equal to 1\. Got 0"):
        PREDICTORS[learned](epochs=0).fit(train)
    with pytest.raises(UsageError, match=r"has no parameter 'epoch'\. Did you mean 'epochs'"):
        build(PREDICTORS[learned], {"epoch": "3"})
    with pytest.raises(UsageError, match="'weighting'"):
        build(PREDICTORS[learned], {"weighting": "heavy"})
    made = build(PREDICTORS[learned], {"epochs": "3", "hidden": "8,4", "patience": "none", "learning_rate": "1e-2"})
    assert (made.epochs, made.hidden, made.patience, made.learning_rate) == (3, (8, 4), None, 0.01)


def test_embeddings_without_provenance_are_compared_by_their_cosines(learned: str, fitted: dict) -> None:
    foreign = np.random.default_rng(0).normal(size=(300, 16))
    negative = Embeddings(normalised(-np.abs(foreign)), normalised(np.abs(foreign[:5])), None, 20.0)
    with pytest.warns(UserWarning, match="are these embeddings from another model"):
        fitted[learned].predict_uncertainty(negative)


def test_damaged_files_are_refused(learned: str, fitted: dict, tmp_path) -> None:
    fitted[learned].save(tmp_path)
    weights = tmp_path / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DataError, match=r"is not the file that predictor\.json names"):
        vilu.load(tmp_path)
    (tmp_path / "predictor.json").write_text('{"schema": 99}')
    with pytest.raises(ProvenanceError, match="schema 99"):
        vilu.load(tmp_path)
    (tmp_path / "predictor.json").write_text("[" * 10)
    with pytest.raises(DataError, match="not JSON"):
        vilu.load(tmp_path)
    with pytest.raises(DataError, match="no predictor here"):
        vilu.load(tmp_path / "nowhere")
