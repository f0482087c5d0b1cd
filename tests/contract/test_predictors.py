"""Test the contract for every method in ``vilu.PREDICTORS``."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as safetensors_torch

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu import PREDICTORS
from vilu.artifacts.documents import write_json
from vilu.embeddings.columns import COLUMN_COMMANDS, TEXT_COLUMNS
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, NotFittedError, ProvenanceError, UsageError
from vilu.metrics import auroc
from vilu.predictors.contract.parameters import build_predictor, parameters
from vilu.predictors.persistence.fit_sample import FitSample
from vilu_bench.methods.ensembles import DeepEnsemble

QUICK = {"hidden": (16, 8), "epochs": 6, "batch_size": 64, "width": 16, "grid": (1.0, 100.0)}
LABELLED = [name for name, cls in PREDICTORS.items() if cls.needs_fit]
LEARNED = [name for name in LABELLED if PREDICTORS[name].learns_failure]
TRAINED = [name for name in LABELLED if {"seed", "epochs"} <= parameters(PREDICTORS[name]).keys()]


def make(name: str, **more: object) -> vilu.FailurePredictor:
    cls = PREDICTORS[name]
    quick = {key: value for key, value in QUICK.items() if key in parameters(cls)}
    if cls is DeepEnsemble:
        quick["members"] = 2
    return cls(**{**quick, **more})


@pytest.fixture(params=list(PREDICTORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LABELLED)
def labelled(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TRAINED)
def trained(request: pytest.FixtureRequest) -> str:
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
    assert PREDICTORS[name].reference
    assert PREDICTORS[name].cost
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
    # 600 rows have about 150 failures. By chance, the AUROC has a standard error near 0.03, so 0.6
    # is more than three standard errors away.
    assert auroc(uncertainty, failures(test)) > 0.6


def test_a_fit(name: str, fitted: dict, train: Embeddings, test: Embeddings) -> None:
    """A fit must change neither the parameters nor the global generator.

    Equal seeds must give equal bytes, each time.
    """
    predictor = make(name)
    before = {key: getattr(predictor, key) for key in parameters(predictor)}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert predictor.fit(train) is predictor
    assert torch.equal(torch.rand(3), expected)
    assert {key: getattr(predictor, key) for key in parameters(predictor)} == before
    first = fitted[name].predict_uncertainty(test)
    assert np.array_equal(predictor.predict_uncertainty(test), first)
    assert np.array_equal(predictor.fit(train).predict_uncertainty(test), first)


def test_seed_matters(trained: str, fitted: dict, train: Embeddings, test: Embeddings) -> None:
    other = make(trained, seed=1).fit(train).predict_uncertainty(test)
    assert not np.array_equal(other, fitted[trained].predict_uncertainty(test))


def test_rows_are_scored_one_by_one(name: str, fitted: dict, test: Embeddings) -> None:
    """A row's score must not depend on the row order or on other rows.

    Only float32 sums in another order may differ.
    """
    whole = fitted[name].predict_uncertainty(test)
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(3))[:37]
    part = test.take(rows)
    assert np.allclose(
        fitted[name].predict_uncertainty(part), whole[rows.numpy()], rtol=1e-4, atol=1e-5
    )


def test_order_of_the_classes_does_not_matter(name: str, fitted: dict, test: Embeddings) -> None:
    order = [3, 0, 4, 1, 2]
    inverse = np.argsort(order)
    permuted = variant(
        test,
        text=test.text[order],
        target=inverse[test.target.numpy()],
        columns={
            column: test.column(column, torch.arange(len(test)))[
                order if column in TEXT_COLUMNS else slice(None)
            ]
            for column in test.columns
        },
    )
    assert np.allclose(
        fitted[name].predict_uncertainty(permuted),
        fitted[name].predict_uncertainty(test),
        rtol=1e-4,
        atol=1e-5,
    )


def test_saved_and_loaded_scores_are_equal_bit_for_bit(
    name: str, fitted: dict, test: Embeddings, tmp_path
) -> None:
    fingerprint = fitted[name].save(tmp_path / "predictor")
    loaded = vilu.load(tmp_path / "predictor")
    assert loaded == fitted[name]
    assert np.array_equal(loaded.predict_uncertainty(test), fitted[name].predict_uncertainty(test))
    assert loaded.save(tmp_path / "again") == fingerprint
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (
        tmp_path / "predictor/weights.safetensors"
    ).read_bytes()


def test_foreign_space_is_refused(
    name: str, fitted: dict, test: Embeddings, train: Embeddings
) -> None:
    other_scale = variant(test, space=EmbeddingSpace(16, 100.0))
    with pytest.raises(ProvenanceError, match=r"logit_scale: 20\.0 .* against 100\.0"):
        fitted[name].predict_uncertainty(other_scale)
    here = EmbeddingSpace(16, 20.0, backbone="compact", weights="aa")
    there = dataclasses.replace(here, weights="bb")
    named = make(name).fit(variant(train, space=here))
    with pytest.raises(ProvenanceError, match=r"weights: 'aa' .* against 'bb'"):
        named.predict_uncertainty(variant(test, space=there))


def test_unusable_rows_get_nan_and_change_no_other(
    name: str, fitted: dict, test: Embeddings
) -> None:
    image = test.image.clone()
    image[3], image[7, 2] = 0, float("nan")
    damaged = variant(test, image=image)
    uncertainty = fitted[name].predict_uncertainty(damaged)
    assert np.flatnonzero(np.isnan(uncertainty)).tolist() == [3, 7]
    usable = np.isfinite(uncertainty)
    assert np.allclose(
        uncertainty[usable], fitted[name].predict_uncertainty(test)[usable], rtol=1e-4, atol=1e-5
    )


def test_one_candidate_has_no_uncertainty(name: str, fitted: dict, test: Embeddings) -> None:
    columns = {
        column: test.column(column, torch.arange(len(test)))[
            : 1 if column in TEXT_COLUMNS else None
        ]
        for column in test.columns
    }
    single = variant(test, text=test.text[:1], target=None, columns=columns)
    assert np.isnan(fitted[name].predict_uncertainty(single)).all()


@pytest.mark.parametrize("k", [2, 1000])
def test_number_of_candidates(name: str, fitted: dict, k: int) -> None:
    """Other candidates than in the fit must be scored, or refused by name.

    If a method is fitted on these candidates, it must score them.
    """
    data = toy_embeddings(n=50, k=k)
    if PREDICTORS[name].closed_set and k > 5:  # both of 2 are among the 5 fitted
        with pytest.raises(ProvenanceError, match=r"scores the 5 classes that it was fitted on"):
            fitted[name].predict_uncertainty(data)
    else:
        assert np.isfinite(fitted[name].predict_uncertainty(data)).all()
    with warnings.catch_warnings():
        # With two candidates, failures are rare.
        warnings.filterwarnings("ignore", message=r"only \d+ failures")
        known = make(name).fit(toy_embeddings(n=300, k=k, seed=1))
    assert np.isfinite(known.predict_uncertainty(data)).all()


def test_half_precision_input(name: str, fitted: dict, test: Embeddings) -> None:
    half = variant(test, image=test.image.half(), text=test.text.half())
    exact, rounded = (fitted[name].predict_uncertainty(data) for data in (test, half))
    # Rounding to float16 moves a coordinate by a relative 2^-11. So a logit moves by at most 20 *
    # 2^-10 * 2 < 0.05. A score that counts neighbours may jump in few rows, if two neighbours are
    # equally near.
    assert np.mean(np.abs(rounded - exact) <= 0.05 * max(1.0, exact.std())) > 0.97


def test_in_batch_candidates(name: str, fitted: dict) -> None:
    train, test = toy_pairs(), toy_pairs(seed=1)
    reason = PREDICTORS[name].no_captions
    if reason is not None:
        for refused in (make(name).fit, fitted[name].predict_uncertainty):
            with pytest.raises(UsageError, match=f"does not work on image-caption pairs: {reason}"):
                refused(train)
        return
    uncertainty = make(name).fit(train).predict_uncertainty(test)
    assert np.isfinite(uncertainty).all()
    assert auroc(uncertainty, failures(test)) > 0.5


def test_missing_columns_are_named(name: str, fitted: dict, train: Embeddings) -> None:
    bare = variant(train, columns=None)
    for column in PREDICTORS[name].columns:
        for refused in (make(name).fit, fitted[name].predict_uncertainty):
            with pytest.raises(
                DataError, match=f"needs the column .* Make it with `{COLUMN_COMMANDS[column]}`"
            ):
                refused(bare)


@pytest.mark.parametrize("n_failures", [0, 1])
@pytest.mark.parametrize("name", [name for name in PREDICTORS if name not in LEARNED])
def test_few_failures(name: str, train: Embeddings, test: Embeddings, n_failures: int) -> None:
    """Methods that learn from class labels must work without failures.

    Methods that learn from failures must say that failures are missing (below).
    """
    failure = failures(train)
    rows = np.concatenate([np.flatnonzero(failure == 0), np.flatnonzero(failure == 1)[:n_failures]])
    scarce = train.take(rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"only \d failures")
        predictor = make(name).fit(scarce)
    assert np.isfinite(predictor.predict_uncertainty(test)).all()


@pytest.mark.parametrize("wrong", [True, False])
def test_nothing_to_learn(learned: str, train: Embeddings, test: Embeddings, wrong: bool) -> None:
    rows = torch.from_numpy(np.flatnonzero(failures(train) == wrong))
    degenerate = train.take(rows)
    with pytest.raises(
        DataError, match=f"Found 0 {'successes' if wrong else 'failures'} among {len(rows)}"
    ):
        make(learned).fit(degenerate)
    with pytest.warns(UserWarning, match="only 0"):
        constant = make(learned, allow_degenerate=True).fit(degenerate)
    assert np.array_equal(constant.predict_uncertainty(test), np.full(len(test), float(wrong)))


def test_probability_of_failure(name: str, fitted: dict, test: Embeddings) -> None:
    if not PREDICTORS[name].is_probability:
        with pytest.raises(UsageError, match="gives a score, not a probability"):
            fitted[name].predict_failure_probability(test)
        return
    probability = fitted[name].predict_failure_probability(test)
    assert probability.min() >= 0
    assert probability.max() <= 1


def test_one_failure_is_enough_to_fit(learned: str, train: Embeddings, test: Embeddings) -> None:
    failure = failures(train)
    rows = np.concatenate([np.flatnonzero(failure == 0), np.flatnonzero(failure == 1)[:1]])
    with pytest.warns(UserWarning, match="only 1 failures"):
        predictor = make(learned).fit(train.take(rows))
    assert np.isfinite(predictor.predict_uncertainty(test)).all()


def test_an_interrupted_fit_changes_nothing(
    labelled: str,
    fitted: dict,
    train: Embeddings,
    test: Embeddings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores, calibration and known rows must stay those of one fit."""
    predictor = copy.copy(fitted[labelled]).calibrate_scores([-1.0, 0.0, 1.0] * 20, [0, 0, 1] * 20)
    before = predictor.predict_uncertainty(test)
    notes, calibrator = predictor.notes_, predictor.calibrator_

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FitSample, "draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predictor.fit(train.take(torch.arange(0, len(train), 2)))
    assert np.array_equal(predictor.predict_uncertainty(test), before, equal_nan=True)
    assert predictor.calibrator_ is calibrator
    assert predictor.notes_ is notes
    assert predictor.seen(train).shared.all()


