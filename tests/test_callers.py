"""Test that a warning points at the caller's line, however deep it is raised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings


def unscaled() -> object:
    return vilu.Embeddings(2 * np.eye(3), np.eye(3), target=[0, 1, 2])


def fit_on_few() -> object:
    return vilu.LVU(epochs=1).fit(toy_embeddings(n=30, k=3))


def fit_without_some_labels() -> object:
    data = toy_embeddings(n=400, k=3)
    target = data.target.clone()
    target[:5] = -1
    partly = vilu.Embeddings(
        data.image, data.text, target=target, logit_scale=data.space.logit_scale
    )
    return vilu.LVU(epochs=1).fit(partly)


def evaluate_few() -> object:
    return vilu.evaluate(vilu.score(vilu.MCM(), toy_embeddings(n=30, k=3)))


def score_fitted_rows() -> object:
    data = toy_embeddings(n=400, k=3)
    return vilu.score(vilu.LVU(epochs=1).fit(data), data)


@pytest.mark.parametrize(
    "call", [unscaled, fit_on_few, fit_without_some_labels, evaluate_few, score_fitted_rows]
)
def test_a_warning_names_the_line_that_called(call: Callable[[], object]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert caught
    first = call.__code__.co_firstlineno
    lines = {line for *_, line in call.__code__.co_lines() if line is not None}
    for warning in caught:
        assert Path(warning.filename) == Path(__file__)
        assert warning.lineno in lines - {first}
