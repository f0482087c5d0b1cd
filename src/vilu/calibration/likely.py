"""Answers that are likely right: an estimate from the labels of the fit, never a guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, Model, read_document, write_document
from vilu.embeddings.columns import AnswerKind
from vilu.errors import DataError, ProvenanceError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.calibrating import log_odds
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.probability import Calibrator, fit_calibrator
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import LIKELY, PREDICTOR

LEAST_WRONG: Final = 5
"""Smallest number of wrong answers among the cross-fitted labels for an estimate."""

WIDENING: Final = 1.1
"""Factor by which the expected error rate is raised before it is compared with the largest one.

It was chosen on four data sets (``benchmarks/likely.py``, docs/triage.md).
"""

Flags = list[bool | None]
"""Whether rows are likely right; all None if there is no estimate."""


class LikelyRight(Model):
    """An estimate of which answers are likely right, for a predictor that estimates P(failure).

    1. Every label of the fit is judged by a predictor that was fitted without it (cross-fitted).
    2. A calibrator from uncertainty to P(failure) is fitted on these labels.
    3. Rows are likely right up to the largest threshold at which ``widening`` times the mean of
       their probabilities is at most ``max_risk``.

    Attributes:
        max_risk: Largest error rate that is expected among the rows that are likely right.
        widening: Factor of the expected error rate.
        n: Number of cross-fitted labels.
        n_wrong: Number of wrong answers among these labels.
        n_wrong_zero_shot: Number of wrong zero-shot answers to the same labels; None if it was not
            counted.
        probability: The calibrator; None with fewer than ``LEAST_WRONG`` wrong answers.
        threshold: New rows up to this uncertainty are likely right, if they are drawn as the rows
            of the fit were. None if no answer is likely right, or if there is no calibrator.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.likely import LikelyRight
        >>> from vilu.predictors.contract.held_out import JudgedAnswers
        >>> u = np.linspace(0.01, 0.5, 100)  # the 80 most trusted answers are right
        >>> wrong = (np.arange(100) >= 80).astype(int)
        >>> likely = LikelyRight.estimate(JudgedAnswers(u, wrong), u, max_risk=0.05)
        >>> likely.n_wrong, likely.rows(u).count(True) > 70
        (20, True)
    """

    max_risk: float = Field(gt=0, lt=1)
    widening: float = Field(gt=0)
    n: int = Field(ge=0)
    n_wrong: int = Field(ge=0)
    n_wrong_zero_shot: int | None = Field(default=None, ge=0)
    probability: Annotated[Calibrator, Field(discriminator="form")] | None = None
    threshold: float | None = None

    @classmethod
    def without_labels(cls, max_risk: float) -> Self:
        """No estimate, because no label was fitted on."""
        return cls(max_risk=max_risk, widening=WIDENING, n=0, n_wrong=0)

    @classmethod
    def estimate(cls, held_out: JudgedAnswers, uncertainty: Floats, max_risk: float) -> Self:
        """Estimate from cross-fitted labels which of new rows are likely right.

        Args:
            held_out: Cross-fitted answers; their uncertainties must be probabilities.
            uncertainty: (N,) uncertainties of rows that are drawn as new rows will be; NaN for rows
                that cannot be scored.
            max_risk: Largest expected error rate.
        """
        is_known = held_out.is_known
        failure = held_out.failure[is_known]
        n_wrong = int(failure.sum())
        counted = cls(max_risk=max_risk, widening=WIDENING, n=len(failure), n_wrong=n_wrong)
        if n_wrong < LEAST_WRONG:
            return counted
        scores = log_odds(held_out.uncertainty[is_known])
        probability = fit_calibrator(scores, failure, is_log_odds=True)
        estimated = counted.model_copy(update={"probability": probability})
        threshold = estimated.threshold_among(uncertainty)
        return estimated.model_copy(update={"threshold": threshold})

    def threshold_among(self, uncertainty: Floats) -> float | None:
        """Largest uncertainty (N,) up to which rows are likely right; None if there is none."""
        if self.probability is None:
            return None
        ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
        probability = self.probability(log_odds(ascending))
        expected = np.cumsum(probability) / np.arange(1, len(ascending) + 1)
        # Rows of equal uncertainty are likely right together, or not at all. So the threshold is
        # the last of equals. The last row of all is followed by infinity.
        is_last_of_equals = np.diff(ascending, append=np.inf) > 0
        is_possible = is_last_of_equals & (self.widening * expected <= self.max_risk)
        possible = ascending[is_possible]
        return float(possible[-1]) if len(possible) else None

    def among(self, uncertainty: Floats) -> Flags:
        """Whether each of these rows (N,) is likely right, with a threshold of their own."""
        return self._flags(self.threshold_among(uncertainty), uncertainty)

    def rows(self, uncertainty: Floats) -> Flags:
        """Whether each of new rows (N,) is likely right."""
        return self._flags(self.threshold, uncertainty)

    def _flags(self, threshold: float | None, uncertainty: Floats) -> Flags:
        """Whether each uncertainty (N,) is at most the threshold; all None without an estimate."""
        if self.probability is None:
            return [None] * len(uncertainty)
        if threshold is None:
            return [False] * len(uncertainty)
        flags: Flags = (uncertainty <= threshold).tolist()  # not true of NaN
        return flags

    def save(self, folder: Path) -> None:
        """Write ``likely.json`` beside the predictor in a folder."""
        weights, answer = _judge(folder)
        file = _LikelyFile(weights_sha256=weights, answer=answer, estimate=self)
        write_document(folder / LIKELY, file)

    @classmethod
    def find(cls, folder: Path) -> LikelyRight | None:
        """The estimate beside a predictor; None if there is none.

        Raises:
            DataError: If the file is damaged.
            ProvenanceError: If the estimate was made for another predictor.
        """
        path = folder / LIKELY
        if not path.is_file():
            return None
        saved = read_document(path, _LikelyFile)
        if (saved.weights_sha256, saved.answer) != _judge(folder):
            raise ProvenanceError(
                f"{path} was made for another predictor than the one beside it, so it says nothing "
                f"about its answers. Remove the file, or: {saved.again}."
            )
        return saved.estimate


class _LikelyFile(Document):
    """The file ``likely.json``: an estimate, and the predictor and answers that it is about."""

    again = "run `vilu triage` into a new folder, with --labels and the labels.parquet of this one"
    fault = DataError

    kind: Literal["likely"] = "likely"
    weights_sha256: str
    answer: AnswerKind
    estimate: LikelyRight


def _judge(folder: Path) -> tuple[str, AnswerKind]:
    """Hash of the weights of a saved predictor, and the kind of answers that it judges."""
    description = read_description(folder / PREDICTOR)
    answer: AnswerKind = description["parameters"].get("answer", "zero_shot")
    return description["weights_sha256"], answer
