"""A method from outside the repository, through the real command line."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import run_process
from vilu.outcomes.outcomes import Outcomes
from vilu.store.embed import embed
from vilu.store.reader import open_source

METHOD = """
from dataclasses import dataclass
from typing import ClassVar

from vilu.predictors.contract.predictor import FailurePredictor
from vilu.registry import register


@register
@dataclass
class Second(FailurePredictor):
    \"\"\"The probability of the second-best class.\"\"\"

    name: ClassVar[str] = "second"
    summary: ClassVar[str] = "probability of the runner-up"
    reference: ClassVar[str] = "nobody, never"

    def _score(self, batch):
        return batch.logits.softmax(dim=1).sort(dim=1).values[:, -2]
"""

WITH_MORE = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from vilu.predictors.contract.predictor import FailurePredictor, Learnt
from vilu.registry import register


@register
@dataclass
class Nearer(FailurePredictor):
    \"\"\"Distance to the mean of the rows without labels.\"\"\"

    name: ClassVar[str] = "nearer"
    summary: ClassVar[str] = "distance to the mean of rows without labels"
    reference: ClassVar[str] = "nobody, never"
    uses_unlabelled: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ("mean",)

    def _learn(self, train, failure, validation):
        more = train.unlabelled
        mean = more.image_rows(torch.arange(len(more))).mean(0)
        return Learnt({"mean": mean}, {"n_more": len(more)})

    def _score(self, batch):
        return (batch.image - self.tensor("mean", batch.image.device)).norm(dim=1)
"""


@pytest.fixture
def run(tmp_path: Path):
    """Return the command line for a user who has the module ``runner_up`` on the path."""
    (tmp_path / "runner_up.py").write_text(METHOD)
    (tmp_path / "with_more.py").write_text(WITH_MORE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return functools.partial(run_process, PYTHONPATH=path)


@pytest.mark.slow
def test_a_method_from_outside_is_listed_fitted_and_scored(run, tmp_path: Path) -> None:
    embed(dataset(80), FakeBackbone(), tmp_path / "data", names=NAMES)
    assert "runner-up" not in run("list", "predictors").stdout
    plugin = ("--plugin", "runner_up")
    listed = json.loads(run(*plugin, "list", "predictors", "--json").stdout)
    assert [row["what it is"] for row in listed if row["name"] == "second"] == [
        "probability of the runner-up"
    ]
    run(*plugin, "fit", tmp_path / "data", "-o", tmp_path / "second", "--method", "second")
    run(*plugin, "score", tmp_path / "second", tmp_path / "data", "-o", tmp_path / "scores.parquet")
    expected = [
        np.sort(batch.logits.softmax(dim=1).numpy())[:, -2]
        for batch in open_source(tmp_path / "data").batches(80)
    ]
    found = Outcomes.load(tmp_path / "scores.parquet").uncertainty
    assert found == pytest.approx(
        np.concatenate(expected), abs=1e-6
    )  # float32 logits from another block
    done = run(
        "score", tmp_path / "second", tmp_path / "data", "-o", tmp_path / "none.parquet", code=3
    )
    assert "Give --plugin runner_up" in done.stderr


@pytest.mark.slow
def test_a_method_gets_the_rows_without_labels_that_it_asks_for(run, tmp_path: Path) -> None:
    for name, n in (("data", 80), ("more", 50)):
        embed(
            dataset(n, unlabelled=range(50) if name == "more" else ()),
            FakeBackbone(),
            tmp_path / name,
            names=NAMES,
        )
    fit = (
        "--plugin",
        "with_more",
        "fit",
        tmp_path / "data",
        "-o",
        tmp_path / "nearer",
        "--method",
        "nearer",
    )
    run(*fit, "--unlabelled", tmp_path / "more")
    assert json.loads((tmp_path / "nearer" / "predictor.json").read_text())["notes"]["n_more"] == 50
    assert "nothing to do" in run(*fit, "--unlabelled", tmp_path / "more").stderr
    assert "holds another predictor" in run(*fit, "--unlabelled", tmp_path / "data", code=2).stderr
    refused = run(
        "fit",
        tmp_path / "data",
        "-o",
        tmp_path / "x",
        "--method",
        "lvu",
        "--unlabelled",
        tmp_path / "more",
        code=2,
    )
    assert "lvu does not use --unlabelled" in refused.stderr


def test_a_plugin_that_is_not_there_is_a_sentence(run) -> None:
    done = run("--plugin", "nothing_of_this_name", "list", "predictors", code=2)
    assert "the plugin 'nothing_of_this_name' cannot be imported" in done.stderr
