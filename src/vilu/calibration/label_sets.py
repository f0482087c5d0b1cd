"""Split-conformal label sets: a row's candidates that probably include the right label.

The sets are built on a posterior q that includes the failure probability. Let f be the probability
that the answer a is wrong, and p the predictor's own posterior over the candidates.
Without an own posterior, p is the zero-shot posterior. Then

    q_a = 1 - f,    q_j = f p_j / (1 - p_a) for all candidates j except a.

So the set for a trusted answer contains only this answer. The set for a doubtful answer contains
more candidates, in the order of p. Shapes: B rows, K candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
from pydantic import Field
from torch import Tensor

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.methods import SetMethod
from vilu.calibration.thresholds import n_rows_for_mean_risk
from vilu.callers import warn_caller
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import UNKNOWN, DataError, InfeasibleError, UsageError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.validation import require_between


class LabelSets(FrozenModel):
    """Label sets that contain the right label with probability at least 1 - max_miss.

    The probability is over two draws: the calibration rows, and a new row that shows one of the
    classes. A picture outside all classes has no right label, and no guarantee. Calibration rows
    with such pictures are left out, with a warning.

    Let s_i = s(x_i, y_i) be the scores of the true labels for n calibration rows. The set for x is

        {j: s(x, j) <= c},    where c is the ceil((n + 1)(1 - max_miss))-th smallest s_i.

    - "lac": s(x, j) = 1 - q_j. These sets are the smallest on average. A set is empty if no
      candidate is probable enough.
    - "aps": s(x, j) = the total probability of the candidates that are more probable than j. Easy
      and hard rows differ less in coverage than with "lac". A set is never empty.

    Ties can only make sets larger. The scores s depend on the failure probability f. The
    calibration rows determine c, so they must not determine f, too. Therefore f is the failure
    probability before calibration.

    Sources: Sadinle et al. (2019), least ambiguous sets. Romano et al. (2020), adaptive sets. In
    these papers the last label of a set is included at random. Here the last label is always
    included, so a set depends on the row alone. Only vilu makes the posterior q in this way.
    """

    method: SetMethod  # "lac" or "aps"
    max_miss: float = Field(gt=0, lt=1)  # largest share of sets without the right label
    limit: float = Field(ge=0, le=2)  # c. It is at most 1, and rounding may add a little
    n: int = Field(ge=1)  # number of calibration rows
    mean_size: float = Field(ge=0)  # mean size of the sets for the calibration rows
    empirical_miss: float = Field(ge=0, le=1)  # share of these sets without the right label

    def members(self, predictor: FailurePredictor, batch: Batch, uncertainty: Floats) -> Tensor:
        """Return the mask (B, K) of the candidates in each row's label set, for a batch.

        ``uncertainty`` (B,) holds the predictor's scores for the rows.
        """
        return nonconformity(predictor, batch, uncertainty, self.method) <= self.limit


def failure_aware_posterior(batch: Batch, log_p: Tensor, failure_probability: Tensor) -> Tensor:
    """Return the posterior q (B, K), defined at the top of this module, float64 on the CPU.

    With two candidates, q is 1 - f for the answer and f for the other candidate.

    Args:
        batch: B rows with K candidates.
        log_p: log p (B, K).
        failure_probability: f (B,).
    """
    answer = batch.prediction.cpu()[:, None]  # (B, 1)
    f = failure_probability.double()[:, None]  # (B, 1)
    # p_j / (1 - p_a) is a softmax over the candidates without the answer. Where p_a rounds to 1,
    # the quotient would be 0 / 0. This happens for the most trusted answers.
    other_posterior = log_p.scatter(1, answer, -torch.inf).softmax(dim=1)
    return (f * other_posterior).scatter(1, answer, 1 - f)


def nonconformity(
    predictor: FailurePredictor, batch: Batch, uncertainty: Floats, method: SetMethod
) -> Tensor:
    """Return the scores s(x, j) (B, K) for all candidates, float64 (see ``LabelSets``)."""
    failure_probability = predictor.raw_failure_probability(uncertainty)
    f = torch.from_numpy(failure_probability)
    with torch.no_grad():
        if predictor.has_posterior:
            log_p = predictor.log_posterior(batch)
        else:
            log_p = log_posterior(batch)  # zero-shot
        q = failure_aware_posterior(batch, log_p.cpu(), f)
    if method == "lac":
        return 1 - q
    q_sorted, candidate = q.sort(dim=1, descending=True, stable=True)
    mass_before = q_sorted.cumsum(dim=1) - q_sorted
    # Candidates with equal q all get the mass before the first such candidate. Otherwise the scores
    # would depend on the class order. For every q, the search finds the first position with an
    # equal q. The search needs ascending numbers, so it runs over -q.
    first_of_ties = torch.searchsorted(-q_sorted, -q_sorted)
    sorted_scores = mass_before.gather(1, first_of_ties)
    return torch.empty_like(q).scatter_(1, candidate, sorted_scores)  # in candidate order


def fit_label_sets(
    predictor: FailurePredictor, data: EmbeddingSource, *, max_miss: float, method: SetMethod
) -> LabelSets:
    """Fit label sets on the calibration rows that were not used in the predictor's ``fit``."""
    check_label_sets(predictor, data, max_miss)
    # Rows from the fit have smaller scores than new rows. With such rows the limit would be too
    # small, and sets for new rows would miss the right label more often than max_miss.
    was_fitted_on = ~predictor.unseen(data, "calibration")
    unseen_data = data.without(was_fitted_on)
    _warn_of_ood(unseen_data)
    true_scores = _scores_of_true_labels(predictor, unseen_data, method)
    if not len(true_scores):
        raise DataError(f"none of the {len(unseen_data)} calibration rows has a label.")
    rank = _rank_of_limit(len(true_scores), max_miss)
    limit = float(true_scores.sort().values[rank - 1])
    sizes = []
    for all_scores, _ in _labelled_scores(predictor, unseen_data, method):
        sizes_of_batch = (all_scores <= limit).sum(dim=1)
        sizes.append(sizes_of_batch)
    all_sizes = torch.cat(sizes)
    is_missed = true_scores > limit
    return LabelSets(
        method=method,
        max_miss=max_miss,
        limit=limit,
        n=len(true_scores),
        mean_size=_mean_as_float64(all_sizes),
        empirical_miss=_mean_as_float64(is_missed),
    )


