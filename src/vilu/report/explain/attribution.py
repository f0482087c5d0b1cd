"""Which part of the input moved the score: Shapley values of small games."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.similarity import TILE_CELLS, float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError
from vilu.predictors.base import FailurePredictor
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.vilu import DeepEnsemble, MCDropout
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.predictors.labelled import LearnedPredictor, failure_log_odds
from vilu.predictors.nn.experts import FEATURES, Experts
from vilu.predictors.nn.head import FailureHead, project_rows
from vilu.predictors.nn.train import SCORING_BATCH
from vilu.report.explain.rows import draw_rows, scored_rows


def shapley(values: Tensor) -> Tensor:
    """(G, B) Shapley values phi_g = sum_S |S|! (G - |S| - 1)! / G! [v(S + g) - v(S)], over the coalitions S without g.

    They add up to v(all) - v(nobody); a player that changes no value gets zero, and two that are interchangeable get
    the same (Shapley 1953).

    Args:
        values: (2^G, B) float64: v(S) at the row whose bits are the members of S, player g being bit g.

    Raises:
        ValueError: If the number of rows is no power of two.

    Example:
        >>> shapley(torch.tensor([[0.0], [1.0], [3.0], [6.0]]).double()).squeeze(1).tolist()
        [2.0, 4.0]
    """
    n = len(values).bit_length() - 1
    if len(values) != 1 << n:
        raise ValueError(f"{len(values)} values are not those of all coalitions")
    parts = torch.zeros(n, *values.shape[1:], dtype=values.dtype)
    for player in range(n):
        for coalition in range(1 << n):
            if not coalition >> player & 1:
                size = coalition.bit_count()
                weight = 1 / (n * math.comb(n - 1, size))
                parts[player] += weight * (values[coalition | 1 << player] - values[coalition])
    return parts


class Pooled(NamedTuple):
    """Three parts whose sum is sum_m w_m l_m, the pooled logits, up to a constant of every row.

    Attributes:
        zero_shot: (B, K) float64 tempered zero-shot logits, times sum_m w_m.
        texts: (1, K) float64 what was learned about the candidates whatever the image: the residual of the experts at
            the mean training image.
        image: (B, K) float64 what the image adds to that residual.
    """

    zero_shot: Tensor
    texts: Tensor
    image: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, K) their sum."""
        return self.zero_shot + self.texts + self.image


def pooled(predictor: ViLUPlus, batch: Batch) -> Pooled:
    """The pooled logits of a batch in their parts.

    l_m = a l0 + r_m(x) for every expert m: l0 the zero-shot logits, a their temperature, r_m the expert's residual, x
    the standardised image, which is zero at the training mean. So sum_m w_m l_m = (sum_m w_m) a l0 + R(0) +
    (R(x) - R(0)) with R = sum_m w_m r_m.

    Raises:
        DataError: If the predictor holds no experts.
    """
    if predictor.experts_ is None or predictor.pool_ is None:
        raise DataError(f"this {predictor.name} holds no experts; its file is damaged.")
    experts = predictor.experts_.to(batch.image.device)
    offset, logits = _experts(experts, batch)
    mean_offset, mean_logits = _experts(experts, _mean_image(experts, batch))
    weights = predictor.pool_.to(logits.device) if logits.shape[1] > 1 else torch.ones_like(logits[0, :1, 0])
    texts = torch.einsum("m,bmk->bk", weights, mean_logits - mean_offset[:, None])
    residual = torch.einsum("m,bmk->bk", weights, logits - offset[:, None])
    return Pooled(weights.sum() * offset, texts, residual - texts)


def _experts(experts: Experts, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, K) offset that all experts share, and their (B, M, K) logits, float64."""
    offset = experts.attention.offset(batch, experts.attention.match(batch.text))
    return float64(offset), float64(experts(batch))


def _mean_image(experts: Experts, batch: Batch) -> Batch:
    """One row, the mean training image, against the candidates of a batch."""
    inputs = experts.attention.inputs
    columns = dict(batch.columns) | ({FEATURES: inputs.features.mean[None]} if inputs.on_features else {})
    one = batch.rows(slice(0, 1))
    return dataclasses.replace(one, image=inputs.image.mean[None], columns=columns)


ZERO_SHOT, IMAGE, TEXTS = "zero-shot score", "image", "texts"
LOG_ODDS = "log-odds of failure"

Scored = tuple[Batch, NDArray[np.float64]]
Parts = dict[str, Tensor]
"""Group -> (B, H) what its inputs add to the first hidden layer."""


class Game(ABC):
    """Values of coalitions.

    Attributes:
        players: Names of the groups of inputs.
        unit: What the score is.
        meaning: What is compared with what, in words.
        step: Rows of the source scored with each background row (``scored_rows``); 1 where no score is looked at.
    """

    players: tuple[str, ...]
    unit: str
    meaning: str
    step = 1

    @abstractmethod
    def see(self, background: list[Scored]) -> None:
        """Remember the rows that stand in for inputs that a coalition lacks."""

    @abstractmethod
    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:
        """(2^G, B) float64 on the CPU: v(S) at the row whose bits are the members of S."""


class SingleGame(Game):
    """A score that looks at one group of inputs alone: all of its distance from the background mean is that group's."""

    unit = "uncertainty"
    step = SCORING_BATCH

    def __init__(self, player: str) -> None:
        self.players = (player,)
        self.meaning = f"the score is a function of one input alone, so all of it is the {player}"
        self._mean = 0.0

    def see(self, background: list[Scored]) -> None:
        """Take their mean score."""
        self._mean = float(np.concatenate([scores for _, scores in background]).mean())

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002 - the score says it all
        """The mean, and the score."""
        found = torch.from_numpy(scores).double()
        return torch.stack([torch.full_like(found, self._mean), found])


