"""The method ``vilu_zero``: improve the zero-shot posterior by unlabelled deployment images.

Two things are learned from these images: which classes occur, and an image prototype per class.

Shapes: N rows to learn from, B rows to score, K classes, D embedding width.

Without labels, the rows of a class cannot be counted. Instead, every row has a posterior
probability of the class, and the class's count is the sum of these probabilities over the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.predictors.bank.closed_set import ClosedSet
from vilu.predictors.bank.search import Count, draw_rows
from vilu.predictors.contract.coalitions import Coalitions, PoolCoalitions
from vilu.predictors.contract.labelled import (
    MIN_RELIABLE_ROWS,
    class_texts,
    failure_log_odds,
    log_odds_with_outside,
)
from vilu.predictors.contract.predictor import CLASSES, Learnt
from vilu.predictors.nn.attention import StartLogits
from vilu.predictors.nn.pooled import PooledLogits
from vilu.predictors.plus.ood import NEGATIVES, Outside, SeesOutside, learn_from_words

MAX_EM_ROWS = 20_000
"""Maximum number of rows used to estimate the class counts. The rows are drawn at random."""
N_EM_PASSES = 50
"""How many EM passes go over these rows."""
PSEUDO_COUNT = 0.5
"""EM adds this many rows to the count of every class.

The zero-shot model confuses many rare classes with frequent classes. Without the added rows, EM
gives such rare classes a count of zero.
"""
N_ROUNDS = 2
"""How many passes learn prototypes.

The first pass uses the zero-shot posterior, and the second the pooled posterior.
"""
RIDGE = 0.7
"""The covariance within classes is averaged with a spherical covariance, which has this weight."""
NEGLIGIBLE_VARIANCE = 1e-12
"""All images count as equal if the variance is at most this."""
ABSENT_MEAN_COUNT = 0.5
"""Assumed mean count, in rows, for an absent class."""
PRIOR_OCCURRING_CLASSES = 5.0
"""As a prior, this many classes are added to the K classes and are taken to occur.

Without this prior, a few classes with a count of zero would make most classes count as absent.
"""
MISCOUNTED_SHARE = 0.1
"""Assumed share of the occurring classes that have a count near zero.

The zero-shot model gives the rows of these classes to other classes.
"""
MAX_ANCHOR_ROWS = 100.0
"""A class mean has an anchor, computed from the class text, with at most this weight in rows."""
FULL_WEIGHT_VARIANCE = 0.2
"""The prototypes get full weight if the variance between class means is at least this.

The unit is the variance within classes.
"""
MIN_PLACEMENT = 0.5
"""The prototypes get no weight if purity and slope are both at most this (``placement``)."""
FULL_PLACEMENT = 0.7
"""The prototypes get full weight if purity or slope is at least this (``placement``)."""
MIN_ROWS_PER_CLASS = 2.0
"""The prototypes get no weight if an occurring class has at most this many rows on average."""
OCCURRENCE_STRENGTHS = (0.0, 0.25, 0.5, 1.0)
"""Candidate values for lambda, the factor on the log occurrence probabilities."""
PROTOTYPE_SCALES = (0.0, *(0.01 * 1.3**i for i in range(24)))
"""Candidate values for tau, the factor on the prototypes' discriminants: 0, and 0.01 to 4.2."""


