"""Attention from images to texts, fitted to labels by solving a convex problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import MAX_BATCH_LOGITS, nearest_rows
from vilu.embeddings.source import SAME_TEXT_COSINE, Batch, LogitBatch
from vilu.errors import DataError

LOG_TEMPERATURE_SD = 0.5
"""Standard deviation of the normal prior on log a, where a is the zero-shot temperature.

The prior mean is 0.
"""

BIAS_SHARE = 0.02
"""Prior variance of a class's bias, relative to the prior variance of the class weights.

The share is small, because training sets often have equally many labels for every class. Such
labels say nothing about how frequent a class is.
"""

SHRINKAGE_ROWS = 8
"""With n labels, the solution is multiplied by n / (n + 8).

The factor is below 1, because a few images may have a property in common by chance.
"""

DEFAULT_MISSED_SHARE = 0.1
"""If no class has two labels, this share of images is assumed to show classes without labels."""

MAX_LBFGS_STEPS = 150
"""Maximum number of L-BFGS steps."""

STREAMED_ROWS = 1_024
"""Rows in a streamed block, so few that the block's logits stay in the cache."""

MAX_SAMPLE_ROWS = 4_096
"""Maximum number of ``sample_rows``, from which statistics over all rows are estimated."""

MIN_LOSS_CHANGE = 1e-9
"""The solver stops when a step changes the mean loss by less than this limit."""

MIN_STREAMED_LOSS_CHANGE = 3e-5
"""For streamed rows the solver stops already at this limit, in place of ``MIN_LOSS_CHANGE``.

Fifty further steps would not increase the AUROC.
"""

FEATURES = "features"
"""Name of the column with image features."""

MIN_VARIANCE = 1e-6
"""Smallest variance above the rounding error."""

MAX_LOGIT_VARIANCE = 1e18
"""Largest variance of a row's logits. With more, float32 rounding changes the learned logits."""


class Moments:
    """The row count, the sum (D,) of the rows, and the sum of their squared norms."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.row_sum = torch.zeros((), dtype=torch.float64)
        self.square_sum = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add a block (N, D) of rows."""
        rows = rows.cpu().double()
        self.n_rows += len(rows)
        self.row_sum = self.row_sum + rows.sum(dim=0)
        self.square_sum = self.square_sum + rows.square().sum()


class Standardisation(nn.Module):
    """Standardises rows: centre the rows, and divide by the root mean square norm.

    Because of the division, training does not depend on the scale of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        zero_mean = torch.zeros(dim, dtype=torch.float32)
        unit_norm = torch.ones((), dtype=torch.float32)
        self.mean = nn.Buffer(zero_mean)
        self.norm = nn.Buffer(unit_norm)

    def fit(self, moments: Moments) -> None:
        """Set mean and norm from the moments of the training rows."""
        mean = moments.row_sum / moments.n_rows
        # E |x - mean|^2 = E |x|^2 - |mean|^2. In float64 this difference has enough digits.
        mean_square = moments.square_sum / moments.n_rows
        square_of_mean = mean.square().sum()
        variance = (mean_square - square_of_mean).clamp_min(0)
        norm = torch.ones((), dtype=torch.float32)  # the norm if all rows are equal
        if variance > MIN_VARIANCE:
            norm = variance.sqrt()
        self.mean.copy_(mean)
        self.norm.copy_(norm)

    def forward(self, rows: Tensor) -> Tensor:
        """Standardise rows (N, D)."""
        return (rows - self.mean) / self.norm


class ImageInputs(nn.Module):
    """Computes an image's inputs for the experts: D from the embedding, and F from the features.

    Both parts are standardised. F is 0 if the images have no features. Otherwise both parts have
    the same mean square norm.
    """

    def __init__(self, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.width = dim + feature_dim
        self.has_features = feature_dim > 0
        self.image = Standardisation(dim)
        self.features = Standardisation(feature_dim)

    def fit(self, rows: Rows) -> None:
        """Fit the standardisation in one pass over the rows."""
        image_moments = Moments()
        feature_moments = Moments()
        for batch in rows.batches(SCORING_BATCH):
            image_moments.add(batch.image)
            if self.has_features:
                feature_moments.add(batch.columns[FEATURES])
            else:
                no_features = batch.image[:, :0]
                feature_moments.add(no_features)
        self.image.fit(image_moments)
        self.features.fit(feature_moments)

    def forward(self, batch: Batch) -> Tensor:
        """Compute a batch's inputs (B, D + F). Over training rows, the mean square norm is 1."""
        image: Tensor = self.image(batch.image)
        if not self.has_features:
            return image
        features: Tensor = self.features(batch.columns[FEATURES])
        # Each part has the mean square norm 1. Side by side they have 2, so sqrt(2) is the divisor.
        return torch.cat([image, features], dim=1) / math.sqrt(2)

    @property
    def image_gain(self) -> float:
        """Factor by which the first D inputs are multiplied to give the standardised embedding."""
        if self.has_features:
            return math.sqrt(2)
        return 1


