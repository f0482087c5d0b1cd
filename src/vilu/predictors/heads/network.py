"""What predictors that train a small network on labelled rows share, where failures are not what they learn from."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod

import torch
from torch import Tensor, nn

from vilu.errors import DataError
from vilu.nn.adamw import AdamWConfig, train_adamw
from vilu.nn.train import Rows
from vilu.predictors.heads.head import Count, NonNegative, Positive, with_weights
from vilu.predictors.labelled import LabelledPredictor
from vilu.types import Batch, EmbeddingSource


@dataclasses.dataclass
class NetworkPredictor(LabelledPredictor):
    """A predictor with a network that gives one number per row, trained by AdamW; the last epoch is kept.

    Args:
        epochs: Passes over the training rows; None: as many as make about 6,000 steps, between 10 and 300.
        batch_size: Rows per step.
        learning_rate: At the start; a cosine takes it to zero.
        weight_decay: Of AdamW.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps"; not part of what is saved.
    """

    epochs: Count | None = None
    batch_size: Count = 128
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 1e-4
    device: str = "auto"

    network_: nn.Module | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    history_: list[float] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @abstractmethod
    def _build(self, dim: int) -> nn.Module:
        """A new network for embeddings of width ``dim``: a batch to (B,)."""

    @abstractmethod
    def _loss(self, batch: Batch, output: Tensor) -> Tensor:
        """The training loss of the network's output (B,)."""

    @abstractmethod
    def _score(self, batch: Batch, output: Tensor) -> Tensor:
        """(B,) uncertainty from the network's output (B,)."""

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> None:  # noqa: ARG002
        config = AdamWConfig(
            self.epochs, self.batch_size, self.learning_rate, self.weight_decay, self.seed, self.device_
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = self._build(train.source.space.embed_dim)
        self.history_ = train_adamw(network, self._loss, train, config)
        self.network_ = network.eval()

    def _notes(self) -> dict[str, object]:
        return {"history": {"loss": self.history_}}

    def _uncertainty(self, batch: Batch) -> Tensor:
        if self.network_ is None:
            raise DataError(f"this {self.name} holds no network; its file is damaged.")
        return self._score(batch, self.network_.to(batch.image.device)(batch))

    def state(self) -> dict[str, Tensor]:
        """The network's weights."""
        return {} if self.network_ is None else {name: t.cpu() for name, t in self.network_.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""
        if self.space_ is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        self.network_ = with_weights(self._build(self.space_.embed_dim), state, self.name)


def perceptron(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths with leaky ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])
