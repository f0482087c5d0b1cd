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
from vilu.predictors.nn.attention import (
    FEATURES,
    ImageInputs,
    Match,
    SupervisedAttention,
    plus,
)
from vilu.predictors.nn.layers import dropout_mask, linear
from vilu.predictors.nn.pooled import Pooled

RIDGE = 0.1
"""Added to the diagonal of the memory's Gram matrix."""

GAIN = 8.0
"""From a residual probability to a logit; the pool weighs it anyway."""

FEWEST_ROWS = 256
"""Rows of a block of the memory, however large the bank is: fewer make a slow product."""


class Adapter(nn.Module):
    """A network of the image with one hidden layer.

    Its outputs are added to the tempered zero-shot logits of the training classes.
    """

    def __init__(
        self, inputs: ImageInputs, n_classes: int, hidden: int, dropout: float, seed: int
    ) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.dropout = dropout
        self.generator = torch.Generator().manual_seed(seed)  # of first weights and masks
        self.first = linear(inputs.width, hidden, self.generator)
        self.last = linear(hidden, n_classes, self.generator)
        # with a last layer of zeros the training begins at the tempered zero-shot logits
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        # the inputs have unit norm on average; so scaled, their coordinates have variance one
        rows = self.inputs(batch) * math.sqrt(self.inputs.width)
        hidden = functional.gelu(self.first(rows))
        if self.training:
            mask = dropout_mask(hidden.shape, self.dropout, self.generator)
            hidden = hidden * mask.to(hidden.device)
        return cast("Tensor", self.last(hidden))