@dataclasses.dataclass
class ViLUZero(SeesOutside, ClosedSet):
    """The zero-shot posterior, pooled with image prototypes learned from unlabelled rows.

    The answer stays the zero-shot answer. An image z has the zero-shot logit l_c for class c. A
    pooled logit l'_c is an average of l_c and a prototype term tau g_c, which has the weight s. An
    offset o_c is added:

        l'_c = (1 - s) l_c + s tau g_c(z) + o_c

    The terms are explained below.

    Let q be the zero-shot answer's probability under softmax(l'), and P_outside the probability
    that the image shows none of the classes. The uncertainty is

        u = 1 - (1 - P_outside) q

    *Which classes occur* (o_c, at most 0). EM finds the class frequencies pi that make the rows
    likeliest. The posterior p(c | z) is in proportion to pi_c exp(l_c). The count n_c is the sum of
    the posteriors p(c | z) over the rows. EM adds half a row to every count.

    The counts are modelled as a mixture of two exponential distributions. A share rho of the
    classes is absent, with a mean count of 1/2. The classes that occur have a mean count of
    N / (K (1 - rho)). The offset is then o_c = lambda log P(c occurs | n_c). lambda in [0, 1] is
    chosen by cross-validation between two halves of the rows. The chosen lambda maximises the mean
    over rows of

        log [sum_c exp(l_c + o_c) / sum_c exp(o_c)]

    *Prototypes* (g_c, linear in z). A class is modelled as a Gaussian over images. All Gaussians
    have the same covariance, and g_c is the discriminant of class c. Every row is a soft member in
    class c, with its posterior as weight. The mean of a class lies between two means:

    - The prior mean is m + a (t_c - t), with the mean image m, the class text t_c, the mean text t
      and a slope a.
    - The members' mean has the weight n_c / (n_c + kappa).

    kappa, a and the covariance are estimated from the rows.

    *Factor tau.* The prototypes from one half of the rows predict the posterior in the other half.
    tau minimises the cross-entropy of this prediction. If the prototypes do not predict the
    posterior, tau is 0.

    *Weight s.* s is ``share`` times three factors in [0, 1]:

    1. 1 - 2 K' / N, with K' = K (1 - rho) occurring classes. Up to two rows per occurring class
       this factor is 0, because prototypes from so few rows do harm.
    2. r^2. r is the variance between the class means divided by ``FULL_WEIGHT_VARIANCE``, and at
       most 1.
    3. A factor that is large if the class means of confused classes stay apart (``placement``).

    *Images that show none of the classes* (P_outside). If the data have the column ``negatives``
    with everyday words, P_outside comes from a mixture of images inside and outside
    (``vilu.predictors.plus.ood``). Without this column P_outside is 0.

    The fit needs no labels (``needs_labels`` is false) and ignores labels. Only candidates known
    from the fit can be scored.

    Args:
        share: The prototypes' largest weight in the pool.
        max_bank: Maximum number of images to learn from. If there are more, ``seed`` draws a
            sample.

    Source: this project. EM for class frequencies: Saerens et al., Neural Computation 2002. Soft
    memberships and text anchors: transductive CLIP (Martin et al., 2024; Zanella et al., 2024),
    here applied to new rows after the fit.

    Examples:
        >>> import numpy as np, vilu
        >>> text = np.eye(8)
        >>> image = text[np.arange(400) % 4]  # only classes 0 to 3 occur
        >>> data = vilu.Embeddings(image, text, logit_scale=2.0)
        >>> new = vilu.Embeddings(text[[0, 7]], text, logit_scale=2.0)  # classes 0 and 7
        >>> vilu.MCM().predict_uncertainty(new).round(1)
        array([0.5, 0.5])
        >>> vilu.PREDICTORS["vilu_zero"]().fit(data).predict_uncertainty(new).round(1)
        array([0.4, 0.7])
    """

    name: ClassVar[str] = "vilu_zero"
    summary: ClassVar[str] = (
        "zero-shot posterior pooled with prototypes and class frequencies of unlabelled images"
    )
    reference: ClassVar[str] = "this project, 2026"
    cost: ClassVar[str] = (
        "fit: about 150 passes over 20,000 rows; score: two products with K vectors"
    )
    no_captions: ClassVar[str | None] = (
        "it learns which classes occur, and captions have no classes"
    )
    is_probability: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    optional_columns: ClassVar[tuple[str, ...]] = (NEGATIVES,)
    # name, type and sizes of the learned tensors, see ``require_forms``
    _forms: ClassVar[str] = f"scale:d centre:dD weight:dKD bias:dK classes:fKD {Outside.forms}"

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_bank: Count = 50_000

    @property
    def label(self) -> str:
        """The name, with "(outside)" where the outcome "outside" was learned."""
        if self.outcome:
            return f"{self.name} (outside)"
        return self.name

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Return the word column, if the data have this column."""
        if NEGATIVES in train.columns:
            return self.optional_columns
        return ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The word column, if the outcome "outside" was learned from words."""
        return self.outcome.columns

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        bank, _ = draw_rows(train, self.max_bank, self.seed)
        learned_classes = learn_classes(bank, self.share, self.seed, self.device_)
        outside = Outside.not_learned()
        if NEGATIVES in bank.columns and len(bank.index) >= MIN_RELIABLE_ROWS:
            outside = learn_from_words(bank, all_known_inside=False)
        tensors = {
            "scale": torch.tensor(1 - learned_classes.share, dtype=torch.float64),
            "centre": learned_classes.centre,
            "weight": learned_classes.weight,
            "bias": learned_classes.bias + learned_classes.log_occurrence,
            CLASSES: class_texts(train),
            **outside.tensors(),
        }
        return Learnt(tensors, {**learned_classes.notes, **outside.notes})

    def pooled_parts(self, batch: Batch) -> PooledLogits:
        """Compute the three parts of a batch's pooled logits l'."""
        image = normalize(batch.image, dim=1)
        image = float64(image)
        class_of_candidate = self.classes_of(batch.text)
        classes = class_of_candidate.to(image.device)
        scale = self.tensor("scale", image.device)
        centre = self.tensor("centre", image.device)
        weight = self.tensor("weight", image.device)
        bias = self.tensor("bias", image.device)
        zero_shot = scale * float64(batch.logits - batch.logit_bias)
        return PooledLogits(
            zero_shot=zero_shot,
            class_offset=bias[classes][None],
            image_effect=(image - centre) @ weight[classes].T,
        )

    def _score(self, batch: Batch) -> Tensor:
        log_odds = failure_log_odds(self.pooled_parts(batch).logits, batch)
        outside_log_odds = self.outside_log_odds(batch)
        log_odds = log_odds_with_outside(log_odds, outside_log_odds)
        return torch.sigmoid(log_odds)

    def outside_log_odds(self, batch: Batch) -> Tensor:
        """Compute the log-odds (B,) float64 that the image shows none of the classes."""
        class_of_candidate = self.classes_of(batch.text)
        return self.outcome.log_odds(batch, class_of_candidate)

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the candidates' log probabilities (B, K) float64 under the pooled logits."""
        return self.pooled_parts(batch).logits.log_softmax(dim=-1)

    def coalitions(self) -> Coalitions:
        """Return the coalitions of the parts of the pooled logits."""
        return PoolCoalitions(self.pooled_parts, self.outside_log_odds if self.outcome else None)


