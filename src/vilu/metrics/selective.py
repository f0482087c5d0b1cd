"""Selective prediction: the error rate of the kept answers if uncertain answers are rejected.

The coverage is the share of kept answers. The selective risk is the share of wrong answers
among the kept answers. Answers with equal uncertainty have no known order, so metrics take the
expected number of wrong answers. Within a block of tied answers this number grows linearly.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from vilu.metrics.counts import Floats, Ints, TieCounts, ratio, tie_counts
from vilu.validation import checked, require_between, require_one_of

Convention = Literal["mean", "trapezoid"]

_HARMONIC: Floats = np.concatenate([[0.0], np.cumsum(1 / np.arange(1.0, 2**16))])
"""Harmonic numbers H_0 ... H_65535, where H_n = 1 + 1/2 + ... + 1/n."""
HARMONIC_TABLE_SIZE = 2**21
"""Count of harmonic numbers in the table for data sets with fewer rows than this count.

The table takes 16 MB. Reading the table is five times as fast as computing logarithms.
"""


@checked
def aurc(uncertainty: ArrayLike, failure: ArrayLike, convention: Convention = "mean") -> float:
    """Compute the area under the risk-coverage curve, in [0, 1]. Lower is better.

    R_i is the selective risk of the i most trusted answers.

    - "mean" is (1/N) Σ_i R_i (Geifman et al. 2019), as the expectation over the order of tied rows.
      Reference implementations leave tied rows in input order, so their value depends on this
      order.
    - "trapezoid" integrates the risk over the coverage by trapezoids. Each distinct uncertainty
      is a point on the curve. Below the smallest coverage the risk is taken as constant. fd-shifts
      reports this value times 1000.

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        convention: "mean" or "trapezoid".

    Raises:
        UsageError: If ``convention`` is neither "mean" nor "trapezoid".

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 0, 0, 1]
        >>> vilu.metrics.aurc(uncertainty, failure)  # (0/1 + 0/2 + 0/3 + 1/4) / 4
        0.0625
    """
    counts = tie_counts(uncertainty, failure)
    return float(aurc_kernel(counts, convention))


def excess_aurc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Compute AURC minus the AURC of the best order. The perfect value is 0.

    The best order has all N_correct correct answers first. Among the first i of the N answers,
    max(0, i - N_correct) are wrong, so

        AURC of the best order = (1/N) Σ_i max(0, i - N_correct) / i

    For large N and the failure rate r, this value approaches the usual formula
    r + (1 - r) ln(1 - r). At N = 100 the value and the formula differ by 0.001.

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 1, 0, 1]  # AURC (0/1 + 1/2 + 1/3 + 2/4) / 4
        >>> best_failure = [0, 0, 1, 1]  # AURC (0/1 + 0/2 + 1/3 + 2/4) / 4
        >>> round(vilu.metrics.excess_aurc(uncertainty, failure), 4)  # the difference, 1/2 / 4
        0.125
    """
    counts = tie_counts(uncertainty, failure)
    return float(excess_aurc_kernel(counts))


def naurc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Divide excess AURC by the excess AURC of a random order: 0 is perfect, 1 is random.

    A random order's AURC is the failure rate. If all answers are right or all answers are wrong,
    the result is NaN.

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 1, 0, 1]  # excess AURC 1/8; a random order has 1/2 - 5/24 = 7/24
        >>> round(vilu.metrics.naurc(uncertainty, failure), 4)  # (1/8) / (7/24)
        0.4286
    """
    counts = tie_counts(uncertainty, failure)
    return float(naurc_kernel(counts))


def augrc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Compute the area under the generalised risk-coverage curve (Traub et al. 2024), in [0, 1/2].

    Lower is better. The generalised risk is the share of answers that are wrong and kept, among all
    answers. With the accuracy a,

        AUGRC = (1 - AUROC) a (1 - a) + (1 - a)² / 2

    AUGRC is (1 - a) / 2 for a random order and (1 - a)² / 2 for the best order.

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 1, 0, 1]  # AUROC 3/4, accuracy 1/2
        >>> vilu.metrics.augrc(uncertainty, failure)  # 1/4 * 1/2 * 1/2 + 1/4 / 2
        0.1875
    """
    counts = tie_counts(uncertainty, failure)
    return float(augrc_kernel(counts))


