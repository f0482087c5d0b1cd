"""Shapley coalitions: groups of inputs, and what a score is worth with a part of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.similarity import TILE_CELLS
from vilu.embeddings.source import Batch
from vilu.predictors.contract.labelled import failure_log_odds, with_outside
from vilu.predictors.nn.head import FailureHead
from vilu.predictors.nn.pooled import Pooled


class NoAttribution(Exception):  # noqa: N818 - an answer, not an error
    """A method has none; the message says why. The rest of an explanation stands without it."""


ZERO_SHOT = "zero-shot score"
IMAGE = "image"
TEXTS = "texts"
NONE = "none of the classes"
PLAYER_OF_LOOK = {"logits": ZERO_SHOT, "image": IMAGE}
PLAYER_OF_PART = {"image": IMAGE, "attended": TEXTS, "caption": TEXTS, "mcm": ZERO_SHOT}
"""The group of every part of a head's input."""

LOG_ODDS = "log-odds of failure"

Scored = tuple[Batch, NDArray[np.float64]]
Parts = dict[str, Tensor]  # group -> (B, H) what its inputs add to the first hidden layer


class Coalitions(ABC):
    """Values of coalitions of players, the groups of inputs.

    ``step`` rows are scored with each background row.
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
        """(2^G, B) float64 on the CPU: v(S) at the row whose bits are the members of S.

        They look at the batch or at its scores, as the values are of either.
        """


class SingleCoalitions(Coalitions):
    """A score that looks at one group of inputs alone.

    All of its distance from the background mean is that group's.
    """

    unit = "uncertainty"
    step = SCORING_BATCH

    def __init__(self, player: str) -> None:
        self.players = (player,)
        self.meaning = f"the score is a function of one input alone, so all of it is the {player}"
        self._mean = 0.0

    def see(self, background: list[Scored]) -> None:
        """Take their mean score."""
        scores = np.concatenate([scores for _, scores in background])
        self._mean = float(scores.mean())

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
        """The mean, and the score."""
        score = torch.from_numpy(scores).double()
        nobody = torch.full_like(score, self._mean)
        return torch.stack([nobody, score])


class HeadCoalitions(Coalitions):
    """Inputs of one or several ``FailureHead`` s, mixed between a row and the background rows.

    v(S) = 1/M sum_b link(g(z with the groups in S from this row, the others from background row
    b)), averaged over the heads: the interventional game (Janzing et al., AISTATS 2020). The groups
    are parts of z: "image" z_v, "texts" the attended text and the predicted caption, "zero-shot
    score" the MCM input. The first layer is a sum over parts, so swapping a part is swapping its
    summand.

    The heads are of one embedding width and the same parts; the link is the identity for one head's
    logit, the sigmoid for an ensemble.
    """

    def __init__(
        self, heads: list[FailureHead], link: Callable[[Tensor], Tensor], unit: str
    ) -> None:
        self.heads = heads
        self.link = link
        self.unit = unit
        inputs = {PLAYER_OF_PART[part] for part in heads[0].first}
        self.players = tuple(player for player in (ZERO_SHOT, IMAGE, TEXTS) if player in inputs)
        self.meaning = (
            "inputs that a coalition lacks are taken from background rows, and the score is "
            "averaged"
        )
        self._background: list[Parts] = []  # of every head

    def see(self, background: list[Scored]) -> None:
        """Keep what their inputs add to the first layer of every head."""
        with torch.no_grad():
            self._background = [self._parts_of(head, background) for head in self.heads]

    def _parts_of(self, head: FailureHead, background: list[Scored]) -> Parts:
        """What the inputs of the background rows add to the first layer of a head."""
        batches = [first_layer_parts(head, batch) for batch, _ in background]
        parts: Parts = {}
        for player in self.players:
            parts[player] = torch.cat([added[player] for added in batches])
        return parts

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
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
        # The first layer is a sum over players, here in two parts: that of the members, from this
        # row, and that of the players outside, from the background rows.
        lacking = torch.zeros_like(head.first_bias)[None]
        inside = head.first_bias + lacking
        for bit, player in enumerate(self.players):
            if coalition >> bit & 1:
                inside = inside + own[player]
            else:
                lacking = lacking + background[player]
        # products of one shape whatever the coalition: they round alike, so a player without effect
        # gets exactly zero
        inside = inside.expand_as(own[IMAGE])
        lacking = lacking.expand_as(background[IMAGE])
        step = max(TILE_CELLS // (len(lacking) * inside.shape[1]), 1)
        means = []
        for part in inside.split(step):
            logits = head.rest(part[:, None] + lacking).squeeze(-1)
            means.append(self.link(logits.cpu().double()).mean(dim=1))
        return torch.cat(means)


def first_layer_parts(head: FailureHead, batch: Batch) -> Parts:
    """What each group adds to the first hidden layer of a head.

    With the bias these make ``head.first_layer``.
    """
    parts: Parts = {}
    for part, added in head.to(batch.image.device).parts(batch).items():
        player = PLAYER_OF_PART[part]
        if player in parts:
            parts[player] = parts[player] + added
        else:
            parts[player] = added
    return parts


class PoolCoalitions(Coalitions):
    """Parts of the pooled logits of ViLU+ or ViLU0, each in or out.

    They are set against what they do for the background rows.

    The pooled logits are a sum (``Pooled``): tempered zero-shot logits ("zero-shot score"), what
    was learned about the candidates whatever the image ("texts"), and what the image adds ("image":
    its terms of the attention, the network and the memory). With f(S) the log-odds of failure of
    the zero-shot answer under the softmax of the summands in S alone, and f(nobody) = 0, the game
    is v(S) = f(S) + mean over background rows of [f_b(all) - f_b(S)]: so v(all) is the score,
    v(nobody) the mean score of the background, and a part that does for this row what it does for
    others on average gets nothing. Inputs are not swapped between images here: residuals of one
    image on the zero-shot logits of another have no meaning, since each of them speaks of classes.

    ``outside`` gives the log-odds (B,) of an image of none of the classes, one more player: f(S)
    with it counts it as one more wrong answer.
    """

    unit = LOG_ODDS
    meaning = (
        "parts of the pooled logits are added or left out, less what that does to background rows "
        "on average"
    )

    def __init__(
        self, parts: Callable[[Batch], Pooled], outside: Callable[[Batch], Tensor] | None = None
    ) -> None:
        self.parts = parts
        self.outside = outside
        self.players: tuple[str, ...] = (ZERO_SHOT, IMAGE, TEXTS)
        if outside is not None:
            self.players = (*self.players, NONE)
        self._mean = torch.zeros(1 << len(self.players), dtype=torch.float64)

    def see(self, background: list[Scored]) -> None:
        """Take the mean f of every coalition."""
        log_odds = [self._log_odds(batch) for batch, _ in background]
        self._mean = torch.cat(log_odds, dim=1).mean(dim=1)

    def values(self, batch: Batch, scores: NDArray[np.float64]) -> Tensor:  # noqa: ARG002
        """F of every coalition, about the background's."""
        return self._log_odds(batch) + (self._mean[-1] - self._mean)[:, None]

    def _log_odds(self, batch: Batch) -> Tensor:
        """(2^G, B) f(S)."""
        with torch.no_grad():
            parts = self.parts(batch)
            summands = [parts.zero_shot, parts.image, parts.texts]  # in the order of the players
            values = [torch.zeros(len(batch.image), dtype=torch.float64)]  # of nobody
            for coalition in range(1, 1 << len(summands)):
                logits = torch.zeros_like(parts.zero_shot)
                for bit, summand in enumerate(summands):
                    if coalition >> bit & 1:
                        logits = logits + summand
                values.append(failure_log_odds(logits, batch).cpu())
            if self.outside is not None:
                # the last player is the highest bit: the same coalitions again, now with it
                outside = self.outside(batch).cpu()
                values += [with_outside(log_odds, outside) for log_odds in values]
        return torch.stack(values)