def test_constant_survives_saving(
    learned: str, train: Embeddings, test: Embeddings, tmp_path
) -> None:
    rows = torch.from_numpy(np.flatnonzero(failures(train) == 0))
    with pytest.warns(UserWarning, match="only 0"):
        constant = make(learned, allow_degenerate=True).fit(train.take(rows))
    constant.save(tmp_path)
    assert np.array_equal(vilu.load(tmp_path).predict_uncertainty(test), np.zeros(len(test)))


def test_bad_training_sets(labelled: str, train: Embeddings) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(DataError, match="training set is empty"):
        make(labelled).fit(train.take(nothing))
    columns = {
        column: train.column(column, torch.arange(len(train)))[
            : 1 if column in TEXT_COLUMNS else None
        ]
        for column in train.columns
    }
    with pytest.raises(DataError, match="one candidate"):
        make(labelled).fit(variant(train, text=train.text[:1], target=None, columns=columns))
    if PREDICTORS[labelled].needs_labels:
        with pytest.raises(DataError, match="none of the 600 training rows has a label"):
            make(labelled).fit(variant(train, target=None))
    spoiled = train.image.clone()
    spoiled[:7] = float("inf")
    with pytest.raises(DataError, match="7 of 600 training rows are not finite"):
        make(labelled).fit(variant(train, image=spoiled))


