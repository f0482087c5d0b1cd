"""Tables of answers through the command line, from the file to decisions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import vilu
from tests.command import run
from tests.tables.answers import columns, table, written
from vilu.outcomes.outcomes import Outcomes

ONE_SCORE = ("id", "score_a", "correct")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables to fit, to calibrate and to test on, and those of one column."""
    folder = tmp_path_factory.mktemp("tables")
    written(folder / "fit.csv", columns(500))
    written(folder / "calibration.csv", columns(800, 1000))
    written(folder / "test.csv", columns(1000, 2000))
    written(folder / "one.csv", columns(800, 1000), ONE_SCORE)
    written(folder / "new.csv", columns(1000, 2000), ONE_SCORE)
    return folder


def test_one_column_of_scores_needs_no_fit(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    command = ("calibrate", work / "one.csv", "--max-risk", 0.05, "-o", folder)
    done = run(*command)
    assert "with confidence 95% at most 5.00% of the accepted answers are wrong" in done.stdout
    data = vilu.open_table(work / "one.csv")
    by_hand = vilu.certify(Outcomes(-data.numbers["score_a"], data.failure), max_risk=0.05)
    assert vilu.Calibration.load(folder).rule.threshold == by_hand.threshold
    assert "there is nothing to do" in run(*command).stderr
    refused = run("calibrate", work / "one.csv", "--max-risk", 0.1, "-o", folder, code=2)
    assert "--overwrite" in refused.stderr

    scores = tmp_path / "scores.csv"
    run("score", folder, work / "new.csv", "-o", scores)
    outcomes = Outcomes.load(scores)
    uncertainty = -vilu.open_table(work / "new.csv").numbers["score_a"]
    assert outcomes.uncertainty.tolist() == uncertainty.tolist()
    accepted = [decision == "accept" for decision in outcomes.decision]
    assert accepted == by_hand.accept(uncertainty).tolist()
    assert outcomes.ids[0] == "row2000"

    evaluated = json.loads(run("evaluate", scores, "--json").stdout)
    auroc = next(row["value"] for row in evaluated if row["metric"] == "auroc")
    assert auroc == pytest.approx(vilu.metrics.auroc(uncertainty, table(1000, 2000).failure))
    assert "holds" in run("monitor", folder, scores).stdout


def test_several_columns_are_fitted_first(work: Path, tmp_path: Path) -> None:
    predictor = tmp_path / "predictor"
    fit = ("fit", work / "fit.csv", "-o", predictor)
    assert "answer_scores fitted on 500 rows" in run(*fit).stderr
    assert "there is nothing to do" in run(*fit).stderr
    run("calibrate", predictor, work / "calibration.csv", "--max-risk", 0.05)
    scores = tmp_path / "scores.parquet"
    run("score", predictor, work / "test.csv", "-o", scores)
    model = vilu.load(predictor)
    expected = model.predict(vilu.open_table(work / "test.csv"))
    assert Outcomes.load(scores).uncertainty.tolist() == expected.uncertainty.tolist()
    run("score", predictor, work / "test.csv", "-o", tmp_path / "parts")
    parts = vilu.ScoreFolder(tmp_path / "parts").outcomes()
    assert parts.uncertainty.tolist() == expected.uncertainty.tolist()
    assert parts.decision == expected.decision


def test_features_beside_the_table_are_read_and_watched(tmp_path: Path) -> None:
    """New features are new inputs, although the table itself is the same file."""
    content = columns(500, features=40)
    path = written(tmp_path / "fit.csv", content)
    predictor = tmp_path / "predictor"
    fit = ("fit", path, "--method", "answer_probe", "-o", predictor)
    run(*fit)
    assert vilu.load(predictor).notes_["n_features"] == 40
    assert "there is nothing to do" in run(*fit).stderr
    np.save(tmp_path / "fit.features.npy", content["features"] + 1)
    assert "--overwrite" in run(*fit, code=2).stderr


def test_what_cannot_be_done_says_what_can(work: Path, tmp_path: Path) -> None:
    several = run("calibrate", work / "fit.csv", "--max-risk", 0.1, "-o", tmp_path / "c", code=2)
    assert "the columns score_a, uncertainty_b" in several.stderr
    assert "vilu fit TABLE" in several.stderr
    assert "needs -o FOLDER" in run("calibrate", work / "one.csv", code=2).stderr
    flags = run("fit", work / "fit.csv", "--pool-size", 8, "-o", tmp_path / "p", code=2)
    assert "is a table of answers" in flags.stderr
    wrong = run("fit", work / "fit.csv", "--method", "mcm_ts", "-o", tmp_path / "p", code=2)
    assert "for which there are answer_scores, answer_probe, answer_score" in wrong.stderr
    shots = run("fit", work / "fit.csv", "--shots", 2, "-o", tmp_path / "p", code=2)
    assert "--shots and --pseudo are about classes" in shots.stderr
    assert not (tmp_path / "p").exists()
    run("fit", work / "fit.csv", "-o", tmp_path / "p")
    seen = run("calibrate", tmp_path / "p", work / "fit.csv", "--max-risk", 0.1, code=3)
    assert "500 of 500 calibration rows were used to fit" in seen.stderr
    alone = run("calibrate", tmp_path / "p", code=2)
    assert "STORE is missing" in alone.stderr
    both = run("calibrate", tmp_path / "p", work / "one.csv", "-o", tmp_path / "c", code=2)
    assert "Leave -o out" in both.stderr
    hopeless = run("calibrate", work / "one.csv", "--max-risk", 0.001, "-o", tmp_path / "c", code=4)
    assert "would be needed" in hopeless.stderr or "are needed" in hopeless.stderr
