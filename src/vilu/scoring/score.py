"""Scoring of embeddings by a predictor, in memory or part by part into a folder."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vilu.artifacts.documents import content_digest
from vilu.artifacts.hashing import digest, tensor_hash
from vilu.callers import warn_caller
from vilu.device import torch_defaults
from vilu.embeddings.checks import STATUS_NAMES, VALID
from vilu.embeddings.columns import LOGITS
from vilu.embeddings.pairs import PairSource
from vilu.embeddings.rows import SCORING_BATCH
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.two_models import TwoModels
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.seen import (
    candidates_agree,
    count_in_words,
    describe_candidates,
    rows_to_score,
)
from vilu.predictors.persistence.description import describe, sketch_tensors
from vilu.predictors.persistence.files import SavedModel
from vilu.predictors.plus.ood import SeesOutside
from vilu.progress import Task, track
from vilu.scoring.score_folder import (
    ScoreFolder,
    ScoreLedger,
    ScoreManifest,
    ScorePart,
    ScoreRun,
)
from vilu.store.reader import CaptionStore, EmbeddingStore
from vilu.validation import checked, require_at_least

ROWS_PER_PART = 2**17  # default number of rows in a folder part

logger = logging.getLogger(__name__)


@runtime_checkable
class CalibrationLike(Protocol):
    """The part of ``vilu.Calibration`` that scoring uses.

    This module cannot import the class ``Calibration``, because ``vilu.calibration`` imports this
    module. Therefore this class is a protocol.
    """

    @property
    def fingerprint(self) -> str:
        """Hash of the guarantee. The hash is saved with the scores."""

    @property
    def has_rule(self) -> bool:
        """Whether the calibration decides which answers are accepted."""

    @property
    def needs_batch(self) -> bool:
        """Whether the rule decides only about all rows together, and not about a single row."""

    def require_match(self, predictor: FailurePredictor, data: EmbeddingSource) -> None:
        """Raise an error if the calibration was made for another predictor or other candidates."""

    def sets_of(
        self,
        predictor: FailurePredictor,
        batch: Batch,
        uncertainty: Floats,
        class_names: tuple[str, ...] | None,
    ) -> list[str] | None:
        """Return a batch's label sets, one per row. Return None if there are no label sets."""

    def decide(self, outcomes: Outcomes, ood: NDArray[np.bool_] | None) -> Outcomes:
        """Return the outcomes with a decision for every row.

        ``ood`` (N,) marks the rows that are more probably out of distribution than answered
        wrongly.
        """


class DecidingModel(SavedModel):
    """A predictor with the calibration that decides about the answers.

    ``vilu.Selective`` inherits from this class. ``vilu.selective`` imports this module, so this
    module knows the base class only.
    """

    predictor: FailurePredictor

    @property
    @abstractmethod
    def decides_by(self) -> CalibrationLike | None:
        """Calibration, or None before ``calibrate``."""


def predictor_and_calibration(
    model: FailurePredictor | DecidingModel, calibration: CalibrationLike | None
) -> tuple[FailurePredictor, CalibrationLike | None]:
    """Return the predictor that scores, and the calibration that decides about the scores.

    Raises:
        UsageError: If there are two calibrations.
    """
    if isinstance(model, FailurePredictor):
        return model, calibration
    if calibration is not None:
        raise UsageError(
            "a vilu.Selective decides by its own calibration. Leave calibration out, or give its "
            "predictor: vilu.score(model.predictor, data, calibration=...)."
        )
    return model.predictor, model.decides_by


def require_streaming(calibration: CalibrationLike | None) -> None:
    """Raise UsageError if the rule can only decide about all rows together."""
    if calibration is not None and calibration.needs_batch:
        raise UsageError(
            "conformal selection and rules about clusters judge all rows of a batch together: "
            "there is no decision about one image, nor in a folder of scores, written part by "
            "part. Score into a file, or calibrate with --method ltt and without a cluster risk."
        )


