"""From scores on calibration rows to a rule that decides, with its guarantee."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.anytime import Looks
from vilu.calibration.methods import Method, RowsMethod
from vilu.calibration.selection import drawn, p_values, selected
from vilu.calibration.shares import (
    Strata,
    in_words,
    require_every_class,
    weighted_learn_then_test,
    why_nothing,
)
from vilu.calibration.target import Target
from vilu.calibration.thresholds import (
    PROCEDURES,
    Threshold,
    accepted_needed,
    coverage_first,
    exactly,
    percent,
    rows_for_coverage,
    rows_for_mean,
    rows_without_error,
    tail,
)
from vilu.calibration.units import CountedRows, count_once
from vilu.callers import warn_caller
from vilu.errors import DataError, InfeasibleError, UsageError
from vilu.metrics.counts import Floats, Ints, TieCounts, real_vector, tie_counts
from vilu.outcomes.outcomes import Outcomes, check_texts
from vilu.predictors.contract.seen import LEARNED_FROM, MAX_SHARED
from vilu.validation import checked

ALL = ""
"""Name of the group of all rows."""

OTHER = "(other)"
"""Name of the group of what has too few calibration rows for a group of its own."""

ROUNDING = 1e-9
"""Shares of rows are compared up to this: 55 are not less than 0.55 * 100."""


class Rule(Model):
    """Accepts an answer, or leaves it for review: by a threshold, or by a whole batch.

    There is one threshold for all rows, or one per group, and above it perhaps a floor. Only the
    method "selection" has none: it judges all rows of a batch together (``needs_batch``,
    ``vilu.calibration.selection``).

    Attributes:
        method: "ltt", "crc", "selection", or "anytime" (``vilu.calibration.anytime``): looked at
            again and again.
        max_risk: The target; None where a coverage was asked for alone.
        min_coverage: Least coverage asked for; None for any.
        confidence: 1 - delta; with several groups the guarantees hold for all of them together with
            it.
        grouped_by: "prediction" (the zero-shot answer), "groups" (given by the caller), or None.
        thresholds: Per group; one group "" without groups, none where whole batches are judged.
        n: Calibration rows.
        wrong: Uncertainties of the wrong calibration answers, ascending, where whole batches are
            judged.
        outside_share: Share of pictures of none of the classes up to which the guarantee holds;
            None: that of the calibration rows.
        class_shares: Shares of the classes, among the others, at which it holds; None: those of the
            calibration rows.
        counted: How many files and pictures the calibration rows are; None where every file shows
            another picture, or nothing is known of pictures.

    Examples:
        >>> import numpy as np, vilu
        >>> uncertainty = np.linspace(0, 1, 101)
        >>> rule = vilu.calibrate(vilu.Outcomes(uncertainty, uncertainty > 0.795), max_risk=0.05)
        >>> round(rule.threshold, 2), rule.n_wrong, rule.n_accepted
        (0.79, 0, 80)
        >>> rule.accept([0.2, 0.99, np.nan]).tolist()
        [True, False, False]
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
    counted: CountedRows | None = None

    @property
    def needs_batch(self) -> bool:
        """Whether it judges all rows of a batch together."""
        return self.method == "selection"

    @property
    def reweighted(self) -> bool:
        """Whether the guarantee is for stated shares, not for those of the calibration rows."""
        return self.outside_share is not None or self.class_shares is not None

    @property
    def feasible(self) -> bool:
        """Whether anything is accepted."""
        return self.needs_batch or self.n_accepted > 0

    @property
    def n_accepted(self) -> int:
        """Calibration rows that are accepted."""
        return sum(threshold.n_accepted for threshold in self.thresholds.values())

    @property
    def n_wrong(self) -> int:
        """Accepted calibration rows that are wrong."""
        return sum(threshold.n_wrong for threshold in self.thresholds.values())

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that is accepted."""
        return self.n_accepted / self.n

    @property
    def risk_bound(self) -> float | None:
        """The bound that is guaranteed; with groups the largest of their bounds."""
        bounds = []
        for threshold in self.thresholds.values():
            if threshold.risk_bound is not None:
                bounds.append(threshold.risk_bound)
        return max(bounds, default=None)

    @property
    def threshold(self) -> float | None:
        """Accept where the uncertainty is at most this; None: accept nothing.

        Raises:
            UsageError: If every group has its own, or whole batches are judged.
        """
        return self._only("threshold").threshold

    @property
    def floor(self) -> float | None:
        """Accept where the uncertainty is above this only; None: no answer is too trusted.

        Raises:
            UsageError: If every group has its own, or whole batches are judged.
        """
        return self._only("floor").floor

    def _only(self, what: str) -> Threshold:
        if self.needs_batch:
            raise UsageError(f"this rule judges whole batches, so it has no {what} of its own.")
        if self.grouped_by is not None:
            raise UsageError(f"this rule has a {what} per group: see its thresholds.")
        return self.thresholds[ALL]

    def limits(self, n: int, groups: Sequence[str] | None) -> tuple[Floats, Floats]:
        """(N,) floor and (N,) threshold of every row, both -inf where its group accepts nothing.

        Groups without their own have those of "(other)".

        Raises:
            UsageError: As ``accept``, or if whole batches are judged.

        Examples:
            >>> import numpy as np, vilu
            >>> day, night = np.linspace(0, 1, 100), np.linspace(0, 1, 100)
            >>> outcomes = vilu.Outcomes(
            ...     [*day, *night], [*(day > 0.9), *(night > 0.6)]
            ... )  # by night more is wrong
            >>> groups = ["day"] * 100 + ["night"] * 100
            >>> rule = vilu.calibrate(outcomes, max_risk=0.1, groups=groups)
            >>> floors, thresholds = rule.limits(2, ["day", "night"])
            >>> thresholds.round(2).tolist()
            [0.93, 0.61]
        """
        if self.needs_batch:
            raise UsageError("this rule judges whole batches, so no row has a limit of its own.")
        intervals = {name: threshold.interval for name, threshold in self.thresholds.items()}
        without_group = intervals.get(OTHER, (-math.inf, -math.inf))
        rows = [intervals.get(name, without_group) for name in self._group_of_each(n, groups)]
        ends = np.array(rows, dtype=np.float64).reshape(n, 2)
        return ends[:, 0], ends[:, 1]

    def _group_of_each(self, n: int, groups: Sequence[str] | None) -> Sequence[str]:
        """Names of the groups of n rows, as the thresholds are called."""
        if self.grouped_by is None:
            return [ALL] * n
        names = check_texts(groups, "groups")
        if names is None or len(names) != n:
            raise UsageError(
                f"with a threshold per group this rule needs the group of each of {n} rows, as "
                "text."
            )
        return names

    def accept(
        self, uncertainty: ArrayLike, groups: Sequence[str] | None = None
    ) -> NDArray[np.bool_]:
        """(N,) whether each answer is accepted; one without an uncertainty (NaN) is not.

        Args:
            uncertainty: (N,) of the same predictor as the calibration rows; all of a batch, where
                the rule judges whole batches.
            groups: N names of groups, where the rule has them.

        Raises:
            UsageError: If groups are needed, and there is not one for every row.
            DataError: If ``uncertainty`` is no vector of numbers, or ``groups`` no list of texts.

        Examples:
            >>> import numpy as np, vilu
            >>> calibration = vilu.Outcomes(
            ...     np.linspace(0, 0.5, 100), np.zeros(100)
            ... )  # all are right
            >>> rule = vilu.calibrate(calibration, max_risk=0.05)
            >>> rule.accept([0.1, 0.5, 0.6, np.nan]).tolist()
            [True, True, False, False]
        """
        scores = real_vector(uncertainty, "uncertainty")
        if self.needs_batch:
            return selected(self.p_values(scores), self.max_risk or 0.0)
        floors, thresholds = self.limits(len(scores), groups)
        return (scores > floors) & (scores <= thresholds)

    def p_values(self, uncertainty: ArrayLike) -> Floats:
        """(N,) conformal p-values of a batch; NaN without an uncertainty.

        Only a rule that judges whole batches has them.

        Examples:
            >>> import numpy as np, vilu
            >>> calibration = vilu.Outcomes(np.linspace(0, 1, 19), np.zeros(19))
            >>> rule = vilu.calibrate(calibration, max_risk=0.05, method="selection")
            >>> rule.p_values([0.5]).tolist()
            [0.05]
        """
        if not self.needs_batch:
            raise UsageError(f"the method {self.method} has thresholds, and no p-values.")
        return p_values(real_vector(uncertainty, "uncertainty"), self.wrong, self.n)

    def reasons(
        self, uncertainty: ArrayLike, groups: Sequence[str] | None = None
    ) -> list[str | None]:
        """Per row why it is not accepted, else None.

        "above_threshold", "below_floor" (answers trusted as much are too often wrong),
        "not_certified" (its group accepts nothing), or "not_selected" (of a batch). Errors are
        those of ``accept``.
        """
        scores = real_vector(uncertainty, "uncertainty")
        reasons = np.full(len(scores), None, dtype=object)
        if self.needs_batch:
            reasons[~self.accept(scores)] = "not_selected"
        else:
            floors, thresholds = self.limits(len(scores), groups)
            reasons[~(scores <= thresholds)] = "above_threshold"
            reasons[scores <= floors] = "below_floor"
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
        counted = "" if self.counted is None else f": {self.counted}"
        return (
            "accepts what it can of a batch, of which on average at most "
            f"{percent(self.max_risk or 0.0)} are wrong ({len(self.wrong)} wrong of {self.n} "
            f"calibration rows{counted})"
        )

    def _guarantee(self) -> str:
        bound = self.risk_bound
        if bound is None:
            return "nothing is accepted"
        sure = f"with confidence {exactly(self.confidence)}"
        what = "of the accepted answers are wrong"
        if self.method == "crc":
            sure = "on average"
            what = "of all answers are accepted and wrong"
        rows = f"{self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n} calibration rows"
        share = ""
        shares = ""
        if self.reweighted:
            rows += ", whose shares are others"
            share = " of the calibration rows"
            shares = f" {in_words(self.outside_share, self.class_shares)}"
        if self.counted is not None:
            rows += f": {self.counted}"
        if self.method == "anytime":
            rows += ", at whatever moment one looks"
            share = " of the calibration rows"
        but = ""
        if any(threshold.floor is not None for threshold in self.thresholds.values()):
            but = ", and leaves the most trusted for review, which are too often wrong"
        accepts = f"accepts {self.coverage:.1%}{share}{but}"
        return f"{accepts}; {sure} at most {percent(bound)} {what}{shares} ({rows})"


@checked
def calibrate(
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
    """A threshold below which the error rate of accepted answers is at most ``max_risk``.

    "ltt" guarantees it with probability ``confidence`` over the draw of the calibration rows; "crc"
    guarantees the mean of another risk, the share of *all* answers that is accepted and wrong. Rows
    of one ``picture`` count once, as wrong where any of them is. Both need calibration rows that
    are drawn as the later ones are and were not used to fit; nothing is guaranteed when the data
    shift. A target that cannot be met is an answer: ``feasible`` is False, and the threshold says
    what is missing.

    Args:
        outcomes: Calibration rows; those without uncertainty or known failure are left out.
        max_risk: Largest error rate among accepted answers ("crc": among all), in [0, 1].
        confidence: 1 - delta, in (0, 1).
        min_coverage: Least share to accept, at the stated shares if there are such. With
            ``max_risk``, a threshold that accepts less counts as infeasible; alone, the strictest
            threshold that accepts so much, with the bound of its risk.
        method: "ltt" or "crc", see ``vilu.calibration.thresholds``; or "selection", which accepts
            part of a batch such that E[share of wrong ones among the accepted] <= max_risk, see
            ``vilu.calibration.selection``. The fourth method of a rule, "anytime", needs labels one
            after another: ``vilu calibrate --method anytime`` makes it.
        groups: N names, or "prediction" for the zero-shot answer: a threshold for each with enough
            rows, the others together, as "(other)", with a group that is called so; delta is
            divided among them, so that all guarantees hold at once. A least coverage alone is that
            of every group.
        outside_share: Share of pictures of none of the classes to be expected, in [0, 1), where it
            is not that of the calibration rows; those that are ``outside`` there stand for them.
            The guarantee holds for every smaller share of pictures like them, too. "ltt" alone,
            without groups.
        class_shares: Shares of the classes among all others, by name, to be expected: of every
            class, 0 where it is.

    Raises:
        UsageError: If neither target is given or one is out of range.
        DataError: If no row can be used, more than 1 % of the rows were used to fit the predictor
            (as ``vilu.score`` has counted), or there is not one group per row.
        InfeasibleError: If "selection" has fewer rows than can select anything.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> uncertainty = rng.random(1000)
        >>> calibration = vilu.Outcomes(uncertainty, rng.random(1000) < uncertainty**2)
        >>> rule = vilu.calibrate(calibration, max_risk=0.1)
        >>> round(rule.threshold, 2), rule.n_accepted, rule.n_wrong
        (0.37, 338, 23)
        >>> few = vilu.calibrate(vilu.Outcomes(np.linspace(0, 1, 50), np.zeros(50)), max_risk=0.05)
        >>> (
        ...     few.feasible,
        ...     few.thresholds[""].n_needed,
        ... )  # 0.95**59 < 0.05, and a row for the threshold
        (False, 60)
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
    return rule_of(outcomes, target, groups)