class LearnedClasses(NamedTuple):
    """Terms in the pooled logits l' for K classes, learned from rows without labels.

    The zero-shot logits l of a unit image z are pooled with prototypes:

        l'_c = (1 - share) l_c + (z - centre) . weight_c + bias_c + log_occurrence_c

    All tensors are float64.
    """

    share: float
    centre: Tensor  # (D,)
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    log_occurrence: Tensor  # (K,), o in ``ViLUZero``
    notes: dict[str, Any]

    def start_logits(self, text: Tensor, logit_scale: float) -> StartLogits:
        """Write the pooled logits as l_c plus a residual, and return the residual's terms.

        The residual is linear in the image, with the term -share l_c. ``text`` (K, D) are the class
        texts.
        """
        # For every image z, share l_c = scaled_text_c . z. With the centre subtracted from z, this
        # is scaled_text_c . (z - centre) + scaled_text_c . centre: a weight and a bias.
        scaled_text = self.share * logit_scale * float64(text).cpu()
        return StartLogits(
            centre=self.centre,
            weight=self.weight - scaled_text,
            bias=self.bias - scaled_text @ self.centre,
            log_occurrence=self.log_occurrence,
        )


def learn_classes(rows: Rows, max_share: float, seed: int, device: torch.device) -> LearnedClasses:
    """Learn which classes occur among the rows, and a prototype for each class.

    ``max_share`` is the prototypes' largest weight in the pool.
    """
    text = class_texts(rows)
    share = 0.0
    prototype_scale = 0.0
    prototypes = Classifier.zero(text)
    log_occurrence = torch.zeros(len(text), dtype=torch.float64)
    notes: dict[str, Any] = {}
    # Each half of the rows checks the estimates from the other half. Too few rows cannot be split
    # into two halves. Nothing is learned then, and the pooled logits are the zero-shot logits.
    n_rows = len(rows.index)
    if n_rows >= MIN_RELIABLE_ROWS:
        halves = UnlabelledHalves(rows, seed, device)
        log_occurrence, absent_share = halves.estimate_occurrence()
        n_occurring = len(text) * (1 - absent_share)
        max_share = max_share * row_count_factor(n_rows, n_occurring)
        purity = halves.purity(log_occurrence)
        share, prototype_scale, prototypes = halves.prototypes(log_occurrence, max_share, purity)
        notes = {
            "absent": absent_share,
            "share": share,
            "trust": prototype_scale,
            "slope": prototypes.slope,
            "anchor": prototypes.anchor,
            "apart": prototypes.separation,
            "purity": purity,
        }
    factor = share * prototype_scale
    return LearnedClasses(
        share=share,
        centre=prototypes.centre,
        weight=factor * prototypes.weight,
        bias=factor * prototypes.bias,
        log_occurrence=log_occurrence,
        notes=notes,
    )


