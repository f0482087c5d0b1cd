"""Rules for accepting answers or leaving answers for review, made from calibration rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from vilu.artifacts.documents import FrozenModel
from vilu.calibration.closed_set import AnyThresholdTests, ClosedPhotos
from vilu.calibration.cluster_bets import LabelledRows, ratio_threshold
from vilu.calibration.clusters import (
    SCORE_IF_TOO_LARGE,
    Clusters,
    correlation_warning,
    majority_outcomes,
    ratio_rows,
)
from vilu.calibration.methods import ClusterRisk, Method, RowsMethod
from vilu.calibration.selection import choose_sample_rows, p_values, select_answers
from vilu.calibration.shares import (
    Strata,
    reason_for_nothing_at_shares,
    require_every_class,
    shares_in_words,
    weighted_learn_then_test,
)
from vilu.calibration.target import Target
from vilu.calibration.thresholds import (
    PROCEDURES,
    Threshold,
    binomial_tail,
    coverage_first,
    exact_percent,
    n_accepted_needed,
    n_right_needed,
    n_rows_for_coverage,
    n_rows_for_mean_risk,
    percent,
)
from vilu.calibration.units import RowCounts, choose_picture_rows
from vilu.callers import warn_caller
from vilu.errors import DataError, InfeasibleError, UsageError
from vilu.metrics.counts import Floats, Ints, TieCounts, real_vector, tie_counts
from vilu.outcomes.outcomes import Outcomes, check_texts
from vilu.predictors.contract.seen import MAX_OVERLAP_SHARE, WHY_NOT_FIT_ROWS
from vilu.validation import checked

ALL_ROWS_GROUP = ""
"""Name of the group with all rows."""

OTHER_GROUP = "(other)"
"""Name of the group that collects all groups with too few calibration rows."""

ROUNDING_TOLERANCE = 1e-9
"""Tolerance for comparing row counts: 0.55 * 100 is a little more than 55 in float64."""


class Rule(FrozenModel):
    """Rule that accepts an answer or leaves the answer for review.

    A rule has a single threshold for all rows, or a threshold per group, and may have floors. A
    rule by the method "selection" has no threshold, and judges all rows in a batch together
    (``needs_batch``, ``vilu.calibration.selection``).

    Attributes:
        method: "ltt", "crc", "selection", or "anytime". A rule by the method "anytime" may be
            tested again after every label (``vilu.calibration.anytime``).
        max_risk: Largest error rate that was asked for. None if only a coverage was asked for.
        min_coverage: Smallest coverage that was asked for. None means any coverage.
        confidence: 1 - delta. The guarantees of all groups hold together with this confidence.
        grouped_by: "prediction": a group is a judged answer. "groups": the caller named the groups.
            None: there are no groups.
        thresholds: Each group's threshold, by name. Without groups, all rows are the group "". If
            whole batches are judged, there is no threshold.
        n: Number of calibration rows.
        wrong: Uncertainties of the wrong calibration answers, ascending. Saved only if whole
            batches are judged.
        outside_share: Largest share of pictures outside all classes for which the guarantee holds.
            None means the share among the calibration rows.
        class_shares: Share of each class among the pictures within the classes. The guarantee holds
            for these shares. None means the shares among the calibration rows.
        counted: How many files and pictures the calibration rows have. None if every file shows a
            different picture, or if files with the same picture are not known.
        about: "new": the guarantee is about rows drawn in the same way as the calibration rows.
            "folder": the guarantee is about the unlabelled photos in one folder.
        closed: The photos in the folder. None for a guarantee about new rows.
        clusters: The guarantee about clusters. None if the guarantee is about single rows.
        drawn_below: The calibration rows were drawn among the rows with an uncertainty up to this
            limit. None means that the calibration rows were drawn among all rows.

    Examples:
        >>> import numpy as np, vilu
        >>> uncertainty = np.linspace(0, 1, 101)
        >>> failure = uncertainty > 0.795  # the 80 most trusted answers are right
        >>> rule = vilu.certify(vilu.Outcomes(uncertainty, failure), max_risk=0.05)
        >>> round(rule.threshold, 2), rule.n_accepted, rule.n_wrong
        (0.79, 80, 0)
        >>> rule.accept([0.2, 0.99]).tolist()
        [True, False]
        >>> rule.reasons([0.2, 0.99])
        [None, 'above_threshold']
    """

    method: Method
    max_risk: float | None = Field(ge=0, le=1)
    min_coverage: float | None = Field(default=None, gt=0, le=1)
    confidence: float = Field(gt=0, lt=1)
    grouped_by: Literal["prediction", "groups"] | None = None
    thresholds: dict[str, Threshold]
    n: int = Field(ge=0)
    wrong: tuple[float, ...] = ()
    outside_share: float | None = Field(default=None, ge=0, lt=1)
    class_shares: dict[str, float] | None = None
    counted: RowCounts | None = None
    about: Literal["new", "folder"] = "new"
    closed: ClosedPhotos | None = None
    clusters: Clusters | None = None
    drawn_below: float | None = None

    @model_serializer(mode="wrap")
    def _fields_to_save(self, fields_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields to save, without unused newer fields."""
        # Scores and monitors refer to a calibration by a fingerprint, a hash over these fields.
        # Earlier versions did not have the newer fields. Saving default values for newer fields
        # would change the fingerprints of old calibrations.
        fields: dict[str, Any] = fields_of(self)
        if self.about == "new":
            fields.pop("about", None)
            fields.pop("closed", None)
        if self.clusters is None:
            fields.pop("clusters", None)
        if self.drawn_below is None:
            fields.pop("drawn_below", None)
        return fields

    @property
    def needs_batch(self) -> bool:
        """Whether the rule judges all rows in a batch together."""
        return self.method == "selection"

    @property
    def reweighted(self) -> bool:
        """Whether the guarantee is for stated shares, not for the shares among calibration rows."""
        return self.outside_share is not None or self.class_shares is not None

    @property
    def is_partial(self) -> bool:
        """Whether the calibration rows are a random sample only up to some uncertainty."""
        return self.method == "anytime" or self.drawn_below is not None

    @property
    def feasible(self) -> bool:
        """Whether anything is accepted."""
        return self.needs_batch or self.n_accepted > 0

    @property
    def n_accepted(self) -> int:
        """Number of accepted calibration rows."""
        return sum(threshold.n_accepted for threshold in self.thresholds.values())

    @property
    def n_wrong(self) -> int:
        """Number of wrong rows among the accepted calibration rows."""
        return sum(threshold.n_wrong for threshold in self.thresholds.values())

    @property
    def coverage(self) -> float:
        """Share of accepted rows among the calibration rows."""
        if not self.n:
            return 0.0
        return self.n_accepted / self.n

    @property
    def risk_bound(self) -> float | None:
        """Guaranteed bound on the risk. With groups, this is the largest bound of any group."""
        bounds = []
        for threshold in self.thresholds.values():
            if threshold.risk_bound is not None:
                bounds.append(threshold.risk_bound)
        return max(bounds, default=None)

    @property
    def threshold(self) -> float | None:
        """Accept where the uncertainty is at most this number. None means: accept nothing.

        Raises:
            UsageError: If every group has a threshold, or if whole batches are judged.
        """
        return self._single_threshold("threshold").threshold

    @property
    def floor(self) -> float | None:
        """Accept only where the uncertainty is above this number. None means: no floor.

        Raises:
            UsageError: If every group has a floor, or if whole batches are judged.
        """
        return self._single_threshold("floor").floor

    def _single_threshold(self, property_name: str) -> Threshold:
        """Return the threshold for all rows. Error messages contain ``property_name``."""
        if self.needs_batch:
            raise UsageError(
                f"this rule judges whole batches, so it has no {property_name} of its own."
            )
        if self.grouped_by is not None:
            raise UsageError(f"this rule has a {property_name} per group: see its thresholds.")
        return self.thresholds[ALL_ROWS_GROUP]

    def limits(self, n: int, groups: Sequence[str] | None) -> tuple[Floats, Floats]:
        """Return floors (N,) and thresholds (N,) for n rows, both -inf where nothing is accepted.

        If a row's group has no threshold, the row has the floor and the threshold of the group
        "(other)".

        Raises:
            UsageError: As in ``accept``, or if whole batches or clusters are judged.

        Examples:
            >>> import numpy as np, vilu
            >>> groups = ["day"] * 100 + ["night"] * 100
            >>> uncertainty = np.tile(np.linspace(0, 1, 100), 2)
            >>> failure = uncertainty > np.repeat([0.9, 0.6], 100)  # by night more is wrong
            >>> outcomes = vilu.Outcomes(uncertainty, failure)
            >>> rule = vilu.certify(outcomes, max_risk=0.1, groups=groups)
            >>> floors, thresholds = rule.limits(2, ["day", "night"])
            >>> thresholds.round(2).tolist()
            [0.93, 0.61]
        """
        if self.needs_batch:
            raise UsageError("this rule judges whole batches, so no row has a limit of its own.")
        if self.clusters is not None:
            raise UsageError("this rule judges whole clusters, so no row has a limit of its own.")
        return self._limits(n, groups)

    def _limits(self, n: int, groups: Sequence[str] | None) -> tuple[Floats, Floats]:
        """Return floors and thresholds like ``limits``, but also for a rule about clusters."""
        intervals = {name: threshold.interval for name, threshold in self.thresholds.items()}
        # Rows in a group without a threshold get the interval for "(other)". If this interval is
        # missing too, the rows are not accepted.
        default_interval = intervals.get(OTHER_GROUP, (-math.inf, -math.inf))
        group_of_row = self._groups_of_rows(n, groups)
        interval_of_row = [intervals.get(name, default_interval) for name in group_of_row]
        # reshaped, because with n = 0 the array would have a single axis
        floors, thresholds = np.array(interval_of_row, dtype=np.float64).reshape(n, 2).T
        return floors, thresholds

    def _groups_of_rows(self, n: int, groups: Sequence[str] | None) -> Sequence[str]:
        """Return the group name for each of n rows. Without groups, this is "" for all rows."""
        if self.grouped_by is None:
            return [ALL_ROWS_GROUP] * n
        names = check_texts(groups, "groups")
        if names is None or len(names) != n:
            raise UsageError(
                f"with a threshold per group this rule needs the group of each of {n} rows, as "
                "text."
            )
        return names

    def accept(
        self,
        uncertainty: ArrayLike,
        groups: Sequence[str] | None = None,
        clusters: Sequence[str | None] | None = None,
    ) -> NDArray[np.bool_]:
        """Return the mask (N,) of accepted answers, False for answers without an uncertainty (NaN).

        With the risk "majority" the mask is True in all scored rows of an accepted cluster. The
        accepted answer is then the cluster's majority answer, not each row's own
        (``vilu.calibration.clusters.majority_outcomes``).

        Args:
            uncertainty: Uncertainties (N,) from the predictor that scored the calibration rows. If
                the rule judges whole batches, these must be the uncertainties for a whole batch.
            groups: Group names for the N rows. Needed if the rule has groups.
            clusters: Cluster names for the N rows. Needed if the rule is about clusters. The
                clusters must be whole.

        Raises:
            UsageError: If the rule has groups or clusters, and ``groups`` or ``clusters`` does not
                name a group or a cluster for every row.
            DataError: If ``uncertainty`` is no numeric vector, or if ``groups`` or
                ``clusters`` is not a list of texts.

        Examples:
            >>> import numpy as np, vilu
            >>> uncertainty = np.linspace(0, 0.5, 100)
            >>> failure = np.zeros(100)  # all answers are right
            >>> rule = vilu.certify(vilu.Outcomes(uncertainty, failure), max_risk=0.05)
            >>> rule.accept([0.1, 0.5, 0.6, np.nan]).tolist()
            [True, True, False, False]
        """
        scores = self._compared_scores(uncertainty, clusters)
        if self.needs_batch:
            level = self.max_risk or 0.0  # rules for whole batches always have a max_risk
            return select_answers(self.p_values(scores), level)
        floors, thresholds = self._limits(len(scores), groups)
        return (scores > floors) & (scores <= thresholds)

    def _compared_scores(
        self, uncertainty: ArrayLike, clusters: Sequence[str | None] | None
    ) -> Floats:
        """Return the scores (N,) for rows or clusters, to compare with thresholds."""
        scores = real_vector(uncertainty, "uncertainty")
        if self.clusters is None:
            return scores
        if clusters is None:
            raise UsageError(
                f"this rule is about clusters, so it needs the cluster of each of {len(scores)} "
                "rows, as text: the column cluster of a table, or the column of --clusters COLUMN."
            )
        return self.clusters.compared_scores(scores, clusters)

    def p_values(self, uncertainty: ArrayLike) -> Floats:
        """Return the conformal p-values (N,) for a batch, NaN for rows without an uncertainty.

        Only rules for whole batches have p-values.

        Examples:
            >>> import numpy as np, vilu
            >>> failure = np.zeros(19)  # all answers are right
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 19), failure)
            >>> rule = vilu.certify(calibration, max_risk=0.05, method="selection")
            >>> rule.p_values([0.5]).tolist()  # (1 + 0) / (1 + 19)
            [0.05]
        """
        if not self.needs_batch:
            raise UsageError(f"the method {self.method} has thresholds, and no p-values.")
        scores = real_vector(uncertainty, "uncertainty")
        return p_values(scores, self.wrong, self.n)

    def reasons(
        self,
        uncertainty: ArrayLike,
        groups: Sequence[str] | None = None,
        clusters: Sequence[str | None] | None = None,
    ) -> list[str | None]:
        """Return the reason why each row is not accepted. None for an accepted row.

        The reasons are "above_threshold", "below_floor" (such highly trusted answers are too often
        wrong), "not_certified" (the group accepts nothing), "not_selected" (from a batch) and
        "large_cluster" (the guarantee does not cover such large clusters). Raises the errors of
        ``accept``.
        """
        scores = self._compared_scores(uncertainty, clusters)
        reasons = np.full(len(scores), None, dtype=object)
        if self.needs_batch:
            reasons[~self.accept(scores)] = "not_selected"
        else:
            floors, thresholds = self._limits(len(scores), groups)
            # Where several reasons apply, the last assigned reason stays.
            is_within = scores <= thresholds  # False for NaN, so such a row gets a reason too
            reasons[~is_within] = "above_threshold"
            reasons[scores <= floors] = "below_floor"
            reasons[scores == SCORE_IF_TOO_LARGE] = "large_cluster"
            reasons[thresholds == -np.inf] = "not_certified"
        texts: list[str | None] = reasons.tolist()
        return texts

    def __str__(self) -> str:
        if self.needs_batch:
            return self._guarantee_of_batch()
        lines = [self._guarantee()]
        if self.grouped_by is not None:
            lines += [f"  {name}: {threshold}" for name, threshold in self.thresholds.items()]
        return "\n".join(lines)

    def _guarantee_of_batch(self) -> str:
        """Return the guarantee of a rule for whole batches as a text."""
        counted = "" if self.counted is None else f": {self.counted}"
        return (
            "accepts what it can of a batch, of which on average at most "
            f"{percent(self.max_risk or 0.0)} are wrong ({len(self.wrong)} wrong of {self.n} "
            f"calibration rows{counted})"
        )

    @property
    def _units_in_words(self) -> str:
        """Words after a number of units, such as "calibration rows"."""
        if self.clusters is None:
            return "calibration rows"
        return self.clusters.units_in_words

    def _guarantee(self) -> str:
        """Return the guarantee of a rule with thresholds as a text."""
        if self.risk_bound is None:
            return "nothing is accepted"
        bound = f"{self._certainty_in_words()} at most {percent(self.risk_bound)}"
        counts = self._counts_in_words()
        if self.closed is not None:
            return (
                f"of {self.closed} of one folder, accepted and without a label, {bound} are wrong "
                f"({counts})"
            )
        return f"{self._acceptance_in_words()}; {bound} {self._errors_in_words()} ({counts})"

    def _certainty_in_words(self) -> str:
        """Return a text such as "with confidence 95%"."""
        if self.method == "crc":
            return "on average"
        return f"with confidence {exact_percent(self.confidence)}"

    def _errors_in_words(self) -> str:
        """Return a text such as "of the accepted answers are wrong", to follow "at most 5%"."""
        if self.clusters is not None:
            errors = self.clusters.errors_in_words
        elif self.method == "crc":
            errors = "of all answers are accepted and wrong"
        else:
            errors = "of the accepted answers are wrong"
        if self.reweighted:
            errors += f" {shares_in_words(self.outside_share, self.class_shares)}"
        return errors

    def _counts_in_words(self) -> str:
        """Return a text such as "2 wrong of 62 accepted, of 100 calibration rows"."""
        counts = (
            f"{self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n} "
            f"{self._units_in_words}"
        )
        if self.reweighted:
            counts += ", which have other shares"
        if self.drawn_below is not None:
            counts += " drawn among them"
        if self.counted is not None:
            counts += f": {self.counted}"
        if self.method == "anytime":
            counts += ", at whatever moment one looks"
        return counts

    def _acceptance_in_words(self) -> str:
        """Return a text such as "accepts 62.0% of the calibration rows"."""
        accepts = f"accepts {self.coverage:.1%}"
        if self.reweighted or self.method == "anytime":
            accepts += " of the calibration rows"
        if self.drawn_below is not None:
            accepts += f" of the answers with an uncertainty up to {self.drawn_below:.6g}"
        if any(threshold.floor is not None for threshold in self.thresholds.values()):
            accepts += ", and leaves the most trusted for review, which are too often wrong"
        return accepts


