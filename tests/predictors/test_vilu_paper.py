"""Test ``vilu_paper``: ViLU with its paper's settings."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import toy_embeddings
from vilu import PREDICTORS

pytestmark = pytest.mark.filterwarnings("ignore:only .* among")

UNMOVED = {"learning_rate": 1e-12, "epochs": 1, "weight_decay": 0.0}


def first_weights(method: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return weights that training left where they began."""
    data = toy_embeddings(n=300)
    return PREDICTORS[method](seed=seed, device="cpu", **UNMOVED).fit(data).state()


def test_the_mlp_begins_as_a_linear_layer_of_torch_does() -> None:
    """Weights must be uniform within 1 / sqrt(inputs), so their standard deviation is 1 / sqrt(3
    inputs).
    """
    weights = first_weights("vilu_paper")
    first = torch.cat([weights[f"first.{part}"] for part in ("image", "attended", "caption")], 1)
    layers = [first] + [weights[f"rest.{place}.weight"] for place in (1, 3, 5)]
    assert [tuple(layer.shape) for layer in layers[1:]] == [(256, 512), (128, 256), (1, 128)]
    for layer in layers:
        bound = 1 / math.sqrt(layer.shape[1])
        assert layer.abs().max() <= bound
        # The tolerance is 8 standard errors for a standard deviation over 128 numbers or more.
        assert float(layer.std()) == pytest.approx(bound / math.sqrt(3), rel=0.4)
    assert weights["first_bias"].abs().max() > 0  # in ``vilu`` the biases begin at zero
    assert first_weights("vilu")["first_bias"].abs().max() < 1e-6


def test_the_attention_begins_as_the_zero_shot_posterior() -> None:
    weights = first_weights("vilu_paper")
    identity = torch.eye(len(weights["attention.image"]))
    torch.testing.assert_close(weights["attention.image"], identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights["attention.text"], identity, rtol=0, atol=1e-6)


def test_a_seed_decides_the_first_weights() -> None:
    again = first_weights("vilu_paper", seed=3)
    torch.testing.assert_close(first_weights("vilu_paper", seed=3), again, rtol=0, atol=0)
    assert not torch.equal(first_weights("vilu_paper")["first.image"], again["first.image"])


def test_the_last_epoch_is_taken_and_no_row_is_held_out() -> None:
    data = toy_embeddings(n=300)
    predictor = PREDICTORS["vilu_paper"](epochs=7, device="cpu").fit(data)
    history = predictor.notes_["history"]
    assert history["kept_epoch"] == 6
    assert history["validation_auroc"] == []
    assert predictor.notes_["n_train"] == len(data)


def test_settings_are_those_of_the_released_run_on_cifar10() -> None:
    """The settings come from that run's saved configuration.

    A.2 in the supplement gives the attention.
    """
    predictor = PREDICTORS["vilu_paper"]()
    assert (predictor.epochs, predictor.batch_size, predictor.learning_rate) == (800, 128, 0.01)
    assert (predictor.momentum, predictor.weight_decay) == (0.9, 0.0005)
    assert (predictor.warmup_epochs, predictor.freeze_epochs) == (5, 1)
    assert (predictor.hidden, predictor.attention) == ((512, 256, 128), "official")
    assert (predictor.weighting, predictor.loss) == ("batch", "bce")
