"""Test attention, losses and the training loop on their own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import ZeroShot, zero_shot
from vilu.embeddings.source import Batch
from vilu.errors import DataError, UsageError
from vilu.predictors.nn.head import ATTENTION_CLASSES, FailureHead
from vilu.predictors.nn.losses import (
    FailureWeight,
    adaptive_weight,
    bce_loss,
    weighted_bce,
    weighted_mse,
)
from vilu.predictors.nn.processes import World
from vilu.predictors.nn.train import (
    HeadTrainer,
    Plan,
    TrainConfig,
    auroc_standard_error,
    default_batch_size,
    default_epochs,
    learning_rate_factor,
    small_network_epochs,
    with_zero_shot_answers,
)

CONFIG = TrainConfig(
    epochs=3,
    batch_size=50,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    warmup_epochs=1.0,
    freeze_epochs=1,
    patience=None,
    precision="fp32",
    seed=0,
    device=torch.device("cpu"),
)


def first_batch(size: int = 64, **kwargs: object) -> Batch:
    return next(toy_embeddings(**kwargs).batches(size))


def make_head(seed: int = 0, **kwargs: object) -> FailureHead:
    torch.manual_seed(seed)
    return FailureHead(16, (12, 8), **kwargs)


@pytest.mark.parametrize("form", list(ATTENTION_CLASSES))
@pytest.mark.parametrize("k", [3, 200])
def test_attention_is_scaled_dot_product_attention(form: str, k: int) -> None:
    """Attention must equal torch's own kernel, with fewer and with more candidates than rows."""
    torch.manual_seed(0)
    module = ATTENTION_CLASSES[form](16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = first_batch(k=k)
    if form == "official":
        query, key, value, scale = module.image, module.text, module.text, 20.0
    else:
        query, key, value, scale = (
            module.query,
            module.key,
            module.value_projection,
            1 / math.sqrt(16),
        )
    text = batch.text
    expected = functional.scaled_dot_product_attention(
        batch.image @ query.T, text @ key.T, text @ value.T, scale=scale
    )
    # These are float32 sums over 16 products near one, in another order.
    ours = module(batch.image, text, batch.logit_scale, torch.eye(16))
    assert torch.allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("k", [3, 200])
@pytest.mark.parametrize("attention", ["official", "paper", None])
@pytest.mark.parametrize("caption", [True, False])
@pytest.mark.parametrize("mcm", [True, False])
def test_head_is_the_mlp_of_the_concatenation(
    k: int, attention: str | None, caption: bool, mcm: bool
) -> None:
    """The reordered products must give the textbook form: concatenate, then Linear and ReLU."""
    head, batch = (
        make_head(attention=attention, predicted_caption=caption, mcm=mcm),
        first_batch(k=k),
    )
    parts = [batch.image]
    if head.attention is not None:
        whole = torch.eye(batch.text.shape[1])
        parts.append(head.attention(batch.image, batch.text, 20.0, whole))
    if caption:
        parts.append(batch.text[batch.prediction])
    if mcm:
        parts.append(batch.logits.softmax(1).amax(1, keepdim=True))
    weight = torch.cat(
        [
            head.first[part]
            for part in ("image", "attended", "caption", "mcm")
            if part in head.first
        ],
        dim=1,
    )
    expected = head.rest(
        functional.linear(torch.cat(parts, dim=1), weight, head.first_bias)
    ).squeeze(1)
    assert torch.allclose(head(batch), expected, atol=1e-5)


def test_official_attention_starts_as_the_zero_shot_posterior() -> None:
    batch = first_batch()
    official = ATTENTION_CLASSES["official"](16)
    attended = official(batch.image, batch.text, batch.logit_scale, torch.eye(16))
    assert torch.allclose(attended, batch.logits.softmax(1) @ batch.text, atol=1e-6)


@pytest.mark.parametrize("k", [3, 200])
def test_a_batch_without_rows(k: int) -> None:
    """If a process has no rows, its share must give no logits, and zero gradients."""
    head = make_head()
    logit = head(first_batch(k=k).rows(slice(0, 0)))
    assert logit.shape == (0,)
    logit.sum().backward()
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in head.parameters())


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_is_configurable(depth: int) -> None:
    head = FailureHead(16, (8,) * depth)
    # The first layer is apart.
    assert sum(isinstance(m, torch.nn.Linear) for m in head.rest) == depth
    assert head(first_batch()).shape == (64,)


