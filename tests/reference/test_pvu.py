"""Test pretrained visual uncertainties and the AdamW loop.

The references are torch's own loss, scheduler and optimiser.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.memory import PairEmbeddings
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.nn.train import AdamWConfig, default_epochs, small_network_epochs, train_adamw
from vilu_bench.methods.networks import PVU, ImageNetwork, ranking_loss

CONFIG = AdamWConfig(
    epochs=3,
    batch_size=64,
    learning_rate=0.01,
    weight_decay=0.1,
    seed=5,
    device=torch.device("cpu"),
)


def network() -> ImageNetwork:
    return ImageNetwork(16, (8,), seed=0)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_ranking_loss_is_the_margin_ranking_loss_of_consecutive_pairs(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    u = torch.randn(n, generator=generator).requires_grad_()
    losses = torch.rand(n, generator=generator, dtype=torch.float64)
    # A pair with equal losses has no order. Its term is the margin, without a gradient.
    losses[2:4] = 0.5
    found = ranking_loss(u, losses)
    found.backward()
    first, second = torch.arange(0, n - 1, 2), torch.arange(1, n, 2)
    if n == 1:
        assert found.item() == 0
        assert torch.equal(u.grad, torch.zeros(1))
        return
    sign = torch.sign(losses[first] - losses[second]).float()
    expected = nn.MarginRankingLoss(margin=0.1)(u[first], u[second], sign)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    if n > 3:
        assert torch.equal(u.grad[2:4], torch.zeros(2))


def test_published_size() -> None:
    """The network must have linear layers 512 -> 512 -> 512 -> 1 with biases."""
    layers = PVU().module({}, EmbeddingSpace(512, 100.0))
    assert sum(p.numel() for p in layers.parameters()) == 2 * (512 * 512 + 512) + 513


def test_network_is_the_textbook_mlp_of_the_scaled_image() -> None:
    batch = next(toy_embeddings(n=20).batches(20))
    torch.manual_seed(0)
    textbook = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    assert torch.allclose(network()(batch), textbook(batch.image * 4).squeeze(1))


def test_uncertainty_is_positive_and_of_the_image_alone() -> None:
    train, other = toy_embeddings(), toy_embeddings(k=7, seed=1)
    predictor = PVU(hidden=(16, 8), epochs=3).fit(train)
    u = predictor.predict_uncertainty(other)
    raw = predictor.network_(next(other.batches(600))).detach().double().numpy()
    assert np.allclose(u, np.log1p(np.exp(raw)) + 1e-6, rtol=1e-6)
    assert u.min() > 0


@pytest.mark.parametrize("loss", ["ranking", "mse"])
def test_it_learns_the_losses(loss: str) -> None:
    train, test = toy_embeddings(n=2000), toy_embeddings(seed=1, ids_from=5000)
    u = (
        PVU(hidden=(16, 8), epochs=20, learning_rate=1e-2, loss=loss)
        .fit(train)
        .predict_uncertainty(test)
    )
    batch = next(test.batches(600))
    losses = nn.functional.cross_entropy(batch.logits, batch.target, reduction="none").numpy()
    # Half the images are blurred, and their embeddings show it. That fact alone gives a rank
    # correlation near 0.6.
    assert stats.spearmanr(u, losses).statistic > 0.5
    if loss == "mse":
        assert np.mean(u) == pytest.approx(losses.mean(), rel=0.2)


def test_loop_is_torchs_adamw_under_a_cosine() -> None:
    data = toy_embeddings(n=200)
    rows, ours, theirs = Rows(data, torch.arange(200)), network(), network()

    def loss(batch: object, output: torch.Tensor) -> torch.Tensor:
        return (output - batch.failure).square().mean()

    history = train_adamw(ours, loss, rows, CONFIG)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)  # four steps an epoch
    generator = torch.Generator().manual_seed(5)
    expected = []
    for _ in range(3):
        values = []
        for batch in rows.steps(64, generator):
            value = loss(batch, theirs(batch))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            cosine.step()
            values.append(value.item())
        expected.append(np.mean(values))
    assert history == pytest.approx(expected, rel=1e-5)
    for mine, torchs in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Both are float32. The fused kernel rounds in another order, over 12 steps with rate 0.01.
        assert torch.allclose(mine, torchs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "length", "batch", "epochs"),
    [
        (64, default_epochs, 32, 300),
        (640, default_epochs, 32, 70),
        (640, small_network_epochs, 32, 20),
        (96, small_network_epochs, 32, 100),
    ],
)
def test_default_lengths(n: int, length: Callable[[int], int], batch: int, epochs: int) -> None:
    config = dataclasses.replace(CONFIG, epochs=None, batch_size=None)
    rows, sizes = Rows(toy_embeddings(n=n), torch.arange(n)), []

    def loss(found: Batch, output: torch.Tensor) -> torch.Tensor:
        sizes.append(len(found.index))
        return output.mean()

    assert len(train_adamw(network(), loss, rows, config, length)) == epochs
    assert sizes == [batch] * (n // batch * epochs)


def test_loop_refuses_what_it_cannot_train_on() -> None:
    pairs: PairEmbeddings = toy_pairs()
    with pytest.raises(DataError, match=r"at least one pool of 32 rows\. Got 31"):
        train_adamw(
            network(), lambda _, output: output.mean(), Rows(pairs, torch.arange(31)), CONFIG
        )
    data = toy_embeddings(n=200)
    with pytest.raises(DataError, match=r"training diverged: .* Lower learning_rate \(now 0\.01\)"):
        train_adamw(
            network(), lambda _, output: output.mean() / 0, Rows(data, torch.arange(200)), CONFIG
        )


def test_foreign_weights_are_refused() -> None:
    predictor = PVU(hidden=(16, 8), epochs=1).fit(toy_embeddings())
    state = predictor.state()
    state["layers.0.weight"] = state["layers.0.weight"][:, :3]
    with pytest.raises(DataError, match="do not fit a pvu with these parameters"):
        predictor.restore(state)
    with pytest.raises(DataError, match="no embedding space"):
        PVU().restore(state)
