"""Simple and strong baselines for a few labels per class.

Shapes: B rows to score, M labelled rows, N held-out rows, K classes, D embedding width.

Some of these methods have a parameter to choose, for example a penalty. The original works choose
its value on a validation set. Here there are no further labels, so the value is chosen by
cross-fitting (``held_out_posteriors``): the labelled rows are held out in folds. The chosen value
makes the labels of held-out rows most likely. If the original work chooses by accuracy, the chosen
value gives the most right answers to held-out rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.linear_probe import ClassRegression, fit_regression
from vilu.predictors.bank.search import Count, class_labels, draw_rows, read_images
from vilu.predictors.contract.labelled import class_texts, failure_log_odds
from vilu.predictors.contract.predictor import CLASSES, Learnt

N_FOLDS = 5
"""Number of folds into which the labelled rows are divided."""
MIN_PROBABILITY = 1e-6
"""Smallest probability from a linear probe. A class without labels would otherwise have 0."""

Floats = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Grid = Annotated[tuple[Positive, ...], Field(min_length=1)]


class LabelledImages(NamedTuple):
    """Labelled images, with zero-shot logits for the same rows."""

    image: Tensor  # (M, D) float32, unit norm
    label: Tensor  # (M,)
    logits: Tensor  # (M, K) float64 zero-shot logits
    n_classes: int

    @classmethod
    def of(cls, train: Rows, max_bank: int, seed: int) -> LabelledImages:
        """Collect the training rows: all rows, or ``max_bank`` rows drawn with ``seed``."""
        bank_rows, _ = draw_rows(train, max_bank, seed)
        image = read_images(bank_rows)
        batches = bank_rows.batches(SCORING_BATCH)
        logits = torch.cat([float64(batch.logits) for batch in batches])
        label = class_labels(bank_rows)
        return cls(image, label, logits, train.source.n_candidates)

    def take(self, rows: Tensor) -> LabelledImages:
        """Return the rows at these indices."""
        return LabelledImages(self.image[rows], self.label[rows], self.logits[rows], self.n_classes)


def class_folds(label: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Assign every row to a fold, and return fold numbers (M,).

    The rows in each class are dealt to the folds in turn, in a random order.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(label))
    class_order = np.argsort(label[shuffled], kind="stable")
    rows_by_class = shuffled[class_order]
    fold_of_row = np.empty(len(label), dtype=np.int64)
    # the folds 0, 1, ..., 4, 0, 1, ... for the rows in this order
    fold_of_row[rows_by_class] = np.arange(len(label)) % N_FOLDS
    return fold_of_row


def held_out_posteriors(
    rows: LabelledImages,
    seed: int,
    log_posteriors: Callable[[LabelledImages, LabelledImages], Tensor],
) -> tuple[Tensor, Tensor] | None:
    """Compute the held-out rows' log posteriors (V, N, K) for each of V values, and labels (N,).

    If a class has only one labelled row, this row is never held out, because nothing would be known
    about the class. Return None if every class has at most one row.

    Args:
        rows: The labelled rows.
        seed: Seed for the folds.
        log_posteriors: Function that gets the rows to fit on, and a fold's n held-out rows. It
            returns the log posteriors (V, n, K) for the held-out rows.
    """
    posteriors_of_folds = []
    held_out_labels = []
    for is_held_out in _held_out_masks(rows, seed):
        held_out_index = is_held_out.nonzero().squeeze(1)
        held_out_rows = rows.take(held_out_index)
        index_to_fit = (~is_held_out).nonzero().squeeze(1)
        rows_to_fit = rows.take(index_to_fit)
        log_p = log_posteriors(rows_to_fit, held_out_rows)
        posteriors_of_folds.append(log_p)
        held_out_labels.append(held_out_rows.label)
    if not posteriors_of_folds:
        return None
    return torch.cat(posteriors_of_folds, dim=1), torch.cat(held_out_labels)


def _held_out_masks(rows: LabelledImages, seed: int) -> Iterator[Tensor]:
    """Yield a mask (M,) of the held-out rows, for every fold that has such rows."""
    count = torch.bincount(rows.label, minlength=rows.n_classes)
    is_alone_in_class = count[rows.label] == 1
    fold_numbers = class_folds(rows.label.numpy(), seed)
    fold_of_row = torch.from_numpy(fold_numbers)
    for fold in range(N_FOLDS):
        is_held_out = (fold_of_row == fold) & ~is_alone_in_class
        if is_held_out.any():
            yield is_held_out


def likeliest_index(
    rows: LabelledImages,
    seed: int,
    log_posteriors: Callable[[LabelledImages, LabelledImages], Tensor],
) -> int | None:
    """Find the value that makes the held-out labels most likely. Return the value's index.

    Return None if no row is held out. The arguments are those of ``held_out_posteriors``.
    """
    posteriors_and_labels = held_out_posteriors(rows, seed, log_posteriors)
    if posteriors_and_labels is None:
        return None
    log_p, label = posteriors_and_labels
    held_out_rows = torch.arange(len(label))
    log_p_of_label = log_p[:, held_out_rows, label]  # (V, N)
    log_likelihood = log_p_of_label.sum(dim=1)
    return int(log_likelihood.argmax())


def most_accurate_index(
    rows: LabelledImages,
    seed: int,
    log_posteriors: Callable[[LabelledImages, LabelledImages], Tensor],
) -> int | None:
    """Find the value that gives the most right answers to held-out rows. Return the value's index.

    With equal counts the first value is best. Return None if no row is held out. The arguments are
    those of ``held_out_posteriors``.
    """
    posteriors_and_labels = held_out_posteriors(rows, seed, log_posteriors)
    if posteriors_and_labels is None:
        return None
    log_p, label = posteriors_and_labels
    is_right = log_p.argmax(dim=2) == label  # (V, N)
    n_right = is_right.sum(dim=1)
    is_best = n_right == n_right.max()
    return int(is_best.nonzero()[0])


@dataclasses.dataclass
class LinearProbeCV(ClassRegression):
    """The linear probe, with a penalty strength chosen by cross-validation.

    u = 1 - P(t̂ | z), as for ``linear_probe``. C is the inverse strength of the L2 penalty. The
    labels are held out in five folds, and C is the value in ``grid`` that makes the held-out labels
    most likely. In this choice every class has at least the probability 1e-6. If every class has
    one label, no row can be held out, and C is 100, as for ``linear_probe``.

    Args:
        grid: The values of C to choose from.
        max_iter: Maximum number of L-BFGS steps.
        max_bank: Maximum number of training images. If there are more, ``seed`` draws a sample.

    Source: the protocol of Radford et al., ICML 2021, who sweep the penalty on a validation set.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], text)  # 0, 53, 90 degrees
        >>> method = vilu.PREDICTORS["linear_probe_cv"]()
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
        >>> method.notes_["C"]
        10000.0
    """

    name: ClassVar[str] = "linear_probe_cv"
    summary: ClassVar[str] = "logistic regression on image embeddings, penalty by cross-validation"
    reference: ClassVar[str] = "Radford et al., ICML 2021"
    cost: ClassVar[str] = "fit: 31 logistic regressions; score: one product with K weights"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})

    grid: Grid = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
    max_iter: Count = 500
    max_bank: Count = 100_000

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = LabelledImages.of(train, self.max_bank, self.seed)

        def log_posteriors(rows_to_fit: LabelledImages, held_out_rows: LabelledImages) -> Tensor:
            log_p_by_penalty = [
                probe_log_posteriors(rows_to_fit, held_out_rows, inverse_penalty, self.max_iter)
                for inverse_penalty in self.grid
            ]
            return torch.stack(log_p_by_penalty)

        inverse_penalty = PROBE_INVERSE_PENALTY
        best_index = likeliest_index(rows, self.seed, log_posteriors)
        if best_index is not None:
            inverse_penalty = self.grid[best_index]
        weight, bias = fit_regression(
            rows.image, rows.label, rows.n_classes, inverse_penalty, self.max_iter
        )
        tensors = {"weight": weight, "bias": bias, CLASSES: class_texts(train)}
        return Learnt(tensors, {"C": inverse_penalty})


PROBE_INVERSE_PENALTY = 100.0
"""C for ``linear_probe``."""


def probe_log_posteriors(
    rows_to_fit: LabelledImages, rows: LabelledImages, inverse_penalty: float, max_iter: int = 500
) -> Tensor:
    """Compute log posteriors (N, K) for ``rows`` by a linear probe fitted on ``rows_to_fit``.

    Probabilities are clipped to at least ``MIN_PROBABILITY``. ``inverse_penalty`` is the probe's C.
    """
    weight, bias = fit_regression(
        rows_to_fit.image, rows_to_fit.label, rows_to_fit.n_classes, inverse_penalty, max_iter
    )
    log_p = (rows.image.double() @ weight.T + bias).log_softmax(dim=1)
    min_log_p = float(np.log(MIN_PROBABILITY))
    return log_p.clamp(min=min_log_p)


def fit_mix_weights(log_p: Floats, label: NDArray[np.int64]) -> Floats:
    """Find the weights w (2,) of a mix between two posteriors. No weight is negative.

    The log posteriors log p are (N, 2, K). The mix is q ~ exp(w_0 log p_0 + w_1 log p_1), and the
    weights make the labels (N,) most likely under q.
    """
    from scipy.optimize import minimize

    rows = np.arange(len(label))
    log_p_of_label = log_p[rows, :, label]  # (N, 2)

    def loss(weights: Floats) -> tuple[float, Floats]:
        """Return the mean of -log q for the labels, and the gradient in the weights."""
        mixed_log_p = weights[0] * log_p[:, 0] + weights[1] * log_p[:, 1]
        log_norm = np.logaddexp.reduce(mixed_log_p, axis=1, keepdims=True)
        log_q = mixed_log_p - log_norm
        q = np.exp(log_q)
        expected_log_p = np.einsum("nk,nmk->nm", q, log_p)
        gradient = (expected_log_p - log_p_of_label).mean(axis=0)
        mean_loss = float(-log_q[rows, label].mean())
        return mean_loss, gradient

    start = np.array([0.5, 0.5])
    optimum = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2)
    return np.asarray(optimum.x)


@dataclasses.dataclass
class ProbeAndZeroShot(ClassRegression):
    """A log-linear mix between the zero-shot posterior and a linear probe.

        u = 1 - q_t̂, with log q = a log p_zero_shot + w log p_probe - const

    t̂ is the answer. Each of five folds is held out once. a and w are not negative, and make the
    held-out labels most likely. If every class has one label, no row can be held out, and
    a = w = 1/2. The probe's probabilities are at least 1e-6. Otherwise a class without labels would
    have the probability 0.

    Args:
        C: Inverse strength of the probe's L2 penalty, as in scikit-learn.
        max_iter: Maximum number of L-BFGS steps for the probe.
        max_bank: Maximum number of training images. If there are more, ``seed`` draws a sample.

    Source: this project, as the plainest way to use both.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target, logit_scale=10.0)
        >>> new = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # 0, 53, 90 degrees
        >>> new = vilu.Embeddings(new, text, logit_scale=10.0)
        >>> method = vilu.PREDICTORS["probe_and_zero_shot"]()
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "probe_and_zero_shot"
    summary: ClassVar[str] = "log-linear mix of zero-shot posterior and linear probe, cross-fitted"
    reference: ClassVar[str] = "this project, 2026"
    cost: ClassVar[str] = "fit: 6 logistic regressions; score: one product with K weights"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = f"{ClassRegression._forms} mix:d2"

    C: Positive = PROBE_INVERSE_PENALTY
    max_iter: Count = 500
    max_bank: Count = 100_000

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = LabelledImages.of(train, self.max_bank, self.seed)

        def log_posteriors(rows_to_fit: LabelledImages, held_out_rows: LabelledImages) -> Tensor:
            probe = probe_log_posteriors(rows_to_fit, held_out_rows, self.C, self.max_iter)
            zero_shot = held_out_rows.logits.log_softmax(dim=1)
            return torch.stack([zero_shot, probe])

        weights = np.array([0.5, 0.5])
        posteriors_and_labels = held_out_posteriors(rows, self.seed, log_posteriors)
        if posteriors_and_labels is not None:
            log_p, label = posteriors_and_labels
            log_p_by_row = log_p.transpose(0, 1)  # (N, 2, K): zero-shot and probe
            weights = fit_mix_weights(log_p_by_row.numpy(), label.numpy())
        weight, bias = fit_regression(rows.image, rows.label, rows.n_classes, self.C, self.max_iter)
        tensors = {
            "weight": weight,
            "bias": bias,
            CLASSES: class_texts(train),
            "mix": torch.from_numpy(weights),
        }
        return Learnt(tensors, {"zero_shot": weights[0], "probe": weights[1]})

    def _logits(self, batch: Batch) -> Tensor:
        """Compute the mix's logits (B, K) float64."""
        zero_shot = float64(batch.logits).log_softmax(dim=1)
        min_log_p = float(np.log(MIN_PROBABILITY))
        probe = super()._logits(batch).log_softmax(dim=1)
        probe = probe.clamp(min=min_log_p)
        weights = self.tensor("mix", zero_shot.device)
        mixed_logits: Tensor = weights[0] * zero_shot + weights[1] * probe
        return mixed_logits


