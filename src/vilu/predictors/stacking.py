"""The method ``stacking``: logistic regression from several methods' scores to failures."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, MissingModelError, UsageError
from vilu.predictors.contract.catalogue import find_method
from vilu.predictors.contract.labelled import cross_fit_splits
from vilu.predictors.contract.parameters import build_predictor, parameters
from vilu.predictors.contract.predictor import CONSTANT, FailurePredictor, Learnt
from vilu.predictors.temperature import WithSecondModel

# The default members.
MEMBERS_WITHOUT_FIT = (
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
MEMBERS_WITH_LABELS = (
    "knn_vote",
    "trine",
    "class_gaussians",
    "mahalanobis",
    "trust_score",
    "linear_probe",
)
MIN_PROBABILITY = 1e-12
"""Probabilities are clipped to the range 1e-12 ... 1 - 1e-12, so that log-odds are finite."""
MAX_DEVIATIONS = 5.0
"""Standardised scores are clipped to -5 ... 5. Then no outlier decides alone."""
NEGLIGIBLE_DEVIATION = 1e-9
"""Limit for a standard deviation, as a share of the largest |score|.

If the standard deviation is not above this limit, a member's scores count as equal. Rounding alone
may cause so small a deviation.
"""


@dataclasses.dataclass
class Stacking(WithSecondModel):
    """Logistic regression from the scores of several methods, the members, to the failure.

        u = P(failure) = sigmoid(b + sum_m w_m x_m)

    x_m is made from the score of member m, and w_m is the member's weight. If the score is a
    probability, it is first replaced by its log-odds. The score or the log-odds are then
    standardised and clipped to ±5.

    1. All members score rows that they were not fitted on: the validation set or, without a
       validation set, held-out training rows. If there are at most 5,000 training rows, all are
       held out in turn, in five folds stratified by failure. If there are more, a fifth is held
       out, but at most 5,000 rows.
    2. Means, standard deviations, w and b are estimated from these scores. A member with equal
       scores for all rows gets no weight.
    3. The members are fitted again on all training rows.

    Members have default parameters, but the ``seed`` and the ``device`` are those of the stack. If
    the fitted rows are all failures or all successes, a member that learns from failures is a
    constant. The stack scores only the fitted classes, because some default members score only
    these classes.

    Args:
        members: Names of the members (see ``vilu list predictors``).
        C: Inverse strength of the L2 penalty on w, as in scikit-learn.

    Source: Wolpert, Neural Networks 1992, with a logistic level-1 model (Ting and Witten, JAIR
    1999).

    Examples:
        >>> import numpy as np, vilu
        >>> angle = np.linspace(0, np.pi / 2, 100)
        >>> image = np.c_[np.cos(angle), np.sin(angle)]
        >>> text = np.eye(2)  # class 0 is at 0 degrees, class 1 at 90 degrees
        >>> target = np.repeat([0, 1], [70, 30])  # truth: 0 up to 63 degrees, answer: 0 up to 45
        >>> train = vilu.Embeddings(image, text, target=target)
        >>> new = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], text)  # 0, 53, 90 degrees
        >>> method = vilu.PREDICTORS["stacking"](members=("mcm", "knn_vote"))
        >>> method.fit(train).predict_uncertainty(new).round()  # the second answer is wrong
        array([0., 1., 0.])
    """

    name: ClassVar[str] = "stacking"
    summary: ClassVar[str] = (
        "logistic regression on the scores of other methods, cross-fitted (Wolpert 1992)"
    )
    reference: ClassVar[str] = "Wolpert, Neural Networks 1992"
    cost: ClassVar[str] = "fit: its members, six times (twice above 5,000 rows); score: its members"
    no_captions: ClassVar[str | None] = (
        "its members compare images of one class, and captions have no classes"
    )
    closed_set: ClassVar[bool] = True
    is_probability: ClassVar[bool] = True
    learns_failure: ClassVar[bool] = True
    # "d" means float64, and "M" is the member count (see ``require_forms``)
    _forms: ClassVar[str] = "mean:dM deviation:dM coefficients:dM intercept:d1"

    seed: int = 0
    allow_degenerate: bool = False
    members: Annotated[tuple[str, ...], Field(min_length=1)] = (
        MEMBERS_WITHOUT_FIT + MEMBERS_WITH_LABELS
    )
    C: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    device: str = "auto"

    members_: dict[str, FailurePredictor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules with the code for the stack and its members."""
        modules = list(super().modules)
        members = self._new_members()
        for member in members.values():
            modules += member.modules
        return tuple(dict.fromkeys(modules))

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:
        """Return the names of the columns used by the members in a fit."""
        columns: list[str] = []
        members = self._new_members()
        for member in members.values():
            columns += member.columns_to_fit(train)
        return tuple(dict.fromkeys(columns))

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """Names of the columns used by the members in scoring."""
        return columns_of_members(self.members_)

    def _new_members(self) -> dict[str, FailurePredictor]:
        """Make new members, not yet fitted. Return them by name."""
        has_duplicates = len(set(self.members)) < len(self.members)
        if has_duplicates or self.name in self.members:
            member_names = ", ".join(self.members)
            raise UsageError(
                f"the members of {self.name} must be different methods, "
                f"and {self.name} itself cannot be a member. Got {member_names}."
            )
        settings = {"seed": self.seed, "device": self.device, "allow_degenerate": True}
        members = {}
        for name in self.members:
            cls = self._member_class(name)
            own_parameters = parameters(cls)
            own_settings = {key: value for key, value in settings.items() if key in own_parameters}
            members[name] = build_predictor(cls, own_settings)
        return members

    def _member_class(self, name: str) -> type[FailurePredictor]:
        """Return the class of the method ``name``. Errors say which member cannot be used."""
        try:
            return find_method(name)
        except (UsageError, MissingModelError) as error:
            raise type(error)(
                f"{self.name} has the member {name!r}, which cannot be used: {error} Or choose "
                'members=("mcm", ...).'
            ) from error

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        scores = []
        failures = []
        folds = cross_fit_splits(train, failure, validation, self.seed, self.needs)
        rows_of_first_fold, _ = folds[0]
        # a picture's rows are held out together, so no row is left if all rows show one picture
        if not len(rows_of_first_fold.index):
            raise DataError(
                f"{self.name} fits its members on other pictures than its weights, and all "
                f"{len(train.index)} training rows show one picture. Add rows of other pictures, "
                "or give validation rows."
            )
        for rows_to_fit, held_out_rows in folds:
            members = self._fit_members(rows_to_fit)
            with torch.no_grad():
                for batch in held_out_rows.batches(SCORING_BATCH):
                    scores_of_batch = member_scores(members, batch.to(self.device_))
                    scores.append(scores_of_batch)
                    failures.append(batch.failure)
        regression = self._regress(torch.cat(scores), torch.cat(failures))
        coefficients = regression["coefficients"].tolist()
        notes = {"coefficients": dict(zip(self.members, coefficients, strict=True))}
        members = self._fit_members(train)
        tensors = regression | member_tensors(members)
        second_notes = self.second_notes(train.source, columns_of_members(members))
        return Learnt(tensors, notes | second_notes)

    def _fit_members(self, rows: Rows) -> dict[str, FailurePredictor]:
        """Make new members and fit them on ``rows``. Return them by name."""
        members = self._new_members()
        failures = [batch.failure for batch in rows.batches(SCORING_BATCH)]
        failure = torch.cat(failures)
        is_ood = rows.source.outside[rows.index]  # images outside all classes
        ood_rows = rows.index[is_ood]
        for member in members.values():
            if not member.needs_fit:
                member.take({}, rows.source.space)  # stores only the embedding space
                continue
            is_usable = torch.ones_like(is_ood)
            if member.needs == "class":
                is_usable = ~is_ood
            member_rows = dataclasses.replace(
                rows, index=rows.index[is_usable], outside_rows=ood_rows
            )
            learnt = member.learn(member_rows, failure[is_usable])
            member.take(learnt.tensors, rows.source.space)
        return members

    def _regress(self, scores: Tensor, failure: Tensor) -> dict[str, Tensor]:
        """Fit the logistic regression to scores (N, M) of held-out rows and failures (N,).

        Return the regression tensors by name: coefficients, intercept, and the scores' means and
        standard deviations.
        """
        from sklearn.linear_model import LogisticRegression

        if len(failure.unique()) < 2:
            missing_kind = "successes" if failure.any() else "failures"
            raise DataError(
                f"{self.name} estimates the weights of its members from failures and successes on "
                f"rows that they were not fitted on, {len(failure)} here. Found 0 {missing_kind} "
                "among them, and both are needed. Give other validation rows, or more training "
                "rows."
            )
        deviation = scores.std(dim=0, correction=0)
        has_no_spread = deviation <= NEGLIGIBLE_DEVIATION * scores.abs().amax(dim=0)
        # A score without spread gets an infinite deviation. So the standardised scores are 0.
        regression = {
            "mean": scores.mean(dim=0),
            "deviation": deviation.masked_fill(has_no_spread, torch.inf),
        }
        model = LogisticRegression(C=self.C, max_iter=1_000, tol=1e-6)
        x = standardise(scores, regression)
        model.fit(x.numpy(), failure.numpy())
        coefficients = model.coef_[0].copy()  # for two classes, ``coef_`` has a single row
        regression["coefficients"] = torch.from_numpy(coefficients)
        regression["intercept"] = torch.from_numpy(model.intercept_.copy())
        return regression

    def _score(self, batch: Batch) -> Tensor:
        scores = member_scores(self.members_, batch)
        x = standardise(scores, self.learned_)
        log_odds = x @ self.learned_["coefficients"] + self.learned_["intercept"]
        return torch.sigmoid(log_odds)

    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Store the tensors of the regression and the members.

        A member's tensor names begin with the member's ``tensor_prefix``.
        """
        members: dict[str, FailurePredictor] = {}
        is_constant = tensors.keys() == {CONSTANT}
        if not is_constant:
            members = self._new_members()
        # move every member's tensors from ``regression`` to ``states``, and drop the prefixes
        regression = dict(tensors)
        states: dict[str, dict[str, Tensor]] = {}
        for name in members:
            prefix = tensor_prefix(name)
            state = {}
            for key, tensor in tensors.items():
                if key.startswith(prefix):
                    state[key.removeprefix(prefix)] = tensor
                    regression.pop(key, None)
            states[name] = state
        n_members = len(regression.get("mean", ()))  # "mean" has one number per member
        if members and n_members != len(members):
            raise DataError(
                f"a {self.name} holds {', '.join(self.tensors)} of {', '.join(members)}. "
                f"The file has the tensors of {n_members} members."
            )
        for name, member in members.items():
            member.take(states[name], space)
        super().take(regression, space)
        self.members_ = members

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the regression and the members, by name."""
        return super().state() | member_tensors(self.members_)


