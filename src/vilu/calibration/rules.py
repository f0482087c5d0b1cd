"""From scores on calibration rows to a rule that accepts or abstains, with its promise."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from vilu.artifacts.documents import Model
from vilu.calibration.shares import (
    Strata,
    check_shares,
    in_words,
    require_every_class,
    weighted_learn_then_test,
    why_nothing,
)
from vilu.calibration.thresholds import (
    METHODS,
    Point,
    accepted_needed,
    coverage_first,
    exactly,
    percent,
    rows_for_coverage,
    rows_for_mean,
    rows_without_error,
    sgr_steps,
    tail,
)
from vilu.calibration.units import CountedRows, count_once
from vilu.errors import DataError, UsageError
from vilu.metrics.counts import Floats, Ints, TieCounts, real_vector, tie_counts
from vilu.outcomes.outcomes import Outcomes, check_texts
from vilu.predictors.contract.seen import LEARNED_FROM, MAX_SHARED
from vilu.validation import checked, require_between, require_one_of

ALL, OTHER = "", "(other)"
"""Names of the group of all rows, and of the group of what has too few calibration rows for a group of its own."""

Promise = Literal["ltt", "sgr", "crc", "anytime"]


class Certificate(Model):
    """A threshold and the calibration rows behind it."""

    threshold: float | None  # accept where the uncertainty is at most this; None: accept nothing
    n: int = Field(ge=0)  # calibration rows
    n_accepted: int = Field(ge=0)  # how many of them the threshold accepts
    n_wrong: int = Field(ge=0)  # how many of those are wrong
    risk_bound: float | None  # what is promised; None where nothing is accepted
    why: str | None = None  # why nothing is accepted
    # so many calibration rows are needed at least, where there are fewer; else None. How many would
    # be enough depends on how many of them are accepted and right
    n_needed: int | None = None
    # abstain where the uncertainty is at most this, too: too many of the most trusted answers are
    # wrong. None: no answer is too trusted
    floor: float | None = None

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that is accepted."""
        return self.n_accepted / self.n if self.n else 0.0


