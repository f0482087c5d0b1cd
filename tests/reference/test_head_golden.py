"""Test the head, its losses and gradients against the reference implementation's numbers (float32).

The reference's output is a confidence logit. Ours is its negative, so the last layer's sign turns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import Batch
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.losses import FailureWeight, weighted_bce, weighted_mse

DATA = Path(__file__).parents[1] / "data"
CASES = [(file, a, c) for file in ("d24", "k100") for a in (0, 1) for c in (0, 1)]
RTOL = 1e-5  # the project guarantees 1e-5, and float32 itself gives about 1e-6 here


class Case:
    """Load one golden head and its batch."""

    def __init__(self, file: str, attention: int, caption: int) -> None:
        self.arrays = np.load(DATA / f"vilu_head_{file}.npz")
        self.prefix = f"attention{attention}_caption{caption}/"
        z = self.arrays
        data = Embeddings(
            z["image"], z["text"], target=z["label"], logit_scale=float(z["logit_scale"])
        )
        self.batch: Batch = next(data.batches(1000))
        parameters = {key.removeprefix("param/"): self(key) for key in self.keys("param/")}
        hidden = tuple(len(parameters[f"mlp.{i}.bias"]) for i in (0, 2))
        self.head = FailureHead(
            z["image"].shape[1],
            hidden,
            attention="official" if attention else None,
            predicted_caption=bool(caption),
        )
        parts = ["image", *["attended"] * attention, *["caption"] * caption]
        self.names = {
            f"rest.{i}.{kind}": f"mlp.{j}.{kind}"
            for i, j in ((1, 2), (3, 4))
            for kind in ("weight", "bias")
        }
        self.names |= {"first_bias": "mlp.0.bias"}
        if attention:
            self.names |= {
                "attention.image": "in_proj_v.weight",
                "attention.text": "in_proj_t.weight",
            }
        self.parts = [f"first.{part}" for part in parts]
        state = {
            ours: self.sign(ours) * torch.tensor(parameters[theirs])
            for ours, theirs in self.names.items()
        }
        blocks = torch.tensor(parameters["mlp.0.weight"]).chunk(len(parts), dim=1)
        self.head.load_state_dict(state | dict(zip(self.parts, blocks, strict=True)))

    def keys(self, start: str) -> list[str]:
        return [
            k.removeprefix(self.prefix) for k in self.arrays if k.startswith(self.prefix + start)
        ]

    def __call__(self, key: str) -> np.ndarray:
        return self.arrays[self.prefix + key]

    @staticmethod
    def sign(ours: str) -> int:
        return -1 if ours.startswith("rest.3") else 1


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-attention{c[1]}-caption{c[2]}")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def close(ours: torch.Tensor, theirs: np.ndarray, scale: float | None = None) -> None:
    """Assert that entries agree to 1e-5 times the scale, by default the largest entry.

    Sums in another order make small entries relatively worse.
    """
    if scale is None:
        scale = float(np.abs(theirs).max())
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=RTOL, atol=RTOL * scale)


def test_logits(case: Case) -> None:
    close(-case.head(case.batch), case("confidence_logit"))


def test_logits_while_the_projections_are_frozen(case: Case) -> None:
    """While the reference freezes its projections, embeddings pass through.

    Our frozen projections are still the identity.
    """
    if case.head.attention is not None:
        dim = case.batch.image.shape[1]
        case.head.attention.load_state_dict({"image": torch.eye(dim), "text": torch.eye(dim)})
    close(-case.head(case.batch), case("confidence_logit_frozen_projections"))


@pytest.mark.parametrize(("mode", "key"), [("batch", "bce_adaptative"), ("static", "bce_static")])
def test_bce(case: Case, mode: str, key: str) -> None:
    failure = case.batch.failure
    weight = FailureWeight(mode, 0.5)(failure)
    close(weighted_bce(case.head(case.batch), failure, weight), case(key))


def test_mse_on_the_true_class_probability(case: Case) -> None:
    batch = case.batch
    wrong = 1 - batch.logits.softmax(1).gather(1, batch.target[:, None]).squeeze(1)
    weight = FailureWeight("batch", 0.5)(batch.failure)
    close(weighted_mse(case.head(batch), wrong, batch.failure, weight), case("mse_adaptative"))


def test_gradients_of_the_weighted_bce(case: Case) -> None:
    failure = case.batch.failure
    weighted_bce(case.head(case.batch), failure, FailureWeight("batch", 0.5)(failure)).backward()
    gradients = dict(case.head.named_parameters())
    assert {f"grad/{theirs}" for theirs in case.names.values()} | {"grad/mlp.0.weight"} == set(
        case.keys("grad/")
    )
    close(
        torch.cat([gradients[part].grad for part in case.parts], dim=1), case("grad/mlp.0.weight")
    )
    for ours, theirs in case.names.items():
        gradient = gradients[ours].grad
        assert gradient is not None
        golden = case(f"grad/{theirs}")
        scale = float(np.abs(golden).max())
        if ours == "attention.image":
            # The gradient through a softmax is a difference: p_j (g_j - sum_i p_i g_i). It vanishes
            # where every p is 0 or 1. Then float32 leaves the rounding of the g, whose sum is the
            # texts' gradient.
            scale = max(scale, float(np.abs(case("grad/in_proj_t.weight")).max()))
        close(case.sign(ours) * gradient, golden, scale)
