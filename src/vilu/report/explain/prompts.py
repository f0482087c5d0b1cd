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

from vilu.device import torch_defaults
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.predictors.bank.search import leaders
from vilu.progress import Task, track
from vilu.report.explain.explain import Findings, first_lines
from vilu.report.explain.rows import ROWS, class_name
from vilu.validation import checked, require_at_least

STEPS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""How far a text is moved; or it stays as it is."""
SHARED = (0.0, 0.1)
"""The share that comes along of the mean that all images have in common."""
MIXES = tuple(itertools.product(STEPS, SHARED))

FOLDS = 5
MIN_FOLDS = 3  # one to measure on, one to choose on, and some to take images from
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class PromptGain:
    """The gain of a better text for one class, all other texts staying as they are."""

    name: str  # of the class
    n: int  # labelled rows of the class
    failures: int  # how many of them are answered wrong now
    saved: int  # rows (of any class) that become right
    lost: int  # rows that become wrong
    gain: float  # (saved - lost) / N, in accuracy
    low: float  # lower end of a 95 % interval of the gain
    high: float  # upper end

    def cells(self) -> tuple[str, ...]:
        """Its row of a table."""
        return (
            self.name,
            f"{self.n:,}",
            f"{self.failures:,}",
            f"{self.saved:,}",
            f"{self.lost:,}",
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
            f"Accuracy is {self.accuracy:.2%} on {self.n:,} labelled rows. "
            "With the text of one class moved towards its\n"
            f"images ({self.folds} folds, measured on rows not fitted on; "
            "an upper range for what wording can do):"
        )
        heading = ("class", "rows", "failures", "saved", "lost", "accuracy", "95 % interval")
        cells = [row.cells() for row in self.rows]
        return "\n".join([head, "", *first_lines(heading, cells, "classes")])


@checked
@torch_defaults()
def prompt_gains(data: EmbeddingSource, *, folds: int = FOLDS, seed: int = 0) -> PromptGains:
    """How many failures a better text for each class would save.

    This is estimated from labelled images by cross-validation.

    The text t_c of one class at a time is replaced by t_c + m (delta_c + kappa mu), of unit norm,
    with mu_c the mean of the class's images, mu the mean of these means, and delta_c = mu_c - mu.
    With kappa = 1 that is a step towards mu_c; but mu is what all images have in common and no text
    has, and a text that has much of it draws images of every class, so kappa is 0 or 0.1, and m
    0.5, 1, 2, 4, 8, or the text stays. Then the rows that become right and wrong are counted.

    Nothing is measured on rows that it was fitted on, nor on their pictures: a fold is measured
    with means from the other folds, and with the (m, kappa) of largest gain on those, each of them
    measured with means without it and without the first fold. The interval is Agresti and Min's
    for a difference of paired proportions (Statistics in Medicine 2005, half a row added to each
    cell); it is of the rows measured on and leaves out that other rows would have given other
    means.

    What it says is a bound for work on prompts rather than a guarantee: these texts are made from
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
        for measured in range(folds):
            better = [means.better_texts(text, {measured, left_out}) for left_out in range(folds)]
            measured_rows = rows[fold[rows] == measured]
            changes.append(_changes(data, measured_rows, better, task))
    saved, lost = _at_the_chosen(torch.stack(changes))
    ranked = tuple(_ranked(data, n, failures, saved, lost))
    return PromptGains(ranked, len(rows), 1 - float(failures.sum() / n.sum()), folds)