@checked
def risk_at_coverage(uncertainty: ArrayLike, failure: ArrayLike, coverage: float = 0.8) -> float:
    """Compute the selective risk of the ⌈N · coverage⌉ most trusted answers.

    The risk is the expectation over the order of tied rows.

    Raises:
        UsageError: If ``coverage`` is not in (0, 1].

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 1, 0, 1]  # one of the three most trusted answers is wrong
        >>> round(vilu.metrics.risk_at_coverage(uncertainty, failure, coverage=0.75), 4)
        0.3333
    """
    counts = tie_counts(uncertainty, failure)
    return float(risk_at_coverage_kernel(counts, coverage))


@checked
def coverage_at_risk(uncertainty: ArrayLike, failure: ArrayLike, risk: float = 0.05) -> float:
    """Return the largest coverage of all thresholds with a selective risk of at most ``risk``.

    If there is no such threshold, the result is 0.

    A threshold keeps or rejects all rows with equal uncertainties together. The result describes
    the given sample, and is no guarantee for new data (see ``vilu.certify``).

    Raises:
        UsageError: If ``risk`` is not in [0, 1].

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 3, 4]
        >>> failure = [0, 1, 0, 1]  # risk of the first 1, 2, 3 and 4 answers: 0, 1/2, 1/3, 1/2
        >>> vilu.metrics.coverage_at_risk(uncertainty, failure, risk=0.4)  # 3 of 4 answers
        0.75
    """
    counts = tie_counts(uncertainty, failure)
    return float(coverage_at_risk_kernel(counts, risk))


def risk_coverage_curve(uncertainty: ArrayLike, failure: ArrayLike) -> tuple[Floats, Floats]:
    """Return the coverage (G,) and the selective risk (G,) at every threshold.

    Every distinct uncertainty is a threshold. The thresholds are ascending.

    Examples:
        >>> import vilu
        >>> uncertainty = [1, 2, 2, 4]  # thresholds 1, 2 and 4 accept 1, 3 and 4 answers
        >>> failure = [0, 1, 0, 1]  # 0, 1 and 2 of them are wrong
        >>> coverage, risk = vilu.metrics.risk_coverage_curve(uncertainty, failure)
        >>> coverage
        array([0.25, 0.75, 1.  ])
        >>> risk.round(4)
        array([0.    , 0.3333, 0.5   ])
    """
    counts = tie_counts(uncertainty, failure)
    coverage = counts.accepted / counts.n
    risk = counts.accepted_wrong / counts.accepted
    return coverage, risk


def aurc_kernel(counts: TieCounts, convention: Convention = "mean") -> Floats:
    """Compute AURC (...), as in ``aurc``."""
    require_one_of("convention", convention, get_args(Convention))
    return _mean_risk(counts) if convention == "mean" else _trapezoid_risk(counts)


def excess_aurc_kernel(counts: TieCounts) -> Floats:
    """Compute excess AURC (...), as in ``excess_aurc``."""
    excess = _mean_risk(counts) - _aurc_of_best_order(counts)
    return np.maximum(excess, 0.0)  # after rounding, the difference may be slightly negative


def naurc_kernel(counts: TieCounts) -> Floats:
    """Compute normalised AURC (...), as in ``naurc``."""
    aurc_of_random_order = ratio(counts.n_wrong, counts.n)
    random_excess = aurc_of_random_order - _aurc_of_best_order(counts)
    # If all answers are right or all are wrong, the denominator is zero and the result is NaN.
    excess = excess_aurc_kernel(counts)
    return ratio(excess, random_excess)


def augrc_kernel(counts: TieCounts) -> Floats:
    """Compute AUGRC (...) by trapezoids, in integers up to the last division."""
    wrong_before = counts.accepted_wrong - counts.wrong
    twice_area = (counts.size * (wrong_before + counts.accepted_wrong)).sum(-1)
    return ratio(twice_area, 2 * counts.n**2)


def risk_at_coverage_kernel(counts: TieCounts, coverage: float) -> Floats:
    """Compute the selective risk (...) at one coverage, as in ``risk_at_coverage``."""
    require_between("coverage", coverage, "(0, 1]")
    # The product is rounded first. In floating point, 0.07 · 100 is slightly more than 7, and
    # would be rounded up to 8.
    n_accepted = np.ceil(np.round(counts.n * coverage, 9))
    n_before = counts.accepted - counts.size
    # (..., G) how many rows are accepted at each score. At the last accepted score this may be
    # only a part of the rows.
    n_at_score = np.clip(n_accepted[..., None] - n_before, 0, counts.size)
    error_rate = ratio(counts.wrong, counts.size, if_undefined=0.0)
    n_wrong = (n_at_score * error_rate).sum(-1)
    return ratio(n_wrong, n_accepted)


