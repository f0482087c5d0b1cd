"""Which part of the input moved the score: an attribution whose parts add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.explaining.games import IMAGE, LOG_ODDS, ZERO_SHOT, Game, HeadGame, PoolGame, Scored, SingleGame
from vilu.explaining.rows import draw_rows, scored_rows
from vilu.explaining.shapley import shapley
from vilu.predictors.base import FailurePredictor
from vilu.predictors.heads.deep_ensemble import DeepEnsemble
from vilu.predictors.heads.head import HeadPredictor
from vilu.predictors.heads.mc_dropout import MCDropout
from vilu.predictors.heads.vilu_plus import ViLUPlus
from vilu.predictors.learned import LearnedPredictor
from vilu.types import EmbeddingSource

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