def test_a_few_bad_or_unlabelled_rows_are_left_out_aloud(labelled: str, train: Embeddings) -> None:
    image, target = train.image.clone(), train.target.clone()
    image[0], target[1:4] = 0, -1
    needs = PREDICTORS[labelled].needs_labels
    said = (
        r"4 of 600 .*rows are left out \(1 unusable, the rest without label\)"
        if needs
        else r"1 of 600 .*\(unusable\)"
    )
    with pytest.warns(UserWarning, match=said):
        predictor = make(labelled).fit(variant(train, image=image, target=target))
    assert predictor.notes_["n_train"] == (596 if needs else 599)


@pytest.mark.parametrize("name", [name for name in LABELLED if not PREDICTORS[name].needs_labels])
def test_labels_change_nothing_where_none_are_needed(
    name: str, fitted: dict, train: Embeddings, test: Embeddings
) -> None:
    """Methods that need no labels must ignore them: other labels, out-of-distribution labels, or
    none.
    """
    expected = fitted[name].predict_uncertainty(test)
    for target in (
        None,
        train.target.flip(0),
        torch.where(train.target == 1, vilu.OUTSIDE, train.target),
    ):
        assert np.array_equal(
            make(name).fit(variant(train, target=target)).predict_uncertainty(test), expected
        )


