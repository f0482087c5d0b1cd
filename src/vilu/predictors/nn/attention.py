"""The convex expert: image-to-text attention that labels told where to look."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import MAX_CELLS, nearest
from vilu.embeddings.source import SAME_TEXT, Batch

TEMPERATURE_SD = 0.5
"""Prior standard deviation of the log of the zero-shot temperature, around zero."""

BIAS_SHARE = 0.02
"""Prior variance of a class's bias, as a share of that of its logits: labels are drawn by class more often than not."""

CAUTION = 8
"""Of n labels the attention learns n / (n + 8) of what they say: what a handful of images have in common is chance."""

MISSED = 0.1
"""Share of images of classes without labels, where no class has two labels and so nothing tells."""

STEPS = 150
STREAMED_ROWS = 1_024  # what is made of so few stays near the processor
SOME_ROWS = 4_096  # from which a number for all rows is taken
CHANGE, STREAMED_CHANGE = 1e-9, 3e-5
"""Of the loss of a row, below which a step is the last one; where rows are streamed the next fifty gain no AUROC."""
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
        self.norm.copy_(
            variance.sqrt() if variance > TINY else torch.ones(())
        )  # one row, or all alike

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

    ``row`` is the class of each, where it is one, ``known`` whether it is one, and ``reach`` 1 for
    a class, else the squared cosine of the standardised text with the nearest class's (0 where it
    is negative): the share of its variance that the two have in common.
    """

    row: Tensor
    known: Tensor
    reach: Tensor


class Start(NamedTuple):
    """What is known of K classes before labels: logits l_c + (z - centre) weight_c + bias_c of unit images z.

    ``centre`` (D,), ``weight`` (K, D) and ``bias`` (K,) are float64, and ``occurrence`` (K,), at
    most 0, is the log probability that a class occurs at all.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    occurrence: Tensor


