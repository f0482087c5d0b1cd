"""Test out-of-distribution rows.

Their target is -2 on input and a Boolean in memory, and any answer to them is wrong.
"""

import math

import numpy as np
import pytest
import torch

import vilu
from vilu.errors import DataError
from vilu.predictors.nn.losses import LOSSES, FailureWeight


def ood_rows() -> vilu.Embeddings:
    """Return four rows for two classes: right, wrong, out of distribution, and unknown."""
    return vilu.Embeddings(np.eye(3)[[0, 0, 2, 1]], np.eye(3)[:2], target=[0, 1, vilu.OUTSIDE, -1])


def test_the_number_stays_at_the_boundary() -> None:
    data = ood_rows()
    assert data.target.tolist() == [0, 1, -1, -1]
    assert data.outside.tolist() == [False, False, True, False]


def test_any_answer_to_an_ood_row_is_wrong() -> None:
    (batch,) = ood_rows().batches(8)
    assert batch.failure.tolist() == [0, 1, 1, -1]
    assert batch.rows(slice(2, 4)).failure.tolist() == [1, -1]
    assert batch.to("cpu").failure.tolist() == [0, 1, 1, -1]


def test_rows_taken_keep_what_is_known_of_them() -> None:
    taken = ood_rows().take([3, 2])
    assert taken.outside.tolist() == [False, True]
    assert torch.cat([batch.failure for batch in taken.batches(8)]).tolist() == [-1, 1]


def test_no_other_negative_number_is_a_target() -> None:
    with pytest.raises(DataError, match="-2 for none of them"):
        vilu.Embeddings(np.eye(3), np.eye(3), target=[0, 1, -3])


def test_an_ood_row_has_no_probability_of_the_truth() -> None:
    """Two texts have a logit scale of 100.

    The first image equals one text, and the out-of-distribution row equals neither.
    """
    (batch,) = ood_rows().batches(8)
    assert batch.target_log_probability[[0, 2]].tolist() == [pytest.approx(0, abs=1e-6), -math.inf]
    assert batch.target_log_probability[1].item() == pytest.approx(-100, rel=1e-6)


def test_the_released_loss_targets_one_for_pictures_of_no_class() -> None:
    """sigmoid(0) = 1/2 is compared with 1 - p = 0, 1 and 1.

    Failures have weight 2, so the loss is (1/4 + 2/4 + 2/4) / 3.
    """
    (batch,) = ood_rows().take([0, 1, 2]).batches(8)
    loss = LOSSES["mse"](FailureWeight("static", 2 / 3, static_weight=2.0))
    assert float(loss(batch, torch.zeros(3))) == pytest.approx(1.25 / 3, rel=1e-6)
    bce = LOSSES["bce"](FailureWeight("static", 2 / 3, static_weight=2.0))
    assert float(bce(batch, torch.zeros(3))) == pytest.approx(5 * math.log(2) / 3, rel=1e-6)
