"""Use vilu as another program does, with types.

The asserted types must be the types that vilu gives. Two type checkers read this file (`make
test-types`), and `make lint` reads it with the rest. Lines that end in an ``ignore`` are wrong
uses: a checker that misses one complains about the ``ignore``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vilu
from vilu import methods, metrics


@dataclass
class Narrow(vilu.FailurePredictor):
    """A user's own method."""

    name: ClassVar[str] = "narrow"
    summary: ClassVar[str] = "mean logit less the largest"
    reference: ClassVar[str] = "nobody"
    power: float = 1.0

    def _score(self, batch: vilu.Batch) -> Tensor:
        return batch.logits.mean(dim=-1) - batch.logits.amax(dim=-1)


def numbers(
    image: NDArray[np.float32], text: NDArray[np.float32], target: NDArray[np.int64]
) -> float:
    """Go from arrays to a threshold."""
    data = vilu.Embeddings(
        image, text, target=target, logit_scale=100.0, class_names=["cat", "dog"]
    )
    assert_type(Narrow(power=2.0).fit(data), Narrow)
    assert_type(vilu.ViLUPlus(seed=0).fit(data).predict_uncertainty(data), NDArray[np.float64])
    outcomes = vilu.score(Narrow(), data)
    assert_type(outcomes, vilu.Outcomes)
    assert_type(vilu.evaluate([outcomes], metrics=["auroc"], n_resamples=0), vilu.ResultTable)
    rule = vilu.certify(outcomes, max_risk=0.05, confidence=0.95)
    assert_type(rule, vilu.Rule)
    assert_type(rule.accept(np.array([0.1, 0.9])), NDArray[np.bool_])
    assert_type(metrics.auroc([0.1, 0.9], [0, 1]), float)
    assert_type(vilu.__version__, str)
    assert_type(methods.Energy, Any)
    return vilu.metrics.fpr_at_tpr(np.array([0.1, 0.9]), np.array([0, 1]))


def photos(folder: Path, images: list[Path]) -> list[str]:
    """Go from photos to decisions."""
    guard = vilu.Guard(folder)
    answers = guard(images)
    assert_type(answers, list[vilu.Answer])
    model = vilu.load(folder)
    assert_type(model, vilu.FailurePredictor | vilu.Selective)
    if isinstance(model, vilu.Selective):
        assert_type(model.predict(np.eye(2)), vilu.Outcomes)
    assert_type(model.predict_uncertainty(torch.eye(2)), Tensor)
    return [answer.label or "?" for answer in answers if answer.decision == "accept"]


def wrong(data: vilu.Embeddings, outcomes: vilu.Outcomes) -> None:
    """Use vilu wrongly: a checker must see a mistake in every line."""
    vilu.Gard("out")  # type: ignore[attr-defined]
    vilu.Guard(3)  # type: ignore[arg-type]
    vilu.Guard("out").ask()  # type: ignore[attr-defined]
    vilu.evaluate(outcomes, metrics=[3])  # type: ignore[list-item]
    vilu.certify(outcomes, risk=0.05)  # type: ignore[call-arg]
    vilu.certify(outcomes, method="best")  # type: ignore[arg-type]
    vilu.MCM(seed="x").fit(data)  # type: ignore[call-arg]
    vilu.ViLUPlus(seed="x")  # type: ignore[arg-type]
    Narrow(power="2")  # type: ignore[arg-type]
    metrics.auroc([0.1, 0.9])  # type: ignore[call-arg]
    metrics.auroq()  # type: ignore[attr-defined]
    vilu.score(data, data)  # type: ignore[arg-type]
