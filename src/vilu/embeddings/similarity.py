"""Zero-shot answers, and the right answers in a pool.

The matrix of all similarities is never in memory. The similarities are computed in float32,
tile by tile. The tile summaries are merged.

Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BATCH_LOGITS = 2**24
"""Maximum number of logits (rows times candidates) in a batch.

This number of logits takes 64 MiB in float32. A method may need several times as much memory for
float64 copies of the logits.
"""

MAX_TILE_LOGITS = 2**22
"""Maximum number of similarities in memory at a time, if only a summary is needed.

A tile of this size takes 16 MiB. So the tile is still in the cache for a second reading.
"""

TILE_ROWS = 1_024
"""Number of rows in a tile if there are at least 4,096 candidates.

The tile then has 4,096 columns. The matrix product for such a tile is 1.5 times as fast as the
product for a long, narrow tile.
"""

CACHED_LOGITS = 2**19
"""Number of logits that stay in the cache together with results of the same size.

These logits take 2 MiB. With fewer logits, the matrix products are slow. With more logits, the
results do not stay in the cache.
"""

KEY_COLUMNS = 8
"""Number of leading columns from which ``row_keys`` computes a row's key."""


class ZeroShot(NamedTuple):
    """Summary of the logits (B, K): the answers, the largest logits and the log-normalisers."""

    prediction: Tensor  # (B,) int64 candidate with the largest logit, the first of equal logits
    max_logit: Tensor  # (B,) float32 largest logit
    log_norm: Tensor  # (B,) float32 log sum_j exp(logit_j)

    @property
    def max_probability(self) -> Tensor:
        """Largest probability (B,) max_j p_j in the zero-shot posterior (MCM's confidence)."""
        return (self.max_logit - self.log_norm).exp()

    def take(self, rows: slice | Tensor) -> ZeroShot:
        """Return the summary of some rows, selected by a slice or by indices."""
        return ZeroShot(
            prediction=self.prediction[rows],
            max_logit=self.max_logit[rows],
            log_norm=self.log_norm[rows],
        )

    def to(self, device: torch.device | str) -> ZeroShot:
        """Copy the summary to another device."""
        return ZeroShot(
            prediction=self.prediction.to(device),
            max_logit=self.max_logit.to(device),
            log_norm=self.log_norm.to(device),
        )


