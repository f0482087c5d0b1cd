"""Split-conformal label sets: in place of one answer the few that hold the right one.

The sets are built on a posterior that knows of failures: with f the probability of failure of the
answer a and p the predictor's own posterior over the candidates, or else the zero-shot one,

    q_a = 1 - f,    q_j = f p_j / (1 - p_a) for the other candidates,

so that a trusted answer stands alone, and beside a doubted one are more, in the order of p.
Shapes: B rows, K candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
from pydantic import Field
from torch import Tensor

from vilu.artifacts.documents import Model
from vilu.calibration.methods import SetMethod
from vilu.calibration.thresholds import rows_for_mean
from vilu.callers import warn_caller
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.validation import require_between


class LabelSets(Model):
    """Sets that hold the right label with probability at least 1 - max_miss.

    The probability is over the draw of calibration rows and new row, for pictures of the classes.
    A picture of none of them has no right label, so no set can hold it: such calibration rows are
    left out, with a warning, and about such pictures nothing is guaranteed.

    With n calibration scores s_i = s(x_i, y_i) of the true labels, the set of x is {j: s(x, j) <=
    c}, c the ceil((n + 1)(1 - max_miss))-th smallest s_i. "lac": s = 1 - q_j, the smallest sets on
    average. "aps": s = the mass of all candidates more probable than j, whose coverage is more even
    over easy and hard rows. Ties only make sets larger. A set can be empty under "lac" (nothing is
    probable enough), never under "aps". f is taken as it was before ``calibrate``: the rows that
    set the limit must not have shaped the score.

    Source: Sadinle et al. (2019), least ambiguous sets; Romano et al. (2020), adaptive sets, whose
    last label is here always in and not by chance, so that a set is a function of the row. The
    posterior q is ours.
    """

    method: SetMethod  # "lac" or "aps"
    max_miss: float = Field(gt=0, lt=1)  # largest share of sets without the right label
    limit: float = Field(ge=0, le=2)  # c, in [0, 1]
    n: int = Field(ge=1)  # calibration rows
    mean_size: float = Field(ge=0)  # mean size of their sets
    empirical_miss: float = Field(ge=0, le=1)  # share of their sets without the right label

    def of(self, predictor: FailurePredictor, batch: Batch, uncertainty: Floats) -> Tensor:
        """(B, K) bool, the sets of a batch with uncertainties (B,) of the predictor."""
        return nonconformity(predictor, batch, uncertainty, self.method) <= self.limit


def failure_aware_posterior(batch: Batch, log_p: Tensor, failure_probability: Tensor) -> Tensor:
    """(B, K) float64 q of the module's docstring, on the CPU.

    With two candidates q = (1 - f, f).
    """
    answer = batch.prediction.cpu()[:, None]
    f = failure_probability.double()[:, None]
    # p_j / (1 - p_a) is a softmax without the answer. As a quotient it would be 0 / 0 where p_a
    # rounds to 1, which it does for the answers that are trusted most.
    rest = log_p.scatter(1, answer, -torch.inf).softmax(dim=1)
    return (f * rest).scatter(1, answer, 1 - f)


def nonconformity(
    predictor: FailurePredictor, batch: Batch, uncertainty: Floats, method: SetMethod
) -> Tensor:
    """(B, K) float64 s(x, j) of every candidate."""
    f = torch.from_numpy(predictor.raw_failure_probability(uncertainty))
    own = predictor.log_posterior if predictor.has_posterior else log_posterior
    with torch.no_grad():
        q = failure_aware_posterior(batch, own(batch).cpu(), f)
    if method == "lac":
        return 1 - q
    ordered, place = q.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    # Equal candidates share the mass before the first of them. By their places one of them would
    # be in the set and its equal not, and the score would depend on the order of the classes.
    first = torch.searchsorted(-ordered, -ordered)
    return torch.empty_like(q).scatter_(1, place, before.gather(1, first))


def fit_label_sets(
    predictor: FailurePredictor, data: EmbeddingSource, *, max_miss: float, method: SetMethod
) -> LabelSets:
    """Label sets from those calibration rows that the predictor's ``fit`` has not seen."""
    check_label_sets(predictor, data, max_miss)
    # Rows of the fit have better scores than new ones: with them the limit would be too small, and
    # sets of new rows would miss more often than max_miss.
    data = data.without(~predictor.unseen(data, "calibration"))
    n_ood = int(data.outside.sum())
    if n_ood:
        warn_caller(
            f"label sets leave out {n_ood} of {len(data)} calibration rows, which are of none of "
            "the classes: no set holds their label, so the guarantee is of pictures of the classes "
            "only.",
        )
    parts = []
    for scores, target in _labelled(predictor, data, method):
        parts.append(scores.gather(1, target[:, None]).squeeze(1))
    scores = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)
    if not len(scores):
        raise DataError(f"none of the {len(data)} calibration rows has a label.")
    # n + 1 and not n: the new row is equally likely at each of n + 1 ranks among the calibration
    # rows, so the quantile of n alone would miss more often than max_miss (Vovk et al. 2005).
    # Rounded first, as 0.9 * 10 may be a little more than 9.
    rank = math.ceil(round((len(scores) + 1) * (1 - max_miss), 9))
    if rank > len(scores):
        raise InfeasibleError(
            f"sets that miss at most {max_miss:.2%} need at least {rows_for_mean(max_miss)} "
            f"calibration rows. Got {len(scores)}."
        )
    limit = float(scores.sort().values[rank - 1])
    sizes = []
    for all_scores, _ in _labelled(predictor, data, method):
        sizes.append((all_scores <= limit).sum(dim=1))
    return LabelSets(
        method=method,
        max_miss=max_miss,
        limit=limit,
        n=len(scores),
        mean_size=float(torch.cat(sizes).double().mean()),
        empirical_miss=float((scores > limit).double().mean()),
    )


def check_label_sets(predictor: FailurePredictor, data: EmbeddingSource, max_miss: float) -> None:
    """Refuse what no sets can be made of."""
    require_between("max_miss", max_miss)
    if data.pool_size is not None:
        raise UsageError(
            "label sets need classes; these are image-caption pairs, each with candidates of its "
            "own pool."
        )
    predictor.raw_failure_probability([])


def _labelled(
    predictor: FailurePredictor, data: EmbeddingSource, method: SetMethod
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the rows with a label: s(x, j) (B, K), and their targets (B,)."""
    for batch, uncertainty in predictor.scored(data):
        known = batch.target.cpu() != UNKNOWN
        scores = nonconformity(predictor, batch, uncertainty, method)
        yield scores[known], batch.target.cpu()[known]


def named_sets(members: Tensor, class_names: Sequence[str] | None) -> list[str]:
    """Sets (B, K) as JSON lists of names, in the order of the candidates."""
    names = class_names
    if names is None:
        names = [str(j) for j in range(members.shape[1])]
    texts = []
    for row in members.tolist():
        members_of_row = list(compress(names, row))
        texts.append(json.dumps(members_of_row, ensure_ascii=False))
    return texts