class Selector(Model):
    """Accepts answers whose uncertainty is at most a threshold, one for all rows or one per group.

    And above a floor, where a certificate has one.

    Attributes:
        method: "ltt", "sgr", "crc", or "anytime" (``vilu.calibration.anytime``): looked at again and
            again.
        max_risk: The target; None where a coverage was asked for alone.
        min_coverage: Least coverage asked for; None for any.
        confidence: 1 - delta; with several groups the promises hold for all of them together with
            it.
        grouped_by: "prediction" (the zero-shot answer), "groups" (given by the caller), or None.
        certificates: Per group; one group "" without groups.
        outside_share: Share of pictures of none of the classes up to which the promise holds; None:
            that of the calibration rows.
        class_shares: Shares of the classes, among the others, at which it holds; None: those of the
            calibration rows.
        counted: How many files and pictures the calibration rows are; None where every file shows
            another picture, or nothing is known of pictures.

    Examples:
        >>> import numpy as np, vilu
        >>> uncertainty = np.linspace(0, 1, 101)
        >>> selector = vilu.calibrate(
        ...     vilu.Outcomes(uncertainty, uncertainty > 0.795), max_risk=0.05
        ... )
        >>> round(selector.threshold, 2), selector.n_wrong, selector.n_accepted
        (0.79, 0, 80)
        >>> selector.accept([0.2, 0.99, np.nan]).tolist()
        [True, False, False]
        >>> selector.reasons([0.2, 0.99])
        [None, 'above_threshold']
    """

    kind: Literal["threshold"] = "threshold"
    needs_batch: ClassVar[bool] = False

    method: Promise
    max_risk: float | None = Field(ge=0, le=1)
    min_coverage: float | None = Field(gt=0, le=1)
    confidence: float = Field(gt=0, lt=1)
    grouped_by: Literal["prediction", "groups"] | None = None
    certificates: dict[str, Certificate]
    outside_share: float | None = Field(default=None, ge=0, lt=1)
    class_shares: dict[str, float] | None = None
    counted: CountedRows | None = None

    @property
    def reweighted(self) -> bool:
        """Whether the promise is for stated shares, others than those of the calibration rows."""
        return self.outside_share is not None or self.class_shares is not None

    @property
    def feasible(self) -> bool:
        """Whether anything is accepted."""
        return self.n_accepted > 0

    @property
    def n(self) -> int:
        """Calibration rows."""
        return sum(one.n for one in self.certificates.values())

    @property
    def n_accepted(self) -> int:
        """Calibration rows that are accepted."""
        return sum(one.n_accepted for one in self.certificates.values())

    @property
    def n_wrong(self) -> int:
        """Accepted calibration rows that are wrong."""
        return sum(one.n_wrong for one in self.certificates.values())

    @property
    def coverage(self) -> float:
        """Share of the calibration rows that is accepted."""
        return self.n_accepted / self.n

    @property
    def risk_bound(self) -> float | None:
        """What is promised; with groups the largest of their bounds."""
        bounds = [
            one.risk_bound for one in self.certificates.values() if one.risk_bound is not None
        ]
        return max(bounds) if bounds else None

    @property
    def threshold(self) -> float | None:
        """Accept where the uncertainty is at most this; None: accept nothing.

        Raises:
            UsageError: If every group has its own.
        """
        return self._only("threshold").threshold

    @property
    def floor(self) -> float | None:
        """Accept where the uncertainty is above this only; None: no answer is too trusted.

        Raises:
            UsageError: If every group has its own.
        """
        return self._only("floor").floor

    def _only(self, what: str) -> Certificate:
        if self.grouped_by is not None:
            raise UsageError(f"this selector has a {what} per group: see its certificates.")
        return self.certificates[ALL]

    def limits(self, n: int, groups: Sequence[str] | None) -> tuple[Floats, Floats]:
        """(N,) floor and (N,) threshold of every row, both -inf where its group accepts nothing.

        Groups without their own have those of "(other)".

        Raises:
            UsageError: As ``accept``.

        Examples:
            >>> import numpy as np, vilu
            >>> day, night = np.linspace(0, 1, 100), np.linspace(0, 1, 100)
            >>> outcomes = vilu.Outcomes(
            ...     [*day, *night], [*(day > 0.9), *(night > 0.6)]
            ... )  # by night more is wrong
            >>> selector = vilu.calibrate(
            ...     outcomes, max_risk=0.1, groups=["day"] * 100 + ["night"] * 100
            ... )
            >>> floors, thresholds = selector.limits(2, ["day", "night"])
            >>> thresholds.round(2).tolist()
            [0.93, 0.61]
        """
        names = [ALL] * n if self.grouped_by is None else check_texts(groups, "groups")
        if names is None or len(names) != n:
            raise UsageError(
                f"with a threshold per group this selector needs the group of each of {n} rows, as text."
            )
        ends = {name: interval(one) for name, one in self.certificates.items()}
        other = ends.get(OTHER, (-np.inf, -np.inf))
        found = np.array([ends.get(name, other) for name in names], dtype=np.float64).reshape(n, 2)
        return found[:, 0], found[:, 1]

    def accept(
        self, uncertainty: ArrayLike, groups: Sequence[str] | None = None
    ) -> NDArray[np.bool_]:
        """(N,) whether each answer is accepted; one without an uncertainty (NaN) is not.

        Args:
            uncertainty: (N,) of the same predictor as the calibration rows.
            groups: N names of groups, where the selector has them.

        Raises:
            UsageError: If groups are needed, and there is not one for every row.
            DataError: If ``uncertainty`` is no vector of numbers, or ``groups`` no list of texts.

        Examples:
            >>> import numpy as np, vilu
            >>> calibration = vilu.Outcomes(
            ...     np.linspace(0, 0.5, 100), np.zeros(100)
            ... )  # all are right
            >>> selector = vilu.calibrate(calibration, max_risk=0.05)
            >>> selector.accept([0.1, 0.5, 0.6, np.nan]).tolist()
            [True, True, False, False]
        """
        scores = real_vector(uncertainty, "uncertainty")
        floors, thresholds = self.limits(len(scores), groups)
        return (scores > floors) & (scores <= thresholds)

    def reasons(
        self, uncertainty: ArrayLike, groups: Sequence[str] | None = None
    ) -> list[str | None]:
        """Per row why it is not accepted, else None.

        "above_threshold", "below_floor" (answers trusted as much are too often wrong), or
        "not_certified" (its group accepts nothing). Errors are those of ``accept``.
        """
        scores = real_vector(uncertainty, "uncertainty")
        floors, thresholds = self.limits(len(scores), groups)
        found = np.full(len(scores), None, dtype=object)
        found[~(scores <= thresholds)] = "above_threshold"
        found[scores <= floors] = "below_floor"
        found[thresholds == -np.inf] = "not_certified"
        return found.tolist()

    def __str__(self) -> str:
        lines = [self._promise()]
        if self.grouped_by is not None:
            lines += [f"  {name}: {describe(one)}" for name, one in self.certificates.items()]
        return "\n".join(lines)

    def _promise(self) -> str:
        bound = self.risk_bound
        if bound is None:
            return "nothing is accepted"
        sure = (
            f"with confidence {exactly(self.confidence)}" if self.method != "crc" else "on average"
        )
        what = (
            "of all answers are accepted and wrong"
            if self.method == "crc"
            else "of the accepted answers are wrong"
        )
        found = f"{self.n_wrong} wrong of {self.n_accepted} accepted, of {self.n} calibration rows"
        found += ", whose shares are others" if self.reweighted else ""
        found += f": {self.counted}" if self.counted is not None else ""
        found += ", at whatever moment one looks" if self.method == "anytime" else ""
        floors = any(one.floor is not None for one in self.certificates.values())
        but = ", and abstains from the most trusted, which are too often wrong" if floors else ""
        shares = f" {in_words(self.outside_share, self.class_shares)}" if self.reweighted else ""
        of = " of the calibration rows" if self.reweighted or self.method == "anytime" else ""
        return f"accepts {self.coverage:.1%}{of}{but}; {sure} at most {percent(bound)} {what}{shares} ({found})"