class SoftMembers(NamedTuple):
    """Sums over rows that are soft members in K classes.

    A row with the image x and the posterior p (K,) is a member in class c with the weight p_c. If
    there are sums for two halves of the rows, each tensor has a first dimension of size 2.
    """

    counts: Tensor  # (K,) sums of p: the class counts
    squares: Tensor  # (K,) sums of p^2
    image_sums: Tensor  # (K, D) sums of p x
    image_products: Tensor  # (D, D) sum of x x^T

    @classmethod
    def empty(cls, n_classes: int, dim: int) -> SoftMembers:
        """Return the sums over two empty halves."""
        return cls(
            counts=torch.zeros(2, n_classes, dtype=torch.float64),
            squares=torch.zeros(2, n_classes, dtype=torch.float64),
            image_sums=torch.zeros(2, n_classes, dim, dtype=torch.float64),
            image_products=torch.zeros(2, dim, dim, dtype=torch.float64),
        )

    def add(self, half: int, posterior: Tensor, image: Tensor) -> None:
        """Add rows with posteriors (b, K) and images (b, D) to a half."""
        self.counts[half] += posterior.sum(0).cpu()
        squares = posterior.square().sum(0)
        self.squares[half] += squares.cpu()
        self.image_sums[half] += (posterior.T @ image).cpu()
        self.image_products[half] += (image.T @ image).cpu()

    def of_half(self, half: int) -> SoftMembers:
        """Return the sums over one half of the rows."""
        return SoftMembers(*(both_halves[half] for both_halves in self))

    def of_both_halves(self) -> SoftMembers:
        """Return the sums over all rows."""
        return SoftMembers(*(both_halves.sum(0) for both_halves in self))


class Classifier(NamedTuple):
    """Discriminants of K classes, and the estimates from the fit.

    An image z has the discriminants g = (z - centre) weight^T + bias.
    """

    centre: Tensor  # (D,)
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    slope: float = 0.0  # a in ``fit_classifier``
    anchor: float = 0.0  # kappa in ``fit_classifier``, in rows
    separation: float = 0.0  # variance between class means, divided by the variance within classes

    @classmethod
    def zero(cls, text: Tensor) -> Classifier:
        """Return the classifier with all discriminants 0, for classes with texts (K, D)."""
        n_classes, dim = text.shape
        return cls(
            centre=torch.zeros(dim, dtype=torch.float64),
            weight=torch.zeros(n_classes, dim, dtype=torch.float64),
            bias=torch.zeros(n_classes, dtype=torch.float64),
        )

    def discriminants(self, image: Tensor) -> Tensor:
        """Compute the discriminants (b, K) float32 for images (b, D)."""
        centred = image - self.centre.to(image)
        return centred @ self.weight.to(image).T + self.bias.to(image)


