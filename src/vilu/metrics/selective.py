"""Selective prediction: what is wrong among answers when the most uncertain are left out.

The coverage is the share of answers kept, the selective risk the share of wrong ones among them.
Inside a block of equal uncertainties the order is unknown, so the number of wrong answers grows
there at its expected, even pace.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from vilu.metrics.counts import Floats, Ints, TieCounts, ratio, tie_counts
from vilu.validation import checked, require_between, require_one_of

Convention = Literal["mean", "trapezoid"]

_HARMONIC: Floats = np.concatenate(
    [[0.0], np.cumsum(1 / np.arange(1.0, 2**16))]
)  # harmonic numbers H_0 ... H_65535
TABLE = (
    2**21
    # of fewer rows harmonic numbers are looked up (16 MB), which is five times as fast as their
    # logarithms
)


@checked
def aurc(uncertainty: ArrayLike, failure: ArrayLike, convention: Convention = "mean") -> float:
    """Area under the risk-coverage curve, in [0, 1]; lower is better.

    With R_i the selective risk of the i most trusted answers, "mean" is (1/N) Σ_i R_i (Geifman et
    al. 2019), taken in expectation over the order of tied rows. Reference implementations sort ties
    as they come, so that their value depends on the order of the input. "trapezoid" integrates over
    distinct uncertainties, level down to coverage 0 (fd-shifts, there times 1000).

    Args:
        uncertainty: (N,) scores, higher = more likely wrong.
        failure: (N,) 1 where the answer is wrong, else 0.
        convention: "mean" or "trapezoid".

    Raises:
        UsageError: If ``convention`` is neither.

    Examples:
        >>> import vilu
        >>> vilu.metrics.aurc([1, 2, 3, 4], [0, 0, 0, 1])  # (0 + 0 + 0 + 1/4) / 4
        0.0625
    """
    return float(aurc_kernel(tie_counts(uncertainty, failure), convention))


def excess_aurc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """AURC less that of the best order, (1/N) Σ_i max(0, i - N_correct) / i; 0 is perfect.

    The finite sum is used; the usual r + (1 - r) ln(1 - r) is its limit and off by .001 at N = 100.

    Examples:
        >>> import vilu
        >>> round(
        ...     vilu.metrics.excess_aurc([1, 2, 3, 4], [0, 1, 0, 1]), 4
        ... )  # (1/2 + 1/3 + 1/2) / 4, at best (1/3 + 1/2) / 4
        0.125
    """
    return float(excess_aurc_kernel(tie_counts(uncertainty, failure)))


def naurc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Excess AURC over that of a random order, whose AURC is the failure rate: 0 perfect, 1 random.

    NaN if there is only one class.

    Examples:
        >>> import vilu
        >>> round(
        ...     vilu.metrics.naurc([1, 2, 3, 4], [0, 1, 0, 1]), 4
        ... )  # 1/8 above the best order, a random one 7/24
        0.4286
    """
    return float(naurc_kernel(tie_counts(uncertainty, failure)))


