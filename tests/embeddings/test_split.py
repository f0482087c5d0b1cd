"""Test the split into parts: no picture is in two parts, and every class is in all parts."""

from __future__ import annotations

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings, toy_pairs
from vilu.embeddings.split import part_of_each_row
from vilu.errors import UsageError


@pytest.mark.parametrize("seed", range(5))
def test_every_part_has_its_share_of_every_class(seed: int) -> None:
    data = toy_embeddings(603, seed=seed)
    parts = data.split(fit=0.4, calibration=0.3, test=0.3, seed=seed)
    assert sum(map(len, parts)) == len(data)
    for label in range(5):
        n = int((data.target == label).sum())
        for part, share in zip(parts, (0.4, 0.3, 0.3), strict=True):
            # one picture at each border of a part
            assert abs(int((part.target == label).sum()) - share * n) <= 1 + 1e-9


def test_rows_of_one_picture_are_in_one_part() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(50, size=400)
    part = part_of_each_row(picture, rng.integers(3, size=400), (0.5, 0.2), seed=1)
    for number in range(50):
        assert len(set(part[picture == number].tolist())) == 1
    assert set(part.tolist()) == {0, 1, 2}  # 2: in no part


def test_a_class_of_one_picture_is_in_each_part_by_its_share() -> None:
    stratum = np.arange(3_000)
    part = part_of_each_row(np.full(3_000, -1), stratum, (0.5, 0.3, 0.2), seed=0)
    # with 3,000 draws, a share has a standard error of at most 0.92 %, times four
    shares = np.bincount(part, minlength=3) / 3_000
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 4 * 0.0092


def test_the_same_seed_is_the_same_division() -> None:
    data = toy_embeddings(100)
    first, again, other = (data.split(fit=0.5, test=0.5, seed=seed) for seed in (3, 3, 4))
    assert list(first.fit.ids) == list(again.fit.ids)
    assert list(first.fit.ids) != list(other.fit.ids)


def test_what_cannot_be_split_is_refused() -> None:
    data = toy_embeddings(20)
    with pytest.raises(UsageError, match=r"add up to at most 1\. Got 1.2"):
        data.split(fit=0.7, test=0.5)
    with pytest.raises(UsageError, match=r"from 0 to 1\. Got -0.1"):
        data.split(fit=-0.1)
    with pytest.raises(UsageError, match="captions cannot be split"):
        toy_pairs(64, 32).split(fit=0.5)


def test_out_of_distribution_rows_are_a_class_of_their_own() -> None:
    target = [0] * 40 + [1] * 40 + [vilu.OUTSIDE] * 20
    rng = np.random.default_rng(1)
    image = rng.normal(size=(100, 8))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    data = vilu.Embeddings(image, np.eye(8)[:2], target=target)
    parts = data.split(fit=0.5, test=0.5)
    assert [int(part.outside.sum()) for part in (parts.fit, parts.test)] == [10, 10]