@checked
@torch_defaults()
def score(
    predictor: FailurePredictor | DecidingModel,
    data: EmbeddingSource,
    *,
    dataset: str | None = None,
    split: str | None = None,
    calibration: CalibrationLike | None = None,
) -> Outcomes:
    """Return the uncertainty, answer and failure for every row.

    The failure is known where the label is known. If the predictor is a ``vilu.Selective``, its
    calibration decides. Unscored rows are included, with the uncertainty NaN and a reason:

    - "nonfinite" or "zero_norm": the image embedding cannot be used.
    - "k<2": there are fewer than two candidates.
    - "short_pool": the row is an image-caption pair in the last pool, and this pool is not full.

    If the predictor is calibrated, the outcomes also have failure probabilities. With a
    ``calibration`` the outcomes also have decisions. ``vilu.Calibration.load`` reads the
    calibration from the predictor's folder.

    Warns:
        UserWarning: If some rows in ``data`` were used to fit the predictor. Metrics on these rows
            are meaningless.

    Raises:
        DataError: If there is no row.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space, or if the ``calibration``
            was made for other candidates or for another predictor.

    Examples:
        >>> import numpy as np, vilu
        >>> image = [[1.0, 0.0], [0.6, 0.8], [np.nan, 0.0]]  # the last row cannot be used
        >>> text = np.eye(2)  # two classes
        >>> data = vilu.Embeddings(image, text, target=[0, 0, 1], logit_scale=10.0)
        >>> outcomes = vilu.score(vilu.MCM(), data)
        >>> outcomes.failure.tolist()  # right, wrong, not known
        [0, 1, -1]
        >>> outcomes.uncertainty.round(4).tolist()  # 1 - the largest probability
        [0.0, 0.1192, nan]
        >>> outcomes.reason
        (None, None, 'nonfinite')
    """
    predictor, calibration = predictor_and_calibration(predictor, calibration)
    _check_data(predictor, data, calibration)
    overlap = predictor.seen(data)
    _warn_seen(overlap.in_words(), predictor, len(overlap))
    counts = {"n_seen_in_fit": len(overlap)}
    if len(overlap):
        counts["n_compared_with_fit"] = overlap.n_comparable
    origin_fields = _origin_fields(
        predictor, data, calibration, dataset=dataset, split=split, **counts
    )
    return score_rows(predictor, data, origin_fields, calibration=calibration)


def score_unseen(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    is_unseen: NDArray[np.bool_],
    *,
    dataset: str | None = None,
    split: str | None = None,
) -> Outcomes:
    """Score only the rows in the mask ``is_unseen`` (N,), which were not used in the fit.

    For image-caption pairs all rows are scored first, because pools are made from all rows.
    """
    _check_data(predictor, data, None)
    origin_fields = _origin_fields(
        predictor, data, None, dataset=dataset, split=split, n_seen_in_fit=0
    )
    scored_rows = rows_to_score(data, is_unseen)
    outcomes = score_rows(predictor, data, origin_fields, scored_rows=scored_rows)
    return outcomes.take(is_unseen)