class ClassMatch(NamedTuple):
    """Comparison between K candidates and the training classes.

    ``class_similarity`` is 1 for a training class. For any other candidate, the cosines between its
    standardised text and the standardised texts of all classes are computed. ``class_similarity``
    is the square of the largest cosine, or 0 if this cosine is negative. The square is the share of
    variance that both texts have in common.
    """

    nearest_class: Tensor  # (K,) int64 index of the training class with the most similar text
    is_class: Tensor  # (K,) bool: whether the candidate is the nearest class
    class_similarity: Tensor  # (K,) from 0 to 1: similarity to the training classes


class StartLogits(NamedTuple):
    """Logits for K classes, estimated from images without labels.

    For class c and a unit-norm image z with the zero-shot logit l_c, the logit is

        l_c + (z - centre) . weight_c + bias_c
    """

    centre: Tensor  # (D,) float64
    weight: Tensor  # (K, D) float64
    bias: Tensor  # (K,) float64
    log_occurrence: Tensor  # (K,) log-probability that the class occurs at all, at most 0


class SupervisedAttention(nn.Module):
    """Logits for K candidates: tempered zero-shot logits, plus a bilinear form in image and text.

    x are the image's ``ImageInputs``. Candidate j has the zero-shot logit l0_j and the standardised
    text t_j. The attention learns a temperature a, a matrix A (``shared``) for all classes, and a
    vector v_j for each training class (a row in ``own``). With rho = ``sharing``, the logit of
    candidate j is

        l_j = a l0_j + (x, 1) . (sqrt(rho) A t_j + sqrt(1 - rho) v_j)

    For a candidate outside the training classes, v_j is zero. So any candidate can be scored.

    For candidates outside the training classes, ``ClassMatch.class_similarity`` reduces the effect
    of A and of the temperature. If a candidate's text is unlike the texts of all classes, the
    logit is nearly the zero-shot logit.

    If the rows have logits instead of texts (``LogitBatch``), t_j is zero, so A has no effect.

    Training begins at the tempered zero-shot logits (A = v = 0), or at the posterior estimated from
    images without labels (``start_from``).

    The logits are products of two vectors: the query (x, 1) of an image, and the key of a
    candidate. A ``LogitBatch`` has no texts to make keys from, so its tempered logits are added
    to the product (``tempered_given_logits``).

    Args:
        inputs: Fitted ``ImageInputs``.
        dim: Embedding width D of the texts.
        n_classes: Number of training classes, 0 for captions.
        sharing: rho, the share of the prior variance that comes from A.
    """

    def __init__(self, inputs: ImageInputs, dim: int, n_classes: int, sharing: float) -> None:
        super().__init__()
        self.sharing = sharing
        self.temperature = nn.Buffer(torch.ones((), dtype=torch.float32))
        self.inputs = inputs
        self.text = Standardisation(dim)
        class_texts = torch.zeros(n_classes, dim, dtype=torch.float32)
        shared_weights = torch.zeros(inputs.width + 1, dim, dtype=torch.float32)
        class_weights = torch.zeros(n_classes, inputs.width + 1, dtype=torch.float32)
        self.classes = nn.Buffer(class_texts)
        self.shared = nn.Parameter(shared_weights)
        self.own = nn.Parameter(class_weights)

    def start_from(self, start: StartLogits) -> None:
        """Set ``own``, the classes' v, so that the logits equal the logits of ``start``."""
        # If x are the first D inputs, the image is z = image.mean + image.norm * image_gain * x.
        # So (z - centre) . weight + bias is a product of (x, 1) with a vector for each class. The
        # last entry of the vector is bias + (image.mean - centre) . weight.
        image = self.inputs.image
        dim = self.text.mean.shape[0]
        class_weights = torch.zeros(self.own.shape, dtype=torch.float64)
        class_weights[:, :dim] = start.weight * float(image.norm) * self.inputs.image_gain
        class_weights[:, -1] = start.bias + (image.mean.double() - start.centre) @ start.weight.T
        class_weight_factor = math.sqrt(1 - self.sharing)
        self.own.data.copy_(class_weights / class_weight_factor)

    def initial_logits(self, batch: Batch) -> Tensor:
        """Compute the logits (B, K) at the start of training, before learning from labels."""
        logits = self.queries(batch) @ self.initial_keys(batch).T
        given_logits = self.tempered_given_logits(batch)
        return add_given_logits(logits, given_logits)

    def initial_keys(self, batch: Batch) -> Tensor:
        """Compute the keys (K, D + F + 1) for the ``initial_logits``."""
        keys = self.tempered_logit_keys(batch)
        if len(self.own):
            keys = keys + math.sqrt(1 - self.sharing) * self.own
        return keys

    def tempered_given_logits(self, batch: Batch) -> Tensor | None:
        """Return ``tempered_logits`` (B, K) for a ``LogitBatch``, and None for other batches."""
        if isinstance(batch, LogitBatch):
            return self.tempered_logits(batch)
        return None

    def tempered_logit_keys(self, batch: Batch) -> Tensor:
        """Compute the keys (K, D + F + 1) for the ``tempered_logits``.

        All candidates must be training classes. For a ``LogitBatch`` the keys are zero.
        """
        # A zero-shot logit is linear in the image z = image.mean + image.norm * image_gain * x.
        # So the zero-shot logit, too, is a product of the query (x, 1) with a key.
        image = self.inputs.image
        dim = batch.text.shape[1]
        scaled_text = self.temperature * batch.logit_scale * batch.text
        keys = torch.zeros(
            len(batch.text), self.inputs.width + 1, device=scaled_text.device, dtype=torch.float32
        )
        keys[:, :dim] = image.norm * self.inputs.image_gain * scaled_text
        keys[:, -1] = scaled_text @ image.mean
        return keys

    def queries(self, batch: Batch) -> Tensor:
        """Compute the vectors (x, 1) (B, D + F + 1): the ``ImageInputs``, and the number 1."""
        inputs = self.inputs(batch)
        return functional.pad(inputs, (0, 1), value=1.0)

    def tempered_logits(self, batch: Batch, class_match: ClassMatch | None = None) -> Tensor:
        """Compute the tempered zero-shot logits (B, K), without the logit bias.

        The less the candidates resemble the training classes, the nearer the temperature is to 1.
        ``class_match`` is the result of ``match_classes`` for the candidates. None means that the
        candidates are the training classes.
        """
        temperature: Tensor = self.temperature
        if class_match is not None:
            # All candidates have the same temperature, because their logits are compared.
            temperature = temperature ** class_match.class_similarity.mean()
        return temperature * (batch.logits - batch.logit_bias)

    def match_classes(self, text: Tensor) -> ClassMatch:
        """Compare candidates (K, D) with the training classes.

        If the attention was fitted to captions, there are no classes, and ``class_similarity`` is
        1.
        """
        if not len(self.classes):
            no_class = torch.zeros(len(text), dtype=torch.long, device=text.device)
            no_match = torch.zeros_like(no_class, dtype=torch.bool)
            full_similarity = torch.ones_like(text[:, 0])
            return ClassMatch(
                nearest_class=no_class, is_class=no_match, class_similarity=full_similarity
            )
        cosine, nearest_class = nearest_rows(text, self.classes)
        is_class = cosine >= SAME_TEXT_COSINE
        candidates = self._text_directions(text)
        classes = self._text_directions(self.classes)
        nearest_cosine, _ = nearest_rows(candidates, classes)
        positive_cosine = nearest_cosine.clamp(0, 1)
        common_variance = positive_cosine.square()
        class_similarity = torch.where(is_class, 1.0, common_variance)
        return ClassMatch(nearest_class, is_class, class_similarity)

    def _text_directions(self, text: Tensor) -> Tensor:
        """Standardise texts (K, D), and divide every text by its norm."""
        standardised_text = self.text(text)
        return functional.normalize(standardised_text, dim=1)

    def forward(self, batch: Batch, class_match: ClassMatch | None = None) -> Tensor:
        """Compute the logits (B, K).

        ``class_match`` is the result of ``match_classes`` for the candidates. None means that the
        candidates are the training classes, in the original order.
        """
        learned_keys = self.learned_keys(batch.text, class_match)
        learned_logits: Tensor = self.queries(batch) @ learned_keys.T
        return self.tempered_logits(batch, class_match) + learned_logits

    def learned_keys(self, text: Tensor, class_match: ClassMatch | None) -> Tensor:
        """Compute the keys (K, D + F + 1) for what is added to the ``tempered_logits``."""
        keys: Tensor = math.sqrt(self.sharing) * (self.text(text) @ self.shared.T)
        if class_match is not None:
            similarity_column = class_match.class_similarity[:, None]
            keys = keys * similarity_column
        if len(self.own):
            class_weights: Tensor = self.own
            if class_match is not None:
                is_class_column = class_match.is_class[:, None]
                class_weights = class_weights[class_match.nearest_class] * is_class_column
            keys = keys + math.sqrt(1 - self.sharing) * class_weights
        return keys


