"""The zero-shot posterior, in the precision that ranking needs."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.similarity import float64
from vilu.types import Batch


def log_posterior(batch: Batch, temperature: float | Tensor = 1.0) -> Tensor:
    """(B, K) float64 log p, p = softmax(logits / temperature).

    log p_max = -log1p(sum of the other exponentials), so confident rows keep their order where p_max itself rounds to
    one: at CLIP's scale a float32 softmax ties many of them.

    Args:
        batch: Some rows and their candidates.
        temperature: Positive number, or one per row (B, 1).
    """
    logits = float64(batch.logits)
    answer = batch.prediction[:, None].to(logits.device)
    below = (logits - logits.gather(1, answer)) / temperature
    others = below.exp().scatter(1, answer, 0.0).sum(dim=-1, keepdim=True)
    return below - torch.log1p(others)