def zero_shot(
    image: Tensor,
    text: Tensor,
    first_equal_index: Tensor,
    logit_scale: float,
    logit_bias: float = 0.0,
    *,
    max_tile_logits: int = MAX_TILE_LOGITS,
) -> ZeroShot:
    """Find answers, largest logits and log-normalisers of logit_scale * image . text + logit_bias.

    All three are computed in float32, tile by tile. Besides the images (B, D), the texts (K, D) and
    the result, at most one tile with ``max_tile_logits`` numbers is in memory.

    ``first_equal_index`` (K,) is the result of ``index_of_first_equal`` for the texts. Every answer
    is replaced by the first equal candidate. Without this step, the answer among equal candidates
    would depend on the tile size, because a matrix product rounds differently at a block's edge.
    """
    if not len(text):
        raise ValueError("there is no candidate")
    n_candidates = len(text)
    # A tile should be at most four times as wide as high. With ``TILE_ROWS`` rows and more than
    # 4,096 candidates the tile would be wider, but ``max_tile_logits`` limits its columns below.
    rows_of_wide_tile = min(TILE_ROWS, n_candidates // 4)
    wanted_rows = max(n_rows_in_cache(n_candidates), rows_of_wide_tile)
    n_rows = min(wanted_rows, max_tile_logits)
    n_columns = min(n_candidates, max_tile_logits // n_rows)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        summaries = [
            _summary_over_tiles(block, text, logit_scale, logit_bias, n_columns)
            for block in image.split(n_rows)
        ]
    prediction = torch.cat([summary.prediction for summary in summaries])
    max_logit = torch.cat([summary.max_logit for summary in summaries])
    log_norm = torch.cat([summary.log_norm for summary in summaries])
    return ZeroShot(first_equal_index[prediction], max_logit=max_logit, log_norm=log_norm)


@dataclass(frozen=True, eq=False)
class RivalWeights:
    """Softmax weights of all candidates except the answer, from logits l (B, K) with K > 1.

    A rival is any candidate except the answer. Let l_a be the logit of the answer, s the largest
    logit of a rival, and T the temperature. The weight of rival j is

        e_j = exp((l_j - s) / T)

    The largest weight is 1, so the sum of the weights is never 0. If p is the answer's
    probability, the odds against the answer are

        (1 - p) / p = exp((s - l_a) / T) sum_j e_j

    A small 1 - p is computed from the odds, because the subtraction would lose digits.

    ``answer_logit``, ``logits``, ``max_rival_logit`` and ``weight`` have the same number format as
    the input logits.
    """

    answer: Tensor  # (B, 1) int64 index of the answer
    answer_logit: Tensor  # (B,) the answer's logit l_a
    logits: Tensor  # (B, K) logits of the rivals. ``NEGLIGIBLE_LOGIT`` in the answer's column
    max_rival_logit: Tensor  # (B, 1) largest rival logit s
    weight: Tensor  # (B, K) weights e_j. 0 in the answer's column
    total_weight: Tensor  # (B,) float64 sum of the weights
    temperature: float = 1.0  # T

    @classmethod
    def from_logits(
        cls, logits: Tensor, answer: Tensor | None = None, temperature: float = 1.0
    ) -> RivalWeights:
        """Compute the weights of all candidates except the answers (B, 1).

        By default the answer is the candidate with the largest logit, the first of equal logits.
        """
        if answer is None:
            answer = logits.argmax(dim=1, keepdim=True)
        answer_logit = logits.gather(1, answer).squeeze(1)
        rival_logits = logits.scatter(1, answer, NEGLIGIBLE_LOGIT)
        max_rival_logit = rival_logits.amax(dim=1, keepdim=True)
        # exp(x) is computed as 2^(x log2 e), because torch computes exp2 twice as fast as exp
        weight = (rival_logits - max_rival_logit).mul_(LOG2_E / temperature).exp2_()
        total_weight = float64(weight.sum(dim=1))
        return cls(
            answer=answer,
            answer_logit=answer_logit,
            logits=rival_logits,
            max_rival_logit=max_rival_logit,
            weight=weight,
            total_weight=total_weight,
            temperature=temperature,
        )

    @cached_property
    def logit_gap(self) -> Tensor:
        """Gap (s - l_a) / T (B,) float64 between the largest rival logit and the answer's logit."""
        max_rival_logit = self.max_rival_logit.squeeze(1)
        difference = float64(max_rival_logit) - float64(self.answer_logit)
        return difference / self.temperature

    @property
    def log_odds(self) -> Tensor:
        """Log-odds log((1 - p) / p) (B,) float64, accurate even if p is near 0 or 1."""
        return self.logit_gap + self.total_weight.log()

    @cached_property
    def ratio(self) -> Tensor:
        """Largest probability of a rival, divided by the answer's probability: (B,) float64.

        The ratio is at most exp(``MAX_LOGIT_GAP``). An infinite ratio would give 1 - p = NaN.
        """
        return self.logit_gap.clamp(max=MAX_LOGIT_GAP).exp()

    @cached_property
    def odds(self) -> Tensor:
        """Odds (1 - p) / p (B,) float64 against the answer."""
        return self.ratio * self.total_weight

    @property
    def total_probability(self) -> Tensor:
        """Probability 1 - p (B,) float64 of all rivals. p is the probability of the answer."""
        return self.odds / (1 + self.odds)

    def zero_shot(self, first_equal_index: Tensor) -> ZeroShot:
        """Return the summary of the logits.

        Every answer must have the largest logit in its row, and the temperature must be 1.
        ``first_equal_index`` (K,) is the result of ``index_of_first_equal`` for the candidates.
        """
        # p = exp(l_a) / sum_j exp(l_j), and 1 / p = 1 + odds.
        # Therefore log sum_j exp(l_j) = l_a + log(1 + odds). log1p keeps the digits of small odds.
        log_inverse_probability = torch.log1p(self.odds)
        log_norm = self.answer_logit + log_inverse_probability.to(self.answer_logit)
        prediction = first_equal_index[self.answer.squeeze(1)]
        return ZeroShot(prediction, max_logit=self.answer_logit, log_norm=log_norm)


MAX_LOGIT_GAP = 600.0
"""Largest gap whose exponential is computed: exp(600) is 4e260. At this gap, 1 - p rounds to 1.

A gap is positive only if another answer is judged than the zero-shot answer.
"""

NEGLIGIBLE_LOGIT = torch.finfo(torch.float32).min / 2
"""A logit below all other logits.

The value is finite, so that its product with a weight of 0 is 0. Minus infinity times 0 would be
NaN.
"""

LOG2_E = math.log2(math.e)
"""Logarithm of e to base 2: exp(x) = 2^(x LOG2_E)."""


def index_of_first_equal(rows: Tensor) -> Tensor:
    """Return the index (N,) int64 of the first equal row, for every row (N, D) float32.

    ``torch.unique`` on all rows would also find the groups of equal rows, but would be slow:
    ``torch.unique`` sorts whole rows. Here, only rows with a repeated key are sorted.
    """
    keys = row_keys(rows)
    _, key_number, key_count = torch.unique(keys, return_inverse=True, return_counts=True)
    has_repeated_key = key_count[key_number] > 1
    repeated_rows = has_repeated_key.nonzero().squeeze(1)  # indices of the rows with a repeated key
    first = torch.arange(len(rows), device=rows.device)
    if len(repeated_rows):
        _, group = torch.unique(rows[repeated_rows], dim=0, return_inverse=True)
        # ``scatter_reduce`` finds the lowest row index in each group. The minimum includes the
        # start values. So the start values must be larger than all indices.
        upper_bounds = torch.full_like(repeated_rows, len(rows))
        lowest_of_group = upper_bounds.scatter_reduce(0, group, repeated_rows, "amin")
        first[repeated_rows] = lowest_of_group[group]
    return first


def row_keys(rows: Tensor) -> Tensor:
    """Compute keys (N,) int64 for the rows (N, D) float32, from the first columns.

    Equal rows have equal keys. Different rows may also have equal keys.
    """
    first_columns = (rows[:, :KEY_COLUMNS] + 0.0).contiguous()  # adding 0 turns -0 into 0
    # each float's four bytes, read as a whole number
    whole_numbers = first_columns.view(torch.int32).long()
    # each column has a different factor: the same numbers in another order give another key
    factors = 31 ** torch.arange(whole_numbers.shape[1], device=rows.device)
    return (whole_numbers * factors).sum(dim=1)


def select_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows (B, ...) of ``rows`` (N, ...) with the indices ``index`` (B,).

    If the indices are consecutive, the result is a view and nothing is copied.
    """
    n_rows = len(index)
    # an empty index has no minimum, and ``index_select`` takes no negative indices
    if n_rows == 0 or int(index.min()) < 0:
        return rows[index]
    first = int(index[0])
    last = int(index[-1])
    may_be_consecutive = last - first == n_rows - 1  # a cheap test before all indices are compared
    if may_be_consecutive and bool((index.diff() == 1).all()):
        return rows[first : first + n_rows]
    return rows.index_select(0, index)  # takes a third of the time that rows[index] takes


def n_rows_in_cache(n_candidates: int) -> int:
    """Return for how many rows the logits fit into the cache: at least 256, at most 32,768.

    A matrix product with fewer than 256 rows would be slow.
    """
    n_fitting = CACHED_LOGITS // max(n_candidates, 1)
    return min(max(n_fitting, 256), 32_768)


def row_blocks(
    n_rows: int, n_candidates: int, size: int, max_block_logits: int = MAX_BATCH_LOGITS
) -> Iterator[slice]:
    """Yield slices of at most ``size`` rows with at most ``max_block_logits`` logits each.

    A slice has at least one row, even if a single row has more than ``max_block_logits`` logits.
    """
    n_fitting = max_block_logits // max(n_candidates, 1)
    step = max(min(size, n_fitting), 1)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def nearest_rows(rows: Tensor, known_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest known row (M, D) for each row (N, D), by the largest cosine.

    Return the largest cosines (N,), and the indices (N,) of the nearest known rows. The cosines
    are computed block by block, so memory is bounded.
    """
    # an exported graph must accept any number of rows, so the graph cannot split rows into blocks
    if torch.compiler.is_exporting():
        cosine, index = (rows @ known_rows.T).max(dim=1)
        return cosine, index
    # Usually both arguments are the candidates from the fit. Then each row is nearest to itself.
    if torch.equal(rows, known_rows):
        return rows.new_ones(len(rows)), torch.arange(len(rows), device=rows.device)
    cosines = []
    indices = []
    for block in row_blocks(n_rows=len(rows), n_candidates=len(known_rows), size=len(rows)):
        cosine, index = (rows[block] @ known_rows.T).max(dim=1)
        cosines.append(cosine)
        indices.append(index)
    return torch.cat(cosines), torch.cat(indices)


def _summary_over_tiles(
    image: Tensor, text: Tensor, scale: float, bias: float, n_columns: int
) -> ZeroShot:
    """Summarise the logits for some images and all texts, in tiles with ``n_columns`` texts."""
    summaries = _summaries_of_tiles(image, text, scale, bias, n_columns)
    return functools.reduce(_merge_summaries, summaries)


def _summaries_of_tiles(
    image: Tensor, text: Tensor, scale: float, bias: float, n_columns: int
) -> Iterator[ZeroShot]:
    """Yield the summary of every tile with ``n_columns`` texts.

    No variable holds a tile's logits. So the logits are freed before the next tile.
    """
    for number, texts in enumerate(text.split(n_columns)):
        yield _summary_of_tile(
            logits=(image @ texts.T).mul_(scale).add_(bias), first_candidate=number * n_columns
        )


def _summary_of_tile(logits: Tensor, first_candidate: int) -> ZeroShot:
    """Summarise the logits (B, k) of k consecutive candidates from ``first_candidate`` on."""
    # ``argmax`` takes the first of equal values. ``torch.max`` would compute both results at once,
    # but its documentation does not say which of equal values is taken.
    column = logits.argmax(dim=1)
    max_logit = logits.amax(dim=1)
    log_norm = logits.logsumexp(dim=1)
    return ZeroShot(column + first_candidate, max_logit=max_logit, log_norm=log_norm)


def _merge_summaries(left: ZeroShot, right: ZeroShot) -> ZeroShot:
    """Merge the summaries of two candidate ranges. ``left`` has the lower indices.

    If the largest logits in a row are equal, the answer is taken from ``left``.
    """
    right_is_larger = right.max_logit > left.max_logit
    prediction = torch.where(right_is_larger, right.prediction, left.prediction)
    max_logit = torch.where(right_is_larger, right.max_logit, left.max_logit)
    log_norm = torch.logaddexp(left.log_norm, right.log_norm)
    return ZeroShot(prediction, max_logit=max_logit, log_norm=log_norm)


def float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on the CPU if the tensor's device has no float64."""
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()


@dataclass(frozen=True)
class Matches:
    """The right candidates in a pool, for every row in the pool.

    A pool consists of M pairs: a query and a candidate each. Several pairs may have the same query,
    and several pairs may have the same candidate. A candidate is right for a query if some pair has
    both. For example, let image A have the captions 1 and 2, and image B the captions 2 and 3. Then
    caption 2 is right for both images, and caption 3 is wrong for image A.

    The index of the first pair with a query identifies the query. A candidate is identified alike.

    Attributes:
        query_of_pair: (M,) int64: for every pair, the first pair with the same query.
        candidate_of_pair: (M,) int64: for every pair, the first pair with the same candidate.
        pair_of_candidate: (K,) int64: for every candidate in the batch, the pair it comes from.
        query_of_row: (B,) int64: for every row in the batch, the first pair with the row's query.
    """

    query_of_pair: Tensor
    candidate_of_pair: Tensor
    pair_of_candidate: Tensor
    query_of_row: Tensor

    def take_rows(self, rows: slice | Tensor) -> Matches:
        """Return the matches for some rows of the batch, selected by a slice or by indices."""
        return replace(self, query_of_row=self.query_of_row[rows])

    def to(self, device: torch.device | str) -> Matches:
        """Return the same matches on another device."""
        return Matches(
            query_of_pair=self.query_of_pair.to(device),
            candidate_of_pair=self.candidate_of_pair.to(device),
            pair_of_candidate=self.pair_of_candidate.to(device),
            query_of_row=self.query_of_row.to(device),
        )

    def are_right(self, answer: Tensor) -> Tensor:
        """Return, as a mask (B,), which answers (B,) are right. No B x K array is made."""
        n_pairs = len(self.query_of_pair)
        answered_candidate = self.candidate_of_pair[self.pair_of_candidate[answer]]
        # A query and a candidate are encoded as a single number. An answer is right if some pair
        # has the number of the row's query and the answered candidate.
        pair_numbers = self.query_of_pair * n_pairs + self.candidate_of_pair
        answer_numbers = self.query_of_row * n_pairs + answered_candidate
        return torch.isin(answer_numbers, pair_numbers)

    def right_mask(self) -> Tensor:
        """Return the mask (B, K) of every row's right candidates."""
        # the pairs with the row's query, then all pairs with a candidate of these pairs
        has_query = self.query_of_pair == self.query_of_row[:, None]
        is_right = _in_same_group(has_query, self.candidate_of_pair)
        return is_right[:, self.pair_of_candidate]

    def same_answer_mask(self, answer: Tensor) -> Tensor:
        """Return the mask (B, K) of candidates that share a query with the row's answer (B,)."""
        answered_candidate = self.candidate_of_pair[self.pair_of_candidate[answer]]
        # the pairs with the answer, then all pairs with the same queries, then all pairs with a
        # candidate of these queries
        has_answer = self.candidate_of_pair == answered_candidate[:, None]
        shares_query = _in_same_group(has_answer, self.query_of_pair)
        is_same_answer = _in_same_group(shares_query, self.candidate_of_pair)
        return is_same_answer[:, self.pair_of_candidate]


def _in_same_group(is_chosen: Tensor, group: Tensor) -> Tensor:
    """Return the mask (B, M) of the pairs in a group with a chosen pair.

    Args:
        is_chosen: (B, M) mask of the chosen pairs.
        group: (M,) group of each pair: the index of the group's first pair.
    """
    row, pair = is_chosen.nonzero(as_tuple=True)
    is_group_chosen = torch.zeros_like(is_chosen)
    is_group_chosen[row, group[pair]] = True
    return is_group_chosen[:, group]
