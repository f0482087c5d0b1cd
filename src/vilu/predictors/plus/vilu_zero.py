"""What unlabelled images of the deployment say about the zero-shot posterior.

They say which classes occur, and where each one lies.

Shapes: N rows to learn from, B rows to score, K classes, D embedding width. A class count is a sum
of posteriors.
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
from vilu.predictors.contract.labelled import FEW, class_texts, failure_log_odds, with_outside
from vilu.predictors.contract.predictor import Learnt
from vilu.predictors.nn.attention import Start
from vilu.predictors.nn.pooled import Pooled
from vilu.predictors.plus.ood import NEGATIVES, Outside, SeesOutside, from_words

EM_ROWS = 20_000
"""Rows that the class counts are estimated on; of more, so many are drawn."""
EM_PASSES = 50
ROUNDS = 2
"""How often the prototypes are learned: from the zero-shot posterior, then from the pooled one."""
RIDGE = 0.7
"""Share of the covariance within classes that is spherical."""
NO_SPREAD = 1e-12
ABSENT_SCALE = 0.5
"""Mean count, in rows, that a class gets of which there is none."""
DOUBT = 5.0
"""Classes known to occur beforehand.

As many as keep a few empty ones from saying that most are absent.
"""
LOST = 0.1
"""Share of the classes that occur and get no count, since others take their rows up."""
MOST_ANCHOR = 100.0
"""Rows that the anchor of a mean counts for at most."""
APART = 0.2
"""Variance of the means of classes, in units of that within.