def describe(certificate: Certificate) -> str:
    """A certificate in words."""
    if certificate.threshold is None:
        return f"accepts nothing: {certificate.why}"
    found = f"{certificate.n_wrong} wrong of {certificate.n_accepted} accepted, of {certificate.n}"
    floor = "" if certificate.floor is None else f"{certificate.floor:.6g} < "
    return f"{floor}uncertainty <= {certificate.threshold:.6g} accepts {certificate.coverage:.1%} ({found})"


def interval(certificate: Certificate) -> tuple[float, float]:
    """Accepted are uncertainties above the first number up to the second; both -inf where nothing is."""
    floor, threshold = certificate.floor, certificate.threshold
    return -np.inf if floor is None else floor, -np.inf if threshold is None else threshold


@checked
def calibrate(
    outcomes: Outcomes,
    *,
    max_risk: float | None = None,
    confidence: float = 0.95,
    min_coverage: float | None = None,
    method: Promise = "ltt",
    groups: Sequence[str] | Literal["prediction"] | None = None,
    outside_share: float | None = None,
    class_shares: Mapping[str, float] | None = None,
) -> Selector:
    """A threshold on the uncertainty such that the error rate among accepted answers is at most ``max_risk``.

    "ltt" and "sgr" promise it with probability ``confidence`` over the draw of the calibration
    rows; "crc" promises the mean of another risk, the share of *all* answers that is accepted and
    wrong. Rows of one ``picture`` count once, as wrong where any of them is. All need calibration
    rows that are drawn as the later ones are and were not used to fit; nothing is promised when the
    data shift. A target that cannot be met is an answer: ``feasible`` is False, and the certificate
    says what is missing.

    Args:
        outcomes: Calibration rows; those without uncertainty or known failure are left out.
        max_risk: Largest error rate among accepted answers ("crc": among all), in [0, 1].
        confidence: 1 - delta, in (0, 1).
        min_coverage: Least share to accept, at the stated shares if there are such. With
            ``max_risk``, a threshold that accepts less counts as infeasible; alone, the strictest
            threshold that accepts so much, with the bound of its risk.
        method: "ltt", "sgr" or "crc"; see ``vilu.calibration.thresholds``.
        groups: N names, or "prediction" for the zero-shot answer: a threshold for each with enough
            rows, the others together, as "(other)", with a group that is called so; delta is
            divided among them, so that all promises hold at once. A least coverage alone is that of
            every group.
        outside_share: Share of pictures of none of the classes to be expected, in [0, 1), where it
            is not that of the calibration rows; those that are ``outside`` there stand for them.
            The promise holds for every smaller share of pictures like them, too. "ltt" alone,
            without groups.
        class_shares: Shares of the classes among all others, by name, to be expected: of every
            class, 0 where it is.

    Raises:
        UsageError: If neither target is given or one is out of range.
        DataError: If no row can be used, more than 1 % of the rows were used to fit the predictor
            (as ``vilu.score`` has counted), or there is not one group per row.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> uncertainty = rng.random(1000)
        >>> calibration = vilu.Outcomes(uncertainty, rng.random(1000) < uncertainty**2)
        >>> selector = vilu.calibrate(calibration, max_risk=0.1)
        >>> round(selector.threshold, 2), selector.n_accepted, selector.n_wrong
        (0.37, 338, 23)
        >>> few = vilu.calibrate(vilu.Outcomes(np.linspace(0, 1, 50), np.zeros(50)), max_risk=0.05)
        >>> (
        ...     few.feasible,
        ...     few.certificates[""].n_needed,
        ... )  # 0.95**59 < 0.05, and a row for the threshold
        (False, 60)
    """
    check_target(max_risk, min_coverage, confidence, method)
    check_stated(outside_share, class_shares, max_risk, method, grouped=groups is not None)
    keep, counted = count_once(outcomes, evaluable(outcomes))
    goal, shares = (
        _Goal(max_risk, min_coverage, method),
        None if class_shares is None else dict(class_shares),
    )
    if outside_share is not None or shares is not None:
        certificates = {
            ALL: goal.certify_shares(outcomes.take(keep), outside_share, shares, 1 - confidence)
        }
    else:
        uncertainty, failure = outcomes.uncertainty[keep], outcomes.failure[keep]
        members = members_of(
            _names(outcomes, groups, keep), len(failure), 1 - confidence, goal.fewest
        )
        delta = (1 - confidence) / len(members)
        found = {
            name: goal.certify(tie_counts(uncertainty[at], failure[at]), delta)
            for name, at in members.items()
        }
        certificates = goal.all_or_none(found)
    return Selector(
        method=method,
        max_risk=max_risk,
        min_coverage=min_coverage,
        confidence=confidence,
        grouped_by=None
        if groups is None
        else "prediction"
        if isinstance(groups, str)
        else "groups",
        certificates=certificates,
        outside_share=outside_share,
        class_shares=shares,
        counted=counted,
    )