def test_overlap_of_training_and_validation_is_refused(
    labelled: str, train: Embeddings, test: Embeddings
) -> None:
    with pytest.raises(DataError, match="600 of 600 validation rows are in the training set"):
        make(labelled).fit(train, validation=train)
    fitted = make(labelled).fit(train, validation=test)
    assert [len(fitted.seen(data)) for data in (train, test)] == [600, 600]


def test_parameters_out_of_range_are_named() -> None:
    with pytest.raises(
        UsageError, match=r"'epochs' parameter of .* must be greater than or equal to 1\. Got 0"
    ):
        PREDICTORS["vilu"](epochs=0).fit(toy_embeddings())
    with pytest.raises(UsageError, match=r"has no parameter 'epoch'\. Did you mean 'epochs'"):
        build_predictor(PREDICTORS["vilu"], {"epoch": "3"})
    with pytest.raises(UsageError, match="'weighting'"):
        build_predictor(PREDICTORS["vilu"], {"weighting": "heavy"})
    settings = {"epochs": "3", "hidden": "8,4", "patience": "none", "learning_rate": "1e-2"}
    made = build_predictor(PREDICTORS["vilu"], settings)
    assert (made.epochs, made.hidden, made.patience, made.learning_rate) == (3, (8, 4), None, 0.01)


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("deep_ensemble", {"members": 1_001, "hidden": (1,)}, "less than or equal to 1000"),
        ("mc_dropout", {"passes": 10_001}, "less than or equal to 10000"),
        ("probvlm", {"samples": 10_001}, "less than or equal to 10000"),
        ("lvu", {"hidden": (1,) * 101}, "at most 100 items"),
        ("pvu", {"hidden": (1,) * 101}, "at most 100 items"),
    ],
)
def test_no_saved_number_makes_loading_or_scoring_endless(
    name: str, settings: dict, most: str, tmp_path
) -> None:
    PREDICTORS["mcm_ts"]().fit(toy_embeddings()).save(tmp_path)
    record = json.loads((tmp_path / "predictor.json").read_bytes())
    write_json(
        tmp_path / "predictor.json",
        {**record, "method": name, "parameters": settings},
        digest_key="fingerprint",
    )
    with pytest.raises(DataError, match=f"{next(iter(settings))!r} parameter of {name} .*{most}"):
        vilu.load(tmp_path)


