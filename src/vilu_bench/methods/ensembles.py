"""Ensembles of ViLU heads: over several seeds, and over several dropout masks."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.predictors.contract.coalitions import Coalitions, HeadCoalitions, NoAttribution
from vilu.predictors.contract.labelled import fit_and_selection
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.contract.predictor import Learnt
from vilu.predictors.nn.head import Dropout
from vilu.predictors.vilu.head import Count, head_graph
from vilu.predictors.vilu.vilu import ViLU


@dataclasses.dataclass
class DeepEnsemble(ViLU):
    """M ViLU heads with different initial weights and different training row orders.

    u = 1/M sum_m sigmoid(g_m(z)), with g_m the output of head m.

    Member m has the seed ``seed * M + m``, so ensembles with different seeds share no member. For
    all members the best epoch is selected on the same rows.

    Args:
        members: Number M of heads.

    Source: Lakshminarayanan et al., NeurIPS 2017, without adversarial training.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # the answers between 45 and 63 degrees are wrong
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, text)
        >>> method = vilu.PREDICTORS["deep_ensemble"](members=2, epochs=10)
        >>> method.fit(train).predict_uncertainty(new).round()  # only the answer at 53 is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "deep_ensemble"
    summary: ClassVar[str] = "mean over ViLU heads of different seeds"
    reference: ClassVar[str] = "Lakshminarayanan et al., NeurIPS 2017"
    cost: ClassVar[str] = "M times that of vilu"

    # bounded, because a predictor from an untrusted file could otherwise build heads without end
    members: Annotated[Count, Field(le=1_000)] = 5

    graph = head_graph  # the score can be exported to ONNX

    def coalitions(self) -> Coalitions:
        """Return the coalitions for the mean failure probability."""
        return HeadCoalitions(
            self.heads,
            torch.sigmoid,
            "uncertainty, mean over the members' probabilities of failure",
        )

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """Make the heads of all members, in a list."""
        return nn.ModuleList(self._head(space) for _ in range(self.members))

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        rows_to_fit, selection_rows = fit_and_selection(
            train, failure, validation, self.validation_fraction, self.seed
        )
        failure_rate = float(failure.double().mean())
        tensors: dict[str, Tensor] = {}
        notes = {}
        for number, member in enumerate(self._new_members()):
            # each head starts from the head with the same number in the start ensemble
            if isinstance(self.start_, DeepEnsemble):
                member.start_ = self.start_._new_members()[number]
                member.start_.network_ = self.start_.heads[number]
            learnt = member.train_head(rows_to_fit, selection_rows, failure_rate)
            for name, tensor in learnt.tensors.items():
                tensors[f"{number}.{name}"] = tensor
            notes[f"member_{number}"] = learnt.notes
        return Learnt(tensors, notes)

    def _new_members(self) -> list[ViLU]:
        """Make the ensemble's unfitted heads, each with a different seed."""
        shared_values = {name: getattr(self, name) for name in parameters(ViLU)}
        del shared_values["seed"]
        first_seed = self.seed * self.members  # so ensembles of equal size share no member's seed
        return [ViLU(**shared_values, seed=first_seed + m) for m in range(self.members)]

    def _start_notes(self) -> dict[str, object]:
        return {}  # each member's notes report its start


@dataclasses.dataclass
class MCDropout(ViLU):
    """ViLU's head with dropout, also in scoring.

    u = 1/M sum_m sigmoid(g_m(z)), with g_m the head's output under dropout mask m.

    Dropout follows every hidden activation of the MLP. The M masks are drawn from the seed, and
    every row uses the same masks. In effect there are M thinned heads, and a row's score does
    not depend on other rows. The best epoch is selected with dropout switched off.

    Args:
        dropout: Share of dropped hidden units.
        passes: Number M of masks.

    Source: Gal and Ghahramani, ICML 2016, Eq. 6. There every input has separate masks.

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # the answers between 45 and 63 degrees are wrong
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, text)
        >>> method = vilu.PREDICTORS["mc_dropout"](epochs=10)
        >>> method.fit(train).predict_uncertainty(new).round()  # only the answer at 53 is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "mc_dropout"
    summary: ClassVar[str] = "ViLU with dropout, mean over thinned heads"
    reference: ClassVar[str] = "Gal and Ghahramani, ICML 2016"
    cost: ClassVar[str] = "fit: as vilu; score: M passes of the MLP"

    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    passes: Annotated[Count, Field(le=10_000)] = 20

    def coalitions(self) -> Coalitions:
        """Raise ``NoAttribution``: no coalitions are defined for a mean over thinned heads."""
        raise NoAttribution(
            "the score of mc_dropout is a mean over thinned heads, for which no coalitions are "
            "defined"
        )

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,
    ) -> nn.Module:
        """Make the head, with dropout layers that are active in training."""
        dropout_layer = Dropout(self.dropout, self.seed)
        return self._head(space, dropout_layer)

    def _score(self, batch: Batch) -> Tensor:
        (head,) = self.heads
        first_layer_output = head.first_layer(batch)
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(len(first_layer_output), dtype=torch.float64)
        for _ in range(self.passes):
            hidden = first_layer_output
            for layer in head.rest:
                if isinstance(layer, Dropout):
                    shape_of_row = hidden.shape[1:]  # all rows share the mask
                    mask = layer.mask(shape_of_row, generator)
                    hidden = hidden * mask.to(hidden.device)
                else:
                    hidden = layer(hidden)
            output = hidden.squeeze(-1).cpu()
            total += torch.sigmoid(output.double())
        return total / self.passes
