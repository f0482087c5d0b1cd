"""A predictor and some embeddings to outcomes."""

from __future__ import annotations

import warnings

import numpy as np

from vilu.errors import DataError
from vilu.nn.train import SCORING_BATCH
from vilu.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.types import EmbeddingSource
from vilu.validate import STATUS, VALID, RowNumbers


def score(
    predictor: FailurePredictor, data: EmbeddingSource, *, dataset: str | None = None, split: str | None = None
) -> Outcomes:
    """Uncertainty, zero-shot answer and (where labels are known) failure of every row.

    Rows that cannot be scored keep their place, with a NaN uncertainty and a reason: "nonfinite" or "zero_norm"
    embedding, or "k<2" (one candidate).

    Warns:
        If rows of ``data`` were used to fit the predictor: metrics on them say nothing.

    Raises:
        DataError: If there is no row.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space.
    """
    if not len(data):
        raise DataError("there is nothing to score: the set has no rows.")
    uncertainty = predictor.predict_uncertainty(data)
    prediction, target = np.full(len(data), -1), data.target.numpy().copy()
    failure = np.full(len(data), -1)
    for batch in data.batches(SCORING_BATCH):
        rows = batch.index.numpy()
        prediction[rows], failure[rows] = batch.prediction.numpy(), batch.failure.numpy()
        target[rows] = batch.target.numpy()
    reason = [None if code == VALID else STATUS[code] for code in data.status]
    if data.n_candidates < 2:
        reason = ["k<2"] * len(data)
    seen = 0 if predictor.seen_ is None or isinstance(data.ids, RowNumbers) else predictor.seen_.overlap(data.ids)
    if seen:
        warnings.warn(f"{seen} of {len(data)} rows were used to fit this {predictor.name}.", stacklevel=2)
    return Outcomes(
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
        },
    )