def score_rows(
    predictor: FailurePredictor,
    source: EmbeddingSource,
    origin_fields: dict[str, Any],
    *,
    calibration: CalibrationLike | None = None,
    rows: Ints | None = None,
    scored_rows: Tensor | None = None,
    task: Task | None = None,
) -> Outcomes:
    """Return the outcomes for some rows. The rows to score are read in one pass.

    Args:
        predictor: The predictor.
        source: The embeddings.
        origin_fields: Outcome fields that describe the outcomes' origin (``_origin_fields``).
        calibration: The calibration that decides. With None, the outcomes have no decisions.
        rows: Row indices (M,) in the source, all different. None means all rows.
        scored_rows: Indices (S,) of the rows to score, in scoring order. None means all usable
            rows.
        task: Progress bar to advance. None means a new progress bar.
    """
    indices = np.arange(len(source)) if rows is None else rows
    sorting_order = np.argsort(indices, kind="stable")
    columns = _OutcomeColumns.without_scores(source, indices)
    n_scored = len(source.usable_rows if scored_rows is None else scored_rows)
    progress_bar = track("score", n_scored, "rows") if task is None else nullcontext(task)
    with progress_bar as progress:
        for batch, scores in predictor.scored(source, scored_rows):
            # A row has the same position in the columns as in ``indices``. Bisection in the sorted
            # indices finds the positions of the batch's rows.
            batch_rows = batch.index.numpy(force=True)
            sorted_positions = np.searchsorted(indices, batch_rows, sorter=sorting_order)
            positions = sorting_order[sorted_positions]
            columns.fill(positions, batch, scores)
            if calibration is not None:
                columns.is_ood[positions] = _is_likely_ood(predictor, calibration, batch, scores)
                label_sets = calibration.sets_of(predictor, batch, scores, source.class_names)
                if label_sets is not None:
                    columns.fill_label_sets(positions, label_sets)
            progress.advance(len(positions))
    reasons = _reasons_for_no_score(source, indices, columns.uncertainty, columns.has_one_candidate)
    # The outcomes of all rows always have a reason column. The outcomes of some rows (``rows``)
    # have it only if one of them lacks a score.
    has_reasons = rows is None or any(reasons)
    zero_shot = None
    if predictor.answer != "zero_shot":
        zero_shot = columns.zero_shot
    outcomes = Outcomes(
        uncertainty=columns.uncertainty,
        failure=columns.failure,
        prediction=columns.prediction,
        answer=predictor.answer,
        zero_shot=zero_shot,
        target=columns.target,
        outside=source.outside.numpy()[indices],
        ids=source.ids if rows is None else _ids_of_rows(source, rows, sorting_order),
        class_names=source.class_names,
        picture=source.picture_identities(indices),
        reason=reasons if has_reasons else None,
        label_set=columns.label_set if any(columns.label_set) else None,
        **origin_fields,
    )
    outcomes = _with_columns_of_source(outcomes, source, indices)
    if predictor.calibrator_ is not None:
        probability = predictor.failure_probability(outcomes.uncertainty)
        outcomes = replace(outcomes, failure_probability=probability)
    if calibration is None:
        return outcomes
    return calibration.decide(outcomes, columns.is_ood)


def _with_columns_of_source(outcomes: Outcomes, source: EmbeddingSource, indices: Ints) -> Outcomes:
    """Return the outcomes with the answers and clusters that a source, such as a table, brings.

    ``indices`` (M,) are the row indices in the source.
    """
    if source.data_kind == "answers":
        # A table has only two candidates, "this answer" and "another answer". Which of them is
        # predicted or right says nothing beyond the failures.
        outcomes = replace(outcomes, prediction=None, zero_shot=None, target=None)
    if source.answer_numbers is not None:
        outcomes = replace(outcomes, prediction=source.answer_numbers[indices])
    if source.cluster is not None:
        clusters = [source.cluster[index] for index in indices.tolist()]
        outcomes = replace(outcomes, cluster=clusters)
    return outcomes


@dataclass
class _OutcomeColumns:
    """Outcome columns for N rows, filled batch by batch.

    The value -1 in ``target``, ``prediction``, ``zero_shot`` and ``failure`` means "not known".
    """

    uncertainty: Floats  # NaN for a row without a score
    target: Ints
    prediction: Ints
    zero_shot: Ints
    failure: Ints
    is_ood: NDArray[np.bool_]  # whether "out of distribution" is more likely than "wrong answer"
    has_one_candidate: NDArray[np.bool_]
    label_set: list[str | None]

    @classmethod
    def without_scores(cls, source: EmbeddingSource, indices: Ints) -> _OutcomeColumns:
        """Make the columns for the rows with these indices in the source, without scores."""
        n = len(indices)
        return cls(
            uncertainty=np.full(n, np.nan),
            target=source.target.numpy()[indices],
            prediction=np.full(n, UNKNOWN),
            zero_shot=np.full(n, UNKNOWN),
            failure=np.full(n, UNKNOWN),
            is_ood=np.zeros(n, np.bool_),
            has_one_candidate=np.zeros(n, np.bool_),
            label_set=[None] * n,
        )

    def fill(self, positions: Ints, batch: Batch, scores: Floats) -> None:
        """Write a batch's scores (B,) and answers to the ``positions`` (B,) in the columns."""
        n_candidates = batch.text.shape[-2]  # text is (K, D)
        self.uncertainty[positions] = scores
        self.target[positions] = batch.target.numpy(force=True)
        self.prediction[positions] = batch.prediction.numpy(force=True)
        self.zero_shot[positions] = batch.zero_shot.prediction.numpy(force=True)
        self.failure[positions] = batch.failure.numpy(force=True)
        self.has_one_candidate[positions] = n_candidates < 2

    def fill_label_sets(self, positions: Ints, label_sets: list[str]) -> None:
        """Write a batch's label sets to the ``positions`` (B,) in the columns."""
        for position, label_set in zip(positions.tolist(), label_sets, strict=True):
            self.label_set[position] = label_set