@pytest.mark.parametrize(
    ("fraction", "error", "what"),
    [(wrong, UsageError, f"must be .* Got {wrong} instead") for wrong in (-0.1, 1.0, 1.5, np.nan)]
    + [
        (0.9999, DataError, "holds out 600 of 600 training rows")
    ],  # failures and successes are rounded separately
)
def test_a_share_to_hold_out_leaves_rows_to_learn_from(
    fraction: float, error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=f"validation_fraction.* {what}"):
        vilu.ViLU(epochs=1, hidden=(4,), validation_fraction=fraction).fit(toy_embeddings())


def test_a_share_to_hold_out_leaves_failures_to_learn_from() -> None:
    wrong, right = (np.flatnonzero(failures(toy_embeddings()) == kind) for kind in (1, 0))
    few = toy_embeddings().take(np.sort([*wrong[:3], *right]))
    with (
        pytest.raises(DataError, match="so that no failure or no success is left"),
        pytest.warns(match="only 3 fail"),
    ):
        vilu.ViLU(epochs=1, hidden=(4,), validation_fraction=0.9).fit(few)


def test_embeddings_without_provenance_are_compared_by_their_cosines(
    learned: str, fitted: dict, train: Embeddings
) -> None:
    """If images point away from every fitted class, a warning must ask for the model.

    Closed-set methods have no other classes to compare with.
    """
    away = -np.linalg.pinv(train.text.numpy()) @ np.ones(5)
    foreign = away / np.linalg.norm(away) + np.random.default_rng(0).normal(size=(300, 16)) * 0.01
    negative = Embeddings(normalised(foreign), train.text, target=None, logit_scale=20.0)
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
    write_json(tmp_path / "predictor.json", {"schema_version": 99}, digest_key="fingerprint")
    with pytest.raises(ProvenanceError, match="schema version 99"):
        vilu.load(tmp_path)
    (tmp_path / "predictor.json").write_text("[" * 10)
    with pytest.raises(DataError, match="not JSON"):
        vilu.load(tmp_path)
    with pytest.raises(DataError, match="no predictor here"):
        vilu.load(tmp_path / "nowhere")


SHAPES = {  # the kinds of damage to a tensor
    "cut": lambda tensor: tensor[..., :-1].contiguous(),
    "empty": lambda tensor: tensor[:0],
    "half": lambda tensor: tensor.half(),
    "beyond": lambda tensor: tensor + 100,
    "two": lambda tensor: tensor.repeat(2),
}


