"""Zero-shot answers without the matrix of all similarities: tiles in float32 with a running maximum.

Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CELLS = 2**24
"""Logits that a batch may have: 64 MiB in float32, and methods that look at them need several times that in float64."""

TILE_CELLS = 2**22
"""Similarities held at a time where nobody asked for them: 16 MiB, and what is read twice is still in the cache."""

KEY_COLUMNS = 8


class ZeroShot(NamedTuple):
    """What the logits say, without the logits."""

    prediction: Tensor  # (B,) int64 candidate of the largest logit; among equal ones the lowest
    max_logit: Tensor  # (B,) float32 largest logit
    log_norm: Tensor  # (B,) float32 log sum_j exp(logit_j)

    @property
    def max_probability(self) -> Tensor:
        """(B,) max_j p_j of the zero-shot posterior (MCM's confidence)."""
        return (self.max_logit - self.log_norm).exp()


def zero_shot(image: Tensor, text: Tensor, first: Tensor, logit_scale: float, logit_bias: float = 0.0) -> ZeroShot:
    """Answer, largest logit and log-normaliser of logit_scale * image . text + logit_bias, tile by tile, in float32.

    Memory above the input (B, D), (K, D) and the result is one tile of ``TILE_CELLS`` numbers. ``first`` (K,) is of
    ``first_equal``: a matrix product may round the same sum differently at the edge of a block, so that of equal
    candidates not the first one would win, but one that the size of the block favours.
    """
    if not len(text):
        raise ValueError("there is no candidate")
    columns = min(len(text), TILE_CELLS)
    rows = TILE_CELLS // columns
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        parts = [_rows(block, text, logit_scale, logit_bias, columns) for block in image.split(rows)]
    place, largest, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return ZeroShot(first[place], largest, norm)


def of_logits(logits: Tensor, first: Tensor) -> ZeroShot:
    """The same from logits (B, K) that are there; ``first`` as from ``first_equal`` of the candidates."""
    # not torch.max(dim): of equal values it documents no order
    place = logits.argmax(dim=1)
    return ZeroShot(first[place], logits.gather(1, place[:, None]).squeeze(1), logits.logsumexp(dim=1))


def first_equal(rows: Tensor) -> Tensor:
    """(N,) int64: for every row (N, D) float32 the first that equals it; as by ``torch.unique``, but fast."""
    # Equal rows have equal keys, made of few columns; only rows of equal keys are compared in full.
    bits = (rows[:, :KEY_COLUMNS] + 0.0).contiguous().view(torch.int32).long()  # + 0: -0 equals 0
    key = (bits * 31 ** torch.arange(bits.shape[1], device=rows.device)).sum(dim=1)
    _, group, count = torch.unique(key, return_inverse=True, return_counts=True)
    unsure = (count[group] > 1).nonzero().squeeze(1)
    first = torch.arange(len(rows), device=rows.device)
    if len(unsure):
        _, same = torch.unique(rows[unsure], dim=0, return_inverse=True)
        first[unsure] = torch.full_like(unsure, len(rows)).scatter_reduce(0, same, unsure, "amin")[same]
    return first


def row_blocks(n_rows: int, n_candidates: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows whose similarities with all candidates fit into ``MAX_CELLS``."""
    step = max(min(size, MAX_CELLS // max(n_candidates, 1)), 1)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def nearest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) of every row (N, D) with the known ones (M, D), and which it is (N,), in bounded memory."""
    if torch.compiler.is_exporting():  # a graph's numbers of rows are open
        cosine, place = (rows @ known.T).max(dim=1)
        return cosine, place
    if torch.equal(rows, known):  # as a rule: the candidates of the fit
        return torch.ones_like(rows[:, 0]), torch.arange(len(rows), device=rows.device)
    blocks = [(rows[block] @ known.T).max(dim=1) for block in row_blocks(len(rows), len(known), len(rows))]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def _rows(image: Tensor, text: Tensor, scale: float, bias: float, columns: int) -> ZeroShot:
    tiles = (
        _of_tile((image @ part.T).mul_(scale).add_(bias), number * columns)
        for number, part in enumerate(text.split(columns))
    )
    return functools.reduce(_merge, tiles)


def _of_tile(logits: Tensor, first: int) -> ZeroShot:
    """As ``of_logits``, of the candidates ``first`` and following; in the memory of the logits."""
    place = logits.argmax(dim=1)
    largest = logits.gather(1, place[:, None])
    norm = logits.sub_(largest).exp_().sum(dim=1).log_()
    return ZeroShot(place + first, largest.squeeze(1), norm + largest.squeeze(1))


def _merge(left: ZeroShot, right: ZeroShot) -> ZeroShot:
    """Of two ranges of candidates, the lower one first: it wins where both are equal."""
    higher = right.max_logit > left.max_logit
    return ZeroShot(
        torch.where(higher, right.prediction, left.prediction),
        torch.where(higher, right.max_logit, left.max_logit),
        torch.logaddexp(left.log_norm, right.log_norm),
    )


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