def _is_likely_ood(
    predictor: FailurePredictor, calibration: CalibrationLike, batch: Batch, uncertainty: Floats
) -> NDArray[np.bool_]:
    """Return the mask (B,) of rows more likely out of distribution than answered wrongly.

    ``uncertainty`` is P(failure) = P(outside) + P(wrong answer). So P(outside) > P(wrong answer) is
    equivalent to P(outside) > P(failure) / 2.
    """
    if calibration.has_rule and isinstance(predictor, SeesOutside):
        probability = predictor.outside_probability(batch)
        if probability is not None:
            is_ood: NDArray[np.bool_] = probability.numpy(force=True) > uncertainty / 2
            return is_ood
    return np.zeros(len(uncertainty), np.bool_)


def _check_data(
    predictor: FailurePredictor, data: EmbeddingSource, calibration: CalibrationLike | None
) -> None:
    """Raise an error if the data have no rows, or do not match the calibration.

    Without a calibration, warn if fitted probabilities are used for candidates that differ from the
    candidates in the fit.
    """
    if not len(data):
        raise DataError("there is nothing to score: the set has no rows.")
    if calibration is not None:
        calibration.require_match(predictor, data)
        return
    is_calibrated = predictor.calibrator_ is not None
    has_fitted_probability = predictor.needs_fit and predictor.is_probability
    if is_calibrated or not has_fitted_probability:
        return
    # a fit writes the result of ``describe_candidates`` into the notes
    fit_candidates = predictor.notes_
    data_candidates = describe_candidates(data)
    are_comparable = "n_candidates" in fit_candidates and "n_candidates" in data_candidates
    if are_comparable and not candidates_agree(fit_candidates, data_candidates):
        warn_caller(
            f"this {predictor.name} was fitted on other candidates (classes or prompts) than "
            "these. Its uncertainties still rank the answers, but as probabilities of failure they "
            "are not calibrated here: run `vilu calibrate` on labelled rows with these candidates."
        )


def _origin_fields(
    predictor: FailurePredictor,
    source: EmbeddingSource,
    calibration: CalibrationLike | None,
    *,
    dataset: str | None,
    split: str | None,
    **more_provenance: object,
) -> dict[str, Any]:
    """Return the outcomes' fields that describe their origin, with ``more_provenance`` added."""
    predictor_space = None
    if predictor.space_ is not None:
        predictor_space = predictor.space_.fingerprint
    return {
        "method": predictor.label,
        "dataset": dataset,
        "split": split,
        "seed": getattr(predictor, "seed", None),
        "is_probability": predictor.is_probability,
        "provenance": {
            "space": source.space.fingerprint,
            "predictor_space": predictor_space,
            "n_candidates": source.n_candidates,
            "pool_size": source.pool_size,
            **more_provenance,
            **provenance_of(calibration),
        },
    }


def provenance_of(calibration: CalibrationLike | None) -> dict[str, str]:
    """Return the provenance entry for the calibration, or no entry without a calibration."""
    if calibration is None:
        return {}
    return {"risk": calibration.fingerprint}


def _warn_seen(overlap_text: str, predictor: FailurePredictor, n_seen: int) -> None:
    """Warn if rows were used in the fit. ``overlap_text`` says how many, as "5 of 100 rows"."""
    if n_seen:
        warn_caller(f"{overlap_text} were used to fit this {predictor.name}.")