def fit_classifier(member_sums: SoftMembers, text: Tensor) -> Classifier:
    """Fit a Gaussian for each class, with a common covariance W and means anchored at the texts.

    Class c has the text t_c (a row in ``text``) and the count n_c. m_c is the mean image over the
    soft members in class c, and m is the mean of all N images. t is the mean text, weighted by n_c.
    The model is

        m_c = m + a (t_c - t) + e_c

    The error e_c has the covariance (1 / n_c + 1 / kappa) W. All distances use the metric W.

    1. W is the scatter within classes, divided by N - d. Here d are the means' degrees of freedom,
       sum_c sum_i p_ic^2 / n_c, with the posterior p_ic of row i for class c.
    2. a is the slope in the regression of m_c - m on t_c - t by weighted least squares. It is at
       least 0.
    3. kappa is the inverse of the variance of the residuals e_c without sampling noise. It is at
       most ``MAX_ANCHOR_ROWS``.
    4. The result's ``separation`` is the variance of m_c - m without sampling noise.
    """
    count = member_sums.counts.clamp(min=1e-9)  # a divisor, so never 0
    n = float(member_sums.counts.sum())
    mean = member_sums.image_sums.sum(0) / n
    class_means = member_sums.image_sums / count[:, None]
    centred_means = class_means - mean
    scatter = member_sums.image_products - n * torch.outer(mean, mean)
    scatter_between = (centred_means.T * member_sums.counts) @ centred_means
    scatter_within = scatter - scatter_between
    # A division by N would treat the means as known. The variance in small classes would then be
    # underestimated.
    degrees_of_means = float((member_sums.squares / count).sum())
    covariance = scatter_within / max(n - degrees_of_means, 1.0)
    dim = len(covariance)
    variance = float(covariance.trace()) / dim
    if variance <= NEGLIGIBLE_VARIANCE:
        return Classifier.zero(text)
    # Few rows estimate D^2 / 2 covariances badly, and the inverse magnifies small eigenvalues. The
    # covariance is therefore mixed with a spherical covariance.
    identity = torch.eye(dim, dtype=torch.float64)
    precision = torch.linalg.inv((1 - RIDGE) * covariance + RIDGE * variance * identity)
    # The weighted least-squares slope is a quotient: products of means with texts, divided by
    # products of texts with texts.
    centred_texts = text - (member_sums.counts @ text) / n
    weighted_texts = member_sums.counts[:, None] * (centred_texts @ precision)
    means_on_texts = (weighted_texts * centred_means).sum()
    texts_on_texts = (weighted_texts * centred_texts).sum().clamp(min=1e-12)
    slope = float((means_on_texts / texts_on_texts).clamp(min=0))
    # an image's mean square within a class, in the metric W
    mean_square_within = float((precision * covariance).sum())

    def variance_without_noise(vectors: Tensor) -> float:
        """Compute the variance over vectors (K, D), one per class, without sampling noise.

        The unit is W. A vector has the noise 1 / n_c, and the weight n_c / N in the mean square. So
        K vectors have the noise K / N in sum.
        """
        squares = ((vectors @ precision) * vectors).sum(1)
        mean_square = float((member_sums.counts * squares).sum()) / (mean_square_within * n)
        return mean_square - len(count) / n

    residual_variance = variance_without_noise(centred_means - slope * centred_texts)
    anchor = 1 / max(residual_variance, 1 / MAX_ANCHOR_ROWS)
    # the average of a class's members' mean, with weight n_c, and its prior mean, with weight kappa
    weighted_sums = member_sums.counts[:, None] * centred_means + anchor * slope * centred_texts
    means = weighted_sums / (member_sums.counts + anchor)[:, None]
    # With a common precision P, the log density of a Gaussian with the mean v at an image x is
    # x P v - v P v / 2, up to terms that are equal for all classes.
    weight = means @ precision
    bias = -(weight * means).sum(1) / 2
    separation = variance_without_noise(centred_means)
    return Classifier(mean, weight, bias, slope, anchor, separation)