def test_published_size() -> None:
    """At D = 512 the MLP must have 951,297 parameters, and the projections 2 D^2.

    The numbers were counted in the released code.
    """
    head = FailureHead(512)
    attention = sum(p.numel() for p in head.attention.parameters())
    assert attention == 2 * 512**2
    assert sum(p.numel() for p in head.parameters()) - attention == 951_297


@given(st.floats(0, 1))
def test_adaptive_weight_is_finite_and_matches_the_formula_inside(rate: float) -> None:
    weight = float(adaptive_weight(torch.tensor(rate)))
    assert weight + 1e-7 >= 0.05
    assert math.isfinite(weight)
    if 1e-5 < rate < 0.95:
        # log(1 + N_s / N_f) has N_s = 1 - e and N_f = e. The logarithm is float32.
        assert weight == pytest.approx(math.log(1 + (1 - rate) / rate), rel=1e-5)


@pytest.mark.parametrize("mode", FailureWeight.MODES)
@pytest.mark.parametrize("failures", [0, 1, 7, 8])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_losses_and_gradients_are_finite_at_every_error_rate(
    mode: str, failures: int, rate: float
) -> None:
    failure = (torch.arange(8) < failures).long()
    logit = torch.linspace(-30, 30, 8).requires_grad_()
    weight = FailureWeight(mode, rate)(failure)
    loss = weighted_bce(logit, failure, weight) + weighted_mse(
        logit, torch.rand(8), failure, weight
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logit.grad).all()
    assert float(weight) > 0
    assert logit.grad.abs().sum() > 0  # also where the batch holds failures only


def test_weight_modes_by_hand() -> None:
    failure = torch.tensor([1, 0, 0, 0])
    assert float(FailureWeight("batch", 0.5)(failure)) == pytest.approx(math.log(4))
    assert float(FailureWeight("dataset", 0.5)(failure)) == pytest.approx(math.log(2))
    assert float(FailureWeight("static", 0.5, 2.5)(failure)) == 2.5
    assert float(FailureWeight("balanced", 0.2)(failure)) == pytest.approx(4)
    ema = FailureWeight("ema", 0.5)
    assert float(ema(failure)) == pytest.approx(-math.log(0.99 * 0.5 + 0.01 * 0.25))
    assert float(ema(failure)) == pytest.approx(-math.log(0.99 * (0.99 * 0.5 + 0.0025) + 0.0025))
    with pytest.raises(UsageError, match="weighting must be one of"):
        FailureWeight("heavy", 0.5)
    with pytest.raises(UsageError, match="static_weight must be positive"):
        FailureWeight("static", 0.5, 0.0)


def test_weighted_bce_by_hand() -> None:
    logit, failure = torch.tensor([0.3, -1.2]), torch.tensor([1, 0])
    p = torch.sigmoid(logit)
    expected = -(2.0 * torch.log(p[0]) + torch.log(1 - p[1])) / 2
    assert float(weighted_bce(logit, failure, torch.tensor(2.0))) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_schedule_warms_up_and_ends_at_zero() -> None:
    values = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[10] == max(values) == 1
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(values[:11]) > 0)
    assert np.all(np.diff(values[10:]) < 0)


def trained(config: TrainConfig, head: FailureHead, data=None) -> FailureHead:
    data = data or toy_embeddings()
    HeadTrainer(head, bce_loss(FailureWeight("batch", 0.3)), config).run(
        Rows(data, torch.arange(len(data))), None
    )
    return head


def test_a_frozen_attention_does_not_move_at_all() -> None:
    """A frozen attention has no gradient, no decay and no momentum.

    Its bits must be the same after three epochs.
    """
    head = trained(dataclasses.replace(CONFIG, freeze_epochs=3), make_head())
    assert torch.equal(head.attention.image, torch.eye(16))
    assert torch.equal(head.attention.text, torch.eye(16))
    assert head.attention.image.grad is None


@pytest.mark.parametrize("epochs", [0, 1])
def test_the_attention_learns_after_the_freeze(epochs: int) -> None:
    head = trained(dataclasses.replace(CONFIG, freeze_epochs=epochs), make_head())
    assert not torch.equal(head.attention.image, torch.eye(16))


def test_a_short_run_trains_the_attention_by_default() -> None:
    head = trained(dataclasses.replace(CONFIG, freeze_epochs=None, epochs=4), make_head())
    assert not torch.equal(head.attention.image, torch.eye(16))


