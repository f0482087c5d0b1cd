"""Guarantees for stated shares of out-of-distribution images, or for stated class shares.

The calibration rows are divided into strata. The out-of-distribution rows are one stratum. The
other rows are a single stratum, or one stratum per class if class shares are stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vilu.artifacts.tables import csv_rows
from vilu.calibration.thresholds import (
    FLOOR_LEVEL_SHARE,
    FLOOR_ROW_SHARES,
    NO_FLOOR,
    Threshold,
    find_sufficient_number,
    percent,
)
from vilu.errors import OUTSIDE_NAME, DataError, UsageError
from vilu.metrics.counts import Floats, Ints, tie_counts
from vilu.outcomes.outcomes import Outcomes
from vilu.validation import require_between

INSIDE_NAME: Final = "(inside)"
"""Name of the stratum with all rows in distribution, used if no class shares are stated."""

BET_SIZES: Final = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.05)
"""Bet sizes, divided by the largest possible bet.

The largest possible bet would lose all wealth at a single wrong row with the largest weight.
"""

MAX_STRATA_SHOWN: Final = 3
"""Largest number of strata in a message about strata with too few rows."""

SUM_TOLERANCE: Final = 1e-3
"""The sum of stated shares may differ from 1 by at most this number, because shares are rounded.

