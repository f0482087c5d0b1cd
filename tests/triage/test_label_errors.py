"""Test that wrong labels are found among rows that occur more than once."""

from __future__ import annotations

import numpy as np
import pytest

import vilu
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.errors import DataError
from vilu.predictors.contract.labelled import cross_fit_splits, fit_and_selection
from vilu.triage.label_errors import find_label_errors

N, WRONG, CLASSES = 300, 24, 6


def mislabelled(times: int, noise: float = 0.0) -> tuple[Embeddings, np.ndarray]:
    """Return 300 rows, each repeated `times` times, and a mask for the rows with a wrong label.

    24 of the 300 labels are wrong.
    """
    rng = np.random.default_rng(0)
    text = rng.normal(size=(CLASSES, 64))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    truth = np.arange(N) % CLASSES
    image = 0.8 * text[truth] + 0.1 * rng.normal(size=(N, 64)) + 0.3 * rng.normal(size=(1, 64))
    label = truth.copy()
    wrong = rng.choice(N, WRONG, replace=False)
    label[wrong] = (truth[wrong] + 1 + rng.integers(CLASSES - 1, size=WRONG)) % CLASSES
    rows = np.tile(image, (times, 1))
    rows[N:] += noise * rng.normal(size=rows[N:].shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    is_wrong = np.tile(np.isin(np.arange(N), wrong), times)
    ids = [str(row) for row in range(N * times)]
    return Embeddings(rows, text, target=np.tile(label, times), logit_scale=20.0, ids=ids), is_wrong


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*rows are .* pictures")
# cleanlab triggers it under a new pandas
@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.parametrize(("times", "noise"), [(1, 0.0), (2, 0.0), (5, 0.0), (5, 0.003)])
def test_wrong_labels_are_told_however_often_they_stand(times: int, noise: float) -> None:
    data, is_wrong = mislabelled(times, noise)
    found = find_label_errors(data)
    flagged = np.array([int(key) for key in found.keys])[found.is_error]
    right = np.count_nonzero(is_wrong[flagged])
    assert right >= 0.75 * WRONG * times  # without repeats: 21 of 24
    assert len(flagged) - right <= 0.02 * len(data)


def test_copies_of_one_picture_cannot_judge_one_another() -> None:
    data, _ = mislabelled(times=1)
    copies = Embeddings(
        np.tile(data.image[:1], (8, 1)), data.text, target=[0, 1] * 4, logit_scale=20.0
    )
    with pytest.raises(DataError, match="all 8 labelled rows are near copies of one picture"):
        find_label_errors(copies)


def test_rows_held_out_from_a_fit_show_none_of_its_pictures() -> None:
    data, _ = mislabelled(times=3)
    train = Rows(data, data.usable_rows)
    failure = (vilu.score(vilu.MCM(), data).failure == 1).astype(np.int64)
    pairs = list(cross_fit_splits(train, train.index.new_tensor(failure), None, seed=0))
    assert len(pairs) == 5
    fitted, selected = fit_and_selection(train, train.index.new_tensor(failure), None, 0.2, seed=0)
    assert selected is not None
    for here, held_out in [*pairs, (fitted, selected)]:
        pictures = [set((rows.index % N).tolist()) for rows in (here, held_out)]
        assert not pictures[0] & pictures[1]
        assert sum(map(len, pictures)) == N
        assert len(held_out.index) == pytest.approx(len(data) / 5, abs=6)
