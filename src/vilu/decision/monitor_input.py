"""Which scores may be compared with those of a calibration."""

from __future__ import annotations

import warnings
from dataclasses import replace

from vilu.errors import ProvenanceError
from vilu.outcomes import Outcomes


def admit(outcomes: Outcomes, calibration: Outcomes, risk: str | None) -> Outcomes:
    """Scores of new rows, checked; what a CSV does not say about the candidates is taken from the calibration.

    Args:
        outcomes: Scores of new rows.
        calibration: Those of the calibration rows.
        risk: Hash of the record of the calibration; None without.

    Warns:
        If some of the rows are calibration rows: those say nothing about new ones.

    Raises:
        ProvenanceError: If the scores are of another predictor or calibration, or their candidates are others.
    """
    for name in ("method", "class_names"):
        ours, theirs = getattr(calibration, name), getattr(outcomes, name)
        if None not in (ours, theirs) and ours != theirs:
            raise ProvenanceError(
                f"the calibration rows have the {name} {ours!r:.100}, these scores {theirs!r:.100}. "
                "Score with the predictor that was calibrated."
            )
    theirs = outcomes.provenance.get("risk")
    if None not in (risk, theirs) and risk != theirs:
        raise ProvenanceError(
            f"these scores were decided on by the calibration {theirs}, the one monitored is {risk}. "
            "Score again with the predictor as it is calibrated now."
        )
    known = _n_known(outcomes, calibration)
    if known:
        warnings.warn(
            f"{known} of {len(outcomes)} rows are calibration rows, which say nothing about new ones.", stacklevel=3
        )
    if outcomes.class_names is None and outcomes.prediction is not None:
        return replace(outcomes, class_names=calibration.class_names)
    return outcomes


def _n_known(outcomes: Outcomes, calibration: Outcomes) -> int:
    """Rows with the key and the uncertainty of a calibration row; a key alone may be of another data set."""
    if outcomes.ids is None or calibration.ids is None:
        return 0
    rows = set(zip(calibration.ids, calibration.uncertainty.tolist(), strict=True))
    return sum(row in rows for row in zip(outcomes.ids, outcomes.uncertainty.tolist(), strict=True))