The shares are then divided by the sum.
"""


def read_shares(path: str | Path) -> dict[str, float]:
    """Read class shares from a CSV file with the columns ``class`` and ``share``.

    Raises:
        DataError: If the file is no CSV in UTF-8, lacks a column, names a class twice, or has a
            share that is not a number.
        StorageError: If the file cannot be read.
    """
    columns, rows = csv_rows(Path(path))
    if not {"class", "share"} <= set(columns):
        present = ", ".join(columns) or "none"
        raise DataError(f"{path} must have the columns class and share. It has {present}.")
    shares: dict[str, float] = {}
    for row in rows:
        name = row["class"]
        share = row["share"]
        if name in shares:
            raise DataError(f"{path} states the share of {name!r} twice.")
        try:
            shares[name] = float(share)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: the share of {name!r} must be a number. Got {share!r} instead."
            ) from error
    return shares


def check_shares(outside_share: float | None, class_shares: Mapping[str, float] | None) -> None:
    """Refuse shares out of range, and class shares that do not add up to 1."""
    if outside_share is not None:
        require_between("outside_share", outside_share, "[0, 1)")
    if class_shares is not None:
        # The type is Any, because a caller may pass values of any type.
        for name, share in dict[str, Any](class_shares).items():
            is_number = isinstance(share, int | float | np.number)
            is_valid_share = is_number and 0 <= share <= 1
            if not is_valid_share:
                raise UsageError(
                    f"the share of {name!r} must be a number in [0, 1]. Got {share!r} instead."
                )
        total = sum(class_shares.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise UsageError(
                "the shares of the classes are shares of the rows that belong to a class, so they "
                f"must add up to 1. They add up to {total:g}."
            )


def require_every_class(rows: Outcomes, class_shares: Mapping[str, float] | None) -> None:
    """Refuse stated shares if a class in the rows is missing. A share of 0 must be stated, too."""
    if class_shares is None or rows.class_names is None:
        return
    names = rows.class_names
    missing_names = [name for name in names if name not in class_shares]
    if missing_names:
        raise UsageError(
            f"no share is stated of {len(missing_names)} of the {len(names)} classes: "
            f"{', '.join(map(repr, missing_names))}. State the share of every class, 0 where none "
            "of its pictures is to be expected."
        )


class SmallStratum(NamedTuple):
    """A stratum with too few rows for any guarantee."""

    name: str
    n: int  # number of rows
    n_needed: int | None  # smallest sufficient number of rows, None if no number is enough


class Strata:
    """Calibration rows, divided into strata with stated shares.

    Args:
        rows: N rows with an uncertainty and a known failure.
        outside_share: Expected share of out-of-distribution images. None means not stated.
        class_shares: Expected share for each class among the rows within the classes. None means
            the shares among the calibration rows.

    Attributes:
        names: Names of the S strata.
        share: Stated share (S,) for every stratum.
        stratum: Index (N,) of each row's stratum.
        n_rows: Row count (S,) in every stratum.

    Raises:
        UsageError: If a share is stated for a class that the rows do not have, or if there are
            out-of-distribution rows and no stated share for such images.
        DataError: If class shares are stated and some row's class is not known.
    """

    def __init__(
        self, rows: Outcomes, outside_share: float | None, class_shares: Mapping[str, float] | None
    ) -> None:
        check_shares(outside_share, class_shares)
        if outside_share is None and rows.outside.any():
            raise UsageError(
                f"{np.count_nonzero(rows.outside)} of these rows are of none of the classes. State "
                "the share of such pictures that is to be expected, too (--outside-share)."
            )
        ood_share = outside_share or 0.0
        if class_shares is None:
            share_inside = {INSIDE_NAME: 1.0}
            stratum_inside = np.zeros(len(rows), dtype=np.int64)
        else:
            share_inside, stratum_inside = _classes_as_strata(rows, class_shares)
        total = sum(share_inside.values())
        shares = []
        for share in share_inside.values():
            # Rounded shares may not add up to exactly 1. Without the division by the sum, the
            # shares of all strata together would not add up to 1.
            shares.append((1 - ood_share) * share / total)
        self.names = [*share_inside, OUTSIDE_NAME]  # out-of-distribution rows: the last stratum
        self.share = np.array([*shares, ood_share])
        self.stratum = np.where(rows.outside, len(share_inside), stratum_inside)
        self.n_rows = np.bincount(self.stratum, minlength=len(self.names))

    @property
    def weight(self) -> Floats:
        """Weight (N,) for every row: v = N share_s / n_s for a row in stratum s.

        The mean weight is 1 if every stratum with a share above 0 has rows.

        Examples:
            >>> import vilu
            >>> from vilu.calibration.shares import Strata
            >>> rows = vilu.Outcomes([0.1, 0.2, 0.3, 0.9], [0, 0, 1, 1], target=[0, 0, 1, -2])
            >>> strata = Strata(rows, outside_share=0.5, class_shares=None)
            >>> strata.weight.round(4).tolist()  # 4 * 0.5 / 3, and 4 * 0.5 / 1 out of distribution
            [0.6667, 0.6667, 0.6667, 2.0]
        """
        # If a stratum has a share but no rows, the mean weight is below 1, and a bound would hold
        # for another population. So callers check ``small_strata`` before searching for a
        # threshold.
        weight_of_stratum = self.share * len(self.stratum) / np.maximum(self.n_rows, 1)
        return weight_of_stratum[self.stratum]

    def small_strata(self, max_risk: float, delta: float) -> list[SmallStratum]:
        """Return strata with too few rows for any guarantee. Strata with share 0 need no rows."""
        level = level_without_floor(delta)
        small_strata: list[SmallStratum] = []
        for name, n, share in zip(
            self.names, self.n_rows.tolist(), self.share.tolist(), strict=True
        ):
            if share == 0:
                continue
            # Every answer about an out-of-distribution image is wrong.
            is_all_wrong = name == OUTSIDE_NAME
            n_needed = n_rows_needed_in_stratum(share, max_risk, level, is_all_wrong=is_all_wrong)
            if n_needed is None or n < n_needed:
                small_stratum = SmallStratum(name=name, n=n, n_needed=n_needed)
                small_strata.append(small_stratum)
        return small_strata


def _classes_as_strata(
    rows: Outcomes, class_shares: Mapping[str, float]
) -> tuple[dict[str, float], Ints]:
    """Return each class's share by name (0 if not stated), and each row's class (N,).

    Out-of-distribution rows have no class, and get the index 0. Callers must replace this 0.
    """
    if rows.class_names is None or rows.target is None:
        raise DataError(
            "shares of classes need rows that say of which class they are. These do not."
        )
    names = list(rows.class_names)
    for name in class_shares:
        if name not in names:
            raise UsageError(
                f"a share is stated of {name!r}, which is none of the {len(names)} classes of "
                "these rows."
            )
    if len(set(names)) < len(names):
        raise UsageError("two classes have one name, so shares by name do not tell them apart.")
    unknown_rows = np.flatnonzero((rows.target < 0) & ~rows.outside)
    if len(unknown_rows):
        raise DataError(
            "shares of classes need the class of every row. The class of row "
            f"{unknown_rows[0]} is not known."
        )
    share_of_class = {name: class_shares.get(name, 0.0) for name in names}
    return share_of_class, np.maximum(rows.target, 0)


def level_without_floor(delta: float) -> float:
    """Return the level for the thresholds without a floor: the part of delta that no floor uses."""
    return delta * (1 - FLOOR_LEVEL_SHARE * len(FLOOR_ROW_SHARES))


def weighted_learn_then_test(
    uncertainty: Floats, is_wrong: NDArray[np.bool_], weight: Floats, max_risk: float, delta: float
) -> Threshold | None:
    """Return the certified score interval with the largest total weight of accepted rows, or None.

    **Single threshold.** Row i has the weight v_i and the score u_i. wrong_i is 1 if the answer is
    wrong, and 0 if the answer is right. Let

        Z_i(t) = v_i 1{u_i <= t} (wrong_i - max_risk).

    The mean of Z_i(t) is positive where the reweighted error rate R(t) is above max_risk. For a
    fixed bet b in [0, 1 / ((1 - max_risk) max v)] the evidence against R(t) >= max_risk is

        E(t) = prod_i (1 - b Z_i(t)),
        E[E(t)] <= exp(-b sum_i E[Z_i(t)]) <= 1    where R(t) >= max_risk.

    The evidence used here is the mean of E(t) over eight bets. The inequality holds for this mean,
    too. So for every such t, P[E(t) >= 1 / delta] <= delta (Markov's inequality).

    **All thresholds.** The laxest t with E(t) >= 1 / delta is taken. If the row counts in the
    strata were Poisson variables, E(t) exp(b sum_i E[Z_i(t)]) would be a martingale in t. The
    second factor is at least 1 where R(t) >= max_risk. So the bound would hold for the supremum of
    E over all such t (Ville's inequality). For fixed row counts there is a proof for every single t
    only. The supremum is simulated in ``benchmarks.shares``: the product is conservative, and the
    share of wrong certificates stays below delta.

    As in ``learn_then_test`` with many rows, the thresholds above each floor share a level of 0.01
    delta. The test pools all strata, so delta is not divided among the strata.

    Sources: Angelopoulos et al., Learn then Test (2021), for the frame. Waudby-Smith & Ramdas,
    Estimating means of bounded random variables by betting (2023), for the product.
    """
    counts = tie_counts(uncertainty, is_wrong.astype(np.int64))
    ascending_rows = np.argsort(uncertainty, kind="stable")
    # No threshold separates equal scores. So the sums for a score are taken at the last row with
    # this score.
    last_row_of_score = counts.accepted - 1
    # (G,) weight of all rows up to each score
    cumulated_weight = np.cumsum(weight[ascending_rows])[last_row_of_score]
    evidence_after_rows = cumulated_evidence(
        is_wrong[ascending_rows], weight[ascending_rows], max_risk, float(weight.max())
    )
    evidence = evidence_after_rows[:, last_row_of_score]  # (B, G)
    best_threshold: Threshold | None = None
    largest_accepted_weight = 0.0
    for floor_index, level in _levels_of_floors(counts.accepted, len(ascending_rows), delta):
        evidence_above_floor = evidence[:, floor_index + 1 :]
        weight_below_floor = 0.0
        if floor_index != NO_FLOOR:
            evidence_at_floor = evidence[:, floor_index][:, None]  # (B, 1)
            evidence_above_floor = evidence_above_floor - evidence_at_floor
            weight_below_floor = float(cumulated_weight[floor_index])
        certified_indices = np.flatnonzero(log_mean(evidence_above_floor) >= -math.log(level))
        if not len(certified_indices):
            continue
        # The laxest certified threshold is taken, even if a stricter threshold is not certified.
        # The bound holds for the supremum over all thresholds, so the order does not matter.
        index = floor_index + 1 + int(certified_indices.max())
        accepted_weight = float(cumulated_weight[index]) - weight_below_floor
        if accepted_weight > largest_accepted_weight:
            largest_accepted_weight = accepted_weight
            best_threshold = Threshold.at(counts, index, max_risk, floor_index)
    return best_threshold


def _levels_of_floors(n_accepted: Ints, n: int, delta: float) -> list[tuple[int, float]]:
    """Return pairs of a floor's index and the level for the thresholds above this floor.

    The first pair has ``NO_FLOOR`` in place of an index.

    ``n_accepted`` holds, for every score, how many of the ``n`` rows have at most this score.
    """
    floor_levels = [(NO_FLOOR, level_without_floor(delta))]
    for share in FLOOR_ROW_SHARES:
        rank = math.ceil(n * share)
        floor_index = int(np.searchsorted(n_accepted, rank))
        floor_levels.append((floor_index, delta * FLOOR_LEVEL_SHARE))
    return floor_levels


def cumulated_evidence(
    is_wrong: NDArray[np.bool_], weight: Floats, max_risk: float, largest_row_weight: float
) -> Floats:
    """Return the log evidence (B, N) for B bets, after 1, 2, ... N rows.

    Args:
        is_wrong: Mask (N,) of the rows with a wrong answer.
        weight: Weight (N,) for every row.
        max_risk: Largest error rate, in (0, 1).
        largest_row_weight: Largest weight of any row.

    Examples:
        >>> import numpy as np
        >>> from vilu.calibration.shares import BET_SIZES, cumulated_evidence
        >>> # With the largest error rate 1/2, a row with the largest weight has the factor 1 + b if
        >>> # the answer is right, and 1 - b if it is wrong. With half of that weight, b is halved.
        >>> is_wrong = np.array([False, True, False])
        >>> weight = np.array([2.0, 2.0, 1.0])
        >>> evidence = cumulated_evidence(is_wrong, weight, max_risk=0.5, largest_row_weight=2.0)
        >>> BET_SIZES[3], np.exp(evidence[3]).round(4).tolist()  # 1.5, 1.5 * 0.5, 0.75 * 1.25
        (0.5, [1.5, 0.75, 0.9375])
    """
    # Every factor is positive, even for a wrong row with the largest weight, because the bets are
    # small enough. Markov's inequality needs E >= 0.
    bets = np.array(BET_SIZES)[:, None] / ((1 - max_risk) * largest_row_weight)
    return np.log1p(-bets * weight * (is_wrong - max_risk)).cumsum(axis=1)


@np.errstate(under="ignore")  # terms far smaller than the largest term are rounded to 0
def log_mean(evidence: Floats) -> Floats:
    """Return the log (G,) of the mean evidence over B bets, from log evidence (B, G)."""
    # E[E(t)] <= 1 holds for the mean over bets, but not for the maximum over bets.
    log_e: Floats = np.logaddexp.reduce(evidence, axis=0) - math.log(len(BET_SIZES))
    return log_e


def n_rows_needed_in_stratum(
    share: float, max_risk: float, level: float, *, is_all_wrong: bool
) -> int | None:
    """Return how many rows a stratum with this share needs, or None if no number is enough.

    The number is for the best case: all other strata have infinitely many rows, and every accepted
    answer is right. If ``is_all_wrong``, all answers in this stratum are wrong, and in the best
    case no row in this stratum is accepted.
    """
    # each bet's gain from a right row with the largest weight
    gain = np.array(BET_SIZES) * max_risk / (1 - max_risk)
    # If all other strata have infinitely many rows, the weights of these rows tend to 0 and the
    # product of their factors tends to exp(-b sum Z). With finitely many rows the product is
    # smaller, so more rows are needed.
    log_gain_elsewhere = gain * (1 - share) / share  # in all other strata, per row in this stratum
    log_gain_here = np.zeros(len(gain))
    if not is_all_wrong:
        log_gain_here = np.log1p(gain)
    log_gain_per_row = log_gain_elsewhere + log_gain_here

    def is_enough(n: int) -> bool:
        evidence = log_mean((n * log_gain_per_row)[:, None])
        return bool(evidence[0] >= -math.log(level))

    return find_sufficient_number(is_enough, first_tried=1)


def reason_for_nothing_at_shares(strata: Strata, max_risk: float, delta: float) -> str:
    """Explain why nothing is certified: strata are too small, or scores separate too little."""
    small_strata = strata.small_strata(max_risk, delta)
    if not small_strata:
        return (
            f"no threshold shows a risk of {max_risk:.2%} at the stated shares: too few rows, or "
            "scores that do not single out answers with so low an error rate"
        )
    parts = []
    for name, n, n_needed in small_strata[:MAX_STRATA_SHOWN]:
        need_in_words = (
            "no number is enough" if n_needed is None else f"needs {n_needed:,} at least"
        )
        parts.append(f"{name} has {n:,} and {need_in_words}")
    rest_in_words = ""
    if len(small_strata) > MAX_STRATA_SHOWN:
        rest_in_words = f" and {len(small_strata) - MAX_STRATA_SHOWN} more"
    return f"too few rows for the stated shares: {', '.join(parts)}{rest_in_words}"


def shares_in_words(outside_share: float | None, class_shares: Mapping[str, float] | None) -> str:
    """Return a text that says for which shares a guarantee holds."""
    parts = []
    if outside_share is not None:
        largest_share = percent(outside_share, decimals=1, rounding=math.floor)
        parts.append(f"for up to {largest_share} of out-of-distribution images like those shown")
    if class_shares is not None:
        parts.append(f"at the stated shares of {len(class_shares)} classes")
    return " and ".join(parts)
