"""The parts of the input that moved the score: Shapley values of groups of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.embeddings.source import EmbeddingSource
from vilu.predictors.contract.coalitions import Coalitions, NoAttribution, Scored
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.report.explain.rows import draw_rows, scored_rows


def shapley(values: Tensor) -> Tensor:
    """(G, B) Shapley values of the players: what each adds to the coalitions of others.

    phi_g = sum_S |S|! (G - |S| - 1)! / G! [v(S + g) - v(S)], over the coalitions S without g.
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
        bit = 1 << player
        for coalition in range(1 << n):
            if coalition & bit:
                continue
            # |S|! (G - |S| - 1)! / G!
            weight = 1 / (n * math.comb(n - 1, coalition.bit_count()))
            parts[player] += weight * (values[coalition | bit] - values[coalition])
    return parts


@dataclass(frozen=True)
class Attribution:
    """Why a score is above or below the mean of the background rows.

    ``score - baseline`` is the sum of the parts.
    """

    score: float
    baseline: float
    parts: dict[str, float]


def coalitions_of(predictor: FailurePredictor) -> Coalitions:
    """The coalitions that a method's own class defines, or the default of what it looks at."""
    if predictor.constant_ is not None:
        raise NoAttribution(
            f"this {predictor.name} is a constant, fitted where there was nothing to learn"
        )
    # those that the class inherits are not asked for: they may not know what the class changed
    defines_its_own = "coalitions" in vars(type(predictor))
    if defines_its_own:
        return predictor.coalitions()
    return FailurePredictor.coalitions(predictor)


class Attributor:
    """Attributions of one predictor against ``n`` drawn background rows.

    Raises:
        NoAttribution: If the predictor has none.
    """

    def __init__(
        self,
        predictor: FailurePredictor,
        background: EmbeddingSource,
        n: int,
        seed: int,
        leave_out: Tensor,
    ) -> None:
        self.coalitions = coalitions_of(predictor)
        rows = draw_rows(background, n, seed, leave_out)
        self.n_background = len(rows)
        self.coalitions.see(list(scored_rows(predictor, background, rows, self.coalitions.step)))

    def of(self, scored: Scored) -> list[Attribution]:
        """One attribution per row of a batch."""
        values = self.coalitions.values(*scored)
        score_of_nobody = values[0].tolist()
        score_of_all = values[-1].tolist()
        parts_of_rows = shapley(values).T.tolist()
        attributions = []
        for score, baseline, parts in zip(
            score_of_all, score_of_nobody, parts_of_rows, strict=True
        ):
            part_of_player = dict(zip(self.coalitions.players, parts, strict=True))
            attributions.append(Attribution(score, baseline, part_of_player))
        return attributions
