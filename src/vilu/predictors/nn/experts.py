"""Experts on which candidate is true, beside the attention, and their pool."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import CACHED_CELLS, cached_rows, float64, row_blocks
from vilu.embeddings.source import Batch
from vilu.predictors.nn.attention import FEATURES, ImageInputs, Match, SupervisedAttention
from vilu.predictors.nn.pooled import Pooled

RIDGE = 0.1
GAIN = 8.0
"""From a residual probability to a logit; the pool weighs it anyway."""


class Adapter(nn.Module):
    """A network of the image with one hidden layer, added to the tempered zero-shot logits of the training classes."""

    def __init__(self, inputs: ImageInputs, n_classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.first, self.last = nn.Linear(inputs.width, hidden), nn.Linear(hidden, n_classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        rows = self.inputs(batch) * math.sqrt(
            self.inputs.width
        )  # coordinates of variance one on average
        return cast("Tensor", self.last(self.dropout(functional.gelu(self.first(rows)))))


class Memory(nn.Module):
    """Attention over M labelled images: kernel ridge regression on what the zero-shot posterior gets wrong.

    8 k(x) (K + 0.1 I)^-1 (Y - P), with k the Gaussian kernel exp(-|x - x'|^2 / 2) of
    ``ImageInputs``, Y the labels and P the tempered zero-shot posterior of the training images; to
    be added to the tempered zero-shot logits.
    """

    def __init__(self, inputs: ImageInputs, n_rows: int, n_classes: int) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.bank = nn.Buffer(torch.zeros(n_rows, inputs.width))
        self.values = nn.Buffer(torch.zeros(n_rows, n_classes))

    @staticmethod
    def kernel(rows: Tensor, bank: Tensor) -> Tensor:
        """(N, M) exp of the products of what ``apart`` makes of inputs (N, D + F) and of a bank (M, D + F).

        Values of both signs and a size of ten cancel to what the rows are told apart by: in float32
        an error of 1e-4.
        """
        return (rows @ bank.T).exp_()

    @staticmethod
    def apart(rows: Tensor, *, is_bank: bool) -> Tensor:
        """(N, D + F + 2) float64 whose product of a row and one of the bank is -|x - x'|^2 / 2."""
        double = float64(rows)
        less, one = -double.square().sum(dim=1, keepdim=True) / 2, torch.ones_like(double[:, :1])
        return torch.cat([double, one, less] if is_bank else [double, less, one], dim=1)

    @classmethod
    def of(cls, attention: SupervisedAttention, rows: Rows) -> Memory:
        """Remember labelled rows, all at once: there are few of them."""
        (batch,) = (batch.to(attention.classes.device) for batch in rows.steps(len(rows.index)))
        memory = cls(attention.inputs, len(batch.index), len(batch.text)).to(
            attention.classes.device
        )
        memory.bank.copy_(attention.inputs(batch))
        missing = functional.one_hot(batch.target, len(batch.text)) - attention.offset(
            batch
        ).softmax(dim=-1)
        gram = memory.kernel(
            *(cls.apart(memory.bank.cpu(), is_bank=is_bank) for is_bank in (False, True))
        )
        gram.diagonal().add_(RIDGE)
        memory.values.copy_(
            GAIN * torch.cholesky_solve(missing.cpu().double(), torch.linalg.cholesky(gram))
        )
        return memory

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        return self.ready()(batch)

    def ready(self) -> Callable[[Batch], Tensor]:
        """What ``forward`` does, for several batches: what they have in common is computed once."""
        bank, values = self.apart(self.bank, is_bank=True), float64(self.values)

        def of(batch: Batch) -> Tensor:
            rows = self.apart(self.inputs(batch), is_bank=False)
            if torch.compiler.is_exporting():
                return (self.kernel(rows, bank) @ values).to(self.bank)
            blocks = rows.split(max(CACHED_CELLS // len(bank), 256))
            return torch.cat([self.kernel(block, bank) @ values for block in blocks]).to(self.bank)

        return of


class Experts(nn.Module):
    """Several opinions on which candidate is true: an attention, and companions that know the training classes only.

    ``weights`` (M,) float64 are those of a log-linear pool of all; the attention alone counts one.
    """

    def __init__(
        self, attention: SupervisedAttention, companions: Mapping[str, nn.Module], weights: Tensor
    ) -> None:
        super().__init__()
        self.attention, self.companions = attention, nn.ModuleDict(companions)
        self.weights = weights  # no buffer: some devices have no float64

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) logits of the pool, sum_m w_m l_m."""
        return torch.cat([logits for _, logits in self.blocks(batch)])

    def blocks(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Rows of a batch with the logits of the pool, so few at a time that these stay near the processor.

        Of what is linear in the image there is one product, whose keys are made once a batch.
        """
        attention, match = self.attention, self.attention.match(batch.text)
        all_known = bool(match.known.all())
        weights = self.weights.tolist() if all_known else [1.0]
        keys = weights[0] * attention.learned_keys(batch.text, match)
        if all_known:
            keys = keys + sum(weights) * attention.offset_keys(batch)
        in_order = len(match.row) == len(attention.classes) and bool((match.row.diff() == 1).all())
        ready = [
            one.ready() if isinstance(one, Memory) else one for one in self.companions.values()
        ]
        for part in row_blocks(len(batch.image), len(batch.text), cached_rows(len(batch.text))):
            rows = batch.rows(part)
            logits = attention.queries(rows) @ keys.T
            if not all_known:
                logits = logits + attention.offset(rows, match)
            else:
                for weight, companion in zip(weights[1:], ready, strict=True):
                    found = companion(rows)
                    logits = logits.add_(found if in_order else found[:, match.row], alpha=weight)
            yield rows, logits

    def log_posteriors(self, batch: Batch) -> Tensor:
        """(B, M, K) float64 log probabilities of the experts."""
        return float64(self.logits(batch)).log_softmax(dim=-1)

    def logits(self, batch: Batch) -> Tensor:
        """(B, M, K) logits: of all experts where every candidate is a training class, else of the attention (M = 1)."""
        match = self.attention.match(batch.text)
        return (
            self.all_logits(batch, match)
            if bool(match.known.all())
            else self.attention(batch, match)[:, None]
        )

    def all_logits(self, batch: Batch, match: Match | None) -> Tensor:
        """(B, M, K) logits of all experts, those of the companions wrong for other candidates than training classes."""
        logits = [self.attention(batch, match)]
        if match is not None and len(self.companions):
            offset = self.attention.offset(batch)
            logits += [
                offset + companion(batch)[:, match.row] for companion in self.companions.values()
            ]
        return torch.stack(logits, dim=1)

    def pooled_parts(self, batch: Batch) -> Pooled:
        """The pooled logits of a batch in their parts.

        l_m = a l0 + r_m(x) for every expert m: l0 the zero-shot logits, a their temperature, r_m
        the expert's residual, x the standardised image, which is zero at the training mean. So
        sum_m w_m l_m = (sum_m w_m) a l0 + R(0) + (R(x) - R(0)) with R = sum_m w_m r_m.
        """
        offset, logits = self._of(batch)
        mean_offset, mean_logits = self._of(self._mean_image(batch))
        texts = pool(mean_logits - mean_offset[:, None], self.weights)
        residual = pool(logits - offset[:, None], self.weights)
        return Pooled(weights_of(logits, self.weights).sum() * offset, texts, residual - texts)

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, K) offset that all experts share, and their (B, M, K) logits, float64."""
        offset = self.attention.offset(batch, self.attention.match(batch.text))
        return float64(offset), float64(self.logits(batch))

    def _mean_image(self, batch: Batch) -> Batch:
        """One row, the mean training image, against the candidates of a batch."""
        inputs = self.attention.inputs
        columns = dict(batch.columns) | (
            {FEATURES: inputs.features.mean[None]} if inputs.on_features else {}
        )
        one = batch.rows(slice(0, 1))
        return dataclasses.replace(one, image=inputs.image.mean[None], columns=columns)


def pool(rows: Tensor, weights: Tensor) -> Tensor:
    """(B, K) float64 weighted sum of the rows (B, M, K) of all experts, or the rows of the attention where M is 1."""
    return torch.einsum("m,bmk->bk", weights_of(rows, weights), rows)


def weights_of(rows: Tensor, weights: Tensor) -> Tensor:
    """(M,) weights of rows (B, M, K)."""
    return weights.to(rows.device) if rows.shape[1] > 1 else torch.ones_like(rows[0, :1, 0])