@checked
def certify(
    outcomes: Outcomes,
    *,
    max_risk: float | None = None,
    confidence: float = 0.95,
    min_coverage: float | None = None,
    method: RowsMethod = "ltt",
    groups: Sequence[str] | Literal["prediction"] | None = None,
    outside_share: float | None = None,
    class_shares: Mapping[str, float] | None = None,
) -> Rule:
    """Make a rule with an error rate of at most ``max_risk`` among accepted answers.

    "ltt" guarantees this with probability ``confidence`` over the draw of the calibration rows.
    "crc" guarantees the mean of another risk: the share of accepted wrong answers among *all*
    answers. Rows with the same ``picture`` count once. With classes, the picture is wrong if any
    row is wrong. With captions, the first row counts.

    Calibration rows must be drawn like the later rows and must not have been used in the fit. After
    a shift in the data nothing is guaranteed. If the target cannot be met, no error is raised. Then
    ``feasible`` is False, and the threshold gives the reason.

    Args:
        outcomes: Calibration rows. Rows without uncertainty or known failure are left out.
        max_risk: Largest error rate among accepted answers, in (0, 1). For "crc", the largest share
            of accepted wrong answers among all answers.
        confidence: 1 - delta, in (0, 1).
        min_coverage: Smallest share of answers to accept. With stated shares, the coverage is taken
            among rows with the stated shares. Together with ``max_risk``, a threshold with a
            smaller coverage is infeasible. Without ``max_risk``, the rule has the strictest
            threshold with this coverage, and states a risk bound.
        method: "ltt" or "crc" (``vilu.calibration.thresholds``), or "selection". "selection"
            accepts part of a batch such that E[share of wrong answers among the accepted] <=
            max_risk (``vilu.calibration.selection``). The method "anytime" needs labels requested
            by ``vilu.Selective.next_labels`` or ``vilu next``.
        groups: Group names for the N rows, or "prediction" for the judged answers. Every group with
            enough rows has a separate threshold. All smaller groups, and a group with the name
            "(other)", share the threshold "(other)". delta is divided among the thresholds, and
            thus all guarantees hold at once. Without ``max_risk``, every group has
            ``min_coverage``.
        outside_share: Expected share of pictures outside all classes, in [0, 1), if different from
            the share among the calibration rows. Calibration rows with ``outside`` represent these
            pictures. The guarantee also holds for every smaller share of such pictures. Only for
            "ltt" without groups.
        class_shares: Expected share for each class, by name, among the pictures within the classes.
            Every class must be named, even with a share of 0. Only for "ltt" without groups.

    Raises:
        UsageError: If ``max_risk`` and ``min_coverage`` are both missing, or if an argument is out
            of range.
        DataError: If no row can be used, if more than 1 % of the rows were used to fit the
            predictor (as counted by ``vilu.score``), or if ``groups`` does not name a group for
            every row.
        InfeasibleError: If "selection" has too few rows to select anything.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> uncertainty = rng.random(1000)
        >>> failure = rng.random(1000) < uncertainty**2  # P(wrong) rises with the uncertainty
        >>> rule = vilu.certify(vilu.Outcomes(uncertainty, failure), max_risk=0.1)
        >>> round(rule.threshold, 2), rule.n_accepted, rule.n_wrong
        (0.37, 338, 23)
        >>> few = vilu.Outcomes(np.linspace(0, 1, 50), np.zeros(50))  # all right, but too few
        >>> vilu.certify(few, max_risk=0.05).feasible
        False
    """
    target = Target(
        max_risk=max_risk,
        min_coverage=min_coverage,
        confidence=confidence,
        method=method,
        outside_share=outside_share,
        class_shares=None if class_shares is None else dict(class_shares),
    )
    target.check_rule(grouped=groups is not None)
    rule = make_rule(outcomes, target, groups)
    warning = cluster_warning(rule, outcomes)
    if warning is not None:
        warn_caller(warning)
    return rule


