"""Coalitions for Shapley values: groups of inputs, and a score's value for every coalition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.similarity import MAX_TILE_LOGITS
from vilu.embeddings.source import Batch
from vilu.predictors.contract.labelled import failure_log_odds, log_odds_with_outside
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.pooled import PooledLogits


class NoAttribution(Exception):  # noqa: N818 - an answer, not an error
    """The method has no Shapley values. The message gives the reason.

    An explanation then lacks only the attribution.
    """


# The player names.
ZERO_SHOT = "zero-shot score"
IMAGE = "image"
TEXTS = "texts"
NONE_OF_CLASSES = "none of the classes"
PLAYER_OF_INPUT = {"logits": ZERO_SHOT, "image": IMAGE}
"""For methods with a single input: maps the input name in ``looks_at`` to the player."""
PLAYER_OF_HEAD_INPUT = {"image": IMAGE, "attended": TEXTS, "caption": TEXTS, "mcm": ZERO_SHOT}
"""Maps an input name in a ``FailureHead`` to the player with this input."""

LOG_ODDS_UNIT = "log-odds of failure"
"""Unit of values that are log-odds, not uncertainties."""

ScoredBatch = tuple[Batch, NDArray[np.float64]]
"""A batch and its uncertainties (B,)."""
LayerTerms = dict[str, Tensor]
"""Maps a player to a term (B, H), a summand in a head's first hidden layer."""


class Coalitions(ABC):
    """Players, which are groups of score inputs, and a value for every coalition."""

    players: tuple[str, ...]
    unit: str  # unit of the values
    meaning: str  # meaning of the values, as a sentence in an explanation
    background_batch_size = 1  # number of background rows in a scored batch

    @abstractmethod
    def set_background(self, background: list[ScoredBatch]) -> None:
        """Store the background rows. Background inputs replace the missing players' inputs."""

    @abstractmethod
    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:
        """Compute the value v(S) of every coalition S: (2^G, B) float64 on the CPU, for G players.

        Bit i of the first index says whether player i is in S. Some subclasses compute the values
        from ``batch``, and some from ``scores`` (B,).
        """


class SingleCoalitions(Coalitions):
    """The coalitions of a score with a single player.

    The whole difference between the score and the background mean belongs to the player.
    """

    unit = "uncertainty"
    background_batch_size = SCORING_BATCH

    def __init__(self, player: str) -> None:
        self.players = (player,)
        self.meaning = f"the score is a function of one input alone, so all of it is the {player}"
        self._background_mean = 0.0

    def set_background(self, background: list[ScoredBatch]) -> None:
        """Store the mean score of the background rows."""
        all_scores = np.concatenate([scores for _, scores in background])
        self._background_mean = float(all_scores.mean())

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
        """Return values (2, B): background mean without the player, scores with the player."""
        score = torch.from_numpy(scores).double()
        background_mean = torch.full_like(score, self._background_mean)
        return torch.stack([background_mean, score])


