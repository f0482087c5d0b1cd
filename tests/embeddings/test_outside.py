"""Rows of none of the classes: -2 where data come in, a Boolean inside, wrong whatever the answer."""

import numpy as np
import pytest
import torch

import vilu
from vilu.errors import DataError


def strangers() -> vilu.Embeddings:
    """Four rows of two classes: right, wrong, of none, unknown."""
    return vilu.Embeddings(np.eye(3)[[0, 0, 2, 1]], np.eye(3)[:2], [0, 1, vilu.OUTSIDE, -1])


def test_the_number_stays_at_the_boundary() -> None:
    data = strangers()
    assert data.target.tolist() == [0, 1, -1, -1]
    assert data.outside.tolist() == [False, False, True, False]


def test_any_answer_to_a_stranger_is_wrong() -> None:
    (batch,) = strangers().batches(8)
    assert batch.failure.tolist() == [0, 1, 1, -1]
    assert batch.rows(slice(2, 4)).failure.tolist() == [1, -1]
    assert batch.to("cpu").failure.tolist() == [0, 1, 1, -1]


def test_rows_taken_keep_what_is_known_of_them() -> None:
    taken = strangers().take([3, 2])
    assert taken.outside.tolist() == [False, True]
    assert torch.cat([batch.failure for batch in taken.batches(8)]).tolist() == [-1, 1]


def test_no_other_negative_number_is_a_target() -> None:
    with pytest.raises(DataError, match="-2 for none of them"):
        vilu.Embeddings(np.eye(3), np.eye(3), [0, 1, -3])
