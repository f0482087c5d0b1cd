"""A predictor and some embeddings to outcomes."""

from __future__ import annotations

import warnings

import numpy as np

from vilu.decision.apply import Decider
from vilu.errors import DataError
from vilu.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.types import EmbeddingSource
from vilu.validate import STATUS, VALID, RowNumbers


def score(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    *,
    dataset: str | None = None,
    split: str | None = None,
    decider: Decider | None = None,
) -> Outcomes:
    """Uncertainty, zero-shot answer and (where labels are known) failure of every row.

    Rows that cannot be scored keep their place, with a NaN uncertainty and a reason: "nonfinite" or "zero_norm"
    embedding, or "k<2" (one candidate). Of a calibrated predictor the probability of failure is there, too, and with
    a ``decider`` (what ``vilu calibrate`` has left beside the predictor) whether to accept each answer.

    Warns:
        If rows of ``data`` were used to fit the predictor: metrics on them say nothing.

    Raises:
        DataError: If there is no row.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space, or have other candidates than the rows that the
            ``decider`` was calibrated on.
    """
    if not len(data):
        raise DataError("there is nothing to score: the set has no rows.")
    decider = decider or Decider(predictor)
    decider.require_match(data)
    sets: list[str | None] = [None] * len(data)
    uncertainty, prediction, failure = np.full(len(data), np.nan), np.full(len(data), -1), np.full(len(data), -1)
    target = data.target.numpy().copy()
    for batch, scores in predictor.scored(data):
        rows = batch.index.numpy(force=True)
        uncertainty[rows], prediction[rows] = scores, batch.prediction.numpy(force=True)
        failure[rows], target[rows] = batch.failure.numpy(force=True), batch.target.numpy(force=True)
        for row, found in zip(rows.tolist(), decider.label_sets(batch, scores, data.class_names) or (), strict=False):
            sets[row] = found
    reason = [None if code == VALID else STATUS[code] for code in data.status]
    if data.n_candidates < 2:
        reason = ["k<2"] * len(data)
    seen = 0 if predictor.seen_ is None or isinstance(data.ids, RowNumbers) else predictor.seen_.overlap(data.ids)
    if seen:
        warnings.warn(f"{seen} of {len(data)} rows were used to fit this {predictor.name}.", stacklevel=2)
    outcomes = Outcomes(
        uncertainty=uncertainty,
        failure=failure,
        prediction=prediction,
        target=target,
        ids=data.ids,
        class_names=data.class_names,
        method=predictor.label,
        dataset=dataset,
        split=split,
        seed=getattr(predictor, "seed", None),
        reason=reason,
        is_probability=predictor.is_probability,
        provenance={
            "space": data.space.fingerprint,
            "predictor_space": None if predictor.space_ is None else predictor.space_.fingerprint,
            "n_candidates": data.n_candidates,
            "pool_size": data.pool_size,
            "n_seen_in_fit": seen,
            **decider.provenance,
        },
        label_set=sets if any(sets) else None,
    )
    return decider.decide(outcomes)
