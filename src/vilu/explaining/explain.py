"""A predictor and some rows to the reasons behind their scores."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vilu.errors import DataError, UsageError
from vilu.explaining.attribution import Attribution, Attributor, NoAttribution
from vilu.explaining.competition import Weights, leading, weights_of
from vilu.explaining.explanation import Competitor, Explanation, Explanations
from vilu.explaining.games import Scored
from vilu.explaining.neighbours import TrainingRows
from vilu.explaining.rows import Names, find_rows, scored_rows
from vilu.predictors.base import FailurePredictor
from vilu.predictors.free.posterior import log_posterior
from vilu.progress import track
from vilu.types import UNKNOWN, EmbeddingSource
from vilu.validate import RowNumbers


class Depth(NamedTuple):
    """How much is said.

    Attributes:
        candidates: Competitors of an answer.
        neighbours: Training failures, and successes.
        background: Rows that an attribution compares with.
        seed: Of their draw.
    """

    candidates: int = 5
    neighbours: int = 3
    background: int = 128
    seed: int = 0


DEFAULT = Depth()


def explain(
    predictor: FailurePredictor,
    data: EmbeddingSource,
    train: EmbeddingSource | None = None,
    rows: Sequence[int | str] | None = None,
    *,
    n: int = 10,
    depth: Depth = DEFAULT,
) -> Explanations:
    """Why some answers are suspicious: competitors, training rows that look alike, and what moved the score.

    Args:
        predictor: Ready to score.
        data: The rows' source.
        train: Labelled training rows, for the neighbours. Where ``data`` have too few rows that are not explained, the
            attribution's background is drawn from them, too, although they were scored in the fit.
        rows: Row numbers, or keys; None for the ``n`` most uncertain rows.
        n: How many rows where none are chosen.
        depth: How much is said of each.

    Warns:
        If explained rows were used to fit the predictor: their scores say little about new images.

    Raises:
        UsageError: If a number is not positive.
        DataError: If a row does not exist or has no score, or no training row has a label.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the data come from another embedding space.
    """
    if min(n, *depth[:3]) < 1:
        raise UsageError(f"n, candidates, neighbours and background must be positive. Got {n}, {tuple(depth[:3])}.")
    predictor.require_fitted()
    if data.n_candidates < 2:
        raise DataError("with one candidate no other answer was possible, so there is nothing to explain.")
    chosen = most_uncertain(predictor, data, n) if rows is None else find_rows(data, rows)
    if train is not None:
        data.space.require_match(train.space, mine="the data to explain", theirs="the training set")
    attributor, why = _attributor(predictor, data, train, chosen, depth)
    explained = _Explainer(predictor, data, depth, attributor).of(chosen)
    return Explanations(
        rows=tuple(_with_neighbours(explained, data, train, depth)),
        method=predictor.label,
        is_probability=predictor.is_probability,
        weights=weights_of(predictor).meaning,
        unit=None if attributor is None else attributor.game.unit,
        attribution=why,
        neighbours="left out: no training rows given" if train is None else f"of {len(train)} training rows",
        n_seen=_seen(predictor, data, chosen),
    )


def _attributor(
    predictor: FailurePredictor, data: EmbeddingSource, train: EmbeddingSource | None, chosen: Tensor, depth: Depth
) -> tuple[Attributor | None, str]:
    """What attributes, where the method allows it, and a sentence on how, or why not."""
    from_train = train is not None and len(data.usable_rows) - len(chosen) < depth.background
    source, leave_out = (train, chosen[:0]) if train is not None and from_train else (data, chosen)
    try:
        found = Attributor(predictor, source, depth.background, depth.seed, leave_out)
    except NoAttribution as reason:
        return None, f"left out: {reason}"
    whence = f"{found.n_background} {'training' if from_train else 'other'} rows"
    return found, f"Shapley values against {whence}: {found.game.meaning}"


def most_uncertain(predictor: FailurePredictor, data: EmbeddingSource, n: int) -> Tensor:
    """(<= n,) positions of the rows of largest uncertainty, falling; of equal ones the lowest first.

    Raises:
        DataError: If no row has a score.
    """
    uncertainty = predictor.predict_uncertainty(data)
    scored = np.flatnonzero(np.isfinite(uncertainty))
    if not len(scored):
        raise DataError(f"none of the {len(data)} rows has a score to explain.")
    return torch.from_numpy(scored[np.argsort(-uncertainty[scored], kind="stable")[:n]])


class _Explainer:
    """Everything about a row but its neighbours."""

    def __init__(
        self, predictor: FailurePredictor, data: EmbeddingSource, depth: Depth, attributor: Attributor | None
    ) -> None:
        self.predictor, self.data, self.depth, self.attributor = predictor, data, depth, attributor
        self.weights: Weights = weights_of(predictor)
        self.names = Names(data)

    def of(self, rows: Tensor) -> list[tuple[Explanation, Tensor]]:
        """An explanation per row, in their order, with its image (D,)."""
        found: dict[int, tuple[Explanation, Tensor]] = {}
        with track("explain", len(rows), "rows") as task, torch.no_grad():
            for scored in scored_rows(self.predictor, self.data, rows):
                images = scored[0].image.cpu()
                for explanation, image in zip(self._batch(scored), images, strict=True):
                    found[explanation.row] = explanation, image
                task.advance(len(images))
        return [found[row] for row in rows.tolist()]

    def _batch(self, scored: Scored) -> list[Explanation]:
        batch, scores = scored
        posterior = log_posterior(batch).exp().cpu()
        weights = self.weights.of(batch).cpu()
        leaders = zip(*(x.tolist() for x in leading(weights, self.depth.candidates)), strict=True)
        attributions: Sequence[Attribution | None] = (
            [None] * len(scores) if self.attributor is None else self.attributor.of(scored)
        )
        columns = (batch.index.tolist(), batch.prediction.tolist(), batch.target.tolist(), batch.failure.tolist())
        rows = zip(*columns, scores.tolist(), posterior, leaders, attributions, strict=True)
        return [
            Explanation(
                row=row,
                key=self.data.ids[row],
                answer=self.names.of(row, answer),
                posterior=float(p[answer]),
                uncertainty=score,
                truth=None if target == UNKNOWN else self.names.of(row, target),
                wrong=None if failure == UNKNOWN else bool(failure),
                competitors=tuple(
                    Competitor(self.names.of(row, j), weight, float(p[j])) for weight, j in zip(*leading_, strict=True)
                ),
                failures=None,
                successes=None,
                attribution=attribution,
            )
            for row, answer, target, failure, score, p, leading_, attribution in rows
        ]


def _with_neighbours(
    explained: list[tuple[Explanation, Tensor]], data: EmbeddingSource, train: EmbeddingSource | None, depth: Depth
) -> list[Explanation]:
    """The explanations with their neighbours, from one pass over the training rows."""
    explanations = [explanation for explanation, _ in explained]
    if train is None or not explained:
        return explanations
    identified = data is train or not (isinstance(data.ids, RowNumbers) or isinstance(train.ids, RowNumbers))
    images, keys = torch.stack([image for _, image in explained]), [e.key if identified else None for e in explanations]
    near = TrainingRows(train).near(images, keys, depth.neighbours)
    return [
        replace(explanation, failures=tuple(failures), successes=tuple(successes))
        for explanation, (failures, successes) in zip(explanations, near, strict=True)
    ]


def _seen(predictor: FailurePredictor, data: EmbeddingSource, rows: Tensor) -> int:
    """How many rows were used to fit; said aloud."""
    if predictor.seen_ is None or isinstance(data.ids, RowNumbers):
        return 0
    seen = predictor.seen_.overlap(data.ids[row] for row in rows.tolist())
    if seen:
        warnings.warn(
            f"{seen} of {len(rows)} explained rows were used to fit this {predictor.name}: their scores say little "
            "about new images.",
            stacklevel=3,
        )
    return seen
