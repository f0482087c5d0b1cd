"""Test test-time augmentation and prompt disagreement.

The references are the definition in SciPy, numbers by hand, and MCM.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.special import softmax

import vilu
from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.errors import UsageError
from vilu_bench.methods.views import TTA, PromptDisagreement, improbability

METHODS = {"views": TTA, "prompts": PromptDisagreement}


def columns_of(data: Embeddings | PairEmbeddings) -> dict[str, np.ndarray]:
    rows = torch.arange(len(data))
    return {name: data.column(name, rows).double().numpy() for name in METHODS}


def looks(data: Embeddings, column: str) -> list[np.ndarray]:
    """Return float64 logits (N, K), first the original's, then one array per view or prompt."""
    image, text, more = (
        data.image.double().numpy(),
        data.text.double().numpy(),
        columns_of(data)[column],
    )
    if column == "views":
        others = [more[:, v] @ text.T for v in range(more.shape[1])]
    else:
        others = [image @ more[:, p].T for p in range(more.shape[1])]
    return [
        data.space.logit_scale * cosine + data.space.logit_bias
        for cosine in (image @ text.T, *others)
    ]


@pytest.mark.parametrize("column", METHODS)
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_against_the_definition(column: str, scale: float) -> None:
    data = toy_embeddings(scale=scale, k=7)
    logits = looks(data, column)
    answer = logits[0].argmax(1)
    mean = np.mean(
        [1 - softmax(one, axis=1)[np.arange(len(data)), answer] for one in logits], axis=0
    )
    vote = np.mean([one.argmax(1) != answer for one in logits], axis=0)
    # Logits are float32 products with 16 roundings, each 6e-8 times the scale. A probability moves
    # by at most a quarter of its logit's change.
    tolerance = 0.25 * 16 * 6e-8 * scale
    np.testing.assert_allclose(
        METHODS[column]().predict_uncertainty(data), mean, atol=tolerance, rtol=0
    )
    found = METHODS[column](statistic="vote").predict_uncertainty(data)
    assert np.mean(found == vote) > 0.99  # two candidates may be equally likely up to rounding
    assert {Fraction(value).limit_denominator(10) for value in found} <= {
        Fraction(i, len(logits)) for i in range(9)
    }


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("statistic", ["mean", "vote"])
def test_looks_that_are_all_the_original(method: type[TTA], statistic: str) -> None:
    data = toy_embeddings()
    same = variant(
        data, columns={"views": data.image[:, None].repeat(1, 3, 1), "prompts": data.text[:, None]}
    )
    found = method(statistic=statistic).predict_uncertainty(same)
    expected = vilu.MCM().predict_uncertainty(data) if statistic == "mean" else np.zeros(len(data))
    np.testing.assert_allclose(found, expected, atol=1e-15, rtol=2e-6)  # MCM sums in float32


def test_by_hand() -> None:
    """With two classes and the scale ln 2, cosines (1, 0) are odds 2 : 1."""
    axes = np.eye(2)
    views = np.array([[[1, 0], [0, 1], [0, 1]]])
    # The first prompt words class 0 as class 1.
    prompts = np.array([[[0, 1], [1, 0]], [[1, 0], [0, 1]]])
    data = Embeddings(
        axes[:1], axes, logit_scale=np.log(2), columns={"views": views, "prompts": prompts}
    )
    assert TTA().predict_uncertainty(data) == pytest.approx(
        (1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4, abs=1e-7
    )
    assert TTA(statistic="vote").predict_uncertainty(data).tolist() == [0.5]
    assert PromptDisagreement().predict_uncertainty(data) == pytest.approx(
        (1 / 3 + 2 / 3 + 1 / 3) / 3, abs=1e-7
    )
    assert PromptDisagreement(statistic="vote").predict_uncertainty(data) == pytest.approx(1 / 3)


def test_doubt_keeps_its_order_where_a_softmax_rounds_to_one_or_to_nothing() -> None:
    """Sure rows must not tie.

    For two candidates with gap g, 1 - p is 1 / (1 + e^g), and float64 gives e^g exactly enough.
    """
    gaps = torch.tensor([-800.0, -40.0, 0.0, 37.0, 40.0, 200.0, 800.0])
    logits = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    found = improbability(logits, torch.zeros(len(gaps), 1, dtype=torch.int64)).numpy()
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(gaps.double().numpy()))
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=0)
    assert np.all(np.diff(found[1:-1]) < 0)


@pytest.mark.parametrize("column", METHODS)
def test_captions_of_a_pool(column: str) -> None:
    """Each pool with 32 pairs must score as if it were alone.

    The prompts are paraphrases of the captions.
    """
    pairs = toy_pairs()
    more = columns_of(pairs)[column]
    found = METHODS[column]().predict_uncertainty(pairs)
    for start in range(0, len(pairs), 32):
        rows = slice(start, start + 32)
        alone = Embeddings(
            pairs.image[rows], pairs.text[rows], logit_scale=20.0, columns={column: more[rows]}
        )
        np.testing.assert_allclose(
            found[rows], METHODS[column]().predict_uncertainty(alone), atol=1e-6
        )


def test_another_statistic_is_refused() -> None:
    with pytest.raises(UsageError, match="'statistic'"):
        TTA(statistic="variance").predict_uncertainty(toy_embeddings())
