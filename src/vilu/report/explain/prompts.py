"""The largest accuracy gain from a better text embedding for a class."""

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
from vilu.predictors.bank.search import k_largest
from vilu.progress import Task, track
from vilu.report.explain.explain import Findings, first_table_lines
from vilu.report.explain.rows import BATCH_ROWS, class_name
from vilu.validation import checked, require_at_least

STEP_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Step sizes m to try: how far a text is moved towards the class's images."""
SHARES_OF_MEAN = (0.0, 0.1)
"""Shares kappa to try: how much of the mean over all images is added to a text."""
MIXES = tuple(itertools.product(STEP_SIZES, SHARES_OF_MEAN))
"""All pairs (m, kappa) to try."""

FOLDS = 5  # default fold count
MIN_FOLDS = 3  # a fold to measure on, a fold to choose the mix on, a fold to compute means from
NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class PromptGain:
    """The gain of a better text for one class, with unchanged texts for all other classes."""

    name: str  # class name
    n: int  # labelled rows in the class
    failures: int  # rows in the class whose current answer is wrong
    saved: int  # rows in any class whose answer becomes right
    lost: int  # rows in any class whose answer becomes wrong
    gain: float  # change in accuracy: (saved - lost) / number of all labelled rows
    low: float  # lower end of the gain's 95 % interval
    high: float  # upper end of the gain's 95 % interval

    def cells(self) -> tuple[str, ...]:
        """Return the cells of this class's row in the printed table."""
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
    """The gains from a better text for all classes, the largest gain first."""

    kind: ClassVar[str] = "prompt_gains"

    rows: tuple[PromptGain, ...]  # a row per class
    n: int  # N, the number of labelled rows
    accuracy: float  # zero-shot accuracy on the labelled rows with the current texts
    folds: int  # number of cross-validation folds

    def __str__(self) -> str:
        head = (
            f"Accuracy is {self.accuracy:.2%} on {self.n:,} labelled rows. "
            "With the text of one class moved towards its\n"
            f"images ({self.folds} folds, measured on rows not fitted on; "
            "an upper range for what wording can do):"
        )
        heading = ("class", "rows", "failures", "saved", "lost", "accuracy", "95 % interval")
        cells = [row.cells() for row in self.rows]
        table_lines = first_table_lines(heading, cells, noun="classes")
        return "\n".join([head, "", *table_lines])


@checked
@torch_defaults()
def prompt_gains(data: EmbeddingSource, *, folds: int = FOLDS, seed: int = 0) -> PromptGains:
    """Estimate by cross-validation how many failures a better text for each class would save.

    The labelled images of class c have the mean embedding mu_c. mu is the mean over all mu_c, and
    delta_c = mu_c - mu. One class c at a time gets a new text: t_c is replaced by the unit-norm
    vector along

        t_c + m (delta_c + kappa mu)

    The step m and the share kappa are chosen from a few values. The function then counts the rows
    whose answer becomes right, and the rows whose answer becomes wrong.

    With kappa = 1 the text would move towards mu_c. However, mu is common to all images and absent
    from all texts. So a text with much of mu attracts images from every class. Therefore kappa is 0
    or 0.1. The step m is 0.5, 1, 2, 4 or 8. If no (m, kappa) gains anything, the class's text is
    not changed.

    A text is measured only on rows that were not used to make the text. Rows with the same pictures
    were not used, either:

    1. The result on fold f is measured with the means over all folds except f.
    2. The pair (m, kappa) for fold f is the pair with the largest gain on all other folds. Each
       other fold g is measured with the means over all folds except f and g.

    The interval is Agresti and Min's for a difference of paired proportions (Statistics in Medicine
    2005), with half a row added to each cell. The interval accounts for the sampling of the
    measured rows, but not for the means: a different row sample would give different means.

    In practice the gain is an upper limit to what work on prompts gains, and is no guarantee.
    The new texts are made from images, and perhaps no wording has such an embedding. But a small
    gain shows that the class's text does not cause the class's failures.

    Raises:
        UsageError: If the data are image-caption pairs, or ``folds`` is less than 3.
        DataError: If fewer rows than folds have a label, or if there is only a single candidate.

    Examples:
        >>> import numpy as np, vilu
        >>> noise = 0.05 * np.random.default_rng(0).normal(size=(60, 4))
        >>> target = np.arange(60) % 3  # 20 cats, 20 dogs, 20 cups
        >>> image = np.eye(4)[target] + noise  # images of cups are near [0, 0, 1, 0],
        >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
        >>> text = np.eye(4)[[0, 1, 3]]  # but the text of "cup" is [0, 0, 0, 1]
        >>> data = vilu.Embeddings(image, text, target=target, class_names=["cat", "dog", "cup"])
        >>> best = vilu.prompt_gains(data).rows[0]
        >>> best.name, best.failures, best.saved  # a better text saves all failures
        ('cup', 14, 14)
    """
    rows, n, failures = _labelled_rows(data, folds)
    # The candidates are the same for all rows, so the texts can be read without reading a row.
    no_rows = rows[:0]
    text = data.candidates(no_rows).text
    fold = _assign_folds(data, rows, folds, seed)
    means = _ClassMeans(data, rows, fold, folds)
    changes = []
    with track("better texts", len(rows), "rows") as task:
        for measured_fold in range(folds):
            # for every fold, the texts made without this fold and without ``measured_fold``
            texts_without_fold = [
                means.better_texts(text, {measured_fold, left_out}) for left_out in range(folds)
            ]
            measured_rows = rows[fold[rows] == measured_fold]
            changes.append(_count_changes(data, measured_rows, texts_without_fold, task))
    saved, lost = _changes_at_best_mix(torch.stack(changes))
    gains = tuple(_gains_in_order(data, n, failures, saved, lost))
    accuracy = 1 - float(failures.sum() / n.sum())
    return PromptGains(rows=gains, n=len(rows), accuracy=accuracy, folds=folds)