def rule_of(
    outcomes: Outcomes, target: Target, groups: Sequence[str] | Literal["prediction"] | None = None
) -> Rule:
    """The rule that calibration rows support for a target, in which nothing may be accepted.

    As ``calibrate``.
    """
    keep, counted = count_once(outcomes, evaluable(outcomes))
    rows = outcomes.take(keep)
    thresholds: dict[str, Threshold] = {}
    wrong: tuple[float, ...] = ()
    n = len(rows)
    if target.method == "selection":
        n, wrong = _to_select_by(rows, target)
    elif target.states_shares:
        thresholds = {ALL: _for_shares(rows, target)}
    else:
        names = None if groups is None else _names(outcomes, groups, keep)
        thresholds = _for_groups(rows, names, target)
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
        wrong=wrong,
        outside_share=target.outside_share,
        class_shares=None if target.class_shares is None else dict(target.class_shares),
        counted=counted,
    )


def _to_select_by(rows: Outcomes, target: Target) -> tuple[int, tuple[float, ...]]:
    """How many rows batches are compared with, and the scores of the wrong ones, ascending.

    There are a million at most.
    """
    max_risk = target.max_risk or 0.0
    fewest = rows_for_mean(max_risk)
    chosen = drawn(len(rows))
    n = len(chosen)
    if n < fewest:
        raise InfeasibleError(
            f"with {n} calibration rows no answer can be selected at a risk of "
            f"{percent(max_risk)}: no p-value is below 1 / {n + 1}. At least {fewest} rows are "
            "needed."
        )
    is_wrong = rows.failure[chosen] == 1
    wrong = np.sort(rows.uncertainty[chosen][is_wrong])
    return n, tuple(wrong.tolist())


