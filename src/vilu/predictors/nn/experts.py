"""Linear experts on embeddings, solved by full-batch steps."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.similarity import float64, nearest
from vilu.embeddings.source import SAME_TEXT, Batch
from vilu.predictors.nn.train import SCORING_BATCH, Rows

TEMPERATURE_SD = 0.5
"""Prior standard deviation of the log of the zero-shot temperature, around zero."""

BIAS_SHARE = 0.02
"""Prior variance of a class's bias, as a share of that of its logits: labels are drawn by class more often than not."""

CAUTION = 8
"""Of n labels the attention learns n / (n + 8) of what they say: what a handful of images have in common is chance."""

MISSED = 0.1
"""Share of images of classes without labels, where no class has two labels and so nothing tells."""

LBFGS_STEPS = 150
FEATURES = "features"
TINY = 1e-6


class Moments:
    """Number, float64 sum (D,) and sum of squared norms of rows that come in blocks."""

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def add(self, rows: Tensor) -> None:
        """Count a block (N, D)."""
        double = rows.cpu().double()
        self.n += len(rows)
        self.total = self.total + double.sum(dim=0)
        self.squares = self.squares + double.square().sum()


class Standard(nn.Module):
    """Rows centred and divided by their root mean square norm, so that nothing learned depends on a model's scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean, self.norm = nn.Buffer(torch.zeros(dim)), nn.Buffer(torch.ones(()))

    def fit(self, moments: Moments) -> None:
        """Take mean and norm from the rows that were added up."""
        mean = moments.total / moments.n
        variance = (moments.squares / moments.n - mean.square().sum()).clamp_min(0)
        self.mean.copy_(mean)
        self.norm.copy_(variance.sqrt() if variance > TINY else torch.ones(()))  # one row, or all alike

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return (rows - self.mean) / self.norm


class ImageInputs(nn.Module):
    """What an image looks like to the experts: its embedding (D), and its features (F; 0: none), of one weight."""

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.width, self.on_features = dim + feature_dim, feature_dim > 0
        self.image, self.features = Standard(dim), Standard(feature_dim)

    def fit(self, rows: Rows) -> None:
        """Mean and norm of the rows, from one pass."""
        images, features = Moments(), Moments()
        for batch in rows.batches(SCORING_BATCH):
            images.add(batch.image)
            features.add(batch.columns[FEATURES] if self.on_features else batch.image[:, :0])
        self.image.fit(images)
        self.features.fit(features)

    def forward(self, batch: Batch) -> Tensor:
        """(B, D + F), of unit norm in the root mean square."""
        if not self.on_features:
            return cast("Tensor", self.image(batch.image))
        both = [self.image(batch.image), self.features(batch.columns[FEATURES])]
        return torch.cat(both, dim=1) / math.sqrt(2)


class Match(NamedTuple):
    """What candidates have to do with the training classes, each (K,).

    ``row`` is the class of each, where it is one, ``known`` whether it is one, and ``reach`` 1 for a class, else the
    squared cosine of the standardised text with the nearest class's (0 where it is negative): the share of its variance
    that the two have in common.
    """

    row: Tensor
    known: Tensor
    reach: Tensor


class SupervisedAttention(nn.Module):
    """Logits of K candidates: the zero-shot logits, tempered, plus a bilinear form in image and text.

    l_j = a l0_j + (x, 1) . (sqrt(rho) A t_j + sqrt(1 - rho) v_j), l0 the zero-shot logits, x the ``ImageInputs``, t
    standardised texts. v_j belongs to class j of the training set and is zero for every other candidate, so any
    candidates can be scored; A is what they have in common. It and the temperature count for other candidates as much
    as their texts are like those of classes (``Match.reach``), so that foreign ones have their zero-shot logits. Starts
    at the tempered zero-shot logits (A = v = 0).

    Args:
        inputs: Fitted.
        dim: Embedding width D of the texts.
        n_classes: Number of training classes; 0 for captions.
        sharing: rho, the share of the prior variance that classes have in common.
    """

    def __init__(self, inputs: ImageInputs, dim: int, n_classes: int, sharing: float) -> None:
        super().__init__()
        self.sharing = sharing
        self.temperature = nn.Buffer(torch.ones(()))
        self.inputs, self.text = inputs, Standard(dim)
        self.classes = nn.Buffer(torch.zeros(n_classes, dim))
        self.shared = nn.Parameter(torch.zeros(inputs.width + 1, dim))
        self.own = nn.Parameter(torch.zeros(n_classes, inputs.width + 1))

    def offset(self, batch: Batch, match: Match | None = None) -> Tensor:
        """(B, K) tempered zero-shot logits without the bias that all share; the more foreign, the less tempered."""
        temperature = self.temperature if match is None else self.temperature ** match.reach.mean()
        return temperature * (batch.logits - batch.logit_bias)

    def match(self, text: Tensor) -> Match:
        """How candidates (K, D) relate to the training classes; captions have none, and nothing to be far from."""
        if not len(self.classes):
            nobody = torch.zeros(len(text), dtype=torch.long, device=text.device)
            return Match(nobody, nobody.bool(), torch.ones_like(text[:, 0]))
        cosine, index = nearest(text, self.classes)
        known = cosine >= SAME_TEXT
        candidates, classes = (functional.normalize(self.text(rows), dim=1) for rows in (text, self.classes))
        near = nearest(candidates, classes)[0].clamp(0, 1).square()
        return Match(index, known, torch.where(known, 1.0, near))

    def forward(self, batch: Batch, match: Match | None = None) -> Tensor:
        """(B, K) logits; ``match`` as from ``match``, None where the candidates are the training classes in order."""
        keys = math.sqrt(self.sharing) * (self.text(batch.text) @ self.shared.T)
        if match is not None:
            keys = keys * match.reach[:, None]
        if len(self.own):
            own = self.own if match is None else self.own[match.row] * match.known[:, None]
            keys = keys + math.sqrt(1 - self.sharing) * own
        learned: Tensor = functional.pad(self.inputs(batch), (0, 1), value=1.0) @ keys.T
        return self.offset(batch, match) + learned


def fit_attention(
    inputs: ImageInputs, rows: Rows, n_classes: int, variance: float, sharing: float, device: torch.device
) -> SupervisedAttention:
    """The attention of largest posterior for labelled rows, drawn towards zero-shot where they are a handful.

    A convex problem, solved by L-BFGS over streamed batches. With C = variance x (variance of the tempered zero-shot
    logits of a row) the prior of what is learned is N(0, C) for the weights of x, N(0, C / 50) for a class's bias,
    about ``class_log_prior``. Of n rows' weights n / (n + 8) are kept.
    """
    attention = SupervisedAttention(inputs, rows.source.space.embed_dim, n_classes, sharing)
    _take_texts(attention, rows)
    attention.to(device)
    attention.temperature.fill_(fit_temperature(rows, device))
    prior = class_log_prior(rows.source.target[rows.index], n_classes).to(device)
    attention.own.data[:, -1] = prior / math.sqrt(1 - sharing)
    start = attention.own.detach().clone()
    _ascend(attention, start, rows, variance * zero_shot_variance(attention, rows, device), device)
    kept = len(rows.index) / (len(rows.index) + CAUTION)
    with torch.no_grad():
        attention.shared.mul_(kept)
        attention.own.copy_(start + kept * (attention.own - start))
    return attention.eval().requires_grad_(requires_grad=False)


def _ascend(attention: SupervisedAttention, start: Tensor, rows: Rows, variance: float, device: torch.device) -> None:
    """To the largest posterior; ``start`` (K, D + F + 1) is the prior mean of the classes' own weights."""
    parameters = [attention.shared, attention.own] if len(start) else [attention.shared]
    means = [torch.zeros_like(attention.shared), start]
    precision = torch.full((attention.shared.shape[0],), 1 / variance, device=device)
    precision[-1] /= BIAS_SHARE
    shapes = [precision[:, None], precision]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=LBFGS_STEPS,
        history_size=10,
        tolerance_grad=1e-7,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    n = len(rows.index)

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = [((p - m).square() * s).sum() for p, m, s in zip(parameters, means, shapes, strict=False)]
        penalty = torch.stack(squares).sum() / (2 * n)
        penalty.backward()
        total = penalty.detach()
        for batch in rows.batches(SCORING_BATCH):
            moved = batch.to(device)
            loss = -moved.log_probability(attention(moved), moved.target).sum() / n
            loss.backward()
            total = total + loss.detach()
        return total

    optimizer.step(closure)
    optimizer.zero_grad()