@pytest.mark.parametrize(
    ("steps", "epochs", "frozen"),
    [(10_000, 20, 1), (400, 20, 3), (12, 200, 84), (12, 100, 50), (3, 300, 150), (3, 1, 1)],
)
def test_the_default_freeze_is_an_epoch_or_a_thousand_steps(
    steps: int, epochs: int, frozen: int
) -> None:
    assert Plan.of(steps, epochs, 1.0, None).frozen_epochs == frozen
    assert Plan.of(steps, epochs, 1.0, 7).frozen_epochs == 7


@pytest.mark.parametrize(
    ("n_rows", "batch", "epochs"),
    # The limits are, in order: at most 300 epochs, 1,400 steps (twice), 35 epochs, 6,000 steps, and
    # at least ten epochs.
    [
        (50, 32, 300),
        (640, 32, 70),
        (1_287, 32, 35),
        (10_000, 128, 35),
        (50_000, 128, 16),
        (1_000_000, 128, 10),
    ],
)
def test_default_lengths(n_rows: int, batch: int, epochs: int) -> None:
    assert default_batch_size(n_rows) == batch
    assert default_epochs(math.ceil(n_rows / batch)) == epochs


@pytest.mark.parametrize(
    ("steps", "epochs"), [(1, 300), (10, 30), (15, 20), (98, 20), (196, 11), (781, 10)]
)
def test_many_rows_need_fewer_epochs(steps: int, epochs: int) -> None:
    """Training takes at least 300 steps and about 2,000 at most, but at least 20 epochs with few
    rows and 10 with many.
    """
    assert small_network_epochs(steps) == epochs


@pytest.mark.slow
def test_a_small_set_is_trained_in_small_steps() -> None:
    """600 rows must be trained in steps with 32 rows, for about 1,400 steps."""
    rows, config = (
        Rows(toy_embeddings(), torch.arange(600)),
        dataclasses.replace(CONFIG, epochs=None, batch_size=None),
    )
    steps = []
    weight = FailureWeight("batch", 0.3)

    def loss(batch: Batch, logit: torch.Tensor) -> torch.Tensor:
        steps.append(len(batch.index))
        return bce_loss(weight)(batch, logit)

    history = HeadTrainer(make_head(), loss, config).run(rows, None)
    assert steps[:19] == [32] * 18 + [24]
    assert (len(history.loss), len(steps)) == (74, 74 * 19)


def test_training_is_deterministic_and_seeded() -> None:
    first, again = trained(CONFIG, make_head()), trained(CONFIG, make_head())
    other = trained(dataclasses.replace(CONFIG, seed=1), make_head())
    assert torch.equal(first.first.image, again.first.image)
    assert not torch.equal(first.first.image, other.first.image)


def test_selection_keeps_the_best_epoch_and_patience_stops() -> None:
    data, validation = toy_embeddings(), toy_embeddings(seed=5, n=200)
    config = dataclasses.replace(CONFIG, epochs=40, patience=3)
    trainer = HeadTrainer(make_head(), bce_loss(FailureWeight("batch", 0.3)), config)
    history = trainer.run(Rows(data, torch.arange(600)), Rows(validation, torch.arange(200)))
    aurocs, kept = history.validation_auroc, history.kept_epoch
    n_failures = int(next(validation.batches(200)).failure.sum())
    allowed = max(aurocs) - auroc_standard_error(max(aurocs), n_failures, 200 - n_failures)
    assert aurocs[kept] >= allowed
    assert all(value < allowed for value in aurocs[kept + 1 :])
    assert len(aurocs) == 40 or len(aurocs) == kept + 4
    # The weights are from the kept epoch.
    logit = trainer.head(next(validation.batches(200))).detach().double().numpy()
    assert vilu.metrics.auroc(logit, next(validation.batches(200)).failure.numpy()) == aurocs[kept]


