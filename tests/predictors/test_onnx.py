"""Test exported graphs in onnxruntime against the predictors.

The data have failures, ties and any number of rows.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import vilu
from tests.conftest import few, toy_embeddings, toy_pairs, variant, without_words
from vilu.embeddings.memory import Embeddings
from vilu.errors import DataError, UsageError
from vilu.predictors.contract.parameters import parameters
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.nn.head import Graph
from vilu.predictors.persistence import onnx
from vilu.predictors.persistence.onnx import GraphBatch, export_onnx, reference_scores, trial_inputs
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.predictors.vilu.vilu import ViLU
from vilu.predictors.zero_shot import MCM, MaxLogit
from vilu_bench.methods.ensembles import MCDropout
from vilu_bench.methods.neighbours import KNNVote

HEAD = {"hidden": (32, 16), "epochs": 4}
PLUS = {"width": 8, "epochs": 2}
EXPORTABLE = [cls for cls in vilu.PREDICTORS.values() if "graph" in vars(cls)]
PREDICTORS = {
    "vilu paper mcm": ViLU(attention="paper", mcm_input=True, **HEAD),
    "vilu_plus features": ViLUPlus(**PLUS),
    "mcm": MCM(),
    "vilu": ViLU(**HEAD),
    "vilu_plus captions": ViLUPlus(features=False),
    "vilu_plus features adapted": ViLUPlus(answer="adapted", **PLUS),
    "vilu_plus captions adapted": ViLUPlus(answer="adapted", features=False),
}


def answers(path: Path, data: Embeddings, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return onnxruntime's answers for the first ``n`` rows."""
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    every = {
        "image": data.image,
        "text": data.text,
        "features": data.column("features", torch.arange(len(data))),
    }
    feed = {entry.name: every[entry.name].numpy() for entry in session.get_inputs()}
    assert [entry.shape[1:] for entry in session.get_inputs()][:2] == [[16], [16]]
    return session.run(
        ["uncertainty", "prediction"], {k: v if k == "text" else v[:n] for k, v in feed.items()}
    )


def candidates(data: Embeddings) -> dict[str, torch.Tensor]:
    """Return other texts for the same images: in another order, fewer, foreign, many,
    or repeated.
    """
    foreign = torch.nn.functional.normalize(
        torch.randn(700, 16, generator=torch.Generator().manual_seed(3)), dim=1
    )
    return {
        "as fitted": data.text,
        "turned": data.text.flip(0),
        "two": data.text[1:3],
        "one foreign": torch.cat([data.text, foreign[:1]]),
        "foreign": foreign[:3],
        "many": torch.cat([foreign, data.text]),
        "twice": torch.cat([data.text.flip(0), data.text, data.text]),
    }


