"""Experts besides the attention, and the pool of all experts.

An expert computes a logit for each candidate. The softmax of these logits is the expert's
probability that a candidate is the true class.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import CACHED_LOGITS, float64, n_rows_in_cache, row_blocks
from vilu.embeddings.source import Batch
from vilu.predictors.nn.attention import (
    FEATURES,
    ClassMatch,
    ImageInputs,
    SupervisedAttention,
    add_given_logits,
)
from vilu.predictors.nn.layers import dropout_mask, linear
from vilu.predictors.nn.pooled import PooledLogits

KERNEL_RIDGE = 0.1
"""Ridge in the kernel regression of ``Memory``."""

LOGIT_GAIN = 8.0
"""Factor from a probability difference to a logit.

The value matters little, because the pool also gives the memory a weight.
"""

MIN_BLOCK_ROWS = 256
"""Minimum number of images in a product of ``Memory``. Products with fewer rows are slow."""


class Adapter(nn.Module):
    """Expert network with one hidden layer, applied to the image.

    The outputs are added to the training classes' tempered zero-shot logits.
    """

    def __init__(
        self, inputs: ImageInputs, n_classes: int, hidden: int, dropout: float, seed: int
    ) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # safetensors saves no tensors with shared memory
        self.dropout = dropout
        self.generator = torch.Generator().manual_seed(seed)  # draws initial weights and masks
        self.first = linear(inputs.width, hidden, self.generator)
        self.last = linear(hidden, n_classes, self.generator)
        # with zeros in the last layer, training begins at the tempered zero-shot logits
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Compute outputs (B, K) to add to the training classes' logits, in their order."""
        # The inputs have a mean square norm of 1 over all their coordinates. With the factor, the
        # mean square of a single coordinate is 1 on average.
        image = self.inputs(batch) * math.sqrt(self.inputs.width)
        hidden = functional.gelu(self.first(image))
        if self.training:
            mask = dropout_mask(hidden.shape, self.dropout, self.generator)
            hidden = hidden * mask.to(hidden.device)
        outputs: Tensor = self.last(hidden)
        return outputs