def cluster_warning(rule: Rule, outcomes: Outcomes) -> str | None:
    """Return a warning if a rule counts rows in one cluster as independent, or None."""
    counts_single_rows = rule.clusters is None and rule.grouped_by is None and rule.feasible
    if outcomes.cluster is None or not counts_single_rows:
        return None
    accepted = rule.accept(outcomes.uncertainty)
    return correlation_warning(outcomes, outcomes.cluster, accepted)


@checked
def certify_clusters(
    outcomes: Outcomes,
    clusters: Sequence[str | None],
    risk: ClusterRisk,
    *,
    max_risk: float,
    confidence: float = 0.95,
    largest: int | None = None,
) -> Rule:
    """Make a rule for clusters of rows, such as bursts, tracks, pages or conversations.

    A cluster counts as a single draw, so rows in one cluster may be wrong together. Calibration
    clusters must be whole, and drawn like the later clusters. If the target cannot be met,
    ``feasible`` is False.

    Args:
        outcomes: Calibration rows. Rows without uncertainty or known failure are left out.
        clusters: Cluster names for the N rows.
        risk: The bounded error rate. "majority": the share of accepted clusters with a wrong
            majority answer. A cluster's score is the mean score over the rows
            (``vilu.calibration.clusters.majority_outcomes``). "ratio": the share of wrong rows
            among the accepted rows. Rows are accepted by their own scores
            (``vilu.calibration.cluster_bets``).
        max_risk: Largest error rate, in (0, 1).
        confidence: 1 - delta, in (0, 1).
        largest: For "ratio", the largest number of rows in a cluster under the guarantee, chosen
            without the labels. Larger clusters are left for review, and a smaller number needs
            fewer clusters. None means the size of the largest calibration cluster. This cluster
            can then speak against a threshold, and never for it.

    Raises:
        UsageError: If an argument is out of range, or if ``largest`` is given for "majority".
        DataError: If no row can be used, if more than 1 % of the rows were used in the fit, or if
            ``clusters`` does not name a cluster for every row.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> burst = np.repeat(np.arange(300), 3)  # 300 bursts of three photos
        >>> uncertainty = rng.random(300)[burst]
        >>> failure = rng.random(300)[burst] < uncertainty**3  # a burst is right or wrong
        >>> outcomes = vilu.Outcomes(uncertainty, failure)
        >>> rule = vilu.certify_clusters(outcomes, burst.astype(str), "majority", max_risk=0.1)
        >>> rule.n_accepted, rule.n_wrong, rule.n
        (182, 10, 300)
        >>> rule.accept([0.1, 0.1, 0.9], clusters=["a", "a", "b"]).tolist()
        [True, True, False]
    """
    target = Target(
        max_risk=max_risk, confidence=confidence, cluster_risk=risk, largest_cluster=largest
    )
    target.check_rule(grouped=False)
    return make_rule(replace(outcomes, cluster=clusters), target)