class SupervisedAttention(nn.Module):
    """Logits of K candidates: the zero-shot logits, tempered, plus a bilinear form in image and text.

    l_j = a l0_j + (x, 1) . (sqrt(rho) A t_j + sqrt(1 - rho) v_j), l0 the zero-shot logits, x the
    ``ImageInputs``, t standardised texts. v_j belongs to class j of the training set and is zero
    for every other candidate, so any candidates can be scored; A is what they have in common. It
    and the temperature count for other candidates as much as their texts are like those of classes
    (``Match.reach``), so that foreign ones have their zero-shot logits. Starts at the tempered
    zero-shot logits (A = v = 0), or at what images without labels say (``start_from``).

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

    def start_from(self, start: Start) -> None:
        """Take the logits of a ``Start`` as those of the classes."""
        image, dim = self.inputs.image, self.text.mean.shape[0]
        own = torch.zeros(self.own.shape, dtype=torch.float64)
        own[:, :dim] = (
            start.weight * float(image.norm) * (math.sqrt(2) if self.inputs.on_features else 1)
        )
        own[:, -1] = start.bias + (image.mean.double() - start.centre) @ start.weight.T
        self.own.data.copy_(own / math.sqrt(1 - self.sharing))

    def begin(self, batch: Batch) -> Tensor:
        """(B, K) logits of the classes before any label is learned from."""
        return self.queries(batch) @ self.begin_keys(batch).T

    def begin_keys(self, batch: Batch) -> Tensor:
        """(K, D + F + 1) what the queries meet there."""
        keys = self.offset_keys(batch)
        return keys + math.sqrt(1 - self.sharing) * self.own if len(self.own) else keys

    def offset_keys(self, batch: Batch) -> Tensor:
        """(K, D + F + 1) those of the ``offset`` for classes: zero-shot logits are linear in the image, too."""
        image, dim = self.inputs.image, batch.text.shape[1]
        scaled = self.temperature * batch.logit_scale * batch.text
        keys = torch.zeros(len(batch.text), self.inputs.width + 1, device=scaled.device)
        keys[:, :dim] = image.norm * (math.sqrt(2) if self.inputs.on_features else 1) * scaled
        keys[:, -1] = scaled @ image.mean
        return keys

    def queries(self, batch: Batch) -> Tensor:
        """(B, D + F + 1) the ``ImageInputs``, and a one."""
        return functional.pad(self.inputs(batch), (0, 1), value=1.0)

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
        candidates, classes = (
            functional.normalize(self.text(rows), dim=1) for rows in (text, self.classes)
        )
        near = nearest(candidates, classes)[0].clamp(0, 1).square()
        return Match(index, known, torch.where(known, 1.0, near))

    def forward(self, batch: Batch, match: Match | None = None) -> Tensor:
        """(B, K) logits; ``match`` as from ``match``, None where the candidates are the training classes in order."""
        learned: Tensor = self.queries(batch) @ self.learned_keys(batch.text, match).T
        return self.offset(batch, match) + learned

    def learned_keys(self, text: Tensor, match: Match | None) -> Tensor:
        """(K, D + F + 1) what the queries meet beside the ``offset``."""
        keys: Tensor = math.sqrt(self.sharing) * (self.text(text) @ self.shared.T)
        if match is not None:
            keys = keys * match.reach[:, None]
        if len(self.own):
            own = self.own if match is None else self.own[match.row] * match.known[:, None]
            keys = keys + math.sqrt(1 - self.sharing) * own
        return keys


def fit_attention(  # noqa: PLR0913 - what it is fitted on, its prior, and where to begin
    inputs: ImageInputs,
    rows: Rows,
    n_classes: int,
    variance: float,
    sharing: float,
    device: torch.device,
    *,
    start: Start | None = None,
    is_few: bool = False,
    near: SupervisedAttention | None = None,
) -> SupervisedAttention:
    """The attention of largest posterior for labelled rows, drawn towards its start as far as they do not hold.

    The start is tempered: zero-shot logits, or those of ``start``. A convex problem. With C =
    ``variance`` x ``zero_shot_variance`` the prior of what is learned is N(0, C) for the weights of
    x and N(0, C / 50) for a class's bias, about ``class_log_prior``, or ``start.occurrence`` where
    that is less. Of what n rows say n / (n + 8) is kept, and where they are few (``is_few``) the
    share of it that ``held_out_share`` finds. A fit to most of the rows that is ``near`` saves
    steps.
    """
    attention = SupervisedAttention(inputs, rows.source.space.embed_dim, n_classes, sharing)
    _take_texts(attention, rows)
    target = rows.source.target[rows.index]
    prior = class_log_prior(target, n_classes)
    if start is not None:
        attention.start_from(start)
        has_labels = torch.bincount(target, minlength=n_classes) > 0
        prior = torch.where(has_labels, 0.0, torch.minimum(prior, start.occurrence.float()))
    attention.to(device)
    temperature = fit_temperature(attention, rows, device)
    attention.temperature.mul_(temperature)
    attention.own.data.mul_(temperature)[:, -1].add_(prior.to(device) / math.sqrt(1 - sharing))
    problem = Problem(attention, rows, variance * zero_shot_variance(attention, rows, device))
    n = len(rows.index)
    share = held_out_share(problem) if is_few and problem.held is not None else 1.0
    found, kept = problem.full(problem.solve(near=near)), share * n / (n + CAUTION)
    attention.shared.data.add_(kept * found.shared)
    attention.own.data.add_(kept * found.own)
    return attention.eval().requires_grad_(requires_grad=False)


class Block(NamedTuple):
    """Labelled rows as the convex problem sees them; their logits are image @ (before + text @ A^T + V)^T.

    Attributes:
        batch: The rows.
        image: (B, P) inputs times their prior standard deviations, so that A and V are N(0, 1) and
            N(0, 1 - rho).
        text: (K, Q) sqrt(rho) times the standardised texts.
        before: (K, P) keys when nothing is learned.
    """

    batch: Batch
    image: Tensor
    text: Tensor
    before: Tensor

    def losses(self, logits: Tensor) -> Tensor:
        """(B,) cross-entropy."""
        return -self.batch.log_probability(logits, self.batch.target)

    def slopes(self, logits: Tensor) -> Tensor:
        """(B, K) of the ``losses`` in the logits, softmax less the share of each right candidate; in their memory."""
        target = self.batch.target[:, None]
        if self.batch.same is None:
            right = torch.ones_like(logits[:, :1])
            return torch.softmax(logits, dim=1, out=logits).scatter_add_(1, target, -right)
        alike = self.batch.alike(self.batch.target)
        return logits.softmax(dim=1).sub_(logits.masked_fill_(~alike, -torch.inf).softmax(dim=1))


class Solution(NamedTuple):
    """What is learned, in the coordinates of a ``Problem``."""

    shared: Tensor  # (P, Q)
    own: Tensor  # (K, P)


class Problem:
    """The attention's convex problem: of rows that are streamed, or, where one batch holds them, in their own span.

    Classes without labels learn what is shared alone: labels of others would else make them ever
    rarer, beyond ``class_log_prior``. The optimum is a sum over rows and over texts, so with fewer
    rows than coordinates an orthonormal basis of the rows says as much as all coordinates do, and
    so for the texts.

    Attributes:
        held: All rows in one block, in the bases; None where they are streamed.
    """

    def __init__(self, attention: SupervisedAttention, rows: Rows, variance: float) -> None:
        self.attention, self.rows = attention, rows
        self.device, self.n = attention.shared.device, len(rows.index)
        scale = torch.full((attention.inputs.width + 1,), math.sqrt(variance), device=self.device)
        scale[-1] *= math.sqrt(BIAS_SHARE)
        self.scale, self.own_scale = scale, math.sqrt(1 - attention.sharing)
        self.has_labels = torch.zeros(len(attention.own), 1).to(scale)
        if len(attention.own):  # pairs have no classes
            self.has_labels[rows.source.target[rows.index].unique()] = 1.0
        self.held: Block | None = None
        if (k := len(attention.classes)) and self.n <= min(SCORING_BATCH, MAX_CELLS // k):
            (whole,) = self._streamed()
            self.of_image, self.of_text = basis(whole.image), basis(whole.text)
            image, text = whole.image @ self.of_image, whole.text @ self.of_text
            self.held = whole._replace(image=image, text=text, before=whole.before @ self.of_image)

    def _streamed(self) -> Iterator[Block]:
        attention, last = self.attention, None
        size = SCORING_BATCH if self.held is None and self.n <= SCORING_BATCH else STREAMED_ROWS
        for batch in self.rows.batches(size):
            moved = batch.to(self.device)
            with torch.no_grad():
                image = attention.queries(moved) * self.scale
                if last is None or not len(
                    attention.classes
                ):  # classes are the same in every batch
                    text = math.sqrt(attention.sharing) * attention.text(moved.text)
                    last = text, attention.begin_keys(moved) / self.scale
            yield Block(moved, image, *last)

    def solve(
        self, weight: Tensor | None = None, near: SupervisedAttention | None = None
    ) -> Solution:
        """The solution of largest posterior; ``weight`` (N,) is how often each of the rows held counts.

        Streamed rows begin where an attention that is fitted to most of them ended (``near``).
        """
        first = self.held or next(self._streamed())
        shared = torch.zeros(first.image.shape[1], first.text.shape[1], device=self.device)
        own = torch.zeros(len(self.attention.own), first.image.shape[1], device=self.device)
        if near is not None and self.held is None:
            shared = near.shared.detach() / self.scale[:, None]
            own = (near.own.detach() - self.attention.own.detach()) / self.scale
        parameters = [shared, own] if len(own) else [shared]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=STEPS,
            history_size=10,
            tolerance_grad=1e-7,
            tolerance_change=STREAMED_CHANGE if self.held is None else CHANGE,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._slope(shared, own, weight))
        return Solution(shared, own)

    @torch.no_grad()
    def _slope(self, shared: Tensor, own: Tensor, weight: Tensor | None) -> Tensor:
        """The loss of a row with its share of the penalty; its gradient is left with the two."""
        total = torch.stack([part.square().sum() for part in (shared, own)]).sum() / (2 * self.n)
        of_shared, of_own = shared / self.n, own / self.n
        texts: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # the last ones, their keys, and the slope of these

        def pass_on() -> None:
            """From the keys to what they are made of: once for classes, in every pool."""
            for text, _, slope in texts:
                of_shared.add_(slope.T @ text)
                if len(own):
                    of_own.add_(self.own_scale * self.has_labels * slope)
            texts.clear()

        for block in self._streamed() if self.held is None else (self.held,):
            if not texts or block.text is not texts[0][0]:
                pass_on()
                keys = block.before + self.keys(block, shared, own)
                texts.append((block.text, keys, torch.zeros_like(keys)))
            _, keys, slope = texts[0]
            share = (
                torch.full_like(block.image[:, 0], 1 / self.n)
                if weight is None
                else weight / self.n
            )
            logits = block.image @ keys.T
            total += (block.losses(logits) * share).sum()
            slope.addmm_((block.slopes(logits) * share[:, None]).T, block.image)
        pass_on()
        shared.grad, own.grad = of_shared, of_own
        return total

    def keys(self, block: Block, shared: Tensor, own: Tensor) -> Tensor:
        """(K, P) what is added to those before."""
        keys = block.text @ shared.T
        return keys + self.own_scale * self.has_labels * own if len(own) else keys

    def full(self, found: Solution) -> Solution:
        """The solution for the attention's own coordinates: (D + F + 1, D) and (K, D + F + 1)."""
        shared, own = found
        if self.held is not None:
            shared, own = self.of_image @ shared @ self.of_text.T, own @ self.of_image.T
        return Solution(self.scale[:, None] * shared, self.scale * own)


