"""Predictor and embeddings to outcomes, in memory or part by part."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vilu.decision.apply import Decider
from vilu.decision.score_folder import (
    MANIFEST,
    Counts,
    Manifest,
    Part,
    Receipt,
    Run,
    ScoreFolder,
    begin,
    claim,
    histogram_bytes,
    read_receipt,
    unseal,
)
from vilu.embeddings.checks import STATUS, VALID, RowNumbers
from vilu.embeddings.pairs import PairSource
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import digest
from vilu.errors import DataError, ProvenanceError, StorageError, UsageError
from vilu.files import parquet_bytes, write_json
from vilu.metrics.counts import Floats, Ints
from vilu.metrics.histogram import Histogram
from vilu.outcomes.outcomes import UNKNOWN, Outcomes
from vilu.predictors.base import FailurePredictor
from vilu.predictors.nn.train import SCORING_BATCH
from vilu.predictors.record import describe
from vilu.progress import track
from vilu.store.parts import write_hashed
from vilu.store.reader import CaptionStore, EmbeddingStore


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


SAMPLED = 256
"""Rows whose embeddings are part of the fingerprint of a source."""


def predictor_fingerprint(predictor: FailurePredictor) -> str:
    """Hash of everything that ``save`` would write, without a copy of the weights."""
    tensors = dict(predictor.state())
    if predictor.seen_ is not None:
        tensors["seen"] = predictor.seen_.hashes
    weights = {name: [str(t.dtype), list(t.shape), _hash(t)] for name, t in tensors.items()}
    return digest({**describe(predictor), "weights": weights})


def source_fingerprint(source: EmbeddingSource) -> str:
    """Hash of a source: the seal of a store, its shape, its labels, the order of its rows, and a sample of them.

    Hashing every embedding would read all data twice. The sample is 256 rows, evenly spaced over the usable ones, with
    the candidates of the first of them (of the first pool) and two identifiers.
    """
    rows = source.usable_rows
    places = np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).round().astype(np.int64)
    sample = rows[torch.from_numpy(places)]
    pool = rows[: source.pool_size or 1]
    whole = source.n_candidates > 0 and len(pool) >= (source.pool_size or 1)
    return digest(
        {
            "content": source.manifest.content if isinstance(source, EmbeddingStore | CaptionStore) else None,
            "space": source.space.fingerprint,
            "n": len(source),
            "n_candidates": source.n_candidates,
            "class_names": source.class_names,
            "pool_size": source.pool_size,
            "pools": asdict(source.pools) if isinstance(source, PairSource) else None,
            "columns": sorted(source.columns),
            "target": _hash(source.target),
            "status": _hash(torch.from_numpy(np.asarray(source.status))),
            "order": _hash(rows),
            "ids": [source.ids[int(row)] for row in (sample[:1], sample[-1:]) if len(row)],
            "images": _hash(source.image_rows(sample)),
            "texts": _hash(source.candidates(pool).text) if whole else None,
        }
    )


def _hash(tensor: Tensor) -> str:
    """Of the numbers, block by block: what repeats one number for all rows is never written out."""
    found = hashlib.blake2b(digest_size=16)
    for block in (
        tensor.detach().cpu().reshape(len(tensor) if tensor.ndim else 1, math.prod(tensor.shape[1:])).split(2**20)
    ):
        found.update(block.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


ROWS_PER_PART = 2**17


def score_parts(
    predictor: FailurePredictor,
    source: EmbeddingSource,
    folder: str | Path,
    *,
    rows_per_part: int = ROWS_PER_PART,
    dataset: str | None = None,
    split: str | None = None,
    overwrite: bool = False,
    decider: Decider | None = None,
) -> ScoreFolder:
    """Score embeddings of any size into a folder; the same values as ``vilu.score`` on the same machine.

    A part is a Parquet file of the rows (``Outcomes.load`` reads it; ``row_id`` is the place in the source), the counts
    from which the whole is evaluated, and last a receipt, each written atomically. Run again after a kill it does the
    missing parts, and the folder ends with the same bytes. Rows are in the order in which they are scored
    (``source.usable_rows``, whose pools are the problem). Those that cannot be scored come after them, in parts of
    their own: null, with the reason "nonfinite", "zero_norm", or "short_pool" (they fill no last pool); with one
    candidate every row has the reason "k<2".

    Args:
        predictor: What scores.
        source: What is scored.
        folder: New, empty, or of the same run.
        rows_per_part: Rows of a part. Rounded to whole pools, or up to whole batches of scoring, so that no value
            depends on it.
        dataset: Name of the data set.
        split: Name of its part.
        overwrite: Remove the scores of another run.
        decider: What ``vilu calibrate`` has left beside the predictor; by default its calibrator alone.

    Warns:
        If rows of ``source`` were used to fit the predictor.

    Raises:
        DataError: If there is no row.
        NotFittedError: If the predictor needs ``fit`` first.
        ProvenanceError: If the folder holds another run, or the data come from another embedding space.
        UsageError: If the folder holds something else, or ``rows_per_part`` is less than 1, or the rule needs all
            rows at once.
        BusyError: If another process scores into it.
        StorageError: If the file system refuses.
    """
    if not len(source):
        raise DataError("there is nothing to score: the set has no rows.")
    predictor.require_fitted()
    decider = decider or Decider(predictor)
    decider.require_match(source)
    decider.require_streaming()
    work = _Work.of(decider, source, rows_per_part, (dataset, split))
    root = Path(folder)
    with claim(root):
        begin(root, work.run, overwrite=overwrite)
        missing = [part for part in work.run.parts if not _is_there(root, work.run, part)]
        if missing:
            unseal(root)
        with track("scoring", sum(map(len, missing)), "row") as task:
            for part in missing:
                work.write(root, part)
                task.advance(len(part))
        receipts = [read_receipt(root, work.run, part) for part in work.run.parts]
        write_json(root / MANIFEST, Manifest.of(work.run, receipts).model_dump(mode="json"))
    done = ScoreFolder(root)
    if done.counts.n_seen:
        warnings.warn(
            f"{done.counts.n_seen} of {len(source)} rows were used to fit this {predictor.name}.", stacklevel=2
        )
    return done


@dataclass(frozen=True)
class _Work:
    """A run with what it is made from; ``rows`` are scored, ``rest`` are not."""

    run: Run
    decider: Decider
    source: EmbeddingSource
    rows: Tensor
    rest: Ints

    @property
    def predictor(self) -> FailurePredictor:
        return self.decider.predictor

    @classmethod
    def of(
        cls, decider: Decider, source: EmbeddingSource, rows_per_part: int, names: tuple[str | None, str | None]
    ) -> _Work:
        predictor, (dataset, split) = decider.predictor, names
        if rows_per_part < 1:
            raise UsageError(f"rows_per_part must be at least 1. Got {rows_per_part} instead.")
        unit = source.pool_size or SCORING_BATCH
        units = rows_per_part // unit if source.pool_size else -(-rows_per_part // unit)
        rows = source.usable_rows
        if source.pool_size:
            rows = rows[: len(rows) // unit * unit]
        left_out = np.ones(len(source), dtype=np.bool_)
        left_out[rows.numpy()] = False
        run = Run(
            predictor=predictor_fingerprint(predictor),
            source=source_fingerprint(source),
            n_in=len(source),
            n_candidate=len(rows),
            rows_per_part=max(units, 1) * unit,
            method=predictor.label,
            dataset=dataset,
            split=split,
            seed=getattr(predictor, "seed", None),
            is_probability=predictor.is_probability,
            provenance={
                "space": source.space.fingerprint,
                "predictor_space": None if predictor.space_ is None else predictor.space_.fingerprint,
                "n_candidates": source.n_candidates,
                "pool_size": source.pool_size,
                **decider.provenance,
            },
        )
        return cls(run, decider, source, rows, np.flatnonzero(left_out))

    def write(self, root: Path, part: Part) -> None:
        """Score the rows of a part and write its files, the receipt last."""
        row_id, outcomes = self._outcomes(part)
        known = outcomes.evaluable
        files = {
            part.scores: parquet_bytes(*outcomes.table(row_id)),
            part.histogram: histogram_bytes(Histogram.of(outcomes.uncertainty[known], outcomes.failure[known])),
        }
        scored = np.isfinite(outcomes.uncertainty)
        seen, ids = self.predictor.seen_, self.source.ids
        counts = Counts(
            n_in=len(row_id),
            n_scored=int(scored.sum()),
            n_failures=int(outcomes.failure[known].sum()),
            n_unlabelled=int((scored & ~known).sum()),
            unscored=dict(sorted(Counter(text for text in outcomes.reason or () if text).items())),
            n_seen=0 if seen is None or isinstance(ids, RowNumbers) else seen.overlap(outcomes.ids or ()),
        )
        receipt = Receipt(
            fingerprint=self.run.fingerprint,
            part=part,
            counts=counts,
            files={name: write_hashed(root / name, content) for name, content in files.items()},
        )
        write_json(root / part.receipt, receipt.model_dump(mode="json"))

    def _outcomes(self, part: Part) -> tuple[Ints, Outcomes]:
        """Rows of the source and what is said of them."""
        sets: list[str | None] | None = None
        if part.start < len(self.rows):
            (rows, uncertainty, failure, prediction, target), sets = self._scored(self.rows[part.start : part.stop])
        else:
            rows = self.rest[part.start - len(self.rows) : part.stop - len(self.rows)]
            uncertainty, failure = np.full(len(rows), np.nan), np.full(len(rows), UNKNOWN)
            prediction, target = failure, self.source.target.numpy()[rows]
        outcomes = Outcomes(
            uncertainty=uncertainty,
            failure=failure,
            prediction=prediction,
            target=target,
            ids=_keys(self.source, rows),
            class_names=self.source.class_names,
            reason=self._reasons(rows, uncertainty),
            **{name: getattr(self.run, name) for name in ("method", "dataset", "split", "seed", "is_probability")},
            provenance=self.run.provenance,
            label_set=sets,
        )
        return rows, self.decider.decide(outcomes)

    def _scored(self, rows: Tensor) -> tuple[tuple[Ints, Floats, Ints, Ints, Ints], list[str | None] | None]:
        """Place in the source, uncertainty, failure, answer and target of the rows, in one pass; and label sets."""
        blocks, sets = [], list[str | None]()
        for b, scores in self.predictor.scored(self.source, rows):
            blocks.append(
                (b.index.cpu(), torch.from_numpy(scores), b.failure.cpu(), b.prediction.cpu(), b.target.cpu())
            )
            sets += self.decider.label_sets(b, scores, self.source.class_names) or ()
        index, uncertainty, failure, prediction, target = (torch.cat(c).numpy() for c in zip(*blocks, strict=True))
        return (index, uncertainty, failure, prediction, target), sets or None

    def _reasons(self, rows: Ints, uncertainty: Floats) -> list[str | None] | None:
        """Per row why it has no score; None where all have one."""
        if not np.isnan(uncertainty).any():
            return None
        if self.source.n_candidates < 2:
            return ["k<2"] * len(rows)
        return ["short_pool" if code == VALID else STATUS[code] for code in self.source.status[rows]]


def _keys(source: EmbeddingSource, rows: Ints) -> list[str]:
    """Identifiers of rows, looked up in ascending order: a store reads them part by part."""
    order = np.argsort(rows, kind="stable")
    keys = np.empty(len(rows), dtype=object)
    keys[order] = [source.ids[row] for row in rows[order].tolist()]
    found: list[str] = keys.tolist()
    return found


def _is_there(root: Path, run: Run, part: Part) -> bool:
    """Whether a part need not be done again."""
    try:
        read_receipt(root, run, part)
    except (StorageError, ProvenanceError):
        return False
    return True
