"""The method ``vilu_plus`` (ViLU+): P(failure) from a learned posterior over the candidates."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64, nearest_rows
from vilu.embeddings.source import SAME_TEXT_COSINE, Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.contract.coalitions import Coalitions, PoolCoalitions
from vilu.predictors.contract.held_out import HeldOutAnswers, folds_have_every_class
from vilu.predictors.contract.labelled import (
    class_texts,
    cross_fit_splits,
    failure_log_odds,
    log_odds_with_outside,
)
from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.predictors.nn.attention import (
    FEATURES,
    ClassMatch,
    ImageInputs,
    StartLogits,
    SupervisedAttention,
    fit_attention,
)
from vilu.predictors.nn.experts import Adapter, Experts, Memory, pooled_logits
from vilu.predictors.nn.pooled import PooledLogits
from vilu.predictors.nn.train import (
    AdamWConfig,
    default_batch_size,
    small_network_epochs,
    train_adamw,
)
from vilu.predictors.plus.ood import (
    NEGATIVES,
    Outside,
    OutsideGraph,
    SeesOutside,
    learn_outside,
)
from vilu.predictors.plus.vilu_zero import LearnedClasses, ViLUZero, learn_classes
from vilu.predictors.vilu.head import Count, NonNegative, Positive

POOL_SD = 0.2
"""Prior standard deviation of each expert's weight in the pool.

