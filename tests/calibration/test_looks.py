"""Test that targets on the same rows are counted, and that the guarantee states the count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vilu
from tests.builders.bench_fakes import make_store
from tests.conftest import toy_embeddings
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.app import app
from vilu.errors import DataError, InfeasibleError
from vilu.predictors.persistence.hub import push


def test_looks_at_the_same_rows_are_counted(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data = toy_embeddings(n=400)
    risks = (0.4, 0.45, 0.5, 0.45)
    records = [calibrate_predictor(tmp_path, data, Target(max_risk=risk)) for risk in risks]
    assert [record.looks for record in records] == [None, 2, 3, 3]
    assert "look" not in records[0].guarantee_text
    assert "second look at these rows: 2 targets were tried" in records[1].guarantee_text
    assert "third look at these rows" in records[2].guarantee_text
    assert "third look at these rows" in (tmp_path / "README.md").read_text()
    assert Calibration.load(tmp_path) == records[3]


def test_a_look_that_ended_without_a_guarantee_counts(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data = toy_embeddings(n=400)
    for risk in (0.001, 0.002):
        with pytest.raises(InfeasibleError, match="No rule was written"):
            calibrate_predictor(tmp_path, data, Target(max_risk=risk))
    assert calibrate_predictor(tmp_path, data, Target(max_risk=0.45)).looks == 3


def test_rows_that_are_the_same_but_for_a_few_are_the_same(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data, target = toy_embeddings(n=600), Target(max_risk=0.45)
    calibrate_predictor(tmp_path, data.take(np.arange(400)), Target(max_risk=0.4))
    assert calibrate_predictor(tmp_path, data.take(np.arange(10, 400)), target).looks == 2
    assert calibrate_predictor(tmp_path, data.take(np.arange(400, 600)), target).looks is None


def test_another_fit_begins_anew_and_probabilities_are_no_look(tmp_path: Path) -> None:
    data, target = toy_embeddings(n=400, seed=1), Target(max_risk=0.45)
    for seed in (2, 3):
        vilu.PREDICTORS["knn_vote"](k=3).fit(toy_embeddings(60, seed=seed)).save(tmp_path)
        calibrate_predictor(tmp_path, data, Target())
        assert calibrate_predictor(tmp_path, data, target).looks is None
        assert calibrate_predictor(tmp_path, data, Target(max_risk=0.4)).looks == 2


def test_looks_go_with_a_predictor_and_damage_to_them_is_said(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path / "p")
    data = toy_embeddings(n=400)
    calibrate_predictor(tmp_path / "p", data, Target(max_risk=0.4))
    push(tmp_path / "p", str(tmp_path / "shelf"))
    assert calibrate_predictor(tmp_path / "shelf", data, Target(max_risk=0.45)).looks == 2
    path = tmp_path / "p" / "looks.json"
    path.write_text(path.read_text().replace('"looks"', '"lookz"'))
    with pytest.raises(DataError, match=r"looks\.json is damaged"):
        calibrate_predictor(tmp_path / "p", data, Target(max_risk=0.45))


def test_overwriting_loses_no_look(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 400, 0)
    vilu.MCM().save(tmp_path / "p")
    for share, words in (("0.5", "wrong of"), ("0.6", "second look"), ("0.7", "third look")):
        command = ["calibrate", tmp_path / "p", store, "--min-coverage", share, "--overwrite"]
        done = CliRunner().invoke(app, [str(part) for part in command])
        assert done.exit_code == 0, done.output
        assert words in done.output
