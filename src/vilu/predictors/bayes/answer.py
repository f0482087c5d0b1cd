"""How the VLM's own answer fares under another posterior than its own."""

from __future__ import annotations

import torch
from torch import Tensor

from vilu.predictors.free.posterior import float64


def failure_log_odds(logits: Tensor, answer: Tensor) -> Tensor:
    """(B,) float64 log((1 - p) / p), p = softmax(logits)[answer], without rounding where p is near zero or one.

    Args:
        logits: (B, K) of any posterior; its largest may be at another candidate than the answer.
        answer: (B,) int64, the zero-shot answer.
    """
    logits = float64(logits)
    index = answer[:, None].to(logits.device)
    others = logits.scatter(1, index, -torch.inf).logsumexp(dim=-1)
    return others - logits.gather(1, index).squeeze(1)
