"""How the VLM's own answer fares under another posterior than its own."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.similarity import float64
from vilu.types import Batch


def failure_log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) float64 log((1 - p) / p), p the mass of the zero-shot answer, without rounding where p is near zero or one.

    Args:
        logits: (B, K) of any posterior; its largest may be at another candidate than the answer.
        batch: Its answers, and which candidates are the same.
    """
    logits = float64(logits)
    alike = batch.alike(batch.prediction).to(logits.device)
    others, own = (logits.masked_fill(mask, -torch.inf).logsumexp(dim=-1) for mask in (alike, ~alike))
    return others - own
