"""The base class for predictors that train a ``FailureHead``."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from vilu.artifacts.hashing import tensors_hash
from vilu.device import torch_defaults
from vilu.embeddings.rows import Rows
from vilu.embeddings.similarity import float64
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.coalitions import LOG_ODDS_UNIT, Coalitions, HeadCoalitions
from vilu.predictors.contract.labelled import fit_and_selection
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.predictors.contract.seen import join_sketches
from vilu.predictors.nn.checkpoint import (
    current_checkpoint_session,
    data_fingerprint,
    text_fingerprint,
)
from vilu.predictors.nn.head import HIDDEN_WIDTHS, FailureHead, load_weights
from vilu.predictors.nn.losses import LOSSES, FailureWeight, adaptive_weight
from vilu.predictors.nn.train import HeadTrainer, TrainConfig

Weighting = Literal["batch", "dataset", "ema", "static", "balanced"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Widths = Annotated[tuple[Count, ...], Field(max_length=100)]


@dataclasses.dataclass
class HeadPredictor(FailurePredictor):
    """A predictor with uncertainty sigmoid(g). A trained ``FailureHead`` computes g.

    - Several processes can share the training (``vilu.predictors.nn.processes``). The learning rate
      does not depend on the process count.
    - Training can write checkpoints (``vilu.predictors.nn.checkpoint``).
    - Training can begin with fitted weights (``vilu.predictors.vilu.fine_tuning``).

    Args:
        validation_fraction: If ``fit`` gets no validation set, this share of the training rows is
            held out to choose the best epoch.
        hidden: Hidden layer widths in the MLP. The MLP has ``len(hidden) + 1`` layers.
        epochs: Number of passes over the training rows. None: 35, or more to reach 1,400 steps, or
            fewer to stay near 6,000 steps, and then clipped to 10 ... 300.
        batch_size: Rows per step. None: a fortieth of the training rows, clipped to 32 ... 128.
        learning_rate: Largest learning rate, reached after a linear warm-up. A cosine decay to zero
            follows.
        momentum: SGD momentum.
        weight_decay: SGD weight decay.
        warmup_epochs: Length of the warm-up in epochs. The warm-up takes at most a tenth of all
            steps.
        freeze_epochs: Number of epochs before the attention is trained. None: as many as have 1,000
            steps (the released code), and at least one (the paper), but at most half of all epochs.
        patience: Stop after this number of epochs without a validation AUROC near the best AUROC.
            None: never stop early.
        weighting: How failures are weighted in the loss
            (see ``vilu.predictors.nn.losses.FailureWeight``).
        static_weight: Failure weight if ``weighting`` is "static".
        precision: Precision of the MLP's matrix products in training.
    """

    is_probability: ClassVar[bool] = True
    learns_failure: ClassVar[bool] = True

    seed: int = 0
    allow_degenerate: bool = False
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    hidden: Widths = HIDDEN_WIDTHS
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive = 0.03
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 2e-3
    warmup_epochs: NonNegative = 1.0
    freeze_epochs: Annotated[int, Field(ge=0)] | None = None
    patience: Count | None = None
    weighting: Weighting = "batch"
    static_weight: Positive = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    start_: HeadPredictor | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    @abstractmethod
    def loss(self) -> str:
        """The loss name, a key of ``LOSSES``."""

    def _fit_rows(self, train: Rows, validation: EmbeddingSource | None) -> None:
        """Fit the predictor. If ``start_`` is set, refuse rows from a different embedding space."""
        start = self.start_
        space = train.source.space
        if start is not None and start.space_ is not None:
            start.space_.require_match(
                space, name=f"the fitted {self.name} to start from", other_name="the data"
            )
        super()._fit_rows(train, validation)
        if start is not None:  # the weights come from the rows of both fits
            self.seen_ = join_sketches(self.seen_, start.seen_)
        if self.constant_ is not None:  # a trained head has these notes already
            self.notes_ |= self._start_notes()

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        rows_to_fit, validation_rows = fit_and_selection(
            train, failure, validation, self.validation_fraction, self.seed
        )
        error_rate = float(failure.double().mean())
        return self.train_head(rows_to_fit, validation_rows, error_rate)

    def train_head(self, train: Rows, validation: Rows | None, error_rate: float) -> Learnt:
        """Train a single head. Validation rows, if given, choose the best epoch.

        ``error_rate`` is the share of failures among the training rows.
        """
        head = self._initial_head(train.source.space)
        weight = FailureWeight(self.weighting, error_rate, self.static_weight)
        session = current_checkpoint_session()
        saver = session.saver(lambda: self._run_inputs(head, train, validation))
        loss = LOSSES[self.loss](weight)
        config = self._settings(TrainConfig)
        trainer = HeadTrainer(head, loss, config, saver, stateful_parts=[weight])
        history = trainer.run(train, validation)
        state = head.state_dict()
        weights = {name: tensor.cpu() for name, tensor in state.items()}
        notes = self._start_notes()
        notes["history"] = dataclasses.asdict(history)
        return Learnt(weights, notes)

    def _initial_head(self, space: EmbeddingSpace) -> FailureHead:
        """Make the head before training, with new weights from the seed or with fitted weights."""
        network = self.module({}, space)
        head = cast("FailureHead", network)
        if self.start_ is not None:
            start_weights = self.start_.state()
            load_weights(head, start_weights, self.name)
        return head

    def _run_inputs(
        self, head: FailureHead, train: Rows, validation: Rows | None
    ) -> dict[str, object]:
        """Describe settings and data that must not change if training resumes from a checkpoint."""
        run_inputs: dict[str, object] = {"method": self.name}
        for name in parameters(self):
            if name != "device":
                run_inputs[name] = getattr(self, name)
        start_weights = head.state_dict()
        run_inputs["weights at the start"] = tensors_hash(start_weights)
        run_inputs["training rows"] = data_fingerprint(train.source, train.index)
        run_inputs["validation rows"] = None
        texts = [text_fingerprint(train.source, train.index)]
        if validation is not None:
            run_inputs["validation rows"] = data_fingerprint(validation.source, validation.index)
            validation_text = text_fingerprint(validation.source, validation.index)
            texts.append(validation_text)
        run_inputs["texts"] = texts
        return run_inputs

    def _start_notes(self) -> dict[str, object]:
        """Make notes on the earlier fit whose weights are the start. Empty without such a fit."""
        if self.start_ is None:
            return {}
        weights = self.start_.state()
        return {"start": {"weights": tensors_hash(weights), **self.start_.notes_}}

    @property
    def heads(self) -> list[FailureHead]:
        """The fitted heads."""
        heads = self.network if isinstance(self.network, nn.ModuleList) else [self.network]
        return [cast("FailureHead", head) for head in heads]

    def _score(self, batch: Batch) -> Tensor:
        probabilities = []
        for head in self.heads:
            logit = head(batch)
            probability = torch.sigmoid(float64(logit))
            probabilities.append(probability)
        probability_of_heads = torch.stack(probabilities)
        return probability_of_heads.mean(dim=0)

    @torch_defaults()
    def _log_odds_bias(self) -> float:
        """Compute how far a trained head's log-odds exceed the log-odds of failure.

        Failures have the weight w in the loss. For a row with the probability p of failure, the
        weighted BCE is least at the odds w p / (1 - p). So the log-odds are too large by log w. w
        is computed from the training error rate. It does not change the order of the rows by
        uncertainty.
        """
        if self.loss != "bce" or self.constant_ is not None:
            return 0.0
        n_rows = self.notes_.get("n_train")
        n_failures = self.notes_.get("n_failures")
        # a converted checkpoint's notes do not count the training rows
        if not n_rows or n_failures is None:
            return 0.0
        error_rate = torch.tensor(n_failures / n_rows, dtype=torch.float32)
        weight = FailureWeight(self.weighting, float(error_rate), self.static_weight)
        if weight.constant_weight is None:
            failure_weight = adaptive_weight(error_rate)
            return math.log(float(failure_weight))
        return math.log(float(weight.constant_weight))


class HeadGraph(nn.Module):
    """The mean of sigmoid(g) over a predictor's heads, as a module for export."""

    def __init__(self, heads: list[FailureHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, batch: Batch) -> Tensor:
        """Compute the uncertainties (N,) float64 of a batch."""
        probabilities = []
        for module in self.heads:
            head = cast("FailureHead", module)
            # as in ``FailureHead.forward``, but without the conversion to float32
            logit_column = head.rest(head.first_layer(batch))
            logit = logit_column.squeeze(-1)
            probability = torch.sigmoid(float64(logit))
            probabilities.append(probability)
        probability_of_heads = torch.stack(probabilities)
        return probability_of_heads.mean(dim=0)


def head_graph(predictor: HeadPredictor) -> nn.Module:
    """Make the graph of a predictor that averages probabilities over heads.

    A class of such predictors sets ``graph`` to this function.
    """
    return HeadGraph(predictor.heads)


def head_coalitions(predictor: HeadPredictor) -> Coalitions:
    """Make coalitions of head inputs, for a predictor with a single head.

    A class of such predictors sets ``coalitions`` to this function.
    """
    return HeadCoalitions(predictor.heads, link=lambda logit: logit, unit=LOG_ODDS_UNIT)
