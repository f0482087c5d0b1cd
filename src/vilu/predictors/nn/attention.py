"""The convex expert: image-to-text attention that learns from labels where to look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import MAX_CELLS, nearest
from vilu.embeddings.source import SAME_TEXT, Batch, LogitBatch

TEMPERATURE_SD = 0.5
"""Prior standard deviation of the log of the zero-shot temperature, around zero."""

BIAS_SHARE = 0.02
"""Prior variance of a class's bias, as a share of that of its logits.

It is small, since labels are drawn by class more often than not.
"""

CAUTION = 8
"""Of n labels the attention learns the share n / (n + 8).

The rest is caution: a handful of images have things in common by chance.
"""

MISSED = 0.1
"""Assumed share of images of classes without labels, where no class has two labels."""

STEPS = 150
STREAMED_ROWS = 1_024
"""Rows of a streamed block: the results of so few stay near the processor."""

SOME_ROWS = 4_096
"""Rows from which a number for all rows is taken."""

CHANGE = 1e-9
"""A step that changes the loss of a row by less is the last one."""

STREAMED_CHANGE = 3e-5
"""The same where rows are streamed: the next fifty steps gain no AUROC."""

FEATURES = "features"
TINY = 1e-6


class Moments:
    """Number, float64 sum (D,) and sum of squared norms of rows that come in blocks."""

    def __init__(self) -> None:
        self.n = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Count a block (N, D)."""
        double = rows.cpu().double()
        self.n += len(rows)
        self.total = self.total + double.sum(dim=0)
        self.squares = self.squares + double.square().sum()


class Standard(nn.Module):
    """Rows centred and divided by their root mean square norm.

    So nothing that is learned depends on a model's scale.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(dim, dtype=torch.float32))
        self.norm = nn.Buffer(torch.ones((), dtype=torch.float32))

    def fit(self, moments: Moments) -> None:
        """Take mean and norm from the rows that were added up."""
        mean = moments.total / moments.n
        # E |x - mean|^2 = E |x|^2 - |mean|^2; float64 leaves enough digits after the subtraction
        variance = (moments.squares / moments.n - mean.square().sum()).clamp_min(0)
        norm = torch.ones((), dtype=torch.float32)  # one row, or all alike
        if variance > TINY:
            norm = variance.sqrt()
        self.mean.copy_(mean)
        self.norm.copy_(norm)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return (rows - self.mean) / self.norm


class ImageInputs(nn.Module):
    """The experts' view of an image: its embedding (D), and its features (F; 0: none).

    Both have the same weight.
    """

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.width = dim + feature_dim
        self.on_features = feature_dim > 0
        self.image = Standard(dim)
        self.features = Standard(feature_dim)

    def fit(self, rows: Rows) -> None:
        """Mean and norm of the rows, from one pass."""
        images = Moments()
        features = Moments()
        for batch in rows.batches(SCORING_BATCH):
            images.add(batch.image)
            if self.on_features:
                features.add(batch.columns[FEATURES])
            else:  # of no columns
                features.add(batch.image[:, :0])
        self.image.fit(images)
        self.features.fit(features)

    def forward(self, batch: Batch) -> Tensor:
        """(B, D + F), of unit norm in the root mean square."""
        if not self.on_features:
            return cast("Tensor", self.image(batch.image))
        both = [self.image(batch.image), self.features(batch.columns[FEATURES])]
        return torch.cat(both, dim=1) / math.sqrt(2)

    @property
    def image_gain(self) -> float:
        """The number that undoes the division of the standardised embedding in ``forward``."""
        return math.sqrt(2) if self.on_features else 1


class Match(NamedTuple):
    """How K candidates relate to the training classes, each field (K,).

    ``known`` says whether a candidate is a class, and ``row`` which one it is. ``reach`` is 1 for a
    class. Else it is the squared cosine of the standardised text with the nearest class's (0 where
    it is negative): the share of its variance that the two have in common.
    """

    row: Tensor
    known: Tensor
    reach: Tensor


class Start(NamedTuple):
    """The knowledge of K classes before labels.

    The logits of unit images z are l_c + (z - centre) weight_c + bias_c. ``centre`` (D,),
    ``weight`` (K, D) and ``bias`` (K,) are float64, and ``occurrence`` (K,), at most 0, is the log
    probability that a class occurs at all.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    occurrence: Tensor