class HeadGame(Game):
    """Inputs of one or several ``FailureHead`` s, mixed between a row and the background rows.

    v(S) = 1/M sum_b link(g(z with the groups in S from this row, the others from background row b)), averaged over the
    heads: the interventional game (Janzing et al., AISTATS 2020). The groups are parts of z: "image" z_v, "texts" the
    attended text and the predicted caption, "zero-shot score" the MCM input. The first layer is a sum over parts, so
    swapping a part is swapping its summand.

    Args:
        heads: Of one embedding width and the same parts.
        link: What is averaged over heads: the identity for one head's logit, the sigmoid for an ensemble.
        unit: What that is.
    """

    def __init__(self, heads: list[FailureHead], link: Callable[[Tensor], Tensor], unit: str) -> None:
        self.heads, self.link, self.unit = heads, link, unit
        inputs = {PLAYER_OF[part] for part in heads[0].first}
        self.players = tuple(player for player in (ZERO_SHOT, IMAGE, TEXTS) if player in inputs)
        self.meaning = "inputs that a coalition lacks are taken from background rows, and the score is averaged"
        self._background: list[Parts] = []

    def see(self, background: list[Scored]) -> None:
        """Keep what their inputs add to the first layer of every head."""
        with torch.no_grad():
            seen = [[first_layer_parts(head, batch) for batch, _ in background] for head in self.heads]
        self._background = [
            {player: torch.cat([parts[player] for parts in of_head]) for player in self.players} for of_head in seen
        ]

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002 - of the logits, not of u
        """Mean over heads and background rows."""
        total = torch.zeros(1 << len(self.players), len(batch.image), dtype=torch.float64)
        with torch.no_grad():
            for head, background in zip(self.heads, self._background, strict=True):
                own = first_layer_parts(head, batch)
                for coalition in range(len(total)):
                    total[coalition] += self._value(head, own, background, coalition)
        return total / len(self.heads)

    def _value(self, head: FailureHead, own: Parts, background: Parts, coalition: int) -> Tensor:
        """(B,) float64 v(S) of one head."""
        inside = [player for bit, player in enumerate(self.players) if coalition >> bit & 1]
        zero = torch.zeros_like(head.first_bias)[None]
        mine = sum((own[player] for player in inside), head.first_bias + zero)
        others = sum((background[player] for player in self.players if player not in inside), zero)
        step = max(TILE_CELLS // (len(others) * mine.shape[1]), 1)
        means = [
            self.link(head.rest(part[:, None] + others).squeeze(-1).cpu().double()).mean(dim=1)
            for part in mine.split(step)
        ]
        return torch.cat(means).expand(len(own[IMAGE]))


PLAYER_OF = {"image": IMAGE, "attended": TEXTS, "caption": TEXTS, "mcm": ZERO_SHOT}
"""The group of every part of a head's input."""


def first_layer_parts(head: FailureHead, batch: Batch) -> Parts:
    """What each group adds to the first hidden layer of a head; with the bias they make ``head.first_layer``."""
    head = head.to(batch.image.device)
    parts = {IMAGE: batch.image @ head.first["image"].T}
    texts = []
    if head.attention is not None:
        texts.append(head.attention(batch.image, batch.text, batch.logit_scale, head.first["attended"]))
    if "caption" in head.first:
        texts.append(project_rows(batch.text, batch.prediction, head.first["caption"]))
    if texts:
        parts[TEXTS] = torch.stack(texts).sum(dim=0)
    if "mcm" in head.first:
        parts[ZERO_SHOT] = batch.zero_shot.max_probability[:, None] * head.first["mcm"].T
    return parts


class PoolGame(Game):
    """Parts of the pooled logits of ViLU+, each in or out, against what they do for the background rows.

    The pooled logits are a sum (``Pooled``): tempered zero-shot logits ("zero-shot score"), what was learned about the
    candidates whatever the image ("texts"), and what the image adds ("image": its terms of the attention, the network
    and the memory). With f(S) the log-odds of failure of the zero-shot answer under the softmax of the summands in S
    alone, and f(nobody) = 0, the game is v(S) = f(S) + mean over background rows of [f_b(all) - f_b(S)]: so v(all) is
    the score, v(nobody) the mean score of the background, and a part that does for this row what it does for others
    on average gets nothing. Inputs are not swapped between images here: residuals of one image on the zero-shot logits
    of another have no meaning, since each of them speaks of classes.
    """

    players = (ZERO_SHOT, IMAGE, TEXTS)
    unit = LOG_ODDS
    meaning = "parts of the pooled logits are added or left out, less what that does to background rows on average"

    def __init__(self, predictor: ViLUPlus) -> None:
        self.predictor = predictor
        self._mean = torch.zeros(1 << len(self.players), dtype=torch.float64)

    def see(self, background: list[Scored]) -> None:
        """Take the mean f of every coalition."""
        self._mean = torch.cat([self._log_odds(batch) for batch, _ in background], dim=1).mean(dim=1)

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002 - of the log-odds, not of u
        """F of every coalition, about the background's."""
        return self._log_odds(batch) + (self._mean[-1] - self._mean)[:, None]

    def _log_odds(self, batch: Batch) -> Tensor:
        """(2^G, B) f(S)."""
        with torch.no_grad():
            parts = pooled(self.predictor, batch)
            found = [coalition_log_odds(parts, coalition, batch).cpu() for coalition in range(len(self._mean))]
        return torch.stack(found)


def coalition_log_odds(parts: Pooled, coalition: int, batch: Batch) -> Tensor:
    """(B,) float64 log-odds of failure of the zero-shot answer when only some parts of the logits are there."""
    summands = dict(zip(PoolGame.players, (parts.zero_shot, parts.image, parts.texts), strict=True))
    inside = [summand for bit, summand in enumerate(summands.values()) if coalition >> bit & 1]
    if not inside:
        return torch.zeros(len(batch.image), dtype=torch.float64)
    return failure_log_odds(sum(inside, torch.zeros_like(parts.zero_shot)), batch)


OF_LOGITS = {
    "mcm", "entropy", "doctor", "max_logit", "margin", "prob_margin", "energy", "gen", "kl_uniform", "mcm_ts", "rel_u",
}  # fmt: skip
"""Methods whose score is a function of the zero-shot logits alone."""

OF_IMAGES = {"pvu", "knn_distance"}
"""Methods whose score is a function of the image embedding alone; ``lvu`` is a head with one part."""


class NoAttribution(Exception):  # noqa: N818 - an answer, not an error
    """A method has none; the message says why. The rest of an explanation stands without it."""


@dataclass(frozen=True)
class Attribution:
    """Why a score is above or below that of other images; ``score - baseline`` is the sum of the parts.

    Attributes:
        score: Of the row, in the unit of the method's game.
        baseline: Mean score of the background rows.
        parts: Group of inputs -> its Shapley value, in the same unit.
    """

    score: float
    baseline: float
    parts: dict[str, float]


def game_of(predictor: FailurePredictor) -> Game:
    """The game of a method.

    Raises:
        NoAttribution: If it has none.
    """
    if isinstance(predictor, LearnedPredictor) and predictor.constant_ is not None:
        raise NoAttribution(f"this {predictor.name} is a constant, fitted where there was nothing to learn")
    if isinstance(predictor, MCDropout):
        raise NoAttribution("the score of mc_dropout is a mean over thinned heads, for which no game is defined")
    if isinstance(predictor, DeepEnsemble):
        heads = [member.head_ for member in predictor.members_.values() if member.head_ is not None]
        return HeadGame(heads, torch.sigmoid, "uncertainty, mean over the members' probabilities of failure")
    if isinstance(predictor, HeadPredictor) and predictor.head_ is not None:
        return HeadGame([predictor.head_], _same, LOG_ODDS)
    if isinstance(predictor, ViLUPlus):
        return PoolGame(predictor)
    for names, player in ((OF_LOGITS, ZERO_SHOT), (OF_IMAGES, IMAGE)):
        if predictor.name in names:
            return SingleGame(player)
    raise NoAttribution(f"no attribution is defined for {predictor.name}")


def _same(logit: Tensor) -> Tensor:
    return logit


class Attributor:
    """Attributions of one predictor against one background.

    Args:
        predictor: Ready to score.
        background: Where the background rows are drawn from.
        n: How many rows.
        seed: Of the draw.
        leave_out: Positions in ``background`` that are not drawn.

    Raises:
        NoAttribution: If the method has none.
        DataError: If there is no background row.
    """

    def __init__(
        self, predictor: FailurePredictor, background: EmbeddingSource, n: int, seed: int, leave_out: Tensor
    ) -> None:
        self.game = game_of(predictor)
        rows = draw_rows(background, n, seed, leave_out)
        self.n_background = len(rows)
        self.game.see(list(scored_rows(predictor, background, rows, self.game.step)))

    def of(self, scored: Scored) -> list[Attribution]:
        """One attribution per row of a batch."""
        values = self.game.values(*scored)
        parts = shapley(values)
        return [
            Attribution(score, baseline, dict(zip(self.game.players, row, strict=True)))
            for score, baseline, row in zip(values[-1].tolist(), values[0].tolist(), parts.T.tolist(), strict=True)
        ]
