"""``vilu calibrate`` and the decisions from ``vilu score``, through the real command line on
noise.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vilu
from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from tests.command import run
from vilu.artifacts.documents import write_json
from vilu.embeddings.memory import Embeddings
from vilu.errors import ProvenanceError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.persistence.storage import load_predictor
from vilu.report.page.choice import read_calibrated
from vilu.store.embed import embed

PHOTOS = Path(str(resources.files("vilu").joinpath("assets", "clothing.parquet")))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write stores with training, calibration and new rows, and a fitted predictor."""
    folder = tmp_path_factory.mktemp("calibrate")
    for name, first, n in (("train", 0, 90), ("calibration", 90, 120), ("new", 210, 40)):
        data = dataset(n)
        data.blobs = dataset(first + n).blobs[first:]
        data.keys = [f"{name}/{i}.png" for i in range(n)]
        embed(data, FakeBackbone(), folder / name, names=NAMES)
    vilu.ViLU(hidden=(8,), epochs=2).fit(vilu.open_source(folder / "train")).save(folder / "fitted")
    return folder


@pytest.fixture
def predictor(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "fitted", tmp_path / "predictor"))


def test_calibrated_scores_say_what_to_do(work: Path, predictor: Path) -> None:
    target = ("--max-risk", 0.8, "--confidence", 0.9)  # on noise, two answers in three are wrong
    done = run("calibrate", predictor, work / "calibration", *target)
    assert "probability: platt (log-loss in cross-validation: temperature 0." in done.stdout
    assert "with confidence 90% at most 80.00% of the accepted answers are wrong" in done.stdout
    record = json.loads((predictor / "risk.json").read_text())
    rows = Outcomes.load(predictor / "calibration.parquet")
    selector = vilu.certify(rows, max_risk=0.8, confidence=0.9)
    assert record["rule"] == selector.model_dump(mode="json")
    assert (record["n"], record["dataset"]) == (120, "calibration")

    run("score", predictor, work / "new", "-o", predictor / "scores.parquet")
    scores = Outcomes.load(predictor / "scores.parquet")
    accepted = selector.accept(scores.uncertainty)
    assert scores.decision == tuple(np.where(accepted, "accept", "review"))
    assert scores.decision_reason == tuple(None if yes else "above_threshold" for yes in accepted)
    loaded = load_predictor(predictor)
    assert scores.failure_probability == pytest.approx(
        loaded.failure_probability(scores.uncertainty), abs=0
    )
    assert scores.provenance["risk"]

    run("score", predictor, work / "new", "-o", predictor / "folder")  # in parts, and as text
    run("score", predictor, work / "new", "-o", predictor / "scores.csv")
    for other in (
        vilu.ScoreFolder(predictor / "folder").outcomes(),
        Outcomes.load(predictor / "scores.csv"),
    ):
        assert (other.decision, other.decision_reason) == (scores.decision, scores.decision_reason)
        assert other.failure_probability == pytest.approx(scores.failure_probability, rel=1e-12)


def test_out_of_reach_changes_nothing(work: Path, predictor: Path) -> None:
    before = {path.name: path.read_bytes() for path in predictor.iterdir()}
    done = run("calibrate", predictor, work / "calibration", "--max-risk", 0.001, code=4)
    assert (
        "0.10% needs 2,996 accepted answers without a wrong one, but there are 120 rows"
        in done.stderr
    )
    assert "At least 2,996 calibration rows are needed" in done.stderr
    assert done.stdout == ""
    after = {path.name: path.read_bytes() for path in predictor.iterdir() if path.name != ".lock"}
    after.pop("looks.json")  # the earlier look at these rows is still recorded
    assert after == before


def test_training_rows_are_refused(work: Path, predictor: Path) -> None:
    done = run("calibrate", predictor, work / "train", "--max-risk", 0.8, code=3)
    assert (
        "90 of 90 calibration rows were used to fit this vilu ('train/0.png', 'train/1.png', "
        "'train/2.png', ...)" in done.stderr
    )