def _labelled(data: EmbeddingSource, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Usable labelled rows (N,), and per class (K,) their number and that of wrong answers."""
    if data.pool_size is not None:
        raise UsageError("captions have no classes whose texts could be improved. Give class data.")
    require_at_least("folds", folds, MIN_FOLDS)
    if data.n_candidates < 2:
        raise DataError("with one candidate every answer is the same, so no text can be better.")
    rows = data.usable_rows[data.target[data.usable_rows] != UNKNOWN]
    if len(rows) < folds:
        raise DataError(
            f"better texts are estimated from labelled rows in {folds} folds. "
            f"Got {len(rows)} such rows."
        )
    n = torch.zeros(data.n_candidates, dtype=torch.int64)
    failures = torch.zeros_like(n)
    for batch in data.batches(ROWS, rows=rows):
        n += batch.target.bincount(minlength=data.n_candidates)
        failures += batch.target[batch.failure == 1].bincount(minlength=data.n_candidates)
    return rows, n, failures


class _Means:
    """Sums of unit-norm images per fold and class, of which means without some folds are made."""

    def __init__(self, data: EmbeddingSource, rows: Tensor, fold: Tensor, folds: int) -> None:
        k = data.n_candidates
        total = torch.zeros(folds * k, data.space.embed_dim, dtype=torch.float64)
        n = torch.zeros(folds * k, dtype=torch.float64)
        for batch in data.batches(ROWS, rows=rows):
            cell = fold[batch.index] * k + batch.target
            total.index_add_(0, cell, batch.image.double())
            n += cell.bincount(minlength=folds * k)
        self.total = total.view(folds, k, -1)
        self.n = n.view(folds, k)

    def better_texts(self, text: Tensor, without: set[int]) -> Tensor:
        """(mixes, K, D) float32 unit-norm texts from the images of the folds not in ``without``.

        A class without such images has its own text.
        """
        folds = [fold for fold in range(len(self.n)) if fold not in without]
        n = self.n[folds].sum(dim=0)
        has_images = n > 0
        mean = self.total[folds].sum(dim=0) / n.clamp(min=1)[:, None]
        shared = mean[has_images].mean(dim=0)
        moved = [text.double() + step * (mean - shared + share * shared) for step, share in MIXES]
        better = torch.where(has_images[:, None], torch.stack(moved), text.double())
        return normalize(better, dim=-1).float()


class Rivals(NamedTuple):
    """The rival that a class has to beat to be the answer when its text is replaced.

    It is the strongest of the other classes.
    """

    # (B, K) the strongest candidate beside each: the answer, or for the answer the next
    place: Tensor
    logit: Tensor  # (B, K) its logit
    right: Tensor  # (B, 1) whether the answer is right now

    @classmethod
    def of(cls, batch: Batch) -> Rivals:
        """Rivals of every class for labelled rows with shared candidates."""
        logits = batch.logits[:, batch.first_equal]  # equal texts tie exactly
        largest, candidates = leaders(logits, 2)
        answer = candidates[:, :1]
        runner_up = candidates[:, 1:]
        is_answer = answer == torch.arange(len(batch.text))
        return cls(
            torch.where(is_answer, runner_up, answer),
            torch.where(is_answer, largest[:, 1:], largest[:, :1]),
            answer == batch.target[:, None],
        )

    def changes(self, batch: Batch, better: Tensor) -> Tensor:
        """(2, K) rows that become right, and wrong, when one text at a time is replaced.

        ``better`` (K, D) are the texts that replace those of the classes.
        """
        classes = torch.arange(len(better))
        logits = (batch.image @ better.T) * batch.logit_scale + batch.logit_bias
        # the lowest index wins ties
        wins_tie = (logits == self.logit) & (classes < self.place)
        wins = (logits > self.logit) | wins_tie
        right = torch.where(wins, classes, self.place) == batch.target[:, None]
        saved = (right & ~self.right).sum(dim=0)
        lost = (self.right & ~right).sum(dim=0)
        return torch.stack([saved, lost])


def _changes(data: EmbeddingSource, rows: Tensor, better: Sequence[Tensor], task: Task) -> Tensor:
    """(folds, mixes, 2, K) of these rows those that become right, and wrong.

    The first axis says without which fold the texts ``better`` were made.
    """
    n_classes = better[0].shape[1]
    changes = torch.zeros(len(better), len(MIXES), 2, n_classes, dtype=torch.int64)
    for batch in data.batches(ROWS, rows=rows):
        rivals = Rivals.of(batch)
        for left_out, texts in enumerate(better):
            for mix, mixed_texts in enumerate(texts):
                changes[left_out, mix] += rivals.changes(batch, mixed_texts)
        task.advance(len(batch.index))
    return changes


def _at_the_chosen(changes: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) rows saved and lost with the mix that was chosen per fold and class.

    There are none where no mix gains anything. ``changes`` (folds, folds, mixes, 2, K) has at
    [f, g] those of the rows in fold f with texts made without folds f and g. Those at f = g are the
    measurement for fold g; those of all other folds f choose the mix for fold g.
    """
    measured = changes.diagonal().movedim(-1, 0)
    elsewhere = changes.sum(dim=0) - measured
    gains = elsewhere[:, :, 0] - elsewhere[:, :, 1]
    gain, mix = gains.max(dim=1, keepdim=True)
    at_mix = measured.take_along_dim(mix[:, :, None], dim=1)
    is_worth_it = (gain > 0)[:, :, None]
    saved, lost = (at_mix * is_worth_it).sum(dim=(0, 1))
    return saved, lost


def _ranked(
    data: EmbeddingSource, n: Tensor, failures: Tensor, saved: Tensor, lost: Tensor
) -> Iterator[PromptGain]:
    """The gains of all classes, falling."""
    total = int(n.sum())
    for c in (saved - lost).argsort(descending=True, stable=True).tolist():
        n_saved = int(saved[c])
        n_lost = int(lost[c])
        low, high = paired_interval(n_saved, n_lost, total)
        yield PromptGain(
            name=class_name(data.class_names, c),
            n=int(n[c]),
            failures=int(failures[c]),
            saved=n_saved,
            lost=n_lost,
            gain=(n_saved - n_lost) / total,
            low=low,
            high=high,
        )


def paired_interval(saved: int, lost: int, n: int) -> tuple[float, float]:
    """95 % interval of (saved - lost) / n.

    It is Agresti and Min's, with half a row added to each cell of the paired table.
    """
    b = saved + 0.5
    c = lost + 0.5
    m = n + 2
    middle = (b - c) / m
    half = NORMAL_95 * math.sqrt(b + c - (b - c) ** 2 / m) / m
    return middle - half, middle + half