class SupervisedAttention(nn.Module):
    """Logits of K candidates: tempered zero-shot logits, plus a bilinear form in image and text.

    With l0 the zero-shot logits, x the ``ImageInputs`` and t standardised texts,

        l_j = a l0_j + (x, 1) . (sqrt(rho) A t_j + sqrt(1 - rho) v_j).

    If the logits were given, the texts t_j are zero, and v_j alone is learned.

    v_j belongs to class j of the training set and is zero for every other candidate, so any
    candidates can be scored. A is what the classes have in common. For other candidates A and the
    temperature count as much as their texts are like those of classes (``Match.reach``), so that
    foreign ones have their zero-shot logits. The attention starts at the tempered zero-shot logits
    (A = v = 0), or at the posterior of images without labels (``start_from``).

    Args:
        inputs: Fitted.
        dim: Embedding width D of the texts.
        n_classes: Number of training classes; 0 for captions.
        sharing: rho, the share of the prior variance that classes have in common.
    """

    def __init__(self, inputs: ImageInputs, dim: int, n_classes: int, sharing: float) -> None:
        super().__init__()
        self.sharing = sharing
        self.temperature = nn.Buffer(torch.ones((), dtype=torch.float32))
        self.inputs = inputs
        self.text = Standard(dim)
        self.classes = nn.Buffer(torch.zeros(n_classes, dim, dtype=torch.float32))
        self.shared = nn.Parameter(torch.zeros(inputs.width + 1, dim, dtype=torch.float32))
        self.own = nn.Parameter(torch.zeros(n_classes, inputs.width + 1, dtype=torch.float32))

    def start_from(self, start: Start) -> None:
        """Take the logits of a ``Start`` as those of the classes."""
        # z = image.mean + image.norm * gain * x, of unit images z and the first D coordinates of x.
        # So (z - centre) . weight is linear in (x, 1), which is what ``own`` is multiplied by.
        image = self.inputs.image
        dim = self.text.mean.shape[0]
        own = torch.zeros(self.own.shape, dtype=torch.float64)
        own[:, :dim] = start.weight * float(image.norm) * self.inputs.image_gain
        own[:, -1] = start.bias + (image.mean.double() - start.centre) @ start.weight.T
        self.own.data.copy_(own / math.sqrt(1 - self.sharing))

    def begin(self, batch: Batch) -> Tensor:
        """(B, K) logits of the classes before any label is learned from."""
        logits = self.queries(batch) @ self.begin_keys(batch).T
        return plus(logits, self.given_offset(batch))

    def begin_keys(self, batch: Batch) -> Tensor:
        """(K, D + F + 1) keys of the logits of ``begin``."""
        keys = self.offset_keys(batch)
        if len(self.own):
            keys = keys + math.sqrt(1 - self.sharing) * self.own
        return keys

    def given_offset(self, batch: Batch) -> Tensor | None:
        """(B, K) ``offset`` of given logits, which no product with keys gives; else None."""
        if isinstance(batch, LogitBatch):
            return self.offset(batch)
        return None

    def offset_keys(self, batch: Batch) -> Tensor:
        """(K, D + F + 1) keys of the ``offset`` for classes; zero for given logits."""
        # zero-shot logits are linear in the image z = image.mean + image.norm * gain * x, too
        image = self.inputs.image
        dim = batch.text.shape[1]
        scaled = self.temperature * batch.logit_scale * batch.text
        keys = torch.zeros(
            len(batch.text), self.inputs.width + 1, device=scaled.device, dtype=torch.float32
        )
        keys[:, :dim] = image.norm * self.inputs.image_gain * scaled
        keys[:, -1] = scaled @ image.mean
        return keys

    def queries(self, batch: Batch) -> Tensor:
        """(B, D + F + 1) the ``ImageInputs``, and a one."""
        return functional.pad(self.inputs(batch), (0, 1), value=1.0)

    def offset(self, batch: Batch, match: Match | None = None) -> Tensor:
        """(B, K) tempered zero-shot logits, without the bias that all share.

        The more foreign the candidates are, the less they are tempered.
        """
        temperature: Tensor = self.temperature
        if match is not None:
            # a mean over the candidates: their logits are compared, so all have one temperature
            temperature = temperature ** match.reach.mean()
        return temperature * (batch.logits - batch.logit_bias)

    def match(self, text: Tensor) -> Match:
        """How candidates (K, D) relate to the training classes.

        Of captions there are no classes, and nothing that a candidate could be far from.
        """
        if not len(self.classes):
            rows = torch.zeros(len(text), dtype=torch.long, device=text.device)
            return Match(rows, rows.bool(), torch.ones_like(text[:, 0]))
        cosine, row = nearest(text, self.classes)
        known = cosine >= SAME_TEXT
        candidates = functional.normalize(self.text(text), dim=1)
        classes = functional.normalize(self.text(self.classes), dim=1)
        nearest_cosine, _ = nearest(candidates, classes)
        common = nearest_cosine.clamp(0, 1).square()
        return Match(row, known, torch.where(known, 1.0, common))

    def forward(self, batch: Batch, match: Match | None = None) -> Tensor:
        """(B, K) logits.

        ``match`` is as from ``match``; None: the candidates are the training classes in order.
        """
        learned: Tensor = self.queries(batch) @ self.learned_keys(batch.text, match).T
        return self.offset(batch, match) + learned

    def learned_keys(self, text: Tensor, match: Match | None) -> Tensor:
        """(K, D + F + 1) keys of the learned logits, beside the ``offset``."""
        keys: Tensor = math.sqrt(self.sharing) * (self.text(text) @ self.shared.T)
        if match is not None:
            keys = keys * match.reach[:, None]
        if len(self.own):
            own: Tensor = self.own
            if match is not None:
                own = own[match.row] * match.known[:, None]
            keys = keys + math.sqrt(1 - self.sharing) * own
        return keys