def coverage_at_risk_kernel(counts: TieCounts, risk: float) -> Floats:
    """Return the coverage (...) at one risk, as in ``coverage_at_risk``."""
    require_between("risk", risk, "[0, 1]")
    meets_risk = ratio(counts.accepted_wrong, counts.accepted) <= risk
    accepted_at_risk = np.where(meets_risk, counts.accepted, 0)
    most_accepted = accepted_at_risk.max(-1)
    return ratio(most_accepted, counts.n)


def _harmonic(n: Ints) -> Floats:
    """Return the harmonic numbers H_n (...)."""
    largest = int(n.max(initial=0))
    if largest < len(_HARMONIC):
        return _HARMONIC[n]
    if largest < HARMONIC_TABLE_SIZE:
        return _harmonic_table()[n]
    last = len(_HARMONIC) - 1
    exact = _HARMONIC[np.minimum(n, last)]
    asymptotic = _harmonic_of_large(n)
    return np.where(n <= last, exact, asymptotic)


def _harmonic_of_large(n: Ints) -> Floats:
    """Compute harmonic numbers H_n (...) for large n, from ln n + γ + 1 / 2n - 1 / 12n².

    The series' next term is below 1e-20. The result is correct only for n too large
    for ``_HARMONIC``. For a smaller n the result is wrong, and callers do not use the result.
    """
    smallest_large = len(_HARMONIC)
    large_n = np.maximum(n, smallest_large).astype(np.float64)
    harmonic: Floats = np.log(large_n) + np.euler_gamma + 1 / (2 * large_n) - 1 / (12 * large_n**2)
    return harmonic


@cache
def _harmonic_table() -> Floats:
    """Compute the table H_0 to H_(HARMONIC_TABLE_SIZE - 1) on first use."""
    large_n = np.arange(len(_HARMONIC), HARMONIC_TABLE_SIZE)
    harmonic_of_large = _harmonic_of_large(large_n)
    return np.concatenate([_HARMONIC, harmonic_of_large])


def _mean_risk(counts: TieCounts) -> Floats:
    """Compute the mean selective risk (1/N) Σ_i R_i, expected over the order of tied rows.

    Consider a block of m tied rows after s rows with smaller uncertainties. In the block w rows are
    wrong, and before the block W rows are wrong. For a rank i inside the block, the expectation is

        R_i = (W + w (i - s) / m) / i

    With harmonic numbers H_n = 1 + 1/2 + ... + 1/n, the sum over the block has a closed form:

        Σ_{i=s+1}^{s+m} R_i = w + (W - w s / m) (H_{s+m} - H_s)
    """
    n_before = counts.accepted - counts.size
    wrong_before = counts.accepted_wrong - counts.wrong
    error_rate = ratio(counts.wrong, counts.size, if_undefined=0.0)
    harmonic_difference = _harmonic(counts.accepted) - _harmonic(n_before)
    # If a block has one row, the difference is 1 / (s + 1), computed here without cancellation.
    np.divide(1.0, counts.accepted, out=harmonic_difference, where=counts.size == 1)
    sum_over_block = counts.wrong + (wrong_before - error_rate * n_before) * harmonic_difference
    sum_of_risks = sum_over_block.sum(-1)
    return ratio(sum_of_risks, counts.n)


def _trapezoid_risk(counts: TieCounts) -> Floats:
    """Compute the area (...) under the risk-coverage curve by trapezoids over distinct scores."""
    risk = ratio(counts.accepted_wrong, counts.accepted, if_undefined=0.0)
    n_before = counts.accepted - counts.size
    # Shift the risks by one score. The first score gets the last score's risk. This entry is
    # not used, because the risk is constant below the smallest coverage.
    risk_of_previous = np.roll(risk, 1, axis=-1)
    risk_at_left = np.where(n_before > 0, risk_of_previous, risk)
    twice_area = (counts.size * (risk_at_left + risk)).sum(-1)
    return ratio(twice_area, 2 * counts.n)


def _aurc_of_best_order(counts: TieCounts) -> Floats:
    """Compute the AURC (...) of the best order: all correct answers first."""
    harmonic_difference = _harmonic(counts.n) - _harmonic(counts.n_correct)
    sum_of_risks = counts.n_wrong - counts.n_correct * harmonic_difference
    return ratio(sum_of_risks, counts.n)
