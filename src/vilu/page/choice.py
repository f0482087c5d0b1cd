"""Which answers the page calls accepted: by a calibrated rule, or by a threshold found on the scores themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from vilu.decision.calibrate import group_names
from vilu.decision.selector import Certificate, Selector
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.metrics.counts import tie_counts
from vilu.outcomes import Outcomes
from vilu.predictors.storage import read_bytes
from vilu.store.document import explain

MAX_BYTES = 16 * 2**20


class Rule(Protocol):
    """Accepts or abstains: a ``Selector``, or another rule over groups or batches."""

    def accept(self, uncertainty: ArrayLike, groups: Sequence[str] | None = None) -> NDArray[np.bool_]:
        """(N,) whether each answer is accepted."""


@dataclass(frozen=True)
class Calibrated:
    """What ``vilu calibrate`` left beside a predictor.

    Attributes:
        rule: What accepts.
        method: Name of the predictor that it belongs to; None where that is not known.
        facts: What else is recorded: fingerprints, data set, version.
    """

    rule: Rule
    method: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Choice:
    """The operating point of a page.

    Attributes:
        accepted: (N,) whether each row is accepted.
        threshold: Accept where the uncertainty is at most this; None: by another rule than one threshold, or nothing.
        max_risk: Error rate that was aimed at; None where another thing was.
        promise: What is promised of later answers, in words; None where nothing is.
        certificates: Per group, if the rule has them.
        facts: What is recorded of the calibration.
    """

    accepted: NDArray[np.bool_] = field(repr=False)
    threshold: float | None
    max_risk: float | None
    promise: str | None = None
    certificates: Mapping[str, Certificate] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def by_hindsight(outcomes: Outcomes, max_risk: float) -> Choice:
    """The largest threshold t with (wrong with u <= t) / (all with u <= t) <= max_risk on these rows. Promises nothing.

    Raises:
        UsageError: If ``max_risk`` is not in (0, 1).
    """
    if not 0 < max_risk < 1:
        raise UsageError(f"max_risk must be in (0, 1). Got {max_risk} instead.")
    rows = outcomes.evaluable
    counts = tie_counts(outcomes.uncertainty[rows], outcomes.failure[rows])
    meets = np.flatnonzero(counts.accepted_wrong <= max_risk * counts.accepted)
    threshold = float(counts.value[meets[-1]]) if len(meets) else None
    accepted = outcomes.uncertainty <= (-np.inf if threshold is None else threshold)
    return Choice(accepted, threshold, max_risk)


def by_rule(outcomes: Outcomes, calibrated: Calibrated) -> Choice:
    """What a calibrated rule accepts of these rows.

    Raises:
        ProvenanceError: If the rule was calibrated for another method.
        UsageError: If the rule needs groups that outcomes do not have.
    """
    rule, method = calibrated.rule, calibrated.method
    if method is not None and method != outcomes.method:
        raise ProvenanceError(
            f"the rule was calibrated for {method!r}, the scores are of {outcomes.method!r}. "
            "Give the predictor that made them, or choose its scores with --main."
        )
    if not isinstance(rule, Selector):
        return Choice(rule.accept(outcomes.uncertainty), None, None, str(rule), facts=calibrated.facts)
    if rule.grouped_by == "groups":
        raise UsageError("this rule has a threshold per group that its caller named; scores do not tell the groups.")
    grouped = rule.grouped_by is not None
    return Choice(
        accepted=rule.accept(outcomes.uncertainty, group_names(outcomes) if grouped else None),
        threshold=None if grouped else rule.threshold,
        max_risk=rule.max_risk,
        promise=str(rule).splitlines()[0] if rule.feasible else None,
        certificates=rule.certificates,
        facts=calibrated.facts,
    )


def read_calibrated(folder: str | Path) -> Calibrated:
    """The rule that ``vilu calibrate`` wrote into the folder of a predictor.

    Raises:
        DataError: If there is none, or it is damaged.
        StorageError: If a file cannot be read.
    """
    path = Path(folder) / "risk.json"
    if not path.is_file():
        raise DataError(
            f"{folder} is not calibrated (it has no risk.json). Run `vilu calibrate` on it, or leave it out."
        )
    record = _object(path)
    if record.get("kind") != "risk" or record.get("rule") is None:
        raise DataError(f"{path} holds no rule that accepts or abstains. Run `vilu calibrate` with --max-risk.")
    try:
        rule = Selector.model_validate(record.pop("rule"))
    except ValidationError as error:
        raise DataError(f"{path} holds no rule that this page can show: {explain(error)}.") from error
    calibration = path.with_name("calibration.parquet")
    return Calibrated(rule, Outcomes.load(calibration).method if calibration.is_file() else None, record)


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object. Got {type(content).__name__} instead.")
    return content