def basis(rows: Tensor) -> Tensor:
    """(P, R) orthonormal basis of a space that holds the rows (N, P), R = min(N, P)."""
    if len(rows) >= rows.shape[1]:
        return torch.eye(rows.shape[1], device=rows.device)
    orthonormal: Tensor = torch.linalg.qr(rows.cpu().double().T).Q
    return orthonormal.to(rows)


FOLDS, HELD_OUT = 5, 200
"""Rows are held out in fifths, each once, until so many have been."""

SHARE_SD = 0.2
"""Prior standard deviation of the share, around one."""


def held_out_share(problem: Problem) -> float:
    """How much of what is learned holds for rows that it was not learned from: the most probable w in [0, 1].

    Their labels are drawn from softmax(offset + w R), R learned without them; w ~ N(1, 0.2^2).
    Neighbours in the order of classes are held out apart, so that classes lose as few rows as they
    can. Rows of one picture are held out together.
    """
    from scipy.optimize import minimize_scalar

    block, n = cast("Block", problem.held), problem.n
    if n == 1:
        return 1.0
    before = block.image @ block.before.T
    first, picture = (places.to(problem.device) for places in problem.rows.pictures())
    fold_of_picture = torch.empty_like(first)
    by_class = block.batch.target[first].argsort(stable=True)
    fold_of_picture[by_class] = torch.arange(len(first), device=problem.device) % FOLDS
    fold = fold_of_picture[picture]
    n_folds = min(math.ceil(FOLDS * HELD_OUT / n), FOLDS, n)
    learned = torch.zeros_like(before)
    for k in range(n_folds):
        keys = problem.keys(block, *problem.solve((fold != k).to(before)))
        learned = torch.where((fold == k)[:, None], block.image @ keys.T, learned)
    was_held_out = fold < n_folds

    def objective(share: float) -> float:
        losses = block.losses(before + share * learned)
        return (share - 1) ** 2 / (2 * SHARE_SD**2) + float(losses[was_held_out].double().sum())

    return float(minimize_scalar(objective, bounds=(0, 1), method="bounded").x)


