"""Zero-shot answers without the matrix of all similarities: tiles in float32 with a running maximum.

Shapes: B images, K candidate texts, D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CELLS = 2**24
"""Logits that a batch may have:

64 MiB in float32, and methods that look at them need several times that in float64.
"""

TILE_CELLS = 2**22
"""Similarities held at a time where nobody asked for them:

16 MiB, and what is read twice is still in the cache.
"""

TILE_ROWS = 1_024
"""Rows of a tile of many candidates: a product of a nearly square tile is half as fast again as one of a long one."""

CACHED_CELLS = 2**20
"""Logits of a batch of which nothing else is looked at:

4 MiB, and what is made of them stays near the processor.
"""

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


def zero_shot(
    image: Tensor, text: Tensor, first: Tensor, logit_scale: float, logit_bias: float = 0.0
) -> ZeroShot:
    """Answer, largest logit and log-normaliser of logit_scale * image . text + logit_bias, tile by tile, in float32.

    Memory above the input (B, D), (K, D) and the result is a tile of ``TILE_CELLS`` numbers at
    most. ``first`` (K,) is of ``first_equal``: a matrix product may round the same sum differently
    at the edge of a block, so that of equal candidates not the first one would win, but one that
    the size of the block favours.
    """
    if not len(text):
        raise ValueError("there is no candidate")
    rows = min(max(cached_rows(len(text)), min(TILE_ROWS, len(text) // 4)), TILE_CELLS)
    columns = min(len(text), TILE_CELLS // rows)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        parts = [
            _rows(block, text, logit_scale, logit_bias, columns) for block in image.split(rows)
        ]
    place, largest, norm = (torch.cat(part) for part in zip(*parts, strict=True))
    return ZeroShot(first[place], largest, norm)


@dataclass(frozen=True, eq=False)
class Others:
    """What the candidates beside the answer weigh, from logits l (B, K), K > 1, in their precision.

    With a reference r their weights are e_j = exp(l_j - r), and the odds of another answer, (1 - p)
    / p, are exp(gap) sum_j e_j: no bit of a small 1 - p is lost. The reference is the largest
    logit, which is there already, or the largest of the others where else the sum would vanish.
    """

    logits: Tensor  # (B, K)
    given: Tensor | None  # (B, 1) int64 answers; None: the first of the largest logits
    own: Tensor  # (B,) the answer's logit
    reference: Tensor  # (B, 1) r
    weight: Tensor  # (B, K) e_j; of the answer 0
    total: Tensor  # (B,) their sum
    temperature: float = 1.0  # what the logits are divided by, ``own`` aside

    @classmethod
    def of(cls, logits: Tensor, answer: Tensor | None = None, temperature: float = 1.0) -> Others:
        """Those beside the answers (B, 1), by default the first of the largest logits."""

        def weights(logits: Tensor, reference: Tensor) -> Tensor:
            weight = logits - reference
            return weight.exp_() if temperature == 1 else weight.div_(temperature).exp_()

        def beside(logits: Tensor, place: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
            weight = weights(logits, reference).scatter_(1, place, 0.0)
            return weight, weight.sum(dim=1)

        def second(logits: Tensor, place: Tensor) -> Tensor:
            return logits.scatter(1, place, NEGLIGIBLE).amax(dim=1, keepdim=True)

        def places(logits: Tensor, answer: Tensor | None) -> Tensor:
            return first_largest(logits)[0] if answer is None else answer

        largest = logits.amax(dim=1, keepdim=True)
        own = (largest if answer is None else logits.gather(1, answer)).squeeze(1)
        if torch.compiler.is_exporting():
            place = places(logits, answer)
            reference = second(logits, place)
            return cls(
                logits, answer, own, reference, *beside(logits, place, reference), temperature
            )
        if answer is None and not logits.requires_grad and logits.shape[1] <= CACHED_CELLS // 16:
            # the largest weighs 1 and has no fraction, so that its place need not be known
            weight = weights(logits, largest)
            whole = weight.sum(dim=1)
            total = weight.frac_().sum(dim=1)
            unsure = (total < VANISHING) | (whole - total > TIED)
        else:
            weight, total = beside(logits, places(logits, answer), largest)
            unsure = total < VANISHING
        rows = unsure.nonzero().squeeze(1)
        reference = largest
        if len(rows):  # row by row: what a row is worth does not depend on those beside it
            few, among = logits[rows], largest[rows]
            place = places(few, None if answer is None else answer[rows])
            vanishing = beside(few, place, among)[1] < VANISHING
            among = torch.where(vanishing[:, None], second(few, place), among)
            few_weights, few_totals = beside(few, place, among)
            reference = largest.index_copy(0, rows, among)
            weight, total = (
                weight.index_copy_(0, rows, few_weights),
                total.index_copy_(0, rows, few_totals),
            )
        return cls(logits, answer, own, reference, weight, total, temperature)

    @cached_property
    def answer(self) -> Tensor:
        """(B, 1) int64 places of the answers."""
        return first_largest(self.logits)[0] if self.given is None else self.given

    @cached_property
    def gap(self) -> Tensor:
        """(B,) float64 reference less the answer's logit."""
        return (float64(self.reference.squeeze(1)) - float64(self.own)) / self.temperature

    @property
    def log_odds(self) -> Tensor:
        """(B,) float64, without rounding where p is near zero or one."""
        return self.gap + float64(self.total).log()

    @cached_property
    def odds(self) -> Tensor:
        """(B,) float64."""
        return self.gap.exp() * float64(self.total)

    @property
    def doubt(self) -> Tensor:
        """(B,) float64 1 - p of the answer."""
        return self.odds / (1 + self.odds)

    def zero_shot(self, first: Tensor) -> ZeroShot:
        """What the logits say, where the answers are the largest; ``first`` as from ``first_equal``."""
        log_norm = self.own + torch.log1p(self.odds).to(self.own)
        return ZeroShot(first[self.answer.squeeze(1)], self.own, log_norm)


