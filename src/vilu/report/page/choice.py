"""Choose which answers a page accepts, and read the scores that a page shows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilu.artifacts.disk import RUN_FILE
from vilu.calibration.calibration import Calibration
from vilu.calibration.clusters import Clusters
from vilu.calibration.monitor.arrivals import count_calibration_rows
from vilu.calibration.rules import Rule, group_names
from vilu.calibration.thresholds import Threshold
from vilu.callers import warn_caller
from vilu.errors import DataError, ProvenanceError, UsageError, did_you_mean
from vilu.metrics.counts import tie_counts
from vilu.outcomes.evaluate import require_same_answers, require_same_rows
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.files import PREDICTOR
from vilu.report.figures import evaluable_scores
from vilu.scoring.score_folder import ScoreFolder
from vilu.validation import require_between


@dataclass(frozen=True)
class CalibratedRule:
    """A calibration's rule. ``vilu calibrate`` writes the rule into a predictor's folder."""

    rule: Rule  # decides for each answer: accept or review
    # name of the calibrated predictor. None if unknown.
    method: str | None = None
    # fingerprint of the calibration. None if unknown. Scores with decisions of this calibration
    # have the fingerprint in the provenance, under the key "risk".
    fingerprint: str | None = None
    # recorded facts about the calibration: fingerprints, data set, version
    facts: Mapping[str, Any] = field(default_factory=dict)
    # the calibration rows. None if unknown.
    rows: Outcomes | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """The choice that a page shows: which rows are accepted."""

    accepted: NDArray[np.bool_] = field(repr=False)  # (N,) whether each row is accepted
    # Rows with at most this uncertainty are accepted, except rows in clusters that are too large.
    # None if the rule has several limits, if it judges whole clusters, or if nothing is accepted.
    threshold: float | None
    max_risk: float | None  # target for the error rate. None if the target was another quantity
    # sentence about the guarantee for later answers. None if there is no guarantee.
    guarantee: str | None = None
    # maps a row group to the group's threshold. Empty for a rule without thresholds.
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # recorded facts about the calibration
    n_calibration_rows: int = 0  # number of the page's rows on which the rule was chosen
    # Set if the rule is about clusters. For "majority", a cluster's mean uncertainty is compared
    # with the threshold in ``thresholds``. For "ratio", a row's uncertainty is.
    clusters: Clusters | None = None


def choose_by_hindsight(outcomes: Outcomes, max_risk: float) -> OperatingPoint:
    """Choose a threshold by looking at failures in the same rows. The threshold guarantees nothing.

    The threshold is the largest uncertainty t, among the uncertainties u of the rows, with

        (number of wrong rows with u <= t) / (number of rows with u <= t) <= max_risk.
    """
    require_between("max_risk", max_risk)
    uncertainty, failure = evaluable_scores(outcomes)
    counts = tie_counts(uncertainty, failure)
    is_low_enough = counts.accepted_wrong <= max_risk * counts.accepted
    if not is_low_enough.any():
        none_accepted = np.zeros(len(outcomes), dtype=np.bool_)
        return OperatingPoint(none_accepted, threshold=None, max_risk=max_risk)
    threshold = float(counts.value[is_low_enough].max())
    is_accepted = outcomes.uncertainty <= threshold
    return OperatingPoint(is_accepted, threshold=threshold, max_risk=max_risk)


def choose_by_rule(outcomes: Outcomes, calibrated: CalibratedRule) -> OperatingPoint:
    """Choose the rows that a calibrated rule accepts.

    The outcomes and the rule must belong to the same method.
    """
    _require_equal(
        calibrated.method,
        outcomes.method,
        "the rule was calibrated for {!r}, the scores are of {!r}.",
    )
    _require_equal(
        calibrated.fingerprint,
        outcomes.provenance.get("risk"),
        "the rule was written in the calibration {!r}, the scores are of {!r}.",
    )
    rule = calibrated.rule
    if rule.grouped_by == "groups":
        raise UsageError(
            "this rule has a threshold for each group of rows that its caller named, and scores do "
            "not say which group a row is in."
        )
    groups = group_names(outcomes) if rule.grouped_by == "prediction" else None
    accepted = rule.accept(outcomes.uncertainty, groups, outcomes.cluster)
    first_line, *_ = str(rule).splitlines()  # what a feasible rule guarantees
    n_calibration_rows = _warn_of_calibration_rows(outcomes, calibrated)
    if rule.needs_batch:
        # Conformal selection has no fixed threshold. For this batch of rows, a threshold at the
        # largest accepted uncertainty accepts the same rows.
        threshold = float(outcomes.uncertainty[accepted].max()) if accepted.any() else None
        return OperatingPoint(
            accepted,
            threshold=threshold,
            max_risk=rule.max_risk,
            guarantee=first_line,
            facts=calibrated.facts,
            n_calibration_rows=n_calibration_rows,
        )
    judges_rows = rule.clusters is None or rule.clusters.risk == "ratio"
    is_one_threshold = judges_rows and rule.grouped_by is None and rule.floor is None
    return OperatingPoint(
        accepted=accepted,
        threshold=rule.threshold if is_one_threshold else None,
        max_risk=rule.max_risk,
        guarantee=first_line if rule.feasible else None,
        thresholds=rule.thresholds,
        facts=calibrated.facts,
        n_calibration_rows=n_calibration_rows,
        clusters=rule.clusters,
    )


def _warn_of_calibration_rows(outcomes: Outcomes, calibrated: CalibratedRule) -> int:
    """Count the rows on which the rule was chosen, and warn if there are any."""
    if calibrated.rows is None:
        return 0
    n_calibration_rows = count_calibration_rows(outcomes, calibrated.rows)
    if n_calibration_rows:
        warn_caller(
            f"{n_calibration_rows} of {len(outcomes)} rows are calibration rows, on which the rule "
            "was chosen. Their errors say little about new rows: give scores of other rows.",
        )
    return n_calibration_rows


def _require_equal(rule_value: object, scores_value: object, message: str) -> None:
    """Raise ProvenanceError if the rule and the scores have different values for the same fact.

    Args:
        rule_value: The fact about the rule, such as the method's name. None if unknown.
        scores_value: The same fact about the scores. None if unknown.
        message: Message for different values, with a pair of braces for each of the two values.
    """
    if rule_value is None or scores_value is None:
        return
    if rule_value != scores_value:
        difference = message.format(rule_value, scores_value)
        raise ProvenanceError(
            f"{difference} Give the predictor that made the scores, "
            "or choose its scores with --main."
        )


def read_calibrated(folder: str | Path) -> CalibratedRule:
    """Read the rule that ``vilu calibrate`` wrote into a predictor's folder."""
    calibration = Calibration.load(folder)
    if calibration.rule is None:
        raise DataError(
            f"{folder} has calibrated probabilities and no rule that accepts answers. "
            "Run `vilu calibrate` with --max-risk, or leave --predictor out."
        )
    facts = calibration.model_dump(mode="json", exclude={"rule", "probability", "label_sets"})
    rows = calibration.rows
    return CalibratedRule(calibration.rule, rows.method, calibration.fingerprint, facts, rows)