@pytest.mark.parametrize(
    ("method", "tensor", "damage", "message"),
    [
        (
            "knn_vote",
            "bank",
            "cut",
            r"float32 of shape \(600, 16\)\. Got torch\.float32 of shape \(600, 15\)",
        ),
        ("knn_vote", "bank", "half", r"Got torch\.float16 of shape \(600, 16\)"),
        ("knn_vote", "labels", "cut", r"shape \(600,\)\. Got torch\.int64 of shape \(599,\)"),
        ("knn_vote", "labels", "beyond", r"from 0 to 4\. Got 100 to 104"),
        ("trine", "classes", "cut", r"shape \(5, 16\)"),
        (
            "knn_distance",
            "bank",
            "empty",
            r"shape \(1, 16\)\. Got torch\.float32 of shape \(0, 16\)",
        ),
        ("mahalanobis", "means", "cut", r"shape \(5, 16\)"),
        ("linear_probe", "weight", "cut", r"shape \(5, 16\)"),
        ("delta_knn", "n_right", "two", r"shape \(\)\. Got torch\.int64 of shape \(2,\)"),
        ("delta_mds", "wrong_whitener", "cut", r"shape \(16, 16\)"),
        ("rel_u", "penalty", "cut", r"shape \(5, 5\)"),
        ("class_gaussians", "groups", "beyond", r"from 0 to 6\. Got 102 to 106"),
        ("sirc", "slope", "two", r"shape \(\)"),
        ("bayesvlm", "image_inputs", "cut", r"shape \(16, 16\)"),
        ("duo", "multipliers", "cut", r"shape \(2,\)"),
        ("vilu_zero", "outside.weight", "cut", r"shape \(16,\)"),
        (
            "vilu_zero",
            "outside.slope",
            "empty",
            r"shape \(1,\)\. Got torch\.float64 of shape \(0,\)",
        ),
        (
            "vilu_plus",
            "outside.offset",
            "empty",
            r"shape \(6,\)\. Got torch\.float64 of shape \(0,\)",
        ),
        ("stacking", "members.knn_vote.bank", "cut", r"float32 of shape \(600, 16\)"),
        ("vilu_plus", "pool", "two", r"each of 3 experts\. Got 6"),
    ],
)
def test_tensors_of_other_shapes_are_refused_when_they_are_read(
    method: str, tensor: str, damage: str, message: str, fitted: dict, tmp_path: Path
) -> None:
    """Tensors with a wrong shape must be refused, even if all seals are whole.

    Whoever makes the folder can also seal it.
    """
    fitted[method].save(tmp_path)
    # The sample is bound to the weights. Without this line it would be refused first.
    (tmp_path / "sample.safetensors").unlink(missing_ok=True)
    weights = tmp_path / "weights.safetensors"
    record = json.loads((tmp_path / "predictor.json").read_text())
    tensors = safetensors_torch.load_file(weights)
    tensors[f"state.{tensor}"] = SHAPES[damage](tensors[f"state.{tensor}"])
    weights.write_bytes(safetensors_torch.save(tensors))
    (tmp_path / "sample.safetensors").unlink(missing_ok=True)  # the sample is bound to the weights
    sealed = {**record, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    del sealed["fingerprint"]
    write_json(tmp_path / "predictor.json", sealed, digest_key="fingerprint")
    with pytest.raises(
        DataError,
        match=f"weights.safetensors beside it: .*{tensor.split('.', 2)[-1]} of .*{message}",
    ):
        vilu.load(tmp_path)


@pytest.mark.parametrize("name", ["vilu", "pvu", "vilu_plus"])
def test_weights_of_another_type_are_refused(name: str, fitted: dict) -> None:
    other, state = make(name), fitted[name].state()
    other.space_ = fitted[name].space_
    weight = next(
        key
        for key in fitted[name].network_.state_dict()
        if key.endswith("weight") or "image" in key
    )
    with pytest.raises(DataError, match=rf"{weight}.*torch\.float16"):
        other.restore({**state, weight: state[weight].half()})
    other.restore(state)
    assert (
        other.network_.state_dict()[weight].data_ptr()
        != fitted[name].network_.state_dict()[weight].data_ptr()
    )


WIDTHLESS = ("mcm_ts", "duo", "sirc")  # their tensors do not depend on the embedding width


@pytest.mark.parametrize(
    "name", [name for name in PREDICTORS if PREDICTORS[name].needs_fit and name not in WIDTHLESS]
)
def test_tensors_of_another_width_are_refused_when_they_are_read(name: str, fitted: dict) -> None:
    other = make(name)
    other.space_ = dataclasses.replace(fitted[name].space_, embed_dim=15)
    state = fitted[name].state()
    # Without words a fit has no tensors for words. Once only these tensors had their width checked.
    if name == "vilu_plus":
        state = {key: tensor for key, tensor in state.items() if not key.startswith("outside.")}
    with pytest.raises(DataError, match=r"of shape \(.*15|do not fit"):
        other.restore(state)


def with_twins(data: Embeddings) -> dict[str, Any]:
    """Return arguments for ``Embeddings``, with the classes 1 and 3 twice.

    The second copies have other names, and half the rows.
    """
    given = torch.tensor([0, 1, 2, 3, 4, 1, 3])
    target, other = data.target.clone(), torch.arange(len(data)) % 2 == 1
    target[other & (data.target == 1)], target[other & (data.target == 3)] = 5, 6
    columns = {name: data.column(name, torch.arange(len(data))) for name in data.columns}
    twice = {name: rows[given] if name in TEXT_COLUMNS else rows for name, rows in columns.items()}
    names = [*(data.class_names or ()), "twin of 1", "twin of 3"]
    text, more = data.text[given], {"class_names": names, "ids": data.ids, "space": data.space}
    return {"image": data.image, "text": text, "target": target, "columns": twice, **more}


@contextmanager
def everything_set() -> Iterator[None]:
    """Change every torch setting that a caller may change, until the block ends."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_settings_of_torch_change_no_score_of_bare_embeddings(
    fitted: dict[str, vilu.FailurePredictor], test: Embeddings
) -> None:
    predictor = fitted["mcm"]
    expected = predictor.predict_uncertainty(test.image, test.text)
    with everything_set():
        found = predictor.predict_uncertainty(test.image, test.text)
        found_of_array = predictor.predict_uncertainty(test.image.numpy(), test.text.numpy())
    assert torch.equal(found, expected)
    assert np.array_equal(found_of_array, expected.numpy())


@pytest.mark.slow
def test_neither_equal_texts_nor_settings_of_torch_change_a_number(
    fitted: dict[str, vilu.FailurePredictor], train: Embeddings, test: Embeddings
) -> None:
    """Classes with equal texts must count as one class in every method.

    A fit must not depend on torch's settings at the call.
    """
    failure = vilu.score(fitted["mcm"], test).failure
    arguments, more = with_twins(train), with_twins(test)
    with everything_set():
        before = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
        )
        doubled_train, doubled = Embeddings(**arguments), Embeddings(**more)
        assert np.array_equal(vilu.score(fitted["mcm"], doubled).failure, failure)
        again = {name: make(name).fit(doubled_train) for name in fitted}
        inside = {
            name: predictor.calibrate_probability(doubled).predict_uncertainty(doubled)
            for name, predictor in again.items()
        }
        sure = {
            name: predictor.predict_failure_probability(doubled)
            for name, predictor in again.items()
        }
        assert (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
        ) == before
        assert torch.is_inference_mode_enabled()
    for name, predictor in fitted.items():
        expected = predictor.predict_uncertainty(test)
        assert np.array_equal(predictor.predict_uncertainty(doubled), expected), name
        assert np.array_equal(inside[name], expected), name
        assert np.array_equal(again[name].predict_uncertainty(test), expected), name
        assert not any(tensor.is_inference() for tensor in again[name].state().values()), name
        calibrator = copy.deepcopy(predictor).calibrate_probability(test)
        for one in (calibrator, again[name]):
            assert np.array_equal(one.predict_failure_probability(test), sure[name]), name


def test_two_classes_of_one_name_and_text_are_one_answer(
    name: str, train: Embeddings, test: Embeddings
) -> None:
    """If two classes share a name and a text, labels for either copy must give the same answer.

    ImageNet has "missile" and "sunglasses" twice.
    """
    quick = train.take(torch.arange(300))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only")
        fits = {copy_of: make(name).fit(labelled_by(quick, copy_of)) for copy_of in (0, 1)}
    said = [
        vilu.score(fits[fitted_on], labelled_by(test, named))
        for fitted_on in (0, 1)
        for named in (0, 1)
    ]
    for other in said[1:]:
        assert np.array_equal(other.uncertainty, said[0].uncertainty)
        assert np.array_equal(other.failure, said[0].failure)
    assert np.isfinite(said[0].uncertainty).all()
    of_two = torch.isin(test.target, torch.tensor([1, 3])).numpy()
    assert 0 < said[0].failure[of_two].mean() < 1  # these rows have right and wrong answers
    assert len({str(vilu.evaluate(outcomes, n_resamples=10)) for outcomes in said}) == 1


def labelled_by(data: EmbeddingSource, copy_of: int) -> Embeddings:
    """Return rows with the classes 1 and 3 twice. Labels name one copy.

    A second class 3 stands before the other classes, and a second class 1 stands behind them.
    """
    given = [3, 0, 1, 2, 3, 4, 1]
    places = {label: [i for i, one in enumerate(given) if one == label] for label in range(5)}
    target = [places[label][copy_of % len(places[label])] for label in data.target.tolist()]
    every = torch.arange(len(data))
    columns = {name: data.column(name, every) for name in data.columns}
    columns |= {name: columns[name][given] for name in TEXT_COLUMNS if name in columns}
    names = [f"class {i}" for i in given]
    text = data.candidates(every).text[given]
    return Embeddings(
        data.image_rows(every),
        text,
        target=target,
        space=data.space,
        class_names=names,
        columns=columns,
    )


@pytest.mark.slow
@pytest.mark.data
def test_imagenets_equal_names_work_in_every_method_that_compares_classes(shared: Path) -> None:
    file = shared / "data" / "realclip" / "imagenet1k_b32.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    found = np.load(file)
    data = Embeddings(
        **{key: found[key] for key in ("image", "text", "target")},
        class_names=found["class_names"].tolist(),
    )
    assert data.n_candidates == 998
    train, test = data.take(torch.arange(0, len(data), 8)), data.take(torch.arange(1, len(data), 4))
    compared = [
        name for name in LABELLED if PREDICTORS[name].closed_set and not PREDICTORS[name].columns
    ]
    assert len(compared) > 8
    for name in compared:
        if name == "stacking":  # it fits all methods again, six times
            continue
        quick = {"max_iter": 5} if name == "linear_probe" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few steps, and few rows per class
            outcomes = vilu.score(make(name, **quick).fit(train), test)
        assert np.isfinite(outcomes.uncertainty).all(), name
        assert vilu.evaluate(outcomes, metrics=["auroc"], n_resamples=0).rows[0].value > 0.4, name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_learns_in_every_mode_of_gradients(
    mode: type, fitted: dict, train: Embeddings, test: Embeddings
) -> None:
    with mode():
        expected = fitted["vilu"].predict_uncertainty(test)
        assert np.array_equal(make("vilu").fit(train).predict_uncertainty(test), expected)
        assert torch.is_grad_enabled() is False


STEEPEST = 10
"""Largest score change per logit change, relative to the largest score.

It is more than any method has on these rows.
"""

ROUNDING = 2 * 16 * 2.0**-24 * 20
"""Largest difference between two float32 sums.

The sums have D = 16 products between unit vectors, at a logit scale of 20.
"""


def test_neither_threads_nor_batches_nor_order_change_a_score(
    fitted: dict[str, vilu.FailurePredictor], test: Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other blocks and thread counts must move a logit only by rounding."""
    before, order = (
        torch.get_num_threads(),
        torch.randperm(len(test), generator=torch.Generator().manual_seed(5)),
    )
    takes = {"order": order, "one row": torch.tensor([5]), "two rows": torch.tensor([9, 2])}
    torch.set_num_threads(1)
    try:
        for name, predictor in fitted.items():
            expected = predictor.predict_uncertainty(test)
            gaps = {
                k: predictor.predict_uncertainty(test.take(v)) - expected[v.numpy()]
                for k, v in takes.items()
            }
            for threads in (2, 4):
                torch.set_num_threads(threads)
                gaps[f"{threads} threads"] = predictor.predict_uncertainty(test) - expected
            torch.set_num_threads(1)
            with monkeypatch.context() as patch:
                patch.setattr("vilu.predictors.contract.predictor.SCORING_BATCH", 7)
                gaps["blocks"] = predictor.predict_uncertainty(test) - expected
            # A score that counts neighbours may jump where rounding decides, in at most one row per
            # hundred.
            allowed = STEEPEST * ROUNDING * max(1.0, np.abs(expected).max())
            for kind, gap in gaps.items():
                assert np.mean(np.abs(gap) > allowed) < 0.01, (name, kind, np.abs(gap).max())
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:only")
def test_logit_scales_from_one_to_ten_thousand(fitted: dict) -> None:
    for scale in (1.0, 1e4):
        train, test = (
            toy_embeddings(n=200, seed=seed, scale=scale, ids_from=1_000 * seed) for seed in (0, 1)
        )
        for name in fitted:
            if name not in TRAINED or name == "vilu":
                assert np.isfinite(make(name).fit(train).predict_uncertainty(test)).all(), (
                    name,
                    scale,
                )


@pytest.mark.filterwarnings("ignore:only")
def test_fifty_thousand_candidates_in_bounded_memory() -> None:
    """The matrix over all class pairs takes 10 GB in float32, so no method may build it.

    A method that needs this matrix must refuse in a sentence.
    """
    data = toy_embeddings(n=24, k=50_000)
    for name in ("mcm", "entropy", "gen", "mcm_ts", "vilu", "knn_vote", "mahalanobis", "bayesvlm"):
        assert np.isfinite(make(name).fit(data).predict_uncertainty(data)).all(), name
    with pytest.raises(UsageError, match=r"at most 10,000 of them\. Got 50,000"):
        make("rel_u").fit(data)
