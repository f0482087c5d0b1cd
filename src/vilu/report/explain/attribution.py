"""Which part of the input moved the score: Shapley values of small games."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.embeddings.source import EmbeddingSource
from vilu.predictors.contract.games import Game, NoAttribution, Scored
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.report.explain.rows import draw_rows, scored_rows


def shapley(values: Tensor) -> Tensor:
    """(G, B) Shapley values phi_g = sum_S |S|! (G - |S| - 1)! / G! [v(S + g) - v(S)], over the coalitions S without g.

    They add up to v(all) - v(nobody); a player that changes no value gets zero, and two that are
    interchangeable get the same (Shapley 1953).

    Args:
        values: (2^G, B) float64: v(S) at the row whose bits are the members of S, player g being
            bit g.

    Examples:
        >>> import torch
        >>> from vilu.report.explain.attribution import shapley
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


@dataclass(frozen=True)
class Attribution:
    """Why a score is above or below the mean of the background rows: ``score - baseline`` is the sum of the parts."""

    score: float
    baseline: float
    parts: dict[str, float]


def game_of(predictor: FailurePredictor) -> Game:
    """The game that a method's own class defines, or the default of what it looks at."""
    if predictor.constant_ is not None:
        raise NoAttribution(
            f"this {predictor.name} is a constant, fitted where there was nothing to learn"
        )
    return predictor.game() if "game" in vars(type(predictor)) else FailurePredictor.game(predictor)


class Attributor:
    """Attributions of one predictor against ``n`` drawn background rows; raises ``NoAttribution`` where it has none."""

    def __init__(
        self,
        predictor: FailurePredictor,
        background: EmbeddingSource,
        n: int,
        seed: int,
        leave_out: Tensor,
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
            for score, baseline, row in zip(
                values[-1].tolist(), values[0].tolist(), parts.T.tolist(), strict=True
            )
        ]
