"""The contract of every failure predictor."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from vilu.device import resolve_device
from vilu.embeddings.checks import RowNumbers
from vilu.embeddings.columns import HOW
from vilu.embeddings.source import UNKNOWN, Batch, EmbeddingSource
from vilu.embeddings.source import log_posterior as zero_shot_log_posterior
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, NotFittedError, UsageError
from vilu.metrics.counts import real_vector
from vilu.predictors.nn.train import SCORING_BATCH
from vilu.predictors.parameters import check_parameters
from vilu.predictors.probability import Calibrator, fit_calibrator
from vilu.predictors.rows import RowSketch

CERTAIN = 1e-15
"""Probabilities nearer to 0 or 1 than this count as this far away, so that their log-odds are finite."""


@dataclasses.dataclass
class Calibrated:
    """A score that can be brought to a probability.

    Attributes:
        name: Of the method.
        is_probability: Whether the uncertainty estimates P(failure).
        calibrator_: From uncertainty to P(failure), learned on calibration rows; None without.
    """

    name: ClassVar[str]
    is_probability: ClassVar[bool] = False

    calibrator_: Calibrator | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """P(failure) (N,) float64 of uncertainties (N,) of this predictor; NaN stays NaN.

        Calibrated, where ``calibrate`` was called; else of methods whose uncertainty is a probability, without the bias
        of a weighted loss (``_log_weight``).

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale, and it has not been calibrated.
        """
        if self.calibrator_ is None:
            return self.raw_failure_probability(uncertainty)
        return self.calibrator_(self._calibration_score(real_vector(uncertainty, "uncertainty")))

    def raw_failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """As ``failure_probability`` before ``calibrate``.

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale.
        """
        if not self.is_probability:
            raise UsageError(
                f"{self.name} gives a score, not a probability of failure. Calibrate it (`vilu calibrate`), or take "
                "vilu_plus."
            )
        score = self._calibration_score(real_vector(uncertainty, "uncertainty"))
        probability: NDArray[np.float64] = special.expit(score)
        return probability

    def calibrate_scores(self, uncertainty: ArrayLike, failure: ArrayLike) -> Self:
        """As ``calibrate``, from uncertainties (N,) of this predictor and failures (N,); unknown ones are left out.

        Raises:
            DataError: If no row has both.
        """
        scores, failures = real_vector(uncertainty, "uncertainty"), real_vector(failure, "failure")
        known = np.isfinite(scores) & (failures != UNKNOWN)
        if not known.any():
            raise DataError(f"none of the {len(scores)} calibration rows has an uncertainty and a known failure.")
        score = self._calibration_score(scores[known])
        self.calibrator_ = fit_calibrator(score, failures[known].astype(np.int64), is_log_odds=self.is_probability)
        return self

    def _calibration_score(self, uncertainty: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds without the bias of the loss where the uncertainty is a probability, else the uncertainty itself."""
        if not self.is_probability:
            return uncertainty
        log_odds: NDArray[np.float64] = special.logit(np.clip(uncertainty, CERTAIN, 1 - CERTAIN)) - self._log_weight()
        return log_odds

    def _log_weight(self) -> float:
        """What a weighted loss adds to the log-odds of failure."""
        return 0.0


SIMILARITY_ROWS = 100