def columns_of_members(members: dict[str, FailurePredictor]) -> tuple[str, ...]:
    """Return the names of the columns used by members in scoring."""
    columns: list[str] = []
    for member in members.values():
        columns += member.columns_to_score
    return tuple(dict.fromkeys(columns))


def tensor_prefix(member: str) -> str:
    """Return the prefix of a member's tensor names in the stack's file."""
    return f"members.{member}."


def member_tensors(members: dict[str, FailurePredictor]) -> dict[str, Tensor]:
    """Return the learned tensors of all members. Each name begins with the member's prefix."""
    tensors = {}
    for name, member in members.items():
        state = member.state()
        for key, tensor in state.items():
            tensors[tensor_prefix(name) + key] = tensor
    return tensors


def member_scores(members: dict[str, FailurePredictor], batch: Batch) -> Tensor:
    """Compute the score of every row by every member: (B, M) float64 on the CPU.

    Probabilities are replaced by their log-odds. The result is on the CPU, because members may be
    on different devices.
    """
    columns = []
    for member in members.values():
        score = member.score_batch(batch)
        column = score.cpu().double()
        if member.is_probability:
            column = torch.logit(column, eps=MIN_PROBABILITY)
        columns.append(column)
    return torch.stack(columns, dim=1)


def standardise(scores: Tensor, regression: dict[str, Tensor]) -> Tensor:
    """Standardise and clip the scores (B, M). Return 0 for a member with equal scores in the fit.

    ``regression`` has the members' means and standard deviations in the fit.
    """
    deviations = (scores - regression["mean"]) / regression["deviation"]
    return deviations.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
