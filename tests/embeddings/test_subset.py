from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import in_memory, toy_embeddings, toy_pairs, variant
from vilu.embeddings.checks import RowNumbers
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, UsageError
from vilu.predictors import PREDICTORS

ROWS = np.array([3, 4, 10, 41, 59])


def test_a_subset_is_what_its_rows_are() -> None:
    whole = toy_embeddings(n=60)
    part, everything = whole.take(ROWS), torch.arange(5)
    assert len(part) == 5
    assert torch.equal(part.image_rows(everything), whole.image[ROWS])
    assert torch.equal(part.target, whole.target[ROWS])
    assert torch.equal(part.candidates(torch.tensor([1, 4])).target, whole.target[[4, 59]])
    assert torch.equal(part.candidates(everything).text, whole.text)
    assert (
        list(part.ids)
        == [part.ids[i] for i in range(5)]
        == part.ids[0:5]
        == [f"row-{i}" for i in ROWS]
    )
    assert part.ids[-1] == "row-59"
    assert torch.equal(
        part.column("features", everything), whole.column("features", torch.from_numpy(ROWS))
    )
    assert torch.equal(part.column("prompts", everything), whole.column("prompts", everything))
    assert (part.n_candidates, part.class_names, part.space) == (
        whole.n_candidates,
        whole.class_names,
        whole.space,
    )


def test_rows_come_in_the_order_asked_for() -> None:
    whole, rows = toy_embeddings(n=60), np.array([41, 3, 59, 3])
    part, everything = whole.take(rows), torch.arange(4)
    assert list(part.ids) == part.ids[:] == [f"row-{i}" for i in rows]
    assert torch.equal(part.image_rows(everything), whole.image[rows])
    assert torch.equal(part.target, whole.target[rows])


def test_taken_of_taken() -> None:
    whole, classes = toy_embeddings(n=60), np.array([4, 0, 2])
    rows = np.flatnonzero(np.isin(whole.target, classes))
    part = whole.take(rows, classes).take(np.array([1, 0]), np.array([2, 1]))
    assert part.class_names == ("class 2", "class 0")
    assert torch.equal(part.candidates(torch.arange(2)).text, whole.text[[2, 0]])
    assert part.target.tolist() == [
        {2: 0, 0: 1}.get(int(whole.target[row]), -1) for row in rows[[1, 0]]
    ]
    assert list(part.ids) == [whole.ids[row] for row in rows[[1, 0]]]
    prompts = part.column("prompts", torch.arange(2))
    assert torch.equal(prompts, whole.column("prompts", torch.arange(2))[[2, 0]])


def test_a_class_that_is_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match=r"classes must name each class once. Got \[0, 1, 0\]"):
        toy_embeddings(n=60).take(ROWS, classes=[0, 1, 0])


def test_columns_left_out_are_not_there() -> None:
    part = toy_embeddings(n=60).take(ROWS, columns=("views", "unheard-of"))
    assert part.columns == {"views"}
    with pytest.raises(DataError, match=r"no column 'features'.*--features"):
        part.column("features", torch.arange(5))


def test_unusable_rows_stay_unusable() -> None:
    whole = toy_embeddings(n=60)
    image = whole.image.clone()
    image[10] = torch.nan
    part = variant(whole, image=image).take(ROWS)
    assert part.status.tolist() == [0, 0, 1, 0, 0]
    assert part.usable_rows.tolist() == [0, 1, 3, 4]


def test_rows_without_identifiers_have_none() -> None:
    assert isinstance(toy_embeddings(n=60, ids_from=None).take(ROWS).ids, RowNumbers)


@pytest.mark.parametrize("name", ["mcm", "knn_vote", "vilu"])
def test_methods_cannot_tell_a_subset_from_a_copy(name: str) -> None:
    whole, rows = toy_embeddings(n=600), np.arange(0, 600, 2)
    copy = in_memory(whole, torch.from_numpy(rows))
    settings = {"epochs": 2, "device": "cpu"} if name == "vilu" else {}
    scores = [
        PREDICTORS[name](**settings).fit(source).predict_uncertainty(source)
        for source in (whole.take(rows), copy)
    ]
    assert np.array_equal(*scores)