@dataclasses.dataclass
class AddedToZeroShot(ClosedSet):
    """A method that adds logits, learned from labelled images, to the zero-shot logits.

    For an image with the zero-shot logits l and the answer t̂, the uncertainty is u = 1 - q_t̂.
    Here q = softmax(l + added).
    """

    is_probability: ClassVar[bool] = True

    max_bank: Count = 100_000

    @abstractmethod
    def _added_logits(self, batch: Batch) -> Tensor:
        """Compute logits (B, K) float64 to add to the zero-shot logits."""

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the log posterior (B, K) float64 from the sum of the logits."""
        added_logits = self._added_logits(batch)
        logits = float64(batch.logits).to(added_logits.device) + added_logits
        return logits.log_softmax(dim=1)

    def _score(self, batch: Batch) -> Tensor:
        log_p = self.log_posterior(batch)
        log_odds = failure_log_odds(log_p, batch)
        return torch.sigmoid(log_odds)


@dataclasses.dataclass
class GDAAndZeroShot(AddedToZeroShot):
    """Gaussian discriminant analysis on image embeddings, added to the zero-shot logits.

        u = 1 - q_t̂, with q = softmax(l + alpha (W z + b))
        W = M S, b_c = -1/2 m_c S m_c

    l are the zero-shot logits of the image z, and t̂ is the answer. M (K, D) has the class means
    m_c. C is the covariance (divisor N - 1) of the N labelled images around the class means. All
    classes share the precision S = D ((N - 1) C + tr(C) I)^-1 (Kubokawa and Srivastava 2008). Class
    priors are equal.

    alpha is the value in ``grid`` that gives the most right answers to held-out rows (five folds).
    With one label per class, C is zero and nothing is added. The original work then uses augmented
    images.

    Args:
        grid: The values of alpha to choose from. The default values are from the released code.
        max_bank: Maximum number of training images. If there are more, ``seed`` draws a sample.

    Source: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR
    2024, and its code (mrflogs/ICLR24). The original takes the alpha with the best accuracy on a
    validation set. The code augments images in several epochs. Here each image is embedded once.
    Here a class without images gets the mean over all images. In the original this class mean is
    undefined.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target, logit_scale=10.0)
        >>> new = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # 0, 53, 90 degrees
        >>> new = vilu.Embeddings(new, text, logit_scale=10.0)
        >>> vilu.PREDICTORS["gda_and_zero_shot"]().fit(train).predict_uncertainty(new).round(2)
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "gda_and_zero_shot"
    summary: ClassVar[str] = "Gaussian discriminants of images, added to the zero-shot logits"
    reference: ClassVar[str] = "Wang et al., ICLR 2024"
    cost: ClassVar[str] = "fit: 6 inverses of D x D; score: one product with K vectors"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor
    _forms: ClassVar[str] = "weight:dKD bias:dK classes:fKD"

    grid: Grid = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = LabelledImages.of(train, self.max_bank, self.seed)

        def log_posteriors(rows_to_fit: LabelledImages, held_out_rows: LabelledImages) -> Tensor:
            weight, bias = gaussian_discriminants(rows_to_fit)
            discriminants = held_out_rows.image.double() @ weight.T + bias
            log_p_by_alpha = [
                (held_out_rows.logits + alpha * discriminants).log_softmax(dim=1)
                for alpha in self.grid
            ]
            return torch.stack(log_p_by_alpha)

        weight, bias = gaussian_discriminants(rows)
        alpha = 0.0  # with one label per class there is no covariance, and nothing is added
        best_index = most_accurate_index(rows, self.seed, log_posteriors)
        if best_index is not None:
            alpha = self.grid[best_index]
        tensors = {"weight": alpha * weight, "bias": alpha * bias, CLASSES: class_texts(train)}
        return Learnt(tensors, {"alpha": alpha})

    def _added_logits(self, batch: Batch) -> Tensor:
        image = float64(batch.image)
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(image.device)
        weight = self.tensor("weight", image.device)[class_of_candidate]
        bias = self.tensor("bias", image.device)[class_of_candidate]
        return image @ weight.T + bias


