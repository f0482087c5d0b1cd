"""Each input group's share in a score, as Shapley values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vilu.embeddings.source import EmbeddingSource
from vilu.predictors.contract.coalitions import Coalitions, NoAttribution, ScoredBatch
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.report.explain.rows import draw_rows, scored_rows


def shapley(values: Tensor) -> Tensor:
    """Return the Shapley values (G, B) of G players (Shapley 1953).

    Every coalition S of players has a value v(S). The Shapley value phi_g of player g is the mean
    increase in v when the player joins a coalition:

        phi_g = sum_S |S|! (G - |S| - 1)! / G! [v(S + g) - v(S)]

    The sum is over the coalitions S without player g. The values phi_g add up to
    v(all) - v(nobody). A player that never changes v gets zero. Two interchangeable players get
    equal values.

    Args:
        values: (2^G, B) float64 value v(S) for every coalition S. If player g is a member of S, bit
            g is set in the index of S.

    Examples:
        >>> import torch
        >>> from vilu.report.explain.attribution import shapley
        >>> nobody, first, second, both = 0.0, 1.0, 3.0, 6.0  # values of the four coalitions
        >>> values = torch.tensor([[nobody], [first], [second], [both]], dtype=torch.float64)
        >>> shapley(values).squeeze(1).tolist()  # (1 - 0 + 6 - 3) / 2 and (3 - 0 + 6 - 1) / 2
        [2.0, 4.0]
    """
    n_players = len(values).bit_length() - 1  # log2 of the coalition count
    if len(values) != 1 << n_players:
        raise ValueError(f"the number of coalitions must be a power of two, not {len(values)}")
    shapley_values = torch.zeros(n_players, *values.shape[1:], dtype=values.dtype)
    for player in range(n_players):
        bit = 1 << player
        for coalition in range(1 << n_players):
            is_member = bool(coalition & bit)
            if is_member:
                continue
            # |S|! (G - |S| - 1)! / G! with a binomial coefficient: 1 / (G (G - 1 choose |S|))
            weight = 1 / (n_players * math.comb(n_players - 1, coalition.bit_count()))
            shapley_values[player] += weight * (values[coalition | bit] - values[coalition])
    return shapley_values


@dataclass(frozen=True)
class Attribution:
    """The difference between a score and the mean background score, split into parts.

    The sum of the parts is ``score - baseline``.
    """

    score: float  # the row's score
    baseline: float  # mean score over the background rows
    parts: dict[str, float]  # Shapley value of every input group


def coalitions_of(predictor: FailurePredictor) -> Coalitions:
    """Return the coalitions that the predictor's class defines.

    If the class has no coalitions, use those of ``FailurePredictor``. These fit every method.
    """
    if predictor.constant_ is not None:
        raise NoAttribution(
            f"this {predictor.name} gives a constant score, because its fit had nothing to learn"
        )
    # Coalitions from a parent class are not used, because the class and the parent may compute
    # scores in different ways.
    defines_its_own = "coalitions" in vars(type(predictor))
    if defines_its_own:
        return predictor.coalitions()
    return FailurePredictor.coalitions(predictor)


class Attributor:
    """Computes attributions of a predictor's scores, in comparison with drawn background rows.

    Args:
        predictor: The predictor.
        background: Source from which background rows are drawn.
        n_rows: Number of background rows to draw.
        seed: Seed for the draw.
        rows_to_leave_out: Positions of rows that must not be drawn.

    Raises:
        NoAttribution: If the predictor allows no attribution.
    """

    def __init__(
        self,
        predictor: FailurePredictor,
        background: EmbeddingSource,
        n_rows: int,
        seed: int,
        rows_to_leave_out: Tensor,
    ) -> None:
        self.coalitions = coalitions_of(predictor)
        background_rows = draw_rows(background, n_rows, seed, rows_to_leave_out)
        self.n_background = len(background_rows)
        batch_size = self.coalitions.background_batch_size
        scored_batches = scored_rows(predictor, background, background_rows, batch_size)
        self.coalitions.set_background(list(scored_batches))

    def attribute(self, scored: ScoredBatch) -> list[Attribution]:
        """Return one attribution for each row in a batch."""
        values = self.coalitions.values(*scored)
        # the first coalition has no player, and the last coalition has all players
        score_of_nobody = values[0].tolist()
        score_of_all = values[-1].tolist()
        parts_of_rows = shapley(values).T.tolist()
        attributions = []
        for score, baseline, parts in zip(
            score_of_all, score_of_nobody, parts_of_rows, strict=True
        ):
            part_of_player = dict(zip(self.coalitions.players, parts, strict=True))
            attribution = Attribution(score, baseline, part_of_player)
            attributions.append(attribution)
        return attributions
