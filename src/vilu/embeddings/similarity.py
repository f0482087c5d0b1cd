"""Zero-shot answers without the matrix of all similarities.

The similarities are computed in float32 tiles, with a running maximum over the tiles.
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
"""Maximum number of logits of a batch.

The logits take 64 MiB in float32. A method that uses the logits may need several times as much
memory for its float64 copies.
"""

TILE_CELLS = 2**22
"""Maximum number of similarities in memory at a time, if only their summary is needed.

A tile of this size takes 16 MiB. It is still in the cache when it is read a second time.
"""

TILE_ROWS = 1_024
"""Rows of a tile where there are many candidates.

The matrix product of a nearly square tile is 1.5 times as fast as that of a long, narrow tile.
"""

CACHED_CELLS = 2**19
"""Number of logits of a batch that stay in the cache together with results of the same size.

The logits take 2 MiB. Products of fewer rows are slow, and larger results do not stay in the cache.
"""

KEY_COLUMNS = 8
"""Number of leading columns of a row from which its key is computed."""


class ZeroShot(NamedTuple):
    """Summary of the logits (B, K): the answers, the largest logits and the log-normalisers."""

    prediction: Tensor  # (B,) int64 candidate of the largest logit; among equal logits the lowest
    max_logit: Tensor  # (B,) float32 largest logit
    log_norm: Tensor  # (B,) float32 log sum_j exp(logit_j)

    @property
    def max_probability(self) -> Tensor:
        """Largest probability (B,) max_j p_j of the zero-shot posterior (the confidence of MCM)."""
        return (self.max_logit - self.log_norm).exp()

    def at(self, rows: slice | Tensor) -> ZeroShot:
        """The summary of some rows, which are given by a slice or by their indices."""
        return ZeroShot(self.prediction[rows], self.max_logit[rows], self.log_norm[rows])

    def to(self, device: torch.device | str) -> ZeroShot:
        """The same summary on another device."""
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

    They are computed in float32, tile by tile. Beside the images (B, D), the texts (K, D) and the
    result, at most one tile of ``tile_cells`` numbers is in memory.

    ``first`` (K,) is the result of ``first_equal`` for the texts. It replaces an answer by the
    first candidate that equals the answer. Without it, the winner among equal candidates would
    depend on the size of the tiles, because a matrix product rounds differently at the edge of a
    block.
    """
    if not len(text):
        raise ValueError("there is no candidate")
    # with fewer than 4 * TILE_ROWS candidates a tile gets fewer rows
    square_rows = min(TILE_ROWS, len(text) // 4)
    rows = min(max(cached_rows(len(text)), square_rows), tile_cells)
    columns = min(len(text), tile_cells // rows)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        parts = [
            _over_tiles(block, text, logit_scale, logit_bias, columns)
            for block in image.split(rows)
        ]
    prediction, largest, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return ZeroShot(first[prediction], largest, norm)


@dataclass(frozen=True, eq=False)
class Others:
    """Softmax weights of all candidates except the answer, from logits l (B, K) with K > 1.

    The logits keep their precision. With l_a the logit of the answer, s the largest logit of the
    other candidates and T the temperature, the weight of another candidate j is

        e_j = exp((l_j - s) / T)

    The largest weight is 1, so the sum of the weights is never 0. With p the probability of the
    answer, the odds against the answer are

        (1 - p) / p = exp((s - l_a) / T) sum_j e_j

    Computed in this way, a small 1 - p loses no digits.
    """

    answer: Tensor  # (B, 1) int64 index of the answer
    own: Tensor  # (B,) logit l_a of the answer
    logits: Tensor  # (B, K) logits of the other candidates; ``NEGLIGIBLE`` in the answer's column
    second: Tensor  # (B, 1) largest logit s of the other candidates
    weight: Tensor  # (B, K) weights e_j; 0 in the answer's column
    total: Tensor  # (B,) float64 sum of the weights
    temperature: float = 1.0  # T

    @classmethod
    def of(cls, logits: Tensor, answer: Tensor | None = None, temperature: float = 1.0) -> Others:
        """The weights beside the answers (B, 1).

        By default the answer is the candidate of the largest logit, the first of equal logits.
        """
        if answer is None:
            answer = logits.argmax(dim=1, keepdim=True)
        own = logits.gather(1, answer).squeeze(1)
        beside = logits.scatter(1, answer, NEGLIGIBLE)
        second = beside.amax(dim=1, keepdim=True)
        # exp(x) is computed as 2^(x log2 e), because torch computes exp2 twice as fast as exp
        weight = (beside - second).mul_(LOG2_E / temperature).exp2_()
        total = float64(weight.sum(dim=1))
        return cls(answer, own, beside, second, weight, total, temperature)

    @cached_property
    def gap(self) -> Tensor:
        """Gap (s - l_a) / T (B,) float64: largest other logit minus logit of the answer, over T."""
        return (float64(self.second.squeeze(1)) - float64(self.own)) / self.temperature

    @property
    def log_odds(self) -> Tensor:
        """Log-odds log((1 - p) / p) (B,) float64, accurate even if p is near zero or one."""
        return self.gap + self.total.log()

    @cached_property
    def odds(self) -> Tensor:
        """Odds (1 - p) / p (B,) float64 against the answer."""
        return self.gap.exp() * self.total

    @property
    def doubt(self) -> Tensor:
        """Doubt 1 - p (B,) float64, where p is the probability of the answer."""
        return self.odds / (1 + self.odds)

    def zero_shot(self, first: Tensor) -> ZeroShot:
        """The summary of the logits, if every answer has the largest logit of its row.

        ``first`` (K,) is the result of ``first_equal`` for the candidates.
        """
        # log sum_j exp(l_j) = l_a + log(1 + odds): log1p keeps the digits of small odds
        log_norm = self.own + torch.log1p(self.odds).to(self.own)
        return ZeroShot(first[self.answer.squeeze(1)], self.own, log_norm)


NEGLIGIBLE = torch.finfo(torch.float32).min / 2
"""A logit below all other logits. It is finite, so that its product with a weight of 0 is 0."""

LOG2_E = math.log2(math.e)
"""exp(x) = 2^(x log2 e)."""


def first_equal(rows: Tensor) -> Tensor:
    """Index (N,) int64, for every row (N, D) float32, of the first row that equals it.

    ``torch.unique`` of the rows would give the same groups of equal rows. But it sorts whole rows,
    which is slow. Here only rows whose keys occur more than once are sorted.
    """
    _, group, count = torch.unique(row_keys(rows), return_inverse=True, return_counts=True)
    repeated = (count[group] > 1).nonzero().squeeze(1)  # rows whose key occurs more than once
    first = torch.arange(len(rows), device=rows.device)
    if len(repeated):
        _, same = torch.unique(rows[repeated], dim=0, return_inverse=True)
        # find the lowest index of each group of equal rows, then give it to every row of the group
        n_rows = torch.full_like(repeated, len(rows))
        lowest = n_rows.scatter_reduce(0, same, repeated, "amin")
        first[repeated] = lowest[same]
    return first


def row_keys(rows: Tensor) -> Tensor:
    """Keys (N,) int64 of the rows (N, D) float32, from their first columns.

    Equal rows have equal keys. Different rows may have equal keys, too.
    """
    columns = (rows[:, :KEY_COLUMNS] + 0.0).contiguous()  # adding 0 turns -0 into 0
    bits = columns.view(torch.int32).long()
    # The key is a polynomial in 31, so that the same numbers in another order give another key.
    powers = 31 ** torch.arange(bits.shape[1], device=rows.device)
    return (bits * powers).sum(dim=1)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (B, ...) at the indices ``index`` (B,) of ``rows`` (N, ...).

    If the indices are consecutive, the result is a view and nothing is copied.
    """
    n = len(index)
    if not n or int(index.min()) < 0:
        return rows[index]
    start = int(index[0])
    spans_n = int(index[-1]) - start == n - 1  # a cheap test before all indices are compared
    if spans_n and bool((index.diff() == 1).all()):
        return rows[start : start + n]
    return rows.index_select(0, index)  # takes a third of the time of rows[index]


def cached_rows(n_candidates: int) -> int:
    """Number of rows whose logits fit into the cache, from 256 to 32,768.

    A matrix product of fewer rows would be slow.
    """
    return min(max(CACHED_CELLS // max(n_candidates, 1), 256), 32_768)


def row_blocks(
    n_rows: int, n_candidates: int, size: int, max_cells: int = MAX_CELLS
) -> Iterator[slice]:
    """Yield slices of at most ``size`` rows with at most ``max_cells`` logits each."""
    step = max(min(size, max_cells // max(n_candidates, 1)), 1)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def nearest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) of every row (N, D) with the known rows (M, D), and its index (N,).

    The cosines are computed block by block, so memory is bounded.
    """
    if torch.compiler.is_exporting():  # in an exported graph the number of rows is not fixed
        cosine, index = (rows @ known.T).max(dim=1)
        return cosine, index
    if torch.equal(rows, known):  # the usual case: the rows are the candidates of the fit
        return rows.new_ones(len(rows)), torch.arange(len(rows), device=rows.device)
    cosines = []
    indices = []
    for block in row_blocks(len(rows), len(known), len(rows)):
        cosine, index = (rows[block] @ known.T).max(dim=1)
        cosines.append(cosine)
        indices.append(index)
    return torch.cat(cosines), torch.cat(indices)


def _over_tiles(image: Tensor, text: Tensor, scale: float, bias: float, columns: int) -> ZeroShot:
    """Summary of the logits of some images and all texts, from tiles of ``columns`` texts."""
    tiles = (
        _of_tile((image @ part.T).mul_(scale).add_(bias), number * columns)
        for number, part in enumerate(text.split(columns))
    )
    return functools.reduce(_merge, tiles)


def _of_tile(logits: Tensor, first_candidate: int) -> ZeroShot:
    """Summary of the logits (B, k) of k consecutive candidates from ``first_candidate`` on."""
    # torch.max(dim) is not used: its documentation does not define which of equal values it takes
    column = logits.argmax(dim=1)
    return ZeroShot(column + first_candidate, logits.amax(dim=1), logits.logsumexp(dim=1))


def _merge(left: ZeroShot, right: ZeroShot) -> ZeroShot:
    """Merge the summaries of two ranges of candidates; ``left`` has the lower indices.

    Where the largest logits are equal, the answer is that of ``left``.
    """
    higher = right.max_logit > left.max_logit
    return ZeroShot(
        torch.where(higher, right.prediction, left.prediction),
        torch.where(higher, right.max_logit, left.max_logit),
        torch.logaddexp(left.log_norm, right.log_norm),
    )


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64; on the CPU, if the device of the tensor has no float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()