class UnlabelledHalves:
    """Unlabelled rows in two random halves, read block by block.

    Estimates from one half are evaluated on the other half.
    """

    def __init__(self, rows: Rows, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows.index), generator=generator)
        # The positions (N / 2,) of each half's rows. The rows are shuffled, and then every second
        # row belongs to the same half.
        self.halves = [order[half::2].sort().values for half in (0, 1)]
        self.rows = rows
        self.device = device
        self.text = class_texts(rows)

    def blocks(self, half: int, max_rows: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield unit images (b, D) and zero-shot logits (b, K), float32, block by block.

        The blocks have all rows of a half, or the first ``max_rows`` rows.
        """
        index = self.rows.index[self.halves[half][:max_rows]]
        rows_of_half = dataclasses.replace(self.rows, index=index)
        for batch in rows_of_half.batches(SCORING_BATCH):
            device_batch = batch.to(self.device)
            yield normalize(device_batch.image, dim=1), device_batch.logits

    def _float32_on_device(self, offset: Tensor) -> Tensor:
        """Return offsets (K,) cast to float32, on the device of the blocks."""
        return offset.float().to(self.device)

    def counts(self, halves: tuple[int, ...]) -> Tensor:
        """Estimate the class counts (K,) float64 of the rows in the given halves, by EM.

        EM begins with equal counts. At most ``MAX_EM_ROWS`` / 2 rows in each half are read.
        """
        # EM by Saerens et al., Neural Computation 2002, with a Dirichlet prior on the class
        # frequencies pi. EM ends at the frequencies that maximise
        #     sum_rows log sum_c pi_c exp(l_c) + PSEUDO_COUNT sum_c log pi_c.
        # A pass computes every row's posterior. Its prior is in proportion to count + PSEUDO_COUNT.
        # The new counts are the sums of the posteriors.
        max_rows = MAX_EM_ROWS // 2  # in each half
        n = 0
        for half in halves:
            n += min(len(self.halves[half]), max_rows)
        count = torch.full((len(self.text),), n / len(self.text), dtype=torch.float64)
        for _ in range(N_EM_PASSES):
            log_count = (count + PSEUDO_COUNT).log()
            prior = self._float32_on_device(log_count)
            count = torch.zeros_like(count)
            for half in halves:
                for _, logits in self.blocks(half, max_rows):
                    posterior = (logits + prior).softmax(1)
                    count_of_block = posterior.sum(0)
                    count += count_of_block.double().cpu()
        return count

    def estimate_occurrence(self) -> tuple[Tensor, float]:
        """Return the offsets o (K,) in ``ViLUZero``, and the share of absent classes."""
        counts = self.counts(halves=(0, 1))
        log_presence, absent_share = fit_presence(counts)
        all_occur = not bool(log_presence.any())  # every log P(c occurs) is 0
        if all_occur:
            return log_presence, 0.0
        # The evidence in one half is computed with the counts from the other half. With counts from
        # the same half, the full strength would always have the most evidence.
        evidence = torch.zeros(len(OCCURRENCE_STRENGTHS), dtype=torch.float64)
        for half in (0, 1):
            counts_of_other = self.counts(halves=(1 - half,))
            log_presence_in_other, _ = fit_presence(counts_of_other)
            evidence += self._evidence(half, log_presence_in_other)
        strength = OCCURRENCE_STRENGTHS[int(evidence.argmax())]
        if strength == 0:
            absent_share = 0.0
        return strength * log_presence, absent_share

    def _evidence(self, half: int, log_presence: Tensor) -> Tensor:
        """Compute the log-evidence (S,) in one half of the rows, for each of the S strengths s.

        ``log_presence`` (K,) are the log occurrence probabilities o. The log-evidence is the sum
        over rows of

            log [sum_c exp(l_c + s o_c) / sum_c exp(s o_c)]
        """
        # The denominator is the same for all rows, so its logarithm is subtracted from s o_c here.
        offsets = []
        for strength in OCCURRENCE_STRENGTHS:
            offset = strength * log_presence
            log_denominator = offset.logsumexp(0)
            offsets.append(offset - log_denominator)
        total = torch.zeros(len(offsets), dtype=torch.float64)
        for _, logits in self.blocks(half, MAX_EM_ROWS // 2):
            for index, offset in enumerate(offsets):
                device_offset = self._float32_on_device(offset)
                log_likelihood = (logits + device_offset).logsumexp(1)
                evidence = log_likelihood.double().sum()
                total[index] += evidence.cpu()
        return total

    def prototypes(
        self, log_occurrence: Tensor, max_share: float, purity: float
    ) -> tuple[float, float, Classifier]:
        """Learn prototypes. Return their weight, at most ``max_share``, then tau, then them."""
        text = float64(self.text).cpu()
        share = 0.0
        prototype_scale = 0.0
        no_prototypes = Classifier.zero(text)
        # each half is scored with the prototypes from the other half
        other_half_prototypes = [no_prototypes, no_prototypes]
        prototypes = no_prototypes
        for _ in range(N_ROUNDS):
            member_sums = self._member_sums(
                log_occurrence, other_half_prototypes, prototype_scale, share
            )
            sums_of_first_half = member_sums.of_half(0)
            first_prototypes = fit_classifier(sums_of_first_half, text)
            sums_of_second_half = member_sums.of_half(1)
            second_prototypes = fit_classifier(sums_of_second_half, text)
            other_half_prototypes = [second_prototypes, first_prototypes]
            prototypes = fit_classifier(member_sums.of_both_halves(), text)
            prototype_scale = self._best_prototype_scale(log_occurrence, other_half_prototypes)
            share = 0.0
            if prototype_scale:
                relative_variance = prototypes.separation / FULL_WEIGHT_VARIANCE
                separation_factor = min(max(relative_variance, 0.0), 1.0) ** 2
                share = max_share * separation_factor * placement(purity, prototypes.slope)
        return share, prototype_scale, prototypes

    def purity(self, log_occurrence: Tensor) -> float:
        """Compute the share of the soft memberships in which the row belongs to the class.

        The row's posterior is p = softmax(l + o). The expected share is the sum of p_c^2 over rows
        and classes, divided by N. At most ``MAX_EM_ROWS`` / 2 rows in each half are read.
        """
        # A row is a member in class c with the weight p_c. If posteriors are calibrated, the row
        # also belongs to class c with the probability p_c. The product is p_c^2.
        offset = self._float32_on_device(log_occurrence)
        squares = 0.0
        n = 0
        for half in (0, 1):
            for _, logits in self.blocks(half, MAX_EM_ROWS // 2):
                posterior = (logits + offset).softmax(1)
                squares += float(posterior.square().sum(dtype=torch.float64))
                n += len(logits)
        return squares / n

    def _member_sums(
        self,
        log_occurrence: Tensor,
        other_half_prototypes: list[Classifier],
        prototype_scale: float,
        share: float,
    ) -> SoftMembers:
        """Compute sums over the soft members in both halves.

        A row's posterior is pooled with the prototypes from the other half. Their weight s is
        ``share``, and tau is ``prototype_scale``. ``log_occurrence`` (K,) is o in ``ViLUZero``.
        """
        n_classes, dim = self.text.shape
        member_sums = SoftMembers.empty(n_classes, dim)
        for half in (0, 1):
            for image, logits in self.blocks(half):
                pooled_logits = logits + self._float32_on_device(log_occurrence)
                if prototype_scale:
                    # prototypes from the same half would only confirm the memberships in this half
                    discriminants = other_half_prototypes[half].discriminants(image)
                    prototype_logits = prototype_scale * discriminants
                    # l + o becomes (1 - s) l + s tau g + o
                    pooled_logits = pooled_logits + share * (prototype_logits - logits)
                member_sums.add(half, pooled_logits.softmax(1), image)
        return member_sums

    def _best_prototype_scale(
        self, log_occurrence: Tensor, other_half_prototypes: list[Classifier]
    ) -> float:
        """Find the tau with which the prototypes predict the posteriors best.

        g are a row's discriminants by the prototypes from the other half. At the best tau, the
        cross-entropy between the posterior softmax(l + o) and softmax(tau g + o) is least.
        """
        losses = torch.zeros(len(PROTOTYPE_SCALES), dtype=torch.float64)
        offset = self._float32_on_device(log_occurrence)
        for half in (0, 1):
            for image, logits in self.blocks(half, MAX_EM_ROWS // 2):
                posterior = (logits + offset).softmax(1)
                g = other_half_prototypes[half].discriminants(image)
                for index, prototype_scale in enumerate(PROTOTYPE_SCALES):
                    log_predicted = (prototype_scale * g + offset).log_softmax(1)
                    cross_entropy = -(posterior * log_predicted).sum(1).double()
                    losses[index] += cross_entropy.sum().cpu()
        return PROTOTYPE_SCALES[int(losses.argmin())]


def row_count_factor(n_rows: int, n_classes: float) -> float:
    """Compute a factor in [0, 1] for the prototypes' weight, for ``n_classes`` occurring classes.

    The factor is 1 - ``MIN_ROWS_PER_CLASS`` n_classes / n_rows, and at least 0.
    """
    return max(1 - MIN_ROWS_PER_CLASS * n_classes / n_rows, 0.0)


def placement(purity: float, slope: float) -> float:
    """Compute a factor in [0, 1] for the prototypes' weight, by where the class means lie.

    The factor is large if the estimated means of two confused classes lie apart, as the true means
    do. Either a large ``purity`` or a large ``slope`` suffices, so the larger of the two decides.
    The factor is 0 up to ``MIN_PLACEMENT``, and rises from there to 1 at ``FULL_PLACEMENT``.
    """
    # Purity: suppose the zero-shot model confuses classes A and B. A share pi of A's soft members
    # belongs to A, and the share 1 - pi belongs to B. For B's soft members it is the other way
    # round. The members' means of A and B then differ by (2 pi - 1) times the true difference. At
    # pi = 1/2 they are equal, and prototypes would only repeat the confusion with more certainty.
    # Slope: a class has the prior mean m + a (t_c - t). If the slope a is above 1/2, the texts
    # (shifted to the mean image) are nearer to the class means than the mean image is. Then the
    # texts keep confused classes' means apart.
    evidence = max(purity, slope)
    factor = (evidence - MIN_PLACEMENT) / (FULL_PLACEMENT - MIN_PLACEMENT)
    return min(max(factor, 0.0), 1.0)


def fit_presence(count: Tensor) -> tuple[Tensor, float]:
    """Estimate log P(c occurs | n_c) (K,) from the class counts n_c (K,). Also return rho.

    A share rho of the classes is absent, with the mean count s = ``ABSENT_MEAN_COUNT``. The classes
    that occur have the mean count m = N / (K (1 - rho)). f(m) = exp(-n_c / m) / m is an exponential
    density. The density of a count n_c is rho f(s) + (1 - rho) (0.9 f(m) + 0.1 f(s)).

    The 0.1 is ``MISCOUNTED_SHARE``: a tenth of the occurring classes have counts like absent
    classes, since the rows count for wrong classes. rho is found by EM, as if
    ``PRIOR_OCCURRING_CLASSES`` further classes occurred. If m <= s, all classes are taken to occur.
    """
    n = float(count.sum())
    k = len(count)
    absent_share = 0.5
    p_absent = torch.zeros_like(count)
    for _ in range(200):  # EM passes
        mean = n / (k * (1 - absent_share))
        if mean <= ABSENT_MEAN_COUNT:
            return torch.zeros_like(count), 0.0
        # Both densities may round to 0. Bayes' rule therefore uses their ratio f(m) / f(s).
        exponent = count * (1 / ABSENT_MEAN_COUNT - 1 / mean)
        density_ratio = torch.exp(exponent) * ABSENT_MEAN_COUNT / mean
        # without MISCOUNTED_SHARE, classes overlooked by the zero-shot model would count as absent
        usual_ratio = (1 - MISCOUNTED_SHARE) * density_ratio  # 0.9 f(m) / f(s)
        mass_occurring = (1 - absent_share) * (usual_ratio + MISCOUNTED_SHARE)
        p_absent = absent_share / (absent_share + mass_occurring)  # Bayes' rule, divided by f(s)
        # the share stays below 1, because the next pass divides by 1 - absent_share
        absent_share = min(float(p_absent.sum()) / (k + PRIOR_OCCURRING_CLASSES), 0.99)
    return torch.log1p(-p_absent), absent_share