class HeadCoalitions(Coalitions):
    """Coalitions of ``FailureHead`` inputs, for a single head or an ensemble.

    A coalition S has the value of the interventional game (Janzing et al., AISTATS 2020):

        v(S) = 1/M sum_b link(g(z_b))

    b runs over M background rows. z_b has the inputs for players in S from the explained row, and
    the remaining inputs from row b. v(S) is averaged over the heads g. The link is the identity for
    a single head's logit, and the sigmoid for an ensemble.

    The players are "image" z_v, "texts" (the attended text and the predicted caption), and
    "zero-shot score" (the MCM input). The first layer is a sum over the inputs, so replacing a
    summand replaces an input. All heads have the same embedding width and inputs.
    """

    def __init__(
        self, heads: list[FailureHead], link: Callable[[Tensor], Tensor], unit: str
    ) -> None:
        self.heads = heads
        self.link = link
        self.unit = unit
        input_names = list(heads[0].first)  # ``first`` has a weight matrix for each input
        players_with_input = {PLAYER_OF_HEAD_INPUT[name] for name in input_names}
        possible_players = (ZERO_SHOT, IMAGE, TEXTS)
        self.players = tuple(player for player in possible_players if player in players_with_input)
        self.meaning = (
            "inputs that a coalition lacks are taken from background rows, and the score is "
            "averaged"
        )
        self._background: list[LayerTerms] = []  # terms of the background rows, for every head

    def set_background(self, background: list[ScoredBatch]) -> None:
        """Store the background rows' first-layer terms for every head."""
        with torch.no_grad():
            self._background = [self._background_terms(head, background) for head in self.heads]

    def _background_terms(self, head: FailureHead, background: list[ScoredBatch]) -> LayerTerms:
        """Compute first-layer terms (M, H) in a head by player, for M background rows."""
        terms_of_batches = [terms_by_player(head, batch) for batch, _ in background]
        terms: LayerTerms = {}
        for player in self.players:
            terms[player] = torch.cat([batch_terms[player] for batch_terms in terms_of_batches])
        return terms

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
        """Compute v(S) (2^G, B): means over heads and background rows."""
        n_coalitions = 2 ** len(self.players)
        total = torch.zeros(n_coalitions, len(batch.image), dtype=torch.float64)
        with torch.no_grad():
            for head, background_terms in zip(self.heads, self._background, strict=True):
                row_terms = terms_by_player(head, batch)
                for coalition in range(n_coalitions):
                    total[coalition] += self._value(head, row_terms, background_terms, coalition)
        return total / len(self.heads)

    def _value(
        self, head: FailureHead, row_terms: LayerTerms, background_terms: LayerTerms, coalition: int
    ) -> Tensor:
        """Compute v(S) (B,) float64 for one head. Bit i of ``coalition`` says if player i is in S.

        ``row_terms`` belong to the B explained rows, ``background_terms`` to M background rows.
        """
        # The first layer is the sum of two parts: member terms from the explained rows, and missing
        # players' terms from the background rows.
        missing_part = torch.zeros_like(head.first_bias)[None]  # (1, H)
        member_part = head.first_bias + missing_part
        for bit, player in enumerate(self.players):
            if is_member(bit, coalition):
                member_part = member_part + row_terms[player]
            else:
                missing_part = missing_part + background_terms[player]
        # All coalitions use tensors with equal shapes. All coalitions then round alike, and a
        # player without effect gets exactly zero.
        member_part = member_part.expand_as(row_terms[IMAGE])  # (B, H)
        missing_part = missing_part.expand_as(background_terms[IMAGE])  # (M, H)
        # the first layers of a block are (b, M, H): choose b so that they fit into memory
        n_background, width = missing_part.shape  # M and H
        numbers_per_row = n_background * width
        block_rows = max(MAX_TILE_LOGITS // numbers_per_row, 1)
        means = []
        for block in member_part.split(block_rows):
            # (b, M, H): every row of the block with every background row
            first_layer = block[:, None] + missing_part
            means_of_block = self._mean_over_background(head, first_layer)
            means.append(means_of_block)
        return torch.cat(means)

    def _mean_over_background(self, head: FailureHead, first_layer: Tensor) -> Tensor:
        """Average scores over M background rows: (b,) float64 from first layers (b, M, H)."""
        logits = head.rest(first_layer).squeeze(-1)  # ``rest`` has all later layers
        cpu_logits = logits.cpu()
        scores = self.link(cpu_logits.double())
        return scores.mean(dim=1)


def is_member(player: int, coalition: int) -> bool:
    """Return whether the player is in the coalition: bit ``player`` of ``coalition`` is 1."""
    bit = (coalition >> player) & 1
    return bool(bit)


def terms_by_player(head: FailureHead, batch: Batch) -> LayerTerms:
    """Compute every player's term in a head's first hidden layer.

    The sum over the players plus the bias is ``head.first_layer``.
    """
    terms: LayerTerms = {}
    head.to(batch.image.device)
    terms_by_input = head.first_layer_terms(batch)
    for name, term in terms_by_input.items():
        player = PLAYER_OF_HEAD_INPUT[name]
        if player in terms:
            terms[player] = terms[player] + term
        else:
            terms[player] = term
    return terms


class PoolCoalitions(Coalitions):
    """Coalitions of summands in the pooled logits (``PooledLogits``) from ViLU+ or ViLU-zero.

    The players are the three summands:

    - "zero-shot score": the tempered zero-shot logits.
    - "texts": the learned effect that the candidates have on any image.
    - "image": the effect of the image.

    The summands in S add up to logits. f(S) is the judged answer's log-odds of failure under the
    softmax of these logits. If S is empty, f(S) is 0. f_b(S) is f(S) for the background row b. The
    value of S is

        v(S) = f(S) + mean over b of [f_b(all) - f_b(S)]

    Three properties follow:

    1. v(all) is the row's score.
    2. If S is empty, v(S) is the mean score over the background rows.
    3. A player gets zero if the player's effect on this row equals the mean effect on the
       background rows.

    Unlike in ``HeadCoalitions``, no input is replaced by a background input. The summands are class
    logits, and one image's summand cannot be added to another image's zero-shot logits.

    ``pooled_parts`` computes the summands for a batch. ``outside_log_odds`` computes the log-odds
    (B,) that an image is outside all classes. If ``outside_log_odds`` is given, "none of the
    classes" is a further player. If this player is in S, f(S) counts "outside" as a further wrong
    answer.
    """

    unit = LOG_ODDS_UNIT
    meaning = (
        "log-odds from the parts of the pooled logits in a coalition, plus what the missing parts "
        "add to background rows on average"
    )

    def __init__(
        self,
        pooled_parts: Callable[[Batch], PooledLogits],
        outside_log_odds: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.pooled_parts = pooled_parts
        self.outside_log_odds = outside_log_odds
        self.players: tuple[str, ...] = (ZERO_SHOT, IMAGE, TEXTS)
        if outside_log_odds is not None:
            self.players = (*self.players, NONE_OF_CLASSES)
        self._background_mean = torch.zeros(2 ** len(self.players), dtype=torch.float64)

    def set_background(self, background: list[ScoredBatch]) -> None:
        """Store the background rows' mean f(S) for every coalition S."""
        log_odds = [self._log_odds(batch) for batch, _ in background]
        log_odds_of_all = torch.cat(log_odds, dim=1)
        self._background_mean = log_odds_of_all.mean(dim=1)

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
        """Compute v(S) (2^G, B) for every coalition S."""
        mean_of_all = self._background_mean[-1]  # the last coalition has all players
        missing_effect = mean_of_all - self._background_mean
        return self._log_odds(batch) + missing_effect[:, None]

    def _log_odds(self, batch: Batch) -> Tensor:
        """Compute f(S) (2^G, B) for every coalition S."""
        with torch.no_grad():
            parts = self.pooled_parts(batch)
            # in the order of the players
            summands = [parts.zero_shot, parts.image_effect, parts.class_offset]
            log_odds_of_empty = torch.zeros(len(batch.image), dtype=torch.float64)
            log_odds_of_coalitions = [log_odds_of_empty]
            for coalition in range(1, 2 ** len(summands)):
                logits = torch.zeros_like(parts.zero_shot)
                for bit, summand in enumerate(summands):
                    if is_member(bit, coalition):
                        logits = logits + summand
                log_odds_of_coalition = failure_log_odds(logits, batch)
                log_odds_of_coalitions.append(log_odds_of_coalition.cpu())
            if self.outside_log_odds is not None:
                # "none of the classes" is the last player, and so the highest bit. Therefore the
                # coalitions without this player come first, and the same coalitions with this
                # player follow in the same order.
                outside = self.outside_log_odds(batch).cpu()
                log_odds_of_coalitions += [
                    log_odds_with_outside(log_odds, outside) for log_odds in log_odds_of_coalitions
                ]
        return torch.stack(log_odds_of_coalitions)