def _make_cluster_rule(outcomes: Outcomes, target: Target) -> Rule:
    """Make the rule for a target with a cluster risk. The rule may accept nothing."""
    is_usable = require_usable_rows(outcomes)
    if outcomes.cluster is None:
        raise DataError(
            "a risk of clusters needs the cluster of every row: the column cluster of the table, "
            "or the column of --clusters COLUMN."
        )
    max_risk = target.max_risk or 0.0  # a cluster_risk needs a max_risk (``check_clusters``)
    if target.cluster_risk == "ratio":
        rows, start_rows = ratio_rows(outcomes, is_usable, outcomes.cluster, target.largest_cluster)
        return _make_ratio_rule(rows, start_rows, max_risk, target.confidence)
    cluster_outcomes = majority_outcomes(outcomes, outcomes.cluster)  # one outcome per cluster
    # How many rows were used in the fit was checked above, among all rows. As a share of the
    # clusters the same number would be too large, so it is not passed on.
    cluster_outcomes = replace(cluster_outcomes, provenance={})
    target_without_clusters = Target(max_risk=max_risk, confidence=target.confidence)
    rule = make_rule(cluster_outcomes, target_without_clusters)
    clusters = Clusters(risk="majority", n=rule.n)
    return rule.model_copy(update={"clusters": clusters})


