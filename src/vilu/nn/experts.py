"""What stands beside the supervised attention where the candidates are the training classes, and all of it together."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.nn.supervised import Inputs, SupervisedAttention
from vilu.nn.train import Rows
from vilu.similarity import float64
from vilu.types import Batch

RIDGE = 0.1
GAIN = 8.0
"""From a residual probability to a logit; the pool weighs it anyway."""


class Adapter(nn.Module):
    """A small network of the image, to be added to the tempered zero-shot logits of the training classes.

    Args:
        inputs: Fitted.
        n_classes: Number of training classes.
        hidden: Width of the one hidden layer.
        dropout: Rate after it.
    """

    def __init__(self, inputs: Inputs, n_classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.first, self.last = nn.Linear(inputs.width, hidden), nn.Linear(hidden, n_classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        rows = self.inputs(batch) * math.sqrt(self.inputs.width)  # coordinates of variance one on average
        logits: Tensor = self.last(self.dropout(functional.gelu(self.first(rows))))
        return logits


class Memory(nn.Module):
    """Attention over labelled images: kernel ridge regression on what the zero-shot posterior gets wrong.

    8 k(x) (K + 0.1 I)^-1 (Y - P), with k the Gaussian kernel exp(-|x - x'|^2 / 2) of ``Inputs``, Y the labels
    and P the tempered zero-shot posterior of the M training images; to be added to the tempered zero-shot logits.

    Args:
        inputs: Fitted.
        n_rows: M.
        n_classes: Number of training classes.
    """

    def __init__(self, inputs: Inputs, n_rows: int, n_classes: int) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.bank = nn.Buffer(torch.zeros(n_rows, inputs.width))
        self.values = nn.Buffer(torch.zeros(n_rows, n_classes))

    def kernel(self, rows: Tensor) -> Tensor:
        """(N, M) float64 of inputs (N, D + F) with the bank, on the CPU where the device has no float64.

        Values of both signs and a size of ten cancel to what the rows are told apart by: in float32 an error of 1e-4.
        """
        x, bank = float64(rows), float64(self.bank)
        squares = x.square().sum(dim=1)[:, None] + bank.square().sum(dim=1) - 2 * x @ bank.T
        return torch.exp(-squares.clamp_min(0) / 2)

    @classmethod
    def of(cls, attention: SupervisedAttention, rows: Rows) -> Memory:
        """Remember labelled rows, all at once: there are few of them."""
        (batch,) = (batch.to(attention.classes.device) for batch in rows.steps(len(rows.index)))
        memory = cls(attention.inputs, len(batch.index), len(batch.text)).to(attention.classes.device)
        memory.bank.copy_(attention.inputs(batch))
        missing = functional.one_hot(batch.target, len(batch.text)) - attention.offset(batch).softmax(dim=-1)
        gram = memory.kernel(memory.bank).cpu()
        gram.diagonal().add_(RIDGE)
        memory.values.copy_(GAIN * torch.cholesky_solve(missing.cpu().double(), torch.linalg.cholesky(gram)))
        return memory

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        rows = self.inputs(batch)
        return (self.kernel(rows) @ float64(self.values)).to(rows)


class Experts(nn.Module):
    """Several opinions on which candidate is true.

    Args:
        attention: Scores any candidates.
        companions: Adapters and memories, which know the training classes only.
    """

    def __init__(self, attention: SupervisedAttention, companions: dict[str, Adapter | Memory]) -> None:
        super().__init__()
        self.attention, self.companions = attention, nn.ModuleDict(companions)

    def forward(self, batch: Batch) -> Tensor:
        """(B, M, K) logits: of all experts where every candidate is a training class, else of the attention (M = 1)."""
        match = self.attention.match(batch.text)
        logits = [self.attention(batch, match)]
        if bool(match.known.all()):
            offset = self.attention.offset(batch)
            logits += [offset + companion(batch)[:, match.row] for companion in self.companions.values()]
        return torch.stack(logits, dim=1)