class Memory(nn.Module):
    """Attention over M labelled images: kernel ridge regression of the zero-shot errors.

    The memory adds to the tempered zero-shot logits

        8 k(x) (K + 0.1 I)^-1 (Y - P),

    with k the Gaussian kernel exp(-|x - x'|^2 / 2) of ``ImageInputs``, K its Gram matrix, Y the
    labels and P the tempered zero-shot posterior of the training images.
    """

    def __init__(self, inputs: ImageInputs, n_rows: int, n_classes: int) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.bank = nn.Buffer(torch.zeros(n_rows, inputs.width, dtype=torch.float32))
        self.values = nn.Buffer(torch.zeros(n_rows, n_classes, dtype=torch.float32))

    @staticmethod
    def kernel(rows: Tensor, bank: Tensor) -> Tensor:
        """(N, M) Gaussian kernel of inputs and a bank, both as from ``exponent_factor``.

        The terms of an exponent have both signs and a size of ten, and cancel to the small distance
        of two rows. In float32 that would be an error of 1e-4.
        """
        return (rows @ bank.T).exp_()

    @staticmethod
    def exponent_factor(rows: Tensor, *, is_bank: bool) -> Tensor:
        """(N, D + F + 2) float64 whose product of a row and one of the bank is -|x - x'|^2 / 2."""
        # -|x - x'|^2 / 2 = x . x' - |x|^2 / 2 - |x'|^2 / 2 is one product of longer vectors,
        # (x, -|x|^2 / 2, 1) . (x', 1, -|x'|^2 / 2): no (N, M) matrix but the kernel's is needed
        double = float64(rows)
        minus_half_square = -double.square().sum(dim=1, keepdim=True) / 2
        unit_column = torch.ones_like(double[:, :1])
        if is_bank:
            return torch.cat([double, unit_column, minus_half_square], dim=1)
        return torch.cat([double, minus_half_square, unit_column], dim=1)

    @classmethod
    def of(cls, attention: SupervisedAttention, rows: Rows) -> Memory:
        """Remember labelled rows, all at once: there are few of them."""
        device = attention.classes.device
        (whole,) = rows.steps(len(rows.index))
        batch = whole.to(device)
        n_classes = len(batch.text)
        memory = cls(attention.inputs, len(batch.index), n_classes).to(device)
        memory.bank.copy_(attention.inputs(batch))
        posterior = attention.offset(batch).softmax(dim=-1)
        missing = functional.one_hot(batch.target, n_classes) - posterior
        memory.values.copy_(GAIN * ridge_weights(memory.bank.cpu(), missing.cpu().double()))
        return memory

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        return self.ready()(batch)

    def ready(self) -> Callable[[Batch], Tensor]:
        """The function ``forward``, for several batches: their common part is computed once."""
        bank = self.exponent_factor(self.bank, is_bank=True)
        values = float64(self.values)

        def recall(batch: Batch) -> Tensor:
            rows = self.exponent_factor(self.inputs(batch), is_bank=False)
            if torch.compiler.is_exporting():  # a graph's numbers of rows are open
                return (self.kernel(rows, bank) @ values).to(self.bank)
            block_rows = max(CACHED_CELLS // len(bank), FEWEST_ROWS)
            blocks = [self.kernel(block, bank) @ values for block in rows.split(block_rows)]
            return torch.cat(blocks).to(self.bank)

        return recall


def ridge_weights(bank: Tensor, missing: Tensor) -> Tensor:
    """(M, K) float64 (K + 0.1 I)^-1 ``missing``, K the Gram matrix of a bank (M, D + F)."""
    rows = Memory.exponent_factor(bank, is_bank=False)
    gram = Memory.kernel(rows, Memory.exponent_factor(bank, is_bank=True))
    # a Gram matrix is positive semi-definite, and the ridge makes it definite: Cholesky succeeds
    gram.diagonal().add_(RIDGE)
    return torch.cholesky_solve(missing, torch.linalg.cholesky(gram))


class Experts(nn.Module):
    """Several opinions on which candidate is true: an attention and its companions.

    The companions know the training classes only. ``weights`` (M,) float64 are those of a
    log-linear pool of all experts. Where the attention is alone, it weighs one.
    """

    def __init__(
        self, attention: SupervisedAttention, companions: Mapping[str, nn.Module], weights: Tensor
    ) -> None:
        super().__init__()
        self.attention = attention
        self.companions = nn.ModuleDict(companions)
        self.weights = weights  # no buffer: some devices have no float64

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) logits of the pool, sum_m w_m l_m."""
        return torch.cat([logits for _, logits in self.blocks(batch)])

    def blocks(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Rows of a batch with their pooled logits, so few that these stay near the processor.

        The part that is linear in the image is one product, whose keys are computed once a batch.
        """
        attention = self.attention
        match = attention.match(batch.text)
        all_known = bool(match.known.all())
        if all_known:
            keys = self._pooled_keys(batch, match)
            companions = self._ready_companions(match)
        else:  # the attention alone knows foreign candidates
            keys = attention.learned_keys(batch.text, match)
            companions = []
        n_candidates = len(batch.text)
        for part in row_blocks(len(batch.image), n_candidates, cached_rows(n_candidates)):
            rows = batch.rows(part)
            logits = attention.queries(rows) @ keys.T
            if all_known:
                logits = plus(logits, self._given_offset(rows))
            else:  # foreign candidates have an offset of their own temperature
                logits = logits + attention.offset(rows, match)
            for weight, companion in companions:
                logits = logits.add_(companion(rows), alpha=weight)
            yield rows, logits

    def _pooled_keys(self, batch: Batch, match: Match) -> Tensor:
        """(K, D + F + 1) keys of the pool's part that is linear in the image, for known classes."""
        # Every expert is l_m = offset + r_m, so the pool has sum_m w_m offsets. The offset is
        # linear in the image, and so is r of the attention: their keys add up.
        weights: list[float] = self.weights.tolist()
        keys = weights[0] * self.attention.learned_keys(batch.text, match)
        return keys + sum(weights) * self.attention.offset_keys(batch)

    def _given_offset(self, batch: Batch) -> Tensor | None:
        """(B, K) part of the pool that given logits are, beside that of ``_pooled_keys``."""
        offset = self.attention.given_offset(batch)
        if offset is None:
            return None
        return float(self.weights.sum()) * offset

    def _ready_companions(self, match: Match) -> list[tuple[float, Callable[[Batch], Tensor]]]:
        """Weights of the companions, and their residuals for known candidates."""
        is_as_long = len(match.row) == len(self.attention.classes)
        in_order = is_as_long and bool((match.row.diff() == 1).all())
        weights = self.weights.tolist()[1:]
        ready = []
        for weight, companion in zip(weights, self.companions.values(), strict=True):
            residual = companion.ready() if isinstance(companion, Memory) else companion
            if not in_order:
                residual = _columns_of(residual, match.row)
            ready.append((weight, residual))
        return ready

    def log_posteriors(self, batch: Batch) -> Tensor:
        """(B, M, K) float64 log probabilities of the experts."""
        return float64(self.logits(batch)).log_softmax(dim=-1)

    def logits(self, batch: Batch) -> Tensor:
        """(B, M, K) logits of all experts; M is 1, the attention, where a candidate is foreign."""
        match = self.attention.match(batch.text)
        if bool(match.known.all()):
            return self.all_logits(batch, match)
        logits: Tensor = self.attention(batch, match)
        return logits[:, None]

    def all_logits(self, batch: Batch, match: Match | None) -> Tensor:
        """(B, M, K) logits of all experts.

        Those of the companions are wrong for candidates that are no training classes.
        """
        logits = [self.attention(batch, match)]
        if match is not None and len(self.companions):
            offset = self.attention.offset(batch)
            for companion in self.companions.values():
                logits.append(offset + companion(batch)[:, match.row])
        return torch.stack(logits, dim=1)

    def pooled_parts(self, batch: Batch) -> Pooled:
        """The pooled logits of a batch in their parts.

        l_m = a l0 + r_m(x) for every expert m: l0 the zero-shot logits, a their temperature, r_m
        the expert's residual, x the standardised image, which is zero at the training mean. So
        sum_m w_m l_m = (sum_m w_m) a l0 + R(0) + (R(x) - R(0)) with R = sum_m w_m r_m.
        """
        offset, logits = self._offset_and_logits(batch)
        mean_offset, mean_logits = self._offset_and_logits(self._mean_image(batch))
        residual_at_mean = pool(mean_logits - mean_offset[:, None], self.weights)
        residual = pool(logits - offset[:, None], self.weights)
        total_weight = weights_of(logits, self.weights).sum()
        return Pooled(total_weight * offset, residual_at_mean, residual - residual_at_mean)

    def _offset_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, K) offset that all experts share, and their (B, M, K) logits, float64."""
        offset = self.attention.offset(batch, self.attention.match(batch.text))
        return float64(offset), float64(self.logits(batch))

    def _mean_image(self, batch: Batch) -> Batch:
        """One row, the mean training image, against the candidates of a batch."""
        inputs = self.attention.inputs
        columns = dict(batch.columns)
        if inputs.on_features:
            columns[FEATURES] = inputs.features.mean[None]
        row = batch.rows(slice(0, 1))
        return dataclasses.replace(row, image=inputs.image.mean[None], columns=columns)


def _columns_of(residual: Callable[[Batch], Tensor], places: Tensor) -> Callable[[Batch], Tensor]:
    """The residual of the training classes at these places."""

    def picked(batch: Batch) -> Tensor:
        return residual(batch)[:, places]

    return picked


def pool(rows: Tensor, weights: Tensor) -> Tensor:
    """(B, K) float64 weighted sum of experts' rows (B, M, K); where M is 1, the attention's."""
    # a sum of logits is a product of probabilities: the pool is log-linear, q ~ prod_m p_m^w_m
    return torch.einsum("m,bmk->bk", weights_of(rows, weights), rows)


def weights_of(rows: Tensor, weights: Tensor) -> Tensor:
    """(M,) weights of rows (B, M, K)."""
    if rows.shape[1] > 1:
        return weights.to(rows.device)
    # foreign candidates: the attention is the only expert, whatever its weight among several
    return torch.ones_like(rows[0, :1, 0])