def _make_ratio_rule(
    rows: LabelledRows, start_rows: LabelledRows, max_risk: float, confidence: float
) -> Rule:
    """Make the rule for the risk "ratio". The rule may accept nothing.

    ``start_rows`` are the rows in the clusters set aside (``ratio_threshold``).
    """
    threshold = ratio_threshold(rows, start_rows, max_risk, delta=1 - confidence)
    clusters = Clusters(risk="ratio", n=rows.n_clusters, largest=rows.largest_cluster)
    return Rule(
        method="ltt",
        max_risk=max_risk,
        confidence=confidence,
        thresholds={ALL_ROWS_GROUP: threshold},
        n=threshold.n,
        clusters=clusters,
    )


def make_rule(
    outcomes: Outcomes, target: Target, groups: Sequence[str] | Literal["prediction"] | None = None
) -> Rule:
    """Make the rule for a target, like ``certify``. The rule may accept nothing."""
    if target.cluster_risk is not None:
        return _make_cluster_rule(outcomes, target)
    is_usable = require_usable_rows(outcomes)
    picture_rows, row_counts = choose_picture_rows(outcomes, is_usable)
    rows = outcomes.take(picture_rows)
    thresholds: dict[str, Threshold] = {}
    wrong_scores: tuple[float, ...] = ()
    n = len(rows)
    if target.method == "selection":
        n, wrong_scores = _scores_for_selection(rows, target)
    elif target.states_shares:
        thresholds = {ALL_ROWS_GROUP: _threshold_for_shares(rows, target)}
    else:
        names = None if groups is None else _names_of_groups(outcomes, groups, picture_rows)
        thresholds = _thresholds_of_groups(rows, names, target)
    grouped_by: Literal["prediction", "groups"] | None = None
    if groups is not None:
        grouped_by = "prediction" if isinstance(groups, str) else "groups"
    return Rule(
        method=target.method,
        max_risk=target.max_risk,
        min_coverage=target.min_coverage,
        confidence=target.confidence,
        grouped_by=grouped_by,
        thresholds=thresholds,
        n=n,
        wrong=wrong_scores,
        outside_share=target.outside_share,
        class_shares=None if target.class_shares is None else dict(target.class_shares),
        counted=row_counts,
    )