def rule_at_any_time(
    groups: Mapping[str, tuple[Looks, Outcomes]], max_risk: float, confidence: float
) -> Rule:
    """The rule that labels support which came one after another, of every group by itself.

    Of a group there are the thresholds that may be certified, and the rows whose labels count.
    One group of all rows is called "".
    """
    thresholds: dict[str, Threshold] = {}
    for name, (looks, rows) in groups.items():
        thresholds[name] = _by_labels(looks, rows, max_risk)
    return Rule(
        method="anytime",
        max_risk=max_risk,
        confidence=confidence,
        grouped_by=None if ALL in groups else "prediction",
        thresholds=thresholds,
        n=sum(threshold.n for threshold in thresholds.values()),
    )


def _by_labels(looks: Looks, rows: Outcomes, max_risk: float) -> Threshold:
    """The laxest threshold that labels certify so far, or what they lack."""
    at = looks.certified(rows.uncertainty, rows.failure)
    wrong, accepted = looks.counts(rows.uncertainty, rows.failure)
    if at is not None:
        return Threshold(
            threshold=float(looks.grid[at]),
            n=len(rows),
            n_accepted=int(accepted[at]),
            n_wrong=int(wrong[at]),
            risk_bound=max_risk,
        )
    more = looks.more_needed(rows.uncertainty, rows.failure)
    last = looks.last
    why = (
        f"of {int(accepted[last])} labels up to the limit {int(wrong[last])} are wrong, and these "
        f"scores do not single out answers with an error rate below {max_risk:.2%}"
    )
    if more is not None:
        why = (
            f"about {more:,} more labels of the calibration side are needed, if errors go on as so "
            "far"
        )
    return Threshold.nothing(len(rows), why)