def first_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Place (B, 1) int64 and value (B, 1) of the largest of (B, K), at equal ones the first.

    Where it is there once, its place is the product of what equals it, zeros and ones, with 0 ... K
    - 1, exact in float32; of long rows near the processor that takes half the time of ``argmax``.
    """
    n = logits.shape[1]
    plain = (logits.dtype, logits.device.type, logits.requires_grad) == (
        torch.float32,
        "cpu",
        False,
    )
    if (
        plain
        and n >= SHORT
        and logits.numel() <= 2 * CACHED_CELLS
        and not torch.compiler.is_exporting()
    ):
        largest = logits.amax(dim=1, keepdim=True)
        equal = torch.eq(logits, largest, out=torch.empty_like(logits))
        place = (equal @ torch.arange(n, dtype=torch.float32)).long().clamp_(0, n - 1)[:, None]
        # the second: products may have been allowed fewer bits
        if bool((equal.sum(dim=1) == 1).all()) and bool(equal.gather(1, place).all()):
            return place, largest
    # not torch.max(dim): of equal values it documents no order
    first = logits.argmax(dim=1, keepdim=True)
    return first, logits.gather(1, first)


SHORT = 64

TIED = 1.5
"""The largest weighs 1 of all weights; so much more is another one that weighs 1."""

VANISHING = 1e-14
"""Below it all others are more than 32 under the reference, where a float32 difference is off by 2e-6 and more."""

NEGLIGIBLE = torch.finfo(torch.float32).min / 2
"""A logit below all others."""


def first_equal(rows: Tensor) -> Tensor:
    """(N,) int64: for every row (N, D) float32 the first that equals it; as by ``torch.unique``, but fast."""
    # only rows of equal keys are compared in full
    _, group, count = torch.unique(row_keys(rows), return_inverse=True, return_counts=True)
    unsure = (count[group] > 1).nonzero().squeeze(1)
    first = torch.arange(len(rows), device=rows.device)
    if len(unsure):
        _, same = torch.unique(rows[unsure], dim=0, return_inverse=True)
        first[unsure] = torch.full_like(unsure, len(rows)).scatter_reduce(0, same, unsure, "amin")[
            same
        ]
    return first


def row_keys(rows: Tensor) -> Tensor:
    """(N,) int64 made of a few columns of (N, D) float32: equal rows have equal ones."""
    bits = (rows[:, :KEY_COLUMNS] + 0.0).contiguous().view(torch.int32).long()  # + 0: -0 equals 0
    return (bits * 31 ** torch.arange(bits.shape[1], device=rows.device)).sum(dim=1)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (B, ...) at the positions ``index`` (B,) of rows (N, ...): a view where they follow one another."""
    n = len(index)
    if not n or int(index.min()) < 0:
        return rows[index]
    start = int(index[0])
    if int(index[-1]) - start == n - 1 and bool((index.diff() == 1).all()):
        return rows[start : start + n]
    return rows.index_select(0, index)  # takes a third of the time of rows[index]


def cached_rows(n_candidates: int) -> int:
    """Rows whose logits stay near the processor, but enough of them for a product."""
    return min(max(CACHED_CELLS // max(n_candidates, 1), 256), 32_768)


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
    blocks = [
        (rows[block] @ known.T).max(dim=1) for block in row_blocks(len(rows), len(known), len(rows))
    ]
    return torch.cat([block.values for block in blocks]), torch.cat(
        [block.indices for block in blocks]
    )


def _rows(image: Tensor, text: Tensor, scale: float, bias: float, columns: int) -> ZeroShot:
    tiles = (
        _of_tile((image @ part.T).mul_(scale).add_(bias), number * columns)
        for number, part in enumerate(text.split(columns))
    )
    return functools.reduce(_merge, tiles)


def _of_tile(logits: Tensor, first: int) -> ZeroShot:
    """Of the candidates ``first`` and following, in the memory of their logits."""
    place, largest = first_largest(logits)
    norm = logits.sub_(largest).exp_().sum(dim=1).log_()
    return ZeroShot(place.squeeze(1) + first, largest.squeeze(1), norm + largest.squeeze(1))


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