def gaussian_discriminants(rows: LabelledImages) -> tuple[Tensor, Tensor]:
    """Compute W (K, D) and b (K,), which ``GDAAndZeroShot`` defines."""
    image = rows.image.double()
    dim = image.shape[1]
    count = torch.bincount(rows.label, minlength=rows.n_classes)
    total = torch.zeros(rows.n_classes, dim, dtype=torch.float64)
    total.index_add_(0, rows.label, image)
    mean = total / count.clamp(min=1)[:, None]
    mean[count == 0] = image.mean(dim=0)  # a class without images has the mean over all images
    centred = image - mean[rows.label]
    n = len(image)
    scatter = centred.T @ centred  # (n - 1) C, with C the covariance within classes
    trace = float(scatter.trace()) / max(n - 1, 1)  # tr(C)
    if trace <= MIN_VARIANCE:  # all images equal their class mean: nothing is added
        return torch.zeros_like(mean), torch.zeros(rows.n_classes, dtype=torch.float64)
    ridge = trace * torch.eye(dim, dtype=torch.float64)
    precision = dim * torch.linalg.inv(scatter + ridge)  # S
    weight = mean @ precision
    bias = -(weight * mean).sum(dim=1) / 2
    return weight, bias


MIN_VARIANCE = 1e-12
"""Unit vectors are treated as equal if the variance is at most this number."""


