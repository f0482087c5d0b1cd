"""ViLU, its image-only baseline, and ensembles of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from vilu.embeddings.source import Batch
from vilu.errors import DataError
from vilu.predictors.heads.head import Count, HeadPredictor, bce_loss
from vilu.predictors.nn.head import Dropout, FailureHead
from vilu.predictors.nn.losses import FailureWeight, weighted_mse
from vilu.predictors.nn.processes import current_world
from vilu.predictors.nn.train import Loss, Rows
from vilu.predictors.parameters import parameters


@dataclasses.dataclass
class LVU(HeadPredictor):
    """Learned visual uncertainty: ViLU's MLP on the image embedding alone, u = sigmoid(g).

    With p_y the zero-shot probability of the true class, the losses are
    "mse": squared error of sigmoid(g) to 1 - p_y, as the released code does;
    "loss": squared error of softplus(g) to the backbone's loss -log p_y, as the supplement says; over the mean square
    of a batch's losses where that exceeds one, so that a step does not grow with the VLM's logit scale;
    "bce": ViLU's own loss, which the released checkpoints seem to be trained with.

    A predicted loss softplus(g) = -log p_y means p_y = 1 - sigmoid(g), so sigmoid(g) has one meaning in both
    regressions: the probability that the VLM withholds from the truth, which stands in for the probability of failure.
    The mean of -log p_y is ruled by its largest values, so "loss" errs upwards (by Jensen's inequality the best "loss"
    is never below the best "mse"); only "bce" learns the failure itself.

    Source: ViLU, supplement A.3, after ConfidNet (Corbière et al., NeurIPS 2019).
    """

    name: ClassVar[str] = "lvu"
    summary: ClassVar[str] = "image-only head: regression of the true-class probability or the loss, or BCE"
    reference: ClassVar[str] = "Corbière et al., NeurIPS 2019"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    loss: Literal["mse", "loss", "bce"] = "mse"

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(dim, self.hidden, attention=None, predicted_caption=False)

    @property
    def learns_failure(self) -> bool:
        """Whether the loss is weighted BCE."""
        return self.loss == "bce"

    def _loss(self, weight: FailureWeight) -> Loss:
        return LOSSES[self.loss](weight)


def withheld_probability(batch: Batch) -> Tensor:
    """(B,) one minus the zero-shot probability of the true class."""
    return -torch.expm1(batch.target_log_probability)


def backbone_loss(batch: Batch) -> Tensor:
    """(B,) cross-entropy of the zero-shot posterior."""
    return -batch.target_log_probability


def regression(target: Callable[[Batch], Tensor], link: Callable[[Tensor], Tensor]) -> Callable[[FailureWeight], Loss]:
    """Weighted squared error of ``link(g)`` to a target, over the mean squared target where that exceeds one."""

    def weighted(weight: FailureWeight) -> Loss:
        def loss(batch: Batch, logit: Tensor) -> Tensor:
            wanted = target(batch)
            size = current_world().mean(wanted.square()).clamp(min=1)
            return weighted_mse(logit, wanted, batch.failure, weight(batch.failure), link) / size

        return loss

    return weighted


LOSSES: dict[str, Callable[[FailureWeight], Loss]] = {
    "mse": regression(withheld_probability, torch.sigmoid),
    "loss": regression(backbone_loss, functional.softplus),
    "bce": bce_loss,
}
"""How a head is trained, by name."""


@dataclasses.dataclass
class ViLU(HeadPredictor):
    """ViLU: cross-attention over all candidates + the predicted caption + the image, an MLP, weighted BCE.

    u = sigmoid(g(z_v, sum_j alpha_j W z_tj, z_t̂)), g an MLP [512, 256, 128, 1] with ReLU; L = weighted BCE on the
    failure of the zero-shot answer, with weight log(1 + N_s / N_f) on failures.

    Args:
        attention: "official" (released code: identity start, shared key/value, logit scale), "paper" (W_Q, W_K, W_V,
            1/sqrt(d)), or None.
        predicted_caption: Whether the embedding of the zero-shot answer is an input.
        mcm_input: Whether max_j p_j is an input (supplement, B.2: used for all transfer experiments).
        loss: "bce", or the regression "mse" of the true class's probability (the paper's ablation; as ``LVU``).

    Source: ViLU, ICCV 2025. Differs from the released code: labels, similarities and losses are in float32; the frozen
    attention really is frozen; the weight is bounded; selection never sees the test set; the output is the failure, not
    the confidence.
    """

    name: ClassVar[str] = "vilu"
    summary: ClassVar[str] = "cross-attention over all texts + predicted caption + image (ViLU, ICCV 2025)"
    reference: ClassVar[str] = "Lafon et al., ICCV 2025"
    cost: ClassVar[str] = "fit: 6,000 steps of an MLP; score: 1 MFLOP a row"

    attention: Literal["official", "paper"] | None = "official"
    predicted_caption: bool = True
    mcm_input: bool = False
    loss: Literal["bce", "mse"] = "bce"

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(
            dim, self.hidden, attention=self.attention, predicted_caption=self.predicted_caption, mcm=self.mcm_input
        )

    @property
    def learns_failure(self) -> bool:
        """Whether the loss is weighted BCE."""
        return self.loss == "bce"

    def _loss(self, weight: FailureWeight) -> Loss:
        return LOSSES[self.loss](weight)


@dataclasses.dataclass
class DeepEnsemble(ViLU):
    """M ViLU heads that differ in their start and in the order of the rows: u = 1/M sum_m sigmoid(g_m(z)).

    Member m has the seed ``seed * M + m``, so that ensembles of different seeds share no member. All members are
    selected on the same rows.

    Args:
        members: M.

    Source: Lakshminarayanan et al., NeurIPS 2017, without adversarial training.
    """

    name: ClassVar[str] = "deep_ensemble"
    summary: ClassVar[str] = "mean over ViLU heads of different seeds"
    reference: ClassVar[str] = "Lakshminarayanan et al., NeurIPS 2017"
    cost: ClassVar[str] = "M times that of vilu"

    members: Count = 5

    members_: dict[int, ViLU] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def _new_members(self) -> dict[int, ViLU]:
        values = {name: getattr(self, name) for name in parameters(ViLU)}
        return {m: ViLU(**values | {"seed": self.seed * self.members + m}) for m in range(self.members)}

    def _fit(self, train: Rows, validation: Rows | None, error_rate: float) -> None:
        self.members_ = self._new_members()
        for m, member in self.members_.items():
            member.start_ = self.start_.members_[m] if isinstance(self.start_, DeepEnsemble) else None
            member._fit(train, validation, error_rate)

    def _learned_uncertainty(self, batch: Batch) -> Tensor:
        if not self.members_:
            raise DataError(f"this {self.name} holds neither heads nor a constant; its file is damaged.")
        scores = [member._learned_uncertainty(batch) for member in self.members_.values()]
        return torch.stack(scores).mean(dim=0)

    def _notes(self) -> dict[str, object]:
        return {f"member_{m}": member._notes() for m, member in self.members_.items()} if self.constant_ is None else {}

    def _learned_state(self) -> dict[str, Tensor]:
        states = {m: member._learned_state() for m, member in self.members_.items()}
        return {f"{m}.{name}": tensor for m, state in states.items() for name, tensor in state.items()}

    def _restore_learned(self, state: dict[str, Tensor]) -> None:
        members = self._new_members()
        unknown = [name for name in state if name.partition(".")[0] not in map(str, members)]
        if unknown:
            raise DataError(f"the weights are not those of {self.members} heads: {', '.join(sorted(unknown)[:4])}.")
        for m, member in members.items():
            member.space_ = self.space_
            start = f"{m}."
            member._restore_learned({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)})
        self.members_ = members


@dataclasses.dataclass
class MCDropout(ViLU):
    """ViLU's head with dropout, which stays on at scoring: u = 1/M sum_m sigmoid(g_m(z)), g_m the head under mask m.

    Dropout follows every hidden activation of the MLP. The M masks are drawn from the seed and are the same for every
    row, that is M thinned heads: a row has the same score in any company. Selection sees the head without dropout.

    Args:
        dropout: Share of units that is dropped.
        passes: M.

    Source: Gal and Ghahramani, ICML 2016, Eq. 6, where every input meets masks of its own.
    """

    name: ClassVar[str] = "mc_dropout"
    summary: ClassVar[str] = "ViLU with dropout, mean over thinned heads"
    reference: ClassVar[str] = "Gal and Ghahramani, ICML 2016"
    cost: ClassVar[str] = "fit: as vilu; score: M passes of the MLP"

    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    passes: Count = 20

    def _build_head(self, dim: int) -> FailureHead:
        return FailureHead(
            dim,
            self.hidden,
            attention=self.attention,
            predicted_caption=self.predicted_caption,
            mcm=self.mcm_input,
            dropout=Dropout(self.dropout, self.seed),
        )

    def _failure_probability(self, head: FailureHead, batch: Batch) -> Tensor:
        first, generator = head.first_layer(batch), torch.Generator().manual_seed(self.seed)
        total = torch.zeros(len(first), dtype=torch.float64)
        for _ in range(self.passes):
            hidden = first
            for layer in head.rest:
                if isinstance(layer, Dropout):
                    hidden = hidden * layer.mask(hidden.shape[1:], generator).to(hidden.device)
                else:
                    hidden = layer(hidden)
            total += torch.sigmoid(hidden.squeeze(-1).cpu().double())
        return total / self.passes