The prior mean is 1 for the weight of the first expert, the attention. It is 0 for further experts.
"""


def fit_pool_weights(log_p: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Find the most probable weights w (M,) for a pool of M experts, given labelled rows.

    Expert m gives the candidates the probabilities p_m. The pool gives them the probabilities q:

        log q = sum_m w_m log p_m - const

    The weights are at least 0, with the prior N((1, 0, ...), ``POOL_SD``^2). The problem is convex.

    Args:
        log_p: (N, M, K) log probabilities of the K candidates by every expert.
        target: (N,) index of the true candidate.
    """
    from scipy.optimize import minimize

    prior_mean = np.eye(log_p.shape[1])[0]  # (1, 0, ...)

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return _minus_log_posterior(weights, prior_mean, log_p, target)

    # With a negative weight, the pool would do the opposite of what an expert says.
    bounds = [(0, None)] * len(prior_mean)
    result = minimize(objective, prior_mean, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(result.x)


def _minus_log_posterior(
    weights: NDArray[np.float64],
    prior_mean: NDArray[np.float64],
    log_p: NDArray[np.float64],
    target: NDArray[np.int64],
) -> tuple[float, NDArray[np.float64]]:
    """Compute minus the log posterior for the pool weights (M,), and the gradient (M,)."""
    rows = np.arange(len(target))
    pooled_log_p = np.einsum("m,nmk->nk", weights, log_p)
    log_q = pooled_log_p - np.logaddexp.reduce(pooled_log_p, axis=1, keepdims=True)
    # A row with the true candidate t has the loss -log q_t. The derivative of this loss by w_m is
    # the mean of log p_m under q, minus log p_m at t. Both are summed over the rows.
    expected_log_p = np.einsum("nk,nmk->m", np.exp(log_q), log_p)
    observed_log_p = log_p[rows, :, target].sum(axis=0)
    distance = weights - prior_mean
    loss = -log_q[rows, target].sum()
    penalty = (distance**2).sum() / (2 * POOL_SD**2)
    gradient = expected_log_p - observed_log_p + distance / POOL_SD**2
    return float(loss + penalty), gradient


MAX_MEMORY_ROWS = 4_096
"""If there are at most this many training rows, the memory is an expert in the pool.

With more rows the network learns enough without the memory (docs/methods/vilu_plus.md).
"""

MIN_LABELS_PER_CLASS = 10
"""With at least this many labels per class on average, there are experts beside the attention.

With fewer labels, folds lack classes, and the experts overfit.
"""

ENOUGH_HELD_OUT_ROWS = 250
"""This many held-out rows suffice to fit the pool's weights, of which there are at most three.

Experts are fitted on one fold after another, until this many rows were held out.
"""

# Names of saved tensors. ``module`` reads the experts' kinds and sizes from these tensors.
POOL_TENSOR = "pool"
CLASSES_TENSOR = "attention.classes"
FEATURE_MEAN_TENSOR = "attention.inputs.features.mean"
ADAPTER_TENSOR = "companions.adapter.first.weight"
BANK_TENSOR = "companions.memory.bank"

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclasses.dataclass
class ViLUPlus(SeesOutside, FailurePredictor):
    """P(failure) for the zero-shot answer under a pool of experts, learned from class labels.

    Every expert m gives candidate j a probability p_mj. The pool gives candidate j the probability
    q_j, with the weights w_m of the experts:

        log q_j = sum_m w_m log p_mj - const

    The uncertainty is u = 1 - q_t̂, where t̂ is the zero-shot answer. The experts are:

    1. The supervised cross-attention (``SupervisedAttention``): the zero-shot logits at a fitted
       temperature, plus a ridge-regularised bilinear form. The fit is convex.
    2. A small network on the image (``Adapter``).
    3. An attention over the labelled training images (``Memory``), if there are at most 4,096.

    The experts learn from class labels, so no failures are needed. The weights w and the experts
    are fitted on different rows (cross-fitting, or ``validation``). Therefore q is a calibrated
    probability. The prior mean of w gives weight to the attention alone.

    The attention is the only expert in each of these four cases:

    - There are fewer than ten labels per class on average.
    - The data are image-caption pairs.
    - All training rows show one picture.
    - A candidate to be scored is no training class.

    The fewer labels there are, the closer the attention stays to the zero-shot posterior. If there
    are also rows without labels, the attention stays close to the posterior from ``ViLUZero``
    instead.

    A further outcome, "outside", means that the image shows none of the classes
    (``vilu.predictors.plus.ood``). It is learned if there are examples of such images, or everyday
    words (the column "negatives"). Then

        u = 1 - (1 - P(outside)) q_t̂

    If there are both words and rows without labels, the fit also estimates how many images are
    outside, and what these images have in common.

    Args:
        features: Whether to use the column "features" as an input beside the embedding, if the data
            have this column. The column holds the image encoder's output before the projection to
            the embedding, or a second encoder's output. The ``label`` says whether it is used.
        variance: Prior variance for what the attention adds to the logits. The unit is the variance
            of the tempered zero-shot logits.
        sharing: The share of this variance that is common to all classes. Only the common part
            changes the logits for unseen candidates.
        width: The network's hidden width.
        dropout: The network's dropout probability.
        epochs: How many passes over the rows train the network. If None, 20, or more passes for
            few rows, or fewer passes for many rows (``small_network_epochs``).
        batch_size: The network's batch size. If None, a twentieth of the rows, between 64 and 256.
        learning_rate: The network's initial learning rate (AdamW, cosine schedule).
        weight_decay: The network's weight decay.

    Source: this project. The ablation is in docs/methods/vilu_plus.md.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)  # the answer is class 0 up to 45 degrees
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> target = np.repeat([0, 1], [70, 30])  # the truth is class 0 up to 63 degrees
        >>> predictor = vilu.ViLUPlus(width=32, epochs=1)
        >>> predictor = predictor.fit(vilu.Embeddings(image, np.eye(2), target=target))
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> predictor.predict_uncertainty(vilu.Embeddings(new_image, np.eye(2))).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "vilu_plus"
    summary: ClassVar[str] = (
        "supervised cross-attention, network and memory, pooled by likelihood; calibrated"
    )
    reference: ClassVar[str] = "this project, 2026"
    cost: ClassVar[str] = (
        "fit: convex + 300 steps or 20 epochs, cross-fitted; score: 0.8 MFLOP per row"
    )
    optional_columns: ClassVar[tuple[str, ...]] = (FEATURES, NEGATIVES)
    is_probability: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits", "image"})
    uses_unlabelled: ClassVar[bool] = True

    seed: int = 0
    features: bool = True
    variance: Positive = 10.0
    sharing: Share = 0.5
    width: Count = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive = 2e-3
    weight_decay: NonNegative = 0.2
    device: str = "auto"

    # name, type and sizes of the learned tensors, see ``require_forms``
    _forms: ClassVar[str] = f"{POOL_TENSOR}:dP {Outside.forms}"

    @property
    def label(self) -> str:
        """The name, followed by "features" and "outside" if the fit used or learned these.

        Examples of labels are "vilu_plus" and "vilu_plus (features, outside)".
        """
        additions = []
        if FEATURES in self.columns_to_score:
            additions.append(FEATURES)
        if self.outcome:
            additions.append("outside")
        if not additions:
            return self.name
        return f"{self.name} ({', '.join(additions)})"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Return which of the columns "features" and "negatives" the fit uses.

        A column is used only if the data have it. Features are used if ``features`` is true. Words
        are used except for image-caption pairs.
        """
        columns = []
        if self.features and FEATURES in train.columns:
            columns.append(FEATURES)
        if train.pool_size is None and NEGATIVES in train.columns:
            columns.append(NEGATIVES)
        return tuple(columns)

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns with features and words that the fitted method needs for scoring."""
        if self.network_ is not None and self.experts.attention.inputs.has_features:
            return (FEATURES, *self.outcome.columns)
        return self.outcome.columns

    @property
    def experts(self) -> Experts:
        """The fitted experts."""
        return cast("Experts", self.network)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        weights = torch.ones(1, dtype=torch.float64)  # for the attention alone, without a pool
        companion_kinds = self._companion_kinds(train)
        folds: list[tuple[Rows, Rows]] = []
        if companion_kinds:
            folds = self._folds(train, failure, validation)
        if not folds:
            companion_kinds = ()
        learned_classes = self._learn_classes(train)
        start_logits = None
        if learned_classes is not None:
            logit_scale = train.source.space.logit_scale
            class_text = class_texts(train)
            start_logits = learned_classes.start_logits(class_text, logit_scale)
        experts = None
        rows_of_experts = None  # the rows on which ``experts`` were fitted
        held_out_answers = None
        if folds:
            # The pool and the experts are fitted on different rows. On the experts' own rows the
            # memory would get all the weight, since it contains the labels of these rows.
            _, first_held_out = folds[0]  # all folds hold out about the same number of rows
            n_folds = math.ceil(ENOUGH_HELD_OUT_ROWS / len(first_held_out.index))
            posteriors_of_batches = []
            for rows_to_fit, held_out_rows in folds[:n_folds]:
                experts = self._fit_experts(
                    rows_to_fit, companion_kinds, weights, start_logits, similar_experts=experts
                )
                rows_of_experts = rows_to_fit
                posteriors_of_batches += expert_posteriors(experts, held_out_rows, self.device_)
            weights, held_out_answers = _fit_pool(posteriors_of_batches, folds)
        # With a validation set, the experts above were already fitted on all training rows.
        # Otherwise the experts were fitted on a fold, or there are no experts yet.
        if experts is None or rows_of_experts is not train:
            experts = self._fit_experts(
                train, companion_kinds, weights, start_logits, similar_experts=experts
            )
        state = experts.state_dict()
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        tensors[POOL_TENSOR] = weights
        outside = learn_outside(train)
        if outside:
            tensors |= outside.tensors()
        notes: dict[str, Any] = {"pool": weights.tolist()}
        if learned_classes is not None:
            notes["unlabelled"] = learned_classes.notes
        return Learnt(tensors, {**notes, **outside.notes}, held_out_answers)

    def _folds(
        self, train: Rows, failure: Tensor, validation: EmbeddingSource | None
    ) -> list[tuple[Rows, Rows]]:
        """Return a pair for each fold: rows to fit the experts on, and rows to fit the pool on.

        All rows of a picture are in the same fold. If all rows show one picture, no row is left to
        fit the experts on, and there are no pairs.
        """
        if validation is not None:
            class_text = class_texts(train)
            require_known_classes(validation, class_text)
        folds = cross_fit_splits(train, failure, validation, self.seed)
        rows_to_fit, _ = folds[0]
        if not len(rows_to_fit.index):
            return []
        return folds

    def _learn_classes(self, train: Rows) -> LearnedClasses | None:
        """Learn about the classes from rows without labels. If there are none, return None."""
        source = train.unlabelled
        if source is None:
            return None
        rows = Rows(source, source.usable_rows)
        return learn_classes(rows, ViLUZero.share, self.seed, self.device_)

    def _companion_kinds(self, train: Rows) -> tuple[str, ...]:
        """Return the kinds of experts beside the attention, by the training set's size."""
        n_rows = len(train.index)
        has_few_labels = n_rows < MIN_LABELS_PER_CLASS * train.source.n_candidates
        if train.source.pool_size is not None or has_few_labels:
            return ()
        if n_rows > MAX_MEMORY_ROWS:
            return ("adapter",)
        return ("adapter", "memory")

    def _fit_experts(
        self,
        rows: Rows,
        companion_kinds: tuple[str, ...],
        weights: Tensor,
        start: StartLogits | None,
        similar_experts: Experts | None,
    ) -> Experts:
        """Fit the pool's experts: the attention, and an expert for each kind.

        Args:
            rows: The rows to fit on.
            companion_kinds: Kinds of the experts beside the attention: "adapter", "memory".
            weights: The experts' weights in the pool.
            start: Logits estimated from images without labels.
            similar_experts: Experts already fitted to most of these rows. The fit starts from the
                weights in their attention, and so needs fewer steps.
        """
        n_classes = rows.source.n_candidates
        if rows.source.pool_size:  # image-caption pairs have no classes
            n_classes = 0
        inputs = _fit_inputs(rows)
        warm_start = None
        if similar_experts is not None:
            warm_start = similar_experts.attention
        attention = fit_attention(
            inputs,
            rows,
            n_classes,
            variance=self.variance,
            sharing=self.sharing,
            device=self.device_,
            start=start,
            has_few_rows=not companion_kinds,
            warm_start=warm_start,
        )
        fit_functions = {"adapter": self._fit_adapter, "memory": Memory.fit}
        companions = {kind: fit_functions[kind](attention, rows) for kind in companion_kinds}
        experts = Experts(attention, companions, weights)
        experts.eval()
        experts.requires_grad_(requires_grad=False)
        return experts

    def _fit_adapter(self, attention: SupervisedAttention, rows: Rows) -> Adapter:
        """Train the network to add a residual to the logits ``attention.tempered_logits``."""

        def loss(batch: Batch, residual: Tensor) -> Tensor:
            logits = attention.tempered_logits(batch) + residual
            return functional.cross_entropy(logits, batch.target)

        batch_size = self.batch_size
        if batch_size is None:
            # twice a fortieth of the rows, as the class docstring says: a twentieth
            batch_size = 2 * default_batch_size(len(rows.index))
        n_classes = len(attention.classes)
        adapter = Adapter(attention.inputs, n_classes, self.width, self.dropout, self.seed)
        config = self._settings(AdamWConfig, batch_size=batch_size)
        train_adamw(adapter, loss, rows, config, epochs_of_steps=small_network_epochs)
        return adapter.eval()

    def _score(self, batch: Batch) -> Tensor:
        # All rows get their zero-shot answers at once, before the batch is split into blocks.
        answered_batch = batch.answered(batch.zero_shot)
        blocks = self.experts.logit_blocks(answered_batch)
        log_odds_of_blocks = [
            failure_log_odds(logits, block_batch) for block_batch, logits in blocks
        ]
        log_odds = torch.cat(log_odds_of_blocks)
        if self.outcome:
            outside_log_odds = self.outside_log_odds(batch)
            log_odds = log_odds_with_outside(log_odds, outside_log_odds)
        return torch.sigmoid(log_odds)

    def outside_log_odds(self, batch: Batch) -> Tensor:
        """Compute the log-odds (B,) float64 that the image shows none of the classes."""
        class_match = self.experts.attention.match_classes(batch.text)
        # -1: no training class
        classes = torch.where(class_match.is_class, class_match.nearest_class, -1)
        return self.outcome.log_odds(batch, classes)

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the candidates' log probabilities (B, K) float64 under the pool of experts."""
        experts = self.experts.to(batch.image.device)
        logits = float64(experts(batch))
        return logits.log_softmax(dim=-1)

    def graph(self) -> nn.Module:
        """Return a module with the experts, the pool, and the outcome "outside" if learned."""
        return PlusGraph(self.experts, self.outcome)

    def coalitions(self) -> Coalitions:
        """Return the coalitions of the parts of the pooled logits."""

        def parts(batch: Batch) -> PooledLogits:
            experts = self.experts.to(batch.image.device)
            return experts.pooled_parts(batch)

        outside = self.outside_log_odds if self.outcome else None
        return PoolCoalitions(parts, outside)

    def module(self, tensors: dict[str, Tensor], space: EmbeddingSpace) -> Experts:
        """Make new experts with the sizes in the saved ``tensors``."""
        missing_names = {CLASSES_TENSOR, FEATURE_MEAN_TENSOR, POOL_TENSOR} - tensors.keys()
        if missing_names:
            first_names = sorted(tensors)[:8]  # these show what kind of file it is
            saved_names = ", ".join(first_names)
            raise DataError(f"a {self.name} holds experts and a pool. The file has {saved_names}.")
        n_classes = len(tensors[CLASSES_TENSOR])
        dim = space.embed_dim
        inputs = ImageInputs(dim, len(tensors[FEATURE_MEAN_TENSOR]))
        companions: dict[str, nn.Module] = {}
        if ADAPTER_TENSOR in tensors:
            companions["adapter"] = Adapter(inputs, n_classes, self.width, self.dropout, self.seed)
        if BANK_TENSOR in tensors:
            companions["memory"] = Memory(inputs, len(tensors[BANK_TENSOR]), n_classes)
        n_experts = 1 + len(companions)  # the attention and the companions
        n_weights = len(tensors[POOL_TENSOR])
        if n_weights != n_experts:
            raise DataError(
                f"{POOL_TENSOR} of {self.name} must have a weight for each of {n_experts} experts. "
                f"Got {n_weights}."
            )
        attention = SupervisedAttention(inputs, dim, n_classes, self.sharing)
        return Experts(attention, companions, weights=tensors[POOL_TENSOR])


class PlusGraph(nn.Module):
    """The score of ``ViLUPlus`` as a graph for export.

    The graph cannot branch on values, so all experts are always computed. If some candidate is no
    training class, all experts but the attention have the weight zero.
    """

    def __init__(self, experts: Experts, outcome: Outside) -> None:
        super().__init__()
        self.outside = OutsideGraph(outcome) if outcome else None
        self.experts = experts
        attention = experts.attention
        self.classes = attention.classes
        n_features = len(attention.inputs.features.mean)  # the mean has a number for each feature
        self.widths = {FEATURES: n_features}
        self.expert_weights = nn.Buffer(experts.weights)
        # the weights (1, 0, ...), with which only the attention counts
        attention_only = torch.eye(len(experts.weights), dtype=experts.weights.dtype)[0]
        self.attention_only = nn.Buffer(attention_only)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the judged answers' uncertainties (N,) float64."""
        log_odds = failure_log_odds(self.log_posterior(batch), batch)
        if self.outside is not None:
            class_match = self.match_classes(batch)
            classes = None
            if class_match is not None:
                # -1: no training class
                classes = torch.where(class_match.is_class, class_match.nearest_class, -1)
            outside_log_odds = self.outside(batch, classes)
            log_odds = log_odds_with_outside(log_odds, outside_log_odds)
        return torch.sigmoid(log_odds)

    def log_posterior(self, batch: Batch) -> Tensor:
        """Compute the candidates' log probabilities (N, K) float64, up to a constant per row."""
        class_match = self.match_classes(batch)
        logits = self.experts.all_expert_logits(batch, class_match)
        weights: Tensor = self.attention_only
        if class_match is not None and len(self.expert_weights) > 1:
            are_all_classes = class_match.is_class.all()
            weights = torch.where(are_all_classes, self.expert_weights, self.attention_only)
        log_p = float64(logits).log_softmax(dim=-1)
        return pooled_logits(log_p, weights)

    def match_classes(self, batch: Batch) -> ClassMatch | None:
        """Compare the candidates with the training classes. Without such classes, return None."""
        attention = self.experts.attention
        if not len(attention.classes):
            return None
        return attention.match_classes(batch.text)


def require_known_classes(validation: EmbeddingSource, classes: Tensor) -> None:
    """Refuse validation rows with a candidate text that is not among the ``classes`` (K, D).

    Only the attention can score such a candidate, so the pool cannot be fitted on these rows.
    """
    n_unknown = validation.n_candidates  # if the candidates are captions, none is a training class
    if not validation.pool_size:
        no_rows = torch.arange(0)
        text = validation.candidates(no_rows).text
        similarity, _ = nearest_rows(text, classes)
        n_unknown = int((similarity < SAME_TEXT_COSINE).sum())
    if n_unknown:
        raise DataError(
            "the pool is fitted on the validation rows, and some experts score only the "
            f"{len(classes)} training classes. {n_unknown} of the {validation.n_candidates} "
            "candidates of the validation set are no training class. Leave these candidates out, "
            "or the whole validation set."
        )


class ExpertPosteriors(NamedTuple):
    """The posteriors for B rows by M experts, with the true candidates and zero-shot answers."""

    log_p: Tensor  # (B, M, K) float64 log probabilities for the K candidates
    target: Tensor  # (B,) true candidates
    answer: Tensor  # (B,) zero-shot answers


def expert_posteriors(experts: Experts, rows: Rows, device: torch.device) -> list[ExpertPosteriors]:
    """Compute the experts' posteriors for all rows, batch by batch, on the CPU."""
    posteriors_of_batches = []
    with torch.no_grad():
        for batch in rows.batches(SCORING_BATCH):
            log_p = experts.log_posteriors(batch.to(device))
            log_p = log_p.cpu()
            posteriors_of_batch = ExpertPosteriors(
                log_p=log_p, target=batch.target, answer=batch.zero_shot.prediction
            )
            posteriors_of_batches.append(posteriors_of_batch)
    return posteriors_of_batches


def _fit_pool(
    posteriors_of_batches: list[ExpertPosteriors], folds: list[tuple[Rows, Rows]]
) -> tuple[Tensor, HeldOutAnswers | None]:
    """Fit the experts' weights. Return them, and the pool's answers for the held-out rows.

    If the experts of some fold were fitted without any row of a class, the answers are None.
    """
    log_p = torch.cat([batch.log_p for batch in posteriors_of_batches])
    target = torch.cat([batch.target for batch in posteriors_of_batches])
    answer = torch.cat([batch.answer for batch in posteriors_of_batches])
    label = target.numpy()
    pool_weights = fit_pool_weights(log_p.numpy(), label)
    weights = torch.from_numpy(pool_weights)
    if not folds_have_every_class(folds):
        return weights, None
    log_q = pooled_logits(log_p, weights).log_softmax(dim=1)
    held_out_answers = HeldOutAnswers.of_posterior(log_q.numpy(), answer.numpy(), label)
    return weights, held_out_answers


def _fit_inputs(rows: Rows) -> ImageInputs:
    """Make the experts' inputs, fitted to the images and to the features, if there are any."""
    feature_dim = 0
    if FEATURES in rows.columns:
        feature_dim = rows.source.column(FEATURES, rows.index[:1]).shape[1]
    inputs = ImageInputs(rows.source.space.embed_dim, feature_dim)
    inputs.fit(rows)
    return inputs