From it on prototypes are fully trusted.
"""
FEW_MEMBERS = 2.0
"""Rows a class, on average over those that occur, up to which prototypes are not trusted at all."""
STRENGTHS = (0.0, 0.25, 0.5, 1.0)
TRUSTS = (0.0, *(0.01 * 1.3**i for i in range(24)))


@dataclasses.dataclass
class ViLUZero(SeesOutside, ClosedSet):
    """The zero-shot posterior, pooled with image prototypes.

    Unlabelled rows teach the prototypes, over the classes that occur.

    u = 1 - (1 - P_outside) q, where q is the mass that softmax(l') gives to the zero-shot answer
    and P_outside = 0; l'_c = (1 - share) l_c + share tau g_c(z) + o_c, with zero-shot logits l. The
    answer stays the zero-shot one.

    *Which classes occur* (o, (K,), at most 0): EM finds the class frequencies pi under which the
    rows are most likely, p(c | z) ~ pi_c exp(l_c). Their counts n_c = N pi_c are taken for a
    mixture of two exponentials, mean 1/2 of absent classes, N / (K (1 - rho)) of the others, and
    o_c = lambda log P(c occurs | n_c). Each half of the rows judges what the other found: lambda in
    [0, 1] is where log sum_c exp(l_c + o_c) / sum_c exp(o_c) is largest on average.

    *Where they lie* (g, linear in z): discriminants of Gaussians with one covariance, whose soft
    members are the rows by their posterior. Means start from where texts lead to, m + a (t_c - t),
    and move towards the members by n_c / (n_c + kappa); kappa, a, and the covariance come from the
    rows. ``tau`` is how well prototypes of one half predict the posterior of the other (least
    cross-entropy): 0 where they cannot. The weight in the pool is ``share`` times 1 - 2 K' / N, K'
    = K (1 - rho) being the classes that occur (0 up to two rows a class: prototypes of so few rows
    do harm), times the square of how far the means lie apart, in units of ``APART``, where that is
    below one.

    *Which images are of none of the classes* (P_outside): where the data carry everyday words, the
    column ``negatives``, a mixture of two says how far an image is on their side
    (``vilu.predictors.plus.ood``); else zero.

    Fitted on rows without labels (``needs_labels``); targets are not looked at. The candidates are
    part of the fit.

    Args:
        share: Largest weight of the prototypes in the pool.
        max_bank: Most images to learn from; of more, so many are drawn with ``seed``.

    Source: this project. EM for class frequencies: Saerens et al., Neural Computation 2002; soft
    members and text
    anchors: the setting of transductive CLIP (Martin et al., 2024; Zanella et al., 2024), here for
    later rows.

    Examples:
        >>> import numpy as np, vilu
        >>> data = vilu.Embeddings(
        ...     np.eye(8)[np.arange(400) % 4], np.eye(8), logit_scale=2.0
        ... )  # of classes 0 to 3
        >>> new = vilu.Embeddings(np.eye(8)[[0, 7]], np.eye(8), logit_scale=2.0)
        >>> vilu.MCM().predict_uncertainty(new).round(1)
        array([0.5, 0.5])
        >>> vilu.PREDICTORS["vilu_zero"]().fit(data).predict_uncertainty(new).round(1)
        array([0.3, 0.7])
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
    _forms: ClassVar[str] = f"scale:d centre:dD weight:dKD bias:dK classes:fKD {Outside.forms}"

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_bank: Count = 50_000

    @property
    def label(self) -> str:
        """The name, and whether words are looked at."""
        return f"{self.name} (outside)" if self.outcome else self.name

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """The words, where they are there."""
        return self.optional_columns if NEGATIVES in train.columns else ()

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The words, where they told something."""
        return self.outcome.columns

    def _learn(
        self,
        train: Rows,
        failure: Tensor,  # noqa: ARG002
        validation: EmbeddingSource | None,  # noqa: ARG002
    ) -> Learnt:
        few, _ = draw_rows(train, self.max_bank, self.seed)
        learned_classes = learn_classes(few, self.share, self.seed, self.device_)
        is_judged = NEGATIVES in few.columns and len(few.index) >= FEW
        outside = from_words(few, known_inside=False) if is_judged else Outside.nothing()
        scale = torch.tensor(1 - learned_classes.share, dtype=torch.float64)
        parts = (
            scale,
            learned_classes.centre,
            learned_classes.weight,
            learned_classes.bias + learned_classes.occurrence,
            class_texts(train),
        )
        learned = dict(zip(self.tensors, parts, strict=False))
        return Learnt(learned | outside.tensors(), {**learned_classes.notes, **outside.notes})

    def parts(self, batch: Batch) -> Pooled:
        """The pooled logits l' in their parts; ``texts`` is what is added at the mean image."""
        image = float64(normalize(batch.image, dim=1))
        classes = self.classes_of(batch.text).to(image.device)
        scale, centre, weight, bias = (self.tensor(name, image.device) for name in self.tensors[:4])
        zero_shot = scale * float64(batch.logits - batch.logit_bias)
        return Pooled(zero_shot, bias[classes][None], (image - centre) @ weight[classes].T)

    def _score(self, batch: Batch) -> Tensor:
        log_odds = failure_log_odds(self.parts(batch).logits, batch)
        return torch.sigmoid(with_outside(log_odds, self.outcome_of(batch)))

    def outcome_of(self, batch: Batch) -> Tensor:
        """(B,) float64 log-odds of an image of none of the classes."""
        return self.outcome.log_odds(batch, self.classes_of(batch.text))

    def log_posterior(self, batch: Batch) -> Tensor:
        """(B, K) float64, of the pooled logits."""
        return self.parts(batch).logits.log_softmax(dim=-1)

    def coalitions(self) -> Coalitions:
        """Of the parts of the pooled logits."""
        return PoolCoalitions(self.parts, self.outcome_of if self.outcome else None)


class Classes(NamedTuple):
    """What rows without labels say.

    l'_c = (1 - share) l_c + (z - centre) weight_c + bias_c + occurrence_c.

    Of unit images z and zero-shot logits l of K classes; all float64, (D,), (K, D), (K,) and (K,).
    """

    share: float
    centre: Tensor
    weight: Tensor
    bias: Tensor
    occurrence: Tensor
    notes: dict[str, Any]

    def start(self, text: Tensor, logit_scale: float) -> Start:
        """The same about the zero-shot logits themselves, of texts (K, D)."""
        less = self.share * logit_scale * float64(text).cpu()
        return Start(
            self.centre, self.weight - less, self.bias - less @ self.centre, self.occurrence
        )


def learn_classes(rows: Rows, most: float, seed: int, device: torch.device) -> Classes:
    """Which classes occur among rows, and where they lie.

    ``most`` is the largest share in the pool.
    """
    text = class_texts(rows)
    share = 0.0
    trust = 0.0
    known = Classifier.nothing(text)
    occurrence = torch.zeros(len(text), dtype=torch.float64)
    notes: dict[str, Any] = {}
    if len(rows.index) >= FEW:  # else nothing can be judged on a half, and the score is MCM's
        pool = Pool(rows, seed, device)
        occurrence, absent = pool.occurrence()
        most = most * sufficiency(len(rows.index), len(text) * (1 - absent))
        share, trust, known = pool.prototypes(occurrence, most)
        shown = {"trust": trust, "slope": known.slope, "anchor": known.anchor, "apart": known.apart}
        notes = {"absent": absent, "share": share, **shown}
    weighed = share * trust
    return Classes(
        share, known.centre, weighed * known.weight, weighed * known.bias, occurrence, notes
    )


class SoftMembers(NamedTuple):
    """Sums over the soft members of every class, (2, ...) of two halves or of one set.

    ``members`` (K,) counts, ``squares`` (K,) of squared posteriors, ``total`` (K, D), and
    ``second`` (D, D) of x x^T.
    """

    members: Tensor
    squares: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def nothing(cls, n_classes: int, dim: int) -> SoftMembers:
        """Of two empty halves."""
        shapes = (n_classes,), (n_classes,), (n_classes, dim), (dim, dim)
        return cls(*(torch.zeros(2, *shape, dtype=torch.float64) for shape in shapes))

    def add(self, half: int, posterior: Tensor, image: Tensor) -> None:
        """Add rows (b, K), (b, D) to a half."""
        parts = posterior.sum(0), posterior.square().sum(0), posterior.T @ image, image.T @ image
        for whole, part in zip(self, parts, strict=True):
            whole[half] += part.cpu()

    def part(self, half: int | None) -> SoftMembers:
        """One half, or both together."""
        return SoftMembers(*(whole.sum(0) if half is None else whole[half] for whole in self))


class Classifier(NamedTuple):
    """Discriminants g = (z - centre) weight^T + bias.

    And what the rows said about the prior of the means.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    slope: float = 0.0
    anchor: float = 0.0
    apart: float = 0.0

    @classmethod
    def nothing(cls, text: Tensor) -> Classifier:
        """One that knows nothing of the classes (K, D)."""
        weight = torch.zeros(text.shape, dtype=torch.float64)
        return cls(weight.sum(0), weight, weight.sum(1))

    def of(self, image: Tensor) -> Tensor:
        """(b, K) float32 discriminants of images (b, D)."""
        return (image - self.centre.to(image)) @ self.weight.to(image).T + self.bias.to(image)


def discriminants(moments: SoftMembers, text: Tensor) -> Classifier:
    """Discriminants of Gaussians of one covariance, whose means are anchored at texts (K, D).

    With members' means m_c, of n_c rows, and m_c - m - a (t_c - t) of covariance (1/n_c + 1/kappa)
    W, moments give 1/kappa (kappa is ``MOST_ANCHOR`` at most), and a is the weighted least-squares
    slope, both in the metric of the covariance W within classes; likewise how far the means lie
    ``apart``, with a = 0. W is divided by N less the rows that the means have used up, sum_c sum_i
    p_ic^2 / n_c.
    """
    count = moments.members.clamp(min=1e-9)
    n = float(moments.members.sum())
    mean = moments.total.sum(0) / n
    centred = moments.total / count[:, None] - mean
    within = moments.second - n * torch.outer(mean, mean) - (centred.T * moments.members) @ centred
    # divided by N, as if the means were known, classes of few rows would look too narrow
    within = within / max(n - float((moments.squares / count).sum()), 1.0)
    dim = len(within)
    variance = float(within.trace()) / dim
    if variance <= NO_SPREAD:
        return Classifier.nothing(text)
    # of D^2 / 2 covariances few rows know most badly, and the inverse magnifies the small ones
    identity = torch.eye(dim, dtype=torch.float64)
    precision = torch.linalg.inv((1 - RIDGE) * within + RIDGE * variance * identity)
    leads = text - (moments.members @ text) / n
    towards = leads @ precision
    weighted = moments.members[:, None] * towards
    slope = float(
        ((weighted * centred).sum() / (weighted * leads).sum().clamp(min=1e-12)).clamp(min=0)
    )
    own = float((precision * within).sum())

    def variance_of(rows: Tensor) -> float:
        """Weighted mean square of rows (K, D) in units of W.

        What comes from the n_c members being few is left out.
        """
        return (
            float((moments.members * ((rows @ precision) * rows).sum(1)).sum()) / (own * n)
            - len(count) / n
        )

    anchor = 1 / max(variance_of(centred - slope * leads), 1 / MOST_ANCHOR)
    means = (moments.members[:, None] * centred + anchor * slope * leads) / (
        moments.members + anchor
    )[:, None]
    weight = means @ precision
    return Classifier(
        mean, weight, -(weight * means).sum(1) / 2, slope, anchor, variance_of(centred)
    )


class Pool:
    """Unlabelled rows in two random halves, read block by block.

    Each half judges what the other has taught.
    """

    def __init__(self, rows: Rows, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows.index), generator=generator)
        self.halves = [order[half::2].sort().values for half in (0, 1)]
        self.rows = rows
        self.device = device
        self.text = class_texts(rows)

    def blocks(self, half: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Unit images (b, D) and zero-shot logits (b, K), float32.

        They are of a half, or of its first rows.
        """
        index = self.rows.index[self.halves[half][:most]]
        for batch in dataclasses.replace(self.rows, index=index).batches(SCORING_BATCH):
            here = batch.to(self.device)
            yield normalize(here.image, dim=1), here.logits

    def counts(self, halves: tuple[int, ...]) -> Tensor:
        """(K,) float64 class counts of the rows of some halves, by EM from equal ones.

        At most ``EM_ROWS`` rows are counted.
        """
        # Saerens et al., Neural Computation 2002: posteriors under these counts add up to them
        n = float(sum(min(len(self.halves[half]), EM_ROWS // 2) for half in halves))
        count = torch.full((len(self.text),), n / len(self.text), dtype=torch.float64)
        for _ in range(EM_PASSES):
            prior = count.clamp(min=1e-12).log().float().to(self.device)
            blocks = (logits for half in halves for _, logits in self.blocks(half, EM_ROWS // 2))
            count = sum(
                ((logits + prior).softmax(1).sum(0).double().cpu() for logits in blocks),
                torch.zeros_like(count),
            )
        return count

    def occurrence(self) -> tuple[Tensor, float]:
        """(K,) o, at most 0, and the share of absent classes."""
        whole, absent = presence(self.counts((0, 1)))
        if not bool(whole.any()):
            return whole, 0.0
        # Judged on the rows that gave the counts, full strength would always win.
        gains = torch.zeros(len(STRENGTHS), dtype=torch.float64)
        for half in (0, 1):
            known, _ = presence(self.counts((1 - half,)))
            gains += self._evidence(half, known)
        strength = STRENGTHS[int(gains.argmax())]
        return strength * whole, absent * (strength > 0)

    def _evidence(self, half: int, known: Tensor) -> Tensor:
        """(S,) sums over a half of log sum_c exp(l_c + s o_c) / sum_c exp(s o_c).

        There is one for each strength s.
        """
        offsets = [strength * known - (strength * known).logsumexp(0) for strength in STRENGTHS]
        total = torch.zeros(len(offsets), dtype=torch.float64)
        for _, logits in self.blocks(half, EM_ROWS // 2):
            for place, offset in enumerate(offsets):
                total[place] += (
                    (logits + offset.float().to(self.device)).logsumexp(1).double().sum().cpu()
                )
        return total

    def prototypes(self, occurrence: Tensor, most: float) -> tuple[float, float, Classifier]:
        """The share in the pool, at most ``most``, tau, and the prototypes."""
        text = float64(self.text).cpu()
        share = 0.0
        trust = 0.0
        crossed = [Classifier.nothing(text)] * 2
        whole = Classifier.nothing(text)
        for _ in range(ROUNDS):
            moments = self._moments(occurrence, crossed, trust, share)
            crossed = [discriminants(moments.part(1 - half), text) for half in (0, 1)]
            whole = discriminants(moments.part(None), text)
            trust = self._trust(occurrence, crossed)
            share = most * min(max(whole.apart / APART, 0.0), 1.0) ** 2 if trust else 0.0
        return share, trust, whole

    def _moments(
        self, occurrence: Tensor, crossed: list[Classifier], trust: float, share: float
    ) -> SoftMembers:
        """Of both halves, by the posterior that is pooled with prototypes.

        These are of the other half, as far as they are trusted.
        """
        moments = SoftMembers.nothing(*self.text.shape)
        for half in (0, 1):
            for image, logits in self.blocks(half):
                pooled = logits + occurrence.float().to(self.device)
                # prototypes of the half itself would confirm the memberships that made them
                if trust:
                    pooled = pooled + share * (trust * crossed[half].of(image) - logits)
                moments.add(half, pooled.softmax(1), image)
        return moments

    def _trust(self, occurrence: Tensor, crossed: list[Classifier]) -> float:
        """Tau of the least mean cross-entropy from softmax(l + o) to softmax(tau g + o).

        The mean is over rows of other halves.
        """
        losses = torch.zeros(len(TRUSTS), dtype=torch.float64)
        offset = occurrence.float().to(self.device)
        for half in (0, 1):
            for image, logits in self.blocks(half, EM_ROWS // 2):
                posterior = (logits + offset).softmax(1)
                discriminants = crossed[half].of(image)
                for place, trust in enumerate(TRUSTS):
                    predicted = (trust * discriminants + offset).log_softmax(1)
                    losses[place] -= (posterior * predicted).sum(1).double().sum().cpu()
        return TRUSTS[int(losses.argmin())]


def sufficiency(n_rows: int, n_classes: float) -> float:
    """How far prototypes of so many classes can be trusted to so many rows.

    1 - ``FEW_MEMBERS`` K / N, at least 0.
    """
    return max(1 - FEW_MEMBERS * n_classes / n_rows, 0.0)


def presence(count: Tensor) -> tuple[Tensor, float]:
    """(K,) log P(c occurs | n_c) of class counts (K,), and the share rho of absent classes.

    See ``ViLUZero``.

    n_c has the density rho f(s) + (1 - rho) (0.9 f(m) + 0.1 f(s)), f(m) = exp(-n_c / m) / m, with s
    = ``ABSENT_SCALE`` and m = N / (K (1 - rho)): of the classes that occur a tenth (``LOST``) is
    not seen, its rows taken for others. rho is found by EM, as if ``DOUBT`` more classes were known
    to occur. Where m would be below s, all do.
    """
    n = float(count.sum())
    k = len(count)
    absent = 0.5
    gone = torch.zeros_like(count)
    low = torch.exp(-count / ABSENT_SCALE) / ABSENT_SCALE
    for _ in range(200):
        mean = n / (k * (1 - absent))
        if mean <= ABSENT_SCALE:
            return torch.zeros_like(count), 0.0
        # without the lost tenth, every class that the model overlooks would be called absent
        present = (1 - absent) * ((1 - LOST) * torch.exp(-count / mean) / mean + LOST * low)
        gone = absent * low / (absent * low + present)
        absent = min(float(gone.sum()) / (k + DOUBT), 0.99)
    return torch.log1p(-gone), absent
