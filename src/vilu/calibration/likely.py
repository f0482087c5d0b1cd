"""Answers that are likely right: an estimate from labels, never a guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from pydantic import Field

from vilu.artifacts.documents import Document, FrozenModel, read_document, write_document
from vilu.embeddings.columns import AnswerKind
from vilu.errors import DataError, ProvenanceError
from vilu.metrics.counts import Floats
from vilu.predictors.contract.calibrating import log_odds
from vilu.predictors.contract.held_out import JudgedAnswers
from vilu.predictors.contract.probability import Calibrator, fit_calibrator
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import LIKELY, PREDICTOR

MIN_WRONG_ANSWERS: Final = 5
"""Smallest number of wrong labelled answers for an estimate."""

WIDENING: Final = 1.1
"""The expected error rate times this factor is compared with ``max_risk``.

The factor was chosen on four data sets (``benchmarks/likely.py``, docs/triage.md).
"""

LikelyFlags = list[bool | None]
"""For each row, whether the answer is likely right. Without an estimate, all flags are None."""

NO_DRAWN_ANSWERS: Final = JudgedAnswers(uncertainty=np.zeros(0), failure=np.zeros(0, np.int64))
"""Answers to no rows, for an estimate without labels of rows drawn at random."""


class LikelyRight(FrozenModel):
    """Estimate of likely right answers, for a predictor that estimates P(failure).

    1. Each labelled row in the fit gets an uncertainty from a predictor that was fitted without
       this row (cross-fitting).
    2. Labels of rows drawn at random are added (``with_drawn_answers``).
    3. A calibrator from uncertainty to P(failure) is fitted on all these labels.
    4. Rows up to a threshold are likely right: ``widening`` times the mean P(failure) of these rows
       is at most ``max_risk``. The threshold is as large as possible.

    Attributes:
        max_risk: Largest expected error rate among the likely right rows.
        widening: Factor on the expected error rate (``WIDENING``).
        n: Number of labelled rows in the fit. All these rows have a cross-fitted answer.
        n_wrong: Number of wrong answers to these rows.
        n_wrong_zero_shot: Number of wrong zero-shot answers to these rows. None if not counted.
        uncertainty: (n,) uncertainties of the cross-fitted answers.
        failure: (n,) 1 if a cross-fitted answer is wrong, otherwise 0.
        n_drawn: Number of labelled rows drawn at random.
        n_drawn_wrong: Number of wrong answers to the drawn rows.
        probability: The calibrator, which maps an uncertainty's log-odds to P(failure). None with
            fewer than ``MIN_WRONG_ANSWERS`` wrong answers.
        threshold: New rows up to this uncertainty are likely right, if new rows are drawn in the
            same way as the N rows given to ``estimate``. None if no answer is likely right, or if
            there is no calibrator.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.likely import LikelyRight
        >>> from vilu.predictors.contract.held_out import JudgedAnswers
        >>> u = np.linspace(0.01, 0.5, 100)  # the 80 most trusted answers are right
        >>> wrong = (np.arange(100) >= 80).astype(int)
        >>> likely_right = LikelyRight.estimate(JudgedAnswers(u, wrong), u, max_risk=0.05)
        >>> likely_right.n_wrong, likely_right.flags_of_new_rows(u).count(True) > 70
        (20, True)
    """

    max_risk: float = Field(gt=0, lt=1)
    widening: float = Field(gt=0)
    n: int = Field(ge=0)
    n_wrong: int = Field(ge=0)
    n_wrong_zero_shot: int | None = Field(default=None, ge=0)
    uncertainty: tuple[float, ...] = ()
    failure: tuple[int, ...] = ()
    n_drawn: int = Field(default=0, ge=0)
    n_drawn_wrong: int = Field(default=0, ge=0)
    probability: Annotated[Calibrator, Field(discriminator="form")] | None = None
    threshold: float | None = None

    @classmethod
    def without_labels(cls, max_risk: float) -> Self:
        """Make an empty estimate, because the fit used no labels."""
        return cls(max_risk=max_risk, widening=WIDENING, n=0, n_wrong=0)

    @classmethod
    def estimate(cls, held_out: JudgedAnswers, uncertainty: Floats, max_risk: float) -> Self:
        """Estimate from cross-fitted answers which new rows are likely right.

        Args:
            held_out: Cross-fitted answers. The uncertainties must be probabilities.
            uncertainty: (N,) uncertainties for rows drawn like later rows. NaN for rows without a
                score.
            max_risk: Largest expected error rate.
        """
        cross_fitted_answers = _answers_with_label(held_out)
        estimate_without_threshold = cls(
            max_risk=max_risk,
            widening=WIDENING,
            n=len(cross_fitted_answers.failure),
            n_wrong=int(cross_fitted_answers.failure.sum()),
            uncertainty=tuple(cross_fitted_answers.uncertainty.tolist()),
            failure=tuple(cross_fitted_answers.failure.tolist()),
        )
        return estimate_without_threshold.with_drawn_answers(NO_DRAWN_ANSWERS, uncertainty)

    def with_drawn_answers(self, drawn: JudgedAnswers, uncertainty: Floats) -> Self:
        """Make a new estimate from the cross-fitted answers and answers to rows drawn at random.

        The labelled rows in the fit were not drawn, but chosen. So answers to these rows may be
        wrong more often, or less often, than all answers with the same uncertainty.

        Args:
            drawn: The predictor's answers to the drawn rows. The draw may be limited to rows up to
                some uncertainty, but must not depend on any other property of the rows.
            uncertainty: As for ``estimate``.
        """
        drawn_answers = _answers_with_label(drawn)
        all_failures = np.concatenate([np.array(self.failure, np.int64), drawn_answers.failure])
        calibrator = None
        if all_failures.sum() >= MIN_WRONG_ANSWERS:
            all_uncertainties = np.concatenate(
                [np.array(self.uncertainty), drawn_answers.uncertainty]
            )
            scores = log_odds(all_uncertainties)
            calibrator = fit_calibrator(scores, all_failures, is_log_odds=True)
        estimate_with_calibrator = self.model_copy(
            update={
                "n_drawn": len(drawn_answers.failure),
                "n_drawn_wrong": int(drawn_answers.failure.sum()),
                "probability": calibrator,  # maps log-odds to P(failure)
            }
        )
        threshold = estimate_with_calibrator.threshold_among(uncertainty)
        return estimate_with_calibrator.model_copy(update={"threshold": threshold})

    def threshold_among(self, uncertainty: Floats) -> float | None:
        """Return the largest uncertainty of likely right rows among N uncertainties, or None."""
        calibrator = self.probability
        if calibrator is None:
            return None
        is_scored = np.isfinite(uncertainty)
        ascending = np.sort(uncertainty[is_scored])
        scores = log_odds(ascending)
        failure_probability = calibrator(scores)
        # for each row, the expected error rate of this row and all earlier rows
        expected_risk = np.cumsum(failure_probability) / np.arange(1, len(ascending) + 1)
        # Rows with equal uncertainty get the same flag. So among such rows only the last row may
        # set the threshold. Infinity is appended, because the last of all rows may set it, too.
        is_last_of_equals = np.diff(ascending, append=np.inf) > 0
        is_low_risk = self.widening * expected_risk <= self.max_risk
        possible_thresholds = ascending[is_last_of_equals & is_low_risk]
        return float(possible_thresholds[-1]) if len(possible_thresholds) else None

    def flags_by_own_threshold(self, uncertainty: Floats) -> LikelyFlags:
        """Flag each of N rows as likely right or not, with the threshold found among these rows."""
        threshold = self.threshold_among(uncertainty)
        return self._flags(threshold, uncertainty)

    def flags_of_new_rows(self, uncertainty: Floats) -> LikelyFlags:
        """Flag each of N new rows as likely right or not, with the saved threshold."""
        return self._flags(self.threshold, uncertainty)

    def _flags(self, threshold: float | None, uncertainty: Floats) -> LikelyFlags:
        """Flag the uncertainties (N,) up to the threshold.

        All flags are None if there is no estimate, and False if the threshold is None.
        """
        if self.probability is None:
            return [None] * len(uncertainty)
        if threshold is None:
            return [False] * len(uncertainty)
        flags: LikelyFlags = (uncertainty <= threshold).tolist()  # False for NaN
        return flags

    def save(self, folder: Path) -> None:
        """Write ``likely.json`` beside the predictor in a folder."""
        weights_sha256, answer = _weights_and_answer(folder)
        file = _LikelyFile(weights_sha256=weights_sha256, answer=answer, estimate=self)
        write_document(folder / LIKELY, file)

    @classmethod
    def find(cls, folder: Path) -> LikelyRight | None:
        """Load the estimate beside a predictor, or return None if there is no estimate.

        Raises:
            DataError: If the file is damaged.
            ProvenanceError: If the estimate was made for another predictor.
        """
        path = folder / LIKELY
        if not path.is_file():
            return None
        saved = read_document(path, _LikelyFile)
        if (saved.weights_sha256, saved.answer) != _weights_and_answer(folder):
            raise ProvenanceError(
                f"{path} was made for another predictor than the one beside it, so it says nothing "
                f"about the answers of that predictor. Remove the file, or: {saved.remedy}."
            )
        return saved.estimate


def _answers_with_label(judged: JudgedAnswers) -> JudgedAnswers:
    """Select the answers with an uncertainty that are known to be right or wrong."""
    has_label = judged.is_known
    return JudgedAnswers(judged.uncertainty[has_label], judged.failure[has_label])


class _LikelyFile(Document):
    """File ``likely.json``: an estimate, with the predictor and the kind of answers."""

    remedy = "run `vilu triage` into a new folder, with --labels and the labels.parquet of this one"
    error_class = DataError

    kind: Literal["likely"] = "likely"
    weights_sha256: str
    answer: AnswerKind
    estimate: LikelyRight


def _weights_and_answer(folder: Path) -> tuple[str, AnswerKind]:
    """Return the hash over a saved predictor's weights, and the kind of judged answers."""
    description = read_description(folder / PREDICTOR)
    answer: AnswerKind = description["parameters"].get("answer", "zero_shot")
    return description["weights_sha256"], answer