def plus(logits: Tensor, given: Tensor | None) -> Tensor:
    """Logits (B, K) that keys give, plus the offset of given logits if there is one."""
    if given is None:
        return logits
    return logits + given


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
    """The attention of largest posterior for labelled rows, drawn towards its start.

    The start is tempered: zero-shot logits, or those of ``start``. The problem is convex. With C =
    ``variance`` x ``zero_shot_variance`` the prior of the learned part is N(0, C) for the weights
    of x and N(0, C / 50) for a class's bias, about ``class_log_prior``, or ``start.occurrence``
    where that is less. Of the solution for n rows the share n / (n + 8) is kept, and where rows are
    few (``is_few``) the share of it that ``held_out_share`` finds. A fit to most of the rows that
    is ``near`` saves steps.
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
    _temper(attention, rows, prior, device)
    problem = Problem(attention, rows, variance * zero_shot_variance(attention, rows, device))
    share = 1.0
    if is_few and problem.held is not None:
        share = held_out_share(problem)
    n = len(rows.index)
    kept_share = share * n / (n + CAUTION)
    solution = problem.full(problem.solve(near=near))
    attention.shared.data.add_(kept_share * solution.shared)
    attention.own.data.add_(kept_share * solution.own)
    return attention.eval().requires_grad_(requires_grad=False)


def _temper(
    attention: SupervisedAttention, rows: Rows, prior: Tensor, device: torch.device
) -> None:
    """Give the start the temperature that fits the rows, and classes their log prior (K,)."""
    temperature = fit_temperature(attention, rows, device)
    attention.temperature.mul_(temperature)
    attention.own.data.mul_(temperature)
    # the last column meets the one of (x, 1), and all of ``own`` counts sqrt(1 - rho) times
    bias = attention.own.data[:, -1]
    bias.add_(prior.to(device) / math.sqrt(1 - attention.sharing))


class Block(NamedTuple):
    """Labelled rows as the convex problem sees them.

    Their logits are image @ (before + text @ A^T + V)^T, plus the offset of given logits.

    Attributes:
        batch: The rows.
        image: (B, P) inputs times their prior standard deviations, so that A and V are N(0, 1) and
            N(0, 1 - rho).
        text: (K, Q) sqrt(rho) times the standardised texts.
        before: (K, P) keys when nothing is learned.
        offset: (B, K) tempered given logits; None where ``before`` gives the offset.
    """

    batch: Batch
    image: Tensor
    text: Tensor
    before: Tensor
    offset: Tensor | None

    def losses(self, logits: Tensor) -> Tensor:
        """(B,) cross-entropy."""
        return -self.batch.log_probability(logits, self.batch.target)

    def slopes(self, logits: Tensor) -> Tensor:
        """(B, K) slopes of the ``losses`` in the logits, in the memory of these.

        They are the softmax, less the share of each right candidate.
        """
        target = self.batch.target[:, None]
        if self.batch.same is None:  # one candidate is right
            right = torch.ones_like(logits[:, :1])
            return torch.softmax(logits, dim=1, out=logits).scatter_add_(1, target, -right)
        # Several captions are right: the loss is -log of the sum of their probabilities, so its
        # slope is softmax over all, less softmax over the right ones.
        posterior = logits.softmax(dim=1)
        is_wrong = ~self.batch.alike(self.batch.target)
        of_right = logits.masked_fill_(is_wrong, -torch.inf).softmax(dim=1)
        return posterior.sub_(of_right)


class Solution(NamedTuple):
    """The learned part of an attention, in the coordinates of a ``Problem``."""

    shared: Tensor  # (P, Q)
    own: Tensor  # (K, P)


class Keys(NamedTuple):
    """The keys that some blocks have in common, and the slope of the loss in them."""

    text: Tensor  # (K, Q) of the blocks
    keys: Tensor  # (K, P)
    slope: Tensor  # (K, P), a sum over the blocks


class Problem:
    """The attention's convex problem, of rows that are streamed, or held in one batch.

    Classes without labels learn only the shared part: labels of others would else make them ever
    rarer, beyond ``class_log_prior``.

    Held rows are written in a basis of their own span. The optimum is a sum over rows and over
    texts, so with fewer rows than coordinates an orthonormal basis of the rows says as much as all
    coordinates do, and so for the texts.

    Attributes:
        held: All rows in one block, in the bases; None where they are streamed.
    """

    def __init__(self, attention: SupervisedAttention, rows: Rows, variance: float) -> None:
        self.attention = attention
        self.rows = rows
        self.device = attention.shared.device
        self.n = len(rows.index)
        # inputs times prior standard deviations: so the prior of what they meet is N(0, 1)
        scale = torch.full(
            (attention.inputs.width + 1,),
            math.sqrt(variance),
            device=self.device,
            dtype=torch.float32,
        )
        scale[-1] *= math.sqrt(BIAS_SHARE)
        self.scale = scale
        self.own_scale = math.sqrt(1 - attention.sharing)
        self.has_labels = scale.new_zeros(len(attention.own), 1)
        if len(attention.own):  # pairs have no classes
            self.has_labels[rows.source.target[rows.index].unique()] = 1.0
        self.held: Block | None = None
        n_classes = len(attention.classes)
        if n_classes and self.n <= min(SCORING_BATCH, MAX_CELLS // n_classes):
            self._hold()

    def _hold(self) -> None:
        """Take all rows into one block, and write it in the bases."""
        (whole,) = self._streamed()
        self.of_image = basis(whole.image)
        self.of_text = basis(whole.text)
        self.held = whole._replace(
            image=whole.image @ self.of_image,
            text=whole.text @ self.of_text,
            before=whole.before @ self.of_image,
        )

    def _streamed(self) -> Iterator[Block]:
        """All rows, block by block."""
        attention = self.attention
        is_whole = self.held is None and self.n <= SCORING_BATCH
        size = SCORING_BATCH if is_whole else STREAMED_ROWS
        of_text: tuple[Tensor, Tensor] | None = None
        for batch in self.rows.batches(size):
            moved = batch.to(self.device)
            with torch.no_grad():
                image = attention.queries(moved) * self.scale
                # classes are the same in every batch, captions are not
                if of_text is None or not len(attention.classes):
                    text = math.sqrt(attention.sharing) * attention.text(moved.text)
                    of_text = text, attention.begin_keys(moved) / self.scale
                offset = attention.given_offset(moved)
            yield Block(moved, image, *of_text, offset)

    def solve(
        self, weight: Tensor | None = None, near: SupervisedAttention | None = None
    ) -> Solution:
        """The solution of largest posterior.

        ``weight`` (N,) is how often each of the held rows counts. Streamed rows begin where an
        attention that is fitted to most of them ended (``near``).
        """
        shared, own = self._first_guess(near)
        optimizer = torch.optim.LBFGS(
            [shared, own] if len(own) else [shared],
            max_iter=STEPS,
            history_size=10,
            tolerance_grad=1e-7,
            tolerance_change=STREAMED_CHANGE if self.held is None else CHANGE,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            return self._slope(shared, own, weight)

        optimizer.step(objective)
        return Solution(shared, own)

    def _first_guess(self, near: SupervisedAttention | None) -> Solution:
        """Zeros, which are the start, or of streamed rows the solution of ``near``."""
        if near is not None and self.held is None:
            shared = near.shared.detach() / self.scale[:, None]
            own = (near.own.detach() - self.attention.own.detach()) / self.scale
            return Solution(shared, own)
        block = self.held or next(self._streamed())
        n_image = block.image.shape[1]
        shared = torch.zeros(n_image, block.text.shape[1], device=self.device, dtype=torch.float32)
        own = torch.zeros(len(self.attention.own), n_image, device=self.device, dtype=torch.float32)
        return Solution(shared, own)

    @torch.no_grad()
    def _slope(self, shared: Tensor, own: Tensor, weight: Tensor | None) -> Tensor:
        """The mean loss of a row with its share of the penalty.

        The gradient is left with ``shared`` and ``own``. It is derived by hand: autograd would keep
        the (B, K) logits of every block.
        """
        penalty = torch.stack([shared.square().sum(), own.square().sum()]).sum()
        total = penalty / (2 * self.n)
        gradient = Solution(shared / self.n, own / self.n)
        current: Keys | None = None
        for block in self._blocks():
            if current is None or block.text is not current.text:
                self._pass_on(current, gradient)
                keys = block.before + self.keys(block, shared, own)
                current = Keys(block.text, keys, torch.zeros_like(keys))
            row_weight = self._row_weight(block, weight)
            logits = plus(block.image @ current.keys.T, block.offset)
            total += (block.losses(logits) * row_weight).sum()
            weighted_slopes = block.slopes(logits) * row_weight[:, None]
            current.slope.addmm_(weighted_slopes.T, block.image)
        self._pass_on(current, gradient)
        shared.grad = gradient.shared
        own.grad = gradient.own
        return total

    def _blocks(self) -> Iterable[Block]:
        """The rows, held or streamed."""
        if self.held is None:
            return self._streamed()
        return (self.held,)

    def _row_weight(self, block: Block, weight: Tensor | None) -> Tensor:
        """(B,) share of each row in the mean loss."""
        if weight is None:
            return torch.full_like(block.image[:, 0], 1 / self.n)
        return weight / self.n

    def _pass_on(self, current: Keys | None, gradient: Solution) -> None:
        """Add the slope in the keys to the gradient, by the chain rule for ``keys``."""
        # for classes once in all, since all blocks have the same keys; for captions in every pool
        if current is None:
            return
        gradient.shared.add_(current.slope.T @ current.text)
        if len(gradient.own):
            gradient.own.add_(self.own_scale * self.has_labels * current.slope)

    def keys(self, block: Block, shared: Tensor, own: Tensor) -> Tensor:
        """(K, P) the learned part of the keys, which is added to those before."""
        keys = block.text @ shared.T
        if len(own):
            keys = keys + self.own_scale * self.has_labels * own
        return keys

    def full(self, solution: Solution) -> Solution:
        """The solution in the attention's own coordinates: (D + F + 1, D) and (K, D + F + 1)."""
        shared, own = solution
        if self.held is not None:
            shared = self.of_image @ shared @ self.of_text.T
            own = own @ self.of_image.T
        return Solution(self.scale[:, None] * shared, self.scale * own)