def test_a_rule_of_another_predictor_is_refused(work: Path, predictor: Path) -> None:
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.8)
    kept = {name: (predictor / name).read_bytes() for name in ("risk.json", "calibration.parquet")}
    vilu.ViLU(hidden=(8,), epochs=1).fit(vilu.open_source(work / "train")).save(predictor)
    assert not any((predictor / name).exists() for name in kept)
    for name, content in kept.items():
        (predictor / name).write_bytes(content)
    done = run("score", predictor, work / "new", "-o", predictor / "scores.parquet", code=6)
    assert "was made for the predictor" in done.stderr
    assert not (predictor / "scores.parquet").exists()
    with pytest.raises(ProvenanceError, match="was made for the predictor"):
        vilu.Monitor.of_folder(predictor)
    with pytest.raises(ProvenanceError, match="was made for the predictor"):
        read_calibrated(predictor)


def test_a_calibration_outlives_an_upgrade(work: Path, predictor: Path, monkeypatch) -> None:
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.8)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet")
    load_predictor(predictor).save(predictor)  # the same fit, written by the other version
    assert json.loads((predictor / "predictor.json").read_text())["vilu"] == "99.0"
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet")


def test_other_candidates_are_another_problem(work: Path, predictor: Path) -> None:
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.8)
    loaded, new = load_predictor(predictor), vilu.open_source(work / "new")
    fewer = Embeddings(
        new.image_rows(new.usable_rows), new.candidates(new.usable_rows).text[:2], space=new.space
    )
    with pytest.raises(
        ProvenanceError, match=r"with 3 candidates \(names [0-9a-f]+\), and these have 2 candidates"
    ):
        vilu.score(loaded, fewer, calibration=vilu.Calibration.load(predictor))


def test_selection_label_sets_and_classes(work: Path, predictor: Path) -> None:
    done = run(
        "calibrate",
        predictor,
        work / "calibration",
        "--max-risk",
        0.9,
        "--method",
        "selection",
        "--label-sets",
        "aps",
    )
    assert "accepts what it can of a batch" in done.stdout
    assert "label sets: aps" in done.stdout
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet")
    scores = Outcomes.load(predictor / "scores.parquet")
    assert {text for text in scores.decision_reason if text} <= {"not_selected"}
    sets = [json.loads(text) for text in scores.label_set]
    assert all(set(one) <= set(NAMES) and one for one in sets)
    done = run("score", predictor, work / "new", "-o", predictor / "folder", code=2)
    assert "judge all rows of a batch together: there is no decision about one image" in done.stderr

    again = (
        "calibrate",
        predictor,
        work / "calibration",
        "--max-risk",
        0.9,
        "--per-class",
        "--json",
    )
    assert "is calibrated already" in run(*again, code=2).stderr
    done = run(*again, "--overwrite")
    rule = json.loads(done.stdout)["rule"]
    assert rule["grouped_by"] == "prediction"
    assert set(rule["thresholds"]) <= {*NAMES, "(other)"}
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet", code=2)
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet", "--overwrite")
    scores = Outcomes.load(predictor / "scores.parquet")
    limits = {name: one["threshold"] for name, one in rule["thresholds"].items()}
    for row, code in enumerate(scores.prediction):
        limit = limits.get(NAMES[code], limits.get("(other)"))
        assert (scores.decision[row] == "accept") == (
            limit is not None and scores.uncertainty[row] <= limit
        )


def test_probabilities_alone_and_a_coverage(work: Path, predictor: Path) -> None:
    assert "decision" not in run("calibrate", predictor, work / "calibration").stdout
    run("score", predictor, work / "new", "-o", predictor / "scores.parquet")
    scores = Outcomes.load(predictor / "scores.parquet")
    assert scores.decision is None
    assert scores.failure_probability is not None
    done = run("calibrate", predictor, work / "calibration", "--min-coverage", 0.5, "--overwrite")
    assert "of the accepted answers are wrong" in done.stdout


