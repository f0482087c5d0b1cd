"""Test which inputs a metric refuses, and that it says why."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vilu import metrics
from vilu.errors import DataError, UsageError

ALL = [
    metrics.auroc,
    metrics.fpr_at_tpr,
    metrics.aupr_failure,
    metrics.aupr_success,
    metrics.aurc,
    metrics.excess_aurc,
    metrics.naurc,
    metrics.augrc,
    metrics.risk_at_coverage,
    metrics.coverage_at_risk,
    metrics.ece,
    metrics.brier,
    metrics.roc_curve_points,
    metrics.risk_coverage_curve,
]


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("uncertainty", "failure", "message"),
    [
        ([], [], "at least one row"),
        ([0.1, np.nan], [0, 1], r"finite. Got 1 bad values of 2, the first in row 1 \(nan\)"),
        ([0.1, np.inf], [0, 1], r"row 1 \(inf\)"),
        ([0.1, 0.2], [0, 2], "failure must be 0 .* Got 2 in row 1"),
        ([0.1, 0.2], [0, 0.5], "Got 0.5 in row 1"),
        ([0.1, 0.2], [0, np.nan], "Got nan in row 1"),
        ([0.1, 0.2], [0, -1], "Got -1 in row 1"),
        ([0.1, 0.2], [0, 1, 1], "Got 2 and 3"),
        ([[0.1, 0.2]], [0, 1], r"shape \(1, 2\)"),
        ([0.1, 0.2], [[0], [1]], r"failure must be a vector .* shape \(2, 1\)"),
        (0.1, 1, r"shape \(\)"),
        (["a", "b"], [0, 1], "real numbers"),
        ([0.1, None], [0, 1], "real numbers"),
        ([1j, 1], [0, 1], "real numbers"),
        ([[1], [1, 2]], [0, 1], "vector of numbers"),
    ],
)
def test_every_metric_refuses_what_cannot_be(
    metric: Callable[..., object], uncertainty: object, failure: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        metric(uncertainty, failure)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float32, np.uint8])
def test_failure_may_have_any_number_type(dtype: type) -> None:
    assert metrics.auroc(np.float32([1, 2, 3]), np.array([0, 1, 0], dtype=dtype)) == 0.5


def test_tensors_are_taken_but_not_those_with_gradients() -> None:
    u, f = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1])
    assert metrics.auroc(u, f) == 1.0
    with pytest.raises(
        DataError, match=r"uncertainty must be a vector of numbers on the CPU: .*detach"
    ):
        metrics.auroc(u.requires_grad_(), f)


def test_the_input_is_left_as_it_was() -> None:
    u, f = np.array([3.0, 1.0, 2.0]), np.array([1, 0, 1])
    for metric in ALL[:-4]:
        metric(u, f)
    np.testing.assert_array_equal(u, [3.0, 1.0, 2.0])
    np.testing.assert_array_equal(f, [1, 0, 1])


@pytest.mark.parametrize("probability", [[-0.1, 0.5], [0.5, 1.1]])
@pytest.mark.parametrize("metric", [metrics.ece, metrics.brier])
def test_calibration_needs_probabilities(
    metric: Callable[..., float], probability: list[float]
) -> None:
    with pytest.raises(DataError, match=r"must be in \[0, 1\]. Got values from .* calibrate"):
        metric(probability, [0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, f: metrics.fpr_at_tpr(u, f, 0.0), r"level .* in \(0, 1\]. Got 0.0"),
        (lambda u, f: metrics.fpr_at_tpr(u, f, 95), "Got 95"),
        (
            lambda u, f: metrics.fpr_at_tpr(u, f, positive="error"),
            "'correct' or 'failure'. Got 'error'",
        ),
        (
            lambda u, f: metrics.fpr_at_tpr(u, f, rule="linear"),
            "'interpolate', 'first', 'nearest'. Got 'linear'",
        ),
        (lambda u, f: metrics.roc_curve_points(u, f, "error"), "Got 'error'"),
        (lambda u, f: metrics.aurc(u, f, "geifman"), "'mean' or 'trapezoid'. Got 'geifman'"),
        (lambda u, f: metrics.risk_at_coverage(u, f, 0), r"\(0, 1\]. Got 0"),
        (lambda u, f: metrics.risk_at_coverage(u, f, float("nan")), "Got nan"),
        (lambda u, f: metrics.coverage_at_risk(u, f, 1.5), r"\[0, 1\]. Got 1.5"),
        (lambda u, f: metrics.ece(u, f, 0), "at least 1. Got 0"),
        (lambda u, f: metrics.ece(u, f, 5, "size"), "'width' or 'mass'. Got 'size'"),
    ],
)
def test_choices_that_do_not_exist(call: Callable[..., object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call([0.1, 0.2], [0, 1])


def test_risk_at_coverage_rounds_rows_up_but_keeps_whole_numbers() -> None:
    failure = [0] * 7 + [1] * 93
    # 0.07 · 100 = 7.000000000000001
    assert metrics.risk_at_coverage(range(100), failure, 0.07) == 0
    assert metrics.risk_at_coverage(range(100), failure, 0.0701) == pytest.approx(1 / 8)
