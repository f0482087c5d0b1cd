"""Test outcomes as text, as pyarrow and pandas tables, and several outcomes combined into one."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings
from vilu.errors import DataError, MissingModelError, UsageError
from vilu.outcomes.outcomes import Outcomes

NAMES = ["cat", "dog"]


def fold(n: int = 40, **changes: object) -> Outcomes:
    facts = {
        "prediction": np.zeros(n, int),
        "ids": [f"{changes.get('seed')}-{i}" for i in range(n)],
        "class_names": NAMES,
        "method": "mcm",
        "dataset": "pets",
        "provenance": {"n_candidates": 2, "n_seen_in_fit": 1, "risk": str(changes.get("seed"))},
        **changes,
    }
    return Outcomes(np.linspace(0, 1, n), np.arange(n) % 2, **facts)


def test_outcomes_show_their_size_and_how_many_are_right() -> None:
    assert repr(Outcomes([0.1, 0.9], [-1, -1])) == "Outcomes(n=2, answer='zero_shot')"
    outcomes = Outcomes(
        [0.1, 0.2, 0.9],
        [0, -1, 1],
        decision=["accept", "accept", "review"],
        method="mcm",
        dataset="pets",
        seed=0,
    )
    assert repr(outcomes) == (
        "Outcomes(n=3, evaluable=2, accuracy=0.500, accepted=2, method='mcm', dataset='pets', "
        "seed=0, answer='zero_shot')"
    )


def test_outcomes_of_a_calibrated_predictor_as_tables() -> None:
    data = toy_embeddings(400)
    model = vilu.Selective(vilu.MCM()).calibrate(data[:200], vilu.Target(max_risk=0.3))
    outcomes = model.predict(data[200:])
    table = outcomes.to_arrow()
    assert table["id"].to_pylist() == list(outcomes.ids or ())
    names = np.array(data.class_names)
    assert table["answer"].to_pylist() == names[outcomes.prediction].tolist()
    assert table["target"].to_pylist() == names[outcomes.target].tolist()
    assert table["accept"].to_pylist() == [d == "accept" for d in outcomes.decision or ()]
    assert table["reason"].to_pylist() == list(outcomes.decision_reason or ())
    np.testing.assert_array_equal(table["uncertainty"], outcomes.uncertainty)
    np.testing.assert_array_equal(table["failure_probability"], outcomes.failure_probability)
    frame = outcomes.to_pandas()
    assert list(frame.columns) == table.column_names
    assert frame.accept.sum() == outcomes.decision.count("accept")
    assert frame.failure.mean() == outcomes.failure.mean()


def test_what_is_not_known_is_null_in_tables() -> None:
    outcomes = Outcomes(
        [0.1, np.nan, 0.3],
        [0, -1, 1],
        [0, -1, 1],
        target=[0, -1, -2],
        reason=[None, "nonfinite", None],
        label_set=['["cat"]', None, "[]"],
        class_names=NAMES,
        picture=[7, -1, 7],
    )
    assert outcomes.to_arrow().to_pydict() == {
        "answer": ["cat", None, "dog"],
        "target": ["cat", None, "(outside)"],
        "uncertainty": [0.1, None, 0.3],
        "failure": [False, None, True],
        "reason": [None, "nonfinite", None],
        "label_set": [["cat"], None, []],
        "picture": [7, None, 7],
    }
    numbers = Outcomes([0.1], [0], [1], target=[1]).to_arrow()
    assert (numbers["answer"].to_pylist(), numbers["target"].to_pylist()) == ([1], [1])


def test_without_pandas_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        sys.modules["vilu.outcomes.outcomes"],
        "find_spec",
        lambda name: None if name == "pandas" else find(name),
    )
    with pytest.raises(MissingModelError, match="pip install pandas"):
        Outcomes([0.1], [0]).to_pandas()


def test_folds_are_joined_row_by_row() -> None:
    whole = Outcomes.concat([fold(seed=0), fold(20, seed=1, reason=["x"] * 20)])
    assert len(whole) == 60
    assert whole.ids == (*fold(seed=0).ids, *fold(20, seed=1).ids)
    assert whole.reason == (*[None] * 40, *["x"] * 20)
    assert (whole.method, whole.dataset, whole.seed, whole.class_names) == (
        "mcm",
        "pets",
        None,
        tuple(NAMES),
    )
    assert whole.provenance == {"n_candidates": 2, "n_seen_in_fit": 2}
    np.testing.assert_array_equal(whole.take(np.arange(40)).uncertainty, fold().uncertainty)


@pytest.mark.parametrize("change", [{"decision": ["review"] * 40}, {"ids": None}])
def test_a_column_of_some_parts_only_is_refused(change: dict) -> None:
    with pytest.raises(DataError, match=f"all parts must have the column {next(iter(change))}"):
        Outcomes.concat([fold(), fold(**change)])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"method": "margin"}, "method"),
        ({"answer": "adapted"}, "answer"),
        ({"class_names": ["dog", "cat"]}, "class_names"),
        ({"is_probability": True}, "is_probability"),
        ({"provenance": {"n_candidates": 3}}, "n_candidates"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change: dict, name: str) -> None:
    with pytest.raises(DataError, match=f"the parts must have the same {name}. Got"):
        Outcomes.concat([fold(), fold(**change)])


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(UsageError, match="at least one part"):
        Outcomes.concat([])