def check_stated(
    outside_share: float | None,
    class_shares: Mapping[str, float] | None,
    max_risk: float | None,
    method: str,
    *,
    grouped: bool,
) -> None:
    """Refuse shares that cannot be, or with which nothing can be promised."""
    check_shares(outside_share, class_shares)
    if (outside_share is not None or class_shares is not None) and (
        max_risk is None or method != "ltt" or grouped
    ):
        raise UsageError("stated shares take a max_risk, the method ltt, and no groups.")


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
    n_told = provenance.get("n_compared_with_fit")
    if not isinstance(n_told, int):
        n_told = len(outcomes)
    found = f"at least {n_seen} of these rows were used to fit the predictor"
    remedy = (
        "Score rows that it has not seen: data.take(np.flatnonzero(~predictor.seen(data).shared))"
    )
    if n_seen > MAX_SHARED * n_told:
        raise DataError(
            f"{found}, more than {MAX_SHARED:.0%} of the {n_told} that can be told. "
            f"{LEARNED_FROM} {remedy}."
        )
    warnings.warn(f"{found}. {LEARNED_FROM} {remedy}.", stacklevel=5)


def group_names(outcomes: Outcomes) -> list[str]:
    """N names of the groups "prediction": the zero-shot answers; "" where there is none."""
    if outcomes.prediction is None:
        raise DataError(
            "groups by prediction need outcomes that say what was answered. These do not."
        )
    names = outcomes.class_names
    return [
        "" if c < 0 else str(c) if names is None else names[c] for c in outcomes.prediction.tolist()
    ]