def _scores_for_selection(rows: Outcomes, target: Target) -> tuple[int, tuple[float, ...]]:
    """Return the calibration row count, and the wrong answers' uncertainties, ascending.

    The method "selection" computes p-values from these numbers. At most a million rows are used.
    """
    max_risk = target.max_risk or 0.0  # "selection" always has a max_risk (``check_rule``)
    n_needed = n_rows_for_mean_risk(max_risk)
    sample_rows = choose_sample_rows(len(rows))
    n = len(sample_rows)
    if n < n_needed:
        raise InfeasibleError(
            f"with {n} calibration rows no answer can be selected at a risk of "
            f"{percent(max_risk)}: no p-value is below 1 / {n + 1}. At least {n_needed} rows are "
            "needed."
        )
    is_wrong = rows.failure[sample_rows] == 1
    wrong_scores = np.sort(rows.uncertainty[sample_rows][is_wrong])
    return n, tuple(wrong_scores.tolist())


def make_anytime_rule(
    groups: Mapping[str, tuple[AnyThresholdTests, Outcomes]],
    max_risk: float,
    confidence: float,
    closed_photos: ClosedPhotos | None = None,
) -> Rule:
    """Make the rule for the method "anytime", certified by the labels so far.

    Args:
        groups: Maps each group's name to the tests of thresholds and to the labelled rows. If all
            rows are a single group, the name is "".
        max_risk: Largest error rate among accepted answers.
        confidence: 1 - delta for all groups together.
        closed_photos: The photos for a rule about one folder. None for a rule about new rows.
    """
    thresholds: dict[str, Threshold] = {}
    for name, (tests, rows) in groups.items():
        thresholds[name] = _laxest_threshold(tests, rows, max_risk)
    n = sum(threshold.n for threshold in thresholds.values())
    return Rule(
        method="anytime",
        max_risk=max_risk,
        confidence=confidence,
        grouped_by=None if ALL_ROWS_GROUP in groups else "prediction",
        thresholds=thresholds,
        n=n,
        about="new" if closed_photos is None else "folder",
        closed=closed_photos,
    )


def _laxest_threshold(tests: AnyThresholdTests, rows: Outcomes, max_risk: float) -> Threshold:
    """Return the laxest threshold certified so far by the labels of ``rows``.

    If the labels certify no threshold, the returned threshold accepts nothing and says why.
    """
    certified_index = tests.index_of_laxest_certified_threshold(rows.uncertainty, rows.failure)
    n_wrong, n_accepted = tests.count_wrong_and_accepted(rows.uncertainty, rows.failure)
    if certified_index is not None:
        return Threshold(
            threshold=float(tests.grid[certified_index]),
            n=len(rows),
            n_accepted=int(n_accepted[certified_index]),
            n_wrong=int(n_wrong[certified_index]),
            risk_bound=max_risk,
        )
    n_more = tests.n_more_labels_needed(rows.uncertainty, rows.failure)
    if n_more is not None:
        reason = (
            f"about {n_more:,} more labels of the calibration side are needed, if the error rates "
            "stay the same"
        )
        return Threshold.accepting_nothing(len(rows), reason)
    n_up_to_limit = int(n_accepted[tests.last_tested_index])
    n_wrong_up_to_limit = int(n_wrong[tests.last_tested_index])
    reason = (
        f"of {n_up_to_limit} labels up to the limit {n_wrong_up_to_limit} are wrong, and these "
        f"scores do not single out answers with an error rate below {max_risk:.2%}"
    )
    return Threshold.accepting_nothing(len(rows), reason)


def require_usable_rows(outcomes: Outcomes) -> NDArray[np.bool_]:
    """Return the mask (N,) of usable rows.

    A usable row has an uncertainty, and the answer is known to be right or wrong. Raises a
    DataError if no row is usable, or if too many rows were used in the fit.
    """
    refuse_fit_rows(outcomes)
    is_usable = outcomes.evaluable
    if not is_usable.any():
        raise DataError(
            "calibration needs rows with an uncertainty and a known failure. "
            f"None of the {len(outcomes)} rows has both."
        )
    return is_usable


def refuse_fit_rows(outcomes: Outcomes) -> None:
    """Refuse outcomes if more than 1 % of the rows were used in the predictor's fit.

    A smaller share leads to a warning.
    """
    provenance = outcomes.provenance
    n_seen = provenance.get("n_seen_in_fit")
    if not isinstance(n_seen, int) or n_seen == 0:
        return
    n_comparable = provenance.get("n_compared_with_fit")
    if not isinstance(n_comparable, int):
        n_comparable = len(outcomes)
    overlap_text = f"at least {n_seen} of these rows were used to fit the predictor"
    remedy = (
        "Score rows that it has not seen: data.take(np.flatnonzero(~predictor.seen(data).shared))"
    )
    if n_seen > MAX_OVERLAP_SHARE * n_comparable:
        raise DataError(
            f"{overlap_text}, more than {MAX_OVERLAP_SHARE:.0%} of the {n_comparable} that can be "
            f"compared. {WHY_NOT_FIT_ROWS} {remedy}."
        )
    warn_caller(f"{overlap_text}. {WHY_NOT_FIT_ROWS} {remedy}.")