def test_the_check_says_nothing_of_its_own_random_rows() -> None:
    predictor = MCM().fit(toy_embeddings())
    predictor.similarity_ = (0.3, 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference_scores(predictor, next(trial_inputs(predictor, ((9, 5),))))


@pytest.mark.parametrize("name", few(PREDICTORS, 1))
@pytest.mark.filterwarnings("ignore:.*was fitted on other candidates")
def test_onnxruntime_says_what_the_predictor_says(
    name: str, tmp_path: Path, test: Embeddings
) -> None:
    predictor: FailurePredictor = PREDICTORS[name].fit(
        toy_pairs() if "captions" in name else without_words(toy_embeddings())
    )
    fingerprint = predictor.save(tmp_path / "p")
    assert export_onnx(tmp_path / "p", tmp_path / "head.onnx") <= 1e-5
    for kind, text in candidates(test).items():
        columns = {"features": test.column("features", torch.arange(len(test)))}
        data = Embeddings(test.image, text, space=predictor.space_, columns=columns)
        expected, judged = (
            predictor.predict_uncertainty(data),
            vilu.score(predictor, data).prediction,
        )
        for n in (1, len(test)):
            uncertainty, prediction = answers(tmp_path / "head.onnx", data, n)
            assert uncertainty.dtype == np.float64
            assert np.abs(uncertainty - expected[:n]).max() <= 1e-5, kind
            assert np.array_equal(prediction, judged[:n]), kind
        if kind == "twice":
            assert prediction.max() < len(test.text)
    session = onnxruntime.InferenceSession((tmp_path / "head.onnx").read_bytes())
    found = session.get_modelmeta().custom_metadata_map
    assert found["vilu.fingerprint"] == fingerprint
    assert found["vilu.embeddings.space"] == predictor.space_.fingerprint
    assert (found["vilu.method"], found["vilu.logit_scale"]) == (predictor.name, "20.0")
    assert found["vilu.answer"] == predictor.answer
    assert found["vilu.version"] == vilu.__version__


@pytest.mark.slow
@pytest.mark.parametrize("examples", few([False, True], 1), ids=["words", "examples"])
@pytest.mark.filterwarnings("ignore")
def test_the_outcome_outside_is_part_of_the_graph(
    examples: bool, tmp_path: Path, test: Embeddings
) -> None:
    """The outcome is learned from everyday words, or from out-of-distribution images.

    The graph must agree with any number of words.
    """
    data = toy_embeddings()
    if examples:
        data = variant(data, target=data.target.clone().index_fill(0, torch.arange(0, 600, 6), -2))
    predictor = ViLUPlus(**PLUS).fit(data)
    assert predictor.outcome
    predictor.save(tmp_path / "p")
    allowed = max(export_onnx(tmp_path / "p", tmp_path / "head.onnx"), 1e-5)
    session = onnxruntime.InferenceSession((tmp_path / "head.onnx").read_bytes())
    features, words = (test.column(name, torch.arange(len(test))) for name in WORDS_TOO)
    without = ViLUPlus(**PLUS).fit(without_words(toy_embeddings()))
    for text in candidates(test).values():
        for n_words in (2, 6, 10, len(words)):  # a quarter of 6 or 10 rounds to even
            columns = {"features": features, "negatives": words[:n_words]}
            new = Embeddings(test.image, text, space=predictor.space_, columns=columns)
            expected = predictor.predict_uncertainty(new)
            every = {"image": new.image, "text": new.text, **columns}
            feed = {entry.name: every[entry.name].numpy() for entry in session.get_inputs()}
            uncertainty, _ = session.run(["uncertainty", "prediction"], feed)
            assert np.abs(uncertainty - expected).max() <= allowed
    known = Embeddings(
        test.image, test.text, space=predictor.space_, columns={"features": features}
    )
    seen = predictor.predict_uncertainty(test) - without.predict_uncertainty(known)
    assert np.abs(seen).max() > 0.01  # the outcome changes scores


WORDS_TOO = ("features", "negatives")


def test_equal_texts_have_the_place_of_the_first() -> None:
    text = torch.eye(6)[[4, 1, 4, 0, 1, 4, 2]]
    batch = GraphBatch(text, text, torch.zeros(7), torch.arange(7), 1.0)
    assert batch.first_equal_index.tolist() == [0, 1, 0, 3, 1, 0, 6]
    assert batch.prediction.tolist() == [0, 1, 0, 3, 1, 0, 6]


def test_large_logits_are_rounded_once(tmp_path: Path) -> None:
    """A logit just below 100 must be off by at most half a float32 ulp, 4e-6."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(200, 512)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text[:64] + rng.normal(size=(64, 512)).astype(np.float32) / 100
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    data = Embeddings(image, text, target=np.arange(64), logit_scale=100.0)
    MaxLogit().fit(data).save(tmp_path / "p")
    export_onnx(tmp_path / "p", tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession((tmp_path / "head.onnx").read_bytes())
    found, _ = session.run(None, {"image": data.image.numpy(), "text": data.text.numpy()})
    exact = -100 * (data.image.double() @ data.text.double().T).amax(dim=1).numpy()
    assert exact.max() < -90
    assert np.abs(found - exact).max() <= np.spacing(np.float32(100)) / 2


@pytest.mark.parametrize("method", EXPORTABLE, ids=lambda cls: cls.name)
def test_every_graph_has_the_formula_of_its_method(
    method: type[FailurePredictor], test: Embeddings
) -> None:
    settings = (
        HEAD | PLUS | {"members": 2, "attention": None, "typicality": "residual", "largest": 3}
    )
    chosen = {key: settings[key] for key in parameters(method) if key in settings}
    predictor = method(**chosen).fit(without_words(toy_embeddings()))
    columns = [test.column(name, torch.arange(len(test))) for name in predictor.columns_to_score]
    for text in candidates(test).values():
        data = Embeddings(
            test.image,
            text,
            space=predictor.space_,
            columns={"features": columns[0]} if columns else {},
        )
        with torch.no_grad():
            found, _ = onnx.score_graph(predictor)(test.image, data.text, *columns)
        expected = predictor.predict_uncertainty(data)
        assert np.abs(found.numpy() - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("shift", few([2e-5, float("nan")], 1))
def test_a_graph_that_says_something_else_is_not_written(
    shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = MCM().fit(toy_embeddings(20))
    predictor.save(tmp_path / "p")
    monkeypatch.setattr(MCM, "graph", lambda p: Graph(lambda batch: p._score(batch) + shift))
    with pytest.raises(DataError, match="rounding explains 1e-05"):
        export_onnx(tmp_path / "p", tmp_path / "head.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


@pytest.mark.parametrize("predictor", [KNNVote(), MCDropout(passes=2, **HEAD)])
def test_what_cannot_be_exported_is_told(predictor: FailurePredictor, tmp_path: Path) -> None:
    predictor.fit(toy_embeddings()).save(tmp_path / "p")
    with pytest.raises(
        UsageError, match=rf"{predictor.name} cannot be exported.*These can: .*vilu, .*vilu_plus"
    ):
        export_onnx(tmp_path / "p", tmp_path / "head.onnx")
    MCM().save(tmp_path / "q")
    with pytest.raises(UsageError, match="knows no embedding space"):
        export_onnx(tmp_path / "q", tmp_path / "head.onnx")
    assert not (tmp_path / "head.onnx").exists()
