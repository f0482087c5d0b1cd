"""Test scores for bare image embeddings, with the model's classes, on the embeddings' device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.builders.fake_gpu import DEVICE, FakeGPU, on_gpu
from tests.conftest import few, toy_embeddings
from vilu.errors import DataError, UsageError

N = 50


def plain(n: int, seed: int, first: int) -> vilu.Embeddings:
    """Return toy rows without extra columns, because bare embeddings have none either."""
    rows = toy_embeddings(n, seed=seed, ids_from=first)
    return vilu.Embeddings(
        image=rows.image,
        text=rows.text,
        target=rows.target,
        logit_scale=20.0,
        class_names=rows.class_names,
    )


@pytest.fixture(scope="module")
def model() -> vilu.Selective:
    predictor = vilu.PREDICTORS["linear_probe"]()
    fitted = vilu.Selective(predictor, answer="adapted").fit(plain(600, 1, 0))
    return fitted.calibrate(plain(600, 2, 5_000), max_risk=0.4, label_sets="lac")


def test_they_are_answered_as_wrapped_ones(model: vilu.Selective) -> None:
    new = plain(N, 3, 9_000)
    image = new.image * torch.linspace(0.5, 2, N)[:, None]
    with pytest.warns(UserWarning, match="not of unit norm"):
        wrapped = vilu.Embeddings(
            image=image, text=new.text, logit_scale=20.0, class_names=new.class_names
        )
    expected = model.predict(wrapped)
    for bare in (image, image.numpy(), image.double()):
        outcomes = model.predict(bare)
        assert outcomes.decision == expected.decision
        assert outcomes.label_set == expected.label_set
        assert np.array_equal(outcomes.uncertainty, expected.uncertainty)
    assert np.array_equal(model.predict_uncertainty(image).numpy(), expected.uncertainty)
    assert np.array_equal(model.predict_uncertainty(image.numpy()), expected.uncertainty)
    assert np.array_equal(model.predict_failure_probability(image), expected.failure_probability)


def test_a_row_without_an_embedding_is_reviewed(model: vilu.Selective) -> None:
    image = plain(N, 3, 9_000).image.clone()
    image[3], image[7, 0] = 0, np.nan
    outcomes = model.predict(image)
    assert (outcomes.reason[3], outcomes.reason[7]) == ("zero_norm", "nonfinite")
    assert outcomes.decision[3] == outcomes.decision[7] == "review"
    uncertainty = model.predict_uncertainty(image)
    assert uncertainty.isnan().nonzero().flatten().tolist() == [3, 7]


def test_numbers_that_float32_cannot_hold_keep_their_direction(model: vilu.Selective) -> None:
    image = plain(N, 3, 9_000).image.double()
    expected = model.predict_uncertainty(image)
    for factor in (1e-200, 1e200):
        assert torch.allclose(model.predict_uncertainty(image * factor), expected, atol=1e-5)


def test_rows_of_the_fit_are_recognised(model: vilu.Selective) -> None:
    with pytest.warns(UserWarning, match="were used to fit"):
        model.predict(plain(600, 1, 0).image)


def test_a_predictor_takes_texts(model: vilu.Selective) -> None:
    new = plain(N, 3, 9_000)
    mcm = vilu.MCM().fit(new)
    expected = mcm.predict_uncertainty(new)
    assert np.array_equal(mcm.predict_uncertainty(new.image, new.text).numpy(), expected)
    probe = model.predictor  # it keeps its classes' texts
    assert len(probe.predict_uncertainty(new.image.numpy())) == N


def test_what_is_missing_is_said(model: vilu.Selective) -> None:
    new = plain(N, 3, 9_000)
    with pytest.raises(UsageError, match="knows no logit scale"):
        vilu.MCM().predict_uncertainty(new.image, new.text)
    with pytest.raises(UsageError, match="keeps no texts of classes"):
        vilu.MCM().fit(new).predict_uncertainty(new.image)
    with pytest.raises(UsageError, match="have their candidates"):
        vilu.MCM().predict_uncertainty(new, new.text)
    with pytest.raises(DataError, match="different rows"):
        vilu.MCM().fit(new).predict_uncertainty(new.image, new.text[[0, 0, 1]])
    with pytest.raises(DataError, match="rows of the width 16"):
        model.predict(new.image[:, :3])
    with pytest.raises(DataError, match="must be a matrix"):
        model.predict(new.image[0])
    with pytest.raises(DataError, match="there is nothing to score"):
        model.predict(new.image[:0])
    with pytest.raises(UsageError, match="keeps no classes"):
        vilu.Selective(vilu.MCM()).predict_uncertainty(new.image)


@pytest.mark.parametrize("name", few(["mcm", "vilu_plus", "linear_probe", "mcm_ts", "vilu"], 4))
def test_no_embedding_leaves_its_device(name: str) -> None:
    predictor = vilu.PREDICTORS[name]().fit(plain(600, 1, 0))
    text = plain(N, 3, 0).text
    with FakeGPU() as gpu:
        uncertainty = predictor.predict_uncertainty(on_gpu(N, text.shape[1]), text)
    assert uncertainty.device.type == DEVICE
    # One status per row is copied, for methods that compare the rows with their fit rows.
    assert set(gpu.shapes) <= {(N,)}


def test_outcomes_take_a_few_numbers_of_a_row(
    model: vilu.Selective, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mean text has no numbers on this device, so it would differ from the calibration's mean
    # text.
    monkeypatch.setattr("vilu.calibration.calibration.candidates_agree", lambda *_: True)
    n_classes, width = plain(N, 3, 0).text.shape
    with FakeGPU() as gpu:
        outcomes = model.predict(on_gpu(N, width))
    assert len(outcomes) == N
    assert outcomes.label_set is not None
    # Only the row numbers, the probabilities for label sets and the mean text are copied.
    assert set(gpu.shapes) <= {(N,), (N, n_classes), (width,)}


def test_a_copy_to_the_cpu_is_noted() -> None:
    with FakeGPU() as gpu:
        on_gpu(3, 2).cpu()
        on_gpu(4, 2).sum().item()
    assert (gpu.shapes, gpu.n_numbers) == ([(3, 2)], 1)
    with FakeGPU(), pytest.raises(AssertionError, match="mixes"):
        on_gpu(3, 2) + torch.ones(3, 2)
