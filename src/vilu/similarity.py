"""Zero-shot answers without the matrix of all similarities: tiles in float32 with a running maximum.

Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CELLS = 2**25
"""Similarities held at a time: 128 MiB in float32."""


class ZeroShot(NamedTuple):
    """What the logits say, without the logits.

    Attributes:
        prediction: (B,) int64 candidate of the largest logit; among equal ones the lowest.
        max_logit: (B,) float32 largest logit.
        log_norm: (B,) float32 log sum_j exp(logit_j).
    """

    prediction: Tensor
    max_logit: Tensor
    log_norm: Tensor

    @property
    def max_probability(self) -> Tensor:
        """(B,) max_j p_j of the zero-shot posterior (MCM's confidence)."""
        return (self.max_logit - self.log_norm).exp()


def zero_shot(image: Tensor, text: Tensor, logit_scale: float, logit_bias: float = 0.0) -> ZeroShot:
    """Answer, largest logit and log-normaliser of logit_scale * image . text + logit_bias, tile by tile, in float32.

    Memory above the input and the result is one tile of ``MAX_CELLS`` numbers, whatever B and K. Where all fits into
    one tile this is the dense computation, bit for bit.

    Args:
        image: (B, D) unit-norm queries.
        text: (K, D) unit-norm candidates.
        logit_scale: Multiplier of the cosine.
        logit_bias: Added to every logit.
    """
    if not len(image):
        empty = image.new_empty(0)
        return ZeroShot(torch.empty(0, dtype=torch.int64, device=image.device), empty, empty)
    columns = min(len(text), MAX_CELLS)
    rows = max(MAX_CELLS // columns, 1)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        parts = [_rows(block, text, logit_scale, logit_bias, columns) for block in image.split(rows)]
    return ZeroShot(*(torch.cat(part) for part in zip(*parts, strict=True)))


def of_logits(logits: Tensor, first: int = 0) -> ZeroShot:
    """The same from logits (B, K) that are there, of the candidates ``first`` and following."""
    # not torch.max(dim): of equal values it documents no order
    place = logits.argmax(dim=1)
    return ZeroShot(place + first, logits.gather(1, place[:, None]).squeeze(1), logits.logsumexp(dim=1))


def row_blocks(n_rows: int, n_candidates: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows whose similarities with all candidates fit into ``MAX_CELLS``."""
    step = max(min(size, MAX_CELLS // max(n_candidates, 1)), 1)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _rows(image: Tensor, text: Tensor, scale: float, bias: float, columns: int) -> ZeroShot:
    best: ZeroShot | None = None
    for start in range(0, len(text), columns):
        tile = of_logits(image @ text[start : start + columns].T * scale + bias, start)
        best = tile if best is None else _merge(best, tile)
    if best is None:
        raise ValueError("there is no candidate")
    return best


def _merge(left: ZeroShot, right: ZeroShot) -> ZeroShot:
    """Of two ranges of candidates, the lower one first: it wins where both are equal."""
    higher = right.max_logit > left.max_logit
    return ZeroShot(
        torch.where(higher, right.prediction, left.prediction),
        torch.where(higher, right.max_logit, left.max_logit),
        torch.logaddexp(left.log_norm, right.log_norm),
    )