def test_wrong_arguments(work: Path, predictor: Path) -> None:
    assert "Usage" in run("calibrate", "--help").stdout
    run("monitor", predictor, work / "nothing.parquet", code=2)
    done = run("monitor", predictor, predictor / "README.md", code=4)
    assert "there is no guarantee to watch" in done.stderr
    run("calibrate", predictor, work / "calibration", "--max-risk", 1.5, code=2)
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.0, code=2)
    run("calibrate", predictor, work / "nothing", "--max-risk", 0.1, code=2)
    run(
        "calibrate",
        predictor,
        work / "calibration",
        "--method",
        "selection",
        "--min-coverage",
        0.5,
        code=2,
    )
    run("calibrate", predictor, work / "calibration", "--per-class", code=2)
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.01, "--max-miss", 0.5, code=2)
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.01, "--method", "selection")
    hopeless = ("--max-risk", 0.001, "--method", "selection", "--overwrite")
    run("calibrate", predictor, work / "calibration", *hopeless, code=4)
    write_json(predictor / "risk.json", {"kind": "risk"})
    done = run("score", predictor, work / "new", "-o", predictor / "x.parquet", code=3)
    assert "risk.json is damaged" in done.stderr
    write_json(predictor / "risk.json", {"schema_version": 7})
    assert (
        "schema version 7"
        in run("score", predictor, work / "new", "-o", predictor / "x.parquet", code=6).stderr
    )


def test_a_row_is_its_picture_and_not_its_name(tmp_path: Path) -> None:
    """A row must be recognized by its picture, not by its name.

    Two folders have photos with equal names. The predictor is fitted on one folder and calibrated
    on the other. A third folder holds the fitted photos under other names, and its calibration must
    be refused.
    """
    photos = pq.read_table(PHOTOS, columns=["image"])["image"].to_pylist()
    for name, first, start in (("train", 0, 0), ("calibration", 40, 0), ("renamed", 0, 500)):
        for i in range(40):
            path = tmp_path / name / ("dress", "shirt")[i % 2] / f"{start + i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photos[first + i])
        run("embed", tmp_path / name, "-o", tmp_path / "emb" / name, "--backbone", "compact:64")
    settings = ("--set", "epochs=1", "--set", "hidden=4", "--set", "allow_degenerate=true")
    run("fit", tmp_path / "emb/train", "-o", tmp_path / "p", "--method", "vilu", *settings)
    assert json.loads((tmp_path / "p/predictor.json").read_text())["seen_by"] == [
        "pictures",
        "names",
    ]
    done = run("calibrate", tmp_path / "p", tmp_path / "emb/renamed", code=3)
    assert (
        "40 of 40 calibration rows were used to fit this vilu ('dress/500.jpg', 'dress/502.jpg'"
        in done.stderr
    )
    done = run("calibrate", tmp_path / "p", tmp_path / "emb/calibration")
    assert "used to fit" not in done.stderr
    assert json.loads((tmp_path / "p/risk.json").read_text())["n"] == 40
    done = run("score", tmp_path / "p", tmp_path / "emb/renamed", "-o", tmp_path / "scores.parquet")
    assert "40 of 40 rows were used to fit this vilu" in done.stderr


@pytest.mark.parametrize("n_shared", [1, 2])
def test_a_hundredth_of_the_rows_is_left_out(
    work: Path, predictor: Path, tmp_path: Path, n_shared: int
) -> None:
    """Up to 1 % shared rows are left out, and more are refused.

    One row in 120 is 0.8 %, two rows are 1.7 %.
    """
    data = dataset(210)
    data.blobs = data.blobs[:n_shared] + data.blobs[90 + n_shared :]
    data.labels, data.keys = [i % 3 for i in range(120)], [f"new/{i}.png" for i in range(120)]
    embed(data, FakeBackbone(), tmp_path / "mixed", names=NAMES)
    target = ("--max-risk", 0.8, "--confidence", 0.9, "--label-sets", "lac")
    done = run("calibrate", predictor, tmp_path / "mixed", *target, code=0 if n_shared == 1 else 3)
    if n_shared == 2:
        message = (
            "2 of 120 calibration rows were used to fit this vilu ('new/0.png', "
            "'new/1.png'), more than 1%."
        )
        assert message in done.stderr
        assert not (predictor / "risk.json").exists()
        return
    assert (
        "1 of 120 calibration rows were used to fit this vilu ('new/0.png'); they are left out."
        in done.stderr
    )
    rows, risk = (
        Outcomes.load(predictor / "calibration.parquet"),
        json.loads((predictor / "risk.json").read_text()),
    )
    assert rows.ids == tuple(f"new/{i}.png" for i in range(1, 120))
    assert (risk["n"], risk["rule"]["thresholds"][""]["n"], risk["label_sets"]["n"]) == (
        119,
        119,
        119,
    )


