"""Zero-shot answers without the matrix of all similarities: float32 tiles with a running maximum.

Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CELLS = 2**24
"""Logits that a batch may have.

They take 64 MiB in float32, and methods that look at them several times that in float64.
"""

TILE_CELLS = 2**22
"""Similarities held at a time where nobody asked for them.

They take 16 MiB, and what is read twice is still in the cache.
"""

TILE_ROWS = 1_024
"""Rows of a tile of many candidates.

The product of a nearly square tile is half as fast again as that of a long one.
"""

CACHED_CELLS = 2**21
"""Logits of a batch of which nothing else is looked at.

They take 8 MiB, and what is made of them stays near the processor.
"""

KEY_COLUMNS = 8
"""Columns of a row that its key is made of."""


class ZeroShot(NamedTuple):
    """What the logits say, without the logits."""

    prediction: Tensor  # (B,) int64 candidate of the largest logit; among equal ones the lowest
    max_logit: Tensor  # (B,) float32 largest logit
    log_norm: Tensor  # (B,) float32 log sum_j exp(logit_j)

    @property
    def max_probability(self) -> Tensor:
        """(B,) max_j p_j of the zero-shot posterior (MCM's confidence)."""
        return (self.max_logit - self.log_norm).exp()

    def at(self, rows: slice | Tensor) -> ZeroShot:
        """The same of some rows, by a slice or their indices."""
        return ZeroShot(self.prediction[rows], self.max_logit[rows], self.log_norm[rows])

    def to(self, device: torch.device | str) -> ZeroShot:
        """The same on another device."""
        return ZeroShot(
            self.prediction.to(device), self.max_logit.to(device), self.log_norm.to(device)
        )


def zero_shot(
    image: Tensor,
    text: Tensor,
    first: Tensor,
    logit_scale: float,
    logit_bias: float = 0.0,
    *,
    tile_cells: int = TILE_CELLS,
) -> ZeroShot:
    """Answer, largest logit and log-normaliser of logit_scale * image . text + logit_bias.

    They are computed tile by tile, in float32.

    Memory above the input (B, D), (K, D) and the result is a tile of ``tile_cells`` numbers at
    most. ``first`` (K,) is of ``first_equal``: a matrix product may round the same sum differently
    at the edge of a block, so that of equal candidates not the first one would win, but one that
    the size of the block favours.
    """
    if not len(text):
        raise ValueError("there is no candidate")
    square_rows = min(TILE_ROWS, len(text) // 4)  # with few candidates a tile is no square
    rows = min(max(cached_rows(len(text)), square_rows), tile_cells)
    columns = min(len(text), tile_cells // rows)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        parts = [
            _over_tiles(block, text, logit_scale, logit_bias, columns)
            for block in image.split(rows)
        ]
    place, largest, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return ZeroShot(first[place], largest, norm)


@dataclass(frozen=True, eq=False)
class Others:
    """What the candidates beside the answer weigh, from logits l (B, K), K > 1, in their precision.

    With the answer's logit l_a and the largest s of the others, their weights are e_j = exp((l_j -
    s) / T). One of them is 1, so their sum never vanishes. The odds of another answer, (1 - p) / p,
    are exp((s - l_a) / T) sum_j e_j: no bit of a small 1 - p is lost.
    """

    answer: Tensor  # (B, 1) int64
    own: Tensor  # (B,) the answer's logit l_a
    logits: Tensor  # (B, K) of the others; the answer's place is ``NEGLIGIBLE``
    second: Tensor  # (B, 1) the largest of them, s
    weight: Tensor  # (B, K) e_j; of the answer 0
    total: Tensor  # (B,) float64 sum of the weights
    temperature: float = 1.0  # T

    @classmethod
    def of(cls, logits: Tensor, answer: Tensor | None = None, temperature: float = 1.0) -> Others:
        """Those beside the answers (B, 1), by default the first of the largest logits."""
        if answer is None:
            answer = logits.argmax(dim=1, keepdim=True)
        own = logits.gather(1, answer).squeeze(1)
        beside = logits.scatter(1, answer, NEGLIGIBLE)
        second = beside.amax(dim=1, keepdim=True)
        # a power of two: torch takes twice as long for one of e
        weight = (beside - second).mul_(LOG2_E / temperature).exp2_()
        total = float64(weight.sum(dim=1))
        return cls(answer, own, beside, second, weight, total, temperature)

    @cached_property
    def gap(self) -> Tensor:
        """(B,) float64 the largest logit of the others less the answer's, over the temperature."""
        return (float64(self.second.squeeze(1)) - float64(self.own)) / self.temperature

    @property
    def log_odds(self) -> Tensor:
        """(B,) float64, without rounding where p is near zero or one."""
        return self.gap + self.total.log()

    @cached_property
    def odds(self) -> Tensor:
        """(B,) float64."""
        return self.gap.exp() * self.total

    @property
    def doubt(self) -> Tensor:
        """(B,) float64 1 - p of the answer."""
        return self.odds / (1 + self.odds)

    def zero_shot(self, first: Tensor) -> ZeroShot:
        """What the logits say, where the answers are the largest.

        ``first`` is as from ``first_equal``.
        """
        # log sum_j exp(l_j) = l_answer + log(1 + odds of the others): no small odds are lost
        log_norm = self.own + torch.log1p(self.odds).to(self.own)
        return ZeroShot(first[self.answer.squeeze(1)], self.own, log_norm)


NEGLIGIBLE = torch.finfo(torch.float32).min / 2
"""A logit below all others; finite, so that its product with a weight of 0 is 0."""

LOG2_E = math.log2(math.e)
"""exp(x) = 2^(x log2 e)."""


def first_equal(rows: Tensor) -> Tensor:
    """(N,) int64: for every row (N, D) float32 the first that equals it.

    It is what ``torch.unique`` of the rows finds, but fast: a sort of whole rows costs most, so
    only rows whose keys meet are sorted.
    """
    _, group, count = torch.unique(row_keys(rows), return_inverse=True, return_counts=True)
    unsure = (count[group] > 1).nonzero().squeeze(1)
    first = torch.arange(len(rows), device=rows.device)
    if len(unsure):
        _, same = torch.unique(rows[unsure], dim=0, return_inverse=True)
        # the lowest position of each group of equal rows, then back to each row of the group
        beyond = torch.full_like(unsure, len(rows))
        lowest = beyond.scatter_reduce(0, same, unsure, "amin")
        first[unsure] = lowest[same]
    return first


def row_keys(rows: Tensor) -> Tensor:
    """(N,) int64 made of a few columns of (N, D) float32: equal rows have equal ones."""
    columns = (rows[:, :KEY_COLUMNS] + 0.0).contiguous()  # + 0: -0 equals 0
    bits = columns.view(torch.int32).long()
    # a polynomial in 31: the same numbers in other columns make another key
    powers = 31 ** torch.arange(bits.shape[1], device=rows.device)
    return (bits * powers).sum(dim=1)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (B, ...) at the positions ``index`` (B,) of rows (N, ...).

    Where they follow one another it is a view.
    """
    n = len(index)
    if not n or int(index.min()) < 0:
        return rows[index]
    start = int(index[0])
    spans_n = int(index[-1]) - start == n - 1  # seen at once, before all are looked at
    if spans_n and bool((index.diff() == 1).all()):
        return rows[start : start + n]
    return rows.index_select(0, index)  # takes a third of the time of rows[index]


def cached_rows(n_candidates: int) -> int:
    """Rows whose logits stay near the processor, but enough of them for a product."""
    return min(max(CACHED_CELLS // max(n_candidates, 1), 256), 32_768)


def row_blocks(
    n_rows: int, n_candidates: int, size: int, max_cells: int = MAX_CELLS
) -> Iterator[slice]:
    """Slices of at most ``size`` rows whose logits of all candidates are ``max_cells`` at most."""
    step = max(min(size, max_cells // max(n_candidates, 1)), 1)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def nearest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) of every row (N, D) with the known ones (M, D), and which it is (N,).

    Memory is bounded.
    """
    if torch.compiler.is_exporting():  # a graph's numbers of rows are open
        cosine, index = (rows @ known.T).max(dim=1)
        return cosine, index
    if torch.equal(rows, known):  # as a rule: the candidates of the fit
        return torch.ones_like(rows[:, 0]), torch.arange(len(rows), device=rows.device)
    cosines = []
    indices = []
    for block in row_blocks(len(rows), len(known), len(rows)):
        cosine, index = (rows[block] @ known.T).max(dim=1)
        cosines.append(cosine)
        indices.append(index)
    return torch.cat(cosines), torch.cat(indices)


def _over_tiles(image: Tensor, text: Tensor, scale: float, bias: float, columns: int) -> ZeroShot:
    """Of some rows and all candidates, of which a tile takes so many ``columns``."""
    tiles = (
        _of_tile((image @ part.T).mul_(scale).add_(bias), number * columns)
        for number, part in enumerate(text.split(columns))
    )
    return functools.reduce(_merge, tiles)


def _of_tile(logits: Tensor, first: int) -> ZeroShot:
    """Of the candidates ``first`` and following."""
    # not torch.max(dim): of equal values it documents no order
    place = logits.argmax(dim=1)
    return ZeroShot(place + first, logits.amax(dim=1), logits.logsumexp(dim=1))


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
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()
