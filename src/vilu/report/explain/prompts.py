"""Classes whose text embedding is worth improving, with what that would gain at most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vilu.device import as_usual
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.predictors.bank.search import leaders
from vilu.progress import Task, track
from vilu.report.explain.explain import Findings, first_lines
from vilu.report.explain.rows import ROWS, class_name
from vilu.validation import checked, require_at_least

STEPS, SHARED = (0.5, 1.0, 2.0, 4.0, 8.0), (0.0, 0.1)
MIXES = tuple(itertools.product(STEPS, SHARED))
"""How far a text is moved, and how much of what all images share comes along; or it stays as it is."""

FOLDS = 5
MIN_FOLDS = 3  # one to measure on, one to choose on, and some to take images from
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class PromptGain:
    """What a better text for one class would gain, all others staying as they are."""

    name: str  # of the class
    n: int  # labelled rows of the class
    failures: int  # how many of them are answered wrong now
    saved: int  # rows (of any class) that become right
    lost: int  # rows that become wrong
    gain: float  # (saved - lost) / N, in accuracy
    low: float  # lower end of a 95 % interval of the gain
    high: float  # upper end

    def cells(self) -> tuple[str, ...]:
        """What a table says of it."""
        counts = (f"{count:,}" for count in (self.n, self.failures, self.saved, self.lost))
        return (
            self.name,
            *counts,
            f"{100 * self.gain:+.2f}",
            f"{100 * self.low:+.2f} to {100 * self.high:+.2f}",
        )


@dataclass(frozen=True)
class PromptGains(Findings):
    """Classes by the gain of a better text, falling."""

    kind: ClassVar[str] = "prompt_gains"

    rows: tuple[PromptGain, ...]  # one per class
    n: int  # N, labelled rows
    accuracy: float  # zero-shot accuracy on them now
    folds: int  # of the cross-validation

    def __str__(self) -> str:
        head = (
            f"Accuracy is {self.accuracy:.2%} on {self.n:,} labelled rows. With the text of one class moved towards "
            f"its\nimages ({self.folds} folds, measured on rows not fitted on; an upper range for what wording can do):"
        )
        heading = ("class", "rows", "failures", "saved", "lost", "accuracy", "95 % interval")
        return "\n".join(
            [head, "", *first_lines(heading, [row.cells() for row in self.rows], "classes")]
        )


@checked
@as_usual()
def prompt_gains(data: EmbeddingSource, *, folds: int = FOLDS, seed: int = 0) -> PromptGains:
    """How many failures a better text for each class would save, from labelled images, by cross-validation.

    The text t_c of one class at a time is replaced by t_c + m (delta_c + kappa mu), of unit norm,
    with mu_c the mean of the class's images, mu the mean of these means, and delta_c = mu_c - mu.
    With kappa = 1 that is a step towards mu_c; but mu is what all images have in common and no text
    has, and a text that has much of it draws images of every class, so kappa is 0 or 0.1, and m
    0.5, 1, 2, 4, 8, or the text stays. Then the rows that become right and wrong are counted.

    Nothing is measured on rows that it was fitted on, nor on their pictures: a fold is measured
    with means from the other folds, and with the (m, kappa) of largest gain on those, each of them
    measured with means without it and without the first fold. The interval is Agresti and Min's for a difference of
    paired proportions (Statistics in Medicine 2005, half a row added to each cell); it is of the
    rows measured on and leaves out that other rows would have given other means.

    What it says is a bound for work on prompts rather than a promise: these texts are made from
    images, and no wording need reach them. That the gain of a class is small does say that its text
    is not what is wrong.

    Raises:
        UsageError: If the data are image-caption pairs, or there are less than 3 folds.
        DataError: If fewer rows than folds have a label, or there is one candidate.

    Examples:
        >>> import numpy as np, vilu
        >>> target = np.arange(60) % 3
        >>> image = np.eye(4)[target] + 0.05 * np.random.default_rng(0).normal(size=(60, 4))
        >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
        >>> text = np.array(
        ...     [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
        ... )  # the last text is off
        >>> gains = vilu.prompt_gains(
        ...     vilu.Embeddings(image, text, target, class_names=["cat", "dog", "cup"])
        ... )
        >>> best = gains.rows[0]
        >>> best.name, best.failures, best.saved, round(gains.accuracy, 2), round(best.gain, 2)
        ('cup', 14, 14, 0.77, 0.23)
    """
    rows, n, failures = _labelled(data, folds)
    text = data.candidates(rows[:0]).text
    fold = torch.empty(len(data), dtype=torch.int64)
    first, picture = Rows(data, rows).pictures()
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(int(seed)))
    fold_of_picture = torch.empty_like(first)
    fold_of_picture[order] = torch.arange(len(first)) % folds
    fold[rows] = fold_of_picture[picture]
    means = _Means(data, rows, fold, folds)
    changes = []
    with track("better texts", len(rows), "rows") as task:
        for here in range(folds):
            better = [means.better_texts(text, {here, left_out}) for left_out in range(folds)]
            changes.append(_changes(data, rows[fold[rows] == here], better, task))
    saved, lost = _at_the_chosen(torch.stack(changes))
    ranked = tuple(_ranked(data, n, failures, saved, lost))
    return PromptGains(ranked, len(rows), 1 - float(failures.sum() / n.sum()), folds)


def _labelled(data: EmbeddingSource, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Usable labelled rows (N,), and per class (K,) how many there are and how many are answered wrong."""
    if data.pool_size is not None:
        raise UsageError("captions have no classes whose texts could be improved. Give class data.")
    require_at_least("folds", folds, MIN_FOLDS)
    if data.n_candidates < 2:
        raise DataError("with one candidate every answer is the same, so no text can be better.")
    rows = data.usable_rows[data.target[data.usable_rows] != UNKNOWN]
    if len(rows) < folds:
        raise DataError(
            f"better texts are estimated from labelled rows in {folds} folds. Got {len(rows)} such rows."
        )
    n, failures = torch.zeros(2, data.n_candidates, dtype=torch.int64)
    for batch in data.batches(ROWS, rows=rows):
        n += batch.target.bincount(minlength=data.n_candidates)
        failures += batch.target[batch.failure == 1].bincount(minlength=data.n_candidates)
    return rows, n, failures


class _Means:
    """Sums of unit-norm images per fold and class, of which means without some folds are made."""

    def __init__(self, data: EmbeddingSource, rows: Tensor, fold: Tensor, folds: int) -> None:
        k = data.n_candidates
        self.total = torch.zeros(folds * k, data.space.embed_dim, dtype=torch.float64)
        self.n = torch.zeros(folds * k, dtype=torch.float64)
        for batch in data.batches(ROWS, rows=rows):
            cell = fold[batch.index] * k + batch.target
            self.total.index_add_(0, cell, batch.image.double())
            self.n += cell.bincount(minlength=folds * k)
        self.total, self.n = self.total.view(folds, k, -1), self.n.view(folds, k)

    def better_texts(self, text: Tensor, without: set[int]) -> Tensor:
        """(mixes, K, D) float32 unit-norm texts from the images of the other folds; of a class without any the text."""
        kept = [fold for fold in range(len(self.n)) if fold not in without]
        n = self.n[kept].sum(dim=0)
        there = n > 0
        mean = self.total[kept].sum(dim=0) / n.clamp(min=1)[:, None]
        shared = mean[there].mean(dim=0)
        moved = [text.double() + step * (mean - shared + share * shared) for step, share in MIXES]
        return normalize(
            torch.where(there[:, None], torch.stack(moved), text.double()), dim=-1
        ).float()


class Rivals(NamedTuple):
    """What a class has to beat to be the answer when its text is replaced: the strongest of the others."""

    place: (
        Tensor  # (B, K) the strongest candidate beside each: the answer, or for the answer the next
    )
    logit: Tensor  # (B, K) its logit
    right: Tensor  # (B, 1) whether the answer is right now

    @classmethod
    def of(cls, batch: Batch) -> Rivals:
        """Rivals of every class for labelled rows with shared candidates."""
        largest, places = leaders(batch.logits[:, batch.first_equal], 2)  # equal texts tie exactly
        is_answer = places[:, :1] == torch.arange(len(batch.text))
        return cls(
            torch.where(is_answer, places[:, 1:], places[:, :1]),
            torch.where(is_answer, largest[:, 1:], largest[:, :1]),
            places[:, :1] == batch.target[:, None],
        )

    def changes(self, batch: Batch, better: Tensor) -> Tensor:
        """(2, K) rows that become right, and wrong, when the text of one class at a time is replaced by ``better``."""
        classes = torch.arange(len(better))
        logits = (batch.image @ better.T) * batch.logit_scale + batch.logit_bias
        wins = (logits > self.logit) | (
            (logits == self.logit) & (classes < self.place)
        )  # the lowest index wins ties
        right = torch.where(wins, classes, self.place) == batch.target[:, None]
        return torch.stack([(right & ~self.right).sum(dim=0), (self.right & ~right).sum(dim=0)])


def _changes(data: EmbeddingSource, rows: Tensor, better: Sequence[Tensor], task: Task) -> Tensor:
    """(folds, mixes, 2, K) of these rows those that become right, and wrong, with the texts made without each fold."""
    found = torch.zeros(len(better), len(MIXES), 2, better[0].shape[1], dtype=torch.int64)
    for batch in data.batches(ROWS, rows=rows):
        rivals = Rivals.of(batch)
        for left_out, mix in itertools.product(range(len(better)), range(len(MIXES))):
            found[left_out, mix] += rivals.changes(batch, better[left_out][mix])
        task.advance(len(batch.index))
    return found


def _at_the_chosen(changes: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) rows saved and lost with the mix that was chosen per fold and class; none where no mix gains anything.

    Of ``changes`` (folds, folds, mixes, 2, K), those in fold f with texts made without folds f and
    g, what is at f = g is measured, and what the other folds f say of the texts without g chooses
    for g.
    """
    measured = changes.diagonal().movedim(-1, 0)
    elsewhere = changes.sum(dim=0) - measured
    gain, mix = (elsewhere[:, :, 0] - elsewhere[:, :, 1]).max(dim=1, keepdim=True)
    saved, lost = (measured.take_along_dim(mix[:, :, None], dim=1) * (gain > 0)[:, :, None]).sum(
        dim=(0, 1)
    )
    return saved, lost


def _ranked(
    data: EmbeddingSource, n: Tensor, failures: Tensor, saved: Tensor, lost: Tensor
) -> Iterator[PromptGain]:
    total = int(n.sum())
    for c in (saved - lost).argsort(descending=True, stable=True).tolist():
        plus, minus = int(saved[c]), int(lost[c])
        name = class_name(data.class_names, c)
        low, high = paired_interval(plus, minus, total)
        yield PromptGain(
            name, int(n[c]), int(failures[c]), plus, minus, (plus - minus) / total, low, high
        )


def paired_interval(saved: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of (saved - lost) / n: Agresti and Min's, half a row added to each cell of the paired table."""
    b, c, m = saved + 0.5, lost + 0.5, n + 2
    middle = (b - c) / m
    half = NORMAL_95 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return middle - half, middle + half
