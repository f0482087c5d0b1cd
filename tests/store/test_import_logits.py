"""Stores that are made from given logits or given answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import vilu
from tests.command import run
from vilu.errors import DataError, UsageError

NAMES = ["cat", "dog", "cup"]


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    target = rng.integers(3, size=60)
    logits = 3 * np.eye(3)[target] + rng.normal(size=(60, 3)) - 8.0
    features = np.eye(3, 16)[target] + rng.normal(size=(60, 16))
    answer = np.where(rng.random(60) < 0.1, (target + 1) % 3, target)
    return {"logits": logits, "features": features, "target": target, "answer": answer}


def source_of(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    path = folder / "arrays.npz"
    np.savez(path, class_names=NAMES, **arrays)
    return path


@pytest.mark.parametrize("part_size", [7, 1000])
def test_a_store_is_the_same_as_the_arrays(
    arrays: dict[str, np.ndarray], tmp_path: Path, part_size: int
) -> None:
    store = vilu.import_arrays(source_of(arrays, tmp_path), tmp_path / "store", part_size=part_size)
    data = vilu.Embeddings.from_logits(**arrays, class_names=NAMES)
    assert store.columns == {"logits", "answer"}
    every = torch.arange(60)
    for name in store.columns:
        assert torch.equal(store.column(name, every), data.column(name, every))
    assert torch.equal(store.image_rows(every), data.image_rows(every))
    assert torch.equal(store.target, data.target)
    for method in (vilu.MCM(), vilu.MCM(answer="given"), vilu.ViLUPlus(width=8, answer="given")):
        fitted = method.fit(data)
        expected = fitted.predict_uncertainty(data)
        assert np.array_equal(fitted.predict_uncertainty(store), expected)
    outcomes = vilu.score(vilu.MCM(answer="given"), store)
    assert outcomes.prediction.tolist() == arrays["answer"].tolist()
    assert vilu.open_source(tmp_path / "store").take([1], classes=[2, 0]).n_candidates == 2


def test_logits_alone_make_a_store(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    del arrays["features"]
    arrays["logits"][5, 0] = np.nan
    path = source_of(arrays, tmp_path)
    store = vilu.import_arrays(path, tmp_path / "store", max_error_rate=0.1)
    assert (len(store), store.has_vectors) == (59, False)
    assert list(store.bad_images()) == [("5", "nonfinite")]
    whole = vilu.Embeddings.from_logits(arrays["logits"], class_names=NAMES)
    expected = vilu.MCM().predict_uncertainty(whole)
    assert np.array_equal(vilu.MCM().predict_uncertainty(store), np.delete(expected, 5))


def test_answers_go_with_texts_by_name(tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("dog\ncat\n", encoding="utf-8")
    np.savez(
        tmp_path / "a.npz",
        image=np.eye(2),
        text=[[0.6, 0.8], [1, 0], [0, 1]],
        class_names=["no", *NAMES[:2]],
    )
    store = vilu.import_arrays(
        tmp_path / "a.npz",
        tmp_path / "store",
        files={"answer": tmp_path / "answers.txt"},
        logit_scale=10,
        logit_bias=0,
        outside=["no"],
    )
    assert store.class_names == ("cat", "dog")
    assert vilu.score(vilu.MCM(answer="given"), store).prediction.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": np.zeros((60, 4))}, "one class name per logit"),
        ({"logits": np.zeros(60)}, "must be a matrix"),
        ({"features": np.zeros((59, 16))}, "one entry per image row"),
        ({"answer": np.full(60, 3)}, "answer must be a row of text, 0 to 2"),
        ({"answer": np.full(60, "cow")}, "'cow'"),
        ({"answer": np.zeros(59, int)}, "one entry per image row"),
        ({"text": np.eye(3, 16)}, "leave one of them out"),
        ({"negatives": np.eye(3, 16)}, "with logits there are no texts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    arrays: dict[str, np.ndarray], tmp_path: Path, changed: dict[str, np.ndarray], message: str
) -> None:
    path = source_of({**arrays, **changed}, tmp_path)
    with pytest.raises(DataError, match=message):
        vilu.import_arrays(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_scale_and_rounding_are_no_choices(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = source_of(arrays, tmp_path)
    with pytest.raises(UsageError, match="have their scale and bias already"):
        vilu.import_arrays(path, tmp_path / "store", logit_scale=100)
    with pytest.raises(UsageError, match="would change answers"):
        vilu.import_arrays(path, tmp_path / "store", dtype="float16")


def test_a_store_without_answers_says_how_to_add_them(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    del arrays["answer"]
    store = vilu.import_arrays(source_of(arrays, tmp_path), tmp_path / "store")
    with pytest.raises(DataError, match="vilu import --answers FILE"):
        vilu.score(vilu.MCM(answer="given"), store)


def test_the_commands_work_on_files(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", arrays["logits"])
    np.save(tmp_path / "features.npy", arrays["features"])
    for name in ("target", "answer"):
        lines = [NAMES[code] for code in arrays[name]]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    store = str(tmp_path / "store")
    flags = {
        "--logits": "logits.npy",
        "--features": "features.npy",
        "--labels": "target.txt",
        "--answers": "answer.txt",
        "--classes": "names.txt",
    }
    given = []
    for flag, file in flags.items():
        given += [flag, str(tmp_path / file)]
    run("import", *given, "-o", store)
    predictor = str(tmp_path / "predictor")
    run("fit", store, "--method", "linear_probe", "--set", "answer=given", "-o", predictor)
    scores = str(tmp_path / "scores.parquet")
    run("score", predictor, store, "-o", scores)
    outcomes = vilu.Outcomes.load(scores)
    assert outcomes.prediction.tolist() == arrays["answer"].tolist()
    run("inspect", "--deep", store)