def class_log_prior(target: Tensor, n_classes: int) -> Tensor:
    """(K,) log of how often a class occurs, next to classes with labels: 0 for these, below it for those without.

    Of n labels, f of which are the only one of their class, Good and Turing estimate the share of
    images of classes without labels by s = f / n (here at least 1 / n). Spread over all K - m of
    them, and the rest over the m others, it makes one of them s m / ((1 - s) (K - m)) times as
    frequent, which counts where it is below one. Where all m classes have one label, they were
    drawn so, and s = 0.1.

    Source: Good, Biometrika 1953.
    """
    if not n_classes:
        return torch.zeros(0)
    count = torch.bincount(target, minlength=n_classes)
    n, m = len(target), int((count > 0).sum())
    share = MISSED if n == m else max(int((count == 1).sum()), 1) / n
    prior = torch.zeros(n_classes)
    if 0 < m < n_classes:
        prior[count == 0] = min(math.log(share * m / ((1 - share) * (n_classes - m))), 0.0)
    return prior


def zero_shot_variance(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Variance of the tempered zero-shot logits among a row's candidates, mean over ``some`` rows."""
    total, n = 0.0, 0
    for batch in some(rows).batches(SCORING_BATCH):
        total += float(attention.offset(batch.to(device)).var(dim=1, correction=0).double().sum())
        n += len(batch.index)
    return max(total / n, TINY)


def some(rows: Rows) -> Rows:
    """At most ``SOME_ROWS`` of them, evenly spaced, or all where they make pools."""
    if rows.source.pool_size is not None:
        return rows
    step = math.ceil(len(rows.index) / SOME_ROWS)
    return replace(rows, index=rows.index[::step])


def _take_texts(attention: SupervisedAttention, rows: Rows) -> None:
    """The classes, and mean and norm of the candidates."""
    texts = Moments()
    for batch in rows.batches(SCORING_BATCH):
        texts.add(batch.text)
        if len(attention.classes):
            attention.classes.copy_(batch.text)
            break  # shared candidates are the same in every batch
    attention.text.fit(texts)


def fit_temperature(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """A > 0 of largest posterior for labels drawn from softmax(a l), log a ~ N(0, 0.5^2): one for few labels.

    Of many rows ``some`` are looked at, for all.
    """
    from scipy.optimize import minimize_scalar

    few = some(rows)

    def objective(log_a: float) -> float:
        total = 0.0
        for batch in few.batches(SCORING_BATCH):
            moved = batch.to(device)
            with torch.no_grad():
                total -= float(
                    moved.log_probability(
                        math.exp(log_a) * attention.begin(moved), moved.target
                    ).sum()
                )
        return log_a**2 / (2 * TEMPERATURE_SD**2) + total * len(rows.index) / len(few.index)

    return math.exp(float(minimize_scalar(objective, bounds=(-3, 3), method="bounded").x))
