"""Images of none of the classes: everyday words as further candidates, and the outcome "outside".

Shapes: B images, K classes, M everyday words, D embedding width. ``margin`` is m(x) = log sum_w exp
l_w(x) - log sum_c exp l_c(x): log-odds of words against classes under the zero-shot softmax over
both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch
from vilu.predictors.contract.predictor import FailurePredictor

NEGATIVES = "negatives"  # the column of everyday words


@lru_cache(maxsize=4)  # by identity: every batch has the same words and classes
def far_words(words: Tensor, text: Tensor, share: float, nearest: float = 0.0) -> Tensor:
    """(M',) int64, ascending: words (M, D) that are far from the classes (K, D).

    They are the ``share`` of the words, at least one, that are farthest.

    How near a word is to the classes is the 1 - ``nearest`` quantile of its K cosines; among equals
    the first go first.
    """
    # words near a class would take the mass of that class's own images, which are inside
    cosine = words @ text.T
    rank = max(math.ceil(nearest * cosine.shape[1]), 1)  # a quantile that needs no interpolation
    nearness = cosine.topk(rank, dim=1).values[:, -1]
    n_far = max(round(share * len(words)), 1)
    return nearness.argsort(stable=True)[:n_far].sort().values


def word_mass(batch: Batch, far: Tensor) -> Tensor:
    """(B,) float64 log sum over the words ``far`` of exp(logit).

    The logit bias, which all share, is left out.
    """
    words = batch.columns[NEGATIVES][far]
    with torch.autocast(batch.image.device.type, enabled=False):
        return float64((batch.image @ words.T).mul_(batch.logit_scale)).logsumexp(dim=1)


def margin(batch: Batch, far: Tensor) -> Tensor:
    """(B,) float64 m(x)."""
    return word_mass(batch, far) - float64(batch.logits - batch.logit_bias).logsumexp(dim=1)


@dataclass
class NegLabel(FailurePredictor):
    """Everyday words as further candidates.

    u = 1 - the share of softmax mass on the classes, or on the answer alone.

    of="classes": u = sum_w exp l_w / (sum_c exp l_c + sum_w exp l_w), which tells images of none of
    the classes. of="answer": u = 1 - exp l_t̂ / (the same), the joint pool, which also sees
    failures within the classes, and takes words that are near a class for other answers.

    The words w are the column ``negatives``; those near a class are left out: how near a word is to
    the classes is the 1 - ``nearest`` quantile of its cosines with them, and the ``share`` of the
    words that is farthest stays.

    Args:
        of: What counts as no failure: "classes" or "answer".
        share: Of the words, those that stay.
        nearest: Share of the classes that a word may be near to without being left out.

    Source: NegLabel, Jiang et al., ICLR 2024 (temperature 0.01, CLIP's own; 5 % ``nearest``, 15 %
    ``share``). There the words are the nouns and adjectives of WordNet and stand in another prompt
    than the classes, and the score is averaged over groups of words; here they are about two
    thousand in the prompts of the classes, and one group. Of so few more have to stay.

    Examples:
        >>> import torch, vilu
        >>> words = torch.eye(4)[2:]
        >>> data = vilu.Embeddings(
        ...     torch.eye(4), torch.eye(4)[:2], logit_scale=10.0, columns={"negatives": words}
        ... )
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
        """The name, and whether the answer alone counts."""
        return self.name if self.of == "classes" else f"{self.name} (answer)"

    def _score(self, batch: Batch) -> Tensor:
        words = word_mass(
            batch, far_words(batch.columns[NEGATIVES], batch.text, self.share, self.nearest)
        )
        logits = float64(batch.logits - batch.logit_bias)
        if self.of == "classes":
            return torch.sigmoid(words - logits.logsumexp(dim=1))
        alike = batch.alike(batch.prediction).to(logits.device)
        own = logits.masked_fill(~alike, -torch.inf).logsumexp(dim=1)
        wrong = logits.masked_fill(alike, -torch.inf).logsumexp(dim=1)
        return torch.sigmoid(torch.logaddexp(wrong, words) - own)


WORDS = 0.25  # share of the words that counts, the farthest from the classes
# fewer rows say nothing about which direction leads outside, or how much of them is
DIRECTION_ROWS = 100

DIRECTION_VARIANCE = 0.1
"""Prior variance of the direction that predicts the margin."""
DIRECTION_WEIGHT = 2.0
"""Weight of that direction beside the margin, whose weight is one."""

CLASS_ROWS = 5.0  # rows that a class's own mean has to be worth against that of all
BELIEF = 0.05  # rows, as a share of all, that the expected mean of images outside is worth
PRESENT = 0.02  # smallest share of images outside from which on their direction is followed
# standard deviations between inside and outside below which words do not tell them apart
APART = 2.0
ASSUMED = 0.1  # share of images outside where all rows are known to be inside
# standard deviations that inside and outside are apart at most: few rows that agree prove no more
MOST_APART = 10.0
CAUTION = 1.0  # what is taken from log-odds that no image outside has been shown for

LABEL_VARIANCE = 100.0
MARGIN_VARIANCE = 10.0
"""Prior variances of the direction and of the margin's weight, where images outside are shown."""

EM_PASSES = 500
EM_TOLERANCE = 1e-9
LBFGS_STEPS = 200


@dataclass(frozen=True, eq=False)
class Outside:
    """The outcome "none of the classes": log-odds that an image is outside.

    They are slope_a (w . x + b + g m(x)) + offset_a.

    a is the zero-shot answer among the classes of the fit, or any other candidate (the last entry
    of ``slope`` and ``offset``). Where g is zero no words are looked at. Empty tensors: nothing is
    known, and P(outside) is zero.
    """

    weight: Tensor  # (D,) w; or (0,), nothing known
    bias: Tensor  # () b
    words: Tensor  # () g, the weight of the margin m
    slope: Tensor  # (1,), or one per class of the fit and one for others; (0,), nothing known
    offset: Tensor  # as ``slope``
    notes: Mapping[str, Any] = field(default_factory=dict)  # for people, as plain JSON

    forms: ClassVar[str] = (
        "outside.weight:dd outside.bias:d outside.words:d outside.slope:ds outside.offset:ds"
    )
    names: ClassVar[tuple[str, ...]] = tuple(form.partition(":")[0] for form in forms.split())

    @classmethod
    def nothing(cls, **notes: Any) -> Self:  # noqa: ANN401 - plain JSON
        """P(outside) is zero."""
        shapes = (0,), (), (), (0,), (0,)  # each its own: a file of weights holds no tensor twice
        weight, bias, words, slope, offset = (
            torch.zeros(shape, dtype=torch.float64) for shape in shapes
        )
        return cls(weight, bias, words, slope, offset, notes)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From saved tensors; nothing is known where there are none."""
        if not tensors.keys() >= set(cls.names):
            return cls.nothing()
        weight, bias, words, slope, offset = (tensors[name] for name in cls.names)
        return cls(weight, bias, words, slope, offset)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return dict(
            zip(
                self.names,
                (self.weight, self.bias, self.words, self.slope, self.offset),
                strict=True,
            )
        )

    def __bool__(self) -> bool:
        return len(self.slope) > 0

    @property
    def columns(self) -> tuple[str, ...]:
        """What data must carry to be scored."""
        return (NEGATIVES,) if bool(self.words != 0) else ()

    def log_odds(self, batch: Batch, classes: Tensor | None = None) -> Tensor:
        """(B,) float64 log(P(outside) / P(inside)), minus infinity where nothing is known.

        Args:
            batch: With the columns ``columns``.
            classes: (K,) place of every candidate among the classes of the fit, -1 for others;
                None: all are others.
        """
        image = float64(batch.image)
        if not self:
            return torch.full_like(image[:, 0], -torch.inf)
        weight, bias, words, slope, offset = (
            tensor.to(image.device) for tensor in self.tensors().values()
        )
        evidence = image @ weight + bias
        if self.columns:
            far = far_words(batch.columns[NEGATIVES], batch.text, WORDS)
            evidence = evidence + words * margin(batch, far).to(image.device)
        if classes is None or len(slope) == 1:
            return slope[-1] * evidence + offset[-1]
        answer = classes.to(image.device)[batch.prediction.to(image.device)]
        return slope[answer] * evidence + offset[answer]


class OutsideGraph(nn.Module):
    """``Outside.log_odds`` for a graph, in which the number of everyday words is open.

    ``far_words`` chooses rows; here all M words stay, and those that do not count have no mass.
    """

    def __init__(self, outcome: Outside) -> None:
        super().__init__()
        self.looks_at_words = bool(outcome.columns)
        self.is_per_class = len(outcome.slope) > 1
        self.weight = nn.Buffer(outcome.weight)
        self.bias = nn.Buffer(outcome.bias)
        self.words = nn.Buffer(outcome.words)
        self.slope = nn.Buffer(outcome.slope)
        self.offset = nn.Buffer(outcome.offset)

    def forward(self, batch: Batch, classes: Tensor | None) -> Tensor:
        """(B,) float64; ``classes`` as of ``Outside.log_odds``."""
        log_odds = float64(batch.image) @ self.weight + self.bias
        if self.looks_at_words:
            log_odds = log_odds + self.words * self.margin(batch)
        if classes is None or not self.is_per_class:
            return self.slope[-1] * log_odds + self.offset[-1]
        # a runtime need not count from the end
        place_of_no_class = len(self.slope) - 1
        answer = classes[batch.prediction]
        place = torch.where(answer < 0, place_of_no_class, answer)
        return self.slope[place] * log_odds + self.offset[place]

    def margin(self, batch: Batch) -> Tensor:
        """(B,) float64 m(x), as the function ``margin``."""
        words = batch.columns[NEGATIVES]
        nearness = (words @ batch.text.T).amax(dim=1)
        order = nearness.argsort()  # equal ones are equal words; ONNX takes the first one first
        rank = torch.empty_like(order).scatter(
            0, order, torch.arange(words.shape[0], device=words.device)
        )
        n_words = torch.ones_like(nearness, dtype=torch.float64).sum()
        n_far = (WORDS * n_words).round().clamp_min(1)
        on_words = replace(batch, text=words, logit_bias=0.0).logits
        far = float64(on_words).masked_fill(rank >= n_far, -torch.inf)
        return far.logsumexp(dim=1) - float64(batch.logits - batch.logit_bias).logsumexp(dim=1)


class SeesOutside(ABC):
    """A method with the outcome "outside" beside those of its candidates.

    u = 1 - (1 - P(outside)) q_t̂.
    """

    learned_: dict[str, Tensor]

    @property
    def outcome(self) -> Outside:
        """What is known of images of none of the classes."""
        return Outside.of(self.learned_)

    @abstractmethod
    def outcome_of(self, batch: Batch) -> Tensor:
        """(B,) float64 log-odds of an image of none of the classes."""

    def outside_probability(self, batch: Batch) -> Tensor | None:
        """(B,) float64 P(the image is of none of the classes); None where nothing is known of it.

        Examples:
            >>> import numpy as np, vilu
            >>> text, words = np.eye(6)[:2], {"negatives": np.eye(6)[2:]}
            >>> train = vilu.Embeddings(
            ...     np.eye(6)[[0, 1] * 20], text, [0, 1] * 20, logit_scale=10.0, columns=words
            ... )
            >>> new = vilu.Embeddings(
            ...     np.eye(6)[:3], text, logit_scale=10.0, columns=words
            ... )  # the third is a word
            >>> predictor = vilu.ViLUPlus(width=32, epochs=1).fit(train)
            >>> batch = next(new.batches(3, columns=["negatives"]))
            >>> predictor.outside_probability(batch).round(decimals=1).tolist()
            [0.0, 0.0, 1.0]
        """
        return torch.sigmoid(self.outcome_of(batch)) if self.outcome else None


def learn_outside(train: Rows) -> Outside:
    """What rows known to be inside say, with examples of images outside.

    Or with words, and rows without labels.
    """
    if train.source.pool_size is None and len(train.outside):
        return from_examples(train, train.outside)
    if NEGATIVES not in train.columns:
        return Outside.nothing()
    if train.unlabelled is None:
        return from_words(train, known_inside=True)
    source = train.unlabelled
    return from_words(Rows(source, source.usable_rows, train.columns), known_inside=False)


class Margins(NamedTuple):
    """What one pass over N rows leaves: their margins and answers (N,), and moments of the images.

    ``mean`` (D,), ``gram`` (D, D) the sum of squares about it, ``cross`` (D,) with the margin.
    """

    margin: Tensor
    answer: Tensor
    mean: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Margins:
        """Look at rows, block by block."""
        dim = rows.source.space.embed_dim
        n = len(rows.index)
        total, gram, cross = (
            torch.zeros(*shape, dtype=torch.float64) for shape in ((dim,), (dim, dim), (dim,))
        )
        margins = []
        answers = []
        for batch in rows.batches(SCORING_BATCH):
            image = float64(batch.image)
            m = margin(batch, far_words(batch.columns[NEGATIVES], batch.text, WORDS))
            total += image.sum(dim=0)
            gram += image.T @ image
            cross += image.T @ m
            margins.append(m)
            answers.append(batch.prediction)
        every = torch.cat(margins)
        mean = total / n
        return cls(
            every,
            torch.cat(answers),
            mean,
            gram - n * torch.outer(mean, mean),
            cross - mean * every.sum(),
        )

    def direction(self) -> tuple[Tensor, Tensor]:
        """(D,) and () of the ridge regression of the margin on the image.

        Inputs are divided by their root mean square norm about the mean and the margin by its
        standard deviation, the prior variance of the weights is ``DIRECTION_VARIANCE`` and that of
        the noise one: it shrinks to the mean.
        """
        # The margin of one image is noisy, as few words fit it. Its regression on the image knows
        # what images on the side of the words have in common; without the ridge, D weights would
        # follow the noise of N margins.
        size = (self.gram.trace() / len(self.margin)).clamp_min(1e-12)
        ridge = size / DIRECTION_VARIANCE * torch.eye(len(self.gram), dtype=torch.float64)
        weight = torch.linalg.solve(self.gram + ridge, self.cross)
        return weight, self.margin.mean() - weight @ self.mean


class Mixture(NamedTuple):
    """Two Gaussians of one variance: inside about a mean for every answer, outside about one mean.

    ``inside`` (K + 1,) means, the last for other candidates; ``outside``, ``variance`` and
    ``share`` of images outside.
    """

    inside: Tensor
    outside: float
    variance: float
    share: float

    @property
    def apart(self) -> float:
        """Standard deviations between the two."""
        return (self.outside - float(self.inside[-1])) / math.sqrt(self.variance)

    def log_odds(self) -> tuple[Tensor, Tensor]:
        """Slope and offset, (K + 1,) each, of the log-odds in the value."""
        # Bayes' rule: with one variance the squares of the value cancel, and the log-odds are
        # linear. With two, the wider Gaussian would win at both ends, far inside the classes too.
        slope = (self.outside - self.inside) / self.variance
        offset = (self.inside.square() - self.outside**2) / (2 * self.variance)
        return slope, offset + math.log(self.share / (1 - self.share))


def fit_mixture(
    value: Tensor, answer: Tensor, n_classes: int, balance: float, *, known_inside: bool
) -> Mixture:
    """The mixture of largest posterior for values (N,) of images with answers (N,), by EM.

    A class's mean inside is shrunk towards that of all, as if ``CLASS_ROWS`` rows had it; the mean
    outside has ``BELIEF`` N rows at the expected one, ``balance`` less the lower quartile, which is
    inside whatever the share, so that rows which are all inside leave it there, and its share
    small. EM starts from that quartile, too.
    """
    n = len(value)
    ordered = value.sort().values
    low = float(ordered[int(0.05 * (n - 1))])
    centre = float(ordered[int(0.25 * (n - 1))])
    expected = balance - centre
    # the likelihood of a Gaussian has no upper bound as it narrows about rows that are alike
    least = max(abs(balance - 2 * centre) / MOST_APART, 1e-6)  # of expected less centre
    # of a normal distribution these quantiles are 1.645 - 0.674 standard deviations apart
    spread = max((centre - low) / 0.97, least)
    state = Mixture(
        torch.full((n_classes + 1,), centre, dtype=torch.float32).double(),
        expected,
        spread**2,
        ASSUMED,
    )
    count = torch.bincount(answer, minlength=n_classes).double()
    for _ in range(1 if known_inside else EM_PASSES):
        slope, offset = state.log_odds()
        outside = torch.zeros_like(value)
        if not known_inside:
            outside = torch.sigmoid(slope[answer] * value + offset[answer])
        inside = 1 - outside
        mean = (inside * value).sum() / inside.sum().clamp_min(1e-9)
        mass = torch.zeros_like(count).index_add_(0, answer, inside)
        sums = torch.zeros_like(count).index_add_(0, answer, inside * value)
        means = torch.cat([(sums + CLASS_ROWS * mean) / (mass + CLASS_ROWS), mean[None]])
        # without the expected mean EM would cut rows that are all inside in two
        n_outside = outside.sum()
        n_believed = BELIEF * n
        far_total = float((outside * value).sum() + n_believed * expected)
        far = far_total / float(n_outside + n_believed)
        squares = inside * (value - means[answer]).square() + outside * (value - far).square()
        share = ASSUMED
        if not known_inside:
            share = (float(n_outside) + 0.5) / (n + 5)  # a share of zero could never grow again
        variance = max(float(squares.mean()), least**2)
        after = Mixture(means, far, variance, min(max(share, 1e-3), 1 - 1e-3))
        moved = abs(after.outside - state.outside) + abs(after.share - state.share)
        state = after
        if moved < EM_TOLERANCE:
            break
    return state


def from_words(rows: Rows, *, known_inside: bool) -> Outside:
    """What everyday words say, with no image shown that is known to be outside.

    The margin of an image outside is expected at log(M / K) less that of one inside: to M words it
    is what an image inside is to K classes. Rows of which nothing is known are taken for a mixture
    of the two; where enough are outside, the value is the margin averaged with its regression on
    the image, which knows what the images have in common.
    """
    seen = Margins.of(rows)
    n_classes = rows.source.n_candidates
    n_words = max(round(WORDS * len(rows.source.column(NEGATIVES, rows.index[:0]))), 1)
    balance = math.log(n_words / n_classes)
    zero = torch.zeros((), dtype=torch.float64)
    weight = torch.zeros_like(seen.mean)
    bias = zero
    words = torch.ones((), dtype=torch.float64)
    mixture = None
    if not known_inside and len(seen.margin) >= DIRECTION_ROWS:
        share = DIRECTION_WEIGHT / (1 + DIRECTION_WEIGHT)
        along, level = (share * tensor for tensor in seen.direction())
        value = torch.cat(
            [float64(batch.image) @ along + level for batch in rows.batches(SCORING_BATCH)]
        )
        value = value + (1 - share) * seen.margin
        mixture = fit_mixture(value, seen.answer, n_classes, balance, known_inside=False)
        # with hardly an image outside, the direction is that of something else in the images
        if mixture.share >= PRESENT:
            weight = along
            bias = level
            words = (1 - share) * words
        else:
            mixture = None
    if mixture is None:
        few = known_inside or len(seen.margin) < DIRECTION_ROWS
        mixture = fit_mixture(seen.margin, seen.answer, n_classes, balance, known_inside=few)
    notes = {
        "outside_share": None if known_inside else mixture.share,
        "outside_apart": mixture.apart,
    }
    # two halves of one hump: P(outside) would reorder the answers within the classes
    if mixture.apart < APART:
        return Outside.nothing(**notes)
    slope, offset = mixture.log_odds()
    return Outside(weight, bias, words, slope, offset - CAUTION, notes)


class Regressors(NamedTuple):
    """Regressors of the regression on examples.

    They are images of some rows and, where there are words, their margins (N,).
    """

    rows: Rows
    margins: Tensor | None

    @classmethod
    def of(cls, rows: Rows) -> Regressors:
        """Margins are computed once."""
        if NEGATIVES not in rows.columns:
            return cls(replace(rows, columns=()), None)
        margins = []
        for batch in replace(rows, columns=(NEGATIVES,)).batches(SCORING_BATCH):
            far = far_words(batch.columns[NEGATIVES], batch.text, WORDS)
            margins.append(margin(batch, far))
        return cls(replace(rows, columns=()), torch.cat(margins))

    def blocks(self) -> Iterator[Tensor]:
        """(b, D) float64, or with the margin (b, D + 1)."""
        start = 0
        for batch in self.rows.batches(SCORING_BATCH):
            image = float64(batch.image)
            stop = start + len(batch.image)
            yield (
                image
                if self.margins is None
                else torch.cat([image, self.margins[start:stop, None]], dim=1)
            )
            start = stop


def from_examples(train: Rows, outside: Tensor) -> Outside:
    """Ridge-regularised logistic regression of "outside" on the image.

    Where there are words, it is on the margin, too.

    Images are centred and divided by their root mean square norm, margins standardised, so the
    prior variances mean the same for every model. Solved by L-BFGS over streamed blocks.
    """
    parts = [Regressors.of(train), Regressors.of(replace(train, index=outside))]
    dim = train.source.space.embed_dim
    n, centre, scale = _standard(parts, dim)
    weights = torch.zeros(len(centre) + 1, dtype=torch.float64, requires_grad=True)
    precision = torch.full_like(weights, 1 / LABEL_VARIANCE, requires_grad=False)
    precision[dim:] = 1 / MARGIN_VARIANCE
    precision[-1] = 0.0
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=LBFGS_STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = (precision * weights.square()).sum() / (2 * n)
        total.backward()
        value = total.detach()
        for is_outside, part in enumerate(parts):
            for inputs in part.blocks():
                logits = (inputs - centre) / scale @ weights[:-1] + weights[-1]
                target = torch.full_like(logits, is_outside)
                loss = (
                    functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / n
                )
                loss.backward()
                value = value + loss.detach()
        return value

    optimizer.step(closure)
    direction = weights.detach()[:-1] / scale
    level = weights.detach()[-1]
    slope = torch.ones(1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    words = direction[dim].clone() if len(direction) > dim else zero[0].clone()
    bias = level - direction @ centre
    return Outside(direction[:dim].clone(), bias, words, slope, zero, {"n_outside": len(outside)})


def _standard(parts: list[Regressors], dim: int) -> tuple[int, Tensor, Tensor]:
    """Number of rows, mean (W,) and scale (W,) of the inputs.

    The scale is one norm for the image, and a deviation for the margin.
    """
    n = 0
    total = torch.zeros((), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for part in parts:
        for inputs in part.blocks():
            n = n + len(inputs)
            total = total + inputs.sum(dim=0)
            squares = squares + inputs.square().sum(dim=0)
    mean = total / n
    variance = (squares / n - mean.square()).clamp_min(0)
    norm = variance[:dim].sum().sqrt().clamp_min(1e-6).expand(dim)
    return n, mean, torch.cat([norm, variance[dim:].sqrt().clamp_min(1e-6)])