def _assign_folds(data: EmbeddingSource, rows: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold numbers (len(data),). All rows that show a picture are in the same fold.

    Only the numbers of ``rows`` have a meaning.
    """
    labelled_rows = Rows(data, rows)
    first_row_of_picture, picture_of_row = labelled_rows.pictures()
    n_pictures = len(first_row_of_picture)
    generator = torch.Generator().manual_seed(int(seed))
    order = torch.randperm(n_pictures, generator=generator)
    fold_of_picture = torch.empty(n_pictures, dtype=torch.int64)
    # the shuffled pictures get the folds 0, 1, ... in turn, so the folds have about equal sizes
    fold_of_picture[order] = torch.arange(n_pictures) % folds
    fold = torch.empty(len(data), dtype=torch.int64)
    fold[rows] = fold_of_picture[picture_of_row]
    return fold


def _labelled_rows(data: EmbeddingSource, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the labelled usable rows (N,), and each class's row count and failure count (K,)."""
    if data.pool_size is not None:
        raise UsageError("captions have no classes whose texts could be improved. Give class data.")
    require_at_least("folds", folds, MIN_FOLDS)
    if data.n_candidates < 2:
        raise DataError("with one candidate every answer is the same, so no text can be better.")
    has_label = data.target[data.usable_rows] != UNKNOWN
    rows = data.usable_rows[has_label]
    if len(rows) < folds:
        raise DataError(
            f"better texts are estimated from labelled rows in {folds} folds. "
            f"Got {len(rows)} such rows."
        )
    n = torch.zeros(data.n_candidates, dtype=torch.int64)
    failures = torch.zeros_like(n)
    for batch in data.batches(BATCH_ROWS, rows=rows):
        n += batch.target.bincount(minlength=data.n_candidates)
        failures += batch.target[batch.failure == 1].bincount(minlength=data.n_candidates)
    return rows, n, failures


class _ClassMeans:
    """Class means over some of the folds, computed from the sums in each fold and class.

    Args:
        data: Source with the rows.
        rows: Positions of the labelled rows.
        fold: (len(data),) fold number of each labelled row.
        folds: Number of folds.

    Attributes:
        image_sum: (folds, K, D) float64 sum of the unit-norm images in each fold and class.
        n_images: (folds, K) float64 number of images in each sum.
    """

    def __init__(self, data: EmbeddingSource, rows: Tensor, fold: Tensor, folds: int) -> None:
        k = data.n_candidates
        n_cells = folds * k  # a cell is a pair: a fold and a class
        image_sum = torch.zeros(n_cells, data.space.embed_dim, dtype=torch.float64)
        n_images = torch.zeros(n_cells, dtype=torch.float64)
        for batch in data.batches(BATCH_ROWS, rows=rows):
            cell = fold[batch.index] * k + batch.target
            image_sum.index_add_(0, cell, batch.image.double())
            n_images += cell.bincount(minlength=n_cells)
        self.image_sum = image_sum.view(folds, k, -1)
        self.n_images = n_images.view(folds, k)

    def better_texts(self, text: Tensor, left_out: set[int]) -> Tensor:
        """Make a new text for every mix and class: (mixes, K, D), float32 and unit-norm.

        The means are over all folds that are not in ``left_out``. A class without images in these
        folds keeps the current text.
        """
        folds = [fold for fold in range(len(self.n_images)) if fold not in left_out]
        n_images = self.n_images[folds].sum(dim=0).unsqueeze(1)  # (K, 1)
        has_images = n_images > 0
        class_mean = self.image_sum[folds].sum(dim=0) / n_images.clamp(min=1)  # (K, D): mu_c
        mean_of_classes = class_mean[has_images.squeeze(1)].mean(dim=0)  # (D,): mu
        delta = class_mean - mean_of_classes
        float64_text = text.double()
        moved_texts = []
        for m, kappa in MIXES:
            moved_texts.append(float64_text + m * (delta + kappa * mean_of_classes))
        new_texts = torch.where(has_images, torch.stack(moved_texts), float64_text)
        return normalize(new_texts, dim=-1).float()


class Rivals(NamedTuple):
    """For each row and class, the strongest other class, which is called the rival.

    A class with a new text becomes a row's answer if the new logit is larger than the rival's. For
    most classes the rival is the row's current answer. For the current answer itself, the rival is
    the runner-up.
    """

    class_index: Tensor  # (B, K) int64 class index of the rival
    logit: Tensor  # (B, K) the rival's logit
    answer_is_right: Tensor  # (B, 1) bool: whether the current answer is correct

    @classmethod
    def of(cls, batch: Batch) -> Rivals:
        """Find every class's rival, for each row in a batch of labelled class data."""
        # Classes with equal texts all get the logit of the first equal class. Otherwise a matrix
        # product may round the equal logits differently and break the tie.
        logits = batch.logits[:, batch.first_equal_index]
        two_largest, two_classes = k_largest(logits, 2)
        logit_of_answer, logit_of_runner_up = two_largest.split(1, dim=1)  # (B, 1) each
        answer, runner_up = two_classes.split(1, dim=1)
        is_answer = answer == torch.arange(len(batch.text))  # (B, K)
        class_index = torch.where(is_answer, runner_up, answer)
        logit = torch.where(is_answer, logit_of_runner_up, logit_of_answer)
        answer_is_right = answer == batch.target.unsqueeze(1)
        return cls(class_index=class_index, logit=logit, answer_is_right=answer_is_right)

    def changes(self, batch: Batch, new_texts: Tensor) -> Tensor:
        """Count the rows whose answer becomes right or wrong, if one class alone gets a new text.

        Args:
            batch: The batch that these rivals belong to.
            new_texts: (K, D) new text for every class.

        Returns:
            (2, K) for each class, the number of saved rows and the number of lost rows.
        """
        classes = torch.arange(len(new_texts))
        logits = (batch.image @ new_texts.T) * batch.logit_scale + batch.logit_bias
        # among equal logits, the class with the lowest index is the answer
        wins_tie = (logits == self.logit) & (classes < self.class_index)
        wins = (logits > self.logit) | wins_tie
        new_answer = torch.where(wins, classes, self.class_index)
        new_is_right = new_answer == batch.target.unsqueeze(1)
        saved = (new_is_right & ~self.answer_is_right).sum(dim=0)
        lost = (self.answer_is_right & ~new_is_right).sum(dim=0)
        return torch.stack([saved, lost])


def _count_changes(
    data: EmbeddingSource, rows: Tensor, texts_without_fold: Sequence[Tensor], task: Task
) -> Tensor:
    """Count the rows that each new text saves and loses.

    Args:
        data: Source with the rows.
        rows: Positions of the rows to count, all in the same fold.
        texts_without_fold: For each fold g, new texts (mixes, K, D) made without the images in
            fold g.
        task: Progress of the whole run.

    Returns:
        (folds, mixes, 2, K) the number of saved rows, and the number of lost rows.
    """
    changes = torch.zeros(
        len(texts_without_fold), len(MIXES), 2, data.n_candidates, dtype=torch.int64
    )
    for batch in data.batches(BATCH_ROWS, rows=rows):
        rivals = Rivals.of(batch)
        for left_out, texts_of_mixes in enumerate(texts_without_fold):
            for mix, new_texts in enumerate(texts_of_mixes):
                changes[left_out, mix] += rivals.changes(batch, new_texts)
        task.advance(len(batch.index))
    return changes


def _changes_at_best_mix(changes: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many rows each class saves (K,) and loses (K,), with its best mix in each fold.

    A mix is a pair (m, kappa). A gain is the number of saved rows minus the number of lost rows.
    For fold g, a class's best mix is the mix with the largest gain on all folds except g. If this
    gain is not above 0, the class keeps the current text in fold g, so no row is saved or lost.

    Args:
        changes: (folds, folds, mixes, 2, K) counts of saved and lost rows. Entry [f, g] counts the
            rows in fold f with texts made without the folds f and g.
    """
    own_changes = changes.diagonal().movedim(-1, 0)  # (folds, mixes, 2, K), the entries with f = g
    # entry g is the sum over all folds f except g
    changes_of_others = changes.sum(dim=0) - own_changes
    saved_on_others, lost_on_others = changes_of_others.unbind(dim=2)  # (folds, mixes, K) each
    gains = saved_on_others - lost_on_others
    best_gain, best_mix = gains.max(dim=1, keepdim=True)  # (folds, 1, K) each
    mix_index = best_mix.unsqueeze(2)  # (folds, 1, 1, K)
    changes_at_best = own_changes.take_along_dim(mix_index, dim=1)  # (folds, 1, 2, K)
    gains_anything = (best_gain > 0).unsqueeze(2)  # (folds, 1, 1, K)
    changes_of_folds = changes_at_best * gains_anything
    saved, lost = changes_of_folds.sum(dim=(0, 1))  # (K,) each
    return saved, lost


def _gains_in_order(
    data: EmbeddingSource, n: Tensor, failures: Tensor, saved: Tensor, lost: Tensor
) -> Iterator[PromptGain]:
    """Yield the gains for all classes, the largest gain first.

    Args:
        data: Source with the rows and the class names.
        n: (K,) number of labelled rows in each class.
        failures: (K,) number of these rows whose current answer is wrong.
        saved: (K,) number of rows whose answer the class's better text makes right.
        lost: (K,) number of rows whose answer the class's better text makes wrong.
    """
    n_rows = int(n.sum())
    order = (saved - lost).argsort(descending=True, stable=True)
    for c in order.tolist():
        n_saved = int(saved[c])
        n_lost = int(lost[c])
        low, high = paired_interval(n_saved, n_lost, n_rows)
        name = class_name(data.class_names, c)
        yield PromptGain(
            name=name,
            n=int(n[c]),
            failures=int(failures[c]),
            saved=n_saved,
            lost=n_lost,
            gain=(n_saved - n_lost) / n_rows,
            low=low,
            high=high,
        )


def paired_interval(saved: int, lost: int, n: int) -> tuple[float, float]:
    """Compute Agresti and Min's 95 % interval of (saved - lost) / n.

    The paired table has four cells: rows that are right before and after, rows that are wrong
    before and after, saved rows, and lost rows. Half a row is added to each cell.
    """
    saved_plus_half = saved + 0.5
    lost_plus_half = lost + 0.5
    n_plus_two = n + 2
    difference = saved_plus_half - lost_plus_half
    middle = difference / n_plus_two
    variance_of_difference = saved_plus_half + lost_plus_half - difference**2 / n_plus_two
    half_width = NORMAL_95 * math.sqrt(variance_of_difference) / n_plus_two
    return middle - half_width, middle + half_width