def _names(outcomes: Outcomes, groups: Sequence[str] | None, keep: Ints) -> list[str] | None:
    """Group of every row that is kept (M,)."""
    if groups is None:
        return None
    names = (
        group_names(outcomes) if isinstance(groups, str) else check_texts(groups, "groups") or ()
    )
    if len(names) != len(outcomes):
        raise DataError(
            f"groups must name one group per row ({len(outcomes)}). Got {len(names)} instead."
        )
    return [names[row] for row in keep.tolist()]


def check_target(
    max_risk: float | None, min_coverage: float | None, confidence: float, method: str
) -> None:
    """Refuse what cannot be promised."""
    if max_risk is None and min_coverage is None:
        raise UsageError("what is to be promised? Give max_risk, min_coverage or both.")
    if max_risk is not None:
        require_between("max_risk", max_risk)
    if min_coverage is not None:
        require_between("min_coverage", min_coverage, "(0, 1]")
    require_between("confidence", confidence)
    require_one_of("method", method, METHODS)


def members_of(
    names: list[str] | None, n: int, delta: float, fewest: Callable[[float], int]
) -> dict[str, Ints]:
    """Rows of each group: as many groups of their own as have enough rows for their share of delta, the largest first.

    The others are one group together. Only the sizes of the groups decide.
    """
    if names is None:
        return {ALL: np.arange(n)}
    sizes = Counter(names)
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    # with g groups of their own there are g + 1 shares, but g where nothing is left over
    enough = [
        g
        for g in range(1, len(ranked) + 1)
        if sizes[ranked[g - 1]] >= fewest(delta / min(g + 1, len(ranked)))
    ]
    own = set(ranked[: max(enough, default=0)])
    group = np.array([name if name in own else OTHER for name in names], dtype=object)
    found = {name: np.flatnonzero(group == name) for name in [*sorted(own), OTHER]}
    return {name: rows for name, rows in found.items() if len(rows)}


def _certificate(counts: TieCounts, point: Point) -> Certificate:
    """What is accepted at a point, of these calibration rows."""
    inside = slice(point.floor + 1, point.index + 1)
    return Certificate(
        threshold=float(counts.value[point.index]),
        n=int(counts.n),
        n_accepted=int(counts.size[inside].sum()),
        n_wrong=int(counts.wrong[inside].sum()),
        risk_bound=point.risk_bound,
        floor=float(counts.value[point.floor]) if point.floor >= 0 else None,
    )


def _nothing(n: int, why: str, n_needed: int | None = None) -> Certificate:
    return Certificate(
        threshold=None, n=n, n_accepted=0, n_wrong=0, risk_bound=None, why=why, n_needed=n_needed
    )


def _too_little(coverage: float, asked: float) -> str:
    return f"the risk is attained at {coverage:.1%} coverage at most, less than the {asked:.1%} asked for"