def group_names(outcomes: Outcomes) -> list[str]:
    """Return names for the N answers, for groups by "prediction". A missing answer is ""."""
    if outcomes.prediction is None:
        raise DataError(
            "groups by prediction need outcomes that say what was answered. These do not."
        )
    class_names = outcomes.class_names
    names = []
    for index in outcomes.prediction.tolist():
        if index < 0:
            names.append("")
        elif class_names is None:
            names.append(str(index))
        else:
            names.append(class_names[index])
    return names


def _names_of_groups(outcomes: Outcomes, groups: Sequence[str], rows: Ints) -> list[str]:
    """Return the group names for the M rows with the indices ``rows`` (M,).

    ``groups`` is as in ``certify``.
    """
    names: Sequence[str] | None
    if isinstance(groups, str):
        names = group_names(outcomes)
    else:
        names = check_texts(groups, "groups") or ()
    if len(names) != len(outcomes):
        raise DataError(
            f"groups must name one group per row ({len(outcomes)}). Got {len(names)} instead."
        )
    return [names[row] for row in rows.tolist()]


def rows_of_groups(
    names: list[str] | None, n: int, delta: float, n_needed_at_level: Callable[[float], int]
) -> dict[str, Ints]:
    """Return each group's row indices, for separate thresholds and for the group "(other)".

    The k largest groups get separate thresholds. All smaller groups together are "(other)". k is as
    large as possible: each of the k groups must have enough rows for a share of delta. Only the
    group sizes are used, not the wrong answers.

    Args:
        names: Group names for n rows. With None, all rows are a single group.
        n: Number of rows.
        delta: Level for all groups together.
        n_needed_at_level: Maps a group's level to the smallest sufficient number of rows.
    """
    if names is None:
        return {ALL_ROWS_GROUP: np.arange(n)}
    sizes = Counter(names)
    # From the largest group to the smallest. Sorting by size keeps the name order among groups with
    # equal size.
    names_in_order = sorted(sizes)
    ranked_names = sorted(names_in_order, key=lambda name: sizes[name], reverse=True)
    n_separate_groups = 0  # number of groups with a separate threshold, k above
    for n_groups in range(1, len(ranked_names) + 1):
        # one more share is for "(other)", unless no group is left over
        n_shares = min(n_groups + 1, len(ranked_names))
        smallest_name = ranked_names[n_groups - 1]  # the smallest of the n_groups largest groups
        if sizes[smallest_name] >= n_needed_at_level(delta / n_shares):
            n_separate_groups = n_groups
    separate_groups = set(ranked_names[:n_separate_groups])
    group_of_row = [name if name in separate_groups else OTHER_GROUP for name in names]
    group_of_row_array = np.array(group_of_row, dtype=object)
    group_rows: dict[str, Ints] = {}
    for name in [*sorted(separate_groups), OTHER_GROUP]:
        rows = np.flatnonzero(group_of_row_array == name)
        if len(rows):
            group_rows[name] = rows
    return group_rows


def _thresholds_of_groups(
    rows: Outcomes, names: list[str] | None, target: Target
) -> dict[str, Threshold]:
    """Return the best threshold for every group.

    If all groups together accept less than ``min_coverage``, every threshold accepts nothing.
    """
    delta = 1 - target.confidence
    n_rows_needed = partial(_n_rows_needed, target)
    group_rows = rows_of_groups(names, len(rows), delta, n_rows_needed)
    # The guarantees of all groups must hold together. With all of delta for each group, some
    # guarantee would be broken far more often than with probability delta (union bound).
    level = delta / len(group_rows)
    thresholds = {}
    for name, rows_of_group in group_rows.items():
        counts = tie_counts(rows.uncertainty[rows_of_group], rows.failure[rows_of_group])
        thresholds[name] = _best_threshold(counts, target, level)
    reason = _reason_for_missed_coverage(thresholds, target)
    if reason is None:
        return thresholds
    for name, threshold in thresholds.items():
        thresholds[name] = Threshold.accepting_nothing(threshold.n, reason, threshold.n_needed)
    return thresholds


def _reason_for_missed_coverage(thresholds: Mapping[str, Threshold], target: Target) -> str | None:
    """Explain why the groups together do not reach ``min_coverage``.

    None if the groups reach ``min_coverage``, or if every threshold already says why nothing is
    accepted.
    """
    if target.min_coverage is None:
        return None
    if target.max_risk is None:
        # Without a maximal risk, every single group must reach ``min_coverage``. So the first group
        # without a threshold is the reason.
        for threshold in thresholds.values():
            if threshold.threshold is None:
                return threshold.why
        return None
    n = sum(threshold.n for threshold in thresholds.values())
    n_accepted = sum(threshold.n_accepted for threshold in thresholds.values())
    n_asked_for = (target.min_coverage - ROUNDING_TOLERANCE) * n
    is_too_small = n_accepted < n_asked_for
    # If nothing is accepted, every threshold already says why.
    if is_too_small and n_accepted > 0:
        return _reason_for_small_coverage(n_accepted / n, target.min_coverage)
    return None


