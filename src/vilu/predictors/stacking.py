"""The method ``stacking``: logistic regression of failures on the scores of other methods."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, UsageError
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.labelled import cross_fitting
from vilu.predictors.contract.parameters import build, parameters
from vilu.predictors.contract.predictor import CONSTANT, FailurePredictor, Learnt
from vilu.predictors.temperature import WithSecondModel

FREE = (
    "mcm",
    "entropy",
    "doctor",
    "gen",
    "max_logit",
    "margin",
    "prob_margin",
    "energy",
    "kl_uniform",
)
LABEL_BASED = ("knn_vote", "trine", "class_gaussians", "mahalanobis", "trust_score", "linear_probe")
CERTAIN = 1e-12  # smallest distance of a probability from zero and one, by clipping
FARTHEST = 5.0
"""Standard deviations to which a score is clipped, so that one outlier does not decide."""
NO_SPREAD = 1e-9  # standard deviation, relative to the largest score, that may be rounding alone


@dataclasses.dataclass
class Stacking(WithSecondModel):
    """Logistic regression of the failure on the scores of other methods, the members.

    u = P(failure) = sigmoid(b + sum_m w_m x_m), with the score x_m of member m, standardised and
    clipped to ±5. Of a member that estimates a probability, the log-odds are taken, with the
    probability clipped at 1e-12.

    1. All members are scored on rows that they were not fitted on. These are the validation set;
       without one, all rows in five folds stratified by failure, up to 5,000 rows; with more rows
       one held-out fifth, of at most 5,000 rows.
    2. Means, standard deviations, w and b are estimated from these scores. A member with equal
       scores everywhere gets no weight.
    3. The members are fitted again on all training rows.

    Members have their default parameters, except for ``seed`` and ``device``, which are those of
    the stack. A member that learns from failures is a constant if the rows of a fold hold no
    failure, or nothing else. The stack scores only the classes that it was fitted on, since that is
    true of its label-based default members.

    Args:
        members: Names of methods (``vilu list predictors``).
        C: Inverse strength of the L2 penalty on w, as in scikit-learn.

    Source: Wolpert, Neural Networks 1992, with a logistic level-1 model (Ting and Witten, JAIR
    1999).

    Examples:
        >>> import numpy as np, vilu
        >>> # the answer is class 0 up to 45 degrees, the truth up to 63
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> train = vilu.Embeddings(image, np.eye(2), target=np.repeat([0, 1], [70, 30]))
        >>> new_image = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]  # at 0, 53 and 90 degrees
        >>> new = vilu.Embeddings(new_image, np.eye(2))
        >>> method = vilu.PREDICTORS["stacking"](members=("mcm", "knn_vote"))
        >>> method.fit(train).predict_uncertainty(new).round()
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "stacking"
    summary: ClassVar[str] = (
        "logistic regression on the scores of other methods, cross-fitted (Wolpert 1992)"
    )
    reference: ClassVar[str] = "Wolpert, Neural Networks 1992"
    cost: ClassVar[str] = "fit: its members, six times up to 5,000 rows; score: its members"
    no_captions: ClassVar[str | None] = (
        "its members compare images of one class, and captions have no classes"
    )
    closed_set: ClassVar[bool] = True
    is_probability: ClassVar[bool] = True
    learns_failure: ClassVar[bool] = True
    _forms: ClassVar[str] = "mean:dM deviation:dM coefficients:dM intercept:d1"

    seed: int = 0
    allow_degenerate: bool = False
    members: Annotated[tuple[str, ...], Field(min_length=1)] = FREE + LABEL_BASED
    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    device: str = "auto"

    members_: dict[str, FailurePredictor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of the code of the stack and of its members."""
        modules = list(super().modules)
        for member in self._new_members().values():
            modules += member.modules
        return tuple(dict.fromkeys(modules))

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """The columns that the members use in a fit."""
        columns: list[str] = []
        for member in self._new_members().values():
            columns += member.columns_to_fit(train)
        return tuple(dict.fromkeys(columns))

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """The columns that the members need to score."""
        columns: list[str] = []
        for member in self.members_.values():
            columns += member.columns_to_score
        return tuple(dict.fromkeys(columns))

    def _new_members(self) -> dict[str, FailurePredictor]:
        """New members, not fitted, by name."""
        has_repeated = len(set(self.members)) < len(self.members)
        if has_repeated or self.name in self.members:
            raise UsageError(
                f"the members of {self.name} must be different methods, and other ones. "
                f"Got {', '.join(self.members)}."
            )
        shared = {"seed": self.seed, "device": self.device, "allow_degenerate": True}
        members = {}
        for name in self.members:
            cls = self._member_class(name)
            accepted = parameters(cls)
            values = {key: value for key, value in shared.items() if key in accepted}
            members[name] = build(cls, values)
        return members

    def _member_class(self, name: str) -> type[FailurePredictor]:
        try:
            return find_method(name)
        except UsageError as error:
            raise UsageError(
                f"{self.name} has the member {name!r}, which cannot be used: {error} Install "
                'vilu-bench, which has methods to compare with, or choose members=("mcm", ...).'
            ) from error

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        scores = []
        failures = []
        for rows, held_out in cross_fitting(train, failure, validation, self.seed, self.needs):
            members = self._fit_members(rows)
            with torch.no_grad():
                for batch in held_out.batches(SCORING_BATCH):
                    scores.append(member_scores(members, batch.to(self.device_)))
                    failures.append(batch.failure)
        stack = self._regress(torch.cat(scores), torch.cat(failures))
        coefficients = stack["coefficients"].tolist()
        notes = {"coefficients": dict(zip(self.members, coefficients, strict=True))}
        self.members_ = self._fit_members(train)
        tensors = stack | member_tensors(self.members_)
        return Learnt(tensors, notes | self.second_notes(train.source))

    def _fit_members(self, rows: Rows) -> dict[str, FailurePredictor]:
        """The members, fitted on some rows."""
        members = self._new_members()
        failure = torch.cat([batch.failure for batch in rows.batches(SCORING_BATCH)])
        is_inside = ~rows.source.outside[rows.index]
        outside = rows.index[~is_inside]
        everywhere = torch.ones_like(is_inside)
        for member in members.values():
            if not member.needs_fit:
                member.take({}, rows.source.space)
                continue
            usable = is_inside if member.needs == "class" else everywhere
            usable_rows = dataclasses.replace(rows, index=rows.index[usable], examples=outside)
            learnt = member.learn(usable_rows, failure[usable])
            member.take(learnt.tensors, rows.source.space)
        return members

    def _regress(self, scores: Tensor, failure: Tensor) -> dict[str, Tensor]:
        """Fit the level-1 model to scores (N, M) of held-out rows and their failures (N,)."""
        from sklearn.linear_model import LogisticRegression

        if len(failure.unique()) < 2:
            kind = "successes" if failure.any() else "failures"
            raise DataError(
                f"{self.name} weighs its members on rows held out from their fit, "
                f"{len(failure)} here. Found 0 {kind} among them, and both are needed. "
                "Give other validation rows, or more training rows."
            )
        deviation = scores.std(dim=0, correction=0)
        has_no_spread = deviation <= NO_SPREAD * scores.abs().amax(dim=0)
        stack = {
            "mean": scores.mean(dim=0),
            "deviation": deviation.masked_fill(has_no_spread, torch.inf),
        }
        model = LogisticRegression(C=self.C, max_iter=1_000, tol=1e-6)
        model.fit(standardised(scores, stack).numpy(), failure.numpy())
        stack["coefficients"] = torch.from_numpy(model.coef_[0].copy())
        stack["intercept"] = torch.from_numpy(model.intercept_.copy())
        return stack

    def _score(self, batch: Batch) -> Tensor:
        x = standardised(member_scores(self.members_, batch), self.learned_)
        return torch.sigmoid(x @ self.learned_["coefficients"] + self.learned_["intercept"])

    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Store the tensors of the level-1 model, and of the members by their prefix."""
        is_constant = tensors.keys() == {CONSTANT}
        members = {} if is_constant else self._new_members()
        own = dict(tensors)
        of_members: dict[str, dict[str, Tensor]] = {}
        for name in members:
            of_members[name] = {}
            for key, tensor in tensors.items():
                if key.startswith(prefix(name)):
                    of_members[name][key.removeprefix(prefix(name))] = tensor
                    own.pop(key, None)
        n = len(own.get("mean", ()))
        if members and n != len(members):
            raise DataError(
                f"a {self.name} holds {', '.join(self.tensors)} of {', '.join(members)}. "
                f"The file has {n}."
            )
        for name, member in members.items():
            member.take(of_members[name], space)
        super().take(own, space)
        self.members_ = members

    def state(self) -> dict[str, Tensor]:
        """The tensors of the level-1 model and of the members, by name."""
        return super().state() | member_tensors(self.members_)


def prefix(member: str) -> str:
    """Prefix of the names of the tensors of a member."""
    return f"members.{member}."


def member_tensors(members: dict[str, FailurePredictor]) -> dict[str, Tensor]:
    """The learned tensors of all members, by name with the prefix of the member."""
    tensors = {}
    for name, member in members.items():
        for key, tensor in member.state().items():
            tensors[prefix(name) + key] = tensor
    return tensors


def member_scores(members: dict[str, FailurePredictor], batch: Batch) -> Tensor:
    """(B, M) float64 scores, or log-odds where a member estimates a probability.

    They are on the CPU, since members may be on different devices.
    """
    columns = []
    for member in members.values():
        column = member.score_batch(batch).cpu().double()
        if member.is_probability:
            column = torch.logit(column, eps=CERTAIN)
        columns.append(column)
    return torch.stack(columns, dim=1)


def standardised(scores: Tensor, stack: dict[str, Tensor]) -> Tensor:
    """(B, M) standardised and clipped scores; zero for a member whose scores were all equal."""
    return ((scores - stack["mean"]) / stack["deviation"]).clamp(-FARTHEST, FARTHEST)