def evaluable(outcomes: Outcomes) -> NDArray[np.bool_]:
    """(N,) rows that can be calibrated on; refuses to have none, and rows of the fit."""
    refuse_fitted(outcomes)
    keep = outcomes.evaluable
    if not keep.any():
        raise DataError(
            "calibration needs rows with an uncertainty and a known failure. "
            f"None of the {len(outcomes)} rows has both."
        )
    return keep


def refuse_fitted(outcomes: Outcomes) -> None:
    """Refuse outcomes of which more than 1 % are of rows of the predictor's fit; warn of fewer."""
    provenance = outcomes.provenance
    n_seen = provenance.get("n_seen_in_fit")
    if not isinstance(n_seen, int) or n_seen == 0:
        return
    n_comparable = provenance.get("n_compared_with_fit")
    if not isinstance(n_comparable, int):
        n_comparable = len(outcomes)
    overlap = f"at least {n_seen} of these rows were used to fit the predictor"
    remedy = (
        "Score rows that it has not seen: data.take(np.flatnonzero(~predictor.seen(data).shared))"
    )
    if n_seen > MAX_SHARED * n_comparable:
        raise DataError(
            f"{overlap}, more than {MAX_SHARED:.0%} of the {n_comparable} that can be told. "
            f"{LEARNED_FROM} {remedy}."
        )
    warn_caller(f"{overlap}. {LEARNED_FROM} {remedy}.")