class _Goal(NamedTuple):
    """What every group is to keep, and the least coverage of all of them together."""

    max_risk: float | None
    min_coverage: float | None
    method: Promise

    def fewest(self, delta: float) -> int:
        """Fewest rows of a group for which anything can be promised at level delta."""
        if self.max_risk is None:
            return (
                1
                if self.min_coverage in {None, 1.0}
                else rows_for_coverage(self.min_coverage or 1.0, delta)
            )
        return (
            rows_for_mean(self.max_risk)
            if self.method == "crc"
            else rows_without_error(self.max_risk, delta) + 1
        )

    def certify(self, counts: TieCounts, delta: float) -> Certificate:
        """The best threshold, or why there is none."""
        if self.max_risk is not None:
            point = METHODS[self.method](counts, self.max_risk, delta)
        else:
            point = coverage_first(counts, self.min_coverage or 1.0, delta)
        return (
            _certificate(counts, point)
            if point
            else _nothing(int(counts.n), *self._why_nothing(counts, delta))
        )

    def certify_shares(
        self,
        rows: Outcomes,
        outside_share: float | None,
        class_shares: dict[str, float] | None,
        delta: float,
    ) -> Certificate:
        """The same for stated shares."""
        strata, max_risk, point = (
            Strata(rows, outside_share, class_shares),
            self.max_risk or 0.0,
            None,
        )
        require_every_class(rows, class_shares)
        if not strata.lacking(max_risk, delta):
            _, point = weighted_learn_then_test(
                rows.uncertainty, rows.failure == 1, strata.weight, max_risk, delta
            )
        if point is None:
            return _nothing(len(rows), *why_nothing(strata, max_risk, delta))
        one = _certificate(tie_counts(rows.uncertainty, rows.failure), point)
        floor, threshold = interval(one)
        accepted = (rows.uncertainty > floor) & (rows.uncertainty <= threshold)
        coverage = float(strata.weight[accepted].sum()) / len(rows)
        if (
            self.min_coverage is not None and coverage < self.min_coverage - 1e-9
        ):  # weights are rounded
            return _nothing(len(rows), _too_little(coverage, self.min_coverage))
        return one

    def all_or_none(self, certificates: dict[str, Certificate]) -> dict[str, Certificate]:
        """The certificates, or none of them where together they fall short of the coverage that was asked for."""
        if self.min_coverage is None:
            return certificates
        n, accepted = (
            sum(getattr(one, field) for one in certificates.values())
            for field in ("n", "n_accepted")
        )
        why = None
        if self.max_risk is None:
            why = next((one.why for one in certificates.values() if one.threshold is None), None)
        elif 0 < accepted < (self.min_coverage - 1e-9) * n:  # 55 are less than 0.55 * 100
            why = _too_little(accepted / n, self.min_coverage)
        if why is None:
            return certificates
        return {name: _nothing(one.n, why, one.n_needed) for name, one in certificates.items()}

    def _why_nothing(self, counts: TieCounts, delta: float) -> tuple[str, int | None]:
        """Why no threshold keeps the promise, and how many calibration rows it takes at least, where they are fewer."""
        n, max_risk = int(counts.n), self.max_risk
        if max_risk is None:
            why = f"{n} rows cannot show that {self.min_coverage:.1%} of all answers are accepted"
            return why, None if self.min_coverage == 1 else self.fewest(delta)
        if self.method == "crc":
            if n < (fewest := self.fewest(delta)):
                return (
                    f"{n} rows are fewer than the {fewest} that a mean of {max_risk:.2%} takes",
                    fewest,
                )
            return (
                f"{int(counts.accepted_wrong[0])} of the most trusted answers, equal in score, are wrong",
                None,
            )
        if self.method == "sgr":
            delta /= sgr_steps(len(counts.value))
        flawless = rows_without_error(max_risk, delta) + (self.method == "ltt")
        right = int(counts.accepted[counts.accepted_wrong == 0].max(initial=0))
        if n < flawless:
            why = (
                f"{max_risk:.2%} takes {flawless:,} accepted answers, none of them wrong, and there are {n:,} rows, of "
                f"which the {right:,} most trusted are right"
            )
            return why, flawless
        return self._why_not_enough(counts, delta), None

    def _why_not_enough(self, counts: TieCounts, delta: float) -> str:
        """Why no threshold is certified although there are rows enough for one."""
        max_risk = self.max_risk or 0.0
        best = int(np.argmin(tail(counts.accepted_wrong, counts.accepted, max_risk)))
        accepted, wrong = int(counts.accepted[best]), int(counts.accepted_wrong[best])
        found = f"of the {accepted:,} most trusted answers {wrong:,} {'is' if wrong == 1 else 'are'} wrong"
        if wrong >= max_risk * accepted:
            return f"{found}: these scores do not single out answers with an error rate below {max_risk:.2%}"
        needed = accepted_needed(wrong, max_risk, delta)
        if needed is not None and needed > accepted:
            return f"{found}, and with so many wrong {max_risk:.2%} takes at least {needed:,} accepted answers"
        return f"{found}, which would do if this were the only threshold that is tried"