def class_log_prior(target: Tensor, n_classes: int) -> Tensor:
    """(K,) log of how often a class occurs, next to classes with labels: 0 for these, below it for those without.

    Of n labels, f of which are the only one of their class, Good and Turing estimate the share of images of classes
    without labels by s = f / n (here at least 1 / n). Spread over all K - m of them, and the rest over the m others, it
    makes one of them s m / ((1 - s) (K - m)) times as frequent, which counts where it is below one. Where all m classes
    have one label, they were drawn so, and s = 0.1.

    Source: Good, Biometrika 1953.
    """
    count = torch.bincount(target, minlength=n_classes)
    n, m = len(target), int((count > 0).sum())
    share = MISSED if n == m else max(int((count == 1).sum()), 1) / n
    prior = torch.zeros(n_classes)
    if 0 < m < n_classes:
        prior[count == 0] = min(math.log(share * m / ((1 - share) * (n_classes - m))), 0.0)
    return prior


def zero_shot_variance(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Variance of the tempered zero-shot logits among a row's candidates, mean over the rows."""
    total, n = 0.0, 0
    for batch in rows.batches(SCORING_BATCH):
        total += float(attention.offset(batch.to(device)).var(dim=1, correction=0).double().sum())
        n += len(batch.index)
    return max(total / n, TINY)


def _take_texts(attention: SupervisedAttention, rows: Rows) -> None:
    """The classes, and mean and norm of the candidates."""
    texts = Moments()
    for batch in rows.batches(SCORING_BATCH):
        texts.add(batch.text)
        if len(attention.classes):
            attention.classes.copy_(batch.text)
            break  # shared candidates are the same in every batch
    attention.text.fit(texts)


def fit_temperature(rows: Rows, device: torch.device) -> float:
    """A > 0 of largest posterior for labels drawn from softmax(a l0), log a ~ N(0, 0.5^2): one for few labels."""
    from scipy.optimize import minimize_scalar

    def objective(log_a: float) -> float:
        total = log_a**2 / (2 * TEMPERATURE_SD**2)
        for batch in rows.batches(SCORING_BATCH):
            moved = batch.to(device)
            total -= float(moved.log_probability(math.exp(log_a) * moved.logits, moved.target).sum())
        return total

    return math.exp(float(minimize_scalar(objective, bounds=(-3, 3), method="bounded").x))


RIDGE = 0.1
GAIN = 8.0
"""From a residual probability to a logit; the pool weighs it anyway."""


class Adapter(nn.Module):
    """A network of the image with one hidden layer, added to the tempered zero-shot logits of the training classes."""

    def __init__(self, inputs: ImageInputs, n_classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.first, self.last = nn.Linear(inputs.width, hidden), nn.Linear(hidden, n_classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        rows = self.inputs(batch) * math.sqrt(self.inputs.width)  # coordinates of variance one on average
        return cast("Tensor", self.last(self.dropout(functional.gelu(self.first(rows)))))


class Memory(nn.Module):
    """Attention over M labelled images: kernel ridge regression on what the zero-shot posterior gets wrong.

    8 k(x) (K + 0.1 I)^-1 (Y - P), with k the Gaussian kernel exp(-|x - x'|^2 / 2) of ``ImageInputs``, Y the labels
    and P the tempered zero-shot posterior of the training images; to be added to the tempered zero-shot logits.
    """

    def __init__(self, inputs: ImageInputs, n_rows: int, n_classes: int) -> None:
        super().__init__()
        self.inputs = copy.deepcopy(inputs)  # tensors of a file must not share memory
        self.bank = nn.Buffer(torch.zeros(n_rows, inputs.width))
        self.values = nn.Buffer(torch.zeros(n_rows, n_classes))

    def kernel(self, rows: Tensor) -> Tensor:
        """(N, M) float64 of inputs (N, D + F) with the bank, on the CPU where the device has no float64.

        Values of both signs and a size of ten cancel to what the rows are told apart by: in float32 an error of 1e-4.
        """
        x, bank = float64(rows), float64(self.bank)
        squares = x.square().sum(dim=1)[:, None] + bank.square().sum(dim=1) - 2 * x @ bank.T
        return torch.exp(-squares.clamp_min(0) / 2)

    @classmethod
    def of(cls, attention: SupervisedAttention, rows: Rows) -> Memory:
        """Remember labelled rows, all at once: there are few of them."""
        (batch,) = (batch.to(attention.classes.device) for batch in rows.steps(len(rows.index)))
        memory = cls(attention.inputs, len(batch.index), len(batch.text)).to(attention.classes.device)
        memory.bank.copy_(attention.inputs(batch))
        missing = functional.one_hot(batch.target, len(batch.text)) - attention.offset(batch).softmax(dim=-1)
        gram = memory.kernel(memory.bank).cpu()
        gram.diagonal().add_(RIDGE)
        memory.values.copy_(GAIN * torch.cholesky_solve(missing.cpu().double(), torch.linalg.cholesky(gram)))
        return memory

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) for the training classes in their order."""
        rows = self.inputs(batch)
        return (self.kernel(rows) @ float64(self.values)).to(rows)


class Pooled(NamedTuple):
    """Three float64 parts whose sum is sum_m w_m l_m, the pooled logits, up to a constant of every row.

    ``zero_shot`` (B, K) are tempered zero-shot logits, times sum_m w_m; ``texts`` (1, K) the residual of the experts at
    the mean training image; ``image`` (B, K) what the image adds to that residual.
    """

    zero_shot: Tensor
    texts: Tensor
    image: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, K) their sum."""
        return self.zero_shot + self.texts + self.image


class Experts(nn.Module):
    """Several opinions on which candidate is true: an attention, and companions that know the training classes only.

    ``weights`` (M,) float64 are those of a log-linear pool of all; the attention alone counts one.
    """

    def __init__(self, attention: SupervisedAttention, companions: Mapping[str, nn.Module], weights: Tensor) -> None:
        super().__init__()
        self.attention, self.companions = attention, nn.ModuleDict(companions)
        self.weights = weights  # no buffer: some devices have no float64

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) float64 log probabilities, pooled, up to a constant of every row."""
        return pool(self.log_posteriors(batch), self.weights)

    def log_posteriors(self, batch: Batch) -> Tensor:
        """(B, M, K) float64 log probabilities of the experts."""
        return float64(self.logits(batch)).log_softmax(dim=-1)

    def logits(self, batch: Batch) -> Tensor:
        """(B, M, K) logits: of all experts where every candidate is a training class, else of the attention (M = 1)."""
        match = self.attention.match(batch.text)
        return self.all_logits(batch, match) if bool(match.known.all()) else self.attention(batch, match)[:, None]

    def all_logits(self, batch: Batch, match: Match | None) -> Tensor:
        """(B, M, K) logits of all experts, those of the companions wrong for other candidates than training classes."""
        logits = [self.attention(batch, match)]
        if match is not None and len(self.companions):
            offset = self.attention.offset(batch)
            logits += [offset + companion(batch)[:, match.row] for companion in self.companions.values()]
        return torch.stack(logits, dim=1)

    def pooled_parts(self, batch: Batch) -> Pooled:
        """The pooled logits of a batch in their parts.

        l_m = a l0 + r_m(x) for every expert m: l0 the zero-shot logits, a their temperature, r_m the expert's residual,
        x the standardised image, which is zero at the training mean. So sum_m w_m l_m = (sum_m w_m) a l0 + R(0) +
        (R(x) - R(0)) with R = sum_m w_m r_m.
        """
        offset, logits = self._of(batch)
        mean_offset, mean_logits = self._of(self._mean_image(batch))
        texts = pool(mean_logits - mean_offset[:, None], self.weights)
        residual = pool(logits - offset[:, None], self.weights)
        return Pooled(weights_of(logits, self.weights).sum() * offset, texts, residual - texts)

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, K) offset that all experts share, and their (B, M, K) logits, float64."""
        offset = self.attention.offset(batch, self.attention.match(batch.text))
        return float64(offset), float64(self.logits(batch))

    def _mean_image(self, batch: Batch) -> Batch:
        """One row, the mean training image, against the candidates of a batch."""
        inputs = self.attention.inputs
        columns = dict(batch.columns) | ({FEATURES: inputs.features.mean[None]} if inputs.on_features else {})
        one = batch.rows(slice(0, 1))
        return dataclasses.replace(one, image=inputs.image.mean[None], columns=columns)


def pool(rows: Tensor, weights: Tensor) -> Tensor:
    """(B, K) float64 weighted sum of the rows (B, M, K) of all experts, or the rows of the attention where M is 1."""
    return torch.einsum("m,bmk->bk", weights_of(rows, weights), rows)


def weights_of(rows: Tensor, weights: Tensor) -> Tensor:
    """(M,) weights of rows (B, M, K)."""
    return weights.to(rows.device) if rows.shape[1] > 1 else torch.ones_like(rows[0, :1, 0])
