from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import toy_embeddings, toy_pairs, variant
from vilu.embeddings.checks import RowNumbers
from vilu.embeddings.source import Subset
from vilu.errors import UsageError
from vilu.predictors import PREDICTORS

ROWS = np.array([3, 4, 10, 41, 59])


def test_a_subset_is_what_its_rows_are() -> None:
    whole = toy_embeddings(n=60)
    part, everything = Subset(whole, ROWS), torch.arange(5)
    assert len(part) == 5
    assert torch.equal(part.image_rows(everything), whole.image[ROWS])
    assert torch.equal(part.target, whole.target[ROWS])
    assert torch.equal(part.candidates(torch.tensor([1, 4])).target, whole.target[[4, 59]])
    assert torch.equal(part.candidates(everything).text, whole.text)
    assert list(part.ids) == [part.ids[i] for i in range(5)] == part.ids[0:5] == [f"row-{i}" for i in ROWS]
    assert part.ids[-1] == "row-59"
    assert torch.equal(part.column("features", everything), whole.column("features", torch.from_numpy(ROWS)))
    assert torch.equal(part.column("prompts", everything), whole.column("prompts", everything))
    assert (part.n_candidates, part.class_names, part.space) == (whole.n_candidates, whole.class_names, whole.space)


def test_unusable_rows_stay_unusable() -> None:
    whole = toy_embeddings(n=60)
    image = whole.image.clone()
    image[10] = torch.nan
    part = Subset(variant(whole, image=image), ROWS)
    assert part.status.tolist() == [0, 0, 1, 0, 0]
    assert part.usable_rows.tolist() == [0, 1, 3, 4]


def test_rows_without_identifiers_have_none() -> None:
    assert isinstance(Subset(toy_embeddings(n=60, ids_from=None), ROWS).ids, RowNumbers)


@pytest.mark.parametrize("name", ["mcm", "knn_vote", "vilu"])
def test_methods_cannot_tell_a_subset_from_a_copy(name: str) -> None:
    whole, rows = toy_embeddings(n=600), np.arange(0, 600, 2)
    copy = type(whole).from_rows(whole, torch.from_numpy(rows))
    settings = {"epochs": 2, "device": "cpu"} if name == "vilu" else {}
    scores = [
        PREDICTORS[name](**settings).fit(source).predict_uncertainty(source) for source in (Subset(whole, rows), copy)
    ]
    assert np.array_equal(*scores)


def test_pairs_have_no_subset() -> None:
    with pytest.raises(UsageError, match="pools"):
        Subset(toy_pairs(), ROWS)