def _reasons_for_no_score(
    source: EmbeddingSource, rows: Ints, uncertainty: Floats, has_one_candidate: NDArray[np.bool_]
) -> list[str | None]:
    """Return for each row the reason for a missing score, or None for a row with a score.

    ``rows`` (M,) are the row indices in the source. ``uncertainty`` (M,) is NaN for a row without a
    score. ``has_one_candidate`` (M,) marks rows with only one candidate.
    """
    lacks_score = np.isnan(uncertainty)
    if not lacks_score.any():
        return [None] * len(rows)
    if source.n_candidates < 2:
        return ["k<2"] * len(rows)
    reasons: list[str | None] = [None] * len(rows)
    positions_without_score = np.flatnonzero(lacks_score)
    for position in positions_without_score.tolist():
        status = int(source.status[rows[position]])
        if has_one_candidate[position]:
            reasons[position] = "k<2"
        elif status == VALID:  # the embedding is usable, so only the pool can be at fault
            reasons[position] = "short_pool"
        else:
            reasons[position] = STATUS_NAMES[status]
    return reasons


def _ids_of_rows(source: EmbeddingSource, rows: Ints, sorting_order: Ints) -> list[str]:
    """Return the identifiers for the rows ``rows`` (M,), in the order of ``rows``.

    ``rows[sorting_order]`` is ascending. Identifiers are looked up in ascending row order, because
    a store reads identifiers part by part.
    """
    if not len(rows):
        return []
    ascending_rows = rows[sorting_order]
    first_row = int(ascending_rows[0])
    last_row = int(ascending_rows[-1])
    are_consecutive = last_row - first_row + 1 == len(rows)
    if not are_consecutive:
        id_of_row = {row: source.ids[row] for row in ascending_rows.tolist()}
        return [id_of_row[row] for row in rows.tolist()]
    # most parts have consecutive rows, so one slice reads all identifiers in the part
    ids = list(source.ids[first_row : last_row + 1])
    if np.array_equal(rows, ascending_rows):
        return ids
    return [ids[row - first_row] for row in rows.tolist()]


@checked
@torch_defaults()
def score_parts(
    predictor: FailurePredictor | DecidingModel,
    source: EmbeddingSource,
    folder: str | Path,
    *,
    rows_per_part: int = ROWS_PER_PART,
    dataset: str | None = None,
    split: str | None = None,
    overwrite: bool = False,
    calibration: CalibrationLike | None = None,
) -> ScoreFolder:
    """Score a source with any number of rows, part by part, and write the scores to a folder.

    The values are equal to the values from ``vilu.score`` on the same machine. Every file is
    written atomically. Each part has three files:

    1. The row outcomes, in Parquet, for ``Outcomes.load``. The column ``row_id`` has each row's
       index in the source.
    2. The counts of correct and wrong answers, for evaluating the whole folder.
    3. A receipt. The receipt is written last.

    If a run is interrupted, the next run makes the missing parts. Then the files in the folder are
    the same as without the interruption.

    Rows are in scoring order, which is the order in ``source.usable_rows``. Unscored rows come
    after them, in separate parts, with the same reasons as in ``vilu.score``.

    Args:
        predictor: The predictor, or a ``vilu.Selective``, which also decides.
        source: The embeddings to score.
        folder: A new or empty folder, or the folder of the same run.
        rows_per_part: Number of rows in a part, rounded to whole pools or batches. The scores do
            not depend on this number.
        dataset: Data set name.
        split: Split name.
        overwrite: Whether to remove scores from another run.
        calibration: As for ``score``. Without a calibration, the scores have no decisions.

    Warns:
        UserWarning: If some rows in ``source`` were used to fit the predictor.

    Raises:
        DataError: If there is no row.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space, or if the folder holds
            scores from another run.
        UsageError: If the folder holds foreign files, if ``rows_per_part`` is less than 1, or if
            the rule judges all rows in a batch together.
        BusyError: If another process is scoring into the folder.
        StorageError: If the folder cannot be written.

    Examples:
        >>> import numpy as np, tempfile, vilu
        >>> text = np.eye(2)
        >>> image = text[[0, 1] * 100]  # the model answers 0, 1, 0, 1, ...
        >>> target = np.zeros(200, int)  # so every second answer is wrong
        >>> data = vilu.Embeddings(image, text, target=target)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scores = vilu.score_parts(vilu.MCM(), data, folder)
        ...     print(scores.counts.n_scored, scores.counts.n_failures)
        200 100
    """
    predictor, calibration = predictor_and_calibration(predictor, calibration)
    folder_path = Path(folder)
    ScoreLedger.check_folder(folder_path, overwrite=overwrite)
    _check_data(predictor, source, calibration)
    predictor.require_fitted()
    require_streaming(calibration)
    origin_fields = _origin_fields(predictor, source, calibration, dataset=dataset, split=split)
    run = _describe_run(predictor, source, origin_fields, rows_per_part)
    ledger = ScoreLedger(folder_path, run)
    with ledger.lock_folder(ledger.root):
        ledger.resume(overwrite=overwrite)
        missing_parts, _ = ledger.check_parts()
        if missing_parts:
            ledger.unseal()
            _score_missing_parts(
                ledger, missing_parts, predictor, source, origin_fields, calibration
            )
        else:
            logger.info("%s is complete: there is nothing to do", folder)
        ledger.seal(ScoreManifest.of(ledger.run, ledger.receipts()))
    return _open_and_warn(ledger.root, predictor, len(source))


