"""Test norms whose squares would overflow or underflow in float16, float32 or float64."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from vilu.embeddings.checks import NONFINITE, VALID, ZERO_NORM, row_status, unit_rows
from vilu.embeddings.memory import Embeddings

ROWS = np.random.default_rng(0).normal(size=(6, 8))
UNIT = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("factor", "kind", "rounding"),
    [
        *((factor, np.float32, 2.0**-22) for factor in (1e-30, 1e-20, 1e-13, 1e20, 1e37)),
        (1e-40, np.float32, 1e-4),  # 1e-41 in steps of 2^-149, that is 1.4e-45
        *((factor, np.float64, 2.0**-22) for factor in (1e-300, 1e-40, 1e-20, 1e20, 1e39, 1e300)),
        *((factor, np.float16, 2.0**-10) for factor in (1e-3, 2e4)),
    ],
)
def test_a_row_of_any_norm_keeps_its_direction(factor: float, kind: type, rounding: float) -> None:
    given = (UNIT * factor).astype(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows, status = unit_rows(given, "image")
    assert not status.any()
    assert np.abs(rows.numpy() - UNIT).max() <= rounding
    assert "6 of 6 image rows" in str(said[0].message)


def test_ordinary_rows_are_the_same_bits_beside_such_rows() -> None:
    ordinary = torch.from_numpy((ROWS * 3).astype(np.float32))
    with pytest.warns(UserWarning, match="not of unit norm"):
        expected, _ = unit_rows(ordinary, "image")
    with pytest.warns(
        UserWarning, match=r"8 of 8 image rows are not of unit norm \(norms 1e-20 to 1e\+20\)"
    ):
        found, _ = unit_rows(
            torch.cat([ordinary, torch.eye(8)[:1] * 1e20, torch.eye(8)[:1] * 1e-20]), "image"
        )
    assert torch.equal(found[:6], expected)


def test_what_has_no_direction_says_so() -> None:
    rows = torch.zeros(4, 3)
    rows[1, 0], rows[2, 1], rows[3, 2] = torch.inf, torch.nan, 1
    assert row_status(rows)[0].tolist() == [ZERO_NORM, NONFINITE, NONFINITE, VALID]
    with np.errstate(over="ignore"):
        overflowed = np.array([[1e5, 1.0], [1.0, 0.0]]).astype(np.float16)
    data = Embeddings(overflowed, np.eye(2))
    assert data.status.tolist() == [NONFINITE, VALID]
