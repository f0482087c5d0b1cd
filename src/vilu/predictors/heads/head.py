"""What predictors that train a ``FailureHead`` share."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vilu.device import resolve_device
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError
from vilu.predictors.labelled import SelectingPredictor
from vilu.predictors.nn.checkpoint import History, current_session, data_fingerprint
from vilu.predictors.nn.head import HIDDEN, FailureHead
from vilu.predictors.nn.losses import FailureWeight, adaptive_weight, weighted_bce
from vilu.predictors.nn.train import HeadTrainer, Loss, Rows, TrainConfig
from vilu.predictors.parameters import parameters
from vilu.predictors.rows import RowSketch

Weighting = Literal["batch", "dataset", "ema", "static", "balanced"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass
class HeadPredictor(SelectingPredictor):
    """A predictor whose uncertainty is sigmoid(g), g the output of a trained ``FailureHead``.

    Its training can be shared by several processes (``vilu.predictors.nn.processes``), leave checkpoints
    (``vilu.predictors.nn.checkpoint``), and begin from fitted weights (``vilu.predictors.init``); the learning rate
    depends on none of these.

    Args:
        hidden: Hidden widths of the MLP; depth is ``len(hidden) + 1``.
        epochs: Passes over the training rows; None: as many as make about 6,000 steps, between 10 and 300.
        batch_size: Rows per step.
        learning_rate: Peak; linear warm-up, then a cosine to zero.
        momentum: Of SGD.
        weight_decay: Of SGD.
        warmup_epochs: Length of the warm-up, at most a tenth of the run.
        freeze_epochs: Epochs before the attention starts to learn; None: one (the paper), or as many as make 1,000
            steps where that is longer (the released code), but at most half of them.
        patience: Stop after so many epochs clearly below the best validation AUROC; None: never.
        weighting: Weight of failures in the loss (see ``vilu.predictors.nn.losses.FailureWeight``).
        static_weight: The weight of mode "static".
        precision: Arithmetic of the MLP's products in training.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; not part of what is saved.
    """

    is_probability: ClassVar[bool] = True

    hidden: tuple[Count, ...] = HIDDEN
    epochs: Count | None = None
    batch_size: Count = 128
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

    head_: FailureHead | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    history_: History | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    start_: HeadPredictor | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @abstractmethod
    def _build_head(self, dim: int) -> FailureHead:
        """A new head for embeddings of width ``dim``."""

    @abstractmethod
    def _loss(self, weight: FailureWeight) -> Loss:
        """The training loss."""

    def fit(self, train: EmbeddingSource, validation: EmbeddingSource | None = None) -> Self:
        """As ``LabelledPredictor.fit``, from the weights of another fit where there are some to start from.

        Raises:
            ProvenanceError: Also if those come from another embedding space.
        """
        start = self.start_
        if start is not None and start.space_ is not None:
            start.space_.require_match(train.space, mine=f"the fitted {self.name} to start from", theirs="the data")
        super().fit(train, validation)
        if start is not None:
            self.seen_ = RowSketch.union(self.seen_, start.seen_)
        return self

    def _fit(self, train: Rows, validation: Rows | None, error_rate: float) -> None:
        config = TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            freeze_epochs=self.freeze_epochs,
            patience=self.patience,
            precision=self.precision,
            seed=self.seed,
            device=resolve_device(self.device),
        )
        head = self._first_head(train.source.space.embed_dim)
        weight = FailureWeight(self.weighting, error_rate, self.static_weight)
        keeper = current_session().keeper(lambda: self._binding(head, train, validation))
        trainer = HeadTrainer(head, self._loss(weight), config, keeper, [weight])
        self.history_ = trainer.run(train, validation)
        self.head_ = head.eval()

    def _first_head(self, dim: int) -> FailureHead:
        """What training begins with: a new head of the seed, or fitted weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head = self._build_head(dim)
        return head if self.start_ is None else with_weights(head, self.start_._learned_state(), self.name)

    def _binding(self, head: FailureHead, train: Rows, validation: Rows | None) -> dict[str, object]:
        """What must be the same when training begins again from a checkpoint."""
        values = {name: getattr(self, name) for name in parameters(self) if name != "device"}
        return {
            "method": self.name,
            **values,
            "weights at the start": weights_digest(head.state_dict()),
            "training rows": data_fingerprint(train.source, train.index),
            "validation rows": validation and data_fingerprint(validation.source, validation.index),
        }

    def _learned_uncertainty(self, batch: Batch) -> Tensor:
        if self.head_ is None:
            raise DataError(f"this {self.name} holds neither a head nor a constant; its file is damaged.")
        return self._failure_probability(self.head_.to(batch.image.device), batch)

    def _failure_probability(self, head: FailureHead, batch: Batch) -> Tensor:
        """(B,) float64 sigmoid(g)."""
        logit: Tensor = head(batch)
        return torch.sigmoid(logit.cpu().double())  # some devices have no float64

    def _log_weight(self) -> float:
        """Log w, w that of the training set's error rate: weighted BCE is least at the odds w p / (1 - p)."""
        n, n_failures = self.notes_.get("n_train"), self.notes_.get("n_failures")
        if not self.learns_failure or self.constant_ is not None or not n or n_failures is None:
            return 0.0  # a converted checkpoint does not say what it was trained on
        rate = torch.tensor(n_failures / n)
        weight = FailureWeight(self.weighting, float(rate), self.static_weight)
        return math.log(float(adaptive_weight(rate) if weight.constant is None else weight.constant))

    @property
    @abstractmethod
    def learns_failure(self) -> bool:
        """Whether the loss is weighted BCE on the failure itself, and not a regression of something else."""

    def _notes(self) -> dict[str, object]:
        notes: dict[str, object] = {}
        if self.start_ is not None:
            notes["start"] = {"weights": weights_digest(self.start_.state()), **self.start_.notes_}
        if self.history_ and self.constant_ is None:
            notes["history"] = dataclasses.asdict(self.history_)
        return notes

    def _learned_state(self) -> dict[str, Tensor]:
        return {} if self.head_ is None else {name: t.cpu() for name, t in self.head_.state_dict().items()}

    def _restore_learned(self, state: dict[str, Tensor]) -> None:
        if self.space_ is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        self.head_ = with_weights(self._build_head(self.space_.embed_dim), state, self.name)


def with_weights(network: Network, state: dict[str, Tensor], method: str) -> Network:
    """The network with saved weights, ready to score.

    Raises:
        DataError: If the weights have other names or shapes.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        differing = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise DataError(f"the weights do not fit a {method} with these parameters; they differ in {differing}.")
    network.load_state_dict(state)
    return network.eval()


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of tensors in the order of their names."""
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(state[name].cpu().numpy().tobytes())
    return hashed.hexdigest()


def bce_loss(weight: FailureWeight) -> Loss:
    """Weighted BCE on the failure of the zero-shot answer."""
    return lambda batch, logit: weighted_bce(logit, batch.failure, weight(batch.failure))
