"""Deep ensemble of ViLU heads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vilu.errors import DataError
from vilu.nn.train import Rows
from vilu.predictors.heads.head import Count
from vilu.predictors.heads.vilu import ViLU
from vilu.predictors.parameters import parameters
from vilu.types import Batch


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
