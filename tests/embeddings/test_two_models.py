"""Test the same rows from two models, which are matched by their ids in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.builders.bank_data import unit
from vilu import OUTSIDE, TwoModels
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, UsageError
from vilu.scoring.score import source_fingerprint

NAMES = ("cat", "dog", "cup", "sea")


def model(rows: list[int], width: int, seed: int, **changes: object) -> Embeddings:
    """Return a model's embeddings for some of 40 pictures. A picture is its number."""
    rng = np.random.default_rng(seed)
    image, text = unit(rng.normal(size=(40, width))), unit(rng.normal(size=(4, width)))
    ids = [f"picture {row}" for row in rows]
    arguments = {
        "image": image[rows],
        "text": text,
        "class_names": NAMES,
        "ids": ids,
        "logit_scale": 7.0,
    }
    return Embeddings(**{**arguments, "target": np.array(rows) % 4, **changes})


@pytest.fixture
def both() -> TwoModels:
    order = np.random.default_rng(3).permutation(40).tolist()
    return TwoModels(model(list(range(5, 25)), 6, 1), model(order, 3, 2))


def second_logits(data: vilu.EmbeddingSource, rows: torch.Tensor) -> torch.Tensor:
    return data.column("second_image", rows) @ data.column("second_text", rows).T


def test_columns_are_the_second_models_logits_of_the_same_pictures(both: TwoModels) -> None:
    other = model(list(range(40)), 3, 2)
    expected = next(other.batches(40)).logits
    rows = torch.tensor([3, 0, 19])
    assert torch.allclose(second_logits(both, rows), expected[rows + 5], atol=1e-6)
    batch = next(both.batches(8, columns=("second_image", "second_text")))
    assert torch.allclose(
        batch.columns["second_image"] @ batch.columns["second_text"].T, expected[5:13], atol=1e-6
    )
    first = both.first
    assert torch.equal(both.image_rows(rows), first.image_rows(rows))
    assert torch.equal(both.target, first.target)
    assert list(both.ids) == list(first.ids)
    assert both.identified_by == first.identified_by
    assert both.class_names == NAMES
    assert both.columns == {"second_image", "second_text"}


def test_some_rows_and_classes_of_them(both: TwoModels) -> None:
    part = both.without(np.arange(20) < 4).take([2, 0], classes=[3, 1])
    expected = second_logits(both, torch.tensor([6, 4]))[:, [3, 1]]
    assert torch.equal(second_logits(part, torch.arange(2)), expected)
    assert part.second is both.second


def test_a_row_must_be_usable_in_both() -> None:
    image = unit(np.random.default_rng(2).normal(size=(10, 3)))
    image[4] = 0
    image[7, 1] = np.nan
    both = TwoModels(model(list(range(10)), 6, 1), model(list(range(10)), 3, 2, image=image))
    assert both.usable_rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9]


def test_classes_of_one_text_are_one_in_both() -> None:
    text = [
        unit(np.random.default_rng(1).normal(size=(4, width)))[[0, 1, 2, 1]] for width in (6, 3)
    ]
    both = TwoModels(
        model(list(range(8)), 6, 1, text=text[0]), model(list(range(8)), 3, 2, text=text[1])
    )
    assert both.n_candidates == 3
    assert both.column("second_text", torch.arange(1)).shape == (3, 3)
    assert both.candidate_of.tolist() == [0, 1, 2, 1]
    assert both.target.tolist() == [0, 1, 2, 1] * 2


def test_outside_rows_stay_outside() -> None:
    target = np.array([0, OUTSIDE, -1, 3])
    both = TwoModels(model([0, 1, 2, 3], 6, 1, target=target), model([0, 1, 2, 3], 3, 2))
    assert both.outside.tolist() == [False, True, False, False]
    assert next(both.batches(4)).failure[[1, 2]].tolist() == [1, -1]


def test_rows_that_the_second_lacks_are_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"2 of 5 rows are not among the 6 rows of the second source .*names.* 'picture 7'",
    ):
        TwoModels(model([1, 7, 2, 8, 3], 6, 1), model([0, 1, 2, 3, 4, 5], 3, 2))
    with pytest.raises(DataError, match="3 of 3 rows are not among the 0"):
        TwoModels(model([0, 1, 2], 6, 1), model([], 3, 2))


def test_what_tells_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="nothing tells which rows of the two sources are the same"):
        TwoModels(model([0, 1], 6, 1, ids=None), model([0, 1], 3, 2))
    with pytest.raises(DataError, match="has 'picture 1' twice"):
        TwoModels(model([0, 1], 6, 1), model([0, 1, 1], 3, 2))


def test_other_candidates_are_refused() -> None:
    first = model([0, 1], 6, 1)
    with pytest.raises(
        DataError, match=r"4 against 4; the first difference is at 1: 'dog' against 'cup'"
    ):
        TwoModels(first, model([0, 1], 3, 2, class_names=("cat", "cup", "dog", "sea")))
    fewer = model([0, 1], 3, 2, text=np.eye(3), target=None, class_names=NAMES[:3])
    with pytest.raises(
        DataError, match=r"4 against 3; the first difference is at 3: 'sea' against None"
    ):
        TwoModels(first, fewer)
    with pytest.raises(DataError, match="one of them has names"):
        TwoModels(first, model([0, 1], 3, 2, class_names=None))


def test_captions_are_refused() -> None:
    pairs = Embeddings.pairs(np.eye(4), np.eye(4), 2)
    with pytest.raises(UsageError, match="works only with sources that have classes"):
        TwoModels(model([0, 1], 6, 1), pairs)


def test_another_second_model_is_another_source(both: TwoModels) -> None:
    """If it were the same source, a folder with scores would be resumed with other numbers."""
    other = TwoModels(both.first, model(list(range(40)), 3, 9))
    prints = {
        source_fingerprint(one)
        for one in (both, other, both.first, both.take(range(19)), other.take(range(19)))
    }
    assert len(prints) == 5
