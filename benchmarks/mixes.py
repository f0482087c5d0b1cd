"""Two baselines: simple mixes of the zero-shot posterior and a linear probe.

- ``mix``: q = (1 - w) p_zero_shot + w p_probe. w is the best of 21 weights from 0 to 1.
- ``pool``: log q = a log p_zero_shot + w log p_probe - const, with a, w >= 0.

The weights have the largest likelihood on labelled rows outside the probe's fit. For this purpose
rows are held out in five folds, stratified by class. If a class has a single labelled row, this row
is never held out. If no row can be held out, w = 1/2 in the mix, and a = w = 1/2 in the pool. The
pool is then the geometric mean of both posteriors.

The answer a is the likeliest candidate under q, and the uncertainty is 1 - q_a.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import vilu
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.predictor import FailurePredictor
from vilu_bench.methods.few_shot import MIN_PROBABILITY, N_FOLDS, class_folds, fit_mix_weights

GRID = np.linspace(0, 1, 21)
BATCH = 4_096


class Experts(NamedTuple):
    """The candidates' log probabilities (N, K) by the logits and by the linear probe."""

    zero_shot: Floats
    probe: Floats

    def mixed(self, weight: float) -> Floats:
        """Compute the mix's probabilities (N, K)."""
        return (1 - weight) * np.exp(self.zero_shot) + weight * np.exp(self.probe)

    def pooled(self, weights: Floats) -> Floats:
        """Compute the pool's log probabilities (N, K)."""
        log_q = weights[0] * self.zero_shot + weights[1] * self.floored_probe
        normed: Floats = log_q - np.logaddexp.reduce(log_q, axis=1, keepdims=True)
        return normed

    @property
    def both(self) -> Floats:
        """(N, 2, K) log probabilities for the pool."""
        return np.stack([self.zero_shot, self.floored_probe], axis=1)

    @property
    def floored_probe(self) -> Floats:
        """The probe's log probabilities, clipped to finite numbers."""
        return np.maximum(self.probe, np.log(MIN_PROBABILITY))


class Weights(NamedTuple):
    """The fitted weights of both mixes."""

    mix: float
    pool: Floats  # (2,) weights for the logits and the probe
    cross_fitted: bool


def experts(probe: FailurePredictor, data: EmbeddingSource) -> Experts:
    """Compute log probabilities by the logits and by the probe for every row."""
    by_logits = []
    by_probe = []
    for batch in data.batches(BATCH):
        zero_shot = batch.logits.double().log_softmax(dim=1)
        posterior = probe.log_posterior(batch)
        by_logits.append(zero_shot.numpy())
        by_probe.append(posterior.numpy())
    return Experts(np.concatenate(by_logits), np.concatenate(by_probe))


def fit_weights(train: vilu.Embeddings, target: Ints, seed: int) -> Weights:
    """Find the weights with the largest likelihood on held-out rows."""
    is_only_label = np.bincount(target)[target] == 1
    if is_only_label.all():
        equal_pool = np.array([0.5, 0.5])
        return Weights(mix=0.5, pool=equal_pool, cross_fitted=False)
    parts = []
    targets = []
    fold = class_folds(target, seed)
    for number in range(N_FOLDS):
        is_held_out = (fold == number) & ~is_only_label
        if not is_held_out.any():
            continue
        held_out = np.flatnonzero(is_held_out)
        data_to_fit = train.take(np.flatnonzero(~is_held_out))
        probe = linear_probe()
        probe.fit(data_to_fit)
        part = experts(probe, train.take(held_out))
        parts.append(part)
        targets.append(target[held_out])
    held_out_experts = Experts(
        np.concatenate([part.zero_shot for part in parts]),
        np.concatenate([part.probe for part in parts]),
    )
    held_out_target = np.concatenate(targets)
    mix = _mix_weight(held_out_experts, held_out_target)
    pool = fit_mix_weights(held_out_experts.both, held_out_target)
    return Weights(mix=mix, pool=pool, cross_fitted=True)


def linear_probe() -> FailurePredictor:
    """Make the linear probe as the judge of the probe's own answers."""
    return vilu.PREDICTORS["linear_probe"](answer="adapted")


def judged_by_mixes(both: Experts, weights: Weights, target: Ints) -> dict[str, JudgedAnswers]:
    """Judge the answers of both mixes."""
    return {
        "mix": _judged(both.mixed(weights.mix), target),
        "pool": _judged(np.exp(both.pooled(weights.pool)), target),
    }


def _judged(q: Floats, target: Ints) -> JudgedAnswers:
    answer = q.argmax(axis=1)
    rows = np.arange(len(q))
    # The sum of all other candidates' probabilities, since 1 - q_a would be 0 for confident rows.
    rest = q.copy()
    rest[rows, answer] = 0.0
    uncertainty = rest.sum(axis=1)
    failure = (answer != target).astype(np.int64)
    return JudgedAnswers(uncertainty, failure)


def _mix_weight(held_out: Experts, target: Ints) -> float:
    rows = np.arange(len(target))
    likelihoods = []
    for weight in GRID:
        with np.errstate(divide="ignore"):  # the probe alone may give a class the probability 0
            probability = held_out.mixed(weight)[rows, target]
            log_likelihood = np.log(probability).sum()
            likelihoods.append(log_likelihood)
    return float(GRID[np.argmax(likelihoods)])
