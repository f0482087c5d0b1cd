"""Test a ten-line score and a thirty-line learned method from outside.

Once registered, they must do all that vilu's own methods do.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import vilu
from tests.builders.bench_fakes import benchmark, config, make_stores
from tests.conftest import few
from tests.contract import test_predictors as contract
from vilu import registry
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.rows import Rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.errors import DataError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor, Learnt, own_graph
from vilu.predictors.persistence.onnx import export_onnx
from vilu.report.page.build import report_page

SOURCE = '''
"""Methods of a stranger."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import pad

import vilu
from vilu.predictors.contract.predictor import Learnt, own_graph


@vilu.register
@dataclass
class Narrow(vilu.FailurePredictor):
    """u = the mean logit less the largest."""

    name: ClassVar[str] = "narrow"
    summary: ClassVar[str] = "mean logit less the largest"
    reference: ClassVar[str] = "a stranger, 2026"
    looks_at: ClassVar[frozenset[str]] = frozenset({"logits"})
    graph = own_graph

    def _score(self, batch):
        return batch.logits.mean(dim=-1) - batch.logits.amax(dim=-1)


@vilu.register
@dataclass
class Ridge(vilu.FailurePredictor):
    """Ridge regression of the failure on the image."""

    name: ClassVar[str] = "ridge"
    summary: ClassVar[str] = "ridge regression of the failure on the image"
    reference: ClassVar[str] = "a stranger, 2026"
    learns_failure: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"image"})
    tensors: ClassVar[tuple[str, ...]] = ("weight",)
    graph = own_graph

    penalty: Annotated[float, Field(gt=0)] = 1.0
    allow_degenerate: bool = False

    def _learn(self, train, failure, validation):
        x = torch.cat([with_one(batch.image) for batch in train.batches(4096)])
        moment = x.T @ x + self.penalty * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(moment, x.T @ failure.double())
        return Learnt({"weight": weight}, {"length": float(weight.norm())})

    def _score(self, batch):
        return with_one(batch.image) @ self.tensor("weight", batch.image.device)


def with_one(image):
    return pad(image.double(), (0, 1), value=1.0)