@dataclasses.dataclass
class TipAdapter(AddedToZeroShot):
    """Tip-Adapter without training: a cache of labelled images, added to the zero-shot logits.

        u = 1 - q_t̂, with q = softmax(l + alpha A)
        A_c = sum over labelled images x of class c: exp(-beta (1 - z^T x))

    l are the zero-shot logits of the image z, and t̂ is the answer. alpha is in ``alphas`` and beta
    is in ``betas``. The chosen pair (alpha, beta) gives the most right answers to held-out rows
    (five folds). If every class has one label, no row can be held out, and the pair is (1, 5.5), as
    in the paper.

    Args:
        alphas: The values of alpha to choose from.
        betas: The values of beta to choose from.
        max_bank: Maximum number of training images. If there are more, ``seed`` draws a sample.

    Source: Zhang et al., "Tip-Adapter", ECCV 2022, and the released code. The code searches a finer
    grid by accuracy on a validation set.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth 0 up to 63 degrees, answer 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target, logit_scale=10.0)
        >>> new = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # 0, 53, 90 degrees
        >>> new = vilu.Embeddings(new, text, logit_scale=10.0)
        >>> vilu.PREDICTORS["tip_adapter"]().fit(train).predict_uncertainty(new).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "tip_adapter"
    summary: ClassVar[str] = "cache of labelled images, added to the zero-shot logits"
    reference: ClassVar[str] = "Zhang et al., ECCV 2022"
    cost: ClassVar[str] = "fit: products of the labelled images; score: one product with them"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    # name, type (f float32, d float64, i int64, ? bool) and sizes for each learned tensor.
    # iN<K: integers (N,) from 0 to K - 1.
    _forms: ClassVar[str] = "bank:fND classes:fKD labels:iN<K shape:d2"

    alphas: Grid = (0.1, 0.3, 1.0, 3.0, 10.0)
    betas: Grid = (1.0, 3.0, 5.5, 10.0, 20.0)

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        rows = LabelledImages.of(train, self.max_bank, self.seed)
        alpha_beta_pairs = list(itertools.product(self.alphas, self.betas))

        def log_posteriors(rows_to_fit: LabelledImages, held_out_rows: LabelledImages) -> Tensor:
            logits_of_beta = {
                beta: cache_logits(
                    held_out_rows.image, rows_to_fit.image, rows_to_fit.label, beta, rows.n_classes
                )
                for beta in self.betas
            }
            log_p_by_pair = [
                (held_out_rows.logits + alpha * logits_of_beta[beta]).log_softmax(dim=1)
                for alpha, beta in alpha_beta_pairs
            ]
            return torch.stack(log_p_by_pair)

        # the paper's values, used if no row can be held out
        alpha = 1.0
        beta = 5.5
        best_index = most_accurate_index(rows, self.seed, log_posteriors)
        if best_index is not None:
            alpha, beta = alpha_beta_pairs[best_index]
        tensors = {
            "bank": rows.image,
            CLASSES: class_texts(train),
            "labels": rows.label,
            "shape": torch.tensor([alpha, beta], dtype=torch.float64),
        }
        return Learnt(tensors, {"alpha": alpha, "beta": beta})

    def _added_logits(self, batch: Batch) -> Tensor:
        device = batch.image.device
        classes = self.classes_of(batch.text)
        class_of_candidate = classes.to(device)
        bank = self.tensor("bank", device)
        label = self.tensor("labels", device)
        alpha_and_beta = self.tensor("shape", device)
        alpha, beta = alpha_and_beta.tolist()
        n_classes = len(self.learned_[CLASSES])
        logits = cache_logits(batch.image, bank, label, beta, n_classes)
        added: Tensor = alpha * logits[:, class_of_candidate]
        return added


def cache_logits(image: Tensor, bank: Tensor, label: Tensor, beta: float, n_classes: int) -> Tensor:
    """Compute ``TipAdapter``'s A (B, K), float64, from images (B, D) and a labelled bank (M, D)."""
    cosines = float64(image) @ float64(bank).T
    affinity = torch.exp(-beta * (1 - cosines))
    logits = affinity.new_zeros(len(image), n_classes)
    logits.index_add_(1, label, affinity)
    return logits