def _mean_as_float64(numbers: Tensor) -> float:
    """Return the mean of integers or Booleans, computed in float64."""
    return float(numbers.double().mean())


def _rank_of_limit(n: int, max_miss: float) -> int:
    """Return the rank ceil((n + 1)(1 - max_miss)) of the limit c among the scores of n rows.

    Examples:
        >>> from vilu.calibration.label_sets import _rank_of_limit
        >>> _rank_of_limit(19, max_miss=0.1), _rank_of_limit(20, max_miss=0.1)  # 18, and 18.9
        (18, 19)
    """
    # The factor is n + 1, because the new row has each of n + 1 ranks among the calibration rows
    # with equal probability. With n the sets would miss more often than max_miss (Vovk et al.
    # 2005). The product is rounded to nine decimals first: in float64 a whole number may come out a
    # little larger, and rounding up alone would give the next whole number.
    rank = math.ceil(round((n + 1) * (1 - max_miss), 9))
    if rank > n:
        n_needed = n_rows_for_mean_risk(max_miss)
        raise InfeasibleError(
            f"sets that miss at most {max_miss:.2%} need at least {n_needed} "
            f"calibration rows. Got {n}."
        )
    return rank


def _warn_of_ood(data: EmbeddingSource) -> None:
    """Warn if there are rows outside all classes, because label sets leave out such rows."""
    n_ood = int(data.outside.sum())
    if n_ood:
        warn_caller(
            f"label sets leave out {n_ood} of {len(data)} calibration rows, which are of none of "
            "the classes: no set holds their label, so the guarantee holds only for pictures of "
            "the classes.",
        )


def _scores_of_true_labels(
    predictor: FailurePredictor, data: EmbeddingSource, method: SetMethod
) -> Tensor:
    """Return the scores s_i (n,) for the true labels of the n labelled rows."""
    scores_of_batches = [torch.empty(0, dtype=torch.float64)]
    for all_scores, target in _labelled_scores(predictor, data, method):
        true_scores = all_scores.gather(1, target[:, None])  # (B, 1)
        scores_of_batches.append(true_scores.squeeze(1))
    return torch.cat(scores_of_batches)


def check_label_sets(predictor: FailurePredictor, data: EmbeddingSource, max_miss: float) -> None:
    """Refuse targets, data and predictors for which label sets cannot be made."""
    require_between("max_miss", max_miss)
    if data.pool_size is not None:
        raise UsageError(
            "label sets need classes; these are image-caption pairs, each with candidates of its "
            "own pool."
        )
    predictor.raw_failure_probability([])  # raises an error if the scores are not probabilities


def _labelled_scores(
    predictor: FailurePredictor, data: EmbeddingSource, method: SetMethod
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores s(x, j) (B, K) and true labels (B,) for each batch's B labelled rows."""
    for batch, uncertainty in predictor.scored(data):
        target = batch.target.cpu()
        is_known = target != UNKNOWN
        scores = nonconformity(predictor, batch, uncertainty, method)
        yield scores[is_known], target[is_known]


def sets_as_json(members: Tensor, class_names: Sequence[str] | None) -> list[str]:
    """Return the label sets for B rows as JSON lists of class names, in candidate order.

    ``members`` (B, K) is the mask of the candidates in the sets. Without class names, the candidate
    numbers are used as names.
    """
    names = class_names
    if names is None:
        names = [str(j) for j in range(members.shape[1])]
    texts = []
    for is_member in members.tolist():  # K Booleans for one row
        names_in_set = list(compress(names, is_member))
        text = json.dumps(names_in_set, ensure_ascii=False)
        texts.append(text)
    return texts