def augrc(uncertainty: ArrayLike, failure: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve (Traub et al. 2024), in [0, 1/2].

    Lower is better.

    The generalised risk is the share of all N answers that are kept and wrong. With accuracy a it
    is (1 - AUROC) a (1 - a) + (1 - a)² / 2; random order (1 - a) / 2, best order (1 - a)² / 2.

    Examples:
        >>> import vilu
        >>> vilu.metrics.augrc(
        ...     [1, 2, 3, 4], [0, 1, 0, 1]
        ... )  # an AUROC of 3/4: 1/4 * 1/2 * 1/2 + 1/4 / 2
        0.1875
    """
    return float(augrc_kernel(tie_counts(uncertainty, failure)))


@checked
def risk_at_coverage(uncertainty: ArrayLike, failure: ArrayLike, coverage: float = 0.8) -> float:
    """Selective risk of the ⌈N · coverage⌉ most trusted answers.

    It is in expectation over the order of tied rows.

    Raises:
        UsageError: If ``coverage`` is not in (0, 1].

    Examples:
        >>> import vilu
        >>> round(
        ...     vilu.metrics.risk_at_coverage([1, 2, 3, 4], [0, 1, 0, 1], coverage=0.75), 4
        ... )  # one of three is wrong
        0.3333
    """
    return float(risk_at_coverage_kernel(tie_counts(uncertainty, failure), coverage))


@checked
def coverage_at_risk(uncertainty: ArrayLike, failure: ArrayLike, risk: float = 0.05) -> float:
    """Largest coverage of a threshold whose selective risk is at most ``risk``; 0 if none is.

    A threshold keeps a tied block or leaves it out. This describes the sample at hand; it is not a
    guarantee for new data (see ``vilu.calibrate``).

    Raises:
        UsageError: If ``risk`` is not in [0, 1].

    Examples:
        >>> import vilu
        >>> vilu.metrics.coverage_at_risk(
        ...     [1, 2, 3, 4], [0, 1, 0, 1], risk=0.4
        ... )  # of two answers half are wrong, of three 1/3
        0.75
    """
    return float(coverage_at_risk_kernel(tie_counts(uncertainty, failure), risk))


def risk_coverage_curve(uncertainty: ArrayLike, failure: ArrayLike) -> tuple[Floats, Floats]:
    """Coverage (G,) and selective risk (G,) of every threshold.

    There is one per distinct uncertainty, ascending.

    Examples:
        >>> import vilu
        >>> coverage, risk = vilu.metrics.risk_coverage_curve([1, 2, 2, 4], [0, 1, 0, 1])
        >>> coverage.tolist(), risk.round(4).tolist()
        ([0.25, 0.75, 1.0], [0.0, 0.3333, 0.5])
    """
    counts = tie_counts(uncertainty, failure)
    return counts.accepted / counts.n, counts.accepted_wrong / counts.accepted


def aurc_kernel(counts: TieCounts, convention: Convention = "mean") -> Floats:
    """AURC (...); see ``aurc``."""
    require_one_of("convention", convention, get_args(Convention))
    return _mean_risk(counts) if convention == "mean" else _trapezoid_risk(counts)


def excess_aurc_kernel(counts: TieCounts) -> Floats:
    """Excess AURC (...); see ``excess_aurc``."""
    return np.maximum(_mean_risk(counts) - _oracle(counts), 0.0)  # below zero only by rounding


def naurc_kernel(counts: TieCounts) -> Floats:
    """Normalised AURC (...); see ``naurc``."""
    # exactly zero if there is only one class
    return ratio(excess_aurc_kernel(counts), ratio(counts.n_wrong, counts.n) - _oracle(counts))


def augrc_kernel(counts: TieCounts) -> Floats:
    """AUGRC (...), by trapezoids in integers up to the last division."""
    twice_area = (counts.size * (2 * counts.accepted_wrong - counts.wrong)).sum(-1)
    return ratio(twice_area, 2 * counts.n**2)


def risk_at_coverage_kernel(counts: TieCounts, coverage: float) -> Floats:
    """Selective risk (...) at one coverage; see ``risk_at_coverage``."""
    require_between("coverage", coverage, "(0, 1]")
    # rounding first: 0.07 · 100 is a little more than 7
    n_accepted = np.ceil(np.round(counts.n * coverage, 9))[..., None]
    inside = np.clip(n_accepted - (counts.accepted - counts.size), 0, counts.size)
    return ratio((inside * ratio(counts.wrong, counts.size, empty=0.0)).sum(-1), n_accepted[..., 0])


def coverage_at_risk_kernel(counts: TieCounts, risk: float) -> Floats:
    """Coverage (...) at one risk; see ``coverage_at_risk``."""
    require_between("risk", risk, "[0, 1]")
    meets = ratio(counts.accepted_wrong, counts.accepted) <= risk
    return ratio(np.where(meets, counts.accepted, 0).max(-1), counts.n)


def _harmonic(n: Ints) -> Floats:
    """Harmonic numbers H_n (...).

    Of large n from ln n + γ + 1 / 2n - 1 / 12n², whose next term is below 1e-20.
    """
    most = int(n.max(initial=0))
    if most < len(_HARMONIC):
        return _HARMONIC[n]
    if most < TABLE:
        return _large_harmonic()[n]
    return np.where(n < len(_HARMONIC), _HARMONIC[np.minimum(n, len(_HARMONIC) - 1)], _series(n))


def _series(n: Ints) -> Floats:
    large = np.maximum(n, len(_HARMONIC)).astype(np.float64)
    series: Floats = np.log(large) + np.euler_gamma + 1 / (2 * large) - 1 / (12 * large**2)
    return series


@cache
def _large_harmonic() -> Floats:
    """H_0 to H_(TABLE - 1), made when the first large data set comes."""
    return np.concatenate([_HARMONIC, _series(np.arange(len(_HARMONIC), TABLE))])


def _mean_risk(counts: TieCounts) -> Floats:
    """(1/N) Σ_i R_i with R_i = (W + w (i - s) / m) / i inside a block of m rows after s.

    Its sum has a closed form.

    Σ_{i=s+1}^{s+m} R_i = w + (W - w s / m) (H_{s+m} - H_s), with w of the block's rows wrong and W
    before it.
    """
    before = counts.accepted - counts.size
    wrong_before = counts.accepted_wrong - counts.wrong
    pace = ratio(counts.wrong, counts.size, empty=0.0)
    steps = _harmonic(counts.accepted) - _harmonic(before)
    np.divide(
        1.0, counts.accepted, out=steps, where=counts.size == 1
    )  # the same, without cancellation
    blocks = counts.wrong + (wrong_before - pace * before) * steps
    return ratio(blocks.sum(-1), counts.n)


def _trapezoid_risk(counts: TieCounts) -> Floats:
    risk = ratio(counts.accepted_wrong, counts.accepted, empty=0.0)
    before = counts.accepted - counts.size
    left = np.where(before > 0, np.roll(risk, 1, axis=-1), risk)
    return ratio((counts.size * (left + risk)).sum(-1), 2 * counts.n)


def _oracle(counts: TieCounts) -> Floats:
    """AURC (...) of the best order: all correct answers first."""
    area = counts.n_wrong - counts.n_correct * (_harmonic(counts.n) - _harmonic(counts.n_correct))
    return ratio(area, counts.n)
