"""Test zero-shot answers in tiles: the dense result, ties, block sizes, and empty inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vilu.embeddings.similarity import (
    Matches,
    RivalWeights,
    index_of_first_equal,
    row_blocks,
    zero_shot,
)
from vilu.embeddings.source import Batch


def unit(n: int, d: int, seed: int) -> Tensor:
    return functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def noisy(text: Tensor, n: int, seed: int = 7) -> Tensor:
    """Return rows whose first third is close to their text, then less close, then far away."""
    noise = unit(n, text.shape[1], seed) * torch.tensor([0.3, 2.0, 9.0])[torch.arange(n) % 3, None]
    return functional.normalize(text[torch.arange(n) % len(text)] + noise, dim=1)


def batch_of(image: Tensor, text: Tensor, **more: object) -> Batch:
    n = len(image)
    return Batch(image, text, torch.arange(n) % len(text), torch.arange(n), 30.0, -5.0, **more)


@pytest.mark.parametrize("cells", [1, 7, 64, 1000, 2**22])
@pytest.mark.parametrize(("b", "k"), [(1, 1), (37, 1), (1, 53), (40, 53), (53, 40)])
def test_tiles_of_any_size_give_the_dense_answers(cells: int, b: int, k: int) -> None:
    """Tiles split rows, and with fewer than K cells also candidates.

    The dense reference is in float64.
    """
    text = unit(k, 16, 0)
    image = noisy(text, b)
    logits = 30 * image.double() @ text.double().T - 5
    found = zero_shot(image, text, index_of_first_equal(text), 30.0, -5.0, max_tile_logits=cells)
    assert torch.equal(found.prediction, logits.argmax(dim=1))
    # logits up to 35 in float32: 16 products with rounding 2^-24 each, times 30
    assert torch.allclose(found.max_logit.double(), logits.amax(dim=1), atol=1e-4)
    assert torch.allclose(found.log_norm.double(), logits.logsumexp(dim=1), atol=1e-4)
    assert torch.allclose(
        found.max_probability.double(), logits.softmax(dim=1).amax(dim=1), atol=1e-4
    )


def test_labels_of_a_large_pool_are_the_dense_ones() -> None:
    text = unit(8192, 64, 0)
    batch = batch_of(noisy(text, 8192), text)
    answer = torch.cat([(rows @ text.T * 30 - 5).argmax(dim=1) for rows in batch.image.split(1024)])
    assert torch.equal(batch.prediction, answer)
    assert torch.equal(batch.failure, (answer != torch.arange(8192)).long())
    assert 0.1 < batch.failure.double().mean() < 0.9
    assert "logits" not in batch.__dict__  # the labels did not need them


@pytest.mark.parametrize("b", [1, 2, 3, 100])
@pytest.mark.parametrize("k", [2, 5, 7, 11, 37, 101])
def test_of_equal_candidates_the_first_wins(b: int, k: int) -> None:
    """Products of equal rows differ in the last bit at a block's edge.

    This difference must not decide the answer.
    """
    text = unit(1, 512, 0).repeat(k, 1)
    image = unit(b, 512, 1)
    assert zero_shot(image, text, index_of_first_equal(text), 100.0).prediction.tolist() == [0] * b
    dense = batch_of(image, text)
    assert dense.logits.shape == (b, k)
    assert dense.prediction.tolist() == [0] * b


def test_equal_candidates_in_different_tiles() -> None:
    text = unit(40, 16, 0)
    text[[25, 39]] = text[3].clone()
    found = zero_shot(text, text, index_of_first_equal(text), 50.0, max_tile_logits=8)
    assert found.prediction.tolist() == [*range(25), 3, *range(26, 39), 3]


def test_first_equal_by_hand_and_against_unique() -> None:
    rows = torch.tensor([[0.0, 1], [1, 0], [-0.0, 1], [1, 0], [1, 1e-30]])
    assert index_of_first_equal(rows).tolist() == [0, 1, 0, 1, 4]
    assert index_of_first_equal(torch.empty(0, 4)).tolist() == []
    many = torch.randint(0, 2, (500, 12), generator=torch.Generator().manual_seed(0)).float()
    assert index_of_first_equal(many).tolist() == [
        next(j for j in range(500) if torch.equal(many[j], row)) for row in many
    ]
    assert index_of_first_equal(torch.eye(30)).tolist() == list(
        range(30)
    )  # most rows agree in all columns that make the key


def test_no_rows_and_no_candidates() -> None:
    text = unit(3, 4, 0)
    for found in (
        zero_shot(torch.empty(0, 4), text, index_of_first_equal(text), 1.0),
        RivalWeights.from_logits(torch.empty(0, 3)).zero_shot(torch.arange(3)),
    ):
        assert [len(part) for part in found] == [0, 0, 0]
        assert found.prediction.dtype == torch.int64
    with pytest.raises(ValueError, match="no candidate"):
        zero_shot(text, torch.empty(0, 4), torch.arange(0), 1.0)
    empty = batch_of(torch.empty(0, 4), text)
    assert (
        empty.failure.tolist()
        == empty.prediction.tolist()
        == empty.target_log_probability.tolist()
        == []
    )


def test_one_candidate_is_always_right() -> None:
    batch = batch_of(unit(5, 4, 0), unit(1, 4, 1))
    assert batch.failure.tolist() == [0] * 5
    assert torch.equal(batch.zero_shot.max_probability, torch.ones(5))
    assert torch.allclose(batch.target_log_probability, torch.zeros(5), atol=1e-5)


def test_blocks_of_rows_cover_all_and_stay_small() -> None:
    for n, k, size in [(50, 7, 1000), (50, 7, 3), (5, 1000, 64), (0, 3, 8)]:
        parts = list(row_blocks(n, k, size, max_block_logits=100))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert all(
            part.stop - part.start == 1 or (part.stop - part.start) * k <= 100 for part in parts
        )
        assert all(part.stop - part.start <= size for part in parts)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("n", "k"), [(33, 20), (4_100, 4_096)])
def test_log_probability_of_the_target(grouped: bool, n: int, k: int) -> None:
    """The reference is a softmax in float64.

    If several candidates give an answer, their probabilities are added. The larger batch has its
    logits in two blocks.
    """
    text = unit(k, 16, 0)
    number = torch.arange(k)
    matches = None
    if grouped:  # candidates 0 and 3 belong to one query, and so do 1 and 4
        number[[3, 4]] = number[[0, 1]]
        target = torch.arange(n) % k
        matches = Matches(number, torch.arange(k), torch.arange(k), query_of_row=number[target])
    batch = batch_of(noisy(text, n), text, matches=matches)
    posterior = (30 * batch.image.double() @ text.double().T - 5).softmax(dim=1)
    expected = [
        float(posterior[i, number == number[t]].sum().log()) for i, t in enumerate(batch.target)
    ]
    assert torch.allclose(
        batch.target_log_probability.double(), torch.tensor(expected).double(), atol=1e-4
    )
    assert torch.allclose(
        batch.log_likelihood(batch.logits).double(),
        torch.tensor(expected).double(),
        atol=1e-4,
    )
    alike = number[None, :] == number[batch.target, None]
    assert torch.equal(batch.right, alike)
    assert torch.equal(batch.alike(batch.target), alike)
    wrong = [
        int(number[p] != number[t])
        for p, t in zip(posterior.argmax(dim=1), batch.target, strict=True)
    ]
    assert batch.failure.tolist() == wrong
    assert 0 < sum(wrong) < n


@pytest.mark.parametrize("temperature", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("k", [2, 65, 1_000])
def test_no_odds_vanish_however_far_the_others_are(k: int, temperature: float) -> None:
    """The reference is float64, from ties to gaps that underflow in float32."""
    gap = torch.tensor([0.0, 1e-3, 1.0, 20.0, 90.0, 600.0])
    logits = torch.rand(len(gap), k, generator=torch.Generator().manual_seed(k)).round(decimals=2)
    logits[:, -1] = 1.0
    logits[:, k // 2] = 1.0
    logits[:, 0] = 1.0 + gap
    rivals = RivalWeights.from_logits(logits, temperature=temperature)
    exact = logits.double() / temperature
    # numpy adds in float64. An exponential 2^x in float32 is off by x times a float32 rounding.
    expected = np.logaddexp.reduce(exact[:, 1:].numpy(), axis=1) - exact[:, 0].numpy()
    assert rivals.answer.squeeze(1).tolist() == [0] * len(gap)
    assert rivals.log_odds.numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert rivals.odds.log().numpy()[expected > -700] == pytest.approx(
        expected[expected > -700], rel=1e-6, abs=1e-6
    )


def test_the_answer_may_be_any_candidate() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0], [0.0, 50.0, 0.0]])
    rivals = RivalWeights.from_logits(logits, torch.tensor([[1], [0]]))
    expected = [np.log(np.exp(2) + 1), np.log(np.exp(50) + 1)]
    assert rivals.log_odds.tolist() == pytest.approx(expected)


def test_of_equal_logits_the_first_is_the_answer() -> None:
    logits = torch.randint(4, (50, 65), generator=torch.Generator().manual_seed(0)).float()
    rows = logits.tolist()
    expected = [row.index(max(row)) for row in rows]
    assert RivalWeights.from_logits(logits).answer.squeeze(1).tolist() == expected
