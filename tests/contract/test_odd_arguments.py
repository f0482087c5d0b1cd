"""Test that public names, with any argument, give a result or a sentence (a ``ViLUError``)."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vilu
from tests.builders.store_fakes import FakeBackbone
from tests.conftest import toy_embeddings, toy_pairs
from vilu.errors import DataError, UsageError, ViLUError
from vilu.predictors.contract.parameters import check_parameters, parameters
from vilu.predictors.persistence.vocabulary import Vocabulary

Call = tuple[Callable[..., object], dict[str, Any]]
STEP = 3
"""Each argument gets every third odd value. Neighbouring arguments get different values."""


def calls_of(folder: Path) -> dict[str, Call]:
    """Return every public function and constructor, with valid arguments."""
    train, test = toy_embeddings(n=120, k=3), toy_embeddings(n=120, k=3, seed=1, ids_from=5000)
    mcm, rows = vilu.MCM().fit(train), np.asarray(test.image)[:20]
    outcomes, pairs = vilu.score(mcm, test), toy_pairs(n=64)
    certain = vilu.Outcomes(np.linspace(0, 1, 300), np.zeros(300, dtype=int))
    selector, table = vilu.certify(certain, max_risk=0.05), vilu.evaluate(outcomes, n_resamples=0)
    mcm.save(folder / "p")
    model = FakeBackbone()
    seen = vilu.Embeddings(train.image, train.text, space=model.space, class_names=list("abc"))
    vilu.MCM().fit(seen).save(folder / "g")
    Vocabulary.of(seen, "float16").save(folder / "g")
    guard: dict[str, Any] = {
        "predictor": folder / "g",
        "device": "cpu",
        "batch_size": 4,
        "workers": 1,
    }
    outcomes.save(folder / "s.parquet")
    table.save(folder / "r.json")
    names, numbers = [str(i) for i in range(20)], count()
    bootstrap: dict[str, Any] = {"n_resamples": 10, "confidence": 0.9, "seed": 0}
    metric: dict[str, Any] = {
        "metric": "auroc",
        "bins": 15,
        "binning": "width",
        "risk": 0.1,
        "coverage": 0.8,
    }
    metric |= {
        "convention": "mean",
        "level": 0.95,
        "positive": "correct",
        "rule": "interpolate",
        "failure": [0, 1, 0],
        "picture": [4, -1, 4],
    }
    scores = ("uncertainty", "uncertainty_a", "uncertainty_b", "probability")
    metric |= {name: [0.1, 0.3, 0.4] for name in scores} | bootstrap
    metrics = {name: getattr(vilu.metrics, name) for name in vilu.metrics.__all__}
    functions = {
        name: function for name, function in metrics.items() if inspect.isfunction(function)
    }

    def into_new_folder(**arguments: object) -> object:
        return vilu.score_parts(**{"folder": folder / f"new{next(numbers)}", **arguments})

    def calibrate_saved(**arguments: object) -> object:
        return vilu.calibrate_predictor(**{"folder": folder / "q", **arguments})

    def monitored(verb: str) -> Callable[..., object]:
        return getattr(vilu.Monitor(certain, selector), verb)

    columns: dict[str, Any] = {
        "uncertainty": [0.1, 0.2],
        "failure": [0, 1],
        "prediction": [0, 1],
        "target": [0, 0],
        "ids": ["a", "b"],
        "class_names": ["x", "y"],
        "method": "m",
        "dataset": "d",
        "split": "s",
        "seed": 0,
        "reason": None,
        "provenance": {},
        "is_probability": True,
        "failure_probability": [0.1, 0.2],
        "label_set": None,
        "decision": ["accept", "review"],
        "decision_reason": [None, "a"],
        "picture": [3, -1],
    }
    return {
        **{
            name: (f, {a: metric[a] for a in inspect.signature(f).parameters})
            for name, f in functions.items()
        },
        "Selective": (vilu.Selective, {"predictor": mcm, "answer": "zero_shot"}),
        "Selective.fit": (
            vilu.Selective(vilu.MCM()).fit,
            {"train": train, "validation": test},
        ),
        "split": (test.split, {"fit": 0.4, "calibration": 0.3, "test": 0.3, "seed": 0}),
        "Guard": (vilu.Guard, {**guard, "backbone": model, "vectors_only": False}),
        "fit": (mcm.fit, {"train": train, "validation": test}),
        "fit with labels": (
            vilu.PREDICTORS["knn_vote"]().fit,
            {"train": train, "validation": test},
        ),
        "predict_uncertainty": (mcm.predict_uncertainty, {"data": test}),
        "predict_failure_probability": (mcm.predict_failure_probability, {"data": test}),
        "failure_probability": (mcm.failure_probability, {"uncertainty": [0.1]}),
        "FailurePredictor.calibrate_probability": (
            mcm.calibrate_probability,
            {"calibration": test},
        ),
        "calibrate_scores": (mcm.calibrate_scores, {"uncertainty": [0.1, 0.3], "failure": [0, 1]}),
        "save": (mcm.save, {"folder": folder / "q"}),
        "open_table": (
            vilu.open_table,
            {"source": {"id": ["a", "b"], "score": [0.1, 0.2]}, "name": "t"},
        ),
        "Embeddings": (
            vilu.Embeddings,
            {
                "image": rows,
                "text": test.text,
                "target": [0] * 20,
                "logit_scale": 20.0,
                "logit_bias": 0.0,
                "class_names": ["a", "b", "c"],
                "ids": names,
                "space": test.space,
                "columns": {},
            },
        ),
        "PairEmbeddings": (
            vilu.PairEmbeddings,
            {
                "image": rows,
                "text": rows,
                "pool_size": 10,
                "logit_scale": 20.0,
                "logit_bias": 0.0,
                "ids": names,
                "space": test.space,
                "columns": {},
            },
        ),
        "Pools": (
            vilu.Pools,
            {"size": 10, "direction": "image_to_text", "hard": False, "near_duplicates": 0.9},
        ),
        "PseudoCaptions": (
            vilu.PseudoCaptions,
            {"sources": [train, pairs], "pools": 10, "names": ["a", "b"]},
        ),
        "TwoModels": (vilu.TwoModels, {"first": test, "second": test}),
        "EmbeddingSpace": (
            vilu.EmbeddingSpace,
            {"embed_dim": 4, "logit_scale": 1.0, "weights": "a"},
        ),
        "take rows": (test.take, {"rows": np.arange(3)}),
        "take": (
            test.take,
            {"rows": torch.arange(3), "classes": torch.arange(2), "columns": ["views"]},
        ),
        "score": (
            vilu.score,
            {"predictor": mcm, "data": test, "dataset": "a", "split": "b", "calibration": None},
        ),
        "score_parts": (
            into_new_folder,
            {
                "predictor": mcm,
                "source": test,
                "rows_per_part": 100,
                "dataset": "a",
                "split": "b",
                "overwrite": False,
                "calibration": None,
            },
        ),
        "certify_clusters": (
            vilu.certify_clusters,
            {
                "outcomes": certain,
                "clusters": [str(row // 2) for row in range(len(certain.uncertainty))],
                "risk": "majority",
                "max_risk": 0.05,
                "confidence": 0.95,
                "largest": None,
            },
        ),
        "estimate": (
            vilu.estimate,
            {"outcomes": certain, "confidence": 0.95, "of_classes": False},
        ),
        "certify": (
            vilu.certify,
            {
                "outcomes": certain,
                "max_risk": 0.05,
                "confidence": 0.95,
                "min_coverage": 0.1,
                "method": "ltt",
                "groups": None,
            },
        ),
        "calibrate_predictor": (
            calibrate_saved,
            {
                "data": test,
                "target": vilu.Target(max_risk=0.9),
                "dataset": "a",
                "split": "b",
                "overwrite": True,
            },
        ),
        "Target": (
            vilu.Target,
            {"max_risk": 0.05, "confidence": 0.9, "method": "ltt", "per_class": False},
        ),
        "Rule.accept": (selector.accept, {"uncertainty": [0.1], "groups": None}),
        "Rule.reasons": (selector.reasons, {"uncertainty": [0.1], "groups": None}),
        "Monitor": (
            vilu.Monitor,
            {
                "calibration": certain,
                "rule": selector,
                "groups": None,
                "false_alarm": 0.05,
                "seed": 0,
            },
        ),
        "Monitor.update": (
            monitored("update"),
            {"outcomes": certain, "groups": None, "in_order": True},
        ),
        "Monitor.audit": (monitored("audit"), {"outcomes": certain, "groups": None}),
        "Monitor.save": (monitored("save"), {"path": folder / "state.parquet"}),
        "evaluate": (vilu.evaluate, {"outcomes": outcomes, "metrics": ["auroc"], **bootstrap}),
        "compare": (vilu.compare, {"a": outcomes, "b": outcomes, "metric": "auroc", **bootstrap}),
        "Outcomes": (vilu.Outcomes, columns),
        "Outcomes.save": (outcomes.save, {"path": folder / "t.parquet"}),
        "Outcomes.load": (vilu.Outcomes.load, {"path": folder / "s.parquet"}),
        "ResultTable.filter": (table.filter, {"metric": "auroc", "method": "mcm"}),
        "ResultTable.value": (table.value, {"metric": "auroc"}),
        "ResultTable.table": (table.table, {"metrics": ["auroc"]}),
        "ResultTable.to_markdown": (table.to_markdown, {"metrics": ["auroc"]}),
        "ResultTable.save": (table.save, {"path": folder / "u.json"}),
        "ResultTable.load": (vilu.ResultTable.load, {"path": folder / "r.json"}),
        "load": (vilu.load, {"folder": folder / "p"}),
        "explain": (
            vilu.explain,
            {"predictor": mcm, "data": test, "train": train, "rows": [0], "n": 2},
        ),
        "prompt_gains": (vilu.prompt_gains, {"data": test, "folds": 3, "seed": 0}),
        "risk_map": (vilu.risk_map, {"outcomes": outcomes, "competitor": None, "coverage": 0.8}),
        "report_page": (
            vilu.report_page,
            {
                "outcomes": [outcomes],
                "main": None,
                "calibrated": None,
                "max_risk": 0.05,
                "images": None,
                "embeddings": None,
                "title": "x",
            },
        ),
    }


def refusing(folder: Path) -> dict[str, Call]:
    """Return the functions that need missing files, so they refuse any argument."""
    nowhere = folder / "nowhere"
    return {
        "ScoreFolder": (vilu.ScoreFolder, {"path": nowhere}),
        "Monitor.of_folder": (
            vilu.Monitor.of_folder,
            {"folder": nowhere, "false_alarm": 0.05, "seed": 0},
        ),
        "open_source": (
            vilu.open_source,
            {"path": nowhere, "pools": None, "fold": None, "logit_scale": 1.0},
        ),
        "EmbeddingStore": (vilu.EmbeddingStore, {"path": nowhere}),
        "open_dataset": (
            vilu.open_dataset,
            {"source": nowhere, "split": None, "limit": None, "captions": False},
        ),
        "load_backbone": (
            vilu.load_backbone,
            {"spec": "none:such", "device": "cpu", "precision": "fp32"},
        ),
        "convert_official": (
            vilu.convert_official,
            {"path": nowhere, "logit_scale": 1.0, "embed_dim": 16},
        ),
        "register": (vilu.register, {"thing": 5}),
        "import_arrays": (vilu.import_arrays, {"source": nowhere, "output": nowhere}),
        "ExtraColumns": (vilu.ExtraColumns, {"views": 0, "prompts": (), "negatives": ("sea",)}),
        "embed": (
            vilu.embed,
            {"dataset": None, "backbone": None, "output": nowhere, "batch_size": 1},
        ),
    }


@pytest.fixture(scope="module")
def odd_values() -> list[object]:
    test = toy_embeddings(n=60, k=3, seed=2)
    numbers = [
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        2**70,
        np.float64(0.5),
        np.int64(3),
    ]
    texts: list[object] = ["", "0.05", b"x", Path("nowhere/at/all")]
    lists: list[object] = [[], [1], ["a", "b"], {}, {"a": 1}, (), [[1], [2, 3]]]
    arrays = [
        np.zeros(3),
        np.zeros((2, 2)),
        np.zeros((20, 16)),
        np.array(["a"]),
        np.array([None]),
        np.zeros((3, 16), complex),
    ]
    tensors: list[object] = [
        torch.zeros(2),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2).to_sparse(),
    ]
    ours: list[object] = [
        vilu.MCM,
        vilu.MCM(),
        test,
        toy_pairs(n=64),
        vilu.score(vilu.MCM(), test),
        len,
        object(),
    ]
    return [*numbers, *texts, *lists, *arrays, *tensors, *ours]


@pytest.fixture
def in_time() -> Iterator[None]:
    """Raise an error if a test takes more than five minutes, so that nothing hangs."""

    def stop(*_: object) -> None:
        raise TimeoutError("this call does not come back")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
@pytest.mark.filterwarnings("ignore")
def test_nothing_but_a_sentence_comes_back(
    odd_values: list[object], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = calls_of(tmp_path)
    for name, (function, valid) in calls.items():
        try:
            function(**valid)
        except ViLUError as error:
            pytest.fail(f"{name} refuses good arguments: {error}")
    calls |= refusing(tmp_path)
    errors = dict(outcomes(calls, odd_values))
    tracebacks = [
        f"{key}: {error!r:.120}"
        for key, error in errors.items()
        if not isinstance(error, ViLUError | None)
    ]
    assert not tracebacks, "\n".join(tracebacks)
    assert min(len(str(error)) for error in errors.values() if error) > 20
    assert len(errors) > 1_500
    assert not set(vilu.__all__) - {name.split(".")[0] for name in calls} - NOT_CALLED


def outcomes(
    calls: dict[str, Call], odd_values: list[object]
) -> Iterator[tuple[str, Exception | None]]:
    """Yield what each function raises if one argument is odd."""
    for name, (function, valid) in calls.items():
        for place, argument in enumerate(valid):
            for number in range(place % STEP, len(odd_values), STEP):
                odd, key = odd_values[number], f"{name}, {argument}, {number}"
                if argument == "metric" and callable(odd):
                    continue  # a metric may be the function that a caller wrote
                try:
                    function(**{**valid, argument: odd})
                except Exception as error:  # noqa: BLE001 - just that is looked for
                    yield key, error
                else:
                    yield key, None


NOT_CALLED = {
    "AnswerTable",  # made by open_table
    "Estimate",  # made by estimate
    "methods",
    "tune_process",  # changes a whole process, see tests/test_process.py
    *(
        "__version__",
        "metrics",
        "OUTSIDE",
        "PREDICTORS",
        "FailurePredictor",
        "EmbeddingSource",
    ),  # not callable, or abstract
    *(
        "LVU",
        "MCM",
        "Doctor",
        "Entropy",
        "Margin",
        "MaxLogit",
        "ViLU",
        "ViLUPlus",
    ),  # parameters, see the test below
    *("Batch", "Answer"),  # made once per batch or per image, from checked values
    # Documents are made by ``certify`` or read from files. For wrong fields, pydantic's
    # ValidationError names the field.
    *("Calibration", "Rule"),
}


def test_parameters_of_every_method(odd_values: list[object]) -> None:
    refused = named = 0
    for cls in vilu.PREDICTORS.values():
        for name, field in parameters(cls).items():
            if name == "device":
                continue
            check_parameters(cls(**{name: field.default}))
            for odd in odd_values:
                try:
                    check_parameters(cls(**{name: odd}))
                except UsageError as error:
                    named += f"the {name!r} parameter of {cls.name}" in str(error)
                    refused += 1
                    continue
                assert odd is None or isinstance(
                    odd, int | float | str | list | tuple | np.number
                ), (
                    cls.name,
                    name,
                    odd,
                )
                assert not isinstance(odd, bool) or isinstance(field.default, bool)
                assert isinstance(odd, str) <= isinstance(field.default, str)
                assert name != "seed" or 0 <= odd < 2**63
    assert named == refused > 1_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: vilu.MCM().predict_uncertainty(np.zeros((2, 3))),
            r"give vilu\.Embeddings\(image, text, logit_scale=",
        ),
        (
            lambda: vilu.MCM().fit(np.zeros((4, 2)), [0, 1, 0, 1]),
            r"train must be .* Got a ndarray of shape \(4, 2\) ins",
        ),
        (
            lambda: vilu.MCM().fit("store"),
            r"vilu\.open_source\(path\) of a store\) or answers \(.*\)\. Got 'store' instead",
        ),
        (
            lambda: vilu.evaluate(np.zeros(3)),
            r"evaluate takes vilu\.Outcomes, .* Got a ndarray of shape \(3,\)",
        ),
        (
            lambda: vilu.score(toy_embeddings(), vilu.MCM()),
            "Got an Embeddings instead. data is one: are they swapped",
        ),
        (lambda: vilu.score(vilu.MCM, toy_embeddings()), "Got the class MCM instead"),
        (
            lambda: vilu.certify(vilu.Outcomes([0.1], [0]), max_risk="0.05"),
            "max_risk must be a number or None. Got '0.05'",
        ),
        (
            lambda: vilu.ViLU(seed=2**70).fit(toy_embeddings()),
            "'seed' parameter of vilu must be less than or equal to",
        ),
        (
            lambda: vilu.ViLU(seed=-1).fit(toy_embeddings()),
            "'seed' parameter of vilu must be greater than or equal to 0",
        ),
        (
            lambda: vilu.ViLU(epochs="3").fit(toy_embeddings()),
            "'epochs' parameter of vilu must be a valid integer",
        ),
        (
            lambda: vilu.ViLU(epochs=True).fit(toy_embeddings()),
            "'epochs' parameter of vilu must be a valid integer",
        ),
        (
            lambda: vilu.evaluate(vilu.Outcomes([0.1], [0]), seed=-1),
            r"seed must be from 0 to 2\^63 - 1\. Got -1",
        ),
    ],
)
def test_what_the_sentence_says(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_a_wrong_number_of_arguments_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'data'"):
        vilu.score(vilu.MCM())  # type: ignore[call-arg]


@pytest.mark.parametrize("number", [np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(number: Callable[[int], Any], tmp_path: Path) -> None:
    """numpy numbers, as from a loop over an array, must count as Python numbers.

    A pool with np.int64(16) once had one candidate, because the pool size was read from ``.size``.
    """
    image, scores = (
        toy_pairs(n=64).image,
        vilu.Outcomes(np.linspace(0, 1, 100), np.arange(100) % 2, seed=number(3)),
    )
    assert vilu.Embeddings.pairs(image, image, pool_size=number(16)).n_candidates == 16
    assert vilu.PseudoCaptions([toy_pairs(n=64)], number(16)).pool_size == 16
    # A model may hold the scale as a parameter.
    space = vilu.EmbeddingSpace(number(4), torch.nn.Parameter(torch.tensor(8.0)))
    assert space.fingerprint == vilu.EmbeddingSpace(4, 8.0).fingerprint
    rule = vilu.certify(scores, max_risk=np.array(0.7))
    assert rule.max_risk == 0.7
    monitor = vilu.Monitor(scores, rule, false_alarm=np.float32(0.05), seed=number(3))
    monitor.save(tmp_path / "state.parquet")
    table = vilu.evaluate(
        replace(scores, is_probability=np.bool_(True)), metrics=["brier"], n_resamples=number(0)
    )
    assert table.filter(seed=number(3)).value("brier", n=number(100)) == pytest.approx(
        1 / 3, abs=0.01
    )


def test_what_is_masked_is_not_taken_for_a_number() -> None:
    masked, bare = np.ma.array(np.eye(2), mask=np.eye(2) == 1), np.ma.array(np.eye(2))
    assert len(vilu.Embeddings(bare, bare, target=bare[0].astype(int))) == len(
        vilu.Outcomes(bare[0], bare[0])
    )
    for call in (vilu.metrics.auroc, vilu.Outcomes, vilu.Embeddings):
        for arguments in ((masked, bare), (bare, masked)):
            odd = [one if call is vilu.Embeddings else one[0] for one in arguments]
            with pytest.raises(DataError, match="numbers that are masked"):
                call(*odd)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vilu.score(1, 2), UsageError, r"^score: predictor must be .* Got 1 instead"),
        (lambda: vilu.MCM().fit("x"), UsageError, r"^MCM\.fit: train must be .* Got 'x'"),
        (
            lambda: vilu.Embeddings(np.eye(2), np.eye(2), logit_scale="100"),
            UsageError,
            r"^Embeddings: logit_scale must be a number. Got '100'",
        ),
        (lambda: vilu.Outcomes.load(3), UsageError, r"^Outcomes\.load: path must be .* Got 3"),
        (lambda: vilu.Outcomes.concat(3), UsageError, r"^Outcomes\.concat: parts must be a list"),
        (lambda: vilu.Embeddings(1, 2, 3), TypeError, "^Embeddings: too many positional"),
        (vilu.score, TypeError, "^score: missing a required argument: 'predictor'"),
        (
            lambda: vilu.Embeddings(np.eye(2), np.eye(2), targets=[0, 1]),
            TypeError,
            "^Embeddings: got an unexpected keyword argument 'targets'",
        ),
    ],
)
def test_errors_name_the_function_and_the_argument(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