def basis(rows: Tensor) -> Tensor:
    """(P, R) orthonormal basis of a space that holds the rows (N, P), R = min(N, P)."""
    if len(rows) >= rows.shape[1]:
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    orthonormal: Tensor = torch.linalg.qr(rows.cpu().double().T).Q
    return orthonormal.to(rows)


FOLDS = 5
"""Parts of the rows; one at a time is held out."""

HELD_OUT = 200
"""Parts are held out until so many rows have been, each once."""

SHARE_SD = 0.2
"""Prior standard deviation of the share, around one."""


def held_out_share(problem: Problem) -> float:
    """The share of the learned part that holds for rows that it was not learned from.

    It is the most probable w in [0, 1], where labels of those rows are drawn from softmax(offset +
    w R), R learned without them, and w ~ N(1, 0.2^2).
    """
    from scipy.optimize import minimize_scalar

    if problem.n == 1:
        return 1.0
    block = cast("Block", problem.held)
    before = plus(block.image @ block.before.T, block.offset)
    fold = _folds(problem, block)
    n_folds = min(math.ceil(FOLDS * HELD_OUT / problem.n), FOLDS, problem.n)
    learned = torch.zeros_like(before)
    for k in range(n_folds):
        solution = problem.solve((fold != k).to(before))
        logits = block.image @ problem.keys(block, *solution).T
        learned = torch.where((fold == k)[:, None], logits, learned)
    was_held_out = fold < n_folds

    def objective(share: float) -> float:
        losses = block.losses(before + share * learned)
        penalty = (share - 1) ** 2 / (2 * SHARE_SD**2)
        return penalty + float(losses[was_held_out].double().sum())

    return float(minimize_scalar(objective, bounds=(0, 1), method="bounded").x)