def test_pairs_have_no_subset() -> None:
    with pytest.raises(UsageError, match="pools"):
        toy_pairs().take(ROWS)


@pytest.mark.parametrize(
    "rows", [[1, 0, 0, 0], [True, False], [2, 3], np.ones((4, 1), bool)]
)  # ~1 is -2, so all rows once stayed
def test_rows_to_leave_out_are_a_mask_of_all_of_them(rows: list[int]) -> None:
    for source in (
        Embeddings(np.eye(4), np.eye(4)),
        Embeddings.pairs(np.eye(4), np.eye(4), pool_size=2),
    ):
        with pytest.raises(DataError, match=r"rows must have one Boolean per row \(4\)"):
            source.without(np.array(rows))


@pytest.mark.parametrize(
    "rows",
    [
        slice(3, 60, 9),
        slice(-5, None),
        ROWS,
        ROWS.tolist(),
        torch.from_numpy(ROWS),
        np.isin(np.arange(60), ROWS),
        np.isin(np.arange(60), ROWS).tolist(),
        torch.from_numpy(np.isin(np.arange(60), ROWS)),
    ],
)
def test_rows_by_index_are_the_rows_that_take_gives(rows: object) -> None:
    whole = variant(toy_embeddings(n=60), class_names=list("abcde"))
    indices = np.arange(60)[np.asarray(rows) if not isinstance(rows, slice) else rows]
    part, taken = whole[rows], whole.take(indices)
    every = torch.arange(len(indices))
    assert list(part.ids) == [f"row-{i}" for i in indices]
    assert torch.equal(part.target, taken.target)
    assert torch.equal(part.image_rows(every), taken.image_rows(every))
    assert part.columns == whole.columns
    for name in whole.columns:
        assert torch.equal(part.column(name, every), taken.column(name, every))
    assert np.array_equal(part.picture_identities(), whole.picture_identities()[indices])


def test_answers_and_rows_of_none_of_the_classes_are_cut_alike() -> None:
    data = Embeddings(
        np.eye(3), np.eye(3), target=[0, -2, 1], columns={"answer": [2, 1, 0]}, ids=list("xyz")
    )
    part = data[[2, 1]]
    (batch,) = part.batches(2, columns=("answer",))
    assert part.outside.tolist() == [False, True]
    assert (batch.prediction.tolist(), batch.failure.tolist()) == ([0, 1], [1, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            1,
            r"rows must be a slice, a mask or a list of indices, as in data\[3:4\].* Got 1 instead",
        ),
        (np.int64(1), "rows must be a slice, a mask or a list"),
        ([60], "rows must be from 0 to 59. Got 60"),
        ([-1], "rows must be from 0 to 59. Got -1"),
        ([True], r"rows must have one Boolean per row \(60\). Got bool \(1,\)"),
        ([0.5], "rows must be a vector of whole numbers. Got float64"),
    ],
)
def test_rows_by_index_that_cannot_be(rows: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        toy_embeddings(n=60)[rows]


def test_pairs_have_no_rows_by_index() -> None:
    with pytest.raises(UsageError, match="matched in pools"):
        toy_pairs()[:10]


def test_a_source_is_no_list_of_sources() -> None:
    data = toy_embeddings(n=60)
    with pytest.raises(UsageError, match="sources must be a list"):
        vilu.PseudoCaptions(data)
    with pytest.raises(DataError, match="rows must be a slice"):
        list(data)


def test_a_source_shows_its_size_and_its_labels() -> None:
    data = Embeddings(
        np.eye(4), np.eye(4)[:2], target=[0, -1, -2, 1], columns={"answer": [0, 0, 1, 1]}
    )
    assert repr(data) == "Embeddings(n=4, K=2, D=4, labelled=2, outside=1, columns=['answer'])"
    assert repr(data[:1]) == "RowSubset(n=1, K=2, D=4, labelled=1, columns=['answer'])"
    assert repr(toy_pairs(64, 32, 16)).startswith("PairEmbeddings(n=64, K=32, D=16, pool_size=32")