def _describe_run(
    predictor: FailurePredictor,
    source: EmbeddingSource,
    origin_fields: dict[str, Any],
    rows_per_part: int,
) -> ScoreRun:
    """Return a description for a run of ``score_parts``: predictor, data and settings."""
    scored_rows, _ = _scored_and_unscored(source)
    return ScoreRun(
        predictor=predictor_fingerprint(predictor),
        source=source_fingerprint(source),
        n_in=len(source),
        n_candidate=len(scored_rows),
        rows_per_part=_rounded_rows_per_part(rows_per_part, source.pool_size),
        answer=predictor.answer,
        **origin_fields,
    )


def _score_missing_parts(
    ledger: ScoreLedger,
    missing_parts: list[ScorePart],
    predictor: FailurePredictor,
    source: EmbeddingSource,
    origin_fields: dict[str, Any],
    calibration: CalibrationLike | None,
) -> None:
    """Score and write the ``missing_parts`` of a folder.

    ``origin_fields`` are the outcome fields that describe the outcomes' origin.
    """
    all_scored_rows, all_unscored_rows = _scored_and_unscored(source)
    n_scored = len(all_scored_rows)
    is_seen = predictor.seen(source).shared
    n_rows = sum(len(part) for part in missing_parts)
    with track("score", n_rows, "rows") as task:
        for part in missing_parts:
            scored_rows = all_scored_rows[part.start : part.stop]
            rows = scored_rows.numpy()
            if not len(scored_rows):  # this part begins after all rows to score
                rows = all_unscored_rows[part.start - n_scored : part.stop - n_scored]
            outcomes = score_rows(
                predictor,
                source,
                origin_fields,
                calibration=calibration,
                rows=rows,
                scored_rows=scored_rows,
                task=task,
            )
            n_seen = int(is_seen[rows].sum())  # rows used in the fit
            ledger.write_part(part, rows, outcomes, n_seen)
            # ``score_rows`` has already reported the scored rows to the progress bar
            task.advance(len(part) - len(scored_rows))


def _open_and_warn(folder: Path, predictor: FailurePredictor, n_rows: int) -> ScoreFolder:
    """Open a complete score folder, and warn if some rows in the folder were used in the fit."""
    scores = ScoreFolder(folder)
    n_seen = scores.counts.n_seen
    # If all rows used in the fit can be recognised, the number is exact. Else it is "at least".
    is_complete = all(sketch.is_complete for sketch in predictor.seen_.values())
    count = count_in_words(n_seen, n_rows, "rows", is_complete=is_complete)
    _warn_seen(count, predictor, n_seen)
    return scores