def group_names(outcomes: Outcomes) -> list[str]:
    """N names of the groups "prediction": the zero-shot answers; "" where there is none."""
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


def _names(outcomes: Outcomes, groups: Sequence[str], keep: Ints) -> list[str]:
    """Group of every row that counts (M,)."""
    names: Sequence[str] | None
    if isinstance(groups, str):
        names = group_names(outcomes)
    else:
        names = check_texts(groups, "groups") or ()
    if len(names) != len(outcomes):
        raise DataError(
            f"groups must name one group per row ({len(outcomes)}). Got {len(names)} instead."
        )
    return [names[row] for row in keep.tolist()]


def members_of(
    names: list[str] | None, n: int, delta: float, fewest: Callable[[float], int]
) -> dict[str, Ints]:
    """Rows of each group: as many groups of their own as have enough rows for their share of delta.

    The largest come first, and the smaller ones are one group together. Only the sizes of the
    groups decide.
    """
    if names is None:
        return {ALL: np.arange(n)}
    sizes = Counter(names)
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    n_own = 0
    for n_groups in range(1, len(ranked) + 1):
        # the smaller ones have a share, too, unless none is left over
        n_shares = min(n_groups + 1, len(ranked))
        smallest = ranked[n_groups - 1]
        if sizes[smallest] >= fewest(delta / n_shares):
            n_own = n_groups
    own = set(ranked[:n_own])
    group_of = np.array([name if name in own else OTHER for name in names], dtype=object)
    members: dict[str, Ints] = {}
    for name in [*sorted(own), OTHER]:
        rows = np.flatnonzero(group_of == name)
        if len(rows):
            members[name] = rows
    return members


def _for_groups(rows: Outcomes, names: list[str] | None, target: Target) -> dict[str, Threshold]:
    """The best threshold of every group.

    None of them where together they accept less than was asked for.
    """

    def fewest(delta: float) -> int:
        return _fewest(target, delta)

    delta = 1 - target.confidence
    members = members_of(names, len(rows), delta, fewest)
    # All groups are to hold at once: with all of delta each, one of them would break its guarantee
    # far more often (union bound).
    level = delta / len(members)
    thresholds = {}
    for name, places in members.items():
        counts = tie_counts(rows.uncertainty[places], rows.failure[places])
        thresholds[name] = _best(counts, target, level)
    why = _why_not_all(thresholds, target)
    if why is None:
        return thresholds
    for name, threshold in thresholds.items():
        thresholds[name] = Threshold.nothing(threshold.n, why, threshold.n_needed)
    return thresholds


def _why_not_all(thresholds: Mapping[str, Threshold], target: Target) -> str | None:
    """Why the groups together fall short of the coverage that was asked for.

    None where they do not.
    """
    if target.min_coverage is None:
        return None
    if target.max_risk is None:
        for threshold in thresholds.values():
            if threshold.threshold is None:
                return threshold.why
        return None
    n = sum(threshold.n for threshold in thresholds.values())
    n_accepted = sum(threshold.n_accepted for threshold in thresholds.values())
    if 0 < n_accepted < (target.min_coverage - ROUNDING) * n:
        return _too_little(n_accepted / n, target.min_coverage)
    return None


