"""Test that classes with equal texts are one answer, wherever embeddings come from."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.builders.store_fakes import FakeBackbone, dataset
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.source import index_of_first_same_answer
from vilu.errors import DataError
from vilu.store.embed import ExtraColumns, embed
from vilu.store.reader import EmbeddingStore

EYE = np.eye(3, dtype=np.float32)
IMAGE = EYE[[0, 1, 2, 0, 1]]


def test_classes_with_equal_texts_become_the_first_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    columns = {
        "prompts": np.stack([EYE[0], EYE[1], -EYE[0], EYE[2]])[:, None],
        "features": np.ones((5, 2)),
    }
    names = ["crane", "owl", "crane (machine)", "eel"]
    with caplog.at_level(logging.WARNING, "vilu"):
        data = Embeddings(
            IMAGE, EYE[[0, 1, 0, 2]], target=[0, 1, 3, 2, -1], class_names=names, columns=columns
        )
    assert (
        "1 of 4 classes have the text of an earlier one: 'crane (machine)' (2) is 'crane' (0)"
        in caplog.text
    )
    assert (data.class_names, data.n_candidates) == (("crane", "owl", "eel"), 3)
    assert data.target.tolist() == [0, 1, 2, 0, -1]
    assert data.candidate_of is not None
    assert data.candidate_of.tolist() == [0, 1, 0, 2]
    batch = next(data.batches(8, columns=["prompts", "features"]))
    assert batch.failure.tolist() == [0, 0, 0, 0, -1]
    assert batch.columns["prompts"][:, 0].tolist() == EYE.tolist()
    assert data.take(torch.tensor([3])).target.tolist() == [0]


def test_one_name_is_one_class_where_its_texts_are_all_but_equal() -> None:
    near = EYE[[0, 1, 0]].copy()
    near[2, 1] = 1e-4  # as another batch of prompts may round it
    assert Embeddings(IMAGE, near, class_names=["a", "b", "a"]).class_names == ("a", "b")
    assert Embeddings(IMAGE, near, class_names=["a", "b", "c"]).candidate_of is None


def test_one_name_for_two_texts_is_refused_and_listed() -> None:
    with pytest.raises(
        DataError, match=r"Different texts: 'a', 'b'\. Rename them, or give both the same row"
    ):
        Embeddings(np.eye(4), np.eye(4), class_names=["a", "b", "a", "b"])


def test_equality_by_name_and_by_text_chains() -> None:
    near = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [1.0, 1e-4]])
    assert index_of_first_same_answer(near, ["a", "a", "b"]).tolist() == [0, 0, 0]


def test_two_equal_classes_are_one_candidate() -> None:
    data = Embeddings(IMAGE, EYE[[0, 0]], target=[0, 1, 0, 1, 0])
    assert data.n_candidates == 1


def test_a_store_of_two_classes_of_one_name_is_one_of_one_class(tmp_path: Path) -> None:
    """Each name is encoded once, so equal names have rows that are equal to the last bit.

    The columns for the classes have one row per answer too.
    """
    columns = ExtraColumns(prompts=("a {}.", "the {}."), features=True)
    embed(
        dataset(9),
        FakeBackbone(),
        tmp_path / "s",
        names=("cat", "dog", "cat"),
        part_size=4,
        columns=columns,
    )
    store, rows = EmbeddingStore(tmp_path / "s"), torch.arange(9)
    assert (store.class_names, store.n_candidates, store.manifest.names) == (
        ("cat", "dog"),
        2,
        ("cat", "dog", "cat"),
    )
    assert store.target.tolist() == [0, 1, 0] * 3
    assert [len(store.column(name, rows)) for name in ("prompts", "text_features", "features")] == [
        2,
        2,
        9,
    ]
    kept = np.load(tmp_path / "s/text_emb/classes.npy")
    assert np.array_equal(kept[0], kept[2])
    assert np.array_equal(store.text.numpy(), kept[:2])
    answers = vilu.score(vilu.MCM(), store)
    assert np.array_equal(answers.failure, (answers.prediction != store.target.numpy()).astype(int))
    assert answers.class_names == ("cat", "dog")