def test_an_edited_rule_is_refused_by_all_who_use_it(
    work: Path, predictor: Path, tmp_path: Path
) -> None:
    """If a rule was edited, every command that uses the rule must refuse it.

    The digest shows the edit. If the digest agrees, or an old file has no digest, the calibration
    rows show the edit.
    """
    run("score", predictor, work / "new", "-o", tmp_path / "plain.parquet")
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.8, "--confidence", 0.9)
    users = (
        ("score", predictor, work / "new", "-o", tmp_path / "x.parquet"),
        ("monitor", predictor, tmp_path / "plain.parquet"),
        ("report", tmp_path / "plain.parquet", "--predictor", predictor, "-o", tmp_path / "x.html"),
        ("inspect", predictor),
        ("push", predictor, tmp_path / "hub"),
        ("pull", predictor, "-o", tmp_path / "pulled"),
    )
    record = json.loads((predictor / "risk.json").read_text())
    record["rule"]["thresholds"][""]["threshold"] = 0.99999
    (predictor / "risk.json").write_text(json.dumps(record))
    for user in users:
        assert (
            "risk.json is damaged: its content is not what its digest says"
            in run(*user, code=3).stderr
        )
    write_json(predictor / "risk.json", record)
    for user in users[:4]:
        assert (
            "which does not follow from calibration.parquet. Run `vilu calibrate` again"
            in run(*user, code=3).stderr
        )
    assert not any((tmp_path / name).exists() for name in ("x.parquet", "x.html", "hub", "pulled"))


def test_an_edited_calibrator_is_refused(work: Path, predictor: Path, tmp_path: Path) -> None:
    run("calibrate", predictor, work / "calibration")
    record = json.loads((predictor / "predictor.json").read_text())
    record["calibrator"]["weights"][0] *= 3
    (predictor / "predictor.json").write_text(json.dumps(record))
    (predictor / "risk.json").unlink()
    done = run("score", predictor, work / "new", "-o", tmp_path / "x.parquet", code=3)
    assert (
        "predictor.json is damaged: its content is not what its fingerprint says. "
        "Run `vilu fit` again" in done.stderr
    )


@pytest.mark.parametrize("how", ["stale", "cut", "other rows"])
def test_push_and_pull_check_the_calibration(
    how: str, work: Path, predictor: Path, tmp_path: Path
) -> None:
    run("calibrate", predictor, work / "calibration", "--max-risk", 0.8, "--confidence", 0.9)
    code, said = 3, "risk.json is damaged"
    if how == "cut":
        (predictor / "risk.json").write_bytes((predictor / "risk.json").read_bytes()[:-40])
    elif how == "stale":
        shutil.copy(work / "fitted/predictor.json", predictor)
        code, said = 6, "was made for another predictor than the one beside it"
    else:
        shutil.copy(predictor / "calibration.parquet", tmp_path / "rows.parquet")
        (predictor / "calibration.parquet").write_bytes(b"PAR1" + b"x" * 50 + b"PAR1")
        said = "calibration.parquet does not hold the rows that risk.json names"
    for words in (
        ("push", predictor, tmp_path / "hub"),
        ("pull", predictor, "-o", tmp_path / "pulled"),
    ):
        done = run(*words, code=code)
        assert said in done.stderr
        assert "Run `vilu calibrate` again" in done.stderr
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / "pulled").exists()
