"""Test ``vilu serve`` with a predictor for tables: rows in, decisions out, and their audit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

import vilu
from tests.command import run
from tests.service.conftest import hosted
from tests.tables.answers import columns, written
from vilu.errors import UsageError
from vilu.service.limits import ClientLimits
from vilu.service.setup import Setup, load_engine

pytest.importorskip("fastapi")

ONE_SCORE = ("id", "score_a", "correct")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    path = written(folder / "one.csv", columns(800), ONE_SCORE)
    run("calibrate", path, "--max-risk", 0.1, "-o", folder / "calibration")
    return folder / "calibration"


def test_rows_are_decided_on_and_audited(calibration: Path, tmp_path: Path) -> None:
    new = columns(200, 5000)
    body = {"id": new["id"], "numbers": {"score_a": new["score_a"].tolist()}}
    rule = vilu.Calibration.load(calibration).rule
    expected = rule.accept(-new["score_a"])
    with hosted(calibration, tmp_path / "state") as service:
        replied = service.post("/v1/scores", json=body)
        assert replied.status_code == 200, replied.text
        answers = replied.json()["answers"]
        accepted = [answer["decision"] == "accept" for answer in answers]
        assert accepted == expected.tolist()
        assert [answer["uncertainty"] for answer in answers] == (-new["score_a"]).tolist()
        # the same rows do not count twice
        assert service.post("/v1/scores", json=body).status_code == 200
        (monitor,) = service.get("/v1/monitor").json()["monitors"]
        assert monitor["status"]["rows"] == 200
        assert "error rate" in monitor["guarantee_text"] or "wrong" in monitor["guarantee_text"]

        rows = [answer["row"] for answer in answers]
        truth = dict(zip(rows, map(str, new["correct"].tolist()), strict=True))
        audited = service.post("/v1/labels", json={"labels": truth}).json()["audited"]
        assert audited[0]["new"] == 200
        status = service.get("/v1/monitor").json()["monitors"][0]["status"]
        assert status["audit"]["n"] == expected.sum()
        assert status["audit"]["wrong"] == (new["correct"][expected] == 0).sum()
        contradiction = {"labels": {rows[0]: str(1 - new["correct"][0])}}
        refused = service.post("/v1/labels", json=contradiction)
        assert refused.status_code == 409
        assert "has the label" in refused.json()["detail"]
        unknown = service.post("/v1/labels", json={"labels": {rows[0]: "yes"}})
        assert "neither 1 (right) nor 0 (wrong)" in unknown.json()["detail"]
    with hosted(calibration, tmp_path / "state") as service:  # a restart keeps rows and labels
        status = service.get("/v1/monitor").json()["monitors"][0]["status"]
        assert (status["rows"], status["audit"]["n"]) == (200, expected.sum())


def test_an_id_that_is_used_again_for_another_answer_is_another_row(
    calibration: Path, tmp_path: Path
) -> None:
    """Clients that name every row "a" must not blind the monitor."""
    with hosted(calibration, tmp_path / "state") as service:
        for score in (*range(-100, -50), -100):
            body = {"id": ["a"], "numbers": {"score_a": [float(score)]}}
            assert service.post("/v1/scores", json=body).status_code == 200
        (monitor,) = service.get("/v1/monitor").json()["monitors"]
    assert monitor["status"]["rows"] == 50  # the last row is the first one again
    assert monitor["guarantee"] == "void"


def test_commas_in_ids_are_no_numbers(calibration: Path, tmp_path: Path) -> None:
    body = {"id": ["page 1, line 2", 'a "word", too'], "numbers": {"score_a": [0.1, 0.2]}}
    with hosted(calibration, tmp_path / "state", max_images=2) as service:
        assert service.post("/v1/scores", json=body).status_code == 200
        three = {"id": ["a", "b", "c"], "numbers": {"score_a": [0.1, 0.2, 0.3]}}
        assert service.post("/v1/scores", json=three).status_code == 413


def test_labels_of_answers_in_clusters_are_counted(tmp_path: Path) -> None:
    content = {**columns(800), "cluster": [f"page{row // 4}" for row in range(800)]}
    path = written(tmp_path / "t.csv", content, (*ONE_SCORE, "answer", "cluster"))
    run("calibrate", path, "--max-risk", 0.1, "-o", tmp_path / "calibration")
    new = columns(20, 5000)
    body = {"id": new["id"], "numbers": {"score_a": new["score_a"].tolist()}}
    with hosted(tmp_path / "calibration", tmp_path / "state") as service:
        answers = service.post("/v1/scores", json=body).json()["answers"]
        rows = [answer["row"] for answer in answers]
        truth = dict(zip(rows, map(str, new["correct"].tolist()), strict=True))
        labelled = service.post("/v1/labels", json={"labels": truth})
        assert labelled.status_code == 200, labelled.text
        assert labelled.json()["audited"][0]["new"] == 20


def test_wrong_requests_are_refused_in_words(calibration: Path, tmp_path: Path) -> None:
    with hosted(calibration, tmp_path / "state") as service:
        for body, detail in (
            ({"id": ["a"], "numbers": {"score_b": [0.1]}}, "Missing: score_a"),
            ({"id": ["a", "a"], "numbers": {"score_a": [0.1, 0.2]}}, "needs an id of its own"),
            ({"id": ["a"], "numbers": {"score_a": [0.1, 0.2]}}, "one length"),
            ({"embeddings": [[0.1]]}, "id"),
        ):
            refused = service.post("/v1/scores", json=body)
            assert refused.status_code == 422
            assert detail in refused.json()["detail"]
        images = service.post("/v1/answers", json={"images": [""]})
        assert images.status_code == 404
        assert "POST /v1/scores" in images.json()["detail"]
        assert service.get("/readyz").status_code == 200


def test_what_is_for_images_is_refused(calibration: Path, tmp_path: Path) -> None:
    refused = pytest.raises(UsageError, match="--keep is for images")
    with refused, hosted(calibration, tmp_path / "state", keep=tmp_path / "kept"):
        pass
    setup = Setup(calibration, None, tmp_path / "state", ClientLimits(), None, precision="bf16")
    with pytest.raises(UsageError, match="--precision is for images"):
        load_engine(setup)
    open_paths = [Path(file.path) for file in psutil.Process().open_files()]
    assert [path for path in open_paths if path.is_relative_to(tmp_path)] == []


def test_a_probe_is_served_with_its_features(tmp_path: Path) -> None:
    path = written(tmp_path / "fit.csv", columns(400, features=40))
    predictor = tmp_path / "probe"
    run("fit", path, "--method", "answer_probe", "-o", predictor)
    new = columns(20, 5000, features=40)
    names = ("score_a", "uncertainty_b", "width")
    body = {"id": new["id"], "numbers": {name: new[name].tolist() for name in names}}
    with hosted(predictor, tmp_path / "state") as service:
        missing = service.post("/v1/scores", json=body)
        assert missing.status_code == 422
        assert "this table has none" in missing.json()["detail"]
        replied = service.post("/v1/scores", json=body | {"features": new["features"].tolist()})
        probabilities = [answer["failure_probability"] for answer in replied.json()["answers"]]
    expected = vilu.load(predictor).predict_failure_probability(vilu.open_table(new))
    assert probabilities == pytest.approx(expected, abs=1e-6)  # features are float32