@dataclasses.dataclass
class FailurePredictor(Calibrated, ABC):
    """Says per image how likely the zero-shot answer is wrong, from embeddings alone.

    A subclass is a dataclass of hyper-parameters. What ``fit`` finds ends in an underscore. Higher uncertainty means
    more likely wrong.

    Attributes:
        name: Key in ``vilu.PREDICTORS``.
        summary: One line for ``vilu list predictors``.
        reference: Where the method comes from, in a few words.
        cost: What fitting and scoring cost, in a few words.
        needs_fit: Whether scores need labels first.
        columns: What the data must carry beside the embeddings (``vilu.embeddings.columns``).
        optional_columns: What it makes use of where the data carry all of it.
        no_captions: Why it cannot work on image-caption pairs; None where it can.
        closed_set: Whether it scores the classes that it was fitted on and no others.
        space_: Embedding space of the training data; None when never fitted.
        seen_: Sketch of the identifiers of the rows used by ``fit``; None when they had none.
        similarity_: Mean and standard deviation of the largest cosine of training rows; None when never fitted.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    cost: ClassVar[str] = "none"
    needs_fit: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    no_captions: ClassVar[str | None] = None
    closed_set: ClassVar[bool] = False
    space_: EmbeddingSpace | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    seen_: RowSketch | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    similarity_: tuple[float, float] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    notes_: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def fit(self, train: EmbeddingSource, validation: EmbeddingSource | None = None) -> Self:  # noqa: ARG002
        """Learn from labelled embeddings; a score that needs no labels only remembers the space.

        Args:
            train: Rows to learn from.
            validation: Rows to select on; a learned predictor without them holds out a part of ``train``.

        Raises:
            UsageError: If the data are image-caption pairs and the method does not work on them.
            DataError: If the data lack a column that the method needs.
        """
        self._check_source(train, self.columns_to_fit(train))
        self.space_, self.calibrator_ = train.space, None
        return self

    @property
    def label(self) -> str:
        """What its scores and results are called: the name, and the kind of fit where a method has several."""
        return self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """Where its code is; with what these import, it decides every score."""
        return (type(self).__module__,)

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:  # noqa: ARG002 - some look at what there is
        """What these data must carry for a fit."""
        return self.columns

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """What data must carry to be scored."""
        return self.columns

    @property
    def device_(self) -> torch.device:
        """Where scores are computed."""
        return resolve_device(getattr(self, "device", "cpu"))

    def predict_uncertainty(self, data: EmbeddingSource) -> NDArray[np.float64]:
        """Uncertainty (N,) float64 of every row, higher = more likely wrong.

        NaN where the embedding is not usable (``data.status``), and everywhere when there is only one candidate,
        since no other answer was possible.

        Raises:
            NotFittedError: If the predictor needs ``fit`` first.
            ProvenanceError: If the data come from another embedding space than the training data.
            UsageError: If a hyper-parameter is out of range, or the method does not work on image-caption pairs.
            DataError: If the data lack a column that the method needs.
        """
        uncertainty = np.full(len(data), np.nan)
        for batch, scores in self.scored(data):
            uncertainty[batch.index.numpy(force=True)] = scores
        return uncertainty

    def scored(self, data: EmbeddingSource, rows: Tensor | None = None) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        """Batches of the ``rows`` (by default all usable ones) on ``device_``, each with its uncertainty (B,) float64.

        Nothing as large as the data is held, so the data may be of any size. A batch keeps the zero-shot answer that
        the score has computed.

        Raises:
            DataError: If a score is not finite, or as ``predict_uncertainty``, whose other errors it raises, too.
        """
        self._check_ready(data)
        device = self.device_
        for found in data.batches(SCORING_BATCH, rows=rows, columns=self.columns_to_score):
            batch = found.to(device)
            if data.n_candidates < 2:
                yield batch, np.full(len(batch.index), np.nan)
                continue
            with torch.no_grad():
                score = self._uncertainty(batch).cpu().double().numpy()
            broken = int(np.count_nonzero(~np.isfinite(score)))
            if broken:
                raise DataError(
                    f"{self.name} gave {broken} scores that are not finite: its weights are damaged. Refit it."
                )
            yield batch, score

    def predict_failure_probability(self, data: EmbeddingSource) -> NDArray[np.float64]:
        """P(failure) (N,) float64 of every row; see ``failure_probability``. Else as ``predict_uncertainty``.

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale, and it has not been calibrated.
        """
        if self.calibrator_ is None and not self.is_probability:
            self.raw_failure_probability([])  # says why not, before anything is computed
        return self.failure_probability(self.predict_uncertainty(data))

    def log_posterior(self, batch: Batch) -> Tensor:
        """(B, K) float64 log probabilities of the candidates: the method's own, where it has some, or zero-shot."""
        return zero_shot_log_posterior(batch)

    def calibrate(self, calibration: EmbeddingSource) -> Self:
        """Learn the probability of failure on labelled rows that were not used to fit. Uncertainties stay as they are.

        Raises:
            DataError: If rows were used to fit, or none has an uncertainty and a known failure.
        """
        self.refuse_seen(calibration, "calibration")
        uncertainty, failure = np.full(len(calibration), np.nan), np.full(len(calibration), UNKNOWN)
        for batch, scores in self.scored(calibration):
            rows = batch.index.numpy(force=True)
            uncertainty[rows], failure[rows] = scores, batch.failure.numpy(force=True)
        return self.calibrate_scores(uncertainty, failure)

    def refuse_seen(self, data: EmbeddingSource, role: str) -> None:
        """Refuse rows that were used to fit, as far as they are known: up to 16,384 all, of more a sample of so many.

        Raises:
            DataError: If there are some; how many are known.
        """
        seen = 0 if self.seen_ is None or isinstance(data.ids, RowNumbers) else self.seen_.overlap(data.ids)
        if seen:
            raise DataError(
                f"at least {seen} of the {len(data)} {role} rows were used to fit this {self.name}: it knows their "
                "answers, so nothing measured on them holds for others. Take rows that it has not seen."
            )

    def require_fitted(self) -> None:
        """Refuse to go on without ``fit``, where it is needed."""
        if self.needs_fit and self.space_ is None:
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet. Call fit, or vilu.load a saved one.")

    def _check_source(self, data: EmbeddingSource, columns: Sequence[str]) -> None:
        if self.no_captions is not None and data.pool_size is not None:
            raise UsageError(f"{self.name} does not work on image-caption pairs: {self.no_captions}.")
        for column in columns:
            if column not in data.columns:
                raise DataError(f"{self.name} needs the column {column!r}. Make it with `{HOW[column]}`.")

    def _check_ready(self, data: EmbeddingSource) -> None:
        check_parameters(self)
        self._check_source(data, self.columns_to_score)
        self.require_fitted()
        if self.space_ is None:
            return
        self.space_.require_match(data.space, mine=f"the fitted {self.name}", theirs="the data to score")
        if self.similarity_ and (self.space_.anonymous or data.space.anonymous):
            self._check_similarity(data)

    def _check_similarity(self, data: EmbeddingSource) -> None:
        """Without provenance, the largest cosines are all that can tell a foreign space of the same width."""
        if data.n_candidates < 2 or not len(data.usable_rows) or self.similarity_ is None:
            return
        found, _ = similarity_range(data)
        mean, deviation = self.similarity_
        if abs(found - mean) > 4 * deviation:
            warnings.warn(
                f"the largest cosine of a row is {found:.3f} on average here and was {mean:.3f} ± {deviation:.3f} in "
                "training: are these embeddings from another model? They carry no provenance to check.",
                stacklevel=5,
            )

    @abstractmethod
    def _uncertainty(self, batch: Batch) -> Tensor:
        """(B,) uncertainty of a batch, float32 or better, on any device."""

    def save(self, folder: str | Path) -> str:
        """Write to a folder and return the fingerprint (see ``vilu.predictors.storage``)."""
        from vilu.predictors import storage

        return storage.save(self, folder)

    def state(self) -> dict[str, Tensor]:
        """Everything that ``fit`` learned, as tensors."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``; must refuse tensors of the wrong names or shapes."""
        if state:
            raise DataError(f"{self.name} has no weights, but the file holds {', '.join(sorted(state)[:5])}.")


def similarity_range(data: EmbeddingSource) -> tuple[float, float]:
    """Mean and standard deviation, over the first 100 usable rows, of the largest cosine with a candidate."""
    rows = data.usable_rows[: max(SIMILARITY_ROWS, data.pool_size or 0)]
    batch = next(data.batches(SIMILARITY_ROWS, rows=rows))
    best = (batch.image @ batch.text.T).amax(dim=1)
    return float(best.mean()), max(float(best.std()) if len(best) > 1 else 0.0, 1e-3 * math.sqrt(len(best)))
