"""What no number depends on, of every method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vilu
from tests.conftest import toy_embeddings, variant
from tests.contract.test_predictors import make
from vilu import PREDICTORS
from vilu.embeddings.columns import TEXT_COLUMNS
from vilu.embeddings.memory import Embeddings


@pytest.fixture(scope="module")
def fitted(train: Embeddings) -> dict[str, vilu.FailurePredictor]:
    return {name: make(name).fit(train) for name in PREDICTORS}


def with_twins(data: Embeddings) -> Embeddings:
    """The classes 1 and 3 a second time, under names of their own, with half of their rows."""
    given = torch.tensor([0, 1, 2, 3, 4, 1, 3])
    target, other = data.target.clone(), torch.arange(len(data)) % 2 == 1
    target[other & (data.target == 1)], target[other & (data.target == 3)] = 5, 6
    columns = {name: data.column(name, torch.arange(len(data))) for name in data.columns}
    twice = {name: rows[given] if name in TEXT_COLUMNS else rows for name, rows in columns.items()}
    names = [*(data.class_names or ()), "twin of 1", "twin of 3"]
    return variant(data, text=data.text[given], target=target, columns=twice, class_names=names)


def test_classes_with_equal_texts_are_one_class_to_every_method(
    fitted: dict[str, vilu.FailurePredictor], train: Embeddings, test: Embeddings
) -> None:
    doubled_train, doubled = with_twins(train), with_twins(test)
    expected = vilu.score(fitted["mcm"], test)
    assert np.array_equal(vilu.score(fitted["mcm"], doubled).failure, expected.failure)
    for name, predictor in fitted.items():
        scores = predictor.predict_uncertainty(test)
        assert np.array_equal(predictor.predict_uncertainty(doubled), scores), name
        assert np.array_equal(make(name).fit(doubled_train).predict_uncertainty(test), scores), name