def add_given_logits(logits: Tensor, given_logits: Tensor | None) -> Tensor:
    """Return the logits (B, K), plus the ``tempered_given_logits`` (B, K) if these are not None."""
    if given_logits is None:
        return logits
    return logits + given_logits


def fit_attention(  # noqa: PLR0913 - training rows, prior and start need many arguments
    inputs: ImageInputs,
    rows: Rows,
    n_classes: int,
    variance: float,
    sharing: float,
    device: torch.device,
    *,
    start: StartLogits | None = None,
    has_few_rows: bool = False,
    warm_start: SupervisedAttention | None = None,
) -> SupervisedAttention:
    """Fit an attention to n labelled rows: the posterior mode, shrunk towards the start.

    1. The start is the zero-shot logits, or the logits of ``start``, times a fitted temperature.
       The class's ``class_log_prior`` is added. With a ``start``, a class without labels has also
       ``start.log_occurrence``, and the lower one of the two is added.
    2. A learned part is added to the start. Its weights on x have the normal prior N(0, C) with
       C = ``variance`` * ``zero_shot_variance``. Its biases have the prior N(0, C / 50). Finding
       the posterior mode is a convex problem.
    3. The solution is multiplied by n / (n + 8). If ``has_few_rows``, it is also multiplied by the
       result of ``held_out_shrinkage``.

    Args:
        inputs: Fitted ``ImageInputs``.
        rows: The labelled rows.
        n_classes: Number of training classes, 0 for captions.
        variance: Prior variance, relative to the variance of the zero-shot logits.
        sharing: The share rho of the prior variance that the classes have in common.
        device: Device on which the problem is solved.
        start: Logits estimated from images without labels.
        has_few_rows: Whether the rows are so few that ``held_out_shrinkage`` is used.
        warm_start: An attention fitted to most of the rows. For streamed rows, the search begins at
            this attention's solution, to save steps.
    """
    attention = SupervisedAttention(inputs, rows.source.space.embed_dim, n_classes, sharing)
    _fit_texts(attention, rows)
    target = rows.source.target[rows.index]
    log_prior = class_log_prior(target, n_classes)
    if start is not None:
        attention.start_from(start)
        log_prior = _limited_log_prior(log_prior, target, start.log_occurrence)
    attention.to(device)
    _set_start(attention, rows, log_prior, device)
    prior_variance = variance * zero_shot_variance(attention, rows, device)
    problem = Problem(attention, rows, prior_variance)
    held_out_factor = 1.0
    if has_few_rows and problem.whole_block is not None:
        held_out_factor = held_out_shrinkage(problem)
    n_rows = len(rows.index)
    shrinkage = held_out_factor * n_rows / (n_rows + SHRINKAGE_ROWS)
    solution_in_bases = problem.solve(warm_start=warm_start)
    solution = problem.in_attention_coordinates(solution_in_bases)
    attention.shared.data.add_(shrinkage * solution.shared_weights)
    attention.own.data.add_(shrinkage * solution.class_weights)
    attention.eval()
    return attention.requires_grad_(requires_grad=False)


