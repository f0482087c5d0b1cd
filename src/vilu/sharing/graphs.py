"""Scores as one graph of image and text for any numbers of both: what torch can export.

A score is the predictor's own code on a ``GraphBatch`` wherever that has no branch on the data or on a size; the few
that have one are written again here, and every export is compared with the predictor (``vilu.sharing.onnx``).

Shapes: N images, K candidate texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from vilu.nn.attention import CrossAttention
from vilu.nn.experts import Experts
from vilu.nn.heads import FailureHead
from vilu.nn.supervised import FEATURES
from vilu.predictors.bayes.answer import failure_log_odds
from vilu.similarity import ZeroShot, float64, of_logits
from vilu.space import EmbeddingSpace
from vilu.types import UNKNOWN, Batch

Score = Callable[[Batch], Tensor]


class GraphBatch(Batch):
    """A batch whose properties are made without a look at values or sizes; all (N, K) logits are there at once."""

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float32, summed in float64: runtimes add in other orders than torch, at a scale of 100 by 1e-4."""
        cosine = self.image.double() @ self.text.double().T
        return (cosine * self.logit_scale + self.logit_bias).to(self.image.dtype)

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """From the logits."""
        return of_logits(self.logits, self.first_equal)

    @cached_property
    def first_equal(self) -> Tensor:
        """(K,) as ``vilu.similarity.first_equal``."""
        _, same = torch.unique(self.text, dim=0, return_inverse=True)
        places = positions(self.text)
        nowhere = torch.full_like(places, self.text.shape[0])
        return nowhere.scatter_reduce(0, same, places, "amin")[same]

    def alike(self, answer: Tensor) -> Tensor:
        """(N, K); all candidates are different answers."""
        return positions(self.text) == answer[:, None]


class PlainBatch(GraphBatch):
    """One whose logits are summed in float32, as the predictors' are: what they round."""

    logits = Batch.logits


def positions(rows: Tensor) -> Tensor:
    """0 ... len - 1, of a length that stays open."""
    return torch.arange(rows.shape[0], device=rows.device)


class ScoreGraph(nn.Module):
    """Image and text, and features where the score looks at them, to uncertainty and zero-shot answer.

    Args:
        score: Of a batch.
        space: Its logit scale and bias become constants.
    """

    batch: type[GraphBatch] = GraphBatch

    def __init__(self, score: Score, space: EmbeddingSpace) -> None:
        super().__init__()
        self.score, self.space = score, space

    def forward(self, image: Tensor, text: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N,) float64 and (N,) int64."""
        rows = positions(image)
        batch = self.batch(
            image=image,
            text=text,
            target=torch.full_like(rows, UNKNOWN),
            index=rows,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns={} if features is None else {FEATURES: features},
        )
        return self.score(batch).double(), batch.prediction


class HeadGraph(nn.Module):
    """sigmoid of a ``FailureHead`` whose attention is multiplied out, in one order whatever N and K.

    scale (image W_Q') (text W_K')' is image Q text' with Q (D, D), and what follows the average of the texts is one
    matrix V (H, D); both products are made in float64.
    """

    def __init__(self, head: FailureHead, logit_scale: float) -> None:
        super().__init__()
        self.first, self.first_bias, self.rest = head.first, head.first_bias, head.rest
        if head.attention is not None:
            query, value = multiplied_out(head.attention, head.first["attended"], logit_scale)
            self.query, self.value = nn.Buffer(query), nn.Buffer(value)

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        hidden = batch.image @ self.first["image"].T + self.first_bias
        if "attended" in self.first:
            weights = torch.softmax(batch.image @ self.query @ batch.text.T, dim=-1)
            hidden = hidden + weights @ batch.text @ self.value.T
        if "caption" in self.first:
            hidden = hidden + batch.text[batch.prediction] @ self.first["caption"].T
        if "mcm" in self.first:
            hidden = hidden + batch.zero_shot.max_probability[:, None] * self.first["mcm"].T
        return torch.sigmoid(float64(self.rest(hidden).squeeze(-1)))


def multiplied_out(attention: CrossAttention, after: Tensor, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Q (D, D) and V (H, D) of ``HeadGraph``."""
    query, key, scale = attention.bilinear(logit_scale)
    joint, value = scale * (query.double().T @ key.double()), after.double() @ attention.value.double()
    return joint.detach().float(), value.detach().float()


class MeanGraph(nn.Module):
    """Mean over the members of an ensemble."""

    def __init__(self, members: Iterable[HeadGraph]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        return torch.stack([member(batch) for member in self.members]).mean(dim=0)


class PlusGraph(nn.Module):
    """``ViLUPlus``; whether all candidates are training classes is a number of the graph, not a branch.

    Every expert is computed; where a candidate is foreign, the companions have no weight in the pool.
    """

    def __init__(self, experts: Experts, pool: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.pool, self.alone = nn.Buffer(pool), nn.Buffer(torch.eye(len(pool), dtype=pool.dtype)[0])

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        attention, companions = self.experts.attention, self.experts.companions.values()
        weights: Tensor = self.alone
        match = attention.match(batch.text) if len(attention.classes) else None
        logits = [attention(batch, match)]
        if match is not None and len(companions):
            offset = attention.offset(batch)
            logits += [offset + companion(batch)[:, match.row] for companion in companions]
            weights = torch.where(match.known.all(), self.pool, self.alone)
        log_p = float64(torch.stack(logits, dim=1)).log_softmax(dim=-1)
        return torch.sigmoid(failure_log_odds(torch.einsum("m,bmk->bk", weights, log_p), batch))


class NetworkGraph(nn.Module):
    """The network of a ``NetworkPredictor``, and what makes a score of its output."""

    def __init__(self, network: nn.Module, score: Callable[[Batch, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.score = network, score

    def forward(self, batch: Batch) -> Tensor:
        """(N,) float64."""
        return self.score(batch, self.network(batch))
