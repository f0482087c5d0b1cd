"""Answers that are likely right: an estimate from labels, never a guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

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
"""Smallest number of wrong answers among the labels of an estimate."""

WIDENING: Final = 1.1
"""Factor by which the expected error rate is raised before it is compared with the largest one.

It was chosen on four data sets (``benchmarks/likely.py``, docs/triage.md).
"""

Flags = list[bool | None]
"""Whether rows are likely right; all None if there is no estimate."""

NOTHING_DRAWN: Final = JudgedAnswers(np.zeros(0), np.zeros(0, np.int64))
"""No labels of a draw."""


class LikelyRight(Model):
    """An estimate of which answers are likely right, for a predictor that estimates P(failure).

    1. Every label of the fit is judged by a predictor that was fitted without it (cross-fitted).
    2. Labels of rows that were drawn at random are added (``with_drawn``).
    3. A calibrator from uncertainty to P(failure) is fitted on all these labels.
    4. Rows are likely right up to the largest threshold at which ``widening`` times the mean of
       their probabilities is at most ``max_risk``.

    Attributes:
        max_risk: Largest error rate that is expected among the rows that are likely right.
        widening: Factor of the expected error rate.
        n: Number of cross-fitted labels.
        n_wrong: Number of wrong answers among these labels.
        n_wrong_zero_shot: Number of wrong zero-shot answers to the same labels; None if it was not
            counted.
        uncertainty: (n,) uncertainties of the cross-fitted answers.
        failure: (n,) 1 if a cross-fitted answer is wrong, otherwise 0.
        n_drawn: Number of drawn labels.
        n_drawn_wrong: Number of wrong answers among the drawn labels.
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
        >>> likely.n_wrong, likely.flags_of_new(u).count(True) > 70
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
        cross_fitted = _known(held_out)
        counted = cls(
            max_risk=max_risk,
            widening=WIDENING,
            n=len(cross_fitted.failure),
            n_wrong=int(cross_fitted.failure.sum()),
            uncertainty=tuple(cross_fitted.uncertainty.tolist()),
            failure=tuple(cross_fitted.failure.tolist()),
        )
        return counted.with_drawn(NOTHING_DRAWN, uncertainty)

    def with_drawn(self, drawn: JudgedAnswers, uncertainty: Floats) -> Self:
        """The estimate from the cross-fitted labels and from labels of rows drawn at random.

        Labels to fit on are chosen, so the answers to them need not be wrong as often as other
        answers of the same uncertainty are. Drawn labels are chosen by chance alone.

        Args:
            drawn: The predictor's answers to rows up to some uncertainty. No other property of
                a row may decide whether it was drawn.
            uncertainty: As for ``estimate``.
        """
        new = _known(drawn)
        n_drawn_wrong = int(new.failure.sum())
        update: dict[str, Any] = {"n_drawn": len(new.failure), "n_drawn_wrong": n_drawn_wrong}
        update |= {"probability": None, "threshold": None}
        failure = np.concatenate([np.array(self.failure, np.int64), new.failure])
        if failure.sum() >= LEAST_WRONG:
            all_uncertainties = np.concatenate([np.array(self.uncertainty), new.uncertainty])
            scores = log_odds(all_uncertainties)
            update["probability"] = fit_calibrator(scores, failure, is_log_odds=True)
        estimated = self.model_copy(update=update)
        threshold = estimated.threshold_among(uncertainty)
        return estimated.model_copy(update={"threshold": threshold})

    def threshold_among(self, uncertainty: Floats) -> float | None:
        """Largest of N uncertainties up to which rows are likely right; None if no row is."""
        if self.probability is None:
            return None
        ascending = np.sort(uncertainty[np.isfinite(uncertainty)])
        probability = self.probability(log_odds(ascending))
        # expected error rate of each row together with all rows before it
        expected_risk = np.cumsum(probability) / np.arange(1, len(ascending) + 1)
        # Rows of equal uncertainty are all likely right, or none of them is. So only the last of
        # them may set the threshold. The appended infinity makes the last row of all such a row.
        is_last_of_equals = np.diff(ascending, append=np.inf) > 0
        is_low_risk = self.widening * expected_risk <= self.max_risk
        possible_thresholds = ascending[is_last_of_equals & is_low_risk]
        return float(possible_thresholds[-1]) if len(possible_thresholds) else None

    def flags_by_own_threshold(self, uncertainty: Floats) -> Flags:
        """Whether each of these rows (N,) is likely right, by the threshold of these rows."""
        return self._flags(self.threshold_among(uncertainty), uncertainty)

    def flags_of_new(self, uncertainty: Floats) -> Flags:
        """Whether each of new rows (N,) is likely right, by the saved threshold."""
        return self._flags(self.threshold, uncertainty)

    def _flags(self, threshold: float | None, uncertainty: Floats) -> Flags:
        """Whether each uncertainty (N,) is at most the threshold; all None without an estimate."""
        if self.probability is None:
            return [None] * len(uncertainty)
        if threshold is None:
            return [False] * len(uncertainty)
        flags: Flags = (uncertainty <= threshold).tolist()  # False for NaN
        return flags

    def save(self, folder: Path) -> None:
        """Write ``likely.json`` beside the predictor in a folder."""
        weights_sha256, answer = _weights_and_answer(folder)
        file = _LikelyFile(weights_sha256=weights_sha256, answer=answer, estimate=self)
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
        if (saved.weights_sha256, saved.answer) != _weights_and_answer(folder):
            raise ProvenanceError(
                f"{path} was made for another predictor than the one beside it, so it says nothing "
                f"about its answers. Remove the file, or: {saved.remedy}."
            )
        return saved.estimate


def _known(judged: JudgedAnswers) -> JudgedAnswers:
    """The answers that have an uncertainty, and are known to be right or wrong."""
    is_known = judged.is_known
    return JudgedAnswers(judged.uncertainty[is_known], judged.failure[is_known])


class _LikelyFile(Document):
    """The file ``likely.json``: an estimate, and the predictor and answers that it is about."""

    remedy = "run `vilu triage` into a new folder, with --labels and the labels.parquet of this one"
    error_class = DataError

    kind: Literal["likely"] = "likely"
    weights_sha256: str
    answer: AnswerKind
    estimate: LikelyRight


def _weights_and_answer(folder: Path) -> tuple[str, AnswerKind]:
    """Hash of the weights of a saved predictor, and the kind of answers that it judges."""
    description = read_description(folder / PREDICTOR)
    answer: AnswerKind = description["parameters"].get("answer", "zero_shot")
    return description["weights_sha256"], answer