def _too_little(coverage: float, asked: float) -> str:
    return (
        f"the risk is attained at {coverage:.1%} coverage at most, less than the {asked:.1%} asked "
        "for"
    )


def _for_shares(rows: Outcomes, target: Target) -> Threshold:
    """The best threshold for stated shares, or why there is none."""
    strata = Strata(rows, target.outside_share, target.class_shares)
    max_risk = target.max_risk or 0.0
    delta = 1 - target.confidence
    require_every_class(rows, target.class_shares)
    best: Threshold | None = None
    if not strata.lacking(max_risk, delta):
        is_wrong = rows.failure == 1
        best = weighted_learn_then_test(rows.uncertainty, is_wrong, strata.weight, max_risk, delta)
    if best is None:
        return Threshold.nothing(len(rows), why_nothing(strata, max_risk, delta))
    floor, limit = best.interval
    accepted = (rows.uncertainty > floor) & (rows.uncertainty <= limit)
    coverage = float(strata.weight[accepted].sum()) / len(rows)
    if target.min_coverage is not None and coverage < target.min_coverage - ROUNDING:
        return Threshold.nothing(len(rows), _too_little(coverage, target.min_coverage))
    return best


def _best(counts: TieCounts, target: Target, delta: float) -> Threshold:
    """The best threshold of a group at level delta, or why there is none."""
    if target.max_risk is None:
        best = coverage_first(counts, target.min_coverage or 1.0, delta)
    else:
        best = PROCEDURES[target.method](counts, target.max_risk, delta)
    if best is not None:
        return best
    why, n_needed = _why_nothing(counts, target, delta)
    return Threshold.nothing(int(counts.n), why, n_needed)


def _fewest(target: Target, delta: float) -> int:
    """Fewest rows of a group for which anything can be guaranteed at level delta."""
    if target.max_risk is None:
        if target.min_coverage in {None, 1.0}:
            return 1
        return rows_for_coverage(target.min_coverage or 1.0, delta)
    if target.method == "crc":
        return rows_for_mean(target.max_risk)
    return rows_without_error(target.max_risk, delta) + 1  # the row at the threshold is no trial


def _why_nothing(counts: TieCounts, target: Target, delta: float) -> tuple[str, int | None]:
    """Why no threshold is certified, and the fewest calibration rows, where there are fewer."""
    n = int(counts.n)
    max_risk = target.max_risk
    fewest = _fewest(target, delta)
    if max_risk is None:
        why = f"{n} rows cannot show that {target.min_coverage:.1%} of all answers are accepted"
        if target.min_coverage == 1:
            return why, None  # no number of rows would
        return why, fewest
    if target.method == "crc":
        if n < fewest:
            why = f"{n} rows are fewer than the {fewest} that a mean of {max_risk:.2%} takes"
            return why, fewest
        wrong = int(counts.accepted_wrong[0])
        return f"{wrong} of the most trusted answers, equal in score, are wrong", None
    if n < fewest:
        right = int(counts.accepted[counts.accepted_wrong == 0].max(initial=0))
        why = (
            f"{max_risk:.2%} takes {fewest:,} accepted answers, none of them wrong, and there are "
            f"{n:,} rows, of which the {right:,} most trusted are right"
        )
        return why, fewest
    return _why_not_enough(counts, max_risk, delta), None


def _why_not_enough(counts: TieCounts, max_risk: float, delta: float) -> str:
    """Why no threshold is certified although there are rows enough for one."""
    best = int(np.argmin(tail(counts.accepted_wrong, counts.accepted, max_risk)))
    accepted = int(counts.accepted[best])
    wrong = int(counts.accepted_wrong[best])
    verb = "is" if wrong == 1 else "are"
    most_trusted = f"of the {accepted:,} most trusted answers {wrong:,} {verb} wrong"
    if wrong >= max_risk * accepted:
        return (
            f"{most_trusted}: these scores do not single out answers with an error rate below "
            f"{max_risk:.2%}"
        )
    needed = accepted_needed(wrong, max_risk, delta)
    if needed is not None and needed > accepted:
        return (
            f"{most_trusted}, and with so many wrong {max_risk:.2%} takes at least {needed:,} "
            "accepted answers"
        )
    return f"{most_trusted}, which would do if this were the only threshold that is tried"