def _rounded_rows_per_part(rows_per_part: int, pool_size: int | None) -> int:
    """Return the rows per part, in whole pools (rounded down) or whole batches (rounded up)."""
    require_at_least("rows_per_part", rows_per_part, 1)
    if pool_size:
        return max(rows_per_part // pool_size, 1) * pool_size
    n_batches = math.ceil(rows_per_part / SCORING_BATCH)
    return n_batches * SCORING_BATCH


def _scored_and_unscored(source: EmbeddingSource) -> tuple[Tensor, Ints]:
    """Return the rows to score, in scoring order, and the rows without a score.

    Both results are row indices in the source.
    """
    scored_rows = source.usable_rows
    if source.pool_size:  # a last pool that is not full gets no scores
        n_pools = len(scored_rows) // source.pool_size
        scored_rows = scored_rows[: n_pools * source.pool_size]
    is_unscored = np.ones(len(source), dtype=np.bool_)
    is_unscored[scored_rows.numpy()] = False
    return scored_rows, np.flatnonzero(is_unscored)


N_SAMPLED_ROWS = 256  # number of embeddings in a source's fingerprint


def predictor_fingerprint(predictor: FailurePredictor) -> str:
    """Hash a predictor and the weights. The hash does not depend on the vilu version."""
    tensors = predictor.state() | sketch_tensors(predictor)
    weights = {}
    for name, tensor in tensors.items():
        weights[name] = [str(tensor.dtype), list(tensor.shape), tensor_hash(tensor)]
    description = {**describe(predictor), "weights": weights}
    return content_digest(description)


def source_fingerprint(source: EmbeddingSource) -> str:
    """Hash a source's shape, labels, order, store and a sample of the rows.

    Only a sample of the embeddings is hashed, because a hash over all embeddings would need a
    second pass over the data. The sample is 256 rows, evenly spaced over the usable rows. The hash
    also covers the candidates for the first usable row (for pairs, the first pool), and the
    identifiers of the first and the last sampled row.
    """
    rows = source.usable_rows
    stored_source = source.first if isinstance(source, TwoModels) else source
    sample = _evenly_spaced(rows, N_SAMPLED_ROWS)
    n_in_pool = source.pool_size or 1
    first_pool = rows[:n_in_pool]  # in a source with classes, only the first usable row
    has_candidates = source.n_candidates > 0 and len(first_pool) >= n_in_pool
    status = torch.from_numpy(np.asarray(source.status))
    facts: dict[str, Any] = {
        "content": source.fingerprint,
        "space": source.space.fingerprint,
        "n": len(source),
        "n_candidates": source.n_candidates,
        "class_names": source.class_names,
        "pool_size": source.pool_size,
        "pools": None,
        "columns": sorted(source.columns),
        "target": tensor_hash(source.target),
        "status": tensor_hash(status),
        "order": tensor_hash(rows),
        "ids": [],
        "images": tensor_hash(source.image_rows(sample)),
        "texts": None,
    }
    if not source.has_texts:
        logits = source.column(LOGITS, sample)
        facts["logits"] = tensor_hash(logits.contiguous())
    if isinstance(stored_source, EmbeddingStore | CaptionStore):
        facts["content"] = stored_source.manifest.content
    if source.second is not None:
        facts["second"] = source_fingerprint(source.second)
    if isinstance(source, PairSource):
        facts["pools"] = asdict(source.pools)
    if source.outside.any():
        facts["outside"] = tensor_hash(source.outside)
    if len(sample):
        first_row = int(sample[0])
        last_row = int(sample[-1])
        facts["ids"] = [source.ids[first_row], source.ids[last_row]]
    if has_candidates:
        facts["texts"] = tensor_hash(source.candidates(first_pool).text)
    return digest(facts)


def _evenly_spaced(rows: Tensor, max_rows: int) -> Tensor:
    """Return at most ``max_rows`` of the rows, evenly spaced."""
    n_sampled = min(max_rows, len(rows))
    spaced_numbers = np.linspace(0, len(rows) - 1, n_sampled).round()
    positions = spaced_numbers.astype(np.int64)
    return rows[torch.from_numpy(positions)]