def _folds(problem: Problem, block: Block) -> Tensor:
    """(N,) number of the fold of every row; rows of one picture are in the same one."""
    first, picture = problem.rows.pictures()
    first = first.to(problem.device)
    picture = picture.to(problem.device)
    # neighbours in the order of classes get different folds: so classes lose as few rows as they
    # can when one fold is held out
    by_class = block.batch.target[first].argsort(stable=True)
    fold_of_picture = torch.empty_like(first)
    fold_of_picture[by_class] = torch.arange(len(first), device=problem.device) % FOLDS
    return fold_of_picture[picture]


def class_log_prior(target: Tensor, n_classes: int) -> Tensor:
    """(K,) log of how often a class occurs, relative to classes with labels.

    It is 0 for these, and below it for those without labels.

    Of n labels, f of which are the only one of their class, Good and Turing estimate the share of
    images of classes without labels by s = f / n (here at least 1 / n). That share is spread over
    the K - m classes without labels, and the rest over the m others. So a class without labels is
    s m / ((1 - s) (K - m)) times as frequent, which counts where it is below one. Where all m
    classes have one label, they were drawn so, and s = 0.1.

    Source: Good, Biometrika 1953.
    """
    if not n_classes:
        return torch.zeros(0, dtype=torch.float32)
    count = torch.bincount(target, minlength=n_classes)
    n = len(target)
    m = int((count > 0).sum())
    if n == m:
        share = MISSED
    else:
        n_single = max(int((count == 1).sum()), 1)
        share = n_single / n
    prior = torch.zeros(n_classes, dtype=torch.float32)
    if 0 < m < n_classes:
        ratio = share * m / ((1 - share) * (n_classes - m))
        prior[count == 0] = min(math.log(ratio), 0.0)
    return prior