def _limited_log_prior(log_prior: Tensor, target: Tensor, log_occurrence: Tensor) -> Tensor:
    """Return the log prior (K,) of each class, which is 0 for a class with labels.

    For a class without labels, this is the smaller entry of ``log_prior`` and ``log_occurrence``.
    """
    has_labels = torch.bincount(target, minlength=len(log_prior)) > 0
    lower_log_prior = torch.minimum(log_prior, log_occurrence.float())
    return torch.where(has_labels, 0.0, lower_log_prior)


def _set_start(
    attention: SupervisedAttention, rows: Rows, log_prior: Tensor, device: torch.device
) -> None:
    """Multiply the start by the fitted temperature, and add the log prior (K,)."""
    temperature = fit_temperature(attention, rows, device)
    attention.temperature.mul_(temperature)
    attention.own.data.mul_(temperature)
    # The last column of ``own`` is the bias, because the last entry of a query (x, 1) is 1. This
    # is a view, so ``own`` changes with it.
    bias = attention.own.data[:, -1]
    # the logits contain sqrt(1 - rho) times ``own``, so the log prior is divided by this factor
    class_weight_factor = math.sqrt(1 - attention.sharing)
    bias.add_(log_prior.to(device) / class_weight_factor)


class Block(NamedTuple):
    """Some labelled rows in the coordinates of a ``Problem``.

    A (P, Q) and V (K, P), with a row for each class, are the unknowns. The logits are

        queries @ (initial_keys + text @ A^T + sqrt(1 - rho) V)^T

    plus the ``given_logits`` if these are not None.

    Attributes:
        batch: The rows.
        queries: (B, P) attention queries, times the prior standard deviations of the weights. So
            every element in A and V has the prior N(0, 1).
        text: (K, Q) sqrt(rho) times the standardised texts.
        initial_keys: (K, P) keys for the logits at the start of training.
        given_logits: (B, K) the batch's ``tempered_given_logits``, or None.
    """

    batch: Batch
    queries: Tensor
    text: Tensor
    initial_keys: Tensor
    given_logits: Tensor | None

    def losses(self, logits: Tensor) -> Tensor:
        """Compute each row's cross-entropy (B,)."""
        return -self.batch.log_likelihood(logits)

    def slopes(self, logits: Tensor) -> Tensor:
        """Compute the derivatives (B, K) of ``losses``. The function overwrites ``logits``.

        A derivative is the softmax over all candidates, minus the softmax over the right
        candidates.
        """
        target_column = self.batch.target[:, None]
        if self.batch.matches is None:  # there is one right candidate, and the softmax over it is 1
            minus_one = torch.full_like(logits[:, :1], -1)
            posterior = torch.softmax(logits, dim=1, out=logits)
            return posterior.scatter_add_(1, target_column, minus_one)
        # Several captions may be right. The loss is -log of the right captions' summed
        # probabilities.
        posterior = logits.softmax(dim=1)
        is_wrong = ~self.batch.right
        logits.masked_fill_(is_wrong, -torch.inf)
        posterior_of_right = logits.softmax(dim=1)
        return posterior.sub_(posterior_of_right)


