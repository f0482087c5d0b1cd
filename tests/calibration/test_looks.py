"""Test that looks at the same rows are counted, and that the guarantee states the count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vilu
from tests.builders.bench_fakes import make_store
from tests.conftest import toy_embeddings
from vilu.artifacts.documents import write_document
from vilu.artifacts.hashing import digest
from vilu.calibration.calibration import Calibration
from vilu.calibration.looks import SKETCH_SIZE, LookRecord, RowsWithTargets, record_target
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.cli.app import app
from vilu.errors import DataError, InfeasibleError
from vilu.predictors.persistence.description import read_description
from vilu.predictors.persistence.files import LOOKS, PREDICTOR
from vilu.predictors.persistence.hub import push

TARGET: dict[str, object] = {"max_risk": 0.05}
OTHER_TARGET: dict[str, object] = {"max_risk": 0.1}
PICTURES = np.random.default_rng(0).integers(0, 2**63 - 1, 10_100)  # distinct hashes


def count_looks(folder: Path, looks: list[tuple[np.ndarray, dict[str, object]]]) -> list[int]:
    """Return the number of looks after each look (pictures and target), for a new predictor."""
    vilu.MCM().save(folder)
    return [record_target(folder, pictures, target) for pictures, target in looks]


def test_looks_at_the_same_rows_are_counted(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data = toy_embeddings(n=400)
    risks = (0.4, 0.45, 0.5, 0.45)
    records = [calibrate_predictor(tmp_path, data, Target(max_risk=risk)) for risk in risks]
    assert [record.looks for record in records] == [None, 2, 3, 3]
    assert "look" not in records[0].guarantee_text
    assert "second look at these rows: they were tested before" in records[1].guarantee_text
    assert "third look at these rows" in records[2].guarantee_text
    assert "third look at these rows" in (tmp_path / "README.md").read_text()
    assert Calibration.load(tmp_path) == records[3]


def test_a_look_that_ended_without_a_guarantee_counts(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data = toy_embeddings(n=400)
    for risk in (0.001, 0.002):
        with pytest.raises(
            InfeasibleError, match=r"No rule was written.*again, that is another look"
        ):
            calibrate_predictor(tmp_path, data, Target(max_risk=risk))
    assert calibrate_predictor(tmp_path, data, Target(max_risk=0.45)).looks == 3


def test_rows_that_are_the_same_but_for_a_few_are_the_same(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data, target = toy_embeddings(n=600), Target(max_risk=0.45)
    calibrate_predictor(tmp_path, data.take(np.arange(400)), Target(max_risk=0.4))
    assert calibrate_predictor(tmp_path, data.take(np.arange(10, 400)), target).looks == 2
    assert calibrate_predictor(tmp_path, data.take(np.arange(400, 600)), target).looks is None


def test_the_same_target_on_more_rows_is_another_look(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    data, target = toy_embeddings(n=2000), Target(max_risk=0.001)
    for n in (100, 150, 600, 2000):
        with pytest.raises(InfeasibleError):
            calibrate_predictor(tmp_path, data.take(np.arange(n)), target)
    reachable = Target(max_risk=0.45)
    assert calibrate_predictor(tmp_path, data, reachable).looks == 5
    assert calibrate_predictor(tmp_path, data, reachable).looks == 5  # nothing has changed
    fewer = data.take(np.arange(100, 600))
    assert calibrate_predictor(tmp_path, fewer, reachable).looks == 6


@pytest.mark.parametrize("n_added", [1, 100, 1000])
def test_a_target_returns_on_more_rows(n_added: int, tmp_path: Path) -> None:
    rows, more_rows = PICTURES[:2000], PICTURES[: 2000 + n_added]
    looks = [(rows, TARGET), (more_rows, OTHER_TARGET), (more_rows, TARGET)]
    assert count_looks(tmp_path, looks) == [1, 2, 3]


def test_rows_that_alternate_are_two_looks(tmp_path: Path) -> None:
    rows, more_rows = PICTURES[:2000], PICTURES[:3000]
    looks = [(pictures, TARGET) for pictures in (rows, more_rows, rows[::-1], more_rows)]
    assert count_looks(tmp_path, looks) == [1, 2, 2, 2]


def test_rows_with_equal_smallest_hashes_are_another_look(tmp_path: Path) -> None:
    rows = np.sort(PICTURES)
    assert count_looks(tmp_path, [(rows[:-1], TARGET), (rows, TARGET)]) == [1, 2]


def test_a_look_at_few_rows_does_not_hide_the_others(tmp_path: Path) -> None:
    rows = PICTURES[:2000]
    looks = [(rows, TARGET), (rows[:300], OTHER_TARGET), (rows[1000:], TARGET)]
    assert count_looks(tmp_path, looks) == [1, 2, 3]


def test_rows_that_grow_tenfold_at_once_are_recognised(tmp_path: Path) -> None:
    looks = [(PICTURES[:n], TARGET) for n in (10, 100, 1000, 10_000)]
    assert count_looks(tmp_path, looks) == [1, 2, 3, 4]


def test_looks_of_version_0_2_0_are_recognised(tmp_path: Path) -> None:
    vilu.MCM().save(tmp_path)
    rows, more_rows = PICTURES[:2000], PICTURES[:3000]
    old_looks = RowsWithTargets(
        hashes=tuple(np.sort(rows)[:SKETCH_SIZE].tolist()),
        targets=(digest(TARGET), digest(OTHER_TARGET)),  # without the rows
    )
    weights_sha256 = read_description(tmp_path / PREDICTOR)["weights_sha256"]
    record = LookRecord(weights_sha256=weights_sha256, rows=(old_looks,))
    write_document(tmp_path / LOOKS, record)
    looks = ((rows, TARGET), (rows, OTHER_TARGET), (more_rows, TARGET), (rows, TARGET))
    numbers = [record_target(tmp_path, pictures, target) for pictures, target in looks]
    assert numbers == [2, 2, 3, 3]
    assert record_target(tmp_path, more_rows, TARGET) == 3


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
