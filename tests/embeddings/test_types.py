"""Test embeddings in memory: shapes, norms, targets, pools, and refused inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import toy_embeddings
from vilu.embeddings.memory import Embeddings, PairEmbeddings
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.store.importing import import_arrays

EYE = np.eye(3)


def test_logits_are_scaled_and_shifted_cosines() -> None:
    data = Embeddings(EYE, EYE, target=[0, 1, 2], logit_scale=10.0, logit_bias=-4.0)
    batch = next(data.batches(3))
    assert torch.equal(batch.logits, 10 * torch.eye(3) - 4)
    assert batch.logits.dtype == torch.float32
    assert batch.failure.tolist() == [0, 0, 0]


def test_a_tie_goes_to_the_lowest_index() -> None:
    between = [[0.6, 0.6, 0.52915026]]  # as near to the first text as to the second
    batch = next(Embeddings(between * 2, EYE, target=[0, 1]).batches(2))
    assert batch.prediction.tolist() == [0, 0]
    assert batch.failure.tolist() == [0, 1]


def test_unknown_targets_have_unknown_failures() -> None:
    assert next(Embeddings(EYE, EYE).batches(3)).failure.tolist() == [-1, -1, -1]
    assert next(Embeddings(EYE, EYE, target=[0, -1, 0]).batches(3)).failure.tolist() == [0, -1, 1]


def test_rows_are_brought_to_unit_norm_and_said_so() -> None:
    with pytest.warns(
        UserWarning, match=r"2 of 3 image rows are not of unit norm \(norms 1 to 5\)"
    ):
        data = Embeddings(EYE * [[1], [2], [5]], EYE)
    assert torch.equal(data.image, torch.eye(3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8", np.int8])
def test_any_number_type_and_byte_order(dtype: object) -> None:
    assert torch.equal(Embeddings(EYE.astype(dtype), EYE).image, torch.eye(3))


def test_identifiers_in_an_array_are_copied() -> None:
    names = np.array(["a.jpg", "b.jpg", "c.jpg"])
    sources = [
        Embeddings(np.eye(3), np.eye(3), ids=names),
        PairEmbeddings(np.eye(3), np.eye(3), 3, ids=names),
    ]
    names[0] = "other"
    for source in sources:
        assert list(source.ids) == ["a.jpg", "b.jpg", "c.jpg"]


def test_read_only_and_reversed_arrays_are_copied() -> None:
    frozen = EYE.astype(np.float32)
    frozen.flags.writeable = False
    assert torch.equal(Embeddings(frozen, EYE).image, torch.eye(3))
    assert torch.equal(Embeddings(EYE[::-1, ::-1], EYE).image, torch.eye(3))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_an_array_that_is_filled_anew_changes_nothing(kind: Callable[..., Any]) -> None:
    """A caller may reuse one buffer for the embeddings of several sets."""
    image, text, negatives, ids = *(kind(EYE.astype(np.float32)) for _ in range(3)), ["a", "b", "c"]
    data = Embeddings(image, text, ids=ids, columns={"negatives": negatives})
    for buffer in (image, text, negatives):
        buffer[:] = 0
    ids[0] = "z"
    kept = data.image, data.text, data.column("negatives", torch.arange(3))
    assert all(torch.equal(rows, torch.eye(3)) for rows in kept)
    assert list(data.ids) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "shape"), [("views", (3, 4, 3)), ("prompts", (3, 2, 3)), ("negatives", (5, 3))]
)
def test_columns_of_embeddings_are_brought_to_unit_norm_as_embeddings_are(
    name: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).normal(size=shape) * 7
    units = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    with pytest.warns(UserWarning, match=f"{name} rows are not of unit norm"):
        data = Embeddings(EYE, EYE, columns={name: values.astype(">f8")})
    np.testing.assert_allclose(data.column(name, torch.arange(3)).numpy(), units, rtol=1e-6)
    data = Embeddings(EYE, EYE, columns={name: units})
    assert np.array_equal(data.column(name, torch.arange(3)).numpy(), units)


def test_columns_of_which_more_than_the_direction_counts_are_not_scaled(tmp_path: Path) -> None:
    features, projection = (
        np.array([[1.0], [3e33], [1e-31]]),
        np.array([[1e-31, 2e-31], [1.0, 2.0], [3e33, 0.0]]),
    )
    columns = {"features": features, "image_projection": projection}
    np.savez(
        tmp_path / "a.npz",
        image=EYE,
        text=EYE,
        class_names=list("abc"),
        logit_scale=100.0,
        logit_bias=0.0,
        **columns,
    )
    for data in (
        Embeddings(EYE, EYE, columns=columns),
        import_arrays(tmp_path / "a.npz", tmp_path / "s"),
    ):
        for name, values in columns.items():
            assert np.array_equal(
                data.column(name, torch.arange(3)).numpy(), values.astype(np.float32)
            )


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"features": np.full((3, 2), 1e39)}, "has numbers that are not finite, or beyond float32"),
        (
            {"features": np.ones((3, 2), complex)},
            "features must hold real numbers. Got dtype complex128",
        ),
        (
            {"features": np.array([["a"], ["b"], ["c"]])},
            "features must hold real numbers. Got dtype <U1",
        ),
        ({"features": np.array([[None]] * 3)}, "features must hold real numbers. Got dtype object"),
        ({"features": [[1.0], [1.0, 2.0], [3.0]]}, "column 'features' must be an array of numbers"),
        (
            {"views": np.ones((3, 0, 3))},
            r"column 'views' must be \(N, V, D\) .*Got shape \(3, 0, 3\)",
        ),
        (
            {"views": np.ones((3, 1, 4))},
            "column 'views' must be of the width of the embeddings, 3. Got 4",
        ),
        (
            {"negatives": np.zeros((2, 3))},
            "every negatives row must be finite and of non-zero norm",
        ),
    ],
)
def test_columns_that_are_refused(column: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Embeddings(EYE, EYE, columns=column)


def test_bfloat16_and_gradients_come_in_as_plain_float32() -> None:
    image = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    data = Embeddings(image, EYE)
    assert data.image.dtype == torch.float32
    assert not data.image.requires_grad


def test_status_marks_unusable_rows_and_batches_leave_them_out() -> None:
    image = np.eye(4, 3)
    image[1, 0] = np.nan
    data = Embeddings(image, EYE, target=[0, 1, 2, 0])
    assert data.status.tolist() == [0, 1, 0, 2]
    assert next(data.batches(10)).index.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image": np.ones(3)}, "image must be a matrix"),
        ({"image": np.eye(3, 4)}, "share one width. Got 4, but text has 3"),
        ({"text": np.zeros((2, 3))}, r"bad rows of 2, first row 0 \(zero_norm\)"),
        ({"text": np.full((2, 3), np.inf)}, "nonfinite"),
        ({"text": np.empty((0, 3))}, "at least one row"),
        ({"image": np.eye(3, dtype=complex)}, "real numbers"),
        ({"image": torch.eye(3, dtype=torch.complex64)}, "real numbers"),
        ({"image": np.eye(3, dtype=object)}, "real numbers. Got dtype object"),
        ({"image": np.eye(3) > 0}, "Got dtype bool"),
        ({"target": [0, 1]}, r"one entry per image row \(3\)"),
        ({"target": [0.0, 1.0, 2.0]}, "whole numbers"),
        (
            {"target": [0, 1, 3]},
            "0 to 2, -1 where unknown, or -2 for none of them. Got values from 0 to 3",
        ),
        ({"target": [0, 1, -3]}, "Got values from -3 to 1"),
        ({"class_names": ["a", "b"]}, r"one name per text row \(3\)"),
        ({"class_names": ["a", "b", "a"]}, "one name must have one text. Different texts: 'a'"),
        ({"class_names": ["a", " ", "b"]}, "Name 1 is blank"),
        (
            {"columns": {"negatives": np.empty((0, 3))}},
            r"with one or more entries\. Got shape \(0, 3\)",
        ),
        ({"columns": {"negatives": 1.0}}, r"with one or more entries\. Got shape \(\)"),
        ({"ids": ["a"]}, "ids must have one entry per image row"),
    ],
)
def test_what_cannot_be_is_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Embeddings(**{"image": EYE, "text": EYE, "target": [0, 1, 2], **kwargs})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_logit_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(UsageError, match="logit_scale must be a positive finite number"):
        Embeddings(EYE, EYE, target=None, logit_scale=scale)


def test_float16_overflow_is_not_hidden() -> None:
    with np.errstate(over="ignore"):
        image = (np.eye(3) * 1e6).astype(np.float16)
    assert Embeddings(image, EYE).status.tolist() == [1, 1, 1]


def test_an_empty_set_is_a_set() -> None:
    data = Embeddings(np.empty((0, 3)), EYE)
    assert len(data) == 0
    assert list(data.batches(4)) == []


@given(st.integers(1, 30), st.integers(1, 40))
def test_batches_cover_every_row_once_in_order(n: int, size: int) -> None:
    data = toy_embeddings(n=n)
    index = torch.cat([batch.index for batch in data.batches(size)])
    assert index.tolist() == list(range(n))


def test_pools_are_whole_and_identical_captions_are_one_target() -> None:
    text = np.eye(6)[[0, 1, 0, 3, 4, 5]]
    data = Embeddings.pairs(text, text, pool_size=3)
    first, second = data.batches(1000)
    assert first.target.tolist() == [0, 1, 0]
    assert first.failure.tolist() == [0, 0, 0]
    assert second.index.tolist() == [3, 4, 5]
    assert data.n_candidates == 3
    assert [batch.index.tolist() for batch in data.batches(2, rows=torch.tensor([5, 0, 1, 2]))] == [
        [5, 0],
        [1],
    ]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((np.eye(5), np.eye(5), 6), DataError, "has 5 usable pairs, and a pool has 6"),
        ((np.eye(4), np.eye(4)[:3], 1), DataError, "pairs of one shape"),
        ((np.eye(4), np.zeros((4, 4)), 2), DataError, "zero_norm"),
        ((np.eye(4), np.eye(4), 0), UsageError, "pool_size must be at least 1"),
    ],
)
def test_pairs_that_cannot_be(args: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        PairEmbeddings(*args)


def test_spaces_are_compared_by_all_that_is_known() -> None:
    known = EmbeddingSpace(8, 100.0, backbone="a", weights="w", preprocess="p")
    bare = EmbeddingSpace(8, 100.0)
    known.require_match(bare, name="x", other_name="y")
    assert known.fingerprint != bare.fingerprint
    with pytest.raises(ProvenanceError, match=r"preprocess: 'p' \(x\) against 'q' \(y\)"):
        known.require_match(
            EmbeddingSpace(8, 100.0, backbone="a", weights="w", preprocess="q"),
            name="x",
            other_name="y",
        )
    with pytest.raises(ProvenanceError, match="logit_bias"):
        bare.require_match(EmbeddingSpace(8, 100.0, -10.0), name="x", other_name="y")
    with pytest.raises(UsageError, match="embed_dim"):
        EmbeddingSpace(-1, 1.0)


@pytest.mark.parametrize("kind", [list, np.array, lambda names: np.array(names, object)])
def test_targets_may_be_names_of_classes(kind: Callable[[list[str]], Any]) -> None:
    names = kind(["cup", "", "(outside)", "cat"])
    data = Embeddings(np.eye(4), np.eye(4)[:3], target=names, class_names=["cat", "dog", "cup"])
    assert data.target.tolist() == [2, -1, -1, 0]
    assert data.outside.tolist() == [False, False, True, False]


def test_names_of_merged_classes_are_one_target() -> None:
    data = Embeddings(
        EYE, EYE[[0, 1, 0]], target=["a", "b", "c"], class_names=["a", "b", "c"], ids=list("xyz")
    )
    assert data.target.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("target", "class_names", "message"),
    [
        (
            ["cat", "dogs", "cat"],
            ["cat", "dog", "cup"],
            r"target must hold names of the 3 candidates. Got 'dogs' too. "
            r"Did you mean 'dog'\? Add the class, or write '\(outside\)'",
        ),
        (["cat", "dog", "cat"], None, "target holds names, and the candidates have none"),
        (["cat", 1, None], ["cat", "dog", "cup"], "whole numbers .* or names of classes"),
        (["cat", np.nan, "dog"], ["cat", "dog", "cup"], '"" where unknown'),
    ],
)
def test_names_that_are_no_targets(
    target: list[object], class_names: list[str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Embeddings(EYE, EYE, target=np.array(target, object), class_names=class_names)


def test_everything_but_images_and_texts_is_given_by_name() -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        Embeddings(EYE, EYE, [0, 1, 2])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("logarithm", "scale"), [(np.log(100), "100"), (4.6052, "100.003"), (4.7631, "117.108")]
)
def test_the_logarithm_of_a_scale_is_no_scale(logarithm: float, scale: str, tmp_path: Path) -> None:
    message = f"probably its logarithm.*logit_scale={scale}"
    with pytest.raises(UsageError, match=message):
        Embeddings(EYE, EYE, logit_scale=logarithm)
    with pytest.raises(UsageError, match=message):
        PairEmbeddings(EYE, EYE, 3, logit_scale=logarithm)
    np.savez(tmp_path / "a.npz", image=EYE, text=EYE, class_names=list("abc"), logit_bias=0.0)
    with pytest.raises(UsageError, match=message):
        import_arrays(tmp_path / "a.npz", tmp_path / "s", logit_scale=logarithm)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("scale", [0.01, 1.0, np.log(10), 4.0, 5.0, 20.0, 54.6, 100.0, 150.0])
def test_scales_that_may_be_are_taken(scale: float) -> None:
    assert Embeddings(EYE, EYE, logit_scale=scale).space.logit_scale == scale