class Solution(NamedTuple):
    """An attention's learned part, in the coordinates of a ``Problem``."""

    shared_weights: Tensor  # (P, Q) A, the part shared by all classes
    class_weights: Tensor  # (K, P) V, a row for each class


class TextKeys(NamedTuple):
    """The keys for successive blocks with the same texts, and the loss gradient for these keys."""

    text: Tensor  # (K, Q) texts in the blocks
    keys: Tensor  # (K, P)
    gradient_of_keys: Tensor  # (K, P) derivatives of the loss by the keys, summed over the blocks


class Problem:
    """The convex problem of ``fit_attention``: mean loss plus penalty, as a function of A and V.

    The rows are either held in memory as a single block, or streamed in blocks at every evaluation.

    For a class without labels only A is learned. A separate v_j would only decrease the class's
    logits further, although ``class_log_prior`` has already decreased these logits.

    For rows in memory, queries and texts are expressed in orthonormal bases of the spaces that they
    span. These spaces contain the optimum. So with fewer rows than coordinates, the problem has
    fewer unknowns, but the same optimum.

    Attributes:
        whole_block: All rows as a single block, in the bases. If the rows are streamed, None.
    """

    def __init__(self, attention: SupervisedAttention, rows: Rows, variance: float) -> None:
        self.attention = attention
        self.rows = rows
        self.device = attention.shared.device
        self.n_rows = len(rows.index)
        # The prior standard deviation of each input's weight. The inputs are multiplied by this
        # scale, so that A and V have the prior N(0, 1). The last input is the constant 1. Its
        # weight is the bias, with a smaller variance.
        prior_sd = math.sqrt(variance)
        input_scale = torch.full(
            (attention.inputs.width + 1,), prior_sd, device=self.device, dtype=torch.float32
        )
        input_scale[-1] *= math.sqrt(BIAS_SHARE)
        self.input_scale = input_scale
        self.class_weight_factor = math.sqrt(1 - attention.sharing)  # factor of V in the keys
        self.labelled_class_mask = input_scale.new_zeros(len(attention.own), 1)
        if len(attention.own):  # captions have no classes
            labelled_classes = rows.source.target[rows.index].unique()
            self.labelled_class_mask[labelled_classes] = 1.0
        self.whole_block: Block | None = None
        n_classes = len(attention.classes)
        if n_classes:
            max_rows_in_memory = min(SCORING_BATCH, MAX_BATCH_LOGITS // n_classes)
            if self.n_rows <= max_rows_in_memory:
                self._load_whole_block()

    def _load_whole_block(self) -> None:
        """Set ``whole_block`` to all rows, with queries and texts in orthonormal bases."""
        (block,) = self._streamed_blocks()
        self.query_basis = orthonormal_basis(block.queries)
        self.text_basis = orthonormal_basis(block.text)
        self.whole_block = block._replace(
            queries=block.queries @ self.query_basis,
            text=block.text @ self.text_basis,
            initial_keys=block.initial_keys @ self.query_basis,
        )

    def _streamed_blocks(self) -> Iterator[Block]:
        """Yield all rows, block by block."""
        attention = self.attention
        # few rows come as a single block, as ``_load_whole_block`` expects
        is_one_block = self.whole_block is None and self.n_rows <= SCORING_BATCH
        block_rows = STREAMED_ROWS
        if is_one_block:
            block_rows = SCORING_BATCH
        has_classes = len(attention.classes) > 0
        text: Tensor | None = None
        initial_keys: Tensor | None = None
        for batch in self.rows.batches(block_rows):
            device_batch = batch.to(self.device)
            with torch.no_grad():
                queries = attention.queries(device_batch) * self.input_scale
                # Class texts are the same in every batch, so they are computed only once. Captions
                # differ from batch to batch.
                if text is None or initial_keys is None or not has_classes:
                    text = math.sqrt(attention.sharing) * attention.text(device_batch.text)
                    initial_keys = attention.initial_keys(device_batch) / self.input_scale
                given_logits = attention.tempered_given_logits(device_batch)
            yield Block(device_batch, queries, text, initial_keys, given_logits)

    def solve(
        self, row_weight: Tensor | None = None, warm_start: SupervisedAttention | None = None
    ) -> Solution:
        """Minimise the objective by L-BFGS.

        Args:
            row_weight: (N,) how often each row counts, only for rows in memory. None means that
                every row counts once.
            warm_start: An attention fitted to most of the rows. If the rows are streamed, the
                search begins at this attention's weights. For rows in memory ``warm_start``
                has no effect.
        """
        shared_weights, class_weights = self._first_guess(warm_start)
        unknowns = [shared_weights]
        if len(class_weights):
            unknowns.append(class_weights)
        optimizer = torch.optim.LBFGS(
            unknowns,
            max_iter=MAX_LBFGS_STEPS,
            history_size=10,
            tolerance_grad=1e-7,
            tolerance_change=self._min_loss_change(),
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            return self._objective_with_gradient(shared_weights, class_weights, row_weight)

        optimizer.step(objective)
        return Solution(shared_weights, class_weights)

    def _min_loss_change(self) -> float:
        """Return the limit for changes in the mean loss. A smaller change ends the search."""
        if self.whole_block is None:
            return MIN_STREAMED_LOSS_CHANGE
        return MIN_LOSS_CHANGE

    def _first_guess(self, warm_start: SupervisedAttention | None) -> Solution:
        """Return the A and V where the search starts.

        For streamed rows with a ``warm_start``, they are its learned part. Otherwise they are zero.
        """
        if warm_start is not None and self.whole_block is None:
            scale_column = self.input_scale[:, None]
            shared_weights = warm_start.shared.detach() / scale_column
            # ``own`` is the start plus the learned part, and the search needs the learned part
            learned_own = warm_start.own.detach() - self.attention.own.detach()
            return Solution(shared_weights, learned_own / self.input_scale)
        # any block shows the sizes of A and V
        block = self.whole_block or next(self._streamed_blocks())
        query_width = block.queries.shape[1]
        shared_weights = torch.zeros(
            query_width, block.text.shape[1], device=self.device, dtype=torch.float32
        )
        class_weights = torch.zeros(
            len(self.attention.own), query_width, device=self.device, dtype=torch.float32
        )
        return Solution(shared_weights, class_weights)

    @torch.no_grad()
    def _objective_with_gradient(
        self, shared_weights: Tensor, class_weights: Tensor, row_weight: Tensor | None
    ) -> Tensor:
        """Compute the negative log-posterior divided by n, and set the gradients of both weights.

        The gradient is computed by formulas, because autograd would keep every block's logits
        (B, K) in memory.
        """
        square_sums = [shared_weights.square().sum(), class_weights.square().sum()]
        penalty = torch.stack(square_sums).sum()
        total = penalty / (2 * self.n_rows)
        gradient = Solution(shared_weights / self.n_rows, class_weights / self.n_rows)
        text_keys: TextKeys | None = None
        for block in self._blocks():
            if text_keys is None or block.text is not text_keys.text:
                self._add_gradient(text_keys, gradient)  # is complete for the texts before
                keys = block.initial_keys + self.keys(block, shared_weights, class_weights)
                gradient_of_keys = torch.zeros_like(keys)
                text_keys = TextKeys(block.text, keys, gradient_of_keys=gradient_of_keys)
            loss_weight = self._loss_weight(block, row_weight)
            weight_column = loss_weight[:, None]
            logits = add_given_logits(block.queries @ text_keys.keys.T, block.given_logits)
            weighted_losses = block.losses(logits) * loss_weight
            total += weighted_losses.sum()
            weighted_slopes = block.slopes(logits) * weight_column
            text_keys.gradient_of_keys.addmm_(weighted_slopes.T, block.queries)
        self._add_gradient(text_keys, gradient)
        shared_weights.grad = gradient.shared_weights
        class_weights.grad = gradient.class_weights
        return total

    def _blocks(self) -> Iterable[Block]:
        """Return the rows: the single block in memory, or the streamed blocks."""
        if self.whole_block is None:
            return self._streamed_blocks()
        return (self.whole_block,)

    def _loss_weight(self, block: Block, row_weight: Tensor | None) -> Tensor:
        """Compute each row's weight (B,) in the mean loss."""
        if row_weight is None:
            return torch.full_like(block.queries[:, 0], 1 / self.n_rows)
        return row_weight / self.n_rows

    def _add_gradient(self, text_keys: TextKeys | None, gradient: Solution) -> None:
        """Add what the gradient for the keys gives to the ``gradient`` for A and V.

        The chain rule is applied once if all blocks have the same classes. For captions, it is
        applied once per block.
        """
        if text_keys is None:
            return
        gradient_of_keys = text_keys.gradient_of_keys
        gradient.shared_weights.add_(gradient_of_keys.T @ text_keys.text)
        if len(gradient.class_weights):
            gradient.class_weights.add_(
                self.class_weight_factor * self.labelled_class_mask * gradient_of_keys
            )

    def keys(self, block: Block, shared_weights: Tensor, class_weights: Tensor) -> Tensor:
        """Compute the learned part (K, P) of the keys, to be added to ``block.initial_keys``."""
        keys = block.text @ shared_weights.T
        if len(class_weights):
            keys = keys + self.class_weight_factor * self.labelled_class_mask * class_weights
        return keys

    def in_attention_coordinates(self, solution: Solution) -> Solution:
        """Convert a solution to attention coordinates: (D + F + 1, D) and (K, D + F + 1)."""
        shared_weights, class_weights = solution
        if self.whole_block is not None:
            shared_weights = self.query_basis @ shared_weights @ self.text_basis.T
            class_weights = class_weights @ self.query_basis.T
        scale_column = self.input_scale[:, None]
        return Solution(scale_column * shared_weights, self.input_scale * class_weights)


def orthonormal_basis(rows: Tensor) -> Tensor:
    """Compute an orthonormal basis (P, R) for a space that contains all rows (N, P).

    R is the smaller of N and P.
    """
    n_rows, width = rows.shape
    if n_rows >= width:  # then R = P, and the unit vectors are a basis
        return torch.eye(width, dtype=rows.dtype, device=rows.device)
    spanning_columns = rows.cpu().double().T
    columns: Tensor = torch.linalg.qr(spanning_columns).Q
    return columns.to(rows)


N_FOLDS = 5
"""Into how many folds the rows are divided. One fold after another is held out."""

ENOUGH_HELD_OUT_ROWS = 200
"""As soon as this many rows were held out, no further fold is held out."""

SHRINKAGE_SD = 0.2
"""Standard deviation of the normal prior on ``held_out_shrinkage``. The prior mean is 1."""


def held_out_shrinkage(problem: Problem) -> float:
    """Find the factor w in [0, 1] with which the learned logits predict held-out rows best.

    A held-out row has the logits b at the start of training, and the logits r learned without this
    row. In the model, its label is drawn from softmax(b + w r). The result is the posterior mode
    under the prior w ~ N(1, 0.2^2).
    """
    from scipy.optimize import minimize_scalar

    if problem.n_rows == 1:  # no row would be left to learn from
        return 1.0
    block = cast("Block", problem.whole_block)
    initial_logits = add_given_logits(block.queries @ block.initial_keys.T, block.given_logits)
    fold_of_row = _fold_of_rows(problem, block)
    rows_per_fold = problem.n_rows / N_FOLDS
    n_folds = min(math.ceil(ENOUGH_HELD_OUT_ROWS / rows_per_fold), N_FOLDS, problem.n_rows)
    learned_logits = torch.zeros_like(initial_logits)  # for each row, learned without this row
    for fold in range(n_folds):
        is_fitted = fold_of_row != fold
        solution = problem.solve(row_weight=is_fitted.to(initial_logits))
        keys = problem.keys(block, solution.shared_weights, solution.class_weights)
        logits_of_fold = block.queries @ keys.T
        learned_logits = torch.where(is_fitted[:, None], learned_logits, logits_of_fold)
    was_held_out = fold_of_row < n_folds

    def objective(shrinkage: float) -> float:
        losses = block.losses(initial_logits + shrinkage * learned_logits)
        penalty = (shrinkage - 1) ** 2 / (2 * SHRINKAGE_SD**2)
        return penalty + float(losses[was_held_out].double().sum())

    return float(minimize_scalar(objective, bounds=(0, 1), method="bounded").x)


def _fold_of_rows(problem: Problem, block: Block) -> Tensor:
    """Assign each row to a fold (N,). All rows that show a picture are in the same fold."""
    first_row, picture_of_row = problem.rows.pictures()
    first_row = first_row.to(problem.device)
    picture_of_row = picture_of_row.to(problem.device)
    # The pictures are sorted by class and get the folds 0, 1, 2, 3, 4, 0, 1, ... So a class's rows
    # are spread over the folds, and a class loses few rows when a fold is held out.
    pictures_by_class = block.batch.target[first_row].argsort(stable=True)
    fold_of_picture = torch.empty_like(first_row)
    fold_of_picture[pictures_by_class] = (
        torch.arange(len(first_row), device=problem.device) % N_FOLDS
    )
    return fold_of_picture[picture_of_row]


def class_log_prior(target: Tensor, n_classes: int) -> Tensor:
    """Compute each class's log frequency (K,), relative to a class with labels.

    The logarithm is 0 for a class with labels, and at most 0 for a class without labels.

    There are n labels, in m of the K classes. f of the labels are the only label in their class.
    Let s be the share of all images that show classes without labels. The formula of Good and
    Turing estimates s = f / n. Here s is at least 1 / n. The share s is divided equally among the
    K - m classes without labels, and the share 1 - s among the m classes with labels. So a class
    without labels has the frequency s / (K - m). Relative to a class with labels, this is

        s m / ((1 - s) (K - m))

    A relative frequency above 1 is replaced by 1. If each of the m classes has exactly one label,
    the training set was probably chosen with one image per class. Such labels say nothing about s,
    and s = 0.1 is assumed.

    Source: Good, Biometrika 1953.
    """
    if not n_classes:
        return torch.zeros(0, dtype=torch.float32)
    count = torch.bincount(target, minlength=n_classes)
    n = len(target)
    m = int((count > 0).sum())
    if n == m:  # each of the m classes has exactly one label
        missed_share = DEFAULT_MISSED_SHARE
    else:
        n_single = int((count == 1).sum())
        missed_share = max(n_single, 1) / n
    log_prior = torch.zeros(n_classes, dtype=torch.float32)
    has_both = 0 < m < n_classes  # classes with labels, and classes without labels
    if has_both:
        ratio = missed_share * m / ((1 - missed_share) * (n_classes - m))
        log_prior[count == 0] = min(math.log(ratio), 0.0)
    return log_prior


def zero_shot_variance(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Compute the variance of a row's tempered zero-shot logits, averaged over ``sample_rows``.

    Raises:
        DataError: If the variance is too large for a fit in float32.
    """
    sum_of_variances = 0.0
    n_rows = 0
    sampled_rows = sample_rows(rows)
    for batch in sampled_rows.batches(SCORING_BATCH):
        tempered_logits = attention.tempered_logits(batch.to(device))
        variance_of_row = tempered_logits.var(dim=1, correction=0)
        sum_of_variances += float(variance_of_row.double().sum())
        n_rows += len(batch.index)
    variance = max(sum_of_variances / n_rows, MIN_VARIANCE)
    if variance > MAX_LOGIT_VARIANCE:
        raise DataError(
            f"the logits of a training row have a variance of {variance:.2g} over the candidates "
            f"on average, and at most {MAX_LOGIT_VARIANCE:.0e} can be learned from. If a large "
            "negative logit rules a candidate out, write the row's smallest other logit minus 50 "
            "in its place, or leave the candidate out."
        )
    return variance


def sample_rows(rows: Rows) -> Rows:
    """Return at most ``MAX_SAMPLE_ROWS`` rows, evenly spaced. If rows form pools, return all."""
    if rows.source.pool_size is not None:
        return rows
    step = math.ceil(len(rows.index) / MAX_SAMPLE_ROWS)  # 1 for few rows
    return replace(rows, index=rows.index[::step])


def _fit_texts(attention: SupervisedAttention, rows: Rows) -> None:
    """Copy the class texts into the attention, and fit the standardisation of texts."""
    text_moments = Moments()
    for batch in rows.batches(SCORING_BATCH):
        text_moments.add(batch.text)
        if len(attention.classes):
            attention.classes.copy_(batch.text)
            break  # the classes are the same in every batch
    attention.text.fit(text_moments)


def fit_temperature(attention: SupervisedAttention, rows: Rows, device: torch.device) -> float:
    """Find the temperature a > 0 as a posterior mode.

    In the model, a row's label is drawn from softmax(a l), where l are its logits at the start of
    training. The prior is log a ~ N(0, 0.5^2), so a stays near 1 for few labels. The likelihood
    over all rows is estimated from the ``sample_rows``.
    """
    from scipy.optimize import minimize_scalar

    sampled_rows = sample_rows(rows)

    def objective(log_a: float) -> float:
        loss = 0.0
        for batch in sampled_rows.batches(SCORING_BATCH):
            device_batch = batch.to(device)
            with torch.no_grad():
                logits = math.exp(log_a) * attention.initial_logits(device_batch)
                log_likelihood = device_batch.log_likelihood(logits)
                loss -= float(log_likelihood.sum())
        loss_of_all = loss * len(rows.index) / len(sampled_rows.index)
        penalty = log_a**2 / (2 * LOG_TEMPERATURE_SD**2)
        return penalty + loss_of_all

    # log a from -3 to 3: a from 1/20 to 20
    optimum = minimize_scalar(objective, bounds=(-3, 3), method="bounded")
    return math.exp(float(optimum.x))
