"""Test that a calibration is accepted only if its rows and its target lead to it again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vilu
from tests.conftest import toy_embeddings
from vilu.artifacts.documents import write_json
from vilu.errors import DataError, ProvenanceError
from vilu.predictors.persistence.storage import load_predictor

TARGETS = {
    "ltt": vilu.Target(max_risk=0.3),
    "crc": vilu.Target(max_risk=0.2, method="crc"),
    "selection": vilu.Target(max_risk=0.3, method="selection"),
    "coverage": vilu.Target(min_coverage=0.7),
    "per class": vilu.Target(max_risk=0.4, confidence=0.8, per_class=True),
    "shares": vilu.Target(
        max_risk=0.35, class_shares={f"class {number}": 0.2 for number in range(5)}
    ),
    "probabilities": vilu.Target(),
}


def calibrated(folder: Path, target: vilu.Target, n: int = 1500) -> vilu.Calibration:
    vilu.MCM().save(folder)
    return vilu.calibrate_predictor(folder, toy_embeddings(n), target)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_loaded_is_what_was_made(name: str, tmp_path: Path) -> None:
    made = calibrated(tmp_path, TARGETS[name])
    loaded = vilu.Calibration.load(tmp_path)
    assert loaded == made
    assert loaded.target == TARGETS[name]
    assert loaded.probability == load_predictor(tmp_path).calibrator_
    assert np.array_equal(loaded.rows.uncertainty, made.rows.uncertainty)


def edit_first(rule: dict[str, Any], name: str, value: object) -> None:
    rule["thresholds"][""][name] = value


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a laxer threshold": lambda record: edit_first(record["rule"], "threshold", 0.99999),
    "a floor": lambda record: edit_first(record["rule"], "floor", 1e-6),
    "fewer wrong ones": lambda record: edit_first(record["rule"], "n_wrong", 0),
    "other accepted ones": lambda record: edit_first(record["rule"], "n_accepted", 1),
    "other rows": lambda record: edit_first(record["rule"], "n", 7),
    "a better bound": lambda record: edit_first(record["rule"], "risk_bound", 1e-6),
    "a confidence": lambda record: record["rule"].update(confidence=1 - 1e-12),
    "a risk": lambda record: record["rule"].update(max_risk=1e-6),
    "a method": lambda record: record["rule"].update(method="crc"),
    "a target": lambda record: record["target"].update(max_risk=0.01),
    "both confidences": lambda record: [
        record[part].update(confidence=0.999999) for part in ("rule", "target")
    ],
    "no target": lambda record: record["target"].update(max_risk=None),
    "a risk below 0": lambda record: record["target"].update(max_risk=-0.2),
    "a coverage of 0": lambda record: record["target"].update(min_coverage=0),
    "a confidence of 1": lambda record: record["target"].update(confidence=1),
    "a count": lambda record: record.update(n=3),
    "rows left out": lambda record: record.update(near_copies=[0, 1, 2]),
    "rows that are not there": lambda record: record.update(near_copies=[10**6]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_with_a_right_digest_is_refused(name: str, tmp_path: Path) -> None:
    calibrated(tmp_path, vilu.Target(max_risk=0.18))
    path = tmp_path / "risk.json"
    record = json.loads(path.read_text())
    EDITS[name](record)
    write_json(path, record)
    with pytest.raises(DataError, match=r"risk\.json is damaged: .* does not follow from"):
        vilu.Calibration.load(tmp_path)


def test_other_scores_of_wrong_answers_are_refused(tmp_path: Path) -> None:
    calibrated(tmp_path, TARGETS["selection"])
    path = tmp_path / "risk.json"
    record = json.loads(path.read_text())
    del record["rule"]["wrong"][0]
    write_json(path, record)
    with pytest.raises(DataError, match="its rule has another wrong"):
        vilu.Calibration.load(tmp_path)


def test_an_older_schema_is_refused_in_words(tmp_path: Path) -> None:
    calibrated(tmp_path, vilu.Target(max_risk=0.3))
    path = tmp_path / "risk.json"
    write_json(path, {**json.loads(path.read_text()), "schema_version": 1})
    with pytest.raises(ProvenanceError, match=r"was made before vilu 0\.2\.0 \(schema 1\)"):
        vilu.Calibration.load(tmp_path)


def test_a_calibration_of_another_predictor_decides_nothing(tmp_path: Path) -> None:
    calibration = calibrated(tmp_path / "a", vilu.Target(max_risk=0.3))
    vilu.Entropy().save(tmp_path / "b")
    vilu.calibrate_predictor(tmp_path / "b", toy_embeddings(500, seed=3), vilu.Target())
    for predictor in (load_predictor(tmp_path / "b"), vilu.MCM()):
        with pytest.raises(ProvenanceError, match="Load both from one folder"):
            vilu.score(predictor, toy_embeddings(50), calibration=calibration)


def test_loading_ten_thousand_rows_takes_no_time_to_speak_of(tmp_path: Path) -> None:
    calibrated(tmp_path, vilu.Target(max_risk=0.3), 10_000)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        vilu.Calibration.load(tmp_path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