'''

CHECKS = [
    contract.test_catalogue_key_is_the_name,
    contract.test_constructor_only_stores_its_parameters,
    contract.test_unfitted_is_refused_where_a_fit_is_needed,
    contract.test_scores_are_float64_of_one_sign,
    contract.test_a_fit,
    contract.test_rows_are_scored_one_by_one,
    contract.test_order_of_the_classes_does_not_matter,
    contract.test_saved_and_loaded_scores_are_equal_bit_for_bit,
    contract.test_foreign_space_is_refused,
    contract.test_unusable_rows_get_nan_and_change_no_other,
    contract.test_one_candidate_has_no_uncertainty,
    contract.test_half_precision_input,
    contract.test_in_batch_candidates,
    contract.test_probability_of_failure,
]
OF_LEARNED = [
    contract.test_one_failure_is_enough_to_fit,
    contract.test_constant_survives_saving,
    contract.test_bad_training_sets,
    contract.test_a_few_bad_or_unlabelled_rows_are_left_out_aloud,
    contract.test_overlap_of_training_and_validation_is_refused,
    contract.test_damaged_files_are_refused,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the other author's module."""
    found = tmp_path_factory.mktemp("outside")
    (found / "stranger.py").write_text(SOURCE)
    return found


@pytest.fixture
def stranger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module as ``--plugin stranger`` imports it. Remove it afterwards."""
    monkeypatch.syspath_prepend(folder)
    registry.load_plugin("stranger")
    assert "stranger" in registry.plugins()
    yield sys.modules["stranger"]
    for name in ("narrow", "ridge"):
        del vilu.PREDICTORS[name]
    del sys.modules["stranger"]
    registry.IMPORTED_PLUGINS.remove("stranger")


@pytest.fixture
def fitted(stranger: ModuleType, train: Embeddings) -> dict[str, FailurePredictor]:
    return {"narrow": stranger.Narrow().fit(train), "ridge": stranger.Ridge().fit(train)}


def elsewhere(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path]),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=found
    )


CASES = [
    *(("narrow", check) for check in CHECKS),
    *(("ridge", check) for check in CHECKS + OF_LEARNED),
]


@pytest.mark.parametrize(
    ("name", "check"), CASES, ids=[f"{name}-{check.__name__}" for name, check in CASES]
)
def test_the_contract_holds(name, check, stranger, fitted, train, test, tmp_path) -> None:
    given = {
        "name": name,
        "learned": name,
        "labelled": name,
        "fitted": fitted,
        "train": train,
        "test": test,
    }
    given["tmp_path"] = tmp_path
    code = check.__code__
    check(**{key: given[key] for key in code.co_varnames[: code.co_argcount]})


@pytest.mark.parametrize("wrong", [True, False])
def test_nothing_to_learn(stranger, train, test, wrong: bool) -> None:
    contract.test_nothing_to_learn("ridge", train, test, wrong)


def test_they_are_scored_and_evaluated(fitted, test) -> None:
    for predictor in fitted.values():
        outcomes = vilu.score(predictor, test)
        assert np.array_equal(outcomes.uncertainty, predictor.predict_uncertainty(test))
        assert vilu.evaluate(outcomes, n_resamples=10).rows


def test_they_are_explained(fitted, test) -> None:
    for name, player in (("narrow", "zero-shot score"), ("ridge", "image")):
        for row in vilu.explain(fitted[name], test, n=3):
            attribution = row.attribution
            assert attribution.parts.keys() == {player}
            assert attribution.score == row.uncertainty
            assert attribution.parts[player] == pytest.approx(
                attribution.score - attribution.baseline
            )


@pytest.mark.slow
def test_they_are_exported(fitted, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for name, predictor in fitted.items():
        predictor.save(tmp_path / name)
        assert export_onnx(tmp_path / name, tmp_path / f"{name}.onnx") < 1e-4


def test_a_subclass_does_not_inherit_a_graph_or_a_game(
    stranger, train, test, tmp_path: Path
) -> None:
    @vilu.register
    @dataclasses.dataclass
    class Blurred(stranger.Narrow):
        """Another score, which looks at other inputs."""

        name = "blurred"

        def _score(self, batch):
            return super()._score(batch) + batch.image[:, 0]

    try:
        predictor = Blurred().fit(train)
        predictor.save(tmp_path / "p")
        with pytest.raises(UsageError, match=r"blurred cannot be exported.*These can: .*narrow"):
            export_onnx(tmp_path / "p", tmp_path / "p.onnx")
        assert vilu.explain(predictor, test, n=1).rows[0].attribution is None
    finally:
        del vilu.PREDICTORS["blurred"]


def test_they_are_members_of_a_stack(stranger, train, test, tmp_path: Path) -> None:
    stack = vilu.PREDICTORS["stacking"](members=("mcm", "narrow", "ridge")).fit(train)
    assert stack.notes_["coefficients"].keys() == {"mcm", "narrow", "ridge"}
    stack.save(tmp_path)
    assert np.array_equal(
        vilu.load(tmp_path).predict_uncertainty(test), stack.predict_uncertainty(test)
    )
    assert "stranger" in stack.modules


@pytest.mark.slow
def test_they_are_benchmarked_and_reported(fitted, test, tmp_path: Path) -> None:
    chosen = config(
        methods={"mcm": {}, "narrow": {}, "ridge": {}},
        settings={"all": {"kind": "labels"}},
        seeds=1,
    )
    # The benchmark also runs in other processes.
    found = benchmark(chosen, make_stores(tmp_path / "stores"), tmp_path / "out", jobs=2)
    for name in fitted:
        cell = Outcomes.load(tmp_path / f"out/cells/one/all/{name}/seed-0.parquet")
        (ranked,) = [line for line in found.summary.blocks[0].lines if line.method == name]
        assert ranked.values["auroc"] == vilu.metrics.auroc(cell.uncertainty, cell.failure)
        assert name in found.text
    page = report_page([vilu.score(predictor, test) for predictor in fitted.values()])
    assert all(f">{name}<" in page for name in fitted)


@pytest.mark.slow
def test_saved_ones_load_in_another_process_that_has_the_plugin(
    folder, fitted, test, tmp_path: Path
) -> None:
    fitted["ridge"].save(tmp_path / "ridge")
    np.savez(tmp_path / "test.npz", image=test.image.numpy(), text=test.text.numpy())
    record = json.loads((tmp_path / "ridge/predictor.json").read_text())
    assert record["home"] == {"distribution": None, "module": "stranger"}
    code = (
        "import numpy, vilu; rows = numpy.load('test.npz');"
        "data = vilu.Embeddings(rows['image'], rows['text'], target=None, logit_scale=20.0);"
        "print(vilu.load('ridge').predict_uncertainty(data).tobytes().hex())"
    )
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    there = elsewhere(code, folder, VILU_PLUGINS="stranger")
    assert there.stdout.strip() == fitted["ridge"].predict_uncertainty(test).tobytes().hex(), (
        there.stderr
    )
    without = elsewhere(code, folder, VILU_PLUGINS="")
    assert without.returncode != 0
    assert (
        "the method 'ridge' of stranger, which is not here. Give --plugin stranger."
        in without.stderr
    )


def test_a_distribution_brings_them_by_entry_points(folder: Path, train, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "stranger_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "stranger.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-methods\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("stranger\n")
    (info / "entry_points.txt").write_text(
        "[vilu.predictors]\nridge = stranger:Ridge\nbroken = nowhere:Else\n"
    )
    code = (
        "import sys, json; from vilu.predictors.contract.catalogue import find_method, "
        "method_names;"
        "from vilu.errors import UsageError; from vilu.predictors.persistence.description import "
        "home_of\n"
        "assert {'ridge', 'broken'} <= set(method_names()) and 'stranger' not in sys.modules\n"
        "print(json.dumps(home_of(find_method('ridge'))))\n"
        "try: find_method('broken')\n"
        "except UsageError as error: print(error)"
    )
    found = elsewhere(code, site, VILU_PLUGINS="")
    lines = found.stdout.splitlines()
    assert json.loads(lines[0]) == {
        "home": {"distribution": "stranger-methods", "module": "stranger"}
    }, found.stderr
    assert "the method 'broken' of stranger-methods (nowhere:Else) cannot be imported" in lines[1]


def test_what_cannot_be_registered_is_told(stranger) -> None:
    named = {
        "name": "new",
        "summary": "a score",
        "reference": "nobody",
        "_score": lambda self, batch: batch.index,
    }
    whole = dataclasses.dataclass(type("Whole", (FailurePredictor,), named))
    assert vilu.register(whole) is whole
    assert vilu.register(whole) is whole  # a module may be imported twice
    del vilu.PREDICTORS["new"]
    for made, reason in [
        ("mcm", "Got 'mcm' instead"),
        (type("Odd", (FailurePredictor,), named), "must be a dataclass"),
        (
            dataclasses.dataclass(type("Odd", (FailurePredictor,), {**named, "name": "mcm"})),
            "a method 'mcm' already",
        ),
        (
            dataclasses.dataclass(type("Odd", (FailurePredictor,), {**named, "summary": ""})),
            "has no summary",
        ),
        (
            dataclasses.dataclass(type("Odd", (FailurePredictor,), {"name": "x"})),
            "has no summary and no reference",
        ),
        (
            dataclasses.make_dataclass(
                "Odd", [("k", int)], bases=(FailurePredictor,), namespace=named
            ),
            "default for k",
        ),
    ]:
        with pytest.raises(UsageError, match=reason):
            vilu.register(made)
    assert "new" not in vilu.PREDICTORS
    with pytest.raises(UsageError, match="the plugin 'nowhere_at_all' cannot be imported"):
        registry.load_plugin("nowhere_at_all")
    for odd in ("", ".relative"):
        with pytest.raises(
            UsageError, match=f"by its whole name, such as package.module. Got '{odd}' instead"
        ):
            registry.load_plugin(odd)


@dataclasses.dataclass
class Level(vilu.FailurePredictor):
    name, summary, reference = "level", "distance to what is the same for all", "nowhere"
    # Methods that learn from failures use the same name for their one number.
    tensors = ("constant",)

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        return Learnt({"constant": train.source.image_rows(train.index).mean(dim=0)})

    def _score(self, batch: Batch) -> Tensor:
        return (batch.image - self.learned_["constant"]).norm(dim=1)


def test_a_learned_tensor_may_have_any_name(train: Embeddings, test: Embeddings) -> None:
    fitted = Level().fit(train)
    other = Level()
    other.space_ = fitted.space_
    other.restore(fitted.state())
    assert (other.predict_uncertainty(test) == fitted.predict_uncertainty(test)).all()


def test_a_learned_tensor_that_is_not_declared_is_told(train: Embeddings) -> None:
    ridge = importlib.import_module("vilu_bench.methods.sirc").SIRC
    body = {
        "name": "odd",
        "summary": "s",
        "reference": "r",
        "tensors": ("other",),
        "graph": own_graph,
    }
    odd = dataclasses.dataclass(
        type("Odd", (ridge,), {**body, "tensor_names": FailurePredictor.tensor_names})
    )
    with pytest.raises(DataError, match=r"a odd holds other\. The file has shift, slope"):
        odd().fit(train)


def method(name: str, score: object, **body: object) -> type[FailurePredictor]:
    """Make a method of this module that is not registered."""
    named = {"name": name, "summary": "a score", "reference": "nobody", "_score": score, **body}
    return dataclasses.dataclass(
        type("Odd", (FailurePredictor,), {"__module__": __name__, **named})
    )


@pytest.mark.parametrize("name", few(["entropy", "answer_probe"], 1))
def test_a_name_of_vilu_is_taken_before_its_method_is_imported(name: str) -> None:
    code = (
        "import dataclasses, vilu\n"
        "@vilu.register\n"
        "@dataclasses.dataclass\n"
        "class Odd(vilu.FailurePredictor):\n"
        f"    name, summary, reference = {name!r}, 'a score', 'nobody'\n"
        "    def _score(self, batch): return batch.logits[:, 0]\n"
    )
    found = elsewhere(code, VILU_PLUGINS="")
    assert f"there is a method '{name}' already" in found.stderr
    assert "Rename __main__.Odd." in found.stderr


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (lambda _, batch: batch.logits.mean(), r"one number for each row.* Got the shape \(\)"),
        (lambda _, batch: batch.logits[:, :1], r"shape \(200,\). Got the shape \(200, 1\) instead"),
        (lambda _, batch: batch.logits[1:, 0], r"Got the shape \(199,\) instead"),
        (
            lambda _, batch: batch.logits[:, 0].numpy(),
            r"must return a tensor\. Got ndarray instead",
        ),
        (lambda _, batch: None, r"_score of odd must return a tensor\. Got NoneType instead"),
    ],
)
def test_a_score_of_another_shape_is_told(score, reason: str, test: Embeddings) -> None:
    few_rows = test.take(range(200))
    with pytest.raises(UsageError, match=reason):
        method("odd", score)().predict_uncertainty(few_rows)
    with pytest.raises(UsageError, match=reason):
        vilu.score(method("odd", score)(), few_rows)


def test_a_score_that_is_not_finite_is_blamed_on_its_cause(
    train: Embeddings, test: Embeddings
) -> None:
    def nan_score(_: object, batch: Batch) -> Tensor:
        return batch.logits[:, 0] * float("nan")

    def learn(*_: object) -> Learnt:
        return Learnt({"weight": torch.ones(1)})

    for odd in (
        method("odd", nan_score)(),
        method("odd", nan_score, tensors=("weight",), _learn=learn)().fit(train),
    ):
        with pytest.raises(DataError, match="not finite, although its weights are finite"):
            odd.predict_uncertainty(test)
    odd.learned_["weight"].fill_(torch.nan)
    with pytest.raises(DataError, match=r"its weights are damaged\. Fit it again"):
        odd.predict_uncertainty(test)


def test_a_predictor_read_by_another_method_of_its_name_warns(
    fitted: dict[str, FailurePredictor],
    train: Embeddings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fitted["narrow"].save(tmp_path / "narrow")
    vilu.load(tmp_path / "narrow")
    vilu.MCM().fit(train).save(tmp_path / "mcm")
    vilu.load(tmp_path / "mcm")
    assert not caplog.messages
    monkeypatch.setattr(type(fitted["narrow"]), "__module__", "other.methods")
    vilu.load(tmp_path / "narrow")
    (message,) = caplog.messages
    assert "is for the method 'narrow' of stranger, and is read by" in message
    assert "in other.methods: its scores may differ" in message


def test_a_method_of_a_script_is_to_be_moved_to_a_module(train: Embeddings, tmp_path: Path) -> None:
    odd = method("odd", lambda _, batch: batch.logits[:, 0], __module__="__main__")
    odd().fit(train).save(tmp_path)
    with pytest.raises(DataError) as caught:
        vilu.load(tmp_path)
    assert "move the class to a module, and give --plugin MODULE" in str(caught.value)
    assert "--plugin __main__" not in str(caught.value)


@pytest.mark.slow
def test_a_score_in_float32_is_exported(train: Embeddings, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def float32_score(self: FailurePredictor, batch: Batch) -> Tensor:
        return self.factor * (batch.image @ self.tensor("weight", batch.image.device))

    def learn(_: object, rows: Rows, *__: object) -> Learnt:
        return Learnt({"weight": rows.source.image_rows(rows.index).float().mean(dim=0)})

    odd = method(
        "odd",
        float32_score,
        tensors=("weight",),
        _learn=learn,
        graph=own_graph,
        __annotations__={"factor": float},
        factor=1.0,
    )
    vilu.register(odd)
    try:
        odd().fit(train).save(tmp_path / "p")
        assert export_onnx(tmp_path / "p", tmp_path / "p.onnx") < 1e-6
        odd(factor=1e4).fit(train).save(tmp_path / "large")
        with pytest.raises(DataError, match=r"_score does not compute in float64: .* dtype"):
            export_onnx(tmp_path / "large", tmp_path / "large.onnx")
    finally:
        del vilu.PREDICTORS["odd"]


@pytest.mark.slow
def test_a_score_that_branches_on_values_is_not_exported(train: Embeddings, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def branching_score(_: object, batch: Batch) -> Tensor:
        logits = batch.logits.amax(dim=1)
        return logits if logits.max() > 3 else -logits

    odd = vilu.register(method("odd", branching_score, graph=own_graph))
    try:
        odd().fit(train).save(tmp_path / "p")
        with pytest.raises(
            UsageError, match=r"odd cannot be written as ONNX.* branch on no values"
        ):
            export_onnx(tmp_path / "p", tmp_path / "p.onnx")
    finally:
        del vilu.PREDICTORS["odd"]