def _reason_for_small_coverage(coverage: float, min_coverage: float) -> str:
    """Explain that the largest possible ``coverage`` is less than ``min_coverage``."""
    return (
        f"the risk is attained at {coverage:.1%} coverage at most, less than the "
        f"{min_coverage:.1%} asked for"
    )


def _threshold_for_shares(rows: Outcomes, target: Target) -> Threshold:
    """Return the best threshold for stated shares, or else accept nothing and give the reason."""
    strata = Strata(rows, target.outside_share, target.class_shares)
    max_risk = target.max_risk or 0.0  # stated shares need a max_risk (``check_shares``)
    delta = 1 - target.confidence
    require_every_class(rows, target.class_shares)
    best_threshold: Threshold | None = None
    if not strata.small_strata(max_risk, delta):
        is_wrong = rows.failure == 1
        best_threshold = weighted_learn_then_test(
            rows.uncertainty, is_wrong, strata.weight, max_risk, delta
        )
    if best_threshold is None:
        reason = reason_for_nothing_at_shares(strata, max_risk, delta)
        return Threshold.accepting_nothing(len(rows), reason)
    floor, threshold = best_threshold.interval
    is_accepted = (rows.uncertainty > floor) & (rows.uncertainty <= threshold)
    coverage = float(strata.weight[is_accepted].sum()) / len(rows)
    if target.min_coverage is not None and coverage < target.min_coverage - ROUNDING_TOLERANCE:
        reason = _reason_for_small_coverage(coverage, target.min_coverage)
        return Threshold.accepting_nothing(len(rows), reason)
    return best_threshold


def _best_threshold(counts: TieCounts, target: Target, delta: float) -> Threshold:
    """Return a group's best threshold at level delta, or ``Threshold.accepting_nothing``."""
    if target.max_risk is None:
        best_threshold = coverage_first(counts, target.min_coverage or 1.0, delta)
    else:
        best_threshold = PROCEDURES[target.method](counts, target.max_risk, delta)
    if best_threshold is not None:
        return best_threshold
    reason, n_needed = _reason_for_nothing(counts, target, delta)
    return Threshold.accepting_nothing(int(counts.n), reason, n_needed)


def _n_rows_needed(target: Target, delta: float) -> int:
    """Return the smallest number of rows for any guarantee for a group at level delta."""
    if target.max_risk is None:
        # Even infinitely many rows would not show a coverage of 1, so no group is too small.
        if target.min_coverage in {None, 1.0}:
            return 1
        return n_rows_for_coverage(target.min_coverage or 1.0, delta)
    if target.method == "crc":
        return n_rows_for_mean_risk(target.max_risk)
    # An additional row is needed, because the row at the threshold is no trial in the test.
    return n_right_needed(target.max_risk, delta) + 1


def _reason_for_nothing(counts: TieCounts, target: Target, delta: float) -> tuple[str, int | None]:
    """Explain why no threshold is certified, and return the number of rows needed.

    The number is None if there are enough rows, or if no number of rows is enough.
    """
    n = int(counts.n)
    max_risk = target.max_risk
    n_needed = _n_rows_needed(target, delta)
    if max_risk is None:
        reason = f"{n} rows cannot show that {target.min_coverage:.1%} of all answers are accepted"
        if target.min_coverage == 1:
            return reason, None  # no number of rows would be enough
        return reason, n_needed
    if target.method == "crc":
        if n < n_needed:
            reason = f"a mean risk of {max_risk:.2%} needs at least {n_needed} rows"
            return f"{reason}, and there are {n}", n_needed
        n_wrong_at_smallest = int(counts.accepted_wrong[0])
        reason = f"{n_wrong_at_smallest} of the most trusted answers, equal in score, are wrong"
        return reason, None
    if n < n_needed:
        # number of rows below the first score with a wrong answer
        n_right = int(counts.accepted[counts.accepted_wrong == 0].max(initial=0))
        reason = (
            f"a risk of {max_risk:.2%} needs {n_needed:,} accepted answers without a wrong one, "
            f"but there are {n:,} rows, of which the {n_right:,} most trusted are right"
        )
        return reason, n_needed
    return _reason_if_enough_rows(counts, max_risk, delta), None


def _reason_if_enough_rows(counts: TieCounts, max_risk: float, delta: float) -> str:
    """Explain why no threshold is certified although there are enough rows."""
    p_value = binomial_tail(counts.accepted_wrong, counts.accepted, max_risk)
    nearest_index = int(np.argmin(p_value))  # index of the threshold nearest to a certificate
    n_accepted = int(counts.accepted[nearest_index])
    n_wrong = int(counts.accepted_wrong[nearest_index])
    verb = "is" if n_wrong == 1 else "are"
    wrong_in_words = f"of the {n_accepted:,} most trusted answers {n_wrong:,} {verb} wrong"
    if n_wrong >= max_risk * n_accepted:
        return (
            f"{wrong_in_words}: these scores do not single out answers with an error rate below "
            f"{max_risk:.2%}"
        )
    n_needed = n_accepted_needed(n_wrong, max_risk, delta)
    if n_needed is not None and n_needed > n_accepted:
        return (
            f"{wrong_in_words}, and with so many wrong answers a risk of {max_risk:.2%} needs at "
            f"least {n_needed:,} accepted answers"
        )
    return (
        f"{wrong_in_words}. For a threshold that was fixed before the labels came this would be "
        "enough. But the labels choose among several thresholds, so more of them are needed"
    )