class Memory(nn.Module):
    """Expert by kernel ridge regression on the zero-shot errors for M labelled images.

    The kernel of two images with the ``ImageInputs`` x and x' is exp(-|x - x'|^2 / 2). Let G (M, M)
    be the kernels between the labelled images. Y (M, K) are their one-hot labels, and P (M, K) is
    their tempered zero-shot posterior, so Y - P are the errors.

    An image with the inputs x has the kernels k(x) (M,) with the labelled images. The memory adds
    to its tempered zero-shot logits

        8 k(x) (G + 0.1 I)^-1 (Y - P)

    ``bank`` (M, D + F) has the labelled images' inputs. ``values`` (M, K) is the product without
    k(x).
    """

    def __init__(self, inputs: ImageInputs, n_rows: int, n_classes: int) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # safetensors saves no tensors with shared memory
        bank = torch.zeros(n_rows, inputs.width, dtype=torch.float32)
        values = torch.zeros(n_rows, n_classes, dtype=torch.float32)
        self.bank = nn.Buffer(bank)
        self.values = nn.Buffer(values)

    @staticmethod
    def gaussian_kernels(row_factors: Tensor, bank_factors: Tensor) -> Tensor:
        """Compute Gaussian kernels (N, M) from rows and bank, both from ``exponent_factor``.

        The exponents are small differences between terms as large as 10. They are computed in
        float64, because in float32 the kernel would have an error of 1e-4.
        """
        return (row_factors @ bank_factors.T).exp_()

    @staticmethod
    def exponent_factor(rows: Tensor, *, is_bank: bool) -> Tensor:
        """Append two columns to rows, so that products of rows are the kernel's exponents.

        The result is (N, D + F + 2) float64. The exponent for x and an x' from the bank is
        -|x - x'|^2 / 2. It is the product of two longer vectors, one from x and one from x':

            x . x' - |x|^2 / 2 - |x'|^2 / 2 = (x, -|x|^2 / 2, 1) . (x', 1, -|x'|^2 / 2)

        So a single matrix product gives all exponents, and no second matrix (N, M) is needed.
        """
        rows = float64(rows)
        minus_half_square = -rows.square().sum(dim=1, keepdim=True) / 2
        unit_column = torch.ones_like(rows[:, :1])
        if is_bank:
            return torch.cat([rows, unit_column, minus_half_square], dim=1)
        return torch.cat([rows, minus_half_square, unit_column], dim=1)

    @classmethod
    def fit(cls, attention: SupervisedAttention, rows: Rows) -> Memory:
        """Fit a memory to labelled rows. The rows must be few enough for a single batch."""
        device = attention.classes.device
        (batch_of_all,) = rows.steps(len(rows.index))  # a single step has all rows
        batch = batch_of_all.to(device)
        n_classes = len(batch.text)
        memory = cls(attention.inputs, len(batch.index), n_classes)
        memory.to(device)
        memory.bank.copy_(attention.inputs(batch))
        posterior = attention.tempered_logits(batch).softmax(dim=-1)
        errors = functional.one_hot(batch.target, n_classes) - posterior
        weights = ridge_weights(memory.bank.cpu(), errors.cpu().double())
        memory.values.copy_(LOGIT_GAIN * weights)
        return memory

    def forward(self, batch: Batch) -> Tensor:
        """Compute outputs (B, K) to add to the training classes' logits, in their order."""
        residual = self.residual_function()
        return residual(batch)

    def residual_function(self) -> Callable[[Batch], Tensor]:
        """Return a function that computes the same as ``forward``, but faster for many batches.

        The bank's vectors are the same for all batches, and are computed only once.
        """
        bank_factors = self.exponent_factor(self.bank, is_bank=True)
        values = float64(self.values)

        def residual(batch: Batch) -> Tensor:
            row_factors = self.exponent_factor(self.inputs(batch), is_bank=False)
            # An exported graph is for any row count, so it cannot have a fixed number of blocks.
            if torch.compiler.is_exporting():
                outputs = self.gaussian_kernels(row_factors, bank_factors) @ values
                return outputs.to(self.bank)
            block_rows = max(CACHED_LOGITS // len(bank_factors), MIN_BLOCK_ROWS)
            blocks = [
                self.gaussian_kernels(block, bank_factors) @ values
                for block in row_factors.split(block_rows)
            ]
            outputs_of_all = torch.cat(blocks)
            return outputs_of_all.to(self.bank)

        return residual


def ridge_weights(bank: Tensor, errors: Tensor) -> Tensor:
    """Solve (G + 0.1 I) w = ``errors`` (M, K) in float64 for w. G is the bank's Gram matrix."""
    row_factors = Memory.exponent_factor(bank, is_bank=False)
    gram = Memory.gaussian_kernels(row_factors, Memory.exponent_factor(bank, is_bank=True))
    # G is positive semi-definite. The ridge makes G positive definite, as required by Cholesky.
    diagonal = gram.diagonal()
    diagonal.add_(KERNEL_RIDGE)
    lower_triangle = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(errors, lower_triangle)


class Experts(nn.Module):
    """M experts that are pooled: an attention, and its ``companions``.

    A companion is an ``Adapter`` or a ``Memory``, with outputs only for the training classes.
    ``weights`` (M,) float64 are the experts' weights in a log-linear pool. The first weight
    belongs to the attention.

    If a candidate in a batch is no training class, only the attention scores the batch, and
    the attention has the weight 1.
    """

    def __init__(
        self, attention: SupervisedAttention, companions: Mapping[str, nn.Module], weights: Tensor
    ) -> None:
        super().__init__()
        self.attention = attention
        self.companions = nn.ModuleDict(companions)
        # not a buffer, because ``to`` would move ``weights`` to devices without float64
        self.weights = weights

    def forward(self, batch: Batch) -> Tensor:
        """Compute the pool's logits (B, K): sum_m w_m l_m, with the weight w_m for expert m."""
        blocks = [logits for _, logits in self.logit_blocks(batch)]
        return torch.cat(blocks)

    def logit_blocks(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Yield blocks of rows with their pooled logits.

        A block is so small that its logits stay in the cache. A single matrix product of queries
        with keys gives the part of the logits that is linear in the image. The keys are computed
        once per batch.
        """
        attention = self.attention
        class_match = attention.match_classes(batch.text)
        all_are_classes = bool(class_match.is_class.all())
        if all_are_classes:
            keys = self._pooled_keys(batch, class_match)
            residuals = self._weighted_residuals(class_match)
        else:  # only the attention scores candidates beyond the training classes
            keys = attention.learned_keys(batch.text, class_match)
            residuals = []
        n_candidates = len(batch.text)
        max_rows = n_rows_in_cache(n_candidates)
        for block in row_blocks(len(batch.image), n_candidates, max_rows):
            block_batch = batch.rows(block)
            logits = attention.queries(block_batch) @ keys.T
            if all_are_classes:
                logits = add_given_logits(logits, self._pooled_given_logits(block_batch))
            else:
                # these keys do not contain the tempered logits, whose temperature differs here
                logits = logits + attention.tempered_logits(block_batch, class_match)
            for weight, residual_of in residuals:
                logits = logits.add_(residual_of(block_batch), alpha=weight)
            yield block_batch, logits

    def _pooled_keys(self, batch: Batch, class_match: ClassMatch) -> Tensor:
        """Compute keys (K, D + F + 1) for the part of the pool that is linear in the image.

        All candidates must be training classes.
        """
        # Expert m has the logits l_m = a l0 + r_m, with the tempered logits a l0. So the pool is
        # (sum_m w_m) a l0 + sum_m w_m r_m. a l0 is linear in the image, and so is the attention's
        # residual r_m.
        weights: list[float] = self.weights.tolist()
        attention_weight = weights[0]
        keys = attention_weight * self.attention.learned_keys(batch.text, class_match)
        return keys + sum(weights) * self.attention.tempered_logit_keys(batch)

    def _pooled_given_logits(self, batch: Batch) -> Tensor | None:
        """Compute the pool's tempered logits (B, K) for a ``LogitBatch``. Else return None."""
        given_logits = self.attention.tempered_given_logits(batch)
        if given_logits is None:
            return None
        return float(self.weights.sum()) * given_logits

    def _weighted_residuals(
        self, class_match: ClassMatch
    ) -> list[tuple[float, Callable[[Batch], Tensor]]]:
        """Return each companion's weight, with a function from a batch to residual logits (B, K).

        All candidates must be training classes.
        """
        # Companions have outputs for all training classes, in their order. If the candidates are
        # not just these classes in this order, output columns are selected.
        classes = class_match.nearest_class  # every candidate's class
        is_complete = len(classes) == len(self.attention.classes)
        # K class numbers, each one more than the number before, can only be 0 to K - 1
        is_in_order = is_complete and bool((classes.diff() == 1).all())
        companion_weights = self.weights.tolist()[1:]
        weighted_residuals = []
        for weight, companion in zip(companion_weights, self.companions.values(), strict=True):
            residual: Callable[[Batch], Tensor] = companion
            if isinstance(companion, Memory):
                residual = companion.residual_function()
            if not is_in_order:
                residual = _select_columns(residual, classes)
            weighted_residuals.append((weight, residual))
        return weighted_residuals

    def log_posteriors(self, batch: Batch) -> Tensor:
        """Compute the experts' log-probabilities (B, M, K) float64."""
        logits = float64(self.expert_logits(batch))
        return logits.log_softmax(dim=-1)

    def expert_logits(self, batch: Batch) -> Tensor:
        """Compute the logits (B, M, K) of all experts.

        If a candidate is no training class, the result is the attention's logits (B, 1, K).
        """
        class_match = self.attention.match_classes(batch.text)
        if bool(class_match.is_class.all()):
            return self.all_expert_logits(batch, class_match)
        logits: Tensor = self.attention(batch, class_match)
        return logits.unsqueeze(1)

    def all_expert_logits(self, batch: Batch, class_match: ClassMatch | None) -> Tensor:
        """Compute the logits (B, M, K) of all experts, without a check on the candidates.

        For candidates beyond the training classes, the companions' logits are wrong.
        ``class_match`` is the result of the attention's ``match_classes`` for the candidates, or
        None without training classes.
        """
        logits = [self.attention(batch, class_match)]
        if class_match is not None and len(self.companions):
            tempered_logits = self.attention.tempered_logits(batch)
            for companion in self.companions.values():
                logits.append(tempered_logits + companion(batch)[:, class_match.nearest_class])
        return torch.stack(logits, dim=1)

    def pooled_parts(self, batch: Batch) -> PooledLogits:
        """Split a batch's pooled logits into three parts.

        Expert m has the weight w_m and the logits l_m = a l0 + r_m(x). l0 are the zero-shot logits,
        a is the temperature, and r_m is the expert's residual. x is the standardised image, equal
        to 0 for the mean training image. With the pooled residual R = sum_m w_m r_m, the pooled
        logits are

            sum_m w_m l_m = (sum_m w_m) a l0 + R(0) + (R(x) - R(0))
        """
        residual, tempered_logits, total_weight = self._pooled_residual(batch)
        mean_image = self._mean_image(batch)
        residual_at_mean, _, _ = self._pooled_residual(mean_image)
        return PooledLogits(
            zero_shot=total_weight * tempered_logits,
            class_offset=residual_at_mean,
            image_effect=residual - residual_at_mean,
        )

    def _pooled_residual(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Compute R(x) (B, K), the tempered logits (B, K), and sum_m w_m (), all in float64."""
        class_match = self.attention.match_classes(batch.text)
        tempered_logits = float64(self.attention.tempered_logits(batch, class_match))
        logits = float64(self.expert_logits(batch))
        tempered_of_every_expert = tempered_logits.unsqueeze(1)  # (B, 1, K)
        residual = pooled_logits(logits - tempered_of_every_expert, self.weights)
        weights = pool_weights(logits, self.weights)
        return residual, tempered_logits, weights.sum()

    def _mean_image(self, batch: Batch) -> Batch:
        """Make a batch with one row, the mean training image, and the candidates in ``batch``."""
        inputs = self.attention.inputs
        columns = dict(batch.columns)
        if inputs.has_features:
            columns[FEATURES] = inputs.features.mean.unsqueeze(0)
        first_row = batch.rows(slice(0, 1))
        mean_image = inputs.image.mean.unsqueeze(0)
        return dataclasses.replace(first_row, image=mean_image, columns=columns)


def _select_columns(
    residual: Callable[[Batch], Tensor], column_index: Tensor
) -> Callable[[Batch], Tensor]:
    """Return a function that computes the columns ``column_index`` (K,) of ``residual``."""

    def columns_of_residual(batch: Batch) -> Tensor:
        return residual(batch)[:, column_index]

    return columns_of_residual


def pooled_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted sum (B, K) float64 over the M experts' logits (B, M, K)."""
    # Logits are log-probabilities up to a constant. So a weighted sum of logits is the logarithm of
    # a product of probabilities: the log-linear pool q is in proportion to prod_m p_m^w_m.
    weight_of_expert = pool_weights(logits, weights)
    return torch.einsum("m,bmk->bk", weight_of_expert, logits)


def pool_weights(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weights (M,) for logits (B, M, K). A single expert has the weight 1."""
    n_experts = logits.shape[1]
    if n_experts > 1:
        return weights.to(logits.device)
    return torch.ones_like(logits[0, :, 0])