PREFERRED_METHODS = ("vilu_plus", "vilu")
"""A method whose name begins with such a prefix is preferred as a page's main method."""


def read_scores(path: str | Path) -> list[Outcomes]:
    """Read the scores of one method or several methods.

    The path is a folder with ``*.parquet`` files (one file per method), a single file, or a folder
    with one method's scores in parts. A method without a name gets the file name. If several files
    have the same method, the file name is appended to the method's name.
    """
    root = Path(path)
    if (root / PREDICTOR).is_file():
        raise UsageError(
            f"{root} is the folder of a predictor. It only has the scores of the calibration rows, "
            f"on which its rule was chosen. Give scores of other rows, and add --predictor {root}."
        )
    if (root / RUN_FILE).is_file():
        folder = ScoreFolder(root)
        outcomes_of_folder = folder.outcomes()
        return _with_distinct_names([(root, outcomes_of_folder)])
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError(
            f"{root} holds no .parquet files. "
            "Give a folder of files that `vilu score` wrote, one file per method."
        )
    outcomes_of_files = [(file, Outcomes.load(file)) for file in files]
    return _with_distinct_names(outcomes_of_files)


def _with_distinct_names(files: Sequence[tuple[Path, Outcomes]]) -> list[Outcomes]:
    """Return the outcomes of all files, with distinct method names (see ``read_scores``)."""
    counts = Counter(outcomes.method for _, outcomes in files)
    named_outcomes = []
    for path, outcomes in files:
        method = outcomes.method
        distinct_outcomes = outcomes
        if not method:
            distinct_outcomes = dataclasses.replace(outcomes, method=path.stem)
        elif counts[method] > 1:
            distinct_outcomes = dataclasses.replace(outcomes, method=f"{method} ({path.stem})")
        named_outcomes.append(distinct_outcomes)
    return named_outcomes


def choose_main(outcomes: Sequence[Outcomes], main: str | None) -> Outcomes:
    """Choose a page's main method.

    The main method is the method named ``main``. If ``main`` is None, it is the first method whose
    name begins with the first prefix in ``PREFERRED_METHODS``, or else with the next prefix.
    Without such a name, it is the first method.
    """
    names = [method_outcomes.method or "" for method_outcomes in outcomes]
    if not names:
        raise UsageError("a page needs at least one set of outcomes. Got none.")
    _require_distinct(names)
    first = outcomes[0]
    for method_outcomes in outcomes[1:]:
        require_same_rows(first, method_outcomes)
        require_same_answers(first, method_outcomes)
    if main is not None:
        if main not in names:
            hint = did_you_mean(main, names)
            listed_names = ", ".join(names)
            raise UsageError(
                f"no method here is called {main!r}.{hint} There are: {listed_names:.500}."
            )
        return outcomes[names.index(main)]
    for prefix in PREFERRED_METHODS:
        for method_outcomes, name in zip(outcomes, names, strict=True):
            if name.startswith(prefix):
                return method_outcomes
    return first


def _require_distinct(names: Sequence[str]) -> None:
    """Refuse methods without a name, and methods with the same name."""
    counts = Counter(names)
    for name, count in counts.items():
        if count > 1 or name == "":
            raise UsageError(
                "every method of a page needs a name of its own. "
                f"Found {count} with the name {name!r}."
            )