@pytest.mark.parametrize("epochs", [1, 3])
def test_answers_of_fixed_classes_are_computed_once_a_fit(
    monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    computed = []

    def counted(image: torch.Tensor, *rest: object) -> ZeroShot:
        computed.append(len(image))
        return zero_shot(image, *rest)

    monkeypatch.setattr("vilu.embeddings.source.zero_shot", counted)
    data, validation = toy_embeddings(), toy_embeddings(seed=5, n=200)
    chosen = torch.arange(400).flip(0)
    trainer = HeadTrainer(
        make_head(mcm=True),
        bce_loss(FailureWeight("batch", 0.3)),
        dataclasses.replace(CONFIG, epochs=epochs),
    )
    trainer.run(Rows(data, chosen), Rows(validation, torch.arange(200)))
    assert computed == [400, 200]


def test_answers_computed_once_are_those_of_the_rows() -> None:
    data, device = toy_embeddings(), torch.device("cpu")
    rows = with_zero_shot_answers(Rows(data, torch.arange(500, 20, -3)), device, World())
    for batch in rows.steps(32, torch.Generator().manual_seed(0)):
        known, again = (
            batch.rows(slice(3, 9)).to(device).zero_shot,
            data.steps(6, rows=batch.index[3:9]),
        )
        for ours, fresh in zip(known, next(again).zero_shot, strict=True):
            # These are float32 sums over 16 products up to 20, in another block.
            assert torch.allclose(ours, fresh, atol=1e-5)
    # Another pool has another answer, so none is kept.
    assert (
        with_zero_shot_answers(Rows(toy_pairs(), torch.arange(64)), device, World()).answers is None
    )


def test_standard_error_of_an_auroc() -> None:
    """The formula must agree with a simulation.

    Binormal scores have the AUROC 0.8, with 40 failures and 60 successes.
    """
    rng, shift = np.random.default_rng(0), math.sqrt(2) * 0.8416212
    failure = np.repeat([1, 0], [40, 60])
    draws = [
        vilu.metrics.auroc(rng.normal(size=100) + shift * failure, failure) for _ in range(2000)
    ]
    # 2,000 draws give a standard deviation to 1.6 per cent. The formula's exponential model is good
    # to about ten per cent.
    assert auroc_standard_error(0.8, 40, 60) == pytest.approx(np.std(draws), rel=0.12)
    assert auroc_standard_error(1.0, 5, 5) == 0


def test_bf16_trains_to_about_the_same_scores() -> None:
    full, half = (
        trained(CONFIG, make_head()),
        trained(dataclasses.replace(CONFIG, precision="bf16"), make_head()),
    )
    batch = first_batch(200, seed=3)
    a, b = full(batch).detach(), half(batch).detach()
    assert a.dtype == b.dtype == torch.float32
    assert not torch.equal(a, b)
    # bfloat16 keeps 8 bits: 0.4 % a product. Over 36 steps the largest logits drift apart by a few
    # times that.
    assert (a - b).abs().max() < 0.1 * a.abs().max()
    assert np.corrcoef(a, b)[0, 1] > 0.999


@pytest.mark.parametrize(
    ("has", "precision", "said"), [("AVX2", "bf16", 1), ("AVX512", "bf16", 0), ("AVX2", "fp32", 0)]
)
def test_bf16_that_the_processor_has_not_is_said(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has: str,
    precision: str,
    said: int,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has)
    HeadTrainer(
        make_head(),
        bce_loss(FailureWeight("batch", 0.5)),
        dataclasses.replace(CONFIG, precision=precision),
    )
    assert [record.message.count("bfloat16") for record in caplog.records] == [1] * said


def test_divergence_is_an_error() -> None:
    with pytest.raises(DataError, match="training diverged"):
        trained(dataclasses.replace(CONFIG, learning_rate=1e6), make_head())


def test_too_few_rows_for_a_pool() -> None:
    pairs = toy_pairs()
    trainer = HeadTrainer(make_head(), bce_loss(FailureWeight("batch", 0.3)), CONFIG)
    with pytest.raises(DataError, match=r"at least one pool of 32 rows\. Got 31"):
        trainer.run(Rows(pairs, torch.arange(31)), None)


@pytest.mark.slow
def test_one_seed_gives_the_same_bytes_with_several_threads() -> None:
    """The bytes must be the same, although torch divides the work between threads.

    Only large batches are divided.
    """
    rng = np.random.default_rng(0)
    target = rng.integers(10, size=1500)
    image = np.eye(10, 512)[target] + 0.15 * rng.normal(size=(1500, 512))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    is_wrong = rng.random(1500) < 0.3
    truth = np.where(is_wrong, (target + 1) % 10, target)
    data = vilu.Embeddings(image, np.eye(10, 512), target=truth, logit_scale=20.0)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        states = [vilu.ViLU(seed=0, epochs=2, batch_size=256).fit(data).state() for _ in range(4)]
    finally:
        torch.set_num_threads(n_threads)
    for name, weights in states[0].items():
        for state in states[1:]:
            assert torch.equal(state[name], weights), name
