"""Find images that show none of the classes. Such an image is called "outside".

The zero-shot model compares an image with the classes and with everyday words. An image outside is
expected to fit a word better than any class.

Shapes: B images, K classes, M everyday words, D embedding width.

An image x has a logit l_c(x) for every class c, and a logit l_w(x) for every word w. The margin is

    m(x) = log sum_w exp l_w(x) - log sum_c exp l_c(x)

A softmax over all words and classes gives all words together a probability p. The margin is the
log-odds log(p / (1 - p)).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch
from vilu.predictors.contract.predictor import FailurePredictor

NEGATIVES = "negatives"
"""Name of the column with everyday words. The words describe images outside, not the classes."""


# All batches from a source have the same texts and words, so the far words are computed for the
# first batch only. The keys are the texts, then the words, then the settings. An entry is dropped
# as soon as its texts or its words no longer exist.
_FAR_WORDS_CACHE: MutableMapping[Tensor, MutableMapping[Tensor, dict[object, Tensor]]] = (
    WeakTensorKeyDictionary()
)


def far_word_indices(words: Tensor, text: Tensor, share: float, nearest: float = 0.0) -> Tensor:
    """Return the ascending indices (M',) of the words (M, D) far from the classes (K, D).

    A word has K cosines with the classes. The word's nearness is the quantile of these cosines at
    1 - ``nearest``. With ``nearest=0``, this is the largest cosine. The words with the least
    nearness are kept: the given ``share`` of all words, and at least 1 word. Among equally near
    words, words with a lower index are kept first.
    """
    empty_cache = WeakTensorKeyDictionary()
    cache_of_text = _FAR_WORDS_CACHE.setdefault(text, empty_cache)
    cache = cache_of_text.setdefault(words, {})
    settings = (share, nearest)
    if settings not in cache:
        cache[settings] = _find_far_word_indices(words, text, share, nearest)
    return cache[settings]


def _find_far_word_indices(words: Tensor, text: Tensor, share: float, nearest: float) -> Tensor:
    """Find the far words as in ``far_word_indices``, without the cache."""
    # A word near a class also fits the images of that class. These images are inside, but the word
    # would take softmax mass from their class. So words near a class are left out.
    cosine = words @ text.T
    # The quantile is found by its rank among a word's K descending cosines. With K = 100 and
    # ``nearest`` = 0.05, this is the fifth largest cosine.
    rank = max(math.ceil(nearest * cosine.shape[1]), 1)
    descending_cosines = cosine.topk(rank, dim=1).values
    nearness = descending_cosines[:, -1]  # the cosine with this rank, for every word
    n_far = max(round(share * len(words)), 1)
    farthest_words = nearness.argsort(stable=True)[:n_far]
    return farthest_words.sort().values


def log_word_mass(batch: Batch, word_index: Tensor) -> Tensor:
    """Compute log sum_w exp l_w (B,) float64 over the words w with these indices.

    l_w is the logit of word w, without the logit bias. Callers compare words with classes, and
    classes have the same bias. The bias would cancel, so both sides leave it out.
    """
    words = batch.columns[NEGATIVES][word_index]
    with torch.autocast(batch.image.device.type, enabled=False):
        logits = (batch.image @ words.T).mul_(batch.logit_scale)
        return float64(logits).logsumexp(dim=1)


def log_class_mass(batch: Batch) -> Tensor:
    """Compute log sum_c exp l_c (B,) float64 over the classes c, without the logit bias."""
    logits = float64(batch.logits - batch.logit_bias)
    return logits.logsumexp(dim=1)


def word_margins(batch: Batch, word_index: Tensor) -> Tensor:
    """Compute the margins m(x) (B,) float64, over the words with these indices."""
    return log_word_mass(batch, word_index) - log_class_mass(batch)


@dataclass
class NegLabel(FailurePredictor):
    """Uncertainty from a softmax over the classes and further candidates, everyday words.

    The candidates are all classes c with logits l_c, and the kept words w with logits l_w. The
    zero-shot answer is the class t̂, with the logit l_t̂. The uncertainty u is one of two masses.

    of="classes" detects images that show none of the classes. u is the softmax mass on the words:

        u = sum_w exp l_w / (sum_c exp l_c + sum_w exp l_w)

    of="answer" also detects wrong answers among the classes. u is all softmax mass that is not on
    the answer. A word then counts as another answer, also a word that is near the answer's class:

        u = 1 - exp l_t̂ / (sum_c exp l_c + sum_w exp l_w)

    The words are in the column ``negatives``. Words near a class are left out. A word's nearness
    is the quantile at 1 - ``nearest`` of the word's cosines with the classes. The words with the
    least nearness are kept, as many as ``share`` says.

    Args:
        of: "classes" or "answer". Mass on all classes, or on the answer alone, lowers u.
        share: Share of the words to keep.
        nearest: A word counts as near only if it is near about this share of the classes or more.

    Source: NegLabel, Jiang et al., ICLR 2024 (temperature 0.01, CLIP's own; ``nearest`` 5 %,
    ``share`` 15 %). In the paper the words are the nouns and adjectives in WordNet, in a
    prompt that differs from the class prompts. The score is averaged over word groups. Here all
    words are in the class prompts, and in a single group. There are only about two thousand words,
    so a larger share is kept.

    Examples:
        >>> import torch, vilu
        >>> image, text, words = torch.eye(4), torch.eye(4)[:2], torch.eye(4)[2:]
        >>> data = vilu.Embeddings(image, text, logit_scale=10.0, columns={"negatives": words})
        >>> # the first two images are like classes, and the last two like words
        >>> vilu.PREDICTORS["neglabel"](share=1.0).predict_uncertainty(data).round(3)
        array([0., 0., 1., 1.])
    """

    name: ClassVar[str] = "neglabel"
    summary: ClassVar[str] = "softmax mass on everyday words that are no class (Jiang et al. 2024)"
    reference: ClassVar[str] = "Jiang et al., ICLR 2024"
    cost: ClassVar[str] = "score: one product with the words"
    columns: ClassVar[tuple[str, ...]] = (NEGATIVES,)
    no_captions: ClassVar[str | None] = (
        "words are chosen by their distance to the classes, and captions have no classes"
    )

    of: Literal["classes", "answer"] = "classes"
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    nearest: Annotated[float, Field(ge=0, le=1)] = 0.05

    @property
    def label(self) -> str:
        """The name, with "(answer)" where only the mass on the answer is counted."""
        if self.of == "classes":
            return self.name
        return f"{self.name} (answer)"

    def _score(self, batch: Batch) -> Tensor:
        word_index = far_word_indices(
            batch.columns[NEGATIVES], batch.text, self.share, self.nearest
        )
        log_words = log_word_mass(batch, word_index)
        logits = float64(batch.logits - batch.logit_bias)
        if self.of == "classes":
            log_classes = logits.logsumexp(dim=1)
            return torch.sigmoid(log_words - log_classes)
        is_answer = batch.alike(batch.prediction).to(logits.device)  # (B, K)
        log_answer = logits.masked_fill(~is_answer, -torch.inf).logsumexp(dim=1)
        log_others = logits.masked_fill(is_answer, -torch.inf).logsumexp(dim=1)
        log_all_others = torch.logaddexp(log_others, log_words)
        return torch.sigmoid(log_all_others - log_answer)


# Constants for the outcome "outside", sorted by step: the choice of words, the regression of the
# margin on the image, the mixture, the fit from examples, and the optimisers.

WORD_SHARE = 0.25
"""The outcome "outside" uses this share of the words: the words farthest from the classes."""

MIN_DIRECTION_ROWS = 100
"""With fewer rows, neither the regression nor the share of images outside is estimated."""

DIRECTION_VARIANCE = 0.1
"""The weights' prior variance in the regression of the margin on the image."""
PREDICTION_SHARE = 2 / 3
"""A row's predicted margin and its actual margin are averaged. The prediction has this weight."""

CLASS_PRIOR_ROWS = 5.0
"""The estimate for a class's mean includes the mean over all classes, as this many rows."""
OUTSIDE_PRIOR = 0.05
"""The estimate for the mean outside includes the expected mean, as this share of the N rows."""
MIN_OUTSIDE_SHARE = 0.02
"""The predicted margin is used only if at least this share of the images seems to be outside."""
MIN_SEPARATION = 2.0
"""The words are used if the means inside and outside are this many standard deviations apart."""
MAX_SEPARATION = 10.0
"""Largest distance between the expected means inside and outside, in standard deviations.

Without this limit, the standard deviation could shrink to that of a few equal rows.
"""
ASSUMED_OUTSIDE_SHARE = 0.1
"""Assumed share of images outside, where the rows do not suffice to estimate the share."""
LOG_ODDS_DISCOUNT = 1.0
"""This number is subtracted from log-odds that were learned without examples outside."""

LABEL_VARIANCE = 100.0
"""Prior variance of the image weights, where there are examples of images outside."""
MARGIN_VARIANCE = 10.0
"""Prior variance of the margin weight, where there are examples of images outside."""

MAX_EM_PASSES = 500  # largest number of EM passes
# EM ends if the changes in the mean outside and in the share outside add up to less
EM_TOLERANCE = 1e-9
MAX_LBFGS_STEPS = 200  # largest number of L-BFGS steps


def outside_word_indices(batch: Batch) -> Tensor:
    """Return the indices (M',) of the words used by the outcome "outside"."""
    return far_word_indices(batch.columns[NEGATIVES], batch.text, WORD_SHARE)


@dataclass(frozen=True, eq=False)
class Outside:
    """The outcome "outside": the learned log-odds that an image shows none of the classes.

    The evidence for an image x is w . x + b + g m(x), with learned w, b and g and the margin m(x).
    If g is zero, the words have no effect. The zero-shot answer is the fitted class with the
    index a. The answer gives the slope and the offset:

        log-odds = slope_a (w . x + b + g m(x)) + offset_a

    An answer that is no fitted class uses the last entry in ``slope`` and ``offset``. If ``slope``
    is empty, nothing was learned and P(outside) is zero.
    """

    weight: Tensor  # (D,) w; (0,) where nothing was learned
    bias: Tensor  # () b
    word_weight: Tensor  # () g, the weight on the margin m
    slope: Tensor  # (1,) for all answers, or (K + 1,). If nothing was learned: (0,)
    offset: Tensor  # with the same shape as ``slope``
    notes: Mapping[str, Any] = field(default_factory=dict)  # plain JSON, for people to read

    # the saved tensors, each as "name:form"; ``require_forms`` describes forms
    forms: ClassVar[str] = (
        "outside.weight:dd outside.bias:d outside.words:d outside.slope:ds outside.offset:ds"
    )
    names: ClassVar[tuple[str, ...]] = tuple(form.split(":")[0] for form in forms.split())

    @classmethod
    def not_learned(cls, **notes: Any) -> Self:  # noqa: ANN401 - plain JSON
        """Make the outcome where nothing was learned: P(outside) is zero."""
        # Five tensors with separate memory: safetensors refuses to save tensors with shared memory.
        return cls(
            weight=torch.zeros(0, dtype=torch.float64),
            bias=torch.zeros((), dtype=torch.float64),
            word_weight=torch.zeros((), dtype=torch.float64),
            slope=torch.zeros(0, dtype=torch.float64),
            offset=torch.zeros(0, dtype=torch.float64),
            notes=notes,
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make the outcome from saved tensors. If a tensor is missing, use ``not_learned()``."""
        if any(name not in tensors for name in cls.names):
            return cls.not_learned()
        weight, bias, word_weight, slope, offset = (tensors[name] for name in cls.names)
        return cls(weight, bias, word_weight, slope, offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""
        tensors = (self.weight, self.bias, self.word_weight, self.slope, self.offset)
        return dict(zip(self.names, tensors, strict=True))

    def __bool__(self) -> bool:
        """Return whether the outcome was learned."""
        return len(self.slope) > 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns needed for scoring."""
        if self.word_weight == 0:
            return ()
        return (NEGATIVES,)

    def log_odds(self, batch: Batch, classes: Tensor | None = None) -> Tensor:
        """Compute log(P(outside) / P(inside)) (B,) float64. If not learned: minus infinity.

        Args:
            batch: Rows with the columns ``columns``.
            classes: (K,) every candidate's index among the fitted classes. A candidate that is no
                fitted class has -1. None means -1 for all candidates.
        """
        image = float64(batch.image)
        if not self:  # nothing was learned
            return torch.full_like(image[:, 0], -torch.inf)
        tensors = self.tensors()
        weight, bias, word_weight, slope, offset = (
            tensor.to(image.device) for tensor in tensors.values()
        )
        evidence = image @ weight + bias
        if self.columns:
            word_index = outside_word_indices(batch)
            margins = word_margins(batch, word_index)
            evidence = evidence + word_weight * margins.to(image.device)
        if classes is None or len(slope) == 1:
            # the last entry is for all answers, or for answers that are no fitted class
            return slope[-1] * evidence + offset[-1]
        # an answer that is no fitted class has the index -1, and so reads the last entry
        answered_class = classes.to(image.device)[batch.prediction.to(image.device)]
        return slope[answered_class] * evidence + offset[answered_class]


class OutsideGraph(nn.Module):
    """``Outside.log_odds`` as a graph for export, for any number M of words.

    ``far_word_indices`` selects the far words. This graph keeps all M words, and gives the other
    words a softmax mass of zero.
    """

    def __init__(self, outcome: Outside) -> None:
        super().__init__()
        self.looks_at_words = bool(outcome.columns)
        self.is_per_class = len(outcome.slope) > 1
        self.weight = nn.Buffer(outcome.weight)
        self.bias = nn.Buffer(outcome.bias)
        self.word_weight = nn.Buffer(outcome.word_weight)
        self.slope = nn.Buffer(outcome.slope)
        self.offset = nn.Buffer(outcome.offset)

    def forward(self, batch: Batch, classes: Tensor | None) -> Tensor:
        """Compute the log-odds (B,) float64, with ``classes`` as in ``Outside.log_odds``."""
        evidence = float64(batch.image) @ self.weight + self.bias
        if self.looks_at_words:
            evidence = evidence + self.word_weight * self.word_margins(batch)
        if classes is None or not self.is_per_class:
            return self.slope[-1] * evidence + self.offset[-1]
        # not every runtime reads the index -1 as the last entry
        index_of_no_class = len(self.slope) - 1
        answered_class = classes[batch.prediction]
        index = torch.where(answered_class < 0, index_of_no_class, answered_class)
        return self.slope[index] * evidence + self.offset[index]

    def word_margins(self, batch: Batch) -> Tensor:
        """Compute the margins m(x) (B,) float64, equal to the function ``word_margins``."""
        words = batch.columns[NEGATIVES]
        nearness = (words @ batch.text.T).amax(dim=1)
        # The sort need not be stable. In practice only equal words have equal nearness, and the
        # order of equal words does not change the margin.
        order = nearness.argsort()
        positions = torch.arange(words.shape[0], device=words.device)
        unranked = torch.empty_like(order)
        rank = unranked.scatter(0, order, positions)  # 0 for the farthest word
        # The words are counted by a sum. A tensor's size would become a constant in the graph.
        one_per_word = torch.ones_like(nearness, dtype=torch.float64)
        n_words = one_per_word.sum()
        rounded_number = (WORD_SHARE * n_words).round()
        n_far = rounded_number.clamp_min(1)
        batch_of_words = replace(batch, text=words, logit_bias=0.0)
        word_logits = float64(batch_of_words.logits)
        is_left_out = rank >= n_far
        far_logits = word_logits.masked_fill(is_left_out, -torch.inf)
        class_logits = float64(batch.logits - batch.logit_bias)
        return far_logits.logsumexp(dim=1) - class_logits.logsumexp(dim=1)


class SeesOutside(ABC):
    """A method with the outcome "outside" in addition to its candidates.

    The zero-shot answer t̂ is right if the image is not outside and t̂ is the right candidate. Let
    q_t̂ be the probability of t̂ among the candidates. The uncertainty is

        u = 1 - (1 - P(outside)) q_t̂
    """

    learned_: dict[str, Tensor]

    @property
    def outcome(self) -> Outside:
        """The learned outcome "outside": the image shows none of the classes."""
        return Outside.from_tensors(self.learned_)

    @abstractmethod
    def outside_log_odds(self, batch: Batch) -> Tensor:
        """Compute the log-odds (B,) float64 that the image shows none of the classes."""

    def outside_probability(self, batch: Batch) -> Tensor | None:
        """Compute P(no class is shown) (B,) float64, or None if "outside" was not learned.

        Examples:
            >>> import numpy as np, vilu
            >>> vectors, target = np.eye(6), [0, 1] * 20
            >>> text, words = vectors[:2], {"negatives": vectors[2:]}
            >>> image = vectors[target]
            >>> train = vilu.Embeddings(image, text, target=target, logit_scale=10.0, columns=words)
            >>> predictor = vilu.ViLUPlus(width=32, epochs=1).fit(train)
            >>> # the third new image is like a word
            >>> new = vilu.Embeddings(vectors[:3], text, logit_scale=10.0, columns=words)
            >>> batch = next(new.batches(3, columns=["negatives"]))
            >>> predictor.outside_probability(batch).round(decimals=1).tolist()
            [0.0, 0.0, 1.0]
        """
        if not self.outcome:
            return None
        log_odds = self.outside_log_odds(batch)
        return torch.sigmoid(log_odds)


def learn_outside(train: Rows) -> Outside:
    """Learn the outcome "outside" from the best evidence in the training rows.

    1. If there are examples of images outside, these are used, except for image-caption pairs.
    2. Otherwise everyday words are used, together with rows without labels if there are any.
    3. Without words, nothing is learned.
    """
    has_captions = train.source.pool_size is not None
    if not has_captions and len(train.outside):
        return learn_from_examples(train, train.outside)
    if NEGATIVES not in train.columns:
        return Outside.not_learned()
    if train.unlabelled is None:
        return learn_from_words(train, all_known_inside=True)
    source = train.unlabelled
    unlabelled_rows = Rows(source, source.usable_rows, train.columns)
    return learn_from_words(unlabelled_rows, all_known_inside=False)


class Margins(NamedTuple):
    """Margins and zero-shot answers for N rows, and moments of the image embeddings.

    The ridge regression from the image to the margin needs only these moments.
    """

    margin: Tensor  # (N,)
    answer: Tensor  # (N,)
    mean: Tensor  # (D,) mean over the image embeddings z
    gram: Tensor  # (D, D) sum of (z - mean) (z - mean)^T
    cross: Tensor  # (D,) sum of (z - mean) times the margin

    @classmethod
    def of(cls, rows: Rows) -> Margins:
        """Compute margins, answers and moments in a single pass over the rows, block by block."""
        dim = rows.source.space.embed_dim
        n = len(rows.index)
        # three sums over the rows: of the images z, of z z^T, and of z times the margin
        sum_of_images = torch.zeros(dim, dtype=torch.float64)
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        cross = torch.zeros(dim, dtype=torch.float64)
        margins = []
        answers = []
        for batch in rows.batches(SCORING_BATCH):
            image = float64(batch.image)
            word_index = outside_word_indices(batch)
            margins_of_batch = word_margins(batch, word_index)
            sum_of_images += image.sum(dim=0)
            gram += image.T @ image
            cross += image.T @ margins_of_batch
            margins.append(margins_of_batch)
            answers.append(batch.prediction)
        all_margins = torch.cat(margins)
        mean = sum_of_images / n
        # Centred sums: sum (z - mean) (z - mean)^T = sum z z^T - n mean mean^T, and in the same way
        # sum (z - mean) margin = sum z margin - mean (sum margin).
        return cls(
            margin=all_margins,
            answer=torch.cat(answers),
            mean=mean,
            gram=gram - n * torch.outer(mean, mean),
            cross=cross - mean * all_margins.sum(),
        )

    def regress_on_image(self) -> tuple[Tensor, Tensor]:
        """Fit a ridge regression from the image to the margin: weights (D,) and intercept ().

        The centred images are divided by their root mean square norm.
        The margins are divided by their standard deviation. The weights have the prior variance
        ``DIRECTION_VARIANCE``, and the noise has the variance 1. The prior shrinks predictions
        towards the mean margin.
        """
        # An image's margin is noisy, because few words fit a given image. The regression finds
        # what images with a large margin have in common. Without the prior, D weights would fit
        # the noise in N margins.
        # Let s be the root mean square norm. Images divided by s have a gram matrix divided by s^2.
        # It has the same effect to multiply the ridge 1 / DIRECTION_VARIANCE by s^2.
        mean_square = (self.gram.trace() / len(self.margin)).clamp_min(1e-12)
        ridge = mean_square / DIRECTION_VARIANCE * torch.eye(len(self.gram), dtype=torch.float64)
        weight = torch.linalg.solve(self.gram + ridge, self.cross)
        return weight, self.margin.mean() - weight @ self.mean


class Mixture(NamedTuple):
    """Two Gaussians with the same variance: one for images inside, and one for images outside.

    Every image has a value, for example its margin. The mean value of images inside depends on the
    zero-shot answer. All images outside share a mean.
    """

    # (K + 1,): a mean for each answer among the K classes, and last a mean for all other answers
    inside_means: Tensor
    outside_mean: float
    variance: float  # of both Gaussians
    outside_share: float  # share of images outside

    @property
    def separation(self) -> float:
        """Difference between the mean outside and the last mean inside, in standard deviations."""
        return (self.outside_mean - float(self.inside_means[-1])) / math.sqrt(self.variance)

    def log_odds(self) -> tuple[Tensor, Tensor]:
        """Return slopes (K + 1,) and offsets (K + 1,): log-odds = slope * value + offset.

        By Bayes' rule, these are the log-odds that an image with this value is outside.
        """
        # With the same variance for both Gaussians the squares of the value cancel, so the log-odds
        # are linear in the value. With two variances, the wider Gaussian would be likelier at both
        # ends. Very small values would then count as outside, although they are far inside.
        slope = (self.outside_mean - self.inside_means) / self.variance
        offset = (self.inside_means.square() - self.outside_mean**2) / (2 * self.variance)
        return slope, offset + math.log(self.outside_share / (1 - self.outside_share))


def fit_mixture(
    value: Tensor, answer: Tensor, n_classes: int, sum_of_means: float, *, all_known_inside: bool
) -> Mixture:
    """Fit the mixture with the largest posterior to values (N,) and answers (N,) by EM.

    The initial mean inside is the lower quartile of the values, since images outside have larger
    values. The priors are:

    - The mean inside for a class is averaged with the mean over all classes. The mean over all
      classes weighs as much as ``CLASS_PRIOR_ROWS`` rows.
    - The mean outside is averaged with an expected value, ``sum_of_means`` minus the lower
      quartile. The expected value weighs as much as ``OUTSIDE_PRIOR`` times N rows. So if all rows
      are inside, the mean outside stays near the expected value, and the share outside stays small.

    With ``all_known_inside`` no row is outside, so a single step gives the means inside and the
    variance. The mean outside is then the expected value, and the share outside is
    ``ASSUMED_OUTSIDE_SHARE``.

    Args:
        value: (N,) values, for example margins.
        answer: (N,) zero-shot answers.
        n_classes: Class count K.
        sum_of_means: Expected mean inside plus expected mean outside.
        all_known_inside: Whether all images are known to be inside.
    """
    last_index = len(value) - 1
    ascending_value = value.sort().values
    low_quantile = float(ascending_value[int(0.05 * last_index)])  # the 5 % quantile
    lower_quartile = float(ascending_value[int(0.25 * last_index)])
    expected_outside = sum_of_means - lower_quartile
    # The likelihood grows without bound if a Gaussian narrows around equal values. The standard
    # deviation is therefore at least |expected_outside - lower_quartile| / MAX_SEPARATION.
    min_deviation = max(abs(sum_of_means - 2 * lower_quartile) / MAX_SEPARATION, 1e-6)
    # In a normal distribution, the 5 % quantile is 1.645 standard deviations below the mean, and
    # the 25 % quantile is 0.674 below. The two quantiles are 0.97 standard deviations apart.
    deviation = max((lower_quartile - low_quantile) / 0.97, min_deviation)
    mixture = Mixture(
        # rounded to float32: without this rounding, the learned numbers would change a little
        inside_means=torch.full((n_classes + 1,), lower_quartile, dtype=torch.float32).double(),
        outside_mean=expected_outside,
        variance=deviation**2,
        outside_share=ASSUMED_OUTSIDE_SHARE,
    )
    n_passes = 1 if all_known_inside else MAX_EM_PASSES
    for _ in range(n_passes):
        p_outside = torch.zeros_like(value)
        if not all_known_inside:
            slope, offset = mixture.log_odds()
            p_outside = torch.sigmoid(slope[answer] * value + offset[answer])
        updated_mixture = _maximisation_step(
            value,
            answer,
            p_outside,
            n_classes=n_classes,
            expected_outside=expected_outside,
            min_deviation=min_deviation,
        )
        if all_known_inside:
            updated_mixture = updated_mixture._replace(outside_share=ASSUMED_OUTSIDE_SHARE)
        change_of_mean = abs(updated_mixture.outside_mean - mixture.outside_mean)
        change_of_share = abs(updated_mixture.outside_share - mixture.outside_share)
        mixture = updated_mixture
        if change_of_mean + change_of_share < EM_TOLERANCE:
            break
    return mixture


def _maximisation_step(
    value: Tensor,
    answer: Tensor,
    p_outside: Tensor,
    *,
    n_classes: int,
    expected_outside: float,
    min_deviation: float,
) -> Mixture:
    """Fit the mixture, given P(outside) for every image. This is the second step in an EM pass.

    Args:
        value: (N,) values.
        answer: (N,) zero-shot answers.
        p_outside: (N,) probabilities that an image is outside, from the first step.
        n_classes: Class count K.
        expected_outside: Expected mean outside.
        min_deviation: Smallest allowed standard deviation.
    """
    n = len(value)
    p_inside = 1 - p_outside
    mean_inside = (p_inside * value).sum() / p_inside.sum().clamp_min(1e-9)  # no division by 0
    # per class, over the images with this answer: sums of P(inside), and of P(inside) times value
    zero_of_class = torch.zeros(n_classes, dtype=torch.float64)
    mass_of_class = zero_of_class.index_add(0, answer, p_inside)
    sum_of_class = zero_of_class.index_add(0, answer, p_inside * value)
    sum_with_prior = sum_of_class + CLASS_PRIOR_ROWS * mean_inside
    class_means = sum_with_prior / (mass_of_class + CLASS_PRIOR_ROWS)
    # the last mean is for all other candidates
    inside_means = torch.cat([class_means, mean_inside[None]])
    n_outside = p_outside.sum()
    # without this prior, EM would split the rows into two halves even if all rows are inside
    prior_rows = OUTSIDE_PRIOR * n
    outside_total = float((p_outside * value).sum() + prior_rows * expected_outside)
    outside_mean = outside_total / float(n_outside + prior_rows)
    squares_outside = p_outside * (value - outside_mean).square()
    squares_inside = p_inside * (value - inside_means[answer]).square()
    mean_square = (squares_inside + squares_outside).mean()
    # The added 0.5 and 5 keep the share above zero. From a share of zero, EM could never move away.
    outside_share = (float(n_outside) + 0.5) / (n + 5)
    return Mixture(
        inside_means=inside_means,
        outside_mean=outside_mean,
        variance=max(float(mean_square), min_deviation**2),
        outside_share=min(max(outside_share, 1e-3), 1 - 1e-3),
    )


def learn_from_words(rows: Rows, *, all_known_inside: bool) -> Outside:
    """Learn the outcome "outside" from everyday words, without examples of images outside.

    An image outside fits one of the M' far words, just as an image inside fits one of the K
    classes. Let s be the logit of what fits, and r the logit of all else. The margins are about

        inside:  (log M' + r) - s
        outside: s - (log K + r)

    Their sum is log(M' / K). So the expected margin outside is log(M' / K) minus the margin inside.

    Unless the rows are ``all_known_inside``, the rows are a mixture of images inside and outside.
    Every row then has a value. If enough rows are outside, the value is an average of two numbers:
    the margin, and the margin predicted from the image (``Margins.regress_on_image``). Otherwise
    the value is the margin alone.
    """
    margins = Margins.of(rows)
    n_classes = rows.source.n_candidates
    # the words belong to the whole data set, so no row is named: the index is empty
    all_words = rows.source.column(NEGATIVES, rows.index[:0])
    n_words = max(round(WORD_SHARE * len(all_words)), 1)  # M'
    sum_of_means = math.log(n_words / n_classes)  # log(M' / K)
    # with these weights, a row's value is the margin alone
    weight = torch.zeros_like(margins.mean)
    bias = torch.zeros((), dtype=torch.float64)
    word_weight = torch.ones((), dtype=torch.float64)
    mixture = None
    has_few_rows = len(margins.margin) < MIN_DIRECTION_ROWS
    if not all_known_inside and not has_few_rows:
        direction, intercept = margins.regress_on_image()
        direction = PREDICTION_SHARE * direction
        intercept = PREDICTION_SHARE * intercept
        prediction = _predict_from_image(rows, direction, intercept)
        value = prediction + (1 - PREDICTION_SHARE) * margins.margin
        mixture_of_averages = fit_mixture(
            value, margins.answer, n_classes, sum_of_means, all_known_inside=False
        )
        # The regression predicts whatever makes margins differ. If hardly any image is outside,
        # this is some other property of the images. Then the value is the margin alone.
        if mixture_of_averages.outside_share >= MIN_OUTSIDE_SHARE:
            mixture = mixture_of_averages
            weight = direction
            bias = intercept
            word_weight = torch.tensor(1 - PREDICTION_SHARE, dtype=torch.float64)
    if mixture is None:
        # Too few rows cannot show which share of the images is outside. The mixture is then fitted
        # as if all rows were inside.
        assume_inside = all_known_inside or has_few_rows
        mixture = fit_mixture(
            margins.margin, margins.answer, n_classes, sum_of_means, all_known_inside=assume_inside
        )
    notes = {
        "outside_share": None if all_known_inside else mixture.outside_share,
        "outside_apart": mixture.separation,
    }
    # With less separation the two Gaussians are two halves of a single peak. P(outside) would then
    # only reorder the images inside.
    if mixture.separation < MIN_SEPARATION:
        return Outside.not_learned(**notes)
    slope, offset = mixture.log_odds()
    return Outside(weight, bias, word_weight, slope, offset - LOG_ODDS_DISCOUNT, notes)


def _predict_from_image(rows: Rows, direction: Tensor, intercept: Tensor) -> Tensor:
    """Predict (N,) float64 values by a linear regression on the image, read block by block."""
    predictions = []
    for batch in rows.batches(SCORING_BATCH):
        prediction = float64(batch.image) @ direction + intercept
        predictions.append(prediction)
    return torch.cat(predictions)


class Regressors(NamedTuple):
    """Inputs to the regression that predicts "outside", for N rows.

    The inputs are the images and, where there are words, the margins.
    """

    rows: Rows
    margins: Tensor | None  # (N,), or None without the word column

    @classmethod
    def of(cls, rows: Rows) -> Regressors:
        """Make the regressors for some rows. The margins are computed only once, here."""
        rows_of_images = replace(rows, columns=())
        if NEGATIVES not in rows.columns:
            return cls(rows_of_images, None)
        margins = []
        rows_with_words = replace(rows, columns=(NEGATIVES,))
        for batch in rows_with_words.batches(SCORING_BATCH):
            word_index = outside_word_indices(batch)
            margins_of_batch = word_margins(batch, word_index)
            margins.append(margins_of_batch)
        all_margins = torch.cat(margins)
        return cls(rows_of_images, all_margins)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the regressors block by block: (b, D) float64, or (b, D + 1) with the margin."""
        start = 0
        for batch in self.rows.batches(SCORING_BATCH):
            image = float64(batch.image)
            stop = start + len(batch.image)
            if self.margins is None:
                yield image
            else:
                yield torch.cat([image, self.margins[start:stop, None]], dim=1)
            start = stop


def learn_from_examples(train: Rows, outside_rows: Tensor) -> Outside:
    """Fit an L2-regularised logistic regression that predicts "outside" from the image.

    Where there are words, the margin is a further regressor. The rows in ``train`` are inside.
    ``outside_rows`` are the indices of the images outside.

    Images are centred, and then divided by the root mean square norm of the centred images. Margins
    are standardised. The prior variances then have the same meaning for every backbone. L-BFGS
    reads the rows in blocks.
    """
    inside = Regressors.of(train)
    outside = Regressors.of(replace(train, index=outside_rows))
    dim = train.source.space.embed_dim
    n_rows, centre, scale = _standardisation([inside, outside], dim)
    weights = torch.zeros(len(centre) + 1, dtype=torch.float64, requires_grad=True)
    prior_precision = torch.full_like(weights, 1 / LABEL_VARIANCE, requires_grad=False)
    prior_precision[dim:] = 1 / MARGIN_VARIANCE
    prior_precision[-1] = 0.0  # the intercept has no prior
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_LBFGS_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = (prior_precision * weights.square()).sum() / (2 * n_rows)
        penalty.backward()
        total_loss = penalty.detach()
        for is_outside, regressors in ((0, inside), (1, outside)):
            for inputs in regressors.blocks():
                standardised_inputs = (inputs - centre) / scale
                intercept = weights[-1]
                logits = standardised_inputs @ weights[:-1] + intercept
                target = torch.full_like(logits, is_outside)
                loss_sum = functional.binary_cross_entropy_with_logits(
                    logits, target, reduction="sum"
                )
                loss = loss_sum / n_rows
                loss.backward()
                total_loss = total_loss + loss.detach()
        return total_loss

    optimizer.step(objective)
    # The weights are for standardised inputs, but ``direction`` and ``bias`` are for raw inputs.
    direction = weights.detach()[:-1] / scale
    centred_intercept = weights.detach()[-1]
    slope = torch.ones(1, dtype=torch.float64)
    offset = torch.zeros(1, dtype=torch.float64)
    word_weight = torch.zeros((), dtype=torch.float64)  # without words, the margin is not used
    if len(direction) > dim:  # the image weights come first, then the margin weight
        word_weight = direction[dim].clone()
    bias = centred_intercept - direction @ centre
    notes = {"n_outside": len(outside_rows)}
    return Outside(direction[:dim].clone(), bias, word_weight, slope, offset, notes)


def _standardisation(sets: list[Regressors], dim: int) -> tuple[int, Tensor, Tensor]:
    """Return the row count over all sets, and the W regressors' means (W,) and scales (W,).

    W is D = ``dim``, or D + 1 with the margin. All D image regressors have the same scale, the root
    mean square norm of the centred images. The margin's scale is its standard deviation.
    """
    n_rows = 0
    # W is not known before the first block. A zero () can be added to sums with any shape (W,).
    sum_of_inputs = torch.zeros((), dtype=torch.float64)
    sum_of_squares = torch.zeros((), dtype=torch.float64)
    for regressors in sets:
        for inputs in regressors.blocks():
            n_rows = n_rows + len(inputs)
            sum_of_inputs = sum_of_inputs + inputs.sum(dim=0)
            sum_of_squares = sum_of_squares + inputs.square().sum(dim=0)
    mean = sum_of_inputs / n_rows
    square_of_mean = mean.square()
    variance = (sum_of_squares / n_rows - square_of_mean).clamp_min(0)
    # scales of at least 1e-6 avoid a division by 0 for constant regressors
    image_variance = variance[:dim].sum()
    image_deviation = image_variance.sqrt()
    image_scale = image_deviation.clamp_min(1e-6).expand(dim)
    margin_deviation = variance[dim:].sqrt()
    margin_scale = margin_deviation.clamp_min(1e-6)
    return n_rows, mean, torch.cat([image_scale, margin_scale])
