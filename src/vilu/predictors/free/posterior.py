"""The zero-shot posterior, in the precision that ranking needs."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.types import Batch


def log_posterior(batch: Batch) -> Tensor:
    """(B, K) float64 log p, p = softmax(logits).

    log p_max = -log1p(sum of the other exponentials), so confident rows keep their order where p_max itself rounds to
    one: at CLIP's scale a float32 softmax ties many of them.
    """
    logits = batch.logits.double()
    answer = batch.prediction[:, None]
    below = logits - logits.gather(1, answer)
    others = below.exp().scatter(1, answer, 0.0).sum(dim=-1, keepdim=True)
    return below - torch.log1p(others)
