"""What a calibration says of scores: probability of failure, accept or abstain with the reason, label set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vilu.decision import record
from vilu.decision.calibrate import group_names
from vilu.decision.label_sets import named_sets
from vilu.decision.record import Record
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import digest
from vilu.errors import UsageError
from vilu.metrics.counts import Floats
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.base import FailurePredictor

ACCEPT, ABSTAIN = "accept", "abstain"


@dataclass(frozen=True)
class Decider:
    """A predictor, and its calibration where it has one.

    Attributes:
        predictor: What scores.
        record: What was promised; None without.
    """

    predictor: FailurePredictor
    record: Record | None = None

    @classmethod
    def of_folder(cls, predictor: FailurePredictor, folder: Path) -> Decider:
        """The calibration beside a predictor that was loaded from a folder, if there is one.

        Raises:
            ProvenanceError: If it was made for another predictor.
            DataError: If it is damaged.
        """
        return cls(predictor, record.load(folder) if record.has_record(folder) else None)

    @property
    def provenance(self) -> dict[str, str]:
        """What binds decisions to their calibration; empty without."""
        return {} if self.record is None else {"risk": digest(self.record.model_dump(mode="json"))}

    def require_match(self, data: EmbeddingSource) -> None:
        """Refuse rows with other candidates than the calibration rows had.

        Raises:
            ProvenanceError: If they have.
        """
        if self.record is not None:
            self.record.require_candidates(data)

    def require_streaming(self) -> None:
        """Refuse a rule that needs all rows at once.

        Raises:
            UsageError: If it does.
        """
        if self.record is not None and self.record.rule is not None and self.record.rule.needs_batch:
            raise UsageError(
                "conformal selection judges all rows of a batch together, and a folder of scores is written part by "
                "part. Give a .parquet or .csv file, or calibrate with --method ltt."
            )

    def label_sets(self, batch: Batch, uncertainty: Floats, outcomes_names: tuple[str, ...] | None) -> list[str] | None:
        """The label sets of a batch; None where there are none, or no uncertainty (one candidate)."""
        if self.record is None or self.record.label_sets is None or len(batch.text) < 2:
            return None
        return named_sets(self.record.label_sets, self.predictor, batch, uncertainty, outcomes_names)

    def decide(self, outcomes: Outcomes) -> Outcomes:
        """The outcomes with what there is to say of them."""
        if self.predictor.calibrator_ is None:
            return outcomes
        probability = self.predictor.failure_probability(outcomes.uncertainty)
        outcomes = dataclasses.replace(outcomes, failure_probability=probability)
        rule = None if self.record is None else self.record.rule
        if rule is None:
            return outcomes
        groups = group_names(outcomes) if rule.grouped_by == "prediction" else None
        reasons = rule.reasons(outcomes.uncertainty, groups)
        missing = np.isnan(outcomes.uncertainty)
        for row in np.flatnonzero(missing).tolist():
            reasons[row] = None if outcomes.reason is None else outcomes.reason[row]
        accepted = np.array([reason is None for reason in reasons]) & ~missing
        decision = [ACCEPT if yes else ABSTAIN for yes in accepted.tolist()]
        return dataclasses.replace(outcomes, decision=decision, decision_reason=reasons)