def zero_shot_variance(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Mean variance of a row's tempered zero-shot logits, over a ``sample`` of the rows."""
    total = 0.0
    n = 0
    for batch in sample(rows).batches(SCORING_BATCH):
        offset = attention.offset(batch.to(device))
        total += float(offset.var(dim=1, correction=0).double().sum())
        n += len(batch.index)
    return max(total / n, TINY)


def sample(rows: Rows) -> Rows:
    """At most ``SOME_ROWS`` of the rows, evenly spaced, or all where they make pools."""
    if rows.source.pool_size is not None:
        return rows
    step = math.ceil(len(rows.index) / SOME_ROWS)
    return replace(rows, index=rows.index[::step])


def _take_texts(attention: SupervisedAttention, rows: Rows) -> None:
    """Take the classes, and mean and norm of the candidates."""
    texts = Moments()
    for batch in rows.batches(SCORING_BATCH):
        texts.add(batch.text)
        if len(attention.classes):
            attention.classes.copy_(batch.text)
            break  # shared candidates are the same in every batch
    attention.text.fit(texts)


def fit_temperature(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Temperature a > 0 of largest posterior: labels are drawn from softmax(a l).

    The prior is log a ~ N(0, 0.5^2), so few labels leave it near one. Of many rows a ``sample``
    stands for all.
    """
    from scipy.optimize import minimize_scalar

    few = sample(rows)

    def objective(log_a: float) -> float:
        loss = 0.0
        for batch in few.batches(SCORING_BATCH):
            moved = batch.to(device)
            with torch.no_grad():
                logits = math.exp(log_a) * attention.begin(moved)
                loss -= float(moved.log_probability(logits, moved.target).sum())
        penalty = log_a**2 / (2 * TEMPERATURE_SD**2)
        return penalty + loss * len(rows.index) / len(few.index)

    return math.exp(float(minimize_scalar(objective, bounds=(-3, 3), method="bounded").x))
